"""Pictures of files of any origin, as what a model reads. No torch: a bundle on a Jetson has this
file too.

    picture = load_picture("cat.png", 64)            # (64, 64, 4) uint8

A picture is RGB on white with a fourth channel that is 255; where all four are 0 there is none.
"""

from cli import UserError, is_of_the_machine, require

import base64
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 50_000_000  # of a file: 200 MB once it is decoded
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def check_size(flag: str, size: int) -> None:
    require(8 <= size <= 1024 and size % 8 == 0, f"{flag} {size}: must be a multiple of 8, at most "
                                                 "1024")


def open_picture(path: str | Path) -> "Image":
    """The picture of a file as RGBA, upright; UserError for whatever is no still picture."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UserError(f"{path}: pictures need Pillow: pip install pillow") from error
    require(Path(path).is_file(), f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large sizes and broken EXIF entries
            with Image.open(path, formats=FORMATS) as image:
                return _decode(image, path)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture that can be read: use PNG, JPEG, WebP or BMP"
                        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large: more than {MOST_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow has a dozen types of exceptions for a broken file
        if is_of_the_machine(error):
            raise
        raise UserError(f"{path} is broken: {error or type(error).__name__}") from error


def _decode(image: "Image", path: str | Path) -> "Image":
    from PIL import Image, ImageOps
    width, height = image.size
    require(width * height <= MOST_PIXELS, f"{path} is too large: {width:,} x {height:,} are more "
                                           f"than {MOST_PIXELS:,} pixels")
    # a photo of some telephones has a second one in it, which is no frame
    require(image.format == "MPO" or not getattr(image, "is_animated", False),
            f"{path} is animated: give one of its frames as PNG")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut off all that is above 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255)
                                .astype(np.uint8))
    return image.convert("RGBA")


def on_white(image: "Image") -> "Image":
    from PIL import Image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def load_picture(path: str | Path, size: int) -> np.ndarray:
    """(size, size, 4) uint8: the picture of a file on white, filled up to a square with white. The
    fourth channel is 255."""
    image = on_white(open_picture(path))  # which says it where Pillow is missing
    from PIL import Image
    # Made small first: a square around a very long picture would not fit into the memory.
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - width) // 2, (size - height) // 2))
    return with_presence(np.asarray(square))


def with_presence(pictures: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 with the fourth channel, which says that they are there."""
    return np.concatenate([pictures, np.full_like(pictures[..., :1], 255)], axis=-1)


def data_uri(picture: np.ndarray) -> str:
    """(size, size, 4) uint8 as what a page can hold."""
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture[..., :3])).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
