"""Drafts of what a model would write, for the price of small products. A library of model.py.

The head reads what the last causal pass made of a token and goes on from there alone, token by
token, without the network: a state of `rank` numbers, moved by every drafted token. Drafts are
verified whatever they were drawn from, so that it costs no exactness, only that fewer may stand.
(arXiv 2402.05109 lets the heads of a left-to-right model depend on what was drafted before them;
here one head is used for every place, as a recurrence: arXiv 2403.09919.)

Where the network itself drafts a block in one evaluation, each place knows nothing of what is drawn
at the place before: there the head tells it, by logits of low rank that are added.

Drafts are of the first `DRAFTED` ids alone: a tokenizer learns frequent pieces first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from network.layers import Linear, rms_norm

DRAFTED = 4096  # 97 % of the slice's text at a vocabulary of 8,192


class DraftHead(nn.Module):
    """R is the rank, W at most `DRAFTED`. sampling/draft_head.py computes the same in NumPy."""

    def __init__(self, vocab_size: int, width: int, rank: int):
        super().__init__()
        self.read = Linear(width, rank)
        self.mix, self.back = Linear(2 * rank, 2 * rank), Linear(2 * rank, rank, std=0.0)
        self.tell = Linear(rank, rank, std=0.0)
        self.before = nn.Parameter(torch.randn(vocab_size, rank) / 2)  # A
        self.behind = nn.Parameter(torch.randn(min(vocab_size, DRAFTED), rank) / rank)  # B

    @torch.no_grad()
    def start_from(self, vocabulary: Tensor) -> None:
        """Reads and speaks as the best approximation of this rank to the vocabulary head (V, D):
        then only the step from a token to the next has to be learned."""
        rank = self.behind.shape[1]
        u, s, v = torch.linalg.svd(vocabulary.float(), full_matrices=False)
        rank = min(rank, len(s))
        self.read.weight.zero_()
        self.behind[:, :rank] = (u[:, :rank] * s[:rank].sqrt())[:len(self.behind)]
        self.read.weight[:rank] = s[:rank].sqrt()[:, None] * v[:rank]

    def start(self, hidden: Tensor) -> Tensor:
        """The state (..., R) of hidden states (..., D), each of the token before the first one
        that `after` is told of."""
        return self.read(hidden.float())

    def after(self, state: Tensor, tokens: Tensor) -> Tensor:
        """The state (..., R) behind tokens (...,)."""
        seen = torch.cat([rms_norm(state), self.before[tokens]], dim=-1)
        return state + self.back(F.relu(self.mix(seen)).square())

    def logits(self, state: Tensor) -> Tensor:
        """(..., W) of the token behind."""
        return state @ self.behind.T

    def told(self, tokens: Tensor) -> Tensor:
        """(..., W): what tokens (...,) that the network did not see add to its logits of the places
        behind them."""
        return self.tell(self.before[tokens]) @ self.behind.T
