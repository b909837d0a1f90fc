"""Pickles and npz files of arrays: what is read, and that nothing of a hostile one runs."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from make_smpl_files import imitate, imitated_chumpy

from chatpose_hf import array_files
from chatpose_hf.array_files import NpzFields, load_array_pickle


GOLDENS = Path(__file__).parent / "goldens"


def test_pickle_of_real_chumpy_under_python_2_gives_the_values_chumpy_computes():
    """
    Both files were made by CPython 2.7.18 with chumpy 0.70, numpy 1.16.6 and scipy 1.2.3 from random numbers:
    `x = ch.array(randn(20, 3, 6))`, `y = ch.array(randn(20, 4))`, then `x`, `x[:, :, :4]`, `x[[5, 1, 2], 1:]`,
    `x[:, :, :4][3]`, `y.reshape((8, 10))`, `y.ravel()`, `y.T`, a `csc_matrix` and a uint32 array in one dictionary,
    written by `cPickle.dumps(..., 2)`, and each one's `.r` (`.todense()`) by `np.savez`.
    """
    loaded = load_array_pickle((GOLDENS / "chumpy_python2.pkl").read_bytes())
    assert loaded.pop("bs_type") == "lrotmin"
    with np.load(GOLDENS / "chumpy_python2.npz", allow_pickle=False) as expected:
        assert loaded.keys() == set(expected)
        for name in expected:
            assert loaded[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(loaded[name], expected[name], err_msg=name)


def test_python_2_text_protocol_by_hand():
    content = rb"""(dp0
S'bytes'
p1
S'\xff\n\x00\'"'
p2
sS'numbers'
(I1
L-2L
F2.5
I01
NtsS'again'
g2
s."""
    assert load_array_pickle(content) == {
        "bytes": "\xff\n\0'\"",
        "numbers": (1, -2, 2.5, True, None),
        "again": "\xff\n\0'\"",
    }


@pytest.mark.parametrize("protocol", range(6))
def test_data_files_of_arrays_and_containers_come_back_equal(protocol):
    nested = np.empty((), dtype=object)
    nested[()] = {"keypoints": np.arange(6, dtype=np.float32).reshape(2, 3)}
    data = [
        {"nested": nested, "objects": np.array([[1, "a"], [None, (2,)]], dtype=object), 7: b"\xff\0"},
        (
            np.float64(1.5),
            np.bool_(True),
            np.zeros((0, 3)),
            np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
        ),
        {"ab", 3},
        "é€",
        2**70,
    ]
    first, arrays, *rest = load_array_pickle(pickle.dumps(data, protocol))
    np.testing.assert_array_equal(first["nested"][()]["keypoints"], nested[()]["keypoints"])
    assert first["objects"].tolist() == data[0]["objects"].tolist()
    assert first[7] == b"\xff\0"
    for loaded, expected in zip(arrays, data[1], strict=True):
        assert loaded.dtype == expected.dtype
        np.testing.assert_array_equal(loaded, expected)
    assert rest == data[2:]


class Reduce:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def live_payloads(marker):
    """Pickles that make the file `marker` under Python's own unpickler, and the global at which ours must stop."""
    path = str(marker)
    in_array = np.array([Reduce(open, path, "w")], dtype=object)
    by_text = f"(dS'a'\ncio\nopen\n(S'{path}'\nS'w'\ntRs.".encode()
    by_inst = f"(S'touch {path}'\nios\nsystem\n.".encode()
    by_obj = f"(cos\nsystem\nS'touch {path}'\no.".encode()
    by_getattr = f"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch {path}'\ntR.".encode()
    by_globals = b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x28_reconstruct.__class__.__base__.__repr__\x93."
    return {
        "system": (f"cos\nsystem\n(S'touch {path}'\ntR.".encode(), "os.system"),
        "eval": (pickle.dumps({"f": Reduce(eval, f"open({path!r}, 'w')")}, 2), "__builtin__.eval"),
        "exec": (pickle.dumps([Reduce(exec, f"open({path!r}, 'w')")], 5), "builtins.exec"),
        "array": (pickle.dumps(in_array, 2), f"{open.__module__}.open"),  # io, from Python 3.13 on _io
        "text": (by_text, "io.open"),
        "inst": (by_inst, "os.system"),
        "obj": (by_obj, "os.system"),
        "getattr": (by_getattr, "builtins.getattr"),
        "dotted": (by_globals, "numpy._core.multiarray._reconstruct.__class__.__base__.__repr__"),
    }


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (pickle.dumps(Reduce(__import__("subprocess").Popen, ["touch", "x"]), 4), r"`subprocess\.Popen`"),
        (
            b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
            r"`numpy\.core\.multiarray\._reconstruct\.__globals__`",
        ),
        (b"cchumpy.ch\nCh.__init__.__globals__\n.", "chumpy expression `chumpy.ch.Ch.__init__.__globals__`"),
        (b"cchumpy.ch\nCh x\n.", "`chumpy.ch.Ch.x`"),
        (b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.", "encoding 'rot13'"),
        (b"cnumpy\nndarray\n.", "`numpy.ndarray`"),
        (b"cnumpy\nndarray\n)\x81.", "`numpy.ndarray`"),
        (b"cnumpy\nndarray\n}b.", "state for `numpy.ndarray`"),
        (b"]}b.", "state for a `list`"),
        (b"]]R.", "call of a `list`"),
        (b"cnumpy\nndarray\n]R.", "call of `numpy.ndarray` with a `list`"),
        (b"cnumpy\nndarray\n)R)R.", "call of `numpy.ndarray`"),
        (b"cnumpy\nndarray\nNa.", "add items to `numpy.ndarray`"),
        (b"}]Ns.", "a `list` as a key"),
        (b"})Ns.", "a `tuple` as a key"),
        (b"}L4294967296L\nNs.", "a `int` as a key"),
        (b"\x80\x04]]\x93.", "a global named by a `list`"),
        (b"\x80\x04S'chumpy'\n]\x93.", "a global named by a `str` and a `list`"),
        (b"\x80\x02\x82\x01.", "opcode `EXT1`"),
        (b"Pname\n.", "opcode `PERSID`"),
        (b"Nq\x00Q.", "opcode `BINPERSID`"),
        (b"\x80\x05\x97.", "opcode `NEXT_BUFFER`"),
        (b"]q\x00h\x00a.", "contains itself"),
        (b"cchumpy.ch\nCh\n)\x81q\x00}X\x01\x00\x00\x00xh\x00sb.", "`chumpy.ch.Ch` that contains itself"),
        (
            b"cchumpy.reordering\nSelect\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
            "`chumpy.reordering.Select` that contains",
        ),
        (b"cchumpy.ch\nCh\n)\x81}b.", "as `x` of `chumpy.ch.Ch`"),
        (b"]" * 200 + b"a" * 199 + b".", "nested more than"),
        (b")" + b"\x85" * 300_000 + b".", "nested more than"),
        (b"})" + b"\x85" * 300_000 + b"Ns.", "a `tuple` as a key"),
        (b"N0" * 500_001 + b"N.", "at most 1000000 pickle opcodes"),
        (b"", "truncated"),
        (b"<html>", "opcode at byte 0"),
        (b".", "truncated"),
        (b"Np-1\nh\x07.", "damaged"),
    ],
)
def test_odd_pickle_is_refused(payload, match):
    with pytest.raises(ValueError, match=match):
        load_array_pickle(payload)


def dumps_array(shape, raw=b"12345678", dtype="f8"):
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n"
        + pickle.dumps(shape, 2)[2:-1]
        + f"cnumpy\ndtype\n(S'{dtype}'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n".encode()
        + pickle.dumps(raw, 3)[2:-1]
        + b"tb"
    )


def dumps_csc(shape, indptr, indices=(0,), data=(1.0,)):
    with imitated_chumpy() as classes:
        arrays = {"indptr": np.array(indptr), "indices": np.array(indices), "data": np.array(data)}
        return pickle.dumps(imitate(classes["csc_matrix"], _shape=shape, **arrays), 2)


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (b"T" + struct.pack("<i", 2**31 - 1) + b"abc.", "expected 2147483647 bytes"),
        (b"B" + struct.pack("<I", 2**32 - 1) + b"abc.", "expected 4294967295 bytes"),
        (b"\x8e" + struct.pack("<Q", 2**62) + b"abc.", "expected 4611686018427387904 bytes"),
        (b"\x8d" + struct.pack("<Q", 2**62) + b"abc.", "expected 4611686018427387904 bytes"),
        (b"\x96" + struct.pack("<Q", 2**62) + b"abc.", "expected 4611686018427387904 bytes"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**62), "truncated"),
        (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.", "not enough data"),
        (b"\x8a\xff" + b"\x7f" * 255 + b".", "integer of 2039 bits"),
        (b"L" + b"9" * 100_000 + b"L\n.", "digits|bits"),
        (b"Nr" + struct.pack("<I", 2**32 - 1) + b"S'the memo of this size was not allocated'\n0Px\n.", "PERSID"),
        (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L1000000000000L\ntS'b'\ntR.",
            "only its announcement",
        ),
        (dumps_array((10**12,)) + b".", r"announces shape \(1000000000000,\)"),
        (dumps_array((2**64, 2**64)) + b".", "announces shape"),
        (dumps_array((-1,)) + b".", "announces shape"),
        (dumps_array((1,), dtype="V8") + b".", "array type 'V8'"),
        (dumps_array((10**12,), dtype="O8") + b".", "damaged|cannot"),
        (b"(" + dumps_array((2**27,)) + b"l.", "announces shape"),
        (dumps_csc((10**6, 10**6), np.zeros(10**6 + 1, np.int8), (), ()), "take more than"),
        (dumps_csc((10**12, 1), [0, 1]), "take more than"),
        (dumps_csc((3, 10**12), [0, 1]), "sparse matrix of 3 rows and 1000000000000 columns"),
        (dumps_csc((3, 2), [0, 1, 0], (), ()), "sparse matrix"),
        (dumps_csc((3, 2), [0, 2**63 - 1, 1]), "sparse matrix"),
        (dumps_csc((3, 3), [0, 2**63 - 1, -2, 1]), "sparse matrix"),
        (dumps_csc((3, 1), [0, 1], [3]), "sparse matrix"),
        (dumps_csc((3, 1), [0, 1], [-1]), "sparse matrix"),
    ],
)
def test_announced_sizes_allocate_nothing(payload, match):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match):
            load_array_pickle(payload)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_a_big_array_asked_for_many_times_runs_out_of_the_limit(monkeypatch):
    monkeypatch.setattr(array_files, "MAX_BYTES", 10**6)
    array = dumps_array((1000,), bytes(8000))
    assert len(load_array_pickle(b"(" + array * 100 + b"l.")) == 100
    select = b"cchumpy.reordering\nSelect\n)\x81}(X\x01\x00\x00\x00ah\x01X\x04\x00\x00\x00idxsh\x02ub"
    content = b"(" + array + b"q\x010" + dumps_array((1000,), bytes(8000), "i8") + b"q\x020" + select * 100 + b"l."
    with pytest.raises(ValueError, match="take more than"):
        load_array_pickle(content)


def zipped(array, header=None):
    """An npz with the array `a`, under another header if one is given."""
    npy = io.BytesIO()
    np.save(npy, array)
    content = npy.getvalue()
    if header is not None:
        text = f"{header}\n".encode().rjust(118)
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text + content[128:]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", content)
    return NpzFields(file.getvalue())


@pytest.mark.parametrize("dtype", ["<U12", ">U12", "S12"])
def test_texts_of_an_npz_come_back_as_they_are(dtype):
    texts = ["image_0.jpg", "", "plain"]
    assert zipped(np.array(texts, dtype)).read_texts("a") == texts
    assert zipped(np.array([], dtype)).read_texts("a") == []
    accented = np.array(["é€"]) if "U" in dtype else np.array(["é€".encode()])
    assert zipped(accented).read_texts("a") == ["é€"]


@pytest.mark.parametrize(
    ("array", "header", "match"),
    [
        (np.array([b"\xff"]), None, "utf-8"),
        (np.array([["a"]]), None, r"`a` of shape \(N,\).*\(1, 1\)"),
        (np.array("a"), None, r"`a` of shape \(N,\)"),
        (np.array([1.0]), None, "not of texts"),
        (np.array(["a", None]), None, "not of texts"),
        (np.array([0x110000], np.uint32).view("U1"), None, "no characters"),
        (np.array([]), {"descr": "<U0", "fortran_order": False, "shape": (2**40,)}, r"`a` of shape \(N,\)"),
        (np.array(["a"]), {"descr": "<U1", "fortran_order": False, "shape": (2**40,)}, "announces shape"),
        (np.zeros(1), {"descr": "<U2147483", "fortran_order": False, "shape": (1,)}, "announces shape"),
    ],
)
def test_texts_of_an_npz_that_are_none_are_refused(array, header, match):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match):
            zipped(array, header).read_texts("a")
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_texts_of_an_npz_are_no_numbers():
    with pytest.raises(ValueError, match="not of numbers"):
        zipped(np.array(["1.0"])).read("a")


def test_texts_of_an_npz_are_limited_in_number(monkeypatch):
    monkeypatch.setattr(array_files, "_MAX_TEXTS", 2)
    assert zipped(np.array(["a", "b"])).read_texts("a") == ["a", "b"]
    with pytest.raises(ValueError, match="at most 2 texts"):
        zipped(np.array(["a", "b", "c"])).read_texts("a")
