"""A new kind of model, a new encoder and a new kernel: one class, one entry, and nothing else."""

import json
import shutil

import numpy as np
import pytest
import torch
from toys import HalfMasked, LengthEncoder, PlacedTransformer

import evaluate
import export_jetson
import generate
import train
from kinds import registry
from kinds.checkpoints import load_checkpoint, model_from_checkpoint
from network import attention, encoders

SHORT = ["--batch_tokens", "512", "--valid_every", "3", "--valid_rows", "8", "--num_samples", "1",
         "--sample_steps", "2", "--device", "cpu", "--precision", "fp32"]


def test_a_toy_kind_is_trained_evaluated_and_writes(long_data_dir, tmp_path, monkeypatch, capsys,
                                                    fails):
    monkeypatch.setitem(registry.KINDS, HalfMasked.name, HalfMasked)
    monkeypatch.chdir(tmp_path)
    argv = ["--data_dir", str(long_data_dir), "--checkpoint_dir", "toy", "--model_config", "tiny",
            "--objective", "half_masked", *SHORT]
    train.main([*argv, "--max_steps", "3"])
    train.main(["--resume", "--checkpoint_dir", "toy", "--max_steps", "6"])
    checkpoint = load_checkpoint("toy/best.pt", kind="half_masked")
    model = model_from_checkpoint(checkpoint)
    assert isinstance(model, PlacedTransformer) and model.places.abs().max() > 0
    assert load_checkpoint("toy/last.pt", kind=None)["step"] == 6
    error = fails(train.main, "--resume", "--checkpoint_dir", "toy", "--objective", "elbo")
    assert "cannot change" in error
    assert "--schedule" in fails(train.main, *argv, "--schedule", "cosine", "--overwrite")
    evaluate.main(["--checkpoint", "toy/best.pt", "--max_rows", "4", "--draws", "2",
                   "--num_samples", "2", "--steps", "2"])
    result = json.loads((tmp_path / "toy/evaluation.json").read_text())
    assert result["kind"] == "half_masked" and result["protocol"].startswith("half-masked toy, 2")
    assert result["likelihood"]["bits_per_byte"] > 0 and result["diversity"]["samples"]
    evaluate.main(["infilling", "--checkpoint", "toy/best.pt", "--num_samples", "4", "--steps",
                   "2"])
    capsys.readouterr()
    generate.main(["--num_samples", "2", "--steps", "2", "--length", "9", "--json"])  # the newest
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["tokens"]) for line in lines] == [11, 11]
    monkeypatch.undo()  # where nobody knows the kind
    assert "half_masked" in fails(generate.main, "--checkpoint", tmp_path / "toy/best.pt")


@pytest.fixture(scope="module")
def lengths_dir(pairs_dir, tmp_path_factory):
    """The pairs, of whose conditions the length alone is to be known."""
    folder = tmp_path_factory.mktemp("lengths") / "pairs"
    shutil.copytree(pairs_dir, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["condition"]["encoder"] = "length"
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_a_toy_encoder_is_trained_evaluated_and_listened_to(
        checkpoint, lengths_dir, tmp_path, monkeypatch, capsys, fails):
    start = ["--stage", "2", "--decoder_checkpoint", str(checkpoint), "--data_dir",
             str(lengths_dir), "--checkpoint_dir", str(tmp_path / "toy"), *SHORT]
    error = fails(train.main, *start, "--max_steps", "2")
    assert "'length'" in error and "text" in error  # nobody knows it yet
    monkeypatch.setitem(encoders.ENCODERS, LengthEncoder.sort, LengthEncoder)
    train.main([*start, "--max_steps", "4"])
    assert "tokens)" in capsys.readouterr().out  # a story after its condition
    decoder = model_from_checkpoint(load_checkpoint(checkpoint)).state_dict()
    stage_2 = load_checkpoint(tmp_path / "toy/best.pt", kind="conditional")
    assert stage_2["encoder"] == "length"
    for name, weight in model_from_checkpoint(stage_2).state_dict().items():
        assert name not in decoder or torch.equal(weight, decoder[name])
    path = tmp_path / "all/best.pt"
    train.main(["--stage", "3", "--decoder_checkpoint", str(tmp_path / "toy/best.pt"),
                "--data_dir", str(lengths_dir), "--checkpoint_dir", str(path.parent), "--max_steps",
                "4", "--condition_dropout", "0.5", *SHORT])
    evaluate.main(["condition", "--checkpoint", str(path), "--max_rows", "4", "--num_samples", "2",
                   "--draws", "1", "--steps", "2", "--guidances", "1"])
    result = json.loads(path.with_name("evaluation.json").read_text())
    # no words tell a length: nobody can be prompted with it
    assert list(result["readers"]) == ["cross-attention"] and result["better_way"] is None
    assert set(result["generation"]) == {"real texts", "guidance 1"}
    assert "tokens**" in path.with_name("evaluation.md").read_text()
    capsys.readouterr()
    generate.main(["--checkpoint", str(path), "--condition", "A cat.", "--steps", "2", "--guidance",
                   "2", "--num_samples", "1"])
    assert "A cat." in capsys.readouterr().out
    error = fails(export_jetson.main, "--checkpoint", path, "--data_dir", lengths_dir, "--out_dir",
                  tmp_path / "bundle")
    assert "'length'" in error


def test_a_condition_of_the_toy_counts(checkpoint, lengths_dir, monkeypatch):
    """What another length changes, and that none is the denoiser alone."""
    source = load_checkpoint(checkpoint)
    plain = model_from_checkpoint(source)
    from model import ConditionalTransformer
    torch.manual_seed(0)
    model = ConditionalTransformer(plain.config, LengthEncoder(16, 64)).eval()
    model.load_decoder(plain.state_dict())
    for block in model.blocks:
        torch.nn.init.constant_(block.cross.gate, 1.0)
    tokens = torch.full((3, 16), 7)
    lengths = torch.tensor([[5], [9], [0]])
    with torch.no_grad():
        short, long, none = model.hidden(tokens, context=model.encode(lengths))
        alone = plain.hidden(tokens)[0]
        dropped = model.encoder.without(lengths, torch.tensor([True, False, False]))
        assert dropped.tolist() == [[0], [9], [0]]
    assert not torch.allclose(short, long, atol=1e-4)
    torch.testing.assert_close(none, alone)


def test_a_kernel_is_one_line_of_the_table(monkeypatch):
    """The first line that fits a device, a precision and whether a graph is made is taken."""
    calls = []

    def kernel(q, k, v, mask, causal):
        calls.append(q.dtype)
        return attention.fused(q, k, v, mask, causal)

    q, k, v = torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    expected = attention.attention(q, k, v)
    for line, used in (
            (("cpu", torch.float32, None, None), True), (("cuda", None, None, None), False),
            (("cpu", torch.bfloat16, None, None), False), ((None, None, True, None), False),
            ((None, None, None, True), False), ((None, torch.float32, False, False), True)):
        monkeypatch.setattr(attention, "KERNELS", ((*line, kernel), *attention.KERNELS))
        calls.clear()
        assert torch.equal(attention.attention(q, k, v), expected) and bool(calls) == used
        monkeypatch.undo()
    # behind a cache a causal query sees what its place in the whole row lets it see
    whole = attention.attention(q, k, v, causal=True)
    for known in (3, 7):
        part = attention.attention(q[:, :, known:], k, v, causal=True)
        torch.testing.assert_close(part, whole[:, :, known:])
    # and what a mask hides besides stays hidden
    hidden = torch.zeros(5, 8)
    hidden[:, 2] = attention.HIDDEN
    part = attention.attention(q[:, :, 3:], k, v, causal=True, mask=hidden)
    others = [0, 1, 3, 4, 5, 6, 7]
    expected = attention.attention(q[:, :, 3:], k[:, :, others], v[:, :, others],
                                   mask=torch.full((5, 7), attention.HIDDEN).triu(3))
    torch.testing.assert_close(part, expected)
    assert np.isfinite(attention.HIDDEN)
