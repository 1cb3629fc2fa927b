"""How fast a bundle is where it runs. Needs no torch.

    python benchmark.py device --bundle jetson_bundle          # here: ONNX Runtime
    python benchmark.py device --bundle . --power              # in the folder on the Jetson
    python benchmark.py device --checkpoint long_run/best.pt --twin checkpoints_ar/best.pt

It times every graph and every engine of a bundle, in turn and in one process: a step, and a
story at each number of steps (median and 95th percentile), tokens/s; in a process of its own the
cold start and the peak memory. Beside them the quality: the NELBO of each precision from the
bundle's report, and with --twin the generative perplexity at each number of steps. On a Jetson it
reads power and the board's memory from tegrastats; what cannot be measured is printed as not
measured. Writes device_benchmark.json and device_benchmark.png.
"""

from cli import atomic_file, check_file, flag, parse, require, write_json

import dataclasses
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jetson.engine_runtime import CACHED, Bundle, read_bundle
from sampling.loop import fill
from sampling.rows import blank_story, draw_length
from sampling.sampler import Sampler

NOT_MEASURED = "not measured"
POWER_SECONDS = 2.0  # of stories, while tegrastats prints ten readings a second


@dataclass(frozen=True)
class DeviceBenchmark(Sampler):
    """Of Sampler the steps are those of --nfe; top_p is that of the presets."""

    top_p: float = flag(0.9, "draw among the likeliest tokens that together reach p")
    bundle: str = flag("jetson_bundle", "folder of export_jetson.py")
    nfe: list[int] = flag([8, 16, 32, 64], "network evaluations of a story to time")
    length: int = flag(0, "tokens of a story; 0: as many as a row has")
    repeats: int = flag(5, "stories of each kind")
    checkpoint: str | None = flag(None, "torch checkpoint to time beside them (desktop)")
    twin: str | None = flag(None, "autoregressive twin that judges the stories (desktop)")
    judged: int = flag(16, "stories that it judges, of each kind")
    power: bool = flag(False, "stop if power cannot be read, instead of leaving it out")
    output: str = flag("device_benchmark.json", "file to write, with a plot beside it")
    seed: int = flag(0, "seed of the stories")

    def check(self) -> None:
        super().check()
        require(min(self.nfe) >= 1, "--nfe: must be 1 or more")
        for name in ("repeats", "judged"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(self.length >= 0, f"--length {self.length}: must be 0 or more")
        require(self.judged > 1, "--judged 1: diversity needs 2 stories or more")


# ---- measuring -----------------------------------------------------------------------------------

class Board:
    """Watts and memory of a Jetson while the block runs, read from tegrastats; None elsewhere."""

    def __init__(self):
        self.watts: list[float] = []
        self.megabytes: list[int] = []
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Board":
        if shutil.which("tegrastats"):
            self.process = subprocess.Popen(["tegrastats", "--interval", "100"], text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()

    def _watch(self) -> None:
        for line in self.process.stdout:
            self.read(line)

    def read(self, line: str) -> None:
        """`RAM 2871/7620MB ... VDD_IN 5032mW/4990mW ...`: now and on average."""
        power, memory = re.search(r"VDD_IN (\d+)mW", line), re.search(r"RAM (\d+)/\d+MB", line)
        if power:
            self.watts.append(int(power[1]) / 1000)
        if memory:
            self.megabytes.append(int(memory[1]))

    def figures(self) -> dict:
        return {"watts": statistics.mean(self.watts) if self.watts else None,
                "board_megabytes": max(self.megabytes) if self.megabytes else None}


def board_name() -> str:
    model = Path("/proc/device-tree/model")
    if model.exists():
        return model.read_text().strip("\0 \n")
    return f"{platform.machine()}, {os.cpu_count()} threads"


def arms_of(config: DeviceBenchmark) -> dict[str, str]:
    """{name: file} of all graphs and engines of the bundle, and of the checkpoint."""
    steps = {name: Path(config.bundle) / entry["name"] for name, entry
             in read_bundle(Path(config.bundle))["files"].items()
             if name != "encoder" and not name.startswith(CACHED)}
    arms = {}
    if find_spec("onnxruntime"):
        arms = {f"onnxruntime {name}": str(path) for name, path in steps.items()}
    else:
        print(f"ONNX Runtime is not installed: its arms are {NOT_MEASURED}")
    engines = {name: path.with_suffix(".engine") for name, path in steps.items()}
    arms |= {f"tensorrt {name}": str(path) for name, path in engines.items() if path.is_file()}
    if config.checkpoint:
        arms["torch fp32"] = config.checkpoint
    require(arms, f"nothing to time in {config.bundle}: build an engine (`python export_jetson.py "
                  "--build_engine step_fp16.onnx`), or pip install onnxruntime")
    return arms


def open_arm(path: str) -> Callable[[Sampler], Any]:
    """A maker of steps."""
    if not path.endswith(".pt"):
        return Bundle(path).step
    from kinds.checkpoints import load_checkpoint, model_from_checkpoint
    from kinds.registry import kinds_that
    from sampling.step import numpy_step
    model = model_from_checkpoint(load_checkpoint(path, kinds_that(lambda kind: kind.unmasks)))
    model.for_inference()
    return lambda sampler: numpy_step(model, dataclasses.replace(sampler, top_k=64))


def alone(config: DeviceBenchmark, path: str) -> tuple[float, float | None]:
    """Seconds from the start of a process to its first token, and its peak memory in MB, of one arm
    in a process that does nothing else."""
    code = "import sys; from measuring import device; device.start_alone(*sys.argv[1:])"
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code, path, json.dumps(dataclasses.asdict(config))],
        stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    require(done.returncode == 0, f"the process that starts {path} failed; see above")
    ready, peak = json.loads(done.stdout)
    return ready - started, peak


def start_alone(path: str, config: str) -> None:
    """The process of `alone`: prints when the first step was done, and its peak memory."""
    config = DeviceBenchmark(**json.loads(config))
    make, row = open_arm(path), row_of(config)
    sampler = dataclasses.replace(plain_sampler(config), steps=1)
    fill(make(sampler), [row], sampler, config.seed)
    ready = time.time()
    sampler = dataclasses.replace(sampler, steps=4)
    fill(make(sampler), [row], sampler, config.seed)
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    print(json.dumps([ready, int(peak[1]) / 1e3 if peak else None]))


def plain_sampler(config: DeviceBenchmark) -> Sampler:
    return Sampler(**{field.name: getattr(config, field.name)
                      for field in dataclasses.fields(Sampler)})


def row_of(config: DeviceBenchmark) -> np.ndarray:
    longest = read_bundle(Path(config.bundle))["length"] - 2
    require(config.length <= longest, f"--length {config.length}: this bundle's rows hold at most "
                                      f"{longest} tokens of text")
    return blank_story(config.length or longest)


def percentile_95(values: list[float]) -> float:
    return sorted(values)[max(0, math.ceil(0.95 * len(values)) - 1)]


def measure(config: DeviceBenchmark) -> dict:
    """Everything that device_benchmark.json holds."""
    require(not config.power or shutil.which("tegrastats"),
            "--power: tegrastats is not here; leave it out")
    arms, contents = arms_of(config), read_bundle(Path(config.bundle))
    row, base = row_of(config), plain_sampler(config)
    result = {"machine": board_name(), "bundle": config.bundle, "tokens": len(row) - 2,
              "model_config": contents["model_config"], "length": contents["length"],
              "judged_on": contents.get("judged_on"), "config": dataclasses.asdict(config),
              "arms": {}}
    for name, path in arms.items():  # while nothing else is loaded
        with Board() as board:
            cold, peak = alone(config, path)
        precision = name.split()[-1]
        report = contents["reports"].get(precision, {}) if "torch" not in name else {
            "nelbo": contents["reports"].get("fp32", {}).get("nelbo_torch_fp32")}
        result["arms"][name] = {
            "cold_start_seconds": cold, "process_megabytes": peak,
            "board_megabytes": board.figures()["board_megabytes"],
            "nelbo": report.get("nelbo"), "megabytes": report.get("megabytes")}
    makers = {name: open_arm(path) for name, path in arms.items()}
    times = time_stories(config, makers, row, base)
    for name, (steps, stories) in times.items():
        watts = power_of(config, makers[name], row, base)
        require(not config.power or watts, "--power: tegrastats told no VDD_IN; leave it out")
        result["arms"][name] |= {
            "step_seconds": statistics.median(steps), "step_seconds_p95": percentile_95(steps),
            "watts": watts,
            "stories": {str(nfe): {
                "seconds": statistics.median(values), "seconds_p95": percentile_95(values),
                "tokens_per_second": (len(row) - 2) / statistics.median(values),
                "joules": watts and watts * statistics.median(values)}
                for nfe, values in stories.items()}}
    if config.twin:
        judge_stories(config, makers, contents, result)
    return result


def time_stories(config: DeviceBenchmark, makers: dict, row: np.ndarray, base: Sampler) -> dict:
    """{arm: (seconds of every step, {nfe: seconds of every story})}, the arms in turn."""
    times: dict[str, tuple] = {name: ([], {nfe: [] for nfe in config.nfe}) for name in makers}
    for turn in range(config.repeats + 1):  # the first one warms up
        for name, make in makers.items():
            steps, stories = times[name]
            for nfe in config.nfe:
                sampler = dataclasses.replace(base, steps=nfe)
                step = timed_step(make(sampler), steps if turn else [])
                started = time.perf_counter()
                fill(step, [row], sampler, config.seed + turn)
                if turn:
                    stories[nfe].append(time.perf_counter() - started)
    return times


def power_of(config: DeviceBenchmark, make: Callable, row: np.ndarray, base: Sampler,
             ) -> float | None:
    """Watts of the board while stories are generated, for as long as a few readings take."""
    if not shutil.which("tegrastats"):
        return None
    sampler = dataclasses.replace(base, steps=max(config.nfe))
    step, end = make(sampler), time.monotonic() + POWER_SECONDS
    with Board() as board:
        while time.monotonic() < end:
            fill(step, [row], sampler, config.seed)
    return board.figures()["watts"]


def timed_step(step: Callable, seconds: list[float]) -> Callable:
    def run_timed(*arguments):
        started = time.perf_counter()
        done = step(*arguments)
        seconds.append(time.perf_counter() - started)
        return done
    return run_timed


def judge_stories(config: DeviceBenchmark, makers: dict, contents: dict, result: dict) -> None:
    """Generative perplexity and entropy of stories of drawn lengths, at each number of steps."""
    from corpus.tokens import load_tokenizer
    from kinds.autoregressive import Autoregressive
    from kinds.checkpoints import load_checkpoint, model_from_checkpoint
    from measuring.quality import PERPLEXITY, Judge, figures
    twin = load_checkpoint(config.twin, kind=Autoregressive.name)
    require(twin["tokenizer_sha256"] == contents["tokenizer_sha256"],
            f"{config.twin} was trained with another tokenizer than {config.bundle}")
    result["generative_perplexity_is"] = PERPLEXITY
    judge = Judge(model_from_checkpoint(twin).for_inference())
    tokenizer = load_tokenizer(twin["tokenizer"])
    longest = contents["length"] - 2
    rows = [blank_story(min(draw_length(contents["length_histogram"], config.seed, i) or 64,
                            longest)) for i in range(config.judged)]
    for name, make in makers.items():
        for nfe in config.nfe:
            sampler = dataclasses.replace(plain_sampler(config), steps=nfe)
            made = figures(fill(make(sampler), rows, sampler, config.seed), tokenizer, judge)
            result["arms"][name]["stories"][str(nfe)] |= {
                key: made[key] for key in ("generative_perplexity", "unigram_entropy")}


def shown(value: Any, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form)


def table(result: dict) -> str:
    """Markdown: an arm a line, then an arm and a number of steps a line."""
    judged = f", NELBO of {result['judged_on']} rows" if result["judged_on"] else ""
    lines = [f"{result['machine']}, {result['tokens']} tokens a story{judged}", "",
             "| arm | size, MB | NELBO | step, ms (p95) | cold start, s | process, MB | board, MB "
             "| watts |", "|---" * 8 + "|"]
    for name, arm in result["arms"].items():
        lines.append(
            f"| {name} | {shown(arm['megabytes'], '.1f')} | {shown(arm['nelbo'], '.4f')} | "
            f"{1000 * arm['step_seconds']:.1f} ({1000 * arm['step_seconds_p95']:.1f}) | "
            f"{arm['cold_start_seconds']:.2f} | {shown(arm['process_megabytes'], '.0f')} | "
            f"{shown(arm['board_megabytes'], 'd')} | {shown(arm['watts'], '.2f')} |")
    lines += ["", "| arm | steps | story, s (p95) | tokens/s | joules | gen. ppl | entropy |",
              "|---" * 7 + "|"]
    for name, arm in result["arms"].items():
        for nfe, story in arm["stories"].items():
            lines.append(
                f"| {name} | {nfe} | {story['seconds']:.3f} ({story['seconds_p95']:.3f}) | "
                f"{story['tokens_per_second']:.0f} | {shown(story['joules'], '.2f')} | "
                f"{shown(story.get('generative_perplexity'), '.1f')} | "
                f"{shown(story.get('unigram_entropy'), '.3f')} |")
    if not any(name.startswith("tensorrt") for name in result["arms"]):
        lines += ["", "No engine in this bundle: TensorRT and the Jetson were not measured."]
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Seconds of a story against its steps, and quality against seconds where it was judged."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    judged = any("generative_perplexity" in story for arm in result["arms"].values()
                 for story in arm["stories"].values())
    figure, axes = plt.subplots(1, 1 + judged, figsize=(6 + 6 * judged, 4.5),
                                layout="constrained", squeeze=False)
    for name, arm in result["arms"].items():
        steps = [int(nfe) for nfe in arm["stories"]]
        seconds = [story["seconds"] for story in arm["stories"].values()]
        axes[0, 0].plot(steps, seconds, marker=".", label=name)
        if judged:
            axes[0, 1].plot(seconds, [story["generative_perplexity"]
                                      for story in arm["stories"].values()], marker=".", label=name)
    axes[0, 0].set(xlabel="network evaluations a story", ylabel="seconds a story",
                   title=result["machine"], xscale="log", yscale="log")
    if judged:
        axes[0, 1].set(xlabel="seconds a story", ylabel="generative perplexity", xscale="log",
                       title="quality at a given time (lower left is better)")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    config, given = parse(DeviceBenchmark, __doc__, argv)
    config.check()
    unused = sorted({"steps", "guidance"} & given)
    require(not unused, f"--{' --'.join(unused)}: without effect here; leave it out")
    config.check_used(given)
    target = Path(config.output)
    check_file(target, "--output")
    plot_file = target.with_suffix(".png")
    require(target != plot_file and not plot_file.is_dir(), f"--output {target}: the plot is "
            f"written to {plot_file}; give the figures another name, as x.json")
    result = measure(config)
    write_json(target, result)
    plot(result, plot_file)
    print(f"{table(result)}\n\nwrote {target}")
