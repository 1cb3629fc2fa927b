"""Exported steps of models that read pictures: the checkpoint's stories, without torch."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import python
from test_export_jetson import run_in, stories

import export_jetson
import generate
import prep_image_data
import train
from corpus.image_files import load_picture
from jetson.bundle import SCRIPTS
from jetson.engine_runtime import Bundle
from jetson.graphs import operators
from kinds.checkpoints import load_checkpoint, model_from_checkpoint, save_checkpoint
from network.attention import GATE_SPEED
from network.lora import adapted, merge
from sampling.sampler import Sampler
from sampling.step import numpy_step
from training import slim

EMOJI = Path(__file__).parent / "data/emoji"
CAT, DOG = str(EMOJI / "cat.png"), str(EMOJI / "dog.png")
SIZE, PLACES, RANK = 32, 16, 3  # no other matrix of the toy has a side of 3
SHORT = ["--steps", "4", "--length", "30", "--seed", "5", "--order", "confidence"]


@pytest.fixture(scope="session")
def emoji_dir(long_data_dir, tmp_path_factory) -> Path:
    """A sentence about each of the emoji."""
    folder = tmp_path_factory.mktemp("emoji")
    names = [json.loads(line) for line in (EMOJI / "pairs.jsonl").read_text().splitlines()]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({
        "image": str(EMOJI / line["image"]), "text": f"Once there was a {line['name']}. It ran.",
        "split": "val" if i % 3 == 0 else "train"}) for i, line in enumerate(names)))
    prep_image_data.main(["--pairs", str(folder / "pairs.jsonl"), "--data_dir", str(long_data_dir),
                          "--output_dir", str(folder / "data"), "--image_size", str(SIZE)])
    return folder / "data"


@pytest.fixture(scope="session")
def picture_model(sharp_checkpoint, emoji_dir, tmp_path_factory) -> Path:
    """Of a toy model after two steps, whose pictures and adapters are then made to count."""
    folder = tmp_path_factory.mktemp("pictures")
    train.main(["--stage", "2", "--decoder_checkpoint", str(sharp_checkpoint), "--data_dir",
                str(emoji_dir), "--checkpoint_dir", str(folder / "run"), "--lora_rank", str(RANK),
                "--encoder_config", "micro", "--max_steps", "2", "--batch_tokens", "512",
                "--valid_every", "2", "--valid_rows", "8", "--num_samples", "0", "--device", "cpu",
                "--precision", "fp32"])
    source = load_checkpoint(folder / "run/best.pt", kind="conditional")
    model = model_from_checkpoint(source)
    torch.manual_seed(5)
    for linear in adapted(model):
        torch.nn.init.normal_(linear.lora.up.weight, std=0.2)
    for block in model.blocks:
        torch.nn.init.normal_(block.cross.out.weight, std=0.3)
        torch.nn.init.constant_(block.cross.gate, 1 / GATE_SPEED)
    torch.nn.init.normal_(model.encoder.patches.weight, std=0.3)
    save_checkpoint(folder / "pictures.pt", model, source["tokenizer"], source["length_histogram"],
                    ema=None, step=2, train_config=source["train_config"])
    return folder / "pictures.pt"


@pytest.fixture(scope="session")
def picture_bundle(picture_model, once) -> Path:
    return once("picture_bundle", lambda folder: export_jetson.main([
        "--checkpoint", str(picture_model), "--out_dir", str(folder), "--report_rows", "3",
        "--calibration_rows", "3", "--batch", "2"]))


def lines_of(capsys, *argv: str) -> list[dict]:
    capsys.readouterr()
    generate.main([*argv, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_bundle_tells_the_checkpoints_stories_of_pictures(picture_bundle, picture_model,
                                                              capsys):
    words = ["--image", CAT, DOG, CAT, *SHORT]
    exported = lines_of(capsys, "--onnx", str(picture_bundle / "step_fp32.onnx"), *words)
    expected = lines_of(capsys, "--checkpoint", str(picture_model), "--top_k", "64", "--no-heal",
                        *words)
    assert [line["tokens"] for line in exported] == [line["tokens"] for line in expected]
    assert [line["image"] for line in exported] == [CAT, DOG, CAT]


def test_step_by_step_the_same_as_torch(picture_bundle, picture_model):
    """With both adapters and the pictures in it; and neither is there for nothing."""
    exported = Bundle(picture_bundle / "step_fp32.onnx")
    model = merge(model_from_checkpoint(load_checkpoint(picture_model, kind="conditional")))
    shown = np.stack([load_picture(path, SIZE) for path in (CAT, DOG, CAT)])
    assert np.array_equal(exported.read_conditions([CAT, DOG, CAT], None), shown)
    shown[2] = 0  # none
    sampler = Sampler(steps=5, top_k=64)
    told = stories(exported.step(sampler, shown), sampler)
    assert told == stories(numpy_step(model.for_inference(), sampler, shown), sampler)
    assert told != stories(exported.step(sampler), sampler)
    bare = model_from_checkpoint(load_checkpoint(picture_model, kind="conditional"))
    for linear in adapted(bare):
        linear.lora = None
    assert told != stories(numpy_step(bare.for_inference(), sampler, shown), sampler)


def test_what_the_graphs_are_of(picture_bundle):
    contents = json.loads((picture_bundle / "bundle.json").read_text())
    assert contents["encoder"] == {"sort": "image", "size": SIZE}
    assert contents["condition_len"] == PLACES and contents["cached"] is None
    reports = contents["reports"]
    assert reports["fp32"]["max_logit_difference"] < 1e-4
    assert 0 < reports["fp16"]["max_logit_difference"] < 0.1
    assert reports["int8"]["nelbo"] == pytest.approx(reports["fp32"]["nelbo"], rel=0.05)
    assert contents["calibrated_on"] == "train" and reports["int8"]["rows"] == 3 * 4
    for name in ("step_fp32", "step_fp16", "step_int8", "encoder"):
        graph = onnx.load(picture_bundle / f"{name}.onnx")
        assert operators(graph)
        assert not [x.name for x in graph.graph.initializer if RANK in x.dims and len(x.dims) == 2]
    assert [(x.name, [d.dim_value for d in x.type.tensor_type.shape.dim]) for x in
            graph.graph.input] == [("condition", [1, SIZE, SIZE, 4])]
    assert "\npillow>=" in (picture_bundle / "requirements-jetson.txt").read_text()
    assert "--image cat.png" in (picture_bundle / "README.md").read_text()
    assert "corpus/image_files.py" in SCRIPTS and "corpus/pictures.py" not in SCRIPTS


def test_a_copied_bundle_reads_pictures_without_torch(picture_bundle, picture_model, tmp_path,
                                                      capsys):
    copy = shutil.copytree(picture_bundle, tmp_path / "copy")
    words = ["--image", CAT, DOG, "--num_samples", "2", *SHORT]
    done = run_in(copy, "--onnx", "step_fp32.onnx", "--json", "--trace", "story.html", *words)
    assert done.returncode == 0, done.stderr
    expected = lines_of(capsys, "--checkpoint", str(picture_model), "--top_k", "64", "--no-heal",
                        *words)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["tokens"] for line in told] == [line["tokens"] for line in expected]
    assert (copy / "story.html").read_text().count("data:image/png;base64,") == 2
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    help_text = subprocess.run(python("generate.py", "--help"), cwd=copy, capture_output=True,
                               text=True, env=env)
    assert help_text.returncode == 0 and "--image" in help_text.stdout


def test_without_pillow_it_says_so(picture_bundle):
    done = run_in(picture_bundle, "--onnx", "step_fp32.onnx", "--image", CAT,
                  blocked=("torch", "PIL"))
    assert done.returncode == 2 and done.stderr.strip().splitlines() == [
        f"error: {CAT}: pictures need Pillow: pip install pillow"]


def test_an_adapter_is_exported_with_its_base(picture_model, sharp_checkpoint, tmp_path, capsys):
    """An adapter's file is in BF16: its own stories, and those of its own bundle; here of any
    shape, and guided."""
    shutil.copy(sharp_checkpoint, tmp_path / "base.pt")
    slim.main(["--adapter", "--checkpoint", str(picture_model), "--output",
               str(tmp_path / "adapter.pt")])
    export_jetson.main(["--checkpoint", str(tmp_path / "adapter.pt"), "--out_dir",
                        str(tmp_path / "bundle"), "--precisions", "fp32", "--report_rows", "0",
                        "--guided", "--dynamic", "--batch", "3"])
    words = ["--image", CAT, DOG, "--guidance", "2", *SHORT]
    exported = lines_of(capsys, "--onnx", str(tmp_path / "bundle/step_fp32.onnx"), *words)
    expected = lines_of(capsys, "--checkpoint", str(tmp_path / "adapter.pt"), "--top_k", "64",
                        "--no-heal", *words)
    assert [line["tokens"] for line in exported] == [line["tokens"] for line in expected]


# ---- mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "message"), [
    (["--condition", "Tom ran."], "step_fp32.onnx reads pictures: give it --image"),
    (["--image", "nowhere.png"], "nowhere.png: no such file"),
    (["--image", CAT, "--guidance", "2"], "export it with --guided"),
    (["--image", CAT, "--adapter", "x.pt"], "an exported step has its own")])
def test_what_is_refused(picture_bundle, words, message, fails):
    assert message in fails(generate.main, "--onnx", picture_bundle / "step_fp32.onnx", *words)


def test_a_step_that_reads_no_pictures(dynamic_bundle, fails):
    assert "reads conditions in words: give it --condition or --conditions" in fails(
        generate.main, "--onnx", dynamic_bundle / "step_fp32.onnx", "--image", CAT)


@pytest.mark.parametrize(("entry", "message"), [
    ({"sort": "image", "size": 64}, "encoder.onnx takes conditions of shape [1, 32, 32, 4]"),
    ({"sort": "image", "size": "32"}, "is damaged (encoder)"),
    ({"sort": "image", "size": 10**6}, "is damaged (encoder)"),
    ({"sort": "image"}, "is damaged (encoder)"), ({"sort": ["image"]}, "is damaged (encoder)"),
    ({"sort": "sound", "size": 32}, "is damaged (encoder)"), ("image", "is damaged (encoder)"),
    (None, "reads conditions in words")])
def test_an_entry_that_is_not_of_this_encoder(picture_bundle, tmp_path, fails, entry, message):
    folder = shutil.copytree(picture_bundle, tmp_path / "copy")
    contents = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(contents | {"encoder": entry}))
    assert message in fails(generate.main, "--onnx", folder / "step_fp32.onnx", "--image", CAT)


def test_an_older_bundle_reads_text(dynamic_bundle, tmp_path, capsys):
    """It does not say what a condition is."""
    folder = shutil.copytree(dynamic_bundle, tmp_path / "copy")
    contents = json.loads((folder / "bundle.json").read_text())
    assert contents.pop("encoder") == {"sort": "text", "max_len": contents["condition_len"]}
    (folder / "bundle.json").write_text(json.dumps(contents))
    words = ["--condition", "Tom ran.", "--num_samples", "1", *SHORT]
    told = [lines_of(capsys, "--onnx", str(path / "step_fp32.onnx"), *words)
            for path in (folder, dynamic_bundle)]
    assert told[0][0]["tokens"] == told[1][0]["tokens"]


def test_data_of_other_conditions(picture_model, long_data_dir, tmp_path, fails):
    assert "has no pictures" in fails(export_jetson.main, "--checkpoint", picture_model,
                                      "--data_dir", long_data_dir, "--out_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
