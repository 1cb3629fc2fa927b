"""How well the middle sentence of real stories is filled in.

    python evaluate.py infilling --checkpoint checkpoints/best.pt --twin checkpoints_ar/best.pt

Exact match, BLEU and nats/token of the hidden sentence, beside those of the autoregressive twin,
which knows only what stands to the left of it, with the paired difference. Prints a table and
writes infilling.json beside the checkpoint. --num_samples makes it shorter.
"""

from cli import atomic_file, flag, parse, require

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from corpus.rows import TokenRows
from corpus.tokens import MASK, decode, maskable
from kinds.autoregressive import before_each, fill_from_the_left
from kinds.likelihood import Corrupted, measure_nats, ratio_error, row_sums
from measuring.held_out import (
    ScoringConfig,
    choose_stories,
    find_measurable,
    open_beside,
    open_model,
    output_file,
)
from network.hardware import device_of
from sampling.loop import fill
from sampling.noise import GAP_STREAM
from sampling.sampler import Sampler
from sampling.step import numpy_step

REFUSED = {"conditional": "infilling is measured for a model without a condition; use `python "
                          "evaluate.py condition` for this one"}
# What stands between two marks: simpler than the sentences of prep_conditional_data.py, and what
# the figures for infilling in docs/results.md were measured with.
SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"'\u201d\u2019]*\s*|[^.!?]+$")


@dataclass(frozen=True)
class InfillingConfig(ScoringConfig):
    """Flags of `evaluate.py infilling`."""

    twin: str | None = flag(None, "checkpoint of an autoregressive model to compare with")
    num_samples: int = flag(64, "stories to hide the middle sentence of")

    def check(self) -> None:
        super().check()
        self.require_from(1, "num_samples")


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
    filled_in, real = ([decode(tokenizer, row[gap == MASK]).strip()
                   for row, gap in zip(group, gaps, strict=True)] for group in (filled, rows))
    nats, tokens = gap_nats(model, rows, gaps, draws, seed)
    return {"exact_match": float(np.mean([a == b for a, b in zip(filled_in, real, strict=True)])),
            "bleu": BLEU().corpus_score(filled_in, [real]).score,
            "nats_per_token": float(nats.sum() / tokens.sum()),
            "standard_error": ratio_error(nats, tokens), "story_nats": nats.tolist(),
            "examples": [{"left": decode(tokenizer, row[:np.argmax(gap == MASK)]), "made": a,
                          "real": b} for row, gap, a, b in zip(rows, gaps, filled_in, real,
                                                             strict=True)][:10]}


def measure(config: InfillingConfig, path: Path, model: torch.nn.Module,
            twin: torch.nn.Module | None, rows: TokenRows, tokenizer) -> dict:
    """Everything that infilling.json holds."""
    stories = [rows[i].astype(np.int64)
               for i in choose_stories(rows, config.num_samples, config.seed)]
    pairs = [(row, gap) for row in stories if (gap := hide_middle(row, tokenizer)) is not None]
    require(pairs, f"{rows.data_dir}: no story of three sentences or more to hide one of")
    whole, gaps = map(list, zip(*pairs, strict=True))
    arms = {name: infilling(arm, whole, gaps, config, tokenizer, config.draws, config.seed)
            for name, arm in (("this model", model), ("left to right", twin)) if arm is not None}
    tokens = np.array([(gap == MASK).sum() for gap in gaps])
    result = {"checkpoint": str(path), "twin": config.twin, "stories": len(pairs),
              "split": rows.split, "config": dataclasses.asdict(config), "arms": arms,
              "story_tokens": tokens.tolist()}
    if twin is not None:
        mine, other = (np.array(arm["story_nats"]) for arm in arms.values())
        result["difference"] = {  # story by story: a long one costs both much
            "nats_per_token": float((mine - other).sum() / tokens.sum()),
            "standard_error": ratio_error(mine - other, tokens)}
    return result


def report(result: dict) -> None:
    """Prints what `measure` found."""
    config = result["config"]
    print(f"the middle sentence of {result['stories']} stories of {result['split']}, "
          f"{sum(result['story_tokens'])} tokens, temperature {config['temperature']:g}, "
          f"{config['steps']} steps, seed {config['seed']}\n\n"
          f"{'':15s}{'exact match':>12s}{'BLEU':>8s}{'nats/token':>12s}")
    for name, arm in result["arms"].items():
        print(f"{name:15s}{arm['exact_match']:12.1%}{arm['bleu']:8.2f}"
              f"{arm['nats_per_token']:12.3f} ± {arm['standard_error']:.3f}")
    if "difference" in result:
        print("\nthis model (a bound) less left to right (exact), story by story: "
              f"{result['difference']['nats_per_token']:+.3f} ± "
              f"{result['difference']['standard_error']:.3f} nats/token")


def main(argv: list[str]) -> None:
    config, given = parse(InfillingConfig, __doc__, argv)
    config.check()
    path, checkpoint = find_measurable(config.checkpoint, REFUSED)
    config.check_used_by(checkpoint["kind"], given)
    target = output_file(config.output, path, "infilling.json")
    model, rows, tokenizer = open_model(config, path, checkpoint)
    twin = open_beside(config.twin, "autoregressive", model, rows)
    result = measure(config, path, model, twin, rows, tokenizer)
    with atomic_file(target, "w") as file:
        json.dump(result, file, indent=1)
    report(result)
    print(f"\nwrote {target}")
