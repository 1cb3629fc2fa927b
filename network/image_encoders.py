"""Encoders that read pictures: one that is trained here, and one that somebody else has trained. A
library of encoders.py.
"""

from cli import UserError, require

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.image_files import load_picture
from corpus.pictures import PictureRows
from corpus.rows import TokenRows
from corpus.tokens import EOS, sha256
from network.attention import View
from network.conditioning import ConditionEncoder, Reading
from network.edges import CELLS, FEATURES, EdgesAndColours
from network.layers import Linear, ModelConfig, rms_norm
from network.transformer import BlockStack, check_blocks, make_blocks


class PictureReader(ConditionEncoder):
    """What they have in common: a batch is (B, size, size, 4) uint8, the fourth channel 0 where
    there is no picture, as the data folder has them."""

    placed, of_pictures = False, True
    size: int

    def conditions_of(self, rows: TokenRows, path: Any = None) -> PictureRows:
        pictures = PictureRows(rows.data_dir, f"{rows.split}_condition")
        require(len(pictures) == len(rows), f"{rows.data_dir} has {len(pictures)} pictures for "
                f"{len(rows)} rows of {rows.split}; prepare the data again")
        require(path is None or pictures.size == self.size, f"{rows.data_dir} has pictures of "
                f"{pictures.size} x {pictures.size}, {path} reads {self.size} x {self.size}: "
                f"prepare them with --image_size {self.size}")
        return pictures

    def read(self, texts: Sequence[str], tokenizer: Any) -> np.ndarray:
        """The pictures in files of these names."""
        return np.stack([load_picture(path, self.size) for path in texts])

    def without(self, batch: Tensor, rows: Tensor) -> Tensor:
        return batch.masked_fill(rows[:, None, None, None], 0)

    def vary(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return varied(batch, generator)

    def example(self, rows: int) -> Tensor:
        return torch.full((rows, self.size, self.size, 4), 255, dtype=torch.uint8)

    def show(self, condition: np.ndarray, tokenizer: Any) -> str:
        return "a picture" if condition[..., 3].any() else "no picture"


class ImageEncoder(BlockStack, PictureReader):
    """Reads pictures, in patches: (B, size, size, 4) uint8, the fourth channel 0 where there is no
    picture (arXiv 2010.11929, with the blocks of the denoiser).

    Of a patch it is given edges and colours (network/edges.py), not pixels. Where a patch stands is
    told by a learned vector, and by rotary positions in two dimensions: the first half of a head's
    pairs is turned by its row, the second by its column. Every block of the denoiser reads the last
    states: what is shown is only there.
    """

    sort = "image"

    def __init__(self, config: ModelConfig, size: int, patch: int):
        super().__init__()
        require(patch > 0 and not size % patch and not patch % CELLS, f"pictures of {size} x "
                f"{size} cannot be cut into patches of {patch} x {patch}")
        self.config, self.size, self.patch = config, size, patch
        self.width, self.compute_dtype = config.width, torch.float32
        self.features = EdgesAndColours(patch)
        self.patches = Linear(FEATURES, config.width)
        across = size // patch
        self.place = nn.Parameter(torch.zeros(across * across, config.width))
        self.blocks = make_blocks(config)
        pairs = config.width // config.heads // 2
        frequencies = 100.0 ** (-torch.arange(pairs - pairs // 2) / (pairs - pairs // 2))
        line = torch.arange(across).float()[:, None] * frequencies  # (across, pairs/2)
        angles = torch.cat([line.repeat_interleave(across, 0)[:, :pairs // 2],
                            line.repeat(across, 1)], dim=1)  # (S, pairs): rows, then columns
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @classmethod
    def create(cls, decoder: ModelConfig, condition: dict, size: ModelConfig | None = None,
               ) -> "ImageEncoder":
        """Of size micro unless another is asked for, in patches of 8 x 8: what there is to learn
        from some thousand pictures."""
        size = size or dataclasses.replace(decoder, width=128, heads=2, layers=4)
        return cls(dataclasses.replace(
            size, vocab_size=EOS + 2, max_len=1, neighbour_init=0.0, dropout=0.0, causal=False,
            time_conditioning="none", self_conditioning=0.0, draft_rank=0, lora_rank=0,
            lora_alpha=0.0, lora_targets=""), condition["size"], PATCH)

    def settings(self) -> dict[str, Any]:
        return {"config": dataclasses.asdict(self.config), "size": self.size, "patch": self.patch}

    @classmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> "ImageEncoder":
        config, size, patch = settings["config"], settings["size"], settings["patch"]
        if (not type(size) is type(patch) is int or not 0 < patch <= size <= 4096 or size % patch
                or patch % CELLS):
            raise TypeError("size and patch are not of pictures")
        config = ModelConfig(**config)
        check_blocks(config, weights)
        if (weights["patches.weight"].shape != (config.width, FEATURES)
                or weights["place"].shape != ((size // patch) ** 2, config.width)):
            raise RuntimeError("the weights are of another size")
        return cls(config, size, patch)

    def places(self, batch: Tensor) -> int:
        return len(self.place)

    def forward(self, batch: Tensor) -> Reading:
        given = batch[..., 3].flatten(1).amax(1) > 0  # (B,)
        colours = batch[..., :3].permute(0, 3, 1, 2).float() / 127.5 - 1
        x = self.patches(self.features(colours).to(self.compute_dtype)) + self.place.to(
            self.compute_dtype)  # (B, S, E)
        states = self.through_blocks(x, View(self.cos.to(x.dtype), self.sin.to(x.dtype)))
        places = torch.zeros(x.shape[:2], dtype=torch.int64, device=batch.device)
        return Reading([states], places, given[:, None].expand(places.shape))


PATCH = 8  # pixels across
SHIFT, ZOOM, SHADE = 0.125, (0.75, 1.1), (0.8, 1.2)  # how far pictures are varied in training


def varied(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, size, size, 4) uint8 shifted, larger or smaller on white, and in another light,
    each in its own way; those that are none stay so. Not mirrored, for text is in some."""
    count, size = batch.shape[:2]

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)
    zoom = between(*ZOOM)
    turn = torch.zeros(count, 2, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = 1 / zoom
    turn[:, :, 2] = between(-SHIFT, SHIFT, 2) * 2 / zoom[:, None]
    # from white, for what is outside is 0
    ink = 255 - batch[..., :3].permute(0, 3, 1, 2).float()
    grid = F.affine_grid(turn, [count, 3, size, size], align_corners=False)
    ink = F.grid_sample(ink, grid, align_corners=False)
    colours = (255 - ink).permute(0, 2, 3, 1) * between(*SHADE, 1, 1, 1) * between(
        0.9, 1.1, 1, 1, 3)
    given = batch[..., 3:]
    return torch.cat([colours.round().clamp(0, 255).to(torch.uint8) * (given > 0), given], -1)


# ---- one that is there already -------------------------------------------------------------------

class FrozenEncoder(PictureReader):
    """A vision model from an ONNX file, which stays as it is, and behind it a matrix that is
    trained: (N, 3, S, S) float32, values 0 to 1 -> (N, places, features) or (N, features).

    Whatever else it needs (mean and deviation of the pixels, a class token left out) must be part
    of the graph. The file's bytes are a buffer, so that a checkpoint has all.
    """

    sort = "image_frozen"

    def __init__(self, size: int, across: int, features: int, count: int, width: int, graph: bytes):
        super().__init__()
        self.size, self.across, self.features, self.count = size, across, features, count
        self.width, self.compute_dtype = width, torch.float32
        self.project = Linear(features, width)
        self._session: tuple[int, Any] | None = None
        self.register_buffer("graph", torch.frombuffer(bytearray(graph), dtype=torch.uint8))

    @classmethod
    def from_file(cls, path: str, decoder: ModelConfig, condition: dict) -> "FrozenEncoder":
        """Raises UserError for a file that is no such model."""
        require(Path(path).is_file() and Path(path).suffix == ".onnx", f"--image_encoder {path}: "
                "name the .onnx file of a vision model, or a .pt file of training.naming")
        graph = Path(path).read_bytes()
        session = session_of(sha256(graph), graph, path)
        inputs = [(entry.type, entry.shape) for entry in session.get_inputs()]
        kind, shape = inputs[0] if len(inputs) == 1 else ("", [])
        good = (kind == "tensor(float)" and len(shape) == 4 and shape[1] == 3
                and shape[2] == shape[3] and isinstance(shape[2], int)
                and (shape[0] == 1 or not isinstance(shape[0], int)))
        require(good, f"--image_encoder {path}: takes {inputs}, not pictures (N, 3, S, S) in FP32, "
                "any number of them or one")
        across = shape[2]
        try:
            found = run(session, np.zeros((1, 3, across, across), np.float32))
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise UserError(f"--image_encoder {path}: does not run ({error})") from error
        require(found.ndim in (2, 3) and len(found) == 1, f"--image_encoder {path}: gives "
                f"{found.shape}, not (N, places, features) or (N, features)")
        return cls(condition["size"], across, found.shape[-1],
                   1 if found.ndim == 2 else found.shape[1], decoder.width, graph)

    @classmethod
    def create(cls, decoder: ModelConfig, condition: dict, size: ModelConfig | None = None,
               ) -> "FrozenEncoder":
        raise UserError("a frozen encoder needs its file: name it with --image_encoder")

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "across": self.across, "features": self.features,
                "count": self.count, "width": self.width}

    @classmethod
    def restore(cls, settings: dict[str, Any], weights: dict[str, Tensor]) -> "FrozenEncoder":
        numbers = [settings[name] for name in ("size", "across", "features", "count", "width")]
        if any(type(number) is not int or not 0 < number <= 2**16 for number in numbers):
            raise TypeError("the settings are not numbers of a picture's encoder")
        graph, project = weights["graph"], weights["project.weight"]
        if project.shape != (settings["width"], settings["features"]) or graph.ndim != 1:
            raise RuntimeError("the weights are of another size")
        return cls(*numbers, bytes(len(graph)))

    def places(self, batch: Tensor) -> int:
        return self.count

    def session(self) -> Any:
        """That of the graph, which is read anew only when other weights have been put in."""
        if self._session is None or self._session[0] != self.graph._version:
            graph = self.graph.cpu().numpy().tobytes()
            self._session = (self.graph._version,
                             session_of(sha256(graph), graph, "the checkpoint's encoder"))
        return self._session[1]

    def __deepcopy__(self, memo: dict) -> "FrozenEncoder":
        other = type(self)(*self.settings().values(), self.graph.cpu().numpy().tobytes())
        other.load_state_dict(self.state_dict())
        other.compute_dtype = self.compute_dtype
        return other.train(self.training).to(self.graph.device)

    def forward(self, batch: Tensor) -> Reading:
        given = batch[..., 3].flatten(1).amax(1) > 0  # (B,)
        colours = batch[..., :3].permute(0, 3, 1, 2).float() / 255
        colours = F.interpolate(colours, (self.across, self.across), mode="bilinear",
                                antialias=True, align_corners=False)
        found = run(self.session(), colours.cpu().numpy())
        found = torch.from_numpy(found).reshape(len(batch), self.count, self.features)
        states = self.project(rms_norm(found.to(batch.device, self.compute_dtype)))
        places = torch.zeros(states.shape[:2], dtype=torch.int64, device=batch.device)
        return Reading([rms_norm(states)], places, given[:, None].expand(places.shape))


SESSIONS: dict[str, Any] = {}  # by the checksum of their graphs; those in use


def session_of(digest: str, graph: bytes, path: str) -> Any:
    """A graph in ONNX Runtime on the CPU; from its bytes, so that it can refer to no other file."""
    if digest in SESSIONS:
        return SESSIONS[digest]
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs ONNX Runtime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        SESSIONS[digest] = onnxruntime.InferenceSession(graph, options,
                                                        providers=["CPUExecutionProvider"])
        return SESSIONS[digest]
    except Exception as error:  # its exceptions have no common class
        raise UserError(f"{path} is no graph that ONNX Runtime can run") from error


def run(session: Any, pictures: np.ndarray) -> np.ndarray:
    """The first output, picture by picture where the graph takes no more."""
    entry, = session.get_inputs()
    parts = [pictures[i:i + 1] for i in range(len(pictures))] if entry.shape[0] == 1 else [pictures]
    return np.concatenate([session.run(None, {entry.name: part})[0] for part in parts])
