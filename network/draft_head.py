"""What a drafted token says of the one behind it. A library of model.py.

A block that is drafted in one evaluation has a distribution for every place that knows nothing of
what is drawn at the place before. A matrix of logits (V, V) of low rank tells it, for the price of
a small product a token: q(x_i) ~ exp(z_i + A[x_{i-1}] B^T). Drafts are verified whatever they were
drawn from, so that it costs no exactness, and more of them stand. (arXiv 2402.05109 lets heads of
a left-to-right model depend on what was drafted before them, by an MLP for each.)
"""

import torch
from torch import Tensor, nn

from network.head_loss import head_loss, head_scores


class DraftHead(nn.Module):
    def __init__(self, vocab_size: int, rank: int):
        super().__init__()
        self.before = nn.Parameter(torch.randn(vocab_size, rank))  # A
        self.behind = nn.Parameter(torch.zeros(vocab_size, rank))  # B: says nothing at first

    def forward(self, tokens: Tensor) -> Tensor:
        """(...,) tokens -> (..., V) what is added to the logits of the place behind each."""
        return self.before[tokens] @ self.behind.T

    def joined(self, hidden: Tensor, weight: Tensor, left: Tensor, drafted: Tensor,
               ) -> tuple[Tensor, Tensor]:
        """Hidden states (M, D) and the vocabulary head's weight (V, D), both fixed, with what the
        tokens `left` (M,) of each say behind them, where those are `drafted` (M,) too: one product
        of (M, D + rank) and (V, D + rank) gives the logits."""
        said = self.before[left] * drafted[:, None]
        return (torch.cat([hidden.detach(), said.to(hidden.dtype)], dim=1),
                torch.cat([weight.detach(), self.behind], dim=1))

    def loss(self, hidden: Tensor, weight: Tensor, bias: Tensor, left: Tensor, drafted: Tensor,
             targets: Tensor, row_weights: Tensor) -> Tensor:
        """The weighted sum of -log q of the targets (M,), differentiable by this head alone."""
        return head_loss(*self.joined(hidden, weight, left, drafted), bias, targets, row_weights)

    @torch.no_grad()
    def scores(self, hidden: Tensor, weight: Tensor, bias: Tensor, left: Tensor, drafted: Tensor,
               targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log q of the targets (M,), and whether each was the likeliest."""
        return head_scores(*self.joined(hidden, weight, left, drafted), bias, targets)
