"""A toy kind of model and a toy encoder of conditions: what somebody would write who adds one.

test_seams.py enters each in its table, and everything else runs as it is.
"""

import numpy as np
import torch
from torch import nn

from diffusion import DiscreteDiffusion
from kinds.likelihood import Corrupted
from model import DiffusionTransformer
from network.encoders import ConditionEncoder, Reading
from network.layers import ModelConfig


class PlacedTransformer(DiffusionTransformer):
    """The denoiser with a learned vector for every position, as if there were no rotary ones."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.places = nn.Parameter(torch.zeros(config.max_len, config.width))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().embed(tokens) + self.places[:tokens.shape[1]].to(self.compute_dtype)


class HalfMasked(DiscreteDiffusion):
    """Masked diffusion that is trained at one mask ratio alone."""

    name = "half_masked"
    objectives = ("half_masked",)
    network = PlacedTransformer
    unused = frozenset(("schedule",))

    @classmethod
    def of_run(cls, config) -> "HalfMasked":
        return cls()

    def corrupt_batch(self, tokens: torch.Tensor, generator: torch.Generator | None = None,
                      ) -> Corrupted:
        return self.corrupt(tokens, torch.full((len(tokens),), 0.5), generator)

    def protocol(self, draws: int) -> str:
        return f"half-masked toy, {draws} masks"


class Lengths:
    """How long the texts of the conditions are: (B, 1) int64."""

    def __init__(self, lengths: np.ndarray):
        self.lengths = lengths

    def batch(self, rows) -> np.ndarray:
        return self.lengths[np.asarray(rows)][:, None].astype(np.int64)


class LengthEncoder(ConditionEncoder):
    """Knows of a condition how long it is, and nothing else; 0 is none."""

    sort = "length"

    def __init__(self, width: int, longest: int):
        super().__init__()
        self.width, self.longest = width, longest
        self.table = nn.Embedding(longest + 1, width)

    @classmethod
    def create(cls, decoder: ModelConfig, condition: dict, size: ModelConfig | None = None,
               ) -> "LengthEncoder":
        return cls(decoder.width // 2, condition["max_len"])

    def settings(self) -> dict:
        return {"width": self.width, "longest": self.longest}

    @classmethod
    def restore(cls, settings: dict, weights: dict) -> "LengthEncoder":
        if weights["table.weight"].shape != (settings["longest"] + 1, settings["width"]):
            raise RuntimeError("the weights are of another size")
        return cls(**settings)

    def conditions_of(self, rows, path=None) -> Lengths:
        return Lengths(rows.conditions().lengths)

    def read(self, texts, tokenizer) -> np.ndarray:
        return np.array([[len(tokenizer.encode(text).ids) + 2] for text in texts])

    def without(self, batch: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return batch.masked_fill(rows[:, None], 0)

    def example(self, rows: int) -> torch.Tensor:
        return torch.ones(rows, 1, dtype=torch.int64)

    def show(self, condition: np.ndarray, tokenizer) -> str:
        return f"{condition[0]} tokens"

    def places(self, batch: torch.Tensor) -> int:
        return 1

    def forward(self, batch: torch.Tensor) -> Reading:
        state = self.table(batch).to(self.compute_dtype)  # (B, 1, E)
        return Reading([state, state], torch.zeros_like(batch), batch > 0)
