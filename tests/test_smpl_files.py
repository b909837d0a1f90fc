"""The official model files: read equal to their arrays, or refused with a reason."""

import io
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from make_smpl_files import dump_model, make_model, make_model_of
from test_array_files import Reduce, live_payloads

from chatpose_hf import array_files, atomic_write
from chatpose_hf.array_files import load_array_pickle
from chatpose_hf.smpl_files import convert_smpl_file, load_smpl_file


FIELDS = ["v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f"]


@pytest.fixture(scope="module")
def toy():
    return make_model_of([-1, 0, 0, 1], vertices=20, faces=30, shapes=5)


@pytest.fixture
def write(tmp_path):
    def write(model, name="model.pkl"):
        path = tmp_path / name
        if path.suffix == ".npz":
            np.savez(path, **model)
        else:
            path.write_bytes(model if isinstance(model, bytes) else dump_model(model))
        return path

    return write


def assert_holds(loaded, model, names):
    assert list(loaded) == names
    for name in names:
        is_index = model[name].dtype.kind in "iu"
        expected = model[name].astype(np.int64 if is_index else np.float32)
        if name == "kintree_table":
            expected[0, 0] = -1
        assert loaded[name].dtype == expected.dtype
        np.testing.assert_array_equal(loaded[name], expected, err_msg=name)


def test_full_smpl_pickle_with_chumpy_and_scipy_equals_its_arrays(write):
    model = make_model("smpl")
    loaded = load_smpl_file(write(model))
    assert_holds(loaded, model, FIELDS)
    assert loaded["posedirs"].shape == (6890, 3, 207)
    assert "chumpy" not in sys.modules


@pytest.mark.parametrize("kind", ["smplh", "smplx"])
@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
def test_hands_and_landmarks_come_where_the_model_has_them(write, kind, suffix):
    model = make_model(kind, vertices=120)
    extras = [name for name in model if name.startswith(("hands", "lmk", "dynamic"))]
    assert len(extras) == {"smplh": 4, "smplx": 8}[kind]
    assert_holds(load_smpl_file(write(model, f"model{suffix}")), model, FIELDS + extras)


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_reads_alike(toy, write, protocol):
    assert_holds(load_smpl_file(write(dump_model(toy, protocol))), toy, FIELDS)


def test_byte_and_memory_order_do_not_matter(toy, write):
    model = {
        name: np.asfortranarray(value).astype(value.dtype.newbyteorder(">"))
        if isinstance(value, np.ndarray)
        else value
        for name, value in toy.items()
    }
    for name in ("model.npz", "model.pkl"):
        assert_holds(load_smpl_file(write(model, name)), toy, FIELDS)


def test_chumpy_expression_is_an_error_only_where_it_is_asked_for(toy, write):
    expression = b"cchumpy.ch_ops\nadd\n)\x81}b"
    fields = dump_model({**toy, "pose_training_info": "HERE"})
    content = fields.replace(b"X\x04\x00\x00\x00HERE", expression)
    assert content != fields
    assert_holds(load_smpl_file(write(content)), toy, FIELDS)
    with pytest.raises(ValueError, match=r"chumpy expression `chumpy\.ch_ops\.add`"):
        load_array_pickle(content)


@pytest.mark.parametrize("name", live_payloads(Path("marker")))
def test_hostile_pickle_is_refused_by_name_and_not_run(toy, write, tmp_path, name):
    marker = tmp_path / "marker"
    payload, offender = live_payloads(marker)[name]
    with pytest.raises(ValueError, match=f"refused `{offender}`.*nothing was executed"):
        load_array_pickle(payload)
    # also inside a field that no body model has
    hidden = dump_model({**toy, "extra": "HERE"}).replace(b"X\x04\x00\x00\x00HERE", payload.removesuffix(b"."))
    with pytest.raises(ValueError, match=offender):
        load_smpl_file(write(hidden))
    assert not marker.exists()
    if name != "dotted":
        pickle.loads(payload)
        assert marker.exists(), "the payload does nothing: the test proves nothing"


@pytest.mark.parametrize("suffix", [".pkl", ".npz"])
def test_truncated_file_is_a_value_error(toy, write, suffix):
    path = write(toy, f"model{suffix}")
    content = path.read_bytes()
    for cut in [0, 1, 2, 3, 10, 100, len(content) // 3, len(content) // 2, len(content) - 30, len(content) - 1]:
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="cannot read"):
            load_smpl_file(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("suffix", "protocol"), [(".pkl", 0), (".pkl", 2), (".pkl", 4), (".npz", None)])
def test_random_damage_is_a_value_error_or_a_valid_model(write, suffix, protocol):
    small = make_model_of([-1, 0], vertices=4, faces=4, shapes=1)
    path = write(small if protocol is None else dump_model(small, protocol), f"model{suffix}")
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(content)
        for position in generator.integers(len(content), size=generator.integers(1, 4)):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            load_smpl_file(path)
        except ValueError:
            refused += 1
    assert refused > 100


def test_npz_with_an_object_array_is_refused_only_where_the_field_is_needed(toy, write, tmp_path):
    marker = tmp_path / "marker"
    hostile = np.array([Reduce(open, str(marker), "w")], dtype=object)
    assert_holds(load_smpl_file(write({**toy, "part2num": hostile}, "model.npz")), toy, FIELDS)
    with pytest.raises(ValueError, match=r"`weights` is an array of type `object`.*a pickle"):
        load_smpl_file(write({**toy, "weights": hostile}, "model.npz"))
    assert not marker.exists()


def test_npz_that_announces_more_than_it_holds_allocates_nothing(toy, write):
    path = write(toy, "model.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 3)})
    with zipfile.ZipFile(path, "r") as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, member in members.items():
            target.writestr(name, header.getvalue() if name == "v_template.npy" else member)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"announces shape \(1000000000, 3\)"):
            load_smpl_file(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_zip_bomb_is_refused_before_it_is_inflated(toy, write, monkeypatch):
    monkeypatch.setattr(array_files, "MAX_BYTES", 10**6)
    path = write(toy, "model.npz")
    np.savez_compressed(path, **{**toy, "weights": np.zeros((100, 10**5))})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="`weights` announces 80000128 bytes"):
            load_smpl_file(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match=r"has \d+ bytes"):
        load_smpl_file(write(bytes(10**6 + 1)))


def change(**fields):
    return lambda toy: {**toy, **{name: function(toy[name].copy()) for name, function in fields.items()}}


def put(index, value):
    def function(array):
        array[index] = value
        return array

    return function


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda toy: {"a": toy["f"]}, r"no `v_template`, .*`f` in the file, which holds `a`"),
        (
            change(weights=lambda array: array[:, :3]),
            r"`weights` of shape \(V, J\), in this file \(20, 4\), got \(20, 3\)",
        ),
        (
            change(v_template=lambda array: array[:, :2]),
            r"`v_template` of shape \(V, 3\), in this file \(20, 3\), got",
        ),
        (change(shapedirs=lambda array: array[..., 0]), r"`shapedirs` of shape \(V, 3, S\)"),
        (change(posedirs=lambda array: array[..., :9]), "27 for 4 joints, got 9"),
        (change(f=put((0, 1), 20)), "indices 0 to 19 in `f`, got 0 to 20"),
        (change(f=lambda array: array + 0.5), "whole numbers in `f`"),
        (change(v_template=put((3, 1), np.nan)), "finite numbers in `v_template`"),
        (change(weights=put((3, 1), 1e300)), "finite numbers in `weights`"),
        (change(kintree_table=put((0, 0), 7)), r"`kintree_table` the root first.*got \[7, 0, 0, 1\]"),
        (change(kintree_table=put((0, 2), 2)), "parent before the joint"),
        (change(kintree_table=put((0, 2), 2**32 - 1)), "parent before the joint"),
        (change(v_template=lambda array: array.astype("S4")), "`v_template`.*type|array type"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
def test_model_that_does_not_fit_together_is_refused(toy, write, suffix, spoil, match):
    model = spoil(toy)
    path = write(pickle.dumps(model, 2) if suffix == ".pkl" else model, f"model{suffix}")
    with pytest.raises(ValueError, match=f"cannot read `.*model{suffix}`: .*{match}"):
        load_smpl_file(path)


def test_field_that_is_no_array_is_refused(toy, write):
    with pytest.raises(ValueError, match="expected numbers in `weights`, got `str`"):
        load_smpl_file(write(pickle.dumps({**toy, "weights": "heavy"}, 2)))
    with pytest.raises(ValueError, match="expected a dictionary in the pickle, got `list`"):
        load_smpl_file(write(pickle.dumps([1], 2)))


def test_unknown_suffix_and_absent_file(tmp_path):
    with pytest.raises(ValueError, match=r"ends in `\.pkl` or `\.npz`, got `model\.txt`"):
        load_smpl_file("model.txt")
    with pytest.raises(FileNotFoundError):
        load_smpl_file(tmp_path / "model.pkl")


def test_converted_file_loads_without_pickle_and_equal(toy, write, tmp_path):
    source, target = write(toy), tmp_path / "clean.npz"
    table = convert_smpl_file(source, target)
    assert table == {name: toy[name].shape for name in FIELDS}
    with np.load(target, allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays} == table
    assert_holds(load_smpl_file(target), toy, FIELDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.npz", "model.pkl"]


def test_conversion_refuses_a_bad_target_and_keeps_what_is_there(toy, write, tmp_path, monkeypatch):
    source = write(toy, "model.npz")
    with pytest.raises(ValueError, match="is the source itself"):
        convert_smpl_file(source, tmp_path / "." / "model.npz")
    with pytest.raises(ValueError, match=r"ends in `\.npz`, got .*clean\.pkl"):
        convert_smpl_file(source, tmp_path / "clean.pkl")
    target = tmp_path / "clean.npz"
    target.write_bytes(b"before")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic_write.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert_smpl_file(source, target)
    assert target.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.npz", "model.npz"]
