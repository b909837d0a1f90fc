"""Small talk and refusals in files of our own: rows without pose, and no question of val that train has."""

import json

import pytest
from conftest import ROOT

from chatpose_hf.data import chats
from chatpose_hf.data.chats import Chats, simplify
from chatpose_hf.data.prompts import redraw_messages
from chatpose_hf.data.rows import validate_row


HELLO = {"questions": ["Hello there", "Hi", "A good day to you."], "answers": ["Hello!"]}
CAPITAL = {
    "questions": ["What is the capital of {place}?", "{place}: its capital?", "Name the main city of {place}."],
    "answers": ["I do not know {place}."],
    "fill": {"place": ["Peru", "Chile", "Cuba", "Fiji", "Togo", "the Congo"]},
}


def write(folder, items, name="talk"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(items))
    return Chats(folder)


def texts(row, role):
    return [message["content"][0]["text"] for message in row["messages"] if message["role"] == role]


def read(source, split):
    return [row for part in source.parts() if part.startswith(split) for row in source.rows(part)]


def test_splits_when_an_item_has_gaps_then_share_neither_wordings_nor_fillings(tmp_path, monkeypatch):
    monkeypatch.setattr(chats, "_LONG_SHARE", 0)
    monkeypatch.setattr(chats, "_HASTY_SHARE", 0)
    source = write(tmp_path / "chats", [HELLO, CAPITAL])
    assert source.parts() == ["train/talk", "val/talk"]
    train, val = (read(source, split) for split in ("train", "val"))
    said = {texts(row, "user")[0]: texts(row, "assistant")[0] for row in train}
    places = ["Chile", "Cuba", "Fiji", "Togo"]
    assert said == {
        "Hello there": "Hello!",
        "Hi": "Hello!",
        **{f"What is the capital of {place}?": f"I do not know {place}." for place in places},
        **{f"{place}: its capital?": f"I do not know {place}." for place in places},
    }
    asked = ["A good day to you.", "Name the main city of Peru.", "Name the main city of the Congo."]
    assert sorted(texts(row, "user")[0] for row in val) == asked


def test_train_when_chats_go_on_then_mix_items_and_are_typed_hastily_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(chats, "_LONG_SHARE", 1)
    monkeypatch.setattr(chats, "_HASTY_SHARE", 1)
    source = write(tmp_path / "chats", [HELLO, CAPITAL])
    train = read(source, "train")
    assert {len(texts(row, "user")) for row in train} <= {2, 3}
    for row in train:
        first, *others = ("Hello!" if answer == "Hello!" else "no" for answer in texts(row, "assistant"))
        assert first not in others, "of another item"
        assert all(question == question.lower() and question[-1] not in ".?" for question in texts(row, "user"))
    assert all(len(row["messages"]) == 2 for row in read(source, "val"))


def test_rows_when_made_again_then_are_the_same_and_others_for_another_seed(tmp_path):
    write(tmp_path / "chats", [HELLO, CAPITAL])
    first, again, other = (read(Chats(tmp_path / "chats", seed=seed), "train") for seed in (0, 0, 1))
    assert first == again
    assert [row["messages"] for row in first] != [row["messages"] for row in other]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": ["One?"]}, r"item 1 of .*talk\.json: expected at least 2 different texts as `questions`"),
        ({"questions": ["One?", "one"]}, "at least 2 different texts as `questions`"),
        ({"questions": ["One?", "hi"]}, r"'hi' is a question of item 0 of .*talk\.json too"),
        ({"questions": ["One?", "Two {place}?"]}, r"gaps of `fill` \(none\) in each question, got 'Two {place}\?'"),
        ({"answers": []}, "at least 1 different texts as `answers`"),
        ({"answers": ["In {place}."]}, "no gaps but those of `fill`"),
        ({"fill": {"place": ["Peru"]}}, "at least 2 different texts for each gap"),
        ({"fill": {"place": ["Peru", "Chile"]}}, r"gaps of `fill` \(place\) in each question"),
        ({"more": 1}, "expected questions, answers and perhaps fill"),
    ],
)
def test_item_when_it_is_none_then_the_file_and_the_fault_are_named(tmp_path, changes, message):
    item = {"questions": ["One?", "Two?"], "answers": ["Three."], **changes}
    with pytest.raises(ValueError, match=message):
        list(write(tmp_path / "chats", [HELLO, item]))


def test_files_when_absent_or_of_another_layout_then_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"THEME\.json"):
        Chats(tmp_path).parts()
    with pytest.raises(ValueError, match=r"expected an array .*talk\.json, got dict"):
        list(write(tmp_path / "chats", {}))


def test_chats_of_this_project_then_are_many_without_pose_and_the_splits_share_no_question(monkeypatch):
    monkeypatch.setattr(chats, "_HASTY_SHARE", 0)
    source = Chats(ROOT / "examples" / "chats")
    train, val = (read(source, split) for split in ("train", "val"))
    assert not source.skipped
    for row in (*train, *val):
        validate_row(row)
        assert row["task"] == "vqa"
        assert row["poses"] == row["captions"] == []
        assert redraw_messages(row, seed=0, epoch=3) is row
    asked = [{simplify(question) for row in rows for question in texts(row, "user")} for rows in (train, val)]
    assert not asked[0] & asked[1]
    assert len(asked[0]) > 5000
    assert len(asked[1]) == len(val) > 500
    assert 0.15 < sum(len(row["messages"]) > 2 for row in train) / len(train) < 0.25


def test_chats_of_this_project_when_every_gap_is_filled_then_no_question_comes_twice(monkeypatch):
    """Whatever the seed draws."""
    monkeypatch.setattr(chats, "_MAX_FILLINGS", {"train": 10**9, "val": 10**9})
    source = Chats(ROOT / "examples" / "chats")
    loaded = [turn for split in ("train", "val") for turns in source._load(split).values() for turn in turns]
    assert len({simplify(turn.question) for turn in loaded}) == len(loaded)
