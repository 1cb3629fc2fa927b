"""Stage 1c: pairs of a picture and the text that tells of it -> shards.

    python prep_image_data.py --pairs pictures/pairs.jsonl      # {"image": "a.png", "text": "..."}
    python prep_image_data.py --emoji noto twemoji openmoji --held_out openmoji
    python prep_image_data.py --captions 6 --emoji noto twemoji openmoji --held_out openmoji
    python prep_image_data.py --scenes 20000 --emoji noto twemoji openmoji --held_out openmoji

`--data_dir` is the data folder of the model that is to be conditioned: its tokenizer is used, and
with `--emoji` its stories. Writes `--output_dir` whole or not at all and prints what was dropped
and why.

--pairs    Names of files count from the folder of the .jsonl file. A line may have a `story` too:
           the pages of one stay on one side. With a `split` ("train", "val", "test") in every line
           nothing else divides them. A `condition` is put before the text. Pictures are PNG, JPEG,
           WebP or BMP. One that is in training, pixel for pixel, is in no other split.
--emoji    Folders with a pairs.jsonl of lines {"image": "cat.png", "name": "cat"}, which may have
           a `style`; otherwise the folder's name is it. A story that tells of one thing more than
           of others is paired with the emoji of that name, once in each style. Styles that are
           held out are seen in validation and test alone, and no others there. With --opening
           only as far as the end of the sentence that names the thing first: behind it a picture
           says little that the text has not said.
--captions Beside the stories so many sentences of training for each of the emoji, of things that
           enough training stories name: what a thing is called, and nothing else. With --no-stories
           nothing but these, and one for each of the emoji of the styles that are held out.
--scenes   So many pictures of one to three emoji each, told in a sentence or two; a twentieth each
           for validation and test. No training scene has a held-out style, or one of the tenth of
           the pairs of things that is held out.

On one slow CPU core a slice of 8,504 stories takes about 30 s with ten styles, as do 20,000 scenes.

The folder is a data folder as data_prep.py writes it, with shards of pictures: row i of
train_condition_00000.idx (corpus/pictures.py tells the format) belongs to row i of train_00000.bin
(every row of a long text has the same). With --emoji subjects.jsonl says what each row shows.
"""

from cli import UserError, atomic_file, flag, parse, require, run
from cli.folders import make_folder

import dataclasses
import functools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any

import numpy as np

from corpus.files import read_json_lines
from corpus.image_files import check_size, load_picture
from corpus.pictures import SUBJECTS, PictureWriter
from corpus.rows import SPLITS, load_meta, read_tokenizer_file, stories_of
from corpus.scenes import (
    NameFinder,
    can_be_placed,
    compose,
    draw_caption,
    draw_scene,
    emoji_lines,
    is_held_out_pair,
    read_emoji,
    trimmed,
)
from corpus.shards import (
    TEST_FRACTION,
    SplitWriter,
    check_test_fraction,
    finish_folder,
    settle_splits,
    unchanged,
)
from corpus.sources import describe_files, side_of
from corpus.tokens import load_tokenizer, split_row
from corpus.vocabulary import tokenize_batches

VALID_FRACTION = 0.05
KNOWN = 20  # stories that have to name a thing before scenes are composed of it
CACHE_BYTES = 2**28  # of pictures in the memory

Emoji = dict[str, dict[str, Path]]  # files by name and style
Dropped = dict[str, Counter]  # reasons by split


@dataclass
class ImageConfig:
    data_dir: str = flag("data", "data folder with the tokenizer, and the stories for --emoji")
    pairs: str | None = flag(None, 'file of lines {"image": "a.png", "text": "..."}')
    emoji: list[str] | None = flag(None, "folders of emoji, each with a pairs.jsonl")
    held_out: list[str] | None = flag(None, "styles that only validation and test see")
    opening: bool = flag(False, "of each story no more than its sentences up to the thing's name")
    captions: int | None = flag(None, "sentences that name each of the emoji, to be trained on too")
    stories: bool = flag(True, "--no-stories: captions alone")
    scenes: int | None = flag(None, "number of training pictures to compose of the emoji")
    output_dir: str = flag("data_pictures", "folder to write")
    image_size: int = flag(64, "sides of the pictures in pixels, a multiple of 8")
    min_count: int = flag(3, "how often a story has to name a thing that it is about")
    max_stories: int | None = flag(None, "stories to read at most of each split, or pairs")
    valid_fraction: float | None = flag(None, "share of the pairs that is held out (default: "
                                              f"{VALID_FRACTION})")
    test_fraction: float | None = flag(
        None, "share of the held-out ones kept for the test split (default: "
              f"{TEST_FRACTION}, or no test split where too few are held out)")
    seed: int = flag(0, "of the scenes")
    overwrite: bool = flag(False, "replace an output folder that is already there")

    def check(self) -> None:
        check_size("--image_size", self.image_size)
        require(Path(self.output_dir).resolve() != Path(self.data_dir).resolve(),
                f"--output_dir {self.output_dir}: that is the --data_dir, which would be replaced; "
                "name another folder")
        require(bool(self.pairs) != bool(self.emoji), "give either --pairs or --emoji")
        for name in ("scenes", "captions"):
            require(self.emoji or not getattr(self, name), f"--{name} are of emoji: give --emoji "
                                                           "too")
        require(not (self.scenes and self.captions), "give either --scenes or --captions")
        require(self.stories or self.captions, "--no-stories leaves --captions: say how many")
        require(self.emoji or not self.held_out, "--held_out names styles of --emoji")
        require(self.held_out or not self.emoji, "--emoji needs a style that only validation and "
                                                 "test see: name it with --held_out")
        require(self.scenes is None or self.scenes >= 20,
                f"--scenes {self.scenes}: must be 20 or more")
        for name in ("max_stories", "min_count", "captions"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} {value}: must be positive")
        require(self.valid_fraction is None or 0 < self.valid_fraction < 1,
                f"--valid_fraction {self.valid_fraction}: must lie between 0 and 1")
        check_test_fraction(self.test_fraction, None)
        for flag_name, path in [("--pairs", Path(self.pairs))] if self.pairs else [
                ("--emoji", Path(folder) / "pairs.jsonl") for folder in self.emoji or ()]:
            require(path.is_file(), f"{flag_name} {path}: no such file")

    def check_used(self, given: set[str]) -> None:
        """Refuses a flag that was given and would change nothing."""
        stories = self.emoji and self.stories and not self.scenes
        for name, used, why in (
                ("min_count", stories, "the stories of --emoji"),
                ("opening", stories, "the stories of --emoji"),
                ("max_stories", stories or self.pairs, "--pairs and the stories of --emoji"),
                ("seed", self.scenes or self.captions, "--scenes and --captions"),
                ("valid_fraction", self.pairs, "--pairs"),
                ("test_fraction", self.pairs, "--pairs")):
            require(name not in given or used, f"--{name} belongs to {why}; leave it out")


@dataclass(frozen=True)
class Sample:
    """A text, and how to get its picture."""

    split: str
    text: str
    picture: Callable[[], np.ndarray]
    subjects: tuple[str, ...] = ()  # what is shown
    style: str = ""


def pair_lines(config: ImageConfig) -> Iterator[tuple[str | None, ...]]:
    """Yields (name of the picture's file, text, story, split, condition) of every line."""
    path = Path(config.pairs or "")
    try:
        yield from islice(read_json_lines(path, ("image", "text"), ("story", "split", "condition")),
                          config.max_stories)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
                        ) from error


def are_divided(config: ImageConfig) -> bool:
    """Whether the pairs say their splits, by the first line."""
    divided = next((split is not None for _, _, _, split, _ in pair_lines(config)), False)
    require(not divided or config.valid_fraction is config.test_fraction is None,
            f"{config.pairs} says which pair is of which split: leave out --valid_fraction and "
            "--test_fraction")
    return divided


def read_pairs(config: ImageConfig) -> Iterator[tuple[str, str | None, str | None]]:
    """Yields ("train", "val" or "test", name of the picture's file, text) of every pair."""
    fractions = (VALID_FRACTION if config.valid_fraction is None else config.valid_fraction,
                 TEST_FRACTION if config.test_fraction is None else config.test_fraction)
    divided = are_divided(config)
    for image, text, story, split, condition in pair_lines(config):
        require(divided == (split is not None), f"{config.pairs}: a split is given to some lines "
                f"and not to others, as that of {image}; give it to all or to none")
        require(split is None or split in SPLITS, f"{config.pairs}: the split {split!r} of {image} "
                                                  f"is none of {', '.join(SPLITS)}")
        text, condition = text and text.strip(), condition and condition.strip()
        side = split or side_of((story or text or "").strip(), *fractions)
        yield side, image, (f"{condition or ''} {text}".strip() if text else text)


def pair_samples(config: ImageConfig, dropped: Dropped) -> Iterator[Sample]:
    """The pairs, those of training first: the others must not have its pictures."""
    folder = Path(config.pairs or "").parent
    for training in (True, False):
        for split, image, text in read_pairs(config):
            if (split == "train") != training:
                continue
            if image is None or not text:
                dropped[split]["the image is null" if image is None else
                               f"the text is {'null' if text is None else 'empty'}"] += 1
            else:
                yield Sample(split, text, functools.partial(load_picture, folder / image,
                                                            config.image_size))


def emoji_samples(config: ImageConfig, emoji: Emoji, tokenizer: Any, dropped: Dropped,
                  ) -> Iterator[Sample]:
    """The stories that are about what an emoji shows, once for each style of their split."""
    finder, held_out = NameFinder(emoji), config.held_out or ()
    size = config.image_size
    load = functools.lru_cache(max(1, CACHE_BYTES // (4 * size**2)))(load_picture)
    for split in splits_of(config):
        for story in islice(stories_of(config.data_dir, split, tokenizer), config.max_stories):
            name = finder.main(story, config.min_count)
            styles = [style for style in emoji.get(name or "", ())
                      if (style in held_out) == (split != "train")]
            if not styles:
                dropped[split]["it is about what no style of this split shows" if name else
                               "it is about nothing that an emoji shows"] += 1
            for style in styles:
                assert name is not None
                text = finder.opening(story, name) if config.opening else story
                yield Sample(split, text, functools.partial(load, emoji[name][style], size),
                             (name,), style)


def caption_samples(config: ImageConfig, names: dict[str, list[str]], emoji: Emoji,
                    ) -> Iterator[Sample]:
    """Sentences that name one emoji each; `names` has those of each style."""
    held_out = config.held_out or ()
    for split in ["train"] if config.stories else SPLITS:
        for style in names:
            if (style in held_out) == (split != "train"):
                for name in names[style]:
                    picture = functools.lru_cache(1)(functools.partial(
                        load_picture, emoji[name][style], config.image_size))
                    for i in range(config.captions or 0 if split == "train" else 1):
                        rng = random.Random(f"{config.seed} {split} {style} {name} {i}")
                        yield Sample(split, draw_caption(rng, name), picture, (name,), style)


def scene_samples(config: ImageConfig, names: dict[str, list[str]], emoji: Emoji,
                  ) -> Iterator[Sample]:
    """The scenes; `names` has those that may be shown in each style. Every scene has a source of
    randomness of its own, so that it is the same however many there are."""
    @functools.lru_cache(1024)
    def drawing(name: str, style: str) -> Any:
        return trimmed(emoji[name][style])

    held_out, count = config.held_out or (), config.scenes or 0
    for split in SPLITS:
        styles = [style for style in names if (style in held_out) == (split != "train")]
        for i in range(count if split == "train" else count // 20):
            rng = random.Random(f"{config.seed} {split} {i}")
            style = rng.choice(styles)
            scene = draw_scene(rng, names[style], style, split != "train")
            yield Sample(split, scene.text, functools.partial(
                compose, scene, drawing, config.image_size),
                tuple(thing.name for thing in scene.things), style)


def splits_of(config: ImageConfig) -> list[str]:
    return [split for split in SPLITS if split in load_meta(config.data_dir)["splits"]]


def styles_of(config: ImageConfig, emoji: Emoji) -> list[str]:
    """The styles there are; UserError unless some are held out and some are not."""
    styles = sorted({style for files in emoji.values() for style in files})
    unknown = [style for style in config.held_out or () if style not in styles]
    require(not unknown, f"--held_out {' '.join(unknown)}: no such style, only {', '.join(styles)}")
    require(set(styles) - set(config.held_out or ()), f"no style is left for training: all of "
            f"{', '.join(styles)} are held out; give --emoji one folder more")
    return styles


def names_to_compose(config: ImageConfig, emoji: Emoji, tokenizer: Any) -> dict[str, list[str]]:
    """The names that scenes and captions may show in each style: training stories tell of them, and
    there is a style to learn them from."""
    finder, known = NameFinder(filter(can_be_placed, emoji)), Counter()
    for story in stories_of(config.data_dir, "train", tokenizer):
        known.update(finder.counts(story).keys())
    styles = styles_of(config, emoji)
    learned = [name for name in sorted(known) if known[name] >= KNOWN
               and not emoji[name].keys() <= set(config.held_out or ())]
    names = {style: [name for name in learned if style in emoji[name]] for style in styles}
    for style, there in names.items():
        require(there, f"no emoji of the style {style} shows what {KNOWN} stories of "
                       f"{config.data_dir} name: leave it out, or give more stories")
    return names


def write_samples(samples: Iterator[Sample], folder: Path, texts: dict[str, SplitWriter],
                  pictures: dict[str, PictureWriter], tokenizer: Any, dropped: Dropped,
                  with_subjects: bool) -> Counter:
    """Writes texts, pictures and what they show; returns how many texts of training tell of each
    thing."""
    from tqdm import tqdm
    told: Counter = Counter()
    with (tqdm(desc="pictures", unit=" pairs", disable=None) as bar,
          atomic_file(folder / SUBJECTS, "w") if with_subjects else nullcontext() as lines):
        # what stands for the split comes back with the tokens
        for sample, text, ids in tokenize_batches(
                ((sample, sample.text) for sample in samples), tokenizer):
            bar.update()
            split, picture = sample.split, sample.picture()
            if split != "train" and pictures["train"].holds(picture):
                dropped[split]["the picture is also in train"] += 1
                continue
            texts[split].add(text, ids)
            told.update(sample.subjects if split == "train" else ())
            for _ in split_row(ids, texts[split].seq_len):
                if lines:
                    print(json.dumps({"split": split, "row": pictures[split].counts["rows"],
                                      "subjects": sample.subjects, "style": sample.style}),
                          file=lines)
                pictures[split].add(picture)
    return told


def write_pictures(config: ImageConfig, folder: Path) -> dict:
    started = time.perf_counter()
    meta = load_meta(config.data_dir)
    source = describe_pictures(config, meta)
    tokenizer_text = read_tokenizer_file(config.data_dir, meta)
    tokenizer = load_tokenizer(tokenizer_text)
    texts = {split: SplitWriter(folder, split, meta["seq_len"]) for split in SPLITS}
    pictures = {split: PictureWriter(folder, f"{split}_condition", config.image_size)
                for split in SPLITS}
    dropped: Dropped = {split: Counter() for split in SPLITS}
    more: dict[str, Any] = {"kind": "pictures"}
    if config.pairs:
        samples = pair_samples(config, dropped)
    else:
        emoji = read_emoji(config.emoji or ())
        more = {"kind": "emoji", "styles": styles_of(config, emoji), "held_out": config.held_out}
        samples = emoji_samples(config, emoji, tokenizer, dropped)
        if config.captions or config.scenes:
            names = names_to_compose(config, emoji, tokenizer)
        if config.captions:
            more |= {} if config.stories else {"kind": "captions"}
            samples = chain(caption_samples(config, names, emoji),
                            samples if config.stories else ())
        if config.scenes:
            every = sorted(set().union(*names.values()))
            more |= {"kind": "scenes", "held_out_pairs": sum(
                is_held_out_pair(*pair) for pair in combinations(every, 2))}
            samples = scene_samples(config, names, emoji)
    told = write_samples(samples, folder, texts, pictures, tokenizer, dropped, not config.pairs)
    writers = texts | {writer.split: writer for writer in pictures.values()}
    settle(config, writers, dropped)
    return finish_folder(
        folder, writers, tokenizer_text, meta["vocab_size"],
        **unchanged(source, describe_pictures(config, meta)),
        condition={"encoder": "image", "size": config.image_size, **more, "dropped": dropped,
                   "told": dict(told.most_common())},
        config=dataclasses.asdict(config), seconds=round(time.perf_counter() - started, 2))


def settle(config: ImageConfig, writers: dict[str, Any], dropped: Dropped) -> None:
    """Raises UserError where a split is empty that must not be; leaves out an empty test split."""
    reasons = sum(dropped.values(), Counter()).most_common()
    empty = "no pair can be used: " + (", ".join(
        f"{count:,} x {reason}" for reason, count in reasons) or "there is none")
    if config.pairs and not are_divided(config):
        return settle_splits(writers, "all", empty, config.test_fraction, None)
    require(writers["val"].counts["stories"] or not writers["train"].counts["stories"],
            "no validation pairs: " + (
                "say \"split\": \"val\" in some lines whose pictures are not in training"
                if config.pairs else "no validation story is about what a held-out style shows; "
                                     "lower --min_count, or hold out a style of more emoji"))
    settle_splits(writers, "none", empty, 0, None)


def describe_pictures(config: ImageConfig, meta: dict) -> dict:
    """Where the pairs come from, for meta.json; `meta` is that of the data folder."""
    if config.pairs:
        return describe_files([("--pairs", config.pairs)])
    paths = [Path(folder) / "pairs.jsonl" for folder in config.emoji or ()]
    emoji = describe_files([("--emoji", str(path)) for path in paths])["sources"]
    for entry, path in zip(emoji, paths, strict=True):
        entry["name"] = f"{path.resolve().parent.name}/{path.name}"
    licences = {licence for folder in config.emoji or ()
                for *_, licence in emoji_lines(folder) if licence}
    names = ", ".join(path.resolve().parent.name for path in paths)
    made = ("scenes of " if config.scenes else f"{meta['source']}, " if config.stories else
            "captions of ")
    return {"source": made + names,
            "licence": ", ".join([meta["licence"], *sorted(licences)]),
            "sources": meta.get("sources", []) + emoji}


def report(output_dir: str, meta: dict) -> None:
    condition = meta["condition"]
    for split in SPLITS:
        if split in meta["splits"]:
            counts, pictures = meta["splits"][split], meta["splits"][f"{split}_condition"]
            print(f"{split:>5}: {counts['stories']:,} pairs of a picture and a text, "
                  f"{counts['rows']:,} rows, {counts['tokens']:,} tokens of text; "
                  f"{pictures['pictures']:,} distinct pictures")
        for reason, count in condition["dropped"][split].items():
            print(f"{'':7}{count:,} dropped: {reason}")
    if told := list(condition["told"].items()):
        print(f"{len(told):,} things are told of in training, most often "
              + ", ".join(f"{name} ({count:,})" for name, count in told[:12]))
    if condition["kind"] == "scenes":
        print(f"{condition['held_out_pairs']:,} pairs of them are in no training scene")
    print(f"wrote {output_dir} in {meta['seconds']:.1f} s; source: {meta['source']}")


def main(argv: list[str] | None = None) -> None:
    config, given = parse(ImageConfig, __doc__, argv)
    config.check()
    config.check_used(given)
    load_meta(config.data_dir)  # before anything is made
    report(config.output_dir, make_folder(config.output_dir, "--output_dir", config.overwrite,
                                          lambda folder: write_pictures(config, folder)))


if __name__ == "__main__":
    run(main)
