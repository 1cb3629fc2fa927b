"""Stage 3: stories from a checkpoint.

    python generate.py --checkpoint checkpoints/best.pt --num_samples 5 --temperature 0.8
    python generate.py --prompt "Once upon a time" --length 120
    python generate.py --infill "Tom had a [MASK:6] and he was happy." --show_steps
    python generate.py --num_samples 100 --json > stories.jsonl
    python generate.py --num_samples 1 --steps 32 --trace story.html
    python generate.py --checkpoint conditional/best.pt --condition "Lily found a shiny key."
    python generate.py --checkpoint conditional/best.pt --conditions first_sentences.txt --json
    python generate.py --checkpoint checkpoints_joint/best.pt --block_size 4 --steps 4 --stream
    python generate.py --checkpoint checkpoints_joint/best.pt --verify --length 1000 --stream
    python generate.py --checkpoint checkpoints_joint/best.pt --verify --steps 1 --stream
    python generate.py --checkpoint checkpoints_joint/best.pt --verify --verify_with twin/best.pt
    python generate.py --checkpoint checkpoints_ar/best.pt --stream             # the twin
    python generate.py --onnx jetson_bundle/step_int8.onnx --preset fast        # without torch
    python generate.py --onnx jetson_bundle/cached_fp16.onnx --verify --stream  # a joint model
    python generate.py --engine step_fp16.engine --preset fast                  # on the Jetson

Starts from a row of [MASK] and uncovers it step by step. `[MASK:n]` in --infill hides n tokens
(a token is about four letters). Prints the stories and the speed; with --json one JSON object a
line, in UTF-8, as stories finish ("row" is a story's number), and the speed on stderr. Three
stories in 64 steps with the small model take about 10 s on 2 CPU cores in FP32.

A prompt may end inside a word ("She was hap"), and a gap may begin or end inside one
("Tom was jum[MASK:3]ing."). The piece at such an edge is taken back, and the first token drawn is
one that begins with it (" happy"), or ends with it where it stands behind a gap: token healing. The
piece keeps a place beside the n hidden ones, and each edge costs one network evaluation. A space
before the hidden part says that the word is over: the first of the n hidden tokens then begins with
that space. Text behind a gap that begins with a space needs nothing. --no-heal takes the text as
the tokens that it is cut into, its last space left to the first hidden token to bring or not, and
an exported step can do no other where it fills whole rows. A gap is filled token by token from the
left, the likeliest order, by a joint model with some of its left-to-right mode (--left_share; not
what completes a word), unless --steps, --order, --pace or a --preset is given.

A model with a condition (train.py --stage 2) goes on from the sentence that it is given;
--conditions reads one a line of a .txt file, or the key "condition" of a .jsonl file. Without one
the network is that of before stage 2; the lengths drawn are those of the texts that follow a
condition.

A model of train.py --objective joint also writes from the left: token by token (--block_size 1), in
blocks of N tokens (--block_size N), each uncovered in --steps evaluations, or in such blocks as
drafts, of which is kept what its token by token mode takes (--verify): distributed as that mode
writes. Drafts are its draft head's (train.py --objective draft), which costs no evaluation, or the
network's, in --steps of them. --verify_with takes the mode of another model, the twin. Who asks for
none of these gets --verify where there is a draft head, and token by token where there is none; who
asks for --steps, an --order or a gap to fill, whole rows. The autoregressive twin itself writes
token by token alone. A bundle of export_jetson.py has a graph of its own for this, cached_*.onnx,
which naming the step finds too. A story then ends where the model ends it, or with --length tokens,
which may be more than its rows have: each token sees as many before it as a row holds. --stream
prints text as soon as it stands; with --json {"row": 0, "text": " ran", "tokens": [391], "ended":
false} for each piece, of which the first is [BOS] and the prompt, beside the usual line of each
story.
"""

from cli import UserError, check_writable, flag, parse, preset, print_json, require, run

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from corpus.conditions import read_conditions
from corpus.image_files import data_uri, load_picture
from corpus.tokens import MASK, decode
from sampling.loop import Choice, State, Step, unmask_rows
from sampling.rows import (
    Given,
    Start,
    Vocabulary,
    build_rows,
    text_with_gaps,
    warn_of_cuts,
    warn_of_text,
)
from sampling.sampler import GAP, PRESETS
from sampling.source import Source
from sampling.stories import FromLeft, Live, Tally, Written, begin, opening, write_stories
from sampling.viewer import TRACE_FORMATS, Picture, Trace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHOWN = 128  # pixels across of a picture on a page


@dataclass(frozen=True)
class GenerateConfig(FromLeft):
    temperature: float = flag(0.8, "0 is greedy, 1 the model's own distribution")
    checkpoint: str | None = flag(None, "checkpoint to use (default: the newest */best.pt, else "
                                        "that of pretrained/, where there is one)")
    onnx: str | None = flag(None, "exported step to use instead (of export_jetson.py), in ONNX "
                                  "Runtime")
    engine: str | None = flag(None, "or as a TensorRT engine")
    preset: str | None = flag(None, "a sampler chosen from the tables in docs/results.md: fast, "
                                    "balanced or best; flags beside it change it", tuple(PRESETS))
    num_samples: int = flag(3, "stories to make")
    prompt: str | None = flag(None, "how the story begins; with a condition that is its first "
                                    'sentence, " Then" with the space between them')
    infill: str | None = flag(None, "a text with gaps: [MASK:n] hides n tokens")
    heal: bool = flag(True, "complete a word that --prompt or the text beside a gap cuts; a "
                            "checkpoint's model alone can")
    condition: str | None = flag(None, "what the story follows from, for a model of train.py "
                                       "--stage 2 or 3")
    conditions: str | None = flag(None, "file of conditions, .txt (one a line) or .jsonl; "
                                        "--num_samples stories of each (default: one)")
    image: list[str] = flag([], "pictures to tell of, for a model of train.py --stage 2 on data of "
                                "prep_image_data.py; --num_samples stories of each (default: one)")
    adapter: list[str] = flag([], "adapters (of training/slim.py) on the --checkpoint that they "
                                  "were trained beside: stories with each of them, in turn")
    length: int | None = flag(None, "tokens in the story (default: drawn from the data's lengths); "
                                    "the most of one that is written from the left (default: what "
                                    "a row holds)")
    seed: int = flag(0, "the same seed gives the same stories")
    batch_size: int = flag(32, "stories made together; does not change them")
    trace: str | None = flag(None, "file to write: a web page (.html) that plays the unmasking of "
                                   "the stories, or an animation (.gif) of the first")
    show_steps: bool = flag(False, "print the text (of blocks: the block) after every step, hidden "
                                   "tokens as _")
    json: bool = flag(False, "print one JSON object for each story, as soon as it is finished")
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
        given = [name for name in ("condition", "conditions", "image")
                 if getattr(self, name) not in (None, [])]
        require(len(given) < 2, f"--{' and --'.join(given)}: give one of them")
        require(not (self.trace and self.adapter and len(self.adapter) > 1), "--trace: one file, "
                "and the stories of several adapters; give one of them")
        require(not (self.adapter and (self.onnx or self.engine)),
                "--adapter: an exported step has its own; leave it out")
        require(self.conditions is None or Path(self.conditions).is_file(),
                f"--conditions {self.conditions}: no such file")
        for name in ("prompt", "infill", "condition", "image"):
            text = "".join(getattr(self, name) or "")
            require(text.isascii() or text.encode(errors="replace").decode() == text,
                    f"--{name} is not valid Unicode; check the encoding of the terminal")

    def check_used(self, given: set[str]) -> None:
        super().check_used(given)
        require(self.given_sort or "guidance" not in given, "--guidance belongs to --condition, "
                "--conditions and --image: add one, or leave it out")
        unused = sorted(given & {"device", "precision"}) if self.onnx or self.engine else []
        require(not unused, f"--{' --'.join(unused)}: an exported step has its own; leave it out")
        require(not (self.verify_with and (self.onnx or self.engine)),
                "--verify_with: needs the --checkpoint that it verifies")
        unable = (self.onnx or self.engine) and self.block_size == 0
        require(not (unable and self.heal and "heal" in given),
                "--heal: an exported step gives no probabilities to choose by; leave it out, or "
                "use --checkpoint")

    @property
    def given_sort(self) -> str | None:
        """The sort of the conditions that are given; None: none are."""
        texts = self.condition is not None or self.conditions is not None
        return "image" if self.image else "text" if texts else None

    def given_conditions(self) -> list[str]:
        """The texts, or the names of the pictures' files."""
        return (self.image or (read_conditions(Path(self.conditions)) if self.conditions else
                               [] if self.condition is None else [self.condition]))


def given_text(config: GenerateConfig) -> Given:
    """--infill or --prompt. As in training there is no white space around a story, but what follows
    a condition in words begins with some."""
    text = (config.prompt or "") if config.infill is None else config.infill.rstrip()
    return Given(text if config.given_sort == "text" else text.lstrip(),
                 config.infill is not None)


def fills_from_the_left(config: GenerateConfig, given: set[str]) -> bool:
    """Whether there is a gap and no word on how to fill it."""
    return config.infill is not None and not given & {"preset", "steps", "order", "pace"}


def read_flags(argv: list[str] | None) -> tuple[GenerateConfig, set[str]]:
    config, given = parse(GenerateConfig, __doc__, argv)
    if config.preset:
        config = preset(config, PRESETS[config.preset], given)
    elif fills_from_the_left(config, given):
        config = preset(config, GAP, given)
    try:
        config.check()
    except UserError as error:
        settings = "".join(f" --{name} {value}" for name, value in PRESETS.get(
            config.preset, {}).items() if name not in given)
        raise UserError(f"{error}" + f" (--preset {config.preset} sets{settings})" * bool(settings)
                        ) from error
    config.check_used(given)
    several = config.conditions or config.image
    return preset(config, {"num_samples": 1}, given) if several else config, given


def main(argv: list[str] | None = None) -> None:
    config, given = read_flags(argv)
    if config.trace:
        check_writable(Path(config.trace).parent, "--trace")
    for adapter in config.adapter or [None]:
        tell(replace(config, adapter=adapter), given)


def tell(config: GenerateConfig, given: set[str]) -> None:
    """The stories of one source."""
    texts, sort = config.given_conditions(), config.given_sort
    if config.onnx or config.engine:
        source = open_exported(config, sort)
    else:
        from kinds.opening import open_checkpoint
        source = open_checkpoint(config, sort)
    if fills_from_the_left(config, given):
        config = preset(config, dict(steps=1024, **source.gap), given)
    config = config.for_model(given, source.name, source.step is not None,
                              source.reader is not None, source.has_head)
    conditions = np.repeat(source.read_conditions(texts, source.tokenizer), config.num_samples,
                           axis=0) if texts else None
    texts = [text for text in texts for _ in range(config.num_samples)]
    warn_of_text({"prompt": [config.prompt or ""], "infill": [config.infill or ""],
                  "conditions" if config.conditions else "condition":
                  texts if sort == "text" else []})

    def print_line(i: int, row: np.ndarray, nfe: int) -> None:
        name = "image" if sort == "image" else "condition"
        given = {name: texts[i], "guidance": config.guidance} if texts else {}
        with tqdm.external_write_mode():  # the bar makes room on a terminal
            print_json({**given, "text": decode(source.tokenizer, row), "tokens": row.tolist(),
                        "nfe": nfe, "seed": config.seed, "row": i, "checkpoint": source.name})

    make = write_from_left if config.block_size else fill_rows
    written = make(config, source, conditions, texts, print_line if config.json else None)
    if not (config.json or config.stream):
        show(written.rows, source.tokenizer, texts)
    print(written.line(source.name), file=sys.stderr if config.json else sys.stdout)


def open_exported(config: GenerateConfig, sort: str | None) -> Source:
    """No torch is imported on this way."""
    from jetson.engine_runtime import Bundle
    path = config.onnx or config.engine
    suffix = ".onnx" if config.onnx else ".engine"
    require(Path(path).suffix == suffix, f"--{suffix[1:]} {path}: name a file that ends in "
                                         f"{suffix}")
    bundle = Bundle(path)
    require(sort is None or bundle.conditional, f"{path}: {bundle.kind} model; what is "
            "needed here is of the kind: conditional model")
    require(sort in (None, bundle.sort), f"{path} reads " + (
        "pictures: give it --image" if bundle.sort == "image" else
        "conditions in words: give it --condition or --conditions"))
    return Source(path, bundle.tokenizer, bundle.contents["length_histogram"], bundle.max_len,
                  bundle.read_conditions, bundle.step, None,
                  (lambda config, conditions: bundle.reader(config, conditions, config.block_size))
                  if bundle.contents.get("cached") else None,
                  has_head="draft_head" in bundle.contents["files"], gap=GAP)


# (number of a story, its row, network evaluations that it took): as soon as it is finished
Done = Callable[[int, np.ndarray, int], None]


def fill_rows(config: GenerateConfig, source: Source, conditions: np.ndarray | None,
              texts: list[str], done: Done | None) -> Written:
    """Stories whose rows are uncovered as a whole, in any order; `texts` are their conditions."""
    tokenizer, given = source.tokenizer, given_text(config)
    heal = config.heal and source.choice is not None
    step = source.step(config, conditions)
    starts = build_rows(given, tokenizer, source.max_len, len(texts) or config.num_samples,
                        Vocabulary(tokenizer) if heal else None, source.histogram, config.seed,
                        config.length)
    if config.heal and not heal:
        warn_of_cuts(given, tokenizer, source.max_len)
    choice = source.choice(config, conditions) if heal else None
    started = time.perf_counter()
    trace = Trace(tokenizer, [start.row for start in starts],
                  pictures_of(config, texts)) if config.trace else None
    filled, row_evaluations, evaluations = generate(
        step, choice, starts, config, tokenizer, trace,
        config.evaluations_per_step if texts else 1, done)
    seconds = time.perf_counter() - started
    if trace:
        Path(config.trace).parent.mkdir(parents=True, exist_ok=True)
        trace.write(config.trace, f"{max(row_evaluations)} steps, {config.order} order, "
                                  f"{config.pace} pace, temperature {config.temperature:g}")
    return Written(filled, sum(int((start.row == MASK).sum()) for start in starts), evaluations,
                   seconds)


def pictures_of(config: GenerateConfig, texts: list[str]) -> list[Picture] | None:
    """What a page shows beside each story; None where there are no pictures."""
    if config.given_sort != "image":
        return None
    pictures = {path: Picture(data_uri(load_picture(path, SHOWN)), Path(path).name)
                for path in set(texts)}
    return [pictures[path] for path in texts]


def write_from_left(config: GenerateConfig, source: Source, conditions: np.ndarray | None,
                    texts: list[str], done: Done | None) -> Written:
    """Stories that the model ends itself; as `fill_rows`."""
    tokenizer, count = source.tokenizer, len(texts) or config.num_samples
    most = config.length or source.max_len - 2  # tokens of text
    places = begin(given_text(config).text, tokenizer,
                   Vocabulary(tokenizer) if config.heal else None, most)
    drafter = source.reader(config, conditions)
    if most > source.max_len - 2:
        print(f"--length {most}: the model's rows are shorter; each token sees the "
              f"{source.max_len} before it", file=sys.stderr)
    reader = source.verifier(config, conditions) if source.verifier else drafter
    tally = Tally(count, config.batch_size, config.evaluations_per_step if texts else 1)
    live = Live(tokenizer, texts, count, config.json) if config.stream else None

    def shown(numbers: np.ndarray, state: State) -> None:
        for i, tokens in zip(numbers, state.tokens, strict=True):
            print(f"[story {i + 1}, block {len(tally.row(i)) // config.block_size + 1}, step "
                  f"{state.step}] {text_with_gaps(tokenizer, tokens)}",
                  file=sys.stderr if config.json else sys.stdout)

    started = time.perf_counter()
    hidden = True if config.stream or config.show_steps else None  # None: where is no terminal
    with tqdm(desc="writing", unit=" tokens", leave=False, disable=hidden) as bar:
        for piece in write_stories(reader, drafter, places, config, most + 1, config.seed, count,
                                   config.batch_size, shown if config.show_steps else None):
            tally.add(piece)
            bar.update(len(piece.tokens))
            if live:
                live.show(piece)
            if done and piece.ended:
                done(piece.row, tally.row(piece.row), tally.nfe[piece.row])
    return tally.written(places, time.perf_counter() - started, config.verify)


def generate(step: Step, choice: Choice | None, starts: list[Start], config: GenerateConfig,
             tokenizer: "Tokenizer", trace: Trace | None = None, each: int = 1,
             done: Done | None = None) -> tuple[list[np.ndarray], list[int], int]:
    """Fills the rows; a step takes `each` network evaluations.

    `done` is given every row as soon as it is filled: its number, itself, its network evaluations.

    Returns: the filled rows, in order; how many network evaluations each of them took; and the
        network evaluations of all batches together.
    """
    filled, row_evaluations, evaluations = [start.row for start in starts], [0] * len(starts), 0
    finished: set[int] = set()
    states = unmask_rows(step, filled.copy(), config, config.seed, config.batch_size, choice,
                         [start.limits for start in starts])
    hide_bar = True if config.show_steps else None  # None: hidden where there is no terminal
    for part, state in tqdm(states, desc="unmasking", unit=" steps", leave=False, disable=hide_bar):
        evaluations += each * int(state.evaluated.max(initial=0))
        if trace:
            trace.add(part, state)
        for i, tokens, evaluated in zip(part, state.tokens, state.evaluated, strict=True):
            filled[i] = tokens[:len(starts[i].row)]
            row_evaluations[i] += each * int(evaluated)
            if config.show_steps and (state.step or not state.nfe):  # edges are seen with step 1
                shown = starts[i].shown if not state.step and MASK in tokens else filled[i]
                # on stderr beside --json, whose lines must stay parseable
                print(f"[story {i + 1}, step {state.step}] {text_with_gaps(tokenizer, shown)}",
                      file=sys.stderr if config.json else sys.stdout)
        if done and not (state.tokens == MASK).any():  # the batch's last
            for i in part:
                if i not in finished:  # where the edges were all, the loop has one state more
                    finished.add(i)
                    done(i, filled[i], row_evaluations[i])
    return filled, row_evaluations, evaluations


def show(filled: list[np.ndarray], tokenizer: "Tokenizer", conditions: list[str]) -> None:
    for i, row in enumerate(filled):
        text = decode(tokenizer, row)
        print(f"{opening(i, text, conditions)}{text}\n")


if __name__ == "__main__":
    run(main, prints=True)
