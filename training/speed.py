"""How fast training is, against what the machine could do. A library: nothing to run here.

    share = train_flops(model, rows, length, masked) / seconds / peak_flops(device, "bf16")   # MFU
"""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from model import DiffusionTransformer
from network.layers import PRECISIONS


def train_flops(model: DiffusionTransformer, rows: int, length: int, predicted: int,
                condition_length: int = 0, left_out: int = 0) -> int:
    """Floating-point operations that the matrix products of a training step need.

    6 for every weight and token (2 forward, 4 backward; arXiv 2001.08361), the vocabulary head only
    for `predicted` positions, and 12 L D a token and layer for attention (causal: the half of it).
    The encoder runs on `condition_length` places of every row; frozen weights need 4.
    `left_out` tokens the last block does not work out behind its attention. Dropout, norms and the
    optimizer count nothing.
    """
    config = model.config
    attention = 12 * config.layers * length * config.width // (2 if config.causal else 1)
    once = weight_flops(model.blocks) + (weight_flops(model.time) if model.time else 0)
    total = predicted * weight_flops(model.vocabulary)
    if condition_length:
        encoder = model.encoder
        between = [part for block in model.blocks for part in (block.cross.key, block.cross.value)]
        read = sum(map(weight_flops, [*(encoder.all_blocks or [encoder]), *between]))
        read += 12 * len(encoder.all_blocks) * condition_length * encoder.width
        once -= sum(map(weight_flops, between))
        attention += 12 * config.layers * condition_length * config.width
        total += rows * condition_length * read
    if model.picks:
        last = model.blocks[-1]
        parts = [last.attention.out, last.up, last.down, *([last.gate] if last.gate else [])]
        total -= left_out * sum(map(weight_flops, parts))
    return rows * length * (once + attention) + total


def weight_flops(module: nn.Module) -> int:
    """Of its weights, for every token: 2 forward, 2 for what is before them, 2 unless frozen."""
    return sum(p.numel() * (6 if p.requires_grad else 4) for p in module.parameters())


def peak_flops(device: torch.device, precision: str, seconds: float = 0.5) -> float:
    """Measured operations a second of this machine's matrix products: the best of several runs of
    2048 x 2048 (CPU) or 8192 x 8192 (GPU) matrices."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(PRECISIONS[precision]) for _ in range(2))
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == 0.0:
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * size ** 3 / (time.perf_counter() - started))
    return best


class Speedometer:
    """Tokens/s and the share of `peak` operations a second (MFU), over the time since `start`."""

    def __init__(self, peak: float):
        self.peak = peak
        self.start()

    def start(self) -> None:
        self.tokens, self.flops, self.started = 0, 0, time.perf_counter()

    def count(self, tokens: int, flops: int) -> None:
        self.tokens, self.flops = self.tokens + tokens, self.flops + flops

    def read(self) -> dict[str, float]:
        """The figures since the last start or reading, which is a new start."""
        seconds = time.perf_counter() - self.started
        figures = {"tokens_per_second": round(self.tokens / seconds, 1),
                   "mfu": round(self.flops / seconds / self.peak, 4)}
        self.start()
        return figures


def synchronize(device: torch.device) -> None:
    """Waits for the device: its work is queued, and a clock would only measure the queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class EnergyMeter:
    """Joules used while the block runs: an NVIDIA GPU's (its power, asked every few seconds), or
    the processor packages' (Intel's and AMD's RAPL counters, which often only root may read)."""

    RAPL, INTERVAL = Path("/sys/class/powercap"), 5.0

    def __init__(self, device: torch.device):
        self.device, self.total = device, 0.0
        self._stop, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> "EnergyMeter":
        self._known = (self._watts if self.device.type == "cuda" else self._packages)()
        self._at = time.perf_counter()
        if self._known is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()

    def joules(self) -> float | None:
        """Since the beginning; None if this machine does not tell."""
        if self._known is None:
            return None
        self._read()
        return self.total

    def _watch(self) -> None:
        while not self._stop.wait(self.INTERVAL):  # often: some counters are full after minutes
            self._read()

    def _read(self) -> None:
        with self._lock:
            if self.device.type == "cuda":
                watts, now = self._watts(), time.perf_counter()
                self.total += (watts or 0.0) * (now - self._at)
                self._at = now
            elif (now := self._packages()) is not None:
                # a counter starts again at 0 when it is full
                self.total += sum((now[name][0] - before) % limit for name, (before, limit)
                                  in self._known.items()) / 1e6
                self._known = now

    def _packages(self) -> dict[str, tuple[int, int]] | None:
        try:
            return {path.name: tuple(int((path / name).read_text()) for name in (
                "energy_uj", "max_energy_range_uj")) for path in self.RAPL.glob("intel-rapl:?")
                } or None
        except (OSError, ValueError):
            return None

    def _watts(self) -> float | None:
        # by its UUID: CUDA may count the GPUs in another order, or see only some of them
        name = (f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
                if torch.cuda.is_available() else self.device.index or 0)
        command = ["nvidia-smi", f"--id={name}", "--query-gpu=power.draw",
                   "--format=csv,noheader,nounits"]
        try:
            return float(subprocess.run(command, capture_output=True, text=True, timeout=5).stdout)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Measures the most memory in use inside the block, in bytes: on CUDA what torch allocated,
    elsewhere the resident memory of this process with all that it has imported (Linux resets that
    peak here; macOS tells the peak since the process began, Windows nothing: None)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    status = Path("/proc/self/status")
    if status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
        yield lambda: int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    elif sys.platform == "darwin":
        import resource
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    else:
        yield lambda: None
