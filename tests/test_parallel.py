"""Real processes with gloo: any number of them takes the same steps as one."""

from cli import Stopped

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import two_processes
from conftest import ROOT, python

from kinds.checkpoints import load_checkpoint
from training import optimizers
from training.processes import Processes, joined

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs gloo on Windows")
# Sums over two processes are rounded in another order, in FP32, and the steps carry that on.
TOLERANCE = dict(rtol=2e-5, atol=0)
LONGER = ("--max_steps", "16")


def settings(data_dir: Path, folder: Path, *more: object) -> list[object]:
    return ["--data_dir", data_dir, "--checkpoint_dir", folder, "--model_config", "micro",
            "--batch_tokens", 512, "--valid_every", 6, "--valid_rows", 20, "--num_samples", 1,
            "--sample_steps", 3, "--log_every", 1, "--device", "cpu", "--precision", "fp32",
            "--save_every", 4, *more]


def torchrun(count: int, *argv: object) -> list[str]:
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count,
                  ROOT / "train.py", *argv)


def call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def curve(folder: Path, key: str = "loss") -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory) -> dict[str, Path]:
    """The same 12 steps alone, on two processes, on two with accumulation, and with FSDP2."""
    base = tmp_path_factory.mktemp("runs")
    call(python(ROOT / "train.py", *settings(data_dir, base / "one", "--max_steps", 12)))
    for name, more in (("ddp", []), ("accumulated", ["--grad_accum_steps", 3]),
                       ("fsdp", ["--fsdp", "--grad_accum_steps", 2])):
        text = call(torchrun(2, *settings(data_dir, base / name, "--max_steps", 12, *more)))
        assert "in 2 processes" in text and text.count("trained 12 steps") == 1
    shutil.copytree(base / "one", base / "longer")
    call(python(ROOT / "train.py", "--resume", "--checkpoint_dir", base / "longer", *LONGER))
    return {name: base / name for name in ("one", "longer", "ddp", "accumulated", "fsdp")}


@pytest.mark.parametrize("name", ["ddp", "accumulated", "fsdp"])
def test_two_processes_take_the_steps_of_one(runs, name):
    for key in ("loss", "grad_norm", "valid_nelbo", "valid_masked_ce"):
        alone, together = (curve(runs[which], key) for which in ("one", name))
        assert len(alone) == len(together) > 1
        np.testing.assert_allclose(together, alone, **TOLERANCE)
    assert curve(runs[name], "tokens") == curve(runs["one"], "tokens")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_checkpoints_hold_the_whole_model_of_either(runs, name):
    alone, together = (load_checkpoint(runs[which] / "last.pt") for which in ("one", name))
    assert together["processes"] == 2 and together["cursor"] == alone["cursor"]
    for key in ("weights", "ema"):
        for parameter, value in alone[key].items():
            torch.testing.assert_close(together[key][parameter], value, rtol=1e-3, atol=1e-4)
    for one, two in zip(alone["optimizer"], together["optimizer"], strict=True):
        assert one["state"].keys() == two["state"].keys()
        for index, values in one["state"].items():
            for what, value in values.items():
                assert two["state"][index][what].shape == value.shape


@pytest.mark.parametrize("start, count, more", [
    ("ddp", 1, []), ("fsdp", 1, []), ("one", 2, []), ("ddp", 2, ["--fsdp"])])
def test_any_number_of_processes_goes_on_from_a_checkpoint(runs, tmp_path, start, count, more):
    """Twelve steps and four: the same as sixteen."""
    folder = tmp_path / "run"
    shutil.copytree(runs[start], folder)
    argv = ["--resume", "--checkpoint_dir", folder, *LONGER, *more]
    call(torchrun(count, *argv) if count > 1 else python(ROOT / "train.py", *argv, "--no-fsdp"))
    np.testing.assert_allclose(curve(folder), curve(runs["longer"]), **TOLERANCE)


def start_two(data_dir: Path, folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """A run of two processes that has saved something, and the ids of the two."""
    command = torchrun(2, *settings(data_dir, folder, "--max_steps", 5000, "--no-compile"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (
            not (folder / "metrics.jsonl").exists() or len(curve(folder)) < 6):
        time.sleep(0.05)
    workers = [int(pid) for pid in Path(
        f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) == 2
    return process, workers


def test_a_lost_process_stops_all_with_a_message_and_nothing_is_lost(data_dir, tmp_path):
    folder = tmp_path / "run"
    process, workers = start_two(data_dir, folder)
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    # torchrun itself tells the survivor to stop, which may come first
    assert "lost contact with another process" in errors or "stopped after step" in errors
    assert load_checkpoint(folder / "last.pt")["step"] >= 4
    call(python(ROOT / "train.py", "--resume", "--checkpoint_dir", folder, "--max_steps", 12))
    assert load_checkpoint(folder / "final.pt")["step"] >= 12


def test_told_to_stop_one_process_stops_all_after_the_same_step(data_dir, tmp_path):
    folder = tmp_path / "run"
    process, workers = start_two(data_dir, folder)
    os.kill(workers[1], signal.SIGINT)  # not the one that writes
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    stops = set(re.findall(r"stopped after step (\d+)", errors))
    assert len(stops) == 1 and "lost contact" not in errors
    assert load_checkpoint(folder / "last.pt")["step"] == int(stops.pop())


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory) -> tuple[dict, dict]:
    """The figures and the weights of all that two_processes.py does, in one start."""
    folder = tmp_path_factory.mktemp("two")
    call(python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                Path(two_processes.__file__), data_dir, folder))
    return (json.loads((folder / "result.json").read_text()),
            torch.load(folder / "weights.pt", weights_only=True))


def alone(data_dir, tmp_path, case: str) -> tuple[dict, dict]:
    changes = {**two_processes.CASES[case], "fsdp": False}
    return two_processes.steps(str(data_dir), str(tmp_path), Processes(), **changes)


@pytest.mark.parametrize("case", two_processes.CASES)
def test_two_processes_hold_the_same_bits_in_every_recipe(two, case):
    result, weights = two
    assert result[case]["same"]
    assert all(value.isfinite().all() for value in weights[case].values())


@pytest.mark.parametrize("case, tolerance", [("adamw", 2e-5), ("bf16", 5e-3),
                                             ("bf16 spread", 5e-3), ("joint", 2e-5)])
def test_two_processes_take_the_steps_of_one_in_other_recipes(two, data_dir, tmp_path, case,
                                                              tolerance):
    figures, _ = alone(data_dir, tmp_path, case)
    for key, values in figures.items():
        np.testing.assert_allclose(two[0][case][key], values, rtol=tolerance)


def test_dropout_in_two_processes_is_seeded_differs_and_compiles(two, data_dir, tmp_path):
    result, weights = two
    # each of the two drops something else, and again the same with the same seed
    assert len(set(result["seeds"])) == 2
    assert result["dropout again"] == result["dropout"]
    for name, value in weights["dropout"].items():
        assert torch.equal(weights["dropout again"][name], value)
    # spread weights and compiled blocks make no difference
    for case in ("dropout spread", "compiled"):
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(result[case][key], result["dropout"][key], rtol=1e-4)
    # (the first loss is that of a network whose blocks add nothing yet)
    figures, _ = alone(data_dir, tmp_path, "adamw")
    np.testing.assert_allclose(result["dropout"]["loss"][0], figures["loss"][0], rtol=1e-5)
    assert result["dropout"]["loss"][-1] < result["dropout"]["loss"][0]


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.01)])
def test_two_processes_share_muons_work(two, precision, tolerance):
    result, weights = two
    expected = two_processes.muon(precision)
    for kind in ("", " spread"):
        name = f"muon {precision}{kind}"
        assert result[name]["same"]
        for a, b in zip(weights[name], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_every_process_orthogonalises_its_share_only(monkeypatch):
    """As one of three: it works on its matrices, and takes the others' from the others."""
    worked_on = []
    monkeypatch.setattr(optimizers, "orthogonalise", lambda x: worked_on.append(len(x)) or x)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)

    def all_gather(gathered, mine):
        for rank, part in enumerate(gathered):
            part.fill_(rank)
        gathered[1].copy_(mine)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    params = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(8)]
    for i, p in enumerate(params):
        p.grad = torch.full((4, 4), 10.0 + i)
    optimizer = optimizers.Muon(params, lr=1 / 0.4, momentum=0.0)
    optimizer.step()
    assert worked_on == [3]  # of 3, 3 and 2
    moved = [-int(p[0, 0]) for p in params]
    assert moved == [0, 0, 0, 13, 14, 15, 2, 2]


def test_fsdp_needs_several_processes(data_dir, tmp_path, fails):
    import train
    error = fails(train.main, *settings(data_dir, tmp_path / "run", "--fsdp"))
    assert "torchrun" in error and not (tmp_path / "run").exists()


# ---- the pieces ----------------------------------------------------------------------------------

def test_rows_are_dealt_out_once_and_every_process_has_as_many_parts():
    for count, world, parts in ((7, 2, 1), (7, 2, 3), (1, 2, 2), (5, 4, 3), (6, 1, 4), (2, 1, 4)):
        dealt = [list(Processes(rank, world).own_rows(count, parts)) for rank in range(world)]
        rows = [int(row) for own in dealt for part, factor in own if factor for row in part]
        assert sorted(rows) == list(range(count))
        assert all(factor in (0.0, float(world)) for own in dealt for _, factor in own)
        assert len({len(own) for own in dealt}) == 1


def test_batches_are_dealt_out_evenly_and_joined_without_repeats():
    batches = [np.arange(3 * i, 3 * i + 3) for i in range(5)]
    columns = []
    for rank in range(3):
        own = Processes(rank, 3).own(batches)
        assert len(own) == 2
        rows = np.concatenate(own)
        columns.append([rows, rows * 10.0])
    rows, values = joined(columns)
    assert rows.tolist() == list(range(15)) and values.tolist() == [10.0 * i for i in range(15)]
    assert Processes().own([]) == []


def test_only_a_broken_connection_is_called_one():
    with pytest.raises(Stopped, match="rank 1 lost contact .*; try again"):
        with Processes(1, 2).losing_one_is_no_bug(lambda: "try again"):
            raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    for processes, text in ((Processes(1, 2), "shapes differ"), (Processes(), "gloo")):
        with pytest.raises(RuntimeError, match=text):
            with processes.losing_one_is_no_bug(str):
                raise RuntimeError(text)


def test_two_processes_train_a_condition_as_one_does(data_dir, runs, tmp_path):
    call(python(ROOT / "prep_conditional_data.py", "--data_dir", data_dir, "--output_dir",
                tmp_path / "pairs"))
    argv = settings(tmp_path / "pairs", tmp_path / "one", "--max_steps", 8, "--stage", 2,
                    "--decoder_checkpoint", runs["one"] / "last.pt", "--lora_rank", 2)
    at = argv.index("--model_config")
    del argv[at:at + 2]  # a later stage goes on with the model that it is given
    call(python(ROOT / "train.py", *argv))
    for name, more in (("ddp", []), ("fsdp", ["--fsdp"])):
        argv[argv.index("--checkpoint_dir") + 1] = tmp_path / name
        call(torchrun(2, *argv, *more))
        for key in ("loss", "grad_norm", "valid_nelbo"):
            alone, together = (curve(tmp_path / which, key) for which in ("one", name))
            assert len(alone) == len(together) > 1
            np.testing.assert_allclose(together, alone, **TOLERANCE)
