"""Pictures from the disk and from strangers."""

import pytest
from PIL import Image

from chatpose_hf.image_files import KEPT_SIDE, MAX_PIXELS, open_image, open_upload


def saved(picture, path, **kwargs):
    picture.save(path, **kwargs)
    return path


def test_photos_are_turned_upright_and_uploads_shrunk(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    lying = Image.new("RGB", (60, 40), "red")
    lying.paste("blue", (0, 0, 30, 40))
    path = saved(lying, tmp_path / "a.jpg", exif=exif, quality=95)
    for upright in (open_image(path), open_upload(path)):
        assert (upright.mode, upright.size) == ("RGB", (40, 60))
        assert upright.getpixel((20, 5))[2] > 200  # what was at the left is above
    assert open_upload(saved(Image.new("L", (6000, 3000)), tmp_path / "b.png")).size == (KEPT_SIDE, KEPT_SIDE // 2)


def test_open_upload_refuses(tmp_path, monkeypatch):
    def refusal(path):
        with pytest.raises(ValueError, match=f"^{path.name} ") as error:
            open_upload(path)
        assert str(tmp_path) not in str(error.value)
        return str(error.value)

    (tmp_path / "text.png").write_text("no picture")
    assert "no picture that can be read; PNG" in refusal(tmp_path / "text.png")
    noise = Image.effect_noise((100, 100), 50)
    assert "no picture that can be read" in refusal(saved(noise, tmp_path / "fine.tiff"))
    whole = saved(noise, tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(tmp_path / "half.png")
    assert "too narrow, 9000 x 10 pixels" in refusal(saved(Image.new("1", (9_000, 10)), tmp_path / "line.png"))

    def decode(*_):
        raise AssertionError("decoded before it was checked")

    too_wide = saved(Image.new("1", (50_000, 10)), tmp_path / "wide.png")
    too_many = saved(Image.new("1", (8_000, 8_000)), tmp_path / "many.png")
    bomb = saved(Image.new("1", (20_000, 20_000)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "convert", decode)
    assert "50000 x 10 pixels" in refusal(too_wide)
    assert f"{MAX_PIXELS // 10**6} million" in refusal(too_many)
    # Pillow itself refuses to open this one
    assert "more pixels than are read for safety" in refusal(bomb)


def test_pictures_that_cannot_be_read(tmp_path, images, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="is no picture that can be read"):
        open_image(tmp_path / "text.png")
    images[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-2000])
    with pytest.raises(ValueError, match="is a damaged picture"):
        open_image(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "nowhere.png")
    images[0].save(tmp_path / "big.png")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="more pixels than are read for safety"):
        open_image(tmp_path / "big.png")
