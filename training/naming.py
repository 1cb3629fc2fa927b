"""Teaches an encoder of pictures to name what it sees, before a model reads what it makes of them.

    python -m training.naming --emoji noto twemoji openmoji --held_out openmoji --output encoder.pt
    python train.py --stage 2 --image_encoder encoder.pt ...

A model that is to tell of pictures says little of them in every sentence, and an encoder that
learns from that alone learns where and how many before it learns what (docs/experiments.md). Here
it is asked for the words of a picture's name and nothing else. `--emoji` and `--held_out` are those
of prep_image_data.py, but all names count, not only those that stories tell of; styles that are
held out are not trained on, and what of them it names is printed. Pictures are varied as in
train.py; half of them are mirrored, and some are grey.

Writes --output at every validation, with all that --resume needs, which keeps the settings that are
not given anew. A step of 128 pictures took 0.8 to 1.2 s on two slow CPU cores.
"""

from cli import Stopped, UserError, atomic_file, check_file, flag, parse, require, run

import dataclasses
import math
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from corpus.image_files import check_size, load_picture
from corpus.scenes import emoji_lines
from corpus.tokens import sha256
from kinds.files import ENCODER_FORMAT, check_encoder, read_file
from model import MODEL_CONFIGS, size_of
from network.encoders import ImageEncoder
from network.hardware import pick_device
from network.layers import Linear, ModelConfig
from network.transformer import Block
from training.loader import step_seed
from training.optimizers import make_optimizers

PLAIN = 4  # names of one word, as stories have them, are shown so many times as often as others
WARMUP, MIRRORED, GREY = 0.02, 0.5, 0.15
WEIGHT_DECAY = 0.1
CHOICES = 8  # names among which one of a held-out picture is to be found
# A run cannot go on with another value of these: the same step would be another one.
FIXED = ("held_out", "encoder_config", "image_size", "batch", "seed")


@dataclass
class NamingConfig:
    emoji: list[str] = flag([], "folders of emoji, each with a pairs.jsonl")
    held_out: list[str] = flag([], "styles that are not trained on")
    output: str = flag("encoder.pt", "file to write")
    encoder_config: str = flag("micro", "size: " + ", ".join(MODEL_CONFIGS))
    image_size: int = flag(64, "sides of the pictures in pixels, a multiple of 8")
    max_steps: int = flag(2500, "optimizer steps")
    batch: int = flag(128, "pictures of a step")
    lr: float = flag(0.006, "peak learning rate, from which it falls to 0 in the second half")
    valid_every: int = flag(250, "steps between validations, and writes of --output")
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    resume: bool = flag(False, "continue from --output")
    overwrite: bool = flag(False, "replace --output")

    def check(self) -> None:
        require(self.emoji, "name the folders of emoji with --emoji")
        for folder in self.emoji:
            require((Path(folder) / "pairs.jsonl").is_file(), f"--emoji {folder}: no pairs.jsonl "
                                                              "there")
        require(self.held_out, "name with --held_out a style that shows what has been learned")
        require(self.encoder_config in MODEL_CONFIGS, f"--encoder_config {self.encoder_config}: "
                f"unknown size, choose from {', '.join(MODEL_CONFIGS)}")
        check_size("--image_size", self.image_size)
        for name in ("max_steps", "batch", "valid_every"):
            require(getattr(self, name) > 0, f"--{name} {getattr(self, name)}: must be positive")
        require(0 <= self.seed < 2**63, f"--seed {self.seed}: must be 0 or more")
        require(0 < self.lr < math.inf, f"--lr {self.lr}: must be positive")
        pick_device(self.device)

    def check_output(self) -> None:
        target = Path(self.output)
        require(target.suffix == ".pt", f"--output {target}: name a .pt file")
        check_file(target, "--output")
        require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")
        require(not self.resume or target.is_file(), f"--resume: no {target} to continue from")
        require(self.resume or self.overwrite or not target.exists(), f"--output {target} is there "
                "already: continue it with --resume, or give --overwrite or another name")


def resumed(config: NamingConfig, given: set[str]) -> tuple[NamingConfig, dict]:
    """The settings of the run in --output with those given now on top, and the file's contents."""
    saved = read_file(Path(config.output))
    check_encoder(config.output, saved)
    stored, step = saved.get("config"), saved.get("step")
    known = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
    require(isinstance(stored, dict) and {name: type(x) for name, x in stored.items()} == known
            and type(step) is int and step >= 0 and type(saved.get("seconds")) is float,
            f"{config.output} is not of python -m training.naming, or was changed: it cannot be "
            "gone on with")
    changed = [name for name in FIXED if name in given and stored[name] != getattr(config, name)]
    require(not changed, f"--{' --'.join(changed)}: {config.output} was begun with other values, "
                         "which cannot change")
    merged = NamingConfig(**stored | {name: getattr(config, name) for name in given}
                          | {"output": config.output, "resume": True, "overwrite": False})
    require(step < merged.max_steps, f"{config.output} has had its {step:,} steps: give more "
                                     "--max_steps")
    return merged, saved


class Pictures:
    """The emoji of all styles and the words of their names.

    `pictures` (N, size, size, 4) uint8, `wanted` (N, W) the share of each word in what is to be
    said of a picture, `plain` (N,) whether its name is one word, `held_out` (N,); `sha256` of all.
    """

    def __init__(self, config: NamingConfig):
        found = [(Path(folder) / image, tuple(re.findall("[a-z]+", name.lower())),
                  style)
                 for folder in config.emoji for image, name, style, _ in emoji_lines(folder)
                 if image and name]
        styles = {style for *_, style in found}
        missing = sorted(set(config.held_out) - styles)
        require(not missing, f"--held_out {' '.join(missing)}: no such style, only "
                             f"{', '.join(sorted(styles))}")
        known = {word for _, words, style in found if style not in config.held_out
                 for word in words}
        found = [entry for entry in found if entry[1] and known.issuperset(entry[1])]
        names = {words for _, words, style in found if style not in config.held_out}
        self.words = sorted(known)
        number = {word: i for i, word in enumerate(self.words)}
        common = Counter(word for words in names for word in set(words))
        self.wanted = torch.zeros(len(found), len(self.words))
        for row, (_, words, _) in zip(self.wanted, found, strict=True):
            for word in words:  # "face" is in many names, and says little
                row[number[word]] = 1 / math.sqrt(common[word])
        self.wanted /= self.wanted.sum(1, keepdim=True)
        self.plain = torch.tensor([len(words) == 1 for _, words, _ in found])
        self.held_out = torch.tensor([style in config.held_out for *_, style in found])
        require(not self.held_out.all(), "no style is left for training: all are held out")
        asked = {words for _, words, style in found
                 if style in config.held_out and len(words) == 1}
        require(len(asked) >= CHOICES, f"the held-out styles show fewer than {CHOICES} things "
                                       "whose name is one word that training knows")
        self.pictures = torch.from_numpy(np.stack([
            load_picture(path, config.image_size) for path, *_ in
            tqdm(found, desc="pictures", leave=False, disable=None)]))
        self.sha256 = sha256(b"".join(x.numpy().tobytes() for x in (
            self.pictures, self.wanted, self.held_out)))


class Namer(nn.Module):
    """An encoder, and behind the mean of its last states a score for every word."""

    def __init__(self, encoder: ImageEncoder, words: int):
        super().__init__()
        self.encoder, self.said = encoder, Linear(encoder.width, words)

    @property
    def all_blocks(self) -> list[Block]:
        return self.encoder.all_blocks

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, size, size, 4) uint8 -> (B, W) log-probabilities."""
        return self.said(self.encoder(pictures).states[-1].mean(1)).log_softmax(-1)


class Naming:
    """A run. Everything random in a step comes from the seed and its number."""

    def __init__(self, config: NamingConfig, saved: dict | None = None):
        self.config, self.step, self.seconds = config, 0, 0.0
        self.data, self.device = Pictures(config), pick_device(config.device)
        torch.manual_seed(config.seed)
        encoder = ImageEncoder.create(ModelConfig(), {"size": config.image_size},
                                      size_of(config.encoder_config))
        self.model = Namer(encoder, len(self.data.words)).to(self.device)
        self.optimizers = make_optimizers(self.model, "muon", config.lr, WEIGHT_DECAY, "fp32")
        self.train = (~self.data.held_out).nonzero()[:, 0]
        self.chance = torch.where(self.data.plain[self.train], float(PLAIN), 1.0)
        if saved is not None:
            self.restore(saved)

    def restore(self, saved: dict) -> None:
        require(saved.get("data") == self.data.sha256, f"{self.config.output} has learned from "
                "other pictures or names than those of --emoji: begin again with --overwrite")
        try:
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizer"], strict=True):
                optimizer.load_state_dict(state)
        except Exception as error:  # torch has many types of exceptions for what does not fit
            raise UserError(f"{self.config.output}: its state does not fit its settings: it was "
                            "changed after it was written") from error
        self.step, self.seconds = saved["step"], saved["seconds"]

    def run(self) -> None:
        config, started, before = self.config, time.perf_counter(), self.seconds
        total = sum(p.numel() for p in self.model.encoder.parameters())
        print(f"{config.encoder_config}: {total / 1e6:.1f}M parameters on {self.device}; "
              f"{len(self.train):,} pictures to learn from, {len(self.data.words):,} words, "
              f"{int((self.data.plain & self.data.held_out).sum()):,} pictures of "
              f"{', '.join(config.held_out)} to be named", flush=True)
        with tqdm(total=config.max_steps, initial=self.step, unit="step", disable=None) as bar:
            while self.step < config.max_steps:
                loss = self.take()
                bar.update()
                self.seconds = before + time.perf_counter() - started
                if self.step % config.valid_every == 0 or self.step == config.max_steps:
                    figures = self.validate()
                    self.save(figures)
                    tqdm.write(f"step {self.step}: loss {loss:.3f}; named {figures['named']:.1%} "
                               f"of the held-out pictures among {figures['names']} names, "
                               f"{figures['one_of_8']:.1%} among {CHOICES}")
                    sys.stdout.flush()
        print(f"{self.step:,} steps in {self.seconds / 60:.1f} minutes; wrote {config.output}, "
              f"{Path(config.output).stat().st_size / 1e6:.1f} MB")

    def take(self) -> float:
        """One optimizer step; returns its loss. One that is not finite changes no weight:
        Stopped."""
        config, data = self.config, self.data
        generator = torch.Generator().manual_seed(step_seed(config.seed, self.step))
        rows = self.train[torch.multinomial(self.chance, config.batch, replacement=True,
                                            generator=generator)]
        pictures = self.model.encoder.vary(data.pictures[rows], generator)
        self.model.train()
        said = self.model(mirrored_or_grey(pictures, generator).to(self.device))
        loss = -(data.wanted[rows].to(self.device) * said).sum(1).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(loss.detach() + norm):
            raise Stopped(f"the loss is not finite at step {self.step}; {config.output} is as the "
                          "last validation left it: lower --lr")
        done = self.step / config.max_steps
        lr = config.lr * min(1.0, (done + 1 / config.max_steps) / WARMUP, 2 * (1 - done))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """How many held-out pictures with a name of one word are named right: among all such names,
        and among CHOICES of them, drawn with the same seed every time."""
        data = self.data
        rows = (data.held_out & data.plain).nonzero()[:, 0]
        self.model.eval()
        said = torch.cat([self.model(data.pictures[part].to(self.device)).cpu()
                          for part in rows.split(256)])
        names, right = data.wanted[rows].argmax(1).unique(return_inverse=True)
        scores = said[:, names]  # (N, names)
        own = scores.gather(1, right[:, None])
        generator = torch.Generator().manual_seed(0)
        others = torch.rand(scores.shape, generator=generator).scatter(1, right[:, None], -1.0)
        drawn = scores.gather(1, others.topk(CHOICES - 1).indices)
        return {"named": float((scores.argmax(1) == right).float().mean()), "names": len(names),
                "one_of_8": float((own > drawn).all(1).float().mean())}

    def save(self, figures: dict[str, float]) -> None:
        encoder = self.model.encoder
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise Stopped(f"the weights are not finite after step {self.step}; "
                          f"{self.config.output} is as the validation before left it: lower --lr")
        contents: dict[str, Any] = {
            **ENCODER_FORMAT, "encoder": encoder.sort, "encoder_config": encoder.settings(),
            "weights": encoder.state_dict(), "figures": figures, "data": self.data.sha256,
            "model": self.model.state_dict(), "step": self.step, "seconds": self.seconds,
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "config": dataclasses.asdict(self.config)}
        with atomic_file(self.config.output) as file:
            torch.save(contents, file)


def mirrored_or_grey(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures (B, size, size, 4) uint8 the other way round, and some without colours:
    names bear both."""
    count = len(pictures)
    flip = torch.rand(count, generator=generator) < MIRRORED
    grey = torch.rand(count, generator=generator) < GREY
    pictures = torch.where(flip[:, None, None, None], pictures.flip(2), pictures)
    mean = pictures[..., :3].float().mean(-1, keepdim=True).to(torch.uint8)
    colours = torch.where(grey[:, None, None, None], mean, pictures[..., :3])
    return torch.cat([colours, pictures[..., 3:]], dim=-1)


def main(argv: list[str] | None = None) -> None:
    config, given = parse(NamingConfig, __doc__, argv)
    config.check_output()
    config, saved = resumed(config, given) if config.resume else (config, None)
    config.check()
    Naming(config, saved).run()


if __name__ == "__main__":
    run(main)
