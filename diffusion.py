"""The mathematics of masked diffusion: schedules, corruption, loss, likelihood bound, unmasking.

A library: nothing to run here.

    diffusion = DiscreteDiffusion(schedule="linear", objective="masked_ce")
    loss = diffusion.loss(model, tokens, generator)           # scalar, differentiable
    bound = diffusion.nelbo(model, batches)                   # bound.nats_per_token
    for state in diffusion.unmask(model, tokens, Sampler()):  # the loop of sampling/
        ...

Forward process: at time t in (0, 1] every maskable token of a row becomes [MASK] independently
with probability m(t). [BOS], [EOS] and [PAD] are never masked and never in the loss.
"""

from cli import require

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corpus.tokens import MASK, length_nats, maskable
from kinds.kind import Kind
from kinds.likelihood import ConditionsOf, Corrupted, Nelbo, measure_nats, weighted_loss
from network.hardware import device_of
from sampling.loop import Choice, State, Step, fill, unmask
from sampling.noise import GAP_STREAM, MASK_STREAM, SHIFT_STREAM
from sampling.rows import blank_story
from sampling.sampler import Sampler
from sampling.step import UnmaskStep, numpy_choice, numpy_step


class CosineSchedule:
    """m(t) = sin(pi t / 2): the share cos(pi (1 - t) / 2) of MaskGIT (arXiv 2202.04200)."""

    def mask_ratio(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def rate(self, t: Tensor) -> Tensor:
        """m'(t)."""
        return math.pi / 2 * torch.cos(math.pi / 2 * t)


class LinearSchedule:
    """m(t) = t."""

    def mask_ratio(self, t: Tensor) -> Tensor:
        return t

    def rate(self, t: Tensor) -> Tensor:
        """m'(t)."""
        return torch.ones_like(t)


SCHEDULES = {"cosine": CosineSchedule, "linear": LinearSchedule}
OBJECTIVES = ("masked_ce", "elbo")


class DiscreteDiffusion(Kind):
    """Masked diffusion: corruption, training loss, likelihood bound and sampling for one schedule
    and objective."""

    name = "diffusion"
    objectives = OBJECTIVES

    def __init__(self, schedule: str = "linear", objective: str = "masked_ce",
                 between: tuple[float, float] = (0.0, 1.0)):
        """`between` are the first and the last time t of training batches."""
        require(schedule in SCHEDULES, f"schedule {schedule!r}: choose {' or '.join(SCHEDULES)}")
        require(objective in OBJECTIVES, f"objective {objective!r}: choose "
                                         f"{' or '.join(OBJECTIVES)}")
        require(objective != "elbo" or between == (0, 1), "--objective elbo: a bound is over all "
                "times; leave out --t_min and --t_max")
        self.schedule, self.objective = SCHEDULES[schedule](), objective
        self.between = between

    @classmethod
    def of_run(cls, config: Any) -> "DiscreteDiffusion":
        return cls(config.schedule, config.objective, config.between)

    def times(self, count: int, generator: torch.Generator | None = None,
              between: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """(count,) float64 times, one in each of `count` equal intervals `between` two, shuffled.

        Stratifying over the whole batch lowers the variance of the loss (arXiv 2107.00630, I.1).
        """
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        first, last = between
        return first + (last - first) * (
            1 - (torch.randperm(count, generator=generator) + u) / count)

    def corrupt(self, tokens: Tensor, t: Tensor, generator: torch.Generator | None = None,
                ) -> Corrupted:
        """Hides tokens of `tokens` (B, L) at times `t` (B,), at least one in every row.

        Runs on the CPU, where a seed means the same on every machine. With n maskable tokens a row
        has none hidden with probability (1 - m)^n; such a draw teaches nothing. So the mask is
        drawn given that it is not empty; "elbo" multiplies the weight of the row by
        P(not empty) = 1 - (1 - m)^n, which leaves the expected loss as it was.
        """
        can = maskable(tokens)  # (B, L)
        n = can.sum(1)  # (B,)
        require(bool((n > 0).all()), "a row without any text cannot be masked")
        m = self.schedule.mask_ratio(t.double())  # (B,)
        masked, not_empty = hide_some(can, m, generator)
        # Weights, so that the loss is a sum that may be split over micro-batches and ranks.
        if self.objective == "elbo":  # m'/m on sums, arXiv 2406.07524 eq. 10, per token of text
            row_weight = not_empty * self.schedule.rate(t.double()) / m / n.sum()
        else:
            row_weight = torch.full_like(m, 1 / float(masked.sum()))
        return Corrupted(tokens, tokens.masked_fill(masked, MASK), masked,
                         (row_weight[:, None] * masked).float(), m.float())

    def corrupt_batch(self, tokens: Tensor, generator: torch.Generator | None = None) -> Corrupted:
        """`corrupt` at stratified `times`, those `between`."""
        return self.corrupt(tokens, self.times(len(tokens), generator, self.between), generator)

    def loss(self, model: nn.Module, tokens: Tensor | Corrupted,
             generator: torch.Generator | None = None) -> Tensor:
        """The training loss, a differentiable scalar in nats/token.

        `tokens` (B, L) are corrupted here at stratified times (noise of `generator`, by default
        torch's global one); a part of an already corrupted batch gives its share of the loss.
        """
        if isinstance(tokens, Tensor):
            tokens = self.corrupt_batch(tokens, generator)
        return weighted_loss(model, tokens)

    def nelbo(self, model: nn.Module, batches: Iterable[np.ndarray], seed: int = 0,
              draws: int = 1, numbers: Iterable[np.ndarray] | None = None,
              conditions: ConditionsOf | None = None) -> Nelbo:
        """The exact any-order bound, stratified over the number of hidden tokens.

        For a row of n tokens NELBO = n E_k[mean over the k hidden of -log p], k uniform on 1..n:
        the mean over all orders in which the tokens could be uncovered (arXiv 2110.02037, arXiv
        2406.03736). It does not depend on the schedule.

        Args:
            batches: (B, L) int64 each.
            numbers: the numbers of the rows of each batch, by default 0, 1, ... Masks depend on
                (seed, number, draw) alone, so batching changes nothing.
            conditions: gives the conditions of the rows with these numbers.
        """
        def hide(clean: Tensor, rows: np.ndarray) -> Iterator[tuple[Corrupted, Tensor]]:
            for draw in range(draws):
                masked, k, n = stratified_masks(clean, rows, draw, draws, seed)
                yield Corrupted(clean, clean.masked_fill(masked, MASK), masked, masked.float(),
                                (k / n).float()), k

        return measure_nats(model, batches, hide, numbers, conditions)

    def extra_nats(self, meta: dict, rows: Iterable[np.ndarray]) -> float:
        """What a text's code needs besides the tokens: the kind and length of every row."""
        return length_nats(meta, rows)

    @torch.no_grad()
    def gap_nats(self, model: nn.Module, row: np.ndarray, gap: np.ndarray,
                 left_share: float = 0.0) -> float:
        """Exactly the -log p of who fills the gap token by token from the left, both sides in view,
        as `--order left` with a step for each does: no bound, and lower than the one over all
        orders. `left_share` is the sampler's."""
        step = UnmaskStep(model, Sampler(order="left", left_share=left_share))
        tokens, clean = torch.from_numpy(gap)[None], torch.from_numpy(row)[None]
        tokens, clean = (x.to(device_of(model)) for x in (tokens, clean))
        nats, training, carried = 0.0, model.training, None
        model.eval()
        while (hidden := tokens == MASK).any():
            first = hidden[0].nonzero()[:1]  # (1, 1)
            ratio = hidden.sum(1) / maskable(clean).sum(1)
            if getattr(model, "self_conditioning", 0):
                carried = step.known(tokens, int(hidden.sum()), ratio, None, None)
            logits = step.logits(tokens, first, ratio, None, carried)  # (1, 1, V)
            if left_share:
                logits = step.with_left(tokens, first, logits, None)
            nats -= float(logits[0, 0].log_softmax(-1)[clean[0, first[0, 0]]])
            tokens = tokens.scatter(1, first, clean.gather(1, first))
        model.train(training)
        return nats

    def gap_bound(self, model: nn.Module, row: np.ndarray, gap: np.ndarray, draws: int, seed: int,
                  number: int) -> float:
        """The bound over all orders of filling it, the number of hidden tokens stratified over the
        draws; `number` is the row's, for the masks."""
        places = np.flatnonzero(gap == MASK)

        def hide(clean: Tensor, _: np.ndarray) -> Iterator[tuple[Corrupted, Tensor]]:
            for draw in range(draws):
                rng = np.random.default_rng([GAP_STREAM, seed, number, draw])
                k = int((draw + rng.random()) / draws * len(places)) + 1
                masked = torch.zeros_like(clean, dtype=torch.bool)
                masked[0, rng.permutation(places)[:k]] = True
                yield Corrupted(clean, clean.masked_fill(masked, MASK), masked, masked.float(),
                                masked.sum(1) / maskable(clean).sum(1)), torch.tensor([k])

        bound = measure_nats(model, [row[None]], hide)
        return float(len(places) * (bound.nats / bound.k).mean())

    def protocol(self, draws: int) -> str:
        return f"any-order NELBO, mask count stratified over 1..n, {draws} masks a row"

    def write(self, model: nn.Module, lengths: Sequence[int], sampler: Sampler, seed: int = 0,
              conditions: np.ndarray | None = None) -> list[np.ndarray]:
        rows = [blank_story(length) for length in lengths]
        return fill(self.step(model, sampler, conditions), rows, sampler, seed)

    def fill(self, model: nn.Module, rows: Sequence[np.ndarray], sampler: Sampler, seed: int = 0,
             ) -> list[np.ndarray]:
        return fill(self.step(model, sampler), rows, sampler, seed)

    def step(self, model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None,
             ) -> Step:
        require(self.from_left or not sampler.left_share, f"--left_share: this is a {self.name} "
                "model, which reads with both sides in view alone; leave it out")
        return numpy_step(model, sampler, conditions)

    def choice(self, model: nn.Module, sampler: Sampler, conditions: np.ndarray | None = None,
               ) -> Choice:
        return numpy_choice(model, sampler, conditions)

    def describe(self, sampler: Sampler, seed: int) -> str:
        return (f"temperature {sampler.temperature:g}, {sampler.steps} steps, `{sampler.order}` "
                f"order, seed {seed}")

    def unmask(self, model: nn.Module, tokens: np.ndarray, sampler: Sampler, seed: int = 0,
               rows: Sequence[int] | None = None, conditions: np.ndarray | None = None,
               ) -> Iterator[State]:
        """The loop of sampling/loop.py with this model: fills every [MASK] of `tokens` (B, L), step
        by step.

        `conditions` (N, ...) belong to the rows with the numbers 0 to N - 1.
        """
        return unmask(self.step(model, sampler, conditions), tokens, sampler, seed, rows)


def hide_some(can: Tensor, m: Tensor, generator: torch.Generator | None = None,
              ) -> tuple[Tensor, Tensor]:
    """Which of the places marked in `can` (B, L), each independently with probability m (B,), given
    that it is at least one in every row: (B, L) bool; and the probability (B,) of that."""
    n = can.sum(1)  # (B,)
    # 1. One uniform for every position; position i is hidden if u_i < m.
    u = torch.rand(can.shape, generator=generator, dtype=torch.float64)
    u = u.masked_fill(~can, 2.0)  # (B, L)
    # 2. Condition on the smallest uniform lying below m. Its distribution function is
    #    1 - (1 - u)^n; v is its quantile, which is shrunk to the part below m. Given the
    #    smallest, the others are uniform above it, so they are moved along.
    low, first = u.min(1)
    v = -torch.expm1(n * torch.log1p(-low))
    not_empty = -torch.expm1(n * torch.log1p(-m))
    new_low = -torch.expm1(torch.log1p(-v * not_empty) / n)
    u = new_low[:, None] + (u - low[:, None]) * ((1 - new_low) / (1 - low))[:, None]
    masked = can & (u < m[:, None])
    masked[torch.arange(len(can)), first] = True  # also where rounding put u at m
    return masked, not_empty


def stratified_masks(clean: Tensor, rows: np.ndarray, draw: int, draws: int, seed: int,
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (B, L) that hide k of n tokens, with k stratified over 1..n; and k and n, (B,).

    The quantiles of k follow a randomly shifted golden-ratio sequence: spread evenly over any run
    of rows, uniform for each.
    """
    can = maskable(clean).numpy()
    n = can.sum(1)
    shift = np.random.default_rng([SHIFT_STREAM, seed]).random()
    quantile = (shift + (rows * draws + draw) * ((5 ** 0.5 - 1) / 2)) % 1  # (B,) in [0, 1)
    k = np.floor(quantile * n).astype(np.int64) + 1
    masked = np.zeros_like(can)
    for i, row in enumerate(rows):
        rng = np.random.default_rng([MASK_STREAM, seed, row, draw])
        masked[i, rng.permutation(np.flatnonzero(can[i]))[:k[i]]] = True
    return torch.from_numpy(masked), torch.from_numpy(k), torch.from_numpy(n)
