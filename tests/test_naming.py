"""An encoder that learns the names of what it sees before a model reads it."""

from cli import Stopped

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


def test_names_are_words_and_the_rarer_ones_count_more(emoji):
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
    varied = naming.mirrored_or_grey(pictures, torch.Generator().manual_seed(0))
    assert (varied[..., 3] == 255).all()
    grey = pictures[..., :3].float().mean(-1).to(torch.uint8)[..., None]
    greys = torch.cat([grey.expand(-1, -1, -1, 3), pictures[..., 3:]], -1)
    count = [(varied == kind).flatten(1).all(1).sum()
             for kind in (pictures, pictures.flip(2), greys, greys.flip(2))]
    assert sum(count) == 200 and min(count[:2]) > 50 and min(count[2:]) > 5


def begun(emoji, path, *more):
    """A run after three of six steps, and its flags."""
    line = flags(emoji, path, "--max_steps", 6, "--valid_every", 3, "--lr", 0.003)
    run = naming.Naming(naming.parse(naming.NamingConfig, "", line)[0])
    for _ in range(3):
        run.take()
    run.save(run.validate())
    return line


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(emoji, tmp_path, fails):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    naming.main(begun(emoji, whole) + ["--overwrite"])
    begun(emoji, parts)
    naming.main(["--output", str(parts), "--resume"])
    one, other = read_file(whole), read_file(parts)
    assert one["step"] == other["step"] == 6
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    for a, b in zip(one["optimizer"], other["optimizer"], strict=True):
        for number, state in a["state"].items():
            assert all(torch.equal(value, b["state"][number][name])
                       for name, value in state.items())
    assert "has had its 6 steps" in fails(naming.main, "--output", parts, "--resume")


def test_it_goes_on_with_the_same_pictures_alone_and_with_what_is_whole(emoji, tmp_path, fails):
    path, spoilt = tmp_path / "encoder.pt", tmp_path / "spoilt.pt"
    begun(emoji, path)
    styles = [str(emoji / style) for style in ("pale", "noto", "small")]
    assert "other pictures" in fails(naming.main, "--output", path, "--resume", "--emoji", *styles)
    contents = read_file(path)
    for change, error in (
            ({"step": "a"}, "cannot be gone on with"), ({"config": {}}, "cannot be gone on with"),
            ({"seconds": None}, "cannot be gone on with"), ({"optimizer": [{}, {}]}, "not fit"),
            ({"model": {}}, "not fit"), ({"optimizer": 1}, "not fit"),
            ({"format_version": torch.ones(2)}, "is not an encoder")):
        torch.save(contents | change, spoilt)
        assert error in fails(naming.main, "--output", spoilt, "--resume"), change


def test_weights_that_are_not_finite_replace_none_that_are(emoji, tmp_path):
    line = begun(emoji, tmp_path / "encoder.pt")
    before = (tmp_path / "encoder.pt").read_bytes()
    for lr in ("1e30", "1e38"):
        with pytest.raises(Stopped, match="not finite"):
            naming.main([*line, "--resume", "--lr", lr])
        assert (tmp_path / "encoder.pt").read_bytes() == before


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


def test_mistakes_are_told_in_a_line(learned, emoji, tmp_path, fails):
    out = tmp_path / "x.pt"
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(EMOJI / "apple.png", few)
    (few / "pairs.jsonl").write_text('{"image": "apple.png", "name": "apple"}\n' * 9)
    (tmp_path / "link.pt").symlink_to(tmp_path / "away" / "x.pt")
    for more, error in (
            (["--held_out", "nowhere"], "no such style, only noto, pale, small"),
            (["--held_out", "small", "noto", "pale"], "no style is left"),
            (["--emoji", str(emoji / "noto"), str(few), "--held_out", "few"], "fewer than 8"),
            (["--emoji", "nowhere"], "--emoji nowhere"), (["--seed", "-1"], "--seed -1"),
            (["--image_size", "12"], "--image_size 12"), (["--batch", "0"], "--batch 0"),
            (["--output", str(tmp_path / "x.txt")], "name a .pt file"),
            (["--output", str(tmp_path / "link.pt")], "does not exist"),
            (["--resume"], "to continue from"), (["--lr", "-1"], "--lr -1.0"),
            (["--encoder_config", "huge"], "--encoder_config huge"),
            (["--device", "abacus"], "--device abacus"),
            (["--output", str(learned)], "is there already")):
        assert error in fails(naming.main, *flags(emoji, out), *more), error
    assert not out.exists()
    for more in (["--batch", "8"], ["--held_out", "noto"]):
        assert more[0] in fails(naming.main, "--output", learned, "--resume", *more)


def test_a_training_refuses_what_is_no_encoder_of_its_pictures(
        learned, emoji, joint_checkpoint, picture_dir, tmp_path, fails):
    out, contents = tmp_path / "x.pt", read_file(learned)
    start = ["--stage", "2", "--objective", "joint", "--decoder_checkpoint", str(joint_checkpoint),
             "--data_dir", str(picture_dir), "--checkpoint_dir", str(tmp_path / "run"), *SHORT,
             "--image_encoder", str(out)]
    assert "no such file" in fails(train.main, *start)
    settings = contents["encoder_config"]
    flat = {name: weight[0] if name == "blocks.0.up.weight" else weight
            for name, weight in contents["weights"].items()}
    for change, error in (
            ({"format": "another"}, "is not an encoder"), ({"encoder": "text"}, "was changed"),
            ({"encoder": "image_frozen"}, "was changed"), ({"weights": {}}, "do not fit"),
            ({"weights": flat}, "do not fit"),
            ({"weights": {name: weight + torch.inf for name, weight in
                          contents["weights"].items()}}, "was changed"),
            ({"encoder_config": settings | {"size": 24}}, "do not fit"),
            ({"encoder_config": settings | {"config": settings["config"] | {"dropout": 0.5}}},
             "was changed")):
        torch.save(contents | change, out)
        assert error in fails(train.main, *start), error
    out.write_bytes(b"nothing")
    assert "not a checkpoint of this program" in fails(train.main, *start)
    shutil.copy(joint_checkpoint, out)
    assert "is not an encoder" in fails(train.main, *start)
    naming.main([*flags(emoji, out), "--image_size", "24", "--max_steps", "1", "--overwrite"])
    assert "reads pictures of 24 x 24" in fails(train.main, *start)
    assert not (tmp_path / "run").exists()
