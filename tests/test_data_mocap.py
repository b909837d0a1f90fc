"""Motion capture: bones that point as in the source, hinges, namings, and folders of good and broken files."""

import numpy as np
import pytest
import torch

from chatpose_hf.body import JOINT_NAMES, PARENTS, BodyModel
from chatpose_hf.data.amass import face_camera
from chatpose_hf.data.mocap import MotionCapture, Rig
from chatpose_hf.data.mocap_files import load_amc, load_bvh
from chatpose_hf.data.prepare import prepare_rows
from chatpose_hf.data.rows import load_rows, validate_row
from chatpose_hf.export import bvh_bytes


BODY = BodyModel.load("default")
LIMBS = [
    (f"{side}_{joint}", f"{side}_{child}")
    for side in "lr"
    for joint, child in (("hip", "knee"), ("knee", "ankle"), ("shoulder", "elbow"), ("elbow", "wrist"))
]
# Joints by parent: name and place in a T-pose, in centimetres; the names are Mixamo's.
T_POSE = {
    "Hips": ("", (0, 95, 0)),
    "Spine": ("Hips", (0, 105, -1)),
    "Spine1": ("Spine", (0, 117, -2)),
    "Spine2": ("Spine1", (0, 130, -2)),
    "Neck": ("Spine2", (0, 146, -3)),
    "Head": ("Neck", (0, 156, 0)),
    **{
        f"{side}{name}": (f"{side}{parent}" if parent in names else parent, (x * sign, y, z))
        for side, sign in (("Left", 1), ("Right", -1))
        for names in [("Shoulder", "Arm", "ForeArm", "UpLeg", "Leg", "Foot")]
        for name, parent, (x, y, z) in (
            ("Shoulder", "Spine2", (4, 142, 0)),
            ("Arm", "Shoulder", (18, 143, -1)),
            ("ForeArm", "Arm", (45, 143, -1)),
            ("Hand", "ForeArm", (71, 143, -1)),
            ("UpLeg", "Hips", (9, 91, 0)),
            ("Leg", "UpLeg", (9, 50, 1)),
            ("Foot", "Leg", (9, 8, -1)),
            ("ToeBase", "Foot", (9, 1, 11)),
        )
    },
}
CMU_NAMES = {
    "Spine2": "Spine1",
    "Spine1": "Spine",
    "Spine": "LowerBack",
    "LeftHand": "LeftFingerBase",
    "RightHand": "RightFingerBase",
}


def turn(axis, degrees):
    """A rotation about x, y or z, as in a textbook."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array(
        {
            "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
            "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
            "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
        }[axis]
    )


def to_rotmat(rotvec):
    """Rodrigues' formula."""
    angle = np.linalg.norm(rotvec)
    x, y, z = np.asarray(rotvec, dtype=float) / (angle or 1.0)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew


def degrees(pose, name):
    return np.degrees(pose[JOINT_NAMES.index(name)])


def in_space(pose):
    """Rotations `(24, 3, 3)` of a pose's joints, y up."""
    turned = []
    for joint, parent in enumerate(PARENTS):
        local = to_rotmat(pose[joint])
        turned.append(turned[parent] @ local if joint else turn("x", 180) @ local)
    return np.stack(turned)


def direction(start, end):
    return (np.asarray(end) - start) / np.linalg.norm(np.asarray(end) - start)


def place(name):
    return BODY.rest_joints[JOINT_NAMES.index(name)].double().numpy()


def bvh(skeleton=None, frames=({},), order="ZXY", rename=str, seconds=0.5, moved=(0, 0, 0)):
    """A BVH file of joints by name, (parent, place); a frame has some joints' angles in the order of the channels."""
    skeleton = T_POSE if skeleton is None else skeleton
    lines, listed = ["HIERARCHY"], []

    def write_joint(name, place):
        listed.append(name)
        children = [child for child, (parent, _) in skeleton.items() if parent == name]
        offset = np.subtract(skeleton[name][1], place)
        position = "" if skeleton[name][0] else "Xposition Yposition Zposition "
        rotations = " ".join(f"{axis}rotation" for axis in order)
        lines.extend(
            [
                f"{'JOINT' if skeleton[name][0] else 'ROOT'} {rename(name)}",
                "{",
                f"OFFSET {offset[0]} {offset[1]} {offset[2]}",
                f"CHANNELS {6 if position else 3} {position}{rotations}",
            ]
        )
        for child in children:
            write_joint(child, skeleton[name][1])
        lines.extend([] if children else ["End Site", "{", "OFFSET 0 0 1", "}"])
        lines.append("}")

    write_joint(next(iter(skeleton)), (0, 0, 0))
    lines += ["MOTION", f"Frames: {len(frames)}", f"Frame Time: {seconds}"]
    for frame in frames:
        assert frame.keys() <= set(listed)
        values = [*moved, *(angle for name in listed for angle in frame.get(name, (0, 0, 0)))]
        lines.append(" ".join(map(str, values)))
    return "\n".join(lines) + "\n"


def cmu_skeleton():
    """CMU's joints on the T-pose: the lowest spine joint at the pelvis, two for the forearm, legs 20 degrees out."""
    skeleton = {
        CMU_NAMES.get(name, name): (CMU_NAMES.get(parent, parent), at) for name, (parent, at) in T_POSE.items()
    }
    skeleton["LowerBack"] = ("Hips", T_POSE["Hips"][1])
    for side, sign in (("Left", 1), ("Right", -1)):
        elbow, wrist = skeleton[f"{side}ForeArm"][1], skeleton[f"{side}FingerBase"][1]
        skeleton[f"{side}Hand"] = (f"{side}ForeArm", tuple(np.add(elbow, wrist) / 2))
        skeleton[f"{side}FingerBase"] = (f"{side}Hand", wrist)
        hip = np.array(skeleton[f"{side}UpLeg"][1])
        for name, length in (("Leg", 41), ("Foot", 83)):
            out = np.radians(20)
            skeleton[f"{side}{name}"] = (
                skeleton[f"{side}{name}"][0],
                tuple(hip + length * np.array([sign * np.sin(out), -np.cos(out), 0])),
            )
    return skeleton


def asf(changes=()):
    """CMU's bones, their axes and their dofs, as in its files; lengths are made up."""
    bones = ""
    hierarchy = "root lhipjoint rhipjoint lowerback\n"

    def bone(name, parent, direction, length, axis="0 0 0", dof=""):
        nonlocal bones, hierarchy
        dof = f"    dof {dof}\n" if dof else ""
        bones += f"  begin\n     name {name}\n     direction {direction}\n     length {length}\n"
        bones += f"     axis {axis} XYZ\n{dof}  end\n"
        hierarchy += f"    {parent} {name}\n" if parent != "root" else ""

    for name, parent in zip(
        ("lowerback", "upperback", "thorax", "lowerneck", "upperneck", "head"),
        ("root", "lowerback", "upperback", "thorax", "lowerneck", "upperneck"),
        strict=True,
    ):
        bone(name, parent, "0 1 0", 2, dof="rx ry rz")
    for side, sign in (("l", 1), ("r", -1)):
        leg, foot = f"{sign * 0.34202} -0.939693 0", f"-90 0 {sign * 20}"
        bone(f"{side}hipjoint", "root", f"{sign * 0.6} -0.7 0.3", 2.5)
        bone(f"{side}femur", f"{side}hipjoint", leg, 7, f"0 0 {sign * 20}", "rx ry rz")
        bone(f"{side}tibia", f"{side}femur", leg, 7.2, f"0 0 {sign * 20}", "rx")
        bone(f"{side}foot", f"{side}tibia", f"{sign * 0.065} -0.178 0.98", 2, foot, "rx rz")
        bone(f"{side}toes", f"{side}foot", "0 0 1", 1, foot, "rx")
        arm = f"180 {-sign * 30} {-sign * 90}"
        bone(f"{side}clavicle", "thorax", f"{sign * 0.92} 0.37 0.09", 3.4, dof="ry rz")
        bone(f"{side}humerus", f"{side}clavicle", f"{sign} 0 0", 4.9, arm, "rx ry rz")
        bone(f"{side}radius", f"{side}humerus", f"{sign} 0 0", 3.2, arm, "rx")
        bone(f"{side}wrist", f"{side}radius", f"{sign} 0 0", 1.6, f"0 {sign * 90} {sign * 90}", "ry")
        bone(f"{side}hand", f"{side}wrist", f"{sign} 0 0", 0.6, f"0 {sign * 90} {sign * 90}", "rx rz")
    text = (
        ":version 1.10\n:units\n  mass 1.0\n  length 0.45\n  angle deg\n:root\n   order TX TY TZ RX RY RZ\n"
        "   axis XYZ\n   position 0 0 0\n   orientation 0 0 0\n"
        f":bonedata\n{bones}:hierarchy\n  begin\n    {hierarchy}  end\n"
    )
    for old, new in changes:
        text = text.replace(old, new)
    return text


DOFS = {
    "root": 6,
    **dict.fromkeys(("lowerback", "upperback", "thorax", "lowerneck", "upperneck", "head"), 3),
    **{
        f"{side}{name}": count
        for side in "lr"
        for name, count in {
            "femur": 3, "tibia": 1, "foot": 2, "toes": 1,
            "clavicle": 2, "humerus": 3, "radius": 1, "wrist": 1, "hand": 2,
        }.items()
    },
}  # fmt: skip


def amc(*frames):
    text = "#!OML:ASF\n:FULLY-SPECIFIED\n:DEGREES\n"
    for number, frame in enumerate(frames, 1):
        lines = (f"{name} {' '.join(map(str, frame.get(name, [0] * count)))}" for name, count in DOFS.items())
        text += f"{number}\n" + "\n".join(lines) + "\n"
    return text


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def bvh_poses(folder, *args, **kwargs):
    capture = load_bvh(write(folder, "pose.bvh", bvh(*args, **kwargs)))
    return Rig(capture).poses(range(capture.num_frames))


def amc_poses(folder, *frames):
    capture = load_amc(write(folder, "1.amc", amc(*frames)), write(folder, "1.asf", asf()))
    return Rig(capture).poses(range(capture.num_frames))


def read(source):
    rows = list(source)
    for row in rows:
        validate_row(row)
    return rows


# --- from one skeleton to the other


def test_rig_when_reading_our_own_bvh_then_the_poses_come_back(tmp_path):
    poses = face_camera(np.random.default_rng(0).normal(0, 0.6, (20, 24, 3)), "y-up")
    capture = load_bvh(write(tmp_path, "own.bvh", bvh_bytes(torch.from_numpy(poses), BODY)))
    rig = Rig(capture)
    read_back = rig.poses(range(20))
    assert rig.mask == [True] * 24
    for pose, other in zip(poses, read_back, strict=True):
        np.testing.assert_allclose([to_rotmat(v) for v in other], [to_rotmat(v) for v in pose], atol=1e-4)


def test_rig_when_our_own_bvh_has_a_heading_then_it_is_gone(tmp_path):
    pose = np.zeros((1, 24, 3))
    pose[0, 0] = [0, 1.1, 0]
    pose[0, 4] = [0.7, 0, 0]
    camera = torch.from_numpy(pose.copy())
    camera[0, 0] = torch.tensor([np.pi * np.cos(0.55), 0, np.pi * np.sin(0.55)])  # R_x(180) R_y(1.1)
    np.testing.assert_allclose(to_rotmat(camera[0, 0].numpy()), turn("x", 180) @ to_rotmat(pose[0, 0]), atol=1e-12)
    capture = load_bvh(write(tmp_path, "own.bvh", bvh_bytes(camera, BODY)))
    read_back = Rig(capture).poses([0])[0]
    np.testing.assert_allclose(to_rotmat(read_back[0]), np.diag([1, -1, -1]), atol=1e-4)
    np.testing.assert_allclose(read_back[4], [0.7, 0, 0], atol=1e-4)


@pytest.mark.parametrize("arms", [0, -45, -90, 40])
@pytest.mark.parametrize("rename", [str, "mixamorig:{}".format, "mixamorig1:{}".format, str.upper], ids=range(4))
def test_rig_when_posed_at_random_then_limbs_point_as_in_the_source(tmp_path, arms, rename):
    skeleton = dict(T_POSE)
    for side, sign in (("Left", 1), ("Right", -1)):
        shoulder = np.array(T_POSE[f"{side}Arm"][1])
        for name in ("ForeArm", "Hand"):
            parent, at = T_POSE[f"{side}{name}"]
            skeleton[f"{side}{name}"] = (parent, tuple(shoulder + turn("z", sign * arms) @ (at - shoulder)))
    rng = np.random.default_rng(1)
    frame = {name: rng.uniform(-80, 80, 3).round(3) for name in skeleton}
    pose = bvh_poses(tmp_path, skeleton, [frame], rename=rename)[0]

    turned = {}
    for name, (parent, _) in skeleton.items():
        z, x, y = frame[name]
        turned[name] = (turned[parent] if parent else np.eye(3)) @ turn("z", z) @ turn("x", x) @ turn("y", y)
    words = {"hip": "UpLeg", "knee": "Leg", "ankle": "Foot", "shoulder": "Arm", "elbow": "ForeArm", "wrist": "Hand"}
    ours = in_space(pose)
    heading = ours[0] @ turned["Hips"].T  # the yaw that was taken out
    np.testing.assert_allclose(heading[1], [0, 1, 0], atol=1e-5)
    for joint, child in LIMBS:
        side = {"l": "Left", "r": "Right"}[joint[0]]
        source = side + words[joint[2:]]
        bone = direction(skeleton[source][1], skeleton[side + words[child[2:]]][1])
        expected = heading @ turned[source] @ bone
        found = ours[JOINT_NAMES.index(joint)] @ direction(place(joint), place(child))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rig_when_a_cmu_motion_is_posed_at_random_then_limbs_point_as_in_the_source(tmp_path):
    rng = np.random.default_rng(2)
    frame = {name: rng.uniform(-60, 60, count).round(3) for name, count in DOFS.items()}
    capture = load_amc(write(tmp_path, "1.amc", amc(frame)), write(tmp_path, "1.asf", asf()))
    turned = dict(zip(capture.names, capture.rotmats([0])[0], strict=True))
    ours = in_space(Rig(capture).poses([0])[0])
    heading = ours[0] @ turned["root"].T
    leg = np.array([0.34202, -0.939693, 0])
    for joint, child, source, bone in (
        ("l_hip", "l_knee", "lfemur", leg),
        ("r_hip", "r_knee", "rfemur", leg * [-1, 1, 1]),
        ("l_knee", "l_ankle", "ltibia", leg),
        ("r_knee", "r_ankle", "rtibia", leg * [-1, 1, 1]),
        ("l_shoulder", "l_elbow", "lhumerus", (1, 0, 0)),
        ("r_shoulder", "r_elbow", "rhumerus", (-1, 0, 0)),
        ("l_elbow", "l_wrist", "lradius", (1, 0, 0)),
        ("r_elbow", "r_wrist", "rradius", (-1, 0, 0)),
    ):
        found = ours[JOINT_NAMES.index(joint)] @ direction(place(joint), place(child))
        np.testing.assert_allclose(found, heading @ turned[source] @ bone, atol=1e-5)
    # Torso, collars and head turn as they are.
    for joint, source in (("spine1", "upperback"), ("spine3", "thorax"), ("head", "head"), ("l_collar", "lclavicle")):
        np.testing.assert_allclose(ours[JOINT_NAMES.index(joint)], heading @ turned[source], atol=1e-5)


@pytest.mark.parametrize("side", ["Left", "Right"])
def test_rig_when_a_knee_bends_then_it_turns_about_x_alone(tmp_path, side):
    still, bent = bvh_poses(tmp_path, None, [{}, {f"{side}Leg": (0, 90, 0)}])
    name = f"{side[0].lower()}_knee"
    # The default body's legs slope out by 3.4 degrees, this skeleton's do not.
    np.testing.assert_allclose(degrees(bent, name), [90, 0, 0], atol=6)
    np.testing.assert_allclose(
        np.delete(bent, JOINT_NAMES.index(name), 0), np.delete(still, JOINT_NAMES.index(name), 0)
    )


def test_rig_when_a_knee_bends_on_a_skeleton_with_our_bones_then_it_turns_about_x_exactly(tmp_path):
    words = {
        "pelvis": "Hips",
        "spine1": "Spine",
        "spine2": "Spine1",
        "spine3": "Spine2",
        "neck": "Neck",
        "head": "Head",
    }
    limbs = {
        "hip": "UpLeg", "knee": "Leg", "ankle": "Foot", "collar": "Shoulder", "shoulder": "Arm", "elbow": "ForeArm",
        "wrist": "Hand",
    }  # fmt: skip
    words |= {
        f"{side[0].lower()}_{ours}": side + theirs for side in ("Left", "Right") for ours, theirs in limbs.items()
    }
    skeleton = {
        name: (words[JOINT_NAMES[PARENTS[JOINT_NAMES.index(joint)]]] if joint != "pelvis" else "", tuple(place(joint)))
        for joint, name in words.items()
    }
    frames = [{"LeftLeg": (0, 90, 0)}, {"RightForeArm": (0, 0, 80)}, {"LeftArm": (-70, 0, 0)}]
    knee, elbow, shoulder = bvh_poses(tmp_path, skeleton, frames)
    for pose, joint, expected in (
        (knee, "l_knee", (90, 0, 0)),
        (elbow, "r_elbow", (0, 80, 0)),
        (shoulder, "l_shoulder", (0, 0, -70)),
    ):
        np.testing.assert_allclose(degrees(pose, joint), expected, atol=1e-4)
        others = [number for number, name in enumerate(JOINT_NAMES) if name not in (joint, "pelvis")]
        np.testing.assert_allclose(pose[others], 0, atol=1e-6)


@pytest.mark.parametrize(("side", "sign"), [("l", 1), ("r", -1)])
def test_rig_when_cmus_hinges_bend_then_smpls_do(tmp_path, side, sign):
    still, knee, elbow = amc_poses(tmp_path, {}, {f"{side}tibia": [90]}, {f"{side}radius": [90]})
    # A hinge at right angles to the default body's legs, which slope out by 3.4 degrees.
    np.testing.assert_allclose(degrees(knee, f"{side}_knee"), [89.84, sign * 5.4, 0], atol=0.3)
    # The forearm swings forward about the vertical, half of CMU's twist of 30 degrees apart.
    ours = to_rotmat(elbow[JOINT_NAMES.index(f"{side}_elbow")]) @ direction(
        place(f"{side}_elbow"), place(f"{side}_wrist")
    )
    np.testing.assert_allclose(ours, [0, 0, 1], atol=0.06)
    np.testing.assert_allclose(degrees(still, f"{side}_knee"), 0, atol=0.1)
    # Up by the slope of the default body's arms, then CMU's twist.
    slope = np.degrees(np.arcsin(-direction(place(f"{side}_shoulder"), place(f"{side}_elbow"))[1]))
    shoulder = to_rotmat(still[JOINT_NAMES.index(f"{side}_shoulder")])
    np.testing.assert_allclose(shoulder, turn("x", -30) @ turn("z", sign * slope), atol=1e-3)
    assert abs(degrees(still, f"{side}_wrist")[0] - 15) < 0.1


def test_rig_when_cmus_forearm_turns_then_half_goes_to_the_elbow_and_half_to_the_wrist(tmp_path):
    for side, turned in zip("lr", amc_poses(tmp_path, {"lwrist": [-60]}, {"rwrist": [-60]}), strict=True):
        still = amc_poses(tmp_path, {})[0]
        for joint in ("elbow", "wrist"):
            change = degrees(turned, f"{side}_{joint}") - degrees(still, f"{side}_{joint}")
            assert abs(change[0]) == pytest.approx(30, abs=0.1)
        assert np.sign(degrees(turned, f"{side}_wrist")[0] - 15) == np.sign(
            degrees(turned, f"{side}_elbow")[0] - degrees(still, f"{side}_elbow")[0]
        )


def test_rig_when_cmus_thorax_bends_then_the_spine_shares_it(tmp_path):
    bent, nod = amc_poses(tmp_path, {"thorax": [40, 0, 0]}, {"head": [30, 0, 0]})
    for joint, expected in (("spine1", 0), ("spine2", 20), ("spine3", 20), ("neck", 0)):
        np.testing.assert_allclose(degrees(bent, joint), [expected, 0, 0], atol=1e-3)
    for joint, expected in (("spine3", 0), ("neck", 15), ("head", 15)):
        np.testing.assert_allclose(degrees(nod, joint), [expected, 0, 0], atol=1e-3)


def test_rig_when_cmu_stands_legs_apart_then_its_soles_are_at_right_angles_to_the_shins(tmp_path):
    # Legs brought together: the soles are flat.
    pose = amc_poses(tmp_path, {"lfemur": [0, 0, -20], "rfemur": [0, 0, 20]})[0]
    for side in "lr":
        np.testing.assert_allclose(in_space(pose)[JOINT_NAMES.index(f"{side}_ankle")], np.eye(3), atol=1e-4)


def test_rig_when_mixamo_is_at_rest_then_torso_hands_and_feet_are_at_rest(tmp_path):
    pose = bvh_poses(tmp_path)[0]
    for joint in (
        "spine1",
        "spine2",
        "spine3",
        "neck",
        "head",
        "l_collar",
        "r_collar",
        "l_wrist",
        "r_wrist",
        "l_foot",
    ):
        np.testing.assert_allclose(degrees(pose, joint), 0, atol=1e-4)
    np.testing.assert_allclose(in_space(pose)[JOINT_NAMES.index("r_ankle")], np.eye(3), atol=1e-5)


@pytest.mark.parametrize(
    "axes", [turn("y", 90), turn("y", 180), turn("y", 37), turn("x", 90), turn("z", -90)], ids=range(5)
)
def test_rig_when_the_source_has_other_axes_then_the_poses_are_the_same(tmp_path, axes):
    bent = {"LeftLeg": (0, 70, 0), "RightArm": (30, 20, -10), "Spine": (5, 30, 15), "Hips": (4, 20, 50)}
    expected = bvh_poses(tmp_path, None, [bent])[0]

    def turned_angles(z, x, y):
        rotmat = axes @ turn("z", z) @ turn("x", x) @ turn("y", y) @ axes.T
        # Of Rz(a) Rx(b) Ry(c): the second column and the third row.
        return np.degrees(
            [np.arctan2(-rotmat[0, 1], rotmat[1, 1]), np.arcsin(rotmat[2, 1]), np.arctan2(-rotmat[2, 0], rotmat[2, 2])]
        )

    skeleton = {name: (parent, tuple(axes @ at)) for name, (parent, at) in T_POSE.items()}
    frame = {name: turned_angles(*angles) for name, angles in bent.items()}
    np.testing.assert_allclose(bvh_poses(tmp_path, skeleton, [frame])[0], expected, atol=1e-5)


def test_rig_when_heading_changes_then_poses_do_not(tmp_path):
    poses = bvh_poses(tmp_path, None, [{"LeftLeg": (0, 40, 0), "Hips": (0, 0, yaw)} for yaw in (0, 75, -160)], "ZXY")
    for pose in poses:
        np.testing.assert_allclose(to_rotmat(pose[0]), np.diag([1, -1, -1]), atol=1e-5)
        np.testing.assert_allclose(pose[1:], poses[0, 1:], atol=1e-5)


# --- namings


def masked(mask):
    return [name for name, value in zip(JOINT_NAMES, mask, strict=True) if not value]


def test_rig_when_joints_are_missing_then_they_are_masked(tmp_path):
    toeless = {name: value for name, value in T_POSE.items() if "Toe" not in name}
    for skeleton, expected in (
        (T_POSE, ["l_hand", "r_hand"]),
        (toeless, ["l_foot", "r_foot", "l_hand", "r_hand"]),
        (cmu_skeleton(), ["l_foot", "r_foot", "l_hand", "r_hand"]),
    ):
        rig = Rig(load_bvh(write(tmp_path, "a.bvh", bvh(skeleton))))
        assert masked(rig.mask) == expected
        for name in expected:
            np.testing.assert_allclose(rig.poses([0])[0, JOINT_NAMES.index(name)], 0, atol=1e-6)


def test_rig_when_the_bvh_is_of_22_joints_of_smpl_then_hands_are_masked(tmp_path):
    skeleton = {
        JOINT_NAMES[joint]: (JOINT_NAMES[PARENTS[joint]] if joint else "", tuple(BODY.rest_joints[joint].tolist()))
        for joint in range(22)
    }
    rig = Rig(load_bvh(write(tmp_path, "a.bvh", bvh(skeleton, [{"l_knee": (0, 50, 0)}]))))
    assert masked(rig.mask) == ["l_hand", "r_hand"]
    np.testing.assert_allclose(degrees(rig.poses([0])[0], "l_knee"), [50, 0, 0], atol=1e-4)


def test_rig_when_the_bvh_is_of_smpl_then_its_rotations_are_taken_whatever_its_bones(tmp_path):
    skeleton = {
        name: (
            JOINT_NAMES[parent] if parent >= 0 else "",
            tuple(place(name) * [1, 1.2, 1] + [0, -abs(place(name)[0]), 0]),
        )
        for name, parent in zip(JOINT_NAMES, PARENTS, strict=True)
    }
    pose = bvh_poses(tmp_path, skeleton, [{"l_elbow": (0, 0, -60), "r_hip": (0, -30, 0)}])[0]
    np.testing.assert_allclose(degrees(pose, "l_elbow"), [0, -60, 0], atol=1e-4)
    np.testing.assert_allclose(degrees(pose, "r_hip"), [-30, 0, 0], atol=1e-4)
    np.testing.assert_allclose(degrees(pose, "l_shoulder"), 0, atol=1e-4)


def test_rig_when_there_are_two_spine_joints_then_the_second_is_shared(tmp_path):
    skeleton = {
        name: ("Spine1" if parent == "Spine2" else parent, at)
        for name, (parent, at) in T_POSE.items()
        if name != "Spine2"
    }
    pose = bvh_poses(tmp_path, skeleton, [{"Spine": (0, 10, 0), "Spine1": (0, 30, 0)}])[0]
    for joint, expected in (("spine1", 10), ("spine2", 15), ("spine3", 15)):
        np.testing.assert_allclose(degrees(pose, joint), [expected, 0, 0], atol=1e-3)


def test_rig_when_the_bvh_is_cmus_then_as_from_its_asf(tmp_path):
    angles = {"LeftHand": (0, 40, 0), "Spine1": (0, 25, 0), "RightArm": (50, 0, 0)}
    rig = Rig(load_bvh(write(tmp_path, "a.bvh", bvh(cmu_skeleton(), [{}, angles]))))
    pose = rig.poses([1])[0]
    assert rig.first == 1
    np.testing.assert_allclose(degrees(pose, "spine2"), [12.5, 0, 0], atol=1e-3)
    np.testing.assert_allclose(degrees(pose, "spine3"), [12.5, 0, 0], atol=1e-3)
    assert degrees(pose, "l_elbow")[0] == pytest.approx(15 + 20, abs=0.1)
    assert degrees(pose, "l_wrist")[0] == pytest.approx(15 + 20, abs=0.1)


@pytest.mark.parametrize("missing", ["LeftLeg", "RightHand", "Head"])
def test_rig_when_a_joint_has_no_known_name_then_names_it_and_those_known(tmp_path, missing):
    capture = load_bvh(write(tmp_path, "a.bvh", bvh(rename=lambda name: "Bone7" if name == missing else name)))
    with pytest.raises(
        ValueError, match=rf"matches \w+ \({missing.lower()}\); it has .*Bone7.*known names: .*lfemur"
    ) as caught:
        Rig(capture)
    assert "l_hip" not in str(caught.value).partition("it has")[0]


def test_rig_when_two_joints_have_one_name_then_refuses(tmp_path):
    capture = load_bvh(write(tmp_path, "a.bvh", bvh(rename=lambda name: name.replace("Right", "Left"))))
    with pytest.raises(ValueError, match="joints of different names"):
        Rig(capture)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LeftLeg": (49, 91, 0), "LeftFoot": (90, 91, 0)}, "bone at l_hip"),
        ({"LeftForeArm": (-9, 143, -1), "LeftHand": (-30, 143, -1)}, "bone at l_shoulder"),
        ({"RightHand": T_POSE["RightForeArm"][1]}, "bone at r_elbow"),
        ({"LeftUpLeg": (0, 91, 0), "RightUpLeg": (0, 91, 0)}, "line of the hips"),
        ({"LeftUpLeg": (1, 91, 0), "RightUpLeg": (0, 40, 0)}, "line of the hips"),
        ({"Head": T_POSE["Hips"][1]}, "line of the hips"),
    ],
)
def test_rig_when_the_rest_pose_does_not_stand_then_refuses(tmp_path, changes, message):
    skeleton = {name: (parent, changes.get(name, at)) for name, (parent, at) in T_POSE.items()}
    with pytest.raises(ValueError, match=message):
        Rig(load_bvh(write(tmp_path, "a.bvh", bvh(skeleton))))


# --- a folder of motions


def test_mocap_when_read_then_a_pose_at_every_half_second_with_captions(tmp_path):
    frames = [{"LeftLeg": (0, number, 0)} for number in range(40)]
    write(tmp_path, "dance/a b.bvh", bvh(frames=frames, seconds=0.1))
    write(tmp_path, "05/05_10.amc", amc(*[{}] * 130))
    write(tmp_path, "05/05.asf", asf())
    source = MotionCapture(tmp_path)
    rows = read(source)
    assert source.parts() == ["train/0+05", "train/0+dance"]
    assert [row["id"] for row in rows] == [
        *(f"05/05_10.amc:{number}" for number in (0, 60, 120)),
        *(f"dance/a b.bvh:{number}" for number in range(0, 40, 5)),
    ]
    assert source.skipped == {}
    for row in rows:
        assert (row["source"], row["task"], {caption["kind"] for caption in row["captions"]}) == (
            "mocap",
            "text_to_pose",
            {"geometry"},
        )
    assert masked(rows[0]["pose_mask"][0]) == ["l_foot", "r_foot", "l_hand", "r_hand"]
    assert masked(rows[-1]["pose_mask"][0]) == ["l_hand", "r_hand"]
    first, last = rows[3]["poses"][0], rows[-1]["poses"][0]
    bend = to_rotmat(first[JOINT_NAMES.index("l_knee")]).T @ to_rotmat(last[JOINT_NAMES.index("l_knee")])
    assert np.degrees(np.arccos((np.trace(bend) - 1) / 2)) == pytest.approx(35, abs=1e-3)
    assert [row["id"] for row in MotionCapture(tmp_path, seconds=2.0)] == [
        "05/05_10.amc:0",
        "dance/a b.bvh:0",
        "dance/a b.bvh:20",
    ]


def test_mocap_when_first_folders_are_splits_then_so_are_the_parts(tmp_path):
    for folder in ("test", "val", "train/deep", "other/test"):
        write(tmp_path, f"{folder}/a.bvh", bvh())
    assert MotionCapture(tmp_path).parts() == ["train/0+other+test", "test/0+test", "train/0+train+deep", "val/0+val"]


def test_mocap_when_cmus_bvh_has_a_t_pose_in_front_then_it_is_left_out(tmp_path):
    write(tmp_path, "02_01.bvh", bvh(cmu_skeleton(), [{}] * 130, seconds=1 / 120))
    assert [row["id"] for row in read(MotionCapture(tmp_path))] == [f"02_01.bvh:{number}" for number in (1, 61, 121)]


def test_mocap_when_endings_are_upper_case_then_files_are_found(tmp_path):
    write(tmp_path, "A.BVH", bvh())
    write(tmp_path, "05_01.AMC", amc({}))
    write(tmp_path, "05.ASF", asf())
    assert [row["id"] for row in read(MotionCapture(tmp_path))] == ["05_01.AMC:0", "A.BVH:0"]


@pytest.mark.parametrize(
    ("skeletons", "motion", "chosen"),
    [
        (("05", "10"), "05_10", "05"),
        (("any",), "05_10", "any"),
        (("HDM_bd", "HDM_bk"), "HDM_bk_01-01_120", "HDM_bk"),
        (("a", "a_b"), "a_b_c", "a_b"),
        (("05", "1"), "10_01", None),
        ((), "10_01", None),
    ],
)
def test_mocap_when_there_are_skeletons_then_a_motion_has_that_of_its_name(tmp_path, skeletons, motion, chosen):
    write(tmp_path, f"{motion}.amc", amc({}))
    for name in skeletons:
        write(tmp_path, f"{name}.asf", asf() if name == chosen else "no skeleton")
    source = MotionCapture(tmp_path)
    rows = read(source)
    assert len(rows) == (chosen is not None)
    assert source.skipped == ({} if chosen else {"missing skeleton": 1})


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_mocap_when_there_are_texts_then_rows_are_of_them(tmp_path, kind):
    write(tmp_path, "a/walk.bvh", bvh(frames=[{}] * 40, seconds=0.1))
    write(tmp_path, "a/other.bvh", bvh())
    if kind == "csv":
        write(
            tmp_path, "texts.csv", "file,frame,start,end,text\na/walk.bvh,7,,,A knee\na/walk.bvh,,1.0,1.6,He walks\n"
        )
    else:
        lines = '{"file": "a/walk.bvh", "frame": 7, "text": "A knee"}\n'
        lines += '{"file": "a/walk.bvh", "start": 1.0, "end": 1.6, "text": "He walks"}\n'
        write(tmp_path, "texts.jsonl", lines)
    rows = read(MotionCapture(tmp_path))
    assert [(row["id"], row["captions"]) for row in rows] == [
        ("a/walk.bvh:7", [{"kind": "human", "text": "A knee"}]),
        ("a/walk.bvh:10", [{"kind": "human", "text": "He walks"}]),
        ("a/walk.bvh:15", [{"kind": "human", "text": "He walks"}]),
    ]


@pytest.mark.parametrize("name", ["../out.bvh", "/etc/passwd.bvh", "a\\..\\..\\out.bvh"])
def test_mocap_when_a_text_names_a_file_outside_then_refuses(tmp_path, name):
    write(tmp_path, "out.bvh", bvh())
    write(tmp_path, "in/texts.csv", f"file,text\n{name},He walks\n")
    with pytest.raises(ValueError, match="refused the path"):
        MotionCapture(tmp_path / "in").parts()


def test_mocap_when_texts_are_no_utf8_then_names_the_file(tmp_path):
    write(tmp_path, "texts.csv", "file,text\na.bvh,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"UTF-8 CSV.*texts\.csv"):
        MotionCapture(tmp_path).parts()


def test_mocap_when_files_are_broken_then_the_others_are_read(tmp_path):
    good = bvh(frames=[{}] * 3)
    write(tmp_path, "1.bvh", good)
    write(tmp_path, "2.bvh", good[:-60])
    write(tmp_path, "3.bvh", good.replace("MOTION", ""))
    write(tmp_path, "4.bvh", bvh(frames=[{}, {"LeftLeg": ("nan", 0, 0)}, {}]))
    write(tmp_path, "5.bvh", bvh(rename=lambda name: f"Bone{name[::-1]}"))
    write(tmp_path, "6.bvh", good.replace("Frame Time: 0.5", "Frame Time: 0"))
    write(tmp_path, "7.bvh", bytes(range(256)) * 100)
    write(tmp_path, "8.bvh", bvh({name: (parent, (0, 0, 0)) for name, (parent, _) in T_POSE.items()}))
    write(tmp_path, "9_1.amc", amc({}))
    write(tmp_path, "a.bvh", bvh(frames=[]))
    (tmp_path / "b.bvh").mkdir()
    source = MotionCapture(tmp_path)
    assert [row["id"] for row in read(source)] == ["1.bvh:0", "1.bvh:1", "1.bvh:2", "4.bvh:0", "4.bvh:2"]
    assert source.skipped == {
        "damaged motion": 3,
        "`poses`: expected finite numbers": 1,
        "unknown skeleton": 2,
        "no frame rate in the file": 1,
        "missing skeleton": 1,
        "missing motion": 1,
    }
    assert "2.bvh" in source.skipped_examples["damaged motion"][0]
    assert "5.bvh" in source.skipped_examples["unknown skeleton"][0]


def test_mocap_when_a_text_is_of_no_motion_then_says_so(tmp_path):
    write(tmp_path, "a.bvh", bvh(frames=[{}] * 3))
    write(tmp_path, "a.npz", b"")
    lines = ["file,frame,text", "a.bvh,1,He stands", "a.bvh,3,too late", "b.bvh,0,nobody", "a.npz,0,not one"]
    write(tmp_path, "texts.csv", "\n".join([*lines, f"{'c' * 3000}.bvh,0,long"]))
    source = MotionCapture(tmp_path)
    assert [row["id"] for row in read(source)] == ["a.bvh:1"]
    assert source.skipped == {
        "text of a time after the motion's end": 1,
        "missing motion": 2,
        "no BVH or AMC file": 1,
    }


def test_mocap_when_there_is_nothing_then_says_what_was_looked_for(tmp_path):
    write(tmp_path, "05.asf", asf())
    with pytest.raises(FileNotFoundError, match=r"\.bvh, \.amc"):
        MotionCapture(tmp_path).parts()
    with pytest.raises(ValueError, match="above 0"):
        MotionCapture(tmp_path, seconds=0)


def test_mocap_when_prepared_then_the_rows_are_those_of_the_source(tmp_path):
    write(tmp_path, "in/a.bvh", bvh(frames=[{"LeftLeg": (0, 10 * number, 0)} for number in range(4)]))
    source = MotionCapture(tmp_path / "in")
    records = prepare_rows(source, tmp_path / "out")
    assert [record.error for record in records] == [None]
    rows = load_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == [row["id"] for row in source]
    np.testing.assert_allclose(rows[3]["poses"], list(source)[3]["poses"], atol=1e-6)
