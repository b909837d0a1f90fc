import json

import numpy as np
import pytest
import torch

from chatpose_hf import export
from chatpose_hf.export import save_reply


@pytest.fixture
def reply():
    thetas = [torch.arange(72.0), torch.zeros(72)]
    return {"text": "It is <POSE> and <POSE>.", "poses": [{"theta": theta} for theta in thetas]}


def test_files_hold_the_reply(reply, tmp_path):
    paths = save_reply(tmp_path / "new" / "folder", reply, "a question é", ["a.png"])
    assert [path.name for path in paths] == ["reply.json", "pose.npz"]
    record = json.loads(paths[0].read_text(encoding="utf-8"))
    assert record["prompt"] == "a question é"
    assert record["images"] == ["a.png"]
    assert record["reply"] == "It is <POSE> and <POSE>."
    assert [pose["theta"] for pose in record["poses"]] == [list(map(float, range(72))), [0.0] * 72]
    with np.load(paths[1], allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "poses": (2, 72),
            "global_orient": (2, 3),
            "body_pose": (2, 69),
            "betas": (10,),
        }
        assert arrays["global_orient"].dtype == np.float32
        assert arrays["body_pose"][0].tolist() == list(range(3, 72))


def test_an_answer_without_pose_leaves_no_older_pose(reply, tmp_path):
    save_reply(tmp_path, reply, "a")
    assert save_reply(tmp_path, {"text": "No.", "poses": []}, "b") == [tmp_path / "reply.json"]
    assert not (tmp_path / "pose.npz").exists()


def test_a_failed_write_keeps_the_old_file(reply, tmp_path, monkeypatch):
    save_reply(tmp_path, reply, "first")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(export.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_reply(tmp_path, reply, "second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
