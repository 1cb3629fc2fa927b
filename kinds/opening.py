"""A checkpoint as what writes stories. A library of generate.py, which imports it where there is a
checkpoint and not where an exported step writes.
"""

from cli import require

from functools import partial
from pathlib import Path
from typing import Any

from kinds.checkpoints import (
    find_checkpoint,
    load_adapted,
    load_checkpoint,
    model_from_checkpoint,
    tokenizer_from_checkpoint,
)
from kinds.registry import kind_of, kinds_that
from network.hardware import pick_device
from network.lora import merge
from sampling.source import Source


def open_checkpoint(config: Any, sort: str | None) -> Source:
    """That of the flags of generate.py; `sort` is that of the conditions that are given. Raises
    UserError for a checkpoint that cannot do what is asked."""
    conditional = sort is not None
    # The newest that does what is asked; one that is named may be of any kind that writes.
    usual = kinds_that(lambda kind: (kind.conditional or not conditional)
                       and (kind.unmasks if config.verify or not config.asks_for else True)
                       and (kind.from_left if config.asks_for else True))
    path = (Path(config.adapter) if config.adapter and config.checkpoint is None else
            find_checkpoint(config.checkpoint, usual, sort == "image" if conditional else None))
    beside = config.adapter if config.checkpoint else None  # else it finds its own base
    checkpoint, kind, model = load(path, config, conditional, beside)
    if conditional:
        has = model.encoder.sort
        require(model.encoder.of_pictures == (sort == "image"), f"{beside or path} reads "
                + ("pictures: give it --image" if model.encoder.of_pictures else
                   f"conditions of the sort {has!r}: give it --condition or --conditions"))
    verifier = None
    if config.verify_with:
        other, its_kind, its_model = load(Path(config.verify_with), config, conditional)
        require(its_kind.from_left, f"--verify_with {config.verify_with}: a {its_kind.name} model "
                                    "does not write from the left; take the twin")
        require(other["tokenizer_sha256"] == checkpoint["tokenizer_sha256"],
                f"--verify_with {config.verify_with} has another tokenizer than {path}: take a "
                "model that was trained on the same data")
        verifier = partial(its_kind.reader, its_model)
    name = f"{path} with {beside}" if beside else str(path)
    return Source(name, tokenizer_from_checkpoint(checkpoint),
                  checkpoint["length_histogram"], model.config.max_len,
                  model.encoder.read if conditional else None,
                  partial(kind.step, model) if kind.unmasks else None,
                  partial(kind.choice, model) if kind.unmasks else None,
                  partial(kind.reader, model) if kind.from_left else None,
                  getattr(model, "draft", None) is not None, kind.gap, verifier)


def load(path: Path, config: Any, conditional: bool, adapter: str | None = None,
         ) -> tuple[dict, Any, Any]:
    """A checkpoint, or an adapter on it, its kind and its network."""
    device = pick_device(config.device)
    kinds = kinds_that(lambda kind: (kind.unmasks or kind.from_left)
                       and (kind.conditional or not conditional))
    checkpoint = load_adapted(adapter, path, kinds) if adapter else load_checkpoint(path, kinds)
    model = merge(model_from_checkpoint(checkpoint)).to(device).set_precision(config.precision)
    return checkpoint, kind_of(checkpoint), model.for_inference()
