"""The bundle: graphs, their reports, and all else that a Jetson needs, in a folder. A library of
export_jetson.py.
"""

from cli import atomic_file, require, sha256_of

import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path

from jetson.engine_runtime import BUNDLE_FORMAT, BUNDLE_VERSION, OnnxSession
from jetson.graphs import OPSET, encoder_graph, operators, step_graph, without_logits
from jetson.report import NoisyRows, compare, line_of
from jetson.settings import ExportConfig
from sampling.sampler import PRESETS

HERE = Path(__file__).parent.parent
SCRIPTS = (
    "generate.py", "export_jetson.py", "benchmark.py",
    "cli/__init__.py", "cli/commands.py", "cli/errors.py", "cli/files.py", "cli/flags.py",
    "cli/locks.py", "cli/streams.py",
    "corpus/__init__.py", "corpus/tokens.py", "corpus/files.py", "corpus/conditions.py",
    "sampling/__init__.py", "sampling/sampler.py", "sampling/noise.py", "sampling/paces.py",
    "sampling/loop.py", "sampling/rows.py", "sampling/viewer.py", "sampling/viewer.html",
    "jetson/__init__.py", "jetson/settings.py", "jetson/engine_runtime.py",
    "jetson/engine_builder.py", "measuring/__init__.py", "measuring/device.py")
REQUIREMENTS = """\
# On the Jetson, in an environment made with `python3 -m venv --system-site-packages`: TensorRT is
# the system's. For --onnx instead of --engine: onnxruntime.
# cuda-python 13 needs a newer driver than that of JetPack 6.
numpy
tokenizers
tqdm
cuda-python>=12.6,<13
"""


def export(config: ExportConfig, folder: Path) -> dict:
    """Fills the folder and returns the content of bundle.json."""
    import onnx
    import torch

    from corpus.rows import TokenRows, open_rows
    from jetson.step_graph import LIKELIEST
    from kinds.checkpoints import (
        check_tokenizer,
        find_checkpoint,
        load_checkpoint,
        model_from_checkpoint,
    )
    from kinds.registry import kind_of, kinds_that
    kinds = kinds_that(lambda kind: kind.unmasks)
    path = find_checkpoint(config.checkpoint, kinds)
    checkpoint = load_checkpoint(path, kinds)
    reference = model_from_checkpoint(checkpoint).for_inference()
    conditional = kind_of(checkpoint).conditional
    require(not conditional or reference.encoder.sort == "text", f"{path} takes conditions of the "
            f"sort {reference.encoder.sort!r}: only text can be told to an exported step"
            if conditional else "")
    require(conditional or not config.guided, f"--guided: {path} is a model without a condition")
    length = config.length or reference.config.max_len
    require(length <= reference.config.max_len, f"--length {length}: {path} has rows of at most "
                                                f"{reference.config.max_len}")
    condition_len = reference.encoder.config.max_len if conditional else None
    noisy = calibration = None
    if config.report_rows or "int8" in config.precisions:
        data_dir = config.data_dir or checkpoint.get("train_config", {}).get("data_dir", "data")
        rows = open_rows(data_dir, None)
        check_tokenizer(path, checkpoint, data_dir, rows.meta)
        if config.report_rows:
            noisy = NoisyRows(rows, config.report_rows, length, conditional)
        if "int8" in config.precisions:  # never of the rows that it is judged on
            calibration = NoisyRows(TokenRows(data_dir, "train"), config.calibration_rows, length,
                                    conditional, draws=1)
    for what, used in (("judged on", noisy), ("INT8's scales are from", calibration)):
        if used:
            print(f"{what} {used.count} rows of {used.split}", flush=True)
    files, reports = {}, {}
    for precision in config.precisions:
        started = time.perf_counter()
        graph = step_graph(config, checkpoint, precision, length, calibration, condition_len)
        name = f"step_{precision}.onnx"
        onnx.save(without_logits(graph), folder / name)
        report = {"megabytes": (folder / name).stat().st_size / 1e6, "opset": OPSET,
                  "operators": operators(graph)}
        if noisy:
            with tempfile.TemporaryDirectory() as scratch:
                onnx.save(graph, Path(scratch) / name)
                report |= compare(OnnxSession(Path(scratch) / name), reference, noisy,
                                  condition_len)
        reports[precision] = report
        files[precision] = {"name": name, "sha256": sha256_of(folder / name)}
        print(line_of(precision, report, time.perf_counter() - started), flush=True)
    if conditional:
        onnx.save(encoder_graph(reference), folder / "encoder.onnx")
        files["encoder"] = {"name": "encoder.onnx", "sha256": sha256_of(folder / "encoder.onnx")}
    contents = {
        "format": BUNDLE_FORMAT, "format_version": BUNDLE_VERSION, "kind": reference.kind,
        "files": files, "batch": config.batch, "length": length, "dynamic": config.dynamic,
        "condition_len": condition_len,
        "guided": config.guided, "likeliest": LIKELIEST, "reports": reports,
        "judged_on": noisy.split if noisy else None,
        "calibrated_on": calibration.split if calibration else None,
        "model_config": checkpoint["model_config"], "step": checkpoint.get("step"),
        "length_histogram": checkpoint["length_histogram"],
        "tokenizer_sha256": checkpoint["tokenizer_sha256"],
        "presets": PRESETS,
        "data_source": checkpoint.get("data_source"), "licence": checkpoint.get("licence"),
        "versions": {"torch": str(torch.__version__), "onnx": onnx.__version__},
        "config": dataclasses.asdict(config)}
    write_text(folder / "tokenizer.json", checkpoint["tokenizer"])
    for script in SCRIPTS:
        (folder / script).parent.mkdir(exist_ok=True)
        shutil.copyfile(HERE / script, folder / script)
    write_text(folder / "requirements-jetson.txt", REQUIREMENTS + (
        "onnxruntime  # for the encoder of the condition\n" if conditional else ""))
    write_text(folder / "README.md", device_readme(contents))
    write_text(folder / "bundle.json", json.dumps(contents, indent=1))
    return contents


def write_text(path: Path, text: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(text)


def device_readme(contents: dict) -> str:
    step = contents["files"].get("fp16", next(iter(contents["files"].values())))["name"]
    engine = step.replace(".onnx", ".engine")
    return f"""# A story model for a Jetson

1. `python3 -m venv --system-site-packages env && . env/bin/activate`
2. `pip install -r requirements-jetson.txt`
3. `python export_jetson.py --build_engine {step}` (once, some minutes; on this very device)
4. `python generate.py --engine {engine} --preset fast`
5. `python benchmark.py device --bundle .` (without a GPU `pip install onnxruntime`, and
   `python generate.py --onnx {step}`)
"""
