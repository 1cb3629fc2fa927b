"""What its condition is worth to a conditional model: for the likelihood of a text and in generated
ones.

    python evaluate.py condition --checkpoint conditional/best.pt --twin checkpoints_ar/best.pt

The likelihood of the same texts, under the same masks, given their own condition, that of another
story, and none, by each reader: the model by its cross-attention; a model without one (--plain), by
the condition as a plain prompt before the text; and so the autoregressive twin, exactly.
Stories at every guidance, beside the real ones: whether they take up the names and nouns of their
condition, BLEU and chrF against the real text, perplexity under the twin, diversity. Prints tables
and writes evaluation.json beside the checkpoint, and evaluation.md, a sheet of ten texts.

--max_rows makes the scoring shorter, --num_samples the rest.
"""

from cli import atomic_file, flag, parse, require, write_json

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from block_diffusion import JointDiffusion
from corpus.rows import TokenRows, evenly_spread
from corpus.tokens import token_bytes
from diffusion import DiscreteDiffusion
from kinds.autoregressive import Autoregressive
from kinds.kind import Kind
from kinds.registry import kind_of
from measuring.condition_likelihood import (
    Reader,
    better_way,
    by_cross_attention,
    by_prompt,
    compare_readers,
    figures_of_arms,
)
from measuring.condition_pairs import Pairs
from measuring.condition_texts import generation, training_words
from measuring.held_out import ScoringConfig, find_measurable, open_beside, open_model, output_file
from measuring.quality import PERPLEXITY
from sampling.sampler import Sampler


@dataclass(frozen=True)
class ConditionConfig(ScoringConfig):
    """Flags of `evaluate.py condition`."""

    max_rows: int | None = flag(None, "score only so many texts, evenly spread over the split")
    num_samples: int = flag(64, "texts generated and compared with as many real ones, 0 for none")
    guidances: list[float] = flag([0.0, 1.0, 1.5, 2.0, 3.0], "the guidances to compare")
    plain: str | None = flag(None, "checkpoint of the diffusion model that gets the condition as a "
                                   "prompt (default: the model itself, without its condition)")
    twin: str | None = flag(None, "checkpoint of an autoregressive model, which gets the condition "
                                  "as a prompt, and judges the texts")

    def check(self) -> None:
        super().check()
        require(self.max_rows is None or self.max_rows > 1, f"--max_rows {self.max_rows}: must be "
                "2 or more, for a condition is compared with that of another row")
        self.require_from(0, "num_samples")
        require(self.num_samples != 1, "--num_samples 1: self-BLEU needs at least 2 stories")
        require(all(math.isfinite(value) and value >= 0 for value in self.guidances),
                "--guidances: must be 0 or more")

    @property
    def sampler(self) -> Sampler:
        """That of the texts, without guidance."""
        return Sampler(**{field.name: getattr(self, field.name)
                          for field in dataclasses.fields(Sampler)})


def measure_readers(config: ConditionConfig, kind: Kind, model: torch.nn.Module,
                    plain: torch.nn.Module, twin: torch.nn.Module | None, pairs: Pairs,
                    rows: TokenRows) -> tuple[list[Reader], list[np.ndarray]]:
    """The likelihood by each reader, and the texts that were scored: those that also fit into a row
    with the condition of another."""
    chosen = pairs.some(evenly_spread(config.max_rows or len(pairs), len(pairs)))
    mismatched = chosen.shuffled(config.seed)
    fit = [i for i, row in enumerate(mismatched.prompted) if len(row) <= model.config.max_len]
    require(len(fit) > 1, f"{rows.data_dir}: no two texts fit into a row with a condition")
    both, draws, seed = (chosen.some(fit), mismatched.some(fit)), config.draws, config.seed
    readers = [by_cross_attention(kind, model, *both, draws, seed)]
    if pairs.in_words:
        readers.append(by_prompt("plain prompt", DiscreteDiffusion(), plain, *both, draws, seed))
    if pairs.in_words and twin is not None:
        readers.append(by_prompt("prompt to the twin", Autoregressive(), twin, *both, 1, seed))
    return readers, both[0].texts


def measure_and_write(config: ConditionConfig, path: Path, checkpoint: dict, target: Path) -> None:
    """Measures the checkpoint that was read from `path`, writes `target` and a sheet of texts
    beside it, and prints the tables."""
    model, rows, tokenizer = open_model(config, path, checkpoint)
    twin = open_beside(config.twin, Autoregressive.name, model, rows)
    plain = open_beside(config.plain, (DiscreteDiffusion.name, JointDiffusion.name), model,
                        rows) or model
    pairs = Pairs(rows, model.encoder, tokenizer, model.config.max_len)
    readers, texts = measure_readers(config, kind_of(checkpoint), model, plain, twin, pairs, rows)
    chosen = pairs.some(np.random.default_rng(config.seed).permutation(len(pairs))
                       [:config.num_samples])
    result = {"checkpoint": str(path), "kind": checkpoint["kind"], "step": checkpoint.get("step"),
              "data": rows.meta["source"], "split": rows.split, "texts": len(texts),
              "stories": len(chosen), "plain": config.plain, "judge": config.twin,
              "config": dataclasses.asdict(config),
              "likelihood": figures_of_arms(readers, texts, rows.meta, token_bytes(tokenizer)),
              "readers": compare_readers(readers), "better_way": better_way(readers),
              "generative_perplexity_is": PERPLEXITY, "generation": {}}
    if len(chosen):
        train = TokenRows(rows.data_dir, "train")
        result["generation"], generated = generation(
            model, plain, chosen, config.sampler, config.guidances, config.seed, tokenizer,
            training_words(train, model.encoder, tokenizer), twin, train)
        with atomic_file(sheet_beside(target), "w") as file:
            file.write(sheet(chosen.shown, generated))
    write_json(target, result)
    print(f"{path}, step {result['step']}; {len(texts)} texts of {rows.split} of one row with a "
          f"condition, {config.draws} masks each; {len(chosen)} stories, {config.steps} steps, "
          f"temperature {config.temperature:g}, top_p {config.top_p:g}, seed {config.seed}\n\n"
          f"{tables(result)}\n\nwrote {target}")


# ---- tables and texts ----------------------------------------------------------------------------

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
    if better := result["better_way"]:
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
        lines += ["", f"gen. ppl: {PERPLEXITY}, given the condition as a prompt; the judge "
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
        for name, group in texts.items():
            lines += ["", f"> {name}: {on_one_line(group[i])}"]
    return "\n".join(lines) + "\n"


def sheet_beside(target: Path) -> Path:
    """Where the sheet of texts goes."""
    return target.with_suffix(".md")


def main(argv: list[str]) -> None:
    config, given = parse(ConditionConfig, __doc__, argv)
    config.check()
    path, checkpoint = find_measurable(config.checkpoint, lambda kind: (
        "" if kind.conditional else "it has no condition; use `python evaluate.py likelihood`"),
        pictures=False)
    config.check_used_by(kind_of(checkpoint), given)
    target = output_file(config.output, path, "evaluation.json", sheet_beside)
    require(target != sheet_beside(target), f"--output {target}: the sheet of texts gets that "
            "name; use .json")
    measure_and_write(config, path, checkpoint, target)
