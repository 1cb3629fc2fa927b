"""How much a condition counts: for the likelihood of a text and in generated ones. A library of
evaluate.py.

The likelihood of the same texts, under the same masks, given their own condition, that of another
story, and none, by each reader: the model by its cross-attention, a model without one by the
condition as a plain prompt before the text, and so the autoregressive twin (exactly).
Stories at every guidance, beside the real ones: whether they take up the names and nouns of their
condition, BLEU and chrF against the real text, perplexity under the twin, diversity.
"""

from cli import atomic_file, require

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpus.conditions import condition_row
from corpus.rows import TokenRows, bucket_batches, evenly_spread
from corpus.tokens import BOS, EOS, MASK, decode, maskable, pad_rows, row_kind, token_bytes
from diffusion import DiscreteDiffusion, stratified_masks
from kinds.autoregressive import Autoregressive
from kinds.likelihood import Conditions, Corrupted, Nelbo, measure_nats, ratio_error
from measuring import quality
from measuring.common import EvaluateConfig, open_beside, open_model
from measuring.likelihood import likelihood
from measuring.overlap import train_overlap
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
# The arms of the likelihood of each reader, told the text's own condition, another's, and none
READERS = {
    "cross-attention": ("its own condition", "another story's", "no condition"),
    "plain prompt": ("as a prompt", "another story's, as a prompt", "no condition, plain"),
    "prompt to the twin": ("as a prompt, to the twin", "another story's, to the twin",
                           "no condition, to the twin")}
WAYS = ("cross-attention", "plain prompt")  # to tell the diffusion model a condition
# What an arm is compared with, if not with the model's own: the same reader, told the true one
OWN = {arm: own for own, *others in list(READERS.values())[1:] for arm in others}


# ---- texts ---------------------------------------------------------------------------------------

class Pairs:
    """Whole texts of one row that fit into one together with their condition.

    `numbers` are those of the rows; `texts` [BOS] text [EOS]; `told` the conditions' token ids;
    `prompted` [BOS] condition, text [EOS]; `starts` where the text begins in those.
    """

    def __init__(self, rows: TokenRows, tokenizer, longest: int):
        conditions = rows.conditions()
        # behind a first sentence the text brings its own white space
        between = ([] if rows.meta["condition"]["kind"] == "first sentence"
                   else tokenizer.encode("\n").ids)
        self.numbers, self.texts, self.told, self.prompted, self.starts = [], [], [], [], []
        for i in range(len(rows)):
            text, told = (source[i].astype(np.int64) for source in (rows, conditions))
            prompt = [*told[:-1], *between]  # [BOS] condition
            if row_kind(text) == "story" and len(prompt) + len(text) - 1 <= longest:
                self.numbers.append(i)
                self.texts.append(text)
                self.told.append(told[1:-1])
                self.prompted.append(np.array([*prompt, *text[1:]], np.int64))
                self.starts.append(len(prompt))

    def __len__(self) -> int:
        return len(self.numbers)

    def some(self, chosen: Iterable[int]) -> "Pairs":
        part = object.__new__(Pairs)
        for name, values in vars(self).items():
            setattr(part, name, [values[i] for i in chosen])
        return part

    def shuffled(self, seed: int) -> "Pairs":
        """The same texts, every one with the condition of another."""
        order = np.random.default_rng(seed).permutation(len(self))
        other = np.empty_like(order)
        other[order] = np.roll(order, 1)
        misled = self.some(range(len(self)))
        misled.told = [self.told[i] for i in other]
        misled.starts = [self.starts[i] for i in other]
        misled.prompted = [np.array([*self.prompted[i][:self.starts[i]], *text[1:]])
                           for i, text in zip(other, self.texts, strict=True)]
        return misled


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


# ---- likelihood ----------------------------------------------------------------------------------

def bounds(model: torch.nn.Module, pairs: Pairs, draws: int, seed: int,
           plain: torch.nn.Module | None = None, misled: Pairs | None = None) -> dict[str, Nelbo]:
    """The bound of the texts in every arm, all with the same masks.

    The prompted arm is that of `plain`, by default this model without its condition; `misled` are
    the texts with another's condition, by default `pairs.shuffled(seed)`.
    """
    def told(source: Pairs):
        return lambda rows: pad_rows([np.array([BOS, *source.told[i], EOS]) for i in rows])

    arms = {"its own condition": told(pairs),
            "another story's": told(misled or pairs.shuffled(seed)), "no condition": None}
    result = {name: text_bound(DiscreteDiffusion(), model, pairs, draws, seed, conditions, name)
              for name, conditions in arms.items()}
    result["as a prompt"] = prompted_bound(plain or model, pairs, draws, seed)
    return result


def prompt_bounds(pairs: Pairs, misled: Pairs, draws: int, seed: int, plain: torch.nn.Module,
                  twin: torch.nn.Module | None) -> dict[str, Nelbo]:
    """What a prompt of another's is worth, and none, and all three for the twin, whose -log p is
    exact: what a condition can tell a network that was trained on whole stories. Masks as in
    `bounds`."""
    arms = {"another story's, as a prompt": prompted_bound(plain, misled, draws, seed),
            "no condition, plain": text_bound(DiscreteDiffusion(), plain, pairs, draws, seed)}
    if twin is not None:
        arms["as a prompt, to the twin"] = prompted_bound(twin, pairs, 1, seed, exact=True)
        arms["another story's, to the twin"] = prompted_bound(twin, misled, 1, seed, exact=True)
        arms["no condition, to the twin"] = text_bound(Autoregressive(), twin, pairs, 1, seed)
    return arms


def text_bound(process: DiscreteDiffusion | Autoregressive, model: torch.nn.Module, pairs: Pairs,
               draws: int, seed: int, conditions: Conditions | None = None,
               name: str = "no condition") -> Nelbo:
    """The bound of the texts by themselves, [BOS] text [EOS], given `conditions` or none; for the
    twin the exact -log p, its [EOS] in the nats and not in the tokens."""
    batches = bucket_batches(np.array([len(text) for text in pairs.texts]), 8192, merge=False)
    bar = tqdm(batches, desc=name, unit=" batches", leave=False, disable=None)
    return process.nelbo(model, (pad_rows([pairs.texts[i] for i in part]) for part in bar), seed,
                         draws, numbers=batches, conditions=conditions)


def prompted_bound(model: torch.nn.Module, pairs: Pairs, draws: int, seed: int,
                   exact: bool = False) -> Nelbo:
    """The bound of the texts behind their conditions in one row, under the masks of `bounds`; or
    the `exact` -log p of a causal model, its [EOS] in the nats and not in the tokens."""
    batches = bucket_batches(np.array([len(row) for row in pairs.prompted]), 8192, merge=False)

    def texts_only(part: np.ndarray) -> np.ndarray:
        rows = pad_rows([pairs.prompted[i] for i in part])
        for row, i in zip(rows, part, strict=True):
            row[:pairs.starts[i]] = BOS  # which is never hidden
        return rows

    def hide(clean: torch.Tensor, part: np.ndarray):
        whole = torch.from_numpy(pad_rows([pairs.prompted[i] for i in part]))
        if exact:
            every = Autoregressive().corrupt_batch(whole)
            every.masked = clean >= EOS  # the prompt is given
            yield every, maskable(clean).sum(1)
            return
        text = maskable(whole).sum(1)
        for draw in range(draws):
            masked, k, _ = stratified_masks(clean, part, draw, draws, seed)
            yield Corrupted(whole, whole.masked_fill(masked, MASK), masked, masked.float(),
                            (k / text).float()), k

    bar = tqdm(batches, desc="as a prompt", unit=" batches", leave=False, disable=None)
    return measure_nats(model, map(texts_only, bar), hide, numbers=batches)


def compare_readers(bounds: dict[str, Nelbo]) -> dict[str, dict]:
    """For each reader that was measured nats/token with the text's own condition, with another's
    and with none, and by how much its own is better than either, paired text by text; each with
    its standard error."""
    readers = {}
    for reader, arms in READERS.items():
        if arms[0] not in bounds:
            continue
        told = dict(zip(("own", "another", "none"), (bounds[arm] for arm in arms), strict=True))
        figures = {}
        for name, bound in told.items():
            figures[name] = bound.nats_per_token
            figures[f"{name}_standard_error"] = bound.standard_error
        for name in ("another", "none"):
            figures[f"gain_over_{name}"], figures[f"gain_over_{name}_standard_error"] = gain(
                told["own"], told[name])
        readers[reader] = figures
    return readers


def better_way(bounds: dict[str, Nelbo]) -> dict:
    """Which of `WAYS` has the lower nats/token with a text's own condition, and by how much."""
    best, other = sorted(WAYS, key=lambda way: bounds[READERS[way][0]].nats_per_token)
    by, error = gain(*(bounds[READERS[way][0]] for way in (best, other)))
    return {"way": best, "than": other, "by": by, "standard_error": error}


def gain(better: Nelbo, worse: Nelbo) -> tuple[float, float]:
    """By how many nats/token the first is lower, and the standard error of that: row by row."""
    (a, tokens), (b, _) = better.row_nats(), worse.row_nats()
    return float((b - a).sum() / tokens.sum()), ratio_error(b - a, tokens)


# ---- generation ----------------------------------------------------------------------------------

def continuations(model: torch.nn.Module, pairs: Pairs, sampler: Sampler, seed: int,
                  condition_len: int, prompted: bool = False) -> list[np.ndarray]:
    """A text of the real one's length for every condition: rows [BOS] text [EOS]."""
    if not prompted:
        told = np.stack([condition_row(ids, condition_len) for ids in pairs.told])
        return fill(numpy_step(model, sampler, told),
                    [blank_story(len(text) - 2) for text in pairs.texts], sampler, seed)
    rows = []
    for row, start in zip(pairs.prompted, pairs.starts, strict=True):
        rows.append(np.array([*row[:start], *[MASK] * (len(row) - start - 1), EOS], np.int64))
    filled = fill(numpy_step(model, sampler), rows, sampler, seed)
    return [np.array([BOS, *row[start:]]) for row, start in zip(filled, pairs.starts, strict=True)]


def figures(made: list[np.ndarray], pairs: Pairs, tokenizer, wanted: set[str],
            twin: torch.nn.Module | None) -> dict:
    """What is told of a group of texts, one for every pair."""
    from sacrebleu.metrics import BLEU, CHRF
    ids = quality.text_ids(made)
    texts, real = ([decode(tokenizer, row).strip() for row in group]
                   for group in (ids, pairs.texts))
    perplexity = None
    if twin is not None:  # of the text, given its condition as a prompt
        whole = [np.array([*row[:start], *text[1:]], np.int64)
                 for row, start, text in zip(pairs.prompted, pairs.starts, made, strict=True)]
        perplexity = quality.Judge(twin).perplexity(whole, pairs.starts)
    return {"take_up": taken_up([decode(tokenizer, told) for told in pairs.told], texts, wanted),
            "bleu": BLEU().corpus_score(texts, [real]).score,
            "chrf": CHRF().corpus_score(texts, [real]).score,
            "generative_perplexity": perplexity, **quality.diversity(texts, ids)}


def generation(model: torch.nn.Module, pairs: Pairs, sampler: Sampler, guidances: list[float],
               tokenizer, wanted: set[str], twin: torch.nn.Module | None, seed: int,
               plain: torch.nn.Module, train: TokenRows) -> tuple[dict, dict[str, list[str]]]:
    """{line of the table: its figures}, and the texts of every line but the real one's."""
    limit = model.encoder.config.max_len
    lines = {"real texts": figures(pairs.texts, pairs, tokenizer, wanted, twin)}
    texts, groups = {}, [quality.text_ids(pairs.texts)]
    for guidance in [*guidances, None]:
        prompted = guidance is None  # the condition as a prompt
        name = "as a prompt" if prompted else f"guidance {guidance:g}"
        settings = dataclasses.replace(sampler, guidance=1.0 if prompted else guidance)
        made = continuations(plain if prompted else model, pairs, settings, seed, limit,
                             prompted)
        lines[name] = figures(made, pairs, tokenizer, wanted, twin)
        texts[name] = [decode(tokenizer, row) for row in made]
        groups.append(quality.text_ids(made))
    for line, share in zip(lines.values(), train_overlap(groups, train), strict=True):
        line |= share
    return lines, texts


def training_words(rows: TokenRows, tokenizer, limit: int = 20_000) -> set[str]:
    """`names_and_nouns` of the first rows of a split, conditions included."""
    conditions = rows.conditions()
    both = (decode(tokenizer, conditions[i]) + "\n" + decode(tokenizer, rows[i])
            for i in range(len(rows)))
    return names_and_nouns(islice(both, limit))


COLUMNS = (("take-up", "take_up", ".1%"), ("gen. ppl", "generative_perplexity", ".1f"),
           ("entropy", "unigram_entropy", ".3f"), ("BLEU", "bleu", ".2f"), ("chrF", "chrf", ".1f"),
           ("distinct-1", "distinct_1", ".3f"), ("-2", "distinct_2", ".3f"),
           ("8 in train", "train_overlap_8", ".1%"), ("16 in train", "train_overlap_16", ".2%"))


def tables(result: dict) -> str:
    """Markdown: nats/token by reader and condition, and the texts by guidance."""
    columns = ("own", "another", "none", "gain_over_another", "gain_over_none")
    lines = ["| nats/token, read by | its own condition | another's | none "
             "| its own better than another's by | than none by |", "|---" * 6 + "|"]
    for name, reader in result["readers"].items():
        cells = (f"{reader[key]:.3f} ± {reader[key + '_standard_error']:.3f}" for key in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    better = result["better_way"]
    lines += ["", f"The better way to tell the model a condition: {better['way']}, by "
              f"{better['by']:.3f} ± {better['standard_error']:.3f} nats/token than "
              f"{better['than']}, both with the texts' own."]
    if result["generation"]:
        lines += ["", "| texts | " + " | ".join(name for name, _, _ in COLUMNS) + " |",
                  "|---" * (len(COLUMNS) + 1) + "|"]
        for name, line in result["generation"].items():
            cells = ["" if line[key] is None else format(line[key], form)
                     for _, key, form in COLUMNS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", f"gen. ppl: {quality.PERPLEXITY}, given the condition as a prompt; the judge "
                  "was trained on the same stories. 8 and 16 in train: share of the texts' 8-grams "
                  "and 16-grams of tokens that stand somewhere in the training texts."]
    return "\n".join(lines)


def sheet(conditions: list[str], texts: dict[str, list[str]], count: int = 10) -> str:
    """The first texts of two lines of the table, beside their conditions; unpicked."""
    def on_one_line(text: str) -> str:
        return " ".join(text.split())

    lines = [f"# The first {min(count, len(conditions))} conditions and what follows, unpicked"]
    for i, condition in enumerate(conditions[:count]):
        lines += ["", f"**{on_one_line(condition)}**"]
        for name, made in texts.items():
            lines += ["", f"> {name}: {on_one_line(made[i])}"]
    return "\n".join(lines) + "\n"


def evaluate_conditional(config: EvaluateConfig, path: Path, checkpoint: dict, target: Path,
                         ) -> None:
    """What the condition is worth; writes `target` and a sheet of texts beside it."""
    require(target.suffix != ".md", f"--output {target}: the sheet of texts gets that name; use "
                                    ".json")
    require(config.max_rows != 1, "--max_rows 1: a condition is compared with that of another row")
    model, rows, tokenizer = open_model(config, path, checkpoint)
    twin, plain = (open_beside(config, name, kind, model, rows) for name, kind in (
        (config.twin, "autoregressive"), (config.plain, "diffusion")))
    plain = plain or model
    pairs = Pairs(rows, tokenizer, model.config.max_len)
    likelihoods, scored = condition_likelihood(config, model, rows, tokenizer, pairs, plain, twin)
    told = pairs.some(np.random.default_rng(config.seed).permutation(len(pairs))
                      [:config.num_samples])
    result = {"checkpoint": str(path), "kind": checkpoint["kind"], "step": checkpoint.get("step"),
              "data": rows.meta["source"], "split": rows.split, "texts": scored,
              "stories": len(told), "plain": config.plain, "judge": config.twin,
              "config": dataclasses.asdict(config), **likelihoods,
              "generative_perplexity_is": quality.PERPLEXITY, "generation": {}}
    if len(told):
        train = TokenRows(rows.data_dir, "train")
        wanted = training_words(train, tokenizer)
        result["generation"], texts = generation(
            model, told, config, config.guidances, tokenizer, wanted, twin, config.seed, plain,
            train)
        with atomic_file(target.with_suffix(".md"), "w") as file:
            file.write(sheet([decode(tokenizer, ids) for ids in told.told], texts))
    with atomic_file(target, "w") as file:
        json.dump(result, file, indent=1)
    print(f"{path}, step {result['step']}; {scored} texts of {rows.split} of one row with a "
          f"condition, {config.draws} masks each; {len(told)} stories, {config.steps} steps, "
          f"temperature {config.temperature:g}, top_p {config.top_p:g}, seed {config.seed}\n\n"
          f"{tables(result)}\n\nwrote {target}")


def condition_likelihood(config: EvaluateConfig, model: torch.nn.Module, rows: TokenRows, tokenizer,
                         pairs: Pairs, plain: torch.nn.Module,
                         twin: torch.nn.Module | None) -> tuple[dict, int]:
    """The bound in every arm and by reader, and how many texts were scored: those that also fit
    into a row with the condition of another."""
    chosen = pairs.some(evenly_spread(config.max_rows or len(pairs), len(pairs)))
    misled = chosen.shuffled(config.seed)
    fit = [i for i, row in enumerate(misled.prompted) if len(row) <= model.config.max_len]
    require(len(fit) > 1, f"{rows.data_dir}: no two texts fit into a row with a condition")
    scored, misled = chosen.some(fit), misled.some(fit)
    measured = bounds(model, scored, config.draws, config.seed, plain, misled)
    measured |= prompt_bounds(scored, misled, config.draws, config.seed, plain, twin)
    arms, sizes = {}, token_bytes(tokenizer)
    for name, bound in measured.items():
        family = Autoregressive() if name.endswith("twin") else DiscreteDiffusion()
        numbers = likelihood(bound, scored.texts, family.extra_nats(rows.meta, scored.texts), sizes)
        arms[name] = {"nats_per_token": bound.nats_per_token,
                      "standard_error": bound.standard_error,
                      "bits_per_byte": numbers["bits_per_byte"]}
        if name != "its own condition":
            own = measured[OWN.get(name, "its own condition")]
            arms[name] |= dict(zip(("gain", "gain_standard_error"), gain(own, bound),
                                   strict=True))
    return {"likelihood": arms, "readers": compare_readers(measured),
            "better_way": better_way(measured)}, len(scored)
