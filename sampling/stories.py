"""Stories from the left: what may be asked of them, how they are begun and written, and how they
are shown while they grow. A library of generate.py.

What writes is in left_to_right.py; here it gets its prompt, its batches and its numbers.
"""

from cli import flag, preset, print_json, require

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corpus.tokens import BOS, EOS, MASK, PAD
from sampling.drawing import distribution, draw
from sampling.left_to_right import Piece, Reader, write_left
from sampling.noise import LIMIT_STREAM
from sampling.rows import Vocabulary, lay_out
from sampling.sampler import Sampler

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What is not given with --verify, where the draft head drafts alone and where the network does
BY_HEAD = {"block_size": 4, "steps": 0}
BY_NETWORK = {"block_size": 8, "steps": 1}
MOST_BLOCK = 1024  # tokens, as in train.py --block_sizes

# Flags without effect
OF_ORDERS = ("preset", "order", "left_share", "carry", "pace", "threshold", "gamma", "remask",
             "eta", "show_steps")
OF_WHOLE_ROWS = ("infill", "trace")


@dataclass(frozen=True)
class FromLeft(Sampler):
    """A sampler, and how it writes from the left."""

    block_size: int | None = flag(None, "tokens written at a time, left to right: 1 is token by "
                                  "token, more are blocks of --steps evaluations each, 0 the whole "
                                  "row at once in any order (default: 1, 0 where --steps, an "
                                  "order or a gap is given or the model can do no other; of "
                                  f"--verify {BY_HEAD['block_size']}, where the network drafts "
                                  f"{BY_NETWORK['block_size']})")
    verify: bool = flag(False, "draft each block, and keep of it what the model's token by token "
                               "mode takes: stories are distributed as in that mode. Drafts are of "
                               "--steps evaluations (default: 1), or of none by the model's draft "
                               "head alone (default where it has one)")
    verify_with: str | None = flag(None, "checkpoint whose token by token mode verifies instead")
    stream: bool = flag(False, "print text as soon as it stands; with --json an object a piece")

    def check(self) -> None:
        super(FromLeft, self.drawing if self.by_head else self).check()
        size = self.block_size
        require(size is None or 0 <= size <= MOST_BLOCK,
                f"--block_size {size}: must be from 0 to {MOST_BLOCK}")
        require(not self.verify or size is None or size > 1,
                f"--block_size {size}: leaves --verify no draft; take 2 or more")
        require(self.verify or self.verify_with is None,
                "--verify_with belongs to --verify: add it, or leave --verify_with out")

    def check_used(self, given: set[str]) -> None:
        if self.verify:
            refuse(OF_ORDERS, given, "--verify uncovers a draft from the left, in equal parts")
        elif self.block_size == 1:
            refuse(("steps", *OF_ORDERS), given, "token by token there are no steps and no order")
        if self.block_size:
            refuse(("left_share",), given, "blocks know their left side already")
        if self.verify or self.block_size:
            refuse(OF_WHOLE_ROWS, given, "needs the whole row (--block_size 0), and writing from "
                                         "the left has none")
        require(not self.stream or "show_steps" not in given,
                "--stream and --show_steps: give one of them")
        super().check_used(given)

    @property
    def by_head(self) -> bool:
        """Whether the draft head drafts, without the network."""
        return self.verify and not self.steps

    @property
    def asks_for(self) -> str | None:
        """The flag that asks for writing from the left."""
        return (f"--block_size {self.block_size}" if self.block_size else
                "--verify" if self.verify else "--stream" if self.stream else None)

    def for_model(self, given: set[str], name: str, unmasks: bool, from_left: bool,
                  has_head: bool = False) -> "FromLeft":
        """With the block size of the model `name`, which fills rows in any order (`unmasks`), or
        writes `from_left`, or both, and may have a draft head. Raises UserError for what it cannot
        do.

        Who asks for nothing gets verified drafts where there is a head for them, else the causal
        mode, which they are distributed as.
        """
        require(from_left or not self.asks_for, f"{self.asks_for}: {name} does not write from the "
                "left; use a model of train.py --objective joint or autoregressive")
        whole = {"steps", *OF_ORDERS, *OF_WHOLE_ROWS} & given
        config = self
        if (unmasks and from_left and has_head and not whole and self.block_size is None
                and "verify" not in given):
            config = replace(self, verify=True)
        if config.verify:
            alone = has_head and not self.verify_with and "steps" not in given
            config = preset(config, BY_HEAD if alone else BY_NETWORK, given)
            require(has_head or config.steps, f"--steps 0: {name} has no draft head; train one "
                    "with train.py --objective draft, or give more --steps")
        if not unmasks:
            require(not config.verify and config.block_size in (None, 1),
                    f"{'--verify' if config.verify else f'--block_size {config.block_size}'}: "
                    f"{name} writes token by token alone; leave it out")
        if config.block_size is None:
            config = replace(config, block_size=int(not unmasks or from_left and not whole))
        require(config.block_size or not config.stream, "--stream: text stands when its row does "
                "where that is filled in any order; add --block_size N or --verify")
        config.check_used(given)
        return config


def refuse(names: Sequence[str], given: set[str], why: str) -> None:
    wrong = [name for name in names if name in given]
    require(not wrong, f"--{' --'.join(wrong)}: {why}; leave it out")


# ---- writing -------------------------------------------------------------------------------------

Places = list[int | np.ndarray]  # of a row's beginning: tokens, or those (V,) bool that may stand


def begin(text: str, tokenizer: "Tokenizer", vocabulary: Vocabulary | None, most: int) -> Places:
    """[BOS] and a prompt, of a story of up to `most` tokens of text; with a vocabulary a word that
    the prompt cuts is to be healed."""
    *places, first = lay_out([text, 1], tokenizer, vocabulary)
    require(len(places) < most, f"--prompt has {len(places)} tokens and leaves no room in a story "
                                f"of {most} tokens; shorten it, or give --length")
    return [BOS, *places, *([first] if isinstance(first, np.ndarray) else [])]


def limits_of(places: Places) -> list[tuple[int, np.ndarray]]:
    return [(i, place) for i, place in enumerate(places) if isinstance(place, np.ndarray)]


def complete(reader: Reader, places: Places, sampler: Sampler, seed: int, numbers: Sequence[int],
             ) -> np.ndarray:
    """Rows (B, L) with these numbers that begin so. Where only some tokens are allowed, one is
    drawn from the causal mode's distribution, restricted to them: with one such place exactly that
    mode's, given what it may hold."""
    tokens = np.array([[PAD, *(MASK if isinstance(place, np.ndarray) else place
                               for place in places)]] * len(numbers), np.int64)
    limits, read = limits_of(places), 0
    if limits:
        reader.begin(np.asarray(numbers))
    for place, allowed in limits:  # of the row; in `tokens` it is one further, behind [PAD]
        logits = reader.read(tokens[:, read:place + 1], logits=1)[:, 0]
        read = place + 1
        uniform = np.array([np.random.default_rng([LIMIT_STREAM, seed, row, place]).random()
                            for row in numbers])
        tokens[:, read] = draw(distribution(np.where(allowed, logits, -np.inf), sampler), uniform)
    return tokens[:, 1:]


def write(reader: Reader, drafter: Reader, places: Places, config: FromLeft, longest: int,
          seed: int, numbers: Sequence[int], shown=None) -> Iterator[Piece]:
    """The rows with these numbers as one batch, of up to `longest` tokens; the first piece of each
    is its beginning. `shown` is that of `write_blocks`."""
    starts = complete(reader, places, config, seed, numbers)
    full = len(places) >= longest
    for number, start in zip(numbers, starts, strict=True):
        yield Piece(number, start, full, len(limits_of(places)))
    if not full:
        yield from write_left(reader, list(starts), config, config.block_size, longest, seed,
                              numbers, drafter if config.verify else None, shown)


def write_stories(reader: Reader, drafter: Reader, places: Places, config: FromLeft, longest: int,
                  seed: int, count: int, batch_size: int, shown=None) -> Iterator[Piece]:
    """`write` for `count` stories, in batches."""
    for first in range(0, count, batch_size):
        yield from write(reader, drafter, places, config, longest, seed,
                         range(first, min(first + batch_size, count)), shown)


class Written(NamedTuple):
    """Stories, and what they cost."""

    rows: list[np.ndarray]
    tokens: int  # of text that were drawn
    evaluations: int  # of the network, all batches together
    seconds: float
    a_round: float | None = None  # tokens that a draft and its verification gave

    def line(self, model: str) -> str:
        """What was written, how fast, and by which `model`."""
        a_round = "" if self.a_round is None else f" ({self.a_round:.2f} tokens a round)"
        return (f"{self.tokens:,} tokens in {len(self.rows)} stories, {self.evaluations} network "
                f"evaluations{a_round}, by {model} in {self.seconds:.2f} s: "
                f"{self.tokens / self.seconds:.1f} tokens/s")


class Tally:
    """What the pieces of `write_stories` add up to."""

    def __init__(self, count: int, batch_size: int, each: int):
        self.batch_size, self.each = batch_size, each  # evaluations that one of a Piece stands for
        self.pieces: list[list[np.ndarray]] = [[] for _ in range(count)]
        self.nfe = [0] * count
        self.most: dict[tuple[int, int], int] = {}  # (batch, number of the piece): evaluations

    def add(self, piece: Piece) -> None:
        i, evaluations = piece.row, self.each * piece.evaluations
        key = i // self.batch_size, len(self.pieces[i])
        self.most[key] = max(self.most.get(key, 0), evaluations)
        self.pieces[i].append(piece.tokens)
        self.nfe[i] += evaluations

    def row(self, i: int) -> np.ndarray:
        return np.concatenate(self.pieces[i])

    def written(self, places: Places, seconds: float, rounds: bool) -> Written:
        """Of stories that all began so."""
        given = len(places) - 1 - len(limits_of(places))  # tokens of text
        rows = [self.row(i) for i in range(len(self.pieces))]
        sizes = [len(tokens) for pieces in self.pieces for tokens in pieces[1:]]
        return Written(rows, sum(int((row > EOS).sum()) - given for row in rows),
                       sum(self.most.values()), seconds,
                       float(np.mean(sizes)) if rounds and sizes else None)


# ---- showing -------------------------------------------------------------------------------------

def token_texts(tokenizer: "Tokenizer") -> list[bytes]:
    """The bytes of every token, of the special ones none. In the byte-level alphabet a printable
    byte is its own character, the others are those from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)}
    return [bytes(byte_of[letter] for letter in text) for text in Vocabulary(tokenizer).texts]


def opening(i: int, text: str, conditions: Sequence[str]) -> str:
    """What stands before the text of a story, of which at least the first letter is known."""
    head = f"--- {i + 1} ---\n"
    if not conditions:
        return head
    # a text that is the rest of a story brings its space
    return head + conditions[i] + ("" if text[:1].isspace() else "\n")


class Live:
    """Text on stdout as soon as it stands, in whole characters: of the first unfinished story as it
    comes, of the later ones when their turn comes. With `json` an object a piece, all as they come.
    """

    def __init__(self, tokenizer: "Tokenizer", conditions: Sequence[str], count: int, json: bool):
        self.texts, self.conditions, self.json = token_texts(tokenizer), conditions, json
        self.decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(count)]
        self.waiting = [""] * count  # to be printed
        self.opened, self.ended = [False] * count, [False] * count
        self.turn = 0

    def show(self, piece: Piece) -> None:
        i = piece.row
        text = self.decoders[i].decode(b"".join(self.texts[token] for token in piece.tokens),
                                       final=piece.ended)
        if self.json:
            print_json({"row": i, "text": text, "tokens": piece.tokens.tolist(),
                        "ended": piece.ended})
            return
        if not self.opened[i] and (text or piece.ended):
            self.opened[i], text = True, opening(i, text, self.conditions) + text
        self.waiting[i] += text + "\n\n" * piece.ended
        self.ended[i] = piece.ended
        while self.turn < len(self.waiting):
            text, self.waiting[self.turn] = self.waiting[self.turn], ""
            if text:
                print(text, end="", flush=True)
            if not self.ended[self.turn]:
                break
            self.turn += 1
