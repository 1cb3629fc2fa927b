"""What the networks are built from: their settings, attention, blocks. A library of model.py.

Every block is pre-norm: attention, where there is a condition cross-attention, and an MLP, each
added to what it reads. Nothing here knows of diffusion.
"""

from cli import require

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep import EOS


@dataclass(frozen=True)
class ModelConfig:
    width: int = 384  # D
    heads: int = 6  # H; each is width / heads wide
    layers: int = 6
    vocab_size: int = 8192  # V
    max_len: int = 256  # longest row, in tokens
    mlp_ratio: int = 4  # hidden width of the MLP, in units of D
    qk_norm: bool = True
    neighbour_init: float = 4.0  # how strongly heads look at neighbours at first; 0: no biases
    causal: bool = False  # the autoregressive twin
    time_conditioning: str = "none"  # or "sinusoidal"
    tied_head: bool = True  # one matrix for the embedding and the vocabulary head
    dropout: float = 0.0  # after attention and MLP
    rope_base: float = 10_000.0

    def __post_init__(self):
        require(self.width % self.heads == 0 and self.width // self.heads % 2 == 0,
                f"width {self.width} cannot be split into {self.heads} heads of even width")
        require(self.time_conditioning in ("none", "sinusoidal"),
                f"time_conditioning {self.time_conditioning!r}: use none or sinusoidal")
        require(self.vocab_size > EOS + 1, f"vocab_size {self.vocab_size} leaves no ordinary token")


class Linear(nn.Linear):
    """A linear map without bias whose FP32 weight is used in the precision of its input."""

    def __init__(self, inputs: int, outputs: int, std: float | None = None):
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=inputs ** -0.5 if std is None else std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    # In FP32: the sum of squares overflows FP16 and loses bits in BF16.
    return F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6).to(x.dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """(D/H/2,) radians a position, from 1 down to nearly 1 / rope_base (arXiv 2104.09864)."""
    half = config.width // config.heads // 2
    return config.rope_base ** (-torch.arange(half).float() / half)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turns the pairs (x_i, x_{i + d/2}) of (B, H, L, d) by their angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, bias: Tensor | None = None,
              ) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for q (B, H, L, d), k and v (B, H, S, d), and a bias that
    can be broadcast to (B, H, L, S)."""
    half_graph = q.dtype == torch.float16 and torch.compiler.is_exporting()
    if not causal and (q.device.type == "cpu" and q.dtype == torch.bfloat16 or half_graph):
        # The CPU's fused kernel leaves its bf16 units idle: plain products with an FP32 softmax
        # took 33 ms against 58 (16 x 6 heads x 256, forward and backward, 2 cores of a Zen 4).
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, L, S)
        if bias is not None:
            scores = scores + bias
        if half_graph:  # which must itself say that its softmax is in FP32
            return torch.softmax(scores.float(), dim=-1).to(q.dtype) @ v
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)


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


def rotation_at(cos: Tensor, sin: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rotary angles of the positions `at` (B, C): (B, 1, C, D/H/2) each; None is all."""
    return (cos, sin) if at is None else (cos[at][:, None], sin[at][:, None])


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None = None,
                at: Tensor | None = None) -> Tensor:
        asking = x if at is None else take(x, at)  # (B, C, D)
        q = self.queries(asking, *rotation_at(cos, sin, at))
        k, v = self.keys_values(x, cos, sin)
        y = attention(q, k, v, self.causal, bias)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, L, D)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, bias: Tensor,
                ) -> Tensor:
        """(B, L, D), the angles of its positions, the condition's keys, values and bias ->
        (B, L, D)."""
        y = attention(self.queries(x, cos, sin), k, v, bias=bias)
        y = y * (GATE_SPEED * self.gate.to(y.dtype))  # rounded first, as `for_inference` keeps it
        return self.out(y.transpose(1, 2).flatten(2))


def dropout_factors(shape: tuple[int, ...], dropout: float, like: Tensor,
                    generator: torch.Generator | None = None) -> Tensor:
    """0 with probability `dropout`, rounded to 256ths, else what keeps the mean; as `like` is.

    Eight factors come from every random number: one for each, as torch draws them, would take a
    third of a step on a CPU.
    """
    count = math.prod(shape)
    words = torch.randint(-2**63, 2**63 - 1, (-(-count // 8),), device=like.device,
                          generator=generator)
    dropped = min(255, max(1, round(256 * dropout)))  # of the 256 values of a byte
    kept = words.view(torch.uint8)[:count].view(shape) >= dropped
    return kept.to(like.dtype).mul_(256 / (256 - dropped))


def dropped(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """`x` times dropout's factors, which depend on `seed` alone: an int64 number on the CPU, where
    reading it waits for nobody.

    The backward pass draws the factors again, so that none are kept: those of all layers would be
    4 GB for xxlarge on 65,000 tokens. To the compiler it is one operation, in which it looks for no
    random numbers.
    """
    return torch.ops.diffusion_llm.dropped(x, seed, dropout)


def _dropped(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return dropout_factors(x.shape, dropout, x, generator).mul_(x)


def _keep_seed(ctx, inputs: tuple, output: Tensor) -> None:
    _, seed, ctx.dropout = inputs
    ctx.save_for_backward(seed)


def _drop_gradient(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
    return dropped(gradient, *ctx.saved_tensors, ctx.dropout), None, None


# Not torch.library.custom_op, which imports the compiler at its first call: 3 s and 70 MB.
_library = torch.library.Library("diffusion_llm", "DEF")
_library.define("dropped(Tensor x, Tensor seed, float dropout) -> Tensor")
_library.impl("dropped", _dropped, "CompositeExplicitAutograd")
torch.library.register_fake("diffusion_llm::dropped", lambda x, seed, dropout: x.new_empty(x.shape),
                            lib=_library)
torch.library.register_autograd("diffusion_llm::dropped", _drop_gradient,
                                setup_context=_keep_seed, lib=_library)


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
