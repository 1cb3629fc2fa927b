"""The loop that uncovers every [MASK] of a batch, in NumPy. A library for whatever samples.

    for state in unmask(step, tokens, Sampler(steps=64, temperature=0.8), seed=1):
        print(state.step, state.tokens)

It is written over any `step`, so that a torch module (step.py) and an exported graph
(jetson/engine_runtime.py) run the same loop. A step decides the order, and how many an adaptive
pace takes; paces.py decides the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from corpus.tokens import MASK, PAD, pad_rows, round_up
from sampling.noise import LIMIT_STREAM, step_noise
from sampling.paces import Pacing
from sampling.sampler import Sampler

# What a model with self-conditioning expects at every place that is still hidden, (B, L, 2K)
# float32: the K likeliest tokens and their probabilities; zeros elsewhere. None: nothing yet, or
# another model
Carried = np.ndarray | None
# (tokens (B, L) int64, count (B,) int64, noise (B, 2, L) float64, numbers of the rows (B,) int64,
#  what the step before expected of them)
#   -> (tokens (B, L) int64, confidence (B, L) float32, what is carried on)
Step = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Carried],
                tuple[np.ndarray, np.ndarray, Carried]]
# (tokens (B, L) int64, place in each row (B,) int64, tokens allowed there (B, V) bool, uniform (B,)
#  float64, numbers of the rows (B,) int64) -> (token (B,) int64, its probability (B,) float32)
Choice = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
                  tuple[np.ndarray, np.ndarray]]
# Of one row: hidden places from left to right, and which tokens (V,) bool may stand at each
Limits = Sequence[tuple[int, np.ndarray]]


def only_hidden(carried: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """What of (B, L, 2K) is carried on to rows (B, L): that of the places still hidden."""
    return np.where((tokens == MASK)[..., None], carried, 0)


def faded(carried: np.ndarray, share: float) -> np.ndarray:
    """(B, L, 2K) with so much of the probabilities; nothing at all for 0."""
    if share in (0, 1):
        return carried if share else np.zeros_like(carried)
    kept = carried.shape[2] // 2
    return np.concatenate([carried[..., :kept], carried[..., kept:] * np.float32(share)], 2)


@dataclass(frozen=True)
class State:
    """The batch after a step. Arrays are (B, L) but for the last, and the caller's to keep."""

    step: int  # 0 is the start; at most K
    nfe: int  # network evaluations so far
    tokens: np.ndarray  # int64, hidden ones are [MASK]
    uncovered: np.ndarray  # bool, what was hidden before this step and is not now
    hidden_again: np.ndarray  # bool, what is hidden now and was not before
    confidence: np.ndarray  # float32, probability of each drawn token when it was drawn, else 0
    evaluated: np.ndarray  # int64 (B,), how often the network looked at each row


def unmask(step: Step, tokens: np.ndarray, sampler: Sampler, seed: int = 0,
           rows: Sequence[int] | None = None) -> Iterator[State]:
    """Uncovers every [MASK] of `tokens` (B, L); all other tokens are known and never change.

    Yields the state at the start and after every step. `rows` (default 0, 1, ...) number the rows
    for the noise: the same (seed, row number) gives the same story in any batch. Only rows in which
    something is to be uncovered are given to the network. A token that is hidden again begins with
    nothing carried.
    """
    sampler.check()
    tokens = np.array(tokens, dtype=np.int64)
    size, width = tokens.shape
    rows = np.arange(size) if rows is None else np.asarray(rows)
    wanted = tokens == MASK
    lengths = (tokens != PAD).sum(1)
    pacing = Pacing(sampler, wanted.sum(1), seed, rows)
    nothing, carried = np.zeros((size, width), bool), None
    state = State(0, 0, tokens, nothing, nothing, np.zeros((size, width), np.float32),
                  np.zeros(size, np.int64))
    yield state
    for k in range(sampler.steps):
        masked = state.tokens == MASK
        counts, again = pacing.counts(k, masked.sum(1))  # (B,) each
        counts = np.minimum(counts, masked.sum(1))  # a step may have uncovered more than its count
        again = np.where(counts > 0, again, 0)  # a row that rests keeps what it has, in any batch
        active = np.flatnonzero(counts)
        if not len(active):  # nothing to evaluate
            continue
        noise = np.zeros((len(active), 2, width))
        for line, i in zip(noise, active, strict=True):
            line[:, :lengths[i]] = step_noise(seed, rows[i], k, lengths[i])
        new, confidence = state.tokens.copy(), state.confidence.copy()
        # One place on, what was expected at the place before is out of date: from the left a row is
        # looked at anew for each
        told = (None if carried is None or sampler.order == "left" else
                faded(carried[active], sampler.carry))
        new[active], drawn, made = step(state.tokens[active], counts[active], noise, rows[active],
                                        told)
        evaluated = (counts > 0) * (1 + int(sampler.left_share > 0))
        if made is not None:
            # a row of which nothing was known has been looked at once before
            evaluated[active] += 1 if told is None else ~told.any((1, 2))
            carried = np.zeros((size, *made.shape[1:]), made.dtype) if carried is None else carried
            carried[active] = made
        uncovered = masked & (new != MASK)
        confidence[active] = np.where(uncovered[active], drawn, confidence[active])
        # what was there before the step, or for the corrector also what came with it
        candidates = wanted & (new != MASK) & (pacing.corrector | ~uncovered)
        remasked = pacing.choose(k, candidates, again, confidence)
        new[remasked], confidence[remasked] = MASK, 0
        state = State(k + 1, state.nfe + int(evaluated.max()), new, uncovered & ~remasked,
                      remasked & ~masked, confidence, evaluated)
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
        uncovered, evaluated = np.zeros(tokens.shape, bool), np.zeros(len(tokens), np.int64)
        confidence = np.zeros(tokens.shape, np.float32)
        uncovered[active, places], confidence[active, places] = True, probability
        evaluated[active] = 1
        yield State(0, k + 1, tokens, uncovered, np.zeros_like(uncovered), confidence, evaluated)


class RowCache:
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
    return fill_counted(step, rows, sampler, seed, batch_size)[0]


def fill_counted(step: Step, rows: Sequence[np.ndarray], sampler: Sampler, seed: int = 0,
                 batch_size: int = 32) -> tuple[list[np.ndarray], np.ndarray]:
    """`fill`, and the network evaluations that each row took, (N,)."""
    filled, evaluations = list(rows), np.zeros(len(rows), np.int64)
    states = unmask_rows(step, rows, sampler, seed, batch_size)
    for part, state in tqdm(states, desc="unmasking", unit=" steps", leave=False, disable=None):
        for i, tokens, evaluated in zip(part, state.tokens, state.evaluated, strict=True):
            filled[i] = tokens[:len(rows[i])]
            evaluations[i] += evaluated
    return filled, evaluations
