"""The settings of a network, and the smallest parts: linear map, norm, precisions. A library of
model.py and the other files here.
"""

from cli import require

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.tokens import EOS

MLPS = ("swiglu", "relu2")
# The matrices of a block beside which there can be an adapter: of self-attention, and of the MLP
LORA_TARGETS = ("query", "key", "value", "out", "up", "gate", "down")
CARRIED = 8  # likeliest tokens of a place that self-conditioning tells the next pass of
# What an older checkpoint means that does not say
OLDER = {"mlp": "relu2", "value_residual": False, "head_gates": False, "self_conditioning": 0.0}


@dataclass(frozen=True)
class ModelConfig:
    width: int = 384  # D
    heads: int = 6  # H; each is width / heads wide
    layers: int = 6
    vocab_size: int = 8192  # V
    max_len: int = 256  # longest row, in tokens
    mlp: str = "swiglu"  # or "relu2", the squared ReLU
    mlp_ratio: int = 4  # hidden width of the MLP, in units of D; of SwiGLU two thirds of it
    value_residual: bool = True  # every block's values are mixed with those of the first
    head_gates: bool = True  # every head of self-attention is weighed by what reads it
    qk_norm: bool = True
    neighbour_init: float = 4.0  # how strongly heads look at neighbours at first; 0: no biases
    causal: bool = False  # the autoregressive twin
    time_conditioning: str = "none"  # or "sinusoidal"
    tied_head: bool = True  # one matrix for the embedding and the vocabulary head
    dropout: float = 0.0  # after attention and MLP
    rope_base: float = 10_000.0
    draft_rank: int = 0  # of a DraftHead; 0: none
    # Share of the rows that are trained to read what an earlier pass made of them; 0: nothing can
    self_conditioning: float = 0.0
    lora_rank: int = 0  # of the adapters beside the matrices of the blocks; 0: none
    lora_alpha: float = 0.0  # what they add is multiplied by alpha / rank
    lora_targets: str = ""  # which matrices have one, by their names, with commas

    def __post_init__(self):
        require(self.width % self.heads == 0 and self.width // self.heads % 2 == 0,
                f"width {self.width} cannot be split into {self.heads} heads of even width")
        require(self.time_conditioning in ("none", "sinusoidal"),
                f"time_conditioning {self.time_conditioning!r}: use none or sinusoidal")
        require(not (self.causal and self.self_conditioning), "self_conditioning: a causal model "
                "hides nothing, of which an earlier pass could tell; leave it out")
        require(isinstance(self.lora_targets, str) and isinstance(self.lora_rank, int)
                and bool(self.lora_rank) == bool(self.lora_targets) and self.lora_rank >= 0,
                f"lora_rank {self.lora_rank} with lora_targets {self.lora_targets!r}: give both")
        require(set(self.adapted) <= set(LORA_TARGETS), f"lora_targets {self.lora_targets}: choose "
                f"from {', '.join(LORA_TARGETS)}")
        require("gate" not in self.adapted or self.mlp == "swiglu", f"lora_targets "
                f"{self.lora_targets}: an MLP of the sort {self.mlp} has no gate; leave it out")
        require(self.mlp in MLPS, f"mlp {self.mlp!r}: use {' or '.join(MLPS)}")
        require(self.vocab_size > EOS + 1, f"vocab_size {self.vocab_size} leaves no ordinary token")

    @property
    def adapted(self) -> list[str]:
        return [name for name in self.lora_targets.split(",") if name]

    @property
    def mlp_width(self) -> int:
        """Of the MLP's hidden layer; SwiGLU has three matrices where the other has two."""
        width = self.mlp_ratio * self.width
        return width if self.mlp == "relu2" else max(64, round(width * 2 / 3 / 64) * 64)


class Linear(nn.Linear):
    """A linear map without bias whose FP32 weight is used in the precision of its input; with an
    adapter (network/lora.py) beside it, what that one makes of the input is added."""

    def __init__(self, inputs: int, outputs: int, std: float | None = None):
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=inputs ** -0.5 if std is None else std)
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        return y if self.lora is None else y + self.lora(x)


def rms_norm(x: Tensor) -> Tensor:
    # In FP32: the sum of squares overflows FP16 and loses bits in BF16.
    return F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6).to(x.dtype)


def likeliest(logits: Tensor) -> Tensor:
    """(..., V) -> (..., 2 CARRIED) FP32: the ids of the likeliest tokens, and their probabilities.
    """
    best, ids = logits.float().topk(CARRIED, dim=-1)
    return torch.cat([ids.float(), (best - logits.float().logsumexp(-1, keepdim=True)).exp()], -1)


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
