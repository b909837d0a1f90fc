"""Poses put together from parts of rows' poses: whose parts they are, that they have no heading, that they repeat."""

import numpy as np
import pytest
import torch
from make_rows import make_row, write_splits

from chatpose_hf.cli import main
from chatpose_hf.data import synthetic
from chatpose_hf.data.compositions import Compositions, compose
from chatpose_hf.data.rows import load_rows, validate_row
from chatpose_hf.data.synthetic import PoseSampler
from chatpose_hf.pose_files import turn_frame
from chatpose_hf.rotations import rotvec_to_rotmat


ARMS = ([13, 16, 18, 20], [14, 17, 19, 21])


@pytest.fixture
def rows(tmp_path):
    """Poses of both splits differ in the head, which no part of this source moves but for noise."""
    train = [make_row(n) for n in range(8)]
    val = [make_row(n) for n in range(20, 24)]
    for split, heads in ((train, 0.3), (val, -0.3)):
        for row in split:
            row["pose_mask"] = [[joint < 22 for joint in range(24)]]
            row["poses"][0][15] = [heads, 0.0, 0.0]
            row["poses"][0][0] = [np.pi, 0.0, 0.0]
    return write_splits(tmp_path / "rows", train, val)


def test_parts_of_a_pose_then_are_those_of_given_poses(monkeypatch):
    monkeypatch.setattr(synthetic, "_NOISE_SHARE", 0)
    poses = np.arange(5)[:, None, None] * np.full((5, 24, 3), 0.1)
    masks = np.ones((5, 24), dtype=bool)
    masks[4] = False
    masks[4, 0] = True
    sampler, rng = PoseSampler(poses, masks), np.random.default_rng(0)
    strange, owners = 0, []
    for _ in range(200):
        pose, mask = compose(sampler, rng)
        numbers = np.rint(pose[1:, 0] / 0.1).astype(int)
        np.testing.assert_allclose(pose[1:], numbers[:, None] * 0.1 * np.ones(3), atol=1e-6)
        assert (mask[1:] == (numbers < 4)).all(), "what is known goes with its part"
        for arm in ARMS:
            assert len(set(numbers[np.array(arm) - 1])) == 1, "an arm is one pose's"
        strange += numbers[ARMS[0][0] - 1] != numbers[14]
        owners.append((numbers[12], numbers[13]))
    assert 0.3 < strange / 200 < 0.5, "half of the arms are drawn anew, one in five of them the same"
    assert len(set(owners)) > 15, "the arms are drawn apart"


def test_rows_then_are_upright_without_heading_and_told_by_their_geometry(rows):
    source = Compositions(rows, count=50)
    made = list(source)
    assert len(made) == 50
    assert not source.skipped
    for row in made:
        validate_row(row)
        assert row["task"] == "text_to_pose"
        assert {caption["kind"] for caption in row["captions"]} == {"geometry"}
        world = turn_frame(torch.tensor(np.array(row["poses"])), "z-up", inverse=True)
        left = rotvec_to_rotmat(world[0, 0])[:, 0]
        assert left[1] == pytest.approx(0, abs=1e-5), "the hips' left points to +x"
        assert left[0] > 0
    assert len({np.array(row["poses"]).tobytes() for row in made}) == 50


def test_rows_then_depend_on_seed_and_number_alone(rows):
    few, many = list(Compositions(rows, count=5)), list(Compositions(rows, count=12))
    for one, other in zip(few, many, strict=False):
        assert one["captions"] == other["captions"]
        np.testing.assert_array_equal(one["poses"], other["poses"])
    other_seed = list(Compositions(rows, seed=1, count=5))
    assert not np.array_equal(few[0]["poses"], other_seed[0]["poses"])


def test_val_then_is_made_of_val(rows, monkeypatch):
    monkeypatch.setattr(Compositions, "rows_per_part", 2)
    source = Compositions(rows, count=40)
    assert [part for part in source.parts() if part.startswith("val")] == ["val/00019"]
    (heads,) = np.array([row["poses"][0][15][:1] for row in source.rows("val/00019")]).T
    assert (heads < 0).all()
    (heads,) = np.array([row["poses"][0][15][:1] for row in source.rows("train/00000")]).T
    assert (heads > 0).all()


def test_source_when_there_are_no_rows_or_no_count_then_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="make some with `chatpose data`"):
        Compositions(tmp_path).parts()
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        Compositions(tmp_path, count=0)


def test_command_when_told_how_many_then_makes_so_many(rows, tmp_path, capsys):
    command = ["data", "compositions", "--input", str(rows), "--output", str(tmp_path / "made")]
    assert main([*command, "--count", "7"]) == 0
    assert len(load_rows(tmp_path / "made")) == 7
    assert main(["data", "cmu", *command[2:], "--count", "7"]) == 1
    assert "expected no `--count` for cmu" in capsys.readouterr().err
