"""How well the middle sentence of real stories is filled in.

    python evaluate.py infilling --checkpoint checkpoints/best.pt --twin checkpoints_ar/best.pt

Exact match, BLEU and nats/token of the hidden sentence, beside those of the autoregressive twin,
which knows only what stands to the left of it, with the paired difference; without --twin a joint
model's own left-to-right mode stands in for it. Of a joint model also
the best of some --candidates ("rescored"). Both nats are exact: of a sentence that is filled in
token by token from its left, which is how it is done unless another --order is asked for, of a
joint model with some of its left-to-right mode (--left_share); "bound" is that over all orders.
Prints a table and writes infilling.json beside the checkpoint. --num_samples makes it shorter.
"""

from cli import flag, parse, preset, require, write_json

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from block_diffusion import CAUSAL, JointDiffusion
from corpus.rows import TokenRows
from corpus.tokens import MASK, decode
from kinds.autoregressive import Autoregressive
from kinds.kind import Kind
from kinds.likelihood import ratio_error
from kinds.registry import kind_of
from measuring.held_out import (
    ScoringConfig,
    choose_stories,
    find_measurable,
    open_beside,
    open_model,
    output_file,
)
from sampling.sampler import ORDERS, PACES, Sampler

# What stands between two marks: simpler than the sentences of prep_conditional_data.py, and what
# the figures for infilling in docs/results.md were measured with.
SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"'\u201d\u2019]*\s*|[^.!?]+$")


@dataclass(frozen=True)
class InfillingConfig(ScoringConfig):
    """Flags of `evaluate.py infilling`."""

    twin: str | None = flag(None, "checkpoint of an autoregressive model to compare with")
    num_samples: int = flag(64, "stories to hide the middle sentence of")
    order: str = flag("left", "which position first: " + ", ".join(ORDERS), ORDERS)
    pace: str = flag("linear", "tokens in a step: " + ", ".join(PACES), PACES)
    steps: int = flag(256, "steps of a story, at most")
    candidates: int = flag(8, "of a joint model also the likeliest from left to right of so many "
                              "sentences, drawn with both sides in view")

    def check(self) -> None:
        super().check()
        self.require_from(1, "num_samples", "candidates")


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


def infilling(kind: Kind, model: torch.nn.Module, rows: list[np.ndarray],
              gaps: list[np.ndarray], sampler: Sampler, tokenizer, draws: int, seed: int) -> dict:
    """Exact match (share), BLEU (0 to 100) and nats/token of the filled gaps against the real, with
    their standard error over the stories, and the nats of each story."""
    filled = kind.fill(model, gaps, sampler, seed)
    nats = np.array([kind.gap_nats(model, *pair, sampler.left_share)
                     for pair in zip(rows, gaps, strict=True)])
    tokens = np.array([(gap == MASK).sum() for gap in gaps])
    bound = {} if kind.exact else {"bound": sum(
        kind.gap_bound(model, *pair, draws, seed, number)
        for number, pair in enumerate(zip(rows, gaps, strict=True))) / float(tokens.sum())}
    return {**compared(rows, gaps, filled, tokenizer), **bound,
            "nats_per_token": float(nats.sum() / tokens.sum()),
            "standard_error": ratio_error(nats, tokens), "story_nats": nats.tolist()}


def compared(rows: list[np.ndarray], gaps: list[np.ndarray], filled: list[np.ndarray], tokenizer,
             ) -> dict:
    """Exact match (share) and BLEU (0 to 100) of the filled gaps, some of them, and all of them as
    texts."""
    from sacrebleu.metrics import BLEU
    filled_in, real = ([decode(tokenizer, row[gap == MASK]).strip()
                   for row, gap in zip(group, gaps, strict=True)] for group in (filled, rows))
    return {"exact_match": float(np.mean([a == b for a, b in zip(filled_in, real, strict=True)])),
            "bleu": BLEU().corpus_score(filled_in, [real]).score,
            "examples": [{"left": decode(tokenizer, row[:np.argmax(gap == MASK)]), "made": a,
                          "real": b} for row, gap, a, b in zip(rows, gaps, filled_in, real,
                                                             strict=True)][:10],
            "texts": filled_in}


def add_bleu_errors(arms: dict[str, dict], real: list[str]) -> None:
    """Takes the texts out of the arms; where there are several, what a paired bootstrap over the
    stories makes of them (1,000 samples) comes in their place: the half of BLEU's interval of 95 %,
    and the p-value of its difference from that of the twin, or else of this model."""
    import logging

    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    names = sorted(arms, key=lambda name: name != "left to right")  # the baseline first
    texts = [(name, arms[name].pop("texts")) for name in names]
    if len(real) > 1 and len(texts) > 1:
        test = PairedTest(texts, {"BLEU": BLEU(references=[real])}, None, "bs", 1000)
        for name, result in zip(names, test()[1]["BLEU"], strict=True):
            arms[name] |= {"bleu_interval": float(result.ci), "bleu_p": result.p_value}


def measure(config: InfillingConfig, path: Path, kind: Kind, model: torch.nn.Module,
            twin: torch.nn.Module | None, rows: TokenRows, tokenizer) -> dict:
    """Everything that infilling.json holds."""
    stories = [rows[i].astype(np.int64)
               for i in choose_stories(rows, config.num_samples, config.seed)]
    pairs = [(row, gap) for row in stories if (gap := hide_middle(row, tokenizer)) is not None]
    require(pairs, f"{rows.data_dir}: no story of three sentences or more to hide one of")
    whole, gaps = map(list, zip(*pairs, strict=True))
    arms = {"this model": (kind, model)}
    if twin is not None:
        arms["left to right"] = Autoregressive(), twin
    elif isinstance(kind, JointDiffusion):
        arms["left to right"] = kind.in_mode(CAUSAL), model
    arms = {name: infilling(*arm, whole, gaps, config, tokenizer, config.draws, config.seed)
            for name, arm in arms.items()}
    if isinstance(kind, JointDiffusion):
        best = kind.fill_best(model, gaps, config, config.seed, config.candidates)
        arms["rescored"] = compared(whole, gaps, best, tokenizer)
    add_bleu_errors(arms, [decode(tokenizer, row[gap == MASK]).strip() for row, gap in pairs])
    tokens = np.array([(gap == MASK).sum() for gap in gaps])
    result = {"checkpoint": str(path), "twin": config.twin, "stories": len(pairs),
              "split": rows.split, "config": dataclasses.asdict(config), "arms": arms,
              "story_tokens": tokens.tolist()}
    if "left to right" in arms:
        mine, other = (np.array(arms[name]["story_nats"])
                       for name in ("this model", "left to right"))
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
          f"{'':15s}{'exact match':>12s}{'BLEU':>8s}{'(95 %)':>7s}{'nats/token':>12s}")
    for name, arm in result["arms"].items():
        interval = f" ± {arm['bleu_interval']:.2f}" if "bleu_interval" in arm else ""
        print(f"{name:15s}{arm['exact_match']:12.1%}{arm['bleu']:8.2f}{interval:7s}"
              + (f"{arm['nats_per_token']:12.3f} ± {arm['standard_error']:.3f}"
                 if "nats_per_token" in arm else "")
              + (f" (over all orders at most {arm['bound']:.3f})" if "bound" in arm else "")
              + (f", BLEU p {arm['bleu_p']:.3f}" if arm.get("bleu_p") is not None else ""))
    if "difference" in result:
        print("\nthis model less left to right, story by story: "
              f"{result['difference']['nats_per_token']:+.3f} ± "
              f"{result['difference']['standard_error']:.3f} nats/token")


def main(argv: list[str]) -> None:
    config, given = parse(InfillingConfig, __doc__, argv)
    config.check()
    path, checkpoint = find_measurable(config.checkpoint, lambda kind: (
        "infilling is measured for a model without a condition; use `python evaluate.py "
        "condition` for this one" if kind.conditional else ""))
    kind = kind_of(checkpoint)
    if not given & {"steps", "order", "pace"}:
        config = preset(config, kind.gap, given)
    config.check_used_by(kind, given)
    target = output_file(config.output, path, "infilling.json")
    model, rows, tokenizer = open_model(config, path, checkpoint)
    twin = open_beside(config.twin, Autoregressive.name, model, rows)
    result = measure(config, path, kind, model, twin, rows, tokenizer)
    write_json(target, result)
    report(result)
    print(f"\nwrote {target}")
