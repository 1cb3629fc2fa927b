"""What a condition is worth for the likelihood of a text. A library of `evaluate.py condition`.

The likelihood of the same texts, under the same masks, given their own condition, that of another
text, and none, by each reader: the conditional model by its cross-attention, a model without one by
the condition as a plain prompt before the text, and so the autoregressive twin (exactly).
"""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from corpus.rows import bucket_batches
from corpus.tokens import BOS, EOS, MASK, maskable, pad_rows
from diffusion import stratified_masks
from kinds.autoregressive import next_tokens
from kinds.kind import Kind
from kinds.likelihood import ConditionsOf, Corrupted, Nelbo, measure_nats, ratio_error
from measuring.condition_pairs import Pairs
from measuring.likelihood import in_every_unit

# The names of what each reader is measured with: the text's own condition, another's, and none
ARMS = {
    "cross-attention": ("its own condition", "another story's", "no condition"),
    "plain prompt": ("as a prompt", "another story's, as a prompt", "no condition, plain"),
    "prompt to the twin": ("as a prompt, to the twin", "another story's, to the twin",
                           "no condition, to the twin")}


@dataclass(frozen=True)
class Reader:
    """A network that is given conditions in one way, and the bounds of the same texts with their
    own condition, with that of another text and with none."""

    name: str
    kind: Kind  # whose bounds they are
    own: Nelbo
    another: Nelbo
    none: Nelbo

    @property
    def arms(self) -> dict[str, Nelbo]:
        """The three bounds under their names in evaluation.json."""
        return dict(zip(ARMS[self.name], (self.own, self.another, self.none), strict=True))


def by_cross_attention(kind: Kind, model: torch.nn.Module, pairs: Pairs, mismatched: Pairs,
                       draws: int, seed: int) -> Reader:
    """The conditional model by its cross-attention; `mismatched` are the same texts with other
    conditions. All arms of all readers of masked models have the same masks."""
    def conditions_of(source: Pairs) -> ConditionsOf:
        return lambda rows: source.batch([source.sources[i] for i in rows])

    name = "cross-attention"
    given = (conditions_of(pairs), conditions_of(mismatched), None)
    return Reader(name, kind, *(
        text_bound(kind, model, pairs, draws, seed, conditions, arm)
        for arm, conditions in zip(ARMS[name], given, strict=True)))


def by_prompt(name: str, kind: Kind, model: torch.nn.Module, pairs: Pairs, mismatched: Pairs,
              draws: int, seed: int) -> Reader:
    """A model without cross-attention, or the conditional one without its condition, by prompts:
    what a condition can tell a network that was trained on whole stories."""
    return Reader(name, kind, prompted_bound(kind, model, pairs, draws, seed),
                  prompted_bound(kind, model, mismatched, draws, seed),
                  text_bound(kind, model, pairs, draws, seed, name=ARMS[name][2]))


def text_bound(kind: Kind, model: torch.nn.Module, pairs: Pairs, draws: int, seed: int,
               conditions: ConditionsOf | None = None, name: str = "no condition") -> Nelbo:
    """The bound of the texts by themselves, [BOS] text [EOS], given `conditions` or none; for the
    twin the exact -log p, its [EOS] in the nats and not in the tokens."""
    batches = bucket_batches(np.array([len(text) for text in pairs.texts]), 8192, merge=False)
    bar = tqdm(batches, desc=name, unit=" batches", leave=False, disable=None)
    return kind.nelbo(model, (pad_rows([pairs.texts[i] for i in part]) for part in bar), seed,
                      draws, numbers=batches, conditions=conditions)


def prompted_bound(kind: Kind, model: torch.nn.Module, pairs: Pairs, draws: int, seed: int,
                   ) -> Nelbo:
    """The bound of the texts behind their conditions in one row, under the masks of `text_bound`;
    for the twin the exact -log p, its [EOS] in the nats and not in the tokens."""
    batches = bucket_batches(np.array([len(row) for row in pairs.prompted]), 8192, merge=False)

    def texts_only(part: np.ndarray) -> np.ndarray:
        rows = pad_rows([pairs.prompted[i] for i in part])
        for row, i in zip(rows, part, strict=True):
            row[:pairs.starts[i]] = BOS  # which is never hidden
        return rows

    def hide(clean: torch.Tensor, part: np.ndarray):
        whole = torch.from_numpy(pad_rows([pairs.prompted[i] for i in part]))
        if kind.exact:
            every = next_tokens(whole)
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


def gain(better: Nelbo, worse: Nelbo) -> tuple[float, float]:
    """By how many nats/token the first is lower, and the standard error of that: row by row."""
    (a, tokens), (b, _) = better.row_nats(), worse.row_nats()
    return float((b - a).sum() / tokens.sum()), ratio_error(b - a, tokens)


def compare_readers(readers: list[Reader]) -> dict[str, dict]:
    """For each reader nats/token with the text's own condition, with another's and with none, and
    by how much its own is better than either, paired text by text; each with its standard error."""
    result = {}
    for reader in readers:
        figures = {}
        for name in ("own", "another", "none"):
            bound = getattr(reader, name)
            figures[name] = bound.nats_per_token
            figures[f"{name}_standard_error"] = bound.standard_error
        for name in ("another", "none"):
            figures[f"gain_over_{name}"], figures[f"gain_over_{name}_standard_error"] = gain(
                reader.own, getattr(reader, name))
        result[reader.name] = figures
    return result


def better_way(readers: list[Reader]) -> dict | None:
    """Which of the two ways to give the diffusion model a condition, by cross-attention or as a
    plain prompt, has the lower nats/token with a text's own condition, and by how much; None where
    only one was measured."""
    diffusion = [reader for reader in readers if not reader.kind.exact]
    if len(diffusion) < 2:
        return None
    best, other = sorted(diffusion, key=lambda reader: reader.own.nats_per_token)
    by, error = gain(best.own, other.own)
    return {"way": best.name, "than": other.name, "by": by, "standard_error": error}


def figures_of_arms(readers: list[Reader], texts: list[np.ndarray], meta: dict, sizes: np.ndarray,
                    ) -> dict[str, dict]:
    """The bound in every arm, and what the text's own condition gains over it. Without a condition,
    or with another's, the gain is that of the same reader; as a prompt, that of cross-attention
    over it. `sizes` is (V,), the bytes behind each token."""
    first, result = readers[0].own, {}
    for reader in readers:
        extra = reader.kind.extra_nats(meta, texts)
        for name, bound in reader.arms.items():
            units = in_every_unit(bound, texts, extra, sizes)
            result[name] = {"nats_per_token": bound.nats_per_token,
                            "standard_error": bound.standard_error,
                            "bits_per_byte": units["bits_per_byte"]}
            if bound is not first:
                base = first if bound is reader.own else reader.own
                result[name] |= dict(zip(("gain", "gain_standard_error"), gain(base, bound),
                                         strict=True))
    return result
