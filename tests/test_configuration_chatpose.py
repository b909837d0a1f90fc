import json

import pytest

from chatpose_hf import ChatPoseConfig


def test_defaults_are_the_papers():
    config = ChatPoseConfig()
    assert config.model_type == "chatpose"
    assert (config.num_pose_joints, config.ce_loss_weight, config.pose_loss_weight) == (24, 1.0, 0.1)
    assert config.pose_hidden_state == "predicts_pose_token"


def test_save_and_load_keeps_every_field(tmp_path):
    config = ChatPoseConfig(
        pose_token_id=7, num_pose_joints=22, pose_head_hidden_size=5, pose_lead_in_ids=[1, 2], pose_loss_weight=2
    )
    config.save_pretrained(tmp_path)
    loaded = ChatPoseConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["pose_lead_in_ids"] == [1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pose_token_id": -1}, "`pose_token_id` must be a token of its own"),
        ({"pose_token_id": 5, "image_token_index": 5}, "not the image token"),
        ({"pose_hidden_state": "is_pose_token"}, "the only rule this version decodes, got 'is_pose_token'"),
        ({"num_pose_joints": 0}, "`num_pose_joints` must be at least 1, got 0"),
        ({"pose_head_hidden_size": 0}, "`pose_head_hidden_size` must be at least 1, got 0"),
        ({"pose_loss_weight": -0.1}, "`pose_loss_weight` must be a finite number"),
        ({"ce_loss_weight": float("nan")}, "`ce_loss_weight` must be a finite number"),
    ],
)
def test_values_without_meaning_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ChatPoseConfig(**fields)


def test_wrong_types_are_refused():
    with pytest.raises(Exception, match="pose_token_id"):
        ChatPoseConfig(pose_token_id="<POSE>")
