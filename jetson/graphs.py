"""Step, cached pass and encoder as ONNX graphs, checked to be what TensorRT reads. A library of
bundle.py.
"""

import copy
import io
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from corpus.tokens import BOS, EOS, MASK
from jetson.engine_builder import DYNAMIC_AXES
from jetson.report import NoisyRows, block_runs, calibration_runs
from jetson.settings import ExportConfig

if TYPE_CHECKING:
    import onnx
    import torch

    from model import DiffusionTransformer
    from network.encoders import ConditionEncoder

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


def largest_condition(encoder: "ConditionEncoder") -> "torch.Tensor":
    """(1, ...) int32: what the graph of the encoder reads."""
    import torch
    if encoder.sort == "text":
        return torch.full((1, encoder.config.max_len), EOS + 1, dtype=torch.int32)
    return encoder.example(1).int()


def step_inputs(model: Any, batch: int, length: int) -> dict[str, "torch.Tensor"]:
    """Inputs of the shapes that the graph will have."""
    import torch

    from network.layers import CARRIED
    tokens = torch.full((batch, length), MASK, dtype=torch.int32)
    tokens[:, 0], tokens[:, -1] = BOS, EOS
    inputs = dict(tokens=tokens, count=torch.full((batch,), 4, dtype=torch.int32),
                  noise=torch.rand(batch, 2, length), options=torch.tensor([1.0, 1, 64, 0, 2, 1]))
    if model.self_conditioning:
        inputs["carried"] = torch.zeros(batch, length, 2 * CARRIED)
    encoder = getattr(model, "encoder", None)
    if encoder is not None:
        config, condition_len = model.config, encoder.places(largest_condition(encoder))
        shape = (config.layers, batch, config.heads, condition_len, config.width // config.heads)
        inputs |= dict(keys=torch.zeros(shape), values=torch.zeros(shape),
                       bias=torch.zeros(batch, 1, 1, condition_len))
    return inputs


def to_onnx(module: "torch.nn.Module", inputs: dict[str, "torch.Tensor"], outputs: list[str],
            shapes: tuple | None = None) -> "onnx.ModelProto":
    """The module as a graph of these shapes, checked to be one that TensorRT reads.

    `shapes` are the axes that stay open, as torch.export takes them.
    """
    import logging
    import warnings

    import onnx
    import torch
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
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


def open_axes(inputs: dict[str, "torch.Tensor"], largest: tuple[int, int]) -> tuple:
    """Those of a step whose batch and length stay open, up to `largest`."""
    from torch.export import Dim
    dims = (Dim("batch", max=max(2, largest[0])), 16 * Dim("sixteens", max=largest[1] // 16))
    axes = [{axis: dims[which] for axis, which in DYNAMIC_AXES[name].items()} for name in inputs]
    # behind the fourth all are one argument, *others
    return (*axes[:4], tuple(axes[4:])) if axes[4:] else tuple(axes)


def operators(graph: "onnx.ModelProto") -> list[str]:
    """Their names, sorted. Raises RuntimeError for one that TensorRT lacks."""
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
    """The model's encoder: condition (1, S) int32, or (1, size, size, 4) int32 of a picture, ->
    what the blocks attend to, in FP32."""
    import torch

    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, condition):
            return tuple(part.float() for part in self.model.encode(condition.long()))
    return to_onnx(Encode(), dict(condition=largest_condition(model.encoder)),
                   ["keys", "values", "bias"])


def step_graph(config: ExportConfig, checkpoint: dict, precision: str, length: int,
               calibration: NoisyRows | None, condition_len: int | None) -> "onnx.ModelProto":
    """The unmasking step in that precision, with the logits as the last output."""
    from jetson.step_graph import DeviceStep

    def export(model: "DiffusionTransformer") -> "onnx.ModelProto":
        step = DeviceStep(model, config.guided)
        step.with_logits = True
        largest = (config.batch, length) if config.dynamic else None
        inputs = step_inputs(model, max(2, config.batch) if largest else config.batch, length)
        outputs = ["new_tokens", "confidence", *["new_carried"] * ("carried" in inputs), "logits"]
        return to_onnx(step, inputs, outputs, open_axes(inputs, largest) if largest else None)
    return in_precision(checkpoint, precision, export, lambda model: calibration_runs(
        model, calibration, condition_len))


def cached_graph(config: ExportConfig, checkpoint: dict, precision: str, cached: dict,
                 calibration: NoisyRows | None) -> "onnx.ModelProto":
    """A pass behind a cache in that precision; `cached` is the entry of bundle.json."""
    from torch.export import Dim

    from jetson.cached_graph import CachedPass, pass_inputs

    def export(model: "DiffusionTransformer") -> "onnx.ModelProto":
        inputs = pass_inputs(model, config.batch, cached["slots"])
        count = Dim("count", min=1, max=cached["tokens"])
        axes = ({1: count}, {1: count}, {2: count, 3: count + cached["slots"]}, {}, {}, {1: count})
        return to_onnx(CachedPass(model), inputs, ["logits", "hidden", "new_keys", "new_values"],
                       axes[:len(inputs)])
    return in_precision(checkpoint, precision, export,
                        lambda model: block_runs(model, checkpoint, calibration))


def in_precision(checkpoint: dict, precision: str,
                 export: Callable[["DiffusionTransformer"], "onnx.ModelProto"],
                 runs: Callable[["DiffusionTransformer"], Iterable[Callable]]) -> "onnx.ModelProto":
    """What `export` makes of the model, its adapters merged; INT8 takes its scales from the `runs`.
    """
    import onnx

    from jetson.int8 import activation_scales, balance, quantize
    from kinds.checkpoints import model_from_checkpoint
    from network.lora import merge
    model = merge(model_from_checkpoint(checkpoint))
    if precision == "int8":
        balance(model, runs(model))
        balanced = copy.deepcopy(model).for_inference()  # in FP32
    model.set_precision("fp32" if precision == "fp32" else "fp16").for_inference()
    graph = export(model)
    if precision == "int8":
        quantize(graph, balanced, activation_scales(balanced, runs(balanced)))
        onnx.checker.check_model(graph)
    return graph
