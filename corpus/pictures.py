"""Pictures kept row by row beside the texts of a data folder.

    pictures = PictureRows("data_pictures", "train_condition")
    pictures.batch([3, 1, 2])                        # (B, size, size, 4) uint8

A picture is what corpus/image_files.py makes of a file. A shard, train_condition_00000.bin, has the
distinct ones, (P, size, size, 3) uint8, without their fourth channel. Its .idx, of int64, has a
header (magic, format version, rows N, pictures P, size) and the numbers of the N rows' pictures,
counted from the first picture of the split's first shard.
"""

from cli import UserError, require

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from corpus.image_files import with_presence
from corpus.rows import AGAIN, FORMAT_VERSION, load_meta, open_shard
from corpus.tokens import sha256

PICTURE_MAGIC = int.from_bytes(b"dllmpics", "little")
PICTURE_HEADER = 5
SHARD_BYTES = 2**26
SUBJECTS = "subjects.jsonl"  # beside meta.json: what the picture of every row shows


class PictureWriter:
    """Writes the pictures of one split, each distinct one once, in the manner of SplitWriter.

    A shard begins with a picture that was not there before, so that none is without pictures.
    """

    def __init__(self, folder: Path, split: str, size: int):
        self.folder, self.split, self.size = folder, split, size
        self.shards: list[dict] = []
        self.counts = Counter(rows=0, pictures=0)
        self._numbers: dict[bytes, int] = {}  # of the distinct ones, by a hash of their pixels
        self._pixels, self._rows = bytearray(), array("q")  # of the shard being filled

    def holds(self, picture: np.ndarray) -> bool:
        """Whether the very same picture is already there."""
        return _digest(picture) in self._numbers

    def add(self, picture: np.ndarray) -> None:
        """Takes the picture, (size, size, 4), of the next row."""
        digest = _digest(picture)
        if digest not in self._numbers:
            if len(self._pixels) >= SHARD_BYTES:
                self.flush()
            self._numbers[digest] = len(self._numbers)
            self._pixels += picture[..., :3].tobytes()
            self.counts.update(pictures=1)
        self._rows.append(self._numbers[digest])
        self.counts.update(rows=1)

    def flush(self) -> None:
        rows, pictures = len(self._rows), len(self._pixels) // (3 * self.size**2)
        if not rows:
            return
        name = f"{self.split}_{len(self.shards):05d}"
        header = [PICTURE_MAGIC, FORMAT_VERSION, rows, pictures, self.size]
        index = np.array([*header, *self._rows], dtype="<i8").tobytes()
        for suffix, content in ((".bin", self._pixels), (".idx", index)):
            with open(self.folder / (name + suffix), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.shards.append({"name": name, "rows": rows, "tokens": pictures,
                            "sha256": sha256(self._pixels), "index_sha256": sha256(index)})
        self._pixels, self._rows = bytearray(), array("q")

    def summary(self) -> dict:
        return {**self.counts, "shards": self.shards}


def _digest(picture: np.ndarray) -> bytes:
    return hashlib.sha256(picture[..., :3].tobytes()).digest()


class PictureRows:
    """The pictures of the rows of a split ("train_condition", ...), memory-mapped. `numbers`, (N,)
    int64, says which of the distinct pictures each row has; their sides are `size` pixels."""

    def __init__(self, data_dir: str | Path, split: str = "train_condition"):
        self.data_dir, self.split, self.meta = Path(data_dir), split, load_meta(data_dir)
        condition = self.meta.get("condition") or {}
        require(condition.get("encoder") == "image", f"{data_dir} has no pictures: prepare them "
                "with prep_image_data.py and name that folder")
        require(split in self.meta["splits"], f"{data_dir} has no {split} split: prepare the data "
                                              "again")
        self.size: int = condition["size"]
        shards = [self._open(shard) for shard in self.meta["splits"][split]["shards"]]
        require(shards, f"{data_dir} has no {split} shards; prepare the data again")
        self._pictures, numbers = zip(*shards, strict=True)
        self._first = np.cumsum([0] + [len(pictures) for pictures in self._pictures])
        for shard, there, of_rows in zip(self.meta["splits"][split]["shards"], self._first[1:],
                                         numbers, strict=True):
            require(0 <= of_rows.min() and of_rows.max() < there, f"{self.data_dir / shard['name']}"
                    ".idx is damaged: its rows have pictures that are not there; prepare the data "
                    "again or copy the folder again")
        self.numbers = np.concatenate(numbers)

    def _open(self, shard: dict) -> tuple[np.ndarray, np.ndarray]:
        rows, pictures = shard["rows"], shard["tokens"]
        binary, index, header = open_shard(self.data_dir, shard, PICTURE_MAGIC, PICTURE_HEADER,
                                           rows, "an index of pictures")
        shape = (pictures, self.size, self.size, 3)
        size, expected = binary.stat().st_size, pictures * 3 * self.size**2
        require(size == expected, f"{binary} is truncated: {expected} bytes expected, {size} "
                                  f"found; {AGAIN}")
        require(header[2:].tolist() == [rows, pictures, self.size], f"{index} is damaged: it is "
                f"not of {rows} rows and {pictures} pictures of {self.size} x {self.size}; {AGAIN}")
        return (np.memmap(binary, dtype=np.uint8, mode="r", shape=shape),
                np.fromfile(index, dtype="<i8", offset=8 * PICTURE_HEADER))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> np.ndarray:
        """The picture of row i: (size, size, 3) uint8."""
        number = int(self.numbers[i])
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._pictures[shard][number - self._first[shard]]

    def batch(self, indices: Iterable[int]) -> np.ndarray:
        """(B, size, size, 4) uint8."""
        return with_presence(np.stack([self[i] for i in indices]))


def read_subjects(data_dir: str | Path, split: str) -> list[dict[str, Any]]:
    """What the pictures of the rows of "train", "val" or "test" show, in the order of the rows:
    {"split": "val", "row": 12, "subjects": ["cat"], "style": "noto"}. Empty for the pictures of
    --pairs, of which nobody knows."""
    meta, path = load_meta(data_dir), Path(data_dir) / SUBJECTS
    require(split in meta["splits"], f"{data_dir} has no {split} split: prepare the data again")
    if (meta.get("condition") or {}).get("kind") not in ("emoji", "captions", "scenes"):
        return []
    require(path.is_file(), f"{path} is missing; prepare the data again or copy the folder again")
    found = []
    try:
        with open(path, encoding="utf-8") as file:
            for entry in map(json.loads, file):
                if entry["split"] == split:
                    right = (entry["row"] == len(found) and isinstance(entry["style"], str)
                             and isinstance(entry["subjects"], list)
                             and all(isinstance(name, str) for name in entry["subjects"]))
                    require(right, f"{path} is damaged at row {len(found)} of {split}; prepare the "
                                   "data again or copy the folder again")
                    found.append(entry)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged; prepare the data again or copy the folder again"
                        ) from error
    rows = sum(shard["rows"] for shard in meta["splits"][split]["shards"])
    require(len(found) == rows, f"{path} has {len(found)} of the {rows} rows of {split}; prepare "
                                "the data again or copy the folder again")
    return found
