"""The processor: `<POSE>`, chat templates, label masks, and what comes out of `generate`."""

import logging

import pytest
import torch
from make_tiny_checkpoint import make_image_processor, make_model, make_processor, make_tokenizer

from chatpose_hf import ChatPoseGenerateOutput, ChatPoseProcessor, vicuna_chat_template
from chatpose_hf.processing_chatpose import SYSTEM_PROMPT
from chatpose_hf.rotations import rotvec_to_rotmat


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(*parts):
    return {**user(*parts), "role": "assistant"}


POSE = {"type": "pose"}


def picture(image):
    return {"type": "image", "image": image}


@pytest.fixture(scope="module")
def chatml():
    return make_processor(chatml=True)


# -- the token --


def test_pose_token_is_one_token_that_decoding_keeps(processor):
    ids = processor.tokenizer("It is <POSE>.", add_special_tokens=False)["input_ids"]
    assert ids.count(processor.pose_token_id) == 1
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "It is <POSE>."
    assert processor.pose_token_id == processor.tokenizer.convert_tokens_to_ids("<POSE>")
    assert processor.pose_token_id != processor.image_token_id


def test_a_base_tokenizer_gets_left_padding_and_a_pad_token(processor, chatml):
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.pad_token == "<unk>"
    assert chatml.tokenizer.pad_token is not None
    ids = processor(text=["USER: a", "USER: a long one"], padding=True, return_tensors="pt")
    assert ids["attention_mask"][0, 0] == 0
    assert ids["attention_mask"][:, -1].tolist() == [1, 1]


def test_save_and_load_keeps_everything(tmp_path):
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    loaded = ChatPoseProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.pose_token_id == processor.pose_token_id
    assert len(loaded.tokenizer) == len(processor.tokenizer)
    assert loaded.chat_template == processor.chat_template
    assert loaded.num_image_tokens == processor.num_image_tokens == 4
    text = "USER: <POSE> ASSISTANT: It is <POSE>.</s>"
    assert loaded.tokenizer(text).input_ids == processor.tokenizer(text).input_ids


# -- templates --


def test_vicuna_template_by_hand(processor, images):
    chat = [user(picture(images[0]), "q1"), assistant("It is ", POSE, "."), user("q2")]
    expected = f"{SYSTEM_PROMPT} USER: <image>\nq1 ASSISTANT: It is <POSE>.</s>USER: q2 ASSISTANT:"
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == expected
    assert processor.apply_chat_template(chat) == expected.removesuffix(" ASSISTANT:")
    strings = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert processor.apply_chat_template(strings, add_generation_prompt=True) == "Be brief. USER: hello ASSISTANT:"


def test_images_stand_where_they_are_put(processor, images):
    chat = [user("before ", picture(images[0]), "after"), assistant("a"), user(picture(images[1]), "q")]
    text = processor.apply_chat_template(chat)
    assert "USER: before <image>\nafter ASSISTANT:" in text
    assert "</s>USER: <image>\nq" in text


def test_pose_in_history_is_text_only_when_an_answer_is_asked_for(processor):
    template = vicuna_chat_template(system_prompt="S", pose_in_history="[POSE]")
    chat = [user("a <POSE>"), assistant("It is <POSE> ."), user("b"), assistant("<POSE> <POSE> <POSE>"), user("c")]
    asked = processor.apply_chat_template(chat, template, add_generation_prompt=True)
    assert asked == "S USER: a <POSE> ASSISTANT: It is [POSE] .</s>USER: b ASSISTANT: [POSE][POSE][POSE]</s>" + (
        "USER: c ASSISTANT:"
    )
    assert "It is <POSE> .</s>" in processor.apply_chat_template(chat, template)


def test_a_base_that_knows_only_strings_keeps_its_template(chatml, images):
    chat = [user(picture(images[0]), "q"), assistant("It is ", POSE, ".")]
    text = chatml.apply_chat_template(chat, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\n<image>\nq<|im_end|>\n<|im_start|>assistant\nIt is <POSE>.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_base_template_without_end_token_is_replaced(caplog):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        processor = ChatPoseProcessor(make_image_processor(), tokenizer, patch_size=14)
    assert processor.chat_template == vicuna_chat_template()


def test_wrong_roles_and_kinds_are_refused(processor):
    with pytest.raises(ValueError, match="expected the roles system"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="expected a text, got None in message 0 of row 0"):
        processor.apply_chat_template([user({"type": "text"})])
    for nothing in ([], {}, None, "words", [[]], [None], [{"role": "user"}], [{"role": "user", "content": ["a"]}]):
        with pytest.raises(ValueError, match=r"expected a chat|expected `role` and `content`"):
            processor.apply_chat_template(nothing)
    for nothing in ([], [None], 3):
        with pytest.raises(ValueError, match="expected a text or a list"):
            processor(text=nothing)
    with pytest.raises(ValueError, match="half of a character"):
        processor(text=["words", "\ud800"])
    with pytest.raises(ValueError, match="got 'video' in message 0 of row 1"):
        processor.apply_chat_template([[user("a")], [user({"type": "video"})]])


def test_one_call_makes_inputs_from_chats(processor, images):
    chats = [[user(picture(images[0]), "q")], [user("only words")]]
    batch = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [4, 0]
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    same = processor(text=texts, images=[[images[0]], []], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == same["input_ids"].tolist()
    assert "image" in chats[0][0]["content"][0]  # the caller's messages are left as they were


# -- label masks --


def masked_texts(processor, chats, **kwargs):
    batch = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
        **kwargs,
    )
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True):
        kept = torch.where(mask.bool(), ids, -1).tolist()
        runs = "".join(" " if i < 0 else f"{i}," for i in kept).split()
        rows.append([processor.tokenizer.decode([int(i) for i in run.split(",") if i]).strip() for run in runs])
    return batch, rows


def test_masks_keep_answers_and_their_ends(processor):
    """The test vector of the original's masking: system USER: a ASSISTANT: b</s>USER: c ASSISTANT: d</s>."""
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    _, rows = masked_texts(processor, [chat])
    assert rows == [["b</s>", "d</s>"]]


def test_masks_with_pictures_padding_and_poses(processor, images):
    chats = [
        [
            user(picture(images[0]), picture(images[1]), "a"),
            assistant("b ", POSE),
            user(picture(images[2])),
            assistant("d"),
        ],
        [user("a question of some length <POSE>"), assistant(POSE, " ", POSE)],
        [user("no answer")],
    ]
    batch, rows = masked_texts(processor, chats)
    assert rows == [["b <POSE></s>", "d</s>"], ["<POSE> <POSE></s>"], []]
    assert not (batch["assistant_masks"].bool() & ~batch["attention_mask"].bool()).any()
    labels = batch["input_ids"].masked_fill(batch["assistant_masks"] == 0, -100)
    assert (labels == processor.pose_token_id).sum(-1).tolist() == [1, 2, 0]


def test_masks_with_a_base_template(chatml, images):
    chats = [[user(picture(images[0]), "a"), assistant("b"), user("c"), assistant("d ", POSE)]]
    _, rows = masked_texts(chatml, chats)
    assert rows == [["b<|im_end|>", "d <POSE><|im_end|>"]]


def test_masks_without_tensors_are_lists(processor):
    output = processor.apply_chat_template(
        [user("a"), assistant("b")], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = output["input_ids"][0], output["assistant_masks"][0]
    assert len(mask) == len(ids)
    assert processor.tokenizer.decode([i for i, kept in zip(ids, mask, strict=True) if kept]) == " b</s>"


def test_masks_refuse_a_truncated_row_and_a_template_that_cannot_tell(processor):
    chat = [user("a long question about a pose"), assistant("b")]
    with pytest.raises(ValueError, match="truncation cut it"):
        masked_texts(processor, [chat], truncation=True, max_length=12)
    rotating = "{% for m in messages %}{{ loop.length ~ m['role'] }}{% endfor %}{{ 'x' if add_generation_prompt }}"
    with pytest.raises(ValueError, match="cannot find the answer in message 1 of row 0"):
        masked_texts(processor, [chat], chat_template=rotating)
    with pytest.raises(ValueError, match="needs `tokenize=True` and `return_dict=True`"):
        processor.apply_chat_template(chat, return_assistant_tokens_mask=True)


# -- counts --


@pytest.mark.parametrize(
    ("texts", "rows_of_images", "message"),
    [
        (["<image> a", "b"], [[], [0]], "got 0 pictures for 1 placeholders in row 0"),
        (["<image> a", "b"], [[0], [0]], "got 1 pictures for 0 placeholders in row 1"),
        (["<image> a", "b"], [[0]], "a list of pictures for each of the 2 texts, got 1 lists"),
        (["<image> a", "<image> b"], [0], r"got 1 pictures for 2 placeholders \(1 in row 0, 1 in row 1\)"),
        (["<image> a"], None, "got 0 pictures for 1 placeholders"),
    ],
)
def test_pictures_and_placeholders_must_agree(processor, images, texts, rows_of_images, message):
    pick = lambda row: [images[i] for i in row] if isinstance(row, list) else images[row]  # noqa: E731
    given = None if rows_of_images is None else [pick(row) for row in rows_of_images]
    with pytest.raises(ValueError, match=message):
        processor(text=texts, images=given)


def test_poses_become_matrices_in_order(processor):
    poses = torch.randn(3, 24, 3)
    batch = processor(
        text=["<POSE> and <POSE>", "none", "<POSE>"],
        poses=[[poses[0].tolist(), poses[1]], [], [poses[2]]],
        padding=True,
    )
    torch.testing.assert_close(batch["pose_labels"], rotvec_to_rotmat(poses))
    assert processor(text="none", poses=[])["pose_labels"].shape == (0, 24, 3, 3)


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        ([[], []], "got 0 poses for 1 tokens in row 0"),
        ([[torch.zeros(24, 3)], [torch.zeros(24, 3)]], "got 1 poses for 0 tokens in row 1"),
        ([[torch.zeros(24, 3)]], "a list of poses for each of the 2 texts, got 1 lists"),
        ([[torch.full((24, 3), 1e30)], []], "finite angles"),
        ([[["a"]], []], "expected poses as axis-angle"),
        (3, "expected a list of poses for each of the 2 texts, got 3"),
        ([[torch.zeros(72)], []], r"expected poses as axis-angle of shape \(joints, 3\), got \(72,\)"),
    ],
)
def test_poses_and_tokens_must_agree(processor, poses, message):
    with pytest.raises(ValueError, match=message):
        processor(text=["It is <POSE>", "none"], poses=poses, padding=True)


# -- replies --


def test_post_process_by_hand(processor):
    rotvecs = torch.zeros(2, 24, 3)
    rotvecs[0, 0, 0], rotvecs[1, 23, 2] = 0.5, -0.25
    answer = processor.tokenizer("It is <POSE> and <POSE>.</s>", add_special_tokens=False, return_tensors="pt")
    sequences = torch.cat([torch.full((1, 3), 7), answer["input_ids"]], dim=1).repeat(2, 1)
    sequences[0, 3:] = processor.tokenizer.pad_token_id
    output = ChatPoseGenerateOutput(
        sequences=sequences,
        pose_rotmats=rotvec_to_rotmat(rotvecs),
        pose_sequence_index=torch.tensor([1, 1]),
        pose_token_positions=torch.tensor([5, 7]),
        prompt_length=3,
    )
    silent, reply = processor.post_process_poses(output)
    assert silent == {"text": "", "poses": []}
    assert reply["text"] == "It is <POSE> and <POSE>."
    first, second = reply["poses"]
    assert first["theta"].shape == (72,)
    torch.testing.assert_close(first["theta"][:3], torch.tensor([0.5, 0.0, 0.0]))
    torch.testing.assert_close(second["theta"][-3:], torch.tensor([0.0, 0.0, -0.25]))
    for pose, rotvec in zip(reply["poses"], rotvecs, strict=True):
        torch.testing.assert_close(pose["global_orient_rotvec"], rotvec[:1])
        torch.testing.assert_close(pose["body_pose_rotvec"], rotvec[1:])
        torch.testing.assert_close(pose["global_orient_rotmat"], rotvec_to_rotmat(rotvec[:1]))
        torch.testing.assert_close(pose["body_pose_rotmat"], rotvec_to_rotmat(rotvec[1:]))


def test_post_process_wants_the_dict_output(processor):
    model = make_model(processor)
    tokens = model.generate(**processor(text="USER: a", return_tensors="pt"), max_new_tokens=2)
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        processor.post_process_poses(tokens)
