"""The sampling loop: which positions, how many a step, which to hide again, and the noise. NumPy.

A sampler is an order (which positions first), a pace (how many in a step) and a way of hiding
tokens again. The loop is written over any `step` callable, so that a torch module and an exported
graph run the same loop:

    for state in unmask(step, tokens, Sampler(steps=64, temperature=0.8), seed=1):
        print(state.step, state.tokens)

Where things are decided: the order, and how many an adaptive pace takes, inside the step
(diffusion.UnmaskStep), for they need the network's probabilities; a planned pace in `plan`; what is
hidden again in `Remasking`.
"""

from cli import flag, require

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep import BOS, EOS, MASK, PAD, pad_rows, round_up

ORDERS = ("random", "confidence", "margin", "entropy")
PLANNED_PACES = ("cosine", "linear", "first_hitting")
ADAPTIVE_PACES = ("threshold", "entropy_bound")
PACES = PLANNED_PACES + ADAPTIVE_PACES
REMASKS = ("none", "remdm_cap", "remdm_rescale", "remdm_confidence", "corrector")
MAX_STEPS = 100_000
# `generate.py --preset`, chosen from the tables of samplers in docs/results.md
PRESETS = {name: dict(steps=steps, order="random", temperature=1.0, top_p=0.9)
           for name, steps in (("fast", 16), ("balanced", 32), ("best", 64))}
# First numbers of the seeds, so that no two uses of randomness share a stream. (3 and 4 are those
# of the evaluation masks in diffusion.py, 7 is that of quality.py.)
LENGTH_STREAM, NOISE_STREAM, HITTING_STREAM, REMASK_STREAM, LIMIT_STREAM = 1, 2, 5, 6, 8

# (tokens (B, L) int64, count (B,) int64, noise (B, 2, L) float64, numbers of the rows (B,) int64)
#   -> (tokens (B, L) int64, confidence (B, L) float32)
Step = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
# (tokens (B, L) int64, place in each row (B,) int64, tokens allowed there (B, V) bool, uniform (B,)
#  float64, numbers of the rows (B,) int64) -> (token (B,) int64, its probability (B,) float32)
Choice = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
                  tuple[np.ndarray, np.ndarray]]
# Of one row: hidden places from left to right, and which tokens (V,) bool may stand at each
Limits = Sequence[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class Sampler:
    """How to unmask. `check` raises UserError for values that mean nothing."""

    steps: int = flag(64, "network evaluations for a story, at most")
    temperature: float = flag(1.0, "0 is greedy, 1 the model's own distribution")
    top_k: int = flag(0, "draw among the k likeliest tokens; 0 is all")
    top_p: float = flag(1.0, "draw among the likeliest tokens that together reach p")
    order: str = flag("random", "which position first: random (ancestral), or by the largest "
                                "probability (confidence), the largest lead over the second token "
                                "(margin) or the smallest entropy")
    # cosine uncovers few tokens first, as in MaskGIT (arXiv 2202.04200)
    pace: str = flag("cosine", "tokens in a step: cosine (few at first), linear (alike), "
                               "first_hitting (random, as the process itself), or as many as the "
                               "network is sure of: threshold, entropy_bound")
    threshold: float = flag(0.9, "pace threshold: uncover every token at least this probable")
    gamma: float = flag(0.2, "pace entropy_bound: nats by which the joint entropy of the tokens of "
                             "a step may exceed their largest entropy")
    remask: str = flag("none", "hide tokens again: none, remdm_cap, remdm_rescale, "
                               "remdm_confidence or corrector")
    eta: float = flag(0.05, "how many: a share of the uncovered (remdm_cap, corrector), or of as "
                            "many as the process allows (remdm_rescale, remdm_confidence)")

    guidance: float = flag(1.0, "how much the condition counts: 0 not at all, 1 as trained, more "
                                "to stress it (classifier-free guidance, two evaluations a step)")

    def check(self) -> None:
        require(0 <= self.guidance < float("inf"), f"--guidance {self.guidance}: must be 0 or more")
        require(self.order in ORDERS, f"--order {self.order}: choose from {', '.join(ORDERS)}")
        require(self.pace in PACES, f"--pace {self.pace}: choose from {', '.join(PACES)}")
        require(self.remask in REMASKS, f"--remask {self.remask}: choose from {', '.join(REMASKS)}")
        require(self.remask == "none" or self.pace in PLANNED_PACES,
                f"--remask {self.remask} hides tokens by a plan, which --pace {self.pace} has not: "
                f"choose one of {', '.join(PLANNED_PACES)}")
        require(0 < self.threshold <= 1, f"--threshold {self.threshold}: must lie in (0, 1]")
        require(0 <= self.gamma < float("inf"), f"--gamma {self.gamma}: must be 0 or more")
        require(0 <= self.eta <= 1, f"--eta {self.eta}: must lie in [0, 1]")
        require(1 <= self.steps <= MAX_STEPS,
                f"--steps {self.steps}: must be from 1 to {MAX_STEPS}")
        require(0 <= self.temperature < float("inf"),
                f"--temperature {self.temperature}: must be 0 (greedy) or more")
        require(self.top_k >= 0, f"--top_k {self.top_k}: must be 0 (off) or more")
        require(0 < self.top_p <= 1, f"--top_p {self.top_p}: must lie in (0, 1]")

    @property
    def evaluations_per_step(self) -> int:
        """Of a row with a condition."""
        return 1 if self.guidance in (0, 1) else 2

    def check_used(self, given: set[str]) -> None:
        """Refuses flags that were given and would change nothing."""
        for name, used, by in (("threshold", self.pace == "threshold", "--pace threshold"),
                               ("gamma", self.pace == "entropy_bound", "--pace entropy_bound"),
                               ("eta", self.remask != "none", "a --remask other than none")):
            require(used or name not in given, f"--{name} belongs to {by}: add it, or leave "
                                               f"--{name} out")


@dataclass(frozen=True)
class State:
    """The batch after a step. Arrays are (B, L) but for the last, and the caller's to keep."""

    step: int  # 0 is the start; at most K
    nfe: int  # network evaluations so far
    tokens: np.ndarray  # int64, hidden ones are [MASK]
    uncovered: np.ndarray  # bool, what was hidden before this step and is not now
    hidden_again: np.ndarray  # bool, what is hidden now and was not before
    confidence: np.ndarray  # float32, probability of each drawn token when it was drawn, else 0
    evaluated: np.ndarray  # bool (B,), rows that were given to the network


def plan(hidden: np.ndarray, steps: int, pace: str) -> np.ndarray:
    """How many of `hidden` (B,) tokens to uncover in each step: (B, K) int64, rows sum to hidden.

    After step s of K a share cos(pi s / 2K) ("cosine") or 1 - s/K ("linear") is still hidden. An
    adaptive pace takes at least as many as "cosine" would have taken by then.
    """
    s = np.arange(steps + 1)
    if pace != "linear":
        # 1e-9: at the last step the cosine is 6e-17, and 1/2 must not fall to 0.49999.
        left = np.floor(hidden[:, None] * np.cos(np.pi / 2 * s / steps) + 1e-9).astype(np.int64)
    else:
        left = hidden[:, None] * (steps - s) // steps
    return left[:, :-1] - left[:, 1:]


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


def step_noise(seed: int, row: int, step: int, length: int) -> np.ndarray:
    """(2, length) uniforms in [0, 1): for the order and for the token of every position.

    A function of (seed, row, step) alone, so that a row's story does not depend on its batch.
    """
    return np.random.default_rng([NOISE_STREAM, seed, row, step]).random((2, length))


def unmask(step: Step, tokens: np.ndarray, sampler: Sampler, seed: int = 0,
           rows: Sequence[int] | None = None) -> Iterator[State]:
    """Uncovers every [MASK] of `tokens` (B, L); all other tokens are known and never change.

    Yields the state at the start and after every step. `rows` (default 0, 1, ...) number the rows
    for the noise: the same (seed, row number) gives the same story in any batch. Only rows in which
    something is to be uncovered are given to the network.
    """
    sampler.check()
    tokens = np.array(tokens, dtype=np.int64)
    size, width = tokens.shape
    rows = np.arange(size) if rows is None else np.asarray(rows)
    wanted = tokens == MASK
    lengths = (tokens != PAD).sum(1)
    pacing = Pacing(sampler, wanted.sum(1), seed, rows)
    nothing = np.zeros((size, width), bool)
    state = State(0, 0, tokens, nothing, nothing, np.zeros((size, width), np.float32),
                  np.zeros(size, bool))
    yield state
    for k in range(sampler.steps):
        masked = state.tokens == MASK
        counts, again = pacing.counts(k, masked.sum(1))  # (B,) each
        again = np.where(counts > 0, again, 0)  # a row that rests keeps what it has, in any batch
        active = np.flatnonzero(counts)
        if not len(active):  # nothing to evaluate
            continue
        noise = np.zeros((len(active), 2, width))
        for line, i in zip(noise, active, strict=True):
            line[:, :lengths[i]] = step_noise(seed, rows[i], k, lengths[i])
        new, confidence = state.tokens.copy(), state.confidence.copy()
        new[active], drawn = step(state.tokens[active], counts[active], noise, rows[active])
        uncovered = masked & (new != MASK)
        confidence[active] = np.where(uncovered[active], drawn, confidence[active])
        # what was there before the step, or for the corrector also what came with it
        there = wanted & (new != MASK) & (pacing.corrector | ~uncovered)
        gone = pacing.choose(k, there, again, confidence)
        new[gone], confidence[gone] = MASK, 0
        state = State(k + 1, state.nfe + 1, new, uncovered & ~gone, gone & ~masked, confidence,
                      counts > 0)
        yield state


def draw_limited(choice: Choice, tokens: np.ndarray, limits: Sequence[Limits], seed: int = 0,
                 rows: Sequence[int] | None = None) -> Iterator[State]:
    """Draws the places of `tokens` (B, L) at which only some tokens are allowed, before `unmask`.

    `limits` are those of each row. Place by place from the left, each given what is visible and
    those before it, with one network evaluation and one uniform that is a function of (seed, row
    number, place) alone. With one place the finished row so has the model's own distribution, in an
    order that begins there, given that the place holds one of its tokens: exactly (at temperature 1
    and one token a step). With several, each place is so conditioned on those before it, and not on
    what the later ones allow.

    Yields the state after every place: step 0, for the loop itself has not begun.
    """
    tokens = np.array(tokens, dtype=np.int64)
    rows = np.arange(len(tokens)) if rows is None else np.asarray(rows)
    for k in range(max(map(len, limits), default=0)):
        active = np.array([i for i, places in enumerate(limits) if len(places) > k])
        places = np.array([limits[i][k][0] for i in active])
        uniform = np.array([np.random.default_rng([LIMIT_STREAM, seed, row, place]).random()
                            for row, place in zip(rows[active], places, strict=True)])
        drawn, probability = choice(tokens[active], places, np.stack(
            [limits[i][k][1] for i in active]), uniform, rows[active])
        tokens = tokens.copy()
        tokens[active, places] = drawn
        uncovered, evaluated = np.zeros(tokens.shape, bool), np.zeros(len(tokens), bool)
        confidence = np.zeros(tokens.shape, np.float32)
        uncovered[active, places], confidence[active, places] = True, probability
        evaluated[active] = True
        yield State(0, k + 1, tokens, uncovered, np.zeros_like(uncovered), confidence, evaluated)


class Kept:
    """What `make` gives for a row, made once: before the row's first step.

    Each alone, so that a story does not depend on its batch. Those of the last `SIZE` rows stay.
    """

    SIZE = 32

    def __init__(self, make: Callable[[int], Any]):
        self.make, self.known = make, {}

    def of(self, rows: Sequence[int]) -> list[Any]:
        for row in map(int, rows):
            # put at the end: the first of the dictionary is the one that was not used for longest
            self.known[row] = self.known.pop(row) if row in self.known else self.make(row)
        values = [self.known[int(row)] for row in rows]
        for row in list(self.known)[:-max(self.SIZE, len(rows))]:
            del self.known[row]
        return values


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
        self.left = hidden[:, None] - self.plan.cumsum(1)  # (B, K) hidden after each step

    def counts(self, k: int, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many to uncover in step k, at least, and then to hide again, with `hidden` (B,)
        hidden now."""
        none = np.zeros_like(hidden)
        if self.sampler.pace in ADAPTIVE_PACES:
            return np.where(hidden > 0, np.maximum(hidden - self.left[:, k], 1), 0), none
        if self.corrector:
            left = self.left[:, k // 2]
            if k % 2:  # what the step before hid comes back
                return hidden - left, none
            last = k + 1 == self.sampler.steps  # no evaluation left to bring anything back
            return hidden - left, none if last else self.amount(
                k, self.sampler.eta * (self.total - left))
        if self.sampler.remask == "none":
            return self.plan[:, k], none
        there, left = self.total - hidden, self.left[:, k]
        most = np.minimum(1.0, left / np.maximum(there, 1))
        sigma = (np.minimum(self.sampler.eta, most) if self.sampler.remask == "remdm_cap"
                 else self.sampler.eta * most)
        again = self.amount(k, sigma * there)
        return hidden - left + again, again

    def amount(self, k: int, expected: np.ndarray) -> np.ndarray:
        """`expected` (B,) rounded up or down at random, so that its mean is kept."""
        uniform = [self._random(row, k).random() for row in self.rows]
        return np.floor(expected + uniform).astype(np.int64)

    def choose(self, k: int, there: np.ndarray, again: np.ndarray, confidence: np.ndarray,
               ) -> np.ndarray:
        """`again` (B,) of the tokens marked in `there` (B, L), as bool (B, L)."""
        chosen = np.zeros_like(there)
        for i in np.flatnonzero(again):
            rng = self._random(self.rows[i], k)
            rng.random()  # the one of `amount`
            positions = np.flatnonzero(there[i])
            weight = np.exp(-confidence[i, positions], dtype=np.float64)
            if self.sampler.remask != "remdm_confidence":
                weight = np.ones(len(positions))
            # exponential races: drawn without replacement, each with its weight
            race = rng.exponential(size=len(positions)) / weight
            chosen[i, positions[np.argsort(race, kind="stable")[:again[i]]]] = True
        return chosen

    def _random(self, row: int, k: int) -> np.random.Generator:
        return np.random.default_rng([REMASK_STREAM, self.seed, row, k])


# ---- rows to fill --------------------------------------------------------------------------------

def blank_story(length: int) -> np.ndarray:
    """[BOS], `length` times [MASK], [EOS]."""
    return np.array([BOS, *[MASK] * length, EOS], dtype=np.int64)


def condition_row(ids: Sequence[int], max_len: int) -> np.ndarray:
    """[BOS], the token ids of a condition, [EOS], [PAD] up to `max_len`: always of one length, so
    that what the encoder makes of it is the same in any company. Ids too many are cut off."""
    return pad_rows([[BOS, *ids[:max_len - 2], EOS]], max_len)[0]


def draw_length(histogram: dict, seed: int, row: int, at_least: int = 1) -> int | None:
    """Tokens of text in a whole story, drawn from the length histogram of meta.json.

    A function of (seed, row) alone. None if no story of the data has `at_least` tokens.
    """
    counts = {int(length) - 2: count for length, count in histogram.get("story", {}).items()}
    counts = {length: count for length, count in counts.items() if length >= at_least}
    if not counts:
        return None
    weights = np.array(list(counts.values()), dtype=np.float64)
    uniform = np.random.default_rng([LENGTH_STREAM, seed, row]).random()
    index = np.searchsorted(weights.cumsum() / weights.sum(), uniform, side="right")
    return list(counts)[min(int(index), len(counts) - 1)]


def unmask_rows(step: Step, rows: Sequence[np.ndarray], sampler: Sampler, seed: int = 0,
                batch_size: int = 32, choice: Choice | None = None,
                limits: Sequence[Limits] | None = None) -> Iterator[tuple[list[int], State]]:
    """Fills rows of any lengths; yields (numbers of the rows, state) after every step.

    With `choice`, the places of `limits` (an entry for each row) are drawn first: `draw_limited`.

    Rows of the same padded width share a batch, so that a row is padded alike in any company; the
    width of the first row comes first. The state of a batch with nothing left hidden is its last.
    """
    widths = [round_up(len(row)) for row in rows]
    for width in dict.fromkeys(widths):
        same = [i for i, w in enumerate(widths) if w == width]
        for start in range(0, len(same), batch_size):
            part = same[start:start + batch_size]
            tokens = pad_rows([rows[i] for i in part])
            if choice is not None and limits is not None:
                for state in draw_limited(choice, tokens, [limits[i] for i in part], seed, part):
                    tokens = state.tokens
                    yield part, state
            for state in unmask(step, tokens, sampler, seed, part):
                yield part, state


def fill(step: Step, rows: Sequence[np.ndarray], sampler: Sampler, seed: int = 0,
         batch_size: int = 32) -> list[np.ndarray]:
    """The filled rows, in the order given, without padding. Shows a progress bar."""
    filled = list(rows)
    states = unmask_rows(step, rows, sampler, seed, batch_size)
    for part, state in tqdm(states, desc="unmasking", unit=" steps", leave=False, disable=None):
        for i, tokens in zip(part, state.tokens, strict=True):
            filled[i] = tokens[:len(rows[i])]
    return filled
