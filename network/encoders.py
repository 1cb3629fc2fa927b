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
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.conditions import condition_rows
from corpus.image_files import load_picture
from corpus.pictures import PictureRows
from corpus.rows import TokenRows
from corpus.tokens import EOS, PAD, decode
from network.attention import HIDDEN, View
from network.layers import OLDER, Linear, ModelConfig
from network.transformer import (
    Block,
    BlockStack,
    Transformer,
    check_blocks,
    check_size,
    make_blocks,
)


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


class ImageEncoder(BlockStack, ConditionEncoder):
    """Reads pictures, in patches: (B, size, size, 4) uint8, the fourth channel 0 where there is no
    picture (arXiv 2010.11929, with the blocks of the denoiser).

    Where a patch stands is told by a learned vector, and by rotary positions in two dimensions: the
    first half of a head's pairs is turned by its row, the second by its column.
    """

    sort, placed = "image", False

    def __init__(self, config: ModelConfig, size: int, patch: int):
        super().__init__()
        require(size % patch == 0 and patch > 0, f"pictures of {size} x {size} cannot be cut into "
                                                 f"patches of {patch} x {patch}")
        self.config, self.size, self.patch = config, size, patch
        self.width, self.compute_dtype = config.width, torch.float32
        self.patches = Linear(3 * patch * patch, config.width)
        across = size // patch
        self.place = nn.Parameter(torch.zeros(across * across, config.width))
        self.blocks = make_blocks(config)
        pairs = config.width // config.heads // 2
        frequencies = 100.0 ** (-torch.arange(pairs - pairs // 2) / (pairs - pairs // 2))
        line = torch.arange(across).float()[:, None] * frequencies  # (across, pairs/2)
        angles = torch.cat([line.repeat_interleave(across, 0)[:, :pairs // 2],
                            line.repeat(across, 1)], dim=1)  # (S, pairs): rows, then columns
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @classmethod
    def create(cls, decoder: ModelConfig, condition: dict, size: ModelConfig | None = None,
               ) -> "ImageEncoder":
        """Of size micro unless another is asked for, in patches of 8 x 8: what there is to learn
        from some thousand pictures."""
        size = size or dataclasses.replace(decoder, width=128, heads=2, layers=4)
        return cls(dataclasses.replace(
            size, vocab_size=EOS + 2, max_len=1, neighbour_init=0.0, dropout=0.0, causal=False,
            time_conditioning="none", self_conditioning=0.0, draft_rank=0, lora_rank=0,
            lora_alpha=0.0, lora_targets=""), condition["size"], PATCH)

    def settings(self) -> dict[str, Any]:
        return {"config": dataclasses.asdict(self.config), "size": self.size, "patch": self.patch}

    @classmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> "ImageEncoder":
        config, size, patch = settings["config"], settings["size"], settings["patch"]
        if not type(size) is type(patch) is int or not 0 < patch <= size <= 4096 or size % patch:
            raise TypeError("size and patch are not of pictures")
        config = ModelConfig(**config)
        check_blocks(config, weights)
        if (weights["patches.weight"].shape != (config.width, 3 * patch * patch)
                or weights["place"].shape != ((size // patch) ** 2, config.width)):
            raise RuntimeError("the weights are of another size")
        return cls(config, size, patch)

    def conditions_of(self, rows: TokenRows, path: Any = None) -> PictureRows:
        pictures = PictureRows(rows.data_dir, f"{rows.split}_condition")
        require(len(pictures) == len(rows), f"{rows.data_dir} has {len(pictures)} pictures for "
                f"{len(rows)} rows of {rows.split}; prepare the data again")
        require(path is None or pictures.size == self.size, f"{rows.data_dir} has pictures of "
                f"{pictures.size} x {pictures.size}, {path} reads {self.size} x {self.size}: "
                f"prepare them with --image_size {self.size}")
        return pictures

    def read(self, texts: Sequence[str], tokenizer: Any) -> np.ndarray:
        """The pictures in files of these names."""
        return np.stack([load_picture(path, self.size) for path in texts])

    def without(self, batch: Tensor, rows: Tensor) -> Tensor:
        return batch.masked_fill(rows[:, None, None, None], 0)

    def vary(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return varied(batch, generator)

    def example(self, rows: int) -> Tensor:
        return torch.full((rows, self.size, self.size, 4), 255, dtype=torch.uint8)

    def show(self, condition: np.ndarray, tokenizer: Any) -> str:
        return "a picture" if condition[..., 3].any() else "no picture"

    def places(self, batch: Tensor) -> int:
        return len(self.place)

    def forward(self, batch: Tensor) -> Reading:
        given = batch[..., 3].flatten(1).amax(1) > 0  # (B,)
        count, across, patch = len(batch), self.size // self.patch, self.patch
        colours = batch[..., :3].to(self.compute_dtype) / 127.5 - 1
        cut = colours.view(count, across, patch, across, patch, 3).transpose(2, 3)
        x = self.patches(cut.reshape(count, across * across, -1)) + self.place.to(
            self.compute_dtype)  # (B, S, E)
        states: list[Tensor] = []
        view = View(self.cos.to(x.dtype), self.sin.to(x.dtype))
        last = self.through_blocks(x, view, states=states)
        places = torch.zeros(count, across * across, dtype=torch.int64, device=batch.device)
        return Reading([*states, last], places, given[:, None].expand(places.shape))


PATCH = 8  # pixels across
SHIFT, ZOOM, SHADE = 0.125, (0.75, 1.1), (0.8, 1.2)  # how far pictures are varied in training


def varied(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, size, size, 4) uint8 shifted, larger or smaller on white, and in another light,
    each in its own way; those that are none stay so. Not mirrored, for text is in some."""
    count, size = batch.shape[:2]

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)
    zoom = between(*ZOOM)
    turn = torch.zeros(count, 2, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = 1 / zoom
    turn[:, :, 2] = between(-SHIFT, SHIFT, 2) * 2 / zoom[:, None]
    # from white, for what is outside is 0
    ink = 255 - batch[..., :3].permute(0, 3, 1, 2).float()
    grid = F.affine_grid(turn, [count, 3, size, size], align_corners=False)
    ink = F.grid_sample(ink, grid, align_corners=False)
    colours = (255 - ink).permute(0, 2, 3, 1) * between(*SHADE, 1, 1, 1) * between(
        0.9, 1.1, 1, 1, 3)
    given = batch[..., 3:]
    return torch.cat([colours.round().clamp(0, 255).to(torch.uint8) * (given > 0), given], -1)


ENCODERS: dict[str, type[ConditionEncoder]] = {
    encoder.sort: encoder for encoder in (TextEncoder, ImageEncoder)}
