"""How fast sampling is, beside ancestral samplers. Each arm runs in turn in one process.

    python benchmark.py sample --model_config small --batch 4 --steps 32
    python benchmark.py sample --checkpoint checkpoints/best.pt --order entropy --pace entropy_bound

The filling of whole rows by one and the same network in the chosen precision: by this project's
sampler (positions first, tokens drawn only there) and by ancestral ones, whatever the flags: a
textbook one (logits and FP64 noise for every position in every step) and a sensible one (both for
hidden positions only, in FP32). Random weights do for a planned pace; an adaptive one needs a
checkpoint. What peers' programs reached here is printed too, from bench/peers.json.

The speed-up that counts is that over the strongest baseline which ran; the table names it. The
columns are those of `benchmark.py train`.
"""

from cli import flag, parse, require

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from corpus.tokens import MASK
from kinds.checkpoints import load_checkpoint, model_from_checkpoint
from kinds.registry import kinds_that
from measuring.paired import Benchmark, read_peers, run_and_write
from model import create_model
from network.hardware import pick_precision
from sampling.loop import unmask
from sampling.rows import blank_story
from sampling.sampler import ADAPTIVE_PACES, Sampler
from sampling.step import numpy_step


@dataclass(frozen=True)
class SampleBenchmark(Benchmark, Sampler):
    BASELINES = ("sensible", "textbook")
    ARMS = (*BASELINES, "own")

    batch: int = flag(4, "stories at a time")
    steps: int = flag(32, "network evaluations for a story, at most")
    repeats: int = flag(5, "how often each arm is timed")
    checkpoint: str | None = flag(None, "model to use (default: random weights of --model_config)")
    arms: list[str] = flag(list(ARMS), "what to run: " + ", ".join(ARMS))

    def check(self) -> None:
        Benchmark.check(self)
        Sampler.check(self)
        require(self.checkpoint or self.pace not in ADAPTIVE_PACES,
                f"--pace {self.pace} depends on what the network is sure of: give a --checkpoint")

    def make(self, arm: str, device: torch.device) -> Callable[[], dict]:
        model = self.model().to(device)
        model.set_precision(pick_precision(device, self.precision)).for_inference()
        rows = np.stack([blank_story(self.seq_len - 2)] * self.batch)
        if arm in self.BASELINES:
            sampling = textbook_sampling if arm == "textbook" else sensible_sampling
            return sampling(self, model, torch.from_numpy(rows).to(device))

        def sample() -> dict:
            *_, last = unmask(numpy_step(model, self), rows, self)
            return {"evaluations": last.nfe, "tokens": int((rows == MASK).sum())}

        return sample

    def model(self) -> nn.Module:
        if self.checkpoint:
            model = model_from_checkpoint(load_checkpoint(self.checkpoint, kinds_that(
                lambda kind: kind.unmasks and not kind.conditional)))
            require(self.seq_len <= model.config.max_len, f"--seq_len {self.seq_len}: rows of "
                    f"{self.checkpoint} have at most {model.config.max_len} tokens")
            return model
        torch.manual_seed(0)
        return create_model(self.model_config, self.vocab_size, max_len=self.seq_len).eval()

    def describe(self, peak: float, arms: dict) -> dict:
        return {"what": (self.checkpoint or f"{self.model_config}, random weights") +
                        f", {self.batch} x {self.seq_len - 2} tokens, {self.order} order, "
                        f"{self.pace} pace, remask {self.remask}, at most {self.steps} steps, "
                        f"temperature {self.temperature:g}, top_k {self.top_k}, top_p "
                        f"{self.top_p:g}",
                "peers": read_peers()}


def textbook_sampling(config: SampleBenchmark, model: nn.Module, rows: torch.Tensor,
                      ) -> Callable[[], dict]:
    """Ancestral sampling as MDLM's paper has it (arXiv 2406.07524, section 3.2.3, linear schedule):
    a token for every position by Gumbel noise over all logits, kept where a hidden one is due."""

    @torch.no_grad()
    def sample() -> dict:
        torch.manual_seed(0)
        tokens = rows.clone()
        for step in range(config.steps):
            left, next_left = 1 - step / config.steps, 1 - (step + 1) / config.steps
            logits = model(tokens).double()  # (B, L, V)
            noise = -torch.log(-torch.log(torch.rand_like(logits)))
            drawn = (logits / max(config.temperature, 1e-9) + noise).argmax(-1)
            due = torch.rand(tokens.shape, device=tokens.device) < 1 - next_left / left
            tokens = torch.where((tokens == MASK) & due, drawn, tokens)
        return {"evaluations": config.steps, "tokens": int((rows == MASK).sum())}

    return sample


def sensible_sampling(config: SampleBenchmark, model: nn.Module, rows: torch.Tensor,
                      ) -> Callable[[], dict]:
    """The same ancestral sampling as anybody would write it who looked where the time goes: logits
    and noise for the hidden positions alone, the noise in FP32."""

    @torch.no_grad()
    def sample() -> dict:
        torch.manual_seed(0)
        tokens = rows.clone()
        for step in range(config.steps):
            hidden = (tokens == MASK).nonzero(as_tuple=True)
            logits = model.head(model.hidden(tokens)[hidden]).float()  # (M, V)
            noise = -torch.log(-torch.log(torch.rand_like(logits)))
            drawn = (logits / max(config.temperature, 1e-9) + noise).argmax(-1)
            due = torch.rand(len(drawn), device=tokens.device) < 1 / (config.steps - step)
            tokens[hidden] = torch.where(due, drawn, MASK)
        return {"evaluations": config.steps, "tokens": int((rows == MASK).sum())}

    return sample


def main(argv: list[str]) -> None:
    config, given = parse(SampleBenchmark, __doc__, argv)
    config.check()
    config.check_used(given)
    require("guidance" not in given, "--guidance: there is no condition here; leave it out")
    unused = sorted({"model_config", "vocab_size"} & given) if config.checkpoint else []
    require(not unused, f"--{' --'.join(unused)}: the --checkpoint has its own; leave it out")
    run_and_write(config)
