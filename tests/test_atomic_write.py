import numpy as np
import pytest

from chatpose_hf import atomic_write
from chatpose_hf.atomic_write import npz_bytes, write_atomically


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    for content in (b"first", b"second, longer"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_write.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_npz_holds_numbers_and_nothing_that_could_run(tmp_path):
    path = tmp_path / "arrays.npz"
    write_atomically(path, npz_bytes({"a": np.arange(3), "name": np.array("x")}))
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["a"].tolist() == [0, 1, 2]
        assert arrays["name"] == "x"
    with pytest.raises(ValueError, match="allow_pickle=False"):
        npz_bytes({"a": np.array([{}], dtype=object)})
