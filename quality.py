"""How good stories are, and what each sampler gives for its cost. A library of evaluate.py.

In `evaluate.py --sampling` every sampler makes as many stories as there are real ones beside them,
of the same lengths. Quality is told by the autoregressive twin as a judge (generative perplexity),
and beside it always by the diversity: perplexity also falls when stories become alike or repeat
themselves, which entropy, distinct-n and self-BLEU show, and when they repeat the training text,
which the judge has learned too: how much of them stands there is told by `train_overlap`. The
figures of the real stories are the mark to reach.
"""

from cli import atomic_file

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from autoregressive import Autoregressive, before_each, fill_from_the_left
from data_prep import EOS, MASK, TokenRows, bucket_batches, decode, pad_rows
from diffusion import Corrupted, maskable, measure_nats, numpy_step, ratio_error, row_sums
from model import device_of
from sampler import ADAPTIVE_PACES, Sampler, blank_story, fill, unmask_rows

GAP_STREAM = 7  # first number of a seed, see sampler.py
EVALUATIONS = (4, 8, 16, 32, 64, 128, 256)
THRESHOLDS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
GAMMAS = (32.0, 16.0, 8.0, 4.0, 2.0, 0.5)
SAMPLERS = {
    "random": dict(),
    "random, linear": dict(pace="linear"),
    "random, first_hitting": dict(pace="first_hitting"),
    "random, temperature 0.8": dict(temperature=0.8),
    "random, top_p 0.9": dict(top_p=0.9),  # the presets of generate.py
    "confidence": dict(order="confidence"),
    "margin": dict(order="margin"),
    "entropy": dict(order="entropy"),
    "random, remdm_cap": dict(remask="remdm_cap", eta=0.05),
    "random, remdm_rescale": dict(remask="remdm_rescale", eta=0.1),
    "random, remdm_confidence": dict(remask="remdm_confidence", eta=0.1),
    "random, corrector": dict(remask="corrector", eta=0.1),
    "confidence, threshold": dict(order="confidence", pace="threshold"),
    "entropy, entropy_bound": dict(order="entropy", pace="entropy_bound"),
    "random, entropy_bound": dict(order="random", pace="entropy_bound"),
}


def settings(base: Sampler, name: str, evaluations: tuple[int, ...] = EVALUATIONS,
             ) -> Iterator[Sampler]:
    """The samplers of one line of the table: by steps, or by what an adaptive pace is bound by.

    Of `base` only what says how a token is drawn counts: everything else is what is compared.
    """
    sampler = Sampler(temperature=base.temperature, top_k=base.top_k, top_p=base.top_p)
    sampler = dataclasses.replace(sampler, **SAMPLERS[name])
    if sampler.pace not in ADAPTIVE_PACES:
        for steps in evaluations:
            yield dataclasses.replace(sampler, steps=steps)
        return
    field, values = (("threshold", THRESHOLDS) if sampler.pace == "threshold" else
                     ("gamma", GAMMAS))
    for value in values:
        yield dataclasses.replace(sampler, steps=max(evaluations), **{field: value})


def words(text: str) -> list[str]:
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
    return [[int(i) for i in row if i > EOS] for row in rows]


def entropy(ids: list[int]) -> float:
    share = np.array(list(Counter(ids).values())) / max(1, len(ids))
    return float(-(share * np.log(share)).sum())


# What every "generative_perplexity" here is
PERPLEXITY = "exp(the judge's nats per token of text and [EOS])"


class Judge:
    """The autoregressive twin, which tells how likely a story is.

    It was trained on the same stories as the models that it judges, so it likes what they have in
    common with the training text.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def perplexity(self, rows: list[np.ndarray], starts: list[int] | None = None) -> float:
        """`PERPLEXITY` over all of these rows; the first `starts[i]` tokens of row i are given, by
        default [BOS] alone."""
        starts = np.ones(len(rows), np.int64) if starts is None else np.asarray(starts)
        batches = bucket_batches(np.array([len(row) for row in rows]), 8192, merge=False)

        def hide(clean: torch.Tensor, part: np.ndarray):
            seen = Autoregressive().corrupt_batch(clean)
            seen.masked &= torch.arange(clean.shape[1]) >= torch.from_numpy(starts[part])[:, None]
            yield seen, seen.masked.sum(1)

        bound = measure_nats(self.model, (pad_rows([rows[i] for i in part]) for part in batches),
                             hide, numbers=batches)
        return math.exp(bound.nats.sum() / bound.k.sum())


# ---- what stands in the training text ------------------------------------------------------------

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


# ---- samplers ------------------------------------------------------------------------------------

def ends_properly(text: str) -> bool:
    """Whether a story ends with the end of a sentence."""
    return text.rstrip().rstrip("\"'\u201d\u2019").endswith((".", "!", "?"))


def tell(model: torch.nn.Module, sampler: Sampler, lengths: list[int], seed: int,
         ) -> tuple[list[np.ndarray], float, float]:
    """Stories with these numbers of tokens, the mean number of network evaluations of a story, and
    the seconds that they took."""
    rows = [blank_story(length) for length in lengths]
    filled, evaluations = list(rows), np.zeros(len(rows))
    started = time.perf_counter()
    for part, state in unmask_rows(numpy_step(model, sampler), rows, sampler, seed):
        for i, number in enumerate(part):
            filled[number] = state.tokens[i, :len(rows[number])]
            evaluations[number] += state.evaluated[i]
    return filled, float(evaluations.mean()), time.perf_counter() - started


def figures(rows: list[np.ndarray], tokenizer, judge: Judge | None) -> dict:
    ids = text_ids(rows)
    texts = [decode(tokenizer, row) for row in ids]
    return {"generative_perplexity": judge.perplexity(rows) if judge else None,
            **diversity(texts, ids),
            "end_properly": float(np.mean([ends_properly(text) for text in texts]))}


def measure(model: torch.nn.Module, base: Sampler, real: list[np.ndarray], tokenizer,
            judge: Judge | None, seed: int, names: list[str], train: TokenRows,
            evaluations: tuple[int, ...] = EVALUATIONS) -> dict:
    """{"data": figures of the real rows, "samplers": one entry for every sampler and cost}."""
    lengths = [len(row) - 2 for row in real]
    lines, data = [], figures(real, tokenizer, judge)
    groups = [text_ids(real)]
    todo = [(name, sampler) for name in names for sampler in settings(base, name, evaluations)]
    for name, sampler in tqdm(todo, desc="sampling", unit=" settings", leave=False, disable=None):
        rows, cost, seconds = tell(model, sampler, lengths, seed)
        lines.append({"name": name, "evaluations": cost, "seconds": seconds,
                      "tokens_per_second": sum(lengths) / seconds,
                      "sampler": {field.name: getattr(sampler, field.name)
                                  for field in dataclasses.fields(Sampler)},
                      **figures(rows, tokenizer, judge)})
        groups.append(text_ids(rows))
    for line, overlap in zip([data, *lines], train_overlap(groups, train), strict=True):
        line |= overlap
    return {"generative_perplexity_is": PERPLEXITY, "data": data, "samplers": lines}


COLUMNS = (("gen. ppl", "generative_perplexity", ".1f"), ("entropy", "unigram_entropy", ".3f"),
           ("distinct-1", "distinct_1", ".3f"), ("-2", "distinct_2", ".3f"),
           ("-3", "distinct_3", ".3f"), ("self-BLEU", "self_bleu", ".1f"),
           ("end", "end_properly", ".0%"), ("8 in train", "train_overlap_8", ".1%"),
           ("16 in train", "train_overlap_16", ".2%"), ("tokens/s", "tokens_per_second", ".0f"))
ENTROPY_SHARE = 0.97  # of the real stories': below it a story repeats itself
NOTE = (f"↓: less than {ENTROPY_SHARE:.0%} of the real stories' entropy. A low perplexity beside "
        "it is bought with repetition: it does not make a better sampler.\n"
        f"gen. ppl: {PERPLEXITY}; the judge was trained on the same stories as the judged.\n"
        "8 and 16 in train: share of their 8-grams and 16-grams of tokens that stand somewhere in "
        "the training text.")


def table(result: dict) -> str:
    """Markdown, the real stories first; a low entropy is marked as `NOTE` says."""
    enough = ENTROPY_SHARE * result["data"]["unigram_entropy"]
    lines = ["| sampler | bound | evaluations | " + " | ".join(name for name, _, _ in COLUMNS)
             + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for line in [{"name": "real stories"} | result["data"], *result["samplers"]]:
        pace = line.get("sampler", {}).get("pace")
        bound = {"threshold": "threshold", "entropy_bound": "gamma"}.get(pace)
        cells = [line["name"], f"{line['sampler'][bound]:g}" if bound else "",
                 f"{line['evaluations']:.0f}" if "evaluations" in line else ""]
        cells += ["" if line.get(key) is None else format(line[key], form)
                  + " ↓" * (key == "unigram_entropy" and line[key] < enough)
                  for _, key, form in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Generative perplexity (without a judge self-BLEU) and unigram entropy against evaluations, a
    line for every sampler."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    judged = result["data"]["generative_perplexity"] is not None
    quality = (("generative_perplexity", "generative perplexity (lower is better)") if judged else
               ("self_bleu", "self-BLEU"))
    for axis, (key, title) in zip(axes, (quality, (
            "unigram_entropy", "unigram entropy, nats (as high as the real stories')")),
            strict=True):
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # more lines than usual colours
        for name in dict.fromkeys(line["name"] for line in result["samplers"]):
            points = sorted((line["evaluations"], line[key]) for line in result["samplers"]
                            if line["name"] == name)
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.axhline(result["data"][key], color="black", linestyle=":", label="real stories")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("network evaluations a story")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log" if judged else "linear")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


# ---- infilling -----------------------------------------------------------------------------------

# What stands between two marks: simpler than the sentences of prep_conditional_data.py, and what
# the figures for infilling in docs/results.md were measured with.
SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"'\u201d\u2019]*\s*|[^.!?]+$")


def middle_sentence(text: str) -> tuple[int, int] | None:
    """Where the middle sentence of a text begins and ends, without the white space around it; None
    for a text of fewer than three sentences."""
    spans = [match.span() for match in SENTENCE.finditer(text) if match[0].strip()]
    if len(spans) < 3:
        return None
    start, end = spans[len(spans) // 2]
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip())


def hide_middle(row: np.ndarray, tokenizer) -> np.ndarray | None:
    """The row of a whole story with the tokens of its middle sentence hidden; None if it has none.

    A token belongs to the sentence in which it ends, for a word brings the space before it.
    """
    pieces = [tokenizer.decode([int(i)]) for i in row[1:-1]]
    text = "".join(pieces)
    span = middle_sentence(text)
    if span is None or text != decode(tokenizer, row[1:-1]):  # a letter cut in two by its bytes
        return None
    ends = np.cumsum([len(piece) for piece in pieces])
    gap = (span[0] < ends) & (ends <= span[1])
    hidden = row.copy()
    hidden[1:-1][gap] = MASK
    return hidden if gap.any() else None


def gap_nats(model: torch.nn.Module, rows: list[np.ndarray], gaps: list[np.ndarray], draws: int,
             seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of each gap, (N,) both: the any-order bound given both sides, with the number
    of hidden tokens stratified over the draws, or for the twin the exact -log p given the left."""
    device, nats = device_of(model), []
    for number, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
        places = np.flatnonzero(gap == MASK)

        def hide(clean: torch.Tensor, _, number=number, places=places):
            for draw in range(draws):
                rng = np.random.default_rng([GAP_STREAM, seed, number, draw])
                k = int((draw + rng.random()) / draws * len(places)) + 1
                masked = torch.zeros_like(clean, dtype=torch.bool)
                masked[0, rng.permutation(places)[:k]] = True
                yield Corrupted(clean, clean.masked_fill(masked, MASK), masked, masked.float(),
                                masked.sum(1) / maskable(clean).sum(1)), torch.tensor([k])

        if model.config.causal:
            clean = torch.from_numpy(row)[None]
            hidden = torch.from_numpy(gap == MASK)[None]
            seen = Corrupted(clean, before_each(clean), hidden, hidden.float(), torch.ones(1))
            with torch.no_grad():
                nats.append(row_sums(model, seen, device)[0][0])
        else:
            bound = measure_nats(model, [row[None]], hide)
            nats.append(len(places) * (bound.nats / bound.k).mean())
    return np.array(nats), np.array([(gap == MASK).sum() for gap in gaps])


def infilling(model: torch.nn.Module, rows: list[np.ndarray], gaps: list[np.ndarray],
              sampler: Sampler, tokenizer, draws: int, seed: int) -> dict:
    """Exact match (share), BLEU (0 to 100) and nats/token of the filled gaps against the real, with
    their standard error over the stories, and the nats of each story."""
    from sacrebleu.metrics import BLEU
    if model.config.causal:
        filled = [fill_from_the_left(model, gap[None], sampler, seed + i, may_end=False)[0]
                  for i, gap in enumerate(gaps)]
    else:
        filled = fill(numpy_step(model, sampler), gaps, sampler, seed)
    made, real = ([decode(tokenizer, row[gap == MASK]).strip()
                   for row, gap in zip(group, gaps, strict=True)] for group in (filled, rows))
    nats, tokens = gap_nats(model, rows, gaps, draws, seed)
    return {"exact_match": float(np.mean([a == b for a, b in zip(made, real, strict=True)])),
            "bleu": BLEU().corpus_score(made, [real]).score,
            "nats_per_token": float(nats.sum() / tokens.sum()),
            "standard_error": ratio_error(nats, tokens), "story_nats": nats.tolist(),
            "examples": [{"left": decode(tokenizer, row[:np.argmax(gap == MASK)]), "made": a,
                          "real": b} for row, gap, a, b in zip(rows, gaps, made, real, strict=True)
                         ][:10]}
