"""Emoji of several artists: which one a story is about, sentences that name one, and scenes that
are composed of them and told in a sentence or two. A library of prep_image_data.py.

    emoji = read_emoji(["noto", "twemoji"])          # {"cat": {"noto": Path(...), ...}, ...}
    scene = draw_scene(random.Random(1), ["cat", "ball", "tree"], "noto", held_out=False)
    scene.text                                       # "There was a big cat and a small ball."
    compose(scene, drawing, 64)                      # (64, 64, 4) uint8
"""

from cli import UserError, require

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from corpus.files import read_json_lines
from corpus.image_files import on_white, open_picture, with_presence
from corpus.sentences import sentence_spans

if TYPE_CHECKING:
    from PIL.Image import Image

# Names of emoji that stories use for something else, mostly as verbs
UNCLEAR = frozenset("bat cook cooking cut dizzy down drop fly guard judge kiss leg link locked "
                    "pause pick play record repeat seal seat select sparkle stop swim unlocked up "
                    "wand warning watch wrestle".split())
# What there is not one of, or not by itself
NOT_ALONE = frozenset("beer bone bread butter cheese child ear eye family fire fog foot garlic "
                      "hole honey ice milk money mouth nose olive person rice salt school shower "
                      "soap spaghetti tongue tooth wing wood yarn".split())
WHO = ("Tim", "Lily", "Ben", "Mia", "Sam", "Anna", "Tom", "Sue", "Max", "Lucy", "Mom", "Dad")
TOLD = ("Once upon a time, there was {}.", "One day, there was {}.", "There was {}.",
        "One day, {who} saw {}.", "{who} saw {}.", "{who} looked and saw {}.",
        "One day, {who} found {}.", "{who} had {}.", "Look, there is {}!")
HELD_OUT_PAIRS = 0.1  # the share of the pairs of names that no training scene has together
TRIES = 200


def emoji_lines(folder: str | Path,
                ) -> Iterator[tuple[str | None, str | None, str, str | None]]:
    """Yields (name of the file, name, style, licence) of every line of a folder's pairs.jsonl; the
    style is by default the folder's name."""
    path = Path(folder) / "pairs.jsonl"
    try:
        for image, name, style, licence in read_json_lines(path, ("image", "name"),
                                                           ("style", "licence")):
            yield image, name, style or path.resolve().parent.name, licence
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
                        ) from error


def read_emoji(folders: Iterable[str | Path]) -> dict[str, dict[str, Path]]:
    """The files of the emoji by name and style; only those whose name is one word of small letters
    that is clear."""
    found: dict[str, dict[str, Path]] = {}
    for folder in map(Path, folders):
        for image, name, style, _ in emoji_lines(folder):
            if image and name and re.fullmatch("[a-z]+", name) and name not in UNCLEAR:
                found.setdefault(name, {}).setdefault(style, folder / image)
    require(found, f"no emoji of {', '.join(map(str, folders))} has a name of one word")
    return found


class NameFinder:
    """Finds names, also in the plural, in stories."""

    def __init__(self, names: Iterable[str]):
        self.meant: dict[str, list[str]] = {}
        for name in sorted(names):
            for word in (name, f"{name}s"):
                self.meant.setdefault(word, []).append(name)

    def counts(self, story: str) -> Counter:
        """How often each of the names occurs."""
        return Counter(name for word in re.findall(r"[^\W\d_]+", story.lower())
                       for name in self.meant.get(word, ()))

    def main(self, story: str, min_count: int) -> str | None:
        """The name that occurs more often than every other one, and at least so often."""
        (name, most), (_, second) = [*self.counts(story).most_common(2), (None, 0), (None, 0)][:2]
        return name if most >= min_count and most > second else None

    def opening(self, story: str, name: str) -> str:
        """The story as far as the end of the sentence that has this name first."""
        for start, end in sentence_spans(story):
            if self.counts(story[start:end])[name]:
                return story[:end]
        return story


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether no training scene has these two together; the same two whatever else there is."""
    digest = hashlib.sha256(" ".join(sorted((first, second))).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_PAIRS * 2**64


def can_be_placed(name: str) -> bool:
    """Whether a scene can have "a" thing of that name."""
    return name not in NOT_ALONE and (not name.endswith("s") or name.endswith(("ss", "us")))


@dataclass(frozen=True)
class Thing:
    name: str
    big: bool
    column: int  # of the 3 x 3 places, from the left
    row: int  # from the top
    x: float  # of its middle; all as shares of the scene's sides
    y: float
    side: float
    flipped: bool


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    style: str
    background: tuple[int, int, int]
    brightness: float
    text: str


def draw_scene(rng: random.Random, names: list[str], style: str, held_out: bool) -> Scene:
    """A scene of one to three different things of these names. Pairs that are held out are in none
    of training, and in about half of the others that have two things or more."""
    count = min(rng.choices((1, 2, 3), (3, 5, 2))[0], len(names))
    wanted = held_out and count > 1 and rng.random() < 0.5
    for _ in range(TRIES):
        chosen = rng.sample(names, count)
        if held_out and not wanted:
            break
        if any(is_held_out_pair(*pair) for pair in combinations(chosen, 2)) == wanted:
            break
    else:  # so few names that hardly any two may be together, or hardly any are held out
        chosen = chosen if held_out else chosen[:1]
    things = _place(rng, chosen)
    background = rng.randint(190, 255), rng.randint(190, 255), rng.randint(190, 255)
    return Scene(things, style, background, rng.uniform(0.85, 1.15), _tell(rng, things))


def draw_caption(rng: random.Random, name: str) -> str:
    """A sentence that names a thing."""
    size = rng.choice(("", "", "", "big ", "little ", "small "))
    return rng.choice(TOLD).format(_with_article(size + name), who=rng.choice(WHO))


def _place(rng: random.Random, names: list[str]) -> tuple[Thing, ...]:
    """Puts things where they do not lie on each other."""
    beside = len(names) == 2 and rng.random() < 0.7
    for attempt in range(TRIES):
        places = rng.sample([(column, row) for column in range(3) for row in range(3)], len(names))
        if beside:
            ends, across = rng.sample((0, 2), 2), rng.randrange(3)
            places = ([(end, across) for end in ends] if rng.random() < 0.7 else
                      [(across, end) for end in ends])
        things = []
        for name, (column, row) in zip(names, places, strict=True):
            big = attempt < TRIES - 1 and rng.random() < 0.5  # small ones have room in any places
            side = (rng.uniform(0.42, 0.48) if big else rng.uniform(0.24, 0.28)) * (
                1.3 if len(names) == 1 else 1)
            x, y = (min(max(0.22 + 0.28 * place + rng.uniform(-0.03, 0.03), side / 2),
                        1 - side / 2) for place in (column, row))
            things.append(Thing(name, big, column, row, x, y, side, rng.random() < 0.5))
        if all(max(abs(a.x - b.x), abs(a.y - b.y)) >= 0.45 * (a.side + b.side)
               for a, b in combinations(things, 2)):
            break
    return tuple(things)


def _tell(rng: random.Random, things: tuple[Thing, ...]) -> str:
    """One sentence that names the things, and often a second one that says where some are."""
    sized = rng.random() < 0.6
    told = [_with_article(("big " if thing.big else "small ") * sized + thing.name)
            for thing in things]
    some = ", ".join(told[:-1]) + " and " + told[-1] if len(told) > 1 else told[0]
    text = rng.choice(TOLD).format(some, who=rng.choice(WHO))
    where = [(thing.name, place) for thing in things if (place := _where(rng, thing, things))]
    if where and rng.random() < 0.7:
        if len(things) == 1:
            return f"{text} It was {where[0][1]}."
        parts = [f"the {name} was {place}" for name, place in rng.sample(where, min(2, len(where)))]
        text += f" {' and '.join(parts).capitalize()}."
    return text


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" and not words.startswith("uni") else "a ") + words


def _where(rng: random.Random, thing: Thing, things: tuple[Thing, ...]) -> str | None:
    """Where a thing is, if that tells it from all others."""
    others = [other for other in things if other is not thing]
    sides = [name for at, name, there in (
        (thing.column == 0, "on the left", any(other.column == 0 for other in others)),
        (thing.column == 2, "on the right", any(other.column == 2 for other in others)),
        (thing.row == 0, "at the top", any(other.row == 0 for other in others)),
        (thing.row == 2, "at the bottom", any(other.row == 2 for other in others)),
        ((thing.column, thing.row) == (1, 1), "in the middle", False)) if at and not there]
    return rng.choice(sides) if sides else None


def trimmed(path: Path) -> "Image":
    """An emoji without the empty space around it, as an RGBA square."""
    from PIL import Image
    image = open_picture(path)
    box = image.getchannel("A").getbbox()
    require(box, f"{path} is empty: every pixel is transparent")
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def compose(scene: Scene, drawing: Callable[[str, str], "Image"], size: int) -> np.ndarray:
    """(size, size, 4) uint8: the picture of a scene. `drawing` gives a name's in a style."""
    from PIL import Image, ImageEnhance, ImageOps
    canvas = Image.new("RGBA", (size, size), scene.background)
    for thing in scene.things:
        side = max(1, round(thing.side * size))
        image = drawing(thing.name, scene.style).resize((side, side), Image.Resampling.LANCZOS)
        image = ImageEnhance.Brightness(image).enhance(scene.brightness)
        image = ImageOps.mirror(image) if thing.flipped else image
        canvas.alpha_composite(image, (max(0, min(size - side, round(thing.x * size - side / 2))),
                                       max(0, min(size - side, round(thing.y * size - side / 2)))))
    return with_presence(np.asarray(on_white(canvas)))
