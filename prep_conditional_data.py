"""Stage 1b: pairs of a condition and the text that follows from it -> token shards.

    python prep_conditional_data.py --data_dir data        # first sentence -> rest of its stories
    python prep_conditional_data.py --source more.txt      # of other stories
    python prep_conditional_data.py --pairs mine.jsonl     # {"condition": "...", "text": "..."}

`--data_dir` is the data folder of the model that is to be conditioned: its tokenizer is used, and
its stories unless others are named. Of every story the first sentence becomes the condition, and
all that stands behind it, white space included, the text. Writes `--output_dir` whole or not at
all and prints what was dropped and why. The slice of 8,504 stories takes about 5 s on 2 CPU cores.

The folder is a data folder as data_prep.py writes it, with shards of the same kind for the
conditions: row i of train_condition_00000.bin, [BOS] condition [EOS], belongs to row i of
train_00000.bin (every row of a long text has the same).
"""

from cli import UserError, flag, parse, require, run
from cli.folders import make_folder

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from corpus.files import read_json_lines
from corpus.rows import SPLITS, load_meta, read_tokenizer_file, stories_of
from corpus.sentences import first_sentence
from corpus.shards import (
    TEST_FRACTION,
    SplitWriter,
    check_row_length,
    check_test_fraction,
    finish_folder,
    settle_splits,
    unchanged,
)
from corpus.sources import check_source, describe_files, describe_source, read_stories, side_of
from corpus.tokens import load_tokenizer, split_row
from corpus.vocabulary import tokenize_batches


@dataclass
class PairConfig:
    data_dir: str = flag("data", "data folder with the tokenizer, and the stories by default")
    source: list[str] | None = flag(None, "other stories: tinystories, sample, or local files")
    valid_source: str | None = flag(None, "file with their validation stories (local files)")
    test_source: str | None = flag(None, "file with their test stories (local files)")
    pairs: str | None = flag(None, 'file of lines {"condition": "...", "text": "..."} to use '
                                   "instead of first sentences")
    output_dir: str = flag("data_pairs", "folder to write")
    condition_len: int = flag(64, "longest condition in tokens, [BOS] and [EOS] included, a "
                                  "multiple of 16")
    max_stories: int | None = flag(None, "stories or pairs to read at most, of each split "
                                        "where there are two")
    valid_fraction: float = flag(0.05, "share held out where there is no validation split")
    test_fraction: float | None = flag(
        None, "share of the held-out ones kept for the test split, where there is none (default: "
              f"{TEST_FRACTION}, or no test split where too few are held out)")
    overwrite: bool = flag(False, "replace an output folder that is already there")

    def check(self) -> None:
        check_row_length("--condition_len", self.condition_len)
        require(Path(self.output_dir).resolve() != Path(self.data_dir).resolve(),
                f"--output_dir {self.output_dir}: that is the --data_dir, which would be replaced; "
                "name another folder")
        require(self.max_stories is None or self.max_stories > 0,
                f"--max_stories {self.max_stories}: must be positive")
        require(0 < self.valid_fraction < 1, f"--valid_fraction {self.valid_fraction}: must lie "
                                             "between 0 and 1")
        check_test_fraction(self.test_fraction, self.test_source)
        require(not (self.pairs and (self.source or self.valid_source or self.test_source)),
                "--pairs brings its own texts: leave out --source, --valid_source and "
                "--test_source")
        for flag_name, name in (("--valid_source", self.valid_source),
                                ("--test_source", self.test_source)):
            require(self.source or not name, f"{flag_name} belongs to --source")
        if self.source:
            check_source(self.source, self.valid_source, self.test_source)
        require(self.pairs is None or Path(self.pairs).is_file(),
                f"--pairs {self.pairs}: no such file")

    def check_used(self, given: set[str]) -> None:
        """Refuses a flag that was given and would change nothing."""
        splits = not self.pairs and (self.source in (None, ["tinystories"]) or self.valid_source)
        require("valid_fraction" not in given or not splits, "--valid_fraction: these stories have "
                                                             "a validation split; leave it out")
        require("test_fraction" not in given or self.pairs or self.source,
                "--test_fraction: the stories of --data_dir keep their splits; leave it out")


def read_pairs(config: PairConfig, tokenizer, dropped: dict[str, Counter],
               ) -> Iterator[tuple[str, str, str]]:
    """Yields ("train", "val" or "test", condition, text); counts what is null in `dropped`."""
    test_fraction = TEST_FRACTION if config.test_fraction is None else config.test_fraction
    if config.pairs:
        try:
            for condition, text in islice(
                    read_json_lines(Path(config.pairs), ("condition", "text")),
                    config.max_stories):
                side = side_of((text or "").strip(), config.valid_fraction, test_fraction)
                if condition is None or text is None:
                    dropped[side][f"the {'text' if text is None else 'condition'} is null"] += 1
                else:
                    yield side, condition.strip(), text.strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{config.pairs} is not UTF-8 text ({error.reason}); convert it to "
                            "UTF-8") from error
        return
    splits = [split for split in SPLITS if split in load_meta(config.data_dir)["splits"]]
    stories = (read_stories(config.source, config.valid_source, config.valid_fraction,
                            config.max_stories, config.test_source, test_fraction)
               if config.source else
               ((split, text) for split in splits for text in
                islice(stories_of(config.data_dir, split, tokenizer), config.max_stories)))
    for split, story in stories:
        if story is None:
            dropped[split]["the story is null"] += 1
        else:
            yield split, *first_sentence(story)


def why_dropped(condition: str, text: str, length: int, config: PairConfig) -> str | None:
    """Why a pair cannot be used; None if it can. `length` is that of the condition's row."""
    if not condition:
        return "the condition is empty"
    if not text.strip():
        return "the text is empty" if config.pairs else "one sentence alone"
    return (f"a condition of more than {config.condition_len} tokens"
            if length > config.condition_len else None)


def write_pairs(config: PairConfig, folder: Path) -> dict:
    from tqdm import tqdm
    started = time.perf_counter()
    meta = load_meta(config.data_dir)
    source = describe_pairs(config, meta)
    tokenizer_text = read_tokenizer_file(config.data_dir, meta)
    tokenizer = load_tokenizer(tokenizer_text)
    texts, conditions = (
        {split: SplitWriter(folder, split + end, length) for split in SPLITS}
        for end, length in (("", meta["seq_len"]), ("_condition", config.condition_len)))
    dropped = {split: Counter() for split in SPLITS}
    both = ((split, part) for split, *parts in read_pairs(config, tokenizer, dropped)
            for part in parts)
    encoded = tokenize_batches(both, tokenizer)  # condition, text, condition, text ...
    with tqdm(desc="tokenizing", unit=" pairs", disable=None) as bar:
        for (split, condition, ids), (_, text, text_ids) in zip(encoded, encoded, strict=True):
            bar.update()
            reason = why_dropped(condition, text, len(ids) + 2, config)
            if reason:
                dropped[split][reason] += 1
                continue
            texts[split].add(text, text_ids)
            for _ in split_row(text_ids, meta["seq_len"]):
                conditions[split].add(condition, ids)
    reasons = sum(dropped.values(), Counter()).most_common()
    own = not (config.pairs or config.source)  # stories of the data folder keep their splits
    with_splits = config.source == ["tinystories"] or config.valid_source
    writers = texts | {writer.split: writer for writer in conditions.values()}
    settle_splits(writers, "none" if own else "held out" if with_splits else "all",
                  "no pair can be used: " + (", ".join(
                      f"{count:,} x {reason}" for reason, count in reasons) or "there is none"),
                  0 if own and "test" not in meta["splits"] else config.test_fraction,
                  config.test_source)
    return finish_folder(
        folder, writers, tokenizer_text, meta["vocab_size"],
        **unchanged(source, describe_pairs(config, meta)),
        condition={"kind": "pairs" if config.pairs else "first sentence",
                   "max_len": config.condition_len, "dropped": dropped},
        config=dataclasses.asdict(config), seconds=round(time.perf_counter() - started, 2))


def describe_pairs(config: PairConfig, meta: dict) -> dict:
    """Where the pairs come from, for meta.json; `meta` is that of the data folder."""
    if config.pairs:
        return describe_files([("--pairs", config.pairs)])
    if config.source:
        return describe_source(config.source, config.valid_source, config.test_source)
    return {key: meta[key] for key in ("source", "licence", "sources") if key in meta}


def report(output_dir: str, meta: dict) -> None:
    for split in SPLITS:
        if split in meta["splits"]:
            counts, conditions = meta["splits"][split], meta["splits"][f"{split}_condition"]
            print(f"{split:>5}: {counts['stories']:,} pairs, {counts['rows']:,} rows, "
                  f"{counts['tokens']:,} tokens of text; conditions of "
                  f"{conditions['tokens'] / conditions['rows']:.1f} tokens on average")
        for reason, count in meta["condition"]["dropped"][split].items():
            print(f"{'':7}{count:,} dropped: {reason}")
    print(f"wrote {output_dir} in {meta['seconds']:.1f} s; source: {meta['source']}")


def main(argv: list[str] | None = None) -> None:
    config, given = parse(PairConfig, __doc__, argv)
    config.check()
    config.check_used(given)
    load_meta(config.data_dir)  # before anything is made
    report(config.output_dir, make_folder(config.output_dir, "--output_dir", config.overwrite,
                                          lambda folder: write_pairs(config, folder)))


if __name__ == "__main__":
    run(main)
