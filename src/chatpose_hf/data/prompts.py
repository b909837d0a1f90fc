"""What is asked and answered: the question and answer tables of ChatPose, and how a row's conversation is drawn from them.

The tables of the original are its own words, misspellings included: its released weights were trained on them. `{sent}` is
a description, as full sentences; `{phrase}` a description without its full stop.
"""

import hashlib
from collections.abc import Sequence

from .rows import POSE_TOKEN


# fmt: off
# TEXT_SHORT_QUESTION_LIST
TEXT_QUESTIONS = (
    "I have a word description of a person's pose, can you give the SMPL pose of this person? {sent}",
    "There is a person: {sent} Please output this person's SMPL pose.",
    "{sent} Give the SMPL pose.",
    "What's the SMPL pose of this person? {sent}",
    "Use SMPL pose to describe this person's behavior. {sent}",
    "There is a person doing this: {sent} Can you use SMPL pose to describe the pose?",
    "A person is described as: {sent} Use the SMPL pose to reflect this.",
    "Human pose is described as words: {sent} The SMPL pose is?",
    "Human pose can be described as words: {sent} And it can also be described as SMPL pose format, can you output this?",
)
# SHORT_QUESTION_LIST
IMAGE_QUESTIONS = (
    "Can you predict the SMPL pose of the person in this image?",
    "There is a person in the middle of the image, please output this person's SMPL pose.",
    "What is the human pose in this image? Please respond with SMPL pose.",
    "What is the person doing in this image? Please output SMPL pose.",
    "There is a person in the middle of the image, use SMPL to describe the pose.",
)
# LONG_QUESTION_LIST
IMAGE_TEXT_QUESTIONS = (
    "{sent} Please respond with SMPL pose.",
    "{sent} Please output SMPL pose.",
)
# EXPLANATORY_QUESTION_LIST
EXPLANATION_REQUESTS = (
    "Please output SMPL pose and explain the pose.",
    "Please output SMPL pose and explain the reason.",
    "Please output SMPL pose and give some explanation.",
)
# HMR_SHORT_QUESTION_LIST, by what each can be asked about
MORE_TEXT_QUESTIONS = (
    "I have a description of a person's pose, can you give the SMPL pose of this person? {sent}",
    "Give you a word descrption of a human, please output the SMPL pose. {sent}",
)
MORE_IMAGE_QUESTIONS = (
    "Describe what this perosn is doing using SMPL pose.",
    "What's the SMPL pose of this person?",
    "Use SMPL pose to describe this person's behavior.",
)
# The paper's form of text-to-pose, SPG and RPE
PHRASE_QUESTION = "{phrase}, can you give the SMPL pose of this person?"
# Ours: nothing but the words
BARE_QUESTIONS = ("{phrase}", "{sent}")
# Ours: as people ask who never heard of SMPL. They read well with a sentence, with several and with a few words in the place of
# `{sent}` (with a full stop) or `{phrase}`.
PLAIN_QUESTIONS = (
    "Show me this: {sent}", "Show me what this looks like: {sent}",
    "Show this pose: {sent}", "Can you show me this? {sent}", "Can you pose the figure like this? {sent}",
    "Pose the figure like this: {sent}", "Please pose a body for me: {sent}", "Pose please: {phrase}",
    "pose: {phrase}", "Draw this person: {sent}", "Draw a body for these words: {sent}",
    "Draw the following pose. {sent}", "How does it look in 3D? {sent}", "How would that look? {sent}",
    "What does this look like? {sent}", "What would a body look like here? {sent}", "I need a 3D pose: {sent}",
    "I need a body in this position: {sent}", "I want to see this: {sent}",
    "I would like a figure that matches this: {sent}", "I am looking for this pose: {sent}",
    "Make a mannequin that does this: {sent}", "Make the mannequin do the following. {sent}",
    "Make a 3D figure: {phrase}", "Make a person like this: {sent}", "Put the body into this position: {sent}",
    "Set the joints so that it fits: {sent}", "Turn these words into a pose: {sent}",
    "Turn this into a 3D body: {phrase}", "Could you model this for me? {sent}",
    "Could you make that pose? {sent}", "Would you show a person like this? {sent}", "Give me the pose: {sent}",
    "Give me a figure: {phrase}", "Give me the human pose for this description: {sent}", "Generate a pose. {sent}",
    "Generate: {phrase}", "Create a character in this pose: {sent}",
    "For my drawing I need somebody like this: {sent}", "My character should be like this: {sent}",
    "Imagine a person. {sent} Show the pose.", "{sent} Show me.", "{sent} Show me the pose.",
    "{sent} Can you make that?", "{sent} What does it look like?", "{sent} Please pose a figure like that.",
    "{sent} 3D pose, please.", "{phrase}, please", "{phrase} - can you show that?", "{phrase}: show me the body",
)
PLAIN_IMAGE_QUESTIONS = (
    "What pose is this?", "Show this person in 3D.", "Show me the body of this person.", "Copy this pose.",
    "Pose the figure like the person in the picture.", "Turn this picture into a 3D pose.", "3D pose, please.",
    "Can you make the pose of this person?", "Make a mannequin that stands like this person.", "Get the pose.",
)
PLAIN_IMAGE_TEXT_QUESTIONS = (
    "Show me this person in 3D: {phrase}", "The pose of this one: {phrase}",
    "What is the pose of this person? {sent}", "I mean this one: {phrase}", "{sent} Copy the pose.",
)
# ANSWER_LIST
ANSWERS = (
    "It is <POSE>.",
    "Sure, <POSE>.",
    "Sure, it is <POSE>.",
    "Sure, the SMPL pose is <POSE>.",
    "<POSE>.",
    "The SMPL pose is <POSE>.",
    "The SMPL pose of the person is <POSE>.",
    "The SMPL format of this person's pose is <POSE>.",
)
# Ours: an explanation after or before the pose; the pose first, in the middle, last.
EXPLAINED_ANSWERS = (
    "<POSE> is the SMPL pose. {sent}",
    "<POSE>. {sent}",
    "Sure, it is <POSE>. {sent}",
    "The SMPL pose is <POSE>. {sent}",
    "{sent} So the SMPL pose is <POSE>.",
    "{sent} It is <POSE>.",
)
# Ours: a situation's pose by its name, and then the pose. Having said the name, a model has made up its mind: without one it answers
# the mean of the poses that it thinks of, which is none of them.
NAMED_ANSWER = "My guess: {phrase}. <POSE>."
# Ours: several people
GROUP_QUESTIONS = (
    "Can you give the SMPL poses of {phrases}?",
    "Please output the SMPL poses of {phrases}.",
    "What are the SMPL poses of {phrases}?",
)
GROUP_ANSWERS = (
    "Sure, {poses}.",
    "{Poses}.",
    "In this image, {poses}.",
)
# fmt: on
# Kinds of captions that say what the body does; a text-to-pose question is drawn from one of these kinds, each as likely:
# the original's fair coin between what people and what programs wrote.
DESCRIBING_KINDS = ("human", "automatic", "geometry")
_DESCRIPTION = f"a caption of kind {', '.join(DESCRIBING_KINDS)}"
_QUESTIONS = {  # of each task: the original's, more of its kind, plain ones
    "text_to_pose": (TEXT_QUESTIONS, (*MORE_TEXT_QUESTIONS, PHRASE_QUESTION), PLAIN_QUESTIONS),
    "pose_estimation": (IMAGE_QUESTIONS, MORE_IMAGE_QUESTIONS, PLAIN_IMAGE_QUESTIONS),
    "spg": (TEXT_QUESTIONS, (PHRASE_QUESTION,), PLAIN_QUESTIONS),
    "rpe": (IMAGE_TEXT_QUESTIONS, (PHRASE_QUESTION,), PLAIN_IMAGE_TEXT_QUESTIONS),
}
# Of the questions that are none of those the original trained on: of its kind, plain ones, the bare words.
_MORE_SHARE, _PLAIN_SHARE, _BARE_SHARE = 0.1, 0.25, 0.25
_EXPLAINED_SHARE = 0.1  # of the rows that have an explanation to give
_NAME_ASKED_SHARE = 0.1  # of the situations whose pose has a name: people type that too


class _Draw:
    """Choices that a key decides. Seeding Python's generator would take longer than all that is drawn from it."""

    def __init__(self, key: str):
        self._left = int.from_bytes(
            hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).digest(), "big"
        )

    def choice(self, options: Sequence):
        self._left, index = divmod(self._left, len(options))
        return options[index]

    def random(self) -> float:
        self._left, number = divmod(self._left, 2**32)
        return number / 2**32


def draw_messages(
    task: str,
    captions: Sequence[dict],
    num_images: int,
    num_poses: int,
    *,
    seed: int,
    id: str,
    epoch: int = 0,
) -> list[dict]:
    """
    A conversation about poses, chosen by seed, id and epoch alone: the same on every machine and in every run.

    Args:
        task (`str`):
            - `"text_to_pose"`: a caption of a describing kind (`"human"`, `"automatic"`, `"geometry"`) is asked for.
            - `"pose_estimation"`: the picture is; with several poses, the captions of kind `"phrase"` name the people.
            - `"spg"`: a caption of kind `"implicit"` is; where there is one of kind `"name"`, the answer says it first, and
              some questions ask by it.
            - `"rpe"`: the picture and a caption of kind `"phrase"` are, one phrase for each pose if there are several.

            In some rows that have a caption of a describing kind, the question wants an explanation, which is that
            caption.
        captions (`Sequence[dict]`): `kind` and `text` of each.
        num_images (`int`), num_poses (`int`): of the row.
        seed (`int`), id (`str`), epoch (`int`, *optional*, defaults to 0): what the choice depends on.

    Returns:
        `list[dict]`: messages as in [`rows.validate_row`].

    Raises:
        ValueError: where the task needs a caption or a picture that is not there.
    """
    rng = _Draw(f"{seed}/{id}/{epoch}")
    by_kind: dict[str, list[str]] = {}
    for caption in captions:
        by_kind.setdefault(caption["kind"], []).append(caption["text"])
    descriptions = [by_kind[kind] for kind in DESCRIBING_KINDS if kind in by_kind]
    names = by_kind.get("name", []) if task == "spg" else []

    def need(texts: list, what: str) -> list:
        if not texts:
            raise ValueError(f"expected {what} for the task {task} of row {id!r}, got {len(captions)} captions")
        return texts

    if (task in ("pose_estimation", "rpe")) != (num_images > 0):
        raise ValueError(
            f"expected pictures for pose_estimation and rpe alone, got {num_images} for {task} in row {id!r}"
        )
    if num_poses != 1:
        phrases = need(by_kind.get("phrase", []), "captions of kind `phrase`")
        if len(phrases) != num_poses:
            raise ValueError(f"expected a phrase for each of the {num_poses} poses of row {id!r}, got {len(phrases)}")
        return make_messages(_draw_group_question(rng, phrases), _draw_group_answer(rng, phrases), num_images)

    if task == "text_to_pose":
        asked = rng.choice(rng.choice(need(descriptions, _DESCRIPTION)))
    elif task == "spg":
        asked = rng.choice(need(by_kind.get("implicit", []), "a caption of kind `implicit`"))
        if names and rng.random() < _NAME_ASKED_SHARE:
            asked = rng.choice(names)
    elif task == "rpe":
        asked = rng.choice(need(by_kind.get("phrase", []), "a caption of kind `phrase`"))
    else:
        asked = ""
    # Nobody explains what was just said: a described pose stays without.
    if task != "text_to_pose" and descriptions and rng.random() < _EXPLAINED_SHARE:
        question = f"{_as_sentence(asked)} {rng.choice(EXPLANATION_REQUESTS)}".strip()
        explanation = rng.choice(rng.choice(descriptions))
        if names:
            answer = f"{fill_template(NAMED_ANSWER, rng.choice(names))} {_as_sentence(explanation)}"
        else:
            answer = fill_template(rng.choice(EXPLAINED_ANSWERS), explanation)
    else:
        questions, more_questions, plain_questions = _QUESTIONS[task]
        share = rng.random()
        if share < _MORE_SHARE:
            questions = more_questions
        elif share < _MORE_SHARE + _PLAIN_SHARE:
            questions = plain_questions
        elif share < _MORE_SHARE + _PLAIN_SHARE + _BARE_SHARE:
            questions = BARE_QUESTIONS if asked else plain_questions
        question = fill_template(rng.choice(questions), asked)
        answer = fill_template(NAMED_ANSWER, rng.choice(names)) if names else rng.choice(ANSWERS)
    return make_messages(question, answer, num_images)


def redraw_messages(row: dict, seed: int, epoch: int) -> dict:
    """
    The row with the conversation of another epoch: another question, another of its captions. Chats about other things
    (task `"vqa"`), and rows without a caption or a picture to draw from, stay as they are.
    """
    if row["task"] == "vqa" or not (row["captions"] or row["images"]):
        return row
    counts = len(row["images"]), len(row["poses"])
    messages = draw_messages(row["task"], row["captions"], *counts, seed=seed, id=row["id"], epoch=epoch)
    return {**row, "messages": messages}


def make_parts(text: str) -> list[dict]:
    """The parts of an answer: its words, and a pose for each `<POSE>`."""
    parts: list[dict] = []
    for index, words in enumerate(text.split(POSE_TOKEN)):
        parts += [{"type": "pose", "text": None}] if index else []
        parts += [{"type": "text", "text": words}] if words else []
    return parts


def make_messages(question: str, answer: str, num_images: int = 0) -> list[dict]:
    """A turn of a chat: a question after so many pictures, and an answer, in which `<POSE>` is a pose."""
    images = [{"type": "image", "text": None} for _ in range(num_images)]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": question}]},
        {"role": "assistant", "content": make_parts(answer)},
    ]


def _draw_group_question(rng: _Draw, phrases: Sequence[str]) -> str:
    names = [_as_phrase(phrase) for phrase in phrases]
    return rng.choice(GROUP_QUESTIONS).format(phrases=f"{', '.join(names[:-1])} and {names[-1]}")


def _draw_group_answer(rng: _Draw, phrases: Sequence[str]) -> str:
    poses = ", ".join(f"{_as_phrase(phrase)} is {POSE_TOKEN}" for phrase in phrases)
    return rng.choice(GROUP_ANSWERS).format(poses=poses, Poses=poses[:1].upper() + poses[1:])


def fill_template(template: str, text: str) -> str:
    """A question about a description, which takes the place of `{sent}` or `{phrase}`."""
    if "{phrase}" in template:
        return template.replace("{phrase}", _as_phrase(text))
    return template.replace("{sent}", _as_sentence(text))


def _as_sentence(text: str) -> str:
    text = text.strip()
    return text if text.rstrip("\"')]").endswith((".", "!", "?")) or not text else f"{text}."


def _as_phrase(text: str) -> str:
    return text.strip().rstrip(".")
