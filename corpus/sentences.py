"""Where the sentences of a text begin and end. A library of prep_conditional_data.py."""

import re
from collections.abc import Iterator
from itertools import chain

# What may end a sentence: its marks with the quotes and brackets that close behind them.
_END = re.compile(r"""[.!?\u2026]+["'\u201d\u2019)\]]*""")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Sr|Jr|Prof|Capt|Sgt|vs|etc|e\.g|i\.e|[ap]\.m)|\b[A-HJ-Z])\.$")
_LONGEST = 8  # characters of an abbreviation, and the one before it
_BLANK_LINE = re.compile(r"\n\s*\n")
_NEXT = re.compile(r"\s+(\S)")
_SPEECH = ("said", "says", "asked", "asks", "cried", "shouted", "yelled", "replied", "whispered",
           "answered", "called", "exclaimed", "thought", "sang", "screamed", "added", "begged",
           "agreed", "roared")
# `"Stop!" the old man said`: a speaker of up to three words and how it was said
_SPEAKER = re.compile(rf"\s+(?:[\w'\u2019]+\s+){{1,3}}?(?:{'|'.join(_SPEECH)})\b")


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Where the sentences of a text begin and end, without the white space around them.

    A mark ends no sentence inside quotes that are still open, before a small letter or a speaker
    ("Stop!" said Tom.), in an abbreviation, an initial or a number. A blank line always does, also
    where somebody forgot to close the quotes. Single quotes do not count as open: most of them are
    apostrophes. The time is that of reading the text once, whatever is in it.
    """
    start = 0
    for stop in chain((blank.start() for blank in _BLANK_LINE.finditer(text)), [len(text)]):
        for end in chain(_sentence_ends(text, start, stop), [stop]):
            inside = text[start:end]
            if inside.strip():
                yield start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip())
            start = end


def _sentence_ends(text: str, start: int, stop: int) -> Iterator[int]:
    seen = start  # up to here the quotes of this sentence are counted
    straight = opened = closed = 0
    for mark in _END.finditer(text, start, stop):
        end = mark.end()
        straight += text.count('"', seen, end)
        opened += text.count("\u201c", seen, end)
        closed += text.count("\u201d", seen, end)
        seen = end
        if not text[end:min(end + 1, stop)].isspace() or straight % 2 or opened > closed:
            continue
        follows = _NEXT.match(text, end, stop)
        if (follows and follows[1].islower()
                or _ABBREVIATION.search(text, max(start, end - _LONGEST), end)
                or mark[0][-1] in "\"\u201d'\u2019" and _SPEAKER.match(text, end, stop)):
            continue
        yield end
        start, straight, opened, closed = end, 0, 0, 0


def first_sentence(text: str) -> tuple[str, str]:
    """A story's first sentence and everything behind it, both as they are: together the story."""
    _, end = next(sentence_spans(text), (0, len(text)))
    return text[:end], text[end:]
