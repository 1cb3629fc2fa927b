"""Stage 1: a corpus of stories -> tokenizer.json and token shards.

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

from cli import flag, parse, require, run, sha256_of
from cli.folders import make_folder

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from corpus.files import missing_separator
from corpus.pictures import PictureRows
from corpus.rows import (
    SPLITS,
    TokenRows,
    bucket_batches,
    load_meta,
    padding_share,
    read_tokenizer_file,
)
from corpus.shards import (
    TEST_FRACTION,
    SplitWriter,
    check_row_length,
    check_test_fraction,
    finish_folder,
    settle_splits,
    unchanged,
)
from corpus.sources import check_source, describe_source, local_files, read_stories, source_bytes
from corpus.vocabulary import tokenize_batches, train_tokenizer


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


def verify(data_dir: str) -> None:
    meta = load_meta(data_dir)
    read_tokenizer_file(data_dir, meta)
    for split, summary in meta["splits"].items():
        pictures = split.endswith("_condition") and meta["condition"].get("encoder") == "image"
        (PictureRows if pictures else TokenRows)(data_dir, split)
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
