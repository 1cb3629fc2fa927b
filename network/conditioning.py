"""What an encoder of conditions is: the seam for their sorts. A library of encoders.py, which knows
all of them, and of model.py.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from corpus.rows import TokenRows
from network.attention import HIDDEN
from network.layers import ModelConfig
from network.transformer import Block, Transformer


class Reading(NamedTuple):
    """What an encoder makes of a batch of conditions, each S places long."""

    states: list[Tensor]  # of (B, S, E), one for each depth: the blocks read them in their order
    positions: Tensor  # (B, S), where they stand to a text that begins at position 1, if `placed`
    given: Tensor  # (B, S) bool; nowhere in a row without a condition


class Conditions(Protocol):
    """The conditions of the rows of a split."""

    def batch(self, rows: Sequence[int]) -> np.ndarray: ...


class ConditionEncoder(nn.Module):
    """Reads conditions of one sort. Another sort (pictures, ...) is a class of its own with an
    entry in ENCODERS; data folders and checkpoints carry its name.

    `width` (E) is the width of its states, `compute_dtype` what they are computed in.
    """

    sort: ClassVar[str]
    of_pictures: ClassVar[bool] = False  # whether its conditions are pictures
    placed: ClassVar[bool] = True  # whether its places stand in line with those of the text
    width: int
    compute_dtype = torch.float32

    # ---- made and restored ----

    @classmethod
    def create(cls, decoder: ModelConfig, condition: dict, size: ModelConfig | None = None,
               ) -> "ConditionEncoder":
        """A new one for this denoiser; `condition` is that entry of the data folder's meta.json,
        `size` what was asked for."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What `restore` needs: plain numbers, strings and containers."""
        raise NotImplementedError

    @classmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> "ConditionEncoder":
        """One for these weights, which are put in later. Raises KeyError, RuntimeError or TypeError
        for settings that do not belong to them."""
        raise NotImplementedError

    def check_decoder(self, decoder: ModelConfig) -> None:
        """Raises UserError for a denoiser that it cannot serve."""

    def start_from(self, decoder: Transformer) -> bool:
        """Takes over what a trained denoiser knows already; returns whether its states are now like
        those that the denoiser's own blocks read."""
        return False

    # ---- conditions ----

    def conditions_of(self, rows: TokenRows, path: Any = None) -> Conditions:
        """Those of a split's rows. With `path`, the model's, UserError if this encoder cannot read
        all of them."""
        raise NotImplementedError

    def read(self, texts: Sequence[str], tokenizer: Any) -> np.ndarray:
        """The batch for what was given on a command line."""
        raise NotImplementedError

    def without(self, batch: Tensor, rows: Tensor) -> Tensor:
        """The batch, on the CPU, with no condition in the rows marked in (B,) bool. Called in the
        loader's thread while the model trains: it reads no parameter."""
        raise NotImplementedError

    def vary(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The batch as it is trained on; where `without` is called, and as that. By default as it
        is."""
        return batch

    def example(self, rows: int) -> Tensor:
        """Any batch of so many, for compiling."""
        raise NotImplementedError

    def as_prompt(self, condition: np.ndarray) -> list[int] | None:
        """The tokens as which one condition can stand before a text; None if no words tell it."""
        return None

    def show(self, condition: np.ndarray, tokenizer: Any) -> str:
        """One condition in words, for people."""
        return f"a condition ({self.sort})"

    # ---- network ----

    @property
    def all_blocks(self) -> list[Block]:
        return []

    def places(self, batch: Tensor) -> int:
        """S of what it makes of the batch."""
        raise NotImplementedError

    def forward(self, batch: Tensor) -> Reading:
        raise NotImplementedError


def reading_bias(given: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) bool -> (B, 1, 1, S) for attention scores: 0, or HIDDEN where nothing is given (but
    nowhere in a row without anything, whose softmax would have nothing to sum)."""
    none = ~given.any(1, keepdim=True)
    bias = torch.zeros(given.shape, dtype=dtype, device=given.device)
    return bias.masked_fill(~given & ~none, HIDDEN)[:, None, None]
