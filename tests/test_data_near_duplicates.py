"""Poses of train that are nearly ones of val: found however they stand, and left out by every source that draws new poses."""

import numpy as np
import torch

from chatpose_hf.body import BodyModel
from chatpose_hf.data.compositions import Compositions
from chatpose_hf.data.near_duplicates import NEARLY_VAL, is_near
from chatpose_hf.data.rows import write_rows
from chatpose_hf.data.source import Source
from chatpose_hf.data.synthetic import SyntheticPeople
from chatpose_hf.pose_files import turn_frame
from chatpose_hf.rotations import rotmat_to_rotvec, rotvec_to_rotmat


def draw(count, seed=0):
    poses = torch.from_numpy(np.random.default_rng(seed).normal(0, 0.4, (count, 24, 3))).float()
    poses[:, 0] = 0
    return turn_frame(poses, "y-up")


def test_is_near_when_compared_joint_by_joint_then_the_same():
    others = draw(30, 1)
    poses = torch.cat([draw(40), others[:10] + torch.linspace(0, 1, 10)[:, None, None] * torch.eye(24)[16][:, None]])
    body = BodyModel.load("default")
    joints, other_joints = (body.joints(part)[:, :24] for part in (poses, others))
    joints, other_joints = joints - joints[:, :1], other_joints - other_joints[:, :1]
    expected = torch.tensor(
        [min((one - other).norm(dim=-1).mean() for other in other_joints) < 0.03 for one in joints]
    )
    assert 3 < expected.sum() < 10
    assert is_near(poses, others).tolist() == expected.tolist()


def test_is_near_when_turned_about_the_vertical_then_still():
    pose = draw(1)
    turned = pose.clone()
    heading = rotvec_to_rotmat(torch.tensor([0.0, 2.0, 0.0]))
    turned[:, 0] = rotmat_to_rotvec(heading @ rotvec_to_rotmat(pose[:, 0]))
    assert is_near(turned, pose).tolist() == [True]
    leaning = pose.clone()
    leaning[:, 0] = rotmat_to_rotvec(rotvec_to_rotmat(torch.tensor([0.5, 0.0, 0.0])) @ rotvec_to_rotmat(pose[:, 0]))
    assert is_near(leaning, pose).tolist() == [False]
    assert is_near(pose, torch.zeros(0, 24, 3)).tolist() == [False]


class _Given(Source):
    name, licence = "given", "CC0"

    def parts(self):
        return []

    def read_part(self, part):
        return iter(())


def test_new_poses_of_train_when_nearly_of_val_then_are_left_out_and_counted(tmp_path):
    """Most poses that are drawn from a val that is all of train are what they were, give or take some noise."""
    source, poses = _Given(tmp_path), draw(4).numpy()
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        rows = [
            source.make_row(f"{split}{n}", "text_to_pose", [pose], [("human", "He stands.")])
            for n, pose in enumerate(poses)
        ]
        write_rows(tmp_path / split / "0.parquet", rows)
    for made in (Compositions(tmp_path, count=60), SyntheticPeople(tmp_path, count=30, image_size=16)):
        rows = list(made.rows(made.parts()[0]))
        assert made.skipped[NEARLY_VAL] > 2
        assert len(rows) + sum(made.skipped.values()) == made.count
        left = torch.tensor(
            np.concatenate([row["poses"] for row in rows if row["task"] == "text_to_pose"] or [draw(1)])
        )
        assert made.name == "synthetic" or not is_near(left, torch.from_numpy(poses)).any()
