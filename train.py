"""Stage 2: token shards -> checkpoints.

    python train.py --quick                         # tiny model, made-up stories, about 2.5 minutes
    python train.py --model_config small            # TinyStories, prepared first if it is missing
    python train.py --model_config small --resume   # go on after a stop or a kill

Writes into `--checkpoint_dir`: last.pt (everything needed to resume), best.pt (lowest validation
NELBO), final.pt, metrics.jsonl and training_curves.png. Prints the validation figures and two
stories at every validation. A step of the small model on 4,096 tokens takes about 1.7 s on 2 CPU
cores with AVX512-BF16; GPU times have not been measured yet.

The validation figures are computed with the averaged (EMA) weights, always on the same rows and
with the same masks, whose number is uniform over 1..n: NELBO in nats/token, bits/byte (with the
code length of the row lengths), and the plain masked cross-entropy and accuracy over all hidden
tokens.
"""

import copy
import dataclasses
import math
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import Stopped, check_writable, flag, parse, require, run
from data_prep import (
    BatchStream,
    DataConfig,
    TokenRows,
    bucket_batches,
    decode,
    length_nats,
    load_meta,
    load_tokenizer,
    prepare,
    read_tokenizer_file,
    token_bytes,
)
from diffusion import OBJECTIVES, SCHEDULES, DiscreteDiffusion, numpy_step
from metrics import MetricsLog, start_wandb
from model import (
    MODEL_CONFIGS,
    PRECISIONS,
    check_tokenizer,
    create_model,
    load_checkpoint,
    pick_device,
    pick_precision,
    save_checkpoint,
)
from sampler import ORDERS, Sampler, blank_story, draw_length, fill
from sources import describe_source

OPTIMIZERS = ("muon", "adamw")
OUTPUTS = ("last.pt", "best.pt", "final.pt", "metrics.jsonl", "training_curves.png")


@dataclass
class TrainConfig:
    # data and output
    data_dir: str = flag("data", "data folder of data_prep.py; prepared first if it is missing")
    data_source: list[str] = flag(["tinystories"], "what to prepare it from: tinystories, sample "
                                                   "or files")
    checkpoint_dir: str = flag("checkpoints", "folder to write")
    resume: bool = flag(False, "continue from last.pt of the checkpoint folder")
    overwrite: bool = flag(False, "start again in a checkpoint folder that holds a run")
    quick: bool = flag(False, "the tiny model on made-up stories, in quick_run/")
    # model
    model_config: str = flag("small", "size: " + ", ".join(MODEL_CONFIGS))
    dropout: float = flag(0.0, "dropout after attention and MLP")
    qk_norm: bool = flag(True, "normalise queries and keys")
    time_conditioning: str = flag("none", "input of the mask ratio", ("none", "sinusoidal"))
    tied_head: bool = flag(False, "one matrix for embedding and vocabulary head")
    # diffusion
    objective: str = flag("masked_ce", "training loss", OBJECTIVES)
    schedule: str = flag("linear", "mask ratio m(t) in training", tuple(SCHEDULES))
    # optimisation
    max_steps: int = flag(10_000, "optimizer steps")
    batch_tokens: int = flag(16_384, "tokens of a step, padding included, over all micro-batches")
    grad_accum_steps: int = flag(1, "micro-batches of a step")
    optimizer: str = flag("muon", "muon: the blocks' matrices by Muon, the rest by AdamW",
                          OPTIMIZERS)
    lr: float | None = flag(None, "peak learning rate (default: 0.006 for muon, 0.001 for adamw)")
    warmup_steps: int | None = flag(None, "steps of linear warm-up (default: 5 % of max_steps)")
    min_lr_ratio: float = flag(0.0, "the cosine decay ends at this share of the peak")
    weight_decay: float = flag(0.0, "decoupled weight decay of the blocks' matrices")
    grad_clip: float = flag(1.0, "largest gradient norm; 0 turns clipping off")
    ema_decay: float = flag(0.99, "decay of the averaged weights; 0 turns averaging off")
    seed: int = flag(0, "seed of everything random")
    # machine
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("auto", "auto, fp32, bf16 or fp16", ("auto", *PRECISIONS))
    compile: bool = flag(False, "torch.compile the network (needs a C++ compiler on a CPU)")
    # reports
    log_every: int = flag(10, "steps between lines of metrics.jsonl")
    valid_every: int = flag(250, "steps between validations")
    valid_rows: int = flag(512, "validation rows, evenly spread over the split")
    save_every: int = flag(250, "steps between writes of last.pt")
    num_samples: int = flag(2, "stories shown at every validation")
    sample_steps: int = flag(64, "their unmasking steps")
    sample_temperature: float = flag(0.8, "their temperature")
    sample_order: str = flag("random", "their order", ORDERS)
    wandb: bool = flag(False, "log to Weights & Biases too; offline where there is no network")

    def check(self) -> None:
        require(self.model_config in MODEL_CONFIGS, f"--model_config {self.model_config}: unknown "
                f"size, choose from {', '.join(MODEL_CONFIGS)}")
        for name in ("max_steps", "batch_tokens", "grad_accum_steps", "log_every", "valid_every",
                     "valid_rows", "save_every"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("weight_decay", "grad_clip", "num_samples", "seed", "min_lr_ratio"):
            require(0 <= getattr(self, name) < 2**63,
                    f"--{name} {getattr(self, name)}: must be 0 or more")
        require(self.warmup_steps is None or self.warmup_steps >= 0,
                f"--warmup_steps {self.warmup_steps}: must be 0 or more")
        for name in ("dropout", "ema_decay"):
            require(0 <= getattr(self, name) < 1,
                    f"--{name} {getattr(self, name)}: must be at least 0 and less than 1")
        self.sampler().check()
        require(self.lr is None or 0 < self.lr < math.inf, f"--lr {self.lr}: must be positive")
        require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")

    def sampler(self) -> Sampler:
        return Sampler(steps=self.sample_steps, temperature=self.sample_temperature,
                       order=self.sample_order)


QUICK = dict(data_dir="quick_run/data", data_source=["sample"], checkpoint_dir="quick_run",
             model_config="tiny", max_steps=500, batch_tokens=2048, lr=0.01, valid_every=250,
             valid_rows=128, num_samples=3, sample_steps=256, sample_temperature=0.3,
             sample_order="confidence")
QUICK_DATA = dict(vocab_size=2048, seq_len=128)
# A run cannot go on with another value of these: the weights, the optimizers' state or the place in
# the data would not fit.
FIXED = ("model_config", "qk_norm", "time_conditioning", "tied_head", "optimizer", "seed",
         "batch_tokens")


def step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


class Trainer:
    """Trains one model on one data folder, from the start or from the content of a last.pt."""

    def __init__(self, config: TrainConfig, checkpoint: dict | None = None):
        config.check()
        self.config, self.step, self.tokens_seen, self.seconds = config, 0, 0, 0.0
        self.best, self.validation, self.resumed = math.inf, {}, checkpoint is not None
        self.folder = Path(config.checkpoint_dir)
        check_writable(self.folder, "--checkpoint_dir")
        self.log = MetricsLog(self.folder)
        # 1. Data.
        self.rows, self.valid = (TokenRows(config.data_dir, split) for split in ("train", "val"))
        self.meta = self.rows.meta
        if checkpoint:
            check_tokenizer(self.folder / "last.pt", checkpoint, config.data_dir, self.meta)
        require(config.batch_tokens >= self.meta["seq_len"], f"--batch_tokens "
                f"{config.batch_tokens}: a row of the data has up to {self.meta['seq_len']} tokens")
        self.tokenizer_text = read_tokenizer_file(config.data_dir, self.meta)
        self.tokenizer = load_tokenizer(self.tokenizer_text)
        # Spread over the split: its beginning may be of another kind than its end.
        count = min(config.valid_rows, len(self.valid))
        chosen = np.arange(count) * len(self.valid) // count
        self.valid_batches = bucket_batches(self.valid.lengths, 8192, chosen, merge=False)
        valid_rows = [self.valid[i] for i in chosen]
        self.valid_length_nats = length_nats(self.meta, valid_rows)
        self.valid_bytes = int(token_bytes(self.tokenizer)[np.concatenate(valid_rows)].sum())
        self.stream = BatchStream(self.rows, config.batch_tokens, config.seed)
        # 2. Network, on its device and in its precision.
        torch.manual_seed(config.seed)
        self.device = pick_device(config.device)
        self.precision = pick_precision(self.device, config.precision)
        self.model = create_model(
            config.model_config, self.meta["vocab_size"], max_len=self.meta["seq_len"],
            dropout=config.dropout, qk_norm=config.qk_norm, tied_head=config.tied_head,
            time_conditioning=config.time_conditioning)
        self.model.to(self.device).set_precision(self.precision)
        self.average = copy.deepcopy(self.model).eval() if config.ema_decay else self.model
        self.diffusion = DiscreteDiffusion(config.schedule, config.objective)
        # 3. Optimizers.
        self.peak_lr = config.lr or (0.006 if config.optimizer == "muon" else 0.001)
        self.warmup = (config.warmup_steps if config.warmup_steps is not None
                       else math.ceil(0.05 * config.max_steps))
        self.optimizers = make_optimizers(self.model, config, self.peak_lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if checkpoint:
            self.restore(checkpoint)
        if config.compile:
            check_compiler(self.device)
            self.model.hidden = torch.compile(self.model.hidden, dynamic=True)
        self.stop_signal: int | None = None
        self.folder.mkdir(parents=True, exist_ok=True)  # now that nothing is wrong
        if config.wandb:
            self.log.wandb_run = start_wandb(dataclasses.asdict(config), self.folder)

    # ---- one step --------------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine decay to min_lr_ratio, for the step with this number."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.config.max_steps - self.warmup)
        low = self.config.min_lr_ratio
        return self.peak_lr * (low + (1 - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2)

    def train_step(self) -> dict:
        """One optimizer step; returns its metrics. A non-finite loss changes no weight."""
        config = self.config
        # 1. All randomness of a step comes from (seed, step): nothing to store for resuming.
        seed = step_seed(config.seed, self.step)
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator().manual_seed(seed)
        # 2. Corrupt the whole batch at once, so that t is stratified over all of it.
        tokens = torch.from_numpy(next(self.stream))  # (B, L)
        times = self.diffusion.times(len(tokens), generator)
        corrupted = self.diffusion.corrupt(tokens, times, generator)
        # 3. Gradients, micro-batch by micro-batch; the weights already add up to the mean.
        self.model.train()
        loss = 0.0
        for part in torch.arange(len(tokens)).chunk(config.grad_accum_steps):
            share = self.diffusion.loss(self.model, corrupted[part].to(self.device))
            self.scaler.scale(share).backward()
            loss += share.item()
        # 4. Update.
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(),
                                              config.grad_clip or math.inf).item()
        overflow = self.scaler.is_enabled() and not math.isfinite(norm)  # the scaler skips the step
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            raise Stopped(f"the loss is not finite at step {self.step} (loss {loss}, gradient norm "
                          f"{norm}); {self.folder / 'last.pt'} holds the last good state: lower "
                          "--lr and --resume")
        lr = self.learning_rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        self.update_average()
        self.step += 1
        self.tokens_seen += int((tokens > 0).sum())
        return {"loss": loss, "lr": lr, "grad_norm": norm}

    @torch.no_grad()
    def update_average(self) -> None:
        if self.average is self.model:
            return
        # Early on a long memory would only remember the initialisation.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for mean, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)

    # ---- the run ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains up to max_steps. Ctrl-C and SIGTERM save the state and stop between two steps."""
        config = self.config
        if not self.resumed:
            clear_folder(self.folder, config.overwrite)
        total, blocks = self.model.count_parameters()
        print(f"{config.model_config}: {total / 1e6:.1f}M parameters ({blocks / 1e6:.1f}M without "
              f"the vocabulary matrices), {self.precision} on {self.device}; {len(self.rows):,} "
              f"training rows, {len(self.valid):,} for validation", flush=True)
        handlers = {number: signal.signal(number, self._on_signal)
                    for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.log.close()

    def _loop(self) -> None:
        config = self.config
        started, before, first = time.perf_counter(), self.seconds, self.step
        if not (self.folder / "last.pt").exists():
            self.save("last.pt", resumable=True)  # there is a good state from the first step on
        with tqdm(total=config.max_steps, initial=self.step, unit="step", disable=None) as bar:
            while self.step < config.max_steps:
                metrics = self.train_step()
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
                self.seconds = before + time.perf_counter() - started
                last = self.step == config.max_steps
                if self.step % config.log_every == 0 or last or self.step == first + 1:
                    self.write_metrics(metrics)
                if self.step % config.valid_every == 0 or last:
                    self.validate()
                if self.step % config.save_every == 0 or last or self.stop_signal:
                    self.save("last.pt", resumable=True)
                if self.stop_signal and not last:
                    raise Stopped(f"stopped after step {self.step}; the same command with --resume "
                                  "goes on from there", 128 + self.stop_signal)
        self.save("final.pt")
        self.log.plot()
        print(f"trained {self.step:,} steps, {self.tokens_seen:,} tokens, "
              f"{self.stream.epochs:.1f} epochs in {self.seconds / 60:.1f} minutes; "
              f"best validation NELBO {self.best:.3f} nats/token; wrote {self.folder}")

    def _on_signal(self, number: int, frame: object) -> None:
        if self.stop_signal:  # asked twice: do not wait for the step to end
            raise KeyboardInterrupt
        self.stop_signal = number

    def validate(self) -> dict:
        """Bound, masked cross-entropy and accuracy of the averaged weights, and some stories."""
        bound = self.diffusion.nelbo(self.average, map(self.valid.batch, self.valid_batches),
                                     numbers=self.valid_batches)
        metrics = self.validation = {
            "valid_nelbo": bound.nats_per_token, "valid_nelbo_se": bound.standard_error,
            "valid_bits_per_byte": bound.bits_per_byte(self.valid_length_nats, self.valid_bytes),
            "valid_masked_ce": bound.masked_ce, "valid_masked_accuracy": bound.masked_accuracy}
        self.write_metrics(metrics)
        tqdm.write(
            f"step {self.step}: {metrics['valid_bits_per_byte']:.3f} bits/byte, NELBO "
            f"{metrics['valid_nelbo']:.3f} ± {metrics['valid_nelbo_se']:.3f} nats/token, masked "
            f"cross-entropy {bound.masked_ce:.3f}, accuracy {bound.masked_accuracy:.1%}")
        for story in self.stories():
            tqdm.write(f"  | {' '.join(story.split())}")
        sys.stdout.flush()
        if metrics["valid_nelbo"] < self.best:
            self.best = metrics["valid_nelbo"]
            self.save("best.pt")
        self.log.plot()
        return metrics

    def stories(self) -> list[str]:
        """`num_samples` stories, the same noise every time, so that progress shows."""
        sampler = self.config.sampler()
        histogram, longest = self.meta["length_histogram"], self.meta["seq_len"] - 2
        rows = [blank_story(draw_length(histogram, self.config.seed, i) or longest)
                for i in range(self.config.num_samples)]
        filled = fill(numpy_step(self.average, sampler), rows, sampler, self.config.seed)
        return [decode(self.tokenizer, row) for row in filled]

    # ---- state -----------------------------------------------------------------------------------

    def write_metrics(self, metrics: dict) -> None:
        self.log.write(self.step, {**metrics, "tokens": self.tokens_seen,
                                   "epoch": round(self.stream.epochs, 4),
                                   "seconds": round(self.seconds, 2)})

    def save(self, name: str, resumable: bool = False) -> None:
        """Writes a checkpoint; last.pt has the optimizers' state too, and only it can be resumed.

        The last step may have broken the weights, which the loss would show one step later: such a
        state never replaces a good file.
        """
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise Stopped(f"the weights are not finite after step {self.step}; {self.folder} holds "
                          "the last good state: lower --lr and --resume")
        state = {"optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
                 "scaler": self.scaler.state_dict()} if resumable else {}
        save_checkpoint(
            self.folder / name, self.model, self.tokenizer_text, self.meta["length_histogram"],
            ema=None if self.average is self.model else self.average.state_dict(),
            step=self.step, tokens_seen=self.tokens_seen, seconds=self.seconds, best=self.best,
            metrics=self.validation,
            cursor={"epoch": self.stream.epoch, "position": self.stream.position},
            train_config=dataclasses.asdict(self.config), command=shlex.join(sys.argv),
            torch_version=str(torch.__version__), data_source=self.meta["source"],
            licence=self.meta["licence"], **state)

    def restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["weights"])
        if self.average is not self.model:
            self.average.load_state_dict(checkpoint["ema"] or checkpoint["weights"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"], strict=True):
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay  # this run's, which may differ from the stored one
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.tokens_seen = checkpoint["step"], checkpoint["tokens_seen"]
        self.seconds, self.best = checkpoint["seconds"], checkpoint["best"]
        self.validation = checkpoint["metrics"]
        self.stream = BatchStream(self.rows, self.config.batch_tokens, self.config.seed,
                                  **checkpoint["cursor"])
        self.log.rewind(self.step)


def make_optimizers(model: torch.nn.Module, config: TrainConfig, lr: float) -> list:
    """Muon (arXiv 2502.16982) for the blocks' matrices and AdamW for the rest, or AdamW for all."""
    matrices = list(model.blocks.parameters())
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    betas = (0.9, 0.98)
    if config.optimizer == "adamw":
        groups = [{"params": matrices, "weight_decay": config.weight_decay},
                  {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=lr, betas=betas)]
    # match_rms_adamw scales updates to the size of AdamW's, so both share one learning rate.
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=config.weight_decay,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=0.0)]


def check_compiler(device: torch.device) -> None:
    require(sys.platform != "win32" and device.type != "mps",
            "--compile: torch.compile does not work on Windows or MPS; leave it out")
    require(device.type != "cpu" or any(map(shutil.which, ("g++", "clang++", "c++"))),
            "--compile: torch.compile needs a C++ compiler on a CPU; install g++ or leave it out")


# ---- command line --------------------------------------------------------------------------------

def resumed_config(config: TrainConfig, given: set[str]) -> tuple[TrainConfig, dict]:
    """The stored settings of last.pt with the flags given now on top, and the checkpoint."""
    path = Path(config.checkpoint_dir) / "last.pt"
    require(path.is_file(), f"--resume: no {path} to continue from")
    checkpoint = load_checkpoint(path)
    require("optimizer" in checkpoint, f"{path} holds no optimizer state: only a last.pt that "
                                       "train.py wrote can be resumed")
    stored = checkpoint["train_config"]
    for name in sorted(given - {"resume", "checkpoint_dir", "quick"}):
        value = getattr(config, name)
        if value != stored[name]:
            require(name not in FIXED, f"--{name} {value}: the run in {config.checkpoint_dir} was "
                    f"started with {stored[name]}, which cannot change; choose another "
                    "--checkpoint_dir")
            print(f"--{name} changes from {stored[name]} to {value}")
    settings = {**stored, **{name: getattr(config, name) for name in given}}
    settings.update(checkpoint_dir=config.checkpoint_dir, resume=True, overwrite=False)
    return TrainConfig(**settings), checkpoint


def clear_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds a run; with `overwrite` removes that run's files."""
    old = [folder / name for name in OUTPUTS if (folder / name).exists()]
    require(overwrite or not old, f"{folder} already holds a run: continue it with --resume, or "
                                  "give --overwrite or another --checkpoint_dir")
    for path in old:
        path.unlink()


def find_data(config: TrainConfig, given: set[str]) -> None:
    """Makes the data folder if there is none; one made from another source is refused."""
    if (Path(config.data_dir) / "meta.json").exists():
        source, wanted = load_meta(config.data_dir)["source"], describe_source(config.data_source)
        require("data_source" not in given or source == wanted["source"],
                f"{config.data_dir} was prepared from {source}, not from {wanted['source']}: name "
                "another --data_dir or leave out --data_source")
        return
    print(f"no data in {config.data_dir}: preparing it from {', '.join(config.data_source)}")
    prepare(DataConfig(source=config.data_source, data_dir=config.data_dir,
                       **(QUICK_DATA if config.quick else {})))


def make_trainer(config: TrainConfig, given: set[str]) -> Trainer:
    """A trainer at its start or where last.pt stopped; nothing of an older run is touched yet."""
    if config.resume:
        return Trainer(*resumed_config(config, given))
    folder = Path(config.checkpoint_dir)
    check_writable(folder, "--checkpoint_dir")
    if not config.overwrite:
        clear_folder(folder, overwrite=False)
    find_data(config, given)
    return Trainer(config)


def main(argv: list[str] | None = None) -> None:
    config, given = parse(TrainConfig, __doc__, argv)
    if config.quick:
        own_folder = "checkpoint_dir" not in given and not config.resume
        config = dataclasses.replace(config, overwrite=config.overwrite or own_folder, **{
            name: value for name, value in QUICK.items() if name not in given})
    config.check()
    make_trainer(config, given).run()


if __name__ == "__main__":
    run(main)
