"""Conditions in words as rows of tokens. No torch: a bundle on a Jetson has this file too."""

from cli import require

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from corpus.tokens import BOS, EOS, pad_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def condition_row(ids: Sequence[int], max_len: int) -> np.ndarray:
    """[BOS], the token ids of a condition, [EOS], [PAD] up to `max_len`: always of one length, so
    that what the encoder makes of it is the same in any company. Ids too many are cut off."""
    return pad_rows([[BOS, *ids[:max_len - 2], EOS]], max_len)[0]


def condition_rows(texts: Sequence[str], tokenizer: "Tokenizer", max_len: int) -> np.ndarray:
    """(N, max_len) token ids; says on stderr which conditions are too long and get cut."""
    rows = []
    for text in texts:
        require(text.strip(), "the condition is empty: write a sentence, or leave out --condition")
        ids = tokenizer.encode(text.strip()).ids
        if len(ids) > max_len - 2:
            print(f"a condition of {len(ids)} tokens is cut to the {max_len - 2} that this model "
                  f"reads: {text[:40]!r} ...", file=sys.stderr)
        rows.append(condition_row(ids, max_len))
    return np.stack(rows)
