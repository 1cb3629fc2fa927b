"""A training run: its loop, its signals, its lines and its checkpoints. A library: train.py and
train_long.py run one.

    Trainer(config).run()

What a run is made of stands in the modules beside: building.py (data and network), steps.py
(optimizer steps), validation.py, saving.py (files), log.py (metrics).
"""

from cli import Stopped, check_writable, end_signals, lock

import contextlib
import dataclasses
import functools
import math
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from corpus.rows import content_hashes
from kinds.checkpoints import save_checkpoint
from training.building import StageData, StageModel
from training.config import TrainConfig
from training.log import MetricsLog, start_wandb
from training.optimizers import local
from training.processes import Processes, start_processes, whole_state
from training.progress import Progress
from training.saving import Saver, clear_folder, clear_partial, not_written
from training.speed import peak_flops
from training.steps import Steps
from training.validation import Validation


class Trainer:
    """Trains one model on one data folder, from the start or from the content of a last.pt.

    All checks are made here, before `run` removes anything of an older run: UserError.
    """

    def __init__(self, config: TrainConfig, checkpoint: dict | None = None,
                 processes: Processes | None = None):
        config.check()
        self.processes = processes or start_processes(config.device)
        self.config, self.resumed = config, checkpoint is not None
        self.folder = Path(config.checkpoint_dir)
        check_writable(self.folder, "--checkpoint_dir")
        self.log = MetricsLog(self.folder)
        self.data = StageData(config, checkpoint)
        self.network = StageModel(config, self.data, self.processes, checkpoint)
        self.validation = Validation(config, self.data, self.network, self.processes)
        self.progress = Progress.of(checkpoint, config.valid_rows) if checkpoint else Progress()
        self.steps = Steps(config, self.data, self.network, self.progress, self.processes,
                           checkpoint)
        self.network.compile(self.data.meta["seq_len"])
        self.saver = Saver(self.folder, self.processes,
                           self.progress.step if checkpoint else None)
        self.shown_speed: dict[str, str] = {}
        self.stop_signal: int | None = None  # the first that this process got
        if self.processes.main:
            self.folder.mkdir(parents=True, exist_ok=True)  # now that nothing is wrong
            if config.wandb:
                self.log.wandb_run = start_wandb(dataclasses.asdict(config), self.folder)

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
            self.log.rewind(self.progress.step)
        else:
            clear_folder(self.folder, self.config.overwrite)

    def _run(self) -> None:
        processes = self.processes
        self.steps.speed.peak = processes.world * peak_flops(self.network.device,
                                                             self.network.precision)
        if processes.main:
            print(self.headline(), flush=True)
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

    def headline(self) -> str:
        """What is trained, on what, and how."""
        config, network, world = self.config, self.network, self.processes.world
        total, blocks = network.model.count_parameters()
        trained = sum(p.numel() for p in network.model.parameters() if p.requires_grad)
        return (f"{config.model_config}: {total / 1e6:.1f}M parameters ({blocks / 1e6:.1f}M "
                "without the vocabulary matrices"
                + f", {trained / 1e6:.1f}M trained" * (config.stage == 2)
                + f"), {network.precision} on {network.device}"
                + f" ({network.precision_reason})" * bool(network.precision_reason)
                + f" in {world} processes" * (world > 1)
                + ", compiled" * network.compiled + f"; {len(self.data.rows):,} training rows, "
                f"{len(self.data.valid):,} for validation; matrix products reach "
                f"{self.steps.speed.peak / 1e12:.2f} TFLOP/s here")

    def _loop(self) -> None:
        config, progress, speed = self.config, self.progress, self.steps.speed
        started, before, first = time.perf_counter(), progress.seconds, progress.step
        speed.start()
        if not self.resumed:
            # there is a good state from the first step on
            self.save("last.pt", resumable=True, give_up=True)
        with tqdm(total=config.max_steps, initial=progress.step, unit="step",
                  disable=None if self.processes.main else True) as bar:
            while progress.step < config.max_steps:
                metrics = self.steps.take()
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", **self.shown_speed, refresh=False)
                progress.seconds = before + time.perf_counter() - started
                last = progress.step == config.max_steps
                if progress.step % config.log_every == 0 or last or progress.step == first + 1:
                    figures = speed.read()
                    self.write_metrics({**metrics, **figures})
                    self.shown_speed = {"tokens/s": f"{figures['tokens_per_second']:,.0f}",
                                        "MFU": f"{figures['mfu']:.0%}"}
                if progress.step % config.valid_every == 0 or last:
                    self.validate(give_up=last)
                # A signal may reach one process only, at any time: all agree once a step.
                stop = self.processes.largest(self.stop_signal or 0)
                if progress.step % config.save_every == 0 or last or stop:
                    self.save("last.pt", resumable=True, give_up=bool(last or stop))
                if stop and not last:
                    raise Stopped(f"stopped after step {progress.step}; the same command with "
                                  "--resume goes on from there", 128 + stop)
        self._finish()

    def _finish(self) -> None:
        progress = self.progress
        if not math.isfinite(progress.best):  # resumed at its end, before any validation
            self.validate(give_up=True)
            self.save("last.pt", resumable=True, give_up=True)
        self.save("final.pt", give_up=True)
        if self.processes.main:
            self.log.plot()
            print(f"trained {progress.step:,} steps, {progress.tokens_seen:,} tokens, "
                  f"{self.steps.loader.epochs:.1f} epochs in {progress.seconds / 60:.1f} minutes; "
                  f"best validation {self.network.kind.likelihood_name} {progress.best:.3f} "
                  f"nats/token; wrote {self.folder}")
        self.processes.barrier()

    def _on_signal(self, number: int, frame: object) -> None:
        if self.stop_signal and number == signal.SIGINT:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        # A service manager may send SIGTERM and SIGHUP one after the other: the state is saved.
        self.stop_signal = self.stop_signal or number

    # ---- what it tells and keeps -----------------------------------------------------------------

    def validate(self, give_up: bool = False) -> dict:
        """Writes and returns the validation figures of the averaged weights, shows some stories,
        and keeps the best weights.

        With `give_up` a best.pt that cannot be written ends the run.
        """
        progress, average = self.progress, self.network.average
        average.eval()  # without averaging it is the model in training
        figures = progress.metrics = self.validation.figures()
        self.write_metrics(figures)
        stories = (self.validation.stories() if self.processes.main or self.config.fsdp else [])
        if self.processes.main:
            tqdm.write(f"step {progress.step}: {self.validation.in_words(figures)}"
                       + "".join(f"; {name} {value}" for name, value in self.shown_speed.items()))
            for story in stories:
                tqdm.write(f"  | {' '.join(story.split())}")
            sys.stdout.flush()
            try:
                self.log.plot()
            except OSError as error:
                not_written(error, progress.step)
        if self.config.fsdp:
            average.reshard()  # or its next forward pass would find the old weights in place
        if figures["valid_nelbo"] < progress.best:
            before, progress.best = progress.best, figures["valid_nelbo"]
            if not self.save("best.pt", give_up=give_up):
                progress.best = before  # that of the best.pt that is there
        self.steps.speed.start()
        return figures

    def write_metrics(self, metrics: dict) -> None:
        if self.processes.main:
            progress = self.progress
            self.log.write(progress.step, {**metrics, "tokens": progress.tokens_seen,
                                           "epoch": round(self.steps.loader.epochs, 4),
                                           "seconds": round(progress.seconds, 2)})

    def save(self, name: str, resumable: bool = False, give_up: bool = False) -> bool:
        """Writes a checkpoint, unless the disk is full (see Saver.write); returns whether it did.

        One that is `resumable` has the optimizers' state too; that is last.pt. It holds whole
        tensors, so that any number of processes can go on from it. The last step may have broken
        the weights, which the loss would show one step later: such a state never replaces a good
        file (Stopped).
        """
        network, progress, data = self.network, self.progress, self.data
        broken = not all(torch.isfinite(local(p)).all() for p in network.model.parameters())
        if self.processes.sum([float(broken)])[0]:
            raise Stopped(f"the weights are not finite after step {progress.step}; {self.folder} "
                          "holds the last good state: lower --lr and --resume")
        weights = whole_state(network.model.state_dict())
        average = (None if network.average is network.model
                   else whole_state(network.average.state_dict()))
        content = functools.partial(
            save_checkpoint, model=network.model, tokenizer=data.tokenizer_text,
            length_histogram=data.meta["length_histogram"], kind=network.kind.name,
            weights=weights, ema=average,
            **vars(progress), cursor=self.steps.loader.cursor,
            train_config=dataclasses.asdict(self.config), command=shlex.join(sys.argv),
            computed_in={"device": network.device.type, "precision": network.precision},
            processes=self.processes.world, torch_version=str(torch.__version__),
            data=content_hashes(data.meta), data_source=data.meta["source"],
            licence=data.meta["licence"], **(self.steps.state() if resumable else {}))
        return self.saver.write(name, progress.step, content, resumable, give_up)
