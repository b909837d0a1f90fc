"""Synthetic people: what the picture shows is what the label says."""

import io

import numpy as np
import pytest
import torch
from named_poses import POSES, make_pose
from PIL import Image

from chatpose_hf.body import BodyModel
from chatpose_hf.data import synthetic
from chatpose_hf.data.rows import validate_row, write_rows
from chatpose_hf.data.synthetic import COLORS, PoseSampler, Studio, SyntheticPeople, decimate, turn
from chatpose_hf.rotations import rotvec_to_rotmat


NAMED = np.stack([make_pose(pose).numpy().reshape(24, 3) for pose in POSES.values()])
STANDING = np.zeros((24, 3))
STANDING[0, 0] = np.pi  # upright, facing the camera, arms out
ALL = np.ones((len(NAMED), 24), dtype=bool)


@pytest.fixture(scope="module")
def studio():
    return Studio()


@pytest.fixture(scope="module")
def body():
    return BodyModel.load("default")


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for split in ("train", "val"):
        (folder / split).mkdir()
        write_rows(
            folder / split / "named.parquet",
            [
                {
                    "id": str(number),
                    "source": "named",
                    "task": "text_to_pose",
                    "messages": [
                        {"role": "user", "content": [{"type": "text", "text": "?"}]},
                        {"role": "assistant", "content": [{"type": "pose", "text": None}]},
                    ],
                    "images": [],
                    "poses": [pose],
                    "pose_mask": [[joint not in (22, 23) for joint in range(24)]],
                    "captions": [],
                    "licence": "CC0",
                }
                for number, pose in enumerate(NAMED[: 8 if split == "train" else 2])
            ],
        )
    return folder


def draw(studio, poses, seed, size=160):
    return studio.draw(np.asarray(poses), np.random.default_rng(seed), size)


def project(scene, number, points):
    """By the pinhole's own formula; nothing of the renderer."""
    x, y, z = (points + scene.translations[number]).T
    return np.stack([x / z * scene.focal + scene.center[0], y / z * scene.focal + scene.center[1]], axis=1)


def test_label_when_projected_then_its_joints_lie_on_the_person(studio, body):
    """Joints of the whole body, not of the coarse one that was drawn."""
    on, count = 0, 0
    for seed in range(40):
        scene = draw(studio, turn(NAMED[seed % len(NAMED)][None], heading(seed)), seed)
        joints = body.joints(torch.from_numpy(scene.people[0].pose).float()).numpy()
        pixels = np.floor(project(scene, 0, joints)).astype(int)
        inside = ((pixels >= 0) & (pixels < 160)).all(1)
        on += (scene.owners[pixels[inside, 1], pixels[inside, 0]] == 0).sum()
        count += inside.sum()
    assert count > 850
    assert on / count > 0.95  # the rest is behind an occluder


def test_label_when_another_pose_then_its_joints_do_not_lie_on_the_person(studio, body):
    """The test above can fail."""
    on, count = 0, 0
    for seed in range(40):
        scene = draw(studio, turn(NAMED[seed % len(NAMED)][None], heading(seed)), seed)
        mirrored = scene.people[0].pose.copy()
        mirrored[:, 1:] *= -1  # about the camera's vertical plane, sides not swapped
        joints = body.joints(torch.from_numpy(mirrored).float()).numpy()
        pixels = np.floor(project(scene, 0, joints)).astype(int)
        inside = ((pixels >= 0) & (pixels < 160)).all(1)
        on += (scene.owners[pixels[inside, 1], pixels[inside, 0]] == 0).sum()
        count += inside.sum()
    assert on / count < 0.9


def heading(seed):
    angle = np.random.default_rng(seed).uniform(-np.pi, np.pi)
    return np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])


@pytest.mark.parametrize(("joint", "sign"), [(16, 1), (17, -1)])
def test_picture_when_one_arm_is_up_and_the_person_faces_us_then_it_is_on_the_mirrored_side(
    studio, monkeypatch, joint, sign
):
    monkeypatch.setattr(synthetic, "_OCCLUDED_SHARE", 0)  # it might hide the arm
    pose = STANDING.copy()
    pose[joint, 2] = sign * np.pi / 2  # the shoulder lifts the arm straight up
    pose[33 - joint, 2] = sign * np.pi / 2.2  # and the other hangs
    for seed in range(5):
        scene = draw(studio, pose[None], seed)
        ys, xs = np.nonzero(scene.owners == 0)
        top = xs[ys < ys.min() + 6].mean()
        left, _, right, _ = scene.people[0].box
        # The person's left is the picture's right.
        assert (top - (left + right) / 2) * sign > 3


def test_label_when_the_camera_looks_down_then_has_that_in_it(studio):
    tilts = []
    for seed in range(30):
        label = draw(studio, STANDING[None], seed, size=64).people[0].pose
        up = rotvec_to_rotmat(torch.from_numpy(label[0])).numpy() @ [0, 1, 0]
        tilts.append(np.degrees(np.arctan2(up[2], -up[1])))
        np.testing.assert_array_equal(label[1:], STANDING[1:])
    # From above the head is nearer than the feet: up leads towards the camera, which is -z.
    assert -35 < min(tilts) < -20
    assert 0 < max(tilts) < 14


def test_box_when_drawn_then_holds_all_pixels_of_the_person_and_no_more_than_a_margin(studio):
    for seed in range(20):
        scene = draw(studio, turn(NAMED[seed % len(NAMED)][None], heading(seed)), seed)
        left, top, right, bottom = scene.people[0].box
        ys, xs = np.nonzero(scene.owners == 0)
        assert left - 1 <= xs.min()
        assert xs.max() <= right + 1
        assert top - 1 <= ys.min()
        assert ys.max() <= bottom + 1
        assert max(bottom - top, (right - left) * 4 / 3) == pytest.approx(160, rel=0.24)


def test_picture_when_seed_is_the_same_then_is_the_same(studio):
    first, again, other = (draw(studio, STANDING[None], seed) for seed in (3, 3, 4))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


@pytest.fixture(scope="module")
def groups(studio):
    """People who stand apart, in pictures large enough to look at their clothes."""
    return [
        draw(studio, turn(np.stack([STANDING] * (2 + seed % 3)), heading(seed)), seed, size=200) for seed in range(40)
    ]


def test_phrases_when_several_people_then_each_is_of_one_alone(groups):
    texts = 0
    for scene in groups:
        said = [phrase for person in scene.people for phrase in person.phrases]
        assert len(set(said)) == len(said)
        texts += len(said)
    assert texts > 200


def test_phrases_when_left_right_middle_then_the_boxes_agree(groups):
    checked = 0
    for scene in groups:
        middles = [(person.box[0] + person.box[2]) / 2 for person in scene.people]
        for middle, person in zip(middles, scene.people, strict=True):
            for place, wanted in (("left", min(middles)), ("right", max(middles)), ("middle", np.median(middles))):
                if any(phrase.endswith(f"the {place}") for phrase in person.phrases):
                    checked += 1
                    assert middle == wanted
    assert checked > 40


def test_phrases_when_closest_then_the_body_is_nearest(groups):
    checked = 0
    for scene in groups:
        depths = scene.translations[:, 2]
        for depth, person in zip(depths, scene.people, strict=True):
            if "the person closest to the camera" in person.phrases:
                checked += 1
                assert depth == depths.min()
    assert checked > 5


def test_phrases_when_a_shirt_has_a_colour_then_the_chest_is_nearest_to_that_colour(groups, body):
    """Read off the picture, at the chest, in any light: by hue where there is one, else by brightness."""
    right, count = 0, 0
    for scene in groups:
        pixels = np.asarray(scene.image.convert("HSV"), dtype=float)
        for number, person in enumerate(scene.people):
            named = [
                name for name in COLORS for phrase in person.phrases if phrase.startswith(f"the person in the {name} ")
            ]
            joints = body.joints(torch.from_numpy(person.pose).float()).numpy()
            x, y = np.floor(project(scene, number, joints[[6]])[0]).astype(int)
            if not named or not (2 <= x < 198 and 2 <= y < 198) or scene.owners[y, x] != number:
                continue
            hue, saturation, value = np.median(pixels[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3), axis=0)

            def distance(name, hue=hue, saturation=saturation, value=value):
                color = Image.new("RGB", (1, 1), COLORS[name]).convert("HSV").getpixel((0, 0))
                turn = abs(hue - color[0])
                grey = abs(saturation - color[1]) + (abs(value - color[2]) if name in ("white", "black") else 0)
                return min(turn, 256 - turn) * (4 if min(saturation, color[1]) > 60 else 0) + grey

            count += 1
            right += named[0] == min(COLORS, key=distance)
    assert count > 50
    assert right / count > 0.8


def test_occluders_when_there_are_some_then_hide_at_most_thirty_percent(studio):
    covered = 0
    for seed in range(30):
        scene = draw(studio, STANDING[None], seed, size=96)
        visible = (scene.owners == 0).sum()
        # The same scene without: the generator draws the same up to there.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic, "_OCCLUDED_SHARE", 0)
            whole = (draw(studio, STANDING[None], seed, size=96).owners == 0).sum()
        assert visible >= 0.7 * whole - 1
        covered += visible < whole
    assert covered >= 2


def test_sampler_when_noise_is_added_then_no_joint_is_led_out_of_its_limits(monkeypatch):
    monkeypatch.setattr(synthetic, "_NOISE_SHARE", 1)
    monkeypatch.setattr(synthetic, "_RECOMBINED_SHARE", 0)
    rng = np.random.default_rng(0)
    poses = rng.normal(0, 0.3, (200, 24, 3))
    poses[:, 23, 0] = np.arange(200)  # a joint that is not known, and stays: says which pose it was
    masks = np.ones((200, 24), dtype=bool)
    masks[:, 23] = False
    sampler = PoseSampler(poses, masks)
    low, high = np.quantile(poses, [0.005, 0.995], axis=0)
    low[[4, 5], 0] = -0.1  # knees do not bend forwards
    changed = 0
    for _ in range(300):
        pose, _ = sampler.sample(rng)
        source = poses[round(pose[23, 0])]
        assert (pose[1:] >= np.minimum(source, low)[1:] - 1e-9).all()
        assert (pose[1:] <= np.maximum(source, high)[1:] + 1e-9).all()
        changed += (pose[1:23] != source[1:23]).mean()
    assert changed > 250


def test_sampler_when_recombined_then_each_half_is_somebodys(monkeypatch):
    monkeypatch.setattr(synthetic, "_NOISE_SHARE", 0)
    monkeypatch.setattr(synthetic, "_RECOMBINED_SHARE", 1)
    sampler = PoseSampler(NAMED, ALL)
    lower = [1, 2, 4, 5, 7, 8, 10, 11]
    upper = [joint for joint in range(1, 24) if joint not in lower]
    rng = np.random.default_rng(0)
    mixed = 0
    for _ in range(50):
        pose, _ = sampler.sample(rng)
        of_lower = np.flatnonzero((NAMED[:, lower] == pose[lower]).all((1, 2)))
        of_upper = np.flatnonzero((NAMED[:, upper] == pose[upper]).all((1, 2)))
        assert len(of_lower)
        assert len(of_upper)
        mixed += not set(of_lower) & set(of_upper)
    assert mixed > 10  # some of the named poses have the same legs


def test_sampler_when_joints_are_unknown_then_leaves_them_alone():
    masks = ALL.copy()
    masks[:, [22, 23]] = False
    sampler = PoseSampler(NAMED, masks)
    rng = np.random.default_rng(0)
    for _ in range(50):
        pose, mask = sampler.sample(rng)
        assert mask.tolist() == [joint < 22 for joint in range(24)]
        assert (pose[22:] == 0).all()


def test_decimate_then_keeps_the_shape(body):
    small = decimate(body)
    assert 1500 < len(small.rest_vertices) < 4000
    for axis in range(3):
        assert small.rest_vertices[:, axis].min().item() == pytest.approx(
            body.rest_vertices[:, axis].min().item(), abs=0.015
        )
    torch.testing.assert_close(small.weights.sum(1), torch.ones(len(small.weights)))
    assert (small.joints(torch.zeros(24, 3)) == body.joints(torch.zeros(24, 3))).all()


def test_source_when_read_then_rows_are_valid_and_repeat(rows_folder, monkeypatch):
    monkeypatch.setattr(synthetic, "_GROUP_SHARE", 0.4)

    def read():
        source = SyntheticPeople(rows_folder, seed=1, image_size=48, count=40)
        return list(source), source

    rows, source = read()
    assert len(rows) + sum(source.skipped.values()) == 40
    tasks = [row["task"] for row in rows]
    assert tasks.count("pose_estimation") > 12
    assert tasks.count("rpe") > 8
    for row in rows:
        validate_row(row)
        assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (48, 48)
        assert all(not mask[22] and mask[0] for mask in row["pose_mask"])
        kinds = {caption["kind"] for caption in row["captions"]}
        assert kinds == ({"geometry"} if row["task"] == "pose_estimation" else {"phrase"})
    assert {len(row["poses"]) > 1 for row in rows if row["task"] == "rpe"} == {True, False}
    again, _ = read()
    assert [row["images"] for row in again] == [row["images"] for row in rows]
    assert [row["messages"] for row in again] == [row["messages"] for row in rows]


def test_source_when_asked_for_parts_then_one_in_twenty_is_of_val_poses(rows_folder):
    parts = SyntheticPeople(rows_folder, count=10_000).parts()
    assert [part for part in parts if part.startswith("val")] == ["val/00019"]
    assert len(parts) == 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda studio: studio.draw(np.zeros((24, 3)), np.random.default_rng(0), 64), "finite poses of shape"),
        (
            lambda studio: studio.draw(np.full((1, 24, 3), np.nan), np.random.default_rng(0), 64),
            "finite poses of shape",
        ),
        (lambda studio: PoseSampler(np.zeros((0, 24, 3)), np.zeros((0, 24))), "some poses of shape"),
        (lambda studio: PoseSampler(np.full((1, 24, 3), np.inf), np.ones((1, 24))), "finite poses"),
    ],
)
def test_people_when_poses_are_wrong_then_says_so(studio, make, message):
    with pytest.raises(ValueError, match=message):
        make(studio)


def test_source_when_there_are_no_rows_then_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="make some with `chatpose data`"):
        SyntheticPeople(tmp_path).parts()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"expected rows in .*x\.parquet"):
        list(SyntheticPeople(tmp_path, count=1))
