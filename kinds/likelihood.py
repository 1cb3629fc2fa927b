"""Batches with hidden tokens, their loss, and the nats measured on them. A library of diffusion.py
and autoregressive.py, which hide in their own ways.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from corpus.tokens import maskable
from model import Ends
from network.attention import Context
from network.hardware import device_of
from network.head_loss import Taught

# Numbers of rows (B,) -> their conditions, a batch as their encoder takes it
ConditionsOf = Callable[[np.ndarray], np.ndarray]


@dataclass
class Corrupted:
    """A batch with some tokens hidden. All (B, L) but `mask_ratio`, (B,), and `condition`."""

    tokens: Tensor  # int64, the clean ones
    noisy: Tensor  # int64, with [MASK]
    masked: Tensor  # bool
    weight: Tensor  # float32: the loss is the sum over masked positions of weight * -log p
    mask_ratio: Tensor  # float32, m(t)
    condition: Tensor | None = None  # a batch for the model's encoder

    ends: ClassVar[Ends] = None  # the special tokens that can be predicted; None: as the model is
    passes: ClassVar[int] = 1  # through the network, in training
    noisy_share: ClassVar[float] = 1.0  # of the rows: those with hidden tokens

    def __getitem__(self, rows) -> "Corrupted":
        return self._each(lambda x: x[rows])

    def to(self, device: torch.device) -> "Corrupted":
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, do: Callable[[Tensor], Tensor]) -> "Corrupted":
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{name: do(x) if isinstance(x, Tensor) else x for name, x in values})

    @property
    def predicted(self) -> int:
        """How many positions are in the loss."""
        return int(self.masked.sum())

    @property
    def left_out(self) -> int:
        """Tokens that the last block does not work out in training, for a model that `picks`."""
        return self.masked.numel() - int(self.masked.sum())

    @property
    def only(self) -> tuple[tuple[int, ...], ...]:
        """`ends` as the last argument of a model's loss and scores, where there are any."""
        return () if self.ends is None else (self.ends,)

    def context(self, model: nn.Module) -> Context | None:
        return None if self.condition is None else model.encode(self.condition)

    def hidden(self, model: nn.Module) -> Tensor:
        """(M, D): what the model makes of the M masked positions."""
        return self.read_twice(model, self.ends)

    def parts(self, model: nn.Module) -> Iterator[tuple]:
        """What the loss is made of, the arguments of a model's `loss`: hidden states (M, D),
        targets (M,), weights (M,) and, where that is not as the model is made, the special tokens
        that can be predicted."""
        yield self.hidden(model), self.tokens[self.masked], self.weight[self.masked], *self.only

    def read_twice(self, model: nn.Module, ends: Ends) -> Tensor:
        """The same, of a model with self-conditioning in two passes: see `first_pass`."""
        context = self.context(model)
        return self.read(model, context, **first_pass(
            model, self.masked, ends, lambda rows: self[rows].read(
                model, context and context.of_rows(rows))))

    def read(self, model: nn.Module, context: Context | None, **carried: Tensor) -> Tensor:
        """(M, D): what one pass makes of them."""
        given = (self.noisy, self.mask_ratio)
        if context is not None:
            return model.hidden(*given, context, **carried)[self.masked]
        if getattr(model, "picks", False):  # the last block at these positions alone
            return model.hidden(*given, at=self.masked.flatten().nonzero()[:, 0], **carried)
        return model.hidden(*given, **carried)[self.masked]


def first_pass(model: nn.Module, masked: Tensor, ends: Ends, read: Callable[[Tensor], Tensor],
               ) -> dict[str, Tensor]:
    """What a first pass expects at the places `masked` (B, L) of some of the rows, as `carried`
    (B, L, 2 CARRIED) for the pass that counts; nothing for a model without self-conditioning.
    `read(rows)` gives the hidden states (M, D) of the masked places of those rows, (B,) bool.

    In training these are its share of the rows, without gradient (arXiv 2208.04202, section 3.3);
    the others learn to do without. In evaluation they are all: the model is then one that goes over
    every noisy row twice, so that a bound stays the bound of a model. (The sampler is told of what
    the step before expected instead, and goes over each once.)
    """
    share, count = getattr(model, "self_conditioning", 0.0), len(masked)
    if not share:
        return {}
    rows = torch.rand(count) < share if model.training else torch.ones(count, dtype=torch.bool)
    rows = rows.to(masked.device)
    where = masked & rows[:, None]
    if not where.any():
        return {}
    with torch.no_grad():
        found = model.expected(read(rows), ends)  # (M, 2 CARRIED)
    carried = found.new_zeros(*masked.shape, found.shape[-1])
    carried[where] = found
    return {"carried": carried}


def weighted_loss(model: nn.Module, batch: Corrupted, teacher: nn.Module | None = None) -> Tensor:
    """The sum over masked positions of weight * -log p, a differentiable scalar; with a `teacher`
    of weight * the cross-entropy with what it makes of the same batch (arXiv 1503.02531, eq. 2, at
    temperature 1).

    The vocabulary head runs on these M positions and nowhere else.
    """
    if teacher is None:
        return sum(model.loss(*part) for part in batch.parts(model))
    with torch.no_grad():
        taught = [Taught(hidden, teacher.vocabulary.weight)
                  for hidden, *_ in batch.parts(teacher)]
    return sum(model.loss(hidden, said, *more) for (hidden, _, *more), said in zip(
        batch.parts(model), taught, strict=True))


def measure_nats(model: nn.Module, batches: Iterable[np.ndarray],
                 hide: Callable[[Tensor, np.ndarray], Iterable[tuple[Corrupted, Tensor]]],
                 numbers: Iterable[np.ndarray] | None = None,
                 conditions: "ConditionsOf | None" = None) -> "Nelbo":
    """The nats of what `hide` hides in every batch (B, L), in evaluation mode.

    `hide(clean, rows)` gives batches with hidden tokens, and the k (B,) of each; `numbers` are the
    numbers of the rows of each batch, by default 0, 1, ..., and `conditions` gives theirs.
    """
    columns, seen = [], 0
    training, device = model.training, device_of(model)
    model.eval()
    numbers = iter(numbers) if numbers is not None else None
    with torch.no_grad():
        for batch in batches:
            clean = torch.as_tensor(batch)
            rows = next(numbers) if numbers else seen + np.arange(len(clean))
            seen += len(clean)
            n = maskable(clean).sum(1).numpy()
            given = None if conditions is None else torch.from_numpy(conditions(rows))
            for hidden, k in hide(clean, rows):
                hidden.condition = given
                columns.append((rows, n, k.numpy(), *row_sums(model, hidden, device)))
    model.train(training)
    return Nelbo(*map(np.concatenate, zip(*columns, strict=True)))


def row_sums(model: nn.Module, batch: Corrupted, device: torch.device,
             ) -> tuple[np.ndarray, np.ndarray]:
    """For each row (B,): the sum of weight * -log p over its hidden tokens, and of the weights of
    those that were likeliest."""
    there = batch.to(device)
    values = model.scores(there.hidden(model), there.tokens[there.masked], *batch.only)
    owner = batch.masked.nonzero()[:, 0].numpy()  # (M,) the row of each hidden token
    weight = batch.weight[batch.masked].double().numpy()
    nats, correct = (np.bincount(owner, weight * x.cpu().double().numpy(),
                                 minlength=len(batch.tokens)) for x in values)
    return nats, correct


@dataclass
class Nelbo:
    """What `nelbo` of a kind of model measured, an entry for each row and draw: (N * draws,)."""

    row: np.ndarray  # number of the row
    n: np.ndarray  # tokens of text in the row
    k: np.ndarray  # how many of them were hidden
    nats: np.ndarray  # sum over the hidden of -log p
    correct: np.ndarray  # how many of the hidden were the likeliest token

    def row_nats(self) -> tuple[np.ndarray, np.ndarray]:
        """The bound of every row in nats, and its tokens, both (N,)."""
        _, index, draws = np.unique(self.row, return_inverse=True, return_counts=True)
        return (np.bincount(index, weights=self.n * self.nats / self.k) / draws,
                np.bincount(index, weights=self.n) / draws)

    @property
    def total_nats(self) -> float:
        return float(self.row_nats()[0].sum())

    @property
    def nats_per_token(self) -> float:
        nats, tokens = self.row_nats()
        return float(nats.sum() / tokens.sum())

    @property
    def standard_error(self) -> float:
        """Of nats_per_token, a ratio of sums over rows (delta method); 0 for a single row."""
        return ratio_error(*self.row_nats())

    @property
    def masked_ce(self) -> float:
        """The plain mean of -log p over all hidden tokens, what "masked_ce" trains on."""
        return float(self.nats.sum() / self.k.sum())

    @property
    def masked_accuracy(self) -> float:
        """Share of all hidden tokens that were the likeliest."""
        return float(self.correct.sum() / self.k.sum())

    def bits_per_byte(self, length_nats: float, text_bytes: int) -> float:
        """The bound on the text in bits/byte, with what telling the row lengths costs."""
        return (self.total_nats + length_nats) / math.log(2) / text_bytes

    def curve(self, bins: int = 20) -> list[dict]:
        """Masked cross-entropy and accuracy in equal bins of the mask ratio k/n.

        Bins that no draw fell into are left out.
        """
        which = np.ceil(self.k / self.n * bins).astype(int) - 1  # bin j holds (j/bins, (j+1)/bins]
        rows = []
        for j in np.unique(which):
            k, nats, correct = (x[which == j].sum() for x in (self.k, self.nats, self.correct))
            rows.append({"low": float(j / bins), "high": float((j + 1) / bins), "hidden": int(k),
                         "cross_entropy": float(nats / k), "accuracy": float(correct / k)})
        return rows

    def averages(self, bins: int = 20) -> dict[str, dict[str, float]]:
        """Averages over t of the curve for four mask ratios r(t).

        Each bin of the mask ratio counts with the share of t in [0, 1] that r(t) spends in it. A
        single "validation loss" of a masked model means nothing without this protocol.
        """
        curve = self.curve(bins)
        low, high, cross_entropy, accuracy = (
            np.array([point[key] for point in curve])
            for key in ("low", "high", "cross_entropy", "accuracy"))
        result = {}
        for name, time in INVERSE_RATIOS.items():
            share = time(high) - time(low)
            share /= share.sum()
            result[name] = {"cross_entropy": float((share * cross_entropy).sum()),
                            "accuracy": float((share * accuracy).sum())}
        return result


def ratio_error(nats: np.ndarray, tokens: np.ndarray) -> float:
    """The standard error of sum(nats) / sum(tokens) over rows (N,), by the delta method."""
    residual = nats - nats.sum() / tokens.sum() * tokens
    count = len(nats)
    return float(math.sqrt(count / max(1, count - 1) * (residual ** 2).sum()) / tokens.sum())


# t as a function of the mask ratio r, for what published "validation losses" average over
INVERSE_RATIOS = {
    "t": lambda r: r,
    "1-cos(pi t/2)": lambda r: 2 / np.pi * np.arccos(1 - r),
    "sin(pi t/2)^2": lambda r: 2 / np.pi * np.arcsin(np.sqrt(r)),
    "sin(pi t/2)": lambda r: 2 / np.pi * np.arcsin(r),
}
