"""An encoder that learns the names of what it sees before a model reads it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_pictures import EMOJI, SHORT

import train
from kinds.checkpoints import load_checkpoint, model_from_checkpoint
from kinds.files import load_encoder, read_file
from training import naming


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The pictures of tests/data/emoji, of which every fifth has a name of two words, and the same
    in two other styles: paler, and smaller."""
    base = tmp_path_factory.mktemp("styles")
    lines = [json.loads(line) for line in (EMOJI / "pairs.jsonl").read_text().splitlines()]
    for style in ("noto", "pale", "small"):
        (base / style).mkdir()
        with open(base / style / "pairs.jsonl", "w") as file:
            for i, line in enumerate(lines):
                picture = Image.open(EMOJI / line["image"]).convert("RGBA")
                if style == "pale":
                    picture.putalpha(picture.getchannel("A").point(lambda x: x * 2 // 3))
                elif style == "small":
                    picture = ImageOps.expand(picture, 6, (0, 0, 0, 0))
                picture.save(base / style / line["image"])
                name = line["name"] if i % 5 else f"{line['name']} thing"
                file.write(json.dumps({"image": line["image"], "name": name}) + "\n")
    return base


def flags(emoji, output, *more):
    return ["--emoji", *(str(emoji / style) for style in ("noto", "pale", "small")), "--held_out",
            "small", "--image_size", "16", "--batch", "16", "--device", "cpu", "--output",
            str(output), *map(str, more)]


@pytest.fixture(scope="module")
def learned(emoji, tmp_path_factory):
    path = tmp_path_factory.mktemp("named") / "encoder.pt"
    naming.main(flags(emoji, path, "--max_steps", 60, "--valid_every", 30))
    return path


def test_it_learns_to_name_a_style_that_it_never_saw(learned):
    figures = read_file(learned)["figures"]
    assert figures["names"] == 32 and figures["named"] > 0.25 and figures["one_of_8"] > 0.5


def test_names_are_words_and_the_rarer_ones_count_more(emoji, tmp_path):
    data = naming.Pictures(naming.NamingConfig(
        emoji=[str(emoji / style) for style in ("noto", "small")], held_out=["small"],
        image_size=16))
    assert data.pictures.shape == (80, 16, 16, 4) and len(data.words) == 41
    assert torch.allclose(data.wanted.sum(1), torch.ones(80))
    assert data.held_out.tolist() == [False] * 40 + [True] * 40
    thing = data.words.index("thing")
    two = ~data.plain
    assert two.sum() == 16 and torch.equal(two, data.wanted[:, thing] > 0)
    # in eight names instead of one
    assert torch.allclose(data.wanted[two].max(1).values / data.wanted[two, thing],
                          torch.tensor(8 ** 0.5))
    assert (data.wanted[data.plain].max(1).values == 1).all()


def test_of_a_held_out_style_it_is_asked_only_what_it_could_learn(emoji, tmp_path):
    folder = shutil.copytree(emoji / "small", tmp_path / "small")
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"name": "zeppelin"})
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    data = naming.Pictures(naming.NamingConfig(emoji=[str(emoji / "noto"), str(folder)],
                                               held_out=["small"], image_size=16))
    assert "zeppelin" not in data.words and data.held_out.sum() == 39


def test_pictures_are_mirrored_and_some_are_grey():
    pictures = torch.randint(0, 256, (200, 8, 8, 4), dtype=torch.uint8)
    pictures[..., 3] = 255
    varied = naming.mirrored(pictures, torch.Generator().manual_seed(0))
    assert (varied[..., 3] == 255).all()
    grey = (varied[..., 0] == varied[..., 1]).flatten(1).all(1)
    flipped = (varied == pictures.flip(2)).flatten(1).all(1)
    same = (varied == pictures).flatten(1).all(1)
    assert 10 < grey.sum() < 60 and flipped.sum() > 50 and same.sum() > 50
    assert (grey | flipped | same).all()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(emoji, tmp_path):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    steps = ("--max_steps", 6, "--valid_every", 3)
    naming.main(flags(emoji, whole, *steps))
    run = naming.Naming(naming.NamingConfig(
        **vars(naming.parse(naming.NamingConfig, "", flags(emoji, parts, *steps))[0])))
    for _ in range(3):
        run.take()
    run.save(run.validate())
    naming.main(flags(emoji, parts, *steps, "--resume"))
    one, other = read_file(whole), read_file(parts)
    assert one["step"] == other["step"] == 6
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name


def test_a_conditioned_model_begins_with_what_was_learned(learned, joint_checkpoint, picture_dir,
                                                          tmp_path):
    train.main(["--stage", "2", "--objective", "joint", "--decoder_checkpoint",
                str(joint_checkpoint), "--data_dir", str(picture_dir), "--checkpoint_dir",
                str(tmp_path / "run"), "--image_encoder", str(learned), "--max_steps", "1", *SHORT,
                "--lr", "1e-12", "--ema_decay", "0"])
    model = model_from_checkpoint(load_checkpoint(tmp_path / "run/last.pt", kind=None))
    encoder, known = load_encoder(learned), read_file(learned)["weights"]
    pictures = torch.from_numpy(np.stack([naming.load_picture(EMOJI / name, 16)
                                          for name in ("apple.png", "bear.png")]))
    for one in (model.encoder, encoder):
        for name, weight in one.state_dict().items():
            assert torch.allclose(weight, known[name], atol=1e-6), name
    with torch.no_grad():
        assert torch.allclose(model.encoder(pictures).states[0], encoder(pictures).states[0],
                              atol=1e-4)
    # and the run goes on without the file
    learned_again = shutil.move(learned, tmp_path / "away.pt")
    try:
        train.main(["--resume", "--checkpoint_dir", str(tmp_path / "run"), "--max_steps", "2"])
    finally:
        shutil.move(learned_again, learned)


def test_mistakes_are_told_in_a_line(learned, emoji, joint_checkpoint, picture_dir, tmp_path, fails,
                                     capsys):
    out = tmp_path / "x.pt"
    for more, error in (
            (["--held_out", "nowhere"], "no such style, only noto, pale, small"),
            (["--held_out", "small", "noto", "pale"], "no style is left"),
            (["--image_size", "12"], "--image_size 12"), (["--batch", "0"], "--batch 0"),
            (["--output", str(tmp_path / "x.txt")], "name a .pt file"),
            (["--resume"], "to continue from"), (["--lr", "-1"], "--lr -1.0"),
            (["--encoder_config", "huge"], "huge"),
            (["--output", str(learned)], "is there already")):
        assert error in fails(naming.main, *flags(emoji, out), *more)
    assert not out.exists()
    for more, error in ((["--batch", "8"], "--batch"),
                        (["--emoji", str(emoji / "noto"), str(emoji / "small"), "--held_out",
                          "small", "noto"], "--held_out")):
        assert error in fails(naming.main, *flags(emoji, learned, "--resume"), *more)
    contents = read_file(learned)
    start = ["--stage", "2", "--objective", "joint", "--decoder_checkpoint", str(joint_checkpoint),
             "--data_dir", str(picture_dir), "--checkpoint_dir", str(tmp_path / "run"), *SHORT,
             "--image_encoder", str(out)]
    for change, error in (
            ({"format": "another"}, "is not an encoder"), ({"encoder": "text"}, "was changed"),
            ({"weights": {}}, "do not fit"),
            ({"encoder_config": contents["encoder_config"] | {"size": 24}}, "do not fit")):
        torch.save(contents | change, out)
        assert error in fails(train.main, *start), error
    out.write_bytes(b"nothing")
    assert "not a checkpoint of this program" in fails(train.main, *start)
    shutil.copy(joint_checkpoint, out)
    assert "is not an encoder" in fails(train.main, *start)
    assert "--encoder_config" in fails(train.main, *start, "--encoder_config", "micro")
    assert not (tmp_path / "run").exists()
