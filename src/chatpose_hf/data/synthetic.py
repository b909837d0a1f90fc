"""Synthetic people: poses in, rendered pictures of clothed bodies with exact labels out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from ..body import BodyModel
from ..render import draw_bodies
from ..rotations import rotmat_to_rotvec, rotvec_to_rotmat
from .captions import Captioner
from .near_duplicates import NEARLY_VAL, is_near
from .source import DrawnFromRows


_BATCH = 50  # pictures whose poses are captioned at a time
_PEOPLE_IN_GROUP = (2, 2, 3, 3, 4)
_GROUP_SHARE = 0.1
_EVERYBODY_SHARE = 0.3  # of the groups that are asked for all
_CELL = 0.028  # metres: the default body keeps some 2,500 of its 13,718 vertices, and its fingers
_NOISE = 0.12  # radians, of each axis of a joint
_NOISE_SHARE, _RECOMBINED_SHARE, _OCCLUDED_SHARE, _BLURRED_SHARE, _BALD_SHARE = 0.5, 0.3, 0.25, 0.3, 0.08
_MAX_OCCLUSION = 0.3  # of the person's pixels
_LOWER_BODY = (1, 2, 4, 5, 7, 8, 10, 11)
# Whatever the given poses show: how far the noise may bend a knee (about x) or an elbow (about y), joint: (axis, low, high).
_HINGES = {4: (0, -0.1, 2.6), 5: (0, -0.1, 2.6), 18: (1, -2.6, 0.1), 19: (1, -0.1, 2.6)}
_PITCH = (-10, 35)  # degrees that the camera looks down
# Far enough apart to be told by name in any light.
COLORS = {
    "red": (190, 30, 35),
    "orange": (235, 125, 25),
    "yellow": (235, 205, 50),
    "green": (45, 135, 60),
    "blue": (40, 75, 175),
    "purple": (115, 50, 140),
    "pink": (240, 150, 185),
    "white": (238, 238, 235),
    "black": (28, 28, 32),
}
_BRIGHTNESS_JITTER, _TINT_JITTER = 14, 4  # little tint: black would become navy, white mint
HAIR_COLORS = {"black": (25, 22, 22), "brown": (92, 58, 36), "blond": (215, 180, 110), "grey": (150, 150, 150)}
# Hair that is like the skin cannot be told from a bald head.
_HAIR_CONTRAST = 60
_SEEN = 2e-4  # of the picture's pixels must show what a phrase is about
_SKIN_COLORS = ((255, 219, 190), (236, 188, 150), (205, 150, 110), (160, 105, 70), (105, 66, 45), (70, 45, 34))
_SHOE_COLORS = ((40, 40, 42), (225, 225, 222), (95, 65, 45), (120, 120, 125))
_TOPS = {"T-shirt": False, "long-sleeved shirt": True}
_BOTTOMS = {"shorts": False, "trousers": True}


class Person(NamedTuple):
    """
    A person of a picture.

    Attributes:
        pose (`np.ndarray` of shape `(24, 3)`): axis-angle in radians, camera frame.
        box (`tuple`): (left, top, right, bottom) of the body in pixels, what is hidden included.
        phrases (`list[str]`): each is true of this person and of nobody else in the picture.
    """

    pose: np.ndarray
    box: tuple[float, float, float, float]
    phrases: list[str]


class Scene(NamedTuple):
    """
    A picture and its people.

    Attributes:
        image (`PIL.Image.Image`): RGB.
        people (`list[Person]`): in the order of the poses.
        owners (`np.ndarray` of shape `(H, W)`): at each pixel, the number of the person there, -1 for none.
        focal (`float`), center (`tuple`): the camera's, in pixels.
        translations (`np.ndarray` of shape `(N, 3)`): what takes each body of `BodyModel.vertices(pose)` to its place.
    """

    image: Image.Image
    people: list[Person]
    owners: np.ndarray
    focal: float
    center: tuple[float, float]
    translations: np.ndarray


class _Look(NamedTuple):
    top: str
    top_color: str
    bottom: str
    bottom_color: str
    hair_color: str | None
    # sRGB, 0 to 255
    top_rgb: np.ndarray
    bottom_rgb: np.ndarray
    skin_rgb: np.ndarray
    shoes_rgb: np.ndarray


def decimate(body: BodyModel, cell: float = _CELL) -> BodyModel:
    """
    A coarser body for small pictures: the vertices of each cell of a grid in the rest pose become one.

    Args:
        body ([`BodyModel`]): of any kind; pose blend shapes are left out.
        cell (`float`, *optional*): metres.
    """
    rest, weights = body.rest_vertices.double().numpy(), body.weights.double().numpy()
    # Not across bones: neighbouring fingers, or the legs, would grow together.
    keys = np.concatenate([np.floor(rest / cell), weights.argmax(1)[:, None]], axis=1)
    _, owner, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    owner = owner.ravel()
    faces = owner[body.faces.numpy()]
    is_whole = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])

    def mean(values: np.ndarray) -> Tensor:
        total = np.stack([np.bincount(owner, column) for column in values.T], axis=1)
        return torch.from_numpy(total / counts[:, None]).float()

    return BodyModel(
        body.name,
        rest_vertices=mean(rest),
        rest_joints=body.rest_joints,
        weights=mean(weights),
        faces=torch.from_numpy(np.unique(faces[is_whole], axis=0)),
        parents=body.parents,
        joint_names=body.joint_names,
    )


class PoseSampler:
    """
    New poses from given ones: a heading of their own, noise that stays inside the joints' limits, and the upper body of one
    with the lower body of another. The limits of a joint's three numbers are what 99 % of the given poses keep to; a pose
    that is beyond them already is not brought back, and not led farther out. Heading is about the camera's vertical: people
    who stood upright before a level camera still do, those of a tilted camera lean.

    Args:
        poses (`np.ndarray` of shape `(N, 24, 3)`): axis-angle in radians, camera frame.
        masks (`np.ndarray` of shape `(N, 24)`): the joints that are known; others stay as they are.
    """

    def __init__(self, poses: np.ndarray, masks: np.ndarray):
        if poses.ndim != 3 or poses.shape[1:] != (24, 3) or len(poses) == 0 or masks.shape != poses.shape[:2]:
            raise ValueError(
                f"expected some poses of shape (N, 24, 3) and masks (N, 24), got {poses.shape} and {masks.shape}"
            )
        if not np.isfinite(poses).all():
            raise ValueError("expected finite poses, got NaN or infinity; leave those poses out")
        self.poses, self._masks = poses, masks.astype(bool)
        self.low, self.high = np.quantile(poses, [0.005, 0.995], axis=0)
        for joint, (axis, low, high) in _HINGES.items():
            self.low[joint, axis] = max(self.low[joint, axis], low)
            self.high[joint, axis] = min(self.high[joint, axis], high)

    def sample(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A pose `(24, 3)` in the camera frame, and its mask `(24,)`."""
        index = rng.integers(len(self.poses))
        pose, mask = self.poses[index].astype(np.float64), self._masks[index].copy()
        if rng.random() < _RECOMBINED_SHARE:
            other = rng.integers(len(self.poses))
            pose[list(_LOWER_BODY)] = self.poses[other, list(_LOWER_BODY)]
            mask[list(_LOWER_BODY)] = self._masks[other, list(_LOWER_BODY)]
        if rng.random() < _NOISE_SHARE:
            noise = rng.normal(0, _NOISE, pose.shape) * mask[:, None]
            noise[0] = 0
            pose = np.clip(pose + noise, np.minimum(pose, self.low), np.maximum(pose, self.high))
        return turn(pose[None], _rotation(1, rng.uniform(-np.pi, np.pi)))[0], mask


@contextmanager
def _one_thread() -> Iterator[None]:
    """A product of matrices is rounded otherwise by other numbers of threads; pictures are to repeat byte by byte."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def turn(poses: np.ndarray, rotmat: np.ndarray) -> np.ndarray:
    """Poses `(N, 24, 3)` whose global orientation is turned by a matrix of the camera frame."""
    orient = torch.from_numpy(rotmat) @ rotvec_to_rotmat(torch.from_numpy(poses[:, 0]).double())
    return np.concatenate([rotmat_to_rotvec(orient).numpy()[:, None], poses[:, 1:]], axis=1)


class Studio:
    """
    Draws people. One body of one shape; clothes, hair and skin are colours of its parts.

    Args:
        body ([`BodyModel`], *optional*): the default body where none is given.
    """

    def __init__(self, body: BodyModel | None = None):
        self.body = decimate(body or BodyModel.load("default"))
        self._faces = self.body.faces.numpy()
        self._parts = _body_parts(self.body)

    @_one_thread()
    def draw(self, poses: np.ndarray, rng: np.random.Generator, size: int) -> Scene:
        """
        A picture of people on one floor; one alone fills it as a person crop does.

        Args:
            poses (`np.ndarray` of shape `(N, 24, 3)`):
                Axis-angle in radians, camera frame of a camera that stands level; the picture's camera looks up or down,
                and the labels in `Scene.people` have that in them.
            rng (`np.random.Generator`): decides all else.
            size (`int`): pixels of the picture's side.
        """
        poses = np.asarray(poses)
        if poses.ndim != 3 or poses.shape[1:] != (24, 3) or len(poses) == 0 or not np.isfinite(poses).all():
            raise ValueError(f"expected some finite poses of shape (N, 24, 3), got {poses.shape}")
        looks = _draw_looks(len(poses), rng)
        with torch.no_grad():
            level = self.body.vertices(torch.from_numpy(poses).float()).double().numpy()
        level = _place(level, rng)
        camera = _rotation(2, rng.normal(0, np.radians(3))) @ _rotation(0, rng.uniform(*np.radians(_PITCH)))
        vertices = level @ camera.T
        # The nearer the camera, the stronger the perspective.
        points = vertices.reshape(-1, 3)
        middle = (points.min(0) + points.max(0)) / 2
        distance = np.linalg.norm(points - middle, axis=1).max() / np.sin(np.radians(rng.uniform(14, 50)) / 2)
        shift = np.array([0, 0, distance]) - middle
        vertices = vertices + shift

        planes = vertices[..., :2] / vertices[..., 2:]
        low, high = planes.reshape(-1, 2).min(0), planes.reshape(-1, 2).max(0)
        extent = high - low
        # As `person_crop` frames a box, give or take what detectors do; of a group nobody is cut off.
        if len(poses) == 1:
            side, jitter = max(extent[1], extent[0] * 4 / 3) * rng.uniform(1.0, 1.3), 0.04
        else:
            side, jitter = max(extent) * rng.uniform(1.08, 1.3), 0.03
        focal = size / side
        center = size / 2 - (low + high) / 2 * focal + rng.uniform(-jitter, jitter, 2) * size

        background = _draw_background(rng, size)
        colors = np.stack([self._colors(look) for look in looks])
        light = camera @ np.array([rng.uniform(-1, 1), -rng.uniform(0.4, 1.2), -rng.uniform(0.1, 1)])
        pixels, shown = draw_bodies(
            background, vertices, self._faces, colors, focal, tuple(center), light, ambient=rng.uniform(0.35, 0.6)
        )
        owners = shown // vertices.shape[1]  # -1 stays
        pixels, owners = _occlude(pixels, owners, rng)
        boxes = np.concatenate([planes.min(1), planes.max(1)], axis=1) * focal + np.tile(center, 2)
        labels = turn(poses.astype(np.float64), camera)
        phrases = _make_phrases(looks, boxes, vertices[..., 2].mean(1), self._seen_parts(shown, owners, len(poses)))
        with torch.no_grad():
            placed = self.body.vertices(torch.from_numpy(labels).float()).double().numpy()
        return Scene(
            image=_finish(pixels, rng),
            people=[
                Person(label, tuple(box.tolist()), texts)
                for label, box, texts in zip(labels, boxes, phrases, strict=True)
            ],
            owners=owners,
            focal=float(focal),
            center=(float(center[0]), float(center[1])),
            translations=(vertices - placed).mean(1),
        )

    def _colors(self, look: _Look) -> np.ndarray:
        """sRGB of each vertex, 0 to 1."""
        colors = np.tile(look.skin_rgb.astype(np.float32), (len(self._parts["torso"]), 1))
        colors[self._parts["torso"] | self._parts["upper arms"]] = look.top_rgb
        if _TOPS[look.top]:
            colors[self._parts["forearms"]] = look.top_rgb
        colors[self._parts["hips"]] = look.bottom_rgb
        if _BOTTOMS[look.bottom]:
            colors[self._parts["shins"]] = look.bottom_rgb
        colors[self._parts["feet"]] = look.shoes_rgb
        if look.hair_color:
            colors[self._parts["scalp"]] = HAIR_COLORS[look.hair_color]
        colors[self._parts["eyes"]] = (40, 35, 35)
        return colors / 255

    def _seen_parts(self, shown: np.ndarray, owners: np.ndarray, count: int) -> list[set[str]]:
        """Of each person, the parts that enough pixels show; `shown` as `draw_bodies` has it, `owners` after the occluder."""
        seen = []
        for number in range(count):
            vertices = shown[owners == number] % len(self._parts["torso"])
            seen.append({name for name, part in self._parts.items() if part[vertices].sum() > _SEEN * shown.size})
        return seen


def _rotation(axis: int, angle: float) -> np.ndarray:
    rotvec = torch.zeros(3, dtype=torch.float64)
    rotvec[axis] = angle
    return rotvec_to_rotmat(rotvec).numpy()


def _body_parts(body: BodyModel) -> dict[str, np.ndarray]:
    """Which vertices are of which part, by the bone that moves them and by their place at rest (y up, facing +z)."""
    bone = body.weights.argmax(1).numpy()
    x, y, z = body.rest_vertices.numpy().T
    joints = body.rest_joints.numpy()
    head = np.isin(bone, [15])
    crown = y[head].max()
    chin = y[head].min()
    height = crown - chin
    # By height alone: by bones the shirt's edge would be ragged.
    is_trunk = np.isin(bone, [0, 1, 2, 3, 6, 9, 13, 14])
    waist = joints[3, 1]
    elbow = abs(joints[18, 0])
    is_face = z > joints[15, 2] + 0.045
    eye_line = np.abs(y - (chin + 0.57 * height)) < 0.05 * height
    return {
        "torso": is_trunk & (y > waist),
        "hips": is_trunk & (y <= waist),
        "shins": np.isin(bone, [4, 5]),
        "feet": np.isin(bone, [7, 8, 10, 11]),
        "upper arms": np.isin(bone, [16, 17]) & (np.abs(x) < elbow),
        "forearms": np.isin(bone, [18, 19]),
        "scalp": head
        & ((y > chin + 0.78 * height) | ((y > chin + 0.3 * height) & ~is_face & (z < joints[15, 2] + 0.02))),
        "eyes": head & eye_line & is_face & (np.abs(np.abs(x) - 0.033) < 0.014),
    }


def _draw_looks(count: int, rng: np.random.Generator) -> list[_Look]:
    looks = []
    for _ in range(count):
        # Of two colours: people in one look naked at the size of a stamp.
        top_color, bottom_color = rng.choice(list(COLORS), 2, replace=False).tolist()
        jitter = rng.uniform(-1, 1, (2, 1)) * _BRIGHTNESS_JITTER + rng.uniform(-1, 1, (2, 3)) * _TINT_JITTER
        tone, between = rng.integers(len(_SKIN_COLORS) - 1), rng.random()
        skin = (1 - between) * np.array(_SKIN_COLORS[tone]) + between * np.array(_SKIN_COLORS[tone + 1])
        hairs = [name for name, color in HAIR_COLORS.items() if np.abs(skin - color).sum() >= _HAIR_CONTRAST]
        looks.append(
            _Look(
                top=str(rng.choice(list(_TOPS))),
                top_color=top_color,
                bottom=str(rng.choice(list(_BOTTOMS))),
                bottom_color=bottom_color,
                hair_color=None if rng.random() < _BALD_SHARE else str(rng.choice(hairs)),
                top_rgb=np.clip(COLORS[top_color] + jitter[0], 0, 255),
                bottom_rgb=np.clip(COLORS[bottom_color] + jitter[1], 0, 255),
                skin_rgb=skin,
                shoes_rgb=np.array(_SHOE_COLORS[rng.integers(len(_SHOE_COLORS))]),
            )
        )
    return looks


def _place(vertices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bodies on the floor y = 0, in a row in a random order, some nearer than others."""
    low, high = vertices.min(1), vertices.max(1)
    offsets = np.zeros((len(vertices), 3))
    offsets[:, 1] = -high[:, 1]
    edge = 0.0
    for number in rng.permutation(len(vertices)):
        offsets[number, 0] = edge - low[number, 0]
        edge += high[number, 0] - low[number, 0] + rng.uniform(-0.15, 0.4)
    if len(vertices) > 1:
        offsets[:, 2] = rng.uniform(-0.7, 0.7, len(vertices)) - (low[:, 2] + high[:, 2]) / 2
    return vertices + offsets[:, None]


def _draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A wall and a floor in muted colours, with soft blotches; bytes."""
    grey = rng.uniform(50, 215, (2, 1))
    wall, floor = np.clip(grey + rng.normal(0, 9, (2, 3)), 0, 255)
    rows = np.arange(size)[:, None] / size
    horizon = rng.uniform(0.45, 0.95)
    softness = rng.uniform(0.005, 0.1)
    blend = 1 / (1 + np.exp(-np.clip((rows - horizon) / softness, -30, 30)))
    column = wall * (1 - blend) + floor * blend + (rows - 0.5) * rng.uniform(-40, 40)
    blotches = rng.normal(0, rng.uniform(0, 22), (rng.integers(3, 9), rng.integers(3, 9))).astype(np.float32)
    texture = np.asarray(Image.fromarray(blotches).resize((size, size), Image.Resampling.BICUBIC))
    return np.clip(column[:, None] + texture[..., None], 0, 255).astype(np.uint8)


def _occlude(pixels: np.ndarray, owners: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sometimes a thing before somebody, which hides at most 30 % of any one."""
    if rng.random() >= _OCCLUDED_SHARE:
        return pixels, owners
    size = len(owners)
    visible = np.bincount(owners[owners >= 0])
    width, height = rng.uniform(0.1, 0.4, 2) * size
    ys, xs = np.nonzero(owners >= 0)
    hit = rng.integers(len(ys))
    left, top = xs[hit] - rng.random() * width, ys[hit] - rng.random() * height
    thing = Image.new("1", (size, size))
    drawer = ImageDraw.Draw(thing)
    shape = drawer.ellipse if rng.random() < 0.5 else drawer.rectangle
    shape((left, top, left + width, top + height), fill=1)
    mask = np.asarray(thing)
    hidden = np.bincount(owners[mask & (owners >= 0)], minlength=len(visible))
    if (hidden > _MAX_OCCLUSION * visible).any():
        return pixels, owners
    color = np.clip(rng.uniform(30, 220) + rng.normal(0, 20, 3), 0, 255).astype(np.uint8)
    return np.where(mask[..., None], color, pixels), np.where(mask, -1, owners)


def _finish(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """What lenses and sensors do."""
    noise = rng.normal(0, rng.uniform(0, 5), pixels.shape[:2]).astype(np.int16)
    image = Image.fromarray(np.clip(pixels + noise[..., None], 0, 255).astype(np.uint8))
    if rng.random() < _BLURRED_SHARE:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8) * len(pixels) / 224))
    return image


def _make_phrases(
    looks: Sequence[_Look], boxes: np.ndarray, depths: np.ndarray, seen: Sequence[set[str]]
) -> list[list[str]]:
    """Of each person, what is true of nobody else and can be seen. One alone needs no telling apart."""
    middles = (boxes[:, 0] + boxes[:, 2]) / 2
    order = np.argsort(middles).tolist()
    is_apart = len(looks) > 1 and np.diff(np.sort(middles)).min() > 0.1 * (boxes[:, 2].max() - boxes[:, 0].min())
    nearest = np.argsort(depths)
    phrases: list[list[str]] = []
    for number, look in enumerate(looks):
        others = [other for index, other in enumerate(looks) if index != number]
        texts = []
        has_top, has_bottom = "torso" in seen[number], "hips" in seen[number]
        if has_top and all(other.top_color != look.top_color for other in others):
            texts.append(f"the person in the {look.top_color} {'shirt' if _TOPS[look.top] else look.top}")
        if has_bottom and all(other.bottom_color != look.bottom_color for other in others):
            texts.append(f"the person wearing {look.bottom_color} {look.bottom}")
        pair = look.top_color, look.bottom_color
        if has_top and has_bottom and all((other.top_color, other.bottom_color) != pair for other in others):
            article = "an" if look.top_color[0] == "o" else "a"
            texts.append(f"the person in {article} {look.top_color} {look.top} and {look.bottom_color} {look.bottom}")
        # A bald head may have the colour of any hair.
        is_only = all(other.hair_color not in (None, look.hair_color) for other in others)
        if look.hair_color and "scalp" in seen[number] and is_only:
            texts.append(f"the person with {look.hair_color} hair")
        if is_apart and number == order[0]:
            texts.append("the person on the left")
        if is_apart and number == order[-1]:
            texts.append("the person on the right")
        if is_apart and len(looks) == 3 and number == order[1]:
            texts.append("the person in the middle")
        if len(looks) > 1 and number == nearest[0] and depths[nearest[1]] - depths[nearest[0]] > 0.4:
            texts.append("the person closest to the camera")
        phrases.append(texts)
    return phrases


class SyntheticPeople(DrawnFromRows):
    """
    Pictures of people in the poses of rows that `chatpose data` wrote, `SPLIT/PART.parquet`, changed as [`PoseSampler`]
    does; none of train is nearly a pose of the rows' val. Nine in ten show one person (task `"pose_estimation"`, captions of kind `"geometry"`); the others some people (task
    `"rpe"`), one of whom is asked for by a phrase that is true of nobody else, or all of them.

    Args:
        folder (`str` or `Path`): the rows.
        seed (`int`, *optional*, defaults to 0): for everything that is drawn.
        image_size (`int`, *optional*, defaults to 224): pixels of a picture's side.
        count (`int`, *optional*, defaults to 10000): how many pictures; one in twenty of the poses of the split `val`.
    """

    name = "synthetic"
    licence = "Rendered by chatpose_hf from a CC0 body; the poses keep the terms of the rows that they were made from"
    default_count = 10_000
    rows_per_part = 500

    def __init__(self, folder: str | Path, seed: int = 0, image_size: int = 224, count: int | None = None):
        super().__init__(folder, seed, count)
        if image_size < 16:
            raise ValueError(f"expected pictures of at least 16 pixels, got {image_size}")
        self.image_size = image_size

    def settings(self) -> dict[str, str | int | float | None]:
        return {**super().settings(), "image_size": self.image_size}

    def read_part(self, part: str) -> Iterator[dict]:
        split = part.split("/")[0]
        sampler = load_sampler(self.folder, split)
        captioner = load_captioner()
        indices = self.indices(part)
        for start in range(0, len(indices), _BATCH):
            sampled = []
            for index in indices[start : start + _BATCH]:
                rng = np.random.default_rng([self.seed, index])
                num_people = rng.choice(_PEOPLE_IN_GROUP) if rng.random() < _GROUP_SHARE else 1
                poses, masks = map(np.stack, zip(*(sampler.sample(rng) for _ in range(num_people)), strict=True))
                sampled.append((f"{index:08}", poses, masks, rng))
            # What is up and down is told by the level camera; the picture's may look from above.
            said = captioner.captions(
                torch.from_numpy(np.stack([poses[0] for _, poses, *_ in sampled])),
                [f"{self.seed}/{id}" for id, *_ in sampled],
            )
            groups = [poses for _, poses, *_ in sampled]
            near = find_near_val(torch.from_numpy(np.concatenate(groups)), self.folder, split)
            near_groups = near.split([len(group) for group in groups])
            for (id, poses, masks, rng), captions, nearly in zip(sampled, said, near_groups, strict=True):
                if nearly.any():
                    self.skip(NEARLY_VAL, id)
                    continue
                row = self._draw_row(id, poses, masks, rng, captions)
                if row is None:
                    self.skip("nobody in the group can be told apart", id)
                else:
                    yield row

    def _draw_row(
        self, id: str, poses: np.ndarray, masks: np.ndarray, rng: np.random.Generator, said: list[str]
    ) -> dict | None:
        """A row, or `None` where there are several people and no word that is true of one alone."""
        scene = _load_studio().draw(poses, rng, self.image_size)
        told = [number for number, person in enumerate(scene.people) if person.phrases]
        if len(poses) == 1:
            task, asked, captions = "pose_estimation", [0], [("geometry", text) for text in said]
        elif len(told) == len(poses) and rng.random() < _EVERYBODY_SHARE:
            task, asked = "rpe", told
            captions = [("phrase", str(rng.choice(scene.people[number].phrases))) for number in told]
        elif told:
            task, asked = "rpe", [int(rng.choice(told))]
            captions = [("phrase", text) for text in scene.people[asked[0]].phrases]
        else:
            return None
        labels = [scene.people[number].pose for number in asked]
        row = self.make_row(id, task, labels, captions, [scene.image])
        return {**row, "pose_mask": masks[asked].tolist()}


# Kept for the parts to come.
@lru_cache(maxsize=2)
def load_sampler(folder: Path, split: str) -> PoseSampler:
    """
    A sampler of the known poses of rows that `chatpose data` wrote, but for those of task `"spg"`, which come twice.

    Args:
        folder (`Path`): of `SPLIT/PART.parquet`.
        split (`str`): which.

    Raises:
        ValueError: where there are none.
    """
    poses, masks = [np.zeros((0, 24, 3), dtype=np.float32)], [np.zeros((0, 24), dtype=bool)]
    for path in sorted(folder.glob(f"{split}/*.parquet")):
        try:
            # Those of spg are there already. Python's own lists would take gigabytes for a million poses.
            table = pq.read_table(path, columns=["poses", "pose_mask"], filters=[("task", "!=", "spg")])
            for column, arrays, shape in (("poses", poses, (24, 3)), ("pose_mask", masks, (24,))):
                values = table[column].combine_chunks().flatten()
                for _ in shape:
                    values = values.flatten()
                arrays.append(values.to_numpy(zero_copy_only=False).reshape(-1, *shape))
        except (OSError, ValueError) as error:  # Arrow's errors are these
            raise ValueError(f"expected rows in {path}, as `chatpose data` writes them: {error}") from error
    all_poses, all_masks = np.concatenate(poses), np.concatenate(masks)
    is_known = all_masks.any(1)  # others stand in for poses that nobody knows
    if not is_known.any():
        raise ValueError(f"expected rows with poses in {folder / split}, found none; make some with `chatpose data`")
    return PoseSampler(all_poses[is_known], all_masks[is_known])


def find_near_val(poses: Tensor, folder: Path, split: str) -> Tensor:
    """Which poses `(N, 24, 3)` of a split are nearly ones of the rows' val and may not be there: `(N,)`, bool, none but of train."""
    return is_near(poses, _load_val_poses(folder)) if split == "train" else torch.zeros(len(poses), dtype=torch.bool)


@lru_cache(maxsize=2)
def _load_val_poses(folder: Path) -> Tensor:
    """The poses `(N, 24, 3)` of the split val of rows, none where there is no such split."""
    if not any(folder.glob("val/*.parquet")):
        return torch.zeros(0, 24, 3)
    return torch.from_numpy(load_sampler(folder, "val").poses)


@lru_cache(maxsize=1)
def _load_studio() -> Studio:
    return Studio()


@lru_cache(maxsize=1)
def load_captioner() -> Captioner:
    """One for all parts: making it takes as long as hundreds of captions."""
    return Captioner()
