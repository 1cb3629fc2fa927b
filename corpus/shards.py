"""The writer of a data folder: shards, splits, meta.json. A library of data_prep.py, which tells
the format, and of prep_conditional_data.py.
"""

from cli import atomic_file, require, write_json

import os
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from corpus.rows import FORMAT, FORMAT_VERSION, SHARD_MAGIC, SPLITS
from corpus.tokens import (
    BOS,
    BUCKET,
    EOS,
    MASK,
    PAD,
    ROW_KINDS,
    SPECIAL_TOKENS,
    row_kind,
    sha256,
    split_row,
)

SHARD_TOKENS = 2**25  # 64 MiB a shard
TEST_FRACTION = 0.5  # of the held-out stories


class SplitWriter:
    """Writes the shards of one split and keeps its counts."""

    def __init__(self, folder: Path, split: str, seq_len: int):
        self.folder, self.split, self.seq_len = folder, split, seq_len
        self.shards: list[dict] = []
        self.first: str | None = None  # of the texts
        self.varied = False  # whether another one came after it
        self.counts = Counter(stories=0, rows=0, tokens=0, bytes=0)
        self.histogram = {kind: Counter() for kind in ROW_KINDS}
        self.tokens, self.offsets = array("H"), array("q", [0])  # of the shard being filled

    def add(self, text: str, ids: list[int]) -> int:
        """Takes one story and its token ids; returns the bytes of its text."""
        size = len(text.encode())
        if self.first is None:
            self.first = text
        self.varied = self.varied or text != self.first
        self.counts.update(stories=1, bytes=size)
        for row in split_row(ids, self.seq_len):
            self.histogram[row_kind(row)][len(row)] += 1
            self.counts.update(rows=1, tokens=len(row))
            self.tokens.extend(row)
            self.offsets.append(len(self.tokens))
        if len(self.tokens) >= SHARD_TOKENS:
            self.flush()
        return size

    def flush(self) -> None:
        rows, tokens = len(self.offsets) - 1, len(self.tokens)
        if not rows:
            return
        name = f"{self.split}_{len(self.shards):05d}"
        data = np.array(self.tokens, dtype="<u2").tobytes()
        header = np.array([SHARD_MAGIC, FORMAT_VERSION, rows, tokens], dtype="<i8")
        index = header.tobytes() + np.array(self.offsets, dtype="<i8").tobytes()
        for suffix, content in ((".bin", data), (".idx", index)):
            with open(self.folder / (name + suffix), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.shards.append({"name": name, "rows": rows, "tokens": tokens,
                            "sha256": sha256(data), "index_sha256": sha256(index)})
        self.tokens, self.offsets = array("H"), array("q", [0])

    def summary(self) -> dict:
        return {**self.counts, "shards": self.shards}


def check_test_fraction(fraction: float | None, test_source: str | None) -> None:
    require(fraction is None or 0 <= fraction < 1,
            f"--test_fraction {fraction}: must be 0 or more and less than 1")
    require(fraction is None or not test_source,
            "--test_source brings the test stories: leave out --test_fraction")


def check_row_length(flag: str, length: int) -> None:
    require(length >= BUCKET and length % BUCKET == 0,
            f"{flag} {length}: must be a positive multiple of {BUCKET}")


def unchanged(before: dict, after: dict) -> dict:
    """What was said of the sources before they were read; UserError if it is otherwise now."""
    require(after == before, f"{before['source']} changed while it was read: run this again when "
                             "nobody writes there")
    return before


def settle_splits(writers: dict[str, SplitWriter], divided: str, empty: str,
                  fraction: float | None, test_source: str | None, hint: str = "") -> None:
    """Raises UserError where a split that must be there is empty, UserError(empty) where everything
    is, and takes an empty test split out of `writers`.

    `divided` says what a hash has divided: "all" the stories, the "held out" ones into validation
    and test, or "none" (they came with their splits). `fraction` is --test_fraction, None where the
    default holds: then held-out stories too few for both all become validation stories, and a line
    says so. `hint` says why there may be one story only.
    """
    stories = {split: writers[split].counts["stories"] for split in SPLITS}
    total, held_out = sum(stories.values()), stories["val"] + stories["test"]
    more = "raise --valid_fraction" if divided == "all" else "give more of them"
    require(total and (stories["train"] or divided == "all"), empty)
    if divided == "all":
        # What has the same text stays together, whatever the fraction.
        alone = [writers[split] for split in SPLITS if stories[split]]
        require(len(alone) > 1 or alone[0].varied,
                ("one story" if total == 1 else f"{total:,} stories of the same text")
                + " cannot be divided into training and validation stories: "
                + (hint or "give more text"))
        require(stories["train"], f"no training stories: all {total:,} are held out; lower "
                                  "--valid_fraction or give more text")
    require(stories["test"] or not test_source, f"{test_source}: no test stories in it; name "
                                                "another --test_source, or give --test_fraction")
    require(stories["test"] or not fraction, f"no test stories: --test_fraction {fraction} of "
            f"{held_out:,} held-out stories gives none; raise it, {more}, or do without: 0")
    short = fraction is None and not test_source
    move = (short and divided != "none" and stories["test"] and not stories["val"]
            and not writers["test"].shards)
    if move or not stories["test"]:
        for name in [name for name in writers if name.startswith("test")]:
            writer = writers.pop(name)
            if move:
                writer.split = name.replace("test", "val")
                writers[writer.split] = writer
        if short and held_out:
            print(f"no test split: {held_out:,} held-out stories are too few to divide; {more}, or "
                  "do without: --test_fraction 0")
    require(writers["val"].counts["stories"], "no validation stories: " + (
        "lower --test_fraction or give more text" if stories["test"] and not test_source else
        "raise --valid_fraction or --max_stories, or give more text" if divided == "all" else
        "those that are there are empty; name others"))


def finish_folder(folder: Path, writers: dict[str, SplitWriter], tokenizer: str, vocab_size: int,
                  **more: Any) -> dict:
    """Ends the shards, and writes tokenizer.json and meta.json with `more` in it; returns meta."""
    for writer in writers.values():
        writer.flush()
    train = writers["train"]
    text_tokens = train.counts["tokens"] - 2 * train.counts["stories"]  # less [BOS] and [EOS]
    meta = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "vocab_size": vocab_size,
        "seq_len": train.seq_len,
        "special_ids": dict(zip(SPECIAL_TOKENS, (PAD, MASK, BOS, EOS), strict=True)),
        "bytes_per_token": train.counts["bytes"] / text_tokens,
        "length_histogram": {kind: {str(length): lengths[length] for length in sorted(lengths)}
                             for kind, lengths in train.histogram.items()},
        "tokenizer_sha256": sha256(tokenizer.encode()),
        "splits": {split: writer.summary() for split, writer in writers.items()}, **more}
    with atomic_file(folder / "tokenizer.json", "w") as file:
        file.write(tokenizer)
    write_json(folder / "meta.json", meta)
    return meta
