"""A bundle's graph -> a TensorRT engine, on the device that runs it; and where there is no GPU,
NVIDIA's compiler as a check of the graphs. A library of export_jetson.py, also on the Jetson.
"""

from cli import UserError, atomic_file, require, sha256_of, write_json

import time
from functools import cache
from pathlib import Path
from typing import Any

from jetson.engine_runtime import CACHED, checked_path, read_bundle
from jetson.tensorrt_session import cuda_runtime, engine_key, engine_note, tensorrt

# Axes of the inputs (and of the outputs) that --dynamic leaves open: 0 is batch, 1 is length.
DYNAMIC_AXES = {"tokens": {0: 0, 1: 1}, "count": {0: 0}, "noise": {0: 0, 2: 1}, "options": {},
                "carried": {0: 0, 1: 1}, "keys": {1: 0}, "values": {1: 0}, "bias": {0: 0}}
# Those of a cached pass, always open: 0 is its tokens, 1 the slots and its tokens.
CACHED_AXES = {"tokens": {1: 0}, "positions": {1: 0}, "mask": {2: 0, 3: 1}, "keys": {},
               "values": {}, "carried": {1: 0}}
LIKELY_TOKENS = 8  # of a cached pass, for which TensorRT chooses its kernels


def build_engine(path: Path, workspace_mb: int) -> Path:
    """Builds an engine beside the graph, for the GPU and the TensorRT that are here.

    Types are those of the graph (strongly typed): no precision flag is set, which TensorRT 11 does
    not have any more. An engine that is there and fits is kept.
    """
    require(path.is_file() and path.suffix == ".onnx", f"--build_engine {path}: no such .onnx file")
    contents = read_bundle(path.parent)
    require(path.name != contents["files"].get("encoder", {}).get("name"),
            f"--build_engine {path}: the encoder runs once a story, in ONNX Runtime; name a step")
    runtime, trt = cuda_runtime(), tensorrt()
    key = engine_key(sha256_of(checked_path(path, contents)), trt, runtime) | {
        "workspace_mb": workspace_mb, "batch": contents["batch"], "length": contents["length"]}
    engine = path.with_suffix(".engine")
    note = engine_note(engine)
    if note and engine.is_file() and note["key"] == key and (
            note["engine_sha256"] == sha256_of(engine)):
        print(f"{engine} is there already, and fits")
        return engine
    started = time.perf_counter()
    plan = build_plan(path, contents, workspace_mb, trt)
    with atomic_file(engine) as file:
        file.write(plan)
    seconds = time.perf_counter() - started
    write_json(engine.with_suffix(".engine.json"),
               {"key": key, "engine_sha256": sha256_of(engine), "seconds": seconds})
    print(f"wrote {engine} in {seconds:.0f} s")
    return engine


def build_plan(path: Path, contents: dict, workspace_mb: int, trt: Any) -> bytes:
    """The engine of the graph at `path`, as a file holds it; keeps TensorRT's timings beside it.

    Raises UserError if TensorRT cannot build it, KeyboardInterrupt if Ctrl-C stopped it.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = 0
    for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"):  # the first is gone in 11
        value = getattr(trt.NetworkDefinitionCreationFlag, name, None)
        flags |= 0 if value is None else 1 << int(value)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        raise UserError(f"TensorRT {trt.__version__} does not take {path}: "
                        + "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    settings = builder.create_builder_config()
    settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    for profile in open_profiles(path.name, builder, network, contents):
        settings.add_optimization_profile(profile)
    settings.clear_flag(trt.BuilderFlag.TF32)  # or products in FP32 would have 10 bits
    timing = path.with_name("timing.cache")
    timings = settings.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
    if timings is None or not settings.set_timing_cache(timings, False):  # of another TensorRT
        timings = settings.create_timing_cache(b"")
        settings.set_timing_cache(timings, False)
    settings.progress_monitor = monitor = progress(trt)
    plan = builder.build_serialized_network(network, settings)
    if monitor.stopped:
        raise KeyboardInterrupt
    require(plan is not None, f"TensorRT could not build {path}: most often the memory is too "
                              "small; close other programs, or lower --workspace_mb")
    with atomic_file(timing) as file:
        file.write(bytes(timings.serialize()))
    return bytes(plan)


def open_profiles(name: str, builder: Any, network: Any, contents: dict) -> list[Any]:
    """The shapes of the graph of that name, where it leaves any open: those of a step from one row
    of 16 to the bundle's largest, best at one row of the largest length; those of a cached pass
    from one token to the most, best at `LIKELY_TOKENS`."""
    cached = name.startswith(CACHED)
    if not (cached or contents["dynamic"] and name != "encoder.onnx"):
        return []
    profile = builder.create_optimization_profile()
    if cached:
        slots, most = contents["cached"]["slots"], contents["cached"]["tokens"]
        axes_of, sizes_of = CACHED_AXES, [(n, slots + n) for n in (
            1, min(LIKELY_TOKENS, most), most)]
    else:
        axes_of, longest = DYNAMIC_AXES, contents["length"]
        sizes_of = [(1, 16), (1, longest), (contents["batch"], longest)]
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        axes, shape = axes_of[tensor.name], tuple(tensor.shape)
        profile.set_shape(tensor.name, *(
            tuple(sizes[axes[axis]] if axis in axes else size for axis, size in enumerate(shape))
            for sizes in sizes_of))
    return [profile]


def progress(trt: Any) -> Any:
    """What shows how far TensorRT is; `stopped` says that Ctrl-C ended the build."""
    from tqdm import tqdm

    class Progress(trt.IProgressMonitor):
        """A bar for every phase of the build; Ctrl-C stops it."""

        def __init__(self):
            super().__init__()
            self.bars: dict[str, Any] = {}
            self.stopped = False  # an exception would be lost in TensorRT, which calls from C++

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.bars[phase_name] = tqdm(total=num_steps, desc=phase_name, leave=False,
                                         disable=None)

        def step_complete(self, phase_name, step):
            try:
                self.bars[phase_name].update()
            except KeyboardInterrupt:
                self.stopped = True
            return not self.stopped

        def phase_finish(self, phase_name):
            self.bars.pop(phase_name).close()
    return Progress()


@cache  # TensorRT keeps the first logger of a process
def rtx_log(trt: Any) -> Any:
    """A logger of TensorRT-RTX that keeps warnings and errors in `lines`."""
    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity, message):
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message)
    return Log()


def check_rtx(folder: Path) -> None:
    """Has TensorRT-RTX parse and compile every graph of a bundle; no GPU is needed.

    A warning about FP16 layer norm is a failure.
    """
    contents = read_bundle(folder)
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise UserError("--check rtx needs TensorRT-RTX: pip install tensorrt-rtx-cu12"
                        ) from error
    log = rtx_log(trt)
    graphs = [entry for entry in contents["files"].values() if entry["name"].endswith(".onnx")]
    for entry in graphs:
        started = time.perf_counter()
        log.lines.clear()
        builder = trt.Builder(log)
        network = builder.create_network(
            1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        parsed = parser.parse((folder / entry["name"]).read_bytes())
        plan = None
        if parsed:
            settings = builder.create_builder_config()
            for profile in open_profiles(entry["name"], builder, network, contents):
                settings.add_optimization_profile(profile)
            plan = builder.build_serialized_network(network, settings)
        require(plan is not None and not log.lines, f"{entry['name']}: TensorRT-RTX "
                f"{trt.__version__} says: {'; '.join(log.lines) or 'nothing'}")
        print(f"{entry['name']}: TensorRT-RTX {trt.__version__} compiles it, "
              f"{len(bytes(plan)) / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s, no warning")
