"""Held-out texts with their conditions, as a conditional model and a plain one are given them. A
library of `evaluate.py condition`.
"""

from collections.abc import Iterable

import numpy as np

from corpus.rows import TokenRows
from corpus.tokens import row_kind


class Pairs:
    """Whole texts of one row that fit into one together with their condition.

    Lists with an entry for every pair: `numbers` are those of the rows; `texts` [BOS] text [EOS];
    `conditions` the token ids of the conditions alone; `prompted` [BOS] condition, text [EOS], the
    condition as a plain prompt; `starts` where the text begins in those.
    """

    def __init__(self, rows: TokenRows, tokenizer, longest: int):
        conditions = rows.conditions()
        # behind a first sentence the text brings its own white space
        between = ([] if rows.meta["condition"]["kind"] == "first sentence"
                   else tokenizer.encode("\n").ids)
        self.numbers, self.texts, self.conditions = [], [], []
        self.prompted, self.starts = [], []
        for i in range(len(rows)):
            text, condition = (source[i].astype(np.int64) for source in (rows, conditions))
            prompt = [*condition[:-1], *between]  # [BOS] condition
            if row_kind(text) == "story" and len(prompt) + len(text) - 1 <= longest:
                self.numbers.append(i)
                self.texts.append(text)
                self.conditions.append(condition[1:-1])
                self.prompted.append(np.array([*prompt, *text[1:]], np.int64))
                self.starts.append(len(prompt))

    def __len__(self) -> int:
        return len(self.numbers)

    def some(self, chosen: Iterable[int]) -> "Pairs":
        """The pairs of these places in the lists."""
        part = object.__new__(Pairs)
        for name, values in vars(self).items():
            setattr(part, name, [values[i] for i in chosen])
        return part

    def shuffled(self, seed: int) -> "Pairs":
        """The same texts, every one with the condition of another."""
        order = np.random.default_rng(seed).permutation(len(self))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        mismatched = self.some(range(len(self)))
        mismatched.conditions = [self.conditions[i] for i in other]
        mismatched.starts = [self.starts[i] for i in other]
        mismatched.prompted = [np.array([*self.prompted[i][:self.starts[i]], *text[1:]])
                               for i, text in zip(other, self.texts, strict=True)]
        return mismatched
