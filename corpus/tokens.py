"""Token ids, the tokenizer, and rows of ids: cut, told apart, padded. A library for every stage.

The ids 0 to 3 are special and stand for no text; every id above EOS is a piece of text.
"""

from cli import UserError, require

import hashlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PAD, MASK, BOS, EOS = range(4)
SPECIAL_TOKENS = ["[PAD]", "[MASK]", "[BOS]", "[EOS]"]
BUCKET = 16  # row lengths are rounded up to a multiple of this: few shapes, little padding
ROW_KINDS = ("story", "start", "middle", "end")


def load_tokenizer(text: str):
    """A tokenizer from the content of tokenizer.json.

    A story may contain the characters "[MASK]": they are then ordinary text, never the special
    token, so `encode` gives only ordinary ids.
    """
    from tokenizers import Tokenizer
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer.json is not a tokenizer ({error}); prepare the data again"
                        ) from error
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    require(ids == [PAD, MASK, BOS, EOS], "tokenizer.json has other special tokens than "
                                          f"{', '.join(SPECIAL_TOKENS)} at ids 0 to 3")
    tokenizer.encode_special_tokens = True
    return tokenizer


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def token_bytes(tokenizer) -> np.ndarray:
    """(V,) bytes of text behind each token id; 0 for the special tokens."""
    # In the byte-level alphabet one character stands for one byte.
    sizes = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    return np.array([0] * len(SPECIAL_TOKENS) + sizes[len(SPECIAL_TOKENS):], dtype=np.int64)


def decode(tokenizer, ids: Iterable[int]) -> str:
    """The text of token ids; special tokens give nothing, broken UTF-8 gives U+FFFD."""
    return tokenizer.decode([int(i) for i in ids if i > EOS])


def split_row(ids: list[int], seq_len: int) -> list[list[int]]:
    """[BOS] ids [EOS] in as few rows as fit into seq_len, their lengths at most one apart."""
    ids = [BOS, *ids, EOS]
    count = -(-len(ids) // seq_len)
    edges = [len(ids) * i // count for i in range(count + 1)]
    return [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def row_kind(row: Any) -> str:
    """Whether a row is a whole story or the start, middle or end of a long one."""
    return {(True, True): "story", (True, False): "start", (False, False): "middle",
            (False, True): "end"}[bool(row[0] == BOS), bool(row[-1] == EOS)]


def is_count(value: Any, most: int = 2**62) -> bool:
    return type(value) is int and 1 <= value <= most


def is_length_histogram(value: Any, kinds: Iterable[str] = ()) -> bool:
    """Whether it is {kind of row: {length as text: rows}} with at least these kinds."""
    return isinstance(value, dict) and value.keys() >= set(kinds) and all(
        isinstance(lengths, dict) and all(
            re.fullmatch("[1-9][0-9]{0,8}", str(length)) and is_count(count)
            for length, count in lengths.items()) for lengths in value.values())


def pad_rows(rows: list, multiple: int = BUCKET) -> np.ndarray:
    width = round_up(max(len(row) for row in rows), multiple)
    tokens = np.full((len(rows), width), PAD, dtype=np.int64)  # (B, L)
    for line, row in zip(tokens, rows, strict=True):
        line[:len(row)] = row
    return tokens


def round_up(n: Any, multiple: int = BUCKET) -> Any:
    return -(-n // multiple) * multiple


def length_nats(meta: dict, rows: Iterable[np.ndarray]) -> float:
    """Code length of the rows' kinds and lengths under the training histogram, in nats.

    The network is told where a row ends, so a bound on the probability of the text has to pay for
    it. One is added to every count (Laplace), so that no length is impossible.
    """
    histogram = meta["length_histogram"]
    total = (sum(sum(lengths.values()) for lengths in histogram.values())
             + len(ROW_KINDS) * meta["seq_len"])
    return float(sum(np.log(total / (1 + histogram[row_kind(row)].get(str(len(row)), 0)))
                     for row in rows))


def maskable(tokens: "Tensor") -> "Tensor":
    """(B, L) bool: the positions that hold text (or already [MASK])."""
    return (tokens > EOS) | (tokens == MASK)
