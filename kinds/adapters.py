"""Adapters: the .pt files with what stage 2 has trained, without the model that it stays beside. A
library of checkpoints.py, which reads them as checkpoints, and of training/slim.py.

    python -m training.slim --adapter --checkpoint pictures/best.pt --output pretrained/pictures.pt

An adapter has the encoder, the cross-attention and the low-rank adapters of network/lora.py, and a
checksum of all other weights: together with a model that has just these it is a checkpoint again.
"""

from cli import require

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from corpus.tokens import is_length_histogram
from kinds.files import are_tensors
from kinds.kind import averaged
from kinds.registry import KINDS
from model import is_of_condition

ADAPTER_FORMAT, ADAPTER_VERSION = "diffusion-llm adapter", 1
# Of the model's settings those that are the adapter's
LORA = ("lora_rank", "lora_alpha", "lora_targets")
# What else it takes over from its checkpoint, and a checkpoint from it
KEPT = ("kind", "data", "encoder", "encoder_config", "tokenizer_sha256", "length_histogram", "step",
        "tokens_seen", "seconds", "torch_version", "data_source", "licence")


def base_hash(weights: dict[str, Tensor]) -> str:
    """One checksum of the weights that an adapter stays beside: their names, shapes and values in
    FP32, so that it does not matter in which precision a file keeps the same values."""
    total = hashlib.sha256()
    for name in sorted(name for name in weights if not is_of_condition(name)):
        weight = weights[name].detach().cpu().float().contiguous()
        total.update(f"{name} {tuple(weight.shape)}".encode())
        total.update(weight.numpy().tobytes())
    return total.hexdigest()


def adapter_of(checkpoint: dict, dtype: torch.dtype = torch.bfloat16) -> dict:
    """The contents of an adapter's file, from a checkpoint of stage 2 (load_checkpoint)."""
    weights, settings = averaged(checkpoint), checkpoint.get("train_config", {})
    return {"format": ADAPTER_FORMAT, "format_version": ADAPTER_VERSION,
            **{name: checkpoint[name] for name in KEPT if name in checkpoint},
            "base_sha256": base_hash(weights),
            "lora": {name: checkpoint["model_config"][name] for name in LORA
                     if name in checkpoint["model_config"]},
            "train_config": settings,
            "weights": {name: weight.to(dtype) if weight.is_floating_point() else weight
                        for name, weight in weights.items() if is_of_condition(name)}}


def wrong_entries(adapter: dict) -> list[str]:
    """The names of an adapter's entries that are not of the form that is written here."""
    kind = adapter.get("kind")
    right = {"kind": isinstance(kind, str) and kind in KINDS and KINDS[kind].conditional,
             "encoder": isinstance(adapter.get("encoder"), str),
             "encoder_config": isinstance(adapter.get("encoder_config"), dict),
             "base_sha256": isinstance(adapter.get("base_sha256"), str),
             "tokenizer_sha256": isinstance(adapter.get("tokenizer_sha256"), str),
             "length_histogram": is_length_histogram(adapter.get("length_histogram")),
             "lora": isinstance(adapter.get("lora"), dict) and set(adapter["lora"]) <= set(LORA)
             and all(isinstance(value, int | float | str) for value in adapter["lora"].values()),
             "train_config": isinstance(adapter.get("train_config"), dict),
             "weights": are_tensors(adapter.get("weights"))
             and all(map(is_of_condition, adapter["weights"]))}
    return [name for name, fine in right.items() if not fine]


def check_adapter(path: Path, adapter: dict) -> None:
    version = adapter.get("format_version")
    require(type(version) is int and version == ADAPTER_VERSION,
            f"{path} has adapter format version {version}, this program reads version "
            f"{ADAPTER_VERSION}: use the program that wrote it")
    wrong = wrong_entries(adapter)
    require(not wrong, f"{path} was changed after it was written ({', '.join(wrong)}): name "
                       "another file")


def beside(path: Path, adapter: dict, base: dict, base_path: Path) -> dict:
    """Base and adapter as one checkpoint. UserError for another base than the adapter's own."""
    denoiser = KINDS[adapter["kind"]].denoiser.name
    require(base["kind"] == denoiser, f"{path} is an adapter for a {denoiser} model; {base_path} "
                                      f"is a {base['kind']} model")
    weights = averaged(base)
    require(base_hash(weights) == adapter["base_sha256"], f"{path} was not trained beside the "
            f"weights of {base_path}: name its own base with --checkpoint")
    return {**{name: value for name, value in base.items() if name not in (
                "ema", "optimizer", "scaler", "data")},
            **{name: adapter[name] for name in KEPT if name in adapter},
            "model_config": base["model_config"] | adapter["lora"],
            "train_config": {name: value for name, value in base.get("train_config", {}).items()
                             if name != "data_dir"} | adapter["train_config"],
            "weights": weights | adapter["weights"]}


def on_its_base(path: Path, adapter: dict, candidates: Iterable[Path],
                load: Callable[[Path], dict | None]) -> dict:
    """The adapter with the first of these checkpoints that it was trained beside; `load` gives None
    for what is none."""
    check_adapter(path, adapter)
    seen = []
    for candidate in candidates:
        base = load(candidate)
        if base is None or base["kind"] != KINDS[adapter["kind"]].denoiser.name:
            continue
        seen.append(str(candidate))
        if base_hash(averaged(base)) == adapter["base_sha256"]:
            return beside(path, adapter, base, candidate)
    require(False, f"{path} is an adapter, and the model that it was trained beside is not here"
            + f" (looked at {', '.join(seen)})" * bool(seen)
            + ": put it into the same folder, or name both, with --checkpoint and --adapter")
    raise AssertionError
