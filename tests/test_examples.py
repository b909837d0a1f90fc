"""The examples that train, and the settings in examples/configs."""

import json
import re
import subprocess
import sys

import chatpose_smollm2
import pyarrow.parquet as pq
import pytest
import rescale_pose_head
import torch
import train_last_layers
import train_pose_head
import yaml
from conftest import ROOT
from layer_states import LayerStates, collate
from make_rows import make_rows, write_splits
from make_tiny_checkpoint import TEXT, make_model, make_tokenizer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from chatpose_hf.adapters import TuningArguments, load_trained, prepare_model
from chatpose_hf.collator import ChatPoseCollator
from chatpose_hf.data.rows import load_rows
from chatpose_hf.rotations import rot6d_to_rotmat
from chatpose_hf.training import parse_arguments


EXAMPLES = ROOT / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_are_taken_as_written(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    command = f"chatpose_hf.cli train examples/configs/{path.name}", f"chatpose train examples/configs/{path.name}"
    assert any(line in path.read_text(encoding="utf-8") for line in command)
    zero = settings.pop("deepspeed", None)
    if zero:  # transformers takes it only where deepspeed is installed
        assert json.loads((ROOT / zero).read_text())["zero_optimization"]["stage"] in (2, 3)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({**settings, "use_cpu": True, "report_to": "none"}, sort_keys=False))
    parsed = parse_arguments([str(file)])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for name, value in settings.items():
        if name == "train_data" and isinstance(value, dict):
            value = [f"{key}={weight}" for key, weight in value.items()]
        if name in ("train_data", "eval_data") and isinstance(value, str):
            value = [value]
        if name not in ("fsdp", "fsdp_config", "report_to"):
            assert values[name] == value, name


def test_scripts_are_short():
    for script in EXAMPLES.glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 100, script


def test_a_base_from_nothing_is_fine_tuned_and_answers(tmp_path):
    rows = write_splits(tmp_path / "rows", make_rows(), make_rows(7))
    assert "weights; wrote" in run("make_base.py", tmp_path / "base", "--rows", rows)
    base, _ = load_trained(tmp_path / "base")
    assert base.num_parameters() > 1e6
    out = run("finetune_lora.py", tmp_path / "base", rows, tmp_path / "out", "--steps", "4")
    assert "eval_mpjpe_mm" in out
    assert "<POSE>" in out.splitlines()[-1]
    assert "torch.Size([72])" in out.splitlines()[-1]
    assert (tmp_path / "out" / "merged" / "modeling_chatpose.py").is_file()


def test_a_rescaled_head_gives_the_same_poses_by_vectors_of_length_one(processor, tmp_path, monkeypatch):
    rows = write_splits(tmp_path / "rows", make_rows(), make_rows(7))
    model = make_model(processor)
    model.save_pretrained(tmp_path / "long")
    processor.save_pretrained(tmp_path / "long")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "long"), str(tmp_path / "one"), "--rows", str(rows)])
    rescale_pose_head.main()
    rescaled, _ = load_trained(tmp_path / "one")
    text = processor(text="USER: q ASSISTANT: It is", return_tensors="pt")
    states = model(**text).last_hidden_state[0]
    long, one = (each.pose_head(states) for each in (model, rescaled))
    torch.testing.assert_close(rot6d_to_rotmat(one), rot6d_to_rotmat(long), atol=1e-4, rtol=0)
    rows = list(load_rows(rows, "train"))
    before, after = (rescale_pose_head.mean_lengths(each, processor, rows) for each in (model, rescaled))
    torch.testing.assert_close(after, torch.ones(24, 2))
    assert (before - 1).abs().max() > 0.5


def test_a_pose_head_from_states_alone_learns_and_nothing_else_changes(processor, tmp_path, monkeypatch, capsys):
    rows = write_splits(tmp_path / "rows", make_rows(), make_rows())
    base = make_model(processor)
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    settings = ["--rows", str(rows), "--count", "40", "--epochs", "600"]
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "out"), str(tmp_path / "base"), *settings])
    train_pose_head.main()
    assert "val: PA-MPJPE" in capsys.readouterr().out
    trained, _ = load_trained(tmp_path / "out")
    assert trained.dtype == torch.float32
    for name, weight in trained.named_parameters():
        rounded = base.get_parameter(name).bfloat16().float()
        assert name.startswith("pose_head.") != torch.equal(weight, rounded), name
    batch = ChatPoseCollator(processor)(make_rows())
    with torch.no_grad():
        assert trained(**batch).pose_loss < 0.5 * base(**batch).pose_loss


def test_smollm2_is_put_together_with_its_adapter(tmp_path, monkeypatch):
    """By a small language model in its place."""
    tokenizer = make_tokenizer(chatml=True)
    tokenizer.save_pretrained(tmp_path / "text")
    LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "text")

    def run_main(output, *arguments):
        command = ["", str(tmp_path / output), "--text-model", str(tmp_path / "text"), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        chatpose_smollm2.main()
        return load_trained(tmp_path / output)

    base, processor = run_main("base")
    chat = [{"role": "user", "content": [{"type": "text", "text": "sit"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True).startswith("<|im_start|>user\nsit")
    new, _ = run_main("new", "--new-weights")
    weight = "model.language_model.layers.0.mlp.up_proj.weight"
    text, base_weight, new_weight = (
        LlamaForCausalLM.from_pretrained(tmp_path / "text").state_dict()[weight.replace("language_model.", "")],
        base.get_parameter(weight),
        new.get_parameter(weight),
    )
    assert torch.equal(text, base_weight)
    assert not torch.equal(text, new_weight)
    tuned = prepare_model(base, TuningArguments(lora_r=2, lora_alpha=4, lora_dropout=0.0), str(tmp_path / "base"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    whole, _ = run_main("whole", "--adapter", str(tmp_path / "adapter"))
    ids = processor(text="<|im_start|>user\nsit", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(whole(**ids).logits, tuned.eval()(**ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(whole.get_parameter(weight), new_weight)


def test_the_last_layers_learn_from_states_and_the_adapter_is_the_whole_models(processor, tmp_path, monkeypatch):
    rows = make_rows(with_images=False)
    base = make_model(processor, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    settings = {
        "model": str(tmp_path / "base"),
        "train_data": {str(write_splits(tmp_path / "rows", rows)): 1.0},
        "output_dir": str(tmp_path / "out"),
        "lora_r": 4,
        "lora_dropout": 0.0,
        "lora_targets": ["q_proj", "down_proj"],
        "lora_layers": 1,
        "ce_loss_weight": 1.0,
        "pose_loss_weight": 1.0,
        "rot6d_norm_weight": 0.0,
        "joint_weights": ["l_hip=2"],
        "learning_rate": 0.01,
        "per_device_train_batch_size": 8,
        "max_steps": 20,
        "train_sampling_strategy": "group_by_length",
        "use_cpu": True,
        "report_to": "none",
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = ["train_last_layers.py", str(tmp_path / "settings.yaml"), "--count", str(len(rows))]
    uppers = []

    def keep(trained, *arguments):
        uppers.append(trained)
        return put_into_whole_model(trained, *arguments)

    put_into_whole_model = train_last_layers.put_into_whole_model
    monkeypatch.setattr(train_last_layers, "put_into_whole_model", keep)
    batch = ChatPoseCollator(processor)(sorted(rows, key=lambda row: len(str(row["messages"]))))
    with torch.no_grad():
        last = base.train()(**batch)
    below = "model.language_model.layers.0.mlp.down_proj.weight"
    for part, start in (("out", []), ("more", ["--adapter", str(tmp_path / "out")])):
        monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path / part), *start])
        train_last_layers.main()
        whole, _ = load_trained(tmp_path / part)
        assert torch.equal(whole.get_parameter(below), base.get_parameter(below))
        dataset = LayerStates([tmp_path / part / "states_0.safetensors"])
        states = collate([dataset[number] for number in range(len(dataset))])["inputs_embeds"]
        upper = uppers[-1].get_base_model().model
        with torch.no_grad():
            output = whole.train()(**batch)
            of_states = upper(inputs_embeds=states, attention_mask=batch["attention_mask"]).last_hidden_state
        assert output.loss < last.loss
        # The first part learns <POSE>, but what follows one it learns from the states of the base's.
        is_same = (batch["input_ids"] == processor.pose_token_id).cumsum(1) == 0
        is_same = (is_same | bool(start)) & (batch["attention_mask"] == 1)
        error = (output.last_hidden_state - of_states)[is_same].abs().mean()  # the states are kept in bfloat16
        assert error < 0.05 * (output.last_hidden_state - last.last_hidden_state)[is_same].abs().mean()
        last = output
    assert len(uppers) == 2

    monkeypatch.setattr(sys, "argv", [*command[:-1], "1000", "--output_dir", str(tmp_path / "none")])
    with pytest.raises(ValueError, match=f"at most {len(rows)}, the different questions of these rows, got 1000"):
        train_last_layers.main()


def test_ray_answers_a_folder_of_pictures_and_goes_on(processor, images, tmp_path):
    pytest.importorskip("ray", reason='needs Ray: pip install "ray[data]"')
    model = make_model(processor)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for number, image in enumerate(images[:3]):
        image.save(tmp_path / "pictures" / ("more" if number else ".") / f"{number}.png")
    (tmp_path / "pictures" / "none.png").write_text("no picture")
    command = ["ray_batch_inference.py", tmp_path / "pictures", tmp_path / "out", "--model", tmp_path / "model"]
    told = run(*command, "--part", "2")
    assert "4 pictures in 2 parts, 0 of them done" in told
    assert "wrote 2 parts; 1 files were no pictures" in told
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    before = [part.read_bytes() for part in parts]
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert [row["image"] for row in rows] == ["0.png", "more/1.png", "more/2.png", "none.png"]
    assert all(len(row["poses"][0]) == 72 and "<POSE>" in row["reply"] for row in rows[:3])
    assert "none.png is no picture that can be read" in rows[3]["error"]
    parts[1].unlink()
    assert "4 pictures in 2 parts, 1 of them done" in run(*command, "--part", "2")
    assert [part.read_bytes() for part in parts] == before


def test_the_adapter_that_is_shipped_is_smollm2s():
    folder = ROOT / "examples" / "chatpose-smollm2"
    weights = load_file(folder / "adapter_model.safetensors")
    layers = {int(match[1]) for name in weights if (match := re.search(r"\.layers\.(\d+)\.", name))}
    assert layers == set(range(22, 30)), "the last eight of thirty"
    (row,) = (weight for name, weight in weights.items() if name.endswith("trainable_tokens_delta"))
    assert row.shape == (1, 576)
    (head,) = (weight for name, weight in weights.items() if name.endswith("pose_head.linear_2.weight"))
    assert head.shape[0] == 24 * 6
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (64, None)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 40e6
