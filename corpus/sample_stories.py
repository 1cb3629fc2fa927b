"""Little stories made up by a small grammar, for trying things out without a network.

Each story is one of six fixed plots with its people, places, objects and wordings drawn at
random. That is enough to watch a tiny model learn something in a few minutes, but it is not a
data set: the sentences come from a short list, so a loss or a sample quality measured on them
says nothing about how a model would do on real stories.

    python -m corpus.sample_stories --count 3 --seed 1

prints three stories with a line `<|endoftext|>` between them.
"""

from cli import flag, parse, require, run

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from corpus.files import SEPARATOR

LARGEST_COUNT = 100_000  # there are more, but drawing without repeats gets slow
Pick = Callable[[Sequence], Any]
_PRONOUNS = (("he", "him", "his"), ("she", "her", "her"))
_BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Finn")
_GIRLS = ("Lily", "Mia", "Anna", "Sue", "Lucy", "Amy", "Zoe", "Rose")
_HE_ANIMALS = ("Pip", "Bruno", "Rusty", "Toby", "Oscar")
_SHE_ANIMALS = ("Daisy", "Poppy", "Ruby", "Honey", "Dot")
_KINDS = ("rabbit", "bear", "fox", "mouse", "puppy", "badger")
_FAMILY = ("Mom", "Dad", "Grandma", "Grandpa")
_COLORS = ("red", "blue", "green", "yellow", "orange")
_THINGS = ("ball", "hat", "doll", "scarf", "book", "bag")
_ADJECTIVES = "[little|small|young|happy|kind]"
_DAYS = "[One day|One morning|One sunny day|One warm afternoon]"
_CHILD_HOMES = "[in a small town|near the woods|in a white house|by the sea]"
_ANIMAL_HOMES = "[in the woods|under an old oak tree|by a small stream|in a warm den]"
# In every text {x} is a slot and [a|b] a free choice.
_OPENING = """
Once upon a time, there was a {adjective} {kind} named {N}.
~ Once there was a {adjective} {kind} named {N}.
~ {N} was a {adjective} {kind} who lived {home}.
"""


class _Plot(NamedTuple):
    # "family", "friend" or "any"; a row with a "helper" column has the last word.
    helper: str
    # Facts that must agree with each other stand in one row, so that a wish, what goes wrong
    # with it and how it ends are never mixed up.
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    # A sentence a line, "~" another wording of the line above (or, with nothing after it, the
    # chance to leave it out), an empty line a new paragraph.
    text: str


_LOST = _Plot("any", ("place", "s1", "s2", "s3"), (
    ("the park", "under [a|the] bench", "behind a tall tree", "in the [long|tall] grass"),
    ("the beach", "behind a big rock", "near the little boats", "under [a towel|an umbrella]"),
    ("the garden", "behind [a|the] flower pot", "by the gate", "under [a|the] bush"),
    ("the woods", "behind an old log", "near the stream", "under [a pile of|the dry] leaves"),
    ("the farm", "behind the barn", "under the apple tree", "in [the hay|an empty basket]"),
), """
{he} had {a_color} {thing} and [took it everywhere|loved it very much].
~ {his} favorite thing was {a_color} {thing}.
{day}, {he} went to {place} with {H0}, but soon the {thing} was gone.

"[Do not worry|Do not be sad]," said {H}. "We will [look for it|find it]."
They looked {s1} and {s2}. Then {H} saw the {thing} {s3}!
~ They looked {s3} and {s1}. At last, {N} looked {s2}, and there was the {thing}!
~ They looked {s2} and {s3}. Then {H} saw something {color} {s1}, and it was the {thing}!

"Thank you, {hv}!" said {N} [with a smile|and jumped for joy].
~ {N} gave {H} a big hug.
~
From that day on, {N} took good care of the {thing}.
~ {N} learned to take [good|better] care of the things {he} loved.
~ {N} learned that it is easier to look together.
""")
_PRACTICE = _Plot("any", ("who", "skill", "fail", "tip", "success"), (
    ("child", "ride a bike", "the bike fell over", "Look ahead and keep your feet moving",
     "rode the bike all the way around the park"),
    ("child", "tie {his} shoes", "the knot came undone",
     "Make two loops, like the ears of a rabbit", "tied both shoes without any help"),
    ("any", "swim", "water got in {his} nose", "Kick your legs and breathe slowly",
     "swam all the way across the pond"),
    ("any", "whistle", "only air came out", "Make your lips round and blow softly",
     "whistled a happy little song"),
    ("animal", "climb the tall tree", "{he} slid back down",
     "Take one small step at a time", "climbed all the way to the top"),
    ("animal", "jump over the stream", "{he} fell in with a splash",
     "Run fast and then jump high", "jumped over the stream and stayed dry"),
), """
[{he}|{N}] wanted to learn how to {skill}.
~ More than anything, {he} wanted to {skill}.
The first time {he} tried, {fail}, and {he} wanted to [give up|stop].
~ {he} tried and tried, but {fail} [each|every] time.

{H0} [came over|sat down next to {him}] and said, "{tip}."
So {N} practiced every [day|morning] for a [week|whole week].
~ {N} tried again that day and [again|once more] the next day.
~ {N} listened, and each day it went a little better.

[At last|Then one day], {he} {success}!
"[I did it|Look at me]!" shouted {N}, and {H} [clapped|smiled].
~ {H} [clapped|smiled], and {N} jumped for joy.
{N} learned that hard things get easy when you [keep trying|practice|do not give up].
~ {N} was [very proud|proud and happy] and never gave up too soon again.
""")
# "it" and "the ball" follow the verbs, which is why "dig" brings its own "with".
_SHARE = _Plot("friend", ("toy", "play", "played", "where"), (
    ("ball", "roll", "rolled", "in the yard"),
    ("kite", "fly", "flew", "on the hill"),
    ("boat", "sail", "sailed", "on the pond"),
    ("drum", "play", "played", "in the garden"),
    ("train", "pull", "pulled", "around the house"),
    ("scooter", "ride", "rode", "on the path"),
    ("spade", "dig with", "dug with", "in the sand"),
), """
{he} had a [new|shiny] {color} {toy} and liked to {play} it {where}.
{day}, {H0} asked, "May I {play} it, too?"
"No, it is mine!" said {N}, so {H} [walked|went] away.
~ {N} said no, so {H} felt sad and [walked|went] away.

[Now {N}|{N}] {played} the {toy} alone, but it was [no fun|not much fun].
So {N} ran [to|after] {H} and said, "I am sorry. Please play with me."

They took turns until [the sun went down|it was time for dinner].
~ They [laughed|played] together all afternoon.
{N} learned that a toy is more fun when you share it.
~ {N} learned that a good friend is better than any toy.
~ From that day on, {N} [always|gladly] shared the {toy} with {H}.
""")
_AFRAID = _Plot("any", ("who", "helper", "fear", "scene", "advice", "act", "result"), (
    ("any", "family", "the dark", "at bedtime, {he} hid under the blanket",
     "The dark is just your room without the light",
     "looked around and saw only toys and books", "soon the dark felt as soft as the blanket"),
    ("any", "family", "storms", "when the rain and wind came, {he} hid under the table",
     "Let us sing louder than the storm", "sang as loud as {he} could",
     "soon the storm was gone, and they were still singing"),
    ("any", "any", "the tall slide", "at the park, {he} sat at the top and shook",
     "I will wait for you at the bottom", "went down with a big laugh",
     "soon {N} ran back to do it again"),
    ("any", "any", "the old bridge", "at the stream, {he} stopped and did not want to cross",
     "Look at me and not at the water", "looked up and took ten small steps",
     "soon {N} was on the other side"),
    ("child", "any", "the big dog next door", "when the dog barked, {he} ran behind a tree",
     "Stand still and let the dog smell your hand", "stood very still and held out one hand",
     "the dog licked it and wagged its tail"),
), """
{he} was [very|always] afraid of {fear}.
~ There was one thing {he} did not like: {fear}.
{scene}, and {his} heart beat fast.
~ {scene}. "I am [too|so] scared!" [said|cried] {N}.

{H0} came [over|close] and said, "{advice}."
After a deep breath, {N} {act}.
~ {N} was [still scared|not sure], but {he} {act}.
{result}!

"I am not afraid [now|any more]," {N} told {H}.
~ "You were very brave," said {H}.
~
{N} learned that [you are brave when you try|it is all right to be scared].
~ {N} learned that scary things get small when someone helps.
""")
_MAKE = _Plot("any", ("gift", "stuff", "mishap", "fix"), (
    ("card", "paper and paint", "paint fell on the card",
     "turned the spot into a [bright|yellow] sun"),
    ("cake", "flour, milk and eggs", "the cake came out flat", "put cream and berries on top"),
    ("necklace", "string and shiny beads", "the string broke",
     "put the beads on a better string"),
    ("scarf", "soft {color} wool", "there was not enough wool",
     "used white wool for the other half"),
    ("birdhouse", "wood and nails", "the roof fell off", "put it back with longer nails"),
    ("kite", "paper and sticks", "the paper got a big hole", "put a star over the hole"),
), """
[Tomorrow was|It was almost] {R}'s birthday, and {N} wanted to make a {gift}.
{H0} helped {him} find {stuff}.

[But then|Then], {mishap}.
~ They worked [hard|all morning], but then {mishap}.
"Oh [no|dear]!" said {N}. "We can fix it," said {H}.
~ "[We can fix it|Do not worry]," said {H} with a smile.
So they {fix}[|, and it looked even better].

[The next day|On the big day], {N} gave the {gift} to {R} and got a big hug.
~ {R} loved the {gift} and gave {N} a big hug.
{N} learned that a mistake [can be fixed|can turn into something good].
~ {N} learned that a gift made with love is the best gift.
~ {N} was glad that they did not give up.
""")
_RAIN = _Plot("any", ("plan", "pack", "instead"), (
    ("have a picnic by the lake", "put bread, cheese and apples in a basket",
     "had the picnic on the living room floor"),
    ("fly a kite on the hill", "found a kite and two warm coats",
     "made paper birds and hung them by the window"),
    ("build a sand castle at the beach", "found a bucket and a spade",
     "built a tall castle out of boxes"),
    ("sleep in a tent in the garden", "found a tent and a little lamp",
     "made a tent out of chairs and blankets"),
    ("take a train to the farm", "put apples and water in a bag",
     "made a train out of chairs and rode it to the moon"),
    ("pick berries in the woods", "found two baskets", "baked a warm apple pie"),
), """
One [day|morning|Saturday], {N} and {H0} wanted to {plan}.
They {pack}, but then [it began to rain|dark clouds came and brought rain].
~ They {pack}, but then a storm came with [loud|heavy] rain.

"Now we can not go," said {N} sadly.
~ "Our day is ruined!" cried {N}.
"We can have fun [inside|at home], too," said {H}[| with a smile].
So they {instead}.
They [laughed|sang|told stories] and forgot [all about the rain|the rain outside].
~

{N} learned that a rainy day can be a [good|happy] day, too.
~ {N} learned that you can always make a new plan.
~ "This is [even better|so much fun]!" said {N}.
""")
_PLOTS = (_LOST, _PRACTICE, _SHARE, _AFRAID, _MAKE, _RAIN)
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SENTENCE_START = re.compile(r'(^"?|[.!?] "?)([a-z])')


def _expand(text: str, slots: dict[str, str], pick: Pick) -> str:
    # Slots may hold slots and choices, and choices may nest: innermost first, until none is left.
    while "{" in text:
        text = text.format_map(slots)
    while "[" in text:
        text = _CHOICE.sub(lambda match: pick(match[1].split("|")), text)
    return text


def _cast(plot: _Plot, pick: Pick) -> dict[str, str]:
    """Draw everything that has to stay the same from the first sentence to the last."""
    slots = dict(zip(plot.columns, pick(plot.rows), strict=True))
    who = slots.get("who", "any")
    is_child = pick((True, True, False)) if who == "any" else who == "child"
    names = (_BOYS, _GIRLS) if is_child else (_HE_ANIMALS, _SHE_ANIMALS)
    sex = pick((0, 1))
    name = pick(names[sex])
    kind = ("boy", "girl")[sex] if is_child else pick(_KINDS)
    he, him, his = _PRONOUNS[sex]
    slots |= {"N": name, "kind": kind, "he": he, "him": him, "his": his, "adjective": _ADJECTIVES}
    slots |= {"day": _DAYS, "home": _CHILD_HOMES if is_child else _ANIMAL_HOMES}

    helper = slots.get("helper", plot.helper)
    if helper == "family" or (helper == "any" and pick((True, False))):
        called = pick(_FAMILY)
        first = later = f"{his} {called.lower()}"
    else:
        called = later = pick([other for other in names[pick((0, 1))] if other != name])
        first = f"{his} friend {called}"
        if not is_child:
            first += " the " + pick([other for other in _KINDS if other != kind])
    # Whoever gets the gift must not be the one who helps to make it.
    receiver = pick([other for other in _FAMILY if other != called])
    slots |= {"H0": first, "H": later, "hv": called, "R": f"{his} {receiver.lower()}"}

    color = pick(_COLORS)
    article = "an" if color[0] in "aeiou" else "a"
    slots |= {"thing": pick(_THINGS), "color": color, "a_color": f"{article} {color}"}
    return slots | {column: _expand(slots[column], slots, pick) for column in plot.columns}


def _story(plot: _Plot, pick: Pick) -> str:
    slots = _cast(plot, pick)
    paragraphs = []
    for block in (_OPENING.strip() + plot.text.rstrip()).split("\n\n"):
        sentences = []
        for wordings in re.sub(r"\n~ ?", "\t", block).split("\n"):
            text = _expand(pick(wordings.split("\t")), slots, pick)
            sentences.append(_SENTENCE_START.sub(lambda m: m[1] + m[2].upper(), text))
        paragraphs.append(" ".join(filter(None, sentences)))
    # Not every story should break at the same places.
    joint = pick((None, None, 0, 1))
    if joint is not None:
        paragraphs[joint : joint + 2] = [" ".join(paragraphs[joint : joint + 2])]
    return "\n".join(paragraphs)


def _generate(count: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed).random

    # Python promises the same sequence in every version for random() only, not for choice().
    def pick(items: Sequence) -> Any:
        return items[int(draw() * len(items))]

    seen: set[str] = set()
    while len(seen) < count:
        story = _story(pick(_PLOTS), pick)
        if story not in seen:
            seen.add(story)
            yield story


def sample_stories(count: int, seed: int = 0) -> Iterator[str]:
    """Yield `count` distinct stories; a smaller count gives the beginning of the same sequence.

    The same seed gives the same stories everywhere. Raises ValueError, at the call and not at
    the first story, if `count` is negative or above LARGEST_COUNT.
    """
    if not 0 <= count <= LARGEST_COUNT:
        raise ValueError(f"count must be from 0 to {LARGEST_COUNT}, got {count}")
    return _generate(count, seed)


@dataclass
class SampleConfig:
    count: int = flag(3, "how many stories")
    seed: int = flag(0, "which ones")


def main(argv: list[str] | None = None) -> None:
    config, _ = parse(SampleConfig, __doc__, argv)
    require(0 <= config.count <= LARGEST_COUNT,
            f"--count {config.count}: must be from 0 to {LARGEST_COUNT}")
    require(config.seed >= 0, f"--seed {config.seed}: must be 0 or more")
    print(f"\n{SEPARATOR}\n".join(sample_stories(config.count, config.seed)))


if __name__ == "__main__":
    run(main, prints=True)
