"""Checkpoints: the .pt files with a network, its tokenizer and its length histogram. A library for
whatever writes or reads them.

    checkpoint = load_checkpoint("checkpoints/best.pt")
    model = model_from_checkpoint(checkpoint)                   # with the averaged weights

Stages meet in these files alone. No Python code in one is ever run (ONNX Runtime runs the graph of
a vision model that a frozen encoder brings), and one that is damaged, foreign or changed is refused
in a line.
"""

from cli import UserError, atomic_file, require

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from corpus.tokens import is_length_histogram, load_tokenizer, sha256
from kinds.adapters import ADAPTER_FORMAT, ADAPTER_VERSION, beside, check_adapter, on_its_base
from kinds.files import are_tensors, read_file
from kinds.kind import averaged
from kinds.registry import KINDS
from model import DiffusionTransformer
from network.encoders import reads_pictures
from network.layers import OLDER

CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "diffusion-llm checkpoint", 3
READABLE = (2, CHECKPOINT_VERSION)  # 2 knows no other network than that of `OLDER`
OLDER_RUN = OLDER | {"t_min": 0.0, "t_max": 1.0}  # what a run means whose settings do not say
# What comes with the repository, for whoever has trained nothing yet
PRETRAINED = Path(__file__).parent.parent / "pretrained" / "stories_small.pt"
PRETRAINED_PICTURES = PRETRAINED.with_name("pictures_small.pt")  # an adapter beside it
CHECKPOINT_KEYS = ("kind", "model_config", "weights", "tokenizer", "tokenizer_sha256",
                   "length_histogram")


def save_checkpoint(path: str | Path, model: DiffusionTransformer, tokenizer: str,
                    length_histogram: dict, kind: str | None = None, **state: Any) -> None:
    """Writes a `.pt` checkpoint, whole or not at all.

    It carries the tokenizer (text of tokenizer.json) and the length histogram, so that generation
    needs this one file. `kind` is that of the model, by default the one that its network is made
    for. `state` is whatever the writer needs to continue (`ema`, `optimizer`,
    `step`, `cursor`, ...): plain containers, numbers, strings and tensors only; `weights` in it
    replaces the model's state dict where that one is spread over several processes.
    """
    encoder = getattr(model, "encoder", None)
    contents = {
        "format": CHECKPOINT_FORMAT, "format_version": CHECKPOINT_VERSION,
        "kind": kind or model.kind, "model_config": dataclasses.asdict(model.config),
        "encoder": encoder and encoder.sort, "encoder_config": encoder and encoder.settings(),
        "tokenizer": tokenizer,
        "tokenizer_sha256": sha256(tokenizer.encode()), "length_histogram": length_histogram,
        **({} if "weights" in state else {"weights": model.state_dict()}), **state}
    with atomic_file(path) as file:
        torch.save(contents, file)


def load_checkpoint(path: str | Path, kind: str | tuple[str, ...] | None = "diffusion") -> dict:
    """Reads a checkpoint without running code from it (`weights_only`).

    Raises UserError if the file is missing, damaged, foreign, of another format version, or not of
    this `kind` ("diffusion", "conditional", "autoregressive" or several; None takes all).
    """
    path = Path(path)
    contents = read_file(path)
    if contents.get("format") == ADAPTER_FORMAT:
        contents = on_its_base(path, contents, bases(path), base_in)
    require(contents.get("format") == CHECKPOINT_FORMAT,
            f"{path} is a torch file but not a checkpoint of this program; name a .pt file that "
            "train.py wrote")
    version = contents.get("format_version")
    require(type(version) is int and version in READABLE,
            f"{path} has checkpoint format version {version}, this program reads "
            f"version {CHECKPOINT_VERSION}: use the program that wrote it")
    missing = [key for key in CHECKPOINT_KEYS if key not in contents]
    require(not missing, f"{path} lacks {', '.join(missing)}: it was not written by train.py")
    check_kind(path, contents, kind)
    wrong = wrong_entries(contents)
    require(not wrong, f"{path} was changed after train.py wrote it ({', '.join(wrong)}): name "
                       "another .pt file")
    for name, older in (("model_config", OLDER), ("train_config", OLDER_RUN)):
        if name in contents:
            contents[name] = older | contents[name]
    if KINDS[contents["kind"]].conditional:
        contents["encoder"] = contents.get("encoder") or "text"  # older ones do not say
    leave_older_head(path, contents)
    return contents


def load_adapted(path: str | Path, base: str | Path,
                 kind: str | tuple[str, ...] | None = None) -> dict:
    """An adapter (kinds/adapters.py) on that base, as one checkpoint; as `load_checkpoint`."""
    path, base = Path(path), Path(base)
    adapter = read_file(path)
    require(adapter.get("format") == ADAPTER_FORMAT, f"{path} is not an adapter: train.py --stage "
            "2 and python -m training.slim --adapter make one")
    check_adapter(path, adapter)
    contents = beside(path, adapter, load_checkpoint(base, None), base)
    check_kind(path, contents, kind)
    return contents


def check_kind(path: Path, contents: dict, kind: str | tuple[str, ...] | None) -> None:
    kinds = (kind,) if isinstance(kind, str) else kind
    require(kinds is None or contents["kind"] in kinds, f"{path}: {contents['kind']} model; "
            f"what is needed here is of the kind: {' or '.join(kinds or ())} model")


def bases(path: Path) -> Iterator[Path]:
    """Where the model is looked for that an adapter in this file was trained beside: the folder of
    the file, what comes with the repository, and the folders here."""
    others = [other for other in sorted(path.parent.glob("*.pt")) if other != path]
    yield from dict.fromkeys([*others, PRETRAINED, *sorted(Path().glob("*/best.pt"))])


def base_in(path: Path) -> dict | None:
    """The checkpoint in a file, if it is one without a condition; a damaged one is none."""
    found = described(path)
    if found is None or found[1]:
        return None
    try:
        return load_checkpoint(path, None)
    except UserError:
        return None


def leave_older_head(path: str | Path, contents: dict) -> None:
    """Takes away a draft head that has tables of its own, as it was once written, and says so on
    stderr. A training of such a head cannot go on (UserError)."""
    if "draft.before" not in contents["weights"]:
        return
    require("optimizer" not in contents or contents["train_config"].get("objective") != "draft",
            f"{path}: its draft head is of an older form and cannot be trained on; begin again, "
            "with --objective draft --init_from")
    contents["model_config"] = contents["model_config"] | {"draft_rank": 0}
    for name in ("weights", "ema"):
        if contents.get(name):
            contents[name] = {key: weight for key, weight in contents[name].items()
                              if not key.startswith("draft.")}
    print(f"{path}: its draft head is of an older form and is left out; train.py --objective draft "
          f"--init_from {path} trains another", file=sys.stderr)


def wrong_entries(contents: dict) -> list[str]:
    """The names of a checkpoint's entries that are not of the form that is written here."""
    text, average = contents["tokenizer"], contents.get("ema")
    right = {
        "kind": isinstance(contents["kind"], str) and contents["kind"] in KINDS,
        "encoder": isinstance(contents.get("encoder"), str | None),
        "model_config": isinstance(contents["model_config"], dict),
        "tokenizer": isinstance(text, str) and
        sha256(text.encode(errors="replace")) == contents["tokenizer_sha256"],
        "length_histogram": is_length_histogram(contents["length_histogram"]),
        "train_config": isinstance(contents.get("train_config", {}), dict),
        "weights": are_tensors(contents["weights"]),
        "ema": average is None or are_tensors(average)}
    return [key for key, fine in right.items() if not fine]


def find_checkpoint(name: str | None, kind: str | tuple[str, ...] | None = None,
                    pictures: bool | None = None) -> Path:
    """The checkpoint of that name, or the newest best.pt of this `kind` (as in load_checkpoint) in
    a folder beside the scripts' output; newer ones that had to be passed over are named on stderr.
    Where there is none at all, one that comes with the repository. With `pictures` only models
    count that read pictures, or (False) only those that do not.
    """
    if name is not None:
        return Path(name)
    kinds = (kind,) if isinstance(kind, str) else kind

    def fits(path: Path) -> bool:
        has = described(path)
        return (has is not None and (kinds is None or has[0] in kinds)
                and pictures in (None, reads_pictures(has[1])))

    found = sorted(Path().glob("*/best.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    ours = [path for path in (PRETRAINED, PRETRAINED_PICTURES) if path.is_file() and fits(path)]
    if ours and (not found or pictures and not any(map(fits, found))):
        there, here = ours[0], Path.cwd()
        there = there.relative_to(here) if there.is_relative_to(here) else there
        print(f"no */best.pt here{' reads pictures' * bool(pictures)}: this is {there}, "
              "which comes with the repository", file=sys.stderr)
        return there
    require(found, "no */best.pt here: train a model first (`python train.py --quick`) or name "
                   "one with --checkpoint")
    passed = []
    for path in found:
        if kinds is None and pictures is None:
            return path
        if fits(path):
            if passed:
                print(f"using {path}; newer, but not what is needed here: {', '.join(passed)}",
                      file=sys.stderr)
            return path
        has = described(path)
        passed.append(f"{path} ({f'{has[0]} model' if has else 'not to be read'})")
    raise UserError(f"no */best.pt here is of the kind that is needed: "
                    f"{' or '.join(kinds or ('any',))} model"
                    + " that reads pictures" * bool(pictures) + "; found "
                    f"{', '.join(passed)}: train one first or name one with --checkpoint")


def described(path: Path) -> tuple[str, str | None] | None:
    """The kind of model in a checkpoint or an adapter, and the sort of its encoder (None: it has
    none), whose weights stay on the disk; None if it cannot be read."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        version, kind = contents["format_version"], contents["kind"]
        ours = (contents["format"] == CHECKPOINT_FORMAT and version in READABLE
                or contents["format"] == ADAPTER_FORMAT and version == ADAPTER_VERSION)
        return (kind, contents.get("encoder")) if ours else None
    except Exception:  # a damaged pickle can raise nearly anything
        return None


def model_from_checkpoint(checkpoint: dict, use_ema: bool = True) -> DiffusionTransformer:
    """The network of a checkpoint, with its averaged (EMA) weights where there are any."""
    weights = averaged(checkpoint) if use_ema else checkpoint["weights"]
    try:
        model = KINDS[checkpoint["kind"]].restore(checkpoint, weights)
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError, KeyError, ArithmeticError) as error:
        raise UserError("the checkpoint's weights do not fit its model settings: it was changed "
                        "after train.py wrote it") from error
    return model.eval()


def tokenizer_from_checkpoint(checkpoint: dict):
    return load_tokenizer(checkpoint["tokenizer"])


def check_tokenizer(path: str | Path, checkpoint: dict, data_dir: str | Path, meta: dict) -> None:
    """Refuses to mix a checkpoint with data that another tokenizer made."""
    require(checkpoint["tokenizer_sha256"] == meta["tokenizer_sha256"],
            f"{path} was trained with another tokenizer than that of {data_dir}: name the data "
            "folder that it was trained on")
