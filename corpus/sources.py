"""Where stories come from: TinyStories on the hub, local files, or the bundled story maker.

A library for data_prep.py: nothing to run here. Every source is a generator, so that a corpus of
any size is read with the same small memory. A story that is null (in JSON or parquet) comes as
None, for whoever reads to count.
"""

from cli import UserError, require, sha256_of

import hashlib
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from corpus.files import READERS, read_files

HUB_DATASET = "roneneldan/TinyStories"


def read_hub(split: str) -> Iterator[str | None]:
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


def check_source(source: list[str], valid_source: str | None, test_source: str | None = None,
                 ) -> None:
    """Raises UserError for files that are missing or of an unknown kind."""
    held_out = {"--valid_source": valid_source, "--test_source": test_source}
    if source in (["tinystories"], ["sample"]):
        for flag, name in held_out.items():
            require(not name, f"{flag} goes with local files; {source[0]} brings its own held-out "
                              "stories")
        return
    for flag, name in local_files(source, valid_source, test_source):
        require(Path(name).is_file(), f"{flag} {name}: no such file; name a file, or use --source "
                                      "tinystories or --source sample")
        require(Path(name).suffix.lower() in READERS,
                f"{name}: unknown kind of file; use {', '.join(READERS)}")


def local_files(source: list[str], valid_source: str | None = None,
                test_source: str | None = None) -> list[tuple[str, str]]:
    """(flag, name) of every file."""
    return [("--source", name) for name in source] + [
        (flag, name) for flag, name in (("--valid_source", valid_source),
                                        ("--test_source", test_source)) if name]


def describe_source(source: list[str], valid_source: str | None = None,
                    test_source: str | None = None) -> dict[str, Any]:
    """The entries `source`, `licence` and `sources` of meta.json.

    `sources` knows local files by content: a dict of flag, name, bytes and sha256 for each. A file
    that is not there has None for both; what is no file has only a name.
    """
    named = {("tinystories",): (HUB_DATASET, HUB_DATASET, "CDLA-Sharing-1.0"),
             ("sample",): ("sample", "sample (made-up stories, for trying things out)", "none")}
    if tuple(source) in named:
        name, text, licence = named[tuple(source)]
        return {"source": text, "licence": licence, "sources": [{"flag": "--source", "name": name}]}
    return describe_files(local_files(source, valid_source, test_source))


def describe_files(files: list[tuple[str, str]]) -> dict[str, Any]:
    """The same for local files, each with the flag that names it."""
    sources = []
    for flag, name in files:
        path = Path(name)
        found: dict[str, Any] = {"bytes": None, "sha256": None}
        if path.is_file():
            found = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        sources.append({"flag": flag, "name": path.name, **found})
    return {"source": ", ".join(entry["name"] for entry in sources),
            "licence": "that of the local files", "sources": sources}


def other_source(meta: dict, described: dict[str, Any]) -> str | None:
    """What differs between the sources of a data folder (its meta.json) and those described by
    `describe_source`, as one phrase; None if they are the same.

    Contents decide: the same file under another name or path is the same source. Folders of
    before checksums were stored can only be compared by the names of their files.
    """
    if "sources" not in meta:
        return (None if meta["source"] == described["source"] else
                f"it was prepared from {meta['source']}, not from {described['source']}")
    old, new = meta["sources"], described["sources"]
    for entry in new:
        if "sha256" in entry and entry["sha256"] is None:
            return (f"it was prepared from {meta['source']}, and {entry['name']}, to compare "
                    "it with, is not there")

    def content(entry: dict) -> tuple:
        known = (entry["bytes"], entry["sha256"]) if "sha256" in entry else (entry["name"],)
        return entry["flag"], *known
    if list(map(content, old)) == list(map(content, new)):
        return None
    differ = [(a, b) for a, b in zip(old, new, strict=False) if content(a) != content(b)]
    # One file more or less has no partner to be named beside.
    old, new = ([pair[i] for pair in differ] or side for i, side in enumerate((old, new)))
    return f"it was prepared from {_name_all(old)}, not from {_name_all(new)}"


def _name_all(sources: list[dict]) -> str:
    return ", ".join(
        f"{entry['name']} ({entry['bytes']:,} bytes, sha256 {entry['sha256'][:8]}...)"
        if entry.get("sha256") else entry["name"] for entry in sources)


def source_bytes(source: list[str], valid_source: str | None, test_source: str | None = None,
                 ) -> int | None:
    """Size of the text to come, for a progress bar; None where it is not known before."""
    paths = [Path(name) for _, name in local_files(source, valid_source, test_source)]
    if all(path.suffix.lower() == ".txt" for path in paths):
        return sum(path.stat().st_size for path in paths)
    return None


def read_stories(source: list[str], valid_source: str | None, valid_fraction: float,
                 max_stories: int | None, test_source: str | None = None,
                 test_fraction: float = 0.0) -> Iterator[tuple[str, str | None]]:
    """Yields ("train", "val" or "test", story) with the white space around each story removed;
    None for a story that is null.

    `test_fraction` is the share of test stories among the held-out ones; with a `test_source`, or
    where it is 0, all of those are validation stories.
    """
    if test_source:
        test_fraction = 0.0
    # The share that is held out of each: of a validation file, everything.
    parts: list[tuple[Iterator[str | None], float]]
    if source == ["tinystories"]:
        parts = [(read_hub("train"), 0.0), (read_hub("validation"), 1.0)]
    elif source == ["sample"]:
        from corpus.sample_stories import sample_stories
        parts = [(sample_stories(max_stories or 6000), valid_fraction)]
    elif valid_source:
        parts = [(read_files(source), 0.0), (read_files([valid_source]), 1.0)]
    else:
        parts = [(read_files(source), valid_fraction)]
    for texts, held_out in parts:
        for text in islice(texts, max_stories):
            text = text and text.strip()
            yield side_of(text or "", held_out, test_fraction), text
    if test_source:
        for text in islice(read_files([test_source]), max_stories):
            yield "test", text and text.strip()


def side_of(text: str, valid_fraction: float, test_fraction: float = 0.0) -> str:
    """"train", "val" or "test" by a hash of the text: the same story never lands on two sides.

    Two parts of the digest decide, so that which held-out story is for the test does not depend
    on how many are held out.
    """
    digest = hashlib.sha256(text.encode()).digest()
    first, second = (int.from_bytes(digest[i:i + 8], "big") for i in (0, 8))
    if first >= valid_fraction * 2**64:
        return "train"
    return "test" if second < test_fraction * 2**64 else "val"
