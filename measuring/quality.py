"""How good and how varied stories are. A library of evaluate.py's commands and of benchmark.py.

The autoregressive twin judges how good they are (generative perplexity); beside it always stands
how varied they are, for perplexity also falls when stories become alike or repeat themselves, which
entropy, distinct-n and self-BLEU show, and when they repeat the training text, which the judge has
learned too: `overlap.train_overlap` measures how much of them stands there. The figures of the real
stories are the mark to reach.
"""

import math
import re
from collections import Counter

import numpy as np
import torch

from corpus.rows import bucket_batches
from corpus.tokens import EOS, decode, pad_rows
from kinds.autoregressive import next_tokens
from kinds.likelihood import ratio_error
from measuring.coherence import PERCENTILE, coherence, sentence_nats
from network.hardware import device_of


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def diversity(texts: list[str], token_rows: list[list[int]]) -> dict:
    """distinct-n and self-BLEU over words, unigram entropy over tokens.

    distinct-n is the share of different n-grams among all n-grams of all texts (arXiv 1510.03055);
    self-BLEU the mean BLEU of each text against all others (arXiv 1802.01886), 0 to 100, lower is
    more diverse; unigram entropy the mean over texts of the entropy of their tokens, in nats.
    """
    from sacrebleu.metrics import BLEU
    result = {}
    for n in (1, 2, 3):
        grams = [gram for text in texts for gram in zip(*(words(text)[i:] for i in range(n)),
                                                        strict=False)]
        result[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    bleu = BLEU(effective_order=True)
    result["self_bleu"] = float(np.mean([
        bleu.sentence_score(text, texts[:i] + texts[i + 1:]).score
        for i, text in enumerate(texts)]))
    result["unigram_entropy"] = float(np.mean([entropy(row) for row in token_rows]))
    result["tokens_per_story"] = float(np.mean([len(row) for row in token_rows]))
    return result


def text_ids(rows: list[np.ndarray]) -> list[list[int]]:
    """The token ids of each row without [BOS], [EOS] and the other marks."""
    return [[int(i) for i in row if i > EOS] for row in rows]


def entropy(ids: list[int]) -> float:
    """Unigram entropy of the tokens of one text, in nats."""
    share = np.array(list(Counter(ids).values())) / max(1, len(ids))
    return float(-(share * np.log(share)).sum())


# What every "generative_perplexity" here is
PERPLEXITY = "exp(the judge's nats per token of text and [EOS])"


class Judge:
    """The autoregressive twin as a judge of how likely stories are.

    It was trained on the same stories as the models that it judges, so it likes what they have in
    common with the training text.
    """

    def __init__(self, model: torch.nn.Module, real: list[np.ndarray] | None = None):
        """`real` are the real stories, rows [BOS] story [EOS], for what needs them."""
        self.model, self.real = model, real
        self.limit: float | None = None  # nats/token beyond which a sentence is improbable

    def perplexity(self, rows: list[np.ndarray], starts: list[int] | None = None) -> float:
        """`PERPLEXITY` over all of these rows; the first `starts[i]` tokens of row i are given, by
        default [BOS] alone, which is always given."""
        nats, tokens = self.nats(rows, starts)
        return math.exp(nats.sum() / tokens.sum())

    def with_error(self, rows: list[np.ndarray]) -> dict:
        """The standard error of `perplexity` over the stories, and the nats/token of each."""
        nats, tokens = self.nats(rows)
        return {"perplexity_error": math.exp(nats.sum() / tokens.sum()) * ratio_error(nats, tokens),
                "story_nats_per_token": (nats / tokens).round(4).tolist()}

    def nats(self, rows: list[np.ndarray], starts: list[int] | None = None,
             ) -> tuple[np.ndarray, np.ndarray]:
        """Nats and tokens of every row behind its start, (N,) each."""
        starts = [1] * len(rows) if starts is None else starts
        behind = [nats[start - 1:] for nats, start in zip(self.token_nats(rows), starts,
                                                          strict=True)]
        return np.array([x.sum() for x in behind]), np.array([len(x) for x in behind])

    @torch.no_grad()
    def token_nats(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        """Of rows [BOS] story [EOS]: the nats of every token behind [BOS], FP64. The model stays in
        evaluation mode."""
        results: list[np.ndarray] = [np.zeros(0)] * len(rows)
        self.model.eval()
        for part in bucket_batches(np.array([len(row) for row in rows]), 8192, merge=False):
            seen = next_tokens(torch.as_tensor(pad_rows([rows[i] for i in part]))).to(
                device_of(self.model))
            nats, _ = self.model.scores(seen.hidden(self.model), seen.tokens[seen.masked])
            counts = seen.masked.sum(1).cpu().numpy()
            for i, x in zip(part, np.split(nats.double().cpu().numpy(), counts.cumsum()[:-1]),
                            strict=True):
                results[i] = x
        return results

    def improbable(self, rows: list[np.ndarray], tokenizer) -> float | None:
        """The share of sentences with more nats/token than `PERCENTILE` in 100 of the real ones
        have; None where there are none."""
        texts = [decode(tokenizer, [i]) for i in range(tokenizer.get_vocab_size())]
        if self.limit is None:
            real = sentence_nats(self.real, self.token_nats(self.real), texts)
            self.limit = np.percentile(real, PERCENTILE) if len(real) else math.inf
        nats = sentence_nats(rows, self.token_nats(rows), texts)
        return float((nats > self.limit).mean()) if len(nats) else None


def ends_properly(text: str) -> bool:
    """Whether a story ends with the end of a sentence."""
    return text.rstrip().rstrip("\"'\u201d\u2019").endswith((".", "!", "?"))


def figures(rows: list[np.ndarray], tokenizer, judge: Judge | None) -> dict:
    """What is measured of stories, rows [BOS] story [EOS]; perplexity None without a judge."""
    ids = text_ids(rows)
    texts = [decode(tokenizer, row) for row in ids]
    return {"generative_perplexity": judge.perplexity(rows) if judge else None,
            **diversity(texts, ids), **coherence(texts, list(map(words, texts))),
            "improbable_sentences": (judge.improbable(rows, tokenizer)
                                     if judge and judge.real else None),
            "end_properly": float(np.mean([ends_properly(text) for text in texts]))}


# Columns of a table: heading, key in `figures`, form
COHERENCE = (("repeated", "repeated_4grams", ".1%"), ("late names", "late_names", ".2f"),
             ("improbable", "improbable_sentences", ".1%"))
