"""TensorRT engines: how they are told apart, and how one is run. A library of engine_runtime.py,
and of engine_builder.py, which builds them.
"""

from cli import UserError, require, sha256_of

import ctypes
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


def cuda_runtime() -> Any:
    """cuda-python's runtime module, after it has found a driver and a GPU.

    TensorRT is asked only afterwards: without a driver it can end the whole process.
    """
    try:
        try:
            from cuda.bindings import runtime
        except ImportError:
            from cuda import cudart as runtime  # as older releases call it
    except ImportError as error:
        raise UserError("--engine needs cuda-python: pip install -r requirements-jetson.txt"
                        ) from error
    try:
        status, count = runtime.cudaGetDeviceCount()
    except Exception as error:  # its loader's own exceptions
        raise UserError(f"no CUDA driver here ({error}): an engine needs an NVIDIA GPU; --onnx "
                        "runs on any processor") from error
    require(int(status) != 35, "cuda-python is newer than this machine's driver: "  # insufficient
            'pip install "cuda-python<13"')
    require(int(status) == 0 and count > 0, "no CUDA driver or no GPU here: an engine needs an "
            "NVIDIA GPU; --onnx runs on any processor")
    return runtime


def tensorrt() -> Any:
    try:
        import tensorrt as module
    except ImportError as error:
        raise UserError("TensorRT is not installed for this Python: on a Jetson it comes with "
                        "JetPack, make the environment with `python3 -m venv "
                        "--system-site-packages`") from error
    return module


def device_name(runtime: Any) -> str:
    """The GPU's name, which several boards share, and what tells them apart."""
    device = checked(runtime.cudaGetDeviceProperties(0), "cudaGetDeviceProperties")
    name = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
    return (f"{name}, sm_{device.major}{device.minor}, {device.multiProcessorCount} "
            "multiprocessors")


def checked(result: tuple, what: str) -> Any:
    """What a CUDA call gives behind its status; UserError if that is an error."""
    status, *values = result if isinstance(result, tuple) else (result,)
    require(int(status) == 0, f"{what} failed (CUDA error {int(status)}): the GPU's memory may be "
                              "used up; close other programs and try again")
    return values[0] if len(values) == 1 else tuple(values)


def engine_note(engine: Path) -> dict | None:
    """What build_engine wrote beside the engine; None without it, or if it is damaged."""
    try:
        note = json.loads(engine.with_suffix(".engine.json").read_text(encoding="utf-8"))
        return note if isinstance(note["key"], dict) and note["engine_sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def engine_key(onnx_sha256: str, trt: Any, runtime: Any) -> dict:
    """What an engine can be used for, and nothing else: it does not run on another device or
    version ("serialized engines are not portable across platforms")."""
    return {"onnx_sha256": onnx_sha256, "tensorrt": trt.__version__, "device": device_name(runtime)}


def building(engine: Path) -> str:
    """What to do for an engine that is of no use here."""
    return ("build it here: python export_jetson.py --build_engine "
            f"{engine.with_suffix('.onnx')}")


def check_engine(path: Path, trt: Any, runtime: Any) -> None:
    """Raises UserError for an engine that is damaged, or was built for another device, TensorRT or
    graph than those that are here."""
    note = engine_note(path)
    require(note, f"{path}.json is missing or damaged, so nobody knows where {path} was built: "
                  f"{building(path)}")
    built, onnx = note["key"], path.with_suffix(".onnx")
    here = engine_key(sha256_of(onnx) if onnx.is_file() else built["onnx_sha256"], trt, runtime)
    other = ", ".join(f"{name} {built.get(name)}, here {here[name]}" for name in here
                      if built.get(name) != here[name])
    require(not other, f"{path} was built for something else ({other}): {building(path)}")
    require(sha256_of(path) == note["engine_sha256"], f"{path} is damaged (checksum): "
                                                      f"{building(path)}")


class Buffer(NamedTuple):
    """An input's or output's memory, for its largest shape."""

    host: np.ndarray | None  # flat; None where it stays on the GPU
    device: int  # address


class TensorRTSession:
    """An engine. Buffers are allocated once, for the largest shapes; from the second run with the
    same shapes on a CUDA graph is replayed.

    Inputs and outputs named in `resident` are never copied: `bind` says where such inputs lie.
    """

    def __init__(self, path: Path, resident: tuple[str, ...] = ()):
        self.cuda = cuda_runtime()
        trt = tensorrt()
        check_engine(path, trt, self.cuda)
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        require(self.engine is not None, f"TensorRT cannot read {path}: {building(path)}")
        self.context = self.engine.create_execution_context()
        require(self.context is not None, f"no memory for {path}: close other programs, or take a "
                                          "smaller precision")
        self.stream = checked(self.cuda.cudaStreamCreate(), "cudaStreamCreate")
        types = {trt.DataType.FLOAT: np.float32, trt.DataType.HALF: np.float16,
                 trt.DataType.INT32: np.int32}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        are_inputs = [self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names]
        self.types = {name: types[self.engine.get_tensor_dtype(name)] for name in names}
        self.inputs = {name: ([None if n < 0 else n for n in self.engine.get_tensor_shape(name)],
                              self.types[name])
                       for name, is_input in zip(names, are_inputs, strict=True) if is_input}
        self.outputs = [name for name in names if name not in self.inputs]
        self.copied = [name for name in names if name not in resident]
        self.buffers: dict[str, Buffer] = {}
        self.bound: dict[str, int] = {}  # resident inputs: their addresses
        self.graph: Any = None
        self._set_shapes({name: shape if None not in shape else tuple(
            self.engine.get_tensor_profile_shape(name, 0)[2])
            for name, (shape, _) in self.inputs.items()})
        for name in names:
            if name not in self.inputs or name in self.copied:
                self._allocate(name)
        self._forget()

    def _forget(self) -> None:
        """What was recorded is of no use any more."""
        if self.graph is not None:
            checked(self.cuda.cudaGraphExecDestroy(self.graph), "cudaGraphExecDestroy")
        self.graph, self.runs, self.shapes = None, 0, None

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, (shape, _) in self.inputs.items():
            if None in shape:
                self.context.set_input_shape(name, shapes[name])

    def _allocate(self, name: str) -> None:
        """Memory for the shape that is set."""
        size = math.prod(self.context.get_tensor_shape(name)) * np.dtype(self.types[name]).itemsize
        host = None
        if name in self.copied:
            # Pinned memory: copies from it can be part of a graph.
            pointer = checked(self.cuda.cudaHostAlloc(size, 0), "cudaHostAlloc")
            host = np.frombuffer((ctypes.c_byte * size).from_address(int(pointer)),
                                 self.types[name])
        device = int(checked(self.cuda.cudaMalloc(size), "cudaMalloc"))
        self.context.set_tensor_address(name, device)
        self.buffers[name] = Buffer(host, device)

    def zeros(self, size: int) -> int:
        """The address of that many bytes of the GPU, all 0."""
        address = int(checked(self.cuda.cudaMalloc(size), "cudaMalloc"))
        checked(self.cuda.cudaMemset(address, 0, size), "cudaMemset")
        return address

    def bind(self, addresses: dict[str, int]) -> None:
        """Where resident inputs lie from now on."""
        for name, address in addresses.items():
            if self.bound.get(name) != address:
                self.context.set_tensor_address(name, address)
                self.bound[name] = address
                self._forget()

    def copy_lines(self, target: int, target_step: int, source: int, source_step: int, size: int,
                   count: int) -> None:
        """Copies `count` lines of `size` bytes on the GPU, so many bytes from the start of one to
        that of the next."""
        checked(self.cuda.cudaMemcpy2DAsync(
            target, target_step, source, source_step, size, count,
            self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, self.stream), "cudaMemcpy2DAsync")

    def run(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs that are not resident, in their order; copies, the caller's to keep."""
        given = [name for name in self.inputs if name in self.copied]
        shapes = {name: arrays[name].shape for name in given}
        if shapes != self.shapes:
            self._forget()
            self._set_shapes(shapes)
            self.views = {name: self.buffers[name].host[:math.prod(shape)].reshape(shape)
                          for name in self.copied
                          for shape in [tuple(self.context.get_tensor_shape(name))]}
            self.shapes = shapes
        for name in given:
            self.views[name][...] = arrays[name]
        if self.graph is not None:
            checked(self.cuda.cudaGraphLaunch(self.graph, self.stream), "cudaGraphLaunch")
        else:
            self._first_runs()
        checked(self.cuda.cudaStreamSynchronize(self.stream), "cudaStreamSynchronize")
        return [self.views[name].copy() for name in self.outputs if name in self.copied]

    def _first_runs(self) -> None:
        """Once as it is, for TensorRT allocates on the way; the second one is recorded too."""
        self.runs += 1
        if self.runs == 2:
            mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            checked(self.cuda.cudaStreamBeginCapture(self.stream, mode), "cudaStreamBeginCapture")
            self._enqueue()
            recorded = checked(self.cuda.cudaStreamEndCapture(self.stream), "cudaStreamEndCapture")
            self.graph = checked(self.cuda.cudaGraphInstantiate(recorded, 0),
                                 "cudaGraphInstantiate")
            checked(self.cuda.cudaGraphDestroy(recorded), "cudaGraphDestroy")
            checked(self.cuda.cudaGraphLaunch(self.graph, self.stream), "cudaGraphLaunch")
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        kinds = self.cuda.cudaMemcpyKind

        def copy(name: str, kind: Any) -> None:
            view, device = self.views[name], self.buffers[name].device
            ends = ((device, view.ctypes.data) if kind == kinds.cudaMemcpyHostToDevice else
                    (view.ctypes.data, device))
            checked(self.cuda.cudaMemcpyAsync(*ends, view.nbytes, kind, self.stream),
                    "cudaMemcpyAsync")

        for name in self.copied:
            if name in self.inputs:
                copy(name, kinds.cudaMemcpyHostToDevice)
        require(self.context.execute_async_v3(int(self.stream)), "TensorRT could not run the step")
        for name in self.copied:
            if name in self.outputs:
                copy(name, kinds.cudaMemcpyDeviceToHost)
