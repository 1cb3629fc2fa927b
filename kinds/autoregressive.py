"""The autoregressive twin: the same network with a causal mask, for comparisons of equal size.

    python train.py --objective autoregressive --checkpoint_dir checkpoints_ar

Each token is predicted from those before it. A row without [BOS] (the middle or the end of a long
story) starts from [PAD]. The twin predicts [EOS] itself, so its code of a text need not be told the
row's length where the story ends in the row; see `extra_nats`.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.tokens import BOS, EOS, MASK, PAD, ROW_KINDS, maskable, row_kind
from kinds.likelihood import Corrupted, Nelbo, measure_nats, weighted_loss
from network.hardware import device_of
from sampling.loop import fill
from sampling.noise import step_noise
from sampling.rows import blank_story, draw_length
from sampling.sampler import Sampler
from sampling.step import draw, numpy_step


def before_each(tokens: Tensor) -> Tensor:
    """What stands to the left of every token: (B, L) moved by one, [PAD] at the start."""
    return F.pad(tokens[:, :-1], (1, 0), value=PAD)


class Autoregressive:
    """Loss, likelihood and sampling of a causal model, with the interface of DiscreteDiffusion."""

    kind = "autoregressive"

    def corrupt_batch(self, tokens: Tensor, generator: torch.Generator | None = None) -> Corrupted:
        """Input and targets of next-token prediction for rows (B, L); nothing is random."""
        wanted = (tokens >= EOS)  # text and [EOS]; never [MASK] in training
        return Corrupted(tokens, before_each(tokens), wanted, wanted.float() / wanted.sum(),
                         torch.ones(len(tokens)))

    def loss(self, model: nn.Module, batch: Corrupted) -> Tensor:
        """The mean of -log p over the targets, or a part's share of it, in nats/token."""
        return weighted_loss(model, batch)

    def nelbo(self, model: nn.Module, batches: Iterable[np.ndarray], seed: int = 0, draws: int = 1,
              numbers: Iterable[np.ndarray] | None = None, conditions: None = None) -> Nelbo:
        """The exact -log p of every row, as a `Nelbo` with everything hidden.

        [EOS] counts in the nats and not in the tokens, so that nats/token is per token of text as
        it is for diffusion. `seed` and `draws` change nothing; the twin has no conditions.
        """
        return measure_nats(model, batches, lambda clean, rows: [
            (self.corrupt_batch(clean), maskable(clean).sum(1))], numbers)

    def extra_nats(self, meta: dict, rows: Iterable[np.ndarray]) -> float:
        """What a text's code needs besides the tokens: each row's kind, and the length of the rows
        that end without [EOS], both under the training histogram (with one added to each count)."""
        histogram, longest = meta["length_histogram"], meta["seq_len"]
        totals = {kind: sum(histogram[kind].values()) + longest for kind in ROW_KINDS}
        nats = 0.0
        for row in rows:
            kind = row_kind(row)
            nats += np.log(sum(totals.values()) / totals[kind])
            if row[-1] != EOS:
                nats += np.log(totals[kind] / (1 + histogram[kind].get(str(len(row)), 0)))
        return float(nats)


@torch.no_grad()
def fill_from_the_left(model: nn.Module, rows: np.ndarray, sampler: Sampler, seed: int = 0,
                       may_end: bool = True) -> np.ndarray:
    """Draws every [MASK] of the rows (B, L), each from what stands to its left, at the sampler's
    temperature, top-k and top-p.

    Where an [EOS] is drawn (only with `may_end`) the row ends: the rest of it becomes [PAD]. The
    row up to there goes through the network for every token: this is for looking at a twin, not for
    serving it. Draws depend on (seed, row, position) alone.
    """
    device = device_of(model)
    rows = torch.tensor(rows, dtype=torch.int64)
    ended = torch.zeros(len(rows), dtype=torch.bool)
    for i in range(rows.shape[1]):
        wanted = torch.nonzero((rows[:, i] == MASK) & ~ended)[:, 0]
        if not len(wanted):
            continue
        before = F.pad(rows[wanted, :i], (1, 0), value=PAD).to(device)
        logits = model.head(model.hidden(before)[:, -1]).float()  # (B, V)
        if not may_end:
            logits[:, EOS] = -torch.inf
        uniform = torch.tensor([step_noise(seed, int(row), i, 1)[1, 0] for row in wanted])
        drawn = draw(logits, uniform.to(device), torch.tensor(sampler.temperature, device=device),
                     sampler.top_k, sampler.top_p).cpu()
        rows[wanted, i] = drawn
        ended[wanted] = drawn == EOS
        if ended.all():
            break
    rows[rows == MASK] = PAD
    return rows.numpy()


def write_stories(model: nn.Module, count: int, max_len: int, sampler: Sampler, seed: int = 0,
                  ) -> list[np.ndarray]:
    """`count` rows [BOS] story, with [EOS] where the model ended it, at most `max_len` long."""
    rows = np.full((count, max_len), MASK)
    rows[:, 0] = BOS
    return [row[row != PAD] for row in fill_from_the_left(model, rows, sampler, seed)]


def tell_stories(model: nn.Module, histogram: dict, sampler: Sampler, count: int, seed: int,
                 conditions: np.ndarray | None = None) -> list[np.ndarray]:
    """`count` whole rows of a model of either kind. A diffusion model's lengths are drawn from the
    length histogram of meta.json, and `conditions` (count, S) go with them; the twin ends its
    stories itself, and knows no order or steps."""
    longest = model.config.max_len
    if model.config.causal:
        return write_stories(model, count, longest, sampler, seed)
    rows = [blank_story(draw_length(histogram, seed, i) or longest - 2) for i in range(count)]
    return fill(numpy_step(model, sampler, conditions), rows, sampler, seed)
