"""The model card: what it says, that its metadata is the Hub's, and that no record can break it."""

import configparser
import contextlib
import io
import json
import re

import pytest
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard

from chatpose_hf.card import is_hub_id, make_card, make_eval_results


RUN = {
    "base_model": "somebody/llava-7b",
    "base_revision": "0123abc",
    "method": "lora",
    "data": [
        {"name": "somebody/poses", "split": "train", "weight": 2, "rows": 123456, "licences": ["CC BY-NC 4.0", "CC0"]},
        {"name": "posescript", "split": "train", "weight": 0.5, "rows": 10, "licences": []},
    ],
    "eval_data": [{"name": "posescript", "split": "val"}],
    "config": {"learning_rate": 0.0003, "train": ["posescript"]},
    "trainable_parameters": {"pose head": 1234567},
    "versions": {"torch": "2.13.0"},
    "hardware": "1 x H100",
    "seconds": 3725.4,
    "step": 1000,
    "epoch": 1.5,
    "metrics": {"eval_loss": 0.123456, "eval_mpjpe_mm": 98.76543},
    "body": "smpl",
    "command": "chatpose train run.yaml",
}
RESULT = {
    "task": "text-to-pose",
    "dataset": "somebody/posescript",
    "split": "test",
    "protocol": "first caption",
    "body": "smpl",
    "versions": {"chatpose_hf": "0.1.0"},
    "metrics": {
        "model": {"pa_mpjpe_mm": {"value": 61.25, "low": 60, "high": 63.5}, "angle_deg": 12},
        "mean_pose": {"pa_mpjpe_mm": 99.5},
    },
}


def metadata(card):
    return ModelCard(card).data.to_dict()


def row_of(card, start):
    return next(line for line in card.splitlines() if line.startswith(f"| {start}"))


def test_metadata_of_a_whole_model():
    data = metadata(make_card(RUN, is_adapter=False, repo_id="me/poser"))
    assert data == {
        "base_model": "somebody/llava-7b",
        "base_model_relation": "finetune",
        "datasets": ["somebody/poses"],
        "language": "en",
        "library_name": "transformers",
        "license": "other",
        "license_name": "see-base-model-and-data",
        "license_link": "https://huggingface.co/somebody/llava-7b",
        "pipeline_tag": "image-text-to-text",
        "tags": ["chatpose", "human-pose", "smpl", "text-to-pose", "image-to-pose", "lora"],
    }


def test_metadata_of_an_adapter():
    data = metadata(make_card(RUN, is_adapter=True))
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")


def test_licence_is_what_the_record_gives():
    data = metadata(make_card({**RUN, "license": "apache-2.0"}, is_adapter=False))
    assert data["license"] == "apache-2.0"
    assert not {"license_name", "license_link"} & data.keys()


def test_local_folders_are_no_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows" / "posescript").mkdir(parents=True)
    assert is_hub_id("somebody/posescript")
    names = ["rows/posescript", "/data/posescript", "./rows/posescript", "posescript", "a/b/c", "", None]
    assert not any(map(is_hub_id, names))
    data = metadata(make_card({"base_model": "rows/posescript"}, is_adapter=True))
    assert not {"base_model", "base_model_relation", "license_link"} & data.keys()


def test_results_of_the_model_become_the_model_index():
    card = make_card(RUN, [RESULT], is_adapter=False, repo_id="me/poser")
    (index,) = metadata(card)["model-index"]
    (result,) = index["results"]
    assert index["name"] == "poser"
    assert result["task"]["type"] == "text-to-pose"
    assert result["dataset"] == {"name": "somebody/posescript", "type": "somebody/posescript", "split": "test"}
    args = {"protocol": "first caption", "body": "smpl"}
    assert [(metric["type"], metric["value"], metric["args"]) for metric in result["metrics"]] == [
        ("pa_mpjpe_mm", 61.25, args),
        ("angle_deg", 12, args),
    ]


def test_results_table_has_intervals_and_baselines():
    card = make_card(RUN, [RESULT], is_adapter=False)
    assert "### `text-to-pose` on `somebody/posescript`, split `test`" in card
    assert "Body: `smpl`. Protocol: `first caption`." in card
    assert row_of(card, "Metric | `model`") == "| Metric | `model` | `mean_pose` |"
    assert row_of(card, "`pa_mpjpe_mm`") == "| `pa_mpjpe_mm` | 61.25 [60, 63.5] | 99.5 |"
    assert row_of(card, "`angle_deg`") == "| `angle_deg` | 12 |  |"


def test_evaluations_have_a_table_each():
    other = {**RESULT, "task": "spg", "metrics": {"model": {"fid": 0.25}}}
    card = make_card(RUN, [RESULT, other], is_adapter=False)
    assert card.count("\n### `") == 2
    assert row_of(card, "`fid`") == "| `fid` | 0.25 |", "no column for a system of another evaluation"


def test_metadata_have_the_first_sentence_of_a_protocol():
    result = {**RESULT, "protocol": "smpl-24: 24 joints. An answer without a pose counts as the rest pose."}
    card = make_card(RUN, [result], is_adapter=False)
    (index,) = metadata(card)["model-index"]
    assert index["results"][0]["metrics"][0]["args"]["protocol"] == "smpl-24: 24 joints"
    assert "Protocol: `smpl-24: 24 joints. An answer without a pose counts as the rest pose.`" in card
    assert "protocol: smpl-24: 24 joints," in make_eval_results([result])


def test_record_is_told():
    card = make_card(RUN, is_adapter=True)
    assert row_of(card, "`somebody/poses`").endswith("| `train` | 2 | 123,456 | `CC BY-NC 4.0`, `CC0` |")
    assert row_of(card, "Time") == "| Time | 1 h 2 min |"
    assert row_of(card, "Trained weights of `pose head`").endswith("| 1,234,567 |")
    assert row_of(card, "`eval_mpjpe_mm`") == "| `eval_mpjpe_mm` | 98.77 |"
    assert "(`posescript`, `val`; body: `smpl`)" in card
    assert "```text\nchatpose train run.yaml\n```" in card
    assert f"```json\n{json.dumps(RUN['config'], indent=2)}\n```" in card


def test_what_is_unknown_is_not_stated():
    card = make_card({}, is_adapter=False)
    assert "Base model: not stated, revision: not stated." in card
    assert "Data: not stated." in card
    assert row_of(card, "Hardware") == "| Hardware | not stated |"
    assert "No evaluation is stated." in card
    assert not re.search(r"None|\bnan\b|\{\{|\}\}", card)


def test_nulls_are_as_good_as_absent():
    null = make_card(dict.fromkeys(RUN), is_adapter=False)
    assert null == make_card({}, is_adapter=False)


HOSTILE = (
    "x`y``z | </code><script>alert(1)</script> [a](http://evil.example) ![b](http://evil.example) http://evil.example "
    '\\| {{ 7 * 7 }}\n---\nlicense: mit\n---\n\n# Title\n\n```\n````\n<img src=x onerror="alert(1)"> \u202e'
)


def replace_texts(value, text):
    """The same record with every text replaced, keys too where they are free."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [replace_texts(item, text) for item in value]
    if isinstance(value, dict):
        return {key: replace_texts(item, text) for key, item in value.items()}
    return value


def test_hostile_texts_stay_texts():
    markdown_it = pytest.importorskip("markdown_it")
    pytest.importorskip("linkify_it")

    def card(text):
        run = {**replace_texts(RUN, text), "method": "lora", "license": "other", "license_name": "a"}
        for key in ("config", "trainable_parameters", "versions", "metrics"):
            run[key] = {text: next(iter(run[key].values()))}
        result = replace_texts(RESULT, text)
        result["metrics"] = {"model": {text: 1.0}, text: {text: 2.0}}
        return make_card(run, [result], is_adapter=False, repo_id="me/poser")

    def shape(text):
        """Every tag of the page, in order: a text that became markup would change it."""
        page = markdown_it.MarkdownIt("gfm-like").render(text)
        return re.findall(r"<\w+", page), re.findall(r'(?:href|src)="([^"]*)"', page)

    plain, hostile = card("harmless"), card(HOSTILE)
    assert shape(ModelCard(hostile).text) == shape(ModelCard(plain).text)
    assert metadata(hostile).keys() == metadata(plain).keys()
    assert metadata(hostile)["license"] == "other"
    assert "\u202e" not in hostile
    assert "7 * 7" in hostile


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_model", 3),
        ("step", 1.5),
        ("step", True),
        ("seconds", "long"),
        ("method", "magic"),
        ("data", {}),
        ("config", []),
    ],
)
def test_malformed_record_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"`{field}` of run.json"):
        make_card({field: value}, is_adapter=False)


@pytest.mark.parametrize(
    ("run", "named"),
    [
        ({"data": ["posescript"]}, r"`data\[0\]`"),
        ({"data": [{"rows": 3}]}, r"`name` of `data\[0\]`"),
        ({"eval_data": [{"name": "a", "rows": "3"}]}, r"`rows` of `eval_data\[0\]`"),
        ({"data": [{"name": "a", "licences": [3]}]}, r"`licences` of `data\[0\]`"),
        ({"metrics": {"eval_loss": "low"}}, r"`metrics.eval_loss`"),
        ({"trainable_parameters": {"head": None}}, r"`trainable_parameters.head`"),
    ],
)
def test_malformed_part_of_a_record_is_refused_by_name(run, named):
    with pytest.raises(ValueError, match=named):
        make_card(run, is_adapter=False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": None}, r"`task` in results\[0\]"),
        ({"dataset": 3}, r"`dataset` of results\[0\]"),
        ({"metrics": {"mean_pose": {}}}, r"`metrics.model` in results\[0\]"),
        ({"metrics": {"model": 3}}, r"`metrics.model` of results\[0\]"),
        ({"metrics": {"model": {"angle_deg": "12"}}}, r"`metrics.model.angle_deg`"),
        ({"metrics": {"model": {"angle_deg": float("nan")}}}, r"`metrics.model.angle_deg`"),
        ({"metrics": {"model": {"angle_deg": {"low": 1, "high": 2}}}}, r"`value` in `metrics.model.angle_deg`"),
        ({"metrics": {"model": {"angle_deg": {"value": 1, "low": 1}}}}, r"`high` in `metrics.model.angle_deg`"),
        ({"metrics": {"model": {"angle_deg": {"value": 1, "low": 2, "high": 1}}}}, r"`low` <= `high`"),
        ({"body": None}, r"`body` in results\[0\]: `pa_mpjpe_mm`"),
    ],
)
def test_malformed_results_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        make_card(RUN, [{**RESULT, **changes}], is_adapter=False)


def test_eval_results_are_of_data_sets_on_the_hub():
    local = {**RESULT, "dataset": "posescript"}
    assert make_eval_results([local]) is None
    entries = yaml.safe_load(make_eval_results([local, RESULT]))
    notes = "split: test, protocol: first caption, body: smpl"
    assert entries == [
        {"dataset": {"id": "somebody/posescript", "task_id": f"text-to-pose_{name}"}, "value": value, "notes": notes}
        for name, value in (("pa_mpjpe_mm", 61.25), ("angle_deg", 12))
    ]


def test_code_of_the_card_runs(tmp_path, model, processor):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    card = make_card(RUN, is_adapter=False, repo_id="me/poser")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = code.replace('"me/poser"', repr(str(folder))).replace(
        "max_new_tokens=64", "max_new_tokens=8, force_pose=True"
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert "[torch.Size([72])]" in printed.getvalue()


def test_requirements_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    ours = (ROOT / "model_card" / "requirements.txt").read_text(encoding="utf-8").split()
    assert set(ours) <= set(setup["options"]["install_requires"].split("\n"))
    assert {"transformers", "torch", "pillow"} <= {re.split("[<>=]", line)[0] for line in ours}
