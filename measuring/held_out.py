"""What is measured: a checkpoint, opened beside held-out rows. A library of evaluate.py's commands.

The flags that these commands share, how they find a checkpoint of a kind that they can measure, its
model, its rows and the models that are compared with it, and where the figures go.
"""

from cli import check_file, flag, require

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from corpus.rows import SPLITS, TokenRows, content_hashes, open_rows
from corpus.tokens import row_kind
from kinds.checkpoints import (
    check_tokenizer,
    find_checkpoint,
    load_checkpoint,
    model_from_checkpoint,
    tokenizer_from_checkpoint,
)
from kinds.kind import Kind
from kinds.registry import kind_of, kinds_that
from network.hardware import device_of, pick_device, pick_precision
from network.layers import PRECISIONS
from network.lora import merge
from sampling.sampler import Sampler

# What a model that does not unmask knows of a sampler
DRAWING = {"temperature", "top_k", "top_p"}


# ---- flags ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class HeldOutConfig:
    """The checkpoint, the rows that it is measured on, and where: what all commands share."""

    checkpoint: str | None = flag(None, "checkpoint to use (default: the newest */best.pt of a "
                                        "kind that can be measured so)")
    data_dir: str | None = flag(None, "data folder with the held-out stories (default: the one "
                                      "that the checkpoint was trained on)")
    split: str | None = flag(None, "test, val or train (default: test where the data folder has "
                                   "it, else val)", SPLITS[::-1])
    seed: int = flag(0, "seed of masks and stories")
    output: str | None = flag(None, "file to write (default: one beside the checkpoint)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("auto", "auto, fp32, bf16 or fp16", ("auto", *PRECISIONS))

    def check(self) -> None:
        """Raises UserError for values that mean nothing."""
        self.require_from(0, "seed")

    def require_from(self, least: int, *names: str) -> None:
        """Raises UserError unless the flags of these names are left out or at least `least`."""
        for name in names:
            value = getattr(self, name)
            require(value is None or least <= value < 2**63,
                    f"--{name} {value}: must be {least} or more")


@dataclass(frozen=True)
class ScoringConfig(Sampler, HeldOutConfig):
    """Also what a likelihood is measured with, and how the stories beside it are generated."""

    draws: int = flag(4, "masks drawn for every row")
    # Not a flag: without a condition it counts for nothing, with one every guidance is measured.
    guidance: ClassVar[float] = 1.0

    def check(self) -> None:
        HeldOutConfig.check(self)
        Sampler.check(self)
        self.require_from(1, "draws")

    def check_used_by(self, kind: Kind, given: set[str]) -> None:
        """Refuses flags that were given and would change nothing for a model of this kind."""
        if not kind.exact:
            self.check_used(given)
            return
        sampler = {field.name for field in dataclasses.fields(Sampler)} - DRAWING
        unused = sorted((sampler | {"draws"}) & given)
        require(not unused, f"--{' --'.join(unused)}: without effect for "
                + ("an exact mode" if kind.modes else f"an {kind.name} model") + "; leave it out")


# ---- before the work -----------------------------------------------------------------------------

def find_measurable(name: str | None, refused: Callable[[type[Kind]], str] = lambda kind: "",
                    pictures: bool | None = None) -> tuple[Path, dict]:
    """Path and contents of the checkpoint of that name, by default the newest */best.pt of a kind
    that is not refused; `pictures` as in find_checkpoint. `refused` says why a kind cannot be
    measured so; nothing: it can."""
    path = find_checkpoint(name, kinds_that(lambda kind: not refused(kind)), pictures)
    checkpoint = load_checkpoint(path, kind=None)
    reason = refused(type(kind_of(checkpoint)))
    require(not reason, f"{path} is {checkpoint['kind']}: {reason}")
    return path, checkpoint


def output_file(output: str | None, path: Path, name: str,
                second: Callable[[Path], Path] | None = None) -> Path:
    """The file to write, by default `name` beside the checkpoint `path`; refuses, before the work
    begins, one that cannot be written, or whose `second` file cannot."""
    target = Path(output) if output else path.parent / name
    check_file(target, "--output")
    if second is not None:
        require(not second(target).is_dir(), f"--output {target}: {second(target)}, which is "
                "written too, is a folder; name another file")
    return target


# ---- rows and models -----------------------------------------------------------------------------

def choose_stories(rows: TokenRows, count: int, seed: int) -> np.ndarray:
    """Numbers of `count` rows that hold whole stories, or of all where there are fewer: a random
    choice, (count,) int64."""
    if not count:
        return np.zeros(0, np.int64)  # and the split need not be read through
    whole = [i for i in range(len(rows)) if row_kind(rows[i]) == "story"]
    if len(whole) < count:
        print(f"only {len(whole)} stories of {rows.split} fit into one row: comparing with those")
    return np.random.default_rng(seed).permutation(whole)[:count]


def warn_of_other_rows(path: str | Path, checkpoint: dict, rows: TokenRows) -> None:
    """Says on stderr that a model was trained on other rows than those of this folder's training
    split: what is held out here may have been trained on. Rows and pairs are not compared: they
    differ where the stories are the same."""
    known, here = checkpoint.get("data"), content_hashes(rows.meta)
    if known and known["train"] != here["train"] and (
            "train_condition" in known) == ("train_condition" in here):
        print(f"warning: {path} was trained on other rows than the training split of "
              f"{rows.data_dir}: stories of its {rows.split} split may be among them",
              file=sys.stderr)


def open_model(config: HeldOutConfig, path: Path, checkpoint: dict) -> tuple:
    """The model of a checkpoint, the rows that it is measured on, and its tokenizer. Raises
    UserError where they do not belong together."""
    data_dir = config.data_dir or checkpoint.get("train_config", {}).get("data_dir", "data")
    rows = open_rows(data_dir, config.split)
    check_tokenizer(path, checkpoint, data_dir, rows.meta)
    warn_of_other_rows(path, checkpoint, rows)
    device = pick_device(config.device)
    precision = pick_precision(device, config.precision)
    model = merge(model_from_checkpoint(checkpoint)).to(device).set_precision(
        precision).for_inference()
    if kind_of(checkpoint).conditional:
        model.encoder.conditions_of(rows, path)  # refuses those that it cannot read
    longest = int(rows.lengths.max())
    require(longest <= model.config.max_len, f"{data_dir} has rows of {longest} tokens, {path} was "
            f"trained on rows of at most {model.config.max_len}")
    return model, rows, tokenizer_from_checkpoint(checkpoint)


def open_beside(path: str | None, kind: str | tuple[str, ...], model: torch.nn.Module,
                rows: TokenRows) -> torch.nn.Module | None:
    """The model of another checkpoint, on the device and in the precision of `model`; None without
    a path. Raises UserError for another kind, tokenizer or shorter rows."""
    if path is None:
        return None
    checkpoint = load_checkpoint(path, kind=kind)
    check_tokenizer(path, checkpoint, rows.data_dir, rows.meta)
    warn_of_other_rows(path, checkpoint, rows)
    beside = model_from_checkpoint(checkpoint).to(device_of(model))
    require(beside.config.max_len >= model.config.max_len, f"{path} was trained on rows of at most "
            f"{beside.config.max_len} tokens, this model on up to {model.config.max_len}")
    beside.compute_dtype = model.compute_dtype
    return beside.for_inference()
