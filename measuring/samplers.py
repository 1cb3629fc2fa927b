"""What each sampler gives for its network evaluations.

    python evaluate.py samplers --checkpoint checkpoints/best.pt --twin checkpoints_ar/best.pt

Every sampler generates as many stories as there are real ones beside them, of the same lengths, at
each number of network evaluations; an adaptive pace at each of its bounds. Prints a table and
writes sampling.json and sampling_pareto.png beside the checkpoint. With --twin the table has the
generative perplexity under this autoregressive model. --num_samples and --evaluations make it
shorter.
"""

from cli import atomic_file, flag, parse, require, write_json

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpus.rows import TokenRows
from kinds.autoregressive import Autoregressive
from measuring.held_out import (
    HeldOutConfig,
    choose_stories,
    find_measurable,
    open_beside,
    open_model,
    output_file,
)
from measuring.overlap import train_overlap
from measuring.quality import COHERENCE, PERPLEXITY, Judge, figures, text_ids
from sampling.loop import fill_counted
from sampling.rows import blank_story
from sampling.sampler import ADAPTIVE_PACES, MAX_STEPS, Sampler
from sampling.step import numpy_step

EVALUATIONS = (4, 8, 16, 32, 64, 128, 256)
# What the adaptive paces are bound by instead
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


@dataclass(frozen=True)
class SamplersConfig(HeldOutConfig):
    """Flags of `evaluate.py samplers`."""

    twin: str | None = flag(None, "checkpoint of an autoregressive model, which judges the stories")
    num_samples: int = flag(64, "stories that each sampler generates, beside as many real ones")
    samplers: list[str] = flag(list(SAMPLERS), "which to compare")
    evaluations: list[int] = flag(list(EVALUATIONS), "network evaluations to compare at")
    # Of a sampler what is the same in all that are compared, unless its line says otherwise
    temperature: float = flag(1.0, "0 is greedy, 1 the model's own distribution")
    top_k: int = flag(0, "draw among the k likeliest tokens; 0 is all")
    top_p: float = flag(1.0, "draw among the likeliest tokens that together reach p")

    def check(self) -> None:
        super().check()
        self.drawing.check()
        self.require_from(2, "num_samples")  # for self-BLEU
        for name in self.samplers:
            require(name in SAMPLERS, f"--samplers {name!r}: choose from "
                                      f"{', '.join(map(repr, SAMPLERS))}")
        require(1 <= min(self.evaluations) and max(self.evaluations) <= MAX_STEPS,
                f"--evaluations: must be from 1 to {MAX_STEPS}")

    @property
    def drawing(self) -> Sampler:
        """How a token is drawn, and everything else as it is by default."""
        return Sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def settings(base: Sampler, name: str, evaluations: tuple[int, ...] = EVALUATIONS,
             ) -> Iterator[Sampler]:
    """The samplers of one line of the table: `base` with what the line is about, by steps or by
    what an adaptive pace is bound by."""
    sampler = dataclasses.replace(base, **SAMPLERS[name])
    if sampler.pace not in ADAPTIVE_PACES:
        for steps in evaluations:
            yield dataclasses.replace(sampler, steps=steps)
        return
    field, values = (("threshold", THRESHOLDS) if sampler.pace == "threshold" else
                     ("gamma", GAMMAS))
    for value in values:
        yield dataclasses.replace(sampler, steps=max(evaluations), **{field: value})


def generate_stories(model: torch.nn.Module, sampler: Sampler, lengths: list[int], seed: int,
                     ) -> tuple[list[np.ndarray], float, float]:
    """Stories with these numbers of tokens, rows [BOS] story [EOS]; the mean number of network
    evaluations of a story, and the seconds that they took."""
    started = time.perf_counter()
    filled, evaluations = fill_counted(numpy_step(model, sampler), list(map(blank_story, lengths)),
                                       sampler, seed)
    return filled, float(evaluations.mean()), time.perf_counter() - started


def measure(config: SamplersConfig, model: torch.nn.Module, real: list[np.ndarray], tokenizer,
            judge: Judge | None, train: TokenRows) -> dict:
    """{"data": figures of the real rows, "samplers": one entry for every sampler and cost}."""
    lengths = [len(row) - 2 for row in real]
    lines, data = [], figures(real, tokenizer, judge)
    groups = [text_ids(real)]
    todo = [(name, sampler) for name in config.samplers
            for sampler in settings(config.drawing, name, tuple(config.evaluations))]
    for name, sampler in tqdm(todo, desc="sampling", unit=" settings", leave=False, disable=None):
        rows, cost, seconds = generate_stories(model, sampler, lengths, config.seed)
        lines.append({"name": name, "evaluations": cost, "seconds": seconds,
                      "tokens_per_second": sum(lengths) / seconds,
                      "sampler": dataclasses.asdict(sampler), **figures(rows, tokenizer, judge)})
        groups.append(text_ids(rows))
    for line, overlap in zip([data, *lines], train_overlap(groups, train), strict=True):
        line |= overlap
    return {"generative_perplexity_is": PERPLEXITY, "data": data, "samplers": lines}


COLUMNS = (("gen. ppl", "generative_perplexity", ".1f"), ("entropy", "unigram_entropy", ".3f"),
           ("distinct-1", "distinct_1", ".3f"), ("-2", "distinct_2", ".3f"),
           ("-3", "distinct_3", ".3f"), ("self-BLEU", "self_bleu", ".1f"),
           ("end", "end_properly", ".0%"),
           *COHERENCE, ("8 in train", "train_overlap_8", ".1%"),
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


def beside(target: Path) -> Path:
    """Where the plot goes."""
    return target.with_name(target.stem + "_pareto.png")


def measure_and_write(config: SamplersConfig, path: Path, checkpoint: dict, target: Path) -> None:
    """Measures the checkpoint that was read from `path`, writes `target` and a plot beside it, and
    prints the table."""
    model, rows, tokenizer = open_model(config, path, checkpoint)
    twin = open_beside(config.twin, Autoregressive.name, model, rows)
    real = [rows[i].astype(np.int64)
            for i in choose_stories(rows, config.num_samples, config.seed)]
    require(len(real) > 1, f"{rows.data_dir}: samplers are compared with two stories or more that "
                           "fit into a row")
    result = {"checkpoint": str(path), "judge": config.twin, "stories": len(real),
              "split": rows.split, "config": dataclasses.asdict(config),
              **measure(config, model, real, tokenizer, twin and Judge(twin, real),
                        TokenRows(rows.data_dir, "train"))}
    write_json(target, result)
    plot(result, beside(target))
    print(f"{len(real)} stories of the lengths of real ones of {rows.split}, temperature "
          f"{config.temperature:g}, top_k {config.top_k}, top_p {config.top_p:g}, seed "
          f"{config.seed}\n\n{table(result)}\n\n{NOTE}\n\nwrote {target}")


def main(argv: list[str]) -> None:
    config, _ = parse(SamplersConfig, __doc__, argv)
    config.check()
    path, checkpoint = find_measurable(config.checkpoint, lambda kind: (
        "it has no samplers" if not kind.unmasks else "samplers are compared for a model without a "
        "condition; use `python evaluate.py condition` for this one" if kind.conditional else ""))
    measure_and_write(config, path, checkpoint,
                      output_file(config.output, path, "sampling.json", beside))
