"""How many tokens are uncovered in each step, and which are hidden again. A library of loop.py.

A planned pace is worked out here, in `plan`; of an adaptive one only the least that it takes, for
the rest needs the network's probabilities (see step.py).
"""

from collections.abc import Sequence

import numpy as np

from sampling.noise import HITTING_STREAM, REMASK_STREAM
from sampling.sampler import ADAPTIVE_PACES, Sampler


def plan(hidden: np.ndarray, steps: int, pace: str) -> np.ndarray:
    """How many of `hidden` (B,) tokens to uncover in each step: (B, K) int64, rows sum to hidden.

    After step s of K a share cos(pi s / 2K) ("cosine") or 1 - s/K ("linear") is still hidden. An
    adaptive pace takes at least as many as "cosine" would have taken by then.
    """
    s = np.arange(steps + 1)
    if pace != "linear":
        # 1e-9: at the last step the cosine is 6e-17, and 1/2 must not fall to 0.49999.
        still = np.floor(hidden[:, None] * np.cos(np.pi / 2 * s / steps) + 1e-9).astype(np.int64)
    else:
        still = hidden[:, None] * (steps - s) // steps
    return still[:, :-1] - still[:, 1:]


def hitting_plan(hidden: np.ndarray, steps: int, seed: int, rows: Sequence[int]) -> np.ndarray:
    """The same for "first_hitting": (B, K) int64.

    Every token has a time of its own, uniform in [0, 1], at which the process uncovers it (arXiv
    2409.02908, first hitting; with m(t) = t).
    The tokens whose times lie in one of K equal intervals are uncovered together, and an interval
    without any costs nothing: with many steps one token is uncovered at a time, exactly.
    """
    counts = np.zeros((len(hidden), steps), np.int64)
    for line, n, row in zip(counts, hidden, rows, strict=True):
        times = np.random.default_rng([HITTING_STREAM, seed, row]).random(n)
        np.add.at(line, (times * steps).astype(np.int64), 1)
    return counts


class Pacing:
    """How many tokens of every row are uncovered and hidden again in each step, and which of them.

    remdm_*: in the step from time t to s the process hides an uncovered token with a probability
    sigma up to sigma_max = (1 - alpha_s) / alpha_t and uncovers more, so that as many are hidden
    after it as without (arXiv 2503.00307). sigma is min(eta, sigma_max) for cap, eta
    sigma_max for rescale; "confidence" spreads the latter over the tokens by exp(-probability with
    which each was drawn), where the paper's sigmas sum to sigma_max over the whole row: at most one
    token a step there, eta sigma_max of all here. corrector: after every step a share eta of the
    uncovered tokens is hidden and drawn anew with one more evaluation (arXiv 2205.14987, as
    predictor and corrector).
    """

    def __init__(self, sampler: Sampler, hidden: np.ndarray, seed: int, rows: np.ndarray):
        self.sampler, self.total, self.seed, self.rows = sampler, hidden, seed, rows
        self.corrector = sampler.remask == "corrector"
        steps = -(-sampler.steps // 2) if self.corrector else sampler.steps
        self.plan = (hitting_plan(hidden, steps, seed, rows) if sampler.pace == "first_hitting"
                     else plan(hidden, steps, sampler.pace))  # (B, K)
        self.hidden_after = hidden[:, None] - self.plan.cumsum(1)  # (B, K), of each step

    def counts(self, k: int, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many to uncover in step k, at least, and then to hide again, with `hidden` (B,)
        hidden now."""
        none = np.zeros_like(hidden)
        if self.sampler.pace in ADAPTIVE_PACES:
            return np.where(hidden > 0, np.maximum(hidden - self.hidden_after[:, k], 1), 0), none
        if self.corrector:
            after = self.hidden_after[:, k // 2]
            if k % 2:  # what the step before hid comes back
                return hidden - after, none
            last = k + 1 == self.sampler.steps  # no evaluation left to bring anything back
            return hidden - after, none if last else self.amount(
                k, self.sampler.eta * (self.total - after))
        if self.sampler.remask == "none":
            return self.plan[:, k], none
        uncovered, after = self.total - hidden, self.hidden_after[:, k]
        sigma_max = np.minimum(1.0, after / np.maximum(uncovered, 1))
        sigma = (np.minimum(self.sampler.eta, sigma_max) if self.sampler.remask == "remdm_cap"
                 else self.sampler.eta * sigma_max)
        again = self.amount(k, sigma * uncovered)
        return hidden - after + again, again

    def amount(self, k: int, expected: np.ndarray) -> np.ndarray:
        """`expected` (B,) rounded up or down at random, so that its mean is kept."""
        uniform = [self._random(row, k).random() for row in self.rows]
        return np.floor(expected + uniform).astype(np.int64)

    def choose(self, k: int, candidates: np.ndarray, again: np.ndarray,
               confidence: np.ndarray) -> np.ndarray:
        """`again` (B,) of the tokens marked in `candidates` (B, L), as bool (B, L)."""
        chosen = np.zeros_like(candidates)
        for i in np.flatnonzero(again):
            rng = self._random(self.rows[i], k)
            rng.random()  # the one of `amount`
            positions = np.flatnonzero(candidates[i])
            weight = np.exp(-confidence[i, positions], dtype=np.float64)
            if self.sampler.remask != "remdm_confidence":
                weight = np.ones(len(positions))
            # exponential races: drawn without replacement, each with its weight
            race = rng.exponential(size=len(positions)) / weight
            chosen[i, positions[np.argsort(race, kind="stable")[:again[i]]]] = True
        return chosen

    def _random(self, row: int, k: int) -> np.random.Generator:
        return np.random.default_rng([REMASK_STREAM, self.seed, row, k])
