"""Benchmarks, paired: each arm runs in turn in one process, so that a noisy machine is fair to all.

    python benchmark.py train --model_config small --batch 16 --seq_len 256
    python benchmark.py train --model_config medium --batch 32 --json bench/train_medium.json

`train` times a training step of this project (as train.py does it: the chosen precision, the head
on hidden positions only, Muon, the average of the weights; compiled and eager) against a textbook
step: torch's TransformerEncoder in FP32 with AdamW and logits for every position. Prints medians of
wall-clock and process CPU-seconds (all threads), their ratio to the textbook, tokens/s, the share
of the measured peak (MFU), and the peak memory of a process that runs this arm alone. About two
minutes for the small model on 2 CPU cores.
"""

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

import torch
import torch.nn.functional as F
from torch import nn

from cli import atomic_file, check_writable, flag, parse, require, run
from data_prep import BOS, EOS
from diffusion import DiscreteDiffusion
from metrics import machine
from model import MODEL_CONFIGS, PRECISIONS, create_model, pick_device, pick_precision
from optimizers import DEFAULT_LR, OPTIMIZERS, make_optimizers, move_average
from throughput import compile_blocks, peak_flops, peak_memory, synchronize, train_flops

ARMS = ("textbook", "eager", "compiled")


@dataclass
class TrainBenchmark:
    model_config: str = flag("small", "size: " + ", ".join(MODEL_CONFIGS))
    batch: int = flag(16, "rows of a step")
    seq_len: int = flag(256, "tokens of a row")
    vocab_size: int = flag(8192, "size of the vocabulary")
    optimizer: str = flag("muon", "of this project's step", OPTIMIZERS)
    steps: int = flag(7, "timed steps of each arm")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("auto", "of this project's step: auto, fp32, bf16 or fp16",
                          ("auto", *PRECISIONS))
    arms: list[str] = flag(list(ARMS), "what to run: textbook, eager, compiled")
    memory: bool = flag(True, "measure peak memory, each arm in a process of its own")
    json: str | None = flag(None, "file to write the figures to")

    def check(self) -> None:
        require(self.model_config in MODEL_CONFIGS, f"--model_config {self.model_config}: unknown "
                f"size, choose from {', '.join(MODEL_CONFIGS)}")
        for name in ("batch", "steps", "seq_len"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(self.seq_len >= 3, f"--seq_len {self.seq_len}: must be at least 3")
        require(self.vocab_size > EOS + 1, f"--vocab_size {self.vocab_size}: too small")
        unknown = set(self.arms) - set(ARMS)
        require(not unknown, f"--arms {' '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")


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

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.layers(self.tokens(tokens) + self.positions(positions)))


def batch_of(config: TrainBenchmark):
    """Rows of random words, hidden as in training."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(EOS + 1, config.vocab_size, (config.batch, config.seq_len),
                           generator=generator)
    tokens[:, 0], tokens[:, -1] = BOS, EOS
    return DiscreteDiffusion().corrupt_batch(tokens, generator)


def textbook_step(config: TrainBenchmark, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    model = Textbook(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = batch_of(config).to(device)

    def step() -> None:
        logits = model(batch.noisy)  # (B, L, V)
        loss = F.cross_entropy(logits.transpose(1, 2), batch.tokens, reduction="none")
        (loss * batch.masked).sum().div(batch.masked.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def own_step(config: TrainBenchmark, device: torch.device, compiled: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    precision = pick_precision(device, config.precision)
    model = create_model(config.model_config, config.vocab_size, max_len=config.seq_len)
    model.to(device).set_precision(precision).train()
    average = copy.deepcopy(model)
    if compiled:
        reason = compile_blocks(model, device, config.seq_len)
        require(reason is None, f"{reason}; leave the arm out: --arms textbook eager")
    optimizers = make_optimizers(model, config.optimizer, DEFAULT_LR[config.optimizer], 0.0,
                                 precision)
    diffusion, batch = DiscreteDiffusion(), batch_of(config).to(device)

    def step() -> None:
        diffusion.loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        move_average(average, model, 0.99)

    return step


def make_step(config: TrainBenchmark, arm: str, device: torch.device) -> Callable[[], None]:
    if arm == "textbook":
        return textbook_step(config, device)
    return own_step(config, device, compiled=arm == "compiled")


def timed(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """(wall-clock seconds, process CPU-seconds) of one call."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def memory_of(config: TrainBenchmark, arm: str, results) -> None:
    """Puts the peak memory of three steps of one arm, in bytes, into a queue."""
    device = pick_device(config.device)
    step = make_step(config, arm, device)
    step()
    with peak_memory(device) as peak:
        step()
        step()
    results.put(peak())


def measure_memory(config: TrainBenchmark, arm: str) -> int | None:
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory
    results = context.Queue()
    child = context.Process(target=memory_of, args=(config, arm, results))
    child.start()
    child.join()
    require(child.exitcode == 0, f"the process that measures the memory of {arm} failed; see above")
    return results.get()


def train_benchmark(config: TrainBenchmark) -> dict:
    device = pick_device(config.device)
    precision = pick_precision(device, config.precision)
    peak = peak_flops(device, precision, seconds=2.0)
    steps = {arm: make_step(config, arm, device) for arm in config.arms}
    for step in steps.values():
        for _ in range(2):
            step()
    times = {arm: [] for arm in steps}
    for _ in range(config.steps):
        for arm, step in steps.items():
            times[arm].append(timed(step, device))
    model = create_model(config.model_config, config.vocab_size, max_len=config.seq_len)
    predicted = int(batch_of(config).masked.sum())
    work = train_flops(model, config.batch, config.seq_len, predicted)
    arms = {}
    for arm, values in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        arms[arm] = {"seconds": wall, "cpu_seconds": cpu,
                     "tokens_per_second": config.batch * config.seq_len / wall,
                     "mfu": None if arm == "textbook" else work / wall / peak,
                     "peak_memory_bytes": measure_memory(config, arm) if config.memory else None}
    if "textbook" in arms:
        base = arms["textbook"]
        for arm, figures in arms.items():
            figures["speedup"] = statistics.median(
                a / b for (a, _), (b, _) in zip(times["textbook"], times[arm], strict=True))
            if base["peak_memory_bytes"]:
                figures["memory_share"] = figures["peak_memory_bytes"] / base["peak_memory_bytes"]
    return {"benchmark": "train", "machine": machine(device), "precision": precision,
            "peak_flops": peak, "step_flops": work,
            "predicted_tokens": predicted, "config": dataclasses.asdict(config), "arms": arms,
            "seconds": {arm: [wall for wall, _ in values] for arm, values in times.items()}}


def report(result: dict) -> None:
    config = result["config"]
    print(f"{config['model_config']}, {config['batch']} x {config['seq_len']} tokens, "
          f"{result['predicted_tokens']} of them hidden; this project in {result['precision']}, "
          f"textbook in fp32; {result['machine']}, torch {torch.__version__}; "
          f"matrix products reach {result['peak_flops'] / 1e12:.2f} TFLOP/s in "
          f"{result['precision']}\n")
    print(f"{'':10s}{'s/step':>9s}{'CPU-s':>9s}{'speed-up':>10s}{'tokens/s':>10s}{'MFU':>8s}"
          f"{'peak GB':>9s}{'memory':>8s}")

    def cell(value: float | None, form: str, width: int) -> str:
        return f"{'-' if value is None else format(value, form):>{width}s}"

    for arm, row in result["arms"].items():
        memory = row["peak_memory_bytes"]
        print(f"{arm:10s}{row['seconds']:9.3f}{row['cpu_seconds']:9.3f}"
              + cell(row.get("speedup"), ".2f", 10) + f"{row['tokens_per_second']:10,.0f}"
              + cell(row["mfu"], ".1%", 8) + cell(memory and memory / 1e9, ".2f", 9)
              + cell(row.get("memory_share"), ".0%", 8))


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    names = {"train": TrainBenchmark}
    if not argv or argv[0] not in names:
        parser = argparse.ArgumentParser(description=__doc__, usage="benchmark.py train [flags]",
                                         formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("benchmark", choices=list(names))
        parser.parse_args(argv[:1])
    config, _ = parse(names[argv[0]], __doc__, argv[1:])
    config.check()
    if config.json:
        check_writable(Path(config.json).parent, "--json")
    result = train_benchmark(config)
    report(result)
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(config.json, "w") as file:
            json.dump(result, file, indent=1)
        print(f"\nwrote {config.json}")


if __name__ == "__main__":
    run(main)
