"""Pictures: the right pixels, the right way round, nothing but NumPy and Pillow."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from named_poses import POSES, make_pose
from PIL import Image

from chatpose_hf.body import BodyModel
from chatpose_hf.render import (
    _Projected,
    _rasterize,
    contact_sheet,
    draw_bodies,
    overlay_bodies,
    render_bodies,
    vertex_normals,
)


# A tetrahedron, counter-clockwise seen from outside
TETRAHEDRON = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


@pytest.fixture(scope="module")
def body():
    return BodyModel.load("default")


def alpha(picture):
    return np.asarray(picture)[..., 3] > 127


def naive_rasterize(projected, faces, width, height):
    """Every pixel's centre against every triangle."""
    nearest = {}
    for number, (a, b, c) in enumerate(faces):
        corners = [np.array([projected.x[i], projected.y[i]], dtype=np.float64) for i in (a, b, c)]

        def cross(u, v):
            return u[0] * v[1] - u[1] * v[0]

        area = cross(corners[1] - corners[0], corners[2] - corners[0])
        if area >= 0:
            continue
        for row in range(height):
            for column in range(width):
                point = np.array([column + 0.5, row + 0.5])
                shares = [
                    cross(corners[(k + 2) % 3] - corners[(k + 1) % 3], point - corners[(k + 1) % 3]) / area
                    for k in range(3)
                ]
                if min(shares) > 0:
                    depth = sum(share * projected.inverse_depth[i] for share, i in zip(shares, (a, b, c), strict=True))
                    pixel = row * width + column
                    nearest[pixel] = max(nearest.get(pixel, (0, 0)), (depth, number))
    return {pixel: number for pixel, (_, number) in nearest.items()}


def test_rasterizer_equals_every_pixel_against_every_triangle():
    generator = np.random.default_rng(0)
    for _ in range(20):
        # also outside the picture
        projected = _Projected(*generator.uniform(-8, 40, (2, 30)), generator.uniform(0.2, 1, 30))
        faces = generator.integers(30, size=(25, 3))
        pixels, nearest = _rasterize(projected, faces, 32, 24)
        assert dict(zip(pixels.tolist(), nearest.tolist(), strict=True)) == naive_rasterize(projected, faces, 32, 24)


def test_neighbouring_triangles_leave_no_gap_and_share_no_pixel():
    size, steps = 40, 9
    grid = np.stack(np.meshgrid(np.linspace(1.3, 37.7, steps), np.linspace(2.1, 36.9, steps)), -1).reshape(-1, 2)
    corner = np.arange(steps * steps).reshape(steps, steps)
    a, b, c, d = corner[:-1, :-1], corner[:-1, 1:], corner[1:, :-1], corner[1:, 1:]
    faces = np.stack([np.stack([a, c, b], -1), np.stack([b, c, d], -1)]).reshape(-1, 3)
    pixels, _ = _rasterize(_Projected(*grid.T, np.ones(len(grid))), faces, size, size)
    covered = np.zeros((size, size), bool)
    covered.ravel()[pixels] = True
    centres = np.arange(size) + 0.5
    inside = ((centres > 2.1) & (centres < 36.9))[:, None] & ((centres > 1.3) & (centres < 37.7))
    assert (covered == inside).all()


def test_normals_point_outwards():
    normals = vertex_normals(TETRAHEDRON[None], FACES)
    outwards = TETRAHEDRON - TETRAHEDRON.mean(0)
    assert ((normals * outwards).sum(-1) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-6)


def test_upright_and_not_mirrored(body):
    """The person's left arm, raised, is at the top right of the picture."""
    seen = alpha(render_bodies(body.vertices(make_pose(POSES["left arm raised"])), body.faces, size=200, shadow=False))
    rows, columns = np.nonzero(seen)
    top = columns[rows < np.quantile(rows, 0.05)].mean()
    assert top > columns.mean() + 10
    # feet below: the lowest rows are two narrow things
    assert seen[rows.max() - 3].sum() < seen[(rows.min() + rows.max()) // 2].sum()
    back = alpha(
        render_bodies(
            body.vertices(make_pose(POSES["left arm raised"])), body.faces, size=200, shadow=False, view="back"
        )
    )
    rows, columns = np.nonzero(back)
    assert columns[rows < np.quantile(rows, 0.05)].mean() < columns.mean() - 10


def test_views_walk_round_to_the_right(body):
    """From the viewer's right one sees more of the person's left: an arm held forward points to the picture's left."""
    vertices = body.vertices(make_pose(POSES["right arm forward"]))
    columns = np.nonzero(alpha(render_bodies(vertices, body.faces, size=200, view="side", shadow=False)))[1]
    middle = np.median(columns)
    assert middle - columns.min() > columns.max() - middle + 20
    same = render_bodies(vertices, body.faces, size=64, view=90.0, shadow=False)
    assert same == render_bodies(vertices, body.faces, size=64, view="side", shadow=False)


def test_frame_background_and_shadow(body):
    vertices = body.vertices(make_pose({}))
    picture = render_bodies(vertices, body.faces, size=(320, 200))
    assert picture.size == (320, 200)
    assert picture.mode == "RGBA"
    plain = render_bodies(vertices, body.faces, size=(320, 200), shadow=False)
    rows, _ = np.nonzero(alpha(plain))
    assert rows.min() > 2
    assert rows.max() < 197
    assert np.ptp(rows) > 150  # fills the picture
    shaded = np.asarray(picture).astype(int)
    shadow = (shaded[..., 3] > 10) & ~alpha(plain)
    assert 100 < shadow.sum() < 6000
    assert np.nonzero(shadow)[0].mean() > 160  # on the floor
    filled = np.asarray(render_bodies(vertices, body.faces, size=50, background="#ff0000"))
    assert (filled[0, 0] == [255, 0, 0, 255]).all()


def test_edges_are_smooth(body):
    picture = np.asarray(render_bodies(body.vertices(make_pose({})), body.faces, size=100, shadow=False))
    partial = (picture[..., 3] > 0) & (picture[..., 3] < 255)
    assert partial.sum() > 50
    # no dark fringe: a half-covered pixel has the body's colour
    assert picture[partial][:, :3].mean() > 60


def test_nearer_bodies_hide_farther_ones_and_have_their_colours(body):
    vertices = body.vertices(make_pose({}))
    behind = vertices + torch.tensor([0.0, 0.0, 2.0])
    picture = render_bodies(
        torch.stack([behind, vertices]), body.faces, size=150, colors=["red", "lime"], shadow=False
    )
    array = np.asarray(picture).astype(int)
    middle = array[70, 70:80]
    assert (middle[:, 1] > middle[:, 0]).all()
    assert (array[..., 0] > array[..., 1] + 50).any()


def test_overlay_fills_the_box_and_keeps_the_rest(body):
    photo = Image.new("RGB", (300, 200), "#305030")
    vertices = body.vertices(make_pose({}))
    drawn = overlay_bodies(photo, vertices, body.faces, box=(100, 50, 250, 150), alpha=1.0)
    assert drawn.size == photo.size
    assert photo.getpixel((175, 100)) == (0x30, 0x50, 0x30)
    changed = np.nonzero((np.asarray(drawn) != np.asarray(photo)).any(-1))
    assert changed[0].min() in range(49, 53)
    assert changed[0].max() in range(147, 151)
    assert abs((changed[1].min() + changed[1].max()) / 2 - 175) < 2
    half = np.asarray(overlay_bodies(photo, vertices, body.faces, box=(100, 50, 250, 150), alpha=0.5)).astype(int)
    full = np.asarray(drawn).astype(int)
    np.testing.assert_allclose(half, (full + np.asarray(photo)) / 2, atol=2)
    # partly outside is no error
    overlay_bodies(photo, vertices, body.faces, box=(-500, -500, 100, 100))


# A square of 1 m with a corner on the camera's axis, its front towards the camera (y points down)
SQUARE = np.array([[0, 0, 2], [1, 0, 2], [1, 1, 2], [0, 1, 2]], dtype=np.float32)
SQUARE_FACES = np.array([[0, 2, 1], [0, 3, 2]])


def draw_squares(*depths, colors, light=(0, 0, -1), ambient=1.0):
    squares = np.stack([SQUARE * [1, 1, 0] + [0, 0, depth] for depth in depths])
    background = np.full((50, 60, 3), 77, dtype=np.uint8)
    vertex_colors = np.repeat(np.array(colors, dtype=float)[:, None], 4, axis=1)
    return draw_bodies(background, squares, SQUARE_FACES, vertex_colors, 40, (10, 20), light, ambient)


def test_draw_bodies_when_a_square_is_two_metres_away_then_it_is_where_the_pinhole_has_it():
    picture, shown = draw_squares(2, colors=[(1, 0, 0)])
    inside = np.zeros((50, 60), dtype=bool)
    inside[20:40, 10:30] = True  # from (10, 20), 40 pixels of focal length times 1 m / 2 m
    assert ((shown >= 0) == inside).all()
    np.testing.assert_allclose(picture[inside], [[255, 0, 0]] * inside.sum(), atol=1)
    assert (picture[~inside] == 77).all()


def test_draw_bodies_when_one_is_before_another_then_hides_it_in_any_order():
    for depths, near in (((2, 4), 0), ((4, 2), 1)):
        picture, shown = draw_squares(*depths, colors=[(1, 0, 0), (0, 1, 0)])
        assert (shown[20:40, 10:30] // 4 == near).all()
        assert picture[30, 20] == pytest.approx([[255, 0, 0], [0, 255, 0]][near], abs=1)


def test_draw_bodies_when_lit_from_behind_then_only_the_ambient_share_is_left():
    """Light adds up before the gamma."""
    for light, ambient, wanted in (((0, 0, -3), 0.3, 1), ((0, 0, 1), 0.3, 0.3), ((0, -1, -1), 0, np.sqrt(0.5))):
        picture, _ = draw_squares(2, colors=[(1, 1, 1)], light=light, ambient=ambient)
        assert picture[30, 20] == pytest.approx(255 * wanted ** (1 / 2.2), abs=1)


def test_draw_bodies_when_a_vertex_is_behind_the_camera_then_says_so():
    with pytest.raises(ValueError, match="expected all vertices before the camera"):
        draw_squares(0, colors=[(1, 0, 0)])


def test_contact_sheet_has_a_tile_and_a_caption_for_each():
    tiles = [Image.new("RGB", (50, 30), color) for color in ("red", "lime", "blue")]
    sheet = contact_sheet(tiles, ["one", "a long caption " * 20, "wörd"], columns=2, tile=100)
    assert sheet.width == 200
    assert sheet.height > 200
    for place, color in (
        ((50, 50), (255, 0, 0)),
        ((150, 50), (0, 255, 0)),
        ((50, sheet.height // 2 + 50), (0, 0, 255)),
    ):
        assert sheet.getpixel(place) == color
    caption = np.asarray(sheet)[101 : sheet.height // 2, :100]
    assert (caption < 128).any()
    assert contact_sheet(tiles[:1]).size == (256, 256)
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])
    with pytest.raises(ValueError, match="a caption for each of the 3 pictures, got 1"):
        contact_sheet(tiles, ["one"])


def test_errors(body):
    vertices = body.vertices(make_pose({}))
    with pytest.raises(ValueError, match=r"expected vertices of shape \(V, 3\)"):
        render_bodies(vertices[:, :2], body.faces)
    with pytest.raises(ValueError, match="expected faces"):
        render_bodies(vertices[:100], body.faces)
    with pytest.raises(ValueError, match="got NaN"):
        render_bodies(vertices * float("nan"), body.faces)
    with pytest.raises(ValueError, match=r"front, three_quarter, side, back.*got 'top'"):
        render_bodies(vertices, body.faces, view="top")
    for size in (0, (10, -1), 100_000):
        with pytest.raises(ValueError, match="expected a picture of 1 to"):
            render_bodies(vertices, body.faces, size=size)
    with pytest.raises(ValueError, match="with an inside"):
        overlay_bodies(Image.new("RGB", (9, 9)), vertices, body.faces, box=(5, 5, 5, 9))
    for box in ((-500, -500, -100, -100), (0, 0, float("inf"), 9)):
        with pytest.raises(ValueError, match="expected a box"):
            overlay_bodies(Image.new("RGB", (9, 9)), vertices, body.faces, box=box)
    with pytest.raises(ValueError, match="alpha from 0 to 1"):
        overlay_bodies(Image.new("RGB", (9, 9)), vertices, body.faces, alpha=2)


def test_nothing_but_numpy_and_pillow_is_loaded():
    code = "import sys, chatpose_hf.render; print({'torch', 'OpenGL', 'matplotlib', 'trimesh'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
