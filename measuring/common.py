"""TODO"""

from cli import flag, require

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from corpus.rows import TokenRows, content_hashes, load_meta
from corpus.tokens import row_kind
from kinds.checkpoints import (
    check_tokenizer,
    load_checkpoint,
    model_from_checkpoint,
    tokenizer_from_checkpoint,
)
from network.hardware import device_of, pick_device, pick_precision
from network.layers import PRECISIONS
from sampling.sampler import MAX_STEPS, Sampler

EVALUATIONS = (4, 8, 16, 32, 64, 128, 256)
THRESHOLDS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
GAMMAS = (32.0, 16.0, 8.0, 4.0, 2.0, 0.5)
SAMPLERS = {
    "random": dict(),
    "random, linear": dict(pace="linear"),
    "random, first_hitting": dict(pace="first_hitting"),
    "random, temperature 0.8": dict(temperature=0.8),
    "random, top_p 0.9": dict(top_p=0.9),  # the presets of generate.py
    "confidence": dict(order="confidence"),
    "margin": dict(order="margin"),
    "entropy": dict(order="entropy"),
    "random, remdm_cap": dict(remask="remdm_cap", eta=0.05),
    "random, remdm_rescale": dict(remask="remdm_rescale", eta=0.1),
    "random, remdm_confidence": dict(remask="remdm_confidence", eta=0.1),
    "random, corrector": dict(remask="corrector", eta=0.1),
    "confidence, threshold": dict(order="confidence", pace="threshold"),
    "entropy, entropy_bound": dict(order="entropy", pace="entropy_bound"),
    "random, entropy_bound": dict(order="random", pace="entropy_bound"),
}
SPLITS = ("test", "val", "train")


@dataclass(frozen=True)
class EvaluateConfig(Sampler):
    checkpoint: str | None = flag(None, "checkpoint to use (default: the newest */best.pt)")
    data_dir: str | None = flag(None, "data folder with the held-out stories (default: the one "
                                      "that the checkpoint was trained on)")
    split: str | None = flag(None, "test, val or train (default: test where the data folder has "
                                   "it, else val)", SPLITS)
    max_rows: int | None = flag(None, "score only so many rows, evenly spread over the "
                                     "split")
    draws: int = flag(4, "masks drawn for every row")
    num_samples: int = flag(64, "stories generated and compared with as many real ones, 0 for none")
    sampling: bool = flag(False, "compare samplers instead")
    infilling: bool = flag(False, "fill in the middle sentence of real stories instead")
    twin: str | None = flag(None, "checkpoint of an autoregressive twin: the judge of --sampling, "
                                  "the other side of --infilling; the judge of a model "
                                  "with a condition")
    samplers: list[str] = flag(list(SAMPLERS), "which to compare")
    evaluations: list[int] = flag(list(EVALUATIONS), "network evaluations to compare at")
    guidances: list[float] = flag([0.0, 1.0, 1.5, 2.0, 3.0], "a model with a condition: the "
                                                             "guidances to compare")
    plain: str | None = flag(None, "its other side: the checkpoint that gets the condition as a "
                                   "prompt (default: the model itself, without its condition)")
    seed: int = flag(0, "seed of masks and stories")
    output: str | None = flag(None, "file to write (default: evaluation.json, sampling.json or "
                                    "infilling.json by the checkpoint)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("auto", "auto, fp32, bf16 or fp16", ("auto", *PRECISIONS))

    def check(self) -> None:
        super().check()
        for name in ("max_rows", "draws"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} {value}: must be at least 1")
        for name in ("num_samples", "seed"):
            require(0 <= getattr(self, name) < 2**63,
                    f"--{name} {getattr(self, name)}: must be 0 or more")
        require(self.num_samples != 1, "--num_samples 1: self-BLEU needs at least 2 stories")
        other = self.sampling or self.infilling
        require(not (self.sampling and self.infilling), "--sampling and --infilling: choose one")
        require(all(math.isfinite(value) and value >= 0 for value in self.guidances),
                "--guidances: must be 0 or more")
        require(self.num_samples or not other, "--sampling and --infilling compare stories: give "
                                               "--num_samples 2 or more")
        for name in self.samplers:
            require(name in SAMPLERS, f"--samplers {name!r}: choose from "
                                              + ", ".join(map(repr, SAMPLERS)))
        require(1 <= min(self.evaluations) and max(self.evaluations) <= MAX_STEPS,
                f"--evaluations: must be from 1 to {MAX_STEPS}")


def choose_stories(config: EvaluateConfig, rows: TokenRows) -> np.ndarray:
    """Numbers of the rows to compare samples with: whole stories, at most `num_samples`."""
    if not config.num_samples:
        return np.zeros(0, np.int64)  # and the split need not be read through
    whole = [i for i in range(len(rows)) if row_kind(rows[i]) == "story"]
    if len(whole) < config.num_samples:
        print(f"only {len(whole)} stories of {rows.split} fit into one row: comparing with those")
    return np.random.default_rng(config.seed).permutation(whole)[:config.num_samples]


def reported_split(meta: dict) -> str:
    """The split that figures come from unless another is asked for: nothing is chosen on "test".
    """
    return "test" if meta["splits"].get("test", {}).get("shards") else "val"


def open_rows(data_dir: str, split: str | None) -> TokenRows:
    meta = load_meta(data_dir)
    split = split or reported_split(meta)
    require(split in meta["splits"], f"--split {split}: {data_dir} has no such split, only "
            f"{', '.join(name for name in SPLITS if name in meta['splits'])}")
    return TokenRows(data_dir, split)


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


def open_model(config: EvaluateConfig, path: Path, checkpoint: dict) -> tuple:
    """The model of a checkpoint, the rows that it is evaluated on, and its tokenizer."""
    data_dir = config.data_dir or checkpoint.get("train_config", {}).get("data_dir", "data")
    rows = open_rows(data_dir, config.split)
    check_tokenizer(path, checkpoint, data_dir, rows.meta)
    warn_of_other_rows(path, checkpoint, rows)
    device = pick_device(config.device)
    precision = pick_precision(device, config.precision)
    model = model_from_checkpoint(checkpoint).to(device).set_precision(precision).for_inference()
    if model.kind == "conditional":
        model.encoder.conditions_of(rows, path)
    longest = int(rows.lengths.max())
    require(longest <= model.config.max_len, f"{data_dir} has rows of {longest} tokens, {path} was "
            f"trained on rows of at most {model.config.max_len}")
    return model, rows, tokenizer_from_checkpoint(checkpoint)


def open_beside(config: EvaluateConfig, path: str | None, kind: str, model: torch.nn.Module,
                rows: TokenRows) -> torch.nn.Module | None:
    """The model of another checkpoint, on the device and in the precision of `model`; None without
    a path."""
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
