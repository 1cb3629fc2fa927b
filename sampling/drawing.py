"""Distributions over tokens and exact draws from them, and an unmasking step, in NumPy. A library
for whatever writes from left to right, with torch or without.

`distribution` and `draw` are what `sampling.step.draw` does in one; here what a draft was drawn
from has to be kept, for it is verified.
"""

import numpy as np

from corpus.tokens import EOS, MASK, PAD
from sampling.sampler import Sampler


def distribution(logits: np.ndarray, sampler: Sampler) -> np.ndarray:
    """(..., V) float64 probabilities of logits (..., V), at the sampler's temperature, top-k and
    top-p; temperature 0 gives the likeliest token alone."""
    best = logits.max(-1, keepdims=True)
    if sampler.temperature == 0:
        alone = np.zeros(logits.shape)
        np.put_along_axis(alone, logits.argmax(-1)[..., None], 1.0, -1)
        return alone
    scaled = (logits - best).astype(np.float32) / np.float32(max(sampler.temperature, 1e-30))
    if 0 < sampler.top_k < logits.shape[-1]:
        smallest = np.partition(scaled, -sampler.top_k, -1)[..., -sampler.top_k, None]
        scaled = np.where(scaled < smallest, -np.inf, scaled)
    p = np.exp(scaled).astype(np.float64)
    p /= p.sum(-1, keepdims=True)
    if sampler.top_p < 1:
        order = np.argsort(-p, axis=-1, kind="stable")
        ordered = np.take_along_axis(p, order, -1)
        before = ordered.cumsum(-1) - ordered  # what the likelier tokens sum to
        ordered = np.where(before >= sampler.top_p, 0.0, ordered)
        np.put_along_axis(p, order, ordered, -1)
        p /= p.sum(-1, keepdims=True)
    return p


def draw(p: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The first token at which the distribution function of p (N, V), which need not sum to 1,
    exceeds `uniform` (N,), as a share of the whole: (N,) int64."""
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding may lift u * total up to the total, behind the last token.
    target = np.minimum(uniform * total, np.nextafter(total, 0.0))
    return np.array([np.searchsorted(line, u, side="right")
                     for line, u in zip(cumulative, target, strict=True)], np.int64)


def verify(draft: np.ndarray, q: np.ndarray, p: np.ndarray, uniform: np.ndarray,
           ) -> tuple[int, int | None]:
    """How many of the tokens `draft` (n,), drawn from q (n, V), stand, and the token in the place
    of the first that does not (None if all stand).

    Token i stands with probability min(1, p_i / q_i), and else is drawn from what of p lies above
    q, by `uniform` (2, n): then the result is distributed by p, whatever q is (arXiv 2211.17192,
    algorithm 1 and appendix A.1). q_i may depend on the draft's tokens before i, and on no later
    one.
    """
    places = np.arange(len(draft))
    stands = uniform[0] * q[places, draft] < p[places, draft]
    if stands.all():
        return len(draft), None
    first = int(stands.argmin())
    above = np.maximum(p[first] - q[first], 0.0)
    return first, int(draw(above[None], uniform[1, first:first + 1])[0])


# ---- one unmasking step --------------------------------------------------------------------------

def unmask_step(logits: np.ndarray, tokens: np.ndarray, count: np.ndarray, noise: np.ndarray,
                sampler: Sampler) -> tuple[np.ndarray, np.ndarray]:
    """A `Step` of loop.py for logits (B, L, V), in which what cannot be is -inf: the same as
    `sampling.step.UnmaskStep`, for the planned paces.

    Positions are chosen first, of equals the leftmost, and tokens drawn only there.
    """
    masked = tokens == MASK  # (B, L)
    score = (SCORES[sampler.order](logits) if sampler.order in SCORES else
             noise[:, 0] if sampler.order == "random" else -np.arange(tokens.shape[1]))
    score = np.where(masked, score, -np.inf)
    positions = np.argsort(-score, axis=1, kind="stable")[:, :int(count.max())]  # (B, C)
    rows, places = np.nonzero(np.arange(positions.shape[1]) < count[:, None])
    at = positions[rows, places]
    chosen = logits[rows, at]  # (N, V)
    drawn = draw(distribution(chosen, sampler), noise[rows, 1, at])
    new, confidence = tokens.copy(), np.zeros(tokens.shape, np.float32)
    new[rows, at] = drawn
    confidence[rows, at] = np.exp(log_p(chosen)[np.arange(len(drawn)), drawn])
    return new, confidence


def expected(logits: np.ndarray, tokens: np.ndarray, count: int) -> np.ndarray:
    """(B, L, 2 count) float32 of logits (B, L, V): the ids of the likeliest tokens and their
    probabilities where rows (B, L) are hidden; zeros elsewhere."""
    result, hidden = np.zeros((*tokens.shape, 2 * count), np.float32), tokens == MASK
    p = np.exp(log_p(logits[hidden]))  # (M, V)
    some = np.argpartition(-p, count - 1, axis=-1)[:, :count]
    order = np.argsort(-np.take_along_axis(p, some, -1), axis=-1, kind="stable")
    ids = np.take_along_axis(some, order, -1)
    result[hidden] = np.concatenate([ids, np.take_along_axis(p, ids, -1)], -1)
    return result


def end_blocks(tokens: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is hidden in blocks (B, S) behind a visible [EOS] or [PAD] is [PAD], for certain."""
    ends = (tokens == EOS) | (tokens == PAD)
    behind = (ends.cumsum(1) - ends > 0) & (tokens == MASK)
    return np.where(behind, PAD, tokens), np.where(behind, 1.0, confidence).astype(np.float32)


def log_p(logits: np.ndarray) -> np.ndarray:
    """Of logits (..., V)."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def confidence_score(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_p(logits).max(-1))


def margin_score(logits: np.ndarray) -> np.ndarray:
    second, first = np.moveaxis(np.exp(np.partition(log_p(logits), -2)[..., -2:]), -1, 0)
    return first - second


def entropy_score(logits: np.ndarray) -> np.ndarray:
    p = log_p(logits)
    return (np.exp(p) * np.where(p == -np.inf, 0.0, p)).sum(-1)


# As sampling.step has them: of (..., V), the best the highest
SCORES = {"confidence": confidence_score, "margin": margin_score, "entropy": entropy_score}
