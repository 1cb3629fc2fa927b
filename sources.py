"""Where stories come from: TinyStories on the hub, local files, or the bundled story maker.

A library for data_prep.py: nothing to run here. Every source is a generator, so that a corpus of
any size is read with the same small memory.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from cli import UserError, require

SEPARATOR = "<|endoftext|>"
HUB_DATASET = "roneneldan/TinyStories"
LONGEST_LINE = 2**20  # characters; a text file without separators must not fill the memory


def read_txt(path: Path) -> Iterator[str]:
    """Stories of a text file, separated by `<|endoftext|>`; newlines are kept as they are."""
    lines: list[str] = []
    size = 0
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        while line := file.readline(LONGEST_LINE):
            *ended, rest = line.split(SEPARATOR)
            for part in ended:
                yield "".join(lines) + part
                lines, size = [], 0
            lines.append(rest)
            size += len(rest)
            require(size < LONGEST_LINE, f"{path}: no {SEPARATOR} in a million characters; put a "
                                         f"line {SEPARATOR} after every story")
    if "".join(lines).strip():  # the last story may lack its separator
        yield "".join(lines)


def read_jsonl(path: Path) -> Iterator[str]:
    return (text for text, in read_json_lines(path, ("text",)))


def read_json_lines(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The strings of these keys of every line of a file; empty lines are passed over."""
    with open(path, encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                texts = tuple(entry[key] for key in keys)
                "".join(texts).encode()  # half a surrogate pair is no text
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                expected = ", ".join(f'"{key}": "..."' for key in keys)
                raise UserError(f"{path}, line {number}: expected {{{expected}}}") from error
            yield texts


def read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        require("text" in file.schema_arrow.names, f"{path} has no column `text`")
        kind = file.schema_arrow.field("text").type
        require(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind),
                f"{path}: the column `text` holds {kind}, not strings")
        for batch in file.iter_batches(batch_size=1000, columns=["text"]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error})") from error


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def read_files(names: Iterable[str]) -> Iterator[str]:
    for path in map(Path, names):
        try:
            yield from READERS[path.suffix.lower()](path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
                            ) from error


def read_hub(split: str) -> Iterator[str]:
    """Streams one split ("train" or "validation") of TinyStories: no copy is kept on disk."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our one line, not its retries
    print(f"reading {HUB_DATASET} ({split}) from the Hugging Face hub ...", flush=True)
    try:
        import datasets
        for row in datasets.load_dataset(HUB_DATASET, split=split, streaming=True):
            yield row["text"]
    except Exception as error:  # the hub's client has a dozen exception types for "no network"
        raise UserError(
            f"cannot read {HUB_DATASET} from the Hugging Face hub ({type(error).__name__}); check "
            "the network, or use --source FILE (your own .txt, .jsonl or .parquet) or "
            "--source sample (made-up stories, no network)") from error


def check_source(source: list[str], valid_source: str | None) -> None:
    """Raises UserError for files that are missing or of an unknown kind."""
    if source in (["tinystories"], ["sample"]):
        require(not valid_source, f"--valid_source goes with local files; {source[0]} brings its "
                                  "own validation stories")
        return
    named = [("--source", name) for name in source]
    if valid_source:
        named.append(("--valid_source", valid_source))
    for flag, name in named:
        require(Path(name).is_file(), f"{flag} {name}: no such file; name a file, or use --source "
                                      "tinystories or --source sample")
        require(Path(name).suffix.lower() in READERS,
                f"{name}: unknown kind of file; use {', '.join(READERS)}")


def describe_source(source: list[str], valid_source: str | None = None) -> dict[str, str]:
    """The `source` and `licence` entries of meta.json."""
    if source == ["tinystories"]:
        return {"source": HUB_DATASET, "licence": "CDLA-Sharing-1.0"}
    if source == ["sample"]:
        return {"source": "sample (made-up stories, for trying things out)", "licence": "none"}
    names = source + ([valid_source] if valid_source else [])
    return {"source": ", ".join(Path(name).name for name in names),
            "licence": "that of the local files"}


def source_bytes(source: list[str], valid_source: str | None) -> int | None:
    """Size of the text to come, for a progress bar; None where it is not known before."""
    paths = [Path(name) for name in source + ([valid_source] if valid_source else [])]
    if all(path.suffix.lower() == ".txt" for path in paths):
        return sum(path.stat().st_size for path in paths)
    return None


def read_stories(source: list[str], valid_source: str | None, valid_fraction: float,
                 max_stories: int | None) -> Iterator[tuple[str, str]]:
    """Yields ("train" or "val", story) with the white space around each story removed."""
    if source == ["tinystories"]:
        splits = {"train": read_hub("train"), "val": read_hub("validation")}
    elif source == ["sample"]:
        from sample_stories import sample_stories
        splits = {"both": sample_stories(max_stories or 6000)}
    elif valid_source:
        splits = {"train": read_files(source), "val": read_files([valid_source])}
    else:
        splits = {"both": read_files(source)}
    for split, texts in splits.items():
        for text in islice(texts, max_stories):
            text = text.strip()
            if split == "both":
                yield side_of(text, valid_fraction), text
            else:
                yield split, text


def side_of(text: str, valid_fraction: float) -> str:
    """"train" or "val" by a hash of the text: the same story never lands on both sides."""
    digest = hashlib.sha256(text.encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < valid_fraction * 2**64 else "train"
