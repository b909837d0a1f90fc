"""The collator: rows to batches, exact to the number; what is cut, what is left out, and that a Trainer takes it."""

import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from make_tiny_checkpoint import make_model, make_processor
from PIL import Image
from test_data_rows import make_row
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from chatpose_hf.collator import ChatPoseCollator, read_report
from chatpose_hf.data.prompts import make_parts
from chatpose_hf.data.rows import load_rows, write_rows
from chatpose_hf.processing_chatpose import SYSTEM_PROMPT
from chatpose_hf.rotations import rot6d_to_rotmat, rotvec_to_rotmat


def poses(count, seed):
    return (0.4 * np.random.default_rng(seed).standard_normal((count, 24, 3))).astype(np.float32).tolist()


def masks(count, num_joints=24):
    return [[joint < num_joints for joint in range(24)] for _ in range(count)]


def photo(seed=0, size=(40, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return {"bytes": buffer.getvalue(), "path": None}


def chat(*texts):
    """Question, answer, question, ...: `<image>` and `<POSE>` in them become parts."""
    messages = []
    for index, text in enumerate(texts):
        images = [{"type": "image", "text": None}] * text.count("<image>")
        role = "assistant" if index % 2 else "user"
        messages.append({"role": role, "content": images + make_parts(text.replace("<image>", ""))})
    return messages


def text_row(id="text", count=1, answer=None, seed=1, **changes):
    answer = answer or ("It is" + " <POSE>" * count + ".")
    row = make_row(id, task="text_to_pose", messages=chat("He raises the left arm.", answer), images=[])
    return {**row, "poses": poses(count, seed), "pose_mask": masks(count), **changes}


def chat_row(id="chat", *texts, **changes):
    """Words alone."""
    messages = chat(*(texts or ("Hi.", "The person.", "And?", "The left arm.")))
    return make_row(id, task="vqa", messages=messages, images=[], poses=[], pose_mask=[], **changes)


def picture_row(id="picture", count=1, num_images=1, seed=2, **changes):
    texts = ("<image>" * num_images + "The pose?", "Sure," + " <POSE>" * count + ".")
    images = [encoded(photo(seed + index)) for index in range(num_images)]
    row = make_row(id, messages=chat(*texts), images=images)
    return {**row, "poses": poses(count, seed), "pose_mask": masks(count, 22), **changes}


def make_rows():
    """All kinds in one batch: 0, 1 and 3 poses, 0, 1 and 2 pictures, one and two turns."""
    return [
        picture_row(),
        chat_row(),
        text_row(count=3),
        picture_row("two pictures", count=2, num_images=2, seed=5),
        make_row(
            "second turn",
            messages=chat("<image>Who?", "A person.", "The pose, and <image>?", "It is <POSE>."),
            images=[encoded(photo(8)), encoded(photo(9))],
            poses=poses(1, 8),
            pose_mask=masks(1, 3),
        ),
    ]


@pytest.fixture(scope="module")
def collator(processor):
    return ChatPoseCollator(processor)


# -- the tensors --


def tokens(processor, pieces):
    """Token ids and labels of pieces of text, tokenised one by one: (text, whether it is to be learnt)."""
    ids, labels = [1], [-100]  # <s>
    for text, is_label in pieces:
        piece = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if is_label else [-100] * len(piece)
    return ids, labels


def test_batch_then_is_exactly_what_the_rows_say(processor, collator):
    rows = [picture_row(), chat_row(), text_row(count=3)]
    batch = collator(rows)
    expected = [
        tokens(
            processor,
            [
                (f"{SYSTEM_PROMPT} USER: <image><image><image><image>\nThe pose? ASSISTANT:", False),
                (" Sure, <POSE>.</s>", True),
            ],
        ),
        tokens(
            processor,
            [
                (f"{SYSTEM_PROMPT} USER: Hi. ASSISTANT:", False),
                (" The person.</s>", True),
                ("USER: And? ASSISTANT:", False),
                (" The left arm.</s>", True),
            ],
        ),
        tokens(
            processor,
            [
                (f"{SYSTEM_PROMPT} USER: He raises the left arm. ASSISTANT:", False),
                (" It is <POSE> <POSE> <POSE>.</s>", True),
            ],
        ),
    ]
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "pixel_values", "pose_labels", "pose_mask"}
    longest = max(len(ids) for ids, _ in expected)
    assert len({len(ids) for ids, _ in expected}) == 3  # so that there is padding to look at
    for row, (ids, labels) in enumerate(expected):
        rest = longest - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [processor.tokenizer.pad_token_id] * rest
        assert batch["labels"][row].tolist() == labels + [-100] * rest
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * rest
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].dtype == torch.int64
    targets = rotvec_to_rotmat(torch.tensor(rows[0]["poses"] + rows[2]["poses"]))
    torch.testing.assert_close(batch["pose_labels"], targets, atol=0, rtol=0)
    assert batch["pose_labels"].dtype == torch.float32
    assert batch["pose_mask"].tolist() == [[1] * 22 + [0] * 2] + [[1] * 24] * 3
    assert batch["pose_mask"].dtype == torch.int
    assert batch["pixel_values"].shape == (1, 3, 28, 28)


def test_poses_and_pictures_of_all_rows_then_stand_in_row_major_order(processor, collator):
    rows = make_rows()
    batch = collator(rows)
    wanted = rotvec_to_rotmat(torch.tensor([pose for row in rows for pose in row["poses"]]))
    torch.testing.assert_close(batch["pose_labels"], wanted, atol=0, rtol=0)
    assert batch["pose_mask"].tolist() == [[int(value) for value in mask] for row in rows for mask in row["pose_mask"]]
    assert (batch["labels"] == processor.pose_token_id).sum(-1).tolist() == [1, 0, 3, 2, 1]
    seeds = [2, 5, 6, 8, 9]
    pictures = processor.image_processor([photo(seed) for seed in seeds], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], pictures, atol=0, rtol=0)
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [4, 0, 0, 8, 8]


def test_batch_without_poses_then_has_one_masked_slot(model, collator):
    batch = collator([chat_row("a"), chat_row("b")])
    torch.testing.assert_close(batch["pose_labels"], torch.eye(3).repeat(1, 24, 1, 1), atol=0, rtol=0)
    assert batch["pose_mask"].tolist() == [[0] * 24]
    assert batch["pose_mask"].dtype == torch.int
    assert "pixel_values" not in batch
    assert model(**batch).pose_loss == 0


def test_a_base_with_its_own_template_then_gives_its_answers_as_labels():
    processor = make_processor(chatml=True)
    batch = ChatPoseCollator(processor)([text_row(), chat_row()])
    answers = [
        processor.tokenizer.decode(labels[labels != -100], clean_up_tokenization_spaces=False)
        for labels in batch["labels"]
    ]
    assert answers == ["It is <POSE>.<|im_end|>", "The person.<|im_end|>The left arm.<|im_end|>"]


# -- pictures --


def test_pictures_however_they_are_given_then_are_the_same(collator, tmp_path):
    image = photo(3)
    image.save(tmp_path / "photo.png")
    forms = [
        image,
        Image.open(tmp_path / "photo.png"),  # not yet decoded
        encoded(image),
        {**encoded(image), "path": "name in an archive.png"},
        {"bytes": None, "path": str(tmp_path / "photo.png")},
        {"path": str(tmp_path / "photo.png")},
        {"bytes": encoded(image)["bytes"]},
    ]
    batch = collator([picture_row(str(index), images=[form]) for index, form in enumerate(forms)])
    for pixel_values in batch["pixel_values"]:
        torch.testing.assert_close(pixel_values, batch["pixel_values"][0], atol=0, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_pictures_of_any_mode_then_are_read_as_rgb(collator, mode):
    image = photo(4).convert(mode)
    batch = collator([picture_row("a", images=[image]), picture_row("b", images=[encoded(image)])])
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
    torch.testing.assert_close(batch["pixel_values"][0], batch["pixel_values"][1], atol=0, rtol=0)


def test_a_telephones_photo_then_stands_upright(collator):
    image = photo(6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    batch = collator(
        [
            picture_row("turned", images=[encoded(image, exif=exif)]),
            picture_row("upright", images=[image.transpose(Image.Transpose.ROTATE_270)]),
            picture_row("lying", images=[image]),
        ]
    )
    torch.testing.assert_close(batch["pixel_values"][0], batch["pixel_values"][1], atol=0, rtol=0)
    assert not torch.equal(batch["pixel_values"][1], batch["pixel_values"][2])


@pytest.fixture
def every_warning():
    """torch gives some of its warnings once a process only: which test meets them would depend on the order."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def test_poses_as_arrays_then_are_as_good(collator, every_warning):
    """As the readers of motion files and the makers of synthetic people give them."""
    row = text_row(count=2)
    given = {**row, "poses": [np.array(pose, dtype=np.float32) for pose in row["poses"]]}
    for name, value in collator([row]).items():
        torch.testing.assert_close(collator([given])[name], value, atol=0, rtol=0)


def test_masks_of_numpys_booleans_then_are_as_good(collator):
    row = picture_row(count=2)
    given = {**row, "pose_mask": [list(np.array(mask)) for mask in row["pose_mask"]]}
    for name, value in collator([row]).items():
        torch.testing.assert_close(collator([given])[name], value, atol=0, rtol=0)


@pytest.mark.parametrize("decode", [False, True])
def test_rows_of_a_dataset_then_are_the_same_as_the_written(collator, tmp_path, decode):
    rows = make_rows()
    write_rows(tmp_path / "rows.parquet", rows)
    stored = load_rows(tmp_path / "rows.parquet", decode=decode)
    batch = collator(list(stored))
    for name, value in collator(rows).items():
        torch.testing.assert_close(batch[name], value, atol=0, rtol=0)


# -- neighbours, and the model's loss --


def test_a_row_alone_then_has_the_numbers_it_has_in_a_batch(model, collator):
    rows = make_rows()
    batch = collator(rows)
    together = model(**batch)
    pose = image = 0
    for index, row in enumerate(rows):
        alone = collator([row])
        length = alone["input_ids"].shape[1]
        assert alone["attention_mask"].all()
        for name in ("input_ids", "labels"):
            torch.testing.assert_close(alone[name][0], batch[name][index, :length])
        if row["images"]:
            pictures = batch["pixel_values"][image : image + len(row["images"])]
            torch.testing.assert_close(alone["pixel_values"], pictures, atol=0, rtol=0)
        if row["poses"]:
            for name in ("pose_labels", "pose_mask"):
                torch.testing.assert_close(alone[name], batch[name][pose : pose + len(row["poses"])], atol=0, rtol=0)
        output = model(**alone)
        torch.testing.assert_close(output.logits[0], together.logits[index, :length], atol=1e-4, rtol=0)
        poses_in_batch = together.pose_rotmats[pose : pose + len(row["poses"])]
        torch.testing.assert_close(output.pose_rotmats, poses_in_batch, atol=1e-4, rtol=0)
        pose += len(row["poses"])
        image += len(row["images"])


def naive_loss(model, processor, rows):
    """Row by row and token by token, from the row's words: no batch, no padding, no collator."""
    ce, errors = [], []
    for row in rows:
        text, images = SYSTEM_PROMPT, iter(row["images"])
        spans = []
        for index, message in enumerate(row["messages"]):
            words = "".join(
                {"image": "<image>\n", "pose": "<POSE>"}.get(part["type"], part["text"]) for part in message["content"]
            )
            if message["role"] == "user":
                text += f"{'' if index else ' '}USER: {words} ASSISTANT:"
            else:
                spans.append((len(text), len(text) + len(f" {words}</s>")))
                text += f" {words}</s>"
        pictures = [Image.open(io.BytesIO(image["bytes"])) for image in images]
        inputs = processor(text=text, images=pictures or None, return_tensors="pt")
        places = processor.tokenizer(text, return_offsets_mapping=True)
        answer_ids = [
            token
            for token, (start, end) in zip(places["input_ids"], places["offset_mapping"], strict=True)
            if any(begin <= start < end <= stop for begin, stop in spans)
        ]
        output = model(input_ids=inputs["input_ids"], pixel_values=inputs.get("pixel_values"))
        ids = inputs["input_ids"][0]
        # Answers alone hold `</s>`: what is learnt is what stands between a colon and the next.
        learnt, is_answer = [], False
        header = processor.tokenizer(" ASSISTANT:", add_special_tokens=False)["input_ids"]
        for position in range(len(ids)):
            if is_answer:
                learnt.append(position)
                is_answer = ids[position] != processor.tokenizer.eos_token_id
            else:
                is_answer = ids[position + 1 - len(header) : position + 1].tolist() == header
        assert ids[learnt].tolist() == answer_ids
        targets = iter(zip(row["poses"], row["pose_mask"], strict=True))
        for position in learnt:
            ce.append(-output.logits[0, position - 1].log_softmax(-1)[ids[position]])
            if ids[position] == processor.pose_token_id:
                pose, mask = next(targets)
                rotmats = rot6d_to_rotmat(model.pose_head(output.last_hidden_state[0, position - 1]))
                difference = (rotmats - rotvec_to_rotmat(torch.tensor(pose))).abs().mean((-2, -1))
                body = torch.stack([difference[joint] for joint in range(1, 24) if mask[joint]]).mean()
                errors.append(body + (difference[0] if mask[0] else 0.0))
        assert next(targets, None) is None
    return torch.stack(ce).mean(), torch.stack(errors).mean()


def test_the_models_loss_of_a_batch_then_is_the_naive_one(model, processor, collator):
    rows = make_rows()
    output = model(**collator(rows))
    ce_loss, pose_loss = naive_loss(model, processor, rows)
    torch.testing.assert_close(output.ce_loss, ce_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.pose_loss, pose_loss, atol=1e-5, rtol=1e-5)


# -- rows that are too long --


def length_of(processor, row):
    return ChatPoseCollator(processor)([row])["input_ids"].shape[1]


@pytest.mark.parametrize("cut", [1, 7])
def test_max_length_when_a_chat_is_longer_then_cuts_its_tail_and_reports_it(processor, cut):
    long = chat_row("long", "Hi.", "The person. " * 6, "And?", "It is.")
    whole = ChatPoseCollator(processor)([long])
    length = whole["input_ids"].shape[1]
    batch = ChatPoseCollator(processor, max_length=length - cut, report_rows=True)([long, chat_row("short", "a", "b")])
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].shape == (2, length - cut)
        torch.testing.assert_close(batch[name][0], whole[name][0, :-cut])
    assert read_report(batch["row_report"]) == {"rows": ["long", "short"], "skipped": [], "truncated": ["long"]}


def test_max_length_when_a_row_just_fits_then_cuts_nothing(processor):
    row = picture_row()
    length = length_of(processor, row)
    batch = ChatPoseCollator(processor, max_length=length, report_rows=True)([row])
    assert batch["input_ids"].shape[1] == length
    assert read_report(batch["row_report"])["truncated"] == []


def test_max_length_when_pictures_and_poses_come_before_the_cut_then_they_stay(model, processor):
    row = picture_row(messages=chat("<image>The pose?", "It is <POSE>. The person raises the left arm."))
    length = length_of(processor, row)
    batch = ChatPoseCollator(processor, max_length=length - 3, report_rows=True)([row])
    assert read_report(batch["row_report"])["truncated"] == ["picture"]
    assert batch["pose_labels"].shape[0] == batch["pixel_values"].shape[0] == 1
    assert model(**{name: value for name, value in batch.items() if name != "row_report"}).loss.isfinite()


def too_long_rows(processor):
    """Row, how many tokens must go at least for it to be bad, and what would be lost."""
    pose_last = text_row(count=2)
    tail = len(processor.tokenizer(".</s>", add_special_tokens=False)["input_ids"])
    image_late = make_rows()[4]
    image_late = {**image_late, "messages": chat("<image>Who?", "A person.", "And <image>?", "None."), "poses": []}
    image_late["pose_mask"] = []
    after_image = len(processor.tokenizer("\nAnd ? ASSISTANT: None.</s>", add_special_tokens=False)["input_ids"])
    answer = chat_row("answer", "Hi. What is the person doing?", "It is.")
    words = len(processor.tokenizer(" It is.</s>", add_special_tokens=False)["input_ids"])
    return {
        "a pose": (pose_last, tail + 1),
        "an image": (image_late, after_image + 1),
        "all of the answer": (answer, words),
    }


@pytest.mark.parametrize("lost", ["a pose", "an image", "all of the answer"])
def test_max_length_when_it_would_cut_more_than_words_then_the_row_is_bad(processor, lost):
    row, least = too_long_rows(processor)[lost]
    length = length_of(processor, row)
    ChatPoseCollator(processor, max_length=length - least + 1)([row])
    message = rf"{row['id']}.*it has {length} tokens, and `max_length={length - least}` would cut {lost};"
    with pytest.raises(ValueError, match=message):
        ChatPoseCollator(processor, max_length=length - least)([row])


def test_max_length_when_it_would_cut_everything_then_all_is_named(processor):
    with pytest.raises(ValueError, match="would cut an image and a pose and all of the answer"):
        ChatPoseCollator(processor, max_length=10)([picture_row()])


# -- bad rows --


class LazyDamaged:
    """A picture that PIL opened and whose rest is missing: it says so when its pixels are wanted."""

    def __new__(cls):
        return Image.open(io.BytesIO(encoded(photo(1, (64, 64)))["bytes"][:3000]))


BAD_ROWS = {
    "no row": (None, "expected the fields id, source"),
    "missing field": ({"id": "bad"}, "expected the fields id, source"),
    "no id": (text_row(id=""), "`id`: expected a text"),
    "poses missing": (text_row("bad", poses=[], pose_mask=[]), "`poses`: expected one for each pose part"),
    "NaN": (text_row("bad", poses=[[[float("nan")] * 3] * 24]), "`poses`: expected finite numbers"),
    "answer missing": (chat_row("bad", "Hi."), "user and assistant in turn"),
    "no picture": (picture_row("bad", images=[{"bytes": b"no picture", "path": None}]), "its picture is no picture"),
    "named": (picture_row("bad", images=[{"bytes": b"no picture", "path": "a/b.png"}]), "a/b.png is no picture"),
    "half a picture": (
        picture_row("bad", images=[{"bytes": encoded(photo(1))["bytes"][:2000], "path": None}]),
        "its picture is a damaged picture",
    ),
    "half a picture, opened": (picture_row("bad", images=[LazyDamaged()]), "truncated"),
    "missing file": (picture_row("bad", images=[{"bytes": None, "path": "/nowhere/a.png"}]), "/nowhere/a.png"),
    "folder": (picture_row("bad", images=[{"bytes": None, "path": "/"}]), "'/'"),
    "narrow": (picture_row("bad", images=[encoded(photo(1, (30, 1)))]), "too narrow"),
    "too long": (text_row("bad", answer="The person. " * 200 + "It is <POSE>."), "would cut a pose"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row_when_told_to_stop_then_it_is_named_with_its_fault(processor, kind):
    row, fault = BAD_ROWS[kind]
    collator = ChatPoseCollator(processor, max_length=200)
    with pytest.raises(ValueError, match=r"cannot train on row .*`on_bad_row=skip`") as caught:
        collator([text_row("good"), row, text_row("good too")])
    assert fault in str(caught.value)
    assert f"row {row['id'] if row else None!r}" in str(caught.value)
    assert "good" not in str(caught.value)
    assert isinstance(caught.value.__cause__, (ValueError, OSError))


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row_when_told_to_skip_then_the_others_are_the_batch(processor, kind):
    row, fault = BAD_ROWS[kind]
    collator = ChatPoseCollator(processor, max_length=200, on_bad_row="skip", report_rows=True)
    good = [picture_row("one"), text_row("two", count=3)]
    batch = collator([good[0], row, good[1]])
    report = read_report(batch.pop("row_report"))
    assert report["rows"] == ["one", "two"]
    assert report["truncated"] == []
    [[name, reason]] = report["skipped"]
    assert name == (str(row["id"]) if row else "None")
    assert fault in reason
    for key, value in ChatPoseCollator(processor)(good).items():
        torch.testing.assert_close(batch[key], value, atol=0, rtol=0)


WILD_ROWS = {
    "a mask that is a number": text_row("wild", pose_mask=[24]),
    "a mask that is None": text_row("wild", pose_mask=[None]),
    "picture bytes that are a text": picture_row("wild", images=[{"bytes": "iVBORw0KGgo=", "path": None}]),
}


@pytest.mark.parametrize("kind", WILD_ROWS)
def test_bad_row_of_wrong_types_then_is_named_or_skipped_like_any(processor, kind):
    row = WILD_ROWS[kind]
    with pytest.raises(ValueError, match="cannot train on row 'wild'"):
        ChatPoseCollator(processor)([row])
    batch = ChatPoseCollator(processor, on_bad_row="skip", report_rows=True)([row])
    assert read_report(batch["row_report"])["skipped"][0][0] == "wild"


REFUSES_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.role + ':' }}{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_bad_row_when_the_template_refuses_its_chat_then_is_named_or_skipped_like_any():
    """Gemma's template, for one, raises at a system message."""
    processor = make_processor()
    processor.chat_template = REFUSES_SYSTEM
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    row = text_row("wild")
    assert len(ChatPoseCollator(processor)([row])["input_ids"]) == 1
    row["messages"] = [system, *row["messages"]]
    with pytest.raises(ValueError, match=r"cannot train on row 'wild'.*no system here"):
        ChatPoseCollator(processor)([row])


@pytest.mark.parametrize("rows", [[None], [BAD_ROWS["no picture"][0], BAD_ROWS["NaN"][0]], []])
def test_batch_of_bad_rows_alone_then_gives_zero_loss_and_zero_gradients(processor, rows):
    model = make_model(processor)
    collator = ChatPoseCollator(processor, on_bad_row="skip", report_rows=True)
    batch = collator(rows)
    report = read_report(batch.pop("row_report"))
    assert report["rows"] == []
    assert len(report["skipped"]) == len(rows)
    assert (batch["labels"] == -100).all()
    assert batch["input_ids"].shape == (1, 2)
    output = model(**batch)
    assert output.loss == 0
    output.loss.backward()
    for name, weight in model.named_parameters():
        is_above = "layers.2." in name or "post_layernorm" in name  # of the tower: its output is not used
        assert is_above or weight.grad is not None, name
        assert weight.grad is None or (weight.grad == 0).all(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_bad_row": "warn"}, "expected `on_bad_row` of stop, skip, got 'warn'"),
        ({"max_length": 1}, "expected a `max_length` of at least 2 tokens, got 1"),
        ({"max_length": 0}, "got 0"),
    ],
)
def test_collator_when_a_setting_is_wrong_then_says_which(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        ChatPoseCollator(processor, **arguments)


# -- the report --


def test_read_report_then_gives_ids_of_any_alphabet_back(processor):
    collator = ChatPoseCollator(processor, on_bad_row="skip", report_rows=True, max_length=150)
    long = chat_row("длинный/長い", "Hi.", "The person. " * 60)
    bad = picture_row("schlimm/été 🏃", images=[{"bytes": b"x", "path": "fotos/ñandú.png"}])
    report = collator([text_row('日本/人\n"1"'), long, bad])["row_report"]
    assert report.dtype == torch.uint8
    assert report.ndim == 1
    got = read_report(report.clone())
    assert got.pop("skipped")[0][0] == "schlimm/été 🏃"
    assert got == {"rows": ['日本/人\n"1"', "длинный/長い"], "truncated": ["длинный/長い"]}
    assert "fotos/ñandú.png" in read_report(report)["skipped"][0][1]


def test_read_report_when_an_id_is_no_text_then_still_gives_it(processor):
    collator = ChatPoseCollator(processor, on_bad_row="skip", report_rows=True)
    report = read_report(collator([text_row(id=3), text_row(id="half \ud800")])["row_report"])
    assert [name for name, _ in report["skipped"]] == ["3", "half \ud800"]
    json.dumps(report)


# -- where it is used --


def make_trainer(model, collator, rows, folder, **settings):
    settings = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-2, **settings}
    arguments = TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, data_collator=collator, train_dataset=rows)


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_plain_trainer_then_trains_every_weight_on_the_batches(processor, tmp_path, kind):
    rows = make_rows()
    if kind == "dataset":
        write_rows(tmp_path / "rows.parquet", rows)
        rows = load_rows(tmp_path / "rows.parquet", decode=False)
        assert isinstance(rows, Dataset)
    model = make_model(processor)
    model.model.vision_tower.requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = make_trainer(model, ChatPoseCollator(processor), rows, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    for name, weight in model.named_parameters():
        assert weight.isfinite().all()
        assert torch.equal(weight, before[name]) == (not weight.requires_grad), name


def test_plain_trainer_when_a_batch_has_only_bad_rows_then_its_weights_stay(processor, tmp_path):
    model = make_model(processor)
    rows = [BAD_ROWS["no picture"][0]] * 3
    trainer = make_trainer(model, ChatPoseCollator(processor, on_bad_row="skip"), rows, tmp_path, max_steps=1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 1
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name], atol=0, rtol=0)


def test_batch_of_bad_rows_alone_when_the_trainer_counts_its_tokens_then_the_loss_is_zero(processor, model):
    batch = ChatPoseCollator(processor, on_bad_row="skip")([None])
    count = (batch["labels"][:, 1:] != -100).sum()
    assert model(**batch, num_items_in_batch=count).loss == 0


def test_loader_with_workers_then_gives_the_batches_of_one_without(processor):
    rows = [*make_rows(), BAD_ROWS["no picture"][0]]
    collator = ChatPoseCollator(processor, on_bad_row="skip", report_rows=True)
    batches = [list(DataLoader(rows, 2, collate_fn=collator, num_workers=workers)) for workers in (0, 2)]
    assert len(batches[0]) == len(batches[1]) == 3
    for one, two in zip(*batches, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, atol=0, rtol=0)
    assert read_report(batches[1][2]["row_report"])["skipped"][0][0] == "bad"
