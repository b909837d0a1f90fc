"""How files are written: all of a file or none of it."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """
    The name of a temporary file beside `path`, which it replaces when the block ends; if it does not end well, `path`
    stays as it was.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replaces the file, or leaves it as it was, whatever interrupts."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A compressed `.npz` of numeric arrays, which loads with `allow_pickle=False`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
