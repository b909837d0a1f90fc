"""The converted checkpoint against what the original code computed with the original one (see the fixture's README)."""

import json

import numpy as np
import pytest
import torch
from conftest import OFFICIAL
from PIL import Image

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.rotations import rot6d_to_rotmat, rotvec_to_rotmat


if not OFFICIAL.is_dir():
    pytest.skip(f"needs the original's fixture at {OFFICIAL}", allow_module_level=True)

GOLDEN = json.loads((OFFICIAL / "golden.json").read_text(encoding="utf-8"))
SAMPLES, BATCHES = GOLDEN["samples"], GOLDEN["batches"]
IMAGE = GOLDEN["meta"]["image_placeholder_id"]
IMAGE_TOKENS = GOLDEN["meta"]["image_tokens"]
# The original's name of each weight -> the module's.
WEIGHTS = (
    ("model.text_hidden_fcs.0.0", "pose_head.linear_1"),
    ("model.text_hidden_fcs.0.2", "pose_head.linear_2"),
    ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
    ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
    ("lm_head", "lm_head"),
    ("model", "model.language_model"),
)


@pytest.fixture(scope="module")
def arrays():
    return np.load(OFFICIAL / "golden.npz")


@pytest.fixture(scope="module")
def official_model(converted):
    return ChatPoseForConditionalGeneration.from_pretrained(converted).eval()


@pytest.fixture(scope="module")
def official_processor(converted):
    return ChatPoseProcessor.from_pretrained(converted)


def load_images(sample):
    return [Image.open(OFFICIAL / "images" / sample["image"])] if sample["image"] else []


def expand(ids, image_token_id):
    """The original's ids with one placeholder an image, as ids with one token a patch."""
    return [new for old in ids for new in ([image_token_id] * IMAGE_TOKENS if old == IMAGE else [old])]


def chat_of(sample):
    """The messages that a user of ours would send for a golden sample."""

    def question(text):
        images = [{"type": "image", "image": image} for image in load_images(sample) if "<image>" in text]
        return {"role": "user", "content": [*images, {"type": "text", "text": text.replace("<image>\n", "")}]}

    if "first_question" not in sample:
        return [question(sample["question"])]
    # What our own reply to the first question says; the template makes the original's `[POSE]` of it.
    first = {"role": "assistant", "content": sample["first_answer_in_history"].replace("[POSE]", "<POSE>")}
    return [question(sample["first_question"]), first, question(sample["question"])]


@pytest.mark.parametrize("name", SAMPLES)
def test_each_sample_alone(name, official_model, official_processor, arrays):
    sample = SAMPLES[name]
    batch = official_processor(text=sample["prompt"], images=load_images(sample) or None, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == expand(sample["input_ids"], official_processor.image_token_id)
    as_chat = official_processor.apply_chat_template(
        chat_of(sample), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert as_chat["input_ids"].tolist() == batch["input_ids"].tolist()

    with torch.no_grad():
        first = official_model(**batch)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(first.last_hidden_state[0, -1].numpy(), arrays[f"{name}.prompt_last_hidden"], **close)
    vocabulary = GOLDEN["meta"]["vocab_size"]
    torch.testing.assert_close(first.logits[0, -1, :vocabulary].numpy(), arrays[f"{name}.prompt_last_logits"], **close)

    output = official_model.generate(**batch, max_new_tokens=64, return_dict_in_generate=True)
    answer = output.sequences[0, output.prompt_length :]
    assert answer.tolist() == sample["generated_ids"]
    assert official_processor.tokenizer.decode(answer) == sample["text"].replace("[SEG]", "<POSE>")
    # Also where the original returned none, because its answer began with the pose.
    assert output.pose_rotmats.shape[0] == 1
    torch.testing.assert_close(output.pose_rotmats[0].numpy(), arrays[f"{name}.pred_rotmat"], atol=1e-5, rtol=0)
    reply = official_processor.post_process_poses(output)[0]
    rotmat = rotvec_to_rotmat(reply["poses"][0]["theta"].reshape(24, 3))
    torch.testing.assert_close(rotmat.numpy(), arrays[f"{name}.pred_rotmat"], atol=1e-5, rtol=0)


def test_all_samples_in_one_left_padded_batch(official_model, official_processor, arrays):
    """Texts and pictures together, which the original could not do."""
    batch = official_processor(
        text=[sample["prompt"] for sample in SAMPLES.values()],
        images=[load_images(sample) for sample in SAMPLES.values()],
        padding=True,
        return_tensors="pt",
    )
    output = official_model.generate(**batch, max_new_tokens=64, return_dict_in_generate=True)
    assert output.pose_sequence_index.tolist() == list(range(len(SAMPLES)))
    for row, (name, sample) in enumerate(SAMPLES.items()):
        answer = output.sequences[row, output.prompt_length :].tolist()
        assert answer[: len(sample["generated_ids"])] == sample["generated_ids"]
        torch.testing.assert_close(output.pose_rotmats[row].numpy(), arrays[f"{name}.pred_rotmat"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients(name, official_model, official_processor, arrays):
    golden = BATCHES[name]
    image_token_id, pad_token_id = official_processor.image_token_id, official_processor.tokenizer.pad_token_id
    rows = [expand(ids, image_token_id) for ids in golden["input_ids"]]
    width = max(len(row) for row in rows)

    def padded(values_of_rows, filler):
        spread = [
            [value for value, old in zip(values, ids, strict=True) for _ in range(IMAGE_TOKENS if old == IMAGE else 1)]
            for values, ids in zip(values_of_rows, golden["input_ids"], strict=True)
        ]
        return torch.tensor([[int(value) for value in row] + [filler] * (width - len(row)) for row in spread])

    images = [Image.open(OFFICIAL / "images" / image) for image in golden["images"] if image]
    pixel_values = official_processor.image_processor(images, return_tensors="pt")["pixel_values"] if images else None
    official_model.zero_grad()
    output = official_model(
        input_ids=torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows]),
        labels=padded(golden["labels"], -100),
        attention_mask=padded(golden["attention_mask"], 0),
        pixel_values=pixel_values,
        pose_labels=rotvec_to_rotmat(torch.from_numpy(arrays[f"batch.{name}.target_axis_angle"])),
    )
    output.loss.backward()
    assert output.ce_loss.item() == pytest.approx(golden["ce_loss"], abs=1e-5)
    assert output.pose_loss.item() == pytest.approx(golden["hmr_loss"], abs=1e-5)
    assert output.loss.item() == pytest.approx(golden["loss"], abs=1e-5)
    pred = output.pose_rotmats.detach().numpy()
    torch.testing.assert_close(pred, arrays[f"batch.{name}.pred_rotmat"], atol=1e-5, rtol=0)

    parameters = dict(official_model.named_parameters())
    assert ("gradients" in golden) == name.endswith("probe")
    for official_name, gradient in golden.get("gradients", {}).items():
        old, new = next(pair for pair in WEIGHTS if official_name.startswith(f"{pair[0]}."))
        grad = parameters[new + official_name.removeprefix(old)].grad
        if gradient["l2_norm"] == 0:  # the projector in a batch without pictures
            assert grad is None or not grad.any()
            continue
        assert grad.norm().item() == pytest.approx(gradient["l2_norm"], rel=1e-4)
        for entry in gradient["entries"]:
            assert grad[tuple(entry["index"])].item() == pytest.approx(entry["value"], rel=1e-3, abs=1e-7)


def test_labels_equal_the_originals(official_processor):
    for sample in SAMPLES.values():
        golden = sample["train_conversation"]
        answer = {"role": "assistant", "content": sample["answer"].replace("[SEG]", "<POSE>")}
        chat = [
            {"role": "system", "content": golden["conversation"].split(" USER: ")[0]},
            *(
                # In the training string the first answer stands as history does in the chat.
                {**message, "content": message["content"].replace("<POSE>", "[POSE]")}
                if message["role"] == "assistant"
                else message
                for message in chat_of(sample)
            ),
            answer,
        ]
        batch = official_processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        ids = batch["input_ids"][0]
        assert ids.tolist() == expand(golden["input_ids"], official_processor.image_token_id)
        labels = ids.masked_fill(batch["assistant_masks"][0] == 0, -100).tolist()
        wanted = [
            label
            for label, old in zip(golden["labels"], golden["input_ids"], strict=True)
            for _ in range(IMAGE_TOKENS if old == IMAGE else 1)
        ]
        assert labels == wanted


def test_parts(official_model, official_processor, arrays):
    pixel_values = official_processor.image_processor(
        Image.open(OFFICIAL / "images" / "wide.png"), return_tensors="pt"
    )
    pixel_values = pixel_values["pixel_values"]
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(pixel_values[0].numpy(), arrays["parts.wide.pixel_values"], **close)
    with torch.no_grad():
        features = official_model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(features[0].numpy(), arrays["parts.wide.projected_features"], **close)
    rot6d = torch.from_numpy(arrays["parts.rot6d.input"])
    torch.testing.assert_close(rot6d_to_rotmat(rot6d).numpy(), arrays["parts.rot6d.rotmat"], **close)
    rotvec = torch.from_numpy(arrays["parts.axis_angle.input"])
    torch.testing.assert_close(rotvec_to_rotmat(rotvec).numpy(), arrays["parts.axis_angle.rotmat"], **close)
