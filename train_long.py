"""Stage 2b: the whole way in one go: data -> train -> evaluate -> curves -> samples -> report.

    python train_long.py                                 # 2 CPU cores, about an hour
    python train_long.py --preset gpu16gb --checkpoint_dir long_gpu
    python train_long.py --data_source train.txt --valid_source valid.txt --checkpoint_dir mine
    python train_long.py --checkpoint_dir mine --minutes 120      # goes on from its end
    torchrun --nproc_per_node 8 train_long.py --preset full --checkpoint_dir long_full

Everything goes into --checkpoint_dir (default long_run/): what train.py writes, evaluation.json,
training_curves.png, samples.md, report.md, and settings.json, the settings of the run. A stage
whose output is there already is skipped, so the same command goes on after any stop or kill;
--from_stage does one again and all after it. With more --minutes or --max_steps a finished run goes
on: its learning rate rises again to where the longer decay has it. The presets stand in
train_config_long.py.
"""

from cli import atomic_file, check_writable, lock, parse, require, run

import contextlib
import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import data_prep
from corpus.rows import content_hashes, load_meta
from corpus.sources import check_source, describe_source, other_source
from corpus.tokens import decode
from kinds.checkpoints import load_checkpoint, model_from_checkpoint, tokenizer_from_checkpoint
from kinds.kind import Kind, drawn_lengths
from kinds.registry import kind_of
from measuring import likelihood
from network.hardware import machine
from train_config_long import PLACES, STAGES, KeptSettings, LongConfig
from training.building import COMPILE_FROM, check_same_data
from training.config import TrainConfig, refuse_changes
from training.log import MetricsLog
from training.processes import Processes, start_processes
from training.speed import EnergyMeter
from training.trainer import Trainer

TIMED_STEPS = 8
# Of --minutes: what validations while training and what the stages after it take, seen on 2 cores.
VALIDATION_SHARE, CLOSING_SHARE = 0.04, 0.10
# A stage is done again when one of these has changed.
STAGE_SETTINGS = {"evaluate": {"draws", "evaluate_rows", "compared_stories", "precision"},
                  "samples": {"written_stories", "written_steps", "sample_temperature",
                              "sample_order"}}
# What a finished training may be called again with: nothing else would be in the report's figures.
HARMLESS = {"max_steps", "device", "compile", "fsdp", "wandb", "log_every", "save_every"}.union(
    PLACES, *STAGE_SETTINGS.values())


class LongRun:
    """The stages of one run, in one folder. Only the training stage uses all processes."""

    def __init__(self, config: LongConfig, given: set[str], processes: Processes):
        self.processes, self.started = processes, time.perf_counter()
        self.folder = Path(config.checkpoint_dir)
        self.settings = KeptSettings(config, given, self.say)
        self.config, self.changed = self.settings.config, self.settings.changed
        self.again = STAGES[STAGES.index(self.config.from_stage or "report"):]
        self.check_data(given)
        stale = sorted(self.changed & {field.name for field in dataclasses.fields(TrainConfig)}
                       - HARMLESS)
        require(not stale or "train" in self.again or not self.finished("train"),
                f"--{' --'.join(stale)}: the training in {self.folder} is finished; give more "
                "--max_steps or --minutes too, or --from_stage train, or another --checkpoint_dir")

    def check_data(self, given: set[str]) -> None:
        """Refuses data that is not what the flags say, and to replace data that is another's."""
        config, path = self.config, Path(self.config.data_dir)
        require(not (config.skip_data_prep and config.from_stage == "data"),
                "--skip_data_prep and --from_stage data: give one of them")
        if not (path / "meta.json").exists():
            data_prep.check_config(config.data_config())
            return
        meta = load_meta(path)
        other = None
        if "data" in self.again or given & {"data_source", "valid_source"}:
            check_source(config.data_source, config.valid_source)
            other = other_source(meta, describe_source(config.data_source, config.valid_source))
        if "data" in self.again:
            require(not other or path.parent == self.folder, f"--from_stage data would replace "
                    f"{path}, but {other}: name another --data_dir")
            return
        mend = "name another --data_dir, or give --from_stage data to prepare it again"
        require(not other, f"{path}: {other}: {mend}")
        if "train" not in self.again and self.settings.known_data:
            check_same_data(self.settings.known_data, config, meta)
        different = {name for name in given & {"vocab_size", "seq_len"}
                     if meta["config"][name] != getattr(config, name)}
        require(not different, f"{path} was prepared with another "
                               f"--{' --'.join(sorted(different))}: {mend}")

    def store_settings(self) -> None:
        if self.processes.main:
            self.settings.store()

    # ---- stages ----------------------------------------------------------------------------------

    def run(self) -> None:
        with contextlib.ExitStack() as held:
            def take_folder() -> None:
                check_writable(self.folder, "--checkpoint_dir")
                if not self.folder.exists():
                    self.folder.mkdir(parents=True)
                    held.callback(remove_if_empty, self.folder)
                held.enter_context(lock(self.folder, "--checkpoint_dir"))

            self.processes.agree(take_folder)
            self.run_stages()

    def run_stages(self) -> None:
        for stage in STAGES:
            alone = STAGES.index(stage) > STAGES.index("train")
            if alone and not self.processes.main:
                return  # nothing more to do together, and evaluating may outlast their patience
            # one process looks, for the others might look when it has already begun
            done = stage not in self.again and self.processes.main and self.finished(stage)
            if done if alone else self.processes.gather(done)[0]:
                self.say(f"[{stage}] is there already")
                continue
            if stage == "train" or self.processes.main:
                self.say(f"[{stage}]")
                getattr(self, f"do_{stage}")()
            if not alone:
                self.processes.barrier()
        if self.changed:
            self.store_settings()

    def say(self, text: str) -> None:
        if self.processes.main:
            print(text, flush=True)

    def finished(self, stage: str) -> bool:
        best = self.folder / "best.pt"
        if self.changed & STAGE_SETTINGS.get(stage, set()):
            return False
        if stage == "data":
            return (Path(self.config.data_dir) / "meta.json").exists()
        if stage == "train":
            path = self.folder / "final.pt"
            return (not self.config.overwrite and "minutes" not in self.changed
                    and path.exists() and best.exists()
                    and load_checkpoint(path, kind=None)["step"] >= self.config.max_steps)
        output, source = {"evaluate": ("evaluation.json", best), "samples": ("samples.md", best),
                          "curves": ("training_curves.png", self.folder / "metrics.jsonl"),
                          "report": ("report.md", None)}[stage]
        output = self.folder / output
        return (source is not None and output.exists()
                and output.stat().st_mtime >= source.stat().st_mtime)

    def do_data(self) -> None:
        config = self.config
        require(not config.skip_data_prep, f"--skip_data_prep: no data in {config.data_dir}; name "
                                           "a --data_dir that data_prep.py wrote")
        settings = config.data_config()
        settings.overwrite = config.from_stage == "data"
        data_prep.report(config.data_dir, data_prep.prepare(settings))

    def do_train(self) -> None:
        config, processes = self.config, self.processes
        load_meta(config.data_dir)
        start_again = config.overwrite or config.from_stage in ("data", "train")
        last = self.folder / "last.pt"
        resumed = last.exists() and not start_again
        checkpoint = load_checkpoint(last, kind=None) if resumed else None
        if config.minutes and (not resumed or "minutes" in self.changed):
            step, seconds = (checkpoint["step"], checkpoint["seconds"]) if resumed else (0, 0.0)
            require(seconds < 60 * config.minutes, f"--minutes {config.minutes:g}: the run in "
                    f"{self.folder} has trained for {seconds / 60:.0f} already; give more")
            config.max_steps = step + self.steps_that_fit(seconds)
        stage_config = config.train_config(
            overwrite=start_again, resume=resumed,
            valid_every=config.valid_every or max(1, config.max_steps // 10))
        if resumed:
            refuse_changes(checkpoint["train_config"], dataclasses.asdict(stage_config),
                           config.checkpoint_dir)
            self.say(f"going on from {last}")
        else:
            self.settings.sessions = []
        trainer = Trainer(stage_config, checkpoint, processes)
        self.settings.known_data = content_hashes(trainer.data.meta)
        self.store_settings()
        network, before = trainer.network, trainer.progress.seconds
        with EnergyMeter(network.device) as energy:
            try:
                trainer.run(locked=True)
            finally:
                self.settings.sessions.append({
                    "command": shlex.join(sys.argv),
                    "machine": machine(network.device), "processes": processes.world,
                    "precision": network.precision, "compiled": network.compiled,
                    "seconds": trainer.progress.seconds - before,
                    "joules": energy.joules() if processes.world == 1 else None})
                self.store_settings()

    def steps_that_fit(self, trained: float = 0.0) -> int:
        """How many steps fit into what `trained` seconds leave of --minutes, by timing some here;
        the same in every process."""
        config = self.config
        for length in (COMPILE_FROM, 1):  # a run too short to be compiled is timed as it will be
            compiled, step = self.time_steps(length)
            spent = trained + time.perf_counter() - self.started
            left = 60 * config.minutes * (1 - VALIDATION_SHARE - CLOSING_SHARE) - spent
            steps = self.processes.gather(int(left / step))[0]
            if not compiled or config.compile or steps >= COMPILE_FROM:
                break
        require(steps > 0, f"--minutes {config.minutes:g}: {spent:.0f} s are spent already and a "
                           f"step takes {step:.2f} s; give more")
        self.say(f"a step takes {step:.2f} s here: {steps:,} {'more ' if trained else ''}steps fit "
                 f"into {config.minutes:g} minutes with everything else")
        return steps

    def time_steps(self, max_steps: int) -> tuple[bool, float]:
        """Whether the steps of a run of `max_steps` are compiled, and how long one takes here."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(self.config.train_config(
                checkpoint_dir=folder, valid_every=1, wandb=False, max_steps=max_steps), None,
                self.processes)
            seconds = []
            for _ in range(TIMED_STEPS):
                started = time.perf_counter()
                trainer.steps.take()
                seconds.append(time.perf_counter() - started)
        return trainer.network.compiled, statistics.mean(seconds[2:])

    def do_evaluate(self) -> None:
        config, path = self.config, self.folder / "best.pt"
        settings = likelihood.LikelihoodConfig(
            checkpoint=str(path), data_dir=config.data_dir, draws=config.draws,
            max_rows=config.evaluate_rows or None, num_samples=config.compared_stories,
            seed=config.seed, device=config.device, precision=config.precision)
        likelihood.measure_and_write(settings, path, load_checkpoint(path, kind=None),
                                     self.folder / "evaluation.json")

    def do_curves(self) -> None:
        MetricsLog(self.folder).plot()

    def do_samples(self) -> None:
        config = self.config
        checkpoint = load_checkpoint(self.folder / "best.pt", kind=None)
        model = model_from_checkpoint(checkpoint).to(self.processes.device)
        kind, sampler = kind_of(checkpoint), config.story_sampler()
        lengths = drawn_lengths(checkpoint["length_histogram"], config.written_stories, config.seed,
                                model.config.max_len)
        rows = kind.write(model, lengths, sampler, config.seed)
        tokenizer = tokenizer_from_checkpoint(checkpoint)
        texts = [decode(tokenizer, row) for row in rows]
        with atomic_file(self.folder / "samples.md", "w") as file:
            file.write(f"# {len(texts)} stories, unpicked\n\n"
                       f"{kind.describe(sampler, config.seed)}; step {checkpoint['step']:,}\n")
            for text in texts:
                file.write(f"\n> {' '.join(text.split())}\n")

    def do_report(self) -> None:
        checkpoint = load_checkpoint(self.folder / "best.pt", kind=None)
        evaluation = json.loads((self.folder / "evaluation.json").read_text(encoding="utf-8"))
        text = report_text(self.config, self.settings.sessions, checkpoint, evaluation,
                           MetricsLog(self.folder).lines())
        text += (self.folder / "samples.md").read_text(encoding="utf-8").replace("# ", "## ", 1)
        with atomic_file(self.folder / "report.md", "w") as file:
            file.write(text)
        print(f"\n{text}\nwrote {self.folder / 'report.md'}")


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def report_text(config: LongConfig, sessions: list[dict], checkpoint: dict, evaluation: dict,
                lines: list[dict]) -> str:
    """report.md without its stories: figures, curve, command, machine, time, tokens, energy."""
    last = lines[-1]
    speeds = [line for line in lines if "mfu" in line]
    joules = [session["joules"] for session in sessions]
    # a killed session has left no figure
    whole = sum(session["seconds"] for session in sessions) > 0.99 * last["seconds"]
    energy = (f"{sum(joules) / 3.6e6:.3f} kWh ({sum(joules) / last['tokens']:.3f} J/token)"
              if joules and None not in joules and whole else "not known: this machine does not "
              "tell, several processes shared the work, or the run was killed in between")
    commands = "".join(f"`{command}`\n\n" for command in dict.fromkeys(
        session.get("command", checkpoint["command"]) for session in sessions))
    entries, kind = evaluation.get("modes", {"": evaluation}), kind_of(evaluation)
    rows = [(f"{mode}: {name}" if mode else name, value) for mode, entry in entries.items()
            for name, value in likelihood_lines(entry, kind.in_mode(mode) if mode else kind)]
    rows += [
        ("best at step", f"{checkpoint['step']:,} of {config.max_steps:,}"),
        ("tokens trained on", f"{last['tokens']:,} ({last['epoch']:.1f} epochs)"),
        ("minutes of training", f"{last['seconds'] / 60:.1f}"),
        ("tokens/s, MFU", f"{statistics.median(s['tokens_per_second'] for s in speeds):,.0f}, "
                          f"{statistics.median(s['mfu'] for s in speeds):.0%}"),
        ("energy", energy),
        ("machine", "; ".join(dict.fromkeys(
            f"{s['machine']}, {s['precision']}" + f", {s['processes']} processes" * (
                s["processes"] > 1) + ", compiled" * s["compiled"] for s in sessions)))]
    protocols = "".join(f"{mode}: {entry['protocol']}.\n\n" if mode else
                        f"{entry['protocol']}.\n\n" for mode, entry in entries.items())
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    return (f"# {config.model_config}, {config.objective}\n\n{commands}"
            f"{protocols}| | |\n|---|---|\n{table}\n"
            "![training curves](training_curves.png)\n\n")


def likelihood_lines(entry: dict, kind: Kind) -> list[tuple[str, str]]:
    """What evaluation.json says of a kind, or of one in one of its modes, in words."""
    numbers = entry["likelihood"]
    return [
        ("bits/byte", f"{numbers['bits_per_byte']:.4f} ± "
                      f"{numbers['bits_per_byte_standard_error']:.4f}"),
        (f"{kind.likelihood_name}, nats/token",
         f"{numbers['nelbo_nats_per_token']:.4f} ± {numbers['nelbo_standard_error']:.4f}"),
        ("perplexity", f"{numbers['perplexity']:.2f}"),
        *((f"masked cross-entropy / accuracy over {name}",
           f"{average['cross_entropy']:.3f} / {average['accuracy']:.1%}")
          for name, average in entry.get("averages_over_t", {}).items())]


def main(argv: list[str] | None = None) -> None:
    config, given = parse(LongConfig, __doc__, argv)
    with start_processes(config.device) as processes:
        LongRun(config, given, processes).run()


if __name__ == "__main__":
    run(main)
