"""The reader of a data folder: its description, its rows, batches of rows of like length. A library
for whatever trains or measures.

    rows = TokenRows("data", "test")
    for indices in bucket_batches(rows.lengths, 4096):
        tokens = rows.batch(indices)                 # (B, L) int64

Whatever is in the files is looked at before it is used; data_prep.py tells their format.
"""

from cli import require

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpus.tokens import (
    EOS,
    ROW_KINDS,
    decode,
    is_count,
    is_length_histogram,
    pad_rows,
    round_up,
    sha256,
)

SPLITS = ("train", "val", "test")
FORMAT, FORMAT_VERSION = "diffusion-llm data", 1
SHARD_MAGIC = int.from_bytes(b"dllmrows", "little")
SHARD_HEADER = 4  # int64: magic, format version, rows, tokens; then rows + 1 offsets
AGAIN = "prepare the data again or copy the folder again"
META_KEYS = ("source", "licence", "vocab_size", "seq_len", "bytes_per_token", "length_histogram",
             "tokenizer_sha256", "splits")


def load_meta(data_dir: str | Path) -> dict:
    """meta.json of a data folder, checked to be one that this version reads."""
    path = Path(data_dir) / "meta.json"
    require(path.is_file(), f"no data in {data_dir}: run `python data_prep.py --data_dir "
                            f"{data_dir}` first (it has --source sample for a first try)")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        known = meta["format"] == FORMAT
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    require(known, f"{path} is not the description of a data folder; prepare the data again")
    check_version(path, version)
    missing = [key for key in META_KEYS if key not in meta]
    require(not missing, f"{path} lacks {', '.join(missing)}; prepare the data again")
    wrong = wrong_entries(meta)
    require(not wrong, f"{path} is damaged ({', '.join(wrong)}); prepare the data again")
    return meta


def wrong_entries(meta: dict) -> list[str]:
    """The names of the entries of meta.json that are not of the form that is written here."""
    def is_split(split: Any) -> bool:
        return (isinstance(split, dict) and isinstance(split.get("shards"), list)
                and all(map(is_shard, split["shards"])))

    def is_shard(shard: Any) -> bool:  # a name is a file in this very folder
        return (isinstance(shard, dict)
                and re.fullmatch(r"[a-z_]+_[0-9]{5,}", str(shard.get("name"))) is not None
                and all(is_count(shard.get(key)) for key in ("rows", "tokens"))
                and all(isinstance(shard.get(key), str) for key in ("sha256", "index_sha256")))

    def is_source(source: Any) -> bool:
        return isinstance(source, dict) and all(
            isinstance(source.get(key), str) for key in ("flag", "name")) and (
            "sha256" not in source or source["sha256"] is None
            or isinstance(source["sha256"], str) and type(source.get("bytes")) is int)

    def is_condition(condition: dict) -> bool:
        size, sort = condition.get("size"), condition.get("encoder", "text")
        if sort == "image":
            return type(size) is int and 8 <= size <= 1024 and size % 8 == 0
        return sort != "text" or is_count(condition.get("max_len"))

    splits, condition, sources = meta["splits"], meta.get("condition"), meta.get("sources", [])
    size = meta["bytes_per_token"]
    right = {
        **{key: isinstance(meta[key], str) for key in ("source", "licence", "tokenizer_sha256")},
        "vocab_size": is_count(meta["vocab_size"], 65536),
        "seq_len": is_count(meta["seq_len"], 2**30),
        "bytes_per_token": isinstance(size, (int, float)) and 0 < size < 2**62,
        "length_histogram": is_length_histogram(meta["length_histogram"], ROW_KINDS),
        "splits": isinstance(splits, dict) and all(map(is_split, splits.values())),
        "sources": isinstance(sources, list) and all(map(is_source, sources)),
        "condition": condition is None or isinstance(condition, dict) and is_condition(condition)}
    return [key for key, fine in right.items() if not fine]


def content_hashes(meta: dict) -> dict[str, str]:
    """What a data folder holds, from its meta.json: one checksum for the tokenizer and for the
    shards of each split. Equal hashes mean equal rows, wherever the folder lies."""
    return {"tokenizer": meta["tokenizer_sha256"]} | {
        split: sha256("".join(shard[key] for shard in summary["shards"]
                              for key in ("sha256", "index_sha256")).encode())
        for split, summary in meta["splits"].items()}


def check_version(path: Path, version: int) -> None:
    require(version == FORMAT_VERSION, f"{path} has data format version {version}, this program "
            f"reads version {FORMAT_VERSION}: prepare the data again with this data_prep.py")


def read_tokenizer_file(data_dir: str | Path, meta: dict) -> str:
    """The text of tokenizer.json, checked against meta.json."""
    path = Path(data_dir) / "tokenizer.json"
    require(path.is_file(), f"{path} is missing; prepare the data again")
    text = path.read_bytes().decode("utf-8", errors="replace")
    require(sha256(text.encode()) == meta["tokenizer_sha256"],
            f"{path} is not the tokenizer that made this data; prepare the data again")
    return text


def open_shard(folder: Path, shard: dict, magic: int, header: int, entries: int, what: str,
               ) -> tuple[Path, Path, np.ndarray]:
    """The paths of a shard's .bin and .idx, which are there, and the latter's header, (header,)
    int64: its magic and version are right, and behind it stand so many `entries`."""
    binary = folder / f"{shard['name']}.bin"
    index = binary.with_suffix(".idx")
    for path in (binary, index):
        require(path.is_file(), f"{path} is missing; {AGAIN}")
    size, expected = index.stat().st_size, 8 * (header + entries)
    truncated = f"{index} is truncated: {expected} bytes expected, {size} found; {AGAIN}"
    require(size >= 8 * header, truncated)
    found = np.fromfile(index, dtype="<i8", count=header)
    require(int(found[0]) == magic, f"{index} is not {what}; {AGAIN}")
    check_version(index, int(found[1]))
    require(size == expected, truncated)
    return binary, index, found


class TokenRows:
    """The rows of a split ("train", "val", "test"), memory-mapped. `lengths` is (N,) int64."""

    def __init__(self, data_dir: str | Path, split: str = "train"):
        self.data_dir, self.split, self.meta = Path(data_dir), split, load_meta(data_dir)
        require(split in self.meta["splits"], f"{data_dir} has no {split} split: prepare the data "
                "again" + (" with --test_fraction or --test_source" if split == "test" else ""))
        shards = [self._open(shard) for shard in self.meta["splits"][split]["shards"]]
        require(shards, f"{data_dir} has no {split} shards; prepare the data again")
        self._tokens, self._offsets = zip(*shards, strict=True)
        self._first = np.cumsum([0] + [len(offsets) - 1 for offsets in self._offsets])
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def _open(self, shard: dict) -> tuple[np.ndarray, np.ndarray]:
        rows, tokens = shard["rows"], shard["tokens"]
        binary, index, header = open_shard(self.data_dir, shard, SHARD_MAGIC, SHARD_HEADER,
                                           rows + 1, "a shard index")
        offsets = np.memmap(index, dtype="<i8", mode="r", offset=8 * SHARD_HEADER)
        size = binary.stat().st_size
        require(size == 2 * tokens and int(offsets[-1]) == tokens,
                f"{binary} is truncated: {2 * tokens} bytes expected, {size} found; {AGAIN}")
        condition = self.meta.get("condition") if self.split.endswith("_condition") else None
        longest = condition["max_len"] if condition else self.meta["seq_len"]
        lengths = np.diff(offsets)
        require(header[2:].tolist() == [rows, tokens] and offsets[0] == 0 and lengths.min() >= 1
                and lengths.max() <= longest, f"{index} is damaged: its rows are not one behind "
                f"the other, of 1 to {longest} tokens; {AGAIN}")
        return np.memmap(binary, dtype="<u2", mode="r"), offsets

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """Row i: (length,) uint16."""
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        offsets, j = self._offsets[shard], i - self._first[shard]
        row = self._tokens[shard][offsets[j]:offsets[j + 1]]
        # Reading all at the start would take minutes; what is read has to be looked at, though:
        # beyond its embedding a network reads foreign memory, or stops a whole GPU.
        require(row.max() < self.meta["vocab_size"], f"{self.data_dir}: row {i} of {self.split} "
                "holds tokens that are not in the vocabulary, its files are damaged: prepare the "
                "data again or copy the folder again")
        return row

    def conditions(self) -> "TokenRows":
        """The conditions of the rows, with the same numbers."""
        split = f"{self.split}_condition"
        require(split in self.meta["splits"], f"{self.data_dir} has no conditions: prepare them "
                                              "with prep_conditional_data.py and name that folder")
        rows = TokenRows(self.data_dir, split)
        require(len(rows) == len(self), f"{self.data_dir} has {len(rows)} conditions for "
                f"{len(self)} rows of {self.split}; prepare the data again")
        return rows

    def batch(self, indices: Iterable[int]) -> np.ndarray:
        """Rows as (B, L) int64, padded with [PAD] to a multiple of 16."""
        return pad_rows([self[i] for i in indices])


def stories_of(data_dir: str | Path, split: str, tokenizer: Any) -> Iterator[str]:
    """The stories of a data folder, those of several rows put together again."""
    rows = TokenRows(data_dir, split)
    ids: list[int] = []
    for i in range(len(rows)):
        ids.extend(rows[i])
        if ids[-1] == EOS:
            yield decode(tokenizer, ids)
            ids = []


def reported_split(meta: dict) -> str:
    """The split that figures come from unless another is asked for: nothing is chosen on "test".
    """
    return "test" if meta["splits"].get("test", {}).get("shards") else "val"


def open_rows(data_dir: str, split: str | None) -> TokenRows:
    """The rows of a split, by default of `reported_split`. Raises UserError for one that the data
    folder has not."""
    meta = load_meta(data_dir)
    split = split or reported_split(meta)
    require(split in meta["splits"], f"--split {split}: {data_dir} has no such split, only "
            f"{', '.join(name for name in reversed(SPLITS) if name in meta['splits'])}")
    return TokenRows(data_dir, split)


def evenly_spread(count: int, rows: int) -> np.ndarray:
    """Numbers of `count` of the rows (of all, if there are fewer): the beginning of a split may be
    of another kind than its end."""
    count = min(count, rows)
    return np.arange(count) * rows // count


def bucket_batches(lengths: np.ndarray, batch_tokens: int, order: np.ndarray | None = None,
                   merge: bool = True) -> list[np.ndarray]:
    """Groups rows of like length into batches of at most `batch_tokens` padded tokens.

    `order` is the order in which rows are taken. With `merge` the rows that do not fill a batch of
    their length join the next longer ones, which keeps batches full; without it a row's padding
    depends on its own length alone, which evaluation needs. Every row appears exactly once.
    """
    order = np.arange(len(lengths)) if order is None else order
    buckets = round_up(lengths[order])
    batches, leftover = [], order[:0]
    for width in np.unique(buckets):
        rows = np.concatenate([leftover, order[buckets == width]])
        size = max(1, batch_tokens // int(width))
        whole = len(rows) // size * size if merge else len(rows)
        batches += [rows[i:i + size] for i in range(0, whole, size)]
        leftover = rows[whole:]
    return batches + ([leftover] if len(leftover) else [])


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    padded = sum(len(batch) * int(round_up(lengths[batch].max())) for batch in batches)
    return 1 - int(lengths.sum()) / padded
