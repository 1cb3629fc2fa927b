"""The block, and a stack of blocks behind an embedding. A library of model.py and encoders.py.

Every block is pre-norm: attention, where there is a condition cross-attention, and an MLP, each
added to what it reads. Nothing here knows of diffusion.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from network.attention import Attention, Cache, Context, CrossAttention, View, rope_frequencies
from network.dropout import dropped
from network.layers import PRECISIONS, Linear, ModelConfig, rms_norm


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.up = Linear(config.width, config.mlp_width)
        self.gate = Linear(config.width, config.mlp_width) if config.mlp == "swiglu" else None
        self.down = Linear(config.mlp_width, config.width, std=0.0)
        self.dropout = config.dropout
        self.cross: CrossAttention | None = None  # of a conditional model

    def forward(self, x: Tensor, view: View, seeds: Tensor | None = None,
                context: tuple[Tensor, Tensor, Tensor] | None = None,
                ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, L, D) -> (B, L, D), or (B, C, D) or (M, D) for the tokens that `view` wants; and the
        keys and values of all tokens.

        `seeds` (2,) are those of dropout for what attention and MLP add, `context` has keys, values
        and bias for the cross-attention.
        """
        y, own = self.attention(rms_norm(x), view)
        y = y if seeds is None else dropped(y, seeds[0], self.dropout)
        x = view.wanted(x) + y
        if self.cross is not None and context is not None:
            x = x + self.cross(rms_norm(x), view, *context)
        read = rms_norm(x)
        y = self.down(F.relu(self.up(read)).square() if self.gate is None else
                      F.silu(self.gate(read)) * self.up(read))
        return x + (y if seeds is None else dropped(y, seeds[1], self.dropout)), own


# Keys and values, (B, H, L, D/H) each, of every block
Known = list[tuple[Tensor, Tensor]]


class BlockStack(nn.Module):
    """Blocks one behind the other, whatever they read. Who inherits makes `config` and, by
    `make_blocks`, `blocks`."""

    config: ModelConfig
    blocks: nn.ModuleList

    @property
    def all_blocks(self) -> list[Block]:
        return list(self.blocks)

    def through_blocks(self, x: Tensor, view: View, context: Context | None = None,
                       states: list[Tensor] | None = None, known: Known | None = None,
                       kept: Known | None = None, added: Tensor | None = None) -> Tensor:
        """(B, L, D) embedded tokens -> (B, L, D) final hidden states, normalised, or (B, C, D) or
        (M, D) for the tokens that `view` wants.

        What each block reads, (B, L, D), is appended to `states`, and its keys and values to
        `kept`; those in `known` are seen as if their tokens stood before these. `added`, (B, L, D),
        joins the tokens once they are normalised.
        """
        count = x.shape[1]
        x = rms_norm(x)
        if added is not None:
            x = x + added
        seeds = [None] * len(self.blocks)
        if self.config.dropout and self.training:
            seeds = torch.randint(2**62, (len(seeds), 2))  # on the CPU, from its global generator
        everything = view._replace(at=None)
        for i, (block, own) in enumerate(zip(self.blocks, seeds, strict=True)):
            if states is not None:
                states.append(rms_norm(x))
            read = None if context is None else (context.keys[i], context.values[i], context.bias)
            # The other positions of the last block would be worked out for nobody.
            seen = view if block is self.blocks[-1] else everything
            x, pair = block(x, seen if known is None else seen._replace(known=known[i]), own, read)
            if kept is not None:
                kept.append(pair)
            if i == 0:
                view, everything = (v._replace(first=pair[1]) for v in (view, everything))
        if view.cache is not None:
            view.cache.advance(count)
        return rms_norm(x)


def make_blocks(config: ModelConfig) -> nn.ModuleList:
    blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
    first = blocks[0].attention  # whose values are the first
    first.own_share = first.first_share = None
    return blocks


class Transformer(BlockStack):
    """Embedding and blocks: what the denoiser and the encoder of its condition have in common."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = make_blocks(config)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)  # (D/H/2,)
        angles = torch.arange(config.max_len).float()[:, None] * self.frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)  # (max_len, D/H/2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.compute_dtype = torch.float32

    def set_precision(self, precision: str) -> "Transformer":
        """Sets what activations are computed in ("fp32", "bf16", "fp16"); weights stay FP32."""
        for module in self.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = PRECISIONS[precision]
        return self

    def for_inference(self) -> "Transformer":
        """Keeps the weights in the compute precision, so that no call has to cast them; what is
        computed stays the same to the bit."""
        return self.requires_grad_(False).eval().to(self.compute_dtype)

    def train_only(self, wanted: Callable[[str], bool]) -> None:
        """Leaves those parameters to be trained whose names are `wanted`, and freezes the others.
        The one rule: whatever trains a part (a stage, an adapter) says it by names."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(wanted(name))

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, D) in the compute precision."""
        return self.embedding(tokens).to(self.compute_dtype)

    def view(self, positions: Tensor | int, mask: Tensor | None = None, cache: Cache | None = None,
             causal: bool | None = None) -> View:
        """What the tokens of a pass look at.

        Args:
            positions: (L,) or (B, L) int64, where they stand in their rows; a number L: 0 to L - 1,
                or the L positions behind what the cache holds.
            mask: added to the attention scores, can be broadcast to (B, H, L, S): 0, or HIDDEN
                where a token must not look.
            cache: of the tokens before these, which they look at too; theirs are added to it, and
                it says what is hidden from each.
            causal: whether a token sees those before it alone; by default where the model is so.
        """
        causal = self.config.causal if causal is None else causal
        if cache is not None:
            count = positions if isinstance(positions, int) else positions.shape[-1]
            if not cache.window and cache.length + count > self.config.max_len + (cache.first < 0):
                raise ValueError(f"rows of {cache.length + count} tokens, but max_len is "
                                 f"{self.config.max_len}")
            cache.room(count)
            hidden = cache.mask(count, causal)
            if hidden is not None:
                hidden = hidden.to(self.cos.device, self.compute_dtype)
                mask = hidden if mask is None else mask + hidden
            causal = False
            if isinstance(positions, int):
                positions = cache.positions(count).to(self.cos.device)
                positions = positions[0] if len(positions) == 1 else positions
        if isinstance(positions, int | torch.SymInt):
            if positions > self.config.max_len:
                raise ValueError(f"rows of {positions} tokens, but max_len is "
                                 f"{self.config.max_len}")
            tables = self.cos[:positions], self.sin[:positions]
        else:
            # (L, D/H/2) or (B, L, D/H/2), also before and behind the tables
            angles = positions[..., None].float() * self.frequencies
            angles = angles if positions.ndim == 1 else angles[:, None]
            tables = angles.cos(), angles.sin()
        cos, sin = (table.to(self.compute_dtype) for table in tables)
        return View(cos, sin, mask, cache, causal=causal)


def check_size(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raises TypeError, KeyError or RuntimeError, before memory is taken, for settings that do not
    belong to the weights of a Transformer."""
    check_blocks(config, weights)
    if (weights["embedding.weight"].shape != (config.vocab_size, config.width)
            or not 1 <= config.max_len <= 2**20):
        raise RuntimeError("the weights are of another size")


def check_blocks(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """The same for those of a BlockStack."""
    for field in dataclasses.fields(config):
        kind = type(getattr(config, field.name))
        if kind is not field.type and (kind, field.type) != (int, float):
            raise TypeError(f"{field.name} is not of {field.type}")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    hidden, width = weights["blocks.0.up.weight"].shape
    ranks = {len(weight) for name, weight in weights.items() if name.endswith(".lora.down.weight")}
    if (len(blocks) != config.layers or hidden != config.mlp_width or width != config.width
            or ranks != ({config.lora_rank} if config.lora_rank else set())):
        raise RuntimeError("the weights are of another size")
