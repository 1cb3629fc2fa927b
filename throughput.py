"""How fast training is, against what the machine could do. A library: nothing to run here.

    share = train_flops(model, rows, length, masked) / seconds / peak_flops(device, "bf16")   # MFU
"""

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data_prep import EOS
from model import PRECISIONS, DiffusionTransformer


def train_flops(model: DiffusionTransformer, rows: int, length: int, predicted: int) -> int:
    """Floating-point operations that the matrix products of a training step need.

    6 for every weight and token (2 forward, 4 backward; arXiv 2001.08361), the vocabulary head only
    for `predicted` positions, and 12 L D a token and layer for attention (causal: the half of it).
    Dropout, norms and the optimizer count nothing.
    """
    config = model.config
    _, blocks = model.count_parameters()
    attention = 12 * config.layers * length * config.width // (2 if config.causal else 1)
    return (rows * length * (6 * blocks + attention)
            + 6 * predicted * config.vocab_size * config.width)


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


def synchronize(device: torch.device) -> None:
    """Waits for the device: its work is queued, and a clock would only measure the queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measures the most memory in use inside the block, in bytes: on CUDA what torch allocated,
    elsewhere the resident memory of this process with all that it has imported (Linux resets that
    peak here; elsewhere it is the peak since the process began)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    import resource
    status = Path("/proc/self/status")
    if status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    yield lambda: (int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
                   if status.exists()
                   else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
                       1 if sys.platform == "darwin" else 1024))


# ---- compiling -----------------------------------------------------------------------------------

def compile_blocks(model: DiffusionTransformer, device: torch.device, length: int) -> str | None:
    """torch.compile for the blocks of a model; returns None, or why it has to stay eager.

    The blocks share their code, so one is compiled and all use it; rows and length are symbols in
    it, so that the batches' many shapes need no second compilation. It is tried out here, forward
    and backward, before a run depends on it.
    """
    if sys.platform == "win32" or device.type == "mps":
        return "torch.compile does not work on Windows or MPS"
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler on a CPU, and neither g++ nor clang++ is here"
    for block in model.blocks:
        block.compile(dynamic=True)
    training = model.training
    try:
        for rows in (3, 2):
            tokens = torch.full((rows, length), EOS, device=device)
            model.train().hidden(tokens, torch.ones(rows, device=device)).sum().backward()
    except Exception as error:  # a compiler has many ways to fail
        for block in model.blocks:
            block._compiled_call_impl = None
        return f"torch.compile failed here ({type(error).__name__}: {first_line(error)})"
    finally:
        model.train(training)
        model.zero_grad()
    return None


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
