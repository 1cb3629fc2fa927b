"""Dropout that keeps nothing for the backward pass. A library of transformer.py."""

import math

import torch
from torch import Tensor


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
