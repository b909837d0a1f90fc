"""The square crop around a person: one function for training rows, evaluation and inference, so that they see alike."""

import math
from collections.abc import Sequence


_ASPECT = 192 / 256  # width to height of HMR2's boxes (`MODEL.BBOX_SHAPE` of its released configuration)
_KEYPOINT_MARGIN = 1.2  # of the tight box around keypoints, as HMR2's evaluation data has it
_MIN_CONFIDENCE = 0.3  # below it HMR2 takes a keypoint as unseen
_BILINEAR = 2  # PIL's number; bilinear with antialiasing when it shrinks
_MAX_SIDE = 8192  # pixels of the square; a larger one is a mistake, and gigabytes of black


def keypoint_box(keypoints: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """
    The box of a person whose 2D joints are known: the larger side of the tight box, times 1.2, on both sides.

    Args:
        keypoints (`Sequence` of shape `(K, 3)`): x and y in pixels, confidence; those below 0.3 count as unseen.

    Returns:
        `(left, top, right, bottom)` in pixels.
    """
    seen = [(float(x), float(y)) for x, y, confidence in keypoints if confidence >= _MIN_CONFIDENCE]
    if len(seen) < 2:
        raise ValueError(f"expected at least 2 keypoints of confidence {_MIN_CONFIDENCE} or more, got {len(seen)}")
    xs, ys = zip(*seen, strict=True)
    half = max(max(xs) - min(xs), max(ys) - min(ys)) * _KEYPOINT_MARGIN / 2
    x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    return x - half, y - half, x + half, y + half


def crop_person(image, box: Sequence[float], size: int):
    """
    The square around a person's box as HMR2 cuts it: the box widened or heightened to 3:4, its height the square's side,
    black where the photo ends.

    Args:
        image (`PIL.Image.Image`): the photo.
        box (`(left, top, right, bottom)`): pixels of the photo; may reach over its edge.
        size (`int`): pixels of the crop's side, the vision tower's.

    Returns:
        `PIL.Image.Image` of mode RGB, `size` x `size`.
    """
    left, top, right, bottom = map(float, box)
    if not (right > left and bottom > top and all(map(math.isfinite, (left, top, right, bottom)))):
        raise ValueError(f"expected a box (left, top, right, bottom) with an inside, got {tuple(box)}")
    if right <= 0 or bottom <= 0 or left >= image.width or top >= image.height:
        raise ValueError(
            f"expected a box that meets the photo of {image.width} x {image.height} pixels, got {tuple(box)}"
        )
    side = max(bottom - top, (right - left) / _ASPECT)
    if side > _MAX_SIDE:
        raise ValueError(f"expected a box of at most {_MAX_SIDE} pixels a side, got {tuple(box)}")
    left, top = (left + right - side) / 2, (top + bottom - side) / 2
    corner = math.floor(left), math.floor(top)
    # `crop` takes whole pixels and adds the black; `resize` takes the fraction.
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    around = rgb.crop((*corner, math.ceil(left + side), math.ceil(top + side)))
    inner = (left - corner[0], top - corner[1], left - corner[0] + side, top - corner[1] + side)
    # Rounding may lead out of the picture by an ulp, which `resize` refuses.
    inner = (inner[0], inner[1], min(inner[2], around.width), min(inner[3], around.height))
    return around.resize((size, size), _BILINEAR, box=inner)
