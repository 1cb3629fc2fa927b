"""TODO"""

from cli import atomic_file, require

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpus.rows import TokenRows
from measuring import quality
from measuring.common import (
    EVALUATIONS,
    GAMMAS,
    SAMPLERS,
    THRESHOLDS,
    EvaluateConfig,
    choose_stories,
    open_beside,
    open_model,
)
from measuring.overlap import train_overlap
from measuring.quality import PERPLEXITY, Judge, figures, text_ids
from sampling.loop import unmask_rows
from sampling.rows import blank_story
from sampling.sampler import ADAPTIVE_PACES, Sampler
from sampling.step import numpy_step


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


def compare_samplers(config: EvaluateConfig, path: Path, checkpoint: dict, target: Path) -> None:
    """The table of samplers; writes `target` and a plot beside it."""
    require(checkpoint["kind"] == "diffusion", f"{path} is autoregressive: it has no samplers")
    model, rows, tokenizer = open_model(config, path, checkpoint)
    twin = open_beside(config, config.twin, "autoregressive", model, rows)
    real = [rows[i].astype(np.int64) for i in choose_stories(config, rows)]
    require(len(real) > 1, f"{rows.data_dir}: --sampling needs two stories that fit into a row")
    result = {"checkpoint": str(path), "judge": config.twin, "stories": len(real),
              "split": rows.split,
              "config": dataclasses.asdict(config),
              **measure(model, config, real, tokenizer, twin and quality.Judge(twin),
                                config.seed, config.samplers, TokenRows(rows.data_dir, "train"),
                                tuple(config.evaluations))}
    with atomic_file(target, "w") as file:
        json.dump(result, file, indent=1)
    plot(result, plot_beside(target))
    print(f"{len(real)} stories of the lengths of real ones of {rows.split}, temperature "
          f"{config.temperature:g}, top_k {config.top_k}, top_p {config.top_p:g}, seed "
          f"{config.seed}\n\n"
          f"{table(result)}\n\n{NOTE}\n\nwrote {target}")


def plot_beside(target: Path) -> Path:
    return target.with_name(target.stem + "_pareto.png")
