"""Encoders: what reads a condition for the cross-attention. A library of model.py.

    encoder = ENCODERS["text"].create(decoder_config, meta["condition"])
    rows = encoder.conditions_of(TokenRows(data_dir))        # the conditions of a split's rows
    reading = encoder(torch.from_numpy(rows.batch([0, 1])))  # Reading

A batch of conditions is one array, NumPy or torch, whose first axis is the rows; only its encoder
knows what the others are. Everything else (loader, sampler, checkpoints) hands it on.
"""

from cli import require

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from corpus.conditions import condition_rows
from corpus.rows import TokenRows
from corpus.tokens import EOS, PAD, decode
from network.attention import HIDDEN
from network.layers import OLDER, ModelConfig
from network.transformer import Block, Transformer, check_size


class Reading(NamedTuple):
    """What an encoder makes of a batch of conditions, each S places long."""

    states: list[Tensor]  # of (B, S, E), one for each depth: the blocks read them in their order
    positions: Tensor  # (B, S), where they stand to a text that begins at position 1
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


class TextEncoder(Transformer, ConditionEncoder):
    """Reads a text, in both directions: (B, S) token ids, [BOS] text [EOS], [PAD] behind it, S at
    most `max_len`. A row of [PAD] alone is no condition."""

    sort = "text"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.width = config.width

    @classmethod
    def create(cls, decoder: ModelConfig, condition: dict, size: ModelConfig | None = None,
               ) -> "TextEncoder":
        """Of the denoiser's size unless another is asked for, with a block less: what the last
        block leaves nobody reads."""
        size = (dataclasses.replace(size, vocab_size=decoder.vocab_size) if size else
                dataclasses.replace(decoder, layers=max(1, decoder.layers - 1)))
        return cls(dataclasses.replace(size, max_len=condition["max_len"], dropout=0.0,
                                       time_conditioning="none", self_conditioning=0.0))

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    @classmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> "TextEncoder":
        config = ModelConfig(**{**OLDER, **settings})
        check_size(config, weights)
        return cls(config)

    def check_decoder(self, decoder: ModelConfig) -> None:
        require(decoder.vocab_size == self.config.vocab_size, "encoder and denoiser must have the "
                                                              "same vocabulary")

    def start_from(self, decoder: Transformer) -> bool:
        """The denoiser's first blocks, which have learned to read already. Both must have the same
        width."""
        learned = decoder.state_dict()
        self.load_state_dict({name: learned[name] for name in self.state_dict()})
        return True

    def conditions_of(self, rows: TokenRows, path: Any = None) -> TokenRows:
        conditions = rows.conditions()
        longest = int(conditions.lengths.max())
        most = self.config.max_len
        require(path is None or longest <= most, f"{rows.data_dir} has conditions of up to "
                f"{longest} tokens, {path} reads at most {most}: prepare them with --condition_len "
                f"{most}")
        return conditions

    def read(self, texts: Sequence[str], tokenizer: Any) -> np.ndarray:
        return condition_rows(texts, tokenizer, self.config.max_len)

    def without(self, batch: Tensor, rows: Tensor) -> Tensor:
        return batch.masked_fill(rows[:, None], PAD)

    def example(self, rows: int) -> Tensor:
        return torch.full((rows, self.config.max_len - rows), EOS)

    def as_prompt(self, condition: np.ndarray) -> list[int]:
        return [int(i) for i in condition if i > EOS]

    def show(self, condition: np.ndarray, tokenizer: Any) -> str:
        return decode(tokenizer, condition)

    def places(self, batch: Tensor) -> int:
        return batch.shape[1]

    def forward(self, batch: Tensor) -> Reading:
        given = batch != PAD  # (B, S)
        bias = reading_bias(given, self.compute_dtype)
        states: list[Tensor] = []
        view = self.view(batch.shape[1], bias)
        last = self.through_blocks(self.embed(batch), view, states=states)
        # The condition stands before the text: its last token, before its [EOS], is at 0.
        positions = torch.arange(batch.shape[1], device=batch.device)
        return Reading([*states, last], positions - (given.sum(1, keepdim=True) - 2), given)


def reading_bias(given: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) bool -> (B, 1, 1, S) for attention scores: 0, or HIDDEN where nothing is given (but
    nowhere in a row without anything, whose softmax would have nothing to sum)."""
    none = ~given.any(1, keepdim=True)
    bias = torch.zeros(given.shape, dtype=dtype, device=given.device)
    return bias.masked_fill(~given & ~none, HIDDEN)[:, None, None]


ENCODERS: dict[str, type[ConditionEncoder]] = {TextEncoder.sort: TextEncoder}
