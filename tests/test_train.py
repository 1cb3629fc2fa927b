import cli
from cli import Stopped, UserError

import dataclasses
import errno
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, python
from torch.utils._python_dispatch import TorchDispatchMode

import data_prep
import diffusion
import train
from corpus import rows, tokens
from kinds.checkpoints import load_checkpoint
from kinds.registry import kind_of_run
from network import hardware
from train import main
from training import building, log
from training.config import TrainConfig
from training.processes import Processes
from training.speed import train_flops
from training.steps import Steps
from training.trainer import Trainer


@pytest.fixture
def settings(data_dir, tmp_path) -> dict:
    return dict(data_dir=str(data_dir), checkpoint_dir=str(tmp_path / "run"), model_config="tiny",
                max_steps=8, batch_tokens=512, precision="fp32", device="cpu", valid_every=4,
                valid_rows=8, save_every=3, log_every=2, num_samples=1, sample_steps=4)


def argv(settings: dict, **changes) -> list[str]:
    words = []
    for name, value in {**settings, **changes}.items():
        if value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def lines(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> bool:
    """Bitwise equality of nested checkpoint contents."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")
TIMING = ("seconds", "tokens_per_second", "mfu")
STATE = ("weights", "ema", "optimizer", "cursor", "step", "tokens_seen", "best", "scaler",
         "metrics")


def test_a_run_writes_what_it_promises(settings, capsys):
    main(argv(settings))
    folder = Path(settings["checkpoint_dir"])
    assert sorted(os.listdir(folder)) == ["best.pt", "final.pt", "last.pt", "metrics.jsonl",
                                          "training_curves.png"]
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert text.count("bits/byte") == 2 and text.count("  | ") == 2
    logged = lines(folder)
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 4, 6, 8]
    validations = [line for line in logged if "valid_nelbo" in line]
    assert [line["step"] for line in validations] == [4, 8]
    assert validations[1]["valid_nelbo"] < validations[0]["valid_nelbo"] < math.log(300) + 0.1
    last, final = load_checkpoint(folder / "last.pt"), load_checkpoint(folder / "final.pt")
    assert "optimizer" in last and "optimizer" not in final
    assert same(last["weights"], final["weights"]) and final["step"] == 8
    assert final["train_config"]["batch_tokens"] == 512
    best = load_checkpoint(folder / "best.pt")
    assert best["best"] == min(line["valid_nelbo"] for line in validations)


def test_validation_repeats_itself(settings):
    trainer = Trainer(TrainConfig(**settings))
    assert trainer.validate() == trainer.validate()
    before = trainer.validation.stories()
    assert trainer.validation.stories() == before


def test_the_model_learns(settings):
    trainer = Trainer(TrainConfig(**{**settings, "max_steps": 150, "lr": 0.02}))
    start = trainer.validate()["valid_nelbo"]
    while trainer.progress.step < 150:
        trainer.steps.take()
    assert trainer.validate()["valid_nelbo"] < start - 1.5


def test_accumulation_changes_nothing(settings):
    losses, gradients = {}, {}
    for parts in (1, 3):
        trainer = Trainer(TrainConfig(**settings, grad_accum_steps=parts))
        for optimizer in trainer.steps.optimizers:
            optimizer.zero_grad = lambda: None
        losses[parts] = trainer.steps.take()["loss"]
        gradients[parts] = [p.grad for p in trainer.network.model.parameters()]
    assert losses[1] == pytest.approx(losses[3], rel=1e-5)
    for a, b in zip(gradients[1], gradients[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_reads_its_device_once(settings, monkeypatch):
    """Reading a number waits for the GPU: all of a step's are read together, after the gradients.
    """
    trainer = Trainer(TrainConfig(**settings, grad_accum_steps=3))
    trainer.steps.take()
    read = []

    class Readings(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            read.append("item") if "_local_scalar_dense" in str(function) else None
            return function(*args, **(kwargs or {}))
    real = Processes.sum
    monkeypatch.setattr(Processes, "sum", lambda self, values: read.append(len(values))
                        or real(self, values))
    with Readings():
        metrics = trainer.steps.take()
    assert read[0] == 3 + 1 and [entry for entry in read if entry != "item"] == [4]
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0


@pytest.mark.parametrize("changes", [
    {"optimizer": "adamw", "lr": 0.01}, {"objective": "masked_ce", "schedule": "cosine"},
    {"time_conditioning": "sinusoidal"}, {"tied_head": False, "qk_norm": False},
    {"ema_decay": 0, "grad_clip": 0}, {"precision": "bf16", "dropout": 0.1},
    {"precision": "fp16"}], ids=str)
def test_every_recipe_trains(settings, changes):
    trainer = Trainer(TrainConfig(**{**settings, "max_steps": 30, "warmup_steps": 0, **changes}))
    first = trainer.validate()["valid_nelbo"]
    for _ in range(30):
        trainer.steps.take()
    assert trainer.validate()["valid_nelbo"] < first


def test_learning_rate_rises_and_falls(settings):
    trainer = Trainer(TrainConfig(**{**settings, "max_steps": 100, "lr": 1.0}, min_lr_ratio=0.1))
    rates = [trainer.steps.learning_rate(step) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[52] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 47 / 95)) / 2)
    assert rates[100] == pytest.approx(0.1)
    assert trainer.steps.learning_rate(130) == pytest.approx(0.1)  # it does not rise again
    # no step is left for the decay, or one
    for warmup, last in ((8, 1.0), (7, 0.1)):
        short = Trainer(TrainConfig(**{**settings, "lr": 1.0}, warmup_steps=warmup,
                                    min_lr_ratio=0.1))
        assert short.steps.learning_rate(warmup - 1) == 1 and short.steps.learning_rate(8) == (
            pytest.approx(last))
    assert Trainer(TrainConfig(**settings, optimizer="adamw")).steps.peak_lr == 0.001


@pytest.mark.parametrize("name, groups", [("muon", 2), ("adamw", 2)])
def test_every_group_of_every_optimizer_moves_at_the_schedules_rate(settings, name, groups):
    trainer = Trainer(TrainConfig(**settings, optimizer=name, lr=0.01, warmup_steps=3))
    used = []
    for optimizer in trainer.steps.optimizers:
        optimizer.register_step_pre_hook(lambda optimizer, *args: used.extend(
            group["lr"] for group in optimizer.param_groups))
    rates = [trainer.steps.learning_rate(step) for step in range(6)]
    assert len(set(rates)) > 4 and rates[0] < 0.004 and rates[5] < rates[3]
    for step, rate in enumerate(rates):
        used.clear()
        assert trainer.progress.step == step and trainer.steps.take()["lr"] == rate
        assert used == [rate] * groups


@pytest.mark.parametrize("clip", [0.01, 0.0, 1e6])
def test_gradients_are_clipped_before_they_are_used_and_forgotten_after(settings, clip):
    trainer = Trainer(TrainConfig(**settings, grad_clip=clip, grad_accum_steps=2))
    used = []
    for optimizer in trainer.steps.optimizers:
        optimizer.register_step_pre_hook(lambda optimizer, *args: used.append([
            p.grad.square().sum() for group in optimizer.param_groups for p in group["params"]]))
    for _ in range(2):
        used.clear()
        norm = trainer.steps.take()["grad_norm"]  # that before clipping
        assert len(used) == 2 and norm > 0.02
        expected = 0.01 if clip == 0.01 else norm
        assert torch.stack(sum(used, [])).sum().sqrt().item() == pytest.approx(expected, rel=1e-3)
        assert all(p.grad is None for p in trainer.network.model.parameters())


def test_a_step_after_a_validation_drops_out_again(settings):
    trainer = Trainer(TrainConfig(**settings, ema_decay=0, dropout=0.5))
    trainer.validate()
    assert trainer.network.average is trainer.network.model and not trainer.network.model.training
    trainer.steps.take()
    assert trainer.network.model.training


def test_a_step_counts_what_it_did(settings):
    trainer = Trainer(TrainConfig(**settings))
    batches, counted, following = [], [], trainer.steps.loader.next
    trainer.steps.loader.next = lambda: batches.append(following()) or batches[-1]
    trainer.steps.speed.count = lambda tokens, flops: counted.append((tokens, flops))
    for _ in range(2):
        trainer.steps.take()
    real = [int((batch.corrupted.tokens != tokens.PAD).sum()) for batch in batches]
    assert trainer.progress.step == 2 and trainer.progress.tokens_seen == sum(real)
    assert counted == [(count, train_flops(
        trainer.network.model, *batch.corrupted.tokens.shape, hidden := int(
            batch.corrupted.masked.sum()), left_out=batch.corrupted.tokens.numel() - hidden))
        for count, batch in zip(real, batches, strict=True)]


def test_a_step_counts_the_condition_too(settings, checkpoint, pairs_dir):
    del settings["model_config"]  # a later stage goes on with the model that it is given
    trainer = Trainer(TrainConfig(**settings | dict(
        data_dir=str(pairs_dir), batch_tokens=1024, stage=2, decoder_checkpoint=str(checkpoint))))
    told, following = [], trainer.steps.loader.next

    def batch():
        told.append(following())
        return told[-1]
    trainer.steps.loader.next = batch
    counted = []
    trainer.steps.speed.count = lambda tokens, flops: counted.append(flops)
    trainer.steps.take()
    corrupted = told[0].corrupted
    assert counted == [train_flops(trainer.network.model, *corrupted.tokens.shape,
                                   told[0].predicted, corrupted.condition.shape[1])]
    assert corrupted.condition.shape[1] > 1


def test_average_follows_the_weights(settings):
    trainer = Trainer(TrainConfig(**settings, ema_decay=0.5))
    before = trainer.network.average.embedding.weight.clone()
    trainer.steps.take()
    decay = min(0.5, 1 / 10)
    expected = decay * before + (1 - decay) * trainer.network.model.embedding.weight
    torch.testing.assert_close(trainer.network.average.embedding.weight, expected)


# ---- resuming ------------------------------------------------------------------------------------

@posix
def test_resume_is_bit_identical(settings, tmp_path, capsys):
    dropout = {**settings, "dropout": 0.2}  # its noise must continue too
    main(argv(dropout))
    # stop in the middle by a signal, at a step that is no save and no validation
    stopped = tmp_path / "stopped"
    trainer = Trainer(TrainConfig(**{**dropout, "checkpoint_dir": str(stopped), "save_every": 100}))
    step = trainer.steps.take

    def and_stop():
        metrics = step()
        if trainer.progress.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics
    trainer.steps.take = and_stop
    with pytest.raises(Stopped, match="after step 5.*--resume") as stop:
        trainer.run()
    assert stop.value.status == 130
    # lines of steps that a killed run did after its last save are dropped
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    main(["--resume", "--checkpoint_dir", str(stopped)])
    whole, resumed = (load_checkpoint(Path(folder) / "last.pt")
                      for folder in (settings["checkpoint_dir"], stopped))
    for key in STATE:
        assert same(whole[key], resumed[key]), key
    first, second = (
        {(line["step"], "valid_nelbo" in line): {k: line[k] for k in line if k not in TIMING}
         for line in lines(folder)} for folder in (settings["checkpoint_dir"], stopped))
    # (a resumed run logs its first step too)
    assert first == second and len(lines(stopped)) == len(second)


def test_the_precision_that_was_measured_is_said_and_kept(settings, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(hardware, "block_seconds", lambda: {"fp32": 0.038, "bf16": 0.0211})
    main(argv(settings, precision="auto"))
    assert ("bf16 on cpu (a block takes 21 ms in bf16, 38 ms in FP32)" in
            capsys.readouterr().out.splitlines()[0])
    # timed again the other one may win: the run stays what it is
    monkeypatch.setattr(hardware, "block_seconds", lambda: {"fp32": 0.02, "bf16": 0.0211})
    main(["--resume", "--checkpoint_dir", settings["checkpoint_dir"], "--max_steps", "10"])
    assert "bf16 on cpu;" in capsys.readouterr().out
    # with other processes it is rank 0's that counts
    processes = Processes(rank=1, world=1)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [("fp16", "why"), value])
    trainer = Trainer(TrainConfig(**settings | {"precision": "auto"}), None, processes)
    assert (trainer.network.precision, trainer.network.precision_reason) == ("fp16", "why")


def test_two_signals_do_not_wait(settings):
    trainer = Trainer(TrainConfig(**settings))
    trainer._on_signal(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        trainer._on_signal(signal.SIGINT, None)


def kill_when(command: list, condition) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not condition():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"


@posix
def test_sigkill_at_a_random_step_and_resume(data_dir, tmp_path):
    """Real processes, a real model: killed anywhere, the weights end bit-identical."""
    command = python(ROOT / "train.py", *argv(dict(
        data_dir=data_dir, model_config="micro", max_steps=24, batch_tokens=512, precision="fp32",
        device="cpu", valid_every=8, valid_rows=4, save_every=2, log_every=1, num_samples=0)))
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    whole = subprocess.run([*command, "--checkpoint_dir", tmp_path / "whole"], **quiet)
    assert whole.returncode == 0, whole.stderr
    kill_at = random.SystemRandom().randint(1, 18)
    print(f"killed when last.pt appeared, and once step {kill_at} was logged")
    folder = tmp_path / "killed"
    command += ["--checkpoint_dir", folder]
    kill_when(command, lambda: (folder / "last.pt").exists())
    kill_when([*command, "--resume"], lambda: (folder / "metrics.jsonl").exists() and (
        len((folder / "metrics.jsonl").read_text().splitlines()) >= kill_at))
    assert not (folder / "final.pt").exists()
    resumed = subprocess.run([*command, "--resume"], **quiet)
    assert resumed.returncode == 0, resumed.stderr
    a, b = (load_checkpoint(path / "last.pt") for path in (tmp_path / "whole", folder))
    for key in STATE:
        assert same(a[key], b[key]), key


def test_resume_keeps_stored_settings_and_says_what_changes(settings, capsys, fails):
    main(argv(settings, lr=0.003))
    folder = settings["checkpoint_dir"]
    main(["--resume", "--checkpoint_dir", folder, "--max_steps", "10", "--weight_decay", "0.5"])
    text = capsys.readouterr().out
    assert "--max_steps changes from 8 to 10" in text and "--weight_decay changes" in text
    checkpoint = load_checkpoint(Path(folder) / "last.pt")
    assert checkpoint["step"] == 10 and checkpoint["train_config"]["lr"] == 0.003
    assert checkpoint["optimizer"][0]["param_groups"][0]["weight_decay"] == 0.5
    assert "cannot change" in fails(main, "--resume", "--checkpoint_dir", folder, "--seed", "5")
    assert "--model_config" in fails(main, "--resume", "--checkpoint_dir", folder,
                                     "--model_config", "small")


def test_only_last_pt_can_be_resumed(settings, fails):
    main(argv(settings))
    folder = Path(settings["checkpoint_dir"])
    shutil.copy(folder / "best.pt", folder / "last.pt")
    assert "no optimizer state" in fails(main, "--resume", "--checkpoint_dir", folder)


# ---- what can go wrong ---------------------------------------------------------------------------

def test_a_non_finite_loss_stops_and_keeps_the_last_good_state(settings, fails, monkeypatch):
    real = diffusion.DiscreteDiffusion.loss
    calls = []

    def loss(self, model, batch):
        calls.append(1)
        return real(self, model, batch) * (math.nan if len(calls) == 6 else 1)
    monkeypatch.setattr(diffusion.DiscreteDiffusion, "loss", loss)
    error = fails(main, *argv(settings, save_every=2), status=1)
    assert "not finite at step 5" in error and "last.pt" in error
    good = load_checkpoint(Path(settings["checkpoint_dir"]) / "last.pt")
    assert good["step"] == 4
    assert all(torch.isfinite(value).all() for value in good["weights"].values())
    main(["--resume", "--checkpoint_dir", settings["checkpoint_dir"]])
    assert load_checkpoint(Path(settings["checkpoint_dir"]) / "final.pt")["step"] == 8


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_one_of_loss_and_gradient_not_finite_changes_no_weight(settings, monkeypatch, broken):
    trainer = Trainer(TrainConfig(**settings))
    trainer.steps.take()
    before = {name: value.clone() for name, value in trainer.network.model.state_dict().items()}
    if broken == "gradient":
        trainer.network.model.embedding.weight.register_hook(lambda gradient: gradient * math.nan)
    else:
        real = diffusion.DiscreteDiffusion.loss
        monkeypatch.setattr(diffusion.DiscreteDiffusion, "loss",
                            lambda *args: real(*args) + torch.tensor(math.inf))
    with pytest.raises(Stopped, match="not finite at step 1"):
        trainer.steps.take()
    assert trainer.progress.step == 1 and same(before, trainer.network.model.state_dict())


def test_broken_weights_never_replace_a_good_file(settings, fails, monkeypatch):
    real = Steps.update_average

    def update(self):
        real(self)
        if self.progress.step == 5:  # as if this very update had overflowed; step 6 would be saved
            self.network.model.embedding.weight.data[5, 5] = math.inf
    monkeypatch.setattr(Steps, "update_average", update)
    error = fails(main, *argv(settings, save_every=3), status=1)
    assert "weights are not finite after step 6" in error
    good = load_checkpoint(Path(settings["checkpoint_dir"]) / "last.pt")
    assert good["step"] == 3
    assert all(torch.isfinite(value).all() for value in good["weights"].values())


def test_fp16_overflow_skips_the_step(settings):
    trainer = Trainer(TrainConfig(**{**settings, "precision": "fp16"}))
    trainer.steps.scaler.load_state_dict({**trainer.steps.scaler.state_dict(), "scale": 2.0 ** 40})
    before = trainer.network.model.blocks[0].up.weight.clone()
    metrics = trainer.steps.take()
    assert not math.isfinite(metrics["grad_norm"]) and math.isfinite(metrics["loss"])
    assert torch.equal(trainer.network.model.blocks[0].up.weight, before)
    assert trainer.steps.scaler.get_scale() == 2.0 ** 39


def test_a_run_in_the_folder_is_kept(settings, fails):
    main(argv(settings))
    path = Path(settings["checkpoint_dir"]) / "last.pt"
    before = path.read_bytes()
    error = fails(main, *argv(settings))
    assert "--resume" in error and "--overwrite" in error and path.read_bytes() == before
    # --overwrite takes nothing away before the new run can start
    for changes in ({"device": "toaster"}, {"batch_tokens": 32}, {"data_dir": path}):
        fails(main, *argv(settings, overwrite=True, **changes))
        assert path.read_bytes() == before
    main(argv(settings, overwrite=True, seed=1))
    assert load_checkpoint(path)["train_config"]["seed"] == 1


def test_data_is_known_by_its_content(settings, data_dir, tmp_path, fails, monkeypatch):
    main(argv(settings))
    path = Path(settings["checkpoint_dir"]) / "last.pt"
    checkpoint = load_checkpoint(path)
    best = path.with_name("best.pt").read_bytes()
    # the same rows under another path, or the same path spelled otherwise: nothing begins again
    shutil.copytree(data_dir, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "copy", "./copy/", f"{data_dir}/."):
        trainer = Trainer(TrainConfig(**{**checkpoint["train_config"], "data_dir": str(name)}),
                          checkpoint)
        assert trainer.progress.best == checkpoint["best"]
        assert trainer.steps.loader.cursor == checkpoint["cursor"]
    # other rows of the same tokenizer: refused in one line, nothing touched
    meta = json.loads((tmp_path / "copy" / "meta.json").read_text())
    meta["splits"]["train"], meta["splits"]["val"] = (meta["splits"][name]
                                                      for name in ("val", "train"))
    (tmp_path / "copy" / "meta.json").write_text(json.dumps(meta))
    before = path.read_bytes()
    error = fails(main, "--resume", "--checkpoint_dir", settings["checkpoint_dir"], "--max_steps",
                  "20", "--data_dir", "copy")
    assert "other content" in error and "(train, val)" in error and "--data_dir" in error
    assert path.read_bytes() == before and path.with_name("best.pt").read_bytes() == best


def test_a_source_is_known_by_its_content(settings, tmp_path, fails, capsys):
    for name, animal in (("a", "cat"), ("b", "dog"), ("c", "cat")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("".join(
            f"Story {i} is about a {animal}.\n<|endoftext|>\n" for i in range(200)))
    changes = dict(data_dir=str(tmp_path / "data"), max_steps=1, overwrite=True)
    main(argv(settings, data_source=[str(tmp_path / "a" / "mine.txt")], **changes))
    main(argv(settings, data_source=[str(tmp_path / "c" / "mine.txt")], **changes))
    other = [str(tmp_path / "b" / "mine.txt")]
    error = fails(main, *argv(settings, data_source=other, **changes))
    assert "mine.txt" in error and "--data_dir" in error
    resumed = ["--resume", "--checkpoint_dir", settings["checkpoint_dir"], "--max_steps", "2",
               "--data_source"]
    assert "mine.txt" in fails(main, *resumed, *other)
    capsys.readouterr()
    main([*resumed, str(tmp_path / "c" / "mine.txt")])
    assert "--data_source changes" not in capsys.readouterr().out
    # stories of validation have no flag here: the training stories decide
    data_prep.main(["--source", str(tmp_path / "a" / "mine.txt"), "--valid_source", *other,
                    "--data_dir", str(tmp_path / "two")])
    main(argv(settings, data_source=[str(tmp_path / "a" / "mine.txt")], overwrite=True,
              max_steps=1, data_dir=str(tmp_path / "two")))


# ---- disks, locks and readers that go ------------------------------------------------------------

class FullDisk:
    """Lets `room` checkpoints be written, then no more until it is given room again."""

    def __init__(self, monkeypatch, room: int):
        self.room, self.tried = room, 0
        write = cli.files._Output.write

        def limited(output, data):
            if ".pt." in str(output.name) and self.room <= 0:
                self.tried += 1
                output.error = OSError(errno.ENOSPC, "No space left on device")
                raise output.error
            return write(output, data)
        monkeypatch.setattr(cli.files._Output, "write", limited)


def test_a_full_disk_ends_a_run_only_when_it_stays_full(settings, monkeypatch, capsys, fails):
    disk = FullDisk(monkeypatch, 0)
    folder = Path(settings["checkpoint_dir"])
    often = {**settings, "save_every": 2, "valid_every": 100}
    error = fails(main, *argv(often))  # no state at all: not begun
    assert "No space left" in error and "last.pt" in error
    assert not list(folder.glob("*.pt*"))
    # full at steps 2 and 3, free again at 4: the run goes on, and says what it could not write
    step = Steps.take

    def fill_up(steps):
        metrics = step(steps)
        disk.room = not 2 <= steps.progress.step <= 3
        return metrics
    monkeypatch.setattr(Steps, "take", fill_up)
    disk.room = 1
    main(argv(often, overwrite=True))
    assert "step 2: not written" in capsys.readouterr().err and disk.tried
    assert load_checkpoint(folder / "last.pt")["step"] == often["max_steps"]

    def stay_full(steps):
        metrics = step(steps)
        disk.room = steps.progress.step < 5
        return metrics
    monkeypatch.setattr(Steps, "take", stay_full)
    disk.room = 1
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main(argv(often, overwrite=True)))
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "not written" in error[0]
    assert error[-1].startswith("error: ") and "holds step 4" in error[-1]
    assert "--resume" in error[-1]
    assert load_checkpoint(folder / "last.pt")["step"] == 4 and not list(folder.glob("*.partial"))
    disk.room = 1
    monkeypatch.setattr(Steps, "take", step)
    left = folder / "last.pt.12345.partial"  # of a run that was killed
    left.touch()
    main(["--resume", "--checkpoint_dir", str(folder)])
    assert load_checkpoint(folder / "last.pt")["step"] == often["max_steps"]
    assert not left.exists()


def test_best_is_what_best_pt_holds(settings, monkeypatch):
    trainer = Trainer(TrainConfig(**settings))
    disk = FullDisk(monkeypatch, 0)
    trainer.validate()
    assert trainer.progress.best == math.inf and disk.tried
    disk.room = 1
    trainer.validate()
    assert trainer.progress.best < math.inf and (trainer.folder / "best.pt").exists()


@posix
def test_one_training_at_a_time_in_a_folder(settings, fails):
    main(argv(settings))
    folder = Path(settings["checkpoint_dir"])
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    code = ("import sys, time, cli\nwith cli.lock(sys.argv[1], '--checkpoint_dir'):\n"
            "    print('held', flush=True)\n    time.sleep(60)")
    holder = subprocess.Popen(python("-c", code, folder), cwd=ROOT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    for flags in (["--overwrite"], ["--resume", "--max_steps", "20"]):
        error = fails(main, *(argv(settings, overwrite=True) if flags == ["--overwrite"] else
                              [*flags, "--checkpoint_dir", str(folder)]))
        assert f"process {holder.pid}" in error and "--checkpoint_dir" in error
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == before
    holder.kill()  # leaves no lock behind
    holder.wait()
    main(argv(settings, overwrite=True))


def real_run(settings, **streams) -> subprocess.Popen:
    """train.py as a process of its own, with a size that exists there."""
    command = argv({**settings, "model_config": "micro"})
    return subprocess.Popen(python(ROOT / "train.py", *command), **streams)


@posix
def test_a_reader_that_goes_does_not_end_a_training(settings):
    process = real_run({**settings, "valid_every": 2}, stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1`
    assert process.wait(120) == 0, process.stderr.read()
    folder = Path(settings["checkpoint_dir"])
    assert load_checkpoint(folder / "final.pt")["step"] == settings["max_steps"]


@posix
def test_a_training_without_any_stream(settings):
    command = argv({**settings, "model_config": "micro", "max_steps": 2})
    line = f"{shlex.join(python(ROOT / 'train.py', *command))} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], timeout=120).returncode == 0
    assert load_checkpoint(Path(settings["checkpoint_dir"]) / "final.pt")["step"] == 2


@posix
@pytest.mark.parametrize("names", [["SIGHUP"], ["SIGTERM"], ["SIGTERM", "SIGHUP"]])
def test_a_terminal_that_closes_saves_and_stops(settings, names):
    number = getattr(signal, names[0])
    process = real_run({**settings, "max_steps": 100_000, "valid_every": 100_000,
                        "save_every": 100_000}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    folder = Path(settings["checkpoint_dir"])
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    for name in names:  # a service manager sends one after the other
        process.send_signal(getattr(signal, name))
        time.sleep(0.02)
    assert process.wait(60) == 128 + number
    step = load_checkpoint(folder / "last.pt")["step"]
    assert step > 0 and f"after step {step}" in process.stderr.read().decode()


@pytest.mark.parametrize("changes, message", [
    ({"model_config": "huge"}, "tiny, small, medium"), ({"max_steps": 0}, "--max_steps"),
    ({"batch_tokens": 32}, "--batch_tokens"), ({"dropout": 1.0}, "--dropout"),
    ({"lr": -1}, "--lr"), ({"resume": True}, "no .*last.pt"), ({"ema_decay": 1}, "--ema_decay"),
    ({"resume": True, "overwrite": True}, "exclude"), ({"device": "toaster"}, "--device"),
    ({"weight_decay": -1}, "--weight_decay"), ({"seed": 2**64}, "--seed"),
    ({"warmup_steps": -5}, "--warmup_steps"), ({"lr": "inf"}, "--lr"),
    ({"data_source": ["tinystories"]}, "was prepared from sample"),
    ({"sample_steps": 0}, "--sample_steps 0"), ({"sample_temperature": -1}, "--sample_temperature"),
    ({"t_min": 0.7, "t_max": 0.2}, "--t_min 0.7 --t_max 0.2"), ({"t_max": 1.5}, "--t_max 1.5"),
    ({"objective": "elbo", "t_min": 0.2}, "--objective elbo: a bound"),
    ({"objective": "autoregressive", "t_min": 0.1}, "--t_min: the twin writes"),
    ({"objective": "autoregressive", "schedule": "cosine"}, "--schedule: the twin writes")])
def test_bad_settings(settings, changes, message, fails):
    import re
    assert re.search(message, fails(main, *argv(settings, **changes)))
    assert not Path(settings["checkpoint_dir"]).exists()


@pytest.mark.parametrize("changes, times", [
    ({}, (0.2, 0.7)), ({"objective": "joint"}, (0.2, 0.7)), ({"t_max": 0.9}, (0.2, 0.9)),
    ({"objective": "elbo"}, (0, 1)), ({"schedule": "cosine"}, (0, 1)),
    ({"time_conditioning": "sinusoidal"}, (0, 1)), ({"t_min": 0, "t_max": 1}, (0, 1))])
def test_the_times_of_whole_rows(changes, times):
    """Those that were chosen, where they were chosen for."""
    assert TrainConfig(**changes).between == kind_of_run(TrainConfig(**changes)).between == times


@pytest.mark.parametrize("more", [{}, {"objective": "joint", "block_sizes": "causal,4"}])
def test_an_older_run_goes_on_with_all_times(settings, monkeypatch, more):
    main(argv(settings, max_steps=1, **more))
    last = Path(settings["checkpoint_dir"]) / "last.pt"
    contents = torch.load(last)
    for name in ("t_min", "t_max"):  # as it was written before there were any
        assert contents["train_config"].pop(name) is None
    torch.save(contents, last)
    seen = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (
        seen.append(self.network.kind.between), run(self)))
    main(["--resume", "--checkpoint_dir", settings["checkpoint_dir"], "--max_steps", "2"])
    assert seen == [(0, 1)] and load_checkpoint(last, None)["step"] == 2


def test_missing_data_is_prepared_from_its_source(settings, tmp_path, monkeypatch, capsys, fails):
    corpus = tmp_path / "own.txt"
    corpus.write_text("".join(f"Story {i} is about a cat.\n<|endoftext|>\n" for i in range(200)))
    changes = dict(data_dir=str(tmp_path / "new"), data_source=[str(corpus)], max_steps=2)
    main(argv(settings, **changes))
    assert "preparing it from" in capsys.readouterr().out
    assert rows.load_meta(tmp_path / "new")["source"] == "own.txt"
    # by default that source is the hub, which may be out of reach
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError
    monkeypatch.setattr(datasets, "load_dataset", offline)
    fails(main, *argv(settings, data_dir=str(tmp_path / "none"),
                      checkpoint_dir=str(tmp_path / "run2")))
    assert not (tmp_path / "none").exists()


def test_the_data_of_another_tokenizer_is_refused(settings, long_data_dir, fails):
    main(argv(settings))
    error = fails(main, "--resume", "--checkpoint_dir", settings["checkpoint_dir"], "--data_dir",
                  long_data_dir)
    assert "another tokenizer" in error


def test_a_truncated_shard_is_refused(settings, tmp_path, fails):
    copy = tmp_path / "copy"
    shutil.copytree(settings["data_dir"], copy)
    path = copy / "train_00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert "truncated" in fails(main, *argv(settings, data_dir=str(copy)))


def test_a_read_only_output_folder(settings, tmp_path):
    """As a real process that has no right to write there; root is asked to drop its override."""
    if sys.platform == "win32":
        pytest.skip("folder permissions work differently on Windows")
    prefix = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("runs as root and there is no setpriv to become a plain user with")
        prefix = ["setpriv", "--bounding-set=-dac_override"]
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    commands = {
        "--checkpoint_dir": ["train.py", *argv(settings, checkpoint_dir=str(folder))],
        "--data_dir": ["data_prep.py", "--source", "sample", "--data_dir", folder / "data"]}
    for flag, command in commands.items():
        command = [*prefix, *python(ROOT / command[0], *command[1:])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and flag in done.stderr
    assert os.listdir(folder) == []


# ---- options -------------------------------------------------------------------------------------

def test_quick_uses_its_own_folder_and_may_be_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "QUICK_DATA", dict(vocab_size=300, seq_len=64, max_stories=200))
    for _ in range(2):
        main(["--quick", "--max_steps", "2", "--sample_steps", "2", "--batch_tokens", "256"])
    assert os.listdir(tmp_path) == ["quick_run"]
    text = capsys.readouterr().out
    assert text.count("preparing it from sample") == 1  # the data are kept
    assert text.count("  | ") == 2 * 3
    # a folder of the user's is not overwritten just because of --quick
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "last.pt").touch()
    with pytest.raises(UserError, match="already holds a run"):
        main(["--quick", "--checkpoint_dir", "mine", "--max_steps", "2"])


def test_compile_is_asked_for_or_decided_by_the_length_of_the_run(settings, monkeypatch, capsys,
                                                                  fails):
    asked, reason = [], None
    monkeypatch.setattr(building, "compile_blocks", lambda model, *args: asked.append(
        model) or reason)
    trainer = Trainer(TrainConfig(**settings, compile=True))
    assert asked == [trainer.network.model] and trainer.network.compiled
    assert not Trainer(TrainConfig(**settings)).network.compiled
    long = {**settings, "max_steps": 1000}
    assert not Trainer(TrainConfig(**long, compile=False)).network.compiled
    assert len(asked) == 1
    assert Trainer(TrainConfig(**long)).network.compiled and len(asked) == 2
    # where it does not work: a reason, and a run all the same if nobody insisted
    reason = "no compiler here"
    assert not Trainer(TrainConfig(**long)).network.compiled
    assert "not compiled" in (text := capsys.readouterr().out) and reason in text
    assert reason in fails(main, *argv(settings, compile=True))


def wandb_here(monkeypatch, init, mode="online", url="https://wandb.example"):
    """A stand-in for the package, and none of the user's settings."""
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_PROJECT", "WANDB_DIR", "https_proxy",
                 "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    settings = types.SimpleNamespace(mode=mode, base_url=url)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=init, setup=lambda: types.SimpleNamespace(settings=settings)))


@pytest.mark.parametrize("online", [True, False])
def test_wandb_gets_the_metrics(settings, monkeypatch, online, capsys):
    logged, finished = [], []
    run = types.SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)),
                                finish=lambda: finished.append(True))
    modes = []
    wandb_here(monkeypatch, lambda **kwargs: modes.append(kwargs["mode"]) or run)

    def connect(*args, **kwargs):
        if not online:
            raise OSError
        return types.SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(log.socket, "create_connection", connect)
    main(argv(settings, wandb=True))
    assert modes == ["online" if online else "offline"] and finished == [True]
    assert {step for step, metrics in logged if "valid_nelbo" in metrics} == {4, 8}
    assert ("offline" in capsys.readouterr().out) is not online


def test_wandb_without_a_login_is_one_line(settings, monkeypatch, fails):
    def init(**kwargs):
        raise RuntimeError("api_key not configured")
    wandb_here(monkeypatch, init)
    monkeypatch.setattr(log, "reachable", lambda url: True)
    assert "wandb login" in fails(main, *argv(settings, wandb=True))


def test_the_users_wishes_for_wandb_count(monkeypatch, tmp_path, capsys):
    asked, looked = [], []

    def connect(address, timeout):
        looked.append(address)
        raise OSError
    monkeypatch.setattr(log.socket, "create_connection", connect)

    def start(**setup):
        asked.clear()
        looked.clear()
        wandb_here(monkeypatch, lambda **kwargs: asked.append(kwargs) or "run", **setup)

    # a mode that was asked for is never replaced, and nobody is asked whether he is there
    for mode in ("online", "offline", "disabled", "shared"):
        start()
        monkeypatch.setenv("WANDB_MODE", mode)
        assert log.start_wandb({}, tmp_path) == "run"
        assert asked[0]["mode"] is None and not looked
    start(mode="disabled")  # of wandb's own settings file
    log.start_wandb({}, tmp_path)
    assert asked[0]["mode"] == "disabled" and not looked
    # told not to send: not even the package is asked
    for value in ("true", "1"):
        start()
        monkeypatch.setenv("WANDB_DISABLED", value)
        assert log.start_wandb({}, tmp_path) is None and not asked and not looked
    assert "WANDB_DISABLED" in capsys.readouterr().out
    # a server of one's own, and what a proxy reaches
    start(url="http://localhost:8080")
    log.start_wandb({}, tmp_path)
    assert looked == [("localhost", 8080)] and asked[0]["mode"] == "offline"
    start()
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    log.start_wandb({}, tmp_path)
    assert asked[0]["mode"] == "online" and not looked
    start()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    log.start_wandb({}, tmp_path)
    assert asked[0]["project"] == "mine"


def test_every_option_lands_in_the_checkpoint(settings):
    main(argv(settings, max_steps=1))
    stored = load_checkpoint(Path(settings["checkpoint_dir"]) / "final.pt")["train_config"]
    assert set(stored) == {field.name for field in dataclasses.fields(TrainConfig)}
