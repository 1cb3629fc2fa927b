import hashlib

import sources
from data_prep import DataConfig, prepare
from sources import describe_source, other_source


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
