"""Exported steps without torch: ONNX Runtime and TensorRT sessions, and the bundle they come from.

    bundle = Bundle("jetson_bundle/step_fp32.onnx")          # or a .engine file in such a folder
    step = bundle.step(Sampler(steps=32))                    # for sampling/loop.py

A library of generate.py, benchmark.py and export_jetson.py; it runs on Python 3.10, on the Jetson
with its own TensorRT, and never imports torch. A session takes named NumPy arrays of fixed shapes
and gives named ones.
"""

from cli import UserError, require, sha256_of

import ctypes
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from corpus.tokens import PAD, is_count, is_length_histogram, load_tokenizer
from sampling.loop import RowCache, Step
from sampling.sampler import ORDERS, Sampler

BUNDLE_FORMAT, BUNDLE_VERSION = "diffusion-llm bundle", 1
BUNDLE_KEYS = ("kind", "files", "batch", "length", "dynamic", "condition_len", "guided",
               "likeliest", "length_histogram", "tokenizer_sha256")
NO_THRESHOLD = 2.0  # no probability reaches it
AGAIN = "export it again, or copy the whole folder again"


# ---- the bundle ----------------------------------------------------------------------------------

class Bundle:
    """A folder that export_jetson.py wrote, and the sessions of one step in it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        require(self.path.is_file(), f"no file {path}: name an .onnx or .engine file in a folder "
                                     "of export_jetson.py")
        self.folder = self.path.parent
        self.contents = read_bundle(self.folder)
        self.tokenizer = load_tokenizer(read_checked(
            self.folder / "tokenizer.json", self.contents["tokenizer_sha256"]).decode())
        self.max_len, self.batch = self.contents["length"], self.contents["batch"]
        self.condition_len, self.kind = self.contents["condition_len"], self.contents["kind"]
        self.conditional = self.condition_len is not None
        self.session = open_session(self.path, self.contents)
        self.dynamic = self.contents["dynamic"]
        shape = [None, None] if self.dynamic else [self.batch, self.max_len]
        found = self.session.inputs.get("tokens", (None, None))[0]
        require(found == shape, f"{path} takes rows of shape {found}, its bundle.json says "
                                f"{shape}: {AGAIN}")
        require(("keys" in self.session.inputs) == self.conditional, f"{path} takes "
                f"{'no' if self.conditional else 'a'} condition, its bundle.json says otherwise: "
                f"{AGAIN}")
        self.encoder = None

    def check(self, sampler: Sampler, conditional: bool) -> None:
        """Raises UserError for a sampler that this graph cannot run, with conditions or without.
        """
        likeliest = self.contents["likeliest"]
        require(sampler.pace != "entropy_bound", "--pace entropy_bound needs the entropy of every "
                "position, which an exported step does not give: choose another one")
        require(sampler.top_k <= likeliest, f"--top_k {sampler.top_k}: an exported step draws "
                                            f"among the {likeliest} likeliest tokens at most")
        require(not conditional or sampler.guidance in (0, 1) or self.contents["guided"],
                f"--guidance {sampler.guidance:g} needs both sides of the model in one step: "
                "export it with --guided")

    def step(self, sampler: Sampler, conditions: np.ndarray | None = None) -> Step:
        """The step of this graph and sampler for the loop of sampling/loop.py.

        `conditions` (N, S) int64 belong to the rows with the numbers 0 to N - 1.
        """
        self.check(sampler, conditions is not None)
        options = np.array([
            sampler.temperature, sampler.top_p, sampler.top_k or self.contents["likeliest"],
            ORDERS.index(sampler.order),
            sampler.threshold if sampler.pace == "threshold" else NO_THRESHOLD,
            sampler.guidance], np.float32)
        context = self.contexts(None if sampler.guidance == 0 else conditions)

        def run(tokens: np.ndarray, count: np.ndarray, noise: np.ndarray, rows: np.ndarray,
                ) -> tuple[np.ndarray, np.ndarray]:
            new = tokens.copy()
            confidence = np.zeros(tokens.shape, np.float32)
            width = tokens.shape[1]
            length = width if self.dynamic else self.max_len
            for start in range(0, len(tokens), self.batch):
                part = slice(start, start + self.batch)
                filled = len(tokens[part])  # a batch that is not full has empty rows behind them
                size = filled if self.dynamic else self.batch
                padded = np.full((size, length), PAD, np.int64)
                padded[:filled, :width] = tokens[part]
                uniform = np.zeros((size, 2, length), np.float32)
                # just below 1, where FP32 rounds up to it
                uniform[:filled, :, :width] = np.minimum(noise[part], np.float32(1 - 2**-24))
                counts = np.zeros(size, np.int64)
                counts[:filled] = count[part]
                outputs = self.session.run(dict(
                    tokens=padded, count=counts, noise=uniform, options=options,
                    **context(rows[part], size)))
                new[part], confidence[part] = (array[:filled, :width] for array in outputs)
            return new, confidence

        return run

    def contexts(self, conditions: np.ndarray | None,
                 ) -> Callable[[np.ndarray, int], dict[str, np.ndarray]]:
        """A function (rows' numbers, size of the batch) -> the graph's inputs for their conditions,
        beside them in a larger batch those of none."""
        if not self.conditional:
            return lambda rows, size: {}
        names = ("keys", "values", "bias")

        def without(size: int) -> dict[str, np.ndarray]:  # values of zero: no condition
            return {name: np.zeros([size if axis == (name != "bias") else n for axis, n in
                                    enumerate(self.session.inputs[name][0])], np.float32)
                    for name in names}

        if conditions is None:
            return lambda rows, size: without(size)
        if self.encoder is None:
            path = self.folder / self.contents["files"]["encoder"]["name"]
            self.encoder = OnnxSession(checked_path(path, self.contents))
        encoded = RowCache(lambda row: self.encoder.run({"condition": conditions[row:row + 1]}))

        def context(rows: np.ndarray, size: int) -> dict[str, np.ndarray]:
            inputs = without(size)
            for i, (keys, values, bias) in enumerate(encoded.of(rows)):
                # the batch is the second axis but for the bias
                inputs["keys"][:, i], inputs["values"][:, i] = keys[:, 0], values[:, 0]
                inputs["bias"][i] = bias[0]
            return inputs

        return context


def read_bundle(folder: Path) -> dict:
    """bundle.json, checked to be one that this version reads."""
    path = folder / "bundle.json"
    require(path.is_file(), f"no bundle.json in {folder}: name a file in a folder that "
                            "export_jetson.py wrote")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        known, version = contents["format"] == BUNDLE_FORMAT, contents["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    require(known, f"{path} is not the description of a bundle: {AGAIN}")
    require(version == BUNDLE_VERSION, f"{path} has bundle format version {version}, this program "
            f"reads version {BUNDLE_VERSION}: use the program in that folder, or export it again")
    missing = [key for key in BUNDLE_KEYS if key not in contents]
    require(not missing, f"{path} lacks {', '.join(missing)}: {AGAIN}")
    wrong = wrong_entries(contents)
    require(not wrong, f"{path} is damaged ({', '.join(wrong)}): {AGAIN}")
    return contents


def wrong_entries(contents: dict) -> list[str]:
    """The names of the entries of bundle.json that are not of the form that is written."""
    def is_file(entry: Any) -> bool:  # of this very folder
        return (isinstance(entry, dict)
                and all(isinstance(entry.get(key), str) for key in ("name", "sha256"))
                and re.fullmatch(r"\w[\w.]*", entry["name"], re.ASCII) is not None)

    files, condition_len = contents["files"], contents["condition_len"]
    right = {
        "kind": isinstance(contents["kind"], str),
        "files": isinstance(files, dict) and all(map(is_file, files.values()))
        and (condition_len is None or "encoder" in files),
        "condition_len": condition_len is None or is_count(condition_len, 2**20),
        "length_histogram": is_length_histogram(contents["length_histogram"]),
        "tokenizer_sha256": isinstance(contents["tokenizer_sha256"], str),
        **{key: is_count(contents[key], 2**20) for key in ("batch", "length", "likeliest")},
        **{key: isinstance(contents[key], bool) for key in ("dynamic", "guided")}}
    return [key for key, fine in right.items() if not fine]


def read_checked(path: Path, sha256: str) -> bytes:
    """A small file of a bundle, checked against bundle.json."""
    require(path.is_file(), f"{path} is missing: {AGAIN}")
    require(sha256_of(path) == sha256, f"{path} is damaged (checksum): {AGAIN}")
    return path.read_bytes()


def checked_path(path: Path, contents: dict) -> Path:
    """The path of an ONNX file of the bundle, whose checksum is right."""
    require(path.is_file(), f"{path} is missing: {AGAIN}")
    known = {entry["name"]: entry["sha256"] for entry in contents["files"].values()}
    require(path.name in known, f"{path} is not in the bundle.json beside it: {AGAIN}")
    require(sha256_of(path) == known[path.name], f"{path} is damaged (checksum): {AGAIN}")
    return path


def open_session(path: Path, contents: dict) -> "OnnxSession | TensorRTSession":
    require(path.suffix in (".onnx", ".engine"), f"{path}: name an .onnx or .engine file")
    return (OnnxSession(checked_path(path, contents)) if path.suffix == ".onnx"
            else TensorRTSession(path))


# ---- ONNX Runtime --------------------------------------------------------------------------------

ONNX_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16,
              "tensor(int32)": np.int32}


class OnnxSession:
    """A graph in ONNX Runtime on the CPU. `inputs` is {name: (shape, dtype)}, None in a shape is
    any size."""

    def __init__(self, path: Path, threads: int = 0):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{path} needs ONNX Runtime: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options,
                                                        providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class
            raise UserError(f"{path} is no graph that ONNX Runtime can run: {AGAIN}") from error
        self.inputs = {x.name: ([n if isinstance(n, int) else None for n in x.shape],
                                ONNX_TYPES[x.type]) for x in self.session.get_inputs()}
        self.outputs = [x.name for x in self.session.get_outputs()]

    def run(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs, in their order. Inputs that the graph does not have are left out."""
        return self.session.run(self.outputs, {
            name: arrays[name].astype(dtype, copy=False) for name, (_, dtype)
            in self.inputs.items()})


# ---- TensorRT ------------------------------------------------------------------------------------

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


class TensorRTSession:
    """An engine. Buffers are allocated once, for the largest shapes; from the second run with the
    same shapes on a CUDA graph is replayed."""

    def __init__(self, path: Path):
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
        tokens_shape: list[int] = []
        types = {trt.DataType.FLOAT: np.float32, trt.DataType.HALF: np.float16,
                 trt.DataType.INT32: np.int32}
        self.inputs, self.outputs, self.buffers = {}, [], {}
        for i in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(i)
            shape = [None if n < 0 else n for n in self.engine.get_tensor_shape(name)]
            dtype = np.dtype(types[self.engine.get_tensor_dtype(name)])
            if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self.inputs[name] = (shape, dtype.type)
                largest = shape if None not in shape else list(
                    self.engine.get_tensor_profile_shape(name, 0)[2])
                tokens_shape = largest if name == "tokens" else tokens_shape
            else:
                self.outputs.append(name)
                largest = tokens_shape  # new tokens and confidences have it too
            self._allocate(name, largest, dtype)
        self.graph, self.runs, self.shapes = None, 0, None

    def _allocate(self, name: str, shape: list[int], dtype: np.dtype) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        # Pinned memory: copies from it can be part of a graph.
        pointer = checked(self.cuda.cudaHostAlloc(size, 0), "cudaHostAlloc")
        host = np.frombuffer((ctypes.c_byte * size).from_address(int(pointer)), dtype)
        device = checked(self.cuda.cudaMalloc(size), "cudaMalloc")
        self.context.set_tensor_address(name, int(device))
        self.buffers[name] = (host, int(pointer), int(device))

    def run(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs, in their order; copies, the caller's to keep."""
        shapes = {name: arrays[name].shape for name in self.inputs}
        if shapes != self.shapes:
            self._use(shapes)
        for name in self.inputs:
            self.views[name][...] = arrays[name]
        if self.graph is not None:
            checked(self.cuda.cudaGraphLaunch(self.graph, self.stream), "cudaGraphLaunch")
        else:
            self._first_runs()
        checked(self.cuda.cudaStreamSynchronize(self.stream), "cudaStreamSynchronize")
        return [self.views[name].copy() for name in self.outputs]

    def _use(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Other shapes than in the run before: what was recorded is of no use any more."""
        for name, (shape, _) in self.inputs.items():
            if None in shape:
                self.context.set_input_shape(name, shapes[name])
        self.views = {name: host[:math.prod(shape)].reshape(shape) for name, (host, shape) in {
            name: (self.buffers[name][0], shapes.get(name, shapes["tokens"]))
            for name in self.buffers}.items()}
        self.graph, self.runs, self.shapes = None, 0, shapes

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
            checked(self.cuda.cudaGraphLaunch(self.graph, self.stream), "cudaGraphLaunch")
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        kinds = self.cuda.cudaMemcpyKind
        for name in self.inputs:
            _, host, device = self.buffers[name]
            size = self.views[name].nbytes
            checked(self.cuda.cudaMemcpyAsync(device, host, size, kinds.cudaMemcpyHostToDevice,
                                              self.stream), "cudaMemcpyAsync")
        require(self.context.execute_async_v3(int(self.stream)), "TensorRT could not run the step")
        for name in self.outputs:
            _, host, device = self.buffers[name]
            size = self.views[name].nbytes
            checked(self.cuda.cudaMemcpyAsync(host, device, size, kinds.cudaMemcpyDeviceToHost,
                                              self.stream), "cudaMemcpyAsync")
