"""Vocabulary head and cross-entropy in one, a chunk of positions at a time. A library.

    loss = head_loss(hidden, weight, bias, targets, row_weights)     # scalar, differentiable
    loss = head_loss(hidden, weight, bias, Taught(states, head), row_weights)    # by a teacher
    nats, correct = head_scores(hidden, weight, bias, targets)       # for evaluation, no gradient

Logits are the largest tensors of a small model: 2,000 hidden tokens times 8,192 words are 64 MiB in
FP32, and a plain cross-entropy keeps them, their softmax and their gradient. Here a chunk's logits
are turned into its share of both gradients at once and forgotten, so that the memory does not grow
with the number of positions, and on a CPU a chunk stays in the cache.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Positions at a time: on a CPU as many as fit into the caches, elsewhere enough to fill the device.
CPU_CHUNK, CHUNK = 256, 4096


class Taught(NamedTuple):
    """What another model says of the same positions, in the place of their tokens."""

    hidden: Tensor  # (M, E), its hidden states
    weight: Tensor  # (V, E), its vocabulary head

    def probabilities(self, part: slice, bias: Tensor) -> Tensor:
        """FP32 (m, V) of some positions."""
        hidden = self.hidden[part]
        return log_probabilities(hidden, self.weight.to(hidden.dtype), bias.to(hidden.dtype)).exp_()


def chunks(hidden: Tensor) -> list[slice]:
    size = CPU_CHUNK if hidden.device.type == "cpu" else CHUNK
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def log_probabilities(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """FP32 log p (M, V) of hidden states (M, D) under the head's weight (V, D) and bias (V,)."""
    return torch.log_softmax(F.linear(hidden, weight, bias).float(), dim=-1)


class _HeadLoss(torch.autograd.Function):
    """sum_i w_i (-log softmax(W h_i + b)[y_i]), with d/dz = w_i (softmax(z) - onehot(y_i)); of
    what is `Taught` sum_i w_i (-q_i . log softmax(z)) and d/dz = w_i (softmax(z) - q_i)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor | Taught,
                row_weights: Tensor) -> Tensor:
        used = weight.to(hidden.dtype)
        # Both gradients are kept in FP32: they are sums, and small ones vanish in FP16.
        to_hidden = torch.empty_like(hidden, dtype=torch.float32)  # (M, D)
        to_weight = (torch.zeros_like(weight, dtype=torch.float32)  # (V, D)
                     if ctx.needs_input_grad[1] else None)  # a frozen head needs none
        nats = torch.empty_like(row_weights)  # (M,)
        for part in chunks(hidden):
            h, scale = hidden[part], row_weights[part, None]
            p = log_probabilities(h, used, bias)  # (m, V)
            if isinstance(targets, Taught):
                q = targets.probabilities(part, bias)
                nats[part] = -(q * p.clamp_(min=-1e4)).sum(-1)  # 0 times -inf would be no number
                slope = p.exp_().sub_(q).to(h.dtype)
            else:
                y = targets[part, None]
                nats[part] = -p.gather(1, y)[:, 0]
                slope = p.exp_().scatter_add_(1, y, -torch.ones_like(scale)).to(h.dtype)
            # The weight joins the side that is smaller by V / D; in FP16 it would lose the slope.
            torch.mul(slope @ used, scale, out=to_hidden[part])
            if to_weight is None:
                continue
            to_weight.addmm_(slope.T, h * scale) if h.dtype == torch.float32 else to_weight.add_(
                slope.T @ (h * scale).to(h.dtype))
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtype = hidden.dtype
        return (nats * row_weights).sum()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        to_hidden, to_weight = ctx.saved_tensors
        return ((to_hidden * gradient).to(ctx.dtype),
                None if to_weight is None else to_weight * gradient, None, None, None)


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor | Taught,
              row_weights: Tensor) -> Tensor:
    """The weighted sum of -log p of the targets, or of the cross-entropies with what is taught, a
    differentiable FP32 scalar in nats.

    Args:
        hidden: (M, D) hidden states, in the precision to compute in.
        weight: (V, D) FP32; gets a gradient. bias: (V,) in the precision of `hidden`, fixed; -inf
            (-1e4 in FP16) for ids that are never predicted.
        targets: (M,) int64, or what a teacher says there. row_weights: (M,) FP32.
    """
    return _HeadLoss.apply(hidden, weight, bias, targets, row_weights)


@torch.no_grad()
def head_scores(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor,
                ) -> tuple[Tensor, Tensor]:
    """-log p of the targets, (M,) FP32, and whether each was the likeliest token, (M,) bool."""
    used = weight.to(hidden.dtype)
    nats = torch.empty(len(hidden), device=hidden.device)
    correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    for part in chunks(hidden):
        log_p, y = log_probabilities(hidden[part], used, bias), targets[part]
        nats[part] = -log_p.gather(1, y[:, None])[:, 0]
        correct[part] = log_p.argmax(-1) == y
    return nats, correct
