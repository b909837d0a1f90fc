"""Reads files of arrays, `.npz` and pickles, that anybody may have made, without running any code of theirs.

A pickle is a program; Python's own unpickler calls what the program names. Here the program runs on a small machine that
knows no Python function: a call becomes a record of the call (`_Record`), and the records of numpy arrays, of scipy's
sparse matrices and of chumpy's wrappers are turned into arrays afterwards, each size checked against the bytes at hand
before anything is allocated. Neither chumpy nor scipy is needed.

Python's `pickle.Unpickler` with a strict `find_class` would not do: it allocates the memo size that the file announces
and hashes nested tuples until the process's stack overflows.
"""

import io
import math
import operator
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType

import numpy as np


# For the bytes read, and again for all arrays made from them. SMPL-X with 400 shape directions in float64 takes a quarter.
MAX_BYTES = 2**30
# A body model has some hundreds. Bounds the time, and the memory of a file full of one-byte `[`.
_MAX_OPCODES = 1_000_000
_MAX_DEPTH = 50
_MAX_TEXTS = 10_000_000  # each becomes an object of Python's
_MAX_INTEGER_BITS = 128  # so that a product of sizes stays cheap


def load_array_pickle(content: bytes) -> object:
    """
    Reads a pickle of plain containers, numpy arrays, chumpy wrappers and scipy's csc matrices.

    Args:
        content (`bytes`): protocol 0 to 5, from Python 2 (whose byte strings are read as latin-1) or 3.

    Returns:
        `object`: dict, list, tuple, set, str, bytes, numbers, `None`, and numpy arrays, read-only, in the file's byte
        order; sparse matrices come back dense. Anything else is refused by name with a `ValueError`.
    """
    with value_errors_only("the pickle"):
        return _Rebuilder().rebuild(_Machine(content).run())


@contextmanager
def value_errors_only(what: str) -> Iterator[None]:
    """A damaged file may fail anywhere, in struct, zlib or numpy: callers handle one kind of error."""
    try:
        yield
    except Exception as error:
        reason = error if isinstance(error, ValueError) else f"damaged or truncated ({error!r})"
        # numpy and int() quote what they cannot parse, all of it.
        raise ValueError(f"cannot read {what}: {str(reason)[:1000]}") from error


def read_limited(path: Path) -> bytes:
    """The file's bytes; a `ValueError` where it has more than any file of ours should."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"`{path}` has {path.stat().st_size} bytes; expected at most {MAX_BYTES}")
    return path.read_bytes()


class NpzFields:
    """Single arrays of an `.npz`, from the bytes: numpy would allocate the shape that a header announces."""

    def __init__(self, content: bytes):
        self._zip = zipfile.ZipFile(io.BytesIO(content))
        self._bytes_left = MAX_BYTES
        self.names = {name.removesuffix(".npy") for name in self._zip.namelist()}

    def read(self, name: str) -> np.ndarray:
        """An array of numbers, read-only."""
        return self._read(name, "biuf", "numbers")

    def read_texts(self, name: str) -> list[str]:
        """An array of shape (N,) of texts, or of bytes that are UTF-8."""
        array = self._read(name, "SU", "texts")
        # Texts of length 0 take no bytes, however many of them a file announces.
        if array.ndim != 1 or array.dtype.itemsize == 0 or array.size > _MAX_TEXTS:
            raise ValueError(
                f"expected `{name}` of shape (N,), at most {_MAX_TEXTS} texts, got `{array.dtype}` of {array.shape}"
            )
        if array.dtype.kind == "S":
            return [text.decode("utf-8") for text in array.tolist()]
        # numpy makes strings of any number, also of those that are no character.
        codes = np.ndarray(array.nbytes // 4, array.dtype.byteorder + "u4", buffer=array.data)
        if array.size and codes.max() > sys.maxunicode:
            raise ValueError(f"expected texts in `{name}`, got numbers that are no characters")
        return array.tolist()

    def _read(self, name: str, kinds: str, what: str) -> np.ndarray:
        member = self._zip.getinfo(f"{name}.npy")
        self._bytes_left -= member.file_size
        if self._bytes_left < 0:
            raise ValueError(f"`{name}` announces {member.file_size} bytes; expected at most {MAX_BYTES} in all")
        raw = io.BytesIO(self._zip.read(member))
        version = np.lib.format.read_magic(raw)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"expected `{name}` in npy format 1.0 or 2.0, got {version}")
        shape, is_fortran, dtype = readers[version](raw)
        if dtype.kind not in kinds:
            raise ValueError(
                f"`{name}` is an array of type `{dtype}`, not of {what}, and objects in it would be a pickle"
            )
        return _array_from_bytes(raw.read(), dtype, shape, is_fortran)


class PickleFields:
    """Single values of a pickled dictionary; what is not asked for is never rebuilt."""

    def __init__(self, content: bytes):
        self._fields = _Machine(content).run()
        if not isinstance(self._fields, dict):
            raise ValueError(f"expected a dictionary in the pickle, got `{type(self._fields).__name__}`")
        self._rebuilder = _Rebuilder()
        self.names = self._fields.keys()

    def read(self, name: str) -> object:
        return self._rebuilder.rebuild(self._fields[name])


def _array_from_bytes(raw: bytes, dtype: np.dtype, shape: tuple, is_fortran: bool) -> np.ndarray:
    shape = tuple(map(operator.index, shape[:32]))
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"an array announces shape {shape} of type `{dtype}`, got {len(raw)} bytes for it")
    return np.ndarray(shape, dtype, buffer=raw, order="F" if is_fortran else "C")


class _Record:
    """What a pickle says about an object: the global that makes it, the arguments, `None` before a call, the state."""

    def __init__(self, name: str, args: tuple | None = None):
        self.name = name
        self.args = args
        self.state: object = None


# Opcodes that push their argument, and those that push a constant, by pickletools' names.
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_LITERALS = {*_INTEGERS, *_TEXTS, "FLOAT", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Machine:
    """Runs a pickle over plain data: it makes containers and records and has no means to call anything."""

    def __init__(self, content: bytes):
        self._file = io.BytesIO(content)
        self._stack: list = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        for _ in range(_MAX_OPCODES):
            position = self._file.tell()
            opcode = pickletools.code2op.get(self._file.read(1).decode("latin1"))
            if opcode is None:
                raise ValueError(f"damaged or truncated: expected a pickle opcode at byte {position}")
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name == "STRING":
                # Python 2's `repr` of bytes; the reader of Python 3.11's pickletools wants ASCII.
                argument = self._file.readline()[1:-2].decode("unicode_escape")
            else:
                argument = opcode.arg and opcode.arg.reader(self._file)
            self._step(opcode.name, argument)
        raise ValueError(f"expected at most {_MAX_OPCODES} pickle opcodes, got more")

    def _pop_to_mark(self) -> list:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _step(self, opcode: str, argument) -> None:
        stack, memo = self._stack, self._memo
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case literal if literal in _LITERALS:
                if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
                    raise ValueError(f"refused an integer of {argument.bit_length()} bits")
                stack.append(argument)
            case constant if constant in _CONSTANTS:
                stack.append(_CONSTANTS[constant])
            case "MARK":
                self._marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(set())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "LIST":
                stack.append(self._pop_to_mark())
            case "DICT":
                stack.append(_filled({}, self._pop_to_mark()))
            case "FROZENSET":
                stack.append(_filled(set(), self._pop_to_mark()))
            case "APPEND":
                item = stack.pop()
                _filled(stack[-1], [item])
            case "SETITEM":
                item, key = stack.pop(), stack.pop()
                _filled(stack[-1], [key, item])
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                items = self._pop_to_mark()
                _filled(stack[-1], items)
            case "GLOBAL":
                stack.append(_named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not isinstance(module, str) or not isinstance(name, str):
                    raise ValueError(f"refused a global named by {_described(module)} and {_described(name)}")
                stack.append(_named(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                args, made_by = stack.pop(), stack.pop()
                stack.append(_called(made_by, args))
            case "OBJ":
                made_by, *args = self._pop_to_mark()
                stack.append(_called(made_by, tuple(args)))
            case "INST":
                stack.append(_called(_named(argument.replace(" ", ".")), tuple(self._pop_to_mark())))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Record) or stack[-1].args is None:
                    raise ValueError(f"refused a state for {_described(stack[-1])}; nothing was executed")
                stack[-1].state = state
            case _:
                raise ValueError(f"refused the pickle opcode `{opcode}`; nothing was executed")


def _described(value: object) -> str:
    return f"`{value.name}`" if isinstance(value, _Record) else f"a `{type(value).__name__}`"


def _named(full_name: str) -> _Record:
    """chumpy has dozens of classes: one outside the table is an error only where its value is asked for."""
    name = full_name
    for old, new in _RENAMED.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    if name not in _REBUILD and not re.fullmatch(r"chumpy[.\w]{1,100}", name):
        raise ValueError(
            f"refused `{full_name}`: a body model or array file names only numpy arrays, chumpy wrappers and sparse "
            "matrices; nothing was executed, get the file again from its official site"
        )
    return _Record(name)


def _called(made_by: object, args: object) -> _Record:
    if not isinstance(made_by, _Record) or made_by.args is not None or not isinstance(args, tuple):
        raise ValueError(f"refused a call of {_described(made_by)} with {_described(args)}; nothing was executed")
    if made_by.name == "copyreg._reconstructor":
        # Protocols 0 and 1 make an object by this function of (class, base class, base value).
        return _called(args[0], args[1:])
    return _Record(made_by.name, args)


def _filled(container: object, items: list) -> list | set | dict:
    """Keys are strings, bytes and small integers: long tuples or chosen integers make hashing crash or crawl."""
    if isinstance(container, list):
        container.extend(items)
        return container
    if not isinstance(container, set | dict):
        raise ValueError(f"refused to add items to {_described(container)}; nothing was executed")
    for key in items if isinstance(container, set) else items[::2]:
        if not isinstance(key, str | bytes | int) or (isinstance(key, int) and abs(key) >= 2**32):
            raise ValueError(f"refused {_described(key)} as a key; expected strings or integers under 2**32")
    container.update(items if isinstance(container, set) else zip(items[::2], items[1::2], strict=True))
    return container


class _Rebuilder:
    """Turns what the machine left into arrays and plain containers."""

    def __init__(self):
        self._made: dict[int, object] = {}
        self._depth = 0
        self._bytes_left = MAX_BYTES

    def rebuild(self, value: object) -> object:
        if not isinstance(value, dict | list | tuple | _Record):
            return value
        # By identity: what a pickle shares stays shared, and what contains itself is found out.
        if id(value) in self._made:
            made = self._made[id(value)]
            if made is self:
                raise ValueError(f"refused {_described(value)} that contains itself")
            return made
        if self._depth == _MAX_DEPTH:
            raise ValueError(f"refused containers nested more than {_MAX_DEPTH} deep")
        self._made[id(value)] = self
        self._depth += 1
        if isinstance(value, _Record):
            made = self._rebuild_record(value)
        elif isinstance(value, dict):
            made = {key: self.rebuild(item) for key, item in value.items()}
        else:
            made = type(value)([self.rebuild(item) for item in value])
        self._depth -= 1
        self._made[id(value)] = made
        return made

    def _rebuild_record(self, record: _Record) -> object:
        method = _REBUILD.get(record.name)
        if method is None:
            raise ValueError(
                f"no way to evaluate the chumpy expression `{record.name}`; save the field as a numpy array where "
                "chumpy is installed"
            )
        if record.args is None:
            raise ValueError(f"expected an object of `{record.name}`, got the name alone")
        return method(self, record)

    def _spend(self, size: int) -> None:
        """A few bytes of pickle can ask for one big array many times."""
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise ValueError(f"the file's arrays take more than {MAX_BYTES} bytes")

    def _part(self, record: _Record, name: str, kind: type | UnionType, default: object = None):
        """One rebuilt item of a record's state, whose type is checked."""
        state = record.state if isinstance(record.state, dict) else {}
        part = self.rebuild(state.get(name, default))
        if not isinstance(part, kind):
            raise ValueError(f"expected {kind} as `{name}` of `{record.name}`, got {_described(part)}")
        return part

    def no_object(self, record: _Record) -> None:
        raise ValueError(f"refused an object of `{record.name}`, which holds no numbers")

    def set_of_keys(self, record: _Record) -> set:
        return _filled(set(), *record.args)

    def latin1(self, record: _Record) -> bytes:
        """How Python 3 writes bytes for Python 2. The real function looks up any codec by name."""
        text, encoding = record.args
        if encoding != "latin1":
            raise ValueError(f"refused the text encoding {encoding!r}; expected 'latin1'")
        self._spend(len(text))
        return text.encode("latin1")

    def no_bytes(self, record: _Record) -> bytes:
        """How Python 3 writes an empty array's bytes for Python 2."""
        if record.args:
            raise ValueError(f"expected no arguments to `{record.name}`")
        return b""

    def dtype(self, record: _Record) -> np.dtype:
        code = record.args[0]
        order, *structure = record.state[1:5]
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|O[48]?", code) or order not in "<>|=" or any(structure):
            raise ValueError(f"refused the array type {code!r}; expected numbers")
        return np.dtype(object if code[0] == "O" else order + code)

    def array(self, record: _Record) -> np.ndarray:
        """`_reconstruct` makes an empty array; the state is (version, shape, dtype, is_fortran, bytes or items)."""
        if not isinstance(record.state, tuple):
            raise ValueError("expected an array's contents, got only its announcement")
        shape, dtype, is_fortran, content = record.state[-4:]
        return self._array(content, dtype, shape, is_fortran)

    def buffer(self, record: _Record) -> np.ndarray:
        content, dtype, shape, order = record.args
        return self._array(content, dtype, shape, order == "F")

    def scalar(self, record: _Record) -> np.generic:
        dtype, content = record.args
        return self._array(content, dtype, (), False)[()]

    def _array(self, content: object, dtype: object, shape: tuple, is_fortran: bool) -> np.ndarray:
        content, dtype = self.rebuild(content), self.rebuild(dtype)
        if not dtype.hasobject:
            self._spend(len(content))
            raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
            return _array_from_bytes(raw, dtype, shape, is_fortran)
        self._spend(len(content) * dtype.itemsize)
        items = np.empty(len(content), dtype=object)
        for index, item in enumerate(content):
            items[index] = item
        return items.reshape(shape, order="F" if is_fortran else "C")

    def csc_matrix(self, record: _Record) -> np.ndarray:
        rows, columns = map(operator.index, self._part(record, "_shape", tuple))
        indptr, indices = (self._part(record, name, np.ndarray).astype(np.int64) for name in ("indptr", "indices"))
        data = self._part(record, "data", np.ndarray)
        is_valid = (
            rows >= 0
            and indptr.shape == (columns + 1,)
            and indices.shape == data.shape == (indptr[-1],)
            and indptr[0] == 0
            and ((indptr >= 0) & (indptr <= len(data))).all()
            and (np.diff(indptr) >= 0).all()
            and ((indices >= 0) & (indices < rows)).all()
        )
        if not is_valid:
            raise ValueError(
                f"damaged: a sparse matrix of {rows} rows and {columns} columns whose index arrays do not fit it"
            )
        self._spend(rows * columns * data.itemsize + indptr.nbytes + indices.nbytes)
        dense = np.zeros((rows, columns), dtype=data.dtype)
        np.add.at(dense, (indices, np.repeat(np.arange(columns), np.diff(indptr))), data)
        return dense

    def chumpy_ch(self, record: _Record) -> np.ndarray:
        return self._part(record, "x", np.ndarray)

    def chumpy_select(self, record: _Record) -> np.ndarray:
        array, indices = self._part(record, "a", np.ndarray), self._part(record, "idxs", np.ndarray)
        self._spend(array.nbytes + indices.size * array.itemsize)
        return array.ravel()[indices].reshape(self._part(record, "preferred_shape", tuple, (-1,)))

    def chumpy_reshape(self, record: _Record) -> np.ndarray:
        array = self._part(record, "a", np.ndarray)
        self._spend(array.nbytes)
        return array.reshape(self._part(record, "newshape", tuple | int))

    def chumpy_transpose(self, record: _Record) -> np.ndarray:
        return self._part(record, "a", np.ndarray).transpose(self._part(record, "axes", tuple | None))


# The globals of numpy-only pickles of protocols 0 to 5 from numpy 1 and 2, and of the official body models.
_REBUILD = {
    "numpy.dtype": _Rebuilder.dtype,
    "numpy.core.multiarray._reconstruct": _Rebuilder.array,
    "numpy.core.multiarray.scalar": _Rebuilder.scalar,
    "numpy.core.numeric._frombuffer": _Rebuilder.buffer,
    "_codecs.encode": _Rebuilder.latin1,
    "builtins.bytes": _Rebuilder.no_bytes,
    "builtins.set": _Rebuilder.set_of_keys,
    "scipy.sparse.csc.csc_matrix": _Rebuilder.csc_matrix,
    "chumpy.ch.Ch": _Rebuilder.chumpy_ch,
    "chumpy.reordering.Select": _Rebuilder.chumpy_select,
    "chumpy.reordering.Reshape": _Rebuilder.chumpy_reshape,
    "chumpy.reordering.transpose": _Rebuilder.chumpy_transpose,
    # arguments of other calls, never objects
    "numpy.ndarray": _Rebuilder.no_object,
    "builtins.object": _Rebuilder.no_object,
    "copyreg._reconstructor": _Rebuilder.no_object,
}
# Python 2's names, and those of numpy 2 and of scipy 1.8 and later.
_RENAMED = {
    "__builtin__.": "builtins.",
    "copy_reg.": "copyreg.",
    "numpy._core.": "numpy.core.",
    "scipy.sparse._csc.": "scipy.sparse.csc.",
}
