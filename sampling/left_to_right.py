"""Writing from the left, before a cache of what is finished: token by token, in blocks, or in
drafts that are verified. In NumPy, over any `Reader`.

    for piece in write_verified(reader, rows, Sampler(steps=1), block_size=8, longest=256):
        print(piece.row, piece.tokens, piece.ended)

Rows are texts from their start, [BOS] and a prompt; the writer goes on from there until it draws
[EOS] or a row has `longest` tokens. Rows that have ended leave the batch. Every draw depends on
seed, row number and place (of a draft: round; in a block: step) alone, so that a story does not
depend on its batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from corpus.tokens import EOS, MASK, PAD
from sampling.draft_head import DraftHead
from sampling.drawing import distribution, draw, verify
from sampling.loop import Carried, unmask
from sampling.noise import BLOCK_STREAM, CAUSAL_STREAM, VERIFY_STREAM
from sampling.sampler import Sampler


class Reader(Protocol):
    """A network and what it remembers of the rows of a batch."""

    draft_head: DraftHead | None

    def begin(self, rows: np.ndarray) -> None:
        """Forgets everything; the rows of the coming batch have these numbers, (B,)."""

    def read(self, tokens: np.ndarray, logits: int = 0) -> np.ndarray | None:
        """Takes in the next tokens (B, L) of every row, each seeing those before it, and gives the
        FP32 logits (B, N, V) of what follows the last N = `logits` of them. Logits in which text
        and [EOS] alone are possible."""

    def look(self, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """FP32 logits (B, C, V) at the places (C,) of a block (B, S) that would come next, whose
        tokens see each other; it is not remembered."""

    def hidden(self, places: np.ndarray) -> np.ndarray:
        """The hidden states (B, D) of the tokens at these places (B,) among those read last."""

    def step(self, tokens: np.ndarray, count: np.ndarray, noise: np.ndarray, rows: np.ndarray,
             carried: Carried) -> tuple[np.ndarray, np.ndarray, Carried]:
        """One unmasking step (a `Step` of loop.py) of such blocks; `rows` are numbers of some rows
        of the batch."""

    def forget(self, counts: np.ndarray) -> None:
        """Keeps the first `counts` (B,) tokens of every row."""

    def keep(self, rows: np.ndarray) -> None:
        """Keeps the rows marked in (B,) bool."""


class Piece(NamedTuple):
    """What has been added to a row, for good."""

    row: int  # its number
    tokens: np.ndarray  # (n,) int64; [EOS] is among them only as the last
    ended: bool  # whether nothing more will come
    evaluations: int  # of the network, for this row, since the last piece


class _Batch:
    """The rows that are still being written."""

    def __init__(self, reader: Reader, starts: Sequence[np.ndarray], numbers: Sequence[int],
                 longest: int):
        self.reader, self.longest = reader, longest
        self.numbers = np.asarray(numbers)
        self.lengths = np.array([len(start) for start in starts])  # tokens written, (B,)
        self.last = np.array([start[-1] for start in starts])
        reader.begin(self.numbers)

    def add(self, pieces: list[np.ndarray], evaluations: int | np.ndarray) -> Iterator[Piece]:
        """Adds tokens to every row; the rows that end with them leave. A row is cut where it has
        `longest` tokens. `evaluations` are those of each row, (B,), or of every one."""
        counts = np.broadcast_to(evaluations, len(pieces))
        ended = np.zeros(len(pieces), bool)
        for i, tokens in enumerate(pieces):
            tokens = tokens[:self.longest - self.lengths[i]]
            self.lengths[i] += len(tokens)
            ended[i] = tokens[-1] == EOS or self.lengths[i] >= self.longest
            self.last[i] = tokens[-1]
            yield Piece(int(self.numbers[i]), tokens, bool(ended[i]), int(counts[i]))
        if ended.any():
            self.numbers, self.lengths, self.last = (
                x[~ended] for x in (self.numbers, self.lengths, self.last))
            if len(self.numbers):
                self.reader.keep(~ended)


def read_starts(reader: Reader, starts: Sequence[np.ndarray], counts: np.ndarray) -> None:
    """Reads the [PAD] that stands before every row, and its first `counts` (B,) tokens."""
    if not len(starts):
        return
    tokens = np.full((len(starts), int(counts.max()) + 1), PAD, np.int64)
    for line, start, count in zip(tokens, starts, counts, strict=True):
        line[1:count + 1] = start[:count]
    reader.read(tokens)
    if (counts != counts.max()).any():
        reader.forget(counts + 1)


def write_causal(reader: Reader, starts: Sequence[np.ndarray], sampler: Sampler, longest: int,
                 seed: int = 0, numbers: Sequence[int] | None = None) -> Iterator[Piece]:
    """Token by token: each goes through the network once."""
    numbers = range(len(starts)) if numbers is None else numbers
    batch = _Batch(reader, starts, numbers, longest)
    read_starts(reader, starts, batch.lengths - 1)
    noise = {row: np.random.default_rng([CAUSAL_STREAM, seed, row]).random(longest)
             for row in map(int, batch.numbers)}  # of every place
    while len(batch.numbers):
        logits = reader.read(batch.last[:, None], logits=1)[:, 0]
        uniform = np.array([noise[row][place] for row, place in
                            zip(batch.numbers, batch.lengths, strict=True)])
        drawn = draw(distribution(logits, sampler), uniform)
        yield from batch.add(list(drawn[:, None]), 1)


def write_verified(reader: Reader, drafter: Reader, starts: Sequence[np.ndarray], sampler: Sampler,
                   block_size: int, longest: int, seed: int = 0,
                   numbers: Sequence[int] | None = None) -> Iterator[Piece]:
    """In drafts of `block_size` - 1 tokens, of `drafter`, that `reader` verifies: distributed as
    `write_causal` writes with that reader, exactly, at any temperature, top-k and top-p.

    A round: the drafter sees the last token, which is not in the cache yet, and the hidden ones
    behind it, and uncovers them in `sampler.steps` evaluations, those on the left first: a token's
    distribution must not depend on what stands to its right, or it could not be verified. One pass
    of the reader over the last token and the draft then gives what the causal mode itself would
    have drawn each from; what stands is kept, and one token more: in the place of the first that
    falls, or behind them all. Where reader and drafter are one, that pass has filled the cache.

    With `sampler.steps` 0 the drafter's draft head goes on from what its last pass made of the text
    that stands: a round is one pass.
    """
    numbers = range(len(starts)) if numbers is None else numbers
    batch = _Batch(reader, starts, numbers, longest)
    apart = drafter is not reader
    if apart:
        drafter.begin(batch.numbers)
    for one in {id(reader): reader, id(drafter): drafter}.values():
        read_starts(one, starts, batch.lengths - 1)
    rounds, by_head = np.zeros(len(starts), np.int64), not sampler.steps
    if by_head and len(starts):
        state = drafter.draft_head.start(drafter.hidden(batch.lengths - 1))
    while len(batch.numbers):
        uniform = round_noise(seed, batch.numbers, rounds, block_size)
        draft, q = (
            headed(drafter.draft_head, state, batch.last, block_size, sampler, uniform[:, 0])
            if by_head else draft_of(drafter, batch.last, block_size, sampler, uniform[:, 0]))
        given = np.concatenate([batch.last[:, None], draft], 1)  # (B, S)
        pieces = verified(draft, q, reader.read(given, logits=block_size), sampler, uniform[:, 1:])
        rounds = rounds + 1
        # all but the last token are in the cache
        grown = batch.lengths + [len(piece) for piece in pieces]
        reader.forget(grown)
        if apart:
            drafter.read(given)
            drafter.forget(grown)
        alive = np.array([piece[-1] != EOS for piece in pieces]) & (grown < longest)
        rounds = rounds[alive]
        if by_head:
            last = [len(piece) - 1 for piece in pieces]
            state = drafter.draft_head.start(drafter.hidden(np.array(last)))[alive]
        if apart and alive.any() and not alive.all():
            drafter.keep(alive)
        yield from batch.add(pieces, min(sampler.steps, block_size - 1) + 1 + apart)


def round_noise(seed: int, numbers: np.ndarray, rounds: np.ndarray, size: int) -> np.ndarray:
    """(B, 3, S) uniforms of these rows in their rounds: for the draft, and two to verify it."""
    return np.stack([np.random.default_rng([VERIFY_STREAM, seed, row, k]).random((3, size))
                     for row, k in zip(numbers, rounds, strict=True)])


def verified(draft: np.ndarray, q: np.ndarray, logits: np.ndarray, sampler: Sampler,
             uniform: np.ndarray) -> list[np.ndarray]:
    """What a round adds to each row: the tokens that stand of the draft (B, S - 1), drawn from q
    (B, S - 1, V), and one more, unless they end the story. `logits` (B, S, V) are the causal mode's
    for each token of the draft and for the one behind it, `uniform` is (B, 2, S)."""
    p, pieces = distribution(logits, sampler), []
    for i in range(len(draft)):
        count, token = verify(draft[i], q[i], p[i, :-1], uniform[i, :, :-1])
        ended = np.flatnonzero(draft[i, :count] == EOS)
        if len(ended):
            pieces.append(draft[i, :ended[0] + 1])
            continue
        if token is None:
            token = int(draw(p[i, -1:], uniform[i, 1, -1:])[0])
        pieces.append(np.append(draft[i, :count], token))
    return pieces


def draft_of(drafter: Reader, last: np.ndarray, size: int, sampler: Sampler, uniform: np.ndarray,
             ) -> tuple[np.ndarray, np.ndarray]:
    """`size` - 1 tokens behind the `last` (B,) of every row, (B, S - 1), and the distributions that
    they were drawn from, (B, S - 1, V); by the uniforms (B, S).

    They are uncovered from left to right in `sampler.steps` evaluations. Of the token before the
    first place of each the network knows, of those before the others a draft head, if there is one.
    """
    block = np.full((len(last), size), MASK, np.int64)
    block[:, 0] = last
    q = []
    for part in np.array_split(np.arange(1, size), min(sampler.steps, size - 1)):
        looked = drafter.look(block, part)
        for i, place in enumerate(part):
            told = drafter.draft_head.told(block[:, place - 1]) if i and drafter.draft_head else 0
            q.append(distribution(looked[:, i] + told, sampler))
            block[:, place] = draw(q[-1], uniform[:, place])
    return block[:, 1:], np.stack(q, 1)


def headed(head: DraftHead, state: np.ndarray, last: np.ndarray, size: int, sampler: Sampler,
           uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by the draft head alone, from its state (B, R) before the last token."""
    draft, q = [last], []
    for place in range(1, size):
        state, logits = head.after(state, draft[-1])
        q.append(distribution(logits, sampler))
        draft.append(draw(q[-1], uniform[:, place]))
    return np.stack(draft[1:], 1), np.stack(q, 1)


def write_blocks(reader: Reader, starts: Sequence[np.ndarray], sampler: Sampler, block_size: int,
                 longest: int, seed: int = 0, numbers: Sequence[int] | None = None,
                 shown=None) -> Iterator[Piece]:
    """In blocks of `block_size`, each uncovered by the sampler's order, pace and remasking in
    `sampler.steps` evaluations, and then read from left to right into the cache.

    All starts must end in the same block. What stands in a block behind [EOS] is [PAD], given for
    nothing. `shown`, if any, is called with (numbers of the rows, State of their blocks) after
    every step.
    """
    numbers = range(len(starts)) if numbers is None else numbers
    batch = _Batch(reader, starts, numbers, longest)
    done = int(batch.lengths.max(initial=0)) // block_size
    if (batch.lengths // block_size != done).any():
        raise ValueError("the starts end in different blocks")
    read_starts(reader, starts, np.full(len(starts), done * block_size))
    begun = [start[done * block_size:] for start in starts]
    while len(batch.numbers):
        size = min(block_size, longest - done * block_size)
        tokens = np.full((len(begun), size), MASK, np.int64)
        for line, known in zip(tokens, begun, strict=True):
            line[:len(known)] = known
        own = int(np.random.SeedSequence([BLOCK_STREAM, seed, done]).generate_state(
            1, np.uint64)[0] >> 1)
        evaluations = np.zeros(len(begun), np.int64)
        for state in unmask(reader.step, tokens, sampler, own, batch.numbers):
            evaluations, tokens = evaluations + state.evaluated, state.tokens
            if shown:
                shown(batch.numbers, state)
        pieces = [up_to_the_end(line)[len(known):]
                  for line, known in zip(tokens, begun, strict=True)]
        alive = np.array([piece[-1] != EOS for piece in pieces])
        done += 1
        # the rows that go on are read once more
        yield from batch.add(pieces, evaluations + (alive & (done * block_size < longest)))
        if len(batch.numbers):
            reader.read(tokens[alive])
        begun = [np.zeros(0, np.int64)] * len(batch.numbers)


def write_left(reader: Reader, starts: Sequence[np.ndarray], sampler: Sampler, block_size: int,
               longest: int, seed: int = 0, numbers: Sequence[int] | None = None,
               drafter: Reader | None = None, shown=None) -> Iterator[Piece]:
    """In the way that these ask for: drafts of `drafter` (which may be the reader) that are
    verified, token by token where a block is of one, and else in blocks."""
    given = starts, sampler, block_size, longest, seed, numbers
    if drafter is not None:
        return write_verified(reader, drafter, *given)
    if block_size == 1:
        return write_causal(reader, starts, sampler, longest, seed, numbers)
    return write_blocks(reader, *given, shown)


def up_to_the_end(tokens: np.ndarray) -> np.ndarray:
    """A finished block (S,) up to its end, which is [EOS]; a [PAD] before any counts as one."""
    ends = np.flatnonzero((tokens == EOS) | (tokens == PAD))
    return np.append(tokens[:ends[0]], EOS) if len(ends) else tokens


def rows_of(pieces: Iterator[Piece], starts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rows when all is written."""
    rows = [[start] for start in starts]
    for piece in pieces:
        rows[piece.row].append(piece.tokens)
    return [np.concatenate(row) for row in rows]


