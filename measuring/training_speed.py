"""How fast training is, beside textbook steps. Each arm runs in turn in one process.

    python benchmark.py train --model_config small --batch 16 --seq_len 256
    python benchmark.py train --model_config medium --batch 32 --json bench/train_medium.json

A training step of this project (as train.py does it: the chosen precision, the head on hidden
positions only, Muon, the average of the weights; compiled and eager) against textbook steps of
torch's TransformerEncoder with AdamW: in FP32 with logits for every position (textbook), the same
under bf16 autocast (textbook_bf16), and as fast as a few lines make it (textbook_compiled: the
chosen precision, all compiled, logits at hidden positions only, fused AdamW). gpt is another work:
the same size trained left to right as nanoGPT does (logits for every position, fused AdamW,
compiled), and no baseline.

The speed-up that counts is that over the strongest baseline which ran; the table names it. Prints
medians of wall-clock and process CPU-seconds (all threads), the speed-up over the textbook and over
the strongest baseline (the median over pairs), tokens per second and per CPU-second, the share of
the measured peak (MFU), and the peak memory of a process that runs this arm alone. Some minutes for
the small model on 2 CPU cores.
"""

from cli import UserError, flag, parse, require

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from corpus.tokens import BOS, EOS
from diffusion import DiscreteDiffusion
from measuring.paired import Benchmark, run_and_write
from measuring.writing_speed import TextbookGPT
from model import MODEL_CONFIGS, create_model
from network.hardware import pick_precision
from network.layers import PRECISIONS
from training.compiling import compile_blocks, first_line
from training.optimizers import DEFAULT_LR, OPTIMIZERS, make_optimizers, move_average
from training.speed import train_flops


@dataclass(frozen=True)
class TrainBenchmark(Benchmark):
    BASELINES = ("textbook_bf16", "textbook_compiled", "textbook")
    ARMS = (*BASELINES, "eager", "compiled", "gpt")

    optimizer: str = flag("muon", "of this project's step", OPTIMIZERS)
    arms: list[str] = flag(list(ARMS), "what to run: " + ", ".join(ARMS))

    def make(self, arm: str, device: torch.device) -> Callable[[], dict]:
        if arm in ("textbook_compiled", "gpt"):
            return compiled_step(self, device, TextbookGPT(self) if arm == "gpt" else None)
        if arm in self.BASELINES:
            return textbook_step(self, device, bf16=arm == "textbook_bf16")
        return own_step(self, device, compiled=arm == "compiled")

    def describe(self, peak: float, arms: dict) -> dict:
        """The work in words; adds the share of the peak to the arms of this project."""
        model = create_model(self.model_config, self.vocab_size, max_len=self.seq_len)
        batch = batch_of(self)
        hidden = batch.predicted
        work = train_flops(model, self.batch, self.seq_len, hidden, left_out=batch.left_out)
        for name, arm in arms.items():
            arm["mfu"] = (None if name in (*self.BASELINES, "gpt") else
                          work / arm["seconds"] / peak)
        return {"what": f"{self.model_config}, {self.batch} x {self.seq_len} tokens, {hidden} of "
                        f"them hidden, {work / 1e12:.3f} TFLOP; textbook in fp32",
                "step_flops": work}


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


def compiled_step(config: TrainBenchmark, device: torch.device, gpt: TextbookGPT | None = None,
                  ) -> Callable[[], dict]:
    """The same model and loss as `textbook_step`, by what torch offers without changing either; or
    a `gpt`'s next tokens."""
    torch.manual_seed(0)
    model = (gpt or Textbook(config)).to(device)
    if gpt:
        nn.init.normal_(gpt.tokens.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type != "mps")
    batch = batch_of(config).to(device)
    where = batch.masked.flatten().nonzero()[:, 0]  # (M,)
    targets = batch.tokens.flatten()[where]
    dtype = PRECISIONS[pick_precision(device, config.precision)]

    @torch.compile
    def loss_of(noisy: torch.Tensor, where: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16 if dtype == torch.float32 else dtype,
                            enabled=dtype != torch.float32):
            if gpt:
                return F.cross_entropy(gpt.all_logits(batch.tokens)[:, :-1].flatten(0, 1),
                                       batch.tokens[:, 1:].flatten())
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


def main(argv: list[str]) -> None:
    config, _ = parse(TrainBenchmark, __doc__, argv)
    run_and_write(config)
