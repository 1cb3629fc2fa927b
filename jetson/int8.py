"""INT8 for an exported step: the blocks' weight products, static, symmetric. A library of
graphs.py.

    balance(model, runs)                            # the same function, with even channels
    scales = activation_scales(model, runs)         # one for the input of every weight product
    quantize(graph, model, scales)                  # explicit QuantizeLinear and DequantizeLinear

Weights get one scale for every output channel, inputs one for each product: what TensorRT's INT8
kernels take. Embedding and vocabulary head, norms, softmax and the choice of tokens stay as they
are.
"""

from collections.abc import Callable, Iterable

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from model import DiffusionTransformer
from network.layers import Linear

LEVELS = 127  # of a sign; -128 is not used, so that the grid is symmetric
KEPT_VALUES = 2**16  # of the inputs of one product in one batch, for choosing its scale


def block_products(model: DiffusionTransformer) -> dict[str, Linear]:
    """The weight products of a step's blocks, by name; a condition's keys and values are inputs,
    and the gates of heads are too small to gain."""
    return {f"blocks.{name}": module for name, module in model.blocks.named_modules()
            if isinstance(module, Linear) and not name.endswith((
                "cross.key", "cross.value", "head_gate"))}


def run_watched(runs: Iterable[Callable[[], Tensor]], hooks: dict[Linear, Callable]) -> None:
    """Calls each of `runs` while the hooks see the inputs of their products."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    for run in runs:
        run()
    for handle in handles:
        handle.remove()


@torch.no_grad()
def balance(model: DiffusionTransformer, runs: Iterable[Callable[[], Tensor]]) -> None:
    """Evens out the channels between two products, so that one scale serves them all; in place.

    Channel j of what `down` reads is silu(gate_j x) (up_j x): a row of `up` divided by s_j, a
    column of `down` multiplied by s_j leave the model the same function (of relu(up_j x)^2 a row
    divided by sqrt(s_j)). So do rows of `value` divided by s_j and columns of `out` multiplied by
    it, unless the first block's values are mixed in. s_j brings the largest input and the largest
    weight of a channel together (as in arXiv 2211.10438 eq. 4, with its alpha at 1/2).
    """
    pairs = [(block.up, block.down, 0.5 if block.gate is None else 1.0) for block in model.blocks]
    pairs += [(block.attention.value, block.attention.out, 1.0) for block in model.blocks
              if not model.config.value_residual]
    largest = {second: torch.zeros(second.in_features) for _, second, _ in pairs}

    def watch(module: Linear, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].float().abs().flatten(0, -2).amax(0)
        largest[module] = torch.maximum(largest[module], values)
    run_watched(runs, {second: watch for second in largest})
    for first, second, power in pairs:
        weight = second.weight.abs().amax(0).clamp(min=1e-6)
        scale = (largest[second].clamp(min=1e-6) / weight).sqrt()
        scale = (scale / scale.log().mean().exp()).clamp(0.01, 100)
        second.weight *= scale
        first.weight /= scale[:, None] ** power


@torch.no_grad()
def activation_scales(model: DiffusionTransformer, runs: Iterable[Callable[[], Tensor]],
                      ) -> dict[str, float]:
    """{name: scale of the input} of every block product. Each of `runs` calls the model once.

    The scale is that, of 32 between a fiftieth of the largest value and the largest, whose rounding
    and clipping together cost least in the mean square: what `down` reads has rare large values,
    and a grid up to the largest would leave nothing for the rest.
    """
    seen: dict[str, list[np.ndarray]] = {name: [] for name in block_products(model)}
    largest = dict.fromkeys(seen, 0.0)

    def watch(name: str):
        def hook(module: Linear, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().float().abs().flatten(0, -2)  # (tokens, channels)
            largest[name] = max(largest[name], float(values.max()))
            every = -(-values.numel() // KEPT_VALUES)  # whole rows: each has every channel
            seen[name].append(values[::every].flatten().numpy())
        return hook

    run_watched(runs, {module: watch(name) for name, module in block_products(model).items()})
    return {name: best_scale(np.concatenate(seen[name]), largest[name]) for name in seen
            if seen[name]}


def best_scale(values: np.ndarray, largest: float) -> float:
    """The one of `activation_scales` for these absolute values, (N,)."""
    candidates = largest * np.geomspace(0.02, 1.0, 32) / LEVELS
    errors = [np.square(np.minimum(np.round(values / scale), LEVELS) * scale - values).mean()
              for scale in candidates]
    return float(candidates[int(np.argmin(errors))])


def quantize(graph: onnx.ModelProto, model: DiffusionTransformer, scales: dict[str, float]) -> None:
    """Puts the quantised weights of the block products, and the scales of their inputs, into an
    exported step; changes it in place. A guided step has the network twice, and its weights once.
    """
    initializers = {x.name: x for x in graph.graph.initializer}
    weights = {name: module.weight.detach().float().T.contiguous().numpy()
               for name, module in block_products(model).items()}
    # Of a weight that is used twice the exporter leaves a large one to be turned in the graph.
    turned = {node.output[0]: node.input[0] for node in graph.graph.node
              if node.op_type == "Transpose" and node.input[0] in initializers}
    nodes, done = [], set()
    for node in graph.graph.node:
        name, factor = None, node.input[1] if node.op_type == "MatMul" else None
        stored = initializers.get(turned.get(factor, factor))
        if stored is not None:
            matrix = numpy_helper.to_array(stored)
            matrix = matrix.T if factor in turned else matrix
            name = next((n for n in sorted(weights, key=done.__contains__)  # new ones first
                         if weights[n].shape == matrix.shape and np.allclose(
                             weights[n], matrix.astype(np.float32), rtol=2e-3, atol=1e-4)), None)
        if name is None or name not in scales:
            nodes.append(node)
            continue
        if name not in done:
            done.add(name)
            add_constants(graph.graph, name, weights[name], scales[name])
        nodes += quantized_product(node, name, f"{name}.{len(nodes)}", stored.data_type)
    missing = scales.keys() - done
    if missing:
        raise ValueError(f"the graph has no product for {', '.join(sorted(missing))}")
    used = {name for node in nodes for name in node.input}
    nodes = [node for node in nodes if node.output[0] not in turned or node.output[0] in used]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [x for x in graph.graph.initializer if x.name in used]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


def add_constants(graph: onnx.GraphProto, name: str, weight: np.ndarray, scale: float) -> None:
    """The INT8 weight (K, N), its scales (N,), and the scale of the input."""
    channel = np.maximum(np.abs(weight).max(0), 1e-8) / LEVELS  # (N,)
    whole = np.clip(np.round(weight / channel), -LEVELS, LEVELS).astype(np.int8)
    for what, array in (("weight", whole), ("weight_scale", channel.astype(np.float32)),
                        ("weight_zero", np.zeros(len(channel), np.int8)),
                        ("scale", np.float32(scale)), ("zero", np.int8(0))):
        graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"{name}.{what}"))


def quantized_product(node: onnx.NodeProto, name: str, here: str, kind: int,
                      ) -> list[onnx.NodeProto]:
    """The nodes that replace a product x W, with FP16 around it casts too. `name` is that of the
    constants, `here` that of this place in the graph."""
    half = kind == TensorProto.FLOAT16
    source, target = node.input[0], node.output[0]
    nodes = []
    if half:  # a scale in FP16 is not what TensorRT's parser expects
        nodes.append(helper.make_node("Cast", [source], [f"{here}.x"], to=TensorProto.FLOAT))
        source, target = f"{here}.x", f"{here}.y"
    scale, weight_scale = [f"{name}.scale", f"{name}.zero"], [f"{name}.weight_scale",
                                                              f"{name}.weight_zero"]
    nodes += [
        helper.make_node("QuantizeLinear", [source, *scale], [f"{here}.xq"], f"{here}.q"),
        helper.make_node("DequantizeLinear", [f"{here}.xq", *scale], [f"{here}.xd"], f"{here}.dq"),
        helper.make_node("DequantizeLinear", [f"{name}.weight", *weight_scale], [f"{here}.wd"],
                         f"{here}.weight_dq", axis=1),
        helper.make_node("MatMul", [f"{here}.xd", f"{here}.wd"], [target], node.name)]
    if half:
        nodes.append(helper.make_node("Cast", [target], [node.output[0]], to=TensorProto.FLOAT16))
    return nodes
