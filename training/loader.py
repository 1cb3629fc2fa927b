"""The batches of training rows, a pure function of seed and step. A library: training/steps.py
takes them, of which the next is prepared while a step runs.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from corpus.rows import TokenRows, bucket_batches
from corpus.tokens import PAD
from kinds.likelihood import Corrupted
from network.encoders import ConditionEncoder, Conditions


class BatchStream:
    """Endless training batches: a pure function of (seed, epoch, position).

    `epoch` and `position` (batches of this epoch already given) are the whole state: store them
    and build the stream again with them to continue in the middle of an epoch.
    """

    def __init__(self, rows: TokenRows, batch_tokens: int, seed: int = 0, epoch: int = 0,
                 position: int = 0):
        self.rows, self.batch_tokens, self.seed = rows, batch_tokens, seed
        self.epoch, self.position = epoch, position
        self.indices = np.zeros(0, np.int64)  # the rows of the batch last given
        self._batches = self._epoch_batches()

    def _epoch_batches(self) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches = bucket_batches(self.rows.lengths, self.batch_tokens,
                                 rng.permutation(len(self.rows)))
        return [batches[i] for i in rng.permutation(len(batches))]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """The next batch, (B, L) int64."""
        if self.position >= len(self._batches):
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._epoch_batches()
        self.indices = self._batches[self.position]
        self.position += 1
        return self.rows.batch(self.indices)

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.epoch + self.position / len(self._batches)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for everything random in one step of one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


@dataclass
class Batch:
    corrupted: Corrupted  # the whole global batch, on the CPU
    tokens: int  # without padding
    predicted: int  # positions in the loss
    cursor: dict  # where the stream stands after it
    epochs: float  # passes over the data after it


class BatchLoader:
    """Endless training batches from (seed, step): no state but the cursor of the last batch given.

    `corrupt` makes a Corrupted of tokens (B, L) and a generator. The whole batch is corrupted at
    once, so that t is stratified over all of it. `conditions` are those of all rows, which the
    `encoder` varies where it does so; a share `dropout` of them it takes away.
    """

    def __init__(self, rows: TokenRows, batch_tokens: int, seed: int, corrupt: Any, step: int = 0,
                 cursor: dict | None = None, conditions: Conditions | None = None,
                 dropout: float = 0.0, encoder: ConditionEncoder | None = None):
        self.stream = BatchStream(rows, batch_tokens, seed, **(cursor or {}))
        self.seed, self.corrupt, self.step = seed, corrupt, step
        self.conditions, self.dropout, self.encoder = conditions, dropout, encoder
        self.cursor, self.epochs = self._position()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._coming = None

    def _position(self) -> tuple[dict, float]:
        stream = self.stream
        return {"epoch": stream.epoch, "position": stream.position}, stream.epochs

    def _prepare(self, step: int) -> Batch:
        tokens = torch.from_numpy(next(self.stream))  # (B, L)
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        corrupted = self.corrupt(tokens, generator)
        if self.conditions is not None:
            conditions = torch.from_numpy(self.conditions.batch(self.stream.indices))
            dropped = torch.rand(len(conditions), generator=generator) < self.dropout
            corrupted.condition = self.encoder.vary(self.encoder.without(conditions, dropped),
                                                    generator)
        return Batch(corrupted, int((tokens != PAD).sum()), corrupted.predicted,
                     *self._position())

    def next(self) -> Batch:
        batch = self._coming.result() if self._coming else self._prepare(self.step)
        self.step += 1
        self._coming = self._pool.submit(self._prepare, self.step)
        self.cursor, self.epochs = batch.cursor, batch.epochs
        return batch
