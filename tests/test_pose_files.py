"""Poses in files and their frames."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT

from chatpose_hf.atomic_write import npz_bytes
from chatpose_hf.pose_files import load_poses, poses_to_amass, turn_frame
from chatpose_hf.rotations import geodesic_distance, rotvec_to_rotmat


@pytest.fixture
def poses():
    return torch.randn(5, 24, 3, generator=torch.Generator().manual_seed(0))


def global_orient(rotvec, **settings):
    pose = torch.zeros(24, 3)
    pose[0] = torch.tensor(rotvec)
    return turn_frame(pose, **settings)[0]


def assert_same_rotations(poses, others, atol=2e-6):
    assert geodesic_distance(rotvec_to_rotmat(poses), rotvec_to_rotmat(others)).max() < atol


def test_upright_people_in_every_frame():
    """The vectors of docs/conventions.md: upright and facing the camera is (pi, 0, 0)."""
    upright = torch.tensor([math.pi, 0, 0])
    assert_same_rotations(global_orient([0.0, 0.0, 0.0], frame="y-up"), upright)
    # AMASS: z up, an upright person is R_x(90 degrees); lying on the back, the head towards +y, is no rotation
    assert_same_rotations(global_orient([math.pi / 2, 0.0, 0.0], frame="z-up"), upright)
    assert_same_rotations(global_orient([0.0, 0.0, 0.0], frame="z-up"), torch.tensor([math.pi / 2, 0, 0]))
    assert_same_rotations(global_orient([math.pi, 0.0, 0.0], frame="camera"), upright)


@pytest.mark.parametrize("frame", ["camera", "y-up", "z-up"])
def test_there_and_back(poses, frame):
    back = turn_frame(turn_frame(poses.double(), frame, inverse=True), frame)
    assert_same_rotations(back, poses.double())
    torch.testing.assert_close(back[:, 1:], poses[:, 1:].double())
    with pytest.raises(ValueError, match="expected a frame of camera, y-up, z-up, got 'x-up'"):
        turn_frame(poses, "x-up")


def test_amass_layout(poses, tmp_path):
    (tmp_path / "pose.npz").write_bytes(npz_bytes(poses_to_amass(poses)))
    with np.load(tmp_path / "pose.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "poses": (5, 156),
            "trans": (5, 3),
            "betas": (16,),
            "gender": (),
            "mocap_framerate": (),
            "theta": (5, 72),
        }
        assert arrays["gender"] == "neutral"
        assert arrays["mocap_framerate"] == 30
        np.testing.assert_allclose(arrays["poses"][:, 3:66], poses[:, 1:22].flatten(1), rtol=1e-6)
        assert (arrays["poses"][:, 66:] == 0).all()
        np.testing.assert_array_equal(arrays["theta"], poses.flatten(1))
    loaded, names = load_poses(tmp_path / "pose.npz")
    torch.testing.assert_close(loaded, poses, rtol=0, atol=0)
    assert names == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("joints", [52, 55])
def test_files_of_amass(poses, tmp_path, joints):
    """As downloaded: no `theta`, z up, more joints, and an object array that is never read."""
    arrays = poses_to_amass(poses)
    full = np.zeros((5, joints * 3))
    full[:, :66] = arrays["poses"][:, :66]
    full[:, 66:] = 0.3  # fingers, jaw
    np.savez(
        tmp_path / "walk_poses.npz", poses=full, trans=arrays["trans"], marker_labels=np.array([{}], dtype=object)
    )
    loaded, _ = load_poses(tmp_path / "walk_poses.npz")
    assert loaded.dtype == torch.float32
    assert_same_rotations(loaded[:, :22], poses[:, :22])
    assert (loaded[:, 22:] == 0).all()


def test_other_layouts_need_their_frame(poses, tmp_path):
    upright = turn_frame(poses, "y-up", inverse=True)
    np.savez(tmp_path / "a.npz", poses=upright.numpy(), ids=np.arange(5))
    np.savez(tmp_path / "b.npz", poses=upright.flatten(1).numpy())
    for name in ("a.npz", "b.npz"):
        assert_same_rotations(load_poses(tmp_path / name, "y-up")[0], poses)
        with pytest.raises(ValueError, match=r"does not say which frame.*camera, y-up, z-up"):
            load_poses(tmp_path / name)


def test_real_motion_capture_poses_stand_upright():
    path = ROOT.parent / "shared" / "data" / "cmu_poses" / "val.npz"
    if not path.is_file():
        pytest.skip(f"needs the motion-capture poses at {path}, which are not in this checkout")
    poses, _ = load_poses(path, "y-up")
    up = rotvec_to_rotmat(poses[:, 0])[..., 1]  # where the body's y axis points
    assert (up[:, 1] < 0).float().mean() > 0.9  # y points down in the camera frame


def test_replies(poses, tmp_path):
    thetas = [{"theta": pose.flatten().tolist()} for pose in poses]
    (tmp_path / "reply.json").write_text(json.dumps({"prompt": "run", "reply": "<POSE>", "poses": thetas[:2]}))
    loaded, names = load_poses(tmp_path / "reply.json")
    torch.testing.assert_close(loaded, poses[:2])
    assert names == ["run", "run"]
    lines = [
        {"id": 7, "prompt": "a", "poses": thetas[:1]},
        {"prompt": "b\u2028", "poses": []},
        {"prompt": "c", "poses": thetas[1:]},
    ]
    (tmp_path / "replies.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    loaded, names = load_poses(tmp_path / "replies.jsonl")
    torch.testing.assert_close(loaded, poses)
    assert names == ["7", "c", "c", "c", "c"]


def test_what_cannot_be_read_says_why(poses, tmp_path):
    def refused(name, content, match):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.savez(path, **content)
        with pytest.raises(ValueError, match=match):
            load_poses(path)

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    refused("a.npz", b"text", "cannot read")
    refused("b.npz", b"PK\x03\x04 cut", "cannot read")
    refused("c.npz", {"vertices": np.zeros(3)}, "expected an array `poses` in .*got vertices")
    refused("d.npz", {"poses": np.zeros((4, 66))}, "does not say which frame")
    refused("e.npz", {"poses": np.array([Payload()], dtype=object)}, "type `object`")
    refused("f.npz", pickle.dumps(Payload()), "cannot read")
    refused("g.npz", {"poses": np.full((1, 156), np.nan)}, "NaN")
    refused("g.npz", {"poses": np.full((1, 156), 1e30)}, "no angle in radians")
    edited = poses_to_amass(poses)
    edited["poses"][2, 4] += 0.5
    refused("h.npz", edited, "`poses` and `theta` of .* are different poses")
    refused("i.json", b"{", "expected replies")
    refused("j.json", b"[1]", "expected replies")
    refused("k.json", b'{"poses": [{"theta": [1, 2]}]}', r"expected poses of shape .*got \(1, 2\)")
    refused("l.json", b'{"poses": [{"theta": [1, 2]}, {"theta": [1]}]}', "expected replies")
    refused("deep.json", b"[" * 100_000, "expected replies")
    refused("empty.jsonl", b"\n", "holds no pose")
    (tmp_path / "ours.npz").write_bytes(npz_bytes(poses_to_amass(poses)))
    with pytest.raises(ValueError, match=r"expected no frame for .*ours\.npz"):
        load_poses(tmp_path / "ours.npz", "camera")
    refused("none.jsonl", b'{"poses": []}\n{"poses": []}\n', "holds no pose, only words")
    refused("latin.json", b'{"prompt": "\xe9", "poses": []}', "expected replies")
    refused("m.txt", b"", r"expected a file of poses \(\.npz, \.json, \.jsonl\)")
    assert not (tmp_path / "marker").exists()
    with pytest.raises(ValueError, match=r"got \(4, 66\)"):
        load_poses(tmp_path / "d.npz", "camera")
    with pytest.raises(FileNotFoundError):
        load_poses(tmp_path / "nowhere.npz")
