"""The rows that a sampler fills: blank stories, prompts, gaps; and the words that they cut. A
library for whatever samples.

Where a text ends inside a word beside hidden tokens, the piece is taken back, and the places of a
row say which tokens may be drawn there (`Limits` of loop.py): token healing.
"""

from cli import require

import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corpus.tokens import BOS, EOS, MASK, decode
from sampling.loop import Limits
from sampling.noise import LENGTH_STREAM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GAP = re.compile(r"\[MASK(?::([^\]]*))?\]")
LIKE_A_GAP = re.compile(r"\[\s{0,9}mask(?:\s{0,9}[:=-]\s{0,9}[^\]\s]{0,9}|\s{1,9}[^\]\s]{0,9})?"
                        r"\s{0,9}\]", re.IGNORECASE)


def blank_story(length: int) -> np.ndarray:
    """[BOS], `length` times [MASK], [EOS]."""
    return np.array([BOS, *[MASK] * length, EOS], dtype=np.int64)


def draw_length(histogram: dict, seed: int, row: int, at_least: int = 1) -> int | None:
    """Tokens of text in a whole story, drawn from the length histogram of meta.json.

    A function of (seed, row) alone. None if no story of the data has `at_least` tokens.
    """
    counts = {int(length) - 2: count for length, count in histogram.get("story", {}).items()}
    counts = {length: count for length, count in counts.items() if length >= at_least}
    if not counts:
        return None
    weights = np.array(list(counts.values()), dtype=np.float64)
    uniform = np.random.default_rng([LENGTH_STREAM, seed, row]).random()
    index = np.searchsorted(weights.cumsum() / weights.sum(), uniform, side="right")
    return list(counts)[min(int(index), len(counts) - 1)]


class Vocabulary:
    """The tokens by their bytes, to complete words that a text cuts."""

    def __init__(self, tokenizer: "Tokenizer"):
        # in the byte-level alphabet, a character for each byte; the special tokens are no text
        self.texts = [tokenizer.id_to_token(i) if i > EOS else ""
                      for i in range(tokenizer.get_vocab_size())]
        self.longest = max(map(len, self.texts))
        self.space = self.texts[tokenizer.encode(" ").ids[0]]

    def where(self, test: Callable[[str, str], bool], text: str) -> np.ndarray:
        """(V,) bool: test(token, text). With str.endswith: the tokens that end with the text."""
        return np.array([test(token, text) for token in self.texts])

    def edge(self, ids: list[int], end: bool) -> tuple[int, np.ndarray]:
        """How many ids at the end, or the beginning, are the longest piece that one token can hold,
        and the tokens (V,) bool that begin, or end, with that piece."""
        for count in range(min(len(ids), self.longest), 0, -1):
            piece = "".join(self.texts[i] for i in (ids[-count:] if end else ids[:count]))
            allowed = self.where(str.startswith if end else str.endswith, piece)
            if allowed.any():  # at the latest with one id
                break
        return count, allowed

    def take_back(self, ids: list[int], left: bool, right: bool) -> list[int | np.ndarray]:
        """`ids` with what stands beside hidden tokens on the left, on the right replaced by the
        tokens (V,) bool that may stand there.

        The longest piece, for that is how the vocabulary would have cut the whole word: the end of
        "She was hap" is " ha" and "p", and " happy" is one token.
        """
        before: list[int | np.ndarray] = []
        behind: list[int | np.ndarray] = []
        if left and right:  # a piece of one word, with both its ends hidden
            allowed = self.where(str.__contains__, "".join(self.texts[i] for i in ids))
            if allowed.any():
                return [allowed]
        if left:
            count, allowed = self.edge(ids[:-1] if right else ids, end=False)
            before, ids = [allowed], ids[count:]
        if right:
            count, allowed = self.edge(ids, end=True)
            behind, ids = [allowed], ids[:-count]
        return [*before, *ids, *behind]


def lay_out(parts: list[str | int], tokenizer: "Tokenizer", vocabulary: Vocabulary | None,
            ) -> list[int | np.ndarray]:
    """Texts and numbers of hidden tokens in turn -> what stands at each place of a row.

    That is a token's id, [MASK], or with a vocabulary the tokens (V,) bool that may be drawn there.
    """
    places: list = []
    over = False  # the word before the hidden part is
    for k, part in enumerate(parts):
        if isinstance(part, int):
            hidden: list = [MASK] * part
            if over and vocabulary:
                hidden[0] = vocabulary.where(str.startswith, vocabulary.space)
            places += hidden
            continue
        left, right = k > 0, k + 1 < len(parts)  # hidden tokens beside it
        # In this vocabulary a word carries the space before it: the first hidden token brings it.
        over = right and part.endswith(" ")
        text = part[:-1] if over else part
        # Other white space is a token of its own before a word, also behind more of it.
        alone = len(text) - (right and not over and text[-1:].isspace())
        ids = tokenizer.encode(text[:alone]).ids + tokenizer.encode(text[alone:]).ids
        left = left and not text[:1].isspace()
        right = right and not over and not text[-1:].isspace()
        places += vocabulary.take_back(ids, left, right) if vocabulary and ids else ids
    return places


def infill_parts(text: str, max_len: int) -> list[str | int]:
    """The text before, between and behind the gaps, and n for every `[MASK:n]`, in turn."""
    parts: list[str | int] = []
    end = 0
    for gap in GAP.finditer(text):
        size = gap[1] if gap[1] is not None else "1"
        require(re.fullmatch(r"[0-9]{1,9}", size) and int(size) > 0,
                f"--infill: {gap[0]} does not say how many tokens to hide; write [MASK:n] with n "
                "of 1 or more")
        require(int(size) <= max_len, f"--infill: {gap[0]} is longer than the model's rows "
                                      f"({max_len} tokens)")
        parts += [text[end:gap.start()], int(size)]
        end = gap.end()
    require(parts, "--infill has no gap: write [MASK:n] where n tokens are to be filled in")
    return [*parts, text[end:]]


def infill_row(text: str, tokenizer: "Tokenizer", max_len: int) -> np.ndarray:
    """[BOS] text with n times [MASK] for every `[MASK:n]`, [EOS]; no edge healed."""
    row = np.array([BOS, *lay_out(infill_parts(text, max_len), tokenizer, None), EOS], np.int64)
    require(len(row) <= max_len, f"--infill: the text and its gaps make {len(row)} tokens, this "
                                 f"model's rows have {max_len}; shorten it")
    return row


class Start(NamedTuple):
    """A row to fill."""

    row: np.ndarray  # (length,) int64 with [MASK] where something is to be drawn
    limits: Limits  # of it, the places at which only some tokens are allowed, and which
    shown: np.ndarray  # int64, the text as it was given and [MASK]: what was taken back is there


def start_of(places: list[int | np.ndarray], shown: list[int]) -> Start:
    """Both without [BOS] and [EOS]."""
    row = [MASK if isinstance(place, np.ndarray) else place for place in places]
    return Start(np.array([BOS, *row, EOS], np.int64),
                 [(i, place) for i, place in enumerate(places, 1) if isinstance(place, np.ndarray)],
                 np.array([BOS, *shown, EOS], np.int64))


def text_with_gaps(tokenizer: "Tokenizer", row: np.ndarray) -> str:
    """The text of a row on one line, with ` _` for every hidden token."""
    pieces, start = [], 0
    for i in [*np.flatnonzero(row == MASK), len(row)]:
        pieces.append(decode(tokenizer, row[start:i]))
        start = i + 1
    return " ".join(" _".join(pieces).split())


# ---- what a person gives -------------------------------------------------------------------------

class Given(NamedTuple):
    """The text of --infill or of --prompt."""

    text: str
    gaps: bool  # it is that of --infill

    @property
    def name(self) -> str:
        return "infill" if self.gaps else "prompt"

    def parts(self, max_len: int) -> list[str | int]:
        """For `lay_out`. One hidden token behind a prompt shows what stands before; the rest of
        them would be the same."""
        return infill_parts(self.text, max_len) if self.gaps else [self.text, 1]


def build_rows(given: Given, tokenizer: "Tokenizer", max_len: int, count: int,
               vocabulary: Vocabulary | None, histogram: dict, seed: int, length: int | None = None,
               ) -> list[Start]:
    """`count` rows to fill, behind a prompt of `length` tokens or of drawn ones; with a vocabulary
    words that the text cuts are healed."""
    if given.gaps:
        shown = infill_row(given.text, tokenizer, max_len).tolist()[1:-1]
        return [start_of(lay_out(given.parts(max_len), tokenizer, vocabulary), shown)] * count
    *places, first = lay_out(given.parts(max_len), tokenizer, vocabulary)
    *ids, _ = lay_out(given.parts(max_len), tokenizer, None)
    longest = max_len - 2  # [BOS] and [EOS]
    require(length is None or length <= longest,
            f"--length {length}: this model's rows hold at most {longest} tokens of text")
    require(len(places) < (length or longest), f"--prompt has {len(places)} tokens and leaves no "
            f"room in a story of {length or longest} tokens; shorten it")
    rows = []
    for i in range(count):
        # A prompt longer than every story of the data: continue to the end of the row.
        tokens = length or draw_length(histogram, seed, i, len(places) + 1) or longest
        hidden = [MASK] * (min(tokens, longest) - len(places) - 1)
        rows.append(start_of([*places, first, *hidden], [*ids, MASK, *hidden]))
    return rows


def warn_of_text(given: dict[str, Sequence[str]]) -> None:
    """Says on stderr, in one line, which text of {flag: its texts} was probably meant as a gap and
    is none."""
    notes = []
    for name, texts in given.items():
        found = next((gap[0] for text in texts for gap in LIKE_A_GAP.finditer(text)
                      if name != "infill" or not GAP.fullmatch(gap[0])), None)
        if found:
            notes.append(f"--{name}: {found!r} is taken as text; " + (
                "a gap is spelled [MASK:n]" if name == "infill" else
                "gaps are filled in --infill, spelled [MASK:n]"))
    if notes:
        print("warning: " + "; ".join(notes), file=sys.stderr)


def warn_of_cuts(given: Given, tokenizer: "Tokenizer", max_len: int) -> None:
    """For an exported step: says on stderr, in one line, which word it cannot complete.

    On the right of a text that is one of several tokens with which another begins; a word that is
    one token may be meant as it is. A gap that is followed by a letter always ends inside a word.
    """
    vocabulary, parts = Vocabulary(tokenizer), given.parts(max_len)
    for k, part in enumerate(parts):
        if isinstance(part, int) or not part:
            continue
        left, right = k > 0, k + 1 < len(parts)
        ids = tokenizer.encode(part).ids
        cut = part.split()[0] if left and part[0].isalnum() else ""
        if right and part[-1].isalnum() and len(vocabulary.take_back(ids, False, True)) < len(ids):
            cut = cut or part.split()[-1]
        if cut:
            print(f"warning: --{given.name}: {cut!r} is cut inside a word, which an exported step "
                  "does not complete; give whole words, or use --checkpoint", file=sys.stderr)
            return
