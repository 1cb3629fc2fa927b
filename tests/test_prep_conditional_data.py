import hashlib
import json
import shutil
import time

import numpy as np
import pytest

from corpus import sources
from corpus.rows import TokenRows, load_meta, read_tokenizer_file
from corpus.sample_stories import sample_stories
from corpus.sentences import first_sentence, sentence_spans
from corpus.tokens import BOS, EOS, decode, load_tokenizer, row_kind
from data_prep import main as data_main
from prep_conditional_data import main, stories_of


@pytest.fixture
def prepare(data_dir, tmp_path, capsys):
    def run(*argv: object) -> tuple[str, str]:
        folder = tmp_path / "pairs"
        main(["--data_dir", str(data_dir), "--output_dir", str(folder), *map(str, argv)])
        return folder, capsys.readouterr().out
    return run


@pytest.mark.parametrize(("text", "sentences"), [
    ('"Hello!" said Tom. He ran.', ['"Hello!" said Tom.', "He ran."]),
    ('"Hello!" Tom said. He ran.', ['"Hello!" Tom said.', "He ran."]),
    ("'Hello!' Tom said. He ran.", ["'Hello!' Tom said.", "He ran."]),
    ('"Stop! Come here," said the old man. Tom did.',
     ['"Stop! Come here," said the old man.', "Tom did."]),
    ('"What?!" the little boy asked. Yes.', ['"What?!" the little boy asked.', "Yes."]),
    ('He said "hi." Then he left.', ['He said "hi."', "Then he left."]),
    ("Mr. Brown had 3.5 dogs, cats etc. and a hen. They ran!",
     ["Mr. Brown had 3.5 dogs, cats etc. and a hen.", "They ran!"]),
    ("J. K. went home at 5 p.m. by bus. So did I. Good.",
     ["J. K. went home at 5 p.m. by bus.", "So did I.", "Good."]),
    ("Wow!? Really... yes. It (the cat!) sat.", ["Wow!?", "Really... yes.", "It (the cat!) sat."]),
    ("\u201cHi!\u201d she said. \u201cGo.\u201d Bye\u2026 Now.",
     ["\u201cHi!\u201d she said.", "\u201cGo.\u201d", "Bye\u2026", "Now."]),
    ('"Never closed. He went.\n\nNew one. End', ['"Never closed. He went.', "New one.", "End"]),
    (" one line\nand the next.  Two ", ["one line\nand the next.", "Two"]),
    ("no mark at all", ["no mark at all"]), ("?!", ["?!"]), ("", []), (" \n\n ", [])])
def test_sentences(text, sentences):
    assert [text[a:b] for a, b in sentence_spans(text)] == sentences


@pytest.mark.parametrize("text", [
    "He ran. " * 100_000, '"' + "He ran. " * 100_000, "a.b" * 200_000, "a" + "\n" * 500_000 + "b",
    'He said "hi." ' + "and so on " * 50_000, "a. " + " " * 500_000 + "B"])
def test_sentences_of_a_very_long_text(text):
    """Each of these took a time that grows with the square of its length: a minute and more."""
    started = time.process_time()
    spans = list(sentence_spans(text))
    assert spans[0][0] == 0 and spans[-1][1] == len(text.rstrip())
    assert "".join(first_sentence(text)) == text
    assert time.process_time() - started < 5


def test_a_first_sentence_and_its_rest_are_the_story():
    for story in sample_stories(200, seed=3):
        first, rest = first_sentence(story)
        assert first + rest == story and first.endswith((".", "!", '"')) and rest[0].isspace()


def test_pairs_are_those_of_the_stories(data_dir, prepare):
    folder, text = prepare()
    meta = load_meta(folder)
    tokenizer = load_tokenizer(read_tokenizer_file(folder, meta))
    assert meta["tokenizer_sha256"] == load_meta(data_dir)["tokenizer_sha256"]
    assert meta["condition"]["kind"] == "first sentence" and "pairs" in text
    for split in ("train", "val"):
        rows = TokenRows(folder, split)
        told = rows.conditions()
        assert len(rows) == len(told) and {row_kind(told[i]) for i in range(len(told))} == {"story"}
        again, condition = [], None
        for i in range(len(rows)):
            if rows[i][0] == BOS:
                condition, ids = told[i], []
            assert np.array_equal(told[i], condition)  # of every row of a long text
            ids.extend(rows[i])
            if rows[i][-1] == EOS:
                again.append(decode(tokenizer, [*condition, *ids]))
        assert again == list(stories_of(data_dir, split, tokenizer)) and len(again) > 10
        # first sentence and rest have the very tokens that they have in the whole story
        whole = TokenRows(data_dir, split)
        ids = np.concatenate([whole[i] for i in range(len(whole))])
        pairs = np.concatenate([part for i in range(len(rows)) for part in (
            *([told[i]] if rows[i][0] == BOS else []), rows[i])])
        assert np.array_equal(ids[ids > EOS], pairs[pairs > EOS])
    data_main(["--data_dir", str(folder), "--verify"])


def test_other_stories_and_what_is_dropped(prepare, tmp_path):
    source = tmp_path / "stories.jsonl"
    long = "Once there was " + "a very, " * 60 + "very long sentence. And more."
    texts = ["One sentence alone.", long, None, *sample_stories(60)]
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    folder, text = prepare("--source", source, "--valid_fraction", 0.2, "--test_fraction", 0)
    meta = load_meta(folder)
    total = {}
    for split in ("train", "val"):
        for reason, count in meta["condition"]["dropped"][split].items():
            total[reason] = total.get(reason, 0) + count
            assert f"{count} dropped: {reason}" in text
    assert total.pop("the story is null") == 1
    assert total == {"one sentence alone": 1, "a condition of more than 64 tokens": 1}
    assert sum(meta["splits"][split]["stories"] for split in ("train", "val")) == 60
    assert meta["source"] == "stories.jsonl"


def test_ones_own_pairs(prepare, tmp_path):
    pairs = tmp_path / "mine.jsonl"
    lines = [{"condition": f"title {i}", "text": f"The story of number {i}."} for i in range(40)]
    lines += [{"condition": " ", "text": "No title."}, {"condition": "No text", "text": ""},
              {"condition": None, "text": "b"}, {"condition": "c", "text": None}]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    folder, text = prepare("--pairs", pairs, "--valid_fraction", 0.3, "--condition_len", 16,
                           "--test_fraction", 0)
    meta = load_meta(folder)
    tokenizer = load_tokenizer(read_tokenizer_file(folder, meta))
    found = set()
    for split in ("train", "val"):
        rows = TokenRows(folder, split)
        told = rows.conditions()
        found |= {(decode(tokenizer, told[i]), decode(tokenizer, rows[i]))
                  for i in range(len(rows))}
    assert found == {(line["condition"], line["text"]) for line in lines[:40]}
    assert meta["condition"]["kind"] == "pairs" and meta["condition"]["max_len"] == 16
    assert "1 dropped: the condition is empty" in text and "1 dropped: the text is empty" in text
    assert "1 dropped: the condition is null" in text and "1 dropped: the text is null" in text


def test_a_story_of_the_test_split_stays_in_it(data_dir, prepare, capsys):
    folder, text = prepare()
    assert load_meta(folder)["splits"].keys() == {
        split + end for split in ("train", "val", "test") for end in ("", "_condition")}
    assert " test: " in text
    meta = load_meta(folder)
    tokenizer = load_tokenizer(read_tokenizer_file(folder, meta))
    rows = TokenRows(folder, "test")
    told = rows.conditions()
    starts = [i for i in range(len(rows)) if rows[i][0] == BOS]
    whole = list(stories_of(data_dir, "test", tokenizer))
    assert len(starts) == len(whole) > 5
    assert all(story.startswith(decode(tokenizer, told[i]))
               for i, story in zip(starts, whole, strict=True))
    assert meta["sources"] == load_meta(data_dir)["sources"]


def test_ones_own_pairs_and_stories_have_a_test_split(prepare, tmp_path):
    lines = [{"condition": f"title {i}", "text": f"The story of number {i}."} for i in range(60)]
    pairs = tmp_path / "mine.jsonl"
    pairs.write_text("\n".join(map(json.dumps, lines)))
    folder, _ = prepare("--pairs", pairs, "--valid_fraction", 0.4, "--test_fraction", 0.3)
    splits = load_meta(folder)["splits"]
    assert (0 < splits["test"]["stories"] == splits["test_condition"]["stories"]
            < splits["val"]["stories"])
    assert sum(splits[split]["stories"] for split in ("train", "val", "test")) == 60
    content = pairs.read_bytes()
    assert load_meta(folder)["sources"] == [
        {"flag": "--pairs", "name": "mine.jsonl", "bytes": len(content),
         "sha256": hashlib.sha256(content).hexdigest()}]
    train, test = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text("<|endoftext|>".join(sample_stories(80)))
    test.write_text("A test. It is one.")
    folder, _ = prepare("--overwrite", "--source", train, "--test_source", test)
    assert load_meta(folder)["splits"]["test"]["stories"] == 1


def test_a_data_folder_of_before_has_no_test_pairs(data_dir, tmp_path):
    """Folders without a test split, and without checksums of their sources, are read as they are.
    """
    old = tmp_path / "old"
    shutil.copytree(data_dir, old)
    meta = json.loads((old / "meta.json").read_text())
    del meta["splits"]["test"], meta["sources"]
    (old / "meta.json").write_text(json.dumps(meta))
    main(["--data_dir", str(old), "--output_dir", str(tmp_path / "pairs")])
    assert load_meta(tmp_path / "pairs")["splits"].keys() == {
        "train", "val", "train_condition", "val_condition"}


def test_at_most_so_many(prepare):
    folder, _ = prepare("--max_stories", 7)
    meta = load_meta(folder)
    assert [meta["splits"][split]["stories"] for split in ("train", "val")] == [7, 7]


def test_no_more_is_read_than_asked_for(prepare, monkeypatch):
    read = []
    monkeypatch.setattr(sources, "read_hub", lambda split: (
        read.append(i) or f"Story {i} of {split}. The end." for i in range(500)))
    prepare("--source", "tinystories", "--max_stories", 5)
    assert len(read) <= 12


@pytest.mark.parametrize(("argv", "message"), [
    (["--data_dir", "nowhere"], "no data in nowhere"),
    (["--condition_len", "20"], "multiple of 16"),
    (["--pairs", "nowhere.jsonl"], "no such file"),
    (["--pairs", "x", "--source", "sample"], "leave out --source"),
    (["--valid_source", "x"], "belongs to --source"),
    (["--source", "nowhere.txt"], "no such file"),
    (["--valid_fraction", "0.5"], "leave it out"),
    (["--test_fraction", "0.5"], "leave it out"), (["--test_source", "x"], "belongs to --source"),
    (["--test_fraction", "1", "--source", "sample"], "less than 1"),
    (["--valid_fraction", "1", "--source", "sample"], "between 0 and 1"),
    (["--max_stories", "0"], "must be positive"),
    (["--data_dir", "{folder}"], "that is the --data_dir, which would be replaced")])
def test_bad_input(argv, message, data_dir, tmp_path, fails):
    folder = tmp_path / "pairs"
    argv = [word.format(folder=folder) for word in argv]
    assert message in fails(main, "--data_dir", data_dir, "--output_dir", folder, *argv)
    assert not list(tmp_path.iterdir())


def test_bad_pairs(data_dir, tmp_path, fails):
    pairs, folder = tmp_path / "mine.jsonl", tmp_path / "pairs"
    for content, message in ((b'{"condition": "a"}', "line 1: expected"),
                             (b'{"condition": "\xff", "text": "b"}', "not UTF-8"),
                             (b"", "no pair can be used: there is none"),
                             (b'{"condition": "", "text": "b"}', "condition is empty")):
        pairs.write_bytes(content)
        assert message in fails(main, "--data_dir", data_dir, "--output_dir", folder,
                                "--pairs", pairs, "--valid_fraction", 0.001)
        assert not folder.exists()


def test_a_folder_is_replaced_only_when_asked(prepare, data_dir, tmp_path, fails):
    folder, _ = prepare()
    assert "already there" in fails(main, "--data_dir", data_dir, "--output_dir", folder)
    prepare("--overwrite", "--max_stories", 3)
    assert load_meta(folder)["splits"]["train"]["stories"] == 3


def test_a_folder_without_or_with_too_few_conditions(data_dir, prepare, fails):
    folder, _ = prepare()
    with pytest.raises(Exception, match="has no conditions: prepare them"):
        TokenRows(data_dir).conditions()
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train_condition"] = meta["splits"]["val_condition"]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(Exception, match="conditions for"):
        TokenRows(folder).conditions()
