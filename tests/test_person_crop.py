"""The square crop of a person's box."""

import numpy as np
import pytest
from PIL import Image

from chatpose_hf.person_crop import crop_person, keypoint_box


def photo(width=120, height=90, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def shifted(image, dx, dy):
    moved = Image.new("RGB", (image.width + dx, image.height + dy))
    moved.paste(image, (dx, dy))
    return moved


@pytest.mark.parametrize("box", [(30, 20, 60, 70), (30.25, 20.5, 61.75, 70.5), (-10, -5, 40, 60), (80, 50, 140, 120)])
@pytest.mark.parametrize("size", [24, 160])
def test_crop_of_a_shifted_photo_equals_the_shifted_crop(box, size):
    image = photo()
    moved_box = (box[0] + 13, box[1] + 7, box[2] + 13, box[3] + 7)
    crop, moved = crop_person(image, box, size), crop_person(shifted(image, 13, 7), moved_box, size)
    assert np.abs(np.asarray(crop, dtype=int) - np.asarray(moved, dtype=int)).max() <= 1  # the fraction's rounding


def test_crop_when_the_box_is_a_square_of_pixels_then_is_those_pixels():
    image = photo()
    # 30 wide and 40 high is 3:4: the square's side is 40, its middle (45, 40).
    crop = crop_person(image, (30, 20, 60, 60), 40)
    assert np.array_equal(np.asarray(crop), np.asarray(image)[20:60, 25:65])


def test_crop_when_the_box_is_wide_then_its_height_grows_to_three_to_four():
    image = photo(200, 200)
    crop = crop_person(image, (50, 90, 110, 100), 80)  # 60 wide: 80 high, around (80, 95)
    assert np.array_equal(np.asarray(crop), np.asarray(image)[55:135, 40:120])


def test_crop_over_the_edge_is_black_there():
    crop = np.asarray(crop_person(Image.new("RGB", (100, 100), "white"), (-30, 0, 30, 80), 80))
    assert (crop[:, :39] == 0).all()
    assert (crop[:, 41:] == 255).all()


def test_crop_of_a_checkerboard_shrunk_is_grey_not_moire():
    board = Image.fromarray((np.indices((160, 160)).sum(0) % 2 * 255).astype(np.uint8))
    crop = np.asarray(crop_person(board, (20, 0, 140, 160), 20))
    assert crop.shape == (20, 20, 3)
    assert abs(crop.astype(float) - 127.5).max() < 20


def test_keypoint_box_is_the_larger_side_times_1_2_and_leaves_out_the_unseen():
    keypoints = [(10, 20, 1.0), (30, 120, 0.3), (500, 500, 0.29)]
    assert keypoint_box(keypoints) == pytest.approx((20 - 60, 70 - 60, 20 + 60, 70 + 60))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 10, 20), "with an inside"),
        ((10, 10, float("nan"), 20), "with an inside"),
        ((200, 10, 220, 20), "meets the photo"),
        ((0, 0, 9000, 9000), "at most 8192"),
    ],
)
def test_crop_when_the_box_is_wrong_then_says_so(box, message):
    with pytest.raises(ValueError, match=message):
        crop_person(photo(), box, 32)


def test_keypoint_box_when_none_is_seen_then_says_so():
    with pytest.raises(ValueError, match="at least 2 keypoints"):
        keypoint_box([(1, 2, 0.1), (3, 4, 0.9)])
