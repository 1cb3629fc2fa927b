"""Names in stories, and their exchange as augmentation. A library of training/loader.py.

    swap = NameSwap(find_names(rows, texts), share=0.5)
    tokens = swap(tokens, np.random.default_rng(0))      # (B, L) -> (B, L)

Every name of a row becomes another one, everywhere in it: a model that has seen each story with
many names cannot learn by heart who is in it, it has to look. A name is a capitalised word of one
token that often stands where no sentence begins. The pronouns of their stories tell the names of
boys from those of girls; one that belongs to neither stays.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from corpus.tokens import EOS

NAME = re.compile(r" ?[A-Z][a-z]+")
# What a word may follow at the beginning of a sentence or a quotation
BEGINS = re.compile(r".*[.!?:\n\"'\u201c\u201d\u2018\u2019][\"'\u201c\u201d\u2018\u2019 ]*",
                    re.DOTALL)
PRONOUNS = frozenset(("he", "his", "him")), frozenset(("she", "her"))
# Capitalised, but what somebody is and not who, or no person at all
NO_NAMES = frozenset("""Mom Mommy Mum Mummy Mama Dad Daddy Papa Grandma Grandpa Granny Mr Mrs Miss
Ms Dr God Santa End Birthday Christmas Monday Tuesday Wednesday Thursday Friday Saturday Sunday True
Big Tiny Blue Bear Cat Bird""".split())
STORIES = 20_000  # that are read at most
# At least: times inside a sentence, their share of all times, the share of stories of one side
SEEN, INSIDE, SIDE = 8, 0.25, 0.6


class Names(NamedTuple):
    """Names that can stand for each other."""

    spaced: np.ndarray  # (n,) int64: the ids of " Name"
    plain: np.ndarray  # (n,) int64: those of "Name"; -1 where that is no single token
    weight: np.ndarray  # (n,) float64: how likely each is taken


def find_names(rows: Sequence[np.ndarray], texts: list[str]) -> list[Names]:
    """Those of the boys and of the girls in rows of token ids; `texts` are those of all ids."""
    name_of = {i: text.strip() for i, text in enumerate(texts) if NAME.fullmatch(text)}
    begins = [i <= EOS or bool(BEGINS.fullmatch(text)) for i, text in enumerate(texts)]
    pronouns = [{i for i, text in enumerate(texts) if text.strip().lower() in side}
                for side in PRONOUNS]
    inside, everywhere, stories = Counter(), Counter(), Counter()
    sides: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for k in range(min(len(rows), STORIES)):
        row = rows[k].tolist()
        for before, token in zip(row, row[1:], strict=False):
            if token in name_of:
                everywhere[name_of[token]] += 1
                inside[name_of[token]] += not begins[before]
        here = [not ids.isdisjoint(row) for ids in pronouns]
        for name in {name_of[token] for token in row if token in name_of}:
            stories[name] += 1
            if sum(here) == 1:  # with both it could be either's
                sides[name][here.index(True)] += 1
    ids = {text: i for i, text in enumerate(texts)}
    groups: tuple[list[str], list[str]] = ([], [])
    for name, (he, she) in sorted(sides.items()):
        if (name not in NO_NAMES and f" {name}" in ids and max(he, she) > SIDE * (he + she)
                and inside[name] >= max(SEEN, INSIDE * everywhere[name])):
            groups[she > he].append(name)
    # The root: the few names of most stories would else be exchanged for each other
    return [Names(np.array([ids[f" {name}"] for name in group], np.int64),
                  np.array([ids.get(name, -1) for name in group], np.int64),
                  np.sqrt([stories[name] for name in group])) for group in groups]


class NameSwap:
    """Exchanges the names in a share of the rows of token ids."""

    def __init__(self, groups: list[Names], share: float):
        self.groups, self.share = groups, share

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows (B, L) of the same lengths, of which about the share has other names."""
        result = tokens.copy()
        for i in np.flatnonzero(rng.random(len(tokens)) < self.share):
            for group in self.groups:
                self.exchange(tokens[i], result[i], group, rng)
        return result

    @staticmethod
    def exchange(row: np.ndarray, result: np.ndarray, group: Names,
                 rng: np.random.Generator) -> None:
        """Writes into `result` the names of a group that those in `row` become; no two the same."""
        plain = np.isin(group.plain, row)
        free = group.weight.copy()
        for k in np.flatnonzero(np.isin(group.spaced, row) | plain):
            # One that begins a text or a quotation needs one that can
            weight = free * (group.plain >= 0) if plain[k] else free
            if not weight.any():
                continue
            other = rng.choice(len(weight), p=weight / weight.sum())
            free[other] = 0.0
            result[row == group.spaced[k]] = group.spaced[other]
            if plain[k]:
                result[row == group.plain[k]] = group.plain[other]
