"""Stage 4: how good a checkpoint is, in numbers.

    python evaluate.py --checkpoint checkpoints/best.pt --data_dir data
    python evaluate.py --checkpoint checkpoints/best.pt --sampling --twin checkpoints_ar/best.pt
    python evaluate.py --checkpoint checkpoints/best.pt --infilling --twin checkpoints_ar/best.pt
    python evaluate.py --checkpoint conditional/best.pt --twin checkpoints_ar/best.pt

What was chosen (the best checkpoint, learning rates, presets) was chosen on the validation split;
what is reported here comes from the test split, where the data folder has one. The protocol names
the split.

Prints a table and writes evaluation.json beside the checkpoint:
- the likelihood bound (NELBO) of held-out stories in bits/byte, nats/token and perplexity, with
  its standard error, and masked cross-entropy and accuracy by mask ratio
- distinct-1/2/3, self-BLEU and unigram entropy of samples, and the share of their 8-grams and
  16-grams (of tokens) that stand in the training text, beside those of real stories
With --sampling it compares the samplers instead, at each number of network evaluations: a table,
sampling.json and sampling_pareto.png (see quality.py). With --infilling it fills in the middle
sentence of real stories: exact match, BLEU, nats/token with the paired difference from the twin,
and infilling.json. It shows its progress;
--num_samples makes it shorter, and --max_rows the scoring. The autoregressive twin is scored on the
same bytes, exactly: its "NELBO" is the negative log-likelihood.
Of a model with a condition it tells what the condition is worth, at every guidance (see
conditioning.py), and writes a sheet of ten texts, evaluation.md.
"""

from cli import atomic_file, check_writable, flag, parse, require, run

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import conditioning
import quality
from autoregressive import Autoregressive, write_stories
from data_prep import (
    MASK,
    TokenRows,
    bucket_batches,
    content_hashes,
    decode,
    evenly_spread,
    load_meta,
    row_kind,
    token_bytes,
)
from diffusion import DiscreteDiffusion, Nelbo, numpy_step, ratio_error
from model import (
    PRECISIONS,
    check_conditions,
    check_tokenizer,
    device_of,
    find_checkpoint,
    load_checkpoint,
    model_from_checkpoint,
    pick_device,
    pick_precision,
    tokenizer_from_checkpoint,
)
from quality import diversity
from sampler import MAX_STEPS, Sampler, blank_story, fill

SPLITS = ("test", "val", "train")


@dataclass(frozen=True)
class EvaluateConfig(Sampler):
    checkpoint: str | None = flag(None, "checkpoint to use (default: the newest */best.pt)")
    data_dir: str | None = flag(None, "data folder with the held-out stories (default: the one "
                                      "that the checkpoint was trained on)")
    split: str | None = flag(None, "test, val or train (default: test where the data folder has "
                                   "it, else val)", SPLITS)
    max_rows: int | None = flag(None, "score only so many rows, evenly spread over the "
                                     "split")
    draws: int = flag(4, "masks drawn for every row")
    num_samples: int = flag(64, "stories generated and compared with as many real ones, 0 for none")
    sampling: bool = flag(False, "compare samplers instead")
    infilling: bool = flag(False, "fill in the middle sentence of real stories instead")
    twin: str | None = flag(None, "checkpoint of an autoregressive twin: the judge of --sampling, "
                                  "the other side of --infilling; the judge of a model "
                                  "with a condition")
    samplers: list[str] = flag(list(quality.SAMPLERS), "which to compare")
    evaluations: list[int] = flag(list(quality.EVALUATIONS), "network evaluations to compare at")
    guidances: list[float] = flag([0.0, 1.0, 1.5, 2.0, 3.0], "a model with a condition: the "
                                                             "guidances to compare")
    plain: str | None = flag(None, "its other side: the checkpoint that gets the condition as a "
                                   "prompt (default: the model itself, without its condition)")
    seed: int = flag(0, "seed of masks and stories")
    output: str | None = flag(None, "file to write (default: evaluation.json, sampling.json or "
                                    "infilling.json by the checkpoint)")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("auto", "auto, fp32, bf16 or fp16", ("auto", *PRECISIONS))

    def check(self) -> None:
        super().check()
        for name in ("max_rows", "draws"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} {value}: must be at least 1")
        for name in ("num_samples", "seed"):
            require(0 <= getattr(self, name) < 2**63,
                    f"--{name} {getattr(self, name)}: must be 0 or more")
        require(self.num_samples != 1, "--num_samples 1: self-BLEU needs at least 2 stories")
        other = self.sampling or self.infilling
        require(not (self.sampling and self.infilling), "--sampling and --infilling: choose one")
        require(all(math.isfinite(value) and value >= 0 for value in self.guidances),
                "--guidances: must be 0 or more")
        require(self.num_samples or not other, "--sampling and --infilling compare stories: give "
                                               "--num_samples 2 or more")
        for name in self.samplers:
            require(name in quality.SAMPLERS, f"--samplers {name!r}: choose from "
                                              + ", ".join(map(repr, quality.SAMPLERS)))
        require(1 <= min(self.evaluations) and max(self.evaluations) <= MAX_STEPS,
                f"--evaluations: must be from 1 to {MAX_STEPS}")


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


def compare_samples(config: EvaluateConfig, model: torch.nn.Module, rows: TokenRows,
                    stories: np.ndarray, tokenizer) -> dict:
    """Diversity of generated stories and of the real `stories` (row numbers), of equal lengths
    (but for the twin's, which end where it ends them), and how much of them stands in the training
    text."""
    real = [rows[i] for i in stories]
    if model.config.causal:
        made = write_stories(model, len(real), model.config.max_len, config, config.seed)
    else:
        made = fill(numpy_step(model, config), [blank_story(len(row) - 2) for row in real], config,
                    config.seed)
    groups = [quality.text_ids(group) for group in (made, real)]
    overlaps = quality.train_overlap(groups, TokenRows(rows.data_dir, "train"))
    return {name: diversity([decode(tokenizer, row) for row in ids], ids) | overlap
            for name, ids, overlap in zip(("samples", "data"), groups, overlaps, strict=True)}


def choose_stories(config: EvaluateConfig, rows: TokenRows) -> np.ndarray:
    """Numbers of the rows to compare samples with: whole stories, at most `num_samples`."""
    if not config.num_samples:
        return np.zeros(0, np.int64)  # and the split need not be read through
    whole = [i for i in range(len(rows)) if row_kind(rows[i]) == "story"]
    if len(whole) < config.num_samples:
        print(f"only {len(whole)} stories of {rows.split} fit into one row: comparing with those")
    return np.random.default_rng(config.seed).permutation(whole)[:config.num_samples]


def reported_split(meta: dict) -> str:
    """The split that figures come from unless another is asked for: nothing is chosen on "test".
    """
    return "test" if meta["splits"].get("test", {}).get("shards") else "val"


def open_rows(data_dir: str, split: str | None) -> TokenRows:
    meta = load_meta(data_dir)
    split = split or reported_split(meta)
    require(split in meta["splits"], f"--split {split}: {data_dir} has no such split, only "
            f"{', '.join(name for name in SPLITS if name in meta['splits'])}")
    return TokenRows(data_dir, split)


def warn_of_other_rows(path: str | Path, checkpoint: dict, rows: TokenRows) -> None:
    """Says on stderr that a model was trained on other rows than those of this folder's training
    split: what is held out here may have been trained on. Rows and pairs are not compared: they
    differ where the stories are the same."""
    known, here = checkpoint.get("data"), content_hashes(rows.meta)
    if known and known["train"] != here["train"] and (
            "train_condition" in known) == ("train_condition" in here):
        print(f"warning: {path} was trained on other rows than the training split of "
              f"{rows.data_dir}: stories of its {rows.split} split may be among them",
              file=sys.stderr)


def open_model(config: EvaluateConfig, path: Path, checkpoint: dict) -> tuple:
    """The model of a checkpoint, the rows that it is evaluated on, and its tokenizer."""
    data_dir = config.data_dir or checkpoint.get("train_config", {}).get("data_dir", "data")
    rows = open_rows(data_dir, config.split)
    check_tokenizer(path, checkpoint, data_dir, rows.meta)
    warn_of_other_rows(path, checkpoint, rows)
    device = pick_device(config.device)
    precision = pick_precision(device, config.precision)
    model = model_from_checkpoint(checkpoint).to(device).set_precision(precision).for_inference()
    if model.kind == "conditional":
        check_conditions(path, model.encoder.config, rows.conditions())
    longest = int(rows.lengths.max())
    require(longest <= model.config.max_len, f"{data_dir} has rows of {longest} tokens, {path} was "
            f"trained on rows of at most {model.config.max_len}")
    return model, rows, tokenizer_from_checkpoint(checkpoint)


def evaluate(config: EvaluateConfig, path: Path, checkpoint: dict) -> dict:
    """Everything that evaluation.json holds, for the checkpoint that was read from `path`."""
    model, rows, tokenizer = open_model(config, path, checkpoint)
    precision = {value: key for key, value in PRECISIONS.items()}[model.compute_dtype]
    stories = choose_stories(config, rows)
    chosen = evenly_spread(config.max_rows or len(rows), len(rows))
    batches = bucket_batches(rows.lengths, 8192, chosen, merge=False)
    bar = tqdm(batches, desc="scoring", unit=" batches", leave=False, disable=None)
    process = Autoregressive() if model.config.causal else DiscreteDiffusion()
    bound = process.nelbo(model, map(rows.batch, bar), config.seed, config.draws, numbers=batches)
    how = ("exact likelihood, left to right, [EOS] predicted" if model.config.causal else
           f"any-order NELBO, mask count stratified over 1..n, {config.draws} masks a row")
    scored = [rows[i] for i in chosen]
    weights = "EMA weights" if checkpoint.get("ema") is not None else "last weights"
    result = {
        "checkpoint": str(path), "kind": checkpoint["kind"], "step": checkpoint.get("step"),
        "tokens_seen": checkpoint.get("tokens_seen"), "data": rows.meta["source"],
        "split": rows.split,
        "protocol": f"{how}, {len(chosen)} rows of {rows.split}, seed {config.seed}, "
                    f"{precision}, {weights}; bits/byte include the code of the row lengths, "
                    "nats/token and perplexity do not",
        "likelihood": likelihood(bound, scored, process.extra_nats(rows.meta, scored),
                                 token_bytes(tokenizer)),
        "masked_ce": bound.masked_ce, "masked_accuracy": bound.masked_accuracy,
        "config": dataclasses.asdict(config)}
    if not model.config.causal:
        result.update(averages_over_t=bound.averages(), curve=bound.curve())
    if len(stories) > 1:
        result["diversity"] = compare_samples(config, model, rows, stories, tokenizer)
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
              **quality.measure(model, config, real, tokenizer, twin and quality.Judge(twin),
                                config.seed, config.samplers, TokenRows(rows.data_dir, "train"),
                                tuple(config.evaluations))}
    with atomic_file(target, "w") as file:
        json.dump(result, file, indent=1)
    quality.plot(result, plot_beside(target))
    print(f"{len(real)} stories of the lengths of real ones of {rows.split}, temperature "
          f"{config.temperature:g}, top_k {config.top_k}, top_p {config.top_p:g}, seed "
          f"{config.seed}\n\n"
          f"{quality.table(result)}\n\n{quality.NOTE}\n\nwrote {target}")


def plot_beside(target: Path) -> Path:
    return target.with_name(target.stem + "_pareto.png")


def open_beside(config: EvaluateConfig, path: str | None, kind: str, model: torch.nn.Module,
                rows: TokenRows) -> torch.nn.Module | None:
    """The model of another checkpoint, on the device and in the precision of `model`; None without
    a path."""
    if path is None:
        return None
    checkpoint = load_checkpoint(path, kind=kind)
    check_tokenizer(path, checkpoint, rows.data_dir, rows.meta)
    warn_of_other_rows(path, checkpoint, rows)
    beside = model_from_checkpoint(checkpoint).to(device_of(model))
    require(beside.config.max_len >= model.config.max_len, f"{path} was trained on rows of at most "
            f"{beside.config.max_len} tokens, this model on up to {model.config.max_len}")
    beside.compute_dtype = model.compute_dtype
    return beside.for_inference()


def compare_infilling(config: EvaluateConfig, path: Path, checkpoint: dict, target: Path) -> None:
    """The middle sentence of real stories, filled in by this model and by the twin."""
    model, rows, tokenizer = open_model(config, path, checkpoint)
    twin = open_beside(config, config.twin, "autoregressive", model, rows)
    stories = [rows[i].astype(np.int64) for i in choose_stories(config, rows)]
    pairs = [(row, gap) for row in stories
             if (gap := quality.hide_middle(row, tokenizer)) is not None]
    require(pairs, f"{rows.data_dir}: no story of three sentences or more to hide one of")
    arms = {"this model": model} | ({"left to right": twin} if twin else {})
    result = {"checkpoint": str(path), "twin": config.twin, "stories": len(pairs),
              "split": rows.split,
              "config": dataclasses.asdict(config),
              "arms": {name: quality.infilling(arm, *map(list, zip(*pairs, strict=True)), config,
                                               tokenizer, config.draws, config.seed)
                       for name, arm in arms.items()}}
    tokens = [int((gap == MASK).sum()) for _, gap in pairs]
    result["story_tokens"] = tokens
    if twin:
        mine, other = (np.array(arm["story_nats"]) for arm in result["arms"].values())
        result["difference"] = {  # story by story: a long one costs both much
            "nats_per_token": float((mine - other).sum() / sum(tokens)),
            "standard_error": ratio_error(mine - other, np.array(tokens))}
    with atomic_file(target, "w") as file:
        json.dump(result, file, indent=1)
    print(f"the middle sentence of {len(pairs)} stories of {rows.split}, {sum(tokens)} tokens, "
          f"temperature {config.temperature:g}, {config.steps} steps, seed {config.seed}\n\n"
          f"{'':15s}{'exact match':>12s}{'BLEU':>8s}{'nats/token':>12s}")
    for name, arm in result["arms"].items():
        print(f"{name:15s}{arm['exact_match']:12.1%}{arm['bleu']:8.2f}"
              f"{arm['nats_per_token']:12.3f} ± {arm['standard_error']:.3f}")
    if twin:
        print("\nthis model (a bound) less left to right (exact), story by story: "
              f"{result['difference']['nats_per_token']:+.3f} ± "
              f"{result['difference']['standard_error']:.3f} nats/token")
    print(f"\nwrote {target}")


def evaluate_conditional(config: EvaluateConfig, path: Path, checkpoint: dict, target: Path,
                         ) -> None:
    """What the condition is worth; writes `target` and a sheet of texts beside it."""
    require(target.suffix != ".md", f"--output {target}: the sheet of texts gets that name; use "
                                    ".json")
    require(config.max_rows != 1, "--max_rows 1: a condition is compared with that of another row")
    model, rows, tokenizer = open_model(config, path, checkpoint)
    twin, plain = (open_beside(config, name, kind, model, rows) for name, kind in (
        (config.twin, "autoregressive"), (config.plain, "diffusion")))
    plain = plain or model
    pairs = conditioning.Pairs(rows, tokenizer, model.config.max_len)
    likelihoods, scored = condition_likelihood(config, model, rows, tokenizer, pairs, plain, twin)
    told = pairs.some(np.random.default_rng(config.seed).permutation(len(pairs))
                      [:config.num_samples])
    result = {"checkpoint": str(path), "kind": checkpoint["kind"], "step": checkpoint.get("step"),
              "data": rows.meta["source"], "split": rows.split, "texts": scored,
              "stories": len(told), "plain": config.plain, "judge": config.twin,
              "config": dataclasses.asdict(config), **likelihoods,
              "generative_perplexity_is": quality.PERPLEXITY, "generation": {}}
    if len(told):
        train = TokenRows(rows.data_dir, "train")
        wanted = conditioning.training_words(train, tokenizer)
        result["generation"], texts = conditioning.generation(
            model, told, config, config.guidances, tokenizer, wanted, twin, config.seed, plain,
            train)
        with atomic_file(target.with_suffix(".md"), "w") as file:
            file.write(conditioning.sheet([decode(tokenizer, ids) for ids in told.told], texts))
    with atomic_file(target, "w") as file:
        json.dump(result, file, indent=1)
    print(f"{path}, step {result['step']}; {scored} texts of {rows.split} of one row with a "
          f"condition, {config.draws} masks each; {len(told)} stories, {config.steps} steps, "
          f"temperature {config.temperature:g}, top_p {config.top_p:g}, seed {config.seed}\n\n"
          f"{conditioning.tables(result)}\n\nwrote {target}")


def condition_likelihood(config: EvaluateConfig, model: torch.nn.Module, rows: TokenRows, tokenizer,
                         pairs: conditioning.Pairs, plain: torch.nn.Module,
                         twin: torch.nn.Module | None) -> tuple[dict, int]:
    """The bound in every arm and by reader, and how many texts were scored: those that also fit
    into a row with the condition of another."""
    chosen = pairs.some(evenly_spread(config.max_rows or len(pairs), len(pairs)))
    misled = chosen.shuffled(config.seed)
    fit = [i for i, row in enumerate(misled.prompted) if len(row) <= model.config.max_len]
    require(len(fit) > 1, f"{rows.data_dir}: no two texts fit into a row with a condition")
    scored, misled = chosen.some(fit), misled.some(fit)
    bounds = conditioning.bounds(model, scored, config.draws, config.seed, plain, misled)
    bounds |= conditioning.prompt_bounds(scored, misled, config.draws, config.seed, plain, twin)
    arms, sizes = {}, token_bytes(tokenizer)
    for name, bound in bounds.items():
        family = Autoregressive() if name.endswith("twin") else DiscreteDiffusion()
        numbers = likelihood(bound, scored.texts, family.extra_nats(rows.meta, scored.texts), sizes)
        arms[name] = {"nats_per_token": bound.nats_per_token,
                      "standard_error": bound.standard_error,
                      "bits_per_byte": numbers["bits_per_byte"]}
        if name != "its own condition":
            own = bounds[conditioning.OWN.get(name, "its own condition")]
            arms[name] |= dict(zip(("gain", "gain_standard_error"), conditioning.gain(own, bound),
                                   strict=True))
    return {"likelihood": arms, "readers": conditioning.compare_readers(bounds),
            "better_way": conditioning.better_way(bounds)}, len(scored)


def check_used(config: EvaluateConfig, kind: str, given: set[str]) -> None:
    """Refuses flags that were given and would change nothing."""
    drawing = {"temperature", "top_k", "top_p"}
    sampler = {field.name for field in dataclasses.fields(Sampler)} - drawing
    compared, told = {"samplers", "evaluations"}, {"guidance", "guidances", "plain"}
    if kind == "conditional":
        unused = compared | {"sampling", "infilling", "guidance"}
        why = "for a model with a condition"
    else:
        unused, why = ((sampler | {"draws", "max_rows"}, "with --sampling") if config.sampling else
                       (compared | {"max_rows"}, "with --infilling") if config.infilling else
                       (compared, "without --sampling"))
        require(not told & given, f"--{' --'.join(sorted(told & given))}: without effect for a "
                                  "model without a condition; leave it out")
    if kind == "autoregressive":
        unused, why = unused | sampler | {"draws"}, "for an autoregressive model"
    unused = sorted(unused & given)
    require(not unused, f"--{' --'.join(unused)}: without effect {why}; leave it out")
    require(config.twin is None or config.sampling or config.infilling or kind == "conditional",
            "--twin is for --sampling and --infilling, and for models with a condition")
    if kind != "autoregressive":
        config.check_used(given)


def write(config: EvaluateConfig, path: Path, checkpoint: dict, target: Path) -> None:
    """Evaluates the checkpoint read from `path`, writes `target` and prints the table."""
    result = evaluate(config, path, checkpoint)
    with atomic_file(target, "w") as file:
        json.dump(result, file, indent=1)
    report(result)
    print(f"\nwrote {target}")


def main(argv: list[str] | None = None) -> None:
    config, given = parse(EvaluateConfig, __doc__, argv)
    config.check()
    path = find_checkpoint(config.checkpoint, "diffusion" if config.sampling else (
        "diffusion", "autoregressive") if config.infilling else None)
    checkpoint = load_checkpoint(path, kind=None)
    check_used(config, checkpoint["kind"], given)
    name, do = (("sampling.json", compare_samplers) if config.sampling else
                ("infilling.json", compare_infilling) if config.infilling else
                ("evaluation.json", evaluate_conditional) if checkpoint["kind"] == "conditional"
                else
                ("evaluation.json", write))
    target = Path(config.output) if config.output else path.parent / name
    require(target.parent.is_dir() and not target.is_dir(),
            f"--output {target}: name a file in a folder that exists")
    beside = (plot_beside(target) if config.sampling else
              target.with_suffix(".md") if checkpoint["kind"] == "conditional" else target)
    require(not beside.is_dir(), f"--output {target}: {beside}, which is written too, is a folder; "
                                 "name another file")
    check_writable(target.parent, "--output")
    do(config, path, checkpoint, target)


if __name__ == "__main__":
    run(main)
