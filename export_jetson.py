"""Stage 5: a checkpoint -> ONNX steps in FP32, FP16 and INT8, and the folder to copy to a Jetson.

    python export_jetson.py --checkpoint long_run/best.pt --data_dir long_run/data
    python export_jetson.py --checkpoint conditional/best.pt --guided   # both sides in a step
    python export_jetson.py --check rtx --out_dir jetson_bundle         # NVIDIA's compiler, no GPU

then copy `--out_dir` to the Jetson and there, in the folder:

    pip install -r requirements-jetson.txt      # TensorRT itself comes with JetPack
    python export_jetson.py --build_engine step_fp16.onnx
    python generate.py --engine step_fp16.engine --preset fast

What is exported is one unmasking step, network and choice of tokens (device_step.py): logits never
leave it. Each precision comes with a report, printed and kept in bundle.json: size, operators,
difference of the logits, agreement of the likeliest token and the NELBO of held-out rows through
that very graph: of the test split where the data has one, else of the validation split. INT8 takes
its scales from training rows. The small model takes about 3 minutes on 2 CPU cores.
"""

from cli import atomic_file, flag, parse, require, run, sha256_of

import copy
import dataclasses
import io
import json
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine_builder import DYNAMIC_AXES, build_engine, check_rtx
from engine_runtime import BUNDLE_FORMAT, BUNDLE_VERSION, OnnxSession
from sampler import PRESETS

if TYPE_CHECKING:  # the Jetson, which builds engines with this script, has neither
    import onnx
    import torch

HERE = Path(__file__).parent
SCRIPTS = ("generate.py", "sampler.py", "viewer.py", "viewer.html", "data_prep.py", "folders.py",
           "sources.py", "cli.py", "engine_runtime.py", "engine_builder.py", "benchmark_device.py",
           "export_jetson.py")
PRECISIONS = ("fp32", "fp16", "int8")
OPSET, NEWEST_IR = 20, 10  # what TensorRT 10 reads; opset 23 has operators that it lacks
# Those that it takes: onnx-tensorrt, docs/operators.md of its release for TensorRT 10.1
TENSORRT_OPERATORS = frozenset("""
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten
Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
GreaterOrEqual GridSample GroupNormalization GRU HardSigmoid HardSwish Hardmax Identity If
ImageScaler InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization
Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or Pad ParametricSoftplus Pow PRelu
QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal
ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
Relu Reshape Resize ReverseSequence RNN RoiAlign Round ScaledTanh Scan Scatter ScatterElements
ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth
Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample
Where Xor""".split())
REQUIREMENTS = """\
# On the Jetson, in an environment made with `python3 -m venv --system-site-packages`: TensorRT is
# the system's. For --onnx instead of --engine: onnxruntime.
# cuda-python 13 needs a newer driver than that of JetPack 6.
numpy
tokenizers
tqdm
cuda-python>=12.6,<13
"""


@dataclass
class ExportConfig:
    checkpoint: str | None = flag(None, "checkpoint to export (default: the newest */best.pt)")
    out_dir: str = flag("jetson_bundle", "folder to write")
    precisions: list[str] = flag(list(PRECISIONS), "which graphs: " + ", ".join(PRECISIONS))
    length: int | None = flag(None, "tokens of a row, a multiple of 16 (default: the model's)")
    batch: int = flag(1, "rows of a step")
    dynamic: bool = flag(False, "any number of rows and any length, up to --batch and --length, in "
                                "one graph (TensorRT likes fixed shapes better)")
    guided: bool = flag(False, "a model with a condition: both sides in one step, for --guidance "
                               "other than 0 and 1 (twice the work)")
    data_dir: str | None = flag(None, "data folder, for INT8's scales and the report (default: "
                                      "that of the training)")
    calibration_rows: int = flag(64, "training rows from which INT8 takes its scales")
    report_rows: int = flag(64, "rows of the report, of the test split or without one of the "
                                "validation split; 0 for none")
    overwrite: bool = flag(False, "replace a bundle that is already there")
    check: str | None = flag(None, "rtx: have NVIDIA's TensorRT-RTX compile every graph of "
                                   "--out_dir (pip install tensorrt-rtx-cu12)", ("rtx",))
    build_engine: str | None = flag(None, "graph to build an engine of, on the device that runs it")
    workspace_mb: int = flag(1024, "memory that TensorRT may use while it builds")

    def check_values(self) -> None:
        for name in self.precisions:
            require(name in PRECISIONS, f"--precisions {name}: choose from {', '.join(PRECISIONS)}")
        for name in ("batch", "calibration_rows", "workspace_mb"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(self.report_rows >= 0, f"--report_rows {self.report_rows}: must be 0 or more")
        require(self.length is None or (self.length >= 16 and self.length % 16 == 0),
                f"--length {self.length}: must be a positive multiple of 16")
        require(not self.dynamic or self.length is None or self.length >= 32,
                f"--length {self.length}: with --dynamic it must be at least 32")
        require(not (self.check and self.build_engine), "--check and --build_engine: choose one")


# ---- graphs --------------------------------------------------------------------------------------

def step_inputs(model: Any, batch: int, length: int) -> dict[str, "torch.Tensor"]:
    """Inputs of the shapes that the graph will have."""
    import torch

    from data_prep import BOS, EOS, MASK
    tokens = torch.full((batch, length), MASK, dtype=torch.int32)
    tokens[:, 0], tokens[:, -1] = BOS, EOS
    inputs = dict(tokens=tokens, count=torch.full((batch,), 4, dtype=torch.int32),
                  noise=torch.rand(batch, 2, length), options=torch.tensor([1.0, 1, 64, 0, 2, 1]))
    if model.kind == "conditional":
        config, told = model.config, model.encoder.config.max_len
        shape = (config.layers, batch, config.heads, told, config.width // config.heads)
        inputs |= dict(keys=torch.zeros(shape), values=torch.zeros(shape),
                       bias=torch.zeros(batch, 1, 1, told))
    return inputs


def to_onnx(module: "torch.nn.Module", inputs: dict[str, "torch.Tensor"], outputs: list[str],
            most: tuple[int, int] | None = None) -> "onnx.ModelProto":
    """The module as a graph of these shapes, checked to be one that TensorRT reads.

    With `most`, the largest batch and length, these two stay open.
    """
    import logging
    import warnings

    import onnx
    import torch
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shapes = None
    if most:
        dims = (torch.export.Dim("batch", max=max(2, most[0])),
                16 * torch.export.Dim("sixteens", max=most[1] // 16))
        axes = [{axis: dims[which] for axis, which in DYNAMIC_AXES[name].items()}
                for name in inputs]
        # behind the fourth all are one argument, *context
        shapes = (*axes[:4], tuple(axes[4:])) if axes[4:] else tuple(axes)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module.eval(), tuple(inputs.values()), dynamo=True,
                                    opset_version=OPSET, external_data=False,
                                    dynamic_shapes=shapes,
                                    input_names=list(inputs), output_names=outputs)
    graph = program.model_proto
    onnx.checker.check_model(graph)
    versions = {entry.domain: entry.version for entry in graph.opset_import}
    if versions.get("") != OPSET or graph.ir_version > NEWEST_IR:
        raise RuntimeError(f"the exporter gave opset {versions} and IR {graph.ir_version}")
    return graph


def operators(graph: "onnx.ModelProto") -> list[str]:
    found = sorted({node.op_type for node in graph.graph.node})
    missing = [name for name in found if name not in TENSORRT_OPERATORS]
    if missing:
        raise RuntimeError(f"TensorRT 10 has no {', '.join(missing)}")
    return found


def without_logits(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same nodes; the logits stay inside."""
    shipped = type(graph)()
    shipped.CopyFrom(graph)
    kept = [output for output in shipped.graph.output if output.name != "logits"]
    del shipped.graph.output[:]
    shipped.graph.output.extend(kept)
    return shipped


def encoder_graph(model: Any) -> "onnx.ModelProto":
    import torch

    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, condition):
            return tuple(part.float() for part in self.model.encode(condition.long()))
    condition = torch.full((1, model.encoder.config.max_len), 5, dtype=torch.int32)
    return to_onnx(Encode(), dict(condition=condition), ["keys", "values", "bias"])


# ---- report --------------------------------------------------------------------------------------

class NoisyRows:
    """Rows of a split with some of their tokens hidden, the same for every precision."""

    def __init__(self, rows: Any, count: int, length: int, conditional: bool, draws: int = 4):
        import torch

        from data_prep import EOS, MASK, evenly_spread, pad_rows
        from diffusion import stratified_masks
        usable = np.flatnonzero(rows.lengths <= length)
        require(len(usable), f"{rows.data_dir} has no row of at most {length} tokens in its "
                             f"{rows.split} split")
        self.split, self.count = rows.split, min(count, len(usable))
        told = rows.conditions() if conditional else None
        self.items = []  # clean, noisy (1, W), masked (W,), k, n, condition (1, S)
        for i in usable[evenly_spread(count, len(usable))]:
            clean = torch.from_numpy(pad_rows([rows[i]]))
            for draw in range(draws):
                masked, k, n = stratified_masks(clean, np.array([i]), draw, draws, 0)
                self.items.append((clean[0].numpy(), clean.masked_fill(masked, MASK),
                                   masked[0].numpy(), int(k), int(n),
                                   None if told is None else told.batch([i])))
        self.first_text = EOS + 1  # ids below it are never predicted


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(session: OnnxSession, reference: Any, noisy: NoisyRows, condition_len: int | None,
            ) -> dict:
    """What the graph (with its logits told) makes of the rows, beside the FP32 torch model."""
    import torch

    from data_prep import pad_rows
    fixed = session.inputs["tokens"][0]  # None where the graph leaves it open
    worst, agree, nats, plain_nats, tokens = 0.0, [], 0.0, 0.0, 0.0
    for clean, hidden, masked, k, n, told in noisy.items:
        context, parts = None, {}
        batch, length = (fixed[0] or 1, fixed[1] or hidden.shape[1])
        if told is not None:
            padded = pad_rows(list(told), condition_len)
            context = reference.encode(torch.from_numpy(padded))
            parts = {name: np.repeat(part.numpy(), batch, axis=0 if name == "bias" else 1)
                     for name, part in zip(("keys", "values", "bias"), context, strict=True)}
        with torch.no_grad():
            expected = reference(hidden, torch.tensor([k / n]), context)[0].numpy()
        row = np.zeros((batch, length), np.int64)
        row[:, :hidden.shape[1]] = hidden.numpy()
        got = session.run(dict(
            tokens=row, count=np.ones(batch, np.int64), noise=np.zeros((batch, 2, length)),
            options=np.array([1, 1, 64, 0, 2, 1]), **parts))[2][0, :hidden.shape[1]]
        a, b = (logits[masked][:, noisy.first_text:] for logits in (expected, got))
        worst = max(worst, float(np.abs(a - b).max()))
        agree.append(a.argmax(-1) == b.argmax(-1))
        target = (np.arange(masked.sum()), clean[masked] - noisy.first_text)
        plain_nats -= n / k * log_softmax(a)[target].sum()
        nats -= n / k * log_softmax(b)[target].sum()
        tokens += n
    return {"rows": len(noisy.items), "hidden_tokens": int(sum(map(len, agree))),
            "max_logit_difference": worst, "argmax_agreement": float(np.concatenate(agree).mean()),
            "nelbo": nats / tokens, "nelbo_torch_fp32": plain_nats / tokens}


# ---- the bundle ----------------------------------------------------------------------------------

def export(config: ExportConfig, folder: Path) -> dict:
    """Fills the folder and returns the content of bundle.json."""
    import onnx
    import torch

    from data_prep import TokenRows
    from device_step import LIKELIEST
    from evaluate import open_rows
    from model import check_tokenizer, find_checkpoint, load_checkpoint, model_from_checkpoint
    path = find_checkpoint(config.checkpoint, ("diffusion", "conditional"))
    checkpoint = load_checkpoint(path, kind=("diffusion", "conditional"))
    reference = model_from_checkpoint(checkpoint).for_inference()
    conditional = reference.kind == "conditional"
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
        shutil.copyfile(HERE / script, folder / script)
    write_text(folder / "requirements-jetson.txt", REQUIREMENTS + (
        "onnxruntime  # for the encoder of the condition\n" if conditional else ""))
    write_text(folder / "README.md", device_readme(contents))
    write_text(folder / "bundle.json", json.dumps(contents, indent=1))
    return contents


def step_graph(config: ExportConfig, checkpoint: dict, precision: str, length: int,
               calibration: NoisyRows | None, condition_len: int | None) -> "onnx.ModelProto":
    """The unmasking step in that precision, which tells its logits too."""
    import onnx

    from device_step import DeviceStep
    from int8 import activation_scales, balance, quantize
    from model import model_from_checkpoint
    model = model_from_checkpoint(checkpoint)
    if precision == "int8":
        balance(model, calibration_inputs(model, calibration, condition_len))
        even = copy.deepcopy(model).for_inference()
    model.set_precision("fp32" if precision == "fp32" else "fp16").for_inference()
    step = DeviceStep(model, config.guided)
    step.tell_logits = True
    most = (config.batch, length) if config.dynamic else None
    inputs = step_inputs(model, max(2, config.batch) if most else config.batch, length)
    graph = to_onnx(step, inputs, ["new_tokens", "confidence", "logits"], most)
    if precision == "int8":
        quantize(graph, even, activation_scales(even, calibration_inputs(
            even, calibration, condition_len)))
        onnx.checker.check_model(graph)
    return graph


def calibration_inputs(model: Any, noisy: NoisyRows, condition_len: int | None):
    """What `activation_scales` runs: hidden rows, and with a condition its context."""
    import torch

    from data_prep import pad_rows
    for _, hidden, _, k, n, told in noisy.items:
        context = () if told is None else (model.encode(torch.from_numpy(
            pad_rows(list(told), condition_len))),)
        yield lambda hidden=hidden, k=k, n=n, context=context: model.hidden(
            hidden, torch.tensor([k / n]), *context)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path, "w") as file:
        file.write(text)


def line_of(precision: str, report: dict, seconds: float) -> str:
    quality = "" if "nelbo" not in report else (
        f", logits within {report['max_logit_difference']:.2g} of torch's in FP32, likeliest token "
        f"the same at {report['argmax_agreement']:.2%} of {report['hidden_tokens']:,} hidden "
        f"positions, NELBO {report['nelbo']:.4f} (torch {report['nelbo_torch_fp32']:.4f})")
    return (f"{precision}: {report['megabytes']:.1f} MB, opset {report['opset']}{quality}; "
            f"{seconds:.0f} s")


def device_readme(contents: dict) -> str:
    step = contents["files"].get("fp16", next(iter(contents["files"].values())))["name"]
    engine = step.replace(".onnx", ".engine")
    return f"""# A story model for a Jetson

1. `python3 -m venv --system-site-packages env && . env/bin/activate`
2. `pip install -r requirements-jetson.txt`
3. `python export_jetson.py --build_engine {step}` (once, some minutes; on this very device)
4. `python generate.py --engine {engine} --preset fast`
5. `python benchmark_device.py device --bundle .` (without a GPU `pip install onnxruntime`, and
   `python generate.py --onnx {step}`)
"""


# ---- command line --------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    config, _ = parse(ExportConfig, __doc__, argv)
    config.check_values()
    if config.build_engine:
        build_engine(Path(config.build_engine), config.workspace_mb)
    elif config.check:
        check_rtx(Path(config.out_dir))
    else:
        from folders import make_folder
        require(find_spec("onnx") and find_spec("torch"), "an export needs torch and onnx, which "
                "are not here: run it where the model was trained; here give --build_engine")
        make_folder(config.out_dir, "--out_dir", config.overwrite,
                    lambda folder: export(config, folder), marker="bundle.json")
        size = sum(path.stat().st_size for path in Path(config.out_dir).iterdir()) / 1e6
        print(f"wrote {config.out_dir}, {size:.1f} MB: copy it to the device, its README.md says "
              "how to go on", file=sys.stdout)


if __name__ == "__main__":
    run(main)
