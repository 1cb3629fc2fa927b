"""The TensorRT code against the recorded API of two releases: a contract test, not a run of it.

No TensorRT is here. A stand-in lets through only the names that tensorrt_api.json holds (taken from
the real bindings of 10.3 and 11.4), keeps "device memory" on the host and runs the graph in ONNX
Runtime, so that buffers, copies, capture and replay can be followed to the stories.
"""

from cli import sha256_of

import ctypes
import enum
import json
import shutil
import sys
import types

import numpy as np
import pytest
from conftest import ROOT
from test_export_cached import STARTS, written
from test_export_jetson import ROWS, stories

import generate
from export_jetson import main
from jetson import engine_builder
from jetson.engine_runtime import Bundle
from jetson.tensorrt_session import cuda_runtime
from sampling.sampler import Sampler

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
API = json.loads((ROOT / "tests" / "tensorrt_api.json").read_text())


class Cuda(types.ModuleType):
    """cuda-python's runtime: every call gives (status, value)."""

    def __init__(self, devices: int = 1):
        super().__init__("runtime")
        self.devices, self.memory, self.recording, self.replays = devices, {}, None, 0
        self.graphs = []  # recorded, and not destroyed
        self.cudaMemcpyKind = types.SimpleNamespace(
            cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
        self.cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def cudaGetDeviceCount(self):
        return (0, self.devices) if self.devices > 0 else (35 if self.devices else 100, 0)

    def cudaGetDeviceProperties(self, device):
        return 0, types.SimpleNamespace(name=b"Orin", major=8, minor=7, multiProcessorCount=8)

    def _memory(self, size):
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cudaHostAlloc(self, size, flags):
        return self._memory(size)

    def cudaMalloc(self, size):
        return self._memory(size)

    def cudaStreamCreate(self):
        return 0, 7

    def do(self, what):
        assert what is not None
        if self.recording is None:
            what()
        else:
            self.recording.append(what)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        assert kind in (1, 2) and stream == 7
        self.do(lambda: ctypes.memmove(target, source, size))
        return (0,)

    def cudaMemset(self, target, value, size):
        ctypes.memset(target, value, size)
        return (0,)

    def cudaMemcpy2DAsync(self, target, target_step, source, source_step, size, count, kind,
                          stream):
        assert kind == 3 and stream == 7 and size <= min(target_step, source_step)
        for i in range(count):
            self.inside(target + i * target_step, size)
            self.inside(source + i * source_step, size)
            ctypes.memmove(target + i * target_step, source + i * source_step, size)
        return (0,)

    def inside(self, address, size):
        """Asserts that these bytes lie in one allocation."""
        assert any(start <= address and address + size <= start + len(buffer)
                   for start, buffer in self.memory.items())

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream):
        graph, self.recording = self.recording, None
        return 0, graph

    def cudaGraphInstantiate(self, graph, flags):
        self.graphs.append([*graph])
        return 0, self.graphs[-1]

    def cudaGraphDestroy(self, graph):
        graph.clear()
        return (0,)

    def cudaGraphExecDestroy(self, graph):
        self.graphs = [other for other in self.graphs if other is not graph]
        return (0,)

    def cudaGraphLaunch(self, graph, stream):
        assert any(graph is other for other in self.graphs)
        self.replays += 1
        for what in graph:
            what()
        return (0,)

    def cudaStreamSynchronize(self, stream):
        return (0,)


def strict(names: list[str]):
    """A class decorator: only these names may be read or set from outside."""
    def wrap(cls):
        class Strict:
            def __init__(self, *args):
                object.__setattr__(self, "inside", cls(*args))

            def __getattr__(self, name):
                assert name in names, f"{cls.__name__} has no {name}"
                return getattr(object.__getattribute__(self, "inside"), name)

            def __setattr__(self, name, value):
                assert name in names, f"{cls.__name__} has no {name}"
                setattr(self.inside, name, value)
        return Strict
    return wrap


def stand_in(version: str, cuda: Cuda) -> types.ModuleType:
    """A module `tensorrt` of that release."""
    import onnxruntime
    api = API[version]
    trt = types.ModuleType("tensorrt")
    trt.__version__ = version
    for name in ("NetworkDefinitionCreationFlag", "BuilderFlag", "MemoryPoolType", "TensorIOMode",
                 "DataType"):
        members = [member for member in api[name] if member.isupper() or member == "TF32"]
        setattr(trt, name, enum.IntEnum(name, {m: i for i, m in enumerate(members)}))

    @strict(api["Logger"])
    class Logger:
        def __init__(self, severity=None):
            pass
    Logger.WARNING, Logger.ERROR = 1, 2
    trt.Logger = Logger

    class IProgressMonitor:
        pass
    trt.IProgressMonitor = IProgressMonitor

    @strict(api["ITimingCache"])
    class Cache:
        def __init__(self, content):
            self.content = content

        def serialize(self):
            return self.content + b"timed"

    @strict(api["IBuilderConfig"])
    class Settings:
        progress_monitor = None

        def __init__(self):
            self.cleared = []

        def set_memory_pool_limit(self, pool, size):
            assert pool == trt.MemoryPoolType.WORKSPACE and size >= 2**20

        def clear_flag(self, flag):
            self.cleared.append(flag)

        def create_timing_cache(self, content):
            return None if content == b"not mine" else Cache(content)

        def add_optimization_profile(self, profile):
            self.profile = profile

        def set_timing_cache(self, cache, mismatch):
            assert mismatch is False
            return True

    plans = {}  # graph: the profile with which it was built

    @strict(api["INetworkDefinition"])
    class Network:
        graph = None

        @property
        def num_inputs(self):
            return len(self.inputs())

        def inputs(self):
            return onnxruntime.InferenceSession(self.graph, providers=[
                "CPUExecutionProvider"]).get_inputs()

        def get_input(self, i):
            x = self.inputs()[i]
            return types.SimpleNamespace(name=x.name, shape=[
                n if isinstance(n, int) else -1 for n in x.shape])

    @strict(api["IOptimizationProfile"])
    class Profile:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, name, smallest, best, largest):
            assert all(a <= b <= c for a, b, c in zip(smallest, best, largest, strict=True))
            self.shapes[name] = (smallest, best, largest)

    @strict(api["Builder"])
    class Builder:
        def __init__(self, logger):
            pass

        def create_network(self, flags):
            strongly = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            assert flags >> int(strongly) & 1
            return Network()

        def create_builder_config(self):
            return Settings()

        def build_serialized_network(self, network, settings):
            monitor = settings.progress_monitor
            monitor.phase_start("build", None, 2)
            going_on = monitor.step_complete("build", 1)
            monitor.phase_finish("build")
            assert settings.inside.cleared == [trt.BuilderFlag.TF32]
            if not going_on:
                return None
            plans[network.inside.graph] = getattr(settings.inside, "profile", None)
            return bytearray(network.inside.graph)

        def create_optimization_profile(self):
            return Profile()
    trt.Builder = Builder

    @strict(api["OnnxParser"])
    class OnnxParser:
        num_errors = 1

        def __init__(self, network, logger):
            self.network = network

        def parse(self, content):
            self.network.inside.graph = content
            return content.startswith(b"\x08")

        def get_error(self, i):
            return "no such operator"
    trt.OnnxParser = OnnxParser

    @strict(api["IExecutionContext"])
    class Context:
        def __init__(self, session):
            self.session, self.addresses, self.shapes = session, {}, {}

        def set_input_shape(self, name, shape):
            self.shapes[name] = shape
            return True

        def set_tensor_address(self, name, address):
            self.addresses[name] = address

        def execute_async_v3(self, stream):
            assert stream == 7
            cuda.do(self.run)
            return True

        def get_tensor_shape(self, name):
            sizes = {letter: n for x in self.session.get_inputs() if x.name in self.shapes
                     for letter, n in zip(x.shape, self.shapes[x.name], strict=True)}
            x = next(x for x in (*self.session.get_inputs(), *self.session.get_outputs())
                     if x.name == name)
            return tuple(n if isinstance(n, int) else sizes[n] for n in x.shape)

        def array(self, x):
            dtype, shape = TYPES[x.type], self.get_tensor_shape(x.name)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return np.frombuffer((ctypes.c_byte * size).from_address(self.addresses[x.name]),
                                 dtype).reshape(shape)

        def run(self):
            inputs = {x.name: self.array(x) for x in self.session.get_inputs()}
            for x, value in zip(self.session.get_outputs(), self.session.run(None, inputs),
                                strict=True):
                self.array(x)[...] = value

    @strict(api["ICudaEngine"])
    class Engine:
        def __init__(self, content):
            self.session = onnxruntime.InferenceSession(content,
                                                        providers=["CPUExecutionProvider"])
            self.profile = plans[content]
            self.tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
            self.num_io_tensors = len(self.tensors)

        def get_tensor_name(self, i):
            return self.tensors[i].name

        def of(self, name):
            return next(x for x in self.tensors if x.name == name)

        def get_tensor_shape(self, name):
            return tuple(n if isinstance(n, int) else -1 for n in self.of(name).shape)

        def get_tensor_profile_shape(self, name, profile):
            return self.profile.inside.shapes[name]

        def get_tensor_dtype(self, name):
            return {np.float32: trt.DataType.FLOAT, np.float16: trt.DataType.HALF,
                    np.int32: trt.DataType.INT32}[TYPES[self.of(name).type]]

        def get_tensor_mode(self, name):
            inputs = [x.name for x in self.session.get_inputs()]
            return trt.TensorIOMode.INPUT if name in inputs else trt.TensorIOMode.OUTPUT

        def create_execution_context(self):
            return Context(self.session)

    @strict(api["Runtime"])
    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, content):
            return Engine(content) if content.startswith(b"\x08") else None
    trt.Runtime = Runtime
    return trt


@pytest.fixture
def device(monkeypatch):
    def have(version: str = "10.3.0", devices: int = 1) -> Cuda:
        cuda = Cuda(devices)
        package = types.ModuleType("cuda")
        package.bindings = types.ModuleType("cuda.bindings")
        package.bindings.runtime = cuda
        for name, module in (("cuda", package), ("cuda.bindings", package.bindings),
                             ("cuda.bindings.runtime", cuda),
                             ("tensorrt", stand_in(version, cuda))):
            monkeypatch.setitem(sys.modules, name, module)
        return cuda
    return have


@pytest.fixture
def copy(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("version", list(API))
def test_an_engine_is_built_and_tells_the_stories_of_its_graph(version, device, copy, capsys):
    cuda = device(version)
    main(["--build_engine", str(copy / "step_fp32.onnx")])
    assert "wrote" in capsys.readouterr().out and (copy / "timing.cache").read_bytes() == b"timed"
    engine = Bundle(copy / "step_fp32.engine")
    sampler = Sampler(steps=5, top_k=64)
    expected = stories(Bundle(copy / "step_fp32.onnx").step(sampler), sampler)
    assert stories(engine.step(sampler), sampler) == expected
    assert cuda.replays == 5 * len(ROWS) - 1  # all but the first step
    assert len(cuda.graphs) == 1
    # a second build finds what is there
    main(["--build_engine", str(copy / "step_fp32.onnx")])
    assert "is there already" in capsys.readouterr().out
    generate.main(["--engine", str(copy / "step_fp32.engine"), "--steps", "3", "--num_samples",
                   "1"])
    assert "--- 1 ---" in capsys.readouterr().out


def test_an_engine_of_open_shapes(device, dynamic_bundle, tmp_path):
    device()
    copy = tmp_path / "copy"
    shutil.copytree(dynamic_bundle, copy)
    main(["--build_engine", str(copy / "step_fp32.onnx")])
    sampler, told = Sampler(steps=4), np.array([[2, 20 + i, 3, *[0] * 29] for i in range(3)])
    assert stories(Bundle(copy / "step_fp32.engine").step(sampler, told), sampler) == stories(
        Bundle(copy / "step_fp32.onnx").step(sampler, told), sampler)


@pytest.mark.parametrize("version", list(API))
@pytest.mark.parametrize(("precision", "mode"), [
    ("fp32", "causal"), ("fp32", "verified"), ("fp32", "by head"), ("fp32", "4"),
    ("fp16", "verified")])
def test_an_engine_behind_a_cache(version, precision, mode, device, joint_bundle, tmp_path):
    """Keys and values stay on the GPU; three rows, so three caches for a graph of one row."""
    cuda = device(version)
    copy = shutil.copytree(joint_bundle, tmp_path / "copy")
    graph = copy / f"cached_{precision}.onnx"
    main(["--build_engine", str(graph)])
    sampler = Sampler(steps=0 if mode == "by head" else 2)
    mode = mode.replace("by head", "verified")
    reader = Bundle(graph.with_suffix(".engine")).reader(sampler)
    assert written(reader, sampler, mode) == written(Bundle(graph).reader(sampler), sampler, mode)
    assert {name for name, (host, _) in reader.slots.session.buffers.items() if host is None} == {
        "new_keys", "new_values"}
    cuda.replays = 0
    alone = [STARTS[1]]
    assert written(reader, sampler, mode, starts=alone) == written(
        Bundle(graph).reader(sampler), sampler, mode, starts=alone)
    assert cuda.replays  # of a single row
    assert len(cuda.graphs) <= 1  # one session, and its passes are of two sizes


def test_rows_side_by_side_behind_a_cache(device, joint_pairs_bundle, tmp_path, capsys):
    device()
    graph = shutil.copytree(joint_pairs_bundle, tmp_path / "copy") / "cached_fp32.onnx"
    main(["--build_engine", str(graph)])
    sampler = Sampler(steps=2)
    a, b = (written(Bundle(path).reader(sampler), sampler, "verified") for path in (
        graph, graph.with_suffix(".engine")))
    assert a == b
    capsys.readouterr()
    told = []  # on the command line, in graphs that take two rows
    for source in (["--onnx", graph], ["--engine", graph.with_suffix(".engine")]):
        generate.main([*map(str, source), "--verify", "--stream", "--prompt", "Tom had a fri"])
        told.append(capsys.readouterr().out.rsplit("\n", 2)[0])
    assert told[0] == told[1] and told[0].count("---\nTom had a fri") == 3


def test_an_engine_that_is_not_there_is_named(device, joint_bundle, tmp_path, fails):
    device()
    copy = shutil.copytree(joint_bundle, tmp_path / "copy")
    main(["--build_engine", str(copy / "step_fp32.onnx")])
    bundle = Bundle(copy / "step_fp32.engine")
    assert f"--build_engine {copy / 'cached_fp32.onnx'}" in fails(
        lambda argv: bundle.reader(Sampler()))


def test_an_engine_of_another_device_is_refused(device, copy, fails):
    device()
    main(["--build_engine", str(copy / "step_fp32.onnx")])

    def told() -> str:
        return fails(generate.main, "--engine", copy / "step_fp32.engine")
    device("11.4.0.106")
    assert "tensorrt 10.3.0, here 11.4.0.106): build it here: python export_jetson.py" in told()
    device()
    note = copy / "step_fp32.engine.json"
    changed = json.loads(note.read_text())
    here = changed["key"]["device"]
    changed["key"]["device"] = "RTX 5060 Ti"
    note.write_text(json.dumps(changed))
    assert "device RTX 5060 Ti, here Orin" in told()
    note.unlink()
    assert "nobody knows where" in told()
    note.write_text("{}")
    assert "nobody knows where" in told()
    engine = copy / "step_fp32.engine"
    engine.write_bytes(b"broken")
    changed["key"]["device"] = here
    note.write_text(json.dumps(changed))
    assert "is damaged (checksum)" in told()
    changed["engine_sha256"] = sha256_of(engine)
    note.write_text(json.dumps(changed))
    assert "TensorRT cannot read" in told()


def test_an_engine_that_was_cut_off_is_built_again(device, copy, capsys):
    device()
    for damage in (lambda: (copy / "step_fp32.engine").write_bytes(b"\x08"),
                   lambda: (copy / "step_fp32.engine.json").write_text("")):
        main(["--build_engine", str(copy / "step_fp32.onnx")])
        damage()
        capsys.readouterr()
        main(["--build_engine", str(copy / "step_fp32.onnx")])
        assert "wrote" in capsys.readouterr().out
        Bundle(copy / "step_fp32.engine")


def test_ctrl_c_stops_a_build_and_leaves_nothing(device, copy, monkeypatch):
    device()

    def interrupt(self, n=1):
        raise KeyboardInterrupt
    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine_builder.build_engine(copy / "step_fp32.onnx", 64)
    assert not list(copy.glob("*.engine*"))


def test_a_timing_cache_of_another_tensorrt_is_left(device, copy):
    device()
    (copy / "timing.cache").write_bytes(b"not mine")
    main(["--build_engine", str(copy / "step_fp32.onnx")])
    assert (copy / "timing.cache").read_bytes() == b"timed"


def test_what_is_missing_is_one_line(device, copy, fails, monkeypatch):
    graph = copy / "step_fp32.onnx"
    monkeypatch.setitem(sys.modules, "cuda", None)
    assert "needs cuda-python" in fails(main, "--build_engine", graph)
    device(devices=0)
    assert "no CUDA driver or no GPU here" in fails(main, "--build_engine", graph)
    device(devices=-1)
    assert "newer than this machine's driver" in fails(main, "--build_engine", graph)
    device()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT is not installed" in fails(main, "--build_engine", graph)
    device()
    assert "no such .onnx file" in fails(main, "--build_engine", copy / "nothing.onnx")
    graph.write_bytes(b"broken")
    assert "is damaged (checksum)" in fails(main, "--build_engine", graph)
    contents = json.loads((copy / "bundle.json").read_text())
    contents["files"]["fp32"]["sha256"] = sha256_of(graph)
    contents["files"]["encoder"] = {"name": "encoder.onnx", "sha256": "x"}
    (copy / "bundle.json").write_text(json.dumps(contents))
    assert "does not take" in fails(main, "--build_engine", graph)
    shutil.copy(graph, copy / "encoder.onnx")
    assert "name a step" in fails(main, "--build_engine", copy / "encoder.onnx")
    assert not list(copy.glob("*.engine*"))


def test_memory_that_is_used_up(device, copy, fails, monkeypatch):
    device()
    main(["--build_engine", str(copy / "step_fp32.onnx")])
    monkeypatch.setattr(Cuda, "cudaMalloc", lambda self, size: (2, None))
    assert "cudaMalloc failed (CUDA error 2)" in fails(
        generate.main, "--engine", copy / "step_fp32.engine")


def test_the_older_name_of_cuda_python(device, monkeypatch):
    cuda = device()
    package = types.ModuleType("cuda")
    package.cudart = cuda
    for name in ("cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.cudart", cuda)
    assert cuda_runtime() is cuda
