"""The block, and a stack of blocks behind an embedding. A library of model.py and encoders.py.

Every block is pre-norm: attention, where there is a condition cross-attention, and an MLP, each
added to what it reads. Nothing here knows of diffusion.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from network.attention import (
    Attention,
    Context,
    CrossAttention,
    rope_frequencies,
    rotation_at,
    take,
)
from network.dropout import dropped
from network.layers import PRECISIONS, Linear, ModelConfig, rms_norm


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.up = Linear(config.width, config.mlp_ratio * config.width)
        self.down = Linear(config.mlp_ratio * config.width, config.width, std=0.0)
        self.dropout = config.dropout
        self.cross: CrossAttention | None = None  # of a conditional model

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seeds: Tensor | None = None,
                bias: Tensor | None = None, context: tuple[Tensor, Tensor, Tensor] | None = None,
                at: Tensor | None = None) -> Tensor:
        """`seeds` (2,) are those of dropout for what attention and MLP add, `bias` is added to the
        attention scores, `context` has keys, values and bias for the cross-attention; the result is
        for all positions or those `at` (B, C)."""
        y = self.attention(rms_norm(x), cos, sin, bias, at)
        y = y if seeds is None else dropped(y, seeds[0], self.dropout)
        x = (x if at is None else take(x, at)) + y
        if self.cross is not None and context is not None:
            x = x + self.cross(rms_norm(x), *rotation_at(cos, sin, at), *context)
        y = self.down(F.relu(self.up(rms_norm(x))).square())
        return x + (y if seeds is None else dropped(y, seeds[1], self.dropout))


class Transformer(nn.Module):
    """Embedding and blocks: what the denoiser and the encoder of its condition have in common."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        angles = torch.arange(config.max_len).float()[:, None] * rope_frequencies(config)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (max_len, D/H/2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.compute_dtype = torch.float32

    @property
    def all_blocks(self) -> list[Block]:
        return list(self.blocks)

    def set_precision(self, precision: str) -> "Transformer":
        """Sets what activations are computed in ("fp32", "bf16", "fp16"); weights stay FP32."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.compute_dtype = PRECISIONS[precision]
        return self

    def for_inference(self) -> "Transformer":
        """Keeps the weights in the compute precision, so that no call has to cast them; what is
        computed stays the same to the bit."""
        return self.requires_grad_(False).eval().to(self.compute_dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, D) in the compute precision."""
        if tokens.shape[1] > self.config.max_len:
            raise ValueError(f"rows of {tokens.shape[1]} tokens, but max_len is "
                             f"{self.config.max_len}")
        return self.embedding(tokens).to(self.compute_dtype)

    def through_blocks(self, x: Tensor, bias: Tensor | None = None,
                       context: Context | None = None, states: list[Tensor] | None = None,
                       at: Tensor | None = None) -> Tensor:
        """(B, L, D) embedded tokens -> (B, L, D) final hidden states, normalised; with `at` (B, C)
        those of these positions, (B, C, D).

        What each block reads, (B, L, D), is appended to `states`.
        """
        x = rms_norm(x)
        cos, sin = (table[:x.shape[1]].to(x.dtype) for table in (self.cos, self.sin))
        seeds = [None] * len(self.blocks)
        if self.config.dropout and self.training:
            seeds = torch.randint(2**62, (len(seeds), 2))  # on the CPU, from its global generator
        for i, (block, own) in enumerate(zip(self.blocks, seeds, strict=True)):
            if states is not None:
                states.append(rms_norm(x))
            told = None if context is None else (context.keys[i], context.values[i], context.bias)
            # The other positions of the last block would be worked out for nobody.
            x = block(x, cos, sin, own, bias, told, at if block is self.blocks[-1] else None)
        return rms_norm(x)
