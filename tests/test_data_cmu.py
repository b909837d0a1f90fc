"""CMU's poses in this project's own form: the real files where they are, and a small tree of the same layout."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from conftest import ROOT

from chatpose_hf.cli import main
from chatpose_hf.data.cmu import CmuPoses
from chatpose_hf.data.rows import caption_texts, load_rows, validate_row


REAL = ROOT.parent / "shared" / "data" / "cmu_poses"
UPRIGHT = np.zeros((24, 3), dtype=np.float32)
BENT = np.zeros((24, 3), dtype=np.float32)
BENT[4, 0] = np.pi / 2  # the left knee


def write(folder, name="train", poses=(UPRIGHT, BENT), ids=("a", "b"), lines=None):
    poses = np.array(poses)
    arrays = {"poses": poses, "poses_yaw0": poses, "yaw": np.zeros(len(poses)), "ids": np.array(ids)}
    np.savez(folder / f"{name}.npz", **arrays)
    records = [{"id": id, "index": n, "clip": "1", "description": "walk"} for n, id in enumerate(ids)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) if lines is None else lines)
    captions = [
        {"text": "The left knee is bent.", "kind": "explicit"},
        {"text": "Somebody climbs a stair.", "kind": "implicit"},
    ]
    record = {"id": "b", "file": "train", "index": 1, "captions": captions}
    (folder / "captions.jsonl").write_text(json.dumps(record) + "\n")


def read(folder):
    source = CmuPoses(folder)
    rows = list(source)
    for row in rows:
        validate_row(row)
    return rows, source


def test_rows_when_read_then_poses_face_the_camera_and_uncaptured_joints_are_masked(tmp_path):
    write(tmp_path)
    write(tmp_path, "val", [UPRIGHT + 0.3], ["c"])
    rows, source = read(tmp_path)
    assert source.parts() == ["train/train", "val/val"]
    assert source.skipped == {}
    assert [(row["id"], row["task"]) for row in rows] == [
        ("a", "text_to_pose"),
        ("b", "text_to_pose"),
        ("b/spg", "spg"),
        ("c", "text_to_pose"),
    ]
    # y up, facing +z, is the camera's R_x(180 degrees).
    np.testing.assert_allclose(rows[0]["poses"][0][0], [np.pi, 0, 0], atol=1e-6)
    np.testing.assert_allclose(rows[1]["poses"][0][1:], BENT[1:], atol=1e-6)
    assert all(row["pose_mask"] == [[joint not in (10, 11, 22, 23) for joint in range(24)]] for row in rows)
    assert all("mocap.cs.cmu.edu" in row["licence"] for row in rows)


def test_captions_when_somebody_wrote_some_then_they_are_beside_those_from_geometry(tmp_path):
    write(tmp_path)
    rows, _ = read(tmp_path)
    assert caption_texts(rows[1], ["human"]) == ["The left knee is bent."]
    assert any("left knee" in text for text in caption_texts(rows[1], ["geometry"]))
    assert caption_texts(rows[0], ["human", "implicit"]) == []
    assert caption_texts(rows[2], ["implicit"]) == ["Somebody climbs a stair."]
    assert "Somebody climbs a stair" in rows[2]["messages"][0]["content"][0]["text"]


def test_pose_when_nan_then_only_it_is_left_out(tmp_path):
    broken = UPRIGHT.copy()
    broken[3, 1] = np.nan
    write(tmp_path, poses=[broken, BENT])
    rows, source = read(tmp_path)
    assert [row["id"] for row in rows] == ["b", "b/spg"]
    assert source.skipped == {"`poses`: expected finite numbers": 1}


def damage_truncated(folder):
    path = folder / "train.npz"
    path.write_bytes(path.read_bytes()[:300])


def damage_shape(folder):
    write(folder, poses=np.zeros((2, 22, 3)))


def damage_lines(folder):
    (folder / "train.jsonl").write_text('{"id": "a"}')


def damage_text(folder):
    (folder / "train.jsonl").write_bytes(b'{"id": "\xff"}')


def damage_captions(folder):
    (folder / "captions.jsonl").write_text('{"id": "b"}')


def damage_absent(folder):
    (folder / "train.jsonl").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, r"train\.npz"),
        (damage_shape, r"\(2, 24, 3\) in .*train\.npz.*got \(2, 22, 3\)"),
        (damage_lines, r"\(1, 24, 3\) in .*train\.npz"),
        (damage_text, r"UTF-8.*train\.jsonl"),
        (damage_captions, r"captions\.jsonl"),
        (damage_absent, r"train\.jsonl"),
    ],
)
def test_files_when_damaged_then_are_named(tmp_path, damage, message):
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(tmp_path)


def test_files_when_absent_then_says_which_are_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.npz, extra_acrobatics_train\.npz, val\.npz"):
        CmuPoses(tmp_path).parts()


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_file_when_hostile_then_nothing_runs(tmp_path):
    write(tmp_path)
    marker = tmp_path / "marker"
    np.savez(tmp_path / "train.npz", poses_yaw0=np.array([Payload(marker)], dtype=object))
    with pytest.raises(ValueError, match="would be a pickle"):
        read(tmp_path)
    assert not marker.exists()
    with zipfile.ZipFile(tmp_path / "train.npz") as file:
        content = file.read("poses_yaw0.npy")
    pickle.loads(content[content.index(b"\x80") :])  # it is live
    assert marker.exists()


def test_command_on_the_real_poses_then_writes_a_row_for_each(tmp_path, capsys):
    if not REAL.is_dir():
        pytest.skip(f"needs the captured poses at {REAL}, which are not in this checkout")
    assert main(["data", "cmu", "--input", str(REAL), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    # 2927 and 119 poses, 31 of them nearly ones of the 606 held out; 65 and 14 somebody described by a situation.
    assert "text_to_pose 3015, spg 65" in printed
    assert "text_to_pose 606, spg 14" in printed
    rows = load_rows(tmp_path / "out", "val")
    assert len(rows) == 620
    with np.load(REAL / "val.npz") as arrays:
        wanted = dict(zip(arrays["ids"].tolist(), arrays["poses_yaw0"], strict=True))
    for row in rows.select(range(0, 620, 31)):
        np.testing.assert_allclose(row["poses"][0][1:], wanted[row["id"].removesuffix("/spg")][1:], atol=1e-6)
        assert len(caption_texts(row, ["geometry"])) == 4
