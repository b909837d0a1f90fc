"""BVH and ASF/AMC: rotations of bones in space against products written out here, and files that are none."""

import time

import numpy as np
import pytest

from chatpose_hf.data.mocap_files import AMC_FRAME_RATE, axis_rotmats, load_amc, load_bvh


ASF = """# made for a test
:version 1.10
:name TEST
:units
  mass 1.0
  length 0.45
  angle deg
:documentation
   begin with no meaning: end
:root
   order TX TY TZ RX RY RZ
   axis XYZ
   position 0 0 0
   orientation 0 0 0
:bonedata
  begin
     id 1
     name upper
     direction 1 0 0
     length 2
     axis 0 0 0 XYZ
    dof rx ry rz
    limits (-60.0 90.0)
           (-90.0 90.0)
           (-90.0 90.0)
  end
  begin
     id 2
     name lower
     direction 1 0 0
     length 3
     axis 90 0 -30 XYZ
    dof rx
    limits (-10.0 170.0)
  end
  begin
     id 3
     name stiff
     direction 0 0 1
     length 1
     axis 0 0 0 XYZ
  end
:hierarchy
  begin
    root upper
    upper lower
    lower stiff
  end
"""
AMC = """#!OML:ASF C:\\test.ASF
:FULLY-SPECIFIED
:DEGREES
1
root 1 2 3 0 0 0
upper 0 0 0
lower 0
2
lower 40
root 1 2 3 10 20 30
upper 50 -60 70
"""


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


def bvh(channels="Zrotation Xrotation Yrotation", frames=("1 2 3 10 20 30 40 50 60",), head=None):
    frames = list(frames)
    return f"""HIERARCHY
ROOT base
{{
  OFFSET 1 2 3
  CHANNELS 6 Xposition Yposition Zposition {channels}
  JOINT tip
  {{
    OFFSET 0 4 0
    CHANNELS 3 {channels}
    End Site
    {{
      OFFSET 0 1 0
    }}
  }}
}}
MOTION
{head or f"Frames: {len(frames)}"}
Frame Time: 0.04
""" + "".join(f"{frame}\n" for frame in frames)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("axis", "xyz")
def test_axis_rotmats_when_turned_then_as_in_a_textbook(axis):
    np.testing.assert_allclose(axis_rotmats(axis, np.radians([35.0]))[0], turn(axis, 35), atol=1e-12)


@pytest.mark.parametrize("order", ["ZXY", "ZYX", "XYZ", "YXZ", "YZX", "XZY"])
def test_load_bvh_when_channels_have_an_order_then_the_first_is_the_outermost(tmp_path, order):
    motion = load_bvh(write(tmp_path, "a.bvh", bvh(" ".join(f"{axis}rotation" for axis in order))))
    base = turn(order[0].lower(), 10) @ turn(order[1].lower(), 20) @ turn(order[2].lower(), 30)
    tip = base @ turn(order[0].lower(), 40) @ turn(order[1].lower(), 50) @ turn(order[2].lower(), 60)
    np.testing.assert_allclose(motion.rotmats([0])[0], [base, tip], atol=1e-12)
    np.testing.assert_array_equal(motion.rest_joints, [[1, 2, 3], [1, 6, 3]])
    assert (motion.names, motion.parents, motion.num_frames) == (["base", "tip"], [-1, 0], 1)
    assert motion.frame_rate == pytest.approx(25)


def test_load_bvh_when_every_joint_has_positions_then_they_are_passed_over(tmp_path):
    text = bvh(frames=["0 0 0 10 20 30 7 8 9 40 50 60"]).replace(
        "CHANNELS 3 Z", "CHANNELS 6 Xposition Yposition Zposition Z"
    )
    motion = load_bvh(write(tmp_path, "a.bvh", text))
    expected = turn("z", 40) @ turn("x", 50) @ turn("y", 60)
    rotmats = motion.rotmats([0])[0]
    np.testing.assert_allclose(rotmats[0].T @ rotmats[1], expected, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r\n\r\n"),
        lambda text: "\ufeff" + text.replace(" {", "{").replace("\n{", " {"),
        lambda text: text.replace("  ", "\t").replace("rotation", "ROTATION").replace("End Site", "End site"),
    ],
    ids=["dos", "blank lines", "braces on the line", "tabs and cases"],
)
def test_load_bvh_when_written_otherwise_then_reads_the_same(tmp_path, change):
    expected = load_bvh(write(tmp_path, "a.bvh", bvh())).rotmats([0])
    motion = load_bvh(write(tmp_path, "b.bvh", change(bvh())))
    assert motion.names == ["base", "tip"]
    np.testing.assert_array_equal(motion.rotmats([0]), expected)


def test_load_bvh_when_some_frames_are_asked_for_then_those_come_in_order(tmp_path):
    motion = load_bvh(write(tmp_path, "a.bvh", bvh(frames=[f"0 0 0 {angle} 0 0 0 0 0" for angle in range(9)])))
    np.testing.assert_allclose(motion.rotmats([7, 2])[:, 0], np.stack([turn("z", 7), turn("z", 2)]), atol=1e-12)


def test_load_bvh_when_bytes_are_no_utf8_then_names_are_latin_1(tmp_path):
    motion = load_bvh(write(tmp_path, "a.bvh", bvh().replace("tip", "sp\xe9").encode("latin-1")))
    assert motion.names[1] == "sp\xe9"


@pytest.mark.parametrize("number", ["nan", "inf", "1e999"])
def test_load_bvh_when_a_number_is_none_then_so_are_the_rotations(tmp_path, number):
    motion = load_bvh(write(tmp_path, "a.bvh", bvh(frames=[f"0 0 0 {number} 0 0 0 0 0", "0 0 0 1 0 0 0 0 0"])))
    assert np.isnan(motion.rotmats([0])).any()
    assert np.isfinite(motion.rotmats([1])).all()


def test_load_bvh_when_frame_time_is_zero_then_there_is_no_rate(tmp_path):
    assert load_bvh(write(tmp_path, "a.bvh", bvh().replace("0.04", "0"))).frame_rate == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found no MOTION"),
        (bvh().replace("MOTION", ""), "found no MOTION"),
        (bvh()[: bvh().index("Frame Time")], "expected `Frames:` and `Frame Time:`"),
        (bvh(head="Frames: 2"), r"expected 2 frames.*got 1"),
        (bvh(head="Frames: 0"), r"expected 0 frames.*got 1"),
        (bvh(head="Frames: -1"), "expected `Frames:`"),
        (bvh(frames=["1 2 3 10 20 30 40 50 60", "1 2 3 10"]), "expected 9 numbers in a frame.*got 4"),
        (bvh(frames=["1 2 3 10 20 30 40 50 60 70"]), "expected 9 numbers in a frame.*got 10"),
        (bvh(frames=["1 2 3 10 20 30 40 fifty 60"]), "fifty"),
        (bvh().replace("CHANNELS 3", "CHANNELS 4"), "expected the number of channels"),
        (bvh("Zrotation Xrotation Wrotation"), "expected the number of channels"),
        (bvh().replace("0 4 0", "0 4"), "expected 3 numbers"),
        (bvh().replace("0 4 0", "0 nan 0"), "expected 3 numbers"),
        (bvh().replace("0 4 0", "0 -1e200 0"), "expected 3 numbers"),
        (bvh().replace("}\nMOTION", "MOTION"), "braces that close"),
        (bvh().replace("}\nMOTION", "}\n}\nMOTION"), "cannot read"),
        (bvh().replace("ROOT", "JOINT"), "expected a ROOT with JOINTs inside"),
        (bvh().replace("JOINT", "ROOT"), "expected a ROOT with JOINTs inside"),
        (bvh().replace("End Site", "JOINT a\n{\n}\nEnd Site").replace("OFFSET 0 1 0", "JOINT b"), "JOINTs inside"),
        (bvh().replace("OFFSET 1 2 3", "SCALE 3"), "got 'SCALE 3'"),
        (bvh().replace("0.04", "fast"), "fast"),
        (bvh().encode("utf-16"), "found no MOTION"),
        (bytes(range(256)) * 10, "found no MOTION"),
    ],
)
def test_load_bvh_when_damaged_then_names_the_file_and_the_fault(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_bvh(write(tmp_path, "broken.bvh", content))
    assert "broken.bvh" in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("depth", [400, 100_000])
def test_load_bvh_when_the_hierarchy_is_deep_then_reads_or_refuses_at_once(tmp_path, depth):
    lines = ["HIERARCHY", "ROOT a", "{", "OFFSET 0 0 0", "CHANNELS 3 Xrotation Yrotation Zrotation"]
    for number in range(depth):
        lines += [f"JOINT j{number}", "{", "OFFSET 0 1 0", "CHANNELS 0"]
    lines += ["}"] * (depth + 1) + ["MOTION", "Frames: 1", "Frame Time: 0.1", "0 0 90"]
    path = write(tmp_path, "deep.bvh", "\n".join(lines))
    start = time.perf_counter()
    if depth > 500:
        with pytest.raises(ValueError, match="at most 500"):
            load_bvh(path)
    else:
        np.testing.assert_allclose(load_bvh(path).rotmats([0])[0, -1], turn("z", 90), atol=1e-12)
    assert time.perf_counter() - start < 5


def test_load_amc_when_read_then_the_first_dof_turns_first_and_axes_are_the_bones(tmp_path):
    motion = load_amc(write(tmp_path, "a.amc", AMC), write(tmp_path, "a.asf", ASF))
    base = turn("z", 30) @ turn("y", 20) @ turn("x", 10)
    upper = base @ turn("z", 70) @ turn("y", -60) @ turn("x", 50)
    axes = turn("z", -30) @ turn("x", 90)
    lower = upper @ axes @ turn("x", 40) @ axes.T
    assert motion.names == ["root", "upper", "lower", "stiff"]
    assert (motion.num_frames, motion.frame_rate) == (2, AMC_FRAME_RATE)
    np.testing.assert_allclose(motion.rotmats([1])[0], [base, upper, lower, lower], atol=1e-12)
    np.testing.assert_allclose(motion.rotmats([0])[0], [np.eye(3)] * 4, atol=1e-12)
    # A bone's joint is where its parent ends.
    np.testing.assert_array_equal(motion.rest_joints, [[0, 0, 0], [0, 0, 0], [2, 0, 0], [5, 0, 0]])


def test_load_amc_when_the_root_has_an_orientation_and_an_order_then_both_count(tmp_path):
    asf = ASF.replace("orientation 0 0 0", "orientation 0 90 0").replace("TX TY TZ RX RY RZ", "RZ RY RX TX TY TZ")
    amc = AMC.replace("root 1 2 3 10 20 30", "root 30 20 10 1 2 3")
    motion = load_amc(write(tmp_path, "a.amc", amc), write(tmp_path, "a.asf", asf))
    expected = turn("y", 90) @ turn("x", 10) @ turn("y", 20) @ turn("z", 30) @ turn("y", -90)
    np.testing.assert_allclose(motion.rotmats([1])[0, 0], expected, atol=1e-12)


@pytest.mark.parametrize("by", ["amc", "asf"])
def test_load_amc_when_angles_are_radians_then_they_are_read_as_such(tmp_path, by):
    asf, amc = ASF, AMC.replace("lower 40", "lower 0.5")
    if by == "amc":
        amc = amc.replace(":DEGREES", ":RADIANS")
    else:
        asf = ASF.replace("angle deg", "angle rad").replace("axis 90 0 -30", f"axis {np.pi / 2} 0 {-np.pi / 6}")
        amc = amc.replace(":DEGREES\n", "")
    motion = load_amc(write(tmp_path, "a.amc", amc), write(tmp_path, "a.asf", asf))
    axes = turn("z", -30) @ turn("x", 90)
    rotmats = motion.rotmats([1])[0]
    expected = axes @ turn("x", np.degrees(0.5)) @ axes.T
    np.testing.assert_allclose(rotmats[1].T @ rotmats[2], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("amc", "message"),
    [
        ("", "expected the number of a frame"),
        (AMC.replace("1\nroot", "root", 1), "expected the number of a frame"),
        (AMC.replace("upper 50 -60 70", "upper 50 -60"), r"other: upper \(2\), upper \(3\)"),
        (AMC.replace("upper 50 -60 70", ""), r"other: upper \(3\)"),
        (AMC.replace("upper 50 -60 70", "upper 50 -60 70\nstiff 1"), r"other: stiff \(1\)"),
        (AMC.replace("lower 40", "lower forty"), "forty"),
        (AMC[:-30], "other:"),
        (bytes(range(256)) * 10, "cannot read"),
    ],
)
def test_load_amc_when_damaged_then_names_the_file_and_the_fault(tmp_path, amc, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_amc(write(tmp_path, "broken.amc", amc), write(tmp_path, "a.asf", ASF))
    assert "broken.amc" in str(caught.value)


@pytest.mark.parametrize(
    ("asf", "message"),
    [
        ("", "expected the section :root, found none"),
        (ASF[: ASF.index(":hierarchy")], "expected the section :hierarchy"),
        (ASF.replace("lower stiff", "lower stiff\n stiff upper"), "upper"),  # a cycle
        (ASF.replace("upper lower", "nobody lower"), "nobody"),
        (ASF.replace("upper lower", "upper nobody"), "nobody"),
        (ASF.replace("name lower", "name upper"), "bones of different names"),
        (ASF.replace("name lower", "name root"), "bones of different names"),
        (ASF.replace("direction 0 0 1", "direction 0 0"), "expected 3 numbers"),
        (ASF.replace("length 3", "length nan"), "expected 3 numbers"),
        (ASF.replace("     length 3\n", ""), "length"),
        (ASF.replace("axis 90 0 -30 XYZ", "axis 90 0 -30 UVW"), "cannot read"),
        (ASF.replace("axis 90 0 -30 XYZ", "axis 90"), "cannot read"),
    ],
)
def test_load_amc_when_the_skeleton_is_damaged_then_names_it(tmp_path, asf, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_amc(write(tmp_path, "a.amc", AMC), write(tmp_path, "broken.asf", asf))
    assert "broken.asf" in str(caught.value)


@pytest.mark.parametrize("name", ["a.bvh", "a.asf"])
def test_load_when_a_file_is_huge_then_it_is_not_read(tmp_path, name):
    path = write(tmp_path, name, "")
    with open(path, "r+b") as file:
        file.truncate(2**29)  # sparse
    with pytest.raises(ValueError, match="expected at most"):
        load_bvh(path) if name == "a.bvh" else load_amc(write(tmp_path, "a.amc", AMC), path)
