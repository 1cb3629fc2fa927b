"""The autoregressive twin: the same network with a causal mask, for comparisons of equal size.

    python train.py --objective autoregressive --checkpoint_dir checkpoints_ar

Each token is predicted from those before it. A row without [BOS] (the middle or the end of a long
story) starts from [PAD]. The twin predicts [EOS] itself, so its code of a text need not be told the
row's length where the story ends in the row; see `extra_nats`.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.tokens import BOS, EOS, MASK, PAD, ROW_KINDS, maskable, row_kind
from kinds.kind import Kind
from kinds.likelihood import Corrupted, Nelbo, measure_nats, row_sums
from network.attention import Cache
from network.hardware import device_of
from sampling.cached import CachedModel
from sampling.left_to_right import rows_of, write_causal
from sampling.noise import step_noise
from sampling.sampler import Sampler
from sampling.step import draw


def before_each(tokens: Tensor) -> Tensor:
    """What stands to the left of every token: (B, L) moved by one, [PAD] at the start."""
    return F.pad(tokens[:, :-1], (1, 0), value=PAD)


def next_tokens(tokens: Tensor, sort: type[Corrupted] = Corrupted) -> Corrupted:
    """A batch in which every token (B, L) is to be predicted from those before it; weights are 1.
    """
    wanted = tokens >= EOS  # text and [EOS]; never [MASK]
    return sort(tokens, before_each(tokens), wanted, wanted.float(), torch.ones(len(tokens)))


class Autoregressive(Kind):
    """Next-token prediction by the same network with a causal mask; no diffusion."""

    name, title = "autoregressive", "autoregressive twin"
    objectives = ("autoregressive",)
    causal = exact = True
    unmasks = False
    from_left = True
    unused = frozenset(("schedule", "t_min", "t_max", "sample_order", "sample_steps",
                        "time_conditioning", "self_conditioning"))
    unused_for = "the twin writes from left to right, knows no time and hides nothing"

    def corrupt_batch(self, tokens: Tensor, generator: torch.Generator | None = None) -> Corrupted:
        """Input and targets of next-token prediction for rows (B, L); nothing is random."""
        batch = next_tokens(tokens)
        return dataclasses.replace(batch, weight=batch.weight / batch.weight.sum())

    def nelbo(self, model: nn.Module, batches: Iterable[np.ndarray], seed: int = 0, draws: int = 1,
              numbers: Iterable[np.ndarray] | None = None, conditions: None = None) -> Nelbo:
        """The exact -log p of every row, as a `Nelbo` with everything hidden.

        [EOS] counts in the nats and not in the tokens, so that nats/token is per token of text as
        it is for diffusion. `seed` and `draws` change nothing; the twin has no conditions.
        """
        return measure_nats(model, batches, lambda clean, rows: [
            (next_tokens(clean), maskable(clean).sum(1))], numbers)

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
    def gap_nats(self, model: nn.Module, row: np.ndarray, gap: np.ndarray,
                 left_share: float = 0.0) -> float:
        """The exact -log p given the left side."""
        clean, hidden = torch.from_numpy(row)[None], torch.from_numpy(gap == MASK)[None]
        seen = Corrupted(clean, before_each(clean), hidden, hidden.float(), torch.ones(1))
        return float(row_sums(model, seen, device_of(model))[0][0])

    def protocol(self, draws: int) -> str:
        return "exact likelihood, left to right, [EOS] predicted"

    def write(self, model: nn.Module, lengths: Sequence[int], sampler: Sampler, seed: int = 0,
              conditions: None = None) -> list[np.ndarray]:
        """One story for each of `lengths`, which change nothing else: the twin ends its stories
        itself, with [EOS], or with the longest row."""
        starts = [np.array([BOS])] * len(lengths)
        return rows_of(write_causal(self.reader(model, sampler), starts, sampler,
                                    model.config.max_len, seed), starts)

    def reader(self, model: nn.Module, sampler: Sampler, conditions: None = None) -> CachedModel:
        return CachedModel(model, sampler)

    def fill(self, model: nn.Module, rows: Sequence[np.ndarray], sampler: Sampler, seed: int = 0,
             ) -> list[np.ndarray]:
        return [fill_from_the_left(model, row[None], sampler, seed + i, may_end=False)[0]
                for i, row in enumerate(rows)]


@torch.no_grad()
def fill_from_the_left(model: nn.Module, rows: np.ndarray, sampler: Sampler, seed: int = 0,
                       may_end: bool = True) -> np.ndarray:
    """Draws every [MASK] of the rows (B, L), each from what stands to its left, at the sampler's
    temperature, top-k and top-p.

    Where an [EOS] is drawn (only with `may_end`) the row ends: the rest of it becomes [PAD]. Every
    token goes through the network once, in front of a cache of those before it. Draws depend on
    (seed, row, position) alone.
    """
    device = device_of(model)
    rows = torch.tensor(rows, dtype=torch.int64)
    temperature = torch.tensor(sampler.temperature, device=device)
    alive = torch.arange(len(rows))  # numbers of the rows that have not ended: those of the cache
    cache = Cache()
    inputs = before_each(rows)  # the i-th is followed by token i
    for i in range(rows.shape[1]):
        wanted = torch.nonzero(rows[alive, i] == MASK)[:, 0]  # among `alive`
        if not len(wanted):
            continue
        new = inputs[alive, cache.length:i + 1].to(device)
        hidden = model.hidden(new, view=model.view(new.shape[1], cache=cache))[:, -1]
        logits = model.head(hidden[wanted.to(device)]).float()  # (B, V)
        if not may_end:
            logits[:, EOS] = -torch.inf
        numbers = alive[wanted]
        uniform = torch.tensor([step_noise(seed, int(row), i, 1)[1, 0] for row in numbers])
        drawn = draw(logits, uniform.to(device), temperature, sampler.top_k, sampler.top_p).cpu()
        rows[numbers, i] = drawn
        if i + 1 < rows.shape[1]:
            inputs[numbers, i + 1] = drawn
        going_on = torch.ones(len(alive), dtype=torch.bool)
        going_on[wanted] = drawn != EOS
        if not going_on.all():
            cache.keep_rows(going_on.to(device))
            alive = alive[going_on]
        if not len(alive):
            break
    rows[rows == MASK] = PAD
    return rows.numpy()
