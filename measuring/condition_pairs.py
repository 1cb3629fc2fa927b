"""Held-out texts with their conditions, as a conditional model and a plain one are given them. A
library of `evaluate.py condition`.
"""

from collections.abc import Iterable

import numpy as np

from corpus.rows import TokenRows
from corpus.tokens import BOS, row_kind
from network.encoders import ConditionEncoder


class Pairs:
    """Whole texts of one row that fit into one together with their condition.

    `batch` gives the conditions of rows as the encoder takes them, `in_words` is whether a prompt
    can tell them. Lists with an entry for every pair: `numbers` are those of the rows, `sources` of
    the rows whose condition is given; `texts` [BOS] text [EOS]; `shown` the condition for people;
    `conditions` the token ids that tell it (none if words cannot); `prompted` [BOS] condition, text
    [EOS], the condition as a plain prompt; `starts` where the text begins in those.
    """

    LISTS = ("numbers", "sources", "texts", "shown", "conditions", "prompted", "starts")

    def __init__(self, rows: TokenRows, encoder: ConditionEncoder, tokenizer, longest: int):
        # behind a first sentence the text brings its own white space
        between = ([] if rows.meta["condition"].get("kind") == "first sentence"
                   else tokenizer.encode("\n").ids)
        self.batch, self.in_words = encoder.conditions_of(rows).batch, True
        for name in self.LISTS:
            setattr(self, name, [])
        for i in range(len(rows)):
            condition, text = self.batch([i])[0], rows[i].astype(np.int64)
            ids = encoder.as_prompt(condition)
            self.in_words = self.in_words and ids is not None
            prompt = [BOS] if ids is None else [BOS, *ids, *between]
            if row_kind(text) == "story" and len(prompt) + len(text) - 1 <= longest:
                self.numbers.append(i)
                self.sources.append(i)
                self.texts.append(text)
                self.shown.append(encoder.show(condition, tokenizer))
                self.conditions.append(np.array(ids or [], np.int64))
                self.prompted.append(np.array([*prompt, *text[1:]], np.int64))
                self.starts.append(len(prompt))

    def __len__(self) -> int:
        return len(self.numbers)

    def some(self, chosen: Iterable[int]) -> "Pairs":
        """The pairs of these places in the lists."""
        part = object.__new__(Pairs)
        part.batch, part.in_words = self.batch, self.in_words
        chosen = list(chosen)
        for name in self.LISTS:
            setattr(part, name, [getattr(self, name)[i] for i in chosen])
        return part

    def shuffled(self, seed: int) -> "Pairs":
        """The same texts, every one with the condition of another."""
        order = np.random.default_rng(seed).permutation(len(self))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        mismatched = self.some(other)
        mismatched.numbers, mismatched.texts = list(self.numbers), list(self.texts)
        mismatched.prompted = [np.array([*self.prompted[i][:self.starts[i]], *text[1:]])
                               for i, text in zip(other, self.texts, strict=True)]
        return mismatched
