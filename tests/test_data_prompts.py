"""The tables of questions and answers, and what is drawn from them."""

import subprocess
import sys

import pytest

from chatpose_hf.data import prompts
from chatpose_hf.data.prompts import draw_messages, make_parts, redraw_messages


def captions(**kinds):
    return [{"kind": kind, "text": text} for kind, texts in kinds.items() for text in texts]


def draws(task, texts, num_images=0, num_poses=1, count=400, **options):
    return [
        draw_messages(task, texts, num_images, num_poses, **{"seed": 0, "id": str(n), **options}) for n in range(count)
    ]


def question_of(messages):
    return "".join(part["text"] for part in messages[0]["content"] if part["type"] == "text")


def answer_of(messages):
    return "".join(part["text"] or "<POSE>" for part in messages[1]["content"])


def test_tables_are_those_of_the_original_in_number():
    # The lists of section 2.1 of the original's code: 9, 5, 2, 3, 5 and 8 strings.
    assert len(prompts.TEXT_QUESTIONS) == 9
    assert len(prompts.IMAGE_QUESTIONS) == 5
    assert len(prompts.IMAGE_TEXT_QUESTIONS) == 2
    assert len(prompts.EXPLANATION_REQUESTS) == 3
    assert len(prompts.MORE_TEXT_QUESTIONS) + len(prompts.MORE_IMAGE_QUESTIONS) == 5
    assert len(prompts.ANSWERS) == 8
    assert all(question.count("{sent}") == 1 for question in prompts.TEXT_QUESTIONS)
    assert all(answer.count("<POSE>") == 1 for answer in prompts.ANSWERS)
    assert "perosn" in prompts.MORE_IMAGE_QUESTIONS[0]  # its spelling is data


def test_draw_when_text_to_pose_then_every_question_and_answer_comes_up_and_holds_the_caption():
    questions, answers = set(), set()
    for messages in draws("text_to_pose", captions(human=["She kneels."]), count=3000):
        assert [message["role"] for message in messages] == ["user", "assistant"]
        questions.add(question_of(messages).replace("She kneels.", "{sent}").replace("She kneels", "{phrase}"))
        answers.add(answer_of(messages))
    more = {*prompts.MORE_TEXT_QUESTIONS, prompts.PHRASE_QUESTION}
    assert questions == {*prompts.TEXT_QUESTIONS, *more, *prompts.PLAIN_QUESTIONS, *prompts.BARE_QUESTIONS}
    assert answers == set(prompts.ANSWERS)


def test_draw_when_captions_are_of_two_kinds_then_each_kind_is_as_likely():
    texts = captions(human=["Alpha."], automatic=["Beta.", "Gamma.", "Delta."], implicit=["Omega."])
    asked = [question_of(messages) for messages in draws("text_to_pose", texts, count=1000)]
    counts = {word: sum(word in question for question in asked) for word in ("Alpha", "Beta", "Gamma", "Delta")}
    assert sum(counts.values()) == 1000
    assert abs(counts["Alpha"] - 500) < 60  # four standard deviations
    assert all(abs(counts[word] - 500 / 3) < 60 for word in ("Beta", "Gamma", "Delta"))


def test_draw_when_an_image_then_it_comes_first():
    asked = set()
    for messages in draws("pose_estimation", [], num_images=1):
        assert messages[0]["content"][0] == {"type": "image", "text": None}
        asked.add(question_of(messages))
    assert asked == {*prompts.IMAGE_QUESTIONS, *prompts.MORE_IMAGE_QUESTIONS, *prompts.PLAIN_IMAGE_QUESTIONS}


def test_draw_when_there_is_an_explanation_then_some_ask_for_it_and_get_it():
    some = draws("pose_estimation", captions(geometry=["The left knee is bent."]), num_images=1, count=600)
    explained = [m for m in some if question_of(m) in prompts.EXPLANATION_REQUESTS]
    assert 30 < len(explained) < 90
    assert all("The left knee is bent." in answer_of(messages) for messages in explained)
    assert not any("knee" in answer_of(messages) for messages in some if messages not in explained)
    places = {answer_of(m).startswith("<POSE>") - answer_of(m).endswith("<POSE>.") for m in explained}
    assert places == {-1, 0, 1}  # last, in the middle, first


def test_draw_when_speculative_then_asks_the_situation_not_the_description():
    texts = captions(implicit=["A man proposes marriage"], human=["He is on one knee."])
    for messages in draws("spg", texts):
        assert "A man proposes marriage" in question_of(messages)
        assert "knee" not in question_of(messages)


def test_draw_when_the_pose_has_a_name_then_a_situation_is_answered_by_it_before_the_pose():
    texts = captions(name=["down on one knee"], implicit=["A man proposes marriage"], human=["He kneels."])
    some = draws("spg", texts, count=600)
    answers = [answer_of(messages) for messages in some]
    named = [answer for answer in answers if answer == "My guess: down on one knee. <POSE>."]
    explained = [answer for answer in answers if answer == "My guess: down on one knee. <POSE>. He kneels."]
    assert len(named) + len(explained) == 600
    assert len(named) > 400
    asked_by_name = ["one knee" in question_of(messages) for messages in some]
    assert 30 < sum(asked_by_name) < 90
    assert all(("marriage" in question_of(m)) != by_name for m, by_name in zip(some, asked_by_name, strict=True))
    assert not any("My guess" in answer_of(messages) for messages in draws("text_to_pose", texts))


def test_draw_when_reasoning_then_asks_the_phrase_with_the_image():
    for messages in draws("rpe", captions(phrase=["the man with black hair"]), num_images=1):
        assert "the man with black hair" in question_of(messages)
        assert messages[0]["content"][0]["type"] == "image"


def test_draw_when_several_people_then_each_has_a_pose_in_order():
    texts = captions(phrase=["the man on the left", "the woman", "the child."])
    for messages in draws("rpe", texts, num_images=1, num_poses=3):
        assert "the man on the left, the woman and the child" in question_of(messages)
        parts = messages[1]["content"]
        assert [part["type"] for part in parts].count("pose") == 3
        answer = answer_of(messages).lower()
        assert "the man on the left is <pose>, the woman is <pose>, the child is <pose>" in answer


def test_draw_when_key_is_the_same_then_so_is_the_choice_in_any_process():
    texts = captions(human=["A.", "B.", "C."])
    code = (
        "from chatpose_hf.data.prompts import draw_messages\n"
        "texts = [{'kind': 'human', 'text': t} for t in ('A.', 'B.', 'C.')]\n"
        "print([draw_messages('text_to_pose', texts, 0, 1, seed=5, id=str(n), epoch=2) for n in range(20)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(draws("text_to_pose", texts, count=20, seed=5, epoch=2))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_draw_when_seed_or_epoch_differ_then_so_do_the_choices(other):
    texts = captions(human=["A.", "B.", "C."])
    pairs = zip(draws("text_to_pose", texts), draws("text_to_pose", texts, **other), strict=True)
    assert sum(a != b for a, b in pairs) > 350  # of 400; 1 in 24 or so agree by chance


def test_draw_when_a_caption_has_braces_then_they_stay():
    for messages in draws("text_to_pose", captions(human=["{sent} {phrase} {0}"]), count=50):
        assert "{sent} {phrase} {0}" in question_of(messages)


@pytest.mark.parametrize(
    ("task", "texts", "images", "poses", "message"),
    [
        ("text_to_pose", captions(implicit=["x"]), 0, 1, "a caption of kind human, automatic, geometry"),
        ("spg", captions(human=["x"]), 0, 1, "a caption of kind `implicit`"),
        ("rpe", captions(human=["x"]), 1, 1, "a caption of kind `phrase`"),
        ("rpe", captions(phrase=["x"]), 0, 1, "pictures for pose_estimation and rpe alone"),
        ("text_to_pose", captions(human=["x"]), 1, 1, "pictures for pose_estimation and rpe alone"),
        ("rpe", captions(phrase=["x"]), 1, 2, "a phrase for each of the 2 poses"),
    ],
)
def test_draw_when_the_row_lacks_something_then_says_what(task, texts, images, poses, message):
    with pytest.raises(ValueError, match=f"{message}.*'the_row'"):
        draw_messages(task, texts, images, poses, seed=0, id="the_row")


def test_redraw_when_another_epoch_then_only_the_messages_change():
    texts = captions(human=["A.", "B.", "C."])
    row = {
        "id": "7",
        "task": "text_to_pose",
        "messages": draw_messages("text_to_pose", texts, 0, 1, seed=0, id="7"),
        "images": [],
        "poses": [None],
        "captions": texts,
    }
    assert redraw_messages(row, seed=0, epoch=0) == row
    drawn = [redraw_messages(row, seed=0, epoch=epoch) for epoch in range(1, 9)]
    assert len({str(other["messages"]) for other in drawn}) > 4
    assert all({**other, "messages": row["messages"]} == row for other in drawn)


def test_redraw_when_a_chat_then_it_stays():
    row = {"id": "7", "task": "vqa", "messages": ["as it is"], "images": [1], "poses": [], "captions": []}
    assert redraw_messages(row, seed=3, epoch=5) is row


def test_make_parts_when_poses_are_first_middle_last_then_keeps_the_order():
    kinds = [[part["type"] for part in make_parts(text)] for text in ("<POSE> a", "a <POSE> b", "a <POSE>", "<POSE>")]
    assert kinds == [["pose", "text"], ["text", "pose", "text"], ["text", "pose"], ["pose"]]
