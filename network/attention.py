"""Attention to a row and to a condition, with rotary positions. A library of transformer.py, and of
model.py for the condition.

D is the width of the network, H the number of its heads, d = D/H, B rows of L tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from network.layers import Linear, ModelConfig, rms_norm


def rope_frequencies(config: ModelConfig) -> Tensor:
    """(D/H/2,) radians a position, from 1 down to nearly 1 / rope_base (arXiv 2104.09864)."""
    half = config.width // config.heads // 2
    return config.rope_base ** (-torch.arange(half).float() / half)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turns the pairs (x_i, x_{i + d/2}) of (B, H, L, d) by their angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


HIDDEN = -1e4  # a score that gets no weight in any precision, and is finite, as graphs need it


class View(NamedTuple):
    """Where the tokens of a pass stand, and what they look at: the one argument of every block.

    `Transformer.view` makes it.
    """

    cos: Tensor  # (L, D/H/2), or (B, 1, L, D/H/2) where each row has positions of its own
    sin: Tensor
    mask: Tensor | None = None  # added to the scores: can be broadcast to (B, H, L, S)
    cache: "Cache | None" = None  # of the tokens before these
    at: Tensor | None = None  # (B, C): the tokens whose result is wanted; None is all

    @property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """The rotary angles of all tokens."""
        return self.cos, self.sin

    @property
    def wanted_rotation(self) -> tuple[Tensor, Tensor]:
        """Those of the wanted ones."""
        if self.at is None:
            return self.rotation
        return tuple(table[self.at][:, None] if table.ndim == 2 else
                     take(table[:, 0], self.at)[:, None] for table in self.rotation)

    def wanted(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, C, D), or all."""
        return x if self.at is None else take(x, self.at)


class Cache:
    """Keys and values of the tokens that a model was given before, for each of its blocks. Every
    pass adds its own."""

    def __init__(self):
        self.keys: dict[nn.Module, Tensor] = {}  # attention: (B, H, S, D/H)
        self.values: dict[nn.Module, Tensor] = {}

    @property
    def length(self) -> int:
        """S, the tokens known until now."""
        return next((keys.shape[2] for keys in self.keys.values()), 0)

    def add(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of new tokens behind the known ones, which these now are too."""
        for known, new in ((self.keys, keys), (self.values, values)):
            known[layer] = torch.cat([known[layer], new], dim=2) if layer in known else new
        return self.keys[layer], self.values[layer]

    def keep_rows(self, rows: Tensor) -> None:
        """Forgets all rows but those with these numbers, or marked in (B,) bool."""
        self._each(lambda x: x[rows])

    def keep_tokens(self, count: int) -> None:
        """Forgets all tokens but the first ones: those of a pass that only looked."""
        self._each(lambda x: x[:, :, :count])

    def _each(self, do: Callable[[Tensor], Tensor]) -> None:
        for known in (self.keys, self.values):
            for layer, x in known.items():
                known[layer] = do(x)


class Context(NamedTuple):
    """What the cross-attention of every block needs of a condition; computed once for a story."""

    keys: Tensor  # (layers, B, H, S, D/H)
    values: Tensor  # (layers, B, H, S, D/H); zeros in a row without a condition
    bias: Tensor  # (B, 1, 1, S): 0, or HIDDEN where the condition is padded


# ---- kernels -------------------------------------------------------------------------------------

def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """torch's own choice."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Plain products with an FP32 softmax. The CPU's fused kernel leaves its bf16 units idle: this
    took 33 ms against 58 (16 x 6 heads x 256, forward and backward, 2 cores of a Zen 4)."""
    return torch.softmax(scores(q, k, mask), dim=-1, dtype=torch.float32).to(q.dtype) @ v


def graph_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The same for a graph in FP16, which must itself say that its softmax is in FP32."""
    return torch.softmax(scores(q, k, mask).float(), dim=-1).to(q.dtype) @ v


def scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, L, S)."""
    product = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return product if mask is None else product + mask


# Device, precision, whether a graph is being exported and whether it is causal (None: any of them),
# and the kernel; the first line that fits holds.
KERNELS: tuple[tuple[str | None, torch.dtype | None, bool | None, bool | None, Callable], ...] = (
    (None, torch.float16, True, False, graph_products),
    ("cpu", torch.bfloat16, None, False, products),
    (None, None, None, None, fused))


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None,
              ) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for q (B, H, L, d), k and v (B, H, S, d), and a mask that
    can be broadcast to (B, H, L, S); with `causal` query i sees the first S - L + i + 1 keys."""
    length, known = q.shape[2], k.shape[2] - q.shape[2]
    if causal and known:  # behind a cache; one new token sees all there is
        if length > 1:
            later = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device)
            later = q.new_zeros(later.shape).masked_fill(later.triu(known + 1), HIDDEN)  # (L, S)
            mask = later if mask is None else mask + later
        causal = False
    here = q.device.type, q.dtype, torch.compiler.is_exporting(), causal
    kernel = next(kernel for *where, kernel in KERNELS if all(
        a in (None, b) for a, b in zip(where, here, strict=True)))
    return kernel(q, k, v, mask, causal)


# ---- heads ---------------------------------------------------------------------------------------

def neighbour_biases(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Biases of queries and keys, (H, 1, D/H) each, with which each head looks at one neighbour.

    Rotary positions turn the pair with frequency f of the query at i by f i and of the key at j by
    f j. A constant key a and a query a turned by f o add a^2 sum_f cos(f (j - i - o)) to the
    score, which is largest at j = i + o. The slow frequencies would only widen that peak.
    """
    half = config.width // config.heads // 2
    frequency = rope_frequencies(config)
    size = config.neighbour_init * (frequency > 0.1)  # (D/H/2,)
    heads = torch.arange(config.heads)
    # -1, 1, -2, 2, ...; a causal head can only look back: -1, -2, ...
    offset = -1 - heads if config.causal else (heads // 2 + 1) * (2 * (heads % 2) - 1)
    angle = offset[:, None] * frequency  # (H, D/H/2)
    query = torch.cat([size * angle.cos(), size * angle.sin()], dim=-1)
    key = torch.cat([size, torch.zeros(half)]).expand_as(query)
    return query[:, None], key[:, None].clone()


def take(x: Tensor, positions: Tensor) -> Tensor:
    """x[b, positions[b]]: (B, L, D), (B, C) -> (B, C, D)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, H, L, D/H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# AdamW moves a parameter by about the learning rate, whatever its gradient: a gate alone would need
# hundreds of steps to open.
GATE_SPEED = 10


class Heads(nn.Module):
    """What self-attention and cross-attention have in common; E is the width of what is read."""

    def __init__(self, config: ModelConfig, read_width: int):
        super().__init__()
        self.heads, self.qk_norm = config.heads, config.qk_norm
        # Three matrices, not one: Muon orthogonalises each map on its own.
        self.query = Linear(config.width, config.width)
        self.key, self.value = (Linear(read_width, config.width) for _ in range(2))
        self.out = Linear(config.width, config.width, std=0.0)  # adds nothing at first
        self.query_bias = self.key_bias = None
        if config.neighbour_init:  # zero unless the heads are to look at neighbours
            shape = (config.heads, 1, config.width // config.heads)
            self.query_bias, self.key_bias = (nn.Parameter(torch.zeros(shape)) for _ in range(2))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, D/H), turned to their positions."""
        return self._turned(self.query(x), self.query_bias, cos, sin)

    def keys_values(self, read: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, E) -> keys, turned to their positions, and values, (B, H, S, D/H) each."""
        return (self._turned(self.key(read), self.key_bias, cos, sin),
                split_heads(self.value(read), self.heads))

    def _turned(self, x: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = split_heads(x, self.heads)
        if bias is not None:
            x = x + bias.to(x.dtype)
        return rotate(rms_norm(x) if self.qk_norm else x, cos, sin)


class Attention(Heads):
    def __init__(self, config: ModelConfig):
        super().__init__(config, config.width)
        self.causal = config.causal
        if config.neighbour_init:
            self.query_bias, self.key_bias = map(nn.Parameter, neighbour_biases(config))

    def forward(self, x: Tensor, view: View) -> Tensor:
        """(B, L, D) -> (B, L, D), or (B, C, D) for the wanted tokens."""
        q = self.queries(view.wanted(x), *view.wanted_rotation)
        k, v = self.keys_values(x, *view.rotation)
        if view.cache is not None:
            k, v = view.cache.add(self, k, v)
        y = attention(q, k, v, self.causal, view.mask)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(Heads):
    """Queries from the story, keys and values from the encoder, whose width E may differ.

    Every head has a gate, closed at first, so that nothing is added (arXiv 2204.14198, section 2.2,
    here without tanh). The output projection behind it need not start at zero: it can have what
    self-attention has learned.
    """

    def __init__(self, config: ModelConfig, read_width: int):
        super().__init__(config, read_width)
        nn.init.normal_(self.out.weight, std=config.width ** -0.5)
        self.gate = nn.Parameter(torch.zeros(config.heads, 1, 1))  # in units of 1 / GATE_SPEED

    def forward(self, x: Tensor, view: View, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """The wanted tokens (B, C, D), and the condition's keys, values and bias -> (B, C, D)."""
        y = attention(self.queries(x, *view.wanted_rotation), k, v, mask=bias)
        y = y * (GATE_SPEED * self.gate.to(y.dtype))  # rounded first, as `for_inference` keeps it
        return self.out(y.transpose(1, 2).flatten(2))
