"""How fast stories are written from the left, beside a plain cached loop. Each arm runs in turn in
one process.

    python benchmark.py write --model_config small --batch 4 --precision fp32
    python benchmark.py write --checkpoint joint/best.pt --batch 1 --block_size 8 --steps 1

`textbook` is what a user would take instead: a GPT of the same size (learned positions, layer norms
with gains, GELU, one matrix for queries, keys and values), token by token with keys and values
that are concatenated, drawn by torch.multinomial. Ours: token by token (`causal`), in blocks
(`blocks`, --steps evaluations each; `uncached`: the same, the whole row read again for each) and in
verified drafts (`verified`: of the network, two passes a round; `headed`: of its draft head, one).
Random weights do for the first four arms; what a draft is worth depends on the model: give a
--checkpoint. Only tokens that were written count, up to --seq_len or the model's
[EOS].

The columns are those of `benchmark.py train`; the file also has the seconds to the first text, and
how much longer `later` pieces take than early ones (for --seq_len 2048).
"""

from cli import flag, parse, require

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.tokens import BOS
from kinds.checkpoints import load_checkpoint, model_from_checkpoint
from kinds.registry import kinds_that
from measuring.paired import Benchmark, read_peers, run_and_write
from model import MODEL_CONFIGS, create_model
from network.hardware import pick_precision
from sampling.cached import CachedModel
from sampling.left_to_right import write_left
from sampling.loop import Carried
from sampling.sampler import Sampler

DRAFTED = {"verified": 1, "headed": 0}  # evaluations of the network for a draft
DRAFT_RANK = 128  # of random weights
MOST_SEEN = 256  # tokens before each, of random weights


@dataclass(frozen=True)
class WriteBenchmark(Benchmark):
    BASELINES = ("textbook",)
    ARMS = (*BASELINES, "causal", "blocks", "uncached", *DRAFTED)

    batch: int = flag(4, "stories at a time")
    repeats: int = flag(5, "how often each arm is timed")
    block_size: int = flag(8, "tokens of a block, and places of a draft")
    steps: int = flag(4, "evaluations of a block; a draft always has one")
    headed_size: int = flag(4, "places of a draft of the draft head")
    temperature: float = flag(1.0, "0 is greedy, 1 the model's own distribution")
    checkpoint: str | None = flag(None, "model to use (default: random weights of --model_config)")
    arms: list[str] = flag(list(ARMS), "what to run: " + ", ".join(ARMS))

    def check(self) -> None:
        super().check()
        for name in ("block_size", "headed_size"):
            require(getattr(self, name) >= 2, f"--{name} {getattr(self, name)}: must be at least 2")
        self.sampler.check()

    @property
    def sampler(self) -> Sampler:
        return Sampler(steps=self.steps, temperature=self.temperature)

    def make(self, arm: str, device: torch.device) -> Callable[[], dict]:
        if arm in self.BASELINES:
            return textbook_writing(self, device)
        model = self.model().to(device)
        model.set_precision(pick_precision(device, self.precision)).for_inference()
        starts, longest = [np.array([BOS])] * self.batch, self.seq_len
        size = {"causal": 1, "headed": self.headed_size}.get(arm, self.block_size)
        sampler = replace(self.sampler, steps=DRAFTED.get(arm, self.steps))

        def write() -> dict:
            reader = (Uncached if arm == "uncached" else CachedModel)(model, sampler)
            written = write_left(reader, starts, sampler, size, longest,
                                 drafter=reader if arm in DRAFTED else None)
            pieces, times = [], [time.perf_counter()]
            for piece in written:
                pieces.append(piece)
                times.append(time.perf_counter())
            return {"evaluations": max(sum(piece.evaluations for piece in pieces if piece.row == i)
                                       for i in range(self.batch)),
                    "tokens": sum(len(piece.tokens) for piece in pieces),
                    "seconds_to_first_text": times[1] - times[0], "later": later(times)}

        return write

    def model(self) -> nn.Module:
        if self.checkpoint:
            model = model_from_checkpoint(load_checkpoint(self.checkpoint, kinds_that(
                lambda kind: kind.from_left and not kind.conditional)))
            require(not model.config.causal or not {"blocks", *DRAFTED} & {*self.arms},
                    f"{self.checkpoint} writes token by token alone: name other --arms")
            require("headed" not in self.arms or model.draft is not None, f"{self.checkpoint} has "
                    "no draft head: name other --arms, or train one (train.py --objective draft)")
            return model
        torch.manual_seed(0)
        # what a token sees, and not how long a story may be
        return create_model(self.model_config, self.vocab_size, draft_rank=DRAFT_RANK,
                            max_len=min(self.seq_len, MOST_SEEN)).eval()

    def describe(self, peak: float, arms: dict) -> dict:
        return {"what": (self.checkpoint or f"{self.model_config}, random weights") +
                        f", {self.batch} stories of up to {self.seq_len} tokens, blocks and drafts "
                        f"of {self.block_size} (of the draft head {self.headed_size}), blocks in "
                        f"{self.steps} steps, temperature "
                        f"{self.temperature:g}; textbook in fp32",
                "peers": read_peers()}


def later(times: list[float]) -> float | None:
    """How much longer a piece takes in the last quarter of a story than in the second one: 1 where
    its time does not grow with what stands before. None of fewer than four pieces."""
    spans, quarter = np.diff(times), (len(times) - 1) // 4
    if not quarter:
        return None
    return float(np.median(spans[-quarter:]) / np.median(spans[quarter:2 * quarter]))


class Uncached(CachedModel):
    """Reads the whole row again for every evaluation, as a loop without a cache does."""

    def begin(self, rows: np.ndarray) -> None:
        super().begin(rows)
        self.so_far = np.zeros((len(rows), 0), np.int64)

    def read(self, tokens: np.ndarray, logits: int = 0) -> None:
        self.so_far = np.concatenate([self.so_far, tokens], 1)

    def step(self, *given: np.ndarray) -> tuple[np.ndarray, np.ndarray, Carried]:
        super().begin(self.numbers)
        super().read(self.so_far)
        return super().step(*given)

    def keep(self, rows: np.ndarray) -> None:
        super().keep(rows)
        self.so_far = self.so_far[rows]


class TextbookBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, known: tuple[Tensor, Tensor] | None,
                ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, 1, D) and the keys and values (B, H, S, D/H) of the tokens before, or (B, L, D)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in self.mixed(self.norms[0](x)).chunk(3, dim=-1))
        if known is not None:
            k, v = torch.cat([known[0], k], dim=2), torch.cat([known[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=known is None and x.shape[1] > 1)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x)))), (k, v)


class TextbookGPT(nn.Module):
    def __init__(self, config: WriteBenchmark):
        super().__init__()
        size = MODEL_CONFIGS[config.model_config]
        self.tokens = nn.Embedding(config.vocab_size, size.width)
        self.positions = nn.Embedding(config.seq_len, size.width)
        self.blocks = nn.ModuleList(TextbookBlock(size.width, size.heads)
                                    for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, token: Tensor, place: int, cache: list) -> Tensor:
        """(B, 1) -> logits (B, V) of the next token; `cache` is brought up to date."""
        x = self.tokens(token) + self.positions.weight[place]
        for i, block in enumerate(self.blocks):
            x, cache[i] = block(x, cache[i])
        return self.norm(x)[:, 0] @ self.tokens.weight.T

    def all_logits(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L, V), of what follows each."""
        x = self.tokens(tokens) + self.positions.weight[:tokens.shape[1]]
        for block in self.blocks:
            x, _ = block(x, None)
        return self.norm(x) @ self.tokens.weight.T


def textbook_writing(config: WriteBenchmark, device: torch.device) -> Callable[[], dict]:
    torch.manual_seed(0)
    model = TextbookGPT(config).eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def write() -> dict:
        torch.manual_seed(0)
        token = torch.full((config.batch, 1), BOS, device=device)
        cache = [None] * len(model.blocks)
        for place in range(config.seq_len - 1):
            logits = model(token, place, cache) / max(config.temperature, 1e-9)
            token = torch.multinomial(logits.softmax(-1), 1)
        return {"evaluations": config.seq_len - 1, "tokens": config.batch * (config.seq_len - 1)}

    return write


def main(argv: list[str]) -> None:
    config, given = parse(WriteBenchmark, __doc__, argv)
    config.check()
    unused = sorted({"model_config", "vocab_size"} & given) if (
        config.checkpoint and "textbook" not in config.arms) else []
    require(not unused, f"--{' --'.join(unused)}: the --checkpoint has its own; leave it out")
    run_and_write(config)
