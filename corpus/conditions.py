"""Conditions in words as rows of tokens. No torch: a bundle on a Jetson has this file too."""

from cli import UserError, require

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from corpus.files import read_json_lines
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


def read_conditions(path: Path) -> list[str]:
    """One a line, or the key "condition" of every line of a .jsonl file."""
    suffix = path.suffix.lower()
    require(suffix in (".txt", ".jsonl"), f"--conditions {path}: use a .txt file, one condition a "
                                          'line, or a .jsonl file with the key "condition"')
    try:
        lines = ([text for text, in read_json_lines(path, ("condition",))]
                 if suffix == ".jsonl" else path.read_text(encoding="utf-8-sig").split("\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
                        ) from error
    if None in lines:
        print(f"{lines.count(None)} conditions of {path} are null and left out", file=sys.stderr)
    conditions = [line.strip() for line in lines if line and line.strip()]
    require(conditions, f"{path} holds no condition")
    return conditions
