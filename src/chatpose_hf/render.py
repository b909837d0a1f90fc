"""Meshes to pictures on the CPU, with NumPy and Pillow alone: no display, no GL, no system package.

Vertices are in the camera frame (x right, y down, z away from the viewer), as poses are, so a picture's axes are the
frame's and nothing is mirrored. A person facing the camera has the left arm on the picture's right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont


# Degrees about the vertical: how far the viewer has walked round the scene, to the viewer's right.
VIEWS = {"front": 0.0, "three_quarter": 40.0, "side": 90.0, "back": 180.0}
COLORS = ("#a9c3e6", "#e8b08c", "#a5cfa8", "#cdb3df", "#e6d59b")
_SUPERSAMPLING = 2
_FIELD_OF_VIEW = np.radians(24)
_ELEVATION = np.radians(7)  # the viewer looks slightly down, so that the floor is seen
_MARGIN = 0.06  # of the picture, on each side
_KEY_LIGHT = np.array([-0.45, -0.75, -0.6], dtype=np.float32)  # towards the light: left, up, from the viewer
_SHADOW_FALL = np.array([0.12, 1.0, 0.1], dtype=np.float32)  # a high light, so that the shadow stays at the feet
_FILL_LIGHT = np.array([0.8, -0.1, -0.55], dtype=np.float32)
_MAX_PIXELS = 64_000_000  # of one picture, supersampled; more is a mistake, and gigabytes


class _Projected(NamedTuple):
    """Vertices as the camera sees them: pixels from the top left corner, and inverse depth (1/m; larger is nearer)."""

    x: np.ndarray
    y: np.ndarray
    inverse_depth: np.ndarray


def render_bodies(
    vertices: ArrayLike,
    faces: ArrayLike,
    size: int | tuple[int, int] = 512,
    view: str | float = "front",
    colors: Sequence[str] = COLORS,
    background: str | None = None,
    shadow: bool = True,
) -> Image.Image:
    """
    Draws bodies, framed to fill the picture, with smooth shading, 2x2 antialiasing and a soft shadow on the floor.

    Args:
        vertices (array of shape `(V, 3)` or `(N, V, 3)`):
            One body or several, metres, camera frame; the floor is under the lowest vertex.
        faces (array of shape `(F, 3)`): triangles of each body, counter-clockwise seen from outside.
        size (`int` or `(width, height)`, *optional*, defaults to 512): pixels.
        view (`str` or `float`, *optional*, defaults to `"front"`):
            `"front"`, as the camera sees it, `"three_quarter"`, `"side"`, `"back"`, or degrees that the viewer has
            walked round to the right.
        colors (`Sequence[str]`, *optional*): of the bodies, in turn, in any form that Pillow reads.
        background (`str`, *optional*): transparent by default.
        shadow (`bool`, *optional*, defaults to `True`): draw the shadow.

    Returns:
        `PIL.Image.Image` of mode RGBA.
    """
    vertices, faces = _check_mesh(vertices, faces)
    width, height = (size, size) if isinstance(size, int) else size
    _check_size(width, height)
    if view not in VIEWS and (isinstance(view, str) or not np.isfinite(view)):
        raise ValueError(f"expected a view of {', '.join(VIEWS)}, or degrees, got {view!r}")
    yaw = np.radians(VIEWS[view] if isinstance(view, str) else view)

    turned = vertices.reshape(-1, 3) @ _rotation_y(yaw).T
    # Every point of the shadow is where its vertex falls on the floor.
    fall = (turned[:, 1].max() - turned[:, 1:2]) * _SHADOW_FALL
    elevation = _rotation_x(_ELEVATION).T
    seen = turned @ elevation
    body, cast = _frame([seen, (turned + fall) @ elevation], width * _SUPERSAMPLING, height * _SUPERSAMPLING)

    canvas = Image.new("RGBA", (width, height), background or (0, 0, 0, 0))
    if shadow:
        canvas.alpha_composite(_draw_shadow(cast, _flat_faces(faces, *vertices.shape[:2]), width, height))
    canvas.alpha_composite(
        _draw(seen.reshape(vertices.shape), body, faces, width * _SUPERSAMPLING, height * _SUPERSAMPLING, colors)
    )
    return canvas


def overlay_bodies(
    photo: Image.Image,
    vertices: ArrayLike,
    faces: ArrayLike,
    box: tuple[float, float, float, float] | None = None,
    colors: Sequence[str] = COLORS,
    alpha: float = 0.8,
) -> Image.Image:
    """
    Draws bodies over a photo. ChatPose predicts no camera: the bodies, seen in parallel, are scaled and moved to fill
    `box`, so size and place are the caller's, the pose is the model's.

    Args:
        photo (`PIL.Image.Image`): any mode; stays as it is.
        vertices (array of shape `(V, 3)` or `(N, V, 3)`), faces, colors: as in [`render_bodies`].
        box (`(left, top, right, bottom)`, *optional*): pixels of the photo to fill; all of it by default.
        alpha (`float`, *optional*, defaults to 0.8): how much the bodies cover, 0 to 1.

    Returns:
        `PIL.Image.Image` of mode RGB and the photo's size.
    """
    vertices, faces = _check_mesh(vertices, faces)
    width, height = photo.size
    _check_size(width, height)
    left, top, right, bottom = box or (0, 0, width, height)
    if not (right > left and bottom > top and np.isfinite([left, top, right, bottom]).all()):
        raise ValueError(f"expected a box (left, top, right, bottom) with an inside, got {box}")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(f"expected a box that meets the photo of {width} x {height} pixels, got {box}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"expected alpha from 0 to 1, got {alpha}")
    low, high = vertices.reshape(-1, 3).min(0), vertices.reshape(-1, 3).max(0)
    scale = min((right - left) / (high[0] - low[0]), (bottom - top) / (high[1] - low[1])) * _SUPERSAMPLING
    flat = vertices.reshape(-1, 3)
    projected = _Projected(
        x=(flat[:, 0] - (low[0] + high[0]) / 2) * scale + (left + right) / 2 * _SUPERSAMPLING,
        y=(flat[:, 1] - (low[1] + high[1]) / 2) * scale + (top + bottom) / 2 * _SUPERSAMPLING,
        # Along parallel rays depth only says what is in front; nearly equal numbers leave the shading's weights alone.
        inverse_depth=1 + 1e-3 * (high[2] - flat[:, 2]),
    )
    drawn = _draw(vertices, projected, faces, width * _SUPERSAMPLING, height * _SUPERSAMPLING, colors)
    drawn.putalpha(drawn.getchannel("A").point(lambda value: round(value * alpha)))
    canvas = photo.convert("RGBA")
    canvas.alpha_composite(drawn)
    return canvas.convert("RGB")


def draw_bodies(
    background: np.ndarray,
    vertices: np.ndarray,
    faces: np.ndarray,
    vertex_colors: np.ndarray,
    focal: float,
    center: tuple[float, float],
    light: ArrayLike,
    ambient: float,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Draws bodies as a pinhole camera sees them, over a background.

    Args:
        background (`np.ndarray` of shape `(H, W, 3)`): bytes, sRGB.
        vertices (`np.ndarray` of shape `(N, V, 3)`): metres, camera frame, all before the camera (z > 0).
        faces (`np.ndarray` of shape `(F, 3)`): of each body.
        vertex_colors (`np.ndarray` of shape `(N, V, 3)`): sRGB, 0 to 1.
        focal (`float`), center (`(x, y)`): the camera's, in pixels.
        light (array of shape `(3,)`): the direction towards the light.
        ambient (`float`): the share of the light that comes from everywhere, 0 to 1.

    Returns:
        `(np.ndarray, np.ndarray)`: the picture, `(H, W, 3)` bytes; and at each pixel the number of a vertex of the triangle
        in its middle, counted through all bodies, -1 for none, `(H, W)`.
    """
    height, width = background.shape[:2]
    fine_height, fine_width = height * _SUPERSAMPLING, width * _SUPERSAMPLING
    flat = vertices.reshape(-1, 3).astype(np.float32)
    if not flat[:, 2].min() > 0:
        raise ValueError("expected all vertices before the camera, got some with z <= 0")
    inverse = 1 / flat[:, 2]
    xy = (flat[:, :2] * inverse[:, None] * focal + np.asarray(center, dtype=np.float32)) * _SUPERSAMPLING
    projected = _Projected(xy[:, 0], xy[:, 1], inverse)
    triangles = _flat_faces(faces, *vertices.shape[:2])
    pixels, nearest = _rasterize(projected, triangles, fine_width, fine_height)
    corners, weights = _interpolation(projected, triangles, pixels, nearest, fine_width)

    direction = np.asarray(light, dtype=np.float32)
    lit = vertex_normals(vertices, faces) @ (direction / np.linalg.norm(direction))
    brightness = ambient + (1 - ambient) * np.clip(lit, 0, None)
    shaded = (vertex_colors.reshape(-1, 3) ** 2.2 * brightness[:, None]).astype(np.float32)
    color = ((weights / weights.sum(0))[..., None] * shaded[corners]).sum(0)
    canvas = np.repeat(np.repeat(background, _SUPERSAMPLING, axis=0), _SUPERSAMPLING, axis=1).reshape(-1, 3)
    canvas[pixels] = np.clip(color, 0, 1) ** (1 / 2.2) * 255
    blocks = canvas.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING, 3)
    # `sum` over the two short axes takes ten times as long.
    total = np.zeros(background.shape, dtype=np.uint16)
    for i, j in np.ndindex(_SUPERSAMPLING, _SUPERSAMPLING):
        total += blocks[:, i, :, j]
    shown = np.full(fine_height * fine_width, -1, dtype=np.int64)
    shown[pixels] = corners[0]
    middle = shown.reshape(fine_height, fine_width)[
        _SUPERSAMPLING // 2 :: _SUPERSAMPLING, _SUPERSAMPLING // 2 :: _SUPERSAMPLING
    ]
    return (total // _SUPERSAMPLING**2).astype(np.uint8), middle


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str] = (),
    columns: int = 4,
    tile: int = 256,
    max_lines: int = 3,
) -> Image.Image:
    """
    Puts pictures in rows of tiles, each with its caption under it.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): at least one; each is scaled to fit its tile.
        captions (`Sequence[str]`, *optional*): one for each picture.
        columns (`int`, *optional*, defaults to 4), tile (`int`, *optional*, defaults to 256): tiles in a row, pixels.
        max_lines (`int`, *optional*, defaults to 3): of a caption that are shown.

    Returns:
        `PIL.Image.Image` of mode RGB.
    """
    if not pictures:
        raise ValueError("expected at least one picture, got none")
    if captions and len(captions) != len(pictures):
        raise ValueError(f"expected a caption for each of the {len(pictures)} pictures, got {len(captions)}")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    font_size = max(tile / 18, 9)
    font = ImageFont.load_default(font_size)
    lines = [_wrap(caption, font, tile - 12, max_lines) for caption in captions]
    line_height = round(1.3 * font_size)
    band = (max(map(len, lines)) * line_height + 8) if lines else 0
    _check_size(columns * tile, rows * (tile + band))
    sheet = Image.new("RGB", (columns * tile, rows * (tile + band)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left, top = index % columns * tile, index // columns * (tile + band)
        ratio = tile / max(picture.size)
        fitted = picture.convert("RGBA").resize([max(round(side * ratio), 1) for side in picture.size])
        place = (left + (tile - fitted.width) // 2, top + (tile - fitted.height) // 2)
        sheet.paste(fitted, place, fitted)
        for number, line in enumerate(lines[index] if lines else ()):
            middle = (left + tile / 2, top + tile + 2 + number * line_height)
            draw.text(middle, line, font=font, fill="#222222", anchor="ma")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, max_lines: int) -> list[str]:
    """Lines that fit; a word that does not is broken, and what is left over becomes an ellipsis."""
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
            if len(lines) > max_lines + 1:
                break
    lines = [line for line in lines if line]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1].rstrip() + "..."]
    return lines


def _check_mesh(vertices: ArrayLike, faces: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    vertices = np.asarray(vertices, dtype=np.float32)
    faces = np.asarray(faces, dtype=np.int64)
    vertices = vertices[None] if vertices.ndim == 2 else vertices
    if vertices.ndim != 3 or vertices.shape[-1] != 3 or vertices.size == 0:
        raise ValueError(f"expected vertices of shape (V, 3) or (N, V, 3), got {vertices.shape}")
    if faces.ndim != 2 or faces.shape[-1] != 3 or not (faces.min() >= 0 and faces.max() < vertices.shape[1]):
        raise ValueError(f"expected faces of shape (F, 3) below {vertices.shape[1]}, got {faces.shape}")
    if not np.isfinite(vertices).all():
        raise ValueError("expected finite vertices, got NaN or infinity; check the pose")
    return vertices, faces


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height * _SUPERSAMPLING**2 > _MAX_PIXELS:
        limit = _MAX_PIXELS // _SUPERSAMPLING**2
        raise ValueError(f"expected a picture of 1 to {limit:,} pixels, got {width} x {height}")


def _rotation_x(angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]], dtype=np.float32)


def _rotation_y(angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]], dtype=np.float32)


def _frame(parts: list[np.ndarray], width: int, height: int) -> list[_Projected]:
    """Perspective projection of points (..., 3) with the camera as near as it can be with all of them in view."""
    points = np.concatenate(parts)
    middle = (points.min(0) + points.max(0)) / 2
    radius = np.linalg.norm(points - middle, axis=-1).max() + 1e-6
    distance = radius / np.sin(_FIELD_OF_VIEW / 2)
    inverse_depths = [1 / (part[:, 2] - middle[2] + distance) for part in parts]
    planes = [
        (part[:, :2] - middle[:2]) * inverse[:, None] for part, inverse in zip(parts, inverse_depths, strict=True)
    ]
    low, high = np.min([plane.min(0) for plane in planes], 0), np.max([plane.max(0) for plane in planes], 0)
    extent = np.maximum(high - low, 1e-9)
    pixels_per_unit = min(width * (1 - 2 * _MARGIN) / extent[0], height * (1 - 2 * _MARGIN) / extent[1])
    place = (np.array([width, height]) - (low + high) * pixels_per_unit) / 2
    pixels = [(plane * pixels_per_unit + place).astype(np.float32) for plane in planes]
    return [_Projected(xy[:, 0], xy[:, 1], inverse) for xy, inverse in zip(pixels, inverse_depths, strict=True)]


def _flat_faces(faces: np.ndarray, num_bodies: int, num_vertices: int) -> np.ndarray:
    return (faces + np.arange(num_bodies)[:, None, None] * num_vertices).reshape(-1, 3)


def _rasterize(
    projected: _Projected, faces: np.ndarray, width: int, height: int, cull: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """
    Z-buffer: the pixels (flat numbers) that any triangle covers at their centre, and the nearest triangle there.

    Each triangle is cut into rows and each row into its pixels, all triangles at once: no work is spent outside.
    """
    x, y = projected.x[faces].astype(np.float64), projected.y[faces].astype(np.float64)
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    # y points down, so a triangle that is counter-clockwise for the viewer has a negative area.
    kept = np.flatnonzero((area < -1e-12) if cull else (np.abs(area) > 1e-12))
    x, y, area = x[kept], y[kept], area[kept]

    # Centres of pixels are at half numbers.
    first_row = np.clip(np.ceil(y.min(1) - 0.5), 0, height).astype(np.int64)
    num_rows = np.clip(np.floor(y.max(1) - 0.5) + 1, 0, height).astype(np.int64) - first_row
    triangle, row = _expand(first_row, num_rows)
    row_y = row + 0.5
    left, right = np.full(len(row), -0.5), np.full(len(row), width + 0.5)
    for start, end in ((0, 1), (1, 2), (2, 0)):
        # Inside, run * (row_y - y_start) - rise * (x - x_start) has the area's sign: each edge bounds x on one side.
        rise, run = (y[:, end] - y[:, start]), (x[:, end] - x[:, start])
        slope = np.divide(run, rise, out=np.zeros_like(run), where=rise != 0)
        crossing = x[triangle, start] + slope[triangle] * (row_y - y[triangle, start])
        is_left = (rise * area > 0)[triangle]
        is_right = (rise * area < 0)[triangle]
        np.minimum(right, crossing, out=right, where=is_left)
        np.maximum(left, crossing, out=left, where=is_right)
    first_column = np.clip(np.ceil(left - 0.5), 0, width).astype(np.int64)
    num_columns = np.clip(np.ceil(right - 0.5), 0, width).astype(np.int64) - first_column
    span, column = _expand(first_column, num_columns)
    triangle, row = triangle[span], row[span]

    # Inverse depth is a plane over the picture.
    inverse = projected.inverse_depth[faces[kept]].astype(np.float64)
    d1, d2 = inverse[:, 1] - inverse[:, 0], inverse[:, 2] - inverse[:, 0]
    slope_x = (d1 * (y[:, 2] - y[:, 0]) - d2 * (y[:, 1] - y[:, 0])) / area
    slope_y = (d2 * (x[:, 1] - x[:, 0]) - d1 * (x[:, 2] - x[:, 0])) / area
    base = inverse[:, 0] + slope_x * (0.5 - x[:, 0]) + slope_y * (0.5 - y[:, 0])
    depth = base[triangle] + slope_x[triangle] * column + slope_y[triangle] * row
    # One comparison for both: positive floats sort like their bits.
    key = np.maximum(depth, 0).astype(np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
    key |= kept[triangle].astype(np.uint64)
    nearest = np.zeros(width * height, dtype=np.uint64)
    np.maximum.at(nearest, row * width + column, key)
    pixels = np.flatnonzero(nearest)
    return pixels, (nearest[pixels] & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _expand(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For ranges of `count` whole numbers from `first`: the range of each number, and the number."""
    count = np.maximum(count, 0)
    owner = np.repeat(np.arange(len(first)), count)
    before = np.cumsum(count) - count
    return owner, np.arange(len(owner)) - (before - first)[owner]


def _interpolation(
    projected: _Projected, triangles: np.ndarray, pixels: np.ndarray, nearest: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each pixel, the three vertices around it and their weights, which do not add up to one, `(3, P)` each."""
    corners = triangles.T[:, nearest]
    x = projected.x[corners] - (pixels % width + 0.5).astype(np.float32)
    y = projected.y[corners] - (pixels // width + 0.5).astype(np.float32)
    # Areas opposite each corner, over depth: weights that are right in perspective, up to their sum.
    weights = np.stack([x[1] * y[2] - x[2] * y[1], x[2] * y[0] - x[0] * y[2], x[0] * y[1] - x[1] * y[0]])
    weights *= projected.inverse_depth[corners]
    return corners, weights


def _draw(
    vertices: np.ndarray, projected: _Projected, faces: np.ndarray, width: int, height: int, colors: Sequence[str]
) -> Image.Image:
    """Shaded bodies `(N, V, 3)` on nothing; width and height are supersampled, the picture is not."""
    triangles = _flat_faces(faces, *vertices.shape[:2])
    pixels, nearest = _rasterize(projected, triangles, width, height)
    corners, weights = _interpolation(projected, triangles, pixels, nearest, width)
    light = (weights * _light(vertex_normals(vertices, faces))[corners]).sum(0) / weights.sum(0)

    body = corners[0] // vertices.shape[1]
    shades = np.stack([_shades(colors[number % len(colors)]) for number in range(len(vertices))])
    canvas = np.zeros((height * width, 4), dtype=np.uint8)
    canvas[pixels] = shades[body, np.clip(light * (shades.shape[1] - 1), 0, shades.shape[1] - 1).astype(np.int64)]
    # Nothing is black and transparent, so the colours are premultiplied already and may be averaged.
    picture = Image.frombytes("RGBa", (width, height), canvas.tobytes())
    return picture.reduce(_SUPERSAMPLING).convert("RGBA")


def _draw_shadow(cast: _Projected, triangles: np.ndarray, width: int, height: int) -> Image.Image:
    """What the bodies take of the light on the floor: soft, so a quarter of the pixels is enough."""
    small_width, small_height = -(-width // 2), -(-height // 2)
    small = cast._replace(x=cast.x / (2 * _SUPERSAMPLING), y=cast.y / (2 * _SUPERSAMPLING))
    mask = np.zeros(small_width * small_height, dtype=np.uint8)
    mask[_rasterize(small, triangles, small_width, small_height, cull=False)[0]] = 95
    soft = Image.fromarray(mask.reshape(small_height, small_width))
    soft = soft.filter(ImageFilter.GaussianBlur(min(small_width, small_height) / 50))
    shadow = Image.new("RGBA", (width, height), "#1c2430")
    shadow.putalpha(
        soft.resize((small_width * 2, small_height * 2), Image.Resampling.BILINEAR).crop((0, 0, width, height))
    )
    return shadow


def _light(normals: np.ndarray) -> np.ndarray:
    """How much light each vertex sends to the viewer: a key light, a fill light, the sky above, a narrow highlight."""
    key, fill = (light / np.linalg.norm(light) for light in (_KEY_LIGHT, _FILL_LIGHT))
    half = key + np.array([0, 0, -1], dtype=np.float32)
    half /= np.linalg.norm(half)
    lit = 0.78 * np.clip(normals @ key, 0, None) + 0.24 * np.clip(normals @ fill, 0, None)
    return lit + 0.17 - 0.08 * normals[:, 1] + 0.1 * np.clip(normals @ half, 0, None) ** 24


def _shades(color: str) -> np.ndarray:
    """The colour, opaque, under light of 0 to 1 in 1024 steps, `(1024, 4)` bytes; light adds up before the gamma."""
    linear = (np.array(ImageColor.getrgb(color)[:3]) / 255) ** 2.2
    srgb = np.clip(np.linspace(0, 1, 1024)[:, None] * linear * 1.1, 0, 1) ** (1 / 2.2)
    return np.concatenate([srgb * 255, np.full((1024, 1), 255)], axis=1).astype(np.uint8)


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """
    The mean direction of the faces around each vertex, weighted by their areas.

    Args:
        vertices (`numpy.ndarray` of shape `(N, V, 3)`), faces (`numpy.ndarray` of shape `(F, 3)`): bodies.

    Returns:
        `numpy.ndarray` of shape `(N V, 3)`: length 1, pointing outwards.
    """
    corner = vertices[:, faces]  # (N, F, 3, 3)
    face_normals = np.cross(corner[:, :, 1] - corner[:, :, 0], corner[:, :, 2] - corner[:, :, 0]).reshape(-1, 3)
    triangles = _flat_faces(faces, *vertices.shape[:2])
    num_vertices = vertices.shape[0] * vertices.shape[1]
    total = np.stack(
        [np.bincount(triangles.ravel(), np.repeat(axis, 3), minlength=num_vertices) for axis in face_normals.T],
        axis=-1,
    )
    return (total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-12)).astype(np.float32)
