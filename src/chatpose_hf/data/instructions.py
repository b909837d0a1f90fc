"""Short instructions about parts of the body ("Raise the left arm and bend the right knee."), and the poses that do them."""

import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from .instruction_states import Choice, Grammar, draw_poses, load_grammar
from .prompts import ANSWERS, TEXT_QUESTIONS, fill_template, make_messages
from .source import BODY_ONLY_MASK, DrawnSource


_CHAT_SHARE, _SINGLE_SHARE, _WRAPPED_SHARE, _FRAMED_SHARE = 0.12, 0.4, 0.3, 0.25
_STANDING_SHARE, _SAID_SHARE = 0.65, 0.3
_WEIGHTS = {"arm": 3, "leg": 5, "head": 5, "torso": 5}  # how often a part is spoken of, by the last word of its name
# Subject, possessor, and the form of "to be" that goes with it; the first of these may also stand before a participle.
_NOUNS = (
    *(("a person", "their"), ("a man", "his"), ("a woman", "her"), ("someone", "their"), ("the person", "their")),
    *(("somebody", "their"), ("a guy", "his"), ("a girl", "her"), ("the figure", "its"), ("a figure", "its")),
    *(("my friend", "her"), ("my sister", "her"), ("my father", "his"), ("the boy", "his"), ("the dancer", "her")),
    *(("the patient", "his"), ("the waitress", "her"), ("a child", "their"), ("this woman", "her")),
)
_SUBJECTS = (
    *((noun, possessor, "is") for noun, possessor in _NOUNS),
    *(("she", "her", "is"), ("he", "his", "is"), ("they", "their", "are"), ("I", "my", "am"), ("you", "your", "are")),
)
# Around an order, to whoever reads it, to a figure, or to the one who speaks; and whose limbs they are.
_YOURS = ("the", "the", "the", "your", "your", "")
_FRAMES = (
    (
        (
            *("please {}", "now {}", "I want you to {}", "try to {}", "show me how to {}", "could you {}?"),
            *("would you {}?", "could you please {}?", "I would like you to {}", "you should {}", "can you {}?"),
            *("go ahead and {}", "{}, please", "let me see you {}"),
        ),
        _YOURS,
    ),
    (
        (
            *("make the figure {}", "let the figure {}", "have the figure {}", "get the figure to {}"),
            *("I want it to {}", "can you make it {}?", "the figure should {}"),
        ),
        ("the", "its"),
    ),
    (
        (
            *("my coach told me to {}", "the doctor wants me to {}", "my teacher asked me to {}", "I was told to {}"),
            *("I have to {}", "how do I {}?", "what does it look like when I {}?", "they want me to {}"),
        ),
        ("the", "my", "my"),
    ),
)
# Around a person, an absolute phrase, and a whole clause.
_PERSON = (
    *("I want {}", "show me {}", "I need {}", "give me {}", "imagine {}", "there is {}", "draw {}", "let me see {}"),
    *("create {}", "can you show me {}?", "could you draw {}?", "picture {}", "the pose of {}"),
)
_WITH = (
    *("a pose with {}", "show me a pose with {}", "the pose has {}", "pose: {}", "I want {}", "I need {}"),
    *("I would like to see {}", "show {}", "could you show {}?", "somebody with {}", "position: {}", "have {}"),
)
_CLAUSE = (
    *("make sure {}", "a pose in which {}", "a pose where {}", "show me a pose where {}", "I want a pose where {}"),
    *("in this pose, {}", "the pose is like this: {}"),
)
_STYLES = (*("order",) * 9, *("does", "is doing", "asked", "stated", "terse") * 2, *("seen",) * 4, "kept")
_ADD = (
    *("now {do}", "then {do}", "also, {do}", "next, {do}", "in addition, {do}", "could you also {do}?"),
    "now {do} too",
    "and {do}",
    "good. Now also {do}",
    "also {do}",
    "keep that and {do}",
    "good. And {do}",
    "{do} as well",
)
_CHANGE = (
    *("now {do} instead", "{do} instead", "no, {do}", "change that: {do}", "actually, {do}", "instead, {do}"),
    *("rather {do}", "not like that: {do}", "could you {do} instead?"),
)
_UNDO = ("{do}", "now {do}", "okay, {do}", "good. Now {do}", "please {do}", "you can {do}", "could you {do}?")
_MIRROR = (
    "the other {limb} instead",
    "the {other} {limb} instead",
    "now the same with the {other} {limb} instead",
    "do it with the {other} {limb} instead of the {side} one",
    "switch to the {other} {limb}",
)
_POSTURE = (
    *("same pose but {ing}", "the same, but {ing}", "now {do} and keep the rest", "keep the rest, but {do}"),
    *("leave the rest as it is, but {do}", "the same thing again, but {ing}", "{do} without changing the rest"),
)


class Plan(NamedTuple):
    """A row before its angles: the choices of each pose, a posture first; its texts (of a chat, one for each pose)."""

    poses: list[list[Choice]]
    texts: list[str]
    rng: random.Random


class Instructions(DrawnSource):
    """
    Instructions as a user writes them ("Raise the left arm and bend the right knee."), with the pose that does what they
    say: a posture and up to three states of free parts, drawn from `GROUP.json`, arrays of states; see [`load_grammar`]. Parts
    that are not spoken of hang or stand as the posture has them. Every pose holds what its states' `checks` ask for.

    A row of task `"text_to_pose"` has captions of kind `"human"`, two or three wordings of one pose; some rows are chats, in
    which one pose after another changes what was asked for and keeps the rest.

    Args:
        folder (`str` or `Path`): the states.
        seed (`int`, *optional*, defaults to 0): for everything that is drawn.
        count (`int`, *optional*, defaults to 100000): how many; one part in twenty is of the split `val`.
    """

    name = "instructions"
    licence = "Apache-2.0, as the code"
    default_count = 100_000

    def read_part(self, part: str) -> Iterator[dict[str, Any]]:
        grammar = load_grammar(self.folder)
        indices = self.indices(part)
        plans = [draw_plan(grammar, random.Random(f"{self.seed}/{index}")) for index in indices]
        drawn, faults = draw_poses(grammar, [(plan.poses, plan.rng) for plan in plans])
        for index, plan, poses, fault in zip(indices, plans, drawn, faults, strict=True):
            if fault:
                self.skip(f"no pose holds the checks of {fault}", f"{index:08}")
            elif len(poses) == 1:
                texts = [("human", text) for text in plan.texts]
                yield self.make_row(f"{index:08}", "text_to_pose", poses, texts, pose_mask=BODY_ONLY_MASK)
            else:
                messages = [
                    message for text in plan.texts for message in make_messages(text, plan.rng.choice(ANSWERS))
                ]
                yield self.make_row(f"{index:08}", "text_to_pose", poses, pose_mask=BODY_ONLY_MASK, messages=messages)


def draw_plan(grammar: Grammar, rng: random.Random) -> Plan:
    """A row's choices and sentences."""
    standing, *others = grammar.postures
    is_chat = rng.random() < _CHAT_SHARE
    is_single = rng.random() < _SINGLE_SHARE
    posture = standing if rng.random() < _STANDING_SHARE or not others else rng.choice(others)
    says_posture = posture is not standing
    if is_single:
        chosen = [] if says_posture else _choose(grammar, [standing], rng, 1)
    else:
        chosen = _choose(grammar, [posture], rng, rng.choice((1, 1, 2, 2, 2, 3)))
        says_posture = says_posture or rng.random() < _SAID_SHARE
    pose = [posture, *chosen]
    if not is_chat:
        texts = list(dict.fromkeys(make_sentence(pose, says_posture, rng) for _ in range(rng.choice((3, 4)))))
        return Plan([pose], texts[:3], rng)
    text = make_sentence(pose, says_posture, rng)
    plan = Plan(
        [pose], [fill_template(rng.choice(TEXT_QUESTIONS), text) if rng.random() < _WRAPPED_SHARE else text], rng
    )
    for _ in range(rng.choice((1, 1, 2))):
        changed, text = _refine(grammar, plan.poses[-1], rng)
        plan.poses.append(changed)
        plan.texts.append(_as_sentence(text, rng))
    return plan


def _choose(grammar: Grammar, pose: list[Choice], rng: random.Random, count: int) -> list[Choice]:
    """Up to so many choices that go with a posture, with what is there already, and with each other."""
    chosen: list[Choice] = []
    for _ in range(count):
        taken = {joint for choice in (*pose[1:], *chosen) for joint in choice.joints.tolist()}
        # By name before side: what has one side only, such as crossed arms, is not rarer for it.
        by_part: dict[str, dict[str, list[Choice]]] = {}
        for choice in grammar.choices[pose[0].name]:
            if taken.isdisjoint(choice.joints.tolist()):
                by_part.setdefault(choice.part, {}).setdefault(choice.name, []).append(choice)
        if not by_part:
            break
        part = rng.choices(list(by_part), [_WEIGHTS.get(name.split()[-1], 1) for name in by_part])[0]
        chosen.append(rng.choice(by_part[part][rng.choice(list(by_part[part]))]))
    return chosen


def _refine(grammar: Grammar, pose: list[Choice], rng: random.Random) -> tuple[list[Choice], str]:
    """The next pose of a chat, which differs in one choice, and what was said to get it."""
    posture, *chosen = pose
    for kind in rng.sample(("add", "add", "undo", "mirror", "change", "posture"), 6):
        if kind == "add" and (added := _choose(grammar, pose, rng, 1)):
            return [*pose, *added], rng.choice(_ADD).format(do=_fill(rng.choice(added[0].do), "the"))
        if kind == "posture":
            fitting = [p for p in grammar.postures if p is not posture and set(chosen) <= set(grammar.choices[p.name])]
            if fitting:
                new = rng.choice(fitting)
                do = _fill(rng.choice(new.do), "the")
                text = rng.choice(_POSTURE if chosen else _CHANGE)
                return [new, *chosen], text.format(do=do, ing=_to_participle(do))
        if not chosen:
            continue
        old = rng.choice(chosen)
        kept = [choice for choice in pose if choice is not old]
        # Arms that a posture has elsewhere do not come to hang by being taken back.
        hangs = old.limb != "arm" or posture.name == "standing" or _fits(old, [posture, posture])
        if kind == "undo" and old.undo and hangs:
            return kept, rng.choice(_UNDO).format(do=_fill(rng.choice(old.undo), "the"))
        alternatives = [
            choice
            for choice in grammar.choices[posture.name]
            if choice.part == old.part and _fits(choice, kept) and choice is not old
        ]
        # Of one that is spoken of alone: else it is not clear which.
        is_alone = sum(choice.limb == old.limb for choice in chosen) == 1
        mirrored = [c for c in alternatives if c.name == old.name and {c.side, old.side} == {"left", "right"}]
        if kind == "mirror" and is_alone and mirrored and old.limb in ("arm", "leg"):
            text = rng.choice(_MIRROR).format(limb=old.limb, side=old.side, other=mirrored[0].side)
            return [*kept, mirrored[0]], text
        others = [choice for choice in alternatives if choice.side == old.side and choice.name != old.name]
        if kind == "change" and others:
            new = rng.choice(others)
            return [*kept, new], rng.choice(_CHANGE).format(do=_fill(rng.choice(new.do), "the"))
    new = rng.choice([p for p in grammar.postures if p is not posture] or [posture])
    return [new], rng.choice(_CHANGE).format(do=_fill(rng.choice(new.do), "the"))


def _fits(choice: Choice, pose: list[Choice]) -> bool:
    return all(set(choice.joints.tolist()).isdisjoint(other.joints.tolist()) for other in pose[1:])


def make_sentence(pose: list[Choice], says_posture: bool, rng: random.Random) -> str:
    """
    One of many wordings of a pose: orders, what somebody does, what is to be seen.

    Args:
        pose (`list[Choice]`): a posture and what else is said.
        says_posture (`bool`): whether the posture is.
        rng (`random.Random`): decides.
    """
    posture, *chosen = pose
    told = [*([posture] if says_posture else []), *rng.sample(chosen, len(chosen))]
    style = rng.choice(_STYLES)
    subject, possessor, be = rng.choice(_SUBJECTS)
    if style == "order":
        return _order(told, says_posture, rng)
    if style == "kept":
        return _keep(told, says_posture, rng)
    if style in ("does", "is doing"):
        the = rng.choice(("the", possessor))
        orders = [_fill(_pick_order(choice, says_posture, rng), the) for choice in told]
        if style == "is doing":
            return _as_sentence(f"{subject} {be} {_list([_to_participle(order) for order in orders])}", rng)
        return _as_sentence(f"{subject} {_list([_to_third(o) if be == 'is' else o for o in orders])}", rng)
    if style == "terse":
        seen = [*([_posture(posture, "", rng)] if says_posture else []), *_tell(told[says_posture:], "", "", rng)]
        return _as_sentence(_list(seen, rng.random() < 0.4), rng)
    if style == "stated" and chosen:
        the = rng.choice(("the", "the", possessor))
        stated = _list(_tell(told[says_posture:], "be", the, rng))
        if says_posture:
            return _as_sentence(f"{subject} {be} {_posture(posture, the, rng)}; {stated}", rng)
        return _as_sentence(rng.choice(_CLAUSE).format(stated) if rng.random() < 0.4 else stated, rng)
    noun, possessor = rng.choice(_NOUNS)
    the = rng.choice(("the", possessor))
    noun = noun.replace("the ", "a ") if style == "asked" else noun
    if style == "asked" and (says_posture or rng.random() < 0.6):
        orders = [_fill(_pick_order(choice, says_posture, rng), the) for choice in told]
        if rng.random() < 0.5:
            person = f"{noun} {'that' if 'figure' in noun else 'who'} {_list([_to_third(order) for order in orders])}"
        else:
            person = f"{noun} {_list([_to_participle(order) for order in orders])}"
        return _as_sentence(rng.choice(_PERSON).format(person), rng)
    if style == "asked":
        return _as_sentence(rng.choice(_WITH).format(_list(_tell(told, "", "the", rng))), rng)
    seen = _tell(told[says_posture:], "", the, rng)
    start = rng.choice((noun, noun, "")) or ("" if says_posture else rng.choice(("", noun)))
    words = " ".join(filter(None, (start, _posture(posture, the, rng) if says_posture else "")))
    if not words:
        return _as_sentence(rng.choice(("with {}", "{}")).format(_list(seen)), rng)
    if not seen:
        return _as_sentence(words, rng)
    with_words = _takes_with(words) and (not says_posture or rng.random() < 0.6)
    return _as_sentence(
        f"{words} with {_list(seen)}" if with_words else f"{words}, {_list(seen, rng.random() < 0.5)}", rng
    )


def _order(told: list[Choice], says_posture: bool, rng: random.Random) -> str:
    frames, possessors = rng.choice(_FRAMES) if rng.random() < _FRAMED_SHARE else (("{}",), _YOURS)
    frame, the = rng.choice(frames), rng.choice(possessors)
    orders = [_fill(_pick_order(choice, says_posture, rng), the) for choice in told]
    draw = rng.random()
    if len(orders) == 1:
        text = orders[0]
    elif draw < 0.1 and not says_posture:
        text = f"{orders[0]} while {_list([_to_participle(order) for order in orders[1:]])}"
    elif draw < 0.3 and _takes_with(orders[0]):
        seen = _list(_tell(told[1:], "", the, rng))
        text = f"{orders[0]} with {seen}" if rng.random() < 0.7 else f"with {seen}, {orders[0]}"
    elif draw < 0.36:
        text = f"{', '.join(orders[:-1])}, then {orders[-1]}"
    elif draw < 0.4 and says_posture:
        text = f"{orders[0]}, but {_list(orders[1:])}"
    elif draw < 0.65 and frame == "{}":
        return _as_sentence(". ".join(order[0].upper() + order[1:] for order in orders), rng)
    else:
        text = _list(orders, rng.random() < 0.85)
    return _as_sentence(frame.format(text), rng)


def _keep(told: list[Choice], says_posture: bool, rng: random.Random) -> str:
    """ "Stay on one knee and keep the left arm raised." """
    the = rng.choice(("the", "the", "your"))
    stay = [f"{rng.choice(('stay', 'remain', 'be'))} {_posture(told[0], the, rng)}"] if says_posture else []
    seen = _tell(told[says_posture:], "", the, rng)
    if not seen:
        return _as_sentence(stay[0], rng)
    if len(seen) > 1 and rng.random() < 0.4:
        doing = [_to_participle(_fill(_pick_order(choice, True, rng), the)) for choice in told[says_posture + 1 :]]
        kept = f"keep {seen[0]} while {_list(doing)}"
    else:
        kept = f"{rng.choice(('keep', 'keep', 'have'))} {_list(seen)}"
    return _as_sentence(_list([*stay, kept]), rng)


def _takes_with(text: str) -> bool:
    """Whether what follows "with" would go with all of the text."""
    return " with " not in text and ", " not in text


def _pick_order(choice: Choice, says_posture: bool, rng: random.Random) -> str:
    """An order, but not to stand or sit twice."""
    once = choice.limb == "leg" and says_posture
    return rng.choice([do for do in choice.do if not (once and do.startswith(("stand ", "sit ")))] or choice.do)


def _posture(posture: Choice, the: str, rng: random.Random) -> str:
    return _fill(rng.choice(posture.tell), the)


def _tell(chosen: list[Choice], be: str, the: str, rng: random.Random) -> list[str]:
    """Statements, with their "is" and "are" or without."""
    texts = [_fill(rng.choice(choice.tell), the) for choice in chosen]
    return [text.replace("[", "").replace("]", "") if be else re.sub(r" \[\w+\]", "", text) for text in texts]


def _fill(text: str, the: str) -> str:
    return text.replace("{the}", the) if the else text.replace("{the} ", "")


def _list(texts: list[str], with_and: bool = True) -> str:
    """ "a, b and c" """
    if len(texts) < 2 or not with_and:
        return ", ".join(texts)
    # What has a comma of its own is kept apart by one.
    comma = "," if any(", " in text for text in texts) else ""
    return f"{', '.join(texts[:-1])}{comma} and {texts[-1]}"


def _as_sentence(text: str, rng: random.Random) -> str:
    """With a capital and a full stop, or as people type."""
    if rng.random() < 0.15:
        return text
    return text[0].upper() + text[1:] + ("" if rng.random() < 0.1 or text.endswith("?") else ".")


def _to_third(order: str) -> str:
    """ "raise the arm" as "raises the arm"."""
    verb, _, rest = order.partition(" ")
    if verb == "have":
        verb = "has"
    elif re.search(r"(s|x|z|sh|ch|o)$", verb):
        verb += "es"
    else:
        verb = re.sub(r"([^aeiou])y$", r"\1ie", verb) + "s"
    return f"{verb} {rest}".strip()


def _to_participle(order: str) -> str:
    """ "raise the arm" as "raising the arm"."""
    verb, _, rest = order.partition(" ")
    if verb.endswith("ie"):
        verb = verb[:-2] + "y"
    elif re.fullmatch(r"([^aeiou]|qu)+[aeiou][^aeiouwxy]", verb):
        verb += verb[-1]
    elif verb.endswith("e") and not verb.endswith("ee"):
        verb = verb[:-1]
    return f"{verb}ing {rest}".strip()
