"""Exported graphs without torch: the bundle that they come from, and ONNX Runtime's session.

    bundle = Bundle("jetson_bundle/step_fp32.onnx")          # or a .engine file in such a folder
    step = bundle.step(Sampler(steps=32))                    # for sampling/loop.py
    reader = bundle.reader(Sampler(steps=4))                 # for sampling/left_to_right.py

A library of generate.py, benchmark.py and export_jetson.py; it runs on Python 3.10, on the Jetson
with its own TensorRT, and never imports torch. A session takes named NumPy arrays of fixed shapes
and gives named ones.
"""

from cli import UserError, require, sha256_of

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corpus.conditions import condition_rows
from corpus.image_files import load_picture
from corpus.tokens import PAD, is_count, is_length_histogram, load_tokenizer
from jetson.reader import DeviceSlots, GraphReader, HostSlots
from jetson.tensorrt_session import TensorRTSession, building
from sampling.draft_head import DraftHead
from sampling.loop import Carried, RowCache, Step
from sampling.sampler import ORDERS, PLANNED_PACES, Sampler

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUNDLE_FORMAT, BUNDLE_VERSION = "diffusion-llm bundle", 3
BUNDLE_KEYS = ("kind", "files", "batch", "length", "dynamic", "condition_len", "guided",
               "likeliest", "length_histogram", "tokenizer_sha256")
CACHED = "cached_"  # names of the graphs behind a cache, before the precision
RESIDENT = ("keys", "values", "new_keys", "new_values")  # what of theirs never leaves the GPU
NO_THRESHOLD = 2.0  # no probability reaches it
AGAIN = "export it again, or copy the whole folder again"
LARGEST_PICTURE = 4096  # pixels across


# ---- the bundle ----------------------------------------------------------------------------------

class Bundle:
    """A folder that export_jetson.py wrote, and the sessions of one precision in it: of the step,
    and of the graph behind a cache, each opened when it is asked for. The path is that of the one
    or the other; with the latter there is no step.
    """

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
        # what a condition is; a bundle that does not say so is older, and reads text
        self.reads = self.conditional and (self.contents.get("encoder") or {
            "sort": "text", "max_len": self.condition_len})
        self.dynamic = self.contents["dynamic"]
        self.encoder = None

    @property
    def sort(self) -> str | None:
        """Of its conditions; None: it takes none."""
        return self.reads["sort"] if self.reads else None

    def read_conditions(self, texts: Sequence[str], tokenizer: "Tokenizer") -> np.ndarray:
        """The batch for these texts, (N, S), or files of pictures, (N, size, size, 4) uint8."""
        if self.sort == "image":
            return np.stack([load_picture(path, self.reads["size"]) for path in texts])
        return condition_rows(texts, tokenizer, self.reads["max_len"])

    @cached_property
    def session(self) -> "OnnxSession | TensorRTSession":
        """Of the step. Raises UserError for one whose inputs are not what bundle.json says."""
        path = self.path
        require(not path.name.startswith(CACHED), f"{path} is no unmasking step: it writes from "
                "the left (--block_size N, --verify); for whole rows name a step")
        session = open_session(path, self.contents)
        shape = [None, None] if self.dynamic else [self.batch, self.max_len]
        found = session.inputs.get("tokens", (None, None))[0]
        require(found == shape, f"{path} takes rows of shape {found}, its bundle.json says "
                                f"{shape}: {AGAIN}")
        require(("keys" in session.inputs) == self.conditional, f"{path} takes "
                f"{'no' if self.conditional else 'a'} condition, its bundle.json says otherwise: "
                f"{AGAIN}")
        return session

    def check(self, sampler: Sampler, conditional: bool) -> None:
        """Raises UserError for a sampler that this graph cannot run, with conditions or without.
        """
        likeliest = self.contents["likeliest"]
        require(not sampler.left_share, "--left_share: an exported step has not the left-to-right "
                                        "mode; leave it out, or use --checkpoint")
        require(sampler.pace != "entropy_bound", "--pace entropy_bound needs the entropy of every "
                "position, which an exported step does not give: choose another one")
        require(sampler.top_k <= likeliest, f"--top_k {sampler.top_k}: an exported step draws "
                                            f"among the {likeliest} likeliest tokens at most")
        require(not conditional or sampler.guidance in (0, 1) or self.contents["guided"],
                f"--guidance {sampler.guidance:g} needs both sides of the model in one step: "
                "export it with --guided")

    def step(self, sampler: Sampler, conditions: np.ndarray | None = None) -> Step:
        """The step of this graph and sampler for the loop of sampling/loop.py.

        `conditions`, of `read_conditions`, belong to the rows with the numbers 0 to N - 1.
        """
        self.check(sampler, conditions is not None)
        session = self.session
        options = np.array([
            sampler.temperature, sampler.top_p, sampler.top_k or self.contents["likeliest"],
            ORDERS.index(sampler.order),
            sampler.threshold if sampler.pace == "threshold" else NO_THRESHOLD,
            sampler.guidance], np.float32)
        context = self.contexts(None if sampler.guidance == 0 else conditions)

        carries = session.inputs.get("carried", ([0],))[0][-1]  # 2K of self-conditioning
        sampler.check_model(carries > 0)
        nothing_sure = options.copy()
        nothing_sure[4] = NO_THRESHOLD

        def run(tokens: np.ndarray, count: np.ndarray, noise: np.ndarray, rows: np.ndarray,
                carried: Carried = None) -> tuple[np.ndarray, np.ndarray, Carried]:
            new = tokens.copy()
            confidence = np.zeros(tokens.shape, np.float32)
            width = tokens.shape[1]
            length = width if self.dynamic else self.max_len
            made = np.zeros((*tokens.shape, carries), np.float32) if carries else None
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
                arrays = dict(tokens=padded, count=counts, noise=uniform, options=options,
                              **context(rows[part], size))
                if made is not None:
                    arrays["carried"] = np.zeros((size, length, carries), np.float32)
                    if carried is not None:
                        arrays["carried"][:filled, :width] = carried[part]
                    fresh = ~arrays["carried"].any((1, 2))
                    if fresh[:filled].any():  # looked at once before: a count of 0 draws nothing
                        look = arrays | {"count": np.zeros_like(counts), "options": nothing_sure}
                        arrays["carried"][fresh] = session.run(look)[2][fresh]
                chosen, sure, *expected = session.run(arrays)
                new[part], confidence[part] = chosen[:filled, :width], sure[:filled, :width]
                if made is not None:
                    made[part] = expected[0][:filled, :width]
            return new, confidence, made

        return run

    def reader(self, sampler: Sampler, conditions: np.ndarray | None = None, tokens: int = 1,
               ) -> GraphReader:
        """What writes from the left with this sampler, for sampling/left_to_right.py, in passes of
        up to so many tokens."""
        cached = self.contents.get("cached")
        require(cached, f"{self.path} is of a {self.kind} model, which fills whole rows alone")
        require(conditions is None, "an exported graph that writes from the left takes no "
                                    "condition: use --checkpoint")
        sampler.drawing.check()
        require(sampler.pace in PLANNED_PACES, f"--pace {sampler.pace} is not there for an "
                f"exported graph that writes from the left: choose from {', '.join(PLANNED_PACES)}")
        require(tokens <= cached["tokens"], f"--block_size: a pass of {tokens} tokens; {self.path} "
                f"takes {cached['tokens']} at most; export it with a larger --cached_tokens")
        name = self.path.name
        path = self.path.with_name(name if name.startswith(CACHED) else
                                   name.replace("step_", CACHED, 1))
        session = open_session(path, self.contents, RESIDENT)
        found = session.inputs.get("keys", ((),))[0]
        require(len(found) == 5 and found[3] == cached["slots"], f"{path} is not the graph "
                f"behind a cache that its bundle.json tells of: {AGAIN}")
        slots = (HostSlots if isinstance(session, OnnxSession) else DeviceSlots)(session)
        return GraphReader(slots, sampler, self.max_len, cached["tokens"], self.draft_head())

    def draft_head(self) -> DraftHead | None:
        """That of the model, where it has one."""
        entry = self.contents["files"].get("draft_head")
        if entry is None:
            return None
        path = checked_path(self.folder / entry["name"], self.contents)
        try:
            with np.load(path, allow_pickle=False) as file:
                return DraftHead(file)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is not a draft head: {AGAIN}") from error

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
            self.encoder = self.open_encoder()
        encoded = RowCache(lambda row: self.encoder.run({"condition": conditions[row:row + 1]}))

        def context(rows: np.ndarray, size: int) -> dict[str, np.ndarray]:
            inputs = without(size)
            for i, (keys, values, bias) in enumerate(encoded.of(rows)):
                # the batch is the second axis but for the bias
                inputs["keys"][:, i], inputs["values"][:, i] = keys[:, 0], values[:, 0]
                inputs["bias"][i] = bias[0]
            return inputs

        return context

    def open_encoder(self) -> "OnnxSession":
        """On the CPU, beside an engine too. Raises UserError for one whose conditions are not what
        bundle.json says."""
        path = self.folder / self.contents["files"]["encoder"]["name"]
        session = OnnxSession(checked_path(path, self.contents))
        across = self.reads.get("size")
        shape = [1, across, across, 4] if self.sort == "image" else [1, self.reads["max_len"]]
        found = session.inputs.get("condition", (None, None))[0]
        require(found == shape, f"{path} takes conditions of shape {found}, its bundle.json says "
                                f"{shape}: {AGAIN}")
        return session


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

    def is_read(entry: Any) -> bool:  # what a condition is; not in older bundles
        sizes = {"text": ("max_len", 2**20), "image": ("size", LARGEST_PICTURE)}
        if entry is None:
            return True
        if not (isinstance(entry, dict) and entry.get("sort") in tuple(sizes)):
            return False
        name, most = sizes[entry["sort"]]
        return is_count(entry.get(name), most)

    files, condition_len = contents["files"], contents["condition_len"]
    cached = contents.get("cached")  # only of models that write from the left
    right = {
        "cached": cached is None or isinstance(cached, dict) and all(
            is_count(cached.get(key), 2**20) for key in ("slots", "tokens")),
        "kind": isinstance(contents["kind"], str),
        "files": isinstance(files, dict) and all(map(is_file, files.values()))
        and (condition_len is None or "encoder" in files),
        "condition_len": condition_len is None or is_count(condition_len, 2**20),
        "encoder": is_read(contents.get("encoder")),
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


def open_session(path: Path, contents: dict, resident: tuple[str, ...] = (),
                 ) -> "OnnxSession | TensorRTSession":
    """Of an engine the inputs and outputs named in `resident` stay on the GPU."""
    require(path.suffix in (".onnx", ".engine"), f"{path}: name an .onnx or .engine file")
    if path.suffix == ".onnx":
        return OnnxSession(checked_path(path, contents))
    require(path.is_file(), f"{path} is missing: {building(path)}")
    return TensorRTSession(path, resident)


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
