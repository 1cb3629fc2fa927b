import cli
from cli import UserError, folders

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import data_prep
from corpus import files, rows, shards, sources, tokens, vocabulary
from corpus.rows import TokenRows, bucket_batches, load_meta, padding_share, read_tokenizer_file
from corpus.sample_stories import sample_stories
from corpus.tokens import BOS, EOS, decode, length_nats, load_tokenizer, split_row, token_bytes
from corpus.vocabulary import train_tokenizer
from data_prep import DataConfig, main, prepare
from training.loader import BatchStream

HOSTILE = [
    "Tom said [MASK] and [EOS], then [PAD] [BOS].", "naïve café — “quotes” 日本語 🙂🏽 e\u0301",
    "tab\there\r\nline\rend", "a", "\x00 null \u200b zero width \ufeff", "  inner   spaces  \n\n x",
    "ﷺ" * 40, "word " * 300, "\u202egnitset\u202c", "{}[]<|end|>",
]


def write_corpus(path: Path, texts: list) -> Path:
    if path.suffix == ".txt":
        path.write_bytes("".join(f"{text}\n<|endoftext|>\n" for text in texts).encode())
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "x": 1}) for text in texts) + "\n\n")
    else:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


def stored_texts(data_dir: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer((data_dir / "tokenizer.json").read_text(encoding="utf-8"))
    stories, ids = [], []
    rows = TokenRows(data_dir, split)
    for i in range(len(rows)):
        ids += list(rows[i])
        if rows[i][-1] == EOS:
            assert ids[0] == BOS
            stories.append(decode(tokenizer, ids))
            ids = []
    assert ids == []
    return stories


# ---- writing -------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_story_decodes_to_its_source(tmp_path, suffix):
    train = write_corpus(tmp_path / f"train{suffix}", HOSTILE)
    valid = write_corpus(tmp_path / f"valid{suffix}", ["", HOSTILE[1], "   "])
    meta = prepare(DataConfig(source=[str(train)], valid_source=str(valid), seq_len=64,
                              data_dir=str(tmp_path / "data"), vocab_size=300, num_workers=2,
                              test_fraction=0))
    assert stored_texts(tmp_path / "data", "train") == [text.strip() for text in HOSTILE]
    assert stored_texts(tmp_path / "data", "val") == [HOSTILE[1]]
    assert meta["dropped_empty"] == 2
    assert meta["splits"]["train"]["bytes"] == sum(len(t.strip().encode()) for t in HOSTILE)
    assert meta["source"] == f"train{suffix}, valid{suffix}"


def test_the_last_separator_may_be_missing_or_share_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two\n<|endoftext|>\nthree\n")
    assert [t.strip() for t in files.read_txt(path)] == ["one", "two", "three"]
    path.write_text("one\n", encoding="utf-8-sig")  # a byte order mark is no text
    assert list(files.read_txt(path)) == ["one\n"]


def test_split_is_by_text_and_max_stories_holds(tmp_path):
    texts = [f"story number {i % 50}" for i in range(200)]
    path = write_corpus(tmp_path / "a.jsonl", texts)
    config = DataConfig(source=[str(path)], data_dir=str(tmp_path / "data"), vocab_size=270,
                        seq_len=32, valid_fraction=0.3, max_stories=150, test_fraction=0)
    meta = prepare(config)
    train, valid = (set(stored_texts(tmp_path / "data", split)) for split in ("train", "val"))
    assert not train & valid and len(train | valid) == 50
    assert sum(meta["splits"][split]["stories"] for split in ("train", "val")) == 150


def test_held_out_stories_are_divided_into_validation_and_test(tmp_path):
    texts = [f"story number {i % 100}" for i in range(400)]
    path = write_corpus(tmp_path / "a.jsonl", texts)
    found = {}
    for fraction in (None, 0.25, 0):
        config = DataConfig(source=[str(path)], data_dir=str(tmp_path / str(fraction)),
                            vocab_size=270, seq_len=32, valid_fraction=0.4, test_fraction=fraction)
        splits = prepare(config)["splits"]
        assert splits.keys() == {"train", "val", *(["test"] if fraction != 0 else [])}
        found[fraction] = {split: stored_texts(Path(config.data_dir), split) for split in splits}
        assert sorted(sum(found[fraction].values(), [])) == sorted(texts)
        assert sum(len(set(part)) for part in found[fraction].values()) == 100
    # what is held out does not depend on how it is divided
    assert all(part["train"] == found[0]["train"] for part in found.values())
    assert len(found[0.25]["test"]) < len(found[0.25]["val"])
    assert 0.3 < len(found[None]["test"]) / len(found[0]["val"]) < 0.7


def test_which_story_is_for_the_test_does_not_hang_on_the_share_held_out():
    texts = [f"story {i}" for i in range(4000)]
    few = {text for text in texts if sources.side_of(text, 0.1, 0.5) == "test"}
    many = {text for text in texts if sources.side_of(text, 0.5, 0.5) == "test"}
    assert few < many and 150 < len(few) < 250 and 900 < len(many) < 1100


def test_a_validation_file_is_divided_and_a_test_file_is_not(tmp_path, fails):
    files = {name: write_corpus(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(40)])
             for name in ("train", "valid", "test")}
    argv = ["--source", files["train"], "--valid_source", files["valid"], "--vocab_size", "270",
            "--seq_len", "32", "--data_dir", tmp_path / "data"]
    main([*map(str, argv), "--test_fraction", "0.5"])
    found = {split: stored_texts(tmp_path / "data", split) for split in ("train", "val", "test")}
    assert found["train"] == [f"train {i}" for i in range(40)]
    assert sorted(found["val"] + found["test"]) == sorted(f"valid {i}" for i in range(40))
    assert 10 < len(found["val"]) < 30
    argv += ["--overwrite", "--test_source", files["test"]]
    main([*map(str, argv)])
    assert stored_texts(tmp_path / "data", "test") == [f"test {i}" for i in range(40)]
    assert len(stored_texts(tmp_path / "data", "val")) == 40
    assert "leave out --test_fraction" in fails(main, *argv, "--test_fraction", "0.5")
    files["test"].write_text("\n")
    assert "no test stories" in fails(main, *argv)


def test_too_few_held_out_stories_have_no_test_split(tmp_path, fails, capsys):
    path = write_corpus(tmp_path / "train.txt", HOSTILE)
    for text in ("one", "two", "three", "four"):  # on either side of the hash
        valid = write_corpus(tmp_path / "valid.txt", [text])
        argv = ["--source", path, "--valid_source", valid, "--vocab_size", "270", "--data_dir",
                tmp_path / "data", "--overwrite"]
        main([*map(str, argv)])
        said = capsys.readouterr().out
        assert said.count("no test split: 1 held-out") == 1 and "--test_fraction 0" in said
        assert stored_texts(tmp_path / "data", "val") == [text]
        with pytest.raises(UserError, match="prepare the data again with --test_fraction"):
            TokenRows(tmp_path / "data", "test")
    valid = write_corpus(tmp_path / "valid.txt", ["one"])
    assert "--test_fraction" in fails(main, *argv, "--test_fraction", "0.001")  # was asked for
    assert "lower --test_fraction" in fails(main, *argv, "--test_fraction", "0.999")
    main([*map(str, argv), "--test_fraction", "0"])
    assert "no test split" not in capsys.readouterr().out


def test_content_hashes_know_the_rows_and_nothing_else(tmp_path):
    def hashes(name, **settings):
        return rows.content_hashes(prepare(DataConfig(
            source=["sample"], data_dir=str(tmp_path / name), seq_len=64,
            **{"vocab_size": 300, "max_stories": 200, **settings})))
    first = hashes("a")
    assert first.keys() == {"tokenizer", "train", "val", "test"} and len(set(first.values())) == 4
    assert hashes("b", num_workers=1) == first
    assert hashes("c", test_fraction=0) == {
        **{key: first[key] for key in ("tokenizer", "train")}, "val": hashes("c2", test_fraction=0)[
            "val"]}
    assert hashes("d", vocab_size=301)["tokenizer"] != first["tokenizer"]
    assert hashes("e", max_stories=199)["train"] != first["train"]


def test_long_stories_become_rows_of_nearly_equal_length():
    for count in (1, 62, 63, 64, 200, 1000):
        ids = list(range(10, 10 + count))
        rows = split_row(ids, 64)
        assert sum(rows, []) == [BOS, *ids, EOS]
        assert len(rows) == -(-(count + 2) // 64)
        assert max(map(len, rows)) <= 64 and max(map(len, rows)) - min(map(len, rows)) <= 1
        # a row of [EOS] alone would have nothing to learn
        assert all(any(i > EOS for i in row) for row in rows)


def test_shards_are_cut_and_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1000)
    meta = prepare(DataConfig(source=["sample"], data_dir=str(tmp_path / "data"), max_stories=100,
                              vocab_size=300, seq_len=64))
    assert len(meta["splits"]["train"]["shards"]) > 3
    rows = TokenRows(tmp_path / "data")
    assert sum(len(rows[i]) for i in range(len(rows))) == meta["splits"]["train"]["tokens"]
    assert [len(rows[i]) for i in range(len(rows))] == rows.lengths.tolist()
    main(["--verify", "--data_dir", str(tmp_path / "data")])


def test_bytes_per_token_match_the_text(data_dir):
    meta = load_meta(data_dir)
    sizes = token_bytes(load_tokenizer(read_tokenizer_file(data_dir, meta)))
    rows = TokenRows(data_dir, "val")
    assert sum(int(sizes[rows[i]].sum()) for i in range(len(rows))) == (
        meta["splits"]["val"]["bytes"])
    counts = meta["splits"]["train"]
    assert meta["bytes_per_token"] == pytest.approx(
        counts["bytes"] / (counts["tokens"] - 2 * counts["stories"]))


def test_hub_stories_stream_through_datasets(tmp_path, monkeypatch):
    """The real loading code, pointed at local files instead of the hub."""
    import datasets
    real = datasets.load_dataset
    files = {split: str(write_corpus(tmp_path / f"{split}.parquet",
                                     [f"{split} story {i}" for i in range(40)]))
             for split in ("train", "validation")}

    def load(name, split, streaming):
        assert (name, streaming) == ("roneneldan/TinyStories", True)
        return real("parquet", data_files={split: files[split]}, split=split, streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    meta = prepare(DataConfig(data_dir=str(tmp_path / "data"), vocab_size=270, seq_len=32,
                              max_stories=30, test_fraction=0))
    assert stored_texts(tmp_path / "data", "train") == [f"train story {i}" for i in range(30)]
    assert stored_texts(tmp_path / "data", "val")[0] == "validation story 0"
    assert meta["licence"] == "CDLA-Sharing-1.0"


def test_no_network_names_the_other_sources(tmp_path, monkeypatch, fails):
    import datasets

    def load(*args, **kwargs):
        raise ConnectionError("offline")
    monkeypatch.setattr(datasets, "load_dataset", load)
    error = fails(main, "--data_dir", tmp_path / "data")
    assert "--source FILE" in error and "--source sample" in error
    assert os.listdir(tmp_path) == []


def test_command_line_reports(tmp_path, capsys):
    main(["--source", "sample", "--max_stories", "200", "--vocab_size", "300", "--data_dir",
          str(tmp_path / "data"), "--test_fraction", "0"])
    text = capsys.readouterr().out
    meta = load_meta(tmp_path / "data")
    counts = meta["splits"]["train"]
    assert f"train: {counts['stories']:,} stories, {counts['rows']:,} rows" in text
    assert sum(meta["splits"][s]["stories"] for s in ("train", "val")) == 200
    assert "wrote" in text and meta["vocab_size"] == 300


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_null_stories_are_dropped_and_counted(tmp_path, suffix, capsys):
    path = write_corpus(tmp_path / f"a{suffix}", [None, "", *HOSTILE, None, " ", None])
    main(["--source", str(path), "--valid_source", str(path), "--vocab_size", "270", "--data_dir",
          str(tmp_path / "data")])
    meta = load_meta(tmp_path / "data")
    assert (meta["dropped_null"], meta["dropped_empty"]) == (6, 4)
    said = capsys.readouterr().out
    assert "6 dropped: the story is null" in said and "4 dropped: the story is empty" in said
    assert stored_texts(tmp_path / "data", "train") == [text.strip() for text in HOSTILE]


def test_null_stories_of_the_hub_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "read_hub", lambda split: iter([None, *HOSTILE]))
    assert prepare(DataConfig(data_dir=str(tmp_path / "data"), vocab_size=270))["dropped_null"] == 2


# ---- the vocabulary ------------------------------------------------------------------------------

def test_the_vocabulary_of_ordinary_text_is_that_of_the_plain_algorithm():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    texts = list(sample_stories(300))
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=500, special_tokens=tokens.SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    assert train_tokenizer(texts, 500).to_str() == plain.to_str()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("aé🙂 \n\u3000"), max_size=30)), st.integers(1, 12))
def test_only_long_words_are_cut(parts, longest):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "LONGEST_WORD", longest)
        pieces = list(vocabulary.cut_long_words(text))
    assert "".join(pieces) == text
    runs = re.findall(r"\S+|\s+", text)
    if all(len(run) < longest for run in runs):
        assert pieces == [text]
    assert all(len(run) <= longest for piece in pieces for run in re.findall(r"\S+|\s+", piece))


@pytest.mark.parametrize("text", ["a" * 500_000, "a b" + " " * 500_000 + "c", "é\n" * 200_000,
                                  "".join(map(str, range(90_000)))])
def test_one_very_long_word(text):
    started = time.process_time()
    tokenizer = train_tokenizer([text], 1000)
    ids = [i for *_, ids in vocabulary.tokenize_batches([("train", text)], tokenizer) for i in ids]
    assert decode(tokenizer, ids) == text
    assert time.process_time() - started < 10  # uncut, the first took minutes


def test_an_error_in_the_texts_ends_the_learning():
    def texts():
        yield from ["some text"] * 10
        raise UserError("a bad line")
    before = threading.active_count()
    with pytest.raises(UserError, match="a bad line"):
        train_tokenizer(texts(), 300)
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_error_in_the_tokenizer_is_heard():
    with pytest.raises(TypeError):  # not a wait without an end
        train_tokenizer(iter([b"x" * 1000] * 10_000), 300)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to one process")
@pytest.mark.parametrize("what", ["learning", "tokenizing"])
def test_ctrl_c_is_heard_inside_the_tokenizer(what, tmp_path):
    # One word that keeps the tokenizer's own code busy for many seconds.
    code = ("import sys, cli, data_prep\nfrom corpus import vocabulary\n"
            "vocabulary.LONGEST_WORD = 10**9\n"
            f"if {what == 'tokenizing'}:\n"
            "    real = vocabulary.train_tokenizer\n"
            "    data_prep.train_tokenizer = lambda texts, size: real(['ab'], size)\n"
            "    data_prep.without_null_and_empty = lambda *_: iter(\n"
            "        [('train', 'ab' * 200_000_000)])\n"
            "class Told(vocabulary.Background):\n"
            "    def result(self):\n"
            "        print('busy', flush=True)\n"
            "        return super().result()\n"
            "vocabulary.Background = Told\n"
            "cli.run(data_prep.main)\n")
    path = write_corpus(tmp_path / "a.jsonl", ["ab" * 150_000])
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--source", str(path), "--valid_fraction", "0.000001",
         "--data_dir", str(tmp_path / "data")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(2 if what == "tokenizing" else 1):
            assert process.stdout.readline() == "busy\n"
        time.sleep(0.5)
        assert process.poll() is None
        started = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert time.perf_counter() - started < 5
    finally:
        process.kill()
    assert (process.returncode, error) == (130, "error: interrupted\n")
    assert os.listdir(tmp_path) == ["a.jsonl"]


# ---- bad input -----------------------------------------------------------------------------------

BAD_FILES = {
    "empty.txt": b"", "blank.jsonl": b"\n", "latin.txt": b"caf\xe9\n<|endoftext|>\n",
    "broken.jsonl": b'{"text": "a"}\n{"text": ', "other.jsonl": b'{"story": "a"}\n',
    "number.jsonl": b'{"text": 5}\n', "bad.parquet": b"not parquet", "kind.csv": b"text\nhello\n",
    "endless.txt": b"no separator anywhere " * 60_000,
    "half_emoji.jsonl": b'{"text": "\\ud83d"}\n',
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, tmp_path, fails):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    assert name in fails(main, "--source", path, "--data_dir", tmp_path / "data")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(("content", "message"), [
    ("one story, a long one", "has no <|endoftext|>, which must stand after every story"),
    ("one\n\ntwo\n\nthree\n", "after every story, but a blank line 2 times"),
    ("one\n---\ntwo\n---\nthree\n", "but a line like --- 2 times"),
    ("one\r\n* * *\r\ntwo\r\n* * *\r\n", "but a line like * * * 2 times"),
    ("one</s>two", "but </s> 1 times"),
    ("one\n</s>\ntwo\n</s>\n", "no <|endoftext|> in it, but </s> 2 times"),
    ("one<|end_of_text|>two<|end_of_text|>", "but <|end_of_text|> 2 times"),
    ("one\n<endoftext>\ntwo\n<endoftext>\n", "but <endoftext> 2 times"),
    ("one\n<|endofstory|>\ntwo\n<|endofstory|>\n", "but <|endofstory|> 2 times"),
    ("one <|EndOfText|> two <|EndOfText|>", "but <|EndOfText|> 2 times"),
    ("one [EOS] two [EOS]", "but [EOS] 2 times"),
    ("one two </s>\n" * 100_000, "in 1,048,576 characters, but </s> 8"),
    ("one two.\n\n" * 150_000, "in 1,048,576 characters, but a blank line 10"),
    ("the same\n<|endoftext|>\n" * 5, "5 stories of the same text cannot be divided")])
def test_one_story_alone_is_told_why(content, message, tmp_path, fails):
    path = tmp_path / "a.txt"
    path.write_text(content, newline="")
    for fraction in (0.05, 0.999):  # the advice of one must not lead to the other
        error = fails(main, "--source", path, "--data_dir", tmp_path / "data", "--valid_fraction",
                      fraction)
        assert message in error and "--valid_fraction" not in error


def test_all_stories_held_out(tmp_path, fails):
    path = write_corpus(tmp_path / "a.txt", HOSTILE)
    assert "all 10 are held out; lower --valid_fraction" in fails(
        main, "--source", path, "--valid_fraction", "0.9999", "--data_dir", tmp_path / "data")


def test_two_files_without_separators_are_told_of(tmp_path, capsys):
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text("One.\n\nTwo.\n\nThree.\n")
    main(["--source", str(tmp_path / "train.txt"), "--valid_source", str(tmp_path / "valid.txt"),
          "--data_dir", str(tmp_path / "data"), "--vocab_size", "270"])
    assert "read as one story: " in (said := capsys.readouterr().out)
    assert "train.txt has no <|endoftext|>" in said and "a blank line 2 times" in said


@pytest.mark.parametrize("column, values", [("story", ["a"]), ("text", [1, 2])])
def test_parquet_without_texts(column, values, tmp_path, fails):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({column: values}), tmp_path / "a.parquet")
    assert "`text`" in fails(main, "--source", tmp_path / "a.parquet", "--data_dir",
                             tmp_path / "data")


@pytest.mark.parametrize("argv", [
    ["--source", "missing.txt"], ["--vocab_size", "259"], ["--vocab_size", "70000"],
    ["--seq_len", "100"], ["--seq_len", "0"], ["--valid_fraction", "1"], ["--max_stories", "0"],
    ["--num_workers", "-1"], ["--source", "sample", "--valid_source", "x.txt"],
    ["--source", "sample", "--max_stories", "3", "--valid_fraction", "0.0001"],
    ["--source", "sample", "--max_stories", "100001"], ["--source", "."],
    ["--source", __file__.replace(".py", ".txt"), "--valid_source", "missing.txt"],
])
def test_bad_flags(argv, tmp_path, fails):
    fails(main, "--data_dir", tmp_path / "data", *argv)
    assert not (tmp_path / "data").exists()


def test_an_existing_folder_is_kept(tmp_path, fails):
    argv = ["--source", "sample", "--max_stories", "60", "--vocab_size", "300", "--data_dir",
            str(tmp_path / "data")]
    main(argv)
    before = (tmp_path / "data" / "meta.json").read_bytes()
    assert "--overwrite" in fails(main, *argv)
    assert (tmp_path / "data" / "meta.json").read_bytes() == before
    main([*argv, "--overwrite", "--max_stories", "50"])
    assert sum(s["stories"] for s in load_meta(tmp_path / "data")["splits"].values()) == 50
    assert os.listdir(tmp_path) == ["data"]
    # somebody's own folder of that name is never replaced
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").touch()
    fails(main, *argv[:-1], tmp_path / "own", "--overwrite")
    assert (tmp_path / "own" / "thesis.txt").exists()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD = {"meta.json": "old", "train_00000.bin": "old", "train_00001.bin": "old"}
NEW = {"meta.json": "new", "train_00000.bin": "new", "test_00000.bin": "new"}


def write_new(folder: Path) -> dict:
    for name, content in NEW.items():
        (folder / name).write_text(content)
    return {}


def old_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    for name, content in OLD.items():
        (path / name).write_text(content)
    return path


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"),
                                   OSError(errno.EBUSY, "busy"), KeyboardInterrupt()])
def test_a_failed_replacement_keeps_the_old_folder(error, tmp_path, monkeypatch):
    """Whichever of its renames fails."""
    rename = Path.rename
    for fails_at in range(20):
        data = old_folder(tmp_path / str(fails_at) / "data")
        count = iter(range(1000))

        def failing(self, target, count=count, fails_at=fails_at):
            if next(count) == fails_at:
                raise error
            return rename(self, target)
        monkeypatch.setattr(Path, "rename", failing)
        try:
            folders.make_folder(str(data), "--data_dir", True, write_new)
        except type(error):
            assert contents(data) == OLD
            assert os.listdir(data.parent) == ["data"]
        else:
            assert contents(data) == NEW
            break
    assert fails_at == len(OLD) + len(NEW)


KILLED = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cli import folders
NEW, steps = eval(sys.argv[3]), iter(range(int(sys.argv[4])))
def write(folder):
    for name, content in NEW.items():
        (folder / name).write_text(content)
    return {}
def step(real):
    def call(*args, **options):
        if next(steps, None) is None:
            os._exit(9)
        return real(*args, **options)
    return call
for owner, names in ((Path, ("rename", "unlink", "rmdir", "mkdir", "write_text")),
                     (os, ("replace", "fsync", "rmdir", "unlink"))):
    for name in names:
        setattr(owner, name, step(getattr(owner, name)))
folders.make_folder(sys.argv[2], "--data_dir", True, write)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes by the dozen")
@pytest.mark.parametrize("there", [True, False])
def test_a_kill_at_any_step_leaves_a_whole_folder_or_none(there, tmp_path, capsys):
    for steps in range(100):
        data = tmp_path / str(steps) / "data"
        if there:
            old_folder(data)
        child = os.fork()
        if child == 0:
            try:
                sys.argv = ["-c", str(ROOT), str(data), repr(NEW), str(steps)]
                exec(KILLED, {})
                os._exit(0)
            except BaseException:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        killed = {name: content for name, content in (
            (path.name, path.read_text()) for path in (data.iterdir() if data.exists() else [])
            if path.is_file() and path.name != ".lock")}
        assert "meta.json" not in killed or killed in (OLD, NEW)  # readers ask for it
        try:  # the next run, which is not asked to replace anything
            folders.make_folder(str(data), "--data_dir", False, write_new)
        except UserError as error:
            assert "already there" in str(error)
            # from where the replacement is decided on, the next run completes it
            assert contents(data) == NEW or contents(data) == killed == OLD
        else:
            assert contents(data) == NEW and not there
        assert os.listdir(data.parent) == ["data"]
        if status == 0:
            break
    assert steps > 10


def test_a_strangers_folder_of_that_name_is_kept(tmp_path):
    for name in ("data.partial", "data.old.partial", "data.partial-abcdefgh", "data.partial-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").touch()
    folders.make_folder(str(tmp_path / "data"), "--data_dir", False, write_new)
    inside = tmp_path / "data" / "partial-abcdefgh"
    inside.mkdir()
    (inside / "thesis.txt").touch()
    with pytest.raises(UserError, match="already there"):
        folders.make_folder(str(tmp_path / "data"), "--data_dir", False, write_new)
    assert len(list(tmp_path.rglob("thesis.txt"))) == 5


@pytest.mark.skipif(os.name == "nt", reason="locks within one process")
def test_a_run_that_still_writes_is_left_alone(tmp_path):
    for there in (False, True):
        data = tmp_path / "data"

        def write(folder, data=data):
            with pytest.raises(UserError, match=f"process {os.getpid()} is (writing|at work)"):
                folders.make_folder(str(data), "--data_dir", True, write_new)
            return write_new(folder)
        folders.make_folder(str(data), "--data_dir", there, write)
        assert contents(data) == NEW and os.listdir(tmp_path) == ["data"]

    def beaten(folder):
        old_folder(tmp_path / "other")
        return write_new(folder)
    with pytest.raises(UserError, match="another process has made"):
        folders.make_folder(str(tmp_path / "other"), "--data_dir", False, beaten)
    assert contents(tmp_path / "other") == OLD


@pytest.fixture
def volume(tmp_path):
    """Mounts another file system on a folder, as a container's volume."""
    mounted = []

    def mount(folder: Path, options: str = "size=64m") -> Path:
        folder.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
                              capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip("mounting needs the rights of root")
        mounted.append(folder)
        return folder
    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_mounted_folder_is_filled_and_replaced(tmp_path, volume, fails):
    data = volume(tmp_path / "volume" / "data")
    (data / "lost+found").mkdir()  # as a new ext4 volume has
    argv = ["--source", "sample", "--max_stories", "60", "--vocab_size", "300", "--data_dir",
            str(data)]
    main(argv)
    main(["--verify", "--data_dir", str(data)])
    assert "already there" in fails(main, *argv)
    main([*argv, "--overwrite", "--max_stories", "50"])
    main(["--verify", "--data_dir", str(data)])
    assert sum(split["stories"] for split in load_meta(data)["splits"].values()) == 50
    assert not list(data.glob("partial-*")) and (data / "lost+found").exists()
    assert os.listdir(data.parent) == ["data"]


def test_a_folder_that_cannot_be_renamed(tmp_path, monkeypatch):
    """The same without the rights to mount: nothing but files inside the folder is renamed."""
    rename = Path.rename

    def busy(self, target):
        if tmp_path / "data" in (self, Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", busy)
    (tmp_path / "data").mkdir()
    for overwrite in (False, True):
        folders.make_folder(str(tmp_path / "data"), "--data_dir", overwrite, write_new)
        assert contents(tmp_path / "data") == NEW


@pytest.mark.parametrize("there", [True, False])
def test_a_really_full_disk(there, tmp_path, volume, fails):
    disk = volume(tmp_path / "disk", "size=64k")
    if there:
        old_folder(disk / "data")
    path = write_corpus(tmp_path / "a.txt", list(sample_stories(1000)))
    error = fails(main, "--source", path, "--vocab_size", "300", "--data_dir", disk / "data",
                  "--overwrite")
    assert "No space left" in error and str(disk / "data") in error
    assert os.listdir(disk) == (["data"] if there else [])
    assert not there or contents(disk / "data") == OLD


def test_a_folder_that_cannot_be_written(tmp_path, volume, fails):
    disk = volume(tmp_path / "disk")
    for name in ("data", "empty"):
        (disk / name).mkdir()
    (disk / "data" / "meta.json").touch()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name in ("data", "empty", "new"):
        assert "cannot write into" in fails(main, "--source", "sample", "--overwrite", "--data_dir",
                                            disk / name)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_as_the_folder(tmp_path, fails):
    (tmp_path / "link").symlink_to("elsewhere/data")  # to nowhere: a volume that is not mounted?
    error = fails(main, "--source", "sample", "--data_dir", tmp_path / "link")
    assert "elsewhere/data, which does not exist" in error
    assert os.listdir(tmp_path) == ["link"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data").mkdir()
    folders.make_folder(str(tmp_path / "link"), "--data_dir", False, write_new)
    assert contents(tmp_path / "elsewhere" / "data") == contents(tmp_path / "link") == NEW
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"]
    (tmp_path / "circle").symlink_to("circle")
    fails(main, "--source", "sample", "--data_dir", tmp_path / "circle")


def test_a_file_in_the_place_of_the_folder(tmp_path, fails):
    (tmp_path / "data").touch()
    assert "is a file" in fails(main, "--source", "sample", "--data_dir", tmp_path / "data")


def test_a_data_folder_of_windows_is_the_same(tmp_path, monkeypatch):
    """Text mode there writes "\\r\\n" unless told otherwise, which would break the checksums."""
    def windows_open(path, mode="r", **options):
        if "b" not in mode:
            options.setdefault("newline", "\r\n")
        return open(path, mode, **options)
    monkeypatch.setattr(cli, "open", windows_open, raising=False)
    meta = prepare(DataConfig(source=["sample"], data_dir=str(tmp_path / "data"), max_stories=60,
                              vocab_size=300))
    read_tokenizer_file(tmp_path / "data", meta)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM of Linux")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    text = "".join(f"{story}\n<|endoftext|>\n" for story in sample_stories(4000))
    peak = {}
    for copies in (5, 25):  # 8 and 42 MB
        path = tmp_path / "corpus.txt"
        path.write_text(text * copies)
        code = ("import data_prep\nfrom corpus import shards\nshards.SHARD_TOKENS = 2**18\n"
                f"data_prep.main(['--source', {str(path)!r}, '--data_dir', "
                f"{str(tmp_path / str(copies))!r}, '--tokenizer_stories', '1000'])\n"
                "print([line for line in open('/proc/self/status') if 'VmHWM' in line])")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              text=True, check=True)
        peak[copies] = int(done.stdout.split()[-2]) / 1024
    assert peak[25] - peak[5] < 10, peak  # MB, for 34 MB more of text


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, fails):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shards.SplitWriter, "flush", full)
    error = fails(main, "--source", "sample", "--max_stories", "60", "--vocab_size", "300",
                  "--data_dir", tmp_path / "data")
    assert "No space left" in error and os.listdir(tmp_path) == []


def edit_index(data_dir: Path, position: int, value: int) -> None:
    path = data_dir / "train_00000.idx"
    index = np.fromfile(path, dtype="<i8")
    index[position] = value
    index.tofile(path)


def truncate(path: Path, keep: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(keep)


def edit_meta(data_dir: Path, **changes) -> None:
    meta = json.loads((data_dir / "meta.json").read_text())
    (data_dir / "meta.json").write_text(json.dumps({**meta, **changes}))


def drop_from_meta(data_dir: Path, key: str) -> None:
    meta = json.loads((data_dir / "meta.json").read_text())
    del meta[key]
    (data_dir / "meta.json").write_text(json.dumps(meta))


DAMAGE = {
    "train_00000.bin is truncated": lambda d: truncate(d / "train_00000.bin", 99),
    "train_00000.idx is truncated": lambda d: truncate(d / "train_00000.idx", 80),
    "idx is truncated: .* 83 found": lambda d: truncate(d / "train_00000.idx", 83),
    "idx is truncated": lambda d: truncate(d / "train_00000.idx", 8),
    "not a shard index": lambda d: edit_index(d, 0, 7),
    "format version 9": lambda d: edit_index(d, 1, 9),
    "format version 2": lambda d: edit_meta(d, format_version=2),
    "not the description": lambda d: edit_meta(d, format="photos"),
    "meta.json is not": lambda d: (d / "meta.json").write_text("{"),
    "is missing": lambda d: (d / "train_00000.bin").unlink(),
    "no data in": lambda d: (d / "meta.json").unlink(),
    "has no train shards": lambda d: edit_meta(d, splits={"train": {"shards": []}}),
    "lacks splits": lambda d: drop_from_meta(d, "splits"),
    "is not the description": lambda d: drop_from_meta(d, "format_version"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_folders_are_refused(message, data_dir, tmp_path, fails):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    DAMAGE[message](copy)
    with pytest.raises(UserError, match=message):
        TokenRows(copy)
    fails(main, "--verify", "--data_dir", copy)


def test_tokenizer_must_be_the_one_of_the_data(data_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    meta = load_meta(copy)
    other = train_tokenizer(["other text"], 270).to_str()
    (copy / "tokenizer.json").write_text(other)
    with pytest.raises(UserError, match="not the tokenizer"):
        read_tokenizer_file(copy, meta)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="missing"):
        read_tokenizer_file(copy, meta)
    with pytest.raises(UserError, match="not a tokenizer"):
        load_tokenizer("{}")
    with pytest.raises(UserError, match="special tokens"):
        load_tokenizer(other.replace("[MASK]", "[HOLE]"))


def test_verify_finds_a_flipped_bit(data_dir, tmp_path, fails, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    main(["--verify", "--data_dir", str(copy)])
    assert "every checksum is right" in capsys.readouterr().out
    data = bytearray((copy / "val_00000.bin").read_bytes())
    data[100] ^= 1
    (copy / "val_00000.bin").write_bytes(data)
    assert "val_00000.bin" in fails(main, "--verify", "--data_dir", copy)


# ---- reading -------------------------------------------------------------------------------------

def test_batches_hold_every_row_once_within_the_budget():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 257, 5000)
    for merge in (True, False):
        batches = bucket_batches(lengths, 4096, rng.permutation(5000), merge)
        assert sorted(np.concatenate(batches).tolist()) == list(range(5000))
        for batch in batches:
            assert len(batch) * tokens.round_up(int(lengths[batch].max())) <= 4096
    # without merging, a row's padding depends on its own length alone
    assert all(len(set(tokens.round_up(lengths[batch]))) == 1 for batch in batches)
    # a budget below the row length still gives one row a batch
    assert all(len(batch) == 1 for batch in bucket_batches(lengths, 1))


def test_padding_is_small_for_real_lengths():
    # TinyStories-like: mean 176 tokens, standard deviation 50
    lengths = np.random.default_rng(0).normal(176, 50, 10_000).clip(20, 256).astype(int)
    assert padding_share(lengths, bucket_batches(lengths, 4096)) < 0.05


def test_stream_is_a_function_of_seed_epoch_and_position(data_dir):
    rows = TokenRows(data_dir)
    first, again, other = (BatchStream(rows, 1024, seed) for seed in (3, 3, 4))
    seen = [next(first) for _ in range(120)]
    assert first.epoch >= 1  # past the end of an epoch
    assert all(np.array_equal(a, next(again)) for a in seen)
    assert any(a.shape != b.shape or not np.array_equal(a, b)
               for a, b in zip(seen, other, strict=False))
    position = 37
    stream = BatchStream(rows, 1024, 3)
    for _ in range(position):
        next(stream)
    resumed = BatchStream(rows, 1024, 3, epoch=stream.epoch, position=stream.position)
    assert resumed.epochs == stream.epochs
    assert all(np.array_equal(a, next(resumed)) for a in seen[position:])
    assert next(iter(resumed)).dtype == np.int64


def test_length_code_is_a_probability(data_dir):
    meta = load_meta(data_dir)
    total = 0.0
    for kind in tokens.ROW_KINDS:
        for length in range(1, meta["seq_len"] + 1):
            row = np.full(length + (length == 1 and kind == "story"), 10)
            if kind in ("story", "start"):
                row[0] = BOS
            if kind in ("story", "end"):
                row[-1] = EOS
            if len(row) == length:
                assert tokens.row_kind(row) == kind
                total += np.exp(-length_nats(meta, [row]))
    assert total <= 1 and total == pytest.approx(1, abs=1e-3)


def test_all_of_a_row_kind_is_known(data_dir):
    rows = TokenRows(data_dir)
    kinds = {tokens.row_kind(rows[i]) for i in range(len(rows))}
    assert {"start", "end"} <= kinds
    histogram = load_meta(data_dir)["length_histogram"]
    assert sum(sum(lengths.values()) for lengths in histogram.values()) == len(rows)


def test_a_source_that_grows_while_it_is_read(tmp_path, monkeypatch, fails):
    source = tmp_path / "grow.txt"
    source.write_text("".join(f"Story {i}.\n<|endoftext|>\n" for i in range(60)))
    finish = shards.settle_splits

    def append(*args):
        with open(source, "a") as file:
            file.write("One more.\n<|endoftext|>\n")
        return finish(*args)
    monkeypatch.setattr(data_prep, "settle_splits", append)
    error = fails(main, "--source", source, "--data_dir", tmp_path / "data")
    assert "changed while it was read" in error and not (tmp_path / "data").exists()


def test_two_processes_do_not_replace_one_folder_together(tmp_path):
    old_folder(tmp_path / "data")

    def write(folder):
        with pytest.raises(UserError, match=f"process {os.getpid()} "):
            folders.make_folder(str(tmp_path / "data"), "--data_dir", True, write_new)
        return write_new(folder)
    folders.make_folder(str(tmp_path / "data"), "--data_dir", True, write)
    assert contents(tmp_path / "data") == NEW
