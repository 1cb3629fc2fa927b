"""How much of a text stands in the training text. A library of evaluate.py's commands.

A model that repeats what it was trained on looks good to a judge that was trained on the same: the
share of its n-grams that the training text has shows it.
"""

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from corpus.rows import TokenRows

OVERLAPS = (8, 16)  # tokens
CHUNK_TOKENS = 2**20  # of the training rows at a time


def train_overlap(groups: list[list[list[int]]], rows: TokenRows, sizes: tuple[int, ...] = OVERLAPS,
                  ) -> list[dict[str, float | None]]:
    """For each group of texts (token ids without [BOS] and [EOS]): the share of its n-grams that
    stand somewhere in a row of `rows`, the training split, as {"train_overlap_8": ...}; None where
    no text is so long.

    An n-gram lies within one text and within one row. Each becomes a 64-bit hash; the rows are read
    once for all groups, a chunk at a time, so that memory depends on the texts alone. A chance hit
    among 10^5 n-grams of samples and 5 10^8 of training text has a probability of 3 10^-6.
    """
    rng = np.random.default_rng(0)
    codes = rng.integers(2**64, size=2**16, dtype=np.uint64)  # of each token id
    factor = rng.integers(2**64, dtype=np.uint64) | np.uint64(1)

    def hashes(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(n, hash of the n-gram that begins at each position where one has room) for all sizes."""
        total = np.zeros(len(tokens), np.uint64)
        for n in range(1, max(sizes) + 1):
            coded = codes[tokens[n - 1:]]
            total = total[:len(coded)] * factor + coded
            if n in sizes:
                yield n, total

    wanted = [{n: [np.zeros(0, np.uint64)] for n in sizes} for _ in groups]
    for texts, own in zip(groups, wanted, strict=True):
        for text in texts:
            for n, values in hashes(np.array(text, np.uint16)):
                own[n].append(values)
    wanted = [{n: np.concatenate(own[n]) for n in sizes} for own in wanted]
    known = {n: np.unique(np.concatenate([own[n] for own in wanted])) for n in sizes}
    found = {n: np.zeros(len(known[n]), bool) for n in sizes}
    # most of the training text's hashes fail this test of their first bits, which is fast
    likely = {n: np.zeros(2**22, bool) for n in sizes}
    for n in sizes:
        likely[n][known[n] >> np.uint64(42)] = True
    edges = np.cumsum(rows.lengths)
    bar = tqdm(total=len(rows), desc="training text", unit=" rows", leave=False, disable=None)
    start = 0
    while start < len(rows):
        read = edges[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(edges, read + CHUNK_TOKENS, side="right")))
        tokens = np.concatenate([rows[i] for i in range(start, stop)])
        to_end = np.repeat(edges[start:stop] - read, rows.lengths[start:stop]) - np.arange(
            len(tokens))  # of its row, from each position
        for n, values in hashes(tokens):
            inside = to_end[:len(values)] >= n
            values = values[inside & likely[n][values >> np.uint64(42)]]
            found[n] |= np.isin(known[n], values)
        bar.update(stop - start)
        start = stop
    bar.close()
    return [{f"train_overlap_{n}": float(found[n][np.searchsorted(known[n], own[n])].mean())
             if len(own[n]) else None for n in sizes} for own in wanted]
