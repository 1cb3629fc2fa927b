"""How likely a model finds held-out stories, and how varied those are that it generates.

    python evaluate.py likelihood --checkpoint checkpoints/best.pt --data_dir data

Prints a table and writes evaluation.json beside the checkpoint:
- the likelihood bound (NELBO) of held-out stories in bits/byte, nats/token and perplexity, with
  its standard error, and masked cross-entropy and accuracy by mask ratio; the protocol names the
  split. The autoregressive twin is scored on the same bytes, exactly: its "NELBO" is the negative
  log-likelihood
- distinct-1/2/3, self-BLEU and unigram entropy of generated stories, and the share of their 8-grams
  and 16-grams (of tokens) that stand in the training text, beside those of real stories

--max_rows makes the scoring shorter, --num_samples the rest.
"""

from cli import flag, parse, require, write_json

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpus.rows import TokenRows, bucket_batches, evenly_spread
from corpus.tokens import decode, token_bytes
from kinds.kind import Kind
from kinds.likelihood import Nelbo
from kinds.registry import kind_of
from measuring.held_out import (
    ScoringConfig,
    choose_stories,
    find_measurable,
    open_model,
    output_file,
)
from measuring.overlap import train_overlap
from measuring.quality import diversity, text_ids
from network.layers import PRECISIONS


@dataclass(frozen=True)
class LikelihoodConfig(ScoringConfig):
    """Flags of `evaluate.py likelihood`."""

    max_rows: int | None = flag(None, "score only so many rows, evenly spread over the split")
    num_samples: int = flag(64, "stories generated and compared with as many real ones, 0 for none")

    def check(self) -> None:
        super().check()
        self.require_from(1, "max_rows")
        self.require_from(0, "num_samples")
        require(self.num_samples != 1, "--num_samples 1: self-BLEU needs at least 2 stories")


def in_every_unit(bound: Nelbo, rows: list[np.ndarray], extra: float, sizes: np.ndarray) -> dict:
    """The bound of these rows in every unit. `extra` nats code the rows' lengths; `sizes` is (V,),
    the bytes behind each token."""
    text_bytes = int(sum(sizes[row].sum() for row in rows))
    factor = bound.bits_per_byte(0, text_bytes) / bound.nats_per_token
    return {
        "nelbo_nats_per_token": bound.nats_per_token,
        "nelbo_standard_error": bound.standard_error,
        "perplexity": math.exp(bound.nats_per_token),
        "perplexity_standard_error": math.exp(bound.nats_per_token) * bound.standard_error,
        "bits_per_byte": bound.bits_per_byte(extra, text_bytes),
        "bits_per_byte_standard_error": bound.standard_error * factor,
        "length_code_bits_per_byte": extra / math.log(2) / text_bytes,
        "rows": len(rows), "tokens": int(bound.row_nats()[1].sum()), "bytes": text_bytes}


def compare_samples(config: LikelihoodConfig, kind: Kind, model: torch.nn.Module, rows: TokenRows,
                    stories: np.ndarray, tokenizer) -> dict:
    """Diversity of generated stories and of the real `stories` (row numbers), of equal lengths
    (but for the twin's, which end where it ends them), and how much of them stands in the training
    text: {"samples": {figure: value}, "data": ...}."""
    real = [rows[i] for i in stories]
    generated = kind.write(model, [len(row) - 2 for row in real], config, config.seed)
    groups = [text_ids(group) for group in (generated, real)]
    overlaps = train_overlap(groups, TokenRows(rows.data_dir, "train"))
    return {name: diversity([decode(tokenizer, row) for row in ids], ids) | overlap
            for name, ids, overlap in zip(("samples", "data"), groups, overlaps, strict=True)}


def measure(config: LikelihoodConfig, path: Path, checkpoint: dict) -> dict:
    """Everything that evaluation.json holds, for the checkpoint that was read from `path`."""
    model, rows, tokenizer = open_model(config, path, checkpoint)
    precision = {value: key for key, value in PRECISIONS.items()}[model.compute_dtype]
    stories = choose_stories(rows, config.num_samples, config.seed)
    chosen = evenly_spread(config.max_rows or len(rows), len(rows))
    batches = bucket_batches(rows.lengths, 8192, chosen, merge=False)
    bar = tqdm(batches, desc="scoring", unit=" batches", leave=False, disable=None)
    kind = kind_of(checkpoint)
    bound = kind.nelbo(model, map(rows.batch, bar), config.seed, config.draws, numbers=batches)
    scored = [rows[i] for i in chosen]
    weights = "EMA weights" if checkpoint.get("ema") is not None else "last weights"
    result = {
        "checkpoint": str(path), "kind": checkpoint["kind"], "step": checkpoint.get("step"),
        "tokens_seen": checkpoint.get("tokens_seen"), "data": rows.meta["source"],
        "split": rows.split,
        "protocol": f"{kind.protocol(config.draws)}, {len(chosen)} rows of {rows.split}, "
                    f"seed {config.seed}, {precision}, {weights}; bits/byte include the code of "
                    "the row lengths, nats/token and perplexity do not",
        "likelihood": in_every_unit(bound, scored, kind.extra_nats(rows.meta, scored),
                                    token_bytes(tokenizer)),
        "masked_ce": bound.masked_ce, "masked_accuracy": bound.masked_accuracy,
        "config": dataclasses.asdict(config)}
    if not kind.exact:
        result.update(averages_over_t=bound.averages(), curve=bound.curve())
    if len(stories) > 1:
        result["diversity"] = compare_samples(config, kind, model, rows, stories, tokenizer)
    return result


def report(result: dict) -> None:
    """Prints what `measure` found."""
    numbers = result["likelihood"]
    print(f"{result['checkpoint']}, step {result['step']}; {result['protocol']}\n")
    print(f"bits/byte        {numbers['bits_per_byte']:8.4f} "
          f"± {numbers['bits_per_byte_standard_error']:.4f}   (of which row lengths "
          f"{numbers['length_code_bits_per_byte']:.4f})")
    print(f"NELBO nats/token {numbers['nelbo_nats_per_token']:8.4f} "
          f"± {numbers['nelbo_standard_error']:.4f}")
    print(f"perplexity       {numbers['perplexity']:8.2f} "
          f"± {numbers['perplexity_standard_error']:.2f}")
    print(f"masked cross-entropy {result['masked_ce']:.3f}, accuracy "
          f"{result['masked_accuracy']:.1%} over all hidden tokens")
    if "curve" in result:
        print("\nmask ratio    masked cross-entropy   accuracy")
        for point in result["curve"]:
            print(f"{point['low']:.2f} - {point['high']:.2f}   {point['cross_entropy']:20.3f}   "
                  f"{point['accuracy']:8.1%}")
        print("averaged over t, mask ratio r(t) =")
        for name, average in result["averages_over_t"].items():
            print(f"{name:14s}{average['cross_entropy']:20.3f}   {average['accuracy']:8.1%}")
    if "diversity" in result:
        print(f"\n{'':18s}" + "".join(f"{name:>12s}" for name in result["diversity"]))
        for key in result["diversity"]["data"]:
            cells = ("-" if group[key] is None else f"{group[key]:.3f}"
                     for group in result["diversity"].values())
            print(f"{key:18s}" + "".join(f"{cell:>12s}" for cell in cells))


def measure_and_write(config: LikelihoodConfig, path: Path, checkpoint: dict, target: Path) -> None:
    """Measures the checkpoint that was read from `path`, writes `target` and prints the table."""
    result = measure(config, path, checkpoint)
    write_json(target, result)
    report(result)
    print(f"\nwrote {target}")


def main(argv: list[str]) -> None:
    config, given = parse(LikelihoodConfig, __doc__, argv)
    config.check()
    path, checkpoint = find_measurable(config.checkpoint, lambda kind: (
        "use `python evaluate.py condition`, which measures it with its conditions"
        if kind.conditional else ""))
    config.check_used_by(kind_of(checkpoint), given)
    measure_and_write(config, path, checkpoint,
                      output_file(config.output, path, "evaluation.json"))
