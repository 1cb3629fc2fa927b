"""What each way of writing costs and gives: left to right, in blocks, in verified drafts, by rows.

    python evaluate.py blocks --checkpoint joint/best.pt --twin ar/best.pt --judge ar2/best.pt

Of a joint model (train.py --objective joint) every way writes the same number of stories at one
temperature; the cached twin, another model for comparison, writes as many. Prints a table and
writes blocks.json and block_tradeoff.png beside the checkpoint:
- bits/byte of held-out rows in that mode, exact or a bound (a verified draft's is the causal one)
- generative perplexity by the judge with its standard error, unigram entropy, self-BLEU. The judge
  must be another model than the ones that write
- tokens per CPU-second and seconds a story with one story and with --batch, in turns in one
  process; evaluations and tokens of a pass, seconds to the first text, memory of the cache
--num_samples, --max_rows and --ways make it shorter.
"""

from cli import atomic_file, flag, parse, require, write_json

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from corpus.rows import TokenRows, bucket_batches, evenly_spread
from corpus.tokens import BOS, EOS, token_bytes
from kinds.autoregressive import Autoregressive
from kinds.kind import Kind, drawn_lengths
from kinds.registry import kind_of
from measuring.held_out import (
    HeldOutConfig,
    choose_stories,
    find_measurable,
    open_beside,
    open_model,
    output_file,
)
from measuring.quality import COHERENCE, PERPLEXITY, Judge, figures
from sampling.left_to_right import Piece, write_left
from sampling.loop import fill_counted
from sampling.rows import blank_story
from sampling.sampler import Sampler
from sampling.step import numpy_step

BATCH = 32  # stories at a time, but for the timings
CAUSAL, ROW, TWIN = "causal", "row", "twin"
# Blocks of so many tokens in so many evaluations, drafts verified of so many places, whole rows
WAYS = (CAUSAL, "2/2", "4/2", "4/4", "8/4", "8/8", "16/4", "16/8", "16/16", "32/8", "32/16",
        "verify 4/1", "verify 8/1", "verify 8/2", "verify 16/1", "verify 3/0", "verify 4/0",
        "verify 6/0", "row/32", "row/64", TWIN)


@dataclass(frozen=True)
class BlocksConfig(HeldOutConfig):
    """Flags of `evaluate.py blocks`."""

    twin: str | None = flag(None, "checkpoint of an autoregressive model, which writes beside it")
    judge: str | None = flag(None, "checkpoint of another one, which judges the stories")
    ways: list[str] = flag(list(WAYS), "which to measure: causal, N/K (blocks of N tokens in K "
                                       "evaluations), 'verify N/K' (K 0: by the draft head), "
                                       "row/K, twin")
    num_samples: int = flag(64, "stories that each writes")
    max_rows: int | None = flag(None, "score only so many rows, evenly spread over the split")
    draws: int = flag(1, "masks drawn for every row")
    batch: int = flag(4, "stories at a time in the second timing; the first has one")
    repeats: int = flag(2, "how often each way is timed")
    temperature: float = flag(1.0, "0 is greedy, 1 the model's own distribution")
    top_k: int = flag(0, "draw among the k likeliest tokens; 0 is all")
    top_p: float = flag(1.0, "draw among the likeliest tokens that together reach p")
    precision: str = flag("fp32", "auto, fp32, bf16 or fp16", ("auto", "fp32", "bf16", "fp16"))

    def check(self) -> None:
        super().check()
        self.require_from(2, "num_samples")  # for self-BLEU
        self.require_from(1, "max_rows", "draws", "batch", "repeats")
        for name in self.ways:
            Way.read(name, self)
        require(TWIN not in self.ways or self.twin, "--ways twin: name its checkpoint with --twin, "
                                                    "or leave it out")


@dataclass(frozen=True)
class Way:
    """A way of writing: in blocks of `size` tokens (0: the row), in `sampler.steps` evaluations."""

    name: str
    size: int
    sampler: Sampler
    verified: bool = False

    @classmethod
    def read(cls, name: str, config: BlocksConfig) -> "Way":
        drawing = Sampler(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        if name in (CAUSAL, TWIN):
            return cls(name, 1, dataclasses.replace(drawing, steps=1))
        verified = name.startswith("verify ")
        size, slash, steps = name.split(" ")[-1].partition("/")
        require(slash and steps.isdigit() and (verified or int(steps)) and (
                name.startswith(f"{ROW}/") or size.isdigit() and int(size) > 1),
                f"--ways {name!r}: choose from causal, twin, N/K, 'verify N/K' and row/K with N of "
                "2 or more and K of 1 or more, or 0 for drafts of the draft head")
        way = cls(name, 0 if size == ROW else int(size),
                  dataclasses.replace(drawing, steps=int(steps)), verified)
        way.sampler.drawing.check()
        return way

    @property
    def mode(self) -> str:
        """That of the likelihood which belongs to it."""
        return CAUSAL if self.size == 1 or self.verified else str(self.size or ROW)

    def write(self, kind: Kind, model: torch.nn.Module, lengths: list[int], seed: int = 0,
              first: int = 0) -> Iterator[Piece]:
        """Stories with the numbers `first`, `first` + 1, ...; only whole rows have `lengths`."""
        numbers = list(range(first, first + len(lengths)))
        if not self.size:
            rows, evaluations = fill_counted(numpy_step(model, self.sampler), [
                blank_story(n - 2) for n in lengths], self.sampler, seed)
            for number, row, count in zip(numbers, rows, evaluations, strict=True):
                yield Piece(number, row[1:], True, int(count))
            return
        starts = [np.array([BOS])] * len(lengths)
        reader = kind.reader(model, self.sampler)
        yield from write_left(reader, starts, self.sampler, self.size, model.config.max_len, seed,
                              numbers, reader if self.verified else None)


@dataclass
class Written:
    """What a way wrote, and how much it took."""

    rows: list[np.ndarray]
    evaluations: int
    pieces: int
    seconds: float
    cpu_seconds: float
    first_seconds: float  # until the first text

    @property
    def tokens(self) -> int:
        return sum(len(row) - 1 for row in self.rows)


def written(way: Way, kind: Kind, model: torch.nn.Module, lengths: list[int], seed: int,
            first: int = 0) -> Written:
    rows: list[list[np.ndarray]] = [[np.array([BOS])] for _ in lengths]
    evaluations = pieces = 0
    started, cpu, at_first = time.perf_counter(), time.process_time(), 0.0
    for piece in way.write(kind, model, lengths, seed, first):
        at_first = at_first or time.perf_counter() - started
        rows[piece.row - first].append(piece.tokens)
        evaluations, pieces = evaluations + piece.evaluations, pieces + 1
    return Written([np.concatenate(row) for row in rows], evaluations, pieces,
                   time.perf_counter() - started, time.process_time() - cpu, at_first)


def measure(config: BlocksConfig, arms: dict[str, tuple[Way, Kind, torch.nn.Module]],
            rows: TokenRows, tokenizer, judge: Judge | None) -> list[dict]:
    """One entry for every way."""
    lengths = [n + 2 for n in drawn_lengths(rows.meta["length_histogram"], config.num_samples,
                                            config.seed, rows.meta["seq_len"])]
    known, lines = {}, []
    for name, (way, kind, model) in tqdm(arms.items(), desc="writing", leave=False, disable=None):
        if (key := (kind.name, way.mode)) not in known:
            known[key] = likelihood(config, way, kind, model, rows, tokenizer)
        together = BATCH if way.size else len(lengths)  # `fill` makes batches of its own
        batches = [written(way, kind, model, lengths[i:i + together], config.seed, i)
                   for i in range(0, len(lengths), together)]
        stories = [row for batch in batches for row in batch.rows]
        tokens = sum(batch.tokens for batch in batches)
        lines.append({"way": name, "size": way.size, "steps": way.sampler.steps,
                      "verified": way.verified, **known[key],
                      **figures([ended(row) for row in stories], tokenizer, judge),
                      **(judge.with_error([ended(row) for row in stories]) if judge else {}),
                      "evaluations_per_token": sum(b.evaluations for b in batches) / tokens,
                      "tokens_per_piece": tokens / sum(b.pieces for b in batches)})
    timed(config, arms, lines, lengths)
    return lines


def ended(row: np.ndarray) -> np.ndarray:
    """A row as the figures of quality.py take it, with [EOS] also where the longest row ended it.
    """
    return row if row[-1] == EOS else np.append(row[:-1], EOS)


def likelihood(config: BlocksConfig, way: Way, kind: Kind, model: torch.nn.Module,
               rows: TokenRows, tokenizer) -> dict:
    """Bits/byte of the way's mode on the held-out rows."""
    kind = kind.in_mode(way.mode) if kind.modes else kind
    chosen = evenly_spread(config.max_rows or len(rows), len(rows))
    batches = bucket_batches(rows.lengths, 8192, chosen, merge=False)
    bound = kind.nelbo(model, map(rows.batch, batches), config.seed, config.draws, numbers=batches)
    scored = [rows[i] for i in chosen]
    text_bytes = int(token_bytes(tokenizer)[np.concatenate(scored)].sum())
    return {"bits_per_byte": bound.bits_per_byte(kind.extra_nats(rows.meta, scored), text_bytes),
            "nats_per_token": bound.nats_per_token, "nats_standard_error": bound.standard_error,
            "exact": kind.exact}


def timed(config: BlocksConfig, arms: dict, lines: list[dict], lengths: list[int]) -> None:
    """Adds tokens per CPU-second and seconds a story, with one story and with several: the best of
    some rounds in which every way has its turn."""
    for count in dict.fromkeys((1, config.batch)):
        some = lengths[:count]
        best: dict[str, list[Written]] = {name: [] for name in arms}
        for _ in range(config.repeats):
            for name, (way, kind, model) in arms.items():
                best[name].append(written(way, kind, model, some, config.seed))
        for line in lines:
            runs = best[line["way"]]
            line[f"batch_{count}"] = {
                "tokens_per_cpu_second": max(run.tokens / run.cpu_seconds for run in runs),
                "seconds_per_token": min(run.seconds / run.tokens for run in runs),
                "seconds_to_first_text": min(run.first_seconds for run in runs),
                "tokens": runs[0].tokens}
    for line in lines:
        way, kind, model = arms[line["way"]]
        size = model.config
        line["cache_bytes_per_token"] = (
            2 * size.layers * size.width * model.compute_dtype.itemsize if way.size else 0)


COLUMNS = (("bits/byte", "bits_per_byte", ".3f"), ("gen. ppl", "generative_perplexity", ".1f"),
           ("±", "perplexity_error", ".1f"), ("entropy", "unigram_entropy", ".3f"),
           ("self-BLEU", "self_bleu", ".1f"), *COHERENCE,
           ("tokens/story", "tokens_per_story", ".0f"),
           ("ev./token", "evaluations_per_token", ".2f"),
           ("tokens a piece", "tokens_per_piece", ".2f"))
SPEEDS = (("tokens/CPU-s", "tokens_per_cpu_second", ".0f"), ("ms a token", "seconds_per_token",
          "ms"), ("first text, ms", "seconds_to_first_text", "ms"))


def table(result: dict) -> str:
    """Markdown, the real stories first."""
    counts = list(dict.fromkeys((1, result["config"]["batch"])))
    speeds = [(f"{name} at {count}", f"batch_{count}", key, form)
              for count in counts for name, key, form in SPEEDS]
    heads = ["way", *(name for name, *_ in COLUMNS), *(name for name, *_ in speeds)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for line in [{"way": "real stories"} | result["data"], *result["ways"]]:
        cells = [line["way"]]
        cells += ["" if line.get(key) is None else format(line[key], form)
                  for _, key, form in COLUMNS]
        for _, batch, key, form in speeds:
            value = line.get(batch, {}).get(key)
            cells.append("" if value is None else f"{1e3 * value:.1f}" if form == "ms"
                         else format(value, form))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """What a way gives (generative perplexity, or bits/byte without a judge) against how fast it
    writes one story."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    judged = result["data"]["generative_perplexity"] is not None
    key, title = (("generative_perplexity", "generative perplexity (lower is better)") if judged
                  else ("bits_per_byte", "bits/byte (lower is better)"))
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    sorts = {"in blocks": lambda w: w["size"] > 1 and not w["verified"],
             "verified drafts": lambda w: w["verified"], "whole rows": lambda w: not w["size"],
             "token by token": lambda w: w["size"] == 1}
    for label, of_sort in sorts.items():
        points = [way for way in result["ways"] if of_sort(way)]
        axis.plot([way["batch_1"]["tokens_per_cpu_second"] for way in points],
                  [way[key] for way in points], "o", label=label)
        for way in points:
            axis.annotate(way["way"], (way["batch_1"]["tokens_per_cpu_second"], way[key]),
                          fontsize=8, xytext=(4, 3), textcoords="offset points")
    if judged:
        axis.axhline(result["data"][key], color="black", linestyle=":", label="real stories")
    axis.set_xlabel("tokens per CPU-second, one story at a time")
    axis.set_ylabel(title)
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def beside(target: Path) -> Path:
    """Where the plot goes."""
    return target.with_name("block_tradeoff.png")


def measure_and_write(config: BlocksConfig, path: Path, checkpoint: dict, target: Path) -> None:
    model, rows, tokenizer = open_model(config, path, checkpoint)
    headed = [name for name in config.ways if name.endswith("/0")] if model.draft is None else []
    require(not headed or config.ways == list(WAYS), f"--ways {' '.join(map(repr, headed))}: "
            f"{path} has no draft head; train one (train.py --objective draft), or leave them out")
    config = dataclasses.replace(config, ways=[name for name in config.ways if name not in headed])
    twin, judge = (open_beside(name, Autoregressive.name, model, rows)
                   for name in (config.twin, config.judge))
    judged_by = config.judge and os.path.realpath(config.judge)
    require(judged_by is None or judged_by not in (os.path.realpath(path), os.path.realpath(
        config.twin or "")), f"--judge {config.judge}: must not be a model that writes here; train "
                             "another twin, with another --seed")
    arms = {name: (Way.read(name, config), *((Autoregressive(), twin) if name == TWIN else
                                             (kind_of(checkpoint), model)))
            for name in config.ways}
    real = [rows[i].astype(np.int64)
            for i in choose_stories(rows, config.num_samples, config.seed)]
    judging = judge and Judge(judge, real)
    data = figures(real, tokenizer, judging) | (judging.with_error(real) if judging else {})
    result = {"checkpoint": str(path), "split": rows.split, "stories": config.num_samples,
              "config": dataclasses.asdict(config), "threads": torch.get_num_threads(),
              "generative_perplexity_is": PERPLEXITY, "data": data,
              "ways": measure(config, arms, rows, tokenizer, judging)}
    write_json(target, result)
    plot(result, beside(target))
    print(f"{config.num_samples} stories each, temperature {config.temperature:g}, top_k "
          f"{config.top_k}, top_p {config.top_p:g}, seed {config.seed}, {config.precision}, "
          f"{torch.get_num_threads()} threads\n\n{table(result)}\n\n"
          f"gen. ppl: {PERPLEXITY}\n\nwrote {target}")


def main(argv: list[str]) -> None:
    config, _ = parse(BlocksConfig, __doc__, argv)
    config.check()
    path, checkpoint = find_measurable(config.checkpoint, lambda kind: (
        "" if kind.from_left and kind.unmasks and not kind.conditional else
        "it does not write in blocks; train one with --objective joint"))
    measure_and_write(config, path, checkpoint,
                      output_file(config.output, path, "blocks.json", beside))
