"""Synthetic people, more: that words are true of what is seen, that limits are anatomy's, and that bytes repeat."""

import numpy as np
import pytest
import torch
from named_poses import POSES, make_pose

from chatpose_hf.body import BodyModel
from chatpose_hf.data import synthetic
from chatpose_hf.data.synthetic import COLORS, HAIR_COLORS, PoseSampler, Studio, turn
from chatpose_hf.render import draw_bodies


NAMED = np.stack([make_pose(pose).numpy().reshape(24, 3) for pose in POSES.values()])
SIZE = 200
L_ELBOW, R_ELBOW, L_KNEE, R_KNEE = 18, 19, 4, 5


@pytest.fixture(scope="module")
def studio():
    return Studio()


def heading(angle):
    return np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])


def draw_group(studio, seed):
    rng = np.random.default_rng(seed)
    poses = NAMED[rng.integers(len(NAMED), size=2 + seed % 3)]
    poses = np.concatenate([turn(pose[None], heading(rng.uniform(-np.pi, np.pi))) for pose in poses])
    return studio.draw(poses, rng, SIZE)


@pytest.fixture(scope="module")
def groups(studio):
    return [draw_group(studio, seed) for seed in range(20)]


def project(scene, number, points):
    """By the pinhole's own formula; nothing of the renderer."""
    x, y, z = (points + scene.translations[number]).T
    return np.stack([x / z * scene.focal + scene.center[0], y / z * scene.focal + scene.center[1]], axis=1)


def nearest_name(rgb, table):
    """The colour of the table that, in some light, comes nearest: shading scales all three channels, before the gamma."""

    def distance(name):
        lit = np.linspace(0.4, 1, 25)[:, None] ** (1 / 2.2) * np.array(table[name])
        return np.abs(lit - rgb).sum(1).min()

    return min(table, key=distance)


def test_phrases_when_a_shirt_is_named_then_the_chest_has_that_colour(groups):
    """What is taken for the chest is found by the label alone."""
    body = BodyModel.load("default")
    right, count = 0, 0
    for scene in groups:
        pixels = np.asarray(scene.image, dtype=float)
        for number, person in enumerate(scene.people):
            phrases = [phrase for phrase in person.phrases if phrase.startswith("the person in the ")]
            named = [name for name in COLORS for phrase in phrases if f" {name} " in phrase]
            joints = body.joints(torch.from_numpy(person.pose).float()).numpy()
            column, row = np.floor(project(scene, number, joints[[6]])[0]).astype(int)
            place = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
            # Somebody's arm may be before it, which has another colour at times.
            if not named or not (scene.owners[place] == number).all():
                continue
            count += 1
            right += nearest_name(np.median(pixels[place].reshape(-1, 3), axis=0), COLORS) == named[0]
    assert count > 20
    assert right / count > 0.9


def test_phrases_when_hair_is_named_then_such_pixels_are_seen_near_the_head(groups):
    body = BodyModel.load("default")
    count = 0
    for scene in groups:
        pixels = np.asarray(scene.image, dtype=float)
        for number, person in enumerate(scene.people):
            named = [name for name in HAIR_COLORS if f"the person with {name} hair" in person.phrases]
            if not named:
                continue
            joints = body.joints(torch.from_numpy(person.pose).float()).numpy()
            head = project(scene, number, joints[[15]])[0]
            rows, columns = np.nonzero(scene.owners == number)
            reach = 4 * np.linalg.norm(project(scene, number, joints[[15]] + [[0.07, 0, 0]])[0] - head)
            near = np.hypot(columns - head[0], rows - head[1]) < reach
            names = [nearest_name(color, HAIR_COLORS) for color in pixels[rows[near], columns[near]][::2]]
            count += 1
            assert names.count(named[0]) >= 3
    assert count > 10


def test_phrases_when_somebody_is_bald_then_hair_tells_nobody(monkeypatch, studio):
    monkeypatch.setattr(synthetic, "_BALD_SHARE", 0.5)
    looks = synthetic._draw_looks(300, np.random.default_rng(0))
    boxes, depths = np.array([[0, 0, 1, 1], [5, 0, 6, 1]]), np.zeros(2)
    is_said = {True: 0, False: 0}
    for first, second in zip(looks[::2], looks[1::2], strict=True):
        everything = set(studio._parts)
        texts = synthetic._make_phrases([first, second], boxes, depths, [everything, everything])
        is_hair_said = any("hair" in text for said in texts for text in said)
        is_said[None in (first.hair_color, second.hair_color)] += is_hair_said
    assert is_said[True] == 0
    assert is_said[False] > 10


def test_phrases_when_a_part_is_not_seen_then_say_nothing_about_it(studio):
    looks = synthetic._draw_looks(2, np.random.default_rng(1))
    boxes, depths = np.array([[0, 0, 1, 1], [5, 0, 6, 1]]), np.zeros(2)
    hidden, seen = synthetic._make_phrases(looks, boxes, depths, [{"shins"}, set(studio._parts)])
    assert hidden == ["the person on the left"]
    assert len(seen) > 2


def test_looks_then_hair_stands_out_from_the_skin_and_trousers_from_the_shirt():
    for look in synthetic._draw_looks(300, np.random.default_rng(0)):
        assert look.top_color != look.bottom_color
        assert nearest_name(look.top_rgb, COLORS) == look.top_color
        assert nearest_name(look.bottom_rgb, COLORS) == look.bottom_color
        if look.hair_color:
            assert np.abs(np.array(HAIR_COLORS[look.hair_color]) - look.skin_rgb).sum() >= 60


def test_groups_then_most_of_everybody_is_seen(groups, studio):
    """Each drawn alone, by the label, from the scene's camera, against what the scene shows of them."""
    faces = studio.body.faces.numpy()
    for scene in groups[:10]:
        for number, person in enumerate(scene.people):
            vertices = studio.body.vertices(torch.from_numpy(person.pose).float()[None]).numpy()
            vertices = vertices + scene.translations[number]
            nothing = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
            alone = draw_bodies(
                nothing, vertices, faces, np.zeros_like(vertices), scene.focal, scene.center, (0, -1, 0), 1.0
            )[1]
            seen = scene.owners == number
            assert (seen & (alone < 0)).sum() <= 2
            assert seen.sum() > 0.6 * (alone >= 0).sum()


def test_occluder_when_there_is_one_then_most_often_hides_some_of_somebody(monkeypatch, studio):
    shares = []
    for seed in range(40):
        whole, seen = [], []
        for share, areas in ((0, whole), (1, seen)):
            monkeypatch.setattr(synthetic, "_OCCLUDED_SHARE", share)
            scene = studio.draw(NAMED[seed % len(NAMED)][None], np.random.default_rng(seed), 96)
            areas.append((scene.owners == 0).sum())
        shares.append(1 - seen[0] / whole[0])
    assert max(shares) <= 0.3 + 1e-9
    assert np.mean(np.array(shares) > 0.03) > 0.4


def test_sampler_when_elbows_and_knees_of_the_given_poses_go_anywhere_then_noise_stays_in_anatomy(monkeypatch):
    monkeypatch.setattr(synthetic, "_NOISE_SHARE", 1)
    monkeypatch.setattr(synthetic, "_RECOMBINED_SHARE", 0)
    rng = np.random.default_rng(0)
    wild = rng.normal(0, 1.5, (99, 24, 3))
    wild[:, 23, 0] = np.arange(99)  # a joint that is not known, and stays: says which pose it was
    sampler = PoseSampler(wild, np.tile(np.arange(24) != 23, (99, 1)))
    poses = [sampler.sample(rng)[0] for _ in range(300)]
    # Flexion is positive about x in knees, negative about y in the left elbow, positive in the right one.
    for joint, axis, low, high in (
        (L_KNEE, 0, -0.1, 2.6),
        (R_KNEE, 0, -0.1, 2.6),
        (L_ELBOW, 1, -2.6, 0.1),
        (R_ELBOW, 1, -0.1, 2.6),
    ):
        values = np.array([pose[joint, axis] for pose in poses])
        given = np.array([wild[round(pose[23, 0]), joint, axis] for pose in poses])
        # What is beyond the limits was given, and was as far out at least.
        assert (values >= np.minimum(given, low) - 1e-9).all()
        assert (values <= np.maximum(given, high) + 1e-9).all()
        assert ((low <= given) & (given <= high) & (values != given)).sum() > 20
        assert ((given < low) & (values < low)).any()  # and it is not brought back


@pytest.mark.parametrize(("elbow", "flexion"), [(L_ELBOW, -1.5), (R_ELBOW, 1.5)])
def test_elbow_limits_then_are_on_the_side_that_the_arm_bends_to(elbow, flexion):
    """The hand of a bent elbow comes before the body, to +z of the rest pose."""
    pose = torch.zeros(24, 3)
    pose[elbow, 1] = flexion
    assert BodyModel.load("default").joints(pose)[elbow + 2, 2] > 0.2
    axis, low, high = synthetic._HINGES[elbow]
    assert axis == 1
    assert low < flexion < high
    assert not low < -flexion < high


def test_picture_when_torch_has_several_threads_then_bodies_are_posed_by_one(monkeypatch, studio):
    """By two, 2 pictures of 120 had another byte."""
    threads_used = []
    pose_body = studio.body.vertices

    def spy(pose):
        threads_used.append(torch.get_num_threads())
        return pose_body(pose)

    monkeypatch.setattr(studio.body, "vertices", spy)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        studio.draw(NAMED[:2], np.random.default_rng(0), 32)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(threads_used) == {1}


def test_picture_when_the_left_arm_alone_is_up_then_it_is_on_the_picture_s_right(monkeypatch, studio):
    monkeypatch.setattr(synthetic, "_OCCLUDED_SHARE", 0)
    pose = np.zeros((24, 3))
    pose[0, 0] = np.pi  # facing the camera
    pose[16, 2], pose[17, 2] = np.pi / 2, np.pi / 2.2
    for seed in range(8):
        scene = studio.draw(pose[None], np.random.default_rng(seed), 160)
        rows, columns = np.nonzero(scene.owners == 0)
        left, _, right, _ = scene.people[0].box
        assert columns[rows < rows.min() + 6].mean() > (left + right) / 2 + 3
