"""A vocabulary learned from texts, and texts cut into it, on every core. A library of data_prep.py
and prep_conditional_data.py.

Both take seconds to minutes inside the tokenizer's own code, and Ctrl-C is heard all the same.
"""

import atexit
import os
import queue
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

from corpus.tokens import SPECIAL_TOKENS, load_tokenizer

LONGEST_WORD = 1024  # characters; a longer one is cut while the vocabulary is learned
BATCH_BYTES = 2**20  # text tokenized together: keeps the cores busy and the memory small


class Background:
    """Runs `work` in a thread, so that this one hears Ctrl-C while it waits: the tokenizer's own
    code hears nothing until it returns. Work that is left so ends with the process at the latest.
    """

    def __init__(self, work: Callable[[], Any]):
        self.value, self.error = None, None
        self.thread = threading.Thread(target=self._call, args=[work], daemon=True)
        self.thread.start()

    def _call(self, work: Callable[[], Any]) -> None:
        try:
            self.value = work()
        except BaseException as error:
            self.error = error

    def put(self, handed: queue.Queue, item: Any) -> None:
        """Hands something over to the work; nothing if that has ended, as `result` will tell."""
        while self.thread.is_alive():
            with suppress(queue.Full):
                return handed.put(item, timeout=0.1)

    def result(self) -> Any:
        try:
            while self.thread.is_alive():
                self.thread.join(0.1)  # without a limit Windows would not hear it either
        except BaseException as error:
            self.abandon(error)
            raise
        if self.error:
            raise self.error
        return self.value

    def abandon(self, error: BaseException) -> None:
        """Waits a little for work that `error` makes useless: most is short, and the interpreter
        must not be taken down under a thread in native code, which may crash."""
        self.thread.join(1)
        number = getattr(error, "number", signal.SIGINT)
        atexit.register(lambda: self.thread.is_alive() and leave(128 + number))


def leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def cut_long_words(text: str) -> Iterator[str]:
    """The text in pieces, cut only inside words and white space of over LONGEST_WORD characters.

    Learning a vocabulary takes time that grows with the square of a word's length.
    """
    words = text.split()
    longest_gap = len(text) - sum(map(len, words))  # at most
    if max(map(len, words), default=0) <= LONGEST_WORD and longest_gap <= LONGEST_WORD:
        yield text
        return
    start = 0
    for part in re.finditer(rf"\S{{1,{LONGEST_WORD}}}|\s{{1,{LONGEST_WORD}}}", text):
        if part.end() - part.start() == LONGEST_WORD:
            yield text[start:part.end()]
            start = part.end()
    yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Byte-level BPE: every byte is a token, so any text round-trips. Ctrl-C is heard."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    # The texts are read here and handed over a batch at a time.
    batches: queue.Queue[list[str]] = queue.Queue(maxsize=2)  # an empty one is the end
    stop = threading.Event()

    def received() -> Iterator[list[str]]:
        while (batch := batches.get()) and not stop.is_set():
            yield batch
        if stop.is_set():
            raise KeyboardInterrupt

    learning = Background(lambda: tokenizer.train_from_iterator(received(), trainer))
    try:
        pieces = (piece for text in texts for piece in cut_long_words(text))
        for batch in chain(in_batches(pieces, len), [[]]):
            learning.put(batches, batch)
    except BaseException as error:
        stop.set()
        with suppress(queue.Full):
            batches.put_nowait([])  # wakes it up
        learning.abandon(error)
        raise
    learning.result()
    return load_tokenizer(tokenizer.to_str())


def in_batches(items: Iterable[Any], size_of: Callable[[Any], int]) -> Iterator[list]:
    """The items in lists of about BATCH_BYTES."""
    batch: list[Any] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize_batches(stories: Iterable[tuple[str, str]], tokenizer,
                     ) -> Iterator[tuple[str, str, list[int]]]:
    """Yields (split, text, token ids); some megabytes at a time, on every core."""
    for batch in in_batches(stories, lambda story: len(story[1])):
        texts = [text for _, text in batch]
        # `encode_batch_fast` leaves out the offsets, which nothing here needs
        encode = partial(tokenizer.encode_batch_fast, texts)
        for (split, text), encoding in zip(batch, Background(encode).result(), strict=True):
            yield split, text, encoding.ids
