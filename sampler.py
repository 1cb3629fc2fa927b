"""The sampling loop: which positions, how many a step, and the noise. NumPy, no torch.

A sampler is an order (which positions first) and a pace (how many in a step). The loop is written
over any `step` callable, so that a torch module and an exported graph run the same loop:

    for state in unmask(step, tokens, Sampler(steps=64, temperature=0.8), seed=1):
        print(state.step, state.tokens)

The seam for more samplers: an order is a score inside the step (diffusion.UnmaskStep), a pace is a
branch of `plan`; a pace that looks at the confidences will read the last state instead.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from cli import flag, require
from data_prep import BOS, EOS, MASK, PAD, pad_rows, round_up

ORDERS = ("random", "confidence")
PACES = ("cosine", "linear")
MAX_STEPS = 100_000
# First numbers of the seeds, so that no two uses of randomness share a stream.
LENGTH_STREAM, NOISE_STREAM = 1, 2

# (tokens (B, L) int64, count (B,) int64, noise (B, 2, L) float64)
#   -> (tokens (B, L) int64, confidence (B, L) float32)
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Sampler:
    """How to unmask. `check` raises UserError for values that mean nothing."""

    steps: int = flag(64, "network evaluations for a story, at most")
    temperature: float = flag(1.0, "0 is greedy, 1 the model's own distribution")
    top_k: int = flag(0, "draw among the k likeliest tokens; 0 is all")
    top_p: float = flag(1.0, "draw among the likeliest tokens that together reach p")
    order: str = flag("random", "random (ancestral), or confidence: the likeliest token first")
    # cosine uncovers few tokens first, as in MaskGIT (arXiv 2202.04200)
    pace: str = flag("cosine", "tokens in a step: cosine (few at first) or linear (alike)")

    def check(self) -> None:
        require(self.order in ORDERS, f"--order {self.order}: choose from {', '.join(ORDERS)}")
        require(self.pace in PACES, f"--pace {self.pace}: choose from {', '.join(PACES)}")
        require(1 <= self.steps <= MAX_STEPS,
                f"--steps {self.steps}: must be from 1 to {MAX_STEPS}")
        require(0 <= self.temperature < float("inf"),
                f"--temperature {self.temperature}: must be 0 (greedy) or more")
        require(self.top_k >= 0, f"--top_k {self.top_k}: must be 0 (off) or more")
        require(0 < self.top_p <= 1, f"--top_p {self.top_p}: must lie in (0, 1]")


@dataclass(frozen=True)
class State:
    """The batch after a step. Arrays are (B, L) and the caller's to keep."""

    step: int  # 0 is the start; at most K
    nfe: int  # network evaluations so far
    tokens: np.ndarray  # int64, hidden ones are [MASK]
    uncovered: np.ndarray  # bool, what this step uncovered
    confidence: np.ndarray  # float32, probability of each drawn token when it was drawn, else 0


def plan(hidden: np.ndarray, steps: int, pace: str) -> np.ndarray:
    """How many of `hidden` (B,) tokens to uncover in each step: (B, K) int64, rows sum to hidden.

    After step s of K a share cos(pi s / 2K) ("cosine") or 1 - s/K ("linear") is still hidden.
    """
    s = np.arange(steps + 1)
    if pace == "cosine":
        # 1e-9: at the last step the cosine is 6e-17, and 1/2 must not fall to 0.49999.
        left = np.floor(hidden[:, None] * np.cos(np.pi / 2 * s / steps) + 1e-9).astype(np.int64)
    else:
        left = hidden[:, None] * (steps - s) // steps
    return left[:, :-1] - left[:, 1:]


def step_noise(seed: int, row: int, step: int, length: int) -> np.ndarray:
    """(2, length) uniforms in [0, 1): for the order and for the token of every position.

    A function of (seed, row, step) alone, so that a row's story does not depend on its batch.
    """
    return np.random.default_rng([NOISE_STREAM, seed, row, step]).random((2, length))


def unmask(step: Step, tokens: np.ndarray, sampler: Sampler, seed: int = 0,
           rows: Sequence[int] | None = None) -> Iterator[State]:
    """Uncovers every [MASK] of `tokens` (B, L); all other tokens are known and never change.

    Yields the state at the start and after every step. `rows` (default 0, 1, ...) number the rows
    for the noise: the same (seed, row number) gives the same story in any batch.
    """
    sampler.check()
    tokens = np.array(tokens, dtype=np.int64)
    size, width = tokens.shape
    rows = range(size) if rows is None else rows
    lengths = (tokens != PAD).sum(1)
    counts = plan((tokens == MASK).sum(1), sampler.steps, sampler.pace)  # (B, K)
    confidence = np.zeros((size, width), np.float32)
    state = State(0, 0, tokens, np.zeros((size, width), bool), confidence)
    yield state
    for k in range(sampler.steps):
        if not counts[:, k].any():  # more steps than hidden tokens: nothing to evaluate
            continue
        noise = np.zeros((size, 2, width))
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            noise[i, :, :length] = step_noise(seed, row, k, length)
        new, new_confidence = step(state.tokens, counts[:, k], noise)
        uncovered = (state.tokens == MASK) & (new != MASK)
        state = State(k + 1, state.nfe + 1, new, uncovered,
                      np.where(uncovered, new_confidence, state.confidence))
        yield state


# ---- rows to fill --------------------------------------------------------------------------------

def blank_story(length: int) -> np.ndarray:
    """[BOS], `length` times [MASK], [EOS]."""
    return np.array([BOS, *[MASK] * length, EOS], dtype=np.int64)


def draw_length(histogram: dict, seed: int, row: int, at_least: int = 1) -> int | None:
    """Tokens of text in a whole story, drawn from the length histogram of meta.json.

    A function of (seed, row) alone. None if no story of the data has `at_least` tokens.
    """
    counts = {int(length) - 2: count for length, count in histogram["story"].items()}
    counts = {length: count for length, count in counts.items() if length >= at_least}
    if not counts:
        return None
    weights = np.array(list(counts.values()), dtype=np.float64)
    uniform = np.random.default_rng([LENGTH_STREAM, seed, row]).random()
    index = np.searchsorted(weights.cumsum() / weights.sum(), uniform, side="right")
    return list(counts)[min(int(index), len(counts) - 1)]


def unmask_rows(step: Step, rows: Sequence[np.ndarray], sampler: Sampler, seed: int = 0,
                batch_size: int = 32) -> Iterator[tuple[list[int], State]]:
    """Fills rows of any lengths; yields (numbers of the rows, state) after every step.

    Rows of the same padded width share a batch, so that a row is padded alike in any company. The
    state of a batch with nothing left hidden is its last.
    """
    widths = [round_up(len(row)) for row in rows]
    for width in sorted(set(widths)):
        same = [i for i, w in enumerate(widths) if w == width]
        for start in range(0, len(same), batch_size):
            part = same[start:start + batch_size]
            for state in unmask(step, pad_rows([rows[i] for i in part]), sampler, seed, part):
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
