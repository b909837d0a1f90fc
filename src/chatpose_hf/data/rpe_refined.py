"""RPE-Refined: which person of a 3DPW photo is meant by a description, and what is that person's pose."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..array_files import read_limited, value_errors_only
from ..image_files import open_image
from .prompts import make_parts
from .rows import IMAGE_TOKEN, NUM_JOINTS
from .source import Source, Truth, inside, load_json, other_files, read_betas, read_gender, read_numbers


_ATTRIBUTES = ("behavior", "outfits", "pose", "shape")
_REQUEST = ", can you give the SMPL pose of this person?"


class RpeRefined(Source):
    """
    `refine_vqa_{behavior,outfits,pose,shape}_withGT.json` (50 items each) of github.com/jjunsss/RPE-Refined, in the folder
    or in `RPE-refined/`; and 3DPW's photos where `real_image` says, `3DPW/imageFiles/<sequence>/image_00326.jpg`, or the
    same without `3DPW/` for a folder that is 3DPW's own.

    A row of task `"rpe"` and split test for each item: the whole photo as it is on disk, the conversation of the file, the
    description as a caption of kind `"phrase"`. The pose is `ground_truth.smpl_param.pose`, 72 numbers, all 24 joints; it
    is taken to be in the camera frame, as 3DPW in NeuralAnnot's format has it. The file's first item bears that out: posed
    by it, the default body's joints lie 91 mm from `fitted_joint_cam`, both from the pelvis, and half a metre off in other
    frames.

    Ids are attribute, photo and the item's own id: base names of photos repeat between sequences, and photos between items.

    [`truths`] reads `ground_truth.fitted_joint_cam` (24 x 3), metres in the camera frame, SMPL's joints in its order, and
    `smpl_param.shape` (10) and `smpl_param.gender`.
    """

    name = "rpe-refined"
    licence = "RPE-Refined states no licence; 3DPW: non-commercial research"

    def parts(self) -> list[str]:
        parts = [f"test/{attribute}" for attribute in _ATTRIBUTES if self._path(attribute).is_file()]
        if not parts:
            raise FileNotFoundError(
                f"expected refine_vqa_{{{','.join(_ATTRIBUTES)}}}_withGT.json in {self.folder} or its RPE-refined, found none"
            )
        return parts

    def read_part(self, part: str) -> Iterator[dict]:
        attribute = part.split("/")[1]
        path = self._path(attribute)
        for index, item in enumerate(_load_items(path)):
            try:
                name = item["real_image"]
                question, answer = (turn["value"] for turn in item["conversations"])
                question = question.replace(IMAGE_TOKEN, "", 1).strip()
                parts = make_parts(answer)
                id = f"{attribute}/{name}/{item['id']}"
                pose = np.array(item["ground_truth"]["smpl_param"]["pose"], np.float32).reshape(NUM_JOINTS, 3)
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
                self.skip("an item without a photo, question, answer or pose of 72 numbers", f"{attribute}/{index}")
                continue
            image = self._read_image(name)
            if image is not None:
                messages = [
                    {
                        "role": "user",
                        "content": [{"type": "image", "text": None}, {"type": "text", "text": question}],
                    },
                    {"role": "assistant", "content": parts},
                ]
                captions = [("phrase", question.removesuffix(_REQUEST))]
                yield self.make_row(id, "rpe", [pose], captions, [image], messages=messages)

    def truths(self, ids: Sequence[str]) -> list[Truth]:
        """As [`Source.truths`]; the 24 joints of the fitted body, of which the benchmark takes the first 22."""
        items: dict[str, dict[str, dict]] = {}
        found: dict[str, Truth] = {}
        for id in ids:
            attribute = id.split("/", 1)[0]
            if attribute not in _ATTRIBUTES:
                raise other_files(id, f"an id that begins with one of {', '.join(_ATTRIBUTES)}, as in {self.folder}")
            path = self._path(attribute)
            if attribute not in items:
                items[attribute] = _load_items_by_id(path, attribute)
            if id not in items[attribute]:
                raise other_files(id, f"an item of that photo and id in {path}")
            if id not in found:
                with value_errors_only(f"row {id!r:.300} in `{path}`"):
                    found[id] = _read_truth(items[attribute][id])
        return [found[id] for id in ids]

    def _path(self, attribute: str) -> Path:
        name = f"refine_vqa_{attribute}_withGT.json"
        path = self.folder / name
        return path if path.is_file() else self.folder / "RPE-refined" / name

    def _read_image(self, name: object) -> bytes | None:
        try:
            places = [inside(self.folder, name), inside(self.folder, str(name).removeprefix("3DPW/"))]
        except ValueError:
            self.skip("refused name of a photo", str(name)[:200])
            return None
        path = next(filter(os.path.isfile, places), None)  # `Path.is_file` raises for a name that is too long
        if path is None:
            self.skip(f"missing image of {places[0].parent.name:.100}", str(name))
            return None
        try:
            open_image(path)
            return read_limited(path)
        except (ValueError, OSError):
            self.skip(f"damaged image of {path.parent.name:.100}", str(name))
            return None


def _load_items(path: Path) -> list:
    items = load_json(path)
    if not isinstance(items, list):
        raise ValueError(f"expected an array of items in {path}, got {type(items).__name__}")
    return items


def _load_items_by_id(path: Path, attribute: str) -> dict[str, dict]:
    """Items by their rows' ids; where some have the same, the first, as rows do."""
    items: dict[str, dict] = {}
    for item in _load_items(path):
        if isinstance(item, dict) and {"real_image", "id"} <= item.keys():
            items.setdefault(f"{attribute}/{item['real_image']}/{item['id']}", item)
    return items


def _read_truth(item: dict) -> Truth:
    truth = item.get("ground_truth")
    parameters = truth.get("smpl_param") if isinstance(truth, dict) else None
    wanted = ("shape", "gender")
    is_complete = isinstance(parameters, dict) and parameters.keys() >= set(wanted) and "fitted_joint_cam" in truth
    if not is_complete:
        raise ValueError(
            f"expected `fitted_joint_cam` and `smpl_param` with {' and '.join(wanted)} as `ground_truth`, got {truth!r:.200}"
        )
    return Truth(
        betas=read_betas("shape", parameters["shape"]),
        gender=read_gender("gender", parameters["gender"]),
        joints=read_numbers("fitted_joint_cam", truth["fitted_joint_cam"], (NUM_JOINTS, 3)),
        known=np.ones(NUM_JOINTS, bool),
    )
