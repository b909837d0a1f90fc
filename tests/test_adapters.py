"""What trains and what stays, LoRA's way to the disk and back, and a merged model that is a plain one."""

import json
import math
import re

import pytest
import torch
from make_tiny_checkpoint import (
    VISION,
    make_image_processor,
    make_model,
    make_processor,
    make_text_model,
    make_tokenizer,
    make_vision_tower,
)
from peft import PeftModel
from safetensors.torch import load_file
from test_collator import chat_row, make_rows, text_row
from test_modeling_chatpose import SayPoseAt
from transformers import (
    AddedToken,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    LogitsProcessorList,
)

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor, adapters
from chatpose_hf.adapters import (
    PARTS,
    TuningArguments,
    count_parameters,
    format_parameters,
    load_base,
    load_trained,
    prepare_model,
)
from chatpose_hf.collator import ChatPoseCollator


BASES = ["untied", "tied", "llava"]
LORA = {"lora_r": 4, "lora_alpha": 8}
POSE_ATOL = 5e-5  # Gram-Schmidt makes more of the states' last digits than the output layer does
POSE_HEAD = {f"pose_head.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
TOWER = "model.vision_tower."


def write_chatpose(folder, tie):
    """A ChatPose on a language model and a tower of one's own, as `from_llava` starts it."""
    processor = make_processor()
    model = ChatPoseForConditionalGeneration.from_llava(
        processor=processor,
        text_model=make_text_model(vocab_size=len(processor.tokenizer) - 2, tie=tie),
        vision_tower=make_vision_tower(),
    )
    with torch.no_grad():  # a head at the rest pose would say nothing about its state
        model.pose_head.linear_2.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_llava(folder):
    """A plain LLaVA as the Hub has them: no word of `<POSE>`, and no row for it."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    tokenizer.pad_token = "<unk>"
    settings = make_model(make_processor()).config.to_dict()
    settings = {name: settings[name] for name in ("vision_config", "text_config", "image_token_index")}
    settings["text_config"]["vocab_size"] = len(tokenizer)
    LlavaForConditionalGeneration(LlavaConfig(**settings, image_seq_length=4)).save_pretrained(folder)
    LlavaProcessor(
        make_image_processor(),
        tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    for name in ("untied", "tied"):
        write_chatpose(folder / name, name == "tied")
    write_llava(folder / "llava")
    return folder


def start(folder, **options):
    processor = ChatPoseProcessor.from_pretrained(folder)
    return load_base(str(folder), processor, **options), processor


def train(model, batch, steps=3):
    """As a training would: dropout, weight decay and all. Every start draws the same numbers."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


class Trained:
    """A LoRA after some steps, on the disk, and the base as it was."""

    def __init__(self, folder, output, **settings):
        self.base, self.processor = start(folder)
        self.batch = ChatPoseCollator(self.processor)(make_rows())
        self.model = prepare_model(start(folder)[0], TuningArguments(**{**LORA, **settings}), str(folder), "v1.0")
        self.losses = train(self.model, self.batch)
        self.folder = output
        self.model.save_pretrained(output)
        self.processor.save_pretrained(output)
        with torch.no_grad():
            self.output = self.model(**self.batch)


@pytest.fixture(scope="module", params=BASES)
def trained(request, bases, tmp_path_factory):
    return Trained(bases / request.param, tmp_path_factory.mktemp("adapter"))


def trained_names(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def plain(names):
    """Names of the weights as the model has them without PEFT."""
    return {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in names}


def lora_names(targets=("q_proj", "v_proj"), tie=False):
    where = {"q_proj": "self_attn", "v_proj": "self_attn", "gate_proj": "mlp"}
    names = {
        f"model.language_model.layers.{layer}.{where[target]}.{target}.lora_{matrix}.default.weight"
        for layer in range(2)
        for target in targets
        for matrix in "AB"
    }
    tokens = ["model.language_model.embed_tokens"] + ([] if tie else ["lm_head"])
    return names | {f"{name}.token_adapter.trainable_tokens_delta.default" for name in tokens}


# -- what trains --


@pytest.mark.parametrize("base", BASES)
def test_lora_then_trains_the_language_model_the_pose_rows_and_the_head_alone(bases, base):
    model, processor = start(bases / base)
    assert processor.pose_token_id == model.config.pose_token_id
    model = prepare_model(model, TuningArguments(**LORA))
    assert isinstance(model, PeftModel)
    assert plain(trained_names(model)) == lora_names(tie=base == "tied") | POSE_HEAD
    weights = dict(model.named_parameters())
    for name in trained_names(model):
        if "trainable_tokens_delta" in name:
            assert weights[name].shape == (1, 32)


def test_lora_then_has_the_settings_of_the_arguments(bases):
    assert TuningArguments() == TuningArguments(
        method="lora",
        lora_r=128,
        lora_alpha=256,
        lora_dropout=0.05,
        lora_targets=["q_proj", "v_proj"],
        lora_layers=None,
        use_dora=False,
        use_rslora=False,
        vision_layers=0,
        train_projector=False,
    )
    tuning = TuningArguments(lora_r=6, lora_alpha=9, lora_dropout=0.25, lora_targets=["gate_proj", "v_proj"])
    model = prepare_model(start(bases / "untied")[0], tuning)
    assert plain(trained_names(model)) == lora_names(("gate_proj", "v_proj")) | POSE_HEAD
    layer = model.get_submodule("base_model.model.model.language_model.layers.1.mlp.gate_proj")
    assert layer.lora_A["default"].weight.shape == (6, 32)
    assert layer.scaling["default"] == 1.5
    assert layer.lora_dropout["default"].p == 0.25


def test_lora_before_a_step_then_is_the_base(bases):
    base, processor = start(bases / "untied")
    batch = ChatPoseCollator(processor)(make_rows())
    model = prepare_model(start(bases / "untied")[0], TuningArguments(**LORA)).eval()
    torch.testing.assert_close(model(**batch).logits, base.eval()(**batch).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_lora_layers_then_nothing_below_them_changes_or_gets_a_gradient(bases, base):
    model, processor = start(bases / base)
    batch = ChatPoseCollator(processor)(make_rows())
    before = model.eval()(**batch)
    model = prepare_model(model, TuningArguments(**LORA, lora_layers=1))
    names = {name for name in lora_names(tie=base == "tied") if ".layers.0." not in name}
    if base == "untied":  # where it is read, <POSE> stays as it is
        names -= {name for name in names if "embed_tokens" in name}
    assert plain(trained_names(model)) == names | POSE_HEAD
    torch.testing.assert_close(model.eval()(**batch).loss, before.loss)
    reached = []
    model.get_submodule("base_model.model.model.language_model.layers.0").register_full_backward_hook(
        lambda *_: reached.append(0)
    )
    model.get_submodule("base_model.model.model.language_model.layers.1").register_full_backward_hook(
        lambda *_: reached.append(1)
    )
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    assert set(reached) == {1}
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_lora_layers_with_a_projector_then_train_both(bases):
    model, processor = start(bases / "untied")
    model = prepare_model(model, TuningArguments(**LORA, lora_layers=1, train_projector=True))
    model(**ChatPoseCollator(processor)(make_rows())).loss.backward()
    weights = [weight for name, weight in model.named_parameters() if "projector" in name and weight.requires_grad]
    assert weights
    assert all((weight.grad != 0).any() for weight in weights)


def test_lora_layers_when_there_are_fewer_then_says_how_many(bases):
    model, _ = start(bases / "untied")
    with pytest.raises(ValueError, match="expected at most 2 `lora_layers`, got 3"):
        prepare_model(model, TuningArguments(lora_layers=3))


VISION_PARTS = {
    "none": ({}, set()),
    "one layer": ({"vision_layers": 1}, {"encoder.layers.1."}),
    "two layers": ({"vision_layers": 2}, {"encoder.layers.0.", "encoder.layers.1."}),
    "the tower": (
        {"vision_layers": -1},
        {"encoder.layers.0.", "encoder.layers.1.", "embeddings.", "pre_layrnorm."},  # CLIP's own misspelling
    ),
    "projector": ({"train_projector": True}, {"projector"}),
    "one layer and projector": ({"vision_layers": 1, "train_projector": True}, {"encoder.layers.1.", "projector"}),
}


def wanted_vision_names(model, parts):
    """Of the base's weights, those of the parts; `vision_model.` stood before them up to transformers 5.1x."""
    names = {name for name, _ in model.named_parameters()}
    wanted = {
        name
        for name in names
        if name.startswith(TOWER)
        and name.removeprefix(TOWER).removeprefix("vision_model.").startswith(tuple(parts - {"projector"} or {"none"}))
    }
    if "projector" in parts:
        wanted |= {name for name in names if name.startswith("model.multi_modal_projector.")}
    assert bool(wanted) == bool(parts)
    return wanted


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", VISION_PARTS)
def test_vision_parts_then_train_where_their_output_is_used_and_always_get_a_gradient(bases, kind, method):
    settings, parts = VISION_PARTS[kind]
    model, processor = start(bases / "untied")
    vision = wanted_vision_names(model, parts)
    if method == "lora":
        wanted = lora_names() | POSE_HEAD | vision
    else:
        language = {name for name, _ in model.named_parameters() if name.startswith("model.language_model.")}
        assert len(language) == 2 * 9 + 2
        wanted = language | POSE_HEAD | {"lm_head.weight"} | vision
    model = prepare_model(model, TuningArguments(method=method, **LORA, **settings))
    assert isinstance(model, PeftModel) == (method == "lora")
    assert plain(trained_names(model)) == wanted

    collator = ChatPoseCollator(processor)
    for rows, has_picture in ((make_rows(), True), ([text_row(), chat_row()], False)):
        model.zero_grad()
        model.train()(**collator(rows)).loss.backward()
        for name, weight in model.named_parameters():
            assert (weight.grad is not None) == weight.requires_grad, name
            if plain({name}) <= vision:
                # Keys' biases have none: softmax takes out what all keys share.
                assert (weight.grad != 0).any() == has_picture or name.endswith("k_proj.bias"), name


def test_vision_layers_when_a_later_layers_output_is_used_then_reach_to_it(bases):
    for taken, last in ((-1, 2), (3, 2), (2, 1), ([1, -2], 1), (1, 0)):
        model, processor = start(bases / "untied")
        model.config.vision_feature_layer = taken
        names = trained_names(prepare_model(model, TuningArguments(method="full", vision_layers=1)))
        layers = {re.search(r"layers\.(\d)", name)[1] for name in names if name.startswith(TOWER)}
        assert layers == {str(last)}
        if not isinstance(taken, list):  # several make the projector's input wider
            model(**ChatPoseCollator(processor)(make_rows())).loss.backward()
            assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_vision_layers_when_there_are_fewer_then_says_how_many(bases, method):
    model, _ = start(bases / "untied")
    assert VISION["num_hidden_layers"] == 3  # of which the third is not used
    with pytest.raises(ValueError, match="expected at most 2 `vision_layers`, got 3"):
        prepare_model(model, TuningArguments(method=method, vision_layers=3))


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_full_then_a_step_moves_all_that_trains_and_nothing_else(bases, base):
    model, processor = start(bases / base)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model = prepare_model(model, TuningArguments(method="full", vision_layers=1))
    losses = train(model, ChatPoseCollator(processor)(make_rows()))
    assert losses[-1] < losses[0]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (base == "tied")


# -- settings that cannot be --


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "qlora"}, "expected `method` of lora, full, got 'qlora'"),
        ({"lora_r": 0}, "expected `lora_r` of at least 1 .* got 0 and 0"),
        ({"vision_layers": -2}, "`vision_layers` of at least -1, got 128 and -2"),
        ({"lora_layers": 0}, "expected `lora_layers` of at least 1, with `method=lora`, got 0 and 'lora'"),
        ({"lora_layers": 1, "method": "full"}, "expected `lora_layers` .* got 1 and 'full'"),
    ],
)
def test_tuning_arguments_when_one_is_wrong_then_says_which(arguments, message):
    with pytest.raises(ValueError, match=message):
        TuningArguments(**arguments)


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [
        (["q_proj", "c_attn"], "c_attn"),
        (["c_attn", "wqkv"], "c_attn, wqkv"),
        (["fc1"], "fc1"),  # of the vision tower alone
        (["lm_head"], "lm_head"),
        (["proj"], "proj"),
        ([".*"], r"\.\*"),
        ([], "none"),
    ],
)
def test_lora_targets_when_no_layer_has_the_name_then_says_which_there_are(bases, targets, wrong):
    model, _ = start(bases / "untied")
    there_are = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ValueError, match=f"expected `lora_targets` of {there_are}, got {wrong}$"):
        prepare_model(model, TuningArguments(lora_targets=targets))
    assert not hasattr(model, "peft_config")


def test_full_when_the_model_is_in_4_bits_then_is_refused(bases):
    model, _ = start(bases / "untied")
    model.is_loaded_in_4bit = True
    with pytest.raises(ValueError, match="expected `method=lora` for a model loaded in 4 bits, got full"):
        prepare_model(model, TuningArguments(method="full"))


# -- what training changes --


def test_a_trained_lora_when_merged_then_only_what_trained_differs_from_the_base(trained):
    assert trained.losses[-1] < trained.losses[0]
    before = trained.base.state_dict()
    # Merged from the disk: the fixture's own model goes on to be asked.
    merged, _ = load_trained(trained.folder)
    after = merged.state_dict()
    assert after.keys() == before.keys()
    pose = merged.config.pose_token_id
    is_tied = merged.config.tie_word_embeddings
    layers = {
        f"model.language_model.layers.{layer}.self_attn.{name}.weight"
        for layer in range(2)
        for name in ("q_proj", "v_proj")
    }
    embeddings = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    for name, value in after.items():
        if name in embeddings:
            changed = (value != before[name]).any(-1).nonzero().flatten().tolist()
            assert changed == [pose], name
        else:
            assert torch.equal(value, before[name]) == (name not in layers | POSE_HEAD), name
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == is_tied
    rows = [after[name][pose] for name in sorted(embeddings)]
    assert torch.equal(*rows) == is_tied


def test_a_trained_lora_then_its_folder_holds_what_trained_and_the_name_of_its_base(trained):
    settings = json.loads((trained.folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(trained.base.name_or_path)
    assert settings["revision"] == "v1.0"
    assert settings["peft_type"] == "LORA"
    weights = load_file(trained.folder / "adapter_model.safetensors")
    kept = {
        name.replace(".modules_to_save.default", "").replace(".default", "") for name in trained_names(trained.model)
    }
    assert weights.keys() == kept


def test_a_trained_lora_when_loaded_then_answers_as_it_did(trained):
    loaded, processor = load_trained(trained.folder)
    assert type(loaded) is ChatPoseForConditionalGeneration
    assert type(processor) is ChatPoseProcessor
    assert processor.pose_token_id == loaded.config.pose_token_id
    assert not loaded.training
    output = loaded(**trained.batch)
    torch.testing.assert_close(output.logits, trained.output.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pose_rotmats, trained.output.pose_rotmats, atol=POSE_ATOL, rtol=0)
    untrained = trained.base.eval()(**trained.batch)
    assert (untrained.logits - output.logits).abs().max() > 0.05
    assert (untrained.pose_rotmats - output.pose_rotmats).abs().max() > 0.05


def test_a_merged_model_when_saved_then_comes_back_equal(trained, tmp_path):
    merged, processor = load_trained(trained.folder)
    merged.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    reloaded, info = ChatPoseForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = merged(**trained.batch)
        for again in (reloaded.eval(), load_trained(str(tmp_path))[0]):
            output = again(**trained.batch)
            torch.testing.assert_close(output.logits, expected.logits, atol=0, rtol=0)
            torch.testing.assert_close(output.pose_rotmats, expected.pose_rotmats, atol=0, rtol=0)
            assert (again.lm_head.weight is again.get_input_embeddings().weight) == again.config.tie_word_embeddings
    assert load_trained(tmp_path)[1].pose_token_id == processor.pose_token_id


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}])
def test_other_loras_then_train_and_come_back(bases, tmp_path, settings):
    trained = Trained(bases / "untied", tmp_path, **settings)
    layer = trained.model.get_submodule("base_model.model.model.language_model.layers.0.self_attn.v_proj")
    assert layer.scaling["default"] == (8 / math.sqrt(4) if "use_rslora" in settings else 2)
    assert any("magnitude" in name for name in trained_names(trained.model)) == ("use_dora" in settings)
    output = load_trained(tmp_path)[0](**trained.batch)
    torch.testing.assert_close(output.logits, trained.output.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pose_rotmats, trained.output.pose_rotmats, atol=POSE_ATOL, rtol=0)


def test_a_lora_with_vision_parts_then_comes_back(bases, tmp_path):
    trained = Trained(bases / "tied", tmp_path, vision_layers=-1, train_projector=True)
    loaded, _ = load_trained(tmp_path)
    before = trained.base.state_dict()
    moved = {
        name
        for name, value in loaded.state_dict().items()
        if not torch.equal(value, before[name])
        and not name.startswith(("model.language_model.", "lm_head", "pose_head"))
    }
    assert moved == wanted_vision_names(trained.base, VISION_PARTS["the tower"][1] | {"projector"})
    output = loaded(**trained.batch)
    torch.testing.assert_close(output.logits, trained.output.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pose_rotmats, trained.output.pose_rotmats, atol=POSE_ATOL, rtol=0)


@pytest.mark.parametrize(
    "base",
    ["untied", "tied", "llava", "towers"],
)
def test_a_base_in_bfloat16_then_its_head_and_all_that_lora_trains_is_float32(bases, base):
    """An optimizer's small steps are lost in bfloat16, and degrees of every rotation."""
    if base == "towers":
        processor = make_processor()
        towers = {"text_model": make_text_model(len(processor.tokenizer)), "vision_tower": make_vision_tower()}
        towers = {name: tower.to(torch.bfloat16) for name, tower in towers.items()}
        model = ChatPoseForConditionalGeneration.from_llava(processor=processor, **towers)
    else:
        model, processor = start(bases / base, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.pose_head.parameters()} == {torch.float32}
    model = prepare_model(model, TuningArguments(**LORA))
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = train(model, ChatPoseCollator(processor)(make_rows()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("settings", [{"vision_layers": 1}, {"train_projector": True}])
def test_vision_parts_of_a_base_in_bfloat16_then_train_in_float32(bases, settings):
    model = prepare_model(start(bases / "untied", dtype=torch.bfloat16)[0], TuningArguments(**LORA, **settings))
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


def test_a_lora_when_loaded_in_bfloat16_then_the_head_stays_float32(trained):
    half, processor = load_trained(trained.folder, dtype=torch.bfloat16)
    assert half.dtype == half.lm_head.weight.dtype == torch.bfloat16
    whole, _ = load_trained(trained.folder)
    torch.testing.assert_close(half.pose_head.state_dict(), whole.pose_head.state_dict(), atol=0, rtol=0)
    batch = processor(text="USER: The pose? ASSISTANT:", return_tensors="pt")
    output = half.generate(**batch, max_new_tokens=8, force_pose=True, return_dict_in_generate=True)
    assert output.pose_rotmats.shape == (1, 24, 3, 3)
    assert output.pose_rotmats.dtype == torch.float32
    unit = output.pose_rotmats.transpose(-1, -2) @ output.pose_rotmats
    torch.testing.assert_close(unit, torch.eye(3).expand_as(unit), atol=1e-5, rtol=0)


def test_generate_then_is_the_same_with_the_adapter_and_merged(trained, images):
    texts = ["USER: <image>\nThe pose? ASSISTANT:", "USER: The person raises the left arm. ASSISTANT:"]
    processor = ChatPoseProcessor.from_pretrained(trained.folder)
    batch = processor(text=texts, images=[images[:1], []], padding=True, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    outputs = [
        model.generate(
            **batch,
            max_new_tokens=7,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([SayPoseAt(processor, length)]),
        )
        for model in (trained.model, load_trained(trained.folder)[0])
    ]
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    assert outputs[0].pose_rotmats.shape == (4, 24, 3, 3)
    torch.testing.assert_close(outputs[1].pose_rotmats, outputs[0].pose_rotmats, atol=1e-4, rtol=0)
    forced = [
        model.generate(**batch, max_new_tokens=9, force_pose=True, return_dict_in_generate=True)
        for model in (trained.model, load_trained(trained.folder)[0])
    ]
    assert forced[0].sequences.tolist() == forced[1].sequences.tolist()
    assert len(forced[0].pose_rotmats) >= 2


# -- where a trained folder leads --


def test_load_trained_when_the_adapter_names_a_revision_then_the_base_is_of_it(trained, monkeypatch):
    asked = []

    def record(name, processor, revision=None, **kwargs):
        asked.append((name, revision, kwargs))
        return load_base(name, processor, revision, **kwargs)

    monkeypatch.setattr(adapters, "load_base", record)
    load_trained(trained.folder, dtype=torch.float32)
    assert asked == [(trained.base.name_or_path, "v1.0", {"dtype": torch.float32})]


def test_load_trained_when_the_adapter_names_no_base_then_says_so(processor, tmp_path):
    prepare_model(make_model(processor), TuningArguments(**LORA)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"expected an adapter that names its base, got none in '{tmp_path}'"):
        load_trained(tmp_path)


def test_load_trained_when_the_base_is_another_kind_then_says_which(trained, tmp_path):
    make_text_model(vocab_size=400).save_pretrained(tmp_path / "llama")
    processor = ChatPoseProcessor.from_pretrained(trained.folder)
    message = r"expected a ChatPose or a LLaVA-1.5 checkpoint in '.*llama', got one of model type 'llama'"
    with pytest.raises(ValueError, match=message):
        load_base(str(tmp_path / "llama"), processor)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((trained.folder / name).read_bytes())
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "llama")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        load_trained(tmp_path)


def test_load_base_of_a_llava_then_is_from_llava_and_the_same_each_time(bases):
    model, processor = start(bases / "llava")
    torch.manual_seed(1)  # only the head is drawn
    again = ChatPoseForConditionalGeneration.from_llava(str(bases / "llava"), processor=processor)
    assert model.get_input_embeddings().num_embeddings == 384
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]) or name.startswith("pose_head."), name


# -- the table --


@pytest.mark.parametrize("base", BASES)
def test_count_parameters_of_a_base_then_is_the_models_own_count(bases, base):
    model, _ = start(bases / base)
    counts = count_parameters(model)
    assert counts.keys() == PARTS.keys()
    assert sum(total for _, total in counts.values()) == model.num_parameters()
    assert counts["vision tower"][1] == sum(weight.numel() for weight in model.model.vision_tower.parameters())
    assert counts["projector"][1] == sum(w.numel() for w in model.model.multi_modal_projector.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    assert counts["token embeddings"][1] == embeddings
    assert counts["output layer"][1] == (0 if base == "tied" else embeddings)
    language = sum(weight.numel() for weight in model.model.language_model.parameters())
    assert counts["language model"][1] == language - embeddings
    assert counts["pose head"] == (5808, 5808)  # 32 x 32 + 32 + 144 x 32 + 144


@pytest.mark.parametrize("settings", [{}, {"vision_layers": 1, "train_projector": True}, {"use_dora": True}])
@pytest.mark.parametrize("base", BASES)
def test_count_parameters_of_a_lora_then_is_pefts_own_count(bases, base, settings):
    model, _ = start(bases / base)
    before = count_parameters(model)
    model = prepare_model(model, TuningArguments(**LORA, **settings))
    counts = count_parameters(model)
    assert sum(trained for trained, _ in counts.values()) == model.get_nb_trainable_parameters()[0]
    dora = 2 * (32 + 16) if settings.get("use_dora") else 0
    # Rank 4 on 32 to 32 and on 32 to 16 numbers, in two layers; a row of the embeddings and one of the output layer.
    added = {"language model": 2 * 4 * (64 + 48) + dora, "token embeddings": 32}
    added["output layer"] = 0 if base == "tied" else 32
    for part, (trained, total) in counts.items():
        assert total == before[part][1] + added.get(part, 0), part
        if part in added:
            assert trained == added[part], part
    layer = sum(w.numel() for name, w in model.named_parameters() if re.search(r"layers\.1\..*modules_to_save", name))
    assert counts["vision tower"][0] == layer
    assert (layer > 0) == ("vision_layers" in settings)
    assert counts["projector"][0] == (counts["projector"][1] if "train_projector" in settings else 0)


def test_count_parameters_of_a_full_training_then_counts_what_trains(bases):
    model = prepare_model(start(bases / "tied")[0], TuningArguments(method="full"))
    counts = count_parameters(model)
    for part, (trained, total) in counts.items():
        assert trained == (0 if part in ("vision tower", "projector") else total), part
    assert sum(trained for trained, _ in counts.values()) == sum(
        weight.numel() for weight in model.parameters() if weight.requires_grad
    )


def test_format_parameters_by_hand():
    counts = {"vision tower": (0, 1_000_000), "pose head": (250_000, 250_000), "output layer": (0, 0)}
    assert format_parameters(counts).splitlines() == [
        "part                      trained               of        %",
        "vision tower                    0        1,000,000    0.000",
        "pose head                 250,000          250,000  100.000",
        "output layer                    0                0    0.000",
        "all                       250,000        1,250,000   20.000",
    ]
