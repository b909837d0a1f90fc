"""Replies and poses as files; the page in a real browser."""

import base64
import io
import json
import math
import re

import numpy as np
import pytest
import torch
import trimesh
from named_poses import POSES, make_pose
from PIL import Image

from chatpose_hf import atomic_write
from chatpose_hf.body import JOINT_NAMES, BodyModel
from chatpose_hf.export import Turn, bvh_bytes, make_page, mesh_bytes, save_poses, save_reply, stand_side_by_side
from chatpose_hf.pose_files import load_poses


FILES = ["pose.npz", "body.glb", "picture.png", "page.html", "reply.json"]


@pytest.fixture(scope="module")
def body():
    return BodyModel.load("default")


@pytest.fixture(scope="module")
def poses():
    return torch.stack(
        [make_pose(POSES[name]) for name in ("left arm raised", "kneeling on the right knee", "running")]
    )


def make_reply(*poses, text=None):
    said = " and ".join("<POSE>" for _ in poses)
    return {"text": text or f"It is {said}.", "poses": [{"theta": pose.flatten()} for pose in poses]}


@pytest.fixture
def turns(poses, images):
    return [
        Turn("What is the pose? </script><b>é</b>", [("a.png", images[0])], make_reply(poses[0])),
        Turn("And two people?", [], make_reply(poses[1], poses[2])),
    ]


def test_five_files_hold_the_reply(turns, body, poses, tmp_path):
    paths = save_reply(tmp_path / "new" / "folder", turns, body)
    assert [path.name for path in paths] == FILES
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(FILES)
    record = json.loads(paths[-1].read_text(encoding="utf-8"))
    assert record == {
        "prompt": "And two people?",
        "images": [],
        "reply": "It is <POSE> and <POSE>.",
        "poses": [{"theta": pose.flatten().tolist()} for pose in poses[1:]],
        "body": "default",
    }
    torch.testing.assert_close(load_poses(paths[0])[0], poses[1:], rtol=0, atol=0)
    torch.testing.assert_close(load_poses(paths[-1])[0], poses[1:], rtol=0, atol=0)
    with Image.open(paths[2]) as picture:
        assert picture.size == (1024, 512)
        assert len(set(picture.convert("RGB").resize((64, 32)).get_flattened_data())) > 100
    save_reply(tmp_path, turns[:1], body)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (1536, 512)  # the photo too
    assert json.loads((tmp_path / "reply.json").read_text())["images"] == ["a.png"]


def test_an_answer_without_pose_leaves_no_older_pose(turns, body, tmp_path):
    save_reply(tmp_path, turns, body)
    paths = save_reply(tmp_path, [Turn("Hi", [], make_reply(text="Hello."))], body)
    assert [path.name for path in paths] == ["page.html", "reply.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "reply.json"]


def test_a_failed_write_keeps_the_old_file(turns, body, tmp_path, monkeypatch):
    save_reply(tmp_path, turns, body)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic_write.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_reply(tmp_path, turns[:1], body)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bodies_stand_in_a_row_on_one_floor(body, poses):
    row = stand_side_by_side(body.vertices(poses), gap=0.2)
    torch.testing.assert_close(row[..., 1].amax(-1), torch.zeros(3), atol=1e-6, rtol=0)
    gaps = row[1:, :, 0].amin(-1) - row[:-1, :, 0].amax(-1)
    torch.testing.assert_close(gaps, torch.full((2,), 0.2), atol=1e-5, rtol=0)
    assert abs(row[..., 0].min() + row[..., 0].max()) < 1e-5
    # nothing but moved
    torch.testing.assert_close(row - row[:, :1], body.vertices(poses) - body.vertices(poses)[:, :1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_meshes_reload_upright_on_the_floor(suffix, body, poses):
    content = mesh_bytes(poses[:2], body, suffix)
    loaded = trimesh.load_scene(io.BytesIO(content), file_type=suffix[1:], process=False)
    if suffix == ".glb":
        assert sorted(loaded.geometry) == ["pose_1", "pose_2"]
    vertices = np.concatenate([np.asarray(mesh.vertices) for mesh in loaded.geometry.values()])
    row = stand_side_by_side(body.vertices(poses[:2])).reshape(-1, 3)
    expected = (row * torch.tensor([1.0, -1.0, -1.0])).numpy()
    np.testing.assert_allclose(vertices, expected, atol=1e-5)
    assert vertices[:, 1].min() == pytest.approx(0, abs=1e-5)
    # the raised left hand: high, at +x of the body's middle
    first = vertices[: len(vertices) // 2]
    top = first[first[:, 1].argmax()]
    assert top[1] > 2
    assert top[0] > first[:, 0].mean()
    normals = np.concatenate([np.asarray(mesh.vertex_normals) for mesh in loaded.geometry.values()])
    assert (normals * (vertices - np.repeat([first.mean(0), vertices[len(first) :].mean(0)], len(first), 0))).sum() > 0
    faces = sum(len(mesh.faces) for mesh in loaded.geometry.values())
    assert faces == 2 * len(body.faces)


def read_bvh(text):
    """A reader of its own: names, parents, offsets, and for each frame the root's place and Z, X, Y degrees."""
    names, parents, offsets, stack, in_end = [], [], [], [], False
    head, motion = text.split("MOTION\n")
    for line in head.splitlines()[1:]:
        word, *values = line.split()
        if word in ("ROOT", "JOINT"):
            names.append(values[0])
            parents.append(stack[-1] if stack else -1)
            stack.append(len(names) - 1)
        elif word == "End":
            in_end = True
        elif word == "OFFSET" and not in_end:
            offsets.append([float(value) for value in values])
        elif word == "CHANNELS":
            assert values[-3:] == ["Zrotation", "Xrotation", "Yrotation"]
        elif word == "}":
            if in_end:
                in_end = False
            else:
                stack.pop()
    lines = motion.splitlines()
    assert lines[0] == f"Frames: {len(lines) - 2}"
    frames = np.array([[float(value) for value in line.split()] for line in lines[2:]])
    assert frames.shape[1] == 3 + 3 * len(names)
    return names, parents, np.array(offsets), frames


def bvh_joints(text):
    """Joints of every frame by matrices, `(T, J, 3)`, in the file's order of names."""

    def turn(axis, degrees):
        a, b = [(1, 2), (2, 0), (0, 1)][axis]
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        matrix = np.eye(3)
        matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = cosine, -sine, sine, cosine
        return matrix

    names, parents, offsets, frames = read_bvh(text)
    result = []
    for frame in frames:
        places, turns = [], []
        for joint, parent in enumerate(parents):
            z, x, y = frame[3 + 3 * joint : 6 + 3 * joint]
            local = turn(2, z) @ turn(0, x) @ turn(1, y)
            turns.append(turns[parent] @ local if joint else local)
            places.append(places[parent] + turns[parent] @ offsets[joint] if joint else frame[:3])
        result.append(places)
    return names, np.array(result)


def test_bvh_gives_the_body_back(body, poses):
    generator = torch.Generator().manual_seed(0)
    wild = torch.cat([poses, torch.randn(5, 24, 3, generator=generator), torch.zeros(1, 24, 3)])
    wild[-1, 5, 0] = math.pi / 2  # where Euler angles lock
    names, joints = bvh_joints(bvh_bytes(wild, body).decode())
    order = [names.index(name) for name in JOINT_NAMES]
    upright = torch.tensor([1.0, -1.0, -1.0])
    expected = body.joints(wild) * upright
    floor = (body.vertices(wild) * upright)[..., 1].amin(-1)
    expected[..., 1] -= floor[:, None]
    np.testing.assert_allclose(joints[:, order], expected, atol=5e-6)


def test_every_ending(body, poses, tmp_path):
    names = ["a", "b", "c"]
    for suffix in (".npz", ".json", ".bvh", ".glb", ".obj", ".ply", ".png", ".html"):
        assert save_poses(tmp_path / f"all{suffix}", poses, names, body) == 3
        assert (tmp_path / f"all{suffix}").stat().st_size > 1000
    for suffix in (".npz", ".json"):
        torch.testing.assert_close(load_poses(tmp_path / f"all{suffix}")[0], poses, rtol=0, atol=0)
    many = poses[torch.arange(30) % 3]
    assert save_poses(tmp_path / "some.png", many, [str(n) for n in range(30)], body, limit=4) == 4
    with Image.open(tmp_path / "some.png") as sheet:
        assert sheet.width == 4 * 256
    assert save_poses(tmp_path / "one.png", poses[:1], ["a"], body, view="side") == 1
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (512, 512)
    assert len(read_bvh((tmp_path / "all.bvh").read_text())[3]) == 3
    with pytest.raises(ValueError, match=r"ends in \.npz, .*\.ply, got .*all\.gif"):
        save_poses(tmp_path / "all.gif", poses, names, body)
    with pytest.raises(ValueError, match="at least one pose"):
        save_poses(tmp_path / "all.png", poses[:0], [], body)


def page_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))


def test_page_holds_the_chat_and_the_bodies(turns, body, poses):
    page = make_page(turns, body)
    assert len(page) < 700_000
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", page)
    assert "<b>é" not in page
    data = page_data(page)
    assert [turn["role"] for turn in data["turns"]] == ["user", "assistant"] * 2
    assert data["turns"][0]["parts"] == [turns[0].prompt]
    assert data["turns"][3]["parts"] == ["It is ", {"pose": 1}, " and ", {"pose": 2}, "."]
    faces = np.frombuffer(base64.b64decode(data["faces"]), "<u2").reshape(-1, 3)
    np.testing.assert_array_equal(faces, body.faces)
    for pose, packed in zip(poses, data["poses"], strict=True):
        np.testing.assert_allclose(packed["theta"], pose.flatten(), atol=1e-6)
        numbers = np.frombuffer(base64.b64decode(packed["vertices"]), "<u2").reshape(-1, 3)
        vertices = numbers * np.array(packed["step"]) + np.array(packed["low"])
        expected = (body.vertices(pose) * torch.tensor([1.0, -1.0, -1.0])).numpy()
        shift = vertices[0] - expected[0]
        np.testing.assert_allclose(vertices - shift, expected, atol=1e-4)
        assert vertices[:, 1].min() == pytest.approx(0, abs=1e-6)
    # a text whose tokens and poses do not match keeps both
    odd = page_data(make_page([Turn("a", [], make_reply(poses[0], text="no token"))], body))
    assert odd["turns"][1]["parts"] == ["no token", {"pose": 0}]


@pytest.fixture
def page(browser, turns, body, tmp_path):
    """The page opened from the disk; `requests` and `errors` as they come."""
    (tmp_path / "page.html").write_text(make_page(turns, body), encoding="utf-8")
    tab = browser.new_page(viewport={"width": 1000, "height": 600})
    tab.requests, tab.errors = [], []
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.on("console", lambda message: message.type == "error" and tab.errors.append(message.text))
    tab.goto((tmp_path / "page.html").as_uri())
    tab.wait_for_timeout(300)
    yield tab
    tab.close()


def screenshot(tab, element="#stage"):
    return np.asarray(Image.open(io.BytesIO(tab.locator(element).screenshot())).convert("RGB")).astype(int)


def test_page_in_a_browser(page):
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in page.requests if url.startswith("file:")]) == 1
    assert page.locator(".user").first.inner_text() == "What is the pose? </script><b>é</b>"
    assert page.locator(".assistant").all_inner_texts() == ["It is pose 1.", "It is pose 2 and pose 3."]
    last = screenshot(page)
    blue = (last[..., 2] > last[..., 0] + 25).mean()
    assert 0.02 < blue < 0.4  # a body, not an empty stage
    page.get_by_role("button", name="pose 1").click()
    page.wait_for_timeout(200)
    first = screenshot(page)
    assert np.abs(first - last).mean() > 1
    # Front view: the raised left arm is at the right.
    page.locator("canvas").dblclick()
    page.wait_for_timeout(200)
    front = screenshot(page)
    rows, columns = np.nonzero(front[..., 2] > front[..., 0] + 25)
    assert columns[rows < np.quantile(rows, 0.03)].mean() > columns.mean() + 15
    box = page.locator("canvas").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 150, middle[1], steps=3)
    page.mouse.up()
    page.wait_for_timeout(200)
    assert np.abs(screenshot(page) - front).mean() > 1
    page.locator("summary").click()
    assert len(json.loads(page.locator("pre").inner_text())) == 72
    assert page.errors == []


def test_page_without_webgl_shows_the_picture(browser, turns, body, tmp_path):
    (tmp_path / "page.html").write_text(make_page(turns, body), encoding="utf-8")
    tab = browser.new_page(viewport={"width": 400, "height": 800})  # a telephone
    tab.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    tab.goto((tmp_path / "page.html").as_uri())
    assert "no WebGL" in tab.locator("#hint").inner_text()
    shown = screenshot(tab)
    assert (shown[..., 2] > shown[..., 0] + 25).mean() > 0.02
    tab.close()
