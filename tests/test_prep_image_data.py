from cli import UserError

import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import time
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, python
from PIL import Image

from corpus import pictures, scenes
from corpus.image_files import load_picture, with_presence
from corpus.pictures import PictureRows, PictureWriter, read_subjects
from corpus.rows import TokenRows, content_hashes, load_meta, read_tokenizer_file, stories_of
from corpus.scenes import NameFinder, draw_scene, is_held_out_pair, read_emoji
from corpus.tokens import BOS, EOS, decode, load_tokenizer
from prep_image_data import main

DATA = Path(__file__).parent / "data"
EMOJI = DATA / "emoji"


def stories(count: int, seed: int) -> list[str]:
    """Each about one of the things of tests/data/emoji."""
    rng = random.Random(seed)
    names = sorted(read_emoji([EMOJI]))
    told = []
    for i in range(count):
        name, other = rng.sample(names, 2)
        told.append(f"Once there was a {name} number {i + 1000 * seed}. The {name} saw a {other}. "
                    f"Then the {name} went home. "
                    + "It was a very good day. " * rng.choice((1, 12)))
    return told + ["Nothing that is drawn is in here. The end."] * 2


@pytest.fixture(scope="session")
def story_dir(tmp_path_factory) -> Path:
    """A data folder of such stories; the long ones take two rows."""
    from data_prep import DataConfig, prepare
    folder = tmp_path_factory.mktemp("stories")
    for name, count, seed in (("train", 900, 1), ("valid", 60, 2), ("test", 50, 3)):
        (folder / f"{name}.txt").write_text("<|endoftext|>".join(stories(count, seed)))
    prepare(DataConfig(source=[str(folder / "train.txt")], valid_source=str(folder / "valid.txt"),
                       test_source=str(folder / "test.txt"), data_dir=str(folder / "data"),
                       vocab_size=500, seq_len=96))
    return folder / "data"


@pytest.fixture(scope="session")
def styles(tmp_path_factory) -> list[Path]:
    """Noto's emoji and two more "artists": the same in other colours, the last without the cat."""
    base = tmp_path_factory.mktemp("styles")
    folders = []
    for style, order in (("noto", "RGBA"), ("warm", "BRGA"), ("cold", "GBRA")):
        folder = base / style
        folder.mkdir()
        lines = [json.loads(line) for line in (EMOJI / "pairs.jsonl").read_text().splitlines()]
        for line in lines:
            image = Image.open(EMOJI / line["image"])
            Image.merge("RGBA", [image.getchannel(band) for band in order]).save(
                folder / line["image"])
        with open(folder / "pairs.jsonl", "w") as file:
            for line in lines:
                if (style, line["name"]) != ("cold", "cat"):
                    del line["style"]  # the folder's name is it
                    print(json.dumps(line), file=file)
        folders.append(folder)
    return folders


@pytest.fixture
def prepare(story_dir, tmp_path, capsys):
    def run(*argv: object, to: str = "made") -> tuple[Path, str]:
        folder = tmp_path / to
        main(["--data_dir", str(story_dir), "--output_dir", str(folder), *map(str, argv)])
        return folder, capsys.readouterr().out
    return run


def opened(folder: Path, split: str) -> tuple[TokenRows, PictureRows, list[str]]:
    """Texts, pictures, and the text of every row."""
    rows = TokenRows(folder, split)
    shown = PictureRows(folder, f"{split}_condition")
    assert len(rows) == len(shown)
    tokenizer = load_tokenizer(read_tokenizer_file(folder, rows.meta))
    return rows, shown, [decode(tokenizer, rows[i]) for i in range(len(rows))]


def plain(path: Path, colour: object, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> str:
    Image.new(mode, size, colour).save(path)
    return path.name


# --- load_picture


def test_a_picture_is_on_white():
    picture = load_picture(EMOJI / "cat.png", 64)
    assert picture.shape == (64, 64, 4) and picture.dtype == np.uint8
    assert (picture[..., 3] == 255).all()
    clear = np.asarray(Image.open(EMOJI / "cat.png"))[..., 3] == 0
    assert clear.sum() > 500 and (picture[clear] == 255).all()
    assert (picture[~clear] < 255).any(axis=-1).mean() > 0.9
    assert (DATA / "cat.png").read_bytes() == (EMOJI / "cat.png").read_bytes()


@pytest.mark.parametrize(("mode", "colour", "expected"), [
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)), ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
    ("RGBA", (0, 0, 0, 128), (127, 127, 127)), ("LA", (40, 255), (40, 40, 40)),
    ("L", 90, (90, 90, 90)), ("1", 1, (255, 255, 255)), ("P", 0, (0, 0, 0)),
    ("I;16", 257 * 90, (90, 90, 90)), ("RGB", (1, 2, 3), (1, 2, 3))])
def test_every_kind_of_pixel(tmp_path, mode, colour, expected):
    name = plain(tmp_path / "a.png", colour, (10, 10), mode)
    assert (load_picture(tmp_path / name, 8) == (*expected, 255)).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif"])
def test_every_format(tmp_path, suffix):
    plain(tmp_path / f"a{suffix}", (200, 100, 50), (40, 40))
    picture = load_picture(tmp_path / f"a{suffix}", 16)
    assert np.abs(picture.astype(int) - (200, 100, 50, 255)).max() <= 6


def test_a_long_picture_is_filled_up_with_white_on_both_sides(tmp_path):
    plain(tmp_path / "a.png", "black", (64, 32))
    picture = load_picture(tmp_path / "a.png", 16)
    assert (picture[:4] == 255).all() and (picture[-4:] == 255).all()
    assert (picture[4:12, :, :3] == 0).all()
    plain(tmp_path / "b.png", "black", (20_000, 1))  # a square around it would take 1.6 GB
    assert (load_picture(tmp_path / "b.png", 8)[..., :3] == 0).sum() == 3 * 8


def test_fine_lines_are_averaged_and_photos_are_turned_upright(tmp_path):
    lines = np.zeros((512, 512), dtype=np.uint8)
    lines[:, ::2] = 255
    Image.fromarray(lines).save(tmp_path / "a.png")
    grey = load_picture(tmp_path / "a.png", 64)[4:-4, 4:-4, :3].astype(int)
    assert np.abs(grey - 127).max() < 12
    halves = np.zeros((32, 32), dtype=np.uint8)
    halves[:16] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(halves).save(tmp_path / "a.jpg", exif=exif, quality=95)
    picture = load_picture(tmp_path / "a.jpg", 16)
    assert picture[2, 8, 0] < 10 and picture[-3, 8, 0] > 245


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(
        ">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says it is huge."""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0,
                                                              0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def animation(kind: str, **settings) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **settings)
    return file.getvalue()


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


HOSTILE = {
    "text.png": (b"This is no picture.", "is not a picture"), "empty.png": (b"", "is not a"),
    "zeros.jpg": (bytes(5000), "is not a picture"), "vector.svg": (b"<svg/>", "is not a picture"),
    "tiff.png": (saved("TIFF"), "use PNG, JPEG, WebP or BMP"),
    **{f"cut.{kind.lower()}": (saved(kind)[:2000], "is broken")
       for kind in ("PNG", "JPEG", "WEBP", "BMP")},
    "head.png": (saved("PNG")[:40], "is"), "crc.png": (saved("PNG")[:29] + b"xxxx", "is not a"),
    "moving.gif": (animation("GIF"), "is animated"),
    "moving.webp": (animation("WEBP"), "is animated"),
    "moving.png": (animation("PNG"), "is animated"),
    "bomb.png": (bomb(50_000, 50_000), "is too large"),
    "warned.png": (bomb(10_000, 10_000), "is too large"),
    "long.png": (bomb(2**31 - 1, 1), "is too large"), "none.png": (bomb(0, 10), "is"),
    "lies.png": (bomb(5000, 5000), "is broken")}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_still_picture_is_refused_in_one_line(tmp_path, name, recwarn):
    content, message = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    started = time.process_time()
    with pytest.raises(UserError) as refused:
        load_picture(tmp_path / name, 64)
    assert str(refused.value).startswith(f"{tmp_path / name} ") and message in str(refused.value)
    assert time.process_time() - started < 5 and not recwarn


def test_a_picture_that_is_not_there(tmp_path):
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load_picture(path, 64)


def test_noise_in_a_file_never_gives_more_than_one_line(tmp_path):
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        whole = np.frombuffer(saved(kind), dtype=np.uint8)
        for _ in range(30):
            broken = whole.copy()
            broken[rng.integers(0, min(len(broken), 400), 8)] = rng.integers(0, 256, 8)
            (tmp_path / "a.png").write_bytes(broken.tobytes())
            try:
                assert load_picture(tmp_path / "a.png", 16).shape == (16, 16, 4)
            except UserError as error:
                assert str(tmp_path / "a.png") in str(error)


# --- PictureWriter and PictureRows


def test_pictures_come_back_from_several_shards(prepare, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    distinct = with_presence(rng.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8))
    order = [0, 0, 1, 2, 1, 3, 0, 4, 5, 6, 2, 6, 0]
    monkeypatch.setattr(pictures, "SHARD_BYTES", 2 * 8 * 8 * 3)
    writer = PictureWriter(tmp_path, "train_condition", 8)
    for number in order:
        writer.add(distinct[number])
    writer.flush()
    writer.flush()  # nothing is left
    summary = writer.summary()
    assert summary["rows"] == 13 and summary["pictures"] == 7
    assert [shard["tokens"] for shard in summary["shards"]] == [2, 2, 2, 1]
    assert sum(shard["rows"] for shard in summary["shards"]) == 13
    assert sum((tmp_path / f"{shard['name']}.bin").stat().st_size
               for shard in summary["shards"]) == 7 * 8 * 8 * 3  # each once
    monkeypatch.undo()
    write_mine(tmp_path)
    folder, _ = prepare("--pairs", tmp_path / "mine.jsonl", "--image_size", 8)
    for path in tmp_path.glob("train_condition_*"):
        shutil.copy(path, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train_condition"] = summary
    (folder / "meta.json").write_text(json.dumps(meta))
    rows = PictureRows(folder, "train_condition")
    assert len(rows) == 13 and rows.size == 8 and rows.numbers.tolist() == order
    shuffled = rng.permutation(13)
    assert np.array_equal(rows.batch(shuffled), distinct[np.array(order)[shuffled]])
    assert writer.holds(distinct[3]) and not writer.holds(255 - distinct[3])


def write_mine(folder: Path, count: int = 60, **more) -> Path:
    """Pairs of pictures of one colour each."""
    with open(folder / "mine.jsonl", "w") as file:
        for i in range(count):
            name = plain(folder / f"{i}.png", (i, 2 * i, 255 - i))
            print(json.dumps({"image": name, "text": f"This is the picture {i}."} | more),
                  file=file)
    return folder / "mine.jsonl"


def damage(path: Path, at: int, number: int) -> None:
    content = bytearray(path.read_bytes())
    content[8 * at:8 * at + 8] = struct.pack("<q", number)
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(("name", "change", "message"), [
    ("train_condition_00000.bin", Path.unlink, "is missing"),
    ("train_condition_00000.idx", Path.unlink, "is missing"),
    ("train_condition_00000.bin", cut, "is truncated"),
    ("train_condition_00000.idx", cut, "is truncated"),
    ("train_condition_00000.idx", lambda path: path.write_bytes(b""), "is truncated"),
    ("train_condition_00000.idx", lambda path: damage(path, 0, 1), "is not an index of pictures"),
    ("train_condition_00000.idx", lambda path: damage(path, 1, 7), "data format version 7"),
    ("train_condition_00000.idx", lambda path: damage(path, 2, 1), "is damaged"),
    ("train_condition_00000.idx", lambda path: damage(path, 4, 64), "is damaged"),
    ("train_condition_00000.idx", lambda path: damage(path, 5, 10**6), "pictures that are not"),
    ("train_condition_00000.idx", lambda path: damage(path, 6, -1), "pictures that are not")])
def test_a_damaged_folder_is_refused(prepare, tmp_path, name, change, message):
    folder, _ = prepare("--pairs", write_mine(tmp_path), "--image_size", 16)
    change(folder / name)
    with pytest.raises(UserError) as refused:
        PictureRows(folder, "train_condition")
    assert message in str(refused.value) and str(folder / name) in str(refused.value)


def test_folders_and_splits_without_pictures(prepare, story_dir, tmp_path):
    with pytest.raises(UserError, match="has no pictures: prepare them with prep_image_data.py"):
        PictureRows(story_dir, "train_condition")
    folder, _ = prepare("--pairs", write_mine(tmp_path), "--test_fraction", 0,
                        "--valid_fraction", 0.2)
    assert read_subjects(folder, "train") == []
    with pytest.raises(UserError, match="no test_condition split"):
        PictureRows(folder, "test_condition")
    with pytest.raises(UserError, match="is not a shard index"):
        TokenRows(folder, "train_condition")


@pytest.mark.parametrize("size", [None, 0, 7, 20, 2048, "64", 64.0, True])
def test_a_size_that_cannot_be(prepare, tmp_path, size):
    folder, _ = prepare("--pairs", write_mine(tmp_path))
    meta = json.loads((folder / "meta.json").read_text())
    meta["condition"]["size"] = size
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"is damaged \(condition\)"):
        load_meta(folder)


# --- --pairs


def test_ones_own_pairs(prepare, tmp_path):
    source = write_mine(tmp_path)
    folder, text = prepare("--pairs", source, "--valid_fraction", 0.4, "--image_size", 16)
    meta = load_meta(folder)
    assert meta["condition"]["encoder"] == "image" and meta["condition"]["kind"] == "pictures"
    assert meta["condition"]["size"] == 16 and meta["sources"][0]["name"] == "mine.jsonl"
    assert meta["splits"].keys() == {split + end for split in ("train", "val", "test")
                                     for end in ("", "_condition")}
    assert not (folder / "subjects.jsonl").exists()
    seen = []
    for split in ("train", "val", "test"):
        _, shown, texts = opened(folder, split)
        for i, told in enumerate(texts):
            number = int(told.removeprefix("This is the picture ").removesuffix("."))
            assert (shown.batch([i])[0] == (number, 2 * number, 255 - number, 255)).all()
            seen.append(number)
        assert f"{split:>5}: {len(texts)} pairs" in text
    assert sorted(seen) == list(range(60))


def test_a_long_text_has_its_picture_in_every_row(prepare, tmp_path):
    source = write_mine(tmp_path)
    plain(tmp_path / "red.png", "red")
    with open(source, "a") as file:
        print(json.dumps({"image": "0.png", "condition": "  ", "text": " Bare. "}), file=file)
        print(json.dumps({"image": "red.png", "condition": " Tell: ",
                          "text": "It was long. " * 80, "split": None}), file=file)
    folder, _ = prepare("--pairs", source)
    for split in ("train", "val"):
        rows, shown, texts = opened(folder, split)
        assert " Bare." not in texts
        long = [i for i in range(len(rows)) if "was long." in texts[i]]
        if long:
            assert len(long) > 2 and rows[long[0]][0] == BOS and rows[long[-1]][-1] == EOS
            assert "".join(texts[i] for i in long) == "Tell: " + ("It was long. " * 80).strip()
            assert (shown.batch(long) == (255, 0, 0, 255)).all()
            assert len(set(shown.numbers[long])) == 1
            return
    raise AssertionError("the long text is gone")


def test_the_pages_of_a_story_stay_together_and_pictures_on_one_side(prepare, tmp_path):
    """Ten pages a story; every fifth picture is the same in all stories."""
    source = tmp_path / "mine.jsonl"
    lines = []
    for story in range(60):
        for page in range(10):
            colour = (250, page, 250) if page % 5 == 0 else (story, page, 9)
            name = plain(tmp_path / f"{story}_{page}.png", colour, (8, 8))
            lines.append({"image": name, "text": f"Page {page} of {story}.", "story": str(story)})
    random.Random(0).shuffle(lines)
    source.write_text("\n".join(map(json.dumps, lines)))
    folder, text = prepare("--pairs", source, "--valid_fraction", 0.4, "--image_size", 8)
    of, looks = {}, {}
    for split in ("train", "val", "test"):
        _, shown, texts = opened(folder, split)
        of[split] = {told.split(" of ")[1] for told in texts}
        looks[split] = {picture.tobytes() for picture in shown.batch(range(len(shown)))}
        assert len(looks[split]) == load_meta(folder)["splits"][f"{split}_condition"]["pictures"]
        dropped = load_meta(folder)["condition"]["dropped"][split]
        assert dropped == ({} if split == "train" else
                           {"the picture is also in train": 2 * len(of[split])})
        assert split == "train" or f"{2 * len(of[split])} dropped: the picture is also" in text
    assert all(not of[a] & of[b] for a, b in combinations(of, 2))
    assert not looks["train"] & (looks["val"] | looks["test"])
    assert len(of["train"] | of["val"] | of["test"]) == 60


def test_lines_that_say_their_split(prepare, tmp_path, story_dir, fails):
    source = write_mine(tmp_path)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["split"] = "val" if i % 10 == 3 else "train"
    source.write_text("\n".join(map(json.dumps, lines)))
    folder, _ = prepare("--pairs", source)
    assert load_meta(folder)["splits"].keys() == {"train", "val", "train_condition",
                                                  "val_condition"}
    assert opened(folder, "val")[2] == [f"This is the picture {i}." for i in range(3, 60, 10)]

    def refused(*argv: object) -> str:
        source.write_text("\n".join(map(json.dumps, lines)))
        return fails(main, "--data_dir", story_dir, "--output_dir", tmp_path / "other", "--pairs",
                     source, *argv)
    assert "leave out --valid_fraction" in refused("--valid_fraction", 0.1)
    lines[5]["split"] = "dev"
    assert "'dev' of 5.png is none of train, val, test" in refused()
    del lines[5]["split"]
    assert "give it to all or to none" in refused()
    for line in lines:
        line["split"] = "train"
    assert "no validation pairs" in refused()
    assert not (tmp_path / "other").exists()


def test_what_is_dropped(prepare, tmp_path):
    source = write_mine(tmp_path)
    with open(source, "a") as file:
        for image, text in (("0.png", ""), ("0.png", " \n"), ("0.png", None), (None, "No picture"),
                            (None, None)):
            print(json.dumps({"image": image, "text": text}), file=file)
    folder, text = prepare("--pairs", source)
    total = {}
    for counts in load_meta(folder)["condition"]["dropped"].values():
        for reason, count in counts.items():
            total[reason] = total.get(reason, 0) + count
    assert total == {"the text is empty": 2, "the text is null": 1, "the image is null": 2}
    assert "2 dropped: the text is empty" in text


@pytest.mark.parametrize("name", ["text.png", "cut.png", "moving.gif", "bomb.png", "gone.png"])
def test_a_broken_picture_is_named_and_nothing_is_left(tmp_path, story_dir, name, fails):
    source = write_mine(tmp_path, 10)
    with open(source, "a") as file:
        print(json.dumps({"image": name, "text": "Not a picture."}), file=file)
    if name in HOSTILE:
        (tmp_path / name).write_bytes(HOSTILE[name][0])
    before = sorted(tmp_path.iterdir())
    assert str(tmp_path / name) in fails(main, "--data_dir", story_dir, "--output_dir",
                                         tmp_path / "out", "--pairs", source)
    assert sorted(tmp_path.iterdir()) == before


def test_bad_lines(tmp_path, story_dir, fails):
    source = tmp_path / "mine.jsonl"
    for content, message in ((b'{"image": "a"}', "line 1: expected"), (b"[]", "line 1: expected"),
                             (b'{"image": 3, "text": "b"}', "line 1: expected"),
                             (b'{"image": "a.png", "text": "b", "story": 5}', "line 1: expected"),
                             (b'{"image": "\xff", "text": "b"}', "not UTF-8"),
                             (b"", "no pair can be used: there is none"),
                             (b'{"image": "a.png", "text": ""}', "1 x the text is empty")):
        source.write_bytes(content)
        assert message in fails(main, "--data_dir", story_dir, "--output_dir", tmp_path / "out",
                                "--pairs", source)
        assert list(tmp_path.iterdir()) == [source]


# --- --emoji


def test_the_main_word_of_a_story():
    finder = NameFinder(["cat", "dog", "bus", "car"])
    for story, count, name in (
            ("The cat saw CATS and a cat's dog.", 3, "cat"), ("Cat, cat and cat.", 4, None),
            ("A cat, a cat. Dogs, dog.", 2, None), ("Concatenate the category, scat!", 1, None),
            ("The bus, the bus, the bus and cars.", 3, "bus"), ("", 1, None),
            ("Car car car dog dog cat", 3, "car")):
        assert finder.main(story, count) == name, story


def test_names_are_single_clear_words(tmp_path):
    names = ["cat", "Leo", "ice cream", "fly", "t-shirt", "caf\u00e9", "", "dog", "dog"]
    lines = [{"image": f"{i}.png", "name": name} for i, name in enumerate(names)]
    lines += [{"image": None, "name": "cow"}, {"image": "x.png", "name": None},
              {"image": "y.png", "name": "cat", "style": "oil"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    style = tmp_path.name
    assert read_emoji([tmp_path]) == {
        "cat": {style: tmp_path / "0.png", "oil": tmp_path / "y.png"},
        "dog": {style: tmp_path / "7.png"}}


def test_stories_about_emoji(prepare, styles, story_dir):
    folder, text = prepare("--emoji", *styles, "--held_out", "cold")
    meta = load_meta(folder)
    assert meta["condition"]["kind"] == "emoji" and meta["condition"]["held_out"] == ["cold"]
    emoji = read_emoji(styles)
    finder = NameFinder(emoji)
    tokenizer = load_tokenizer(read_tokenizer_file(folder, meta))
    told = {}
    for split in ("train", "val", "test"):
        rows, shown, texts = opened(folder, split)
        subjects = read_subjects(folder, split)
        assert [line["row"] for line in subjects] == list(range(len(rows)))
        assert {line["style"] for line in subjects} == (
            {"noto", "warm"} if split == "train" else {"cold"})
        found, whole = [], ""
        for i, line in enumerate(subjects):
            (name,) = line["subjects"]
            assert np.array_equal(shown.batch([i])[0],
                                  load_picture(emoji[name][line["style"]], 64))
            whole += texts[i]
            if rows[i][-1] == EOS:
                assert finder.main(whole, 3) == name
                found.append((whole, line["style"]))
                whole = ""
        expected = [(story, style) for story in stories_of(story_dir, split, tokenizer)
                    if (name := finder.main(story, 3)) for style in emoji[name]
                    if (style == "cold") == (split != "train")]
        assert found == expected and len(found) > 30
        told[split] = {story for story, _ in found}
        assert f"{split:>5}: {len(found):,} pairs" in text
        assert meta["condition"]["dropped"][split]["it is about nothing that an emoji shows"] >= 1
    assert all(not told[a] & told[b] for a, b in combinations(told, 2))
    assert "it is about what no style of this split shows" in text  # the cat, of validation
    assert "things are told of in training, most often" in text
    assert [source["flag"] for source in meta["sources"]][-3:] == ["--emoji"] * 3


def test_a_story_in_two_styles_that_look_the_same_is_in_training_alone(prepare, styles, tmp_path,
                                                                       story_dir, fails):
    copy = tmp_path / "copy"
    shutil.copytree(styles[0], copy)
    assert "val" in fails(main, "--data_dir", story_dir, "--output_dir", tmp_path / "out",
                          "--emoji", styles[0], copy, "--held_out", "copy")


def test_as_often_and_as_many_as_asked(prepare, styles):
    folder, _ = prepare("--emoji", *styles, "--held_out", "cold", "--max_stories", 40)
    few = load_meta(folder)["splits"]
    assert 0 < few["val"]["stories"] <= 40 and 0 < few["train"]["stories"] <= 80
    folder, _ = prepare("--emoji", *styles, "--held_out", "cold", "--max_stories", 40,
                        "--min_count", 1, to="low")
    assert load_meta(folder)["splits"]["train"]["stories"] >= few["train"]["stories"]


def test_bad_emoji(styles, story_dir, tmp_path, fails):
    folder, out = tmp_path / "bad", tmp_path / "out"
    shutil.copytree(styles[1], folder)
    whole = (folder / "pairs.jsonl").read_bytes()

    def refused(*argv: object) -> str:
        return fails(main, "--data_dir", story_dir, "--output_dir", out, "--emoji", styles[0],
                     folder, "--held_out", "bad", *argv)
    for content, message in ((b'{"image": "a.png"}', "line 1: expected"),
                             (b'{"image": "a.png", "name": "\xff"}', "not UTF-8"),
                             (b"", "--held_out bad: no such style, only noto"),
                             (b'{"image": "a.png", "name": "not one word"}', "no such style")):
        (folder / "pairs.jsonl").write_bytes(content)
        assert message in refused()
    (folder / "pairs.jsonl").write_bytes(whole)
    for path in folder.glob("*.png"):
        Image.new("RGBA", (8, 8)).save(path)
    assert "is empty: every pixel is transparent" in refused("--scenes", 20)
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:-30])
    assert str(folder) in (text := refused()) and "is broken" in text
    assert not out.exists()
    (folder / "pairs.jsonl").write_text('{"image": "a.png", "name": "zebra"}')
    assert "no emoji of the style bad shows what 20 stories" in refused("--scenes", 20)


def test_subjects_that_are_damaged(prepare, styles):
    folder, _ = prepare("--emoji", *styles, "--held_out", "cold", "--max_stories", 40)
    path = folder / "subjects.jsonl"
    whole = path.read_text()
    for content in (whole[:-20], "\n".join(whole.splitlines()[1:]), whole + "{}\n", "[]\n",
                    whole.replace('"subjects": ["', '"subjects": [["', 1), whole + whole):
        path.write_text(content)
        with pytest.raises(UserError, match="prepare the data again"):
            for split in ("train", "val", "test"):
                read_subjects(folder, split)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        read_subjects(folder, "val")


# --- --captions, and --opening


def test_captions_name_every_emoji_in_several_wordings(prepare, styles):
    folder, _ = prepare("--captions", 5, "--no-stories", "--emoji", *styles, "--held_out", "cold")
    assert load_meta(folder)["condition"]["kind"] == "captions"
    count = {}
    for split in ("train", "val", "test"):
        _, shown, texts = opened(folder, split)
        subjects = read_subjects(folder, split)
        assert {line["style"] for line in subjects} == (
            {"noto", "warm"} if split == "train" else {"cold"})
        for line, text in zip(subjects, texts, strict=True):
            name, = line["subjects"]
            assert re.search(rf"\b(an?|(an?) (big|little|small)) {name}\b", text), text
        names = {line["subjects"][0] for line in subjects}
        count[split] = len(texts) / len({(line["style"], *line["subjects"]) for line in subjects})
        assert len(names) > 20 and len(set(texts)) > 0.8 * len(texts) / count[split] ** 0.5
        assert len(np.unique(shown.numbers)) == len(texts) / count[split]
    assert count == {"train": 5, "val": 1, "test": 1}


def test_captions_are_trained_on_beside_the_stories(prepare, styles):
    argv = ["--emoji", *styles, "--held_out", "cold", "--opening"]
    stories, _ = prepare(*argv, to="stories")
    both, _ = prepare(*argv, "--captions", 2, to="both")
    alone, _ = prepare("--captions", 2, "--no-stories", *argv[:-1], to="alone")
    assert load_meta(both)["condition"]["kind"] == "emoji"
    for split in ("train", "val", "test"):
        told, captions, mixed = (opened(folder, split)[2] for folder in (stories, alone, both))
        assert mixed == ([*captions, *told] if split == "train" else told)


def test_an_opening_ends_with_the_sentence_that_names_the_thing():
    finder = NameFinder(["cat", "dog"])
    story = 'It was hot. "I see cats!" said Tom. The cat ran. A dog ran.'
    assert finder.opening(story, "cat") == 'It was hot. "I see cats!" said Tom.'
    assert finder.opening(story, "dog") == story
    assert finder.opening("No cat", "cat") == "No cat"


def test_stories_can_be_told_as_far_as_their_openings(prepare, styles):
    whole, _ = prepare("--emoji", *styles, "--held_out", "cold", to="whole")
    cut, _ = prepare("--emoji", *styles, "--held_out", "cold", "--opening", to="cut")
    for split in ("train", "val"):
        stories, openings = (opened(folder, split)[2] for folder in (whole, cut))
        for opening, line in zip(openings, read_subjects(cut, split), strict=True):
            name, = line["subjects"]
            assert re.search(rf"\b{name}s?\b", opening, re.I)
            assert any(story.startswith(opening) for story in stories)
        assert len(openings) == load_meta(whole)["splits"][split]["stories"]
        assert sum(map(len, openings)) < sum(map(len, stories))


# --- --scenes


def test_scenes(prepare, styles):
    folder, text = prepare("--scenes", 400, "--emoji", *styles, "--held_out", "cold",
                           "--image_size", 32)
    meta = load_meta(folder)
    assert meta["condition"]["kind"] == "scenes" and meta["condition"]["held_out_pairs"] > 20
    assert [meta["splits"][split]["stories"] for split in ("train", "val", "test")] == [400, 20, 20]
    assert f"{meta['condition']['held_out_pairs']} pairs of them are in no training scene" in text
    for split in ("train", "val", "test"):
        _, shown, texts = opened(folder, split)
        subjects = read_subjects(folder, split)
        assert {line["style"] for line in subjects} == (
            {"noto", "warm"} if split == "train" else {"cold"})
        assert {len(line["subjects"]) for line in subjects} == {1, 2, 3}
        pairs = [[is_held_out_pair(*pair) for pair in combinations(line["subjects"], 2)]
                 for line in subjects]
        assert any(map(any, pairs)) == (split != "train")
        for line, told in zip(subjects, texts, strict=True):
            assert all(name in told for name in line["subjects"]) and told[-1] in ".!"
        batch = shown.batch(range(len(shown)))
        corners = batch[:, [0, 0, -1, -1], [0, -1, 0, -1], :3]
        assert np.median(corners) >= 190  # a light background
        assert (batch[..., :3].min(axis=(1, 2, 3)) < 190).mean() > 0.9  # and something on it
        assert len(np.unique(batch.reshape(len(batch), -1), axis=0)) == len(batch)


def test_what_is_told_of_a_scene_is_so():
    names = sorted(name for name in read_emoji([EMOJI]) if scenes.can_be_placed(name))
    seen = set()
    for i in range(3000):
        scene = draw_scene(random.Random(i), names, "noto", held_out=False)
        things = {thing.name: thing for thing in scene.things}
        assert len(things) == len(scene.things)
        for a, b in combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= 0.4 * (a.side + b.side)
            assert not is_held_out_pair(a.name, b.name)
        first, *rest = scene.text.replace("!", ".").split(". ")
        for thing in scene.things:
            assert thing.side / 2 <= thing.x <= 1 - thing.side / 2
            assert thing.side / 2 <= thing.y <= 1 - thing.side / 2
            assert f"{'small' if thing.big else 'big'} {thing.name}" not in first
        for part in " ".join(rest).lower().rstrip(".").split(" and ") if rest else ():
            subject, where = part.split(" was ")
            thing = scene.things[0] if subject == "it" else things[subject.removeprefix("the ")]
            seen.add(where)
            value, others = {
                "on the left": (-thing.x, [-t.x for t in scene.things]),
                "on the right": (thing.x, [t.x for t in scene.things]),
                "at the top": (-thing.y, [-t.y for t in scene.things]),
                "at the bottom": (thing.y, [t.y for t in scene.things]),
                "in the middle": (0, [0])}[where]
            assert value == max(others)
    assert seen == {"on the left", "on the right", "at the top", "at the bottom", "in the middle"}


def test_articles():
    for i in range(300):
        text = draw_scene(random.Random(i), ["apple", "unicorn", "egg", "dog"], "x", True).text
        assert not re.search(r"\b(a [aeio]|an [^aeio])", text), text


def test_two_things_that_may_not_be_together():
    together = [pair for pair in combinations(sorted(read_emoji([EMOJI])), 2)
                if is_held_out_pair(*pair)]
    assert 0.05 < len(together) / 780 < 0.15
    a, b = together[0]
    assert is_held_out_pair(b, a)
    for i in range(50):
        assert len(draw_scene(random.Random(i), [a, b], "x", held_out=False).things) == 1


def test_the_same_seed_gives_the_same_folder(prepare, styles):
    argv = ["--scenes", 40, "--emoji", *styles, "--held_out", "cold"]
    first, second, third = (content_hashes(load_meta(prepare(*argv, *more, to=name)[0]))
                            for name, more in (("a", ()), ("b", ()), ("c", ("--seed", 1))))
    assert first == second
    assert all(first[split] != third[split] for split in first if split != "tokenizer")
    folder, _ = prepare("--scenes", 80, *argv[2:], to="d")  # the first forty are the same
    few = PictureRows(folder.parent / "a", "train_condition")
    many = PictureRows(folder, "train_condition")
    assert np.array_equal(few.batch(range(40)), many.batch(range(40)))


# --- the command line


@pytest.mark.parametrize(("argv", "message"), [
    ([], "either --pairs or --emoji"), (["--pairs", "a", "--emoji", "b"], "either --pairs or"),
    (["--pairs", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--emoji", "nowhere", "--held_out", "a"], "nowhere/pairs.jsonl: no such file"),
    (["--emoji", "{noto}"], "name it with --held_out"),
    (["--emoji", "{noto}", "--held_out", "noto"], "no style is left for training"),
    (["--emoji", "{noto}", "--held_out", "oil"], "no such style, only noto"),
    (["--emoji", "{noto}", "{warm}", "--held_out", "warm", "--scenes", "19"], "20 or more"),
    (["--scenes", "30", "--pairs", "x"], "give --emoji too"),
    (["--captions", "3", "--pairs", "x"], "give --emoji too"),
    (["--captions", "3", "--scenes", "30", "--emoji", "{noto}", "--held_out", "a"], "either"),
    (["--captions", "0", "--emoji", "{noto}", "--held_out", "a"], "must be positive"),
    (["--captions", "3", "--no-stories", "--emoji", "{noto}", "--held_out", "a", "--opening"],
     "--opening belongs"),
    (["--no-stories", "--emoji", "{noto}", "--held_out", "a"], "say how many"),
    (["--pairs", "{noto}/pairs.jsonl", "--opening"], "--opening belongs to the stories"),
    (["--held_out", "a", "--pairs", "x"], "names styles of --emoji"),
    (["--pairs", "x", "--image_size", "60"], "multiple of 8"),
    (["--pairs", "x", "--image_size", "0"], "multiple of 8"),
    (["--pairs", "x", "--image_size", "2048"], "at most 1024"),
    (["--pairs", "{noto}/pairs.jsonl", "--min_count", "2"],
     "--min_count belongs to the stories of --emoji"),
    (["--pairs", "{noto}/pairs.jsonl", "--seed", "2"], "--seed belongs to --scenes"),
    (["--emoji", "{noto}", "--held_out", "a", "--valid_fraction", "0.1"], "belongs to --pairs"),
    (["--emoji", "{noto}", "--held_out", "a", "--scenes", "20", "--max_stories", "3"],
     "--max_stories belongs to"),
    (["--pairs", "x", "--valid_fraction", "1"], "between 0 and 1"),
    (["--pairs", "x", "--test_fraction", "1"], "less than 1"),
    (["--pairs", "x", "--max_stories", "0"], "must be positive"),
    (["--emoji", "{noto}", "{warm}", "--held_out", "warm", "--min_count", "50"],
     "no pair can be used"),
    (["--pairs", "x", "--data_dir", "nowhere"], "no such file"),
    (["--pairs", "{noto}/pairs.jsonl", "--data_dir", "nowhere"], "no data in nowhere"),
    (["--pairs", "x", "--data_dir", "{out}"], "that is the --data_dir, which would be replaced")])
def test_bad_input(argv, message, story_dir, styles, tmp_path, fails):
    places = {folder.name: folder for folder in styles} | {"out": tmp_path / "out"}
    argv = [word.format(**places) for word in argv]
    assert message in fails(main, "--data_dir", story_dir, "--output_dir", tmp_path / "out", *argv)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_when_asked(prepare, story_dir, tmp_path, fails):
    source = write_mine(tmp_path)
    folder, _ = prepare("--pairs", source)
    assert "already there" in fails(main, "--data_dir", story_dir, "--output_dir", folder,
                                    "--pairs", source)
    prepare("--pairs", source, "--overwrite", "--image_size", 8)
    assert PictureRows(folder, "val_condition").size == 8


def test_killed_half_way_it_leaves_nothing(styles, story_dir, tmp_path):
    """A kill that cannot be heard leaves a workplace, which the next run removes."""
    argv = python(ROOT / "prep_image_data.py", "--data_dir", story_dir, "--output_dir",
                  tmp_path / "out", "--emoji", *styles, "--held_out", "cold", "--scenes")
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([*argv, "200000"], cwd=tmp_path, stderr=subprocess.PIPE,
                                   env=os.environ | {"TQDM_DISABLE": "1"})
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out.partial-*/new/subjects.jsonl*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (143, -signal.SIGKILL) and not (tmp_path / "out").exists()
        assert bool(list(tmp_path.iterdir())) == (number == signal.SIGKILL)
    subprocess.run([*argv, "20"], cwd=tmp_path, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_meta(tmp_path / "out")["splits"]["train"]["stories"] == 20
