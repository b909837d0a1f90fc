"""Reads picture files, one's own or a stranger's, upright and in RGB."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


MAX_ASPECT = 20  # a line of 10,000 x 1, its short side brought to the model's hundreds of pixels, fills gigabytes
# What strangers may send: what photos come in and browsers show; each further decoder is one more that they can feed.
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_SIDE = 10_000
MAX_PIXELS = 40_000_000
KEPT_SIDE = 2048  # 12 MB a picture for as long as its chat lives; models look at a few hundred pixels


def open_image(path: str | Path, name: str | None = None, formats: Sequence[str] | None = None) -> Image.Image:
    """
    Reads a picture as RGB, turned as its EXIF orientation says: telephones' photos lie on their side.

    Args:
        path (`str` or `Path`): the file.
        name (`str`, *optional*): what errors call it; its path by default.
        formats (`Sequence[str]`, *optional*): Pillow's names of the formats tried; all by default.

    Raises:
        ValueError: for what is no picture, is cut off, is narrower than `MAX_ASPECT`, or has more pixels than Pillow
            reads for safety.
    """
    name = name or str(path)
    try:
        with Image.open(path, formats=formats) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                width, height = image.size
                raise ValueError(f"{name} is too narrow, {width} x {height} pixels; at most {MAX_ASPECT} to 1, please")
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is no picture that can be read; {', '.join(formats or UPLOAD_FORMATS)}, please"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more pixels than are read for safety: {error}") from error
    except (OSError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's own words: no such file, no permission
        raise ValueError(f"{name} is a damaged picture: {error}") from error


def open_upload(path: str | Path) -> Image.Image:
    """
    Reads a stranger's picture: upright, RGB, at most `KEPT_SIDE` pixels a side.

    Raises:
        ValueError: for what is no picture, is damaged, or is too large, which is known before it is decoded.
    """
    name = Path(path).name
    try:
        with Image.open(path, formats=UPLOAD_FORMATS) as opened:
            width, height = opened.size
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError):
        pass  # `open_image` says what is wrong
    else:
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            raise ValueError(
                f"{name} is too large, {width} x {height} pixels; at most {MAX_SIDE} a side and "
                f"{MAX_PIXELS // 10**6} million together, please"
            )
    picture = open_image(path, name, UPLOAD_FORMATS)
    picture.thumbnail((KEPT_SIDE, KEPT_SIDE))
    return picture
