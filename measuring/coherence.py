"""Whether a story holds its thread. A library of quality.py.

Three figures that a low perplexity does not give, each to be read beside that of real stories:
- repeated_4grams: the share of a story's 4-grams of words that stand earlier in it
- late_names: how many of its names are first seen in its second half
- improbable_sentences: the share of sentences to whose tokens the judge gives more nats on average
  than to 99 in 100 sentences of real stories
"""

import re

import numpy as np

from corpus.tokens import EOS

# A word with a capital that is not a sentence's first: behind the end of one, or a quotation mark
NAME = re.compile(r"\b[A-Z][a-z]+\b")
QUOTED = "\"'\u201c\u201d\u2018\u2019"
BEGINS = re.compile(rf"(^|[.!?:\n\"\u201c\u201d\u2018\u2019]|(?<!\w)')[\s{QUOTED}]*$")
SHORTEST = 4  # tokens: of fewer a mean says little
ENDS = re.compile(r".*[.!?][\"'\u201d\u2019]*\s*", re.DOTALL)
QUOTES = re.compile(r"[\"'\u201d\u2019]+")
PERCENTILE = 99


def repeated(words: list[str], n: int = 4) -> float:
    """The share of the n-grams of a story that stand earlier in it; 0 where it has none."""
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return (len(grams) - len(set(grams))) / max(1, len(grams))


def late_names(text: str) -> set[str]:
    """The names that are first seen in the second half of a text, by its characters. A name is a
    capitalised word that stands at least once where no sentence and no quotation begins."""
    found = list(NAME.finditer(text))
    names = {word.group() for word in found if not BEGINS.search(text[:word.start()])}
    early = {word.group() for word in found if word.start() < len(text) / 2}
    return names - early


def sentences(ids: np.ndarray, texts: list[str]) -> list[slice]:
    """The sentences of a row [BOS] story [EOS] of token ids as slices of it, [EOS] left out.
    `texts` are those of all ids."""
    result, start, ended = [], 1, False
    stop = len(ids) - (ids[-1] == EOS)
    for i in range(1, stop):
        text = texts[ids[i]]
        if ended and not QUOTES.fullmatch(text):
            result.append(slice(start, i))
            start, ended = i, False
        ended = ended or bool(ENDS.fullmatch(text))
    return [*result, slice(start, stop)] if start < stop else result


def sentence_nats(rows: list[np.ndarray], nats: list[np.ndarray], texts: list[str]) -> np.ndarray:
    """Nats/token of the sentences of rows [BOS] story [EOS], of the short ones none; `nats` are
    those of every token behind [BOS]."""
    return np.array([of_row[part.start - 1:part.stop - 1].mean()
                     for row, of_row in zip(rows, nats, strict=True)
                     for part in sentences(row, texts) if part.stop - part.start >= SHORTEST])


def coherence(texts: list[str], words_of: list[list[str]]) -> dict:
    """The figures that need no judge: means over the stories."""
    return {"repeated_4grams": float(np.mean(list(map(repeated, words_of)))),
            "late_names": float(np.mean([len(late_names(text)) for text in texts]))}
