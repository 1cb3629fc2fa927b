"""What a device could do at best, and what fits on it: worked out, nothing is measured.

    python benchmark.py roofline --device orin_nano_8gb
    python benchmark.py roofline --measured device_benchmark.json   # beside what was measured

For each size and precision: the operations and bytes of a step, the least time that the device
needs for them, for a step and for a story, and the memory. Then, for one network that writes from
the left behind a cache (block_diffusion.py), the most tokens a second: token by token, in blocks,
and in drafts that it verifies itself.
"""

from cli import UserError, flag, parse, require

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import MODEL_CONFIGS
from network.draft_head import DRAFTED
from network.layers import ModelConfig


@dataclass(frozen=True)
class Device:
    """Dense operations a second in each precision, bytes a second, megabytes in all."""

    operations: dict
    bandwidth: float
    megabytes: int


# Orin Nano 8 GB in its Super mode: 67 INT8 TOPS with sparsity, so 33.4 dense, half of it in FP16,
# 102 GB/s (NVIDIA's data sheet). FP32 outside of the tensor cores: 1024 cores, 2 x 1.02 GHz.
DEVICES = {"orin_nano_8gb": Device({"fp32": 2.1e12, "fp16": 16.7e12, "int8": 33.4e12}, 102e9, 7620)}
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
# Estimates, to be replaced by measurements: CUDA's context and TensorRT's libraries, a Python
# process with NumPy and the tokenizer, and what JetPack's system without a desktop keeps.
CONTEXT_MB, PROCESS_MB, SYSTEM_MB, WORKSPACE_MB = 600, 150, 1500, 256


@dataclass(frozen=True)
class Roofline:
    device: str = flag("orin_nano_8gb", "device: " + ", ".join(DEVICES), tuple(DEVICES))
    length: int = flag(256, "tokens of a row")
    vocab_size: int = flag(8192, "size of the vocabulary")
    nfe: list[int] = flag([8, 16, 32, 64, 128], "network evaluations of a story")
    block_sizes: list[int] = flag([4, 8, 16, 32], "tokens of a block")
    draft: int = flag(8, "tokens of a pass that drafts, or verifies")
    draft_evaluations: int = flag(1, "network evaluations of a draft")
    # Assumed, between what small blocks and good drafts give elsewhere; measure your own
    round_tokens: list[float] = flag([2.5, 3.5], "tokens that a draft and its verification give "
                                                 "together: assumed, not worked out")
    headed: int = flag(4, "tokens of a pass that verifies a draft of the draft head")
    headed_tokens: float = flag(2.1, "tokens that such a pass gives: assumed")
    draft_rank: int = flag(128, "rank of the head, which is read in FP32 for every drafted token")
    measured: str | None = flag(None, "a device_benchmark.json of that device, to compare with")

    def check(self) -> None:
        require(self.length >= 1 and self.vocab_size >= 260 and min(self.nfe) >= 1,
                "--length, --vocab_size and --nfe must be positive, the vocabulary 260 or more")
        require(min(*self.block_sizes, self.draft, self.draft_evaluations) >= 1,
                "--block_sizes, --draft and --draft_evaluations must be positive")
        require(all(1 <= tokens <= self.draft for tokens in self.round_tokens),
                f"--round_tokens: a round gives from 1 to {self.draft} tokens (--draft)")
        require(self.headed >= 2 and 1 <= self.headed_tokens <= self.headed,
                f"--headed_tokens {self.headed_tokens:g}: a pass gives from 1 to {self.headed} "
                "tokens (--headed, 2 or more)")
        require(self.draft_rank >= 1, f"--draft_rank {self.draft_rank}: must be at least 1")
        require(self.measured is None or Path(self.measured).is_file(),
                f"--measured {self.measured}: no such file")


def floor_of(size: Any, precision: str, device: Device, length: int) -> dict:
    """Operations, bytes and least seconds of one step of a batch of 1 with all its logits.

    INT8 is for the blocks' weight products; attention and head stay in FP16.
    """
    mlp = size.width * size.mlp_width * (2 if size.mlp == "relu2" else 3)
    block = size.layers * (4 * size.width ** 2 + mlp)  # weights of the blocks
    head = size.vocab_size * size.width
    rest = "fp16" if precision == "int8" else precision
    products = 2 * length * block
    other = 4 * length ** 2 * size.width * size.layers + 2 * length * head
    weights = block * WEIGHT_BYTES[precision] + head * WEIGHT_BYTES[rest]
    compute = products / device.operations[precision] + other / device.operations[rest]
    return {"gflop": (products + other) / 1e9, "weight_megabytes": weights / 1e6,
            "compute_seconds": compute, "weight_seconds": weights / device.bandwidth,
            "floor_seconds": max(compute, weights / device.bandwidth)}


def pass_seconds(size: Any, precision: str, device: Device, tokens: int, slots: int) -> float:
    """Least seconds of a pass of a batch of 1 behind a cache: it reads all weights, and the keys
    and values in all slots, whatever they hold. All logits; INT8 as in `floor_of`."""
    floor = floor_of(size, precision, device, tokens)
    rest = "fp16" if precision == "int8" else precision
    attended = 4 * tokens * slots * size.width * size.layers
    cache = 2 * size.layers * slots * size.width * WEIGHT_BYTES[rest]
    return max(floor["compute_seconds"] + attended / device.operations[rest],
               floor["weight_seconds"] + cache / device.bandwidth)


def evaluations_of(block: int) -> list[int]:
    """Those to show: 1, 2, 4, ... and as many as the block has tokens."""
    return [*(2 ** i for i in range(block.bit_length()) if 2 ** i < block), block]


def writing_table(config: Roofline, device: Device) -> list[str]:
    """Tokens a second of a network that writes from the left. A block takes its evaluations and one
    causal pass, which fills the cache; a draft as many and one pass that verifies it."""
    lines = ["", f"Writing from the left behind a cache of {config.length} slots, batch 1, at most "
             "so many tokens/s; worked out, without the launch of kernels", "",
             "| size | precision | token by token | "
             + "".join(f"blocks of {block} at {'/'.join(map(str, evaluations_of(block)))} "
                       "evaluations | " for block in config.block_sizes)
             + f"drafts of {config.draft - 1} at {config.draft_evaluations}, "
             + "/".join(f"{tokens:g}" for tokens in config.round_tokens) + " tokens a round | "
             f"drafts of {config.headed - 1} by the draft head, {config.headed_tokens:g} tokens a "
             "pass |",
             "|---" * (5 + len(config.block_sizes)) + "|"]
    for name, size in sizes_of(config):
        for precision in ("fp16", "int8"):
            def seconds(tokens: int, size=size, precision=precision) -> float:
                return pass_seconds(size, precision, device, tokens, config.length)
            blocks = ("/".join(f"{block / ((evaluations + 1) * seconds(block)):.0f}"
                               for evaluations in evaluations_of(block))
                      for block in config.block_sizes)
            a_round = (config.draft_evaluations + 1) * seconds(config.draft)
            verified = "/".join(f"{tokens / a_round:.0f}" for tokens in config.round_tokens)
            read = 4 * config.draft_rank * min(size.vocab_size, DRAFTED) / device.bandwidth
            headed = config.headed_tokens / (seconds(config.headed) + (config.headed - 1) * read)
            lines.append(f"| {name} | {precision} | {1 / seconds(1):.0f} | {' | '.join(blocks)} "
                         f"| {verified} | {headed:.0f} |")
    return lines


def sizes_of(config: Roofline) -> list[tuple[str, ModelConfig]]:
    return [(name, dataclasses.replace(size, vocab_size=config.vocab_size))
            for name, size in MODEL_CONFIGS.items() if name != "micro"]


def memory_of(size: Any, precision: str, length: int, weights_mb: float) -> dict:
    """Megabytes that a process with this model needs, weights and estimates."""
    wide = 4 if precision == "fp32" else 2
    activations = (length * size.width * (8 + 2 * size.mlp_ratio) * wide
                   + 2 * size.heads * length ** 2 * 4  # scores and their softmax, in FP32
                   + 3 * length * size.vocab_size * 4) / 1e6  # logits and what the choice makes
    parts = {"weights": weights_mb, "activations": activations, "workspace": WORKSPACE_MB,
             "context": CONTEXT_MB, "process": PROCESS_MB}
    return parts | {"total": sum(parts.values())}


def read_measured(path: str | None) -> dict:
    """A device_benchmark.json; without a path one without any measurement."""
    if path is None:
        return {"machine": "", "arms": {}}
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: measured[key] for key in ("machine", "arms", "model_config", "length")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--measured {path} is not what `benchmark.py device` wrote; measure again"
                        ) from error


def roofline(config: Roofline) -> str:
    device = DEVICES[config.device]
    measured = read_measured(config.measured)
    lines = [f"{config.device}, batch 1, {config.length} tokens, all logits; worked out, not "
             "measured", "",
             "| size | precision | GFLOP | weights, MB | compute, ms | weights, ms "
             "| floor of a step, ms | of a story at " + "/".join(map(str, config.nfe))
             + ", s | memory, MB |",
             "|---" * 9 + "|"]
    fits = {}
    for name, size in sizes_of(config):
        for precision in WEIGHT_BYTES:
            floor = floor_of(size, precision, device, config.length)
            memory = memory_of(size, precision, config.length, floor["weight_megabytes"])
            if memory["total"] + SYSTEM_MB <= device.megabytes:
                fits[precision] = name
            stories = "/".join(f"{nfe * floor['floor_seconds']:.3f}" for nfe in config.nfe)
            lines.append(
                f"| {name} | {precision} | {floor['gflop']:.1f} | {floor['weight_megabytes']:.0f} "
                f"| {1000 * floor['compute_seconds']:.2f} | {1000 * floor['weight_seconds']:.2f} "
                f"| {1000 * floor['floor_seconds']:.2f} | {stories} | {memory['total']:.0f} |")
    lines += ["", f"Memory is weights, activations, workspace {WORKSPACE_MB}, context {CONTEXT_MB} "
              f"and process {PROCESS_MB} MB (the last three estimated); of {device.megabytes} MB "
              f"the system keeps {SYSTEM_MB}. The largest that fits: "
              + ", ".join(f"{name} in {precision}" for precision, name in fits.items()) + "."]
    lines += writing_table(config, device)
    on_it = "Orin Nano" in measured["machine"]
    for name, arm in measured["arms"].items():
        if on_it and name.startswith("tensorrt"):
            size = ModelConfig(**measured["model_config"])
            floor = floor_of(size, name.split()[-1], device, measured["length"])["floor_seconds"]
            lines.append(f"{name}: a step takes {1000 * arm['step_seconds']:.2f} ms, measured: "
                         f"{floor / arm['step_seconds']:.0%} of the floor's speed")
    if not on_it:
        lines.append("\nShare of the floor reached: not measured on this device.")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    config, _ = parse(Roofline, __doc__, argv)
    config.check()
    print(roofline(config))
