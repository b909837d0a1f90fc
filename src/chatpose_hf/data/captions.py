"""Captions from geometry: the codes of a pose in, true English out.

The codes that tell most are chosen, merged and grouped, and become sentences. How is drawn at random; what is not.
"""

import copy
import fnmatch
import itertools
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..body import JOINT_NAMES, BodyModel
from ..rotations import rotvec_to_rotmat
from .pose_codes import (
    ALIGNED_RELATIONS,
    DIRECTIONS,
    INVERSE,
    RARE,
    SIDES,
    Geometry,
    PoseCode,
    all_codes,
    both_sides,
    is_pair,
    plural,
    pose_codes,
    to_caption_frame,
    without_side,
)


# What is left unsaid because something else says it, or nearly: given codes -> dropped ones, as part|relation|other part.
_REDUNDANT = """
S arm|stretched|* -> S elbow|straight|, S elbow|slightly bent|
S arm|stretched|overhead -> S hand|above|*, S upper arm|*, S forearm|*
S arm|stretched|up and * -> S hand|above|S shoulder
S arm|stretched|to the side -> S upper arm|*, S forearm|*, S hand|level with|S shoulder, S hand|directly*
S arm|stretched|forward -> S upper arm|*, S forearm|*, S hand|level with|S shoulder, S hand|in front of|torso, S hand|directly*
S arm|stretched|down* -> S hand|below|S hip, S upper arm|*, S forearm|*, S hand|close to|S hip, S hand|level with|S knee
S arm|stretched|overhead & O arm|stretched|down -> left hand|*|right hand, left elbow|*|right elbow
S hand|above|head -> S hand|above|S shoulder, S hand|level with|S shoulder
S hand|above|head & O hand|below|O hip -> left hand|higher than|*, left hand|lower than|*
S hand|close to|head -> S hand|level with|*, S hand|directly*
S hand|behind|torso -> S hand|close to|S hip
S hand|across| -> S hand|in front of|torso
S hand|close to|S shoulder -> S elbow|*
S hand|close to|O elbow -> S hand|directly*|O elbow, S hand|directly*|O upper arm, S hand|directly*|O forearm
S hand|below|S knee -> S hand|below|S hip
S leg|stretched|* -> S knee|straight|
S thigh|vertical| & S shin|vertical| -> S knee|straight|
S upper arm|vertical| & S forearm|horizontal| -> S elbow|right angle|
S thigh|horizontal| -> S knee|level with|S hip
S foot|above|S hip -> S foot|above|O knee, S foot|off ground|, left foot|far from|right foot, left foot|*er than|right foot
S foot|level with|S hip -> S foot|above|O knee, S foot|off ground|, left foot|far from|right foot, left foot|*er than|right foot
S foot|off ground| -> left foot|*er than|right foot
hands|crossed| -> left hand|right of|right hand, *hand|across|
feet|crossed| -> left foot|right of|right foot, left foot|close to|right foot
feet|spread| -> left foot|far from|right foot
left hand|close to|right hand -> left elbow|close to|right elbow
left foot|in front of|right foot -> left knee|in front of|right knee
left foot|behind|right foot -> left knee|behind|right knee
left hand|*er than|right hand -> left elbow|*er than|right elbow
left hand|in front of|right hand -> left elbow|in front of|right elbow
left hand|behind|right hand -> left elbow|behind|right elbow
body|standing| -> *knee|straight|, *knee|slightly bent|, *thigh|vertical|, *shin|vertical|, torso|vertical|
body|standing on|S -> S knee|straight|, S thigh|vertical|, S shin|vertical|, O foot|off ground|, torso|vertical|, left foot|*er than|*
body|kneeling| -> *thigh|*, *shin|*, *foot|directly*
body|kneeling on|S -> S shin|*, S thigh|*, S foot|*, left knee|*er than|*, left foot|far from|*
body|sitting* -> *thigh|*, *shin|*, *knee|level with|*
body|on all fours| -> *thigh|*, *shin|*, torso|horizontal|, *hand|on ground|, body|bent far forward|, *arm|vertical|
body|lying on|* -> *|horizontal|*, *hand|on ground|, *foot|directly*
body|upside down| -> torso|vertical|
torso|horizontal| -> body|bent far forward|
"""
# Two neighbours that do the same are told as the limb.
_WHOLE_LIMBS = {
    ("hand", "elbow"): "arm",
    ("foot", "knee"): "leg",
    ("forearm", "upper arm"): "arm",
    ("shin", "thigh"): "leg",
}
# Wordings by relation, by relation|part, or by relation|other part. {o} is the other part, {h} the same without its side, {d}
# a determiner, {s} an s for both sides.
_WORDINGS: dict[str, tuple[str, ...]] = {
    "fully bent": ("fully bent", "folded up tightly"),
    "sharply bent": ("sharply bent", "bent well past a right angle"),
    "right angle": ("bent at a right angle", "bent at about ninety degrees", "bent to roughly a right angle"),
    "half bent": ("moderately bent", "half bent"),
    "slightly bent": ("slightly bent", "a little bent"),
    "straight": ("straight", "straightened"),
    "close to": ("close to {o}", "near {o}"),
    "far from": ("far from {o}",),
    "close together": ("close together", "near each other"),
    "far apart": ("far apart", "wide apart"),
    "shoulder width apart": ("about shoulder width apart",),
    "spread": ("spread wide to the sides", "planted wide apart sideways"),
    "higher than": ("higher than {o}", "above the level of {o}"),
    "lower than": ("lower than {o}", "below the level of {o}"),
    "above": ("higher than {o}", "above {h} height"),
    "above|shoulder": ("above {o}", "above {h} height"),
    "above|head": ("above {d} head", "raised above {d} head", "raised above head height"),
    "below": ("lower than {o}", "below {h} height"),
    "level with": ("level with {o}", "at {h} height"),
    "in front of": ("in front of {o}", "ahead of {o}", "further forward than {o}"),
    "in front of|hand": ("ahead of {o}", "further forward than {o}"),
    "in front of|torso": ("in front of {d} body", "in front of {d} torso"),
    "behind": ("behind {o}", "further back than {o}"),
    "behind|hand": ("further back than {o}",),
    "behind|torso": ("behind {d} back", "behind {d} body"),
    "right of": ("to the right of {o}",),
    "left of": ("to the left of {o}",),
    "crossed": ("crossed",),
    "across": ("across {d} body", "reaching across the front of {d} body"),
    "horizontal": ("horizontal", "parallel to the ground"),
    "vertical": ("vertical",),
    "vertical|torso": ("vertical", "straight up and down"),
    "on ground": ("at ground level", "down by the ground"),
    "off ground": ("lifted off the ground", "raised off the ground"),
    "leaning forward": ("leaning forward", "tilted forward"),
    "bent far forward": ("bent far forward", "bent over forward"),
    "leaning back": ("leaning back", "leaning backward"),
    "leaning far back": ("leaning far back",),
    "leaning slightly to": ("leaning slightly to the {o}", "leaning a little to the {o}"),
    "leaning far to": ("leaning far to the {o}", "leaning well over to the {o}"),
    "twisted to": ("twisted to the {o}", "rotated to the {o}"),
    "twisted far to": ("twisted far to the {o}",),
    "turned to": ("turned to the {o}",),
    "turned slightly to": ("turned slightly to the {o}", "turned a little to the {o}"),
    "tilted to": ("tilted to the {o}", "tilted toward the {o} shoulder"),
    "tilted forward": ("tilted forward", "bowed forward"),
    "tilted back": ("tilted back", "tipped back"),
    "stretched|overhead": ("raised overhead", "stretched up overhead"),
    "stretched|to the side": ("stretched out to the side{s}", "held straight out to the side{s}"),
    "stretched|forward": ("stretched out forward", "held straight out in front"),
    "stretched|backward": ("stretched out backward", "stretched out behind"),
    "stretched|down": ("hanging down", "down at the side{s}"),
    "stretched|along the body": ("alongside the body",),
    "stretched|up and to the side": ("stretched diagonally up and out to the side{s}",),
    "stretched|down and to the side": ("stretched diagonally down and out to the side{s}",),
    "stretched|up and forward": ("stretched diagonally up and forward",),
    "stretched|down and forward": ("stretched diagonally down and forward",),
    "stretched|down and backward": ("stretched diagonally down and backward",),
    "stretched|forward and to the side": ("stretched diagonally forward and out to the side{s}",),
    "stretched|backward and to the side": ("stretched diagonally backward and out to the side{s}",),
    "standing": ("standing", "standing upright"),
    "standing on": ("standing on {d} {o} leg", "balancing on {d} {o} leg"),
    "kneeling": ("kneeling on both knees", "kneeling"),
    "kneeling on": ("kneeling on {d} {o} knee", "down on {d} {o} knee"),
    "squatting": ("squatting", "in a squat"),
    "sitting": ("in a sitting position", "in a seated position"),
    "sitting on the ground": ("sitting on the ground", "seated on the ground"),
    "on all fours": ("on all fours", "on hands and knees"),
    "lying on": ("lying on {d} {o}",),
    "lying on|back": ("lying on {d} back", "lying face up"),
    "lying on|front": ("lying on {d} stomach", "lying face down"),
    "upside down": ("upside down",),
} | {relation: (f"{relation} {{o}}",) for relations in ALIGNED_RELATIONS.values() for relation in relations}
_REGIONS = {
    "torso": ("torso",),
    "head": ("head",),
    "arms": ("hand", "hands", "elbow", "elbows", "arm", "arms", "upper arm", "upper arms", "forearm", "forearms"),
    "legs": ("knee", "knees", "foot", "feet", "leg", "legs", "thigh", "thighs", "shin", "shins"),
}
_REGION_OF = {part: region for region, parts in _REGIONS.items() for part in parts}


class _Voice(NamedTuple):
    """How a caption speaks of the person."""

    determiner: str
    person: str
    pronoun: str
    weight: int

    @property
    def has(self) -> str:
        return "have" if self.pronoun == "they" else "has"

    @property
    def does(self) -> str:
        return "are" if self.pronoun == "they" else "is"


_VOICES = (
    _Voice("the", "the person", "the person", 5),
    _Voice("their", "the person", "they", 3),
    _Voice("his", "the person", "he", 1),
    _Voice("her", "the person", "she", 1),
)
# Facts told at most
STYLES = {"terse": 3, "plain": 5, "full": 9, "chatty": 6}
_TELLING = 4
_SKIP = 0.15
_MERGE = 0.95
MIRRORED_JOINTS = [
    JOINT_NAMES.index({"l": "r", "r": "l"}[name[0]] + name[1:] if name[1] == "_" else name) for name in JOINT_NAMES
]


class _Clause(NamedTuple):
    """Several parts of which one thing is said, or one part of which several things are said."""

    parts: tuple[str, ...]
    predicates: tuple[str, ...]

    def subject(self, determiner: str) -> str:
        return _join([_noun(part, determiner) for part in self.parts])

    def says(self) -> str:
        return _join(list(self.predicates))

    def states(self, determiner: str) -> str:
        is_plural = len(self.parts) > 1 or _is_plural(self.parts[0])
        return f"{self.subject(determiner)} {'are' if is_plural else 'is'} {self.says()}"

    def adds(self, determiner: str) -> str:
        return f"{self.subject(determiner)} {self.says()}"


def _is_plural(part: str) -> bool:
    return part.endswith(("s", "feet"))


def _join(items: list[str]) -> str:
    return ", ".join(items[:-1]) + (" and " if len(items) > 1 else "") + items[-1]


def _noun(part: str, determiner: str) -> str:
    return part if part.startswith(("both ", "each ")) or not determiner else f"{determiner} {part}"


class Captioner:
    """
    Writes captions of poses. What they say is true of the pose; how it is said is drawn at random from the key of each pose,
    so a caption depends on its pose and key alone.

    Args:
        body ([`BodyModel`], *optional*): whose joints are measured; the default body of 24 joints if left out.

    Example:

    ```python
    captions = Captioner().captions(poses, keys=ids, styles=["terse", "full"])  # captions[0][1] is a "full" one
    ```
    """

    def __init__(self, body: BodyModel | None = None):
        # In float64 a pose has the same codes whichever way it faces.
        self.body = copy.deepcopy(body or BodyModel.load("default")).double()

    def captions(
        self, poses: Tensor, keys: Sequence[str | int], styles: Sequence[str] = tuple(STYLES)
    ) -> list[list[str]]:
        """
        Args:
            poses (`torch.Tensor` of shape `(N, 24, 3)`): axis-angle in radians, camera frame, any heading.
            keys (`Sequence[str | int]`): of each pose, its seed: an id, with whatever else makes captions differ.
            styles (`Sequence[str]`, *optional*, defaults to all four):
                `"terse"`, a list without verbs; `"plain"`, short sentences; `"full"`, longer ones with more facts; or
                `"chatty"`. A style named twice gives two captions of it.

        Returns:
            `list[list[str]]`: of each pose, a caption of each style.
        """
        poses = torch.as_tensor(poses)
        if poses.ndim != 3 or poses.shape[1:] != (24, 3):
            raise ValueError(
                f"expected `poses` of shape (N, 24, 3), axis-angle, got {tuple(poses.shape)}; give one pose as pose[None]"
            )
        if not torch.isfinite(poses).all():
            broken = int((~torch.isfinite(poses)).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"expected finite `poses`, got NaN or infinity in pose {broken}; leave it out")
        if len(keys) != len(poses):
            raise ValueError(f"expected a key for each of the {len(poses)} poses, got {len(keys)}")
        for style in styles:
            if style not in STYLES:
                raise ValueError(f"expected styles among {', '.join(STYLES)}, got {style!r}")
        if not len(poses):
            return []
        poses = to_caption_frame(poses)
        is_mirrored = _faces_mirror(poses)
        poses[is_mirrored] = mirror(poses[is_mirrored])
        geometry = Geometry(self.body.joints(poses)[:, :24].numpy(), poses.numpy())
        captions = []
        for key, codes, mirrored in zip(keys, pose_codes(geometry), is_mirrored.tolist(), strict=True):
            texts = [
                _write(codes, style, random.Random(f"{key}/{number}/{style}")) for number, style in enumerate(styles)
            ]
            captions.append([_swap_sides(text) for text in texts] if mirrored else texts)
        return captions


def mirror(poses: Tensor) -> Tensor:
    """Poses `(N, 24, 3)`, axis-angle, as in a looking glass."""
    return poses[:, MIRRORED_JOINTS] * poses.new_tensor([1.0, -1.0, -1.0])


def _faces_mirror(poses: Tensor) -> Tensor:
    """
    Of a pose and its mirror image, which are told with the same words, the one that is told; the other's words are those with
    left and right swapped. A sum that changes sign in the mirror decides.
    """
    rotmats = rotvec_to_rotmat(poses)
    difference = (rotmats - rotvec_to_rotmat(mirror(poses))).flatten(1)
    weights = torch.linspace(1, 2, difference.shape[1], dtype=difference.dtype).sin()
    return difference @ weights < 0


def _swap_sides(text: str) -> str:
    swapped = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return re.sub(r"\b(left|right)\b(?! angle)", lambda match: swapped[match[0]], text, flags=re.IGNORECASE)


def _write(codes: list[PoseCode], style: str, rng: random.Random) -> str:
    codes = [code for code in codes if code.priority >= RARE or rng.random() >= _SKIP] or codes
    codes = _prune_transitive(_merge_sides(_merge_limbs(_prune_redundant(codes), rng), rng))
    ranked = sorted(codes, key=lambda code: code.priority + 2 * rng.random(), reverse=True)[: STYLES[style]]
    # What is next to nothing fills up a short caption, not a long one.
    ranked = [code for rank, code in enumerate(ranked) if rank < _TELLING or code.priority > 1]
    ordered = _walk([_invert(code) if rng.random() < 0.5 else code for code in ranked], rng)
    voice = rng.choices(_VOICES, [voice.weight for voice in _VOICES])[0]
    return {"terse": _write_terse, "plain": _write_plain, "full": _write_full, "chatty": _write_chatty}[style](
        ordered, voice, rng
    )


def _parse_rules(text: str) -> list[tuple[set[str], set[str]]]:
    """For either side, and with the wildcards put in."""
    told = ["|".join(code[:3]) for code in all_codes()]
    rules = []
    for line in text.strip().splitlines():
        for (sided,) in both_sides(line):
            given, dropped = ([name.strip() for name in re.split("[&,]", half)] for half in sided.split("->"))
            without = {name for pattern in dropped for name in fnmatch.filter(told, pattern)}
            expanded = [fnmatch.filter(told, pattern) for pattern in given]
            rules += [(set(names), without) for names in itertools.product(*expanded)]
    return rules


_RULES = _parse_rules(_REDUNDANT)


def _prune_redundant(codes: list[PoseCode]) -> list[PoseCode]:
    names = {"|".join(code[:3]) for code in codes}
    dropped = {name for given, without in _RULES if given <= names for name in without}
    return [code for code in codes if "|".join(code[:3]) not in dropped]


def _prune_transitive(codes: list[PoseCode]) -> list[PoseCode]:
    """Without a over c where a is over b and b over c; likewise in front of."""
    ups = {"higher than": 1, "above": 1, "lower than": -1, "below": -1, "in front of": 1, "behind": -1}
    orders = {
        code: (code.kind, *(code.part1, code.part2)[:: ups[code.relation]])
        for code in codes
        if code.kind in ("y", "z") and code.relation in ups
    }
    known = set(orders.values())
    implied = {(kind, a, c) for kind, a, b in known for kind_too, b_too, c in known if (kind, b) == (kind_too, b_too)}
    return [code for code in codes if orders.get(code) not in implied]


def _merge_limbs(codes: list[PoseCode], rng: random.Random) -> list[PoseCode]:
    """Left hand higher than the right and left elbow higher than the right: left arm higher than the right."""
    by_name = {code[:3]: code for code in codes}
    for (end, middle), limb in _WHOLE_LIMBS.items():
        for code in codes:
            side = code.part1.split(" ")[0]
            if code.part1 != f"{side} {end}":
                continue
            other = code.part2.replace(end, middle) if is_pair(code.part1, code.part2) else code.part2
            twin = (f"{side} {middle}", code.relation, other)
            if twin in by_name and rng.random() < _MERGE:
                del by_name[code[:3]]
                priority = max(code.priority, by_name.pop(twin).priority)
                merged = PoseCode(f"{side} {limb}", code.relation, code.part2.replace(end, limb), code.kind, priority)
                by_name[merged[:3]] = merged
    return list(by_name.values())


def _merge_sides(codes: list[PoseCode], rng: random.Random) -> list[PoseCode]:
    """Left knee straight and right knee straight: both knees straight. A part near the other side's: each near its opposite."""
    by_name = {code[:3]: code for code in codes}
    for code in codes:
        if not code.part1.startswith("left ") or code[:3] not in by_name or is_pair(code.part1, code.part2):
            continue
        bare, other = without_side(code.part1), without_side(code.part2)
        for part2, part1, merged_part2 in (
            (code.part2, f"both {plural(bare)}", code.part2),
            (f"right {other}", f"both {plural(bare)}", plural(other)),
            (f"left {other}", f"each {bare}", f"opposite {other}"),
        ):
            twin = (f"right {bare}", code.relation, part2)
            # Sides differ in the second and third case: to its own, and to the opposite.
            sides_fit = (
                part2 == code.part2 or code.part2 == f"{'left' if part1.startswith('both') else 'right'} {other}"
            )
            if twin in by_name and sides_fit and rng.random() < _MERGE:
                del by_name[code[:3]]
                priority = max(code.priority, by_name.pop(twin).priority)
                merged = PoseCode(part1, code.relation, merged_part2, code.kind, priority)
                by_name[merged[:3]] = merged
                break
    return list(by_name.values())


def _invert(code: PoseCode) -> PoseCode:
    """The same from the other part's side: right hand below left hand for left hand above right hand."""
    if not is_pair(code.part1, code.part2):
        return code
    relation = INVERSE.get(code.relation, code.relation)
    return code._replace(part1=code.part2, relation=relation, part2=code.part1)


def _walk(codes: list[PoseCode], rng: random.Random) -> list[PoseCode]:
    """From the whole body outwards: the torso, then limbs and head in any order, each with what belongs to it."""
    outer = ["head", "arms", "legs"]
    rng.shuffle(outer)
    regions = ["body", "torso", *outer]
    first, second = rng.sample(["left", "right"], 2)
    sides = ["both", "each", first, second]

    def place(code: PoseCode) -> tuple[int, int, str]:
        side = code.part1.split(" ")[0]
        bare = code.part1.removeprefix(f"{side} ") if side in sides else code.part1
        # Parts of one name stay together, so that a clause can take them all.
        return regions.index(_REGION_OF.get(bare, "body")), sides.index(side) if side in sides else 0, bare

    return sorted(codes, key=place)


def _predicate(code: PoseCode, voice: _Voice, rng: random.Random) -> str:
    bare = without_side(code.part1).removeprefix("both ").removeprefix("each ")
    other = code.part2.split(" ")[-1] if code.part2 not in DIRECTIONS else code.part2
    names = (f"{code.relation}|{other}", f"{code.relation}|{bare}", code.relation)
    wordings = next(_WORDINGS[name] for name in names if name in _WORDINGS)
    determiner = voice.determiner or "the"
    if code.part2 in SIDES:
        noun = code.part2
    elif code.part2.startswith("opposite "):
        noun = f"the {code.part2}"
    elif is_pair(code.part1, code.part2):
        side = code.part2.split(" ")[0]
        noun = rng.choice([f"{determiner} {code.part2}", f"the {side} one", f"the other {bare}"])
    else:
        noun = f"{determiner} {code.part2}"
    plural = "s" if _is_plural(code.part1) else ""
    height = without_side(code.part2).removeprefix("opposite ")
    height = {"shoulders": "shoulder", "hips": "hip", "knees": "knee"}.get(height, height)
    return rng.choice(wordings).format(o=noun, h=height, d=determiner, s=plural)


def _reword(code: PoseCode, rng: random.Random) -> PoseCode:
    """Another subject for the same fact, now and then."""
    if code.relation in ("close to", "far from") and is_pair(code.part1, code.part2) and rng.random() < 0.6:
        relation = {"close to": "close together", "far from": "far apart"}[code.relation]
        return code._replace(part1=plural(without_side(code.part1)), relation=relation, part2="")
    if code.relation == "straight" and rng.random() < 0.6:
        return code._replace(part1=code.part1.replace("knee", "leg").replace("elbow", "arm"))
    if code.part1.startswith("both ") and rng.random() < 0.5:
        return code._replace(part1=code.part1.removeprefix("both "))
    return code


def _make_clauses(codes: list[PoseCode], voice: _Voice, rng: random.Random, grouped: bool) -> list[_Clause]:
    """One clause a code; grouped, parts that do the same share a clause, and so do things that one part does."""
    codes = [_reword(code, rng) for code in codes]
    clauses: list[_Clause] = []
    while codes:
        code = codes.pop(0)
        predicate = _predicate(code, voice, rng)
        alike = [other for other in codes if other[1:4] == code[1:4] and not other.part2] if grouped else []
        of_part = [other for other in codes if other.part1 == code.part1][:2]
        if alike and not code.part2 and code.part1 not in ("body", "feet", "hands") and rng.random() < _MERGE:
            other = alike[0]
            codes.remove(other)
            both = (f"both {plural(without_side(code.part1))}",)
            parts = both if is_pair(code.part1, other.part1) else (code.part1, other.part1)
            clauses.append(_Clause(parts, (predicate,)))
        elif of_part and grouped and rng.random() < _MERGE:
            for other in of_part:
                codes.remove(other)
            clauses.append(_Clause((code.part1,), (predicate, *(_predicate(o, voice, rng) for o in of_part))))
        else:
            clauses.append(_Clause((code.part1,), (predicate,)))
    return clauses


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(clause: _Clause, voice: _Voice, person: str) -> str:
    if clause.parts == ("body",):
        return f"{person} {voice.does if person == voice.pronoun else 'is'} {clause.says()}"
    return clause.states(voice.determiner)


def _write_terse(codes: list[PoseCode], voice: _Voice, rng: random.Random) -> str:
    clauses = _make_clauses(codes, voice._replace(determiner=""), rng, grouped=False)
    phrases = [clause.says() if clause.parts == ("body",) else clause.adds("") for clause in clauses]
    return _capitalize(rng.choice([", ", "; "]).join(phrases)) + "."


def _write_plain(codes: list[PoseCode], voice: _Voice, rng: random.Random) -> str:
    clauses = _make_clauses(codes, voice, rng, grouped=False)
    people = [voice.person] + [voice.pronoun] * len(clauses)
    return " ".join(
        _capitalize(_sentence(clause, voice, person)) + "." for clause, person in zip(clauses, people, strict=False)
    )


# How further clauses hang on a sentence, and whether they keep their verb.
_LINKS: tuple[tuple[tuple[str, bool], ...], ...] = (
    (),
    ((" while ", True),),
    ((", and ", True),),
    (("; ", True),),
    ((" with ", False),),
    ((" with ", False), (" and ", False)),
    (("; ", True), (", and ", True)),
)


def _write_full(codes: list[PoseCode], voice: _Voice, rng: random.Random) -> str:
    clauses = _make_clauses(codes, voice, rng, grouped=True)
    sentences = []
    person = voice.person
    while clauses:
        text = _sentence(clauses.pop(0), voice, person)
        person = voice.pronoun
        for link, has_verb in rng.choice(_LINKS):
            if not clauses or clauses[0].parts == ("body",):
                break
            clause = clauses.pop(0)
            text += link + (clause.states if has_verb else clause.adds)(voice.determiner)
        sentences.append(_capitalize(text) + ".")
    return " ".join(sentences)


def _write_chatty(codes: list[PoseCode], voice: _Voice, rng: random.Random) -> str:
    clauses = _make_clauses(codes, voice, rng, grouped=True)
    sentences = []
    person = voice.person
    if clauses[0].parts == ("body",):
        opening = rng.choice(["Picture someone {}.", "Here is someone {}.", "This shows somebody {}."])
        sentences.append(opening.format(clauses.pop(0).says()))
        person = voice.pronoun
    elif rng.random() < 0.5:
        sentences.append(rng.choice(["Here is the pose.", "Picture this pose.", "This is how the body is held."]))
    while clauses:
        clause = clauses.pop(0)
        if clause.parts == ("body",) or rng.random() < 0.4:
            text = _sentence(clause, voice, person)
            has_verb = True
        else:
            text = f"{person} {voice.has if person == voice.pronoun else 'has'} {clause.adds(voice.determiner)}"
            has_verb = False
        if clauses and clauses[0].parts != ("body",) and rng.random() < 0.7:
            clause = clauses.pop(0)
            text += ", and " + clause.states(voice.determiner) if has_verb else " and " + clause.adds(voice.determiner)
        if len(sentences) > 1:
            text = rng.choice(["", "", "", "also, ", "in addition, "]) + text
        sentences.append(_capitalize(text) + ".")
        person = voice.pronoun
    return " ".join(sentences)
