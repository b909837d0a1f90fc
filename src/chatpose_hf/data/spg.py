"""Speculative pose generation: rows that ask for a pose by a situation in which somebody would take it."""

import json
import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice, tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..body import JOINT_NAMES, BodyModel
from ..pose_files import turn_frame
from .cmu import CmuPoses
from .endpoint import Endpoint
from .prompts import DESCRIBING_KINDS
from .rows import FEATURES, IMAGE_TOKEN, POSE_TOKEN, caption_texts
from .source import Source


# All that say where the body is; the tips of feet and hands are not captured everywhere.
_MEASURED = [joint for joint in range(22) if joint not in (10, 11)]
_LEAST_WIDTH = 0.2  # metres, of hips and shoulders seen from above, for knowing where a person faces
_COLUMNS = ["id", "task", "poses", "pose_mask", "captions", "licence"]
_BATCH = 100  # rows measured at once
_NUM_SITUATIONS = 3
_LENGTHS = 12, 240  # letters
_GEOMETRY = re.compile(
    r"\b(knees?|elbows?|wrists?|ankles?|shoulders?|thighs?|shins?|forearms?|torso|pelvis|spine|degrees?|joints?|limbs?"
    r"|(left|right) (arm|hand|leg|foot|side)|(straight|bent|horizontal|vertical|extended) (arm|leg)s?)\b|°",
    re.IGNORECASE,
)
_PROMPT = """Below, in quotes, is a description of how a person's body is posed.

{description}

Think of {count} different everyday, professional, sporting or dramatic situations in which somebody's body would be \
posed in just this way. Write one sentence of at most 25 words about each. Say who the person is and what is going \
on, so that a reader who knows people can guess the pose. Do not describe the pose: no parts of the body and where \
they are, no angles, no left and right, no words of the description.

Answer with JSON alone: {{"situations": ["...", "...", "..."]}}"""


class Spg(Source):
    """
    Rows that `chatpose data` wrote, `SPLIT/NAME.parquet`, or what [`CmuPoses`] reads; from those of task
    `"text_to_pose"` with one pose come rows of task `"spg"`: the same pose, mask and licence, the same describing
    captions, and situations as captions of kind `"implicit"`.

    With an endpoint, a model turns one of the captions, a human's where there is one, into situations. Without, they
    come from [`SITUATIONS`]: the pose is measured, and a row is made only where it is clearly of a kind that is there.

    Args:
        folder (`str` or `Path`): of rows.
        seed (`int`, *optional*, defaults to 0): of the choice of a caption.
        endpoint ([`Endpoint`], *optional*): the model that is asked.
    """

    name = "spg"
    licence = "that of the rows it was made from"

    def __init__(self, folder: str | Path, seed: int = 0, endpoint: Endpoint | None = None):
        super().__init__(folder, seed)
        self.endpoint = endpoint

    def settings(self) -> dict:
        return {**super().settings(), **(self.endpoint.settings() if self.endpoint else {"model": None})}

    def parts(self) -> list[str]:
        if cmu := self._find_cmu():
            return cmu.parts()
        parts = sorted(f"{path.parent.name}/{path.stem}" for path in self.folder.glob("*/*.parquet"))
        if not parts:
            raise FileNotFoundError(
                f"expected rows in {self.folder}, SPLIT/NAME.parquet, found none; make them with `chatpose data`"
            )
        return parts

    def read_part(self, part: str) -> Iterator[dict]:
        find = self._ask if self.endpoint else self._measure
        for row, situations in find(self._described_rows(part)):
            if situations:
                yield self._make_row(row, situations)

    def _find_cmu(self) -> CmuPoses | None:
        return CmuPoses(self.folder, self.seed) if any(self.folder.glob("*.npz")) else None

    def _described_rows(self, part: str) -> Iterator[dict]:
        cmu = self._find_cmu()
        for row in cmu.rows(part) if cmu else self._load(self.folder / f"{part}.parquet"):
            if row["task"] != "text_to_pose" or len(row["poses"]) != 1:
                self.skip("a row that asks for something else than one described pose", row["id"])
            else:
                yield row

    def _load(self, path: Path) -> list[dict]:
        if not path.is_file():
            raise FileNotFoundError(f"expected the file {path}, found none")
        try:
            file = pq.ParquetFile(path)
            if not file.schema_arrow.equals(FEATURES.arrow_schema):
                raise ValueError(f"got the columns {', '.join(file.schema_arrow.names)}, or other types")
            return file.read(_COLUMNS).to_pylist()
        except (ValueError, OSError, pa.ArrowException) as error:
            raise ValueError(f"expected rows as `chatpose data` writes them in {path}: {error}") from error

    def _make_row(self, row: dict, situations: list[str]) -> dict:
        explicit = [(text["kind"], text["text"]) for text in row["captions"] if text["kind"] in DESCRIBING_KINDS]
        captions = [*(("implicit", text) for text in situations), *explicit]
        made = self.make_row(f"{row['id']}/spg", "spg", row["poses"], captions, pose_mask=row["pose_mask"][0])
        return {**made, "licence": row["licence"]}

    def _measure(self, rows: Iterator[dict]) -> Iterator[tuple[dict, list[str]]]:
        """Rows and the situations in the table for each."""
        while batch := list(islice(rows, _BATCH)):
            kinds = find_kinds(torch.from_numpy(np.array([row["poses"][0] for row in batch], dtype=np.float32)))
            for row, of_row in zip(batch, kinds, strict=True):
                situations = []
                if not all(row["pose_mask"][0][joint] for joint in _MEASURED):
                    self.skip("a pose that is known in part only", row["id"])
                elif not of_row:
                    self.skip("no situation for the pose", row["id"])
                else:
                    situations = [text for kind in SITUATIONS if kind.name in of_row for text in kind.situations]
                yield row, situations

    def _ask(self, rows: Iterator[dict]) -> Iterator[tuple[dict, list[str]]]:
        """Rows and what the model makes of each; nothing where it makes nothing of use."""
        chosen, same = tee((row, text) for row in rows if (text := self._choose_description(row)))
        answers = self.endpoint.ask_all((make_prompt(text), ()) for _, text in same)
        for (row, text), answer in zip(chosen, answers, strict=True):
            situations = []
            if answer is None:
                # Begins with "missing": the runner asks again next time.
                self.skip("missing answer: the model gave no JSON object", row["id"])
            else:
                situations = check_situations(answer.get("situations"), text)
                if not situations:
                    self.skip("no usable situation in the model's answer", row["id"])
            yield row, situations

    def _choose_description(self, row: dict) -> str | None:
        for kind in DESCRIBING_KINDS:
            if texts := caption_texts(row, (kind,)):
                return random.Random(f"{self.seed}/{row['id']}").choice(texts)
        self.skip("no description of the pose", row["id"])
        return None


def make_prompt(description: str) -> str:
    """What the model is asked about a described pose."""
    return _PROMPT.format(description=json.dumps(description, ensure_ascii=False), count=_NUM_SITUATIONS)


def check_situations(texts: object, description: str) -> list[str]:
    """
    The usable ones of a model's situations, at most three: sentences of a sensible length that differ, and neither
    repeat the description nor speak of joints and angles.
    """
    usable: list[str] = []
    for text in texts if isinstance(texts, list) else []:
        if isinstance(text, str):
            text = " ".join(text.split())
            is_short = _LENGTHS[0] <= len(text) <= _LENGTHS[1]
            is_same = text.casefold().strip(".") in description.casefold() or description.casefold() in text.casefold()
            is_plain = IMAGE_TOKEN not in text and POSE_TOKEN not in text and not _GEOMETRY.search(text)
            if is_short and is_plain and not is_same and text not in usable:
                usable.append(text)
    return usable[:_NUM_SITUATIONS]


class Measures:
    """
    What the table's conditions look at, of `N` poses, in metres.

    Places are in a frame of the person's own: y up from the lowest joint, z to where the person faces, x outwards,
    away from the middle, so that left and right are alike. Arrays of both sides have the shape `(N, 2)`. x and z are
    NaN for one who lies on a side, whose front is nowhere level, and no comparison with them is true.

    Args:
        poses (`torch.Tensor` of shape `(N, 24, 3)`): axis-angle, camera frame.
    """

    def __init__(self, poses: torch.Tensor):
        with torch.no_grad():
            joints = _body().joints(turn_frame(poses.double(), "y-up", inverse=True)).double().numpy()
        joints = joints[:, _MEASURED] - joints[:, :1]
        joints[..., 1] -= joints[..., 1].min(1, keepdims=True)
        place = dict(zip((JOINT_NAMES[joint] for joint in _MEASURED), joints.swapaxes(0, 1), strict=True))
        torso = _unit(place["neck"] - place["pelvis"])
        self.up = torso[:, 1]  # cosine of the angle between the torso and the vertical
        self.chest_up = np.cross(_unit(place["l_shoulder"] - place["r_shoulder"]), torso)[:, 1]

        outwards = (place["l_hip"] - place["r_hip"] + place["l_shoulder"] - place["r_shoulder"]) * [1, 0, 1]
        outwards[np.linalg.norm(outwards, axis=-1) < _LEAST_WIDTH] = np.nan
        outwards = _unit(outwards)
        forward = np.cross(outwards, [0, 1, 0])
        axes = np.stack([outwards, np.broadcast_to([0, 1, 0], outwards.shape), forward], axis=-1)
        place = {name: np.einsum("ni,nij->nj", xyz, axes) for name, xyz in place.items()}
        for xyz, before in zip(place.values(), joints.swapaxes(0, 1), strict=True):
            xyz[:, 1] = before[:, 1]  # heights are known even where the front is not

        def sides(name: str) -> np.ndarray:
            return np.stack([place[f"l_{name}"], place[f"r_{name}"] * [-1, 1, 1]], axis=1)

        self.pelvis, self.chest, self.neck, self.head = (
            place[name][:, None] for name in ("pelvis", "spine3", "neck", "head")
        )
        self.hip, self.knee, self.ankle = sides("hip"), sides("knee"), sides("ankle")
        self.shoulder, self.elbow, self.wrist = sides("shoulder"), sides("elbow"), sides("wrist")
        self.thigh, self.shin = _unit(self.knee - self.hip), _unit(self.ankle - self.knee)
        self.arm = _unit(self.wrist - self.shoulder)
        self.knee_angle = _angle(self.hip, self.knee, self.ankle)  # degrees, 180 straight
        self.elbow_angle = _angle(self.shoulder, self.elbow, self.wrist)
        self.wrist_gap = np.linalg.norm(place["l_wrist"] - place["r_wrist"], axis=-1)

        # What several conditions share.
        self.is_upright = self.up > 0.93
        self.legs_stand = ((self.thigh[..., 1] < -0.93) & (self.shin[..., 1] < -0.93)).all(1)
        self.stands = self.legs_stand & (self.up > 0.96)
        self.arm_hangs = (
            (self.wrist[..., 1] < self.pelvis[..., 1] + 0.12)
            & (np.abs(self.wrist[..., 0] - self.shoulder[..., 0]) < 0.25)
            & (np.abs(self.wrist[..., 2] - self.hip[..., 2]) < 0.25)
            & (self.elbow_angle > 140)
        )
        self.arm_straight = self.elbow_angle > 150
        self.arm_high = self.wrist[..., 1] > self.head[..., 1] + 0.2
        self.arm_below_head = self.wrist[..., 1] < self.head[..., 1]
        self.arm_low = self.wrist[..., 1] < self.shoulder[..., 1] - 0.1
        self.leg_supports = (self.thigh[..., 1] < -0.93) & (self.shin[..., 1] < -0.93) & (self.ankle[..., 1] < 0.12)
        self.knee_on_floor = (self.knee[..., 1] < 0.12) & (np.abs(self.shin[..., 1]) < 0.5)


def one(of_side: np.ndarray, of_other: np.ndarray) -> np.ndarray:
    """Where one of the sides is the one and the other the other; `(N, 2)` to `(N,)`."""
    return (of_side & of_other[:, ::-1]).any(1)


class Kind(NamedTuple):
    """
    A kind of pose: its name, which poses are of it, and situations in which people take it.

    Conditions are strict: a pose that is left out costs less than a situation that is wrong.
    """

    name: str
    condition: Callable[[Measures], np.ndarray]
    situations: tuple[str, ...]


# fmt: off
SITUATIONS = (
    Kind("kneeling on one knee", lambda b: (b.up > 0.87) & b.arm_low.all(1) & one(
        b.knee_on_floor & (b.thigh[..., 1] < -0.8),
        (b.thigh[..., 2] > 0.6) & (b.thigh[..., 1] > -0.5) & (b.shin[..., 1] < -0.75) & (b.ankle[..., 1] < 0.25),
    ), (
        "a man proposing marriage to his girlfriend",
        "a squire who is about to be made a knight by the queen",
        "a football player in the front row of the team photo",
        "a coach talking to a small child at the child's own height",
    )),
    Kind("kneeling on both knees", lambda b: (b.up > 0.9) & b.arm_low.all(1) & (
        b.knee_on_floor & (b.thigh[..., 1] < -0.85)
    ).all(1), (
        "a believer before the altar of a church",
        "a defeated prince begging the emperor for his life",
        "someone in front of a low shelf, looking for a book in its bottom row",
    )),
    Kind("sitting on the heels", lambda b: (b.up > 0.9) & b.arm_low.all(1) & (b.pelvis[:, 0, 1] < 0.35) & (
        b.knee_on_floor & (b.thigh[..., 2] > 0.75) & (np.abs(b.thigh[..., 1]) < 0.5) & (b.knee_angle < 60)
    ).all(1), (
        "a guest at a Japanese tea ceremony",
        "a judo student listening to the master between two fights",
        "a calligrapher at a low table, thinking about the next stroke",
    )),
    Kind("both hands high", lambda b: b.stands & (b.arm_high & (b.elbow_angle > 120)).all(1), (
        "a fan whose team has just scored",
        "a bank clerk into whose office a robber has burst with a gun",
        "a marathon winner crossing the finish line",
        "a castaway who tries to be seen by a plane",
        "a gymnast greeting the judges after a perfect landing",
    )),
    Kind("one hand high", lambda b: b.stands & one(b.arm_high & (b.elbow_angle > 130), b.arm_hangs), (
        "a businesswoman hailing a taxi",
        "somebody at the arrivals gate who wants to be seen by a friend",
        "a member of the audience who has a question for the speaker",
        "somebody who wants a jar from the top shelf of the kitchen",
        "a voter in a show of hands",
    )),
    Kind("arms out to the sides", lambda b: b.stands & (
        b.arm_straight & (b.arm[..., 0] > 0.93) & (np.abs(b.arm[..., 1]) < 0.25)
    ).all(1), (
        "a scarecrow in a field of wheat",
        "a child playing aeroplane in the garden",
        "a customer whom a tailor is measuring",
        "a traveller being searched by airport security",
        "an actor in a motion capture studio while the system is calibrated",
    )),
    Kind("one arm out to the side", lambda b: b.stands & one(
        b.arm_straight & (b.arm[..., 0] > 0.93) & (np.abs(b.arm[..., 1]) < 0.3), b.arm_hangs
    ), (
        "a hitchhiker at the edge of the road",
        "a doorman showing guests the way to the side room",
        "a falconer waiting for the bird to land",
    )),
    Kind("both arms to the front", lambda b: b.stands & (
        b.arm_straight & (b.arm[..., 2] > 0.93) & (np.abs(b.arm[..., 1]) < 0.25)
    ).all(1), (
        "a sleepwalker in an old film",
        "a child dressed up as a zombie at Halloween",
        "somebody feeling the way through a dark cellar",
    )),
    Kind("one arm to the front", lambda b: b.stands & one(
        b.arm_straight & (b.arm[..., 2] > 0.9) & (np.abs(b.arm[..., 1]) < 0.35), b.arm_hangs
    ), (
        "a witness picking out the thief in a row of suspects",
        "a local showing a tourist where the station is",
        "somebody about to press the button of a lift",
        "a sports shooter aiming a pistol",
    )),
    Kind("hands on the hips", lambda b: b.stands & (
        (b.wrist[..., 1] > b.pelvis[..., 1] - 0.06) & (b.wrist[..., 1] < b.pelvis[..., 1] + 0.22)
        & (b.wrist[..., 0] > 0.1) & (b.wrist[..., 0] < 0.3) & (np.abs(b.wrist[..., 2] - b.pelvis[..., 2]) < 0.16)
        & (b.elbow[..., 0] > b.wrist[..., 0] + 0.06) & (b.elbow_angle < 130)
    ).all(1), (
        "a mother waiting for an explanation of the broken vase",
        "a superhero surveying the city from a roof",
        "a foreman looking over the unfinished building site",
        "a fitness trainer who tells the class to catch its breath",
    )),
    Kind("hands on the head", lambda b: b.stands & (
        (np.linalg.norm(b.wrist - (b.head * [0, 1, 1] + [0, 0.1, 0]), axis=-1) < 0.24)
        & (b.wrist[..., 1] > b.head[..., 1] + 0.02) & (b.elbow_angle < 110) & (b.elbow[..., 1] > b.shoulder[..., 1])
    ).all(1), (
        "a striker who has just missed a penalty",
        "an arrested burglar whom the police are about to search",
        "a runner catching breath behind the finish line",
        "somebody who sees the parked car roll into the lake",
    )),
    Kind("a hand at the ear", lambda b: b.stands & one(
        (np.linalg.norm(b.wrist - (b.head * [0, 1, 1] + [0.08, 0.03, 0.02]), axis=-1) < 0.18)
        & (b.elbow_angle < 75) & (b.elbow[..., 1] < b.shoulder[..., 1] + 0.05) & (b.wrist[..., 0] > 0.04),
        b.arm_hangs,
    ), (
        "somebody taking a phone call in the corridor",
        "a bodyguard listening to the earpiece",
        "a grandfather who did not catch what was said",
    )),
    Kind("arms crossed", lambda b: b.stands & (
        (b.wrist[..., 0] < -0.03) & (b.wrist[..., 1] < b.neck[..., 1] - 0.1)
        & (b.wrist[..., 1] > b.pelvis[..., 1] + 0.15) & (b.wrist[..., 2] > b.chest[..., 2] + 0.08)
        & (b.elbow_angle < 110)
    ).all(1), (
        "a bouncer at the door of a nightclub",
        "a teacher waiting for the class to be quiet",
        "a buyer who does not believe a word of the salesman",
    )),
    Kind("hands together before the chest", lambda b: b.is_upright & (b.wrist_gap < 0.13) & (
        (b.wrist[..., 2] > b.chest[..., 2] + 0.1) & (b.wrist[..., 1] > b.chest[..., 1] - 0.12)
        & (b.wrist[..., 1] < b.neck[..., 1] + 0.08) & (b.elbow_angle < 100) & (b.wrist[..., 0] > -0.03)
        & (b.wrist[..., 1] > b.elbow[..., 1] + 0.06)
    ).all(1), (
        "a worshipper deep in prayer",
        "a host in India welcoming the guests",
        "somebody pleading with a policeman not to write a ticket",
    )),
    Kind("hands behind the back", lambda b: b.stands & (b.wrist_gap < 0.26) & (
        (b.wrist[..., 2] < b.pelvis[..., 2] - 0.1) & (b.wrist[..., 1] < b.pelvis[..., 1] + 0.25)
        & (b.wrist[..., 1] > b.pelvis[..., 1] - 0.15)
    ).all(1), (
        "a suspect in handcuffs",
        "a butler waiting for orders",
        "a museum guard watching over the old masters",
        "a boy hiding a present from his mother",
    )),
    Kind("standing at ease", lambda b: b.stands & (b.up > 0.98) & (b.wrist_gap > 0.35) & (
        b.arm_hangs & (b.wrist[..., 0] - b.shoulder[..., 0] < 0.17) & (b.wrist[..., 2] - b.hip[..., 2] > -0.1)
        & (np.abs(b.neck[..., 2] - b.ankle[..., 2]) < 0.2) & (b.ankle[..., 1] < 0.1)
    ).all(1) & (
        np.linalg.norm((b.ankle[:, 0] - b.ankle[:, 1] * [-1, 1, 1]) * [1, 0, 1], axis=-1) < 0.45
    ), (
        "a commuter waiting for the bus",
        "the last customer in the queue at the bakery",
        "a passenger in a lift on the way to the tenth floor",
        "somebody listening to the national anthem before the match",
    )),
    Kind("standing on one leg", lambda b: b.is_upright & b.arm_low.all(1) & one(
        b.leg_supports & (b.thigh[..., 1] < -0.97) & (b.knee_angle > 160),
        (b.ankle[..., 1] > 0.33) & (b.knee_angle < 130) & (b.thigh[..., 2] > -0.1),
    ), (
        "a driver showing the police that she is sober",
        "a child imitating a flamingo at the zoo",
        "a patient whose balance the doctor is testing",
    )),
    Kind("climbing a step", lambda b: b.is_upright & b.arm_low.all(1) & one(
        b.leg_supports,
        (b.ankle[..., 1] > 0.14) & (b.ankle[..., 1] < 0.32) & (b.ankle[..., 2] > 0.2) & (b.shin[..., 1] < -0.9)
        & (b.thigh[..., 2] > 0.5),
    ), (
        "a tenant on the way up because the lift is out of order",
        "a passenger boarding a train",
        "a visitor at the foot of a lighthouse's stairs",
    )),
    Kind("sitting on a seat", lambda b: b.is_upright & (b.pelvis[:, 0, 1] > 0.35) & (b.pelvis[:, 0, 1] < 0.62) & (
        (np.abs(b.thigh[..., 1]) < 0.35) & (b.thigh[..., 2] > 0.7) & (b.shin[..., 1] < -0.9) & (b.ankle[..., 1] < 0.15)
        & (b.wrist[..., 1] < b.chest[..., 1])
    ).all(1), (
        "a patient in the doctor's waiting room",
        "a passenger on the bus to work",
        "a listener at a concert of classical music",
        "a student in a lecture hall",
    )),
    Kind("sitting cross-legged", lambda b: (b.up > 0.9) & b.arm_low.all(1) & (b.pelvis[:, 0, 1] < 0.15) & (
        (b.knee[..., 0] > 0.22) & (b.knee[..., 1] < 0.3) & (b.knee_angle < 90) & (b.ankle[..., 0] < 0.2)
        & (b.ankle[..., 2] > 0.05) & (b.ankle[..., 1] < 0.2)
    ).all(1), (
        "a monk in meditation",
        "a child in a story circle at kindergarten",
        "a camper telling tales by the fire",
    )),
    Kind("sitting on the ground with the legs out", lambda b: (b.up > 0.8) & (b.pelvis[:, 0, 1] < 0.2) & (
        b.arm_low & (np.abs(b.thigh[..., 1]) < 0.3) & (np.abs(b.shin[..., 1]) < 0.3) & (b.knee_angle > 150)
        & (b.thigh[..., 2] > 0.75)
    ).all(1), (
        "a toddler playing in the sandpit",
        "a sunbather who has sat up on the towel to look at the sea",
        "a hiker who cannot walk any further and rests on the path",
    )),
    Kind("squatting deeply", lambda b: (b.up > 0.5) & (b.pelvis[:, 0, 1] > 0.12) & (b.pelvis[:, 0, 1] < 0.5) & (
        b.arm_low & (b.ankle[..., 1] < 0.15) & (b.knee_angle < 80) & (b.knee[..., 1] > 0.25) & (b.shin[..., 1] < -0.5)
        & (np.abs(b.pelvis[..., 2] - b.ankle[..., 2]) < 0.3)
    ).all(1), (
        "a weightlifter at the lowest point of the exercise",
        "a hiker answering the call of nature behind a bush",
        "a catcher behind the batter in a baseball game",
        "a gardener weeding between the carrots",
    )),
    Kind("lunging", lambda b: (b.up > 0.8) & b.arm_below_head.all(1) & one(
        (b.thigh[..., 2] > 0.7) & (b.thigh[..., 1] > -0.65) & (b.shin[..., 1] < -0.8) & (b.ankle[..., 1] < 0.12),
        (b.knee_angle > 145) & (b.thigh[..., 2] < -0.25) & (b.shin[..., 2] < -0.5) & (b.ankle[..., 1] < 0.25)
        & (b.knee[..., 1] > 0.13),
    ), (
        "a fencer striking at the opponent",
        "a jogger warming up before a run",
        "a table tennis player reaching for a short ball",
    )),
    Kind("walking", lambda b: b.is_upright & (b.pelvis[:, 0, 1] > 0.74) & (
        (b.thigh[..., 1] < -0.75) & (b.knee_angle > 120) & (b.ankle[..., 1] < 0.27)
        & (b.wrist[..., 1] < b.pelvis[..., 1] + 0.2) & (b.wrist[..., 0] > 0.1)
    ).all(1) & one(b.ankle[..., 2] > 0.15, b.ankle[..., 2] < -0.15), (
        "a pedestrian crossing the street at the green light",
        "a commuter on the way to the station",
        "somebody taking the dog to the park",
    )),
    Kind("running", lambda b: (b.up > 0.85) & (b.elbow_angle < 125).all(1) & b.arm_low.all(1) & one(
        (b.thigh[..., 2] > 0.5) & (b.knee_angle < 150),
        (b.thigh[..., 2] < 0.2) & (b.shin[..., 2] < -0.5) & (b.ankle[..., 1] > 0.3),
    ) & (np.abs(b.wrist[:, 0, 2] - b.wrist[:, 1, 2]) > 0.15), (
        "somebody who sees the last bus pull away",
        "a pickpocket with the police at his heels",
        "a sprinter in the middle of the race",
    )),
    Kind("kicking to the front", lambda b: (b.up > 0.7) & b.arm_below_head.all(1) & one(
        b.leg_supports, (b.thigh[..., 1] > -0.35) & (b.thigh[..., 2] > 0.7) & (b.knee_angle > 145)
    ), (
        "a karate fighter striking at the opponent's head",
        "a dancer of the can-can",
        "a punter sending the ball down the field",
    )),
    Kind("a leg stretched to the back", lambda b: one(
        b.leg_supports, (b.thigh[..., 2] < -0.75) & (b.knee_angle > 140) & (b.shin[..., 1] > -0.5)
    ), (
        "a figure skater gliding over the ice on one blade",
        "a ballerina in an arabesque",
        "a swan on the stage of the ballet",
    )),
    Kind("bowing", lambda b: b.legs_stand & (b.up > 0.3) & (b.up < 0.85) & (b.chest_up < -0.3) & (
        (b.wrist[..., 2] < b.chest[..., 2] - 0.1) & (b.elbow_angle > 140)
    ).all(1), (
        "an actor thanking the audience for the applause",
        "a Japanese manager greeting an important guest",
        "a courtier before the king",
    )),
    Kind("hands on the knees", lambda b: (b.up > 0.2) & (b.up < 0.9) & (b.chest_up < -0.3) & (
        (np.linalg.norm(b.wrist - b.knee, axis=-1) < 0.2) & (b.wrist[..., 1] > b.knee[..., 1] - 0.03)
        & (b.knee_angle > 120) & (b.ankle[..., 1] < 0.15) & (b.shin[..., 1] < -0.8)
    ).all(1), (
        "a runner out of breath after the race",
        "a basketball player worn out in the last minute of the match",
        "somebody who is about to be sick after the roller coaster",
    )),
    Kind("bent down to the feet", lambda b: (b.up < 0.1) & (b.chest_up < 0) & (
        (b.thigh[..., 1] < -0.75) & (b.knee_angle > 130) & (b.wrist[..., 1] < 0.32) & (b.ankle[..., 1] < 0.15)
        & (b.wrist[..., 2] - b.ankle[..., 2] < 0.45)
    ).all(1), (
        "somebody who has stopped to tie a loose shoelace",
        "a gymnastics student trying how far the hamstrings stretch",
        "somebody picking up coins that fell out of the purse",
    )),
    Kind("on all fours", lambda b: (np.abs(b.up) < 0.45) & (b.chest_up < -0.7) & (
        b.knee_on_floor & (b.thigh[..., 1] < -0.6) & (b.wrist[..., 1] < 0.15) & (b.elbow_angle > 120)
    ).all(1), (
        "a baby exploring the living room",
        "a father playing horse for his daughter",
        "somebody looking for a contact lens on the carpet",
        "a cleaner scrubbing the floor with a brush",
    )),
    Kind("push-up", lambda b: (b.up > -0.1) & (b.up < 0.55) & (b.chest_up < -0.7) & (
        (b.wrist[..., 1] < 0.12) & (b.ankle[..., 1] < 0.3) & (b.knee_angle > 150) & (b.knee[..., 1] > 0.12)
        & (np.abs(b.thigh[..., 1]) < 0.6) & (b.thigh[..., 2] < -0.7) & (b.pelvis[..., 1] > 0.2)
        & (b.shoulder[..., 1] > 0.2)
    ).all(1), (
        "a recruit being punished by the drill sergeant",
        "an athlete training the chest and the triceps",
        "a gym class counting out loud to twenty",
    )),
    Kind("lying on the back", lambda b: (np.abs(b.up) < 0.25) & (b.chest_up > 0.87) & (b.pelvis[:, 0, 1] < 0.25) & (
        (b.knee[..., 1] < 0.3) & (b.ankle[..., 1] < 0.25) & (b.wrist[..., 1] < 0.35) & (b.head[..., 1] < 0.35)
    ).all(1), (
        "a sunbather on the beach",
        "somebody looking for shooting stars in a meadow",
        "a patient in an MRI scanner",
        "a boxer who has been counted out",
    )),
    Kind("lying face down", lambda b: (np.abs(b.up) < 0.25) & (b.chest_up < -0.87) & (b.pelvis[:, 0, 1] < 0.25) & (
        (b.knee[..., 1] < 0.2) & (b.ankle[..., 1] < 0.25) & (b.wrist[..., 1] < 0.35) & (b.head[..., 1] < 0.35)
    ).all(1), (
        "a client on the massage table",
        "a hostage whom the robbers have told to get down",
        "somebody who fell into bed dead tired",
    )),
    Kind("lying on a side", lambda b: (np.abs(b.up) < 0.3) & (np.abs(b.chest_up) < 0.35) & (
        (b.pelvis[..., 1] < 0.3) & (b.knee[..., 1] < 0.5) & (b.ankle[..., 1] < 0.5) & (b.head[..., 1] < 0.45)
    ).all(1), (
        "somebody asleep in bed, turned to the wall",
        "an unconscious cyclist whom a first-aider has made safe until the ambulance comes",
        "a Roman at a banquet",
    )),
    Kind("upside down", lambda b: (b.up < -0.85) & (
        (b.thigh[..., 1] > 0.8) & (b.knee_angle > 130) & (b.wrist[..., 1] < 0.3)
    ).all(1), (
        "an acrobat walking through the circus ring on the hands",
        "a gymnast in the middle of the floor exercise",
        "a child who wants to see the world the other way round",
    )),
)
# fmt: on


def find_kinds(poses: torch.Tensor) -> list[list[str]]:
    """
    The names of the kinds in [`SITUATIONS`] that each pose is of.

    Args:
        poses (`torch.Tensor` of shape `(N, 24, 3)`): axis-angle, camera frame, upright people upright.
    """
    measures = Measures(poses)
    with np.errstate(invalid="ignore"):
        matches = [kind.condition(measures) for kind in SITUATIONS]
    return [[kind.name for kind, of in zip(SITUATIONS, matches, strict=True) if of[row]] for row in range(len(poses))]


@cache
def _body() -> BodyModel:
    return BodyModel.load("default")  # the thresholds are in its metres


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def _angle(start: np.ndarray, middle: np.ndarray, end: np.ndarray) -> np.ndarray:
    """At the middle, in degrees."""
    cosine = (_unit(start - middle) * _unit(end - middle)).sum(-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))
