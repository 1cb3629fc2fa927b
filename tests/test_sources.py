from cli import UserError

import hashlib
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import files, sources
from corpus.sources import describe_source, other_source
from data_prep import DataConfig, prepare

SEPARATOR = files.SEPARATOR


def pieces(path, monkeypatch, chunk: int) -> list[str]:
    monkeypatch.setattr(files, "CHUNK", chunk)
    return list(files.read_txt(path))


# ---- reading in pieces ---------------------------------------------------------------------------

def test_a_separator_stands_at_every_place_of_a_piece(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    for offset in range(2 * len(SEPARATOR) + 3):
        stories = ["x" * offset, "two\r\n", "", "é🙂"]
        path.write_text(SEPARATOR.join(stories), encoding="utf-8-sig", newline="")
        for chunk in range(1, 3 * len(SEPARATOR)):
            assert pieces(path, monkeypatch, chunk) == stories


def test_a_separator_stands_across_the_real_edge(tmp_path):
    path = tmp_path / "a.txt"
    for offset in range(2**20 - len(SEPARATOR) - 1, 2**20 + 1):
        path.write_text("x" * offset + SEPARATOR + "the second story")
        first, second = files.read_txt(path)
        assert (len(first), second) == (offset, "the second story")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.sampled_from("<|endoftxé🙂\r\n \u2028"), max_size=30), max_size=6),
       st.integers(1, 40), st.booleans())
def test_any_text_in_any_pieces_is_split_as_a_whole(tmp_path_factory, parts, chunk, mark):
    text = SEPARATOR.join(parts)
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    *ended, last = text.split(SEPARATOR)
    if not mark and text.startswith("\ufeff"):
        ended, last = text[1:].split(SEPARATOR)
    with pytest.MonkeyPatch.context() as patch:
        assert pieces(path, patch, chunk) == ended + ([last] if last.strip() else [])


def test_sixty_thousand_stories_on_one_line(tmp_path):
    path = tmp_path / "a.txt"
    stories = [f"story {i}, {'x' * (i % 97)}" for i in range(60_000)]
    path.write_text(SEPARATOR.join(stories))
    assert list(files.read_txt(path)) == stories


def test_a_line_longer_than_memory_should_hold(tmp_path):
    path = tmp_path / "a.txt"
    with open(path, "w") as file:
        for _ in range(300):
            file.write("x" * 100_000 + SEPARATOR)
    tracemalloc.start()
    assert sum(len(story) for story in files.read_txt(path)) == 30_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


@pytest.mark.parametrize("chunk", [7, 100, 2**20])
def test_the_longest_story_does_not_depend_on_the_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "LONGEST_STORY", 1000)
    path = tmp_path / "a.txt"
    path.write_text("one" + SEPARATOR + "x" * 1000 + SEPARATOR + "x" * 1000)
    assert [len(story) for story in pieces(path, monkeypatch, chunk)] == [3, 1000, 1000]
    for text in ("x" * 1001 + SEPARATOR, "one" + SEPARATOR + "x" * 1001):
        path.write_text(text)
        with pytest.raises(UserError, match="in 1,000 characters"):
            pieces(path, monkeypatch, chunk)


def test_long_lines_of_json(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    texts = ["a", "x" * (2**20 + 5), "é" * 3_000_000, "b"]
    path.write_text("\r\n".join(json.dumps({"text": text}) for text in texts))
    assert list(files.read_jsonl(path)) == texts
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    with pytest.raises(UserError, match="line 2: more than 1,000 characters"):
        list(files.read_jsonl(path))
    for length in (999, 1000, 1001):  # with its end, that of the last line may be missing
        line = json.dumps({"text": "x" * (length - 12)})
        for text in (line, line[:-1] + "}\n"):
            path.write_text(text)
            if len(text) <= 1000:
                assert len(list(files.read_jsonl(path))) == 1
            else:
                with pytest.raises(UserError, match="more than"):
                    list(files.read_jsonl(path))


def test_json_too_deep_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "[" * 200_000 + "\n")
    with pytest.raises(UserError, match="line 2: expected"):
        list(files.read_jsonl(path))


# ---- contents ------------------------------------------------------------------------------------

def test_files_are_known_by_their_content(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    one, same, other = (tmp_path / name for name in ("a/mine.txt", "b/copy.txt", "c/mine.txt"))
    one.write_text("a story\n" * 200_000)  # over a megabyte: read in pieces
    same.write_bytes(one.read_bytes())
    other.write_text("another story\n")
    meta = describe_source([str(one)], str(other))
    digest = hashlib.sha256(one.read_bytes()).hexdigest()
    assert meta["source"] == "mine.txt, mine.txt"
    assert meta["sources"][0] == {"flag": "--source", "name": "mine.txt", "bytes": 1_600_000,
                                  "sha256": digest}
    assert [entry["flag"] for entry in meta["sources"]] == ["--source", "--valid_source"]
    assert other_source(meta, describe_source([str(same)], str(other))) is None
    assert other_source(meta, describe_source([str(other)], str(other))) == (
        f"it was prepared from mine.txt (1,600,000 bytes, sha256 {digest[:8]}...), not from "
        f"mine.txt (14 bytes, sha256 {hashlib.sha256(other.read_bytes()).hexdigest()[:8]}...)")
    for wanted in (describe_source([str(one)]), describe_source([str(one), str(other)]),
                   describe_source([str(other)], str(one)), describe_source(["sample"]),
                   describe_source([str(one)], None, str(other)), describe_source(["tinystories"])):
        assert other_source(meta, wanted).startswith("it was prepared from mine.txt (")
    one.unlink()
    assert "mine.txt, to compare it with, is not there" in other_source(
        meta, describe_source([str(one)], str(other)))


def test_what_is_no_file_is_known_by_its_name():
    for source in (["tinystories"], ["sample"]):
        assert other_source(describe_source(source), describe_source(source)) is None
    assert "from sample" in other_source(describe_source(["sample"]),
                                         describe_source(["tinystories"]))


def test_a_folder_of_before_is_known_by_its_files_names(tmp_path):
    meta = {"source": "mine.txt"}
    assert other_source(meta, describe_source([str(tmp_path / "mine.txt")])) is None
    assert other_source(meta, describe_source(["sample"])) == (
        f"it was prepared from mine.txt, not from {describe_source(['sample'])['source']}")


def test_the_sources_are_in_the_data_folder(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "story {i}"}}\n' for i in range(90)))
    meta = prepare(DataConfig(source=[str(path)], data_dir=str(tmp_path / "data"), vocab_size=270,
                              seq_len=32, valid_fraction=0.4))
    assert meta["sources"] == sources.describe_source([str(path)])["sources"]
