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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corpus.conditions import condition_rows
from corpus.rows import TokenRows
from corpus.tokens import EOS, PAD, decode
from network.conditioning import ConditionEncoder, Conditions, Reading, reading_bias
from network.image_encoders import FrozenEncoder, ImageEncoder, varied
from network.layers import OLDER, ModelConfig
from network.transformer import Transformer, check_size

__all__ = ["ENCODERS", "ConditionEncoder", "Conditions", "FrozenEncoder", "ImageEncoder", "Reading",
           "TextEncoder", "reading_bias", "reads_pictures", "varied"]


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
        return cls(dataclasses.replace(
            size, max_len=condition["max_len"], dropout=0.0, time_conditioning="none",
            self_conditioning=0.0, lora_rank=0, lora_alpha=0.0, lora_targets=""))

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
        sort = rows.meta.get("condition", {}).get("encoder", "text")
        require(sort != "image", f"{rows.data_dir} has pictures, and "
                f"{path or 'the model'} reads conditions in words: prepare them with "
                "prep_conditional_data.py and name that folder")
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


ENCODERS: dict[str, type[ConditionEncoder]] = {
    encoder.sort: encoder for encoder in (TextEncoder, ImageEncoder, FrozenEncoder)}


def reads_pictures(sort: str | None) -> bool:
    """Whether an encoder of that sort does; None is no encoder."""
    return sort in ENCODERS and ENCODERS[sort].of_pictures
