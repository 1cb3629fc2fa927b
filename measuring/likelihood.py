"""TODO"""

from cli import atomic_file

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpus.rows import TokenRows, bucket_batches, evenly_spread
from corpus.tokens import decode, token_bytes
from kinds.kind import Kind
from kinds.likelihood import Nelbo
from kinds.registry import kind_of
from measuring import overlap, quality
from measuring.common import EvaluateConfig, choose_stories, open_model
from measuring.quality import diversity
from network.layers import PRECISIONS


def likelihood(bound: Nelbo, rows: list[np.ndarray], extra: float, sizes: np.ndarray) -> dict:
    """The bound in every unit. `extra` nats code the rows' lengths; `sizes` is (V,), the bytes
    behind each token."""
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


def compare_samples(config: EvaluateConfig, kind: Kind, model: torch.nn.Module, rows: TokenRows,
                    stories: np.ndarray, tokenizer) -> dict:
    """Diversity of generated stories and of the real `stories` (row numbers), of equal lengths
    (but for the twin's, which end where it ends them), and how much of them stands in the training
    text."""
    real = [rows[i] for i in stories]
    made = kind.write(model, [len(row) - 2 for row in real], config, config.seed)
    groups = [quality.text_ids(group) for group in (made, real)]
    overlaps = overlap.train_overlap(groups, TokenRows(rows.data_dir, "train"))
    return {name: diversity([decode(tokenizer, row) for row in ids], ids) | overlap
            for name, ids, overlap in zip(("samples", "data"), groups, overlaps, strict=True)}


def evaluate(config: EvaluateConfig, path: Path, checkpoint: dict) -> dict:
    """Everything that evaluation.json holds, for the checkpoint that was read from `path`."""
    model, rows, tokenizer = open_model(config, path, checkpoint)
    precision = {value: key for key, value in PRECISIONS.items()}[model.compute_dtype]
    stories = choose_stories(config, rows)
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
        "likelihood": likelihood(bound, scored, kind.extra_nats(rows.meta, scored),
                                 token_bytes(tokenizer)),
        "masked_ce": bound.masked_ce, "masked_accuracy": bound.masked_accuracy,
        "config": dataclasses.asdict(config)}
    if not kind.exact:
        result.update(averages_over_t=bound.averages(), curve=bound.curve())
    if len(stories) > 1:
        result["diversity"] = compare_samples(config, kind, model, rows, stories, tokenizer)
    return result


def report(result: dict) -> None:
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


def write(config: EvaluateConfig, path: Path, checkpoint: dict, target: Path) -> None:
    """Evaluates the checkpoint read from `path`, writes `target` and prints the table."""
    result = evaluate(config, path, checkpoint)
    with atomic_file(target, "w") as file:
        json.dump(result, file, indent=1)
    report(result)
    print(f"\nwrote {target}")
