"""Stage 1: a corpus of stories -> tokenizer.json and token shards; and the reader of those shards.

    python data_prep.py                                    # TinyStories from the Hugging Face hub
    python data_prep.py --source stories.txt more.jsonl    # your own files (.txt, .jsonl, .parquet)
    python data_prep.py --source sample                    # made-up stories, no network

A .txt file has a line <|endoftext|> after every story, .jsonl and .parquet have a `text` field.
Three splits: "train", "val" for everything that is chosen, "test" for everything that is reported.
The stories of --valid_source, of the hub's validation split, or else a share --valid_fraction of
all are held out, and --test_fraction of those (half) is the test split; a hash of the text decides,
so that a story stands in one split only. Or name a file of their own with --test_source.
Writes `--data_dir` whole or not at all and prints what is in it. The slice of 8,504 stories takes
about 3 s on 2 CPU cores; memory stays flat.

The data folder (format version 1)
    tokenizer.json             byte-level BPE; decoding gives the source text back byte for byte
    meta.json                  versions, source, licence, counts, length histogram, checksums
    train_00000.bin, .idx ...  uint16 token ids; int64 header and row offsets (val_*, test_*)
One row is one story, [BOS] story [EOS]. A story longer than `seq_len` becomes several rows of
nearly equal length, of which only the first has [BOS] and only the last [EOS].
prep_conditional_data.py adds train_condition_00000.bin ..., the condition of every row.
"""

from cli import UserError, atomic_file, flag, parse, require, run, sha256_of

import atexit
import dataclasses
import hashlib
import json
import os
import queue
import re
import signal
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from folders import make_folder
from sources import (
    check_source,
    describe_source,
    local_files,
    missing_separator,
    read_stories,
    source_bytes,
)

PAD, MASK, BOS, EOS = range(4)
SPECIAL_TOKENS = ["[PAD]", "[MASK]", "[BOS]", "[EOS]"]
SPLITS = ("train", "val", "test")
FORMAT, FORMAT_VERSION = "diffusion-llm data", 1
SHARD_MAGIC = int.from_bytes(b"dllmrows", "little")
SHARD_HEADER = 4  # int64: magic, format version, rows, tokens; then rows + 1 offsets
SHARD_TOKENS = 2**25  # 64 MiB a shard
BUCKET = 16  # row lengths are rounded up to a multiple of this: few shapes, little padding
ROW_KINDS = ("story", "start", "middle", "end")
LONGEST_WORD = 1024  # characters; a longer one is cut while the vocabulary is learned
BATCH_BYTES = 2**20  # text tokenized together: keeps the cores busy and the memory small
TEST_FRACTION = 0.5  # of the held-out stories
META_KEYS = ("source", "licence", "vocab_size", "seq_len", "bytes_per_token", "length_histogram",
             "tokenizer_sha256", "splits")


@dataclass
class DataConfig:
    source: list[str] = flag(["tinystories"], "tinystories (the hub), sample, or local files")
    valid_source: str | None = flag(None, "file with the validation stories (local sources)")
    test_source: str | None = flag(None, "file with the test stories (local sources)")
    data_dir: str = flag("data", "folder to write")
    max_stories: int | None = flag(None, "stories to read at most, of each split")
    vocab_size: int = flag(8192, "size of the vocabulary, 260 to 65536")
    seq_len: int = flag(256, "longest row in tokens, a multiple of 16")
    valid_fraction: float = flag(0.05, "share held out where the source has no validation split")
    test_fraction: float | None = flag(
        None, f"share of the held-out stories kept for the test split (default: {TEST_FRACTION}, "
              "or none where too few are held out); 0: no test split")
    tokenizer_stories: int = flag(50_000, "training stories from which the vocabulary is learned")
    num_workers: int = flag(0, "threads for tokenizing; 0 uses every core")
    overwrite: bool = flag(False, "replace a data folder that is already there")
    verify: bool = flag(False, "only check the checksums of an existing data folder")


# ---- tokenizer -----------------------------------------------------------------------------------

class Background:
    """Runs `work` in a thread, so that this one hears Ctrl-C while it waits: the tokenizer's own
    code hears nothing until it returns. Work that is left so ends with the process at the latest.
    """

    def __init__(self, work: Callable[[], Any]):
        self.value, self.error = None, None
        self.thread = threading.Thread(target=self._call, args=[work], daemon=True)
        self.thread.start()

    def _call(self, work: Callable[[], Any]) -> None:
        try:
            self.value = work()
        except BaseException as error:
            self.error = error

    def put(self, handed: queue.Queue, item: Any) -> None:
        """Hands something over to the work; nothing if that has ended, as `result` will tell."""
        while self.thread.is_alive():
            with suppress(queue.Full):
                return handed.put(item, timeout=0.1)

    def result(self) -> Any:
        try:
            while self.thread.is_alive():
                self.thread.join(0.1)  # without a limit Windows would not hear it either
        except BaseException as error:
            self.abandon(error)
            raise
        if self.error:
            raise self.error
        return self.value

    def abandon(self, error: BaseException) -> None:
        """Waits a little for work that `error` makes useless: most is short, and the interpreter
        must not be taken down under a thread in native code, which may crash."""
        self.thread.join(1)
        number = getattr(error, "number", signal.SIGINT)
        atexit.register(lambda: self.thread.is_alive() and leave(128 + number))


def leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def cut_long_words(text: str) -> Iterator[str]:
    """The text in pieces, cut only inside words and white space of over LONGEST_WORD characters.

    Learning a vocabulary takes time that grows with the square of a word's length.
    """
    words = text.split()
    longest_gap = len(text) - sum(map(len, words))  # at most
    if max(map(len, words), default=0) <= LONGEST_WORD and longest_gap <= LONGEST_WORD:
        yield text
        return
    start = 0
    for part in re.finditer(rf"\S{{1,{LONGEST_WORD}}}|\s{{1,{LONGEST_WORD}}}", text):
        if part.end() - part.start() == LONGEST_WORD:
            yield text[start:part.end()]
            start = part.end()
    yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Byte-level BPE: every byte is a token, so any text round-trips. Ctrl-C is heard."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    # The texts are read here and handed over a batch at a time.
    batches: queue.Queue[list[str]] = queue.Queue(maxsize=2)  # an empty one is the end
    stop = threading.Event()

    def received() -> Iterator[list[str]]:
        while (batch := batches.get()) and not stop.is_set():
            yield batch
        if stop.is_set():
            raise KeyboardInterrupt

    learning = Background(lambda: tokenizer.train_from_iterator(received(), trainer))
    try:
        pieces = (piece for text in texts for piece in cut_long_words(text))
        for batch in chain(in_batches(pieces, len), [[]]):
            learning.put(batches, batch)
    except BaseException as error:
        stop.set()
        with suppress(queue.Full):
            batches.put_nowait([])  # wakes it up
        learning.abandon(error)
        raise
    learning.result()
    return load_tokenizer(tokenizer.to_str())


def load_tokenizer(text: str):
    """A tokenizer from the content of tokenizer.json.

    A story may contain the characters "[MASK]": they are then ordinary text, never the special
    token, so `encode` gives only ordinary ids.
    """
    from tokenizers import Tokenizer
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer.json is not a tokenizer ({error}); prepare the data again"
                        ) from error
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    require(ids == [PAD, MASK, BOS, EOS], "tokenizer.json has other special tokens than "
                                          f"{', '.join(SPECIAL_TOKENS)} at ids 0 to 3")
    tokenizer.encode_special_tokens = True
    return tokenizer


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def token_bytes(tokenizer) -> np.ndarray:
    """(V,) bytes of text behind each token id; 0 for the special tokens."""
    # In the byte-level alphabet one character stands for one byte.
    sizes = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    return np.array([0] * len(SPECIAL_TOKENS) + sizes[len(SPECIAL_TOKENS):], dtype=np.int64)


def decode(tokenizer, ids: Iterable[int]) -> str:
    """The text of token ids; special tokens give nothing, broken UTF-8 gives U+FFFD."""
    return tokenizer.decode([int(i) for i in ids if i > EOS])


def split_row(ids: list[int], seq_len: int) -> list[list[int]]:
    """[BOS] ids [EOS] in as few rows as fit into seq_len, their lengths at most one apart."""
    ids = [BOS, *ids, EOS]
    count = -(-len(ids) // seq_len)
    edges = [len(ids) * i // count for i in range(count + 1)]
    return [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def row_kind(row: Any) -> str:
    """Whether a row is a whole story or the start, middle or end of a long one."""
    return {(True, True): "story", (True, False): "start", (False, False): "middle",
            (False, True): "end"}[bool(row[0] == BOS), bool(row[-1] == EOS)]


# ---- writer --------------------------------------------------------------------------------------

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


def prepare(config: DataConfig) -> dict:
    """Runs the whole stage and returns the content of meta.json."""
    check_config(config)
    return make_folder(config.data_dir, "--data_dir", config.overwrite,
                       lambda folder: write_folder(config, folder))


def check_config(config: DataConfig) -> None:
    require(260 <= config.vocab_size <= 65536,
            f"--vocab_size {config.vocab_size}: must be from 260 (the bytes) to 65536 (uint16)")
    check_row_length("--seq_len", config.seq_len)
    require(0 < config.valid_fraction < 1, f"--valid_fraction {config.valid_fraction}: must lie "
                                           "between 0 and 1")
    check_test_fraction(config.test_fraction, config.test_source)
    for name in ("max_stories", "tokenizer_stories"):
        value = getattr(config, name)
        require(value is None or value > 0, f"--{name} {value}: must be positive")
    require(config.num_workers >= 0, f"--num_workers {config.num_workers}: must be 0 or more")
    require(config.source != ["sample"] or (config.max_stories or 0) <= 100_000,
            f"--max_stories {config.max_stories}: the bundled story maker has 100,000 stories")
    check_source(config.source, config.valid_source, config.test_source)


def check_test_fraction(fraction: float | None, test_source: str | None) -> None:
    require(fraction is None or 0 <= fraction < 1,
            f"--test_fraction {fraction}: must be 0 or more and less than 1")
    require(fraction is None or not test_source,
            "--test_source brings the test stories: leave out --test_fraction")


def check_row_length(flag: str, length: int) -> None:
    require(length >= BUCKET and length % BUCKET == 0,
            f"{flag} {length}: must be a positive multiple of {BUCKET}")


def in_batches(items: Iterable[Any], size_of: Callable[[Any], int]) -> Iterator[list]:
    """The items in lists of about BATCH_BYTES."""
    batch: list[Any] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize_batches(stories: Iterable[tuple[str, str]], tokenizer,
                     ) -> Iterator[tuple[str, str, list[int]]]:
    """Yields (split, text, token ids); some megabytes at a time, on every core."""
    for batch in in_batches(stories, lambda story: len(story[1])):
        texts = [text for _, text in batch]
        # `encode_batch_fast` leaves out the offsets, which nothing here needs
        encode = partial(tokenizer.encode_batch_fast, texts)
        for (split, text), encoding in zip(batch, Background(encode).result(), strict=True):
            yield split, text, encoding.ids


def without_null_and_empty(stories: Iterable[tuple[str, str | None]], dropped: Counter,
                           ) -> Iterator[tuple[str, str]]:
    """The stories that have a text; counts the others."""
    for split, text in stories:
        if text:
            yield split, text
        else:
            dropped["null" if text is None else "empty"] += 1


def write_folder(config: DataConfig, folder: Path) -> dict:
    from tqdm import tqdm
    if config.num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(config.num_workers)
    started = time.perf_counter()

    files = config.source, config.valid_source, config.test_source
    described = describe_source(*files)
    test_fraction = TEST_FRACTION if config.test_fraction is None else config.test_fraction

    def stories() -> Iterator[tuple[str, str | None]]:
        return read_stories(config.source, config.valid_source, config.valid_fraction,
                            config.max_stories, config.test_source, test_fraction)

    # 1. The vocabulary, from the first training stories.
    texts = (text for split, text in stories() if split == "train" and text)
    tokenizer = train_tokenizer(
        tqdm(islice(texts, config.tokenizer_stories), desc="learning the vocabulary",
             unit=" stories", disable=None), config.vocab_size)
    # 2. Every story to rows, a batch at a time: memory does not grow with the corpus.
    writers = {split: SplitWriter(folder, split, config.seq_len) for split in SPLITS}
    dropped = Counter(empty=0, null=0)
    total = None if config.max_stories else source_bytes(*files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        for split, text, ids in tokenize_batches(without_null_and_empty(stories(), dropped),
                                                 tokenizer):
            bar.update(writers[split].add(text, ids))
    # 3. What a reader must know.
    lone = any(writer.counts["stories"] == 1 for writer in writers.values())
    hint = missing_separator(name for _, name in local_files(*files)) if lone else ""
    with_splits = config.source == ["tinystories"] or config.valid_source
    settle_splits(writers, "held out" if with_splits else "all",
                  f"no stories in {', '.join(config.source)}: the corpus is empty",
                  config.test_fraction, config.test_source, hint)
    if hint:
        print(f"read as one story: {hint}")
    return finish_folder(
        folder, writers, tokenizer.to_str(pretty=True), tokenizer.get_vocab_size(),
        **unchanged(described, describe_source(*files)), dropped_empty=dropped["empty"],
        dropped_null=dropped["null"],
        config=dataclasses.asdict(config), seconds=round(time.perf_counter() - started, 2))


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
    with atomic_file(folder / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    return meta


# ---- reader --------------------------------------------------------------------------------------

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


def is_count(value: Any, most: int = 2**62) -> bool:
    return type(value) is int and 1 <= value <= most


def is_length_histogram(value: Any, kinds: Iterable[str] = ()) -> bool:
    """Whether it is {kind of row: {length as text: rows}} with at least these kinds."""
    return isinstance(value, dict) and value.keys() >= set(kinds) and all(
        isinstance(lengths, dict) and all(
            re.fullmatch("[1-9][0-9]{0,8}", str(length)) and is_count(count)
            for length, count in lengths.items()) for lengths in value.values())


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

    splits, told, sources = meta["splits"], meta.get("condition"), meta.get("sources", [])
    size = meta["bytes_per_token"]
    right = {
        **{key: isinstance(meta[key], str) for key in ("source", "licence", "tokenizer_sha256")},
        "vocab_size": is_count(meta["vocab_size"], 65536),
        "seq_len": is_count(meta["seq_len"], 2**30),
        "bytes_per_token": isinstance(size, (int, float)) and 0 < size < 2**62,
        "length_histogram": is_length_histogram(meta["length_histogram"], ROW_KINDS),
        "splits": isinstance(splits, dict) and all(map(is_split, splits.values())),
        "sources": isinstance(sources, list) and all(map(is_source, sources)),
        "condition": told is None or isinstance(told, dict) and is_count(told.get("max_len"))}
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
        binary = self.data_dir / f"{shard['name']}.bin"
        index = binary.with_suffix(".idx")
        again = "prepare the data again or copy the folder again"
        for path in (binary, index):
            require(path.is_file(), f"{path} is missing; {again}")
        rows, tokens = shard["rows"], shard["tokens"]
        size, expected = index.stat().st_size, 8 * (SHARD_HEADER + rows + 1)
        require(size >= 8 * SHARD_HEADER, f"{index} is truncated: {expected} bytes expected, "
                                          f"{size} found; {again}")
        header = np.fromfile(index, dtype="<i8", count=SHARD_HEADER)
        require(int(header[0]) == SHARD_MAGIC, f"{index} is not a shard index; {again}")
        check_version(index, int(header[1]))
        require(size == expected, f"{index} is truncated: {expected} bytes expected, {size} found; "
                                  f"{again}")
        offsets = np.memmap(index, dtype="<i8", mode="r", offset=8 * SHARD_HEADER)
        size = binary.stat().st_size
        require(size == 2 * tokens and int(offsets[-1]) == tokens,
                f"{binary} is truncated: {2 * tokens} bytes expected, {size} found; {again}")
        told = self.meta.get("condition") if self.split.endswith("_condition") else None
        longest = told["max_len"] if told else self.meta["seq_len"]
        lengths = np.diff(offsets)
        require(header[2:].tolist() == [rows, tokens] and offsets[0] == 0 and lengths.min() >= 1
                and lengths.max() <= longest, f"{index} is damaged: its rows are not one behind "
                f"the other, of 1 to {longest} tokens; {again}")
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


def evenly_spread(count: int, rows: int) -> np.ndarray:
    """Numbers of `count` of the rows (of all, if there are fewer): the beginning of a split may be
    of another kind than its end."""
    count = min(count, rows)
    return np.arange(count) * rows // count


def pad_rows(rows: list, multiple: int = BUCKET) -> np.ndarray:
    width = round_up(max(len(row) for row in rows), multiple)
    tokens = np.full((len(rows), width), PAD, dtype=np.int64)  # (B, L)
    for line, row in zip(tokens, rows, strict=True):
        line[:len(row)] = row
    return tokens


def round_up(n: Any, multiple: int = BUCKET) -> Any:
    return -(-n // multiple) * multiple


def bucket_batches(lengths: np.ndarray, batch_tokens: int, order: np.ndarray | None = None,
                   merge: bool = True) -> list[np.ndarray]:
    """Groups rows of like length into batches of at most `batch_tokens` padded tokens.

    `order` is the order in which rows are taken. With `merge` the rows that do not fill a batch of
    their length join the next longer ones, which keeps batches full; without it a row's padding
    depends on its own length alone, which evaluation needs. Every row appears exactly once.
    """
    order = np.arange(len(lengths)) if order is None else order
    buckets = round_up(lengths[order])
    batches, left = [], order[:0]
    for width in np.unique(buckets):
        rows = np.concatenate([left, order[buckets == width]])
        size = max(1, batch_tokens // int(width))
        whole = len(rows) // size * size if merge else len(rows)
        batches += [rows[i:i + size] for i in range(0, whole, size)]
        left = rows[whole:]
    return batches + ([left] if len(left) else [])


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    padded = sum(len(batch) * int(round_up(lengths[batch].max())) for batch in batches)
    return 1 - int(lengths.sum()) / padded


def length_nats(meta: dict, rows: Iterable[np.ndarray]) -> float:
    """Code length of the rows' kinds and lengths under the training histogram, in nats.

    The network is told where a row ends, so a bound on the probability of the text has to pay for
    it. One is added to every count (Laplace), so that no length is impossible.
    """
    histogram = meta["length_histogram"]
    total = (sum(sum(lengths.values()) for lengths in histogram.values())
             + len(ROW_KINDS) * meta["seq_len"])
    return float(sum(np.log(total / (1 + histogram[row_kind(row)].get(str(len(row)), 0)))
                     for row in rows))


class BatchStream:
    """Endless training batches: a pure function of (seed, epoch, position).

    `epoch` and `position` (batches of this epoch already given) are the whole state: store them
    and build the stream again with them to continue in the middle of an epoch. With `world` ranks
    each global batch is dealt out row by row; rank r gets rows r, r + world, ...
    """

    def __init__(self, rows: TokenRows, batch_tokens: int, seed: int = 0, epoch: int = 0,
                 position: int = 0, rank: int = 0, world: int = 1):
        self.rows, self.batch_tokens, self.seed = rows, batch_tokens, seed
        self.epoch, self.position, self.rank, self.world = epoch, position, rank, world
        self.indices = np.zeros(0, np.int64)  # the rows of the batch last given
        self._batches = self._epoch_batches()

    def _epoch_batches(self) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches = bucket_batches(self.rows.lengths, self.batch_tokens,
                                 rng.permutation(len(self.rows)))
        return [batches[i] for i in rng.permutation(len(batches))]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """The next batch, (B, L) int64; with several ranks B may be 0 for the last ones."""
        if self.position >= len(self._batches):
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._epoch_batches()
        self.indices = self._batches[self.position][self.rank::self.world]
        self.position += 1
        return (self.rows.batch(self.indices) if len(self.indices)
                else np.zeros((0, BUCKET), np.int64))

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.epoch + self.position / len(self._batches)


# ---- command line --------------------------------------------------------------------------------

def verify(data_dir: str) -> None:
    meta = load_meta(data_dir)
    read_tokenizer_file(data_dir, meta)
    for split, summary in meta["splits"].items():
        TokenRows(data_dir, split)
        for shard in summary["shards"]:
            for suffix, key in ((".bin", "sha256"), (".idx", "index_sha256")):
                path = Path(data_dir) / (shard["name"] + suffix)
                require(sha256_of(path) == shard[key], f"{path} is damaged (checksum): prepare "
                        "the data again or copy the folder again")
    print(f"{data_dir}: every checksum is right")


def report(data_dir: str, meta: dict) -> None:
    for split, counts in meta["splits"].items():
        print(f"{split:>5}: {counts['stories']:,} stories, {counts['rows']:,} rows, "
              f"{counts['tokens']:,} tokens, {counts['bytes']:,} bytes of text")
    lengths = TokenRows(data_dir).lengths
    padding = padding_share(lengths, bucket_batches(lengths, 4096))
    for reason in ("empty", "null"):
        if count := meta.get(f"dropped_{reason}", 0):
            print(f"{'':7}{count:,} dropped: the story is {reason}")
    size = sum(counts["bytes"] for counts in meta["splits"].values()) / 1e6
    wanted = meta["config"]["vocab_size"]
    smaller = f" (the text gives no {wanted:,})" if meta["vocab_size"] < wanted else ""
    print(f"vocabulary {meta['vocab_size']:,}{smaller}, {meta['bytes_per_token']:.2f} bytes/token, "
          f"{padding:.1%} padding in batches of 4,096 tokens")
    seconds = max(meta["seconds"], 0.01)
    print(f"wrote {data_dir} in {seconds:.1f} s ({size / seconds:.1f} MB/s); "
          f"source: {meta['source']}")


def main(argv: list[str] | None = None) -> None:
    config, _ = parse(DataConfig, __doc__, argv)
    if config.verify:
        verify(config.data_dir)
    else:
        report(config.data_dir, prepare(config))


if __name__ == "__main__":
    run(main)
