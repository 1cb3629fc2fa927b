"""Shared fixtures: a small data folder, a small checkpoint, a network that can be enumerated.

Each process has one thread: that is quickest for the small networks of the tests, and the more so
where several workers (pytest-xdist) share the cores.
"""

import cli

import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import export_jetson
import model
import prep_conditional_data
import prep_image_data
import train
from corpus.tokens import BOS, EOS, MASK, PAD
from data_prep import DataConfig, prepare
from kinds import checkpoints
from model import ConditionalTransformer
from network import layers
from network.attention import GATE_SPEED, take
from network.encoders import TextEncoder
from training import config, trainer

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that are started
ROOT = Path(__file__).parent.parent
SMALL = layers.ModelConfig(width=32, heads=2, layers=2)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For a whole folder one worker more than there are cores, for some tests wait; for single
    files and tests none, as each worker takes seconds to read torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores + 1, 8) if all(Path(arg).is_dir() for arg in config.args) else 0


@pytest.fixture(autouse=True)
def quiet_bars(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@contextmanager
def alone(path: Path):
    """Waits until no other worker is between these lines for that path."""
    with open(path.with_suffix(".lock"), "w") as file:
        while True:
            try:
                cli.lock_file(file)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable:
    """Gives this worker a folder of its own as `make(folder)` fills it: the first worker that asks
    for that name has it made, the others get a copy."""

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder = tmp_path_factory.mktemp("shared") / name
        if not WORKER:
            make(folder)
            return folder
        kept = tmp_path_factory.getbasetemp().parent / name
        with alone(kept):
            if kept.exists():
                shutil.copytree(kept, folder)
            else:
                make(folder)
                shutil.copytree(folder, kept.with_suffix(".copy"), dirs_exist_ok=True)
                kept.with_suffix(".copy").rename(kept)
        return folder

    return folder_of


@pytest.fixture(scope="session", autouse=True)
def quick_trainings():
    """What the small trainings of this process would spend most of their time on: how fast matrix
    products are is measured once, and the parts of a figure keep the places where they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "peak_flops", functools.cache(
            functools.partial(trainer.peak_flops, seconds=0.05)))
        patch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute",
                      lambda engine, figure: None)
        yield


def made_up_data(path: Path, **settings) -> Path:
    prepare(DataConfig(source=["sample"], data_dir=str(path), **settings))
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Made-up stories, 300 tokens of vocabulary, rows of 64: most stories take two or three."""
    return made_up_data(tmp_path_factory.mktemp("shared") / "data", max_stories=300,
                        vocab_size=300, seq_len=64, valid_fraction=0.1)


@pytest.fixture(scope="session")
def long_data_dir(tmp_path_factory) -> Path:
    """The same with rows long enough for whole stories, and no test split."""
    return made_up_data(tmp_path_factory.mktemp("shared") / "data", max_stories=120,
                        vocab_size=400, seq_len=256, valid_fraction=0.2, test_fraction=0.0)


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    """The size "tiny" is a toy in all tests of this process; real sizes have their own tests."""
    monkeypatch.setitem(model.MODEL_CONFIGS, "tiny", SMALL)


@pytest.fixture(scope="session")
def checkpoint(long_data_dir, tmp_path_factory) -> Path:
    """best.pt of a toy model after some steps on `long_data_dir`."""
    folder = tmp_path_factory.mktemp("shared") / "checkpoints"
    sizes = {**model.MODEL_CONFIGS, "tiny": SMALL}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "MODEL_CONFIGS", sizes)
        patch.setattr(config, "MODEL_CONFIGS", sizes)
        trainer.Trainer(config.TrainConfig(
            data_dir=str(long_data_dir), checkpoint_dir=str(folder), model_config="tiny",
            max_steps=12, batch_tokens=1024, precision="fp32", device="cpu", valid_every=6,
            valid_rows=8, num_samples=0, t_min=0.0, t_max=1.0)).run()
    return folder / "best.pt"


def stop_after(run: trainer.Trainer, steps: int) -> None:
    """Takes the steps of a training, which a SIGTERM stops after so many."""
    take = run.steps.take

    def and_stop():
        if run.progress.step == steps - 1:
            run.stop_signal = 15
        return take()
    run.steps.take = and_stop
    with pytest.raises(cli.Stopped, match=f"stopped after step {steps}"):
        run.run()


def as_joint(plain: Path, path: Path) -> Path:
    """Writes a joint checkpoint with the weights of a plain one."""
    source = checkpoints.load_checkpoint(plain)
    checkpoints.save_checkpoint(
        path, checkpoints.model_from_checkpoint(source), source["tokenizer"],
        source["length_histogram"], "joint", ema=None, step=1,
        train_config=source["train_config"] | {"objective": "joint", "block_sizes": "4,row"})
    return path


@pytest.fixture(scope="session")
def pairs_dir(long_data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "pairs"
    prep_conditional_data.main(["--data_dir", str(long_data_dir), "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="session")
def conditional_checkpoint(checkpoint, pairs_dir, tmp_path_factory):
    """That of a toy model whose cross-attention counts."""
    source = checkpoints.load_checkpoint(checkpoint)
    torch.manual_seed(5)
    plain = checkpoints.model_from_checkpoint(source)
    network = ConditionalTransformer(plain.config, TextEncoder(dataclasses.replace(
        plain.config, max_len=32, layers=1)))
    network.load_decoder(plain.state_dict())
    network.start_encoder()
    for block in network.blocks:
        torch.nn.init.normal_(block.cross.out.weight, std=0.3)
        torch.nn.init.constant_(block.cross.gate, 1 / GATE_SPEED)
    path = tmp_path_factory.mktemp("shared") / "conditional.pt"
    checkpoints.save_checkpoint(
        path, network, source["tokenizer"], source["length_histogram"], ema=None, step=1,
        train_config=source["train_config"] | {"data_dir": str(pairs_dir)})
    return path


@pytest.fixture(scope="session")
def sharp_checkpoint(checkpoint, tmp_path_factory):
    """A toy model that is surer of some tokens than of others: rounding must not decide anything.
    """
    source = checkpoints.load_checkpoint(checkpoint)
    model = checkpoints.model_from_checkpoint(source)
    torch.manual_seed(9)
    torch.nn.init.normal_(model.embedding.weight, std=0.35)
    for name, weight in model.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            torch.nn.init.normal_(weight, std=0.2)
    path = tmp_path_factory.mktemp("shared") / "sharp.pt"
    checkpoints.save_checkpoint(
        path, model, source["tokenizer"], source["length_histogram"], ema=None, step=1,
        train_config=source["train_config"], licence="none")
    return path


@pytest.fixture(scope="session")
def joint_checkpoint(sharp_checkpoint, tmp_path_factory):
    """The same weights as a joint model's, which ends its stories more often and has a head for its
    drafts, of which nothing is true."""
    source = checkpoints.load_checkpoint(sharp_checkpoint)
    source["model_config"]["draft_rank"] = 3
    width = source["model_config"]["width"]
    generator = torch.Generator().manual_seed(0)
    shapes = {"read.weight": (3, width), "mix.weight": (6, 6), "back.weight": (3, 6),
              "tell.weight": (3, 3), "before.weight": (3, width), "behind.weight": (3, width)}
    source["weights"] |= {f"draft.{name}": torch.randn(shape, generator=generator) / 3
                          for name, shape in shapes.items()}
    network = checkpoints.model_from_checkpoint(source)
    with torch.no_grad():
        network.embedding.weight[[PAD, EOS]] *= 1.6
    path = tmp_path_factory.mktemp("shared") / "joint.pt"
    checkpoints.save_checkpoint(
        path, network, source["tokenizer"], source["length_histogram"], kind="joint", ema=None,
        step=1, train_config=source["train_config"] | {"objective": "joint",
                                                       "block_sizes": "4,16,row"})
    return path


@pytest.fixture(scope="session")
def picture_dir(long_data_dir, tmp_path_factory):
    """Two sentences about each of the pictures of tests/data/emoji."""
    folder, emoji = tmp_path_factory.mktemp("pictures"), ROOT / "tests/data/emoji"
    lines = [json.loads(line) for line in (emoji / "pairs.jsonl").read_text().splitlines()]
    with open(folder / "pairs.jsonl", "w") as file:
        for i, line in enumerate(lines):
            shutil.copy(emoji / line["image"], folder / f"{i}.png")
            for k in range(2):
                file.write(json.dumps({"image": f"{i}.png", "story": line["name"], "text": (
                    "Once upon a time there was a ", "Look at the ")[k] + line["name"] + ".",
                    "split": "val" if i % 3 == 0 else "train"}) + "\n")
    prep_image_data.main(["--pairs", str(folder / "pairs.jsonl"), "--data_dir", str(long_data_dir),
                          "--output_dir", str(folder / "data"), "--image_size", "16"])
    return folder / "data"


@pytest.fixture(scope="session")
def picture_checkpoint(joint_checkpoint, picture_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("picture_run")
    train.main(["--stage", "2", "--objective", "joint", "--decoder_checkpoint",
                str(joint_checkpoint), "--data_dir", str(picture_dir), "--checkpoint_dir",
                str(folder / "run"), "--lora_rank", "2", "--max_steps", "6", "--encoder_config",
                "micro", "--batch_tokens", "512",
                "--valid_every", "3", "--valid_rows", "8", "--num_samples", "1", "--sample_steps",
                "2", "--device", "cpu", "--precision", "fp32"])
    return folder / "run/best.pt"


@pytest.fixture(scope="session")
def joint_bundle(joint_checkpoint, long_data_dir, once):
    return once("joint", lambda folder: export_jetson.main([
        "--checkpoint", str(joint_checkpoint), "--data_dir", str(long_data_dir), "--out_dir",
        str(folder), "--report_rows", "3", "--calibration_rows", "4", "--cached_tokens", "8"]))


@pytest.fixture(scope="session")
def joint_pairs_bundle(joint_checkpoint, once):
    """Whose cached graph takes two rows."""
    return once("joint_pairs", lambda folder: export_jetson.main([
        "--checkpoint", str(joint_checkpoint), "--out_dir", str(folder), "--batch", "2",
        "--precisions", "fp32", "--report_rows", "0"]))


@pytest.fixture(scope="session")
def bundle(sharp_checkpoint, long_data_dir, once):
    return once("bundle", lambda folder: export_jetson.main([
        "--checkpoint", str(sharp_checkpoint), "--data_dir", str(long_data_dir), "--out_dir",
        str(folder), "--report_rows", "6", "--calibration_rows", "6"]))


@pytest.fixture(scope="session")
def dynamic_bundle(conditional_checkpoint, once):
    return once("dynamic", lambda folder: export_jetson.main([
        "--checkpoint", str(conditional_checkpoint), "--out_dir", str(folder), "--dynamic",
        "--report_rows", "3", "--precisions", "fp32", "--batch", "3"]))


@pytest.fixture(scope="session")
def twin(long_data_dir, once):
    return once("twin", lambda folder: train.main([
        "--objective", "autoregressive", "--model_config", "tiny", "--max_steps", "4", "--data_dir",
        str(long_data_dir), "--checkpoint_dir", str(folder), "--device", "cpu", "--batch_tokens",
        "1024", "--num_samples", "0", "--valid_rows", "8"])) / "best.pt"


@pytest.fixture
def fails(capsys):
    """Calls a script's main as its command line would; asserts exit 2 and one line on stderr."""

    def call(main, *argv: object, status: int = 2) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: main([str(arg) for arg in argv]))
        error = capsys.readouterr().err
        assert stop.value.code == status
        assert len(error.strip().splitlines()) == 1 and error.startswith("error: "), error
        return error

    return call


class TableModel(nn.Module):
    """A network over rows [BOS] x1 x2 x3 [EOS] of an alphabet of 3: one table of probabilities.

    Random, and with no joint distribution behind it, so that every order matters.
    """

    ALPHABET = (4, 5, 6)

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        # [what each of the 3 positions holds: hidden or a letter][position][letter]
        logits = 1.5 * torch.randn(4, 4, 4, 3, 3, generator=generator, dtype=torch.float64)
        self.register_buffer("table", logits)

    def hidden(self, tokens, t=None, context=None, at=None):
        inner = tokens[:, 1:4]
        index = torch.where(inner == MASK, 0, inner - 3)  # (B, 3): 0 hidden, 1..3 letters
        letters = self.table[index[:, 0], index[:, 1], index[:, 2]]  # (B, 3, 3)
        logits = torch.full((*tokens.shape, 7), -torch.inf, dtype=self.table.dtype)
        logits[:, 1:4, 4:] = letters
        logits[:, [0, 4]] = 0.0  # nothing asks for the ends, but a network has numbers there too
        return logits if at is None else take(logits, at)

    def head(self, hidden):
        return hidden

    def scores(self, hidden, targets):
        return F.cross_entropy(hidden, targets, reduction="none"), hidden.argmax(-1) == targets

    def loss(self, hidden, targets, row_weights):
        return (self.scores(hidden, targets)[0] * row_weights).sum()

    def probabilities(self, row: tuple) -> np.ndarray:
        """(3, 3): distribution of the letter at each position of `row` (letters or MASK)."""
        tokens = torch.tensor([[BOS, *row, EOS]])
        return self.hidden(tokens)[0, 1:4, 4:].softmax(-1).numpy()


@pytest.fixture
def table_model() -> TableModel:
    return TableModel().eval()


def all_rows():
    return list(itertools.product(TableModel.ALPHABET, repeat=3))


def chi_squared_p(observed: np.ndarray, expected: np.ndarray) -> float:
    """p-value of Pearson's test; cells of expectation below 5 are joined into one."""
    small = expected < 5
    observed = np.append(observed[~small], observed[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    if expected[-1] == 0:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def python(*argv: object) -> list[str]:
    return [sys.executable, *map(str, argv)]
