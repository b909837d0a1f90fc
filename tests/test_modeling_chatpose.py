"""The model: what a LLaVA must do, the pose loss, and poses from every way of generating."""

from functools import partial
from inspect import signature

import pytest
import torch
from make_tiny_checkpoint import make_model, make_processor, make_text_model, make_vision_tower
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    TextStreamer,
    TorchAoConfig,
)

from chatpose_hf import ChatPoseForConditionalGeneration, modeling_chatpose
from chatpose_hf.modeling_chatpose import (
    ForcePoseLogitsProcessor,
    PoseStateCollector,
    compute_pose_loss,
    compute_rot6d_norm_loss,
)
from chatpose_hf.rotations import rot6d_to_rotmat, rotvec_to_rotmat


ROW_TEXTS = [
    "USER: <image>\nWhat is the pose? ASSISTANT:",
    "USER: The person raises the left arm. ASSISTANT:",
    "USER: <image>\n<image>\nBoth? The literal <POSE> here is text. ASSISTANT:",
]


class SayPoseAt(LogitsProcessor):
    """Random weights say `<POSE>` at the given steps, and never end."""

    def __init__(self, processor, prompt_length, steps=(1, 4)):
        self.processor, self.prompt_length, self.steps = processor, prompt_length, steps

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.processor.tokenizer.eos_token_id] = -torch.inf
        if input_ids.shape[1] - self.prompt_length in self.steps:
            scores[:] = -torch.inf
            scores[:, self.processor.pose_token_id] = 0
        return scores


@pytest.fixture
def batch(processor, images):
    return processor(text=ROW_TEXTS, images=[images[:1], [], images[1:3]], padding=True, return_tensors="pt")


@pytest.fixture
def text_batch(processor):
    texts = ["USER: What is the pose? ASSISTANT:", "USER: The person raises the left arm. ASSISTANT:"]
    return processor(text=texts, padding=True, return_tensors="pt")


def teacher_forced(model, batch, output, copies=1):
    """One ordinary forward over the finished sequences: what the poses of `generate` must equal."""
    pixel_values = batch.get("pixel_values")
    if pixel_values is not None:
        images_of_rows = pixel_values.split([1, 0, 2])
        pixel_values = torch.cat([images for images in images_of_rows for _ in range(copies)])
    prompt = batch["attention_mask"].repeat_interleave(copies, dim=0)
    answer = torch.ones_like(output.sequences[:, output.prompt_length :])
    labels = output.sequences.clone()
    labels[:, : output.prompt_length] = -100
    return model(
        input_ids=output.sequences,
        attention_mask=torch.cat([prompt, answer], dim=1),
        pixel_values=pixel_values,
        labels=labels,
    )


def assert_poses_match(model, batch, output, copies=1, tolerance=1e-4):
    answers = output.sequences[:, output.prompt_length :]
    is_pose = answers == getattr(model, "func", model).config.pose_token_id
    assert is_pose.sum() > 0
    assert output.pose_rotmats.shape == (is_pose.sum(), 24, 3, 3)
    rows, steps = torch.nonzero(is_pose, as_tuple=True)
    assert output.pose_sequence_index.tolist() == rows.tolist()
    assert output.pose_token_positions.tolist() == (steps + output.prompt_length).tolist()
    expected = teacher_forced(model, batch, output, copies).pose_rotmats
    torch.testing.assert_close(output.pose_rotmats, expected, atol=tolerance, rtol=0)


# -- a LLaVA in every respect --


def test_logits_and_tokens_equal_plain_llava(model, batch):
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    plain = LlavaForConditionalGeneration(LlavaConfig(**settings)).eval()
    report = plain.load_state_dict(model.state_dict(), strict=False)
    assert all(key.startswith("pose_head.") for key in report.unexpected_keys)
    assert not report.missing_keys
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, atol=0, rtol=0)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 2}
    assert model.generate(**batch, **options).tolist() == plain.generate(**batch, **options).tolist()


def test_return_dict_false_gives_a_tuple(model, batch):
    output = model(**batch, return_dict=False)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], model(**batch).logits)


def test_save_and_load_keeps_weights_and_outputs(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = ChatPoseForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits, atol=0, rtol=0)
    torch.testing.assert_close(loaded.pose_head.state_dict(), model.pose_head.state_dict(), atol=0, rtol=0)


def test_published_llava_layout_loads_and_saved_folders_load_as_llava(model, tmp_path):
    model.save_pretrained(tmp_path)
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(str(key).startswith("pose_head.") for key in info["unexpected_keys"])


def test_new_head_starts_at_the_rest_pose_facing_the_camera(processor):
    head = ChatPoseForConditionalGeneration(make_model(processor).config).pose_head
    expected = torch.eye(3).repeat(24, 1, 1)
    expected[0] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(
        rot6d_to_rotmat(head(torch.zeros(2, 32))), expected.repeat(2, 1, 1, 1), atol=1e-6, rtol=0
    )


def test_bfloat16_keeps_the_head_in_float32_and_poses_close(model, text_batch, tmp_path):
    model.save_pretrained(tmp_path)
    half = ChatPoseForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    assert half.pose_head.linear_1.weight.dtype == torch.float32
    labels = text_batch["input_ids"].clone()
    labels[:, -1] = model.config.pose_token_id
    poses = half(**text_batch, labels=labels).pose_rotmats
    assert poses.dtype == torch.float32
    torch.testing.assert_close(poses, model(**text_batch, labels=labels).pose_rotmats, atol=0.3, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            half.pose_head(torch.ones(1, 32)), model.pose_head(torch.ones(1, 32)), atol=1e-6, rtol=0
        )


def test_parts_on_the_disk_give_the_same_poses(model, batch, tmp_path):
    """What `device_map="auto"` does where the model is larger than the devices."""
    model.save_pretrained(tmp_path)
    places = dict.fromkeys([name for name, _ in model.named_children()], "cpu") | {"pose_head": "disk"}
    del places["model"]
    parts = [name for name, _ in model.model.named_children()]
    places |= {f"model.{name}": "disk" if name == "language_model" else "cpu" for name in parts}
    apart = ChatPoseForConditionalGeneration.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert {str(weight.device) for weight in apart.pose_head.parameters()} == {"meta"}
    labels = batch["input_ids"].clone()
    labels[:, -1] = model.config.pose_token_id
    with torch.no_grad():
        torch.testing.assert_close(
            apart(**batch, labels=labels).pose_rotmats, model(**batch, labels=labels).pose_rotmats
        )


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_quantized_to_8_bits_keeps_the_head_in_float32_and_poses_close(model, text_batch, tmp_path, library):
    package = pytest.importorskip(library, reason=f"needs {library}: pip install {library}")
    if library == "torchao":
        settings = TorchAoConfig(package.quantization.Int8WeightOnlyConfig())
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    model.save_pretrained(tmp_path)
    small = ChatPoseForConditionalGeneration.from_pretrained(tmp_path, quantization_config=settings, dtype="bfloat16")
    layer = small.model.language_model.layers[0].mlp.up_proj
    assert type(layer.weight) is not torch.nn.Parameter, "nothing was quantized"
    for name, weight in small.pose_head.named_parameters():
        assert type(weight) is torch.nn.Parameter
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, model.pose_head.get_parameter(name))
    labels = text_batch["input_ids"].clone()
    labels[:, -1] = model.config.pose_token_id
    with torch.no_grad():
        exact = model(**text_batch, labels=labels).pose_rotmats
        rough = small(**text_batch, labels=labels).pose_rotmats
    assert rough.dtype == torch.float32
    # Random weights pass small errors on enlarged; another row's pose is much farther.
    assert (rough - exact).abs().mean() < 0.2 * (exact[0] - exact[1]).abs().mean()


def test_resizing_keeps_old_rows(processor):
    model = make_model(processor)
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(len(before) + 3, pad_to_multiple_of=64)
    torch.testing.assert_close(model.get_input_embeddings().weight[: len(before)], before, atol=0, rtol=0)
    assert model.config.text_config.vocab_size == model.lm_head.weight.shape[0]


# -- starting from a base --


@pytest.mark.parametrize("chatml", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_from_llava_with_towers_keeps_their_weights(chatml, tie, tmp_path):
    processor = make_processor(chatml)
    text_model = make_text_model(vocab_size=len(processor.tokenizer) - 2, tie=tie)
    vision_tower = make_vision_tower()
    text_model.save_pretrained(tmp_path / "text")
    vision_tower.save_pretrained(tmp_path / "vision")
    model = ChatPoseForConditionalGeneration.from_llava(
        processor=processor,
        text_model=str(tmp_path / "text"),
        vision_tower=str(tmp_path / "vision"),
        vision_feature_layer=-1,
    ).eval()
    rows = text_model.config.vocab_size
    assert model.get_input_embeddings().num_embeddings >= len(processor.tokenizer)
    assert model.config.pose_token_id == processor.tokenizer.convert_tokens_to_ids("<POSE>")
    assert model.config.vision_feature_layer == -1  # LLaVA's own fields are set too
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(input_ids=ids).logits[..., :rows], text_model(input_ids=ids).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    assert model.generation_config.eos_token_id is not None
    model.save_pretrained(tmp_path / "chatpose")
    loaded = ChatPoseForConditionalGeneration.from_pretrained(tmp_path / "chatpose").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=0, rtol=0)


def test_from_llava_forgets_how_the_text_model_lay_on_the_disk(processor):
    text_model = make_text_model(vocab_size=len(processor.tokenizer))
    text_model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "a.gguf"}
    model = ChatPoseForConditionalGeneration.from_llava(
        processor=processor, text_model=text_model, vision_tower=make_vision_tower()
    )
    assert "quantization_config" not in model.config.text_config.to_dict()


def test_new_rows_are_the_mean_of_the_old_in_every_run(processor):
    models = []
    for seed in (0, 1):
        text_model = make_text_model(vocab_size=len(processor.tokenizer) - 2)
        torch.manual_seed(seed)
        models.append(
            ChatPoseForConditionalGeneration.from_llava(
                processor=processor, text_model=text_model, vision_tower=make_vision_tower()
            )
        )
    old = text_model.config.vocab_size
    for get in ("get_input_embeddings", "get_output_embeddings"):
        first, second = (getattr(model, get)().weight for model in models)
        assert torch.equal(first, second)
        torch.testing.assert_close(first[old:], first[:old].mean(0).expand_as(first[old:]))


def make_published_llava(folder, processor):
    """A plain LLaVA without a row for `<POSE>`, in the layout of the Hub's checkpoints."""
    settings = make_model(processor).config.to_dict()
    settings = {name: settings[name] for name in ("vision_config", "text_config", "image_token_index")}
    settings["text_config"]["vocab_size"] = len(processor.tokenizer) - 1
    llava = LlavaForConditionalGeneration(LlavaConfig(**settings, image_seq_length=4)).eval()
    llava.save_pretrained(folder)
    return llava


def test_from_llava_with_a_base_keeps_its_weights_and_makes_only_the_head(processor, tmp_path):
    llava = make_published_llava(tmp_path, processor)
    model = ChatPoseForConditionalGeneration.from_llava(str(tmp_path), processor=processor, pose_loss_weight=0.5)
    ids = torch.arange(3, 40)[None]
    rows = llava.config.text_config.vocab_size
    torch.testing.assert_close(model.eval()(input_ids=ids).logits[..., :rows], llava(input_ids=ids).logits)
    assert model.config.model_type == "chatpose"
    assert model.config.pose_loss_weight == 0.5
    assert model.get_input_embeddings().num_embeddings >= len(processor.tokenizer)


def test_from_llava_refuses_a_base_with_missing_weights(processor, tmp_path):
    from safetensors.torch import load_file, save_file

    make_published_llava(tmp_path, processor)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if key.endswith("lm_head.weight"))
    save_file({key: value for key, value in weights.items() if key != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"only the pose head may be missing.*lm_head\.weight"):
        ChatPoseForConditionalGeneration.from_llava(str(tmp_path), processor=processor)


@pytest.mark.parametrize("arguments", [{}, {"base": "a", "text_model": "b", "vision_tower": "c"}, {"text_model": "b"}])
def test_from_llava_wants_one_kind_of_base(processor, arguments):
    with pytest.raises(ValueError, match="expected `base`, or `text_model` and `vision_tower` together"):
        ChatPoseForConditionalGeneration.from_llava(processor=processor, **arguments)


# -- the loss --


def training_batch(processor, poses_per_row=(1, 0, 2)):
    texts = ["USER: q ASSISTANT:" + " It is <POSE>." * count + "</s>" for count in poses_per_row]
    batch = processor(text=texts, padding=True, return_tensors="pt")
    # The first token of a row has nothing before it that could predict it.
    begins = batch["attention_mask"].cumsum(-1) <= 1
    labels = batch["input_ids"].masked_fill(begins, -100)
    targets = rotvec_to_rotmat(
        0.5 * torch.randn(sum(poses_per_row), 24, 3, generator=torch.Generator().manual_seed(5))
    )
    return {**batch, "labels": labels}, targets


def naive_loss(model, batch, targets, masks=None):
    """The definition, token by token and pose by pose, without batching."""
    ce, errors, pose = [], [], 0
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
        output = model(input_ids=ids[None])
        for position in range(1, len(ids)):
            if labels[position] == -100:
                continue
            ce.append(-output.logits[0, position - 1].log_softmax(-1)[labels[position]])
            if labels[position] == model.config.pose_token_id:
                rotmats = rot6d_to_rotmat(model.pose_head(output.last_hidden_state[0, position - 1]))
                difference = (rotmats - targets[pose]).abs()
                mask = torch.ones(24, dtype=torch.bool) if masks is None else masks[pose].bool()
                if mask.any():
                    body = difference[1:][mask[1:]].mean() if mask[1:].any() else 0.0
                    errors.append(body + (difference[0].mean() if mask[0] else 0.0))
                pose += 1
    return torch.stack(ce).mean(), torch.stack(errors).mean()


@pytest.mark.parametrize("use_mask", [False, True])
def test_loss_is_the_papers(model, processor, use_mask):
    batch, targets = training_batch(processor)
    masks = None
    if use_mask:
        masks = (torch.rand(3, 24, generator=torch.Generator().manual_seed(1)) > 0.4).int()
        masks[1] = 0
        targets = torch.where(masks[..., None, None] > 0, targets, torch.nan)
    output = model(**batch, pose_labels=targets, pose_mask=masks)
    ce_loss, pose_loss = naive_loss(model, batch, targets, masks)
    torch.testing.assert_close(output.ce_loss, ce_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.pose_loss, pose_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, ce_loss + 0.1 * pose_loss, atol=1e-5, rtol=1e-5)
    assert output.pose_rotmats.shape == (3, 24, 3, 3)
    assert output.loss.requires_grad
    assert not output.ce_loss.requires_grad


def test_training_puts_no_other_state_through_the_output_layer_and_learns_the_same(model, processor):
    batch, targets = training_batch(processor)
    widths = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[:-1].numel()))
    losses, gradients = [], []
    for is_training in (True, False):
        model.train(is_training).zero_grad()
        output = model(**batch, pose_labels=targets, num_items_in_batch=30)
        output.loss.backward()
        assert (output.logits is None) == is_training
        losses.append(output.loss.detach())
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    hook.remove()
    model.eval()
    assert widths == [(batch["labels"][:, 1:] != -100).sum() + 1, batch["labels"].numel()]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    # Nothing to learn from is no error, and every process reaches the layer.
    model.train()
    nothing = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    model.eval()
    assert nothing.loss == 0
    assert nothing.loss.requires_grad


def test_scores_of_many_states_are_held_in_chunks_and_the_gradient_is_the_same(model, processor, monkeypatch):
    batch, targets = training_batch(processor)
    widths, losses, gradients = [], [], []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(len(output)))
    model.train()
    num_states = (batch["labels"][:, 1:] != -100).sum().item() + 1
    for size in (num_states, 5):
        monkeypatch.setattr(modeling_chatpose, "_SCORES_AT_ONCE", size * model.config.text_config.vocab_size)
        model.zero_grad()
        output = model(**batch, pose_labels=targets, num_items_in_batch=30)
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    hook.remove()
    model.eval()
    whole, chunks = widths[:1], widths[1:]
    assert whole == [num_states]
    assert max(chunks) == 5
    assert sum(chunks) == num_states, "once, for the loss and its gradient"
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_training_keeps_nothing_of_a_frozen_tower(model, batch):
    is_in_tower, kept = [], {True: 0, False: 0}
    tower = model.model.vision_tower
    hooks = [
        tower.register_forward_pre_hook(lambda *_: is_in_tower.append(True)),
        tower.register_forward_hook(lambda *_: is_in_tower.clear()),
    ]

    def keep(tensor):
        kept[bool(is_in_tower)] += tensor.nbytes
        return tensor

    needed = {name: weight.requires_grad for name, weight in tower.named_parameters()}
    model.train()
    tower.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, weight in tower.named_parameters():
        weight.requires_grad_(needed[name])
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    model.eval()
    assert kept[False] > 0
    assert kept[True] == 0


def test_pose_loss_by_hand():
    prediction = torch.eye(3).repeat(1, 24, 1, 1)
    target = prediction.clone()
    target[0, 0] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))  # |difference| sums to 4 over 9 numbers
    target[0, 5] = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    assert compute_pose_loss(prediction, target).item() == pytest.approx(4 / 9 + 4 / 9 / 23)
    only_knee = torch.zeros(1, 24)
    only_knee[0, 5] = 1
    assert compute_pose_loss(prediction, target, only_knee).item() == pytest.approx(4 / 9)
    assert compute_pose_loss(prediction, target, torch.zeros(1, 24)).item() == 0


def test_norm_loss_by_hand():
    rot6d = torch.tensor([[3.0, 0, 0, 0, 0.5, 0], [0, 1, 0, 0, 0, 1], [0, 0, 1, 2, 0, 0]]).expand(2, 3, 6)
    each = [(2**2 + 0.5**2) / 2, 0.0, 0.5]
    torch.testing.assert_close(compute_rot6d_norm_loss(rot6d), torch.full((2,), sum(each) / 3))
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(compute_rot6d_norm_loss(rot6d, mask), torch.tensor([each[0] / 2, 0.0]))


@pytest.mark.parametrize("training", [True, False])
def test_norm_loss_is_part_of_training_and_not_of_evaluation(model, processor, monkeypatch, training):
    batch, targets = training_batch(processor)
    monkeypatch.setattr(model.config, "rot6d_norm_weight", 0.0)
    plain = model.train(training)(**batch, pose_labels=targets)
    monkeypatch.setattr(model.config, "rot6d_norm_weight", 0.25)
    lengths = []
    hook = model.pose_head.register_forward_hook(lambda module, args, rot6d: lengths.append(rot6d[:-1]))
    output = model(**batch, pose_labels=targets)
    hook.remove()
    model.eval()
    added = 0.25 * compute_rot6d_norm_loss(lengths[0]).mean() if training else torch.tensor(0.0)
    torch.testing.assert_close(output.pose_loss, plain.pose_loss + added.detach())
    torch.testing.assert_close(output.loss, plain.loss + model.config.pose_loss_weight * added)


def test_gradient_of_masked_slots_is_zero_even_for_nan_targets(model, processor):
    batch, targets = training_batch(processor)
    masks = torch.ones(3, 24)
    masks[2] = 0
    targets[2] = torch.nan
    model.zero_grad()
    model(**batch, pose_labels=targets, pose_mask=masks).loss.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("give_padding", [False, True])
def test_batch_without_poses_still_reaches_the_head(model, processor, give_padding):
    batch, _ = training_batch(processor, poses_per_row=(0, 0))
    padding = {"pose_labels": torch.zeros(1, 24, 3, 3), "pose_mask": torch.zeros(1, 24, dtype=torch.int)}
    model.zero_grad()
    output = model(**batch, **(padding if give_padding else {}))
    output.loss.backward()
    assert output.pose_loss == 0
    assert output.pose_rotmats.shape[0] == 0
    for weight in model.pose_head.parameters():
        assert weight.grad is not None
        assert (weight.grad == 0).all()


def test_accumulated_batches_give_the_whole_batchs_gradient(model, processor):
    batch, targets = training_batch(processor, poses_per_row=(1, 0, 2, 3))

    def gradient(groups, **counts):
        model.zero_grad()
        start = 0
        for rows in groups:
            end = start + int((batch["labels"][rows] == model.config.pose_token_id).sum())
            part = {name: value[rows] for name, value in batch.items()}
            model(**part, pose_labels=targets[start:end], **counts).loss.backward()
            start = end
        return [weight.grad.clone() for weight in model.pose_head.parameters()] + [model.lm_head.weight.grad.clone()]

    whole = gradient([slice(0, 4)])
    counts = {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum(), "num_poses_in_batch": len(targets)}
    split = gradient([slice(0, 1), slice(1, 2), slice(2, 4)], **counts)
    for got, want in zip(split, whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_a_plain_trainers_accumulation_weighs_poses_by_the_share_of_tokens(model, processor):
    batch, targets = training_batch(processor)
    alone = model(**batch, pose_labels=targets)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    for whole in (tokens, 4 * tokens):  # the whole accumulated batch; four times this one
        output = model(**batch, pose_labels=targets, num_items_in_batch=whole)
        torch.testing.assert_close(output.pose_loss, alone.pose_loss * (tokens / whole))
        torch.testing.assert_close(output.ce_loss, alone.ce_loss * (tokens / whole))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:2], r"got 2 poses for 3 tokens \(\[1, 0, 2\] in the rows"),
        (lambda t: torch.cat([t, t[:1]]), "got 4 poses for 3 tokens"),
        (lambda t: t[:, :22], r"expected `pose_labels` of shape \(P, 24, 3, 3\), got \(3, 22, 3, 3\)"),
    ],
)
def test_poses_that_do_not_match_the_labels_are_refused(model, processor, change, message):
    batch, targets = training_batch(processor)
    with pytest.raises(ValueError, match=message):
        model(**batch, pose_labels=change(targets))


def test_pose_labels_without_labels_and_masks_of_another_shape_are_refused(model, processor):
    batch, targets = training_batch(processor)
    with pytest.raises(ValueError, match="`pose_labels` need `labels`"):
        model(input_ids=batch["input_ids"], pose_labels=targets)
    with pytest.raises(ValueError, match=r"expected `pose_mask` of shape \(3, 24\), got \(3, 22\)"):
        model(**batch, pose_labels=targets, pose_mask=torch.ones(3, 22))


def test_pose_token_of_the_prompt_is_text(model, batch):
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    assert (batch["input_ids"] == model.config.pose_token_id).sum() == 1
    assert model(**batch, labels=labels).pose_rotmats.shape[0] == 0
    assert model(**batch).pose_rotmats is None


# -- generation --


PATHS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beams_return_all": {"num_beams": 3, "num_return_sequences": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "no_cache": {"use_cache": False},
    "static_cache": {"cache_implementation": "static", "disable_compile": True},
    "static_cache_beams": {"cache_implementation": "static", "num_beams": 2, "disable_compile": True},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "scores": {"output_scores": True, "output_logits": True, "output_hidden_states": True},
}


@pytest.mark.parametrize("path", PATHS)
def test_generated_poses_equal_a_teacher_forced_forward(model, processor, batch, path):
    torch.manual_seed(0)
    length = batch["input_ids"].shape[1]
    output = model.generate(
        **batch,
        **PATHS[path],
        max_new_tokens=8,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([SayPoseAt(processor, length)]),
    )
    copies = PATHS[path].get("num_return_sequences", 1)
    assert output.prompt_length == length
    assert output.pose_rotmats.shape[0] == 2 * 3 * copies
    assert_poses_match(model, batch, output, copies)


def test_pose_as_last_token_allowed(model, processor, batch):
    length = batch["input_ids"].shape[1]
    output = model.generate(
        **batch,
        max_new_tokens=3,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([SayPoseAt(processor, length, steps=(0, 2))]),
    )
    assert output.pose_token_positions.tolist() == [length, length + 2] * 3
    assert_poses_match(model, batch, output)


def test_rows_that_end_early(model, processor, batch):
    """A finished row is padded while others go on; the padding holds no pose."""

    class EndFirstRow(SayPoseAt):
        def __call__(self, input_ids, scores):
            scores = super().__call__(input_ids, scores)
            if input_ids.shape[1] - self.prompt_length == 2:
                scores[0] = -torch.inf
                scores[0, processor.tokenizer.eos_token_id] = 0
            return scores

    length = batch["input_ids"].shape[1]
    output = model.generate(
        **batch,
        max_new_tokens=8,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([EndFirstRow(processor, length)]),
    )
    assert output.pose_sequence_index.tolist() == [0, 1, 1, 2, 2]
    assert_poses_match(model, batch, output)


def test_prompt_lookup_and_assisted_decoding(model, processor, text_batch):
    one = {name: value[1:] for name, value in text_batch.items()}
    draft = make_model(processor, seed=1)
    length = one["input_ids"].shape[1]
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        output = model.generate(
            **one,
            **options,
            max_new_tokens=8,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([SayPoseAt(processor, length)]),
        )
        assert output.pose_rotmats.shape[0] == 2
        assert_poses_match(model, one, output)


def test_poses_come_however_the_dict_is_asked_for(model, processor, text_batch, monkeypatch):
    length = text_batch["input_ids"].shape[1]
    say = {"logits_processor": LogitsProcessorList([SayPoseAt(processor, length)])}
    asked = GenerationConfig(max_new_tokens=6, return_dict_in_generate=True, pad_token_id=0)
    assert model.generate(**text_batch, generation_config=asked, **say).pose_rotmats.shape[0] == 4
    monkeypatch.setattr(model.generation_config, "return_dict_in_generate", True)
    left_open = GenerationConfig(max_new_tokens=6, pad_token_id=0)
    for options in ({"generation_config": left_open}, {"max_new_tokens": 6}):
        assert model.generate(**text_batch, **options, **say).pose_rotmats.shape[0] == 4
    refused = {"max_new_tokens": 6, "return_dict_in_generate": False}
    assert isinstance(model.generate(**text_batch, **refused, **say), torch.Tensor)


@pytest.mark.parametrize("options", [{"logits_to_keep": 0}, {"vision_feature_layer": -1}])
def test_arguments_of_forward_go_through_generate(model, processor, batch, options):
    length = batch["input_ids"].shape[1]
    say = {"logits_processor": LogitsProcessorList([SayPoseAt(processor, length, steps=(0, 3))])}
    output = model.generate(**batch, **options, **say, max_new_tokens=6, return_dict_in_generate=True)
    forward_options = {name: value for name, value in options.items() if name != "logits_to_keep"}
    assert_poses_match(partial(model, **forward_options), batch, output)


def test_embeddings_as_prompt(model, processor, text_batch):
    embeddings = model.get_input_embeddings()(text_batch["input_ids"])
    options = {"max_new_tokens": 6, "return_dict_in_generate": True}
    output = model.generate(
        inputs_embeds=embeddings,
        attention_mask=text_batch["attention_mask"],
        logits_processor=LogitsProcessorList([SayPoseAt(processor, 0)]),
        **options,
    )
    length = text_batch["input_ids"].shape[1]
    by_ids = model.generate(
        **text_batch, logits_processor=LogitsProcessorList([SayPoseAt(processor, length)]), **options
    )
    assert output.prompt_length == 0
    torch.testing.assert_close(output.pose_rotmats, by_ids.pose_rotmats, atol=1e-4, rtol=0)


def test_continuing_from_a_cache(model, processor, text_batch):
    """The second turn of a chat reuses the first turn's cache."""
    length = text_batch["input_ids"].shape[1]
    say = partial(SayPoseAt, processor)
    first = model.generate(
        **text_batch,
        max_new_tokens=6,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([say(length)]),
    )
    mask = torch.cat([text_batch["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
    more = {"input_ids": first.sequences, "attention_mask": mask}
    name = "cache" if "cache" in first else "past_key_values"  # renamed in transformers 5.24
    second = model.generate(
        **more,
        **{name: first[name]},
        max_new_tokens=6,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([say(first.sequences.shape[1])]),
    )
    assert second.pose_rotmats.shape[0] == 4
    assert_poses_match(model, more, second)


def test_streamer_and_plain_tensor_output(model, processor, text_batch, capsys):
    one = {name: value[1:] for name, value in text_batch.items()}
    output = model.generate(**one, max_new_tokens=5, streamer=TextStreamer(processor.tokenizer))
    assert isinstance(output, torch.Tensor)
    assert len(capsys.readouterr().out) > 0


def test_no_pose_gives_empty_tensors(model, processor, text_batch):
    length = text_batch["input_ids"].shape[1]
    never = LogitsProcessorList([SayPoseAt(processor, length, steps=())])
    suppress = {"suppress_tokens": [processor.pose_token_id]}
    output = model.generate(
        **text_batch, max_new_tokens=4, return_dict_in_generate=True, logits_processor=never, **suppress
    )
    assert output.pose_rotmats.shape == (0, 24, 3, 3)
    assert output.pose_sequence_index.numel() == output.pose_token_positions.numel() == 0


def test_generate_does_no_more_work_than_plain_llava_and_keeps_one_state_a_token(model, processor, batch, monkeypatch):
    """Work, not seconds: what goes through each part, once; what is kept beside the cache."""
    parts = {
        "tower": (model.model.vision_tower, lambda output: len(output.last_hidden_state)),
        "language model": (model.model.language_model.layers[0], lambda output: output.shape[:-1].numel()),
        "output layer": (model.lm_head, lambda output: output.shape[:-1].numel()),
        "pose head": (model.pose_head, lambda output: len(output)),
    }
    work = {name: [] for name in parts}
    hooks = [
        part.register_forward_hook(lambda _, inputs, output, n=name, c=count: work[n].append(c(output)))
        for name, (part, count) in parts.items()
    ]
    collectors = []

    class KnownCollector(PoseStateCollector):
        def __init__(self):
            super().__init__()
            collectors.append(self)

    monkeypatch.setattr(modeling_chatpose, "PoseStateCollector", KnownCollector)
    rows, length = batch["input_ids"].shape
    steps = 6
    processors = LogitsProcessorList([SayPoseAt(processor, length)])
    output = model.generate(**batch, max_new_tokens=steps, return_dict_in_generate=True, logits_processor=processors)
    for hook in hooks:
        hook.remove()
    assert work["tower"] == [len(batch["pixel_values"])], "every picture once"
    assert work["language model"] == [rows * length] + [rows] * (steps - 1), "the prompt once, then a token a row"
    assert work["output layer"] == [rows] * steps, "the last position alone"
    assert work["pose head"] == [len(output.pose_rotmats)] == [2 * rows], "all poses at once, at the end"
    hidden_size = model.config.text_config.hidden_size
    # More than one block, and the last one is not full.
    monkeypatch.setattr(modeling_chatpose, "_STEPS_A_BLOCK", 4)
    again = model.generate(**batch, max_new_tokens=steps, return_dict_in_generate=True, logits_processor=processors)
    assert torch.equal(again.pose_rotmats, output.pose_rotmats)
    for collector, kept in zip(collectors, (64, 8), strict=True):
        assert sum(block.untyped_storage().nbytes() for block in collector.blocks) == kept * rows * hidden_size * 4
    assert output.hidden_states is None


@pytest.mark.slow
def test_static_cache_compiles_as_one_graph(model, processor, text_batch):
    torch._dynamo.reset()
    name = "cache" if "cache" in signature(type(model).__base__.forward).parameters else "past_key_values"
    cache = {name: StaticCache(model.config.text_config, max_cache_len=64)}
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    ids = text_batch["input_ids"]
    eager = model(input_ids=ids, logits_to_keep=1)
    output = compiled(input_ids=ids, **cache, logits_to_keep=1)
    torch.testing.assert_close(output.last_hidden_state, eager.last_hidden_state, atol=1e-4, rtol=0)


# -- forced poses --


def ending_model(processor, end_step):
    """Weights that say the word "person", then want to end at `end_step`; never a pose."""

    class WantsToEnd(LogitsProcessor):
        def __init__(self, prompt_length):
            self.prompt_length = prompt_length

        def __call__(self, input_ids, scores):
            scores = torch.zeros_like(scores)
            word = processor.tokenizer.convert_tokens_to_ids("person")
            step = input_ids.shape[1] - self.prompt_length
            scores[:, word] = 5.0
            if step >= end_step:
                scores[:, processor.tokenizer.eos_token_id] = 9.0
            return scores

    return WantsToEnd


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 2}])
def test_forced_pose_replaces_the_end(model, processor, text_batch, options):
    torch.manual_seed(0)
    length = text_batch["input_ids"].shape[1]
    output = model.generate(
        **text_batch,
        max_new_tokens=12,
        force_pose=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([ending_model(processor, 2)(length)]),
        **options,
    )
    rows = output.sequences.shape[0]
    assert output.pose_sequence_index.tolist() == list(range(rows))
    for reply in processor.post_process_poses(output):
        assert reply["text"].endswith("It is <POSE>")
        assert reply["text"].count("<POSE>") == 1
    assert_poses_match(model, text_batch, output, options.get("num_return_sequences", 1))


@pytest.mark.parametrize("room", [1, 2, 4, 6])
def test_forced_pose_fits_the_last_token(model, processor, text_batch, room):
    length = text_batch["input_ids"].shape[1]
    output = model.generate(
        **text_batch,
        max_new_tokens=room,
        force_pose=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([ending_model(processor, 100)(length)]),
    )
    assert output.pose_token_positions.tolist() == [length + room - 1] * 2


def test_forced_pose_leaves_answers_with_a_pose_alone(model, processor, text_batch):
    length = text_batch["input_ids"].shape[1]
    options = {
        "max_new_tokens": 8,
        "return_dict_in_generate": True,
        "logits_processor": LogitsProcessorList([SayPoseAt(processor, length, steps=(2,))]),
    }
    free = model.generate(**text_batch, **options)
    forced = model.generate(**text_batch, **options, force_pose=True)
    assert forced.sequences.tolist() == free.sequences.tolist()


def test_forced_pose_is_the_same_with_a_draft_model(model, processor, text_batch):
    """The draft wants to end at once; that must not bring a pose into an answer that goes on."""
    one = {name: value[1:] for name, value in text_batch.items()}
    draft = make_model(processor, seed=1)
    with torch.no_grad():
        draft.lm_head.weight[processor.tokenizer.eos_token_id] *= 20
    options = {"max_new_tokens": 16, "force_pose": True, "return_dict_in_generate": True}
    alone = model.generate(**one, **options)
    assisted = model.generate(**one, **options, assistant_model=draft)
    assert assisted.sequences.tolist() == alone.sequences.tolist()
    torch.testing.assert_close(assisted.pose_rotmats, alone.pose_rotmats, atol=1e-4, rtol=0)


def test_force_pose_processor_by_hand():
    """Pose 9, lead-in 5 6, end 1: row 0 ends and gets "5 6 9"; row 1, with another prompt, goes on."""
    force = ForcePoseLogitsProcessor(9, [5, 6], [1], prompt_length=2, max_length=20)
    ids, answers = torch.tensor([[3, 3], [3, 4]]), []
    for step in range(5):
        scores = torch.zeros(2, 10)
        scores[:, 7] = 1.0
        if step in (1, 4):
            scores[0, 1] = 2.0
        tokens = force(ids, scores).argmax(-1)
        answers.append(tokens.tolist())
        ids = torch.cat([ids, tokens[:, None]], dim=1)
    assert list(zip(*answers, strict=True)) == [(7, 5, 6, 9, 1), (7, 7, 7, 7, 7)]
