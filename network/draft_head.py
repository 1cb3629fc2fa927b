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
    """R is the rank, W at most `DRAFTED`. sampling/draft_head.py computes the same in NumPy.

    What it knows of the tokens, A (V, R) and B (W, R), it reads off the model's own embedding and
    vocabulary head: two tables of its own would be larger than all the rest of it together.
    """

    def __init__(self, embedding: nn.Embedding, vocabulary: Linear, rank: int):
        super().__init__()
        self._model = embedding, vocabulary  # in a tuple: they are not the head's own
        self.drafted = min(len(embedding.weight), DRAFTED)  # W
        width = embedding.weight.shape[1]
        self.read = Linear(width, rank)
        self.mix, self.back = Linear(2 * rank, 2 * rank), Linear(2 * rank, rank, std=0.0)
        self.tell = Linear(rank, rank, std=0.0)
        self.before = Linear(width, rank, std=width ** -0.5 / 2)
        self.behind = Linear(width, rank)

    @torch.no_grad()
    def start_from_vocabulary(self) -> None:
        """Reads and speaks as the best approximation of this rank to the vocabulary head (V, D):
        then only the step from a token to the next has to be learned."""
        _, vocabulary = self._model
        _, s, v = torch.linalg.svd(vocabulary.weight.float(), full_matrices=False)
        rank = min(len(self.read.weight), int((s > 1e-6 * s[0]).sum()))
        s, v = s[:rank, None].sqrt(), v[:rank]
        self.read.weight.zero_()
        self.behind.weight.zero_()
        self.read.weight[:rank], self.behind.weight[:rank] = s * v, v / s

    def told_of(self, tokens: Tensor) -> Tensor:
        """A[tokens], (..., R)."""
        embedding, _ = self._model
        return self.before(rms_norm(embedding.weight.detach()[tokens].float()))

    def speaks(self) -> Tensor:
        """B (W, R)."""
        _, vocabulary = self._model
        return self.behind(vocabulary.weight.detach()[:self.drafted].float())

    @torch.no_grad()
    def parts(self) -> dict[str, Tensor]:
        """The matrices with which sampling/draft_head.py computes the same, FP32, by their names
        there."""
        embedding, _ = self._model
        every = torch.arange(len(embedding.weight), device=embedding.weight.device)
        return {**{name: getattr(self, name).weight.detach().float() for name in (
            "read", "mix", "back", "tell")}, "before": self.told_of(every), "behind": self.speaks()}

    def start(self, hidden: Tensor) -> Tensor:
        """The state (..., R) of hidden states (..., D), each of the token before the first one
        that `after` is told of."""
        return self.read(hidden.float())

    def after(self, state: Tensor, tokens: Tensor) -> Tensor:
        """The state (..., R) behind tokens (...,)."""
        seen = torch.cat([rms_norm(state), self.told_of(tokens)], dim=-1)
        return state + self.back(F.relu(self.mix(seen)).square())

    def logits(self, state: Tensor) -> Tensor:
        """(..., W) of the token behind."""
        return state @ self.speaks().T

    def told(self, tokens: Tensor) -> Tensor:
        """(..., W): what tokens (...,) that the network did not see add to its logits of the places
        behind them."""
        return self.tell(self.told_of(tokens)) @ self.speaks().T
