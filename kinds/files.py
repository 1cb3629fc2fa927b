"""The .pt files of this program, read without running code from them: what torch.save wrote, and an
encoder that was trained alone. A library of whatever reads one.
"""

from cli import UserError, require

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from network.encoders import ImageEncoder

ENCODER_FORMAT = {"format": "diffusion-llm encoder", "format_version": 1}


def read_file(path: Path) -> dict:
    """What torch.save wrote into a file, a dict, without running code from it. UserError for
    anything else."""
    require(not path.is_dir(), f"{path} is a folder; name a .pt file in it")
    require(path.is_file(), f"no checkpoint {path}: train one first, `python train.py`")
    contents, cause = None, None
    if zipfile.is_zipfile(path):  # as torch.save writes; anything else is refused unopened
        try:
            with zipfile.ZipFile(path) as archive:
                # torch looks at no checksum, and would unpack what is larger than the file.
                if archive.testzip() is None and not any(
                        entry.compress_type for entry in archive.infolist()):
                    contents = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise nearly anything
            cause = error
    if contents is None:
        raise UserError(f"{path} is not a checkpoint of this program, or is damaged; name a .pt "
                        "file that train.py wrote") from cause
    return contents if isinstance(contents, dict) else {}


def are_tensors(weights: object) -> bool:
    return isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items())


def check_encoder(path: str | Path, contents: dict) -> None:
    """Refuses (UserError) what is not the content of a file with an encoder of pictures."""
    version = contents.get("format_version")
    require(contents.get("format") == ENCODER_FORMAT["format"] and type(version) is int
            and version == ENCODER_FORMAT["format_version"], f"{path} is not an encoder of this "
            "program: python -m training.naming makes one")
    require(contents.get("encoder") == ImageEncoder.sort
            and isinstance(contents.get("encoder_config"), dict)
            and are_tensors(contents.get("weights")), f"{path} was changed after it was written: "
            "name another file")


def load_encoder(path: str | Path) -> ImageEncoder:
    """The encoder of pictures in a file that training/naming.py wrote, to be trained on."""
    require(Path(path).is_file(), f"--image_encoder {path}: no such file")
    contents = read_file(Path(path))
    check_encoder(path, contents)
    try:
        encoder = ImageEncoder.restore(contents["encoder_config"], contents["weights"])
        encoder.load_state_dict(contents["weights"])
        fits = encoder.config.dropout == 0 and all(
            weight.isfinite().all() for weight in encoder.state_dict().values())
    except (TypeError, ValueError, RuntimeError, KeyError, ArithmeticError) as error:
        raise UserError(f"{path}: the weights do not fit the encoder's settings: it was changed "
                        "after it was written") from error
    require(fits, f"{path} was changed after it was written: name another file")
    return encoder
