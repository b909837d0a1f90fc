"""The row schema: what a row must be, and how rows are stored."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image

from chatpose_hf.collator import ChatPoseCollator
from chatpose_hf.data.rows import FEATURES, RowError, caption_texts, load_rows, validate_row, write_rows


def png(color=(200, 30, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def make_row(id="a", **changes):
    row = {
        "id": id,
        "source": "test",
        "task": "pose_estimation",
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "The pose?"}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "It is "}, {"type": "pose", "text": None}],
            },
        ],
        "images": [{"bytes": png(), "path": None}],
        "poses": [np.arange(72, dtype=np.float32).reshape(24, 3) / 100],
        "pose_mask": [[joint < 22 for joint in range(24)]],
        "captions": [{"kind": "human", "text": "He stands."}],
        "licence": "CC0",
    }
    return {**row, **changes}


def text_messages(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, texts, strict=False)
    ]


def test_validate_row_when_the_row_is_right_then_is_silent():
    validate_row(make_row())
    validate_row(make_row(images=[Image.new("RGB", (4, 4))]))
    validate_row(make_row(task="vqa", messages=text_messages("Hi", "Hello"), images=[], poses=[], pose_mask=[]))
    validate_row(make_row(pose_mask=[[False] * 24]))  # a pose that nobody knows
    system = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    validate_row(make_row(messages=system + make_row()["messages"]))


FAULTS = {
    "id empty": ({"id": ""}, "`id`: expected a text"),
    "id number": ({"id": 3}, "`id`: expected a text"),
    "surrogate": ({"source": "\ud800"}, "`source`: expected text that UTF-8"),
    "task": ({"task": "dance"}, "`task`: expected one of .*got dance"),
    "no list": ({"messages": "hi"}, "`messages`: expected a list"),
    "no messages": ({"messages": []}, "`messages`: expected user and assistant in turn"),
    "question last": ({"messages": make_row()["messages"][:1]}, "`messages`: expected user and assistant in turn"),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "video", "text": None}]}, *make_row()["messages"][1:]]},
        "`messages`: expected parts of type .*got video",
    ),
    "content is a string": (
        {"messages": [{"role": "user", "content": "x"}, *make_row()["messages"][1:]]},
        "`messages`: expected a list of parts",
    ),
    "placeholder in text": (
        {"messages": text_messages("what is <image>", "no"), "images": [], "poses": [], "pose_mask": []},
        "`messages`: expected no `<image>`",
    ),
    "pose token in text": (
        {"messages": text_messages("what", "<POSE>"), "images": [], "poses": [], "pose_mask": []},
        "`messages`: expected no `<image>` or `<POSE>`",
    ),
    "pose in a question": (
        {"messages": [make_row()["messages"][1] | {"role": "user"}, *make_row()["messages"][1:]]},
        "`messages`: expected a part of type pose of the assistant",
    ),
    "image without picture": ({"images": []}, "`images`: expected one for each image part .*got 0 for 1"),
    "picture is a text": ({"images": ["x.png"]}, "`images`: expected a picture"),
    "two poses for one": ({"poses": [np.zeros((24, 3))] * 2}, "`poses`: expected one for each pose part .*2 for 1"),
    "shape": ({"poses": [np.zeros((22, 3))]}, r"`poses`: expected shape \(24, 3\), got \(22, 3\)"),
    "ragged": ({"poses": [[[0.0], [1.0, 2.0]]]}, r"`poses`: expected shape \(24, 3\), got no numbers"),
    "huge": ({"poses": [np.full((24, 3), 1e30)]}, "`poses`: expected radians, under 10000"),
    "nan": ({"poses": [np.full((24, 3), np.nan)]}, "`poses`: expected finite numbers"),
    "mask length": ({"pose_mask": [[True] * 23]}, "`pose_mask`: expected 24 booleans"),
    "mask numbers": ({"pose_mask": [[1.0] * 24]}, "`pose_mask`: expected 24 booleans"),
    "mask missing": ({"pose_mask": []}, "`pose_mask`: expected one for each pose"),
    "caption kind": ({"captions": [{"text": "x"}]}, "`captions`: expected `kind` and `text`"),
    "caption with a token": (
        {"captions": [{"kind": "human", "text": "a <POSE>"}]},
        "`captions`: expected no `<image>`",
    ),
    "caption empty": ({"captions": [{"kind": "human", "text": " "}]}, "`captions`: expected a text"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_validate_row_when_a_field_is_wrong_then_names_row_field_and_fault(name):
    changes, message = FAULTS[name]
    row = make_row("the_row") | changes
    with pytest.raises(RowError, match=message) as caught:
        validate_row(row)
    assert repr(row["id"]) in str(caught.value)


def test_row_error_reason_when_numbers_differ_then_is_the_same():
    reasons = set()
    for shape in ((22, 3), (24, 4)):
        with pytest.raises(RowError) as caught:
            validate_row(make_row(str(shape), poses=[np.zeros(shape)]))
        reasons.add(caught.value.reason)
    assert reasons == {"`poses`: expected shape (24, 3)"}


def test_validate_row_when_fields_are_missing_then_says_so():
    row = make_row()
    del row["licence"]
    with pytest.raises(RowError, match="expected the fields id, source"):
        validate_row(row)


def same_rows(loaded, rows):
    assert len(loaded) == len(rows)
    for got, want in zip(loaded, rows, strict=True):
        assert {k: got[k] for k in ("id", "source", "task", "messages", "captions", "licence", "pose_mask")} == {
            k: want[k] for k in ("id", "source", "task", "messages", "captions", "licence", "pose_mask")
        }
        np.testing.assert_array_equal(np.array(got["poses"], dtype=np.float32), want["poses"])
        assert [image.getpixel((0, 0)) for image in got["images"]] == [(200, 30, 30)] * len(want["images"])
        validate_row(got)


@pytest.fixture
def rows():
    chat = make_row(
        "b",
        task="vqa",
        messages=text_messages("Hi\u2028there", "Héllo"),
        images=[],
        poses=[],
        pose_mask=[],
        captions=[],
    )
    return [make_row(), chat, make_row("c")]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_when_written_and_loaded_then_are_the_same(tmp_path, rows, streaming):
    assert write_rows(tmp_path / "x.parquet", rows) == 3
    loaded = load_rows(tmp_path / "x.parquet", streaming=streaming)
    assert loaded.features == FEATURES
    same_rows(list(loaded), rows)


def test_rows_when_in_a_folder_of_splits_then_load_by_split(tmp_path, rows):
    for split, some in (("train", rows[:2]), ("test", rows[2:])):
        (tmp_path / split).mkdir()
        write_rows(tmp_path / split / "part.parquet", some)
    same_rows(list(load_rows(tmp_path)), rows[:2])
    write_rows(tmp_path / "train" / "part.parquet", rows[1:])
    same_rows(list(load_rows(tmp_path)), rows[1:])  # and not what the cache has of this place
    same_rows(list(load_rows(tmp_path, "test")), rows[2:])
    with pytest.raises(FileNotFoundError, match="val"):
        load_rows(tmp_path, "val")


def test_rows_when_saved_by_datasets_and_loaded_then_are_the_same(tmp_path, rows):
    """What `push_to_hub` does: its shards are `to_parquet` files."""
    write_rows(tmp_path / "x.parquet", rows)
    load_rows(tmp_path / "x.parquet").to_parquet(tmp_path / "y.parquet")
    same_rows(list(load_rows(tmp_path / "y.parquet")), rows)
    same_rows(list(load_dataset("parquet", data_files=str(tmp_path / "y.parquet"), split="train")), rows)


def test_write_rows_when_many_then_groups_are_small(tmp_path, rows):
    """A viewer reads a group at a time."""
    import pyarrow.parquet as pq

    write_rows(tmp_path / "x.parquet", (make_row(str(number)) for number in range(250)))
    groups = pq.ParquetFile(tmp_path / "x.parquet").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)][:3] == [100, 100, 50]


def test_write_rows_when_a_row_fails_then_leaves_the_file_as_it_was(tmp_path, rows):
    path = tmp_path / "x.parquet"
    write_rows(path, rows)
    before = path.read_bytes()

    def broken():
        yield make_row()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        write_rows(path, broken())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.parquet"]


def test_load_rows_when_the_columns_are_others_then_says_so(tmp_path):
    Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"expected rows with the columns id, source.*got text"):
        load_rows(tmp_path / "x.parquet")


def test_caption_texts_when_kinds_are_given_then_takes_those():
    row = {"captions": [{"kind": "human", "text": "a"}, {"kind": "geometry", "text": "b"}]}
    assert caption_texts(row) == ["a", "b"]
    assert caption_texts(row, ["geometry"]) == ["b"]


def unknown(id="unknown", value=0.0):
    return make_row(id, poses=[np.full((24, 3), value)], pose_mask=[[False] * 24])


def test_batch_when_nobody_knows_a_pose_then_its_words_are_learnt_and_nothing_of_the_pose(processor, model):
    collator = ChatPoseCollator(processor)
    head = list(model.pose_head.parameters())
    batch = collator([unknown()])
    assert (batch["labels"] == model.config.pose_token_id).sum() == 1
    outputs = model(**batch)
    assert outputs.ce_loss.isfinite()
    assert outputs.ce_loss > 0
    torch.testing.assert_close(outputs.loss, model.config.ce_loss_weight * outputs.ce_loss, rtol=0, atol=0)
    assert outputs.pose_loss == 0
    gradients = torch.autograd.grad(outputs.loss, head)
    assert all((gradient == 0).all() for gradient in gradients)
    assert torch.equal(model(**collator([unknown(value=0.7)])).loss, outputs.loss)


def test_batch_when_one_pose_of_two_is_unknown_then_the_other_has_all_of_the_pose_loss(processor, model):
    """It is no pose of the mean either."""
    collator = ChatPoseCollator(processor)
    alone = model(**collator([make_row()])).pose_loss
    assert alone > 0
    for rows in ([unknown(), make_row()], [make_row(), unknown()]):
        batch = collator(rows)
        torch.testing.assert_close(model(**batch).pose_loss, alone, rtol=1e-5, atol=1e-6)
        assert (batch["pose_mask"] > 0).any(-1).sum() == 1


def test_rows_when_a_pose_is_unknown_then_are_stored_as_such(tmp_path):
    write_rows(tmp_path / "x.parquet", [unknown()])
    (row,) = load_rows(tmp_path / "x.parquet")
    assert row["pose_mask"] == [[False] * 24]
    validate_row(row)
