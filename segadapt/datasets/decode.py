"""Image and label files to arrays; every kind of broken file ends in one line that names it."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from segadapt.errors import UserError

# H W image px  3 RGB

LIMIT = "data.max_pixels"  # what max_pixels is the value of, unless the caller has another setting for it
_PLAIN_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_16_BIT_MODES = {"I;16", "I;16B", "I;16L"}
# Pillow stretches gray PNGs of 2 and 4 bit to 0..255 (by these factors), which would turn label id 1 into 85 or 17.
_STRETCH = {"L;2": 85, "L;4": 17}
_ON_ITS_SIDE = {5, 6, 7, 8}  # EXIF orientations that swap height and width
_TAIL_BYTES = 2**16  # cameras and web servers append to JPEG files; behind more than this, the file is decoded
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


@contextmanager
def _opened(path: Path, *, max_pixels: int, limit: str | None = LIMIT) -> Iterator[ImageFile.ImageFile]:
    """Open an image by its header; UserError if it is too large, broken, or breaks while the caller decodes it."""
    too_large = (
        f"expected at most {limit}={max_pixels}. Replace the file, or raise {limit}."
        if limit
        else f"expected at most {max_pixels} px. Give a smaller image."
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit here
            with Image.open(path) as image:
                if image.width * image.height > max_pixels:
                    raise UserError(f"{path}: {image.width} x {image.height} px; {too_large}")
                yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too many pixels to open ({error}); {too_large}") from error
    except _DECODER_ERRORS as error:
        found = "the file is empty" if path.is_file() and path.stat().st_size == 0 else str(error) or repr(error)
        raise UserError(
            f"{path}: cannot be decoded: {found}; expected a whole image file. Fetch the file again, or remove it "
            f"together with its partner."
        ) from error


def read_image(path: Path, *, max_pixels: int, limit: str | None = LIMIT) -> np.ndarray:
    """Decode an image as seen by a viewer: uint8 [H, W, 3] RGB, rotated as its EXIF says, alpha dropped.

    Gray, palette, CMYK and 1-bit images become RGB; of 16 bit the high byte counts; of several frames the first.

    Args:
        limit: the setting that max_pixels is the value of; None: of none.
    Raises:
        UserError: not an image, truncated, empty, more than max_pixels, or a pixel format that is not listed above.
    """
    with _opened(path, max_pixels=max_pixels, limit=limit) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in _16_BIT_MODES:
            return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        _check_mode(path, upright.mode)
        if "transparency" in upright.info:
            upright = upright.convert("RGBA")  # straight to RGB, Pillow warns about a palette's alpha
        return np.array(upright.convert("RGB"))


def image_size(path: Path, *, max_pixels: int) -> tuple[int, int]:
    """Height and width of what `read_image` returns, px; a JPEG or PNG that has its end is not decoded.

    Raises:
        UserError: as `read_image`, except for damage inside of a JPEG or PNG that has its end.
    """
    with _opened(path, max_pixels=max_pixels) as image:
        is_whole = _IS_WHOLE.get(str(image.format))
        if is_whole and image.fp and is_whole(image.fp):
            _check_mode(path, image.mode)
            is_on_its_side = image.format == "JPEG" and image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
            return (image.width, image.height) if is_on_its_side else (image.height, image.width)
    height, width, _ = read_image(path, max_pixels=max_pixels).shape
    return height, width


def is_turned(path: Path) -> bool:
    """Whether `read_image` turns or mirrors the image as its EXIF says; of a file that it has read."""
    with Image.open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)


def ids_size(path: Path, *, max_pixels: int) -> tuple[int, int]:
    """Height and width of a label file by its header, px. UserError: not an image, or more than max_pixels."""
    with _opened(path, max_pixels=max_pixels) as image:
        return image.height, image.width


def read_ids(path: Path, *, max_pixels: int, limit: str = LIMIT) -> np.ndarray:
    """Decode a label file as stored: uint8 [H, W] ids; palette indices are kept, 1-bit pixels are 0 and 1, EXIF is not
    applied.

    Args:
        limit: the setting that max_pixels is the value of.
    Raises:
        UserError: not an image, truncated, empty, more than max_pixels, colours instead of ids, or an id above 255.
    """
    with _opened(path, max_pixels=max_pixels, limit=limit) as image:
        if image.mode not in {"1", "L", "P"} | _16_BIT_MODES:
            raise UserError(
                f"{path}: label of pixel format {image.mode}; expected one id a pixel (gray or palette PNG, 1 to 16 "
                f"bit). Convert the colours to ids with `segadapt convert`, or correct data.label_path if it leads to "
                f"images."
            )
        stretch = _STRETCH.get(str(image.tile[0].args), 1) if image.tile else 1
        ids_HW = np.array(image)
    if ids_HW.itemsize > 1 and ids_HW.max(initial=0) > 255:
        row, column = np.argwhere(ids_HW > 255)[0]
        raise UserError(
            f"{path}: label id {ids_HW[row, column]} at row {row}, column {column}; expected 0..255. Store class ids, "
            f"not instance ids."
        )
    return ids_HW.astype(np.uint8) // np.uint8(stretch)


def read_greys(path: Path, *, max_pixels: int, limit: str = LIMIT) -> np.ndarray:
    """Decode a label file of grey values: as `read_ids`, also where each is stored as R = G = B, or beside alpha.

    Raises:
        UserError: as `read_ids` and `read_colours`; a pixel with a colour.
    """
    with _opened(path, max_pixels=max_pixels, limit=limit) as image:
        has_colours = image.mode in {"LA", "PA", "RGB", "RGBA", "RGBX"}
    if not has_colours:
        return read_ids(path, max_pixels=max_pixels, limit=limit)
    colour_HW3 = read_colours(path, max_pixels=max_pixels, limit=limit)
    is_grey_HW = (colour_HW3 == colour_HW3[:, :, :1]).all(axis=2)
    if not is_grey_HW.all():
        row, column = np.argwhere(~is_grey_HW)[0]
        raise UserError(f"{path}: {colour_HW3[row, column].tolist()} at row {row}, column {column} is no grey value; "
                        "expected R = G = B. Name the colours in convert.colours or convert.palette.")  # fmt: skip
    return colour_HW3[:, :, 0]


def read_colours(path: Path, *, max_pixels: int, limit: str = LIMIT) -> np.ndarray:
    """Decode a label file of colours as stored: uint8 [H, W, 3] RGB; a palette is looked up, EXIF is not applied, alpha
    is dropped.

    Args:
        limit: the setting that max_pixels is the value of.
    Raises:
        UserError: not an image, truncated, empty, more than max_pixels, or a pixel format without exact 8-bit colours.
    """
    with _opened(path, max_pixels=max_pixels, limit=limit) as image:
        if image.mode not in _PLAIN_MODES - {"CMYK", "YCbCr"}:
            raise UserError(f"{path}: label of pixel format {image.mode}; expected 8-bit colours, a palette or gray. "
                            "Save it as RGB PNG.")  # fmt: skip
        has_alpha = "transparency" in image.info  # straight to RGB, Pillow warns about a palette's alpha
        return np.array((image.convert("RGBA") if has_alpha else image).convert("RGB"))


def _check_mode(path: Path, mode: str) -> None:
    if mode not in _PLAIN_MODES | _16_BIT_MODES:
        raise UserError(
            f"{path}: pixel format {mode}; expected 8-bit gray, palette, RGB, RGBA or CMYK, or 16-bit gray or RGB. "
            f"Convert the file to RGB PNG."
        )


def _jpeg_is_whole(file: IO[bytes]) -> bool:
    """Whether an end marker stands in the last _TAIL_BYTES, for a file just opened by Pillow."""
    scan = file.tell()  # Pillow has read up to the pixels; in front of them, a thumbnail has an end marker of its own
    end = file.seek(0, 2)
    file.seek(max(scan, end - _TAIL_BYTES))
    return b"\xff\xd9" in file.read()


def _png_is_whole(file: IO[bytes]) -> bool:
    """Whether the chunks lead to IEND, and none may turn the image."""
    end = file.seek(0, 2)
    position = len(b"\x89PNG\r\n\x1a\n")
    while position < end:
        file.seek(position)
        length, kind, keyword = struct.unpack(">I4s24s", file.read(32).ljust(32, b"\0"))
        position += 8 + length + 4  # length and kind, body, CRC
        if kind == b"eXIf" or (kind in {b"tEXt", b"zTXt", b"iTXt"} and (b"exif" in keyword or b"xmp" in keyword)):
            return False
        if kind == b"IEND":
            return position <= end
    return False


_IS_WHOLE = {"JPEG": _jpeg_is_whole, "PNG": _png_is_whole}
