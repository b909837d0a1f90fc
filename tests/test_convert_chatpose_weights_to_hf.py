"""Converting checkpoints of the original layout: shards, plain LLaVA, other settings, and everything that can be wrong."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from chatpose_hf import ChatPoseForConditionalGeneration, ChatPoseProcessor
from chatpose_hf.convert_chatpose_weights_to_hf import convert_checkpoint
from chatpose_hf.rotations import rot6d_to_rotmat


@pytest.fixture
def checkpoint(official, tmp_path):
    """A writable copy of the original's checkpoint folder."""
    return shutil.copytree(official / "checkpoint", tmp_path / "checkpoint", copy_function=shutil.copyfile)


@pytest.fixture
def tower(official):
    return str(official / "vision_tower")


@pytest.fixture
def weights(official):
    return torch.load(official / "checkpoint" / "pytorch_model.bin", weights_only=True)


def edit_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def write_shards(checkpoint, weights, count):
    (checkpoint / "pytorch_model.bin").unlink()
    weight_map = {}
    for number in range(count):
        name = f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin"
        part = {key: weights[key] for key in list(weights)[number::count]}
        torch.save(part, checkpoint / name)
        weight_map.update(dict.fromkeys(part, name))
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def to_llava(checkpoint, weights):
    """The fixture as a plain LLaVA-1.5 of the original layout: no pose token, no tags, no head."""
    edit_config(checkpoint, architectures=["LlavaLlamaForCausalLM"], out_dim=None, mm_use_im_start_end=False)
    edit_config(checkpoint, image_aspect_ratio="pad", vocab_size=900)
    (checkpoint / "added_tokens.json").unlink()
    plain = {key: value for key, value in weights.items() if "text_hidden_fcs" not in key}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        plain[key] = plain[key][:900].clone()
    torch.save(plain, checkpoint / "pytorch_model.bin")
    return plain


def load_all(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_shards_give_the_same_as_one_file(checkpoint, tower, weights, converted, tmp_path):
    write_shards(checkpoint, weights, 3)
    table = convert_checkpoint(checkpoint, tmp_path / "out", tower)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    torch.testing.assert_close(load_all(tmp_path / "out"), load_all(converted), atol=0, rtol=0)
    assert {key.old for key in table if key.old != "(new)"} == set(weights)


def test_safetensors_and_old_torch_files_are_read(checkpoint, tower, weights, converted, tmp_path):
    torch.save(weights, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_checkpoint(checkpoint, tmp_path / "old", tower)
    (checkpoint / "pytorch_model.bin").unlink()
    save_file(weights, checkpoint / "model.safetensors")
    convert_checkpoint(checkpoint, tmp_path / "new", tower)
    for name in ("old", "new"):
        torch.testing.assert_close(load_all(tmp_path / name), load_all(converted), atol=0, rtol=0)


def test_what_is_written_loads_without_a_missing_weight(converted):
    for model_class, left_over in (
        (ChatPoseForConditionalGeneration, ()),
        (LlavaForConditionalGeneration, "pose_head."),
    ):
        _, info = model_class.from_pretrained(converted, output_loading_info=True)
        assert not info["missing_keys"]
        assert all(str(key).startswith(left_over) for key in info["unexpected_keys"])
    names = {path.name for path in converted.iterdir()}
    assert {"config.json", "modeling_chatpose.py", "tokenization_chatpose.py", "chat_template.jinja"} <= names
    assert not any(path.suffix in (".bin", ".pkl", ".pt", ".model") for path in converted.iterdir())


def test_half_precision_stays_but_for_the_head(checkpoint, tower, weights, tmp_path):
    torch.save({key: value.half() for key, value in weights.items()}, checkpoint / "pytorch_model.bin")
    edit_config(checkpoint, torch_dtype="float16")
    convert_checkpoint(checkpoint, tmp_path / "out", tower)
    types = {key: value.dtype for key, value in load_all(tmp_path / "out").items()}
    assert {dtype for key, dtype in types.items() if not key.startswith("pose_head.")} == {torch.float16}
    assert {dtype for key, dtype in types.items() if key.startswith("pose_head.")} == {torch.float32}
    model = ChatPoseForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.float16


def test_ignored_and_vision_weights(checkpoint, tower, weights, tmp_path):
    """Buffers and a body model are left out; a vision tower inside the checkpoint wins over the folder's."""
    own_embedding = torch.full((32,), 0.5)
    weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(577)
    weights["model.smplx.v_template"] = torch.ones(10, 3)
    weights["model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"] = own_embedding
    torch.save(weights, checkpoint / "pytorch_model.bin")
    table = convert_checkpoint(checkpoint, tmp_path / "out", tower)
    assert sorted(key.old for key in table if key.new is None) == [
        *(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)),
        "model.smplx.v_template",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
    ]
    model = ChatPoseForConditionalGeneration.from_pretrained(tmp_path / "out")
    embedding = next(value for key, value in model.state_dict().items() if key.endswith("class_embedding"))
    torch.testing.assert_close(embedding, own_embedding)


def test_checkpoint_without_tags(checkpoint, tower, tmp_path):
    edit_config(checkpoint, mm_use_im_start_end=False)
    convert_checkpoint(checkpoint, tmp_path / "out", tower)
    processor = ChatPoseProcessor.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.endswith("USER: <image>\nq ASSISTANT:")


def test_plain_llava_gets_a_pose_token_and_a_head_at_the_rest_pose(checkpoint, tower, weights, tmp_path):
    plain = to_llava(checkpoint, weights)
    table = convert_checkpoint(checkpoint, tmp_path / "out", tower)
    assert sum(key.new is not None and key.new.startswith("pose_head.") for key in table) == 4
    model = ChatPoseForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = ChatPoseProcessor.from_pretrained(tmp_path / "out")
    assert (processor.pose_token_id, processor.image_token_id) == (900, 901)
    assert "curious user" in processor.chat_template
    assert type(processor.image_processor).__name__ == "LlavaImageProcessorPil"
    rest = torch.eye(3).repeat(24, 1, 1)
    rest[0] = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(rot6d_to_rotmat(model.pose_head(torch.zeros(64))), rest)
    torch.testing.assert_close(model.lm_head.weight[:900], plain["lm_head.weight"])
    torch.testing.assert_close(model.lm_head.weight[900], plain["lm_head.weight"].mean(0))
    reply = model.generate(
        **processor(text="USER: hi ASSISTANT:", return_tensors="pt"),
        max_new_tokens=4,
        force_pose=True,
        return_dict_in_generate=True,
    )
    assert reply.pose_rotmats.shape == (1, 24, 3, 3)


# -- what can be wrong: a clear error, and nothing written --


def drop(key):
    return lambda weights: weights.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.norm.weight"), r"missing \['language_model\.model\.norm\.weight'\]"),
        (drop("model.text_hidden_fcs.0.2.bias"), r"missing \['pose_head\.linear_2\.bias'\]"),
        (lambda w: w.update({"model.odd": torch.ones(1)}), "no ChatPose or LLaVA-1.5 has: 'model.odd'"),
        (lambda w: w.update({"model.norm.weight": torch.ones(5)}), r"norm\.weight: expected \(64,\), got \(5,\)"),
    ],
)
def test_weights_that_do_not_fill_the_model(checkpoint, tower, weights, tmp_path, change, message):
    change(weights)
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint, tmp_path / "out", tower)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_hidden_size": None}, "is not of the original LLaVA layout"),
        ({"text_config": {}}, "use ChatPoseForConditionalGeneration.from_llava"),
        ({"mm_projector_type": "linear"}, "expected `mm_projector_type` 'mlp2x_gelu'.*got 'linear'"),
        ({"mm_vision_select_layer": "last"}, "expected `mm_vision_select_layer` as a whole number"),
        ({"mm_hidden_size": 48}, "expected a vision tower of width 48"),
    ],
)
def test_configurations_that_do_not_fit(checkpoint, tower, tmp_path, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint, tmp_path / "out", tower)
    assert not (tmp_path / "out").exists()


def test_missing_files(checkpoint, tower, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out", tower)
    with pytest.raises(FileNotFoundError, match=r"cannot load the vision tower 'vision_tower'.*--vision-tower"):
        convert_checkpoint(checkpoint, tmp_path / "out")
    write_shards(checkpoint, weights, 2)
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks \['pytorch_model-00002-of-00002\.bin'\] of its 2"):
        convert_checkpoint(checkpoint, tmp_path / "out", tower)
    (checkpoint / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        convert_checkpoint(checkpoint, tmp_path / "out", tower)


def test_index_that_points_outside_is_refused(checkpoint, tower, tmp_path):
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.bin"}}))
    with pytest.raises(ValueError, match="names files outside its folder"):
        convert_checkpoint(checkpoint, tmp_path / "out", tower)


def test_existing_output_is_never_touched(checkpoint, tower, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        convert_checkpoint(checkpoint, tmp_path / "out", tower)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert_checkpoint(checkpoint, tmp_path / "empty", tower)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_hostile_pickle_runs_nothing(checkpoint, tower, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for write in (
        lambda path: torch.save({"model.norm.weight": Payload()}, path),
        lambda path: path.write_bytes(pickle.dumps({"model.norm.weight": Payload()})),
    ):
        write(checkpoint / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin.*is not a file of plain tensors"):
            convert_checkpoint(checkpoint, tmp_path / "out", tower)
        assert not (tmp_path / "executed").exists()
        assert not (tmp_path / "out").exists()


def test_truncated_weights(checkpoint, tower, tmp_path):
    content = (checkpoint / "pytorch_model.bin").read_bytes()
    (checkpoint / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        convert_checkpoint(checkpoint, tmp_path / "out", tower)
    assert not (tmp_path / "out").exists()
