"""What a condition is worth in generated texts. A library of `evaluate.py condition`.

Texts generated at every guidance, beside the real ones: whether they take up the names and nouns of
their condition, BLEU and chrF against the real text, perplexity under the autoregressive twin,
diversity.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch

from corpus.rows import TokenRows
from corpus.tokens import BOS, EOS, MASK, decode
from measuring import quality
from measuring.condition_pairs import Pairs
from measuring.overlap import train_overlap
from network.encoders import ConditionEncoder
from sampling.loop import fill
from sampling.rows import blank_story
from sampling.sampler import Sampler
from sampling.step import numpy_step

DETERMINERS = frozenset("a an the his her their my your our its some this that".split())
FUNCTION_WORDS = DETERMINERS | frozenset(
    "and or but to of in on at with for from by as so if when who that which it he she they we i "
    "you him them was were is are be had has have did do does not said could would can will up "
    "down out into over then there named called who".split())
RARE = 5  # a word seen less often says too little about itself
FORMULAS = frozenset(("time", "day"))  # nouns of "Once upon a time" and "One day"


def names_and_nouns(texts: Iterable[str]) -> set[str]:
    """Words that are names or nouns in these texts, by where they stand: no tagger is needed.

    A name has a capital letter in most of its places inside sentences. A noun stands in a tenth of
    its places or more right behind a determiner, and in half of them before a mark or a function
    word, where adjectives do not.
    """
    seen, inside, capital, behind, before = (Counter() for _ in range(5))
    for text in texts:
        pieces = re.findall(r"\w+(?:'\w+)?|[^\w\s]", text)
        lower = [piece.lower() for piece in pieces]
        for i, (piece, word) in enumerate(zip(pieces, lower, strict=True)):
            if not word[0].isalpha():
                continue
            seen[word] += 1
            if i and lower[i - 1][0].isalpha():
                inside[word] += 1
                capital[word] += piece[0].isupper()
                behind[word] += lower[i - 1] in DETERMINERS
            after = lower[i + 1] if i + 1 < len(lower) else "."
            before[word] += not after[0].isalpha() or after in FUNCTION_WORDS
    return {word for word, count in seen.items()
            if count >= RARE and word not in FUNCTION_WORDS and word not in FORMULAS
            and (capital[word] > inside[word] / 2
                 or (behind[word] >= count / 10 and before[word] >= count / 2))}


def taken_up(conditions: list[str], texts: list[str], wanted: set[str]) -> float:
    """Of the `wanted` words in all conditions the share that the text takes up, as it is or with a
    plural s."""
    found = total = 0
    for condition, text in zip(conditions, texts, strict=True):
        there = set(quality.words(text))
        there |= {word.removesuffix("'s") for word in there}
        for word in set(quality.words(condition)) & wanted:
            found += not there.isdisjoint((word, word + "s", word.removesuffix("s")))
            total += 1
    return found / max(1, total)


def texts_by_cross_attention(model: torch.nn.Module, pairs: Pairs, sampler: Sampler, seed: int,
                             ) -> list[np.ndarray]:
    """A text of the real one's length for every condition: rows [BOS] text [EOS]."""
    return fill(numpy_step(model, sampler, pairs.batch(pairs.sources)),
                [blank_story(len(text) - 2) for text in pairs.texts], sampler, seed)


def texts_by_prompt(model: torch.nn.Module, pairs: Pairs, sampler: Sampler, seed: int,
                    ) -> list[np.ndarray]:
    """The same by a model that gets the condition as a plain prompt."""
    rows = [np.array([*row[:start], *[MASK] * (len(row) - start - 1), EOS], np.int64)
            for row, start in zip(pairs.prompted, pairs.starts, strict=True)]
    filled = fill(numpy_step(model, sampler), rows, sampler, seed)
    return [np.array([BOS, *row[start:]]) for row, start in zip(filled, pairs.starts, strict=True)]


def figures(generated: list[np.ndarray], pairs: Pairs, tokenizer, wanted: set[str],
            twin: torch.nn.Module | None) -> dict:
    """What is measured of a group of texts, rows [BOS] text [EOS], one for every pair."""
    from sacrebleu.metrics import BLEU, CHRF
    ids = quality.text_ids(generated)
    texts, real = ([decode(tokenizer, row).strip() for row in group]
                   for group in (ids, pairs.texts))
    perplexity = None
    if twin is not None and pairs.in_words:  # of the text, given its condition as a prompt
        whole = [np.array([*row[:start], *text[1:]], np.int64)
                 for row, start, text in zip(pairs.prompted, pairs.starts, generated, strict=True)]
        perplexity = quality.Judge(twin).perplexity(whole, pairs.starts)
    return {"take_up": taken_up(pairs.shown, texts, wanted),
            "bleu": BLEU().corpus_score(texts, [real]).score,
            "chrf": CHRF().corpus_score(texts, [real]).score,
            "generative_perplexity": perplexity, **quality.diversity(texts, ids)}


def generation(model: torch.nn.Module, plain: torch.nn.Module, pairs: Pairs, sampler: Sampler,
               guidances: list[float], seed: int, tokenizer, wanted: set[str],
               twin: torch.nn.Module | None, train: TokenRows,
               ) -> tuple[dict[str, dict], dict[str, list[str]]]:
    """{line of the table: its figures}, and the texts of every line but the real one's. `plain`
    gets the condition as a prompt; the twin judges, if there is one."""
    generated = {f"guidance {guidance:g}": texts_by_cross_attention(
        model, pairs, dataclasses.replace(sampler, guidance=guidance), seed)
        for guidance in guidances}
    if pairs.in_words:
        generated["as a prompt"] = texts_by_prompt(plain, pairs, sampler, seed)
    groups = {"real texts": pairs.texts, **generated}
    lines = {name: figures(rows, pairs, tokenizer, wanted, twin) for name, rows in groups.items()}
    shares = train_overlap([quality.text_ids(rows) for rows in groups.values()], train)
    for line, share in zip(lines.values(), shares, strict=True):
        line |= share
    return lines, {name: [decode(tokenizer, row) for row in rows]
                   for name, rows in generated.items()}


def training_words(rows: TokenRows, encoder: ConditionEncoder, tokenizer, limit: int = 20_000,
                   ) -> set[str]:
    """`names_and_nouns` of the first rows of a split, conditions included."""
    conditions = encoder.conditions_of(rows)
    both = (encoder.show(conditions.batch([i])[0], tokenizer) + "\n" + decode(tokenizer, rows[i])
            for i in range(len(rows)))
    return names_and_nouns(islice(both, limit))
