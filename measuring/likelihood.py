"""How likely a model finds held-out stories, and how varied those are that it generates.

    python evaluate.py likelihood --checkpoint checkpoints/best.pt --data_dir data

Prints a table and writes evaluation.json beside the checkpoint:
- the likelihood bound (NELBO) of held-out stories in bits/byte, nats/token and perplexity, with
  its standard error, and masked cross-entropy and accuracy by mask ratio; the protocol names the
  split. The autoregressive twin is scored on the same bytes, exactly: its "NELBO" is the negative
  log-likelihood. A joint model (train.py --objective joint) is scored in every mode that it was
  trained for, or those of --mode
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

from block_diffusion import CAUSAL
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
    mode: list[str] = flag([], "of a joint model: causal, row or block sizes (default: those that "
                               "it was trained for)")

    def check(self) -> None:
        super().check()
        self.require_from(1, "max_rows")
        self.require_from(0, "num_samples")
        require(self.num_samples != 1, "--num_samples 1: self-BLEU needs at least 2 stories")

    def kinds(self, kind: Kind) -> list[Kind]:
        """The kind in every mode that is measured, or as it is."""
        require(not self.mode or kind.modes, f"--mode {' '.join(self.mode)}: for a joint model "
                                             "alone; leave it out")
        return [kind.in_mode(mode) for mode in self.modes(kind)] or [kind]

    def modes(self, kind: Kind) -> list[str]:
        return list(dict.fromkeys(self.mode or kind.modes))


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


def compare_samples(config: LikelihoodConfig, kinds: list[Kind], model: torch.nn.Module,
                    rows: TokenRows, stories: np.ndarray, tokenizer) -> list[dict]:
    """Diversity of stories that each of the `kinds` generated and of the real `stories` (row
    numbers), of equal lengths (but where a kind ends them itself), and how much of them stands in
    the training text: {"samples": {figure: value}, "data": ...} each."""
    real = [rows[i] for i in stories]
    lengths = [len(row) - 2 for row in real]
    groups = [text_ids(group) for group in (*(
        kind.write(model, lengths, config, config.seed) for kind in kinds), real)]
    overlaps = train_overlap(groups, TokenRows(rows.data_dir, "train"))
    *samples, data = (diversity([decode(tokenizer, row) for row in ids], ids) | overlap
                      for ids, overlap in zip(groups, overlaps, strict=True))
    return [{"samples": one, "data": data} for one in samples]


def score(config: LikelihoodConfig, kind: Kind, model: torch.nn.Module, rows: TokenRows,
          chosen: np.ndarray, sizes: np.ndarray) -> dict:
    """The likelihood of the rows with the numbers `chosen`; `sizes` is (V,), the bytes behind each
    token."""
    batches = bucket_batches(rows.lengths, 8192, chosen, merge=False)
    bar = tqdm(batches, desc="scoring", unit=" batches", leave=False, disable=None)
    bound = kind.nelbo(model, map(rows.batch, bar), config.seed, config.draws, numbers=batches)
    scored = [rows[i] for i in chosen]
    result = {
        "protocol": kind.protocol(config.draws),
        "likelihood": in_every_unit(bound, scored, kind.extra_nats(rows.meta, scored), sizes),
        "masked_ce": bound.masked_ce, "masked_accuracy": bound.masked_accuracy}
    if (bound.k < bound.n).any():  # else there is one mask ratio alone
        result.update(averages_over_t=bound.averages(), curve=bound.curve())
    return result


def measure(config: LikelihoodConfig, path: Path, checkpoint: dict) -> dict:
    """Everything that evaluation.json holds, for the checkpoint that was read from `path`. Of a
    kind with modes the figures of each lie under its name in "modes"."""
    kind = kind_of(checkpoint)
    kinds = config.kinds(kind)
    model, rows, tokenizer = open_model(config, path, checkpoint)
    precision = {value: key for key, value in PRECISIONS.items()}[model.compute_dtype]
    stories = choose_stories(rows, config.num_samples, config.seed)
    chosen = evenly_spread(config.max_rows or len(rows), len(rows))
    weights = "EMA weights" if checkpoint.get("ema") is not None else "last weights"
    entries = [score(config, one, model, rows, chosen, token_bytes(tokenizer)) for one in kinds]
    for one, entry in zip(kinds, entries, strict=True):
        if model.self_conditioning and getattr(one, "mode", None) != CAUSAL:
            entry["protocol"] += ", each noisy row in two passes (self-conditioning)"
        entry["protocol"] += (f", {len(chosen)} rows of {rows.split}, seed {config.seed}, "
                              f"{precision}, {weights}; bits/byte include the code of the row "
                              "lengths, nats/token and perplexity do not")
    if len(stories) > 1:
        for entry, groups in zip(entries, compare_samples(config, kinds, model, rows, stories,
                                                          tokenizer), strict=True):
            entry["diversity"] = groups
    modes = config.modes(kind)
    return {
        "checkpoint": str(path), "kind": checkpoint["kind"], "step": checkpoint.get("step"),
        "tokens_seen": checkpoint.get("tokens_seen"), "data": rows.meta["source"],
        "split": rows.split, **({"modes": dict(zip(modes, entries, strict=True))} if modes else
                                entries[0]), "config": dataclasses.asdict(config)}


def report(result: dict) -> None:
    """Prints what `measure` found."""
    of = f"{result['checkpoint']}, step {result['step']}"
    if "modes" in result:
        print(f"{of}\n\n{table(result['modes'])}")
    else:
        print(f"{of}; {result['protocol']}\n")
        report_likelihood(result)
    entries = result.get("modes", {"": result})
    for entry in entries.values():
        if "curve" in entry:
            report_curve(entry)
    groups = {name or "samples": entry["diversity"]["samples"] for name, entry in entries.items()
              if "diversity" in entry}
    if groups:
        groups["data"] = next(iter(entries.values()))["diversity"]["data"]
        print(f"\n{'':18s}" + "".join(f"{name:>12s}" for name in groups))
        for key in groups["data"]:
            cells = ("-" if group[key] is None else f"{group[key]:.3f}"
                     for group in groups.values())
            print(f"{key:18s}" + "".join(f"{cell:>12s}" for cell in cells))


def table(modes: dict[str, dict]) -> str:
    """Markdown: the likelihood in every mode, and how each was measured."""
    lines = ["| mode | bits/byte | of which row lengths | nats/token | perplexity | accuracy |",
             "|---" * 6 + "|"]
    for mode, entry in modes.items():
        numbers = entry["likelihood"]
        lines.append(
            f"| {mode} | {numbers['bits_per_byte']:.4f} ± "
            f"{numbers['bits_per_byte_standard_error']:.4f} | "
            f"{numbers['length_code_bits_per_byte']:.4f} | "
            f"{numbers['nelbo_nats_per_token']:.4f} ± {numbers['nelbo_standard_error']:.4f} | "
            f"{numbers['perplexity']:.2f} ± {numbers['perplexity_standard_error']:.2f} | "
            f"{entry['masked_accuracy']:.1%} |")
    return "\n".join([*lines, "", *(f"{mode}: {entry['protocol']}"
                                    for mode, entry in modes.items())])


def report_likelihood(result: dict) -> None:
    numbers = result["likelihood"]
    print(f"bits/byte        {numbers['bits_per_byte']:8.4f} "
          f"± {numbers['bits_per_byte_standard_error']:.4f}   (of which row lengths "
          f"{numbers['length_code_bits_per_byte']:.4f})")
    print(f"NELBO nats/token {numbers['nelbo_nats_per_token']:8.4f} "
          f"± {numbers['nelbo_standard_error']:.4f}")
    print(f"perplexity       {numbers['perplexity']:8.2f} "
          f"± {numbers['perplexity_standard_error']:.2f}")
    print(f"masked cross-entropy {result['masked_ce']:.3f}, accuracy "
          f"{result['masked_accuracy']:.1%} over all hidden tokens")


def report_curve(result: dict) -> None:
    print("\nmask ratio    masked cross-entropy   accuracy")
    for point in result["curve"]:
        print(f"{point['low']:.2f} - {point['high']:.2f}   {point['cross_entropy']:20.3f}   "
              f"{point['accuracy']:8.1%}")
    print("averaged over t, mask ratio r(t) =")
    for name, average in result["averages_over_t"].items():
        print(f"{name:14s}{average['cross_entropy']:20.3f}   {average['accuracy']:8.1%}")


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
    kinds = config.kinds(kind_of(checkpoint))
    # what one of the modes knows is of use
    config.check_used_by(min(kinds, key=lambda kind: kind.exact), given)
    measure_and_write(config, path, checkpoint,
                      output_file(config.output, path, "evaluation.json"))
