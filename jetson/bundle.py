"""The bundle: graphs, their reports, and all else that a Jetson needs, in a folder. A library of
export_jetson.py.
"""

from cli import atomic_file, require, sha256_of, write_json

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corpus.tokens import round_up
from jetson.engine_runtime import BUNDLE_FORMAT, BUNDLE_VERSION, CACHED, OnnxSession
from jetson.graphs import (
    OPSET,
    cached_graph,
    encoder_graph,
    largest_condition,
    operators,
    step_graph,
    without_logits,
)
from jetson.reader import GraphReader, HostSlots
from jetson.report import NoisyRows, compare, compare_cached, line_of
from jetson.settings import ExportConfig
from sampling.sampler import PRESETS, Sampler

if TYPE_CHECKING:
    from model import DiffusionTransformer
    from network.encoders import ConditionEncoder

ROOT = Path(__file__).parent.parent
SCRIPTS = (
    "generate.py", "export_jetson.py", "benchmark.py",
    "cli/__init__.py", "cli/commands.py", "cli/errors.py", "cli/files.py", "cli/flags.py",
    "cli/locks.py", "cli/streams.py",
    "corpus/__init__.py", "corpus/tokens.py", "corpus/files.py", "corpus/conditions.py",
    "corpus/image_files.py",
    "sampling/__init__.py", "sampling/sampler.py", "sampling/noise.py", "sampling/paces.py",
    "sampling/loop.py", "sampling/rows.py", "sampling/viewer.py", "sampling/viewer.html",
    "sampling/source.py", "sampling/stories.py", "sampling/left_to_right.py", "sampling/drawing.py",
    "sampling/draft_head.py",
    "jetson/__init__.py", "jetson/settings.py", "jetson/engine_runtime.py",
    "jetson/tensorrt_session.py", "jetson/reader.py", "jetson/engine_builder.py",
    "measuring/__init__.py", "measuring/device.py")
DRAFT_HEAD = "draft_head.npz"
JUDGED_BLOCK = 8  # tokens of a block in the report
REQUIREMENTS = """\
# On the Jetson, in an environment made with `python3 -m venv --system-site-packages`: TensorRT is
# the system's. For --onnx instead of --engine: onnxruntime.
# cuda-python 13 needs a newer driver than that of JetPack 6.
numpy
tokenizers
tqdm
cuda-python>=12.6,<13
"""


class Source(NamedTuple):
    """A checkpoint to export, and the rows for it."""

    checkpoint: dict
    model: "DiffusionTransformer"  # in FP32, as it is judged against
    length: int  # tokens of a row
    condition_len: int | None  # places of a condition; None: the model takes none
    reads: dict | None  # what a condition is, as bundle.json has it
    cached: dict | None  # slots and most tokens of a pass behind a cache, where there is one
    judged: NoisyRows | None  # of the report, where there is to be one
    calibration: NoisyRows | None  # for INT8's scales, where they are needed


def export(config: ExportConfig, folder: Path) -> dict:
    """Fills the folder and returns the content of bundle.json."""
    import onnx
    source = open_source(config)
    files, reports = write_steps(config, source, folder)
    if source.cached:
        write_cached(config, source, folder, files, reports)
    if source.condition_len is not None:
        onnx.save(encoder_graph(source.model), folder / "encoder.onnx")
        files["encoder"] = file_entry(folder / "encoder.onnx")
    contents = describe(config, source, files, reports)
    write_device_files(folder, source.checkpoint["tokenizer"], contents)
    write_json(folder / "bundle.json", contents)
    return contents


def open_source(config: ExportConfig) -> Source:
    """Raises UserError for a checkpoint or data that cannot be exported with these settings."""
    from diffusion import DiscreteDiffusion
    from kinds.checkpoints import find_checkpoint, load_checkpoint, model_from_checkpoint
    from kinds.registry import kind_of, kinds_that
    from network.lora import merge
    kinds = kinds_that(lambda kind: kind.unmasks)
    path = find_checkpoint(config.checkpoint, kinds)
    checkpoint = load_checkpoint(path, kinds)
    model = merge(model_from_checkpoint(checkpoint)).for_inference()
    kind = kind_of(checkpoint)
    require(type(kind).step is DiscreteDiffusion.step, f"{path}: a {kind.name} model draws by a "
            "step of its own, which has no graph")
    encoder = model.encoder if kind.conditional else None
    require(encoder or not config.guided, f"--guided: {path} is a model without a condition")
    reads = encoder and reads_of(path, encoder)
    length = config.length or model.config.max_len
    require(length <= model.config.max_len, f"--length {length}: {path} has rows of at most "
                                            f"{model.config.max_len}")
    return Source(checkpoint, model, length,
                  encoder and encoder.places(largest_condition(encoder)), reads,
                  cached_of(config, length) if kind.from_left and not encoder else None,
                  *open_noisy_rows(config, path, checkpoint, length, encoder))


def reads_of(path: Path, encoder: "ConditionEncoder") -> dict:
    """The entry of bundle.json that says what a condition is."""
    readers = {"text": lambda: {"max_len": encoder.config.max_len},
               "image": lambda: {"size": encoder.size}}
    require(encoder.sort in readers, f"{path} takes conditions of the sort {encoder.sort!r}: an "
            f"exported step takes those of the sorts {' and '.join(readers)} alone")
    return {"sort": encoder.sort, **readers[encoder.sort]()}


def cached_of(config: ExportConfig, length: int) -> dict:
    """The sizes of a pass behind a cache: slots for the `length` tokens that a token sees before
    it, and for those of a pass, which may be forgotten again."""
    tokens = min(config.cached_tokens, length)
    return {"slots": round_up(length + tokens, 16), "tokens": tokens}


def open_noisy_rows(config: ExportConfig, path: Path, checkpoint: dict, length: int,
                    encoder: "ConditionEncoder | None",
                    ) -> tuple[NoisyRows | None, NoisyRows | None]:
    """The rows of the report and those for INT8's scales, each where the settings need them."""
    from corpus.rows import TokenRows, open_rows
    from kinds.checkpoints import check_tokenizer
    judged = calibration = None

    def noisy(rows: TokenRows, count: int, **settings: int) -> NoisyRows:
        # all pictures must be of the encoder's size; of texts those alone that are taken
        named = path if encoder and encoder.sort == "image" else None
        return NoisyRows(rows, count, length, encoder and encoder.conditions_of(rows, named),
                         **settings)

    if config.report_rows or "int8" in config.precisions:
        data_dir = config.data_dir or checkpoint.get("train_config", {}).get("data_dir", "data")
        rows = open_rows(data_dir, None)
        check_tokenizer(path, checkpoint, data_dir, rows.meta)
        if config.report_rows:
            judged = noisy(rows, config.report_rows)
        if "int8" in config.precisions:  # never of the rows that it is judged on
            calibration = noisy(TokenRows(data_dir, "train"), config.calibration_rows, draws=1)
    for what, used in (("judged on", judged), ("INT8's scales are from", calibration)):
        if used:
            print(f"{what} {used.count} rows of {used.split}", flush=True)
    return judged, calibration


def write_steps(config: ExportConfig, source: Source, folder: Path) -> tuple[dict, dict]:
    """Writes the step's graph of each precision; returns {precision: entry of its file} and
    {precision: report}, as bundle.json has them."""
    import onnx
    files, reports = {}, {}
    for precision in config.precisions:
        started = time.perf_counter()
        graph = step_graph(config, source.checkpoint, precision, source.length, source.calibration,
                           source.condition_len)
        path = folder / f"step_{precision}.onnx"
        onnx.save(without_logits(graph), path)
        report = {"megabytes": path.stat().st_size / 1e6, "opset": OPSET,
                  "operators": operators(graph)}
        if source.judged:
            with tempfile.TemporaryDirectory() as scratch:
                onnx.save(graph, Path(scratch) / path.name)
                report |= compare(OnnxSession(Path(scratch) / path.name), source.model,
                                  source.judged, source.condition_len)
        files[precision], reports[precision] = file_entry(path), report
        print(line_of(precision, report, time.perf_counter() - started), flush=True)
    return files, reports


def write_cached(config: ExportConfig, source: Source, folder: Path, files: dict, reports: dict,
                 ) -> None:
    """The same for the graph of a pass behind a cache; adds to both."""
    import onnx

    from sampling.cached import CachedModel, head_parts
    draft = source.model.draft
    if draft is not None:  # a product of the host's
        np.savez(folder / DRAFT_HEAD, **head_parts(draft))
        files["draft_head"] = file_entry(folder / DRAFT_HEAD)
    for precision in config.precisions:
        started = time.perf_counter()
        name = f"{CACHED}{precision}"
        path = folder / f"{name}.onnx"
        graph = cached_graph(config, source.checkpoint, precision, source.cached,
                             source.calibration)
        onnx.save(graph, path)
        report = {"megabytes": path.stat().st_size / 1e6, "opset": OPSET,
                  "operators": operators(graph)}
        if source.judged:
            sampler, most = Sampler(), source.cached["tokens"]
            reader = GraphReader(HostSlots(OnnxSession(path)), sampler, source.length, most)
            report |= compare_cached(reader, CachedModel(source.model, sampler), source.judged,
                                     min(JUDGED_BLOCK, most))
        files[name], reports[name] = file_entry(path), report
        print(line_of(name, report, time.perf_counter() - started), flush=True)


def file_entry(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": sha256_of(path)}


def describe(config: ExportConfig, source: Source, files: dict, reports: dict) -> dict:
    """The content of bundle.json."""
    import onnx
    import torch

    from jetson.step_graph import LIKELIEST
    checkpoint = source.checkpoint
    return {
        "format": BUNDLE_FORMAT, "format_version": BUNDLE_VERSION, "kind": checkpoint["kind"],
        "files": files, "batch": config.batch, "length": source.length, "dynamic": config.dynamic,
        "condition_len": source.condition_len, "encoder": source.reads, "cached": source.cached,
        "guided": config.guided, "likeliest": LIKELIEST, "reports": reports,
        "judged_on": source.judged.split if source.judged else None,
        "calibrated_on": source.calibration.split if source.calibration else None,
        "model_config": checkpoint["model_config"], "step": checkpoint.get("step"),
        "length_histogram": checkpoint["length_histogram"],
        "tokenizer_sha256": checkpoint["tokenizer_sha256"],
        "presets": PRESETS,
        "data_source": checkpoint.get("data_source"), "licence": checkpoint.get("licence"),
        "versions": {"torch": str(torch.__version__), "onnx": onnx.__version__},
        "config": dataclasses.asdict(config)}


def write_device_files(folder: Path, tokenizer: str, contents: dict) -> None:
    """Writes what the device needs besides the graphs and bundle.json."""
    write_text(folder / "tokenizer.json", tokenizer)
    for script in SCRIPTS:
        (folder / script).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / script, folder / script)
    write_text(folder / "requirements-jetson.txt", REQUIREMENTS + (
        "onnxruntime  # for the encoder of the condition\n"
        if contents["condition_len"] is not None else "") + (
        "pillow>=9.1  # for the pictures\n" if is_of_pictures(contents) else ""))
    write_text(folder / "README.md", device_readme(contents))


def write_text(path: Path, text: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(text)


def is_of_pictures(contents: dict) -> bool:
    return (contents["encoder"] or {}).get("sort") == "image"


def device_readme(contents: dict) -> str:
    step = contents["files"].get("fp16", next(iter(contents["files"].values())))["name"]
    engine = step.replace(".onnx", ".engine")
    cached = engine.replace("step_", CACHED, 1)
    build = write = ""
    if contents["cached"] is not None:
        build = (f", and for writing from the left\n   `python export_jetson.py --build_engine "
                 f"{cached.replace('.engine', '.onnx')}`")
        write = (f", or from the left, token by token\n   (`--block_size 1`), in blocks of up to "
                 f"{contents['cached']['tokens']} tokens (`--block_size 4 --steps 4`) or in\n"
                 f"   verified drafts: `python generate.py --engine {cached} --verify --stream`")
    if is_of_pictures(contents):
        write += ("; of a picture:\n   "
                  f"`python generate.py --engine {engine} --preset fast --image cat.png`")
    return f"""# A story model for a Jetson

1. `python3 -m venv --system-site-packages env && . env/bin/activate`
2. `pip install -r requirements-jetson.txt`
3. `python export_jetson.py --build_engine {step}` (once, some minutes; on this very device){build}
4. `python generate.py --engine {engine} --preset fast`{write}
5. `python benchmark.py device --bundle .` (without a GPU `pip install onnxruntime`, and
   `python generate.py --onnx {step}`)
"""
