"""The default body and SMPL-family bodies against naive references, smplx itself, and what words say of poses."""

import math

import numpy as np
import pytest
import smplx
import torch
from make_smpl_files import dump_model, make_model
from named_poses import POSES, make_pose
from smplx.utils import Struct

from chatpose_hf.body import JOINT_NAMES, PARENTS, BodyModel
from chatpose_hf.rotations import rotvec_to_rotmat


@pytest.fixture(scope="module")
def body():
    return BodyModel.load("default")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A folder as the official downloads leave it: SMPL as pickle, SMPL-H, SMPL-X as npz in folders of their own."""
    folder = tmp_path_factory.mktemp("body_models")
    (folder / "SMPL_NEUTRAL.pkl").write_bytes(dump_model(make_model("smpl")))
    for kind in ("smplh", "smplx"):
        (folder / kind).mkdir()
        np.savez(folder / kind / f"{kind.upper()}_NEUTRAL.npz", **make_model(kind))
    return folder


def random_poses(*shape, joints=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, joints, 3, generator=generator, dtype=torch.float64).to(dtype)


def naive_joints(body, pose):
    """One joint after the other, with 4x4 matrices, in float64."""
    rest, world = body.rest_joints.double(), []
    for joint, parent in enumerate(body.parents):
        local = torch.eye(4, dtype=torch.float64)
        local[:3, :3] = rotvec_to_rotmat(pose[joint].double())
        local[:3, 3] = rest[joint] - (rest[parent] if joint else 0)
        world.append(world[parent] @ local if joint else local)
    return torch.stack(world)


def test_joints_equal_one_joint_after_the_other(body):
    poses = random_poses(50)
    joints = body.joints(poses)
    assert joints.dtype == torch.float32
    for pose, ours in zip(poses, joints, strict=True):
        naive = naive_joints(body, pose)[:, :3, 3]
        torch.testing.assert_close(ours.double(), naive, atol=1e-6, rtol=0)


def test_vertices_equal_one_vertex_after_the_other(body):
    pose = random_poses(1)[0]
    world = naive_joints(body, pose)
    vertices = body.vertices(pose)
    for vertex in range(0, len(vertices), 500):
        total = torch.zeros(3, dtype=torch.float64)
        for joint in range(24):
            from_joint = body.rest_vertices[vertex].double() - body.rest_joints[joint].double()
            moved = world[joint][:3, :3] @ from_joint + world[joint][:3, 3]
            total += body.weights[vertex, joint].double() * moved
        torch.testing.assert_close(vertices[vertex].double(), total, atol=2e-6, rtol=0)


def test_rest_pose_is_the_rest_body(body):
    rest = torch.zeros(24, 3)
    torch.testing.assert_close(body.joints(rest), body.rest_joints, atol=1e-6, rtol=0)
    torch.testing.assert_close(body.vertices(rest), body.rest_vertices, atol=1e-6, rtol=0)
    assert body.joint_names == JOINT_NAMES
    assert body.parents == PARENTS
    assert body.name == "default"
    assert body.rest_joints[JOINT_NAMES.index("l_wrist"), 0] > 0.5
    assert 1.6 < body.rest_vertices[:, 1].max() - body.rest_vertices[:, 1].min() < 1.8


def test_faces_point_outwards(body):
    corner = body.rest_vertices[body.faces].double()
    volume = torch.linalg.det(corner).sum() / 6
    assert 0.04 < volume < 0.09  # cubic metres; negative if faces pointed inwards


def test_gradients(body):
    body = BodyModel.load("default").double()
    pose = random_poses(2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(body.joints, pose)
    generator = torch.Generator().manual_seed(1)
    probe = torch.randn(3, len(body.rest_vertices), 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda pose: torch.einsum("kvd,nvd->nk", probe, body.vertices(pose)), pose)
    # At rest too, where a careless Rodrigues formula gives NaN.
    assert torch.autograd.gradcheck(body.joints, torch.zeros(1, 24, 3, dtype=torch.float64).requires_grad_())


def test_every_form_of_a_pose_gives_the_same_body(body):
    poses = random_poses(2, 3)
    vertices = body.vertices(poses)
    assert vertices.shape == (2, 3, len(body.rest_vertices), 3)
    assert vertices.is_contiguous()
    for other in (rotvec_to_rotmat(poses), poses.flatten(-2)):
        torch.testing.assert_close(body.vertices(other), vertices)
        assert body.joints(other).shape == (2, 3, 24, 3)
    torch.testing.assert_close(body.vertices(poses[1, 2]), vertices[1, 2], atol=1e-5, rtol=0)
    # 52 and 55 joints: the first 22 count, hands stay flat
    flat_hands = poses.clone()
    flat_hands[..., 22:, :] = 0
    for joints in (52, 55):
        longer = torch.cat([poses[..., :22, :], random_poses(2, 3, joints=joints - 22)], dim=-2)
        torch.testing.assert_close(body.joints(longer), body.joints(flat_hands))
        torch.testing.assert_close(body.joints(longer.flatten(-2)), body.joints(flat_hands))
    torch.testing.assert_close(body.vertices(poses.numpy()), vertices)
    assert body.vertices(torch.zeros(0, 24, 3)).shape == (0, len(body.rest_vertices), 3)
    assert body.joints(torch.zeros(0, 24, 3, 3)).shape == (0, 24, 3)
    torch.testing.assert_close(body.joints(poses.bfloat16()), body.joints(poses), atol=0.05, rtol=0)
    for wrong in (torch.zeros(23, 3), torch.zeros(24, 6), torch.zeros(70), torch.tensor(1.0), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match=r"expected a pose as axis-angle"):
            body.joints(wrong)


def test_no_checkpoint_ever_holds_a_body(body, model_dir):
    assert body.state_dict() == {}
    assert BodyModel.load(model_dir).state_dict() == {}
    assert list(body.parameters()) == []


def smplx_forward(kind, poses, betas, model_dir):
    if kind == "smplx":  # this one ignores `data_struct`
        layer = smplx.SMPLXLayer(str(model_dir / "smplx" / "SMPLX_NEUTRAL.npz"), ext="npz", num_betas=10)
    else:
        layer_class = {"smpl": smplx.SMPLLayer, "smplh": smplx.SMPLHLayer}[kind]
        layer = layer_class("", data_struct=Struct(**make_model(kind)), num_betas=10)
    rotmats = rotvec_to_rotmat(poses)
    parts = {"global_orient": rotmats[:, :1], "body_pose": rotmats[:, 1:24] if kind == "smpl" else rotmats[:, 1:22]}
    if kind == "smplx":
        parts |= {"jaw_pose": rotmats[:, 22:23], "leye_pose": rotmats[:, 23:24], "reye_pose": rotmats[:, 24:25]}
    if kind != "smpl":
        parts |= {"left_hand_pose": rotmats[:, -30:-15], "right_hand_pose": rotmats[:, -15:]}
    output = layer(betas=betas.expand(len(poses), -1), **parts)
    return output.vertices, output.joints[:, : poses.shape[1]]


@pytest.mark.parametrize(("kind", "joints"), [("smpl", 24), ("smplh", 52), ("smplx", 55)])
def test_smpl_bodies_equal_smplx(kind, joints, model_dir, monkeypatch):
    monkeypatch.setenv("SMPL_MODEL_DIR", str(model_dir))
    poses = random_poses(3, joints=joints)
    betas = torch.linspace(-2, 2, 10)
    body = BodyModel.load(kind, betas=betas)
    assert body.num_joints == len(body.joint_names) == joints
    assert body.joint_names[:22] == JOINT_NAMES[:22]
    assert (
        body.name
        == {
            "smpl": "SMPL (SMPL_NEUTRAL.pkl)",
            "smplh": "SMPL-H (SMPLH_NEUTRAL.npz)",
            "smplx": "SMPL-X (SMPLX_NEUTRAL.npz)",
        }[kind]
    )
    vertices, expected_joints = smplx_forward(kind, poses, betas, model_dir)
    torch.testing.assert_close(body.vertices(poses), vertices, atol=5e-6, rtol=0)
    torch.testing.assert_close(body.joints(poses), expected_joints, atol=5e-6, rtol=0)
    # beta = 0 by default, and 24 joints are enough
    plain = BodyModel.load(kind)
    short = random_poses(2)
    padded = torch.zeros(2, joints, 3)
    padded[:, : 24 if kind == "smpl" else 22] = short[:, : 24 if kind == "smpl" else 22]
    vertices, _ = smplx_forward(kind, padded, torch.zeros(10), model_dir)
    torch.testing.assert_close(plain.vertices(short), vertices, atol=5e-6, rtol=0)


def test_where_a_body_comes_from(model_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("SMPL_MODEL_DIR", raising=False)
    assert BodyModel.load().name == "default"
    assert BodyModel.load(model_dir / "SMPL_NEUTRAL.pkl").name == "SMPL (SMPL_NEUTRAL.pkl)"
    assert BodyModel.load(str(model_dir / "smplx")).name == "SMPL-X (SMPLX_NEUTRAL.npz)"
    # the number of joints tells what it is, not the name
    odd = tmp_path / "my body.npz"
    odd.write_bytes((model_dir / "smplx" / "SMPLX_NEUTRAL.npz").read_bytes())
    assert BodyModel.load(odd).name == "SMPL-X (my body.npz)"
    (tmp_path / "basicmodel_m_lbs_10_207_0_v1.0.0.pkl").write_bytes((model_dir / "SMPL_NEUTRAL.pkl").read_bytes())
    assert BodyModel.load(tmp_path, gender="male").name == "SMPL (basicmodel_m_lbs_10_207_0_v1.0.0.pkl)"
    (tmp_path / "smplh" / "female").mkdir(parents=True)
    smplh = (model_dir / "smplh" / "SMPLH_NEUTRAL.npz").read_bytes()
    (tmp_path / "smplh" / "female" / "model.npz").write_bytes(smplh)  # as AMASS's site has it
    assert BodyModel.load(tmp_path, gender="female").name == "SMPL-H (model.npz)"
    monkeypatch.setenv("SMPL_MODEL_DIR", str(model_dir))
    assert BodyModel.load().name == "SMPL (SMPL_NEUTRAL.pkl)"
    assert BodyModel.load("default").name == "default"
    monkeypatch.setenv("SMPL_MODEL_DIR", str(model_dir / "SMPL_NEUTRAL.pkl"))
    assert BodyModel.load().name == "SMPL (SMPL_NEUTRAL.pkl)"


def test_a_missing_file_is_explained(model_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("SMPL_MODEL_DIR", raising=False)
    with pytest.raises(FileNotFoundError) as error:
        BodyModel.load("smpl")
    for part in ("SMPL_NEUTRAL.npz or .pkl", "SMPL_MODEL_DIR is not set", "https://smpl.is.tue.mpg.de", '"default"'):
        assert part in str(error.value)
    monkeypatch.setenv("SMPL_MODEL_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        BodyModel.load()
    for part in (str(tmp_path), str(tmp_path / "smpl"), "needs no file"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"SMPLX_FEMALE.*smpl-x\.is\.tue\.mpg\.de"):
        BodyModel.load("smplx", gender="female")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        BodyModel.load(tmp_path / "nowhere.pkl")
    with pytest.raises(ValueError, match="expected gender neutral, male or female, got 'men'"):
        BodyModel.load("smpl", gender="men")
    with pytest.raises(ValueError, match="the default body has one shape"):
        BodyModel.load("default", betas=[1.0])
    with pytest.raises(ValueError, match="at most 10 finite `betas`"):
        BodyModel.load(model_dir, betas=torch.zeros(300))


def upright(name):
    return dict(
        zip(
            JOINT_NAMES,
            (BodyModel.load("default").joints(make_pose(POSES[name])) * torch.tensor([1, -1, -1])).numpy(),
            strict=True,
        )
    )


def test_named_poses_are_what_they_say():
    """In the upright frame: x to the person's left, y up, z to the front."""
    up = upright("arms up")
    assert min(up["l_wrist"][1], up["r_wrist"][1]) > up["head"][1] + 0.2
    left = upright("left arm raised")
    assert left["l_wrist"][1] > left["head"][1] > left["r_wrist"][1]
    assert left["l_wrist"][0] > 0 > left["r_wrist"][0]
    forward = upright("right arm forward")
    assert forward["r_wrist"][2] > 0.4 > forward["l_wrist"][2]
    kneeling = upright("kneeling on the right knee")
    assert kneeling["r_knee"][1] < kneeling["l_knee"][1] - 0.3
    sitting = upright("sitting")
    assert sitting["l_knee"][2] > 0.3
    assert abs(sitting["l_knee"][1] - sitting["l_hip"][1]) < 0.05
    one_leg = upright("standing on the left leg")
    assert one_leg["r_foot"][1] > one_leg["l_foot"][1] + 0.3
    lying = upright("lying on the back")
    assert abs(lying["head"][1] - lying["pelvis"][1]) < 0.05
    assert lying["l_foot"][1] > lying["l_ankle"][1] + 0.1  # toes up
    bow = upright("bowing")
    assert bow["head"][2] > 0.4
    assert math.isclose(upright("standing, arms down")["head"][2], upright("T-pose")["head"][2], abs_tol=1e-6)
    turned = BodyModel.load("default")
    nose = turned.vertices(make_pose(POSES["head turned to the left"]))
    is_head = turned.weights[:, JOINT_NAMES.index("head")] > 0.9
    nose = nose[is_head][turned.rest_vertices[is_head][:, 2].argmax()]
    assert nose[0] > 0.05  # its tip has gone to the person's left
