"""Where to compute and in which precision. A library for whatever runs a network."""

from cli import UserError, require

import functools
import math
import os
import platform
import time

import torch
from torch import nn

from network.attention import View, rope_frequencies
from network.layers import PRECISIONS, ModelConfig
from network.transformer import Block


def device_of(model: nn.Module) -> torch.device:
    """Where a module's first parameter or buffer lives; the CPU if it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name, or the best one here: CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        try:
            device = torch.device(name)
            require(device.type in ("cpu", "cuda", "mps"), f"--device {name}: use auto, cpu, cuda "
                                                           "or mps")
            torch.empty(0, device=device)
            return device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"--device {name} cannot be used here; try auto or cpu") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(device: torch.device, name: str = "auto", before: str | None = None) -> str:
    """`name`, or for "auto" the fastest safe precision of the device's matrix units.

    A CPU that claims to multiply in bf16 may still be faster in FP32: both are timed, once in a
    process. `before` is what a resumed run was computed in: kept where the timing would decide,
    which may come out otherwise the second time.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if not claims_bf16(device):
        return "fp32"
    if before is not None:
        return before
    seconds = block_seconds()
    return min(seconds, key=seconds.__getitem__)


def precision_reason(device: torch.device, name: str = "auto", before: str | None = None) -> str:
    """Why pick_precision chooses what it does with these arguments, where a timing decided."""
    if name != "auto" or before is not None or not claims_bf16(device):
        return ""
    seconds = block_seconds()
    return (f"a block takes {1e3 * seconds['bf16']:.0f} ms in bf16, "
            f"{1e3 * seconds['fp32']:.0f} ms in FP32")


def claims_bf16(device: torch.device) -> bool:
    """Whether it is a CPU whose flags say that it has instructions for products in bf16."""
    if device.type != "cpu":
        return False
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))


@functools.cache
def block_seconds(enough: float = 0.4) -> dict[str, float]:
    """Seconds that this CPU needs for a block of the small size, forward and backward, on 4 x 256
    tokens, in FP32 and in bf16: products, attention, norms and conversions in their true shares.

    The best of two to five rounds, in which both have their turn, so that what else the machine
    does disturbs both alike; no third one begins after `enough` seconds. The random state is left
    as it was.
    """
    config, best = ModelConfig(), dict.fromkeys(("fp32", "bf16"), math.inf)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        block = Block(config)
        angles = torch.arange(config.max_len).float()[:, None] * rope_frequencies(config)
        tokens = torch.randn(4, config.max_len, config.width)
        deadline = time.perf_counter() + enough
        for done in range(5):
            if done >= 2 and time.perf_counter() > deadline:
                break
            for precision in best:
                x, *rotation = (table.to(PRECISIONS[precision]) for table in
                                (tokens, angles.cos(), angles.sin()))
                started = time.perf_counter()
                block(x.requires_grad_(), View(*rotation))[0].sum().backward()
                best[precision] = min(best[precision], time.perf_counter() - started)
    return best


def machine(device: torch.device) -> str:
    """This machine in some words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file
                         if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)} on {os.cpu_count()} cores"
