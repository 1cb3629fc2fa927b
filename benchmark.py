"""Benchmarks, paired: each arm runs in turn in one process, so that a noisy machine is fair to all.

    python benchmark.py train --model_config small --batch 16 --seq_len 256
    python benchmark.py train --model_config medium --batch 32 --json bench/train_medium.json
    python benchmark.py sample --model_config small --batch 4 --steps 32
    python benchmark.py sample --checkpoint checkpoints/best.pt --order entropy --pace entropy_bound

`train` times a training step of this project (as train.py does it: the chosen precision, the head
on hidden positions only, Muon, the average of the weights; compiled and eager) against textbook
steps of torch's TransformerEncoder with AdamW: in FP32 with logits for every position (textbook),
the same under bf16 autocast (textbook_bf16), and as fast as a few lines make it (textbook_compiled:
the chosen precision, all compiled, logits at hidden positions only, fused AdamW).

`sample` times the filling of whole rows by one and the same network in the chosen precision: by
this project's sampler (positions first, tokens drawn only there) and by ancestral ones, whatever
the flags: a textbook one (logits and FP64 noise for every position in every step) and a sensible
one (both for hidden positions only, in FP32). Random weights do for a planned pace; an adaptive one
needs a checkpoint. What peers' programs reached here is printed too, from bench/peers.json.

The speed-up that counts is that over the strongest baseline which ran; the table names it.

`device` is that of benchmark_device.py, for exported steps, `roofline` that of roofline.py.

The first two print medians of wall-clock and process CPU-seconds (all threads), the speed-up over
the textbook and over the strongest baseline (the median over pairs), tokens per second and per
CPU-second, and the peak memory of a process that runs this arm alone; `train` also the share of the
measured peak (MFU). Some minutes for the small model on 2 CPU cores.
"""

from cli import UserError, atomic_file, check_writable, flag, parse, require, run

import argparse
import copy
import dataclasses
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import benchmark_device
import roofline
from data_prep import BOS, EOS, MASK
from diffusion import DiscreteDiffusion, numpy_step
from metrics import machine
from model import (
    MODEL_CONFIGS,
    PRECISIONS,
    create_model,
    load_checkpoint,
    model_from_checkpoint,
    pick_device,
    pick_precision,
)
from optimizers import DEFAULT_LR, OPTIMIZERS, make_optimizers, move_average
from sampler import ADAPTIVE_PACES, Sampler, blank_story, unmask
from throughput import compile_blocks, first_line, peak_flops, peak_memory, synchronize, train_flops

PEERS = Path(__file__).parent / "bench" / "peers.json"


@dataclass(frozen=True)
class Benchmark:
    """What the benchmarks share. An arm is something that is timed again and again."""

    model_config: str = flag("small", "size: " + ", ".join(MODEL_CONFIGS))
    batch: int = flag(16, "rows at a time")
    seq_len: int = flag(256, "tokens of a row")
    vocab_size: int = flag(8192, "size of the vocabulary")
    repeats: int = flag(7, "how often each arm is timed")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("auto", "of this project's arms: auto, fp32, bf16 or fp16",
                          ("auto", *PRECISIONS))
    memory: bool = flag(True, "measure peak memory, each arm in a process of its own")
    json: str | None = flag(None, "file to write the figures to")

    def check(self) -> None:
        require(self.model_config in MODEL_CONFIGS, f"--model_config {self.model_config}: unknown "
                f"size, choose from {', '.join(MODEL_CONFIGS)}")
        for name in ("batch", "repeats", "seq_len"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(self.seq_len >= 3, f"--seq_len {self.seq_len}: must be at least 3")
        require(self.vocab_size > EOS + 1, f"--vocab_size {self.vocab_size}: too small")
        unknown = set(self.arms) - set(self.ARMS)
        require(not unknown, f"--arms {' '.join(sorted(unknown))}: choose from "
                             f"{', '.join(self.ARMS)}")


@dataclass(frozen=True)
class TrainBenchmark(Benchmark):
    BASELINES = ("textbook_bf16", "textbook_compiled", "textbook")
    ARMS = (*BASELINES, "eager", "compiled")

    optimizer: str = flag("muon", "of this project's step", OPTIMIZERS)
    arms: list[str] = flag(list(ARMS), "what to run: " + ", ".join(ARMS))

    def make(self, arm: str, device: torch.device) -> Callable[[], dict]:
        if arm == "textbook_compiled":
            return compiled_textbook_step(self, device)
        if arm in self.BASELINES:
            return textbook_step(self, device, bf16=arm == "textbook_bf16")
        return own_step(self, device, compiled=arm == "compiled")

    def describe(self, peak: float, arms: dict) -> dict:
        """The work in words; adds the share of the peak to the arms of this project."""
        model = create_model(self.model_config, self.vocab_size, max_len=self.seq_len)
        hidden = int(batch_of(self).masked.sum())
        work = train_flops(model, self.batch, self.seq_len, hidden)
        for name, arm in arms.items():
            arm["mfu"] = None if name in self.BASELINES else work / arm["seconds"] / peak
        return {"what": f"{self.model_config}, {self.batch} x {self.seq_len} tokens, {hidden} of "
                        f"them hidden, {work / 1e12:.3f} TFLOP; textbook in fp32",
                "step_flops": work}


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
            model = model_from_checkpoint(load_checkpoint(self.checkpoint))
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


def read_peers() -> dict | None:
    """What peers' programs reached, measured by this project with their checkouts; None where this
    script stands without its repository."""
    return json.loads(PEERS.read_text(encoding="utf-8")) if PEERS.is_file() else None


class Textbook(nn.Module):
    """A masked language model of the same size as a textbook writes it."""

    def __init__(self, config: TrainBenchmark):
        super().__init__()
        size = MODEL_CONFIGS[config.model_config]
        self.tokens = nn.Embedding(config.vocab_size, size.width)
        self.positions = nn.Embedding(config.seq_len, size.width)
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, size.layers, nn.LayerNorm(size.width),
                                            enable_nested_tensor=False)
        self.head = nn.Linear(size.width, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight  # one matrix for both, as in this project's model
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.layers(self.tokens(tokens) + self.positions(positions))


def batch_of(config: TrainBenchmark):
    """Rows of random words, hidden as in training."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(EOS + 1, config.vocab_size, (config.batch, config.seq_len),
                           generator=generator)
    tokens[:, 0], tokens[:, -1] = BOS, EOS
    return DiscreteDiffusion().corrupt_batch(tokens, generator)


def textbook_step(config: TrainBenchmark, device: torch.device, bf16: bool = False,
                  ) -> Callable[[], dict]:
    torch.manual_seed(0)
    model = Textbook(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = batch_of(config).to(device)

    def step() -> dict:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(batch.noisy)  # (B, L, V)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten(), reduction="none")
        (loss * batch.masked.flatten()).sum().div(batch.masked.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"tokens": batch.tokens.numel()}

    return step


def compiled_textbook_step(config: TrainBenchmark, device: torch.device) -> Callable[[], dict]:
    """The same model and loss as `textbook_step`, by what torch offers without changing either."""
    torch.manual_seed(0)
    model = Textbook(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type != "mps")
    batch = batch_of(config).to(device)
    where = batch.masked.flatten().nonzero()[:, 0]  # (M,)
    targets = batch.tokens.flatten()[where]
    dtype = PRECISIONS[pick_precision(device, config.precision)]

    @torch.compile
    def loss_of(noisy: torch.Tensor, where: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16 if dtype == torch.float32 else dtype,
                            enabled=dtype != torch.float32):
            hidden = model.hidden(noisy).flatten(0, 1)[where]  # (M, D)
            return F.cross_entropy(model.head(hidden), targets)

    def step() -> dict:
        loss_of(batch.noisy, where, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"tokens": batch.tokens.numel()}

    try:  # it compiles now, before anything is timed
        loss_of(batch.noisy, where, targets).backward()
    except Exception as error:  # a compiler has many ways to fail
        raise UserError(f"torch.compile failed here ({type(error).__name__}: {first_line(error)}); "
                        "leave its arms out: --arms textbook_bf16 textbook eager") from error
    optimizer.zero_grad()
    return step


def own_step(config: TrainBenchmark, device: torch.device, compiled: bool) -> Callable[[], dict]:
    torch.manual_seed(0)
    precision = pick_precision(device, config.precision)
    model = create_model(config.model_config, config.vocab_size, max_len=config.seq_len)
    model.to(device).set_precision(precision).train()
    average = copy.deepcopy(model)
    if compiled:
        reason = compile_blocks(model, device, config.seq_len)
        require(reason is None, f"{reason}; leave its arms out: --arms textbook_bf16 textbook "
                                "eager")
    optimizers = make_optimizers(model, config.optimizer, DEFAULT_LR[config.optimizer], 0.0,
                                 precision)
    diffusion, batch = DiscreteDiffusion(), batch_of(config).to(device)

    def step() -> dict:
        diffusion.loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        move_average(average, model, 0.99)
        return {"tokens": batch.tokens.numel()}

    return step


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


def timed(call: Callable[[], dict], device: torch.device) -> tuple[float, float, dict]:
    """Wall-clock seconds, process CPU-seconds and the result of one call."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu, result


def memory_of(config: Benchmark, arm: str, results) -> None:
    """Puts the peak memory of two calls of one arm, in bytes, into a queue."""
    device = pick_device(config.device)
    call = config.make(arm, device)
    call()
    with peak_memory(device) as peak:
        call()
        call()
    results.put(peak())


def measure_memory(config: Benchmark, arm: str) -> int | None:
    """`memory_of` in a process of its own; a fork would inherit this process's memory."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=memory_of, args=(config, arm, results))
    child.start()
    child.join()
    require(child.exitcode == 0, f"the process that measures the memory of {arm} failed; see above")
    return results.get()


def paired_speedup(base: list[tuple], other: list[tuple]) -> float:
    """The median of the ratios of seconds, each of two calls that ran one soon after the other."""
    return statistics.median(a[0] / b[0] for a, b in zip(base, other, strict=True))


def run_benchmark(config: Benchmark) -> dict:
    """Times the arms in turn; everything that --json writes."""
    device = pick_device(config.device)
    precision = pick_precision(device, config.precision)
    peak = peak_flops(device, precision, seconds=2.0)
    calls = {arm: config.make(arm, device) for arm in config.arms}
    for call in calls.values():
        for _ in range(2):
            call()
    times = {arm: [] for arm in calls}
    for _ in range(config.repeats):
        for arm, call in calls.items():
            times[arm].append(timed(call, device))
    arms = {}
    for arm, values in times.items():
        wall, cpu = (statistics.median(column) for column in list(zip(*values, strict=True))[:2])
        result = values[-1][2]
        arms[arm] = {"seconds": wall, "cpu_seconds": cpu, **result,
                     "tokens_per_second": result["tokens"] / wall,
                     "tokens_per_cpu_second": result["tokens"] / cpu,
                     "peak_memory_bytes": measure_memory(config, arm) if config.memory else None}
    if "textbook" in arms:
        base = arms["textbook"]
        for arm, figures in arms.items():
            figures["speedup"] = paired_speedup(times["textbook"], times[arm])
            if base["peak_memory_bytes"]:
                figures["memory_share"] = figures["peak_memory_bytes"] / base["peak_memory_bytes"]
    strongest = min((arm for arm in arms if arm in config.BASELINES), default=None,
                    key=lambda arm: arms[arm]["seconds"])
    for arm, figures in arms.items():
        if strongest:
            figures["speedup_over_strongest"] = paired_speedup(times[strongest], times[arm])
    return {**config.describe(peak, arms), "strongest_baseline": strongest,
            "machine": machine(device), "peak_flops": peak, "precision": precision,
            "config": dataclasses.asdict(config), "arms": arms,
            "seconds": {arm: [value[0] for value in values] for arm, values in times.items()}}


COLUMNS = (("s", "seconds", ".3f"), ("CPU-s", "cpu_seconds", ".3f"),
           ("x textbook", "speedup", ".2f"), ("x strongest", "speedup_over_strongest", ".2f"),
           ("evaluations", "evaluations", "d"),
           ("tokens/s", "tokens_per_second", ",.0f"),
           ("tokens/CPU-s", "tokens_per_cpu_second", ",.0f"), ("MFU", "mfu", ".1%"),
           ("peak bytes", "peak_memory_bytes", ".3g"), ("memory", "memory_share", ".0%"))


def report(result: dict) -> None:
    print(f"{result['what']}; {result['precision']}; "
          f"{result['machine']}, torch {torch.__version__}; matrix products reach "
          f"{result['peak_flops'] / 1e12:.2f} TFLOP/s in {result['precision']}\n")
    columns = [column for column in COLUMNS
               if any(row.get(column[1]) is not None for row in result["arms"].values())]
    print(f"{'':18s}" + "".join(f"{name:>14s}" for name, _, _ in columns))
    for arm, row in result["arms"].items():
        cells = ("-" if row.get(key) is None else format(row[key], form)
                 for _, key, form in columns)
        print(f"{arm:18s}" + "".join(f"{cell:>14s}" for cell in cells))
    strongest = result["strongest_baseline"]
    if strongest:
        print(f"\nspeed-up over the strongest baseline here, {strongest}: " + ", ".join(
            f"{arm} {row['speedup_over_strongest']:.2f}" for arm, row in result["arms"].items()
            if arm != strongest))
    if result.get("peers"):
        print("\n" + peers_note(result["peers"]))


def peers_note(peers: dict) -> str:
    """What bench/peers.json holds, and the ratio to each peer."""
    own, *others = peers["figures"].items()
    return (f"Not measured in this run but by {peers['by']} ({peers['machine']}): {peers['what']}, "
            f"{peers['unit']}: {own[0]} {own[1]:g}; " + "; ".join(
                f"{name} {value:g} ({own[0]} is {own[1] / value:.2f} times as fast)"
                for name, value in others))


def check_json(target: Path) -> None:
    """Refuses, before any work, a file that cannot be written; its folder may be made later."""
    folder = target.absolute().parent
    there = next(path for path in (folder, *folder.parents) if path.is_symlink() or path.exists())
    require(there.is_dir(), f"--json {target}: {there} is not a folder; name a file in one")
    require(not target.is_dir(), f"--json {target} is a folder; name a file")
    check_writable(folder, "--json")


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["device"]:
        benchmark_device.main(argv)
        return
    if argv[:1] == ["roofline"]:
        roofline.main(argv[1:])
        return
    names = {"train": TrainBenchmark, "sample": SampleBenchmark}
    if not argv or argv[0] not in names:
        parser = argparse.ArgumentParser(description=__doc__,
                                         usage="benchmark.py {train,sample,device,roofline} "
                                               "[flags]",
                                         formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("benchmark", choices=list(names))
        parser.parse_args(argv[:1])
    config, given = parse(names[argv[0]], __doc__, argv[1:])
    config.check()
    if isinstance(config, SampleBenchmark):
        config.check_used(given)
        require("guidance" not in given, "--guidance: there is no condition here; leave it out")
        unused = sorted({"model_config", "vocab_size"} & given) if config.checkpoint else []
        require(not unused, f"--{' --'.join(unused)}: the --checkpoint has its own; leave it out")
    if config.json:
        check_json(Path(config.json))
    result = run_benchmark(config)
    report(result)
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(config.json, "w") as file:
            json.dump(result, file, indent=1)
        print(f"\nwrote {config.json}")


if __name__ == "__main__":
    # without --json the table is all that there is
    run(main, prints=sys.argv[1:2] != ["device"] and not any(
        word.split("=")[0] == "--json" for word in sys.argv))
