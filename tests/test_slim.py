"""A checkpoint that holds nothing but what writes stories."""

import json

import pytest
import torch
from conftest import as_joint

import generate
from kinds.checkpoints import load_checkpoint, model_from_checkpoint
from train import main as train
from training.slim import main


@pytest.fixture
def small(checkpoint, tmp_path, capsys):
    path = tmp_path / "small.pt"
    main(["--checkpoint", str(checkpoint), "--output", str(path)])
    capsys.readouterr()
    return path


def test_it_holds_the_averaged_weights_in_bf16_and_no_folders(small, checkpoint):
    whole, contents = load_checkpoint(checkpoint), load_checkpoint(small)
    assert "optimizer" not in contents and "ema" not in contents and "command" not in contents
    assert not {"data_dir", "checkpoint_dir", "data_source"} & contents["train_config"].keys()
    averaged = model_from_checkpoint(whole).state_dict()
    for name, weight in model_from_checkpoint(contents).state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, averaged[name].bfloat16().float()), name
    # embedding and head are one matrix, here too
    used = sum(w.numel() for n, w in averaged.items() if n != "vocabulary.weight")
    assert small.stat().st_size < 2 * used + len(contents["tokenizer"]) + 60_000


def test_it_writes_and_begins_a_training(small, checkpoint, long_data_dir, tmp_path, capsys, fails):
    generate.main(["--checkpoint", str(small), "--num_samples", "1", "--steps", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["text"]
    settings = ["--data_dir", str(long_data_dir), "--model_config", "tiny", "--batch_tokens", "512",
                "--max_steps", "2", "--valid_rows", "8", "--num_samples", "0", "--device", "cpu",
                "--precision", "fp32"]
    train([*settings, "--init_from", str(small), "--checkpoint_dir", str(tmp_path / "on")])
    assert (tmp_path / "on/best.pt").is_file()
    (tmp_path / "run").mkdir()
    small.rename(tmp_path / "run/last.pt")
    assert "optimizer" in fails(train, "--resume", "--checkpoint_dir", str(tmp_path / "run"))


def test_of_a_joint_model_too(checkpoint, tmp_path):
    path = as_joint(checkpoint, tmp_path / "joint.pt")
    main(["--checkpoint", str(path), "--output", str(tmp_path / "small.pt")])
    assert load_checkpoint(tmp_path / "small.pt", "joint")["kind"] == "joint"


def test_mistakes(checkpoint, tmp_path, fails):
    assert "name both" in fails(main, "--checkpoint", checkpoint)
    assert "no checkpoint" in fails(main, "--checkpoint", tmp_path / "x.pt", "--output", "y.pt")
    for place in (tmp_path, tmp_path / "missing/x.pt"):
        assert "--output" in fails(main, "--checkpoint", checkpoint, "--output", place)
