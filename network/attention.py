"""Attention to a row and to a condition, with rotary positions. A library of transformer.py, and of
model.py for the condition.

D is the width of the network, H the number of its heads, d = D/H, B rows of L tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

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
    # added to the scores: can be broadcast to (B, H, L, S); or the pairs that FlexAttention visits
    mask: Tensor | BlockMask | None = None
    cache: "Cache | None" = None  # of the tokens before these
    # The tokens whose result is wanted: (B, C) of each row, or (M,) of all B * L; None is all
    at: Tensor | None = None
    causal: bool = False  # token i sees the first i + 1 of this pass alone; never with a cache
    # keys and values of other tokens, (B, H, S, D/H) each, of this layer: seen before its own
    known: tuple[Tensor, Tensor] | None = None
    first: Tensor | None = None  # (B, H, L, D/H), the first block's values; None: this is that one

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
        """(B, L, D) -> (B, C, D) or (M, D), or all."""
        if self.at is None:
            return x
        return x.flatten(0, 1)[self.at] if self.at.ndim == 1 else take(x, self.at)


class Cache:
    """Keys and values of the tokens that a model was given before, for each of its blocks, turned
    to their positions, in slots that are there before they are needed.

    Rows may know different numbers of tokens. A pass writes its own keys behind the known ones of
    each row, and they stay unless it only looked (`looking`). With a `window` a token sees the
    `window` - 1 before it and no more, the oldest are dropped, and a story has no end.
    """

    def __init__(self, first: int = 0, window: int | None = None):
        self.first, self.window = first, window  # the position of a row's first token
        self.keys: dict[nn.Module, Tensor] = {}  # attention: (B, H, slots, D/H)
        self.values: dict[nn.Module, Tensor] = {}
        self.know(torch.zeros(1, dtype=torch.int64))
        self.dropped = torch.zeros(1, dtype=torch.int64)  # (B,) or (1,): tokens before slot 0
        self.slots = 0
        self.looking = False  # whether the passes only look

    def know(self, known: Tensor) -> None:
        self.known = known  # (B,) or (1,): slots in use, on the CPU
        self.most = int(known.max())  # every layer asks for it

    @property
    def length(self) -> int:
        """The most tokens that a row knows, those it has dropped included."""
        return int((self.known + self.dropped).max())

    def positions(self, count: int) -> Tensor:
        """Those of the next tokens, (B, L) or (1, L)."""
        return self.first + (self.known + self.dropped)[:, None] + torch.arange(count)

    def room(self, count: int) -> None:
        """Makes slots for `count` tokens more: drops what no token sees any more, or takes more
        memory, twice as much each time."""
        if self.window and self.most + count > 2 * self.window:
            kept = self.known.clamp(max=self.window - 1)
            start = self.known - kept  # (B,)
            # the last ones of every row, moved to slot 0 and on
            slots = (start[:, None] + torch.arange(self.window - 1)).clamp(max=self.slots - 1)
            self._each(lambda x: F.pad(x.gather(2, slots.to(x.device)[:, None, :, None].expand(
                len(x), x.shape[1], -1, x.shape[3])), (0, 0, 0, self.slots - self.window + 1)))
            self.know(kept)
            self.dropped = self.dropped + start
        if self.most + count > self.slots:
            more = max(64, self.slots, self.most + count - self.slots)
            self._each(lambda x: F.pad(x, (0, 0, 0, more)))
            self.slots += more

    def add(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes those of new tokens, (B, H, L, D/H) each, behind the known ones (`room` is there),
        and gives all: slots that a row does not know yet are for the mask to hide."""
        count, top = keys.shape[2], self.most + keys.shape[2]
        for held, new in ((self.keys, keys), (self.values, values)):
            if layer not in held:
                held[layer] = new.new_zeros(*new.shape[:2], self.slots, new.shape[3])
            if len(self.known) == 1:
                held[layer][:, :, top - count:top] = new
            else:
                slots = (self.known[:, None] + torch.arange(count)).to(new.device)  # (B, L)
                held[layer].scatter_(2, slots[:, None, :, None].expand_as(new), new)
        return self.keys[layer][:, :, :top], self.values[layer][:, :, :top]

    def mask(self, count: int, causal: bool) -> Tensor | None:
        """What the next `count` tokens must not see: 0 or HIDDEN, (B, 1, L, S), or (B, 1, 1, S) for
        tokens that all see the same; or None where they see all slots.

        Each sees the known tokens, and of the new ones all, or with `causal` those up to itself.
        With a window only those less than that far before it, or before the last of the new ones.
        """
        known = self.known[:, None, None]  # (B, 1, 1)
        top = self.most + count
        if len(known) == 1 and (not causal or count == 1) and top <= (self.window or top):
            return None
        # (B, L, 1) or (B, 1, 1): the last slot that a token sees
        last = known + (torch.arange(count)[:, None] if causal else count - 1)
        slot = torch.arange(top)
        hidden = slot > last
        if self.window:
            hidden = hidden | (slot <= last - self.window)
        return torch.zeros(hidden.shape).masked_fill(hidden, HIDDEN)[:, None]

    def advance(self, count: int) -> None:
        """After a pass of that many tokens: they are known now, unless it only looked."""
        if not self.looking:
            self.know(self.known + count)

    def keep_rows(self, rows: Tensor) -> None:
        """Forgets all rows but those with these numbers, or marked in (B,) bool."""
        self._each(lambda x: x[rows.to(x.device)])
        if len(self.known) > 1:
            self.know(self.known[rows.cpu()])
            self.dropped = self.dropped[rows.cpu()]

    def keep_tokens(self, count: int | Tensor) -> None:
        """Forgets all tokens but the first ones, as many of every row or, (B,), of each."""
        count = torch.as_tensor(count).reshape(-1).cpu()
        if len(count) > 1 and (count == count[0]).all() and (
                self.dropped == self.dropped[0]).all():
            count, self.dropped = count[:1], self.dropped[:1]
        if (count < self.dropped).any():
            raise ValueError("the cache has dropped tokens that are to be kept")
        self.know(count - self.dropped)
        if len(self.known) != len(self.dropped):
            self.dropped = self.dropped.expand_as(self.known)

    def _each(self, do: Callable[[Tensor], Tensor]) -> None:
        for known in (self.keys, self.values):
            for layer, x in known.items():
                known[layer] = do(x)


class Context(NamedTuple):
    """What the cross-attention of every block needs of a condition; computed once for a story."""

    keys: Tensor  # (layers, B, H, S, D/H)
    values: Tensor  # (layers, B, H, S, D/H); zeros in a row without a condition
    bias: Tensor  # (B, 1, 1, S): 0, or HIDDEN where the condition is padded

    def of_rows(self, rows: Tensor) -> "Context":
        """Those marked in (B,) bool."""
        return Context(self.keys[:, rows], self.values[:, rows], self.bias[rows])


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


def flexible(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention, which leaves out what no query of a tile of 128 x 128 sees. No backward pass
    on a CPU."""
    alone = q.is_cuda and not torch.compiler.is_compiling()
    return (compiled_flex() if alone else flex_attention)(q, k, v, block_mask=mask)


@functools.cache
def compiled_flex() -> Callable:
    """Uncompiled it would write out all scores."""
    return torch.compile(flex_attention)


# Device, precision, whether a graph is being exported and whether it is causal (None: any of them),
# and the kernel; the first line that fits holds.
KERNELS: tuple[tuple[str | None, torch.dtype | None, bool | None, bool | None, Callable], ...] = (
    (None, torch.float16, True, False, graph_products),
    ("cpu", torch.bfloat16, None, False, products),
    (None, None, None, None, fused))


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False,
              mask: Tensor | BlockMask | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for q (B, H, L, d), k and v (B, H, S, d), and a mask that
    can be broadcast to (B, H, L, S); with `causal` query i sees the first S - L + i + 1 keys."""
    if isinstance(mask, BlockMask):
        return flexible(q, k, v, mask)
    length, known = q.shape[2], k.shape[2] - q.shape[2]
    if causal and known:  # the queries are the last tokens of all
        later = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).triu(known + 1)
        later = q.new_zeros(later.shape).masked_fill(later, HIDDEN)  # (L, S)
        mask, causal = later if mask is None else mask + later, False
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

    def queries(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, H, L, D/H), turned to their positions, where they have any."""
        return self._turned(self.query(x), self.query_bias, cos, sin)

    def keys_values(self, read: Tensor, cos: Tensor | None, sin: Tensor | None,
                    ) -> tuple[Tensor, Tensor]:
        """(B, S, E) -> keys, turned to their positions, and values, (B, H, S, D/H) each."""
        return (self._turned(self.key(read), self.key_bias, cos, sin),
                split_heads(self.value(read), self.heads))

    def _turned(self, x: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
                ) -> Tensor:
        x = split_heads(x, self.heads)
        if bias is not None:
            x = x + bias.to(x.dtype)
        x = rms_norm(x) if self.qk_norm else x
        return x if cos is None or sin is None else rotate(x, cos, sin)


class Attention(Heads):
    """Self-attention. Where that is asked for, its values are mixed with those of the first block,
    by two learned numbers a head (arXiv 2410.17897), and what every head finds is weighed by twice
    a sigmoid of what the token reads (arXiv 2505.06708, headwise). Both change nothing at first.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.width)
        self.own_share = self.first_share = self.head_gate = None
        if config.value_residual:
            self.own_share = nn.Parameter(torch.ones(config.heads, 1, 1))
            self.first_share = nn.Parameter(torch.zeros(config.heads, 1, 1))
        if config.head_gates:
            self.head_gate = Linear(config.width, config.heads, std=0.0)
        if config.neighbour_init:
            self.query_bias, self.key_bias = map(nn.Parameter, neighbour_biases(config))
        self._joined: tuple[tuple, Tensor] | None = None

    def forward(self, x: Tensor, view: View) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, L, D) -> (B, L, D), or (B, C, D) or (M, D) for the wanted tokens; and the keys and
        values of all tokens, (B, H, L, D/H) each."""
        flat = view.at is not None and view.at.ndim == 1  # too ragged for attention itself
        asked = view._replace(at=None) if flat else view
        if view.cache is not None and view.at is None and self.are_plain():
            q, *own = self.together(x, view)
        else:
            q = self.queries(asked.wanted(x), *asked.wanted_rotation)
            own = list(self.keys_values(x, *view.rotation))
        if self.own_share is not None and view.first is not None:
            own[1] = (own[1] * self.own_share.to(x.dtype)
                      + view.first * self.first_share.to(x.dtype))
        k, v = own
        if view.cache is not None:
            k, v = view.cache.add(self, k, v)
        elif view.known is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(view.known, own, strict=True))
        y = attention(q, k, v, view.causal, view.mask).transpose(1, 2)  # (B, L, H, D/H)
        if self.head_gate is not None:
            y = y * (2 * torch.sigmoid(self.head_gate(asked.wanted(x))))[..., None]
        y = y.flatten(2)
        return self.out(view.wanted(y) if flat else y), tuple(own)

    def are_plain(self) -> bool:
        """Whether the three maps are their matrices, which no training changes, and nothing more.
        """
        return all(part.lora is None and not part.weight.requires_grad
                   for part in (self.query, self.key, self.value))

    def together(self, x: Tensor, view: View) -> list[Tensor]:
        """Queries, keys and values by one product of three matrices in one, which is kept until
        one of them changes: a token at a time, the number of calls counts."""
        matrices = [part.weight for part in (self.query, self.key, self.value)]
        state = (x.dtype, *((w.data_ptr(), w._version) for w in matrices))
        if self._joined is None or self._joined[0] != state:
            self._joined = state, torch.cat(matrices).to(x.dtype)
        both = split_heads(F.linear(x, self._joined[1]), 3 * self.heads)  # (B, 3H, L, D/H)
        turned, v = both.split([2 * self.heads, self.heads], dim=1)
        if self.query_bias is not None:
            turned = turned + torch.cat([self.query_bias, self.key_bias]).to(x.dtype)
        turned = rotate(rms_norm(turned) if self.qk_norm else turned, *view.rotation)
        return [*turned.chunk(2, dim=1), v]


class CrossAttention(Heads):
    """Queries from the story, keys and values from the encoder, whose width E may differ. What is
    not `placed` (a picture) stands at no distance from any token: nothing is turned.

    Every head has a gate, closed at first, so that nothing is added (arXiv 2204.14198, section 2.2,
    here without tanh). The output projection behind it need not start at zero: it can have what
    self-attention has learned.
    """

    def __init__(self, config: ModelConfig, read_width: int, placed: bool = True):
        super().__init__(config, read_width)
        self.placed = placed
        nn.init.normal_(self.out.weight, std=config.width ** -0.5)
        self.gate = nn.Parameter(torch.zeros(config.heads, 1, 1))  # in units of 1 / GATE_SPEED

    def forward(self, x: Tensor, view: View, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """The wanted tokens (B, C, D), and the condition's keys, values and bias -> (B, C, D)."""
        where = view.wanted_rotation if self.placed else (None, None)
        y = attention(self.queries(x, *where), k, v, mask=bias)
        y = y * (GATE_SPEED * self.gate.to(y.dtype))  # rounded first, as `for_inference` keeps it
        return self.out(y.transpose(1, 2).flatten(2))
