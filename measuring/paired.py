"""What the paired benchmarks of training and sampling share: timing, memory, table, file."""

from cli import check_writable, flag, require, write_json

import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from corpus.tokens import EOS
from model import MODEL_CONFIGS
from network.hardware import machine, pick_device, pick_precision
from network.layers import PRECISIONS
from training.speed import peak_flops, peak_memory, synchronize

PEERS = Path(__file__).parent.parent / "bench" / "peers.json"


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


def read_peers() -> dict | None:
    """What peers' programs reached, measured by this project with their checkouts; None where this
    script stands without its repository."""
    return json.loads(PEERS.read_text(encoding="utf-8")) if PEERS.is_file() else None


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
    """The median of the ratios of seconds a token, for a story may end early, each of two calls
    that ran one soon after the other."""
    return statistics.median(a[0] / a[2]["tokens"] / (b[0] / b[2]["tokens"])
                             for a, b in zip(base, other, strict=True))


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
                    key=lambda arm: arms[arm]["seconds"] / arms[arm]["tokens"])
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


def run_and_write(config: Benchmark) -> None:
    """The whole of a benchmark's command."""
    config.check()
    if config.json:
        check_json(Path(config.json))
    result = run_benchmark(config)
    report(result)
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(config.json, result)
        print(f"\nwrote {config.json}")
