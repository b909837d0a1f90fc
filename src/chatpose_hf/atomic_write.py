"""How files are written: all of a file or none of it."""

import io
import os
import tempfile
from pathlib import Path

import numpy as np


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replaces the file, or leaves it as it was, whatever interrupts."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A compressed `.npz` of numeric arrays, which loads with `allow_pickle=False`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
