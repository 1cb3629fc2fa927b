"""Stage 3: stories from a checkpoint.

    python generate.py --checkpoint checkpoints/best.pt --num_samples 5 --temperature 0.8
    python generate.py --prompt "Once upon a time" --length 120
    python generate.py --infill "Tom had a [MASK:6] and he was happy." --show_steps
    python generate.py --num_samples 100 --json > stories.jsonl
    python generate.py --num_samples 1 --steps 32 --trace story.html
    python generate.py --checkpoint conditional/best.pt --condition "Lily found a shiny key."
    python generate.py --checkpoint conditional/best.pt --conditions first_sentences.txt --json
    python generate.py --onnx jetson_bundle/step_int8.onnx --preset fast        # without torch
    python generate.py --engine step_fp16.engine --preset fast                  # on the Jetson

Starts from a row of [MASK] and uncovers it step by step. `[MASK:n]` in --infill hides n tokens
(a token is about four letters); the space before a gap belongs to it. Prints the stories and the
speed; with --json one JSON object a line, and the speed on stderr. Three stories in 64 steps with
the small model take about 10 s on 2 CPU cores in FP32.

A model with a condition (train.py --stage 2) goes on from the sentence that it is given;
--conditions reads one a line of a .txt file, or the key "condition" of a .jsonl file. Without one
the network is that of before stage 2; the lengths drawn are those of the texts that follow a
condition.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from cli import UserError, check_writable, flag, parse, preset, require, run
from data_prep import BOS, EOS, MASK, decode
from sampler import PRESETS, Sampler, Step, blank_story, condition_row, draw_length, unmask_rows
from sources import read_json_lines
from viewer import TRACE_FORMATS, Trace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GAP = re.compile(r"\[MASK(?::([^\]]*))?\]")


@dataclass(frozen=True)
class GenerateConfig(Sampler):
    temperature: float = flag(0.8, "0 is greedy, 1 the model's own distribution")
    checkpoint: str | None = flag(None, "checkpoint to use (default: the newest */best.pt)")
    onnx: str | None = flag(None, "exported step to use instead (of export_jetson.py), in ONNX "
                                  "Runtime")
    engine: str | None = flag(None, "or as a TensorRT engine")
    preset: str | None = flag(None, "a sampler chosen from the README's table: fast, balanced or "
                                    "best; flags beside it change it", tuple(PRESETS))
    num_samples: int = flag(3, "stories to make")
    prompt: str | None = flag(None, "how the story begins; with a condition that is its first "
                                    'sentence, " Then" with the space between them')
    infill: str | None = flag(None, "a text with gaps: [MASK:n] hides n tokens")
    condition: str | None = flag(None, "what the story follows from, for a model of train.py "
                                       "--stage 2 or 3")
    conditions: str | None = flag(None, "file of conditions, .txt (one a line) or .jsonl; "
                                        "--num_samples stories of each (default: one)")
    length: int | None = flag(None, "tokens in the story (default: drawn from the data's lengths)")
    seed: int = flag(0, "the same seed gives the same stories")
    batch_size: int = flag(32, "stories made together; does not change them")
    trace: str | None = flag(None, "file to write: a web page (.html) that plays the unmasking of "
                                   "the stories, or an animation (.gif) of the first")
    show_steps: bool = flag(False, "print the text after every step, hidden tokens as _")
    json: bool = flag(False, "print one JSON object for each story")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("fp32", "fp32, or bf16 or fp16 (faster on a GPU; a story may then depend "
                                  "on its batch)", ("fp32", "bf16", "fp16"))

    def check(self) -> None:
        super().check()
        for name in ("num_samples", "batch_size"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(0 <= self.seed < 2**63, f"--seed {self.seed}: must be 0 or more")
        require(self.length is None or self.length >= 1,
                f"--length {self.length}: must be at least 1")
        require(not (self.infill is not None and (self.prompt is not None or self.length)),
                "--infill fixes the whole row: leave out --prompt and --length")
        require(self.trace is None or Path(self.trace).suffix in TRACE_FORMATS,
                f"--trace {self.trace}: name a file that ends in {' or '.join(TRACE_FORMATS)}")
        require(not (self.trace or "").endswith(".gif") or find_spec("matplotlib"),
                f"--trace {self.trace}: needs matplotlib, which is not here; take .html")
        sources = [name for name in ("checkpoint", "onnx", "engine") if getattr(self, name)]
        require(len(sources) < 2, f"--{' and --'.join(sources)}: give one of them")
        require(self.condition is None or self.conditions is None,
                "--condition and --conditions: give one of them")
        require(self.conditions is None or Path(self.conditions).is_file(),
                f"--conditions {self.conditions}: no such file")
        for name in ("prompt", "infill", "condition"):
            text = getattr(self, name) or ""
            require(text.isascii() or text.encode(errors="replace").decode() == text,
                    f"--{name} is not valid Unicode; check the encoding of the terminal")


    def check_used(self, given: set[str]) -> None:
        super().check_used(given)
        told = self.condition is not None or self.conditions is not None
        require(told or "guidance" not in given, "--guidance belongs to --condition and "
                                                 "--conditions: add one, or leave it out")
        unused = sorted(given & {"device", "precision"}) if self.onnx or self.engine else []
        require(not unused, f"--{' --'.join(unused)}: an exported step has its own; leave it out")


def read_conditions(path: Path) -> list[str]:
    """One a line, or the key "condition" of every line of a .jsonl file."""
    suffix = path.suffix.lower()
    require(suffix in (".txt", ".jsonl"), f"--conditions {path}: use a .txt file, one condition a "
                                          'line, or a .jsonl file with the key "condition"')
    try:
        lines = ([text for text, in read_json_lines(path, ("condition",))]
                 if suffix == ".jsonl" else path.read_text(encoding="utf-8-sig").split("\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
                        ) from error
    conditions = [line.strip() for line in lines if line.strip()]
    require(conditions, f"{path} holds no condition")
    return conditions


def condition_rows(texts: list[str], tokenizer: "Tokenizer", max_len: int) -> np.ndarray:
    """(N, max_len) token ids; says on stderr which conditions are too long and get cut."""
    rows = []
    for text in texts:
        require(text.strip(), "the condition is empty: write a sentence, or leave out --condition")
        ids = tokenizer.encode(text.strip()).ids
        if len(ids) > max_len - 2:
            print(f"a condition of {len(ids)} tokens is cut to the {max_len - 2} that this model "
                  f"reads: {text[:40]!r} ...", file=sys.stderr)
        rows.append(condition_row(ids, max_len))
    return np.stack(rows)


def prompt_row(ids: list[int], length: int) -> np.ndarray:
    """[BOS] prompt, [MASK] up to `length` tokens of text, [EOS]."""
    row = blank_story(length)
    row[1:1 + len(ids)] = ids
    return row


def infill_row(text: str, tokenizer: "Tokenizer", max_len: int) -> np.ndarray:
    """[BOS] text with n times [MASK] for every `[MASK:n]`, [EOS]."""
    row, end = [BOS], 0
    for gap in GAP.finditer(text):
        size = gap[1] if gap[1] is not None else "1"
        require(re.fullmatch(r"[0-9]{1,9}", size) and int(size) > 0,
                f"--infill: {gap[0]} does not say how many tokens to hide; write [MASK:n] with n "
                "of 1 or more")
        require(int(size) <= max_len, f"--infill: {gap[0]} is longer than the model's rows "
                                      f"({max_len} tokens)")
        # In this vocabulary a word carries the space before it: the first hidden token brings it.
        before = text[end:gap.start()].removesuffix(" ")
        row += tokenizer.encode(before).ids + [MASK] * int(size)
        end = gap.end()
    require(end > 0, "--infill has no gap: write [MASK:n] where n tokens are to be filled in")
    row += tokenizer.encode(text[end:]).ids + [EOS]
    require(len(row) <= max_len, f"--infill: the text and its gaps make {len(row)} tokens, this "
                                 f"model's rows have {max_len}; shorten it")
    return np.array(row, dtype=np.int64)


def build_rows(config: GenerateConfig, tokenizer: "Tokenizer", histogram: dict, max_len: int,
               count: int) -> list[np.ndarray]:
    """`count` rows to fill, each (length,) int64 with [MASK] where text is wanted."""
    if config.infill is not None:
        return [infill_row(config.infill, tokenizer, max_len)] * count
    # As in training: no white space around a story, and a word brings the space before it; what
    # follows a first sentence begins with one.
    prompt = (config.prompt or "").rstrip()
    told = config.condition is not None or config.conditions is not None
    ids = tokenizer.encode(prompt if told else prompt.lstrip()).ids
    longest = max_len - 2  # [BOS] and [EOS]
    require(config.length is None or config.length <= longest,
            f"--length {config.length}: this model's rows hold at most {longest} tokens of text")
    require(len(ids) < (config.length or longest), f"--prompt has {len(ids)} tokens and leaves no "
            f"room in a story of {config.length or longest} tokens; shorten it")
    rows = []
    for i in range(count):
        # A prompt longer than every story of the data: continue to the end of the row.
        length = config.length or draw_length(histogram, config.seed, i, len(ids) + 1) or longest
        rows.append(prompt_row(ids, min(length, longest)))
    return rows


def text_with_gaps(tokenizer: "Tokenizer", row: np.ndarray) -> str:
    """The text of a row on one line, with ` _` for every hidden token."""
    pieces, start = [], 0
    for i in [*np.flatnonzero(row == MASK), len(row)]:
        pieces.append(decode(tokenizer, row[start:i]))
        start = i + 1
    return " ".join(" _".join(pieces).split())


def main(argv: list[str] | None = None) -> None:
    config, given = parse(GenerateConfig, __doc__, argv)
    if config.preset:
        config = preset(config, PRESETS[config.preset], given)
    try:
        config.check()
    except UserError as error:
        settings = "".join(f" --{name} {value}" for name, value in PRESETS.get(
            config.preset, {}).items() if name not in given)
        raise UserError(f"{error}" + f" (--preset {config.preset} sets{settings})" * bool(settings)
                        ) from error
    config.check_used(given)
    if config.conditions:
        config = preset(config, {"num_samples": 1}, given)
    texts = (read_conditions(Path(config.conditions)) if config.conditions else
             [config.condition] if config.condition is not None else [])
    if config.trace:
        check_writable(Path(config.trace).parent, "--trace")
    source = open_exported(config, bool(texts)) if config.onnx or config.engine else open_torch(
        config, bool(texts))
    tokenizer = source.tokenizer
    told = np.repeat(condition_rows(texts, tokenizer, source.condition_len),
                     config.num_samples, axis=0) if texts else None
    texts = [text for text in texts for _ in range(config.num_samples)]
    rows = build_rows(config, tokenizer, source.histogram, source.max_len,
                      len(texts) or config.num_samples)
    step = source.step(config, told)
    started = time.perf_counter()
    trace = Trace(tokenizer, rows) if config.trace else None
    filled, row_evaluations, evaluations = generate(
        step, rows, config, tokenizer, trace,
        config.evaluations_per_step if texts else 1)
    seconds = time.perf_counter() - started
    if trace:
        Path(config.trace).parent.mkdir(parents=True, exist_ok=True)
        trace.write(config.trace, f"{max(row_evaluations)} steps, {config.order} order, "
                                  f"{config.pace} pace, temperature {config.temperature:g}")
    show(filled, row_evaluations, config, tokenizer, source.name, texts)
    tokens = sum(int((row == MASK).sum()) for row in rows)
    print(f"{tokens:,} tokens in {len(rows)} stories, {evaluations} network evaluations, "
          f"{seconds:.2f} s: {tokens / seconds:.1f} tokens/s",
          file=sys.stderr if config.json else sys.stdout)


class Source(NamedTuple):
    """What tells the stories: a checkpoint or an exported step."""

    name: str
    tokenizer: "Tokenizer"
    histogram: dict  # of lengths
    max_len: int
    condition_len: int | None
    step: Callable[[Sampler, np.ndarray | None], Step]


def open_torch(config: GenerateConfig, told: bool) -> Source:
    from diffusion import numpy_step
    from model import (
        find_checkpoint,
        load_checkpoint,
        model_from_checkpoint,
        pick_device,
        tokenizer_from_checkpoint,
    )
    path = find_checkpoint(config.checkpoint,
                           "conditional" if told else ("diffusion", "conditional"))
    device = pick_device(config.device)
    checkpoint = load_checkpoint(path, kind="conditional" if told else
                                 ("diffusion", "conditional"))
    model = model_from_checkpoint(checkpoint).to(device).set_precision(config.precision)
    model.for_inference()
    return Source(str(path), tokenizer_from_checkpoint(checkpoint),
                  checkpoint["length_histogram"], model.config.max_len,
                  model.encoder.config.max_len if told else None,
                  lambda sampler, conditions: numpy_step(model, sampler, conditions))


def open_exported(config: GenerateConfig, told: bool) -> Source:
    """No torch is imported on this way."""
    from engine_runtime import Bundle
    path = config.onnx or config.engine
    suffix = ".onnx" if config.onnx else ".engine"
    require(Path(path).suffix == suffix, f"--{suffix[1:]} {path}: name a file that ends in "
                                         f"{suffix}")
    bundle = Bundle(path)
    require(not told or bundle.kind == "conditional", f"{path}: {bundle.kind} model; what is "
            "needed here is of the kind: conditional model")
    bundle.check(config, told)
    return Source(path, bundle.tokenizer, bundle.contents["length_histogram"], bundle.max_len,
                  bundle.condition_len, bundle.step)


def generate(step: Step, rows: list[np.ndarray], config: GenerateConfig, tokenizer: "Tokenizer",
             trace: Trace | None = None, each: int = 1,
             ) -> tuple[list[np.ndarray], list[int], int]:
    """Fills the rows; a step takes `each` network evaluations.

    Returns: the filled rows, in order; how many network evaluations each of them took; and the
        network evaluations of all batches together.
    """
    filled, row_evaluations, evaluations = list(rows), [0] * len(rows), 0
    states = unmask_rows(step, rows, config, config.seed, config.batch_size)
    hide_bar = True if config.show_steps else None  # None: hidden where there is no terminal
    for part, state in tqdm(states, desc="unmasking", unit=" steps", leave=False, disable=hide_bar):
        evaluations += each * (state.nfe > 0)
        if trace:
            trace.add(part, state)
        for i, tokens, evaluated in zip(part, state.tokens, state.evaluated, strict=True):
            filled[i] = tokens[:len(rows[i])]
            row_evaluations[i] += each * bool(evaluated)
            if config.show_steps:
                # on stderr beside --json, whose lines must stay parseable
                print(f"[story {i + 1}, step {state.step}] {text_with_gaps(tokenizer, filled[i])}",
                      file=sys.stderr if config.json else sys.stdout)
    return filled, row_evaluations, evaluations


def show(filled: list[np.ndarray], row_evaluations: list[int], config: GenerateConfig,
         tokenizer: "Tokenizer", checkpoint: str, conditions: list[str]) -> None:
    for i, row in enumerate(filled):
        text = decode(tokenizer, row)
        if config.json:
            told = {"condition": conditions[i], "guidance": config.guidance} if conditions else {}
            print(json.dumps({**told, "text": text, "tokens": row.tolist(),
                              "nfe": row_evaluations[i], "seed": config.seed, "row": i,
                              "checkpoint": checkpoint}, ensure_ascii=False))
        else:
            if conditions:  # a text that is the rest of a story brings its space
                text = conditions[i] + (text if text[:1].isspace() else f"\n{text}")
            print(f"--- {i + 1} ---\n{text}\n")


if __name__ == "__main__":
    run(main)
