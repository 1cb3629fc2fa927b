"""TODO"""

from cli import Stopped, check_writable, describe, end_signals, is_of_the_machine, lock, require

import contextlib
import copy
import dataclasses
import math
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpus.rows import (
    TokenRows,
    bucket_batches,
    content_hashes,
    evenly_spread,
    read_tokenizer_file,
)
from corpus.tokens import decode, load_tokenizer, token_bytes
from kinds.checkpoints import check_tokenizer, load_checkpoint, save_checkpoint
from kinds.kind import NETWORK_SETTINGS, drawn_lengths
from kinds.likelihood import Nelbo
from kinds.registry import kind_of_run
from model import DiffusionTransformer
from network.hardware import pick_precision, precision_reason
from training.compiling import compile_blocks
from training.config import TrainConfig
from training.loader import BatchLoader, step_seed
from training.log import MetricsLog, start_wandb
from training.optimizers import local, make_optimizers, move_average, whole
from training.processes import (
    LossOf,
    Processes,
    joined,
    shard,
    spread_state,
    start_processes,
    whole_state,
)
from training.speed import Speedometer, peak_flops, train_flops

OUTPUTS = ("last.pt", "best.pt", "final.pt", "metrics.jsonl", "training_curves.png")
COMPILE_FROM = 1000  # steps; compiling takes about as long as it saves in 100 to 400 of them
# A run cannot go on with another value of these: the weights, the optimizers' state or the place in
# the data would not fit.
FIXED = (*NETWORK_SETTINGS, "stage", "encoder_config", "decoder_checkpoint", "optimizer", "seed",
         "batch_tokens")


class Trainer:
    """Trains one model on one data folder, from the start or from the content of a last.pt."""

    def __init__(self, config: TrainConfig, checkpoint: dict | None = None,
                 processes: Processes | None = None):
        config.check()
        self.processes = processes or start_processes(config.device)
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
            check_same_data(checkpoint.get("data"), config, self.meta)
        require(config.batch_tokens >= self.meta["seq_len"], f"--batch_tokens "
                f"{config.batch_tokens}: a row of the data has up to {self.meta['seq_len']} tokens")
        self.tokenizer_text = read_tokenizer_file(config.data_dir, self.meta)
        self.tokenizer = load_tokenizer(self.tokenizer_text)
        # Spread over the split: its beginning may be of another kind than its end.
        chosen = evenly_spread(config.valid_rows, len(self.valid))
        self.valid_batches = bucket_batches(self.valid.lengths, 8192, chosen, merge=False)
        # 2. Network, on its device and in its precision.
        torch.manual_seed(config.seed)
        self.device = self.processes.device
        # Rank 0 chooses for all: a timing may come out otherwise in another process.
        before = (checkpoint or {}).get("computed_in", {})
        choice = (config.precision, before.get("precision")
                  if before.get("device") == self.device.type else None)
        self.precision, self.precision_reason = self.processes.gather((
            pick_precision(self.device, *choice), precision_reason(self.device, *choice))
            if self.processes.main else None)[0]
        self.kind = kind_of_run(config)
        self.model = self.create_model(checkpoint)
        self.told, self.valid_told = (self.model.encoder.conditions_of(
            rows, config.decoder_checkpoint) if self.kind.conditional else None
            for rows in (self.rows, self.valid))
        self.model.set_precision(self.precision)
        valid_rows = [self.valid[i] for i in chosen]
        self.valid_extra_nats = self.kind.extra_nats(self.meta, valid_rows)
        self.valid_bytes = int(token_bytes(self.tokenizer)[np.concatenate(valid_rows)].sum())
        if checkpoint:
            self.model.load_state_dict(checkpoint["weights"])
        self.average = copy.deepcopy(self.model).eval() if config.ema_decay else self.model
        if checkpoint and self.average is not self.model:
            self.average.load_state_dict(checkpoint.get("ema") or checkpoint["weights"])
        self.distribute()
        # 3. Optimizers.
        self.peak_lr = config.peak_lr
        self.warmup = (config.warmup_steps if config.warmup_steps is not None
                       else math.ceil(0.05 * config.max_steps))
        self.optimizers = make_optimizers(self.model, config.optimizer, self.peak_lr,
                                          config.weight_decay, self.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        if checkpoint:
            self.restore(checkpoint)
        self.loader = BatchLoader(self.rows, config.batch_tokens, config.seed,
                                  self.kind.corrupt_batch, self.step,
                                  checkpoint["cursor"] if checkpoint else None, self.told,
                                  config.condition_dropout if config.stage == 3 else 0.0,
                                  self.model.encoder.without if self.told else None)
        self.compiled = self.compile()
        self.speed = Speedometer(math.inf)  # the machine's peak is measured when the run begins
        self.shown_speed: dict[str, str] = {}
        self.stop_signal: int | None = None  # what this process was told
        self.saved_step: int | None = self.step if checkpoint else None  # of last.pt
        self.failed_saves = 0  # in a row
        if self.processes.main:
            self.folder.mkdir(parents=True, exist_ok=True)  # now that nothing is wrong
            if config.wandb:
                self.log.wandb_run = start_wandb(dataclasses.asdict(config), self.folder)

    def create_model(self, checkpoint: dict | None) -> DiffusionTransformer:
        """The network of the run, whose weights come later if there is a `checkpoint`."""
        config, source = self.config, checkpoint
        kinds = self.kind.starts_from(config.stage)
        if kinds:
            path = config.decoder_checkpoint
            source = checkpoint or load_checkpoint(path, kind=kinds)
            check_tokenizer(path, source, config.data_dir, self.meta)
            for name in NETWORK_SETTINGS:  # for the record, and for who goes on from this run
                setattr(config, name, source["train_config"][name])
        model = self.kind.create(config, self.meta, source, checkpoint is not None)
        model.train_only(self.kind.trained(config.stage))
        return model

    def distribute(self) -> None:
        """Puts the model on its device and, of several processes, into their common work."""
        config, several = self.config, self.processes.world > 1
        require(several or not config.fsdp, "--fsdp spreads a model over several processes: start "
                                            "them with torchrun --nproc_per_node N train.py ...")
        require(not config.fsdp or self.precision != "fp16",
                "--fsdp works with --precision bf16 or fp32, not fp16")
        for model in {id(m): m for m in (self.model, self.average)}.values():
            if config.fsdp:
                shard(model, self.device)
            model.to(self.device)
        self.loss_of = LossOf(self.kind, self.model)
        if several and not config.fsdp:
            self.loss_of = torch.nn.parallel.DistributedDataParallel(
                self.loss_of, gradient_as_bucket_view=True)

    def compile(self) -> bool:
        """Compiles the blocks where that is asked for or pays; says why where it cannot."""
        config = self.config
        if config.compile is False or (config.compile is None
                                       and config.max_steps < COMPILE_FROM):
            return False
        reason = compile_blocks(self.model, self.device, self.meta["seq_len"])
        require(reason is None or config.compile is None, f"--compile: {reason}; leave it out")
        if reason and self.processes.main:
            print(f"not compiled, the steps will be slower: {reason}", flush=True)
        return reason is None

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
        # 1. The global batch, its tokens hidden already. Dropout's noise comes from (seed, step)
        #    too: nothing random has to be stored for resuming.
        batch = self.loader.next()
        torch.manual_seed(step_seed(config.seed, self.step, self.processes.rank))
        # 2. Gradients, micro-batch by micro-batch; the weights already add up to the mean.
        self.model.train()
        shares = []  # they stay on the device: reading one would wait for it
        parts = list(self.processes.own_rows(len(batch.corrupted.tokens), config.grad_accum_steps))
        for i, (part, factor) in enumerate(parts):
            self.synchronise_gradients(i == len(parts) - 1)
            share = self.loss_of(batch.corrupted[part].to(self.device)) * factor
            self.scaler.scale(share).backward()
            shares.append(share.detach())
        # 3. Update, after the one reading of the step: every process decides by the same numbers.
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(),
                                                    config.grad_clip or math.inf))
        sums = self.processes.sum(torch.stack([*shares, norm]))
        loss, norm = (value / self.processes.world for value in (sum(sums[:-1]), sums[-1]))
        overflow = self.scaler.is_enabled() and not math.isfinite(norm)  # a step to be skipped
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            raise Stopped(f"the loss is not finite at step {self.step} (loss {loss}, gradient norm "
                          f"{norm}); {self.folder / 'last.pt'} holds the last good state: lower "
                          "--lr and --resume")
        lr = self.learning_rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if not overflow:  # the scaler asks each optimizer's gradients alone; all must skip
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        self.update_average()
        self.step += 1
        self.tokens_seen += batch.tokens
        told = batch.corrupted.condition
        self.speed.count(batch.tokens, train_flops(
            self.model, *batch.corrupted.tokens.shape, batch.predicted,
            0 if told is None else self.model.encoder.places(told)))
        return {"loss": loss, "lr": lr, "grad_norm": norm}

    def synchronise_gradients(self, wanted: bool) -> None:
        """Gradients are averaged over the processes with the last micro-batch only."""
        if self.config.fsdp:
            self.model.set_requires_gradient_sync(wanted)
        elif self.processes.world > 1:
            self.loss_of.require_backward_grad_sync = wanted

    def update_average(self) -> None:
        if self.average is not self.model:
            # Early on a long memory would only remember the initialisation.
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            move_average(self.average, self.model, decay)

    # ---- the run ---------------------------------------------------------------------------------

    def run(self, locked: bool = False) -> None:
        """Trains up to max_steps. Ctrl-C, SIGTERM and SIGHUP save the state and stop between two
        steps. With `locked` the caller holds the folder."""
        processes = self.processes
        processes.barrier()  # every process has made its checks before anything is removed
        with contextlib.ExitStack() as held:
            if not locked:
                processes.agree(lambda: held.enter_context(lock(self.folder, "--checkpoint_dir")))
            processes.agree(self.clear)
            self._run()

    def clear(self) -> None:
        """Removes what an earlier run left, or what came after the state that is gone on from."""
        clear_partial(self.folder)
        if self.resumed:
            self.log.rewind(self.step)
        else:
            clear_folder(self.folder, self.config.overwrite)

    def _run(self) -> None:
        config, processes = self.config, self.processes
        self.speed = Speedometer(peak_flops(self.device, self.precision) * processes.world)
        if processes.main:
            total, blocks = self.model.count_parameters()
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            print(f"{config.model_config}: {total / 1e6:.1f}M parameters ({blocks / 1e6:.1f}M "
                  "without the vocabulary matrices"
                  + f", {trained / 1e6:.1f}M trained" * (config.stage == 2)
                  + f"), {self.precision} on {self.device}"
                  + f" ({self.precision_reason})" * bool(self.precision_reason)
                  + f" in {processes.world} processes" * (processes.world > 1)
                  + ", compiled" * self.compiled + f"; {len(self.rows):,} training rows, "
                  f"{len(self.valid):,} for validation; matrix products reach "
                  f"{self.speed.peak / 1e12:.2f} TFLOP/s here", flush=True)
        handlers = {number: signal.signal(number, self._on_signal)
                    for number in (signal.SIGINT, *end_signals())}
        try:
            with processes.losing_one_is_no_bug(lambda: f"{self.folder / 'last.pt'} holds the last "
                                                "state saved: start all processes again, with "
                                                "--resume"):
                self._loop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.log.close()

    def _loop(self) -> None:
        config, main = self.config, self.processes.main
        started, before, first = time.perf_counter(), self.seconds, self.step
        self.speed.start()
        if not self.resumed:
            # there is a good state from the first step on
            self.save("last.pt", resumable=True, give_up=True)
        with tqdm(total=config.max_steps, initial=self.step, unit="step",
                  disable=None if main else True) as bar:
            while self.step < config.max_steps:
                metrics = self.train_step()
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", **self.shown_speed, refresh=False)
                self.seconds = before + time.perf_counter() - started
                last = self.step == config.max_steps
                if self.step % config.log_every == 0 or last or self.step == first + 1:
                    speed = self.speed.read()
                    self.write_metrics({**metrics, **speed})
                    self.shown_speed = {"tokens/s": f"{speed['tokens_per_second']:,.0f}",
                                        "MFU": f"{speed['mfu']:.0%}"}
                if self.step % config.valid_every == 0 or last:
                    self.validate(give_up=last)
                # A signal may reach one process only, at any time: all agree once a step.
                stop = self.processes.largest(self.stop_signal or 0)
                if self.step % config.save_every == 0 or last or stop:
                    self.save("last.pt", resumable=True, give_up=bool(last or stop))
                if stop and not last:
                    raise Stopped(f"stopped after step {self.step}; the same command with --resume "
                                  "goes on from there", 128 + stop)
        if not math.isfinite(self.best):  # resumed at its end, before any validation
            self.validate(give_up=True)
            self.save("last.pt", resumable=True, give_up=True)
        self.save("final.pt", give_up=True)
        if main:
            self.log.plot()
            print(f"trained {self.step:,} steps, {self.tokens_seen:,} tokens, "
                  f"{self.loader.epochs:.1f} epochs in {self.seconds / 60:.1f} minutes; "
                  f"best validation {self.likelihood_name} {self.best:.3f} nats/token; wrote "
                  f"{self.folder}")
        self.processes.barrier()

    def _on_signal(self, number: int, frame: object) -> None:
        if self.stop_signal and number == signal.SIGINT:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        # A service manager may send SIGTERM and SIGHUP one after the other: the state is saved.
        self.stop_signal = self.stop_signal or number

    @property
    def likelihood_name(self) -> str:
        """The twin's likelihood is exact, that of diffusion a bound."""
        return self.kind.likelihood_name

    def validate(self, give_up: bool = False) -> dict:
        """Bound, masked cross-entropy and accuracy of the averaged weights, and some stories.

        With `give_up` a best.pt that cannot be written ends the run.
        """
        self.average.eval()  # without averaging it is the model in training
        bound = self.valid_bound()
        metrics = self.validation = {
            "valid_nelbo": bound.nats_per_token, "valid_nelbo_se": bound.standard_error,
            "valid_bits_per_byte": bound.bits_per_byte(self.valid_extra_nats, self.valid_bytes),
            "valid_masked_ce": bound.masked_ce, "valid_masked_accuracy": bound.masked_accuracy}
        self.write_metrics(metrics)
        stories = self.stories() if self.processes.main or self.config.fsdp else []
        if self.processes.main:
            tqdm.write(
                f"step {self.step}: {metrics['valid_bits_per_byte']:.3f} bits/byte, "
                f"{self.likelihood_name} {metrics['valid_nelbo']:.3f} ± "
                f"{metrics['valid_nelbo_se']:.3f} nats/token, masked cross-entropy "
                f"{bound.masked_ce:.3f}, accuracy {bound.masked_accuracy:.1%}"
                + "".join(f"; {name} {value}" for name, value in self.shown_speed.items()))
            for story in stories:
                tqdm.write(f"  | {' '.join(story.split())}")
            sys.stdout.flush()
            try:
                self.log.plot()
            except OSError as error:
                self.say_not_written(error)
        if self.config.fsdp:
            self.average.reshard()  # or its next forward pass would find the old weights in place
        if metrics["valid_nelbo"] < self.best:
            before, self.best = self.best, metrics["valid_nelbo"]
            if not self.save("best.pt", give_up=give_up):
                self.best = before  # that of the best.pt that is there
        self.speed.start()
        return metrics

    def valid_bound(self) -> Nelbo:
        """The bound of the averaged weights on the validation rows, worked out together."""
        batches = self.processes.own(self.valid_batches)
        bound = self.kind.nelbo(self.average, map(self.valid.batch, batches), numbers=batches,
                                   conditions=None if self.valid_told is None
                                   else self.valid_told.batch)
        columns = [getattr(bound, field.name) for field in dataclasses.fields(bound)]
        return Nelbo(*joined(self.processes.gather(columns)))

    def stories(self) -> list[str]:
        """`num_samples` stories, the same noise every time, so that progress shows."""
        config, count, told = self.config, self.config.num_samples, None
        if self.valid_told is not None and count:
            count = min(count, len(self.valid))
            told = self.valid_told.batch(evenly_spread(count, len(self.valid)))
        lengths = drawn_lengths(self.meta["length_histogram"], count, config.seed,
                                self.average.config.max_len)
        filled = self.kind.write(self.average, lengths, config.sampler(), config.seed, told)
        texts = [decode(self.tokenizer, row) for row in filled]
        if told is not None:
            texts = [f"({self.model.encoder.show(condition, self.tokenizer)}) {text}"
                     for condition, text in zip(told, texts, strict=True)]
        return texts

    # ---- state -----------------------------------------------------------------------------------

    def write_metrics(self, metrics: dict) -> None:
        if self.processes.main:
            self.log.write(self.step, {**metrics, "tokens": self.tokens_seen,
                                       "epoch": round(self.loader.epochs, 4),
                                       "seconds": round(self.seconds, 2)})

    def save(self, name: str, resumable: bool = False, give_up: bool = False) -> bool:
        """Writes a checkpoint; last.pt has the optimizers' state too, and only it can be resumed.

        A file that the disk does not take leaves the one before as it is, and training goes on;
        when the next last.pt fails too, or with `give_up`, UserError. Returns whether it was
        written.

        It holds whole tensors, so that any number of processes can go on from it. The last step may
        have broken the weights, which the loss would show one step later: such a state never
        replaces a good file.
        """
        broken = not all(torch.isfinite(local(p)).all() for p in self.model.parameters())
        if self.processes.sum([float(broken)])[0]:
            raise Stopped(f"the weights are not finite after step {self.step}; {self.folder} holds "
                          "the last good state: lower --lr and --resume")
        weights = whole_state(self.model.state_dict())
        average = None if self.average is self.model else whole_state(self.average.state_dict())
        state = {"optimizer": [whole_state(optimizer.state_dict())
                               for optimizer in self.optimizers],
                 "scaler": self.scaler.state_dict()} if resumable else {}
        problem = None
        if self.processes.main:
            try:
                save_checkpoint(
                    self.folder / name, self.model, self.tokenizer_text,
                    self.meta["length_histogram"], self.kind.name, weights=weights,
                    ema=average, step=self.step, tokens_seen=self.tokens_seen, seconds=self.seconds,
                    best=self.best, metrics=self.validation, cursor=self.loader.cursor,
                    train_config=dataclasses.asdict(self.config), command=shlex.join(sys.argv),
                    computed_in={"device": self.device.type, "precision": self.precision},
                    processes=self.processes.world, torch_version=str(torch.__version__),
                    data=content_hashes(self.meta), data_source=self.meta["source"],
                    licence=self.meta["licence"], **state)
            except OSError as error:
                problem = self.say_not_written(error, give_up or resumable and self.failed_saves)
        problem = self.processes.gather(problem)[0]
        if resumable:
            self.failed_saves = self.failed_saves + 1 if problem else 0
            self.saved_step = self.saved_step if problem else self.step
        there = ("there is no last.pt yet" if self.saved_step is None else
                 f"{self.folder / 'last.pt'} holds step {self.saved_step}")
        require(not problem or not (give_up or self.failed_saves > 1), f"{problem}, at step "
                f"{self.step}; {there}: free some space, then " + (
                    "try again" if self.saved_step is None else "--resume"))
        return not problem

    def say_not_written(self, error: OSError, ends: bool = False) -> str:
        """Says that a file could not be written, and why, unless the run `ends` with it; returns
        it. A bug stays one."""
        if not is_of_the_machine(error):
            raise error
        if not ends:
            tqdm.write(f"step {self.step}: not written: {describe(error)}; training goes on and "
                       "tries again at the next save", file=sys.stderr)
        return describe(error)

    def restore(self, checkpoint: dict) -> None:
        """All of the state but the weights, which are there before they are spread."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer"], strict=True):
            decays = [group["weight_decay"] for group in optimizer.param_groups]
            optimizer.load_state_dict(spread_state(state, optimizer))
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay  # this run's, which may differ from the stored one
        if checkpoint["scaler"]:  # empty if the run was not in FP16 until now
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.tokens_seen = checkpoint["step"], checkpoint["tokens_seen"]
        self.seconds, self.best = checkpoint["seconds"], checkpoint["best"]
        self.validation = checkpoint["metrics"]
        if checkpoint["train_config"]["valid_rows"] != self.config.valid_rows:
            self.best = math.inf  # that of other rows


def check_same_data(known: dict | None, config: TrainConfig, meta: dict) -> None:
    """Refuses to go on with other rows than those whose hashes a run has `known`: its place in the
    data and its best validation would mean nothing, and rows of training might be validated on.
    The folder's path does not matter."""
    here = content_hashes(meta)
    known = known or here  # an older checkpoint has none
    different = [split for split in here if split.removesuffix("_condition") != "test"
                 and here[split] != known.get(split)]
    require(not different, f"{config.data_dir} has other content than the run in "
            f"{config.checkpoint_dir} was trained on ({', '.join(different)}): name that data "
            "folder with --data_dir, or begin another run with another --checkpoint_dir")


def clear_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds a run; with `overwrite` removes that run's files."""
    old = [folder / name for name in OUTPUTS if (folder / name).exists()]
    require(overwrite or not old, f"{folder} already holds a run: continue it with --resume, or "
                                  "give --overwrite or another --checkpoint_dir")
    for path in old:
        path.unlink()


def clear_partial(folder: Path) -> None:
    """Removes what runs left that were killed while they wrote; the folder is locked."""
    for name in OUTPUTS:
        for path in folder.glob(f"{name}.*.partial"):
            path.unlink()
