"""Chats about poses: each pose is the one that was asked for, what is told of it is true of it, other talk has none."""

import re

import numpy as np
import pytest
from make_rows import make_row, write_splits

from chatpose_hf.data import pose_chats
from chatpose_hf.data.pose_chats import UNRELATED, PoseChats, share, tell_limbs
from chatpose_hf.data.prompts import PLAIN_QUESTIONS, fill_template, redraw_messages
from chatpose_hf.data.rows import validate_row


def describe(number):
    """Captions in which the number stands, so that a text says whose it is."""
    return [
        {"kind": "human", "text": f"Someone is in pose {number}"},
        {
            "kind": "geometry",
            "text": f"The arms are as in {number}. The legs are as in {number}. The torso is upright.",
        },
        {"kind": "geometry", "text": f"Also, the elbow is bent as in {number}; pose {number}."},
        {"kind": "implicit", "text": "A situation."},
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    train, val = [make_row(n) for n in range(10, 18)], [make_row(n) for n in range(20, 24)]
    for row in (*train, *val):
        number = int(row["id"].removeprefix("row_"))
        row["captions"] = describe(number)
        row["poses"] = [np.full((24, 3), number / 100).tolist()]
    train.append({**make_row(90), "task": "spg", "captions": describe(90)})
    train.append({**make_row(91, num_poses=2), "captions": describe(91)})
    train.append({**make_row(92), "captions": [{"kind": "implicit", "text": "A situation of 92."}]})
    train.append({**make_row(93), "captions": describe(93), "pose_mask": [[False] * 24]})
    return write_splits(tmp_path_factory.mktemp("data") / "rows", train, val)


@pytest.fixture(scope="module")
def made(rows):
    source = PoseChats(rows)
    made = {split: list(source.rows(part)) for split, part in (("train", "train/00000"), ("val", "val/00019"))}
    assert not source.skipped
    return made


def turns(row):
    """Question, answer without its poses, and number of poses of each turn."""
    for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
        words = "".join(part["text"] or "" for part in answer["content"])
        yield question["content"][0]["text"], words, sum(part["type"] == "pose" for part in answer["content"])


def test_pose_when_asked_for_then_is_the_described_one_and_what_is_told_of_it_is_its_own(made):
    told = 0
    for row in (*made["train"], *made["val"]):
        validate_row(row)
        poses, masks = list(row["poses"]), list(row["pose_mask"])
        number, asked = None, ""
        for question, answer, num_poses in turns(row):
            assert num_poses <= 1
            if num_poses:
                number, asked = round(float(poses.pop(0)[0][0]) * 100), question
                assert str(number) in question
                assert masks.pop(0) == make_row(number)["pose_mask"][0]
            elif number and str(number) in answer:
                told += 1
                assert answer.lower().rstrip(".") not in asked.lower(), "told by the words that it was asked by"
            else:
                assert not re.search(r"\d\d", answer), "of a pose that is not the last"
        assert not poses
    assert told > 200


def test_other_talk_then_has_no_pose_and_the_splits_share_none_of_it(made):
    asked = {split: {q for row in rows for q, _, n in turns(row) if not n} for split, rows in made.items()}
    for split, other in (("train", "val"), ("val", "train")):
        unrelated = set(share(UNRELATED, split))
        assert len(unrelated & asked[split]) > len(unrelated) / 2
        assert not unrelated & asked[other]
    assert len(UNRELATED) == len(share(UNRELATED, "train")) + len(share(UNRELATED, "val"))
    with_pose = {q for rows in made.values() for row in rows for q, _, n in turns(row) if n}
    assert not with_pose & set(UNRELATED)


def test_rows_then_have_one_to_four_turns_of_a_split_and_stay_as_they_are(made):
    for split, numbers in (("train", range(10, 18)), ("val", range(20, 24))):
        seen = {round(float(pose[0][0]) * 100) for row in made[split] for pose in row["poses"]}
        assert seen == set(numbers)
    counts = np.bincount([len(row["messages"]) // 2 for row in made["train"]])
    assert len(counts) == 5
    assert 0.2 < counts[1] / counts.sum() < 0.4
    with_smpl = [("SMPL" in q or "pose of this person" in q) for row in made["train"] for q, _, n in turns(row) if n]
    assert 0.2 < np.mean(with_smpl) < 0.6
    for row in made["train"][:50]:
        assert row["task"] == "text_to_pose"
        assert redraw_messages(row, seed=0, epoch=2) is row


def test_rows_then_depend_on_seed_and_number_alone(rows, made):
    few = list(PoseChats(rows, count=5))
    assert [row["messages"] for row in few] == [row["messages"] for row in made["train"][:5]]
    np.testing.assert_array_equal(few[0]["poses"], made["train"][0]["poses"])
    assert [row["messages"] for row in PoseChats(rows, seed=1, count=5)] != [row["messages"] for row in few]


def test_plain_questions_then_are_many_and_each_holds_a_description_of_any_form():
    assert len(set(PLAIN_QUESTIONS)) >= 40
    for template in PLAIN_QUESTIONS:
        for text in ("A stiff salute.", "the left knee is bent"):
            filled = fill_template(template, text)
            assert text.rstrip(".") in filled
            assert not {"{", "}"} & set(filled)
            assert ".." not in filled
        assert "SMPL" not in template


def test_limbs_when_told_then_are_those_asked_about_alone():
    text = "He stands. Also, his left elbow is bent. The feet are apart. Both hands are near the knees"
    assert tell_limbs(text, "arms") == "His left elbow is bent."
    assert tell_limbs(text, "legs") == "The feet are apart."
    assert tell_limbs("He stands.", "legs") == ""


def test_source_when_there_are_no_rows_or_no_captions_or_no_count_then_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="make some with `chatpose data`"):
        PoseChats(tmp_path).parts()
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        PoseChats(tmp_path, count=0)
    with pytest.raises(ValueError, match=r"one known pose with captions in .*train, found none"):
        list(PoseChats(write_splits(tmp_path / "rows", [make_row(1)]), count=3))
    (tmp_path / "rows" / "train" / "part.parquet").write_bytes(b"PAR1")
    pose_chats._load_described.cache_clear()
    with pytest.raises(ValueError, match=r"expected rows in .*part\.parquet"):
        list(PoseChats(tmp_path / "rows", count=3))
