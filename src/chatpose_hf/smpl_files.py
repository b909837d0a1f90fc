"""Reads the official SMPL, SMPL-H and SMPL-X model files without running any code of theirs."""

from pathlib import Path

import numpy as np

from .array_files import NpzFields, PickleFields, read_limited, value_errors_only
from .atomic_write import npz_bytes, write_atomically


# The fields that the `smplx` package's body models read. Letters are sizes that must agree between fields.
_BODY = {
    "v_template": ("V", 3),
    "shapedirs": ("V", 3, "S"),
    "posedirs": ("V", 3, "P"),
    "J_regressor": ("J", "V"),
    "weights": ("V", "J"),
    "kintree_table": (2, "J"),
    "f": ("F", 3),
}
_HANDS = {
    "hands_componentsl": ("C", "H"),
    "hands_componentsr": ("C", "H"),
    "hands_meanl": ("H",),
    "hands_meanr": ("H",),
}
_LANDMARKS = {
    "lmk_faces_idx": ("L",),
    "lmk_bary_coords": ("L", 3),
    "dynamic_lmk_faces_idx": ("A", "D"),
    "dynamic_lmk_bary_coords": ("A", "D", 3),
}
# By number of joints: SMPL-H, SMPL-X.
_EXTRAS = {52: _HANDS, 55: _HANDS | _LANDMARKS}
# Index fields, and the size that bounds them. The kinematic tree has its own check.
_INDICES = {"kintree_table": None, "f": "V", "lmk_faces_idx": "F", "dynamic_lmk_faces_idx": "F"}


def load_smpl_file(path: str | Path) -> dict[str, np.ndarray]:
    """
    Loads an SMPL, SMPL-H or SMPL-X model file as dense numeric arrays.

    Args:
        path (`str` or `Path`): `.pkl` or `.npz`, as downloaded, or an `.npz` of [`convert_smpl_file`].

    Returns:
        `dict[str, np.ndarray]`: float32 and int64. `v_template` (V, 3) in metres, `shapedirs` (V, 3, S), `posedirs`
        (V, 3, 9 (J - 1)), `J_regressor` (J, V), `weights` (V, J), `kintree_table` (2, J) whose first row holds the
        parents, -1 for the root, and `f` (F, 3); where the file has them, the hands of SMPL-H (52 joints) and the
        hands and face landmarks of SMPL-X (55 joints).
    """
    path = Path(path)
    readers = {".pkl": PickleFields, ".npz": NpzFields}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"expected a body model file that ends in `.pkl` or `.npz`, got `{path}`")
    content = read_limited(path)
    with value_errors_only(f"`{path}`"):
        file = readers[suffix](content)
        if missing := [name for name in _BODY if name not in file.names]:
            held = ", ".join(f"`{name}`" for name in sorted(map(str, file.names))[:20]) or "nothing"
            raise ValueError(
                f"no {', '.join(f'`{name}`' for name in missing)} in the file, which holds {held}; expected the model "
                "file of SMPL, SMPL-H or SMPL-X"
            )
        sizes = {}
        model = {name: _checked_field(name, file.read(name), shape, sizes) for name, shape in _BODY.items()}
        for name, shape in _EXTRAS.get(sizes["J"], {}).items():
            if name in file.names:
                model[name] = _checked_field(name, file.read(name), shape, sizes)
        _check_model(model, sizes)
    return model


def convert_smpl_file(source: str | Path, target: str | Path) -> dict[str, tuple[int, ...]]:
    """
    Writes a model file's arrays as an `.npz` that loads everywhere with `allow_pickle=False`.

    Args:
        source (`str` or `Path`): as for [`load_smpl_file`].
        target (`str` or `Path`): ends in `.npz`; replaced if it exists.

    Returns:
        `dict[str, tuple]`: each field's shape.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() != ".npz":
        raise ValueError(f"expected a target that ends in `.npz`, got `{target}`")
    if target.exists() and target.samefile(source):
        raise ValueError(f"the target `{target}` is the source itself; name another file")
    model = load_smpl_file(source)
    write_atomically(target, npz_bytes(model))
    return {name: array.shape for name, array in model.items()}


def _checked_field(name: str, value: object, shape: tuple, sizes: dict[str, int]) -> np.ndarray:
    """As float32 or int64 of the shape, whose letters get their sizes from the first field that has them."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        what = f"an array of type `{value.dtype}`" if isinstance(value, np.ndarray) else f"`{type(value).__name__}`"
        raise ValueError(f"expected numbers in `{name}`, got {what}; use the model's original file")
    if value.ndim == len(shape):
        for letter, size in zip(shape, value.shape, strict=True):
            if isinstance(letter, str):
                sizes.setdefault(letter, size)
    expected = tuple(sizes.get(letter, letter) for letter in shape)
    if value.shape != expected:
        letters = ", ".join(map(str, shape))
        raise ValueError(f"expected `{name}` of shape ({letters}), in this file {expected}, got {value.shape}")
    if name in _INDICES and value.dtype.kind == "f" and (value != np.floor(value)).any():
        raise ValueError(f"expected whole numbers in `{name}`, got fractions")
    with np.errstate(over="ignore", invalid="ignore"):
        array = value.astype(np.int64 if name in _INDICES else np.float32, order="C")
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers in `{name}`, got NaN, infinity or more than float32 holds")
    return array


def _check_model(model: dict[str, np.ndarray], sizes: dict[str, int]) -> None:
    """Indices in range and parents before children; writes the root's parent, 2**32 - 1 in official files, as -1."""
    if sizes["P"] != 9 * (sizes["J"] - 1):
        raise ValueError(
            f"expected 9 pose directions in `posedirs` for each joint but the root, {9 * (sizes['J'] - 1)} for "
            f"{sizes['J']} joints, got {sizes['P']}"
        )
    parents = model["kintree_table"][0]
    if parents[0] == 2**32 - 1:
        parents[0] = -1
    if parents[0] != -1 or (parents[1:] < 0).any() or (parents[1:] >= np.arange(1, sizes["J"])).any():
        raise ValueError(
            "expected in the first row of `kintree_table` the root first, with parent -1 or 2**32 - 1, then each "
            f"joint's parent before the joint, got {parents.tolist()}"
        )
    for name in _INDICES.keys() & model.keys() - {"kintree_table"}:
        bound = sizes[_INDICES[name]]
        if ((model[name] < 0) | (model[name] >= bound)).any():
            raise ValueError(
                f"expected indices 0 to {bound - 1} in `{name}`, got {model[name].min()} to {model[name].max()}"
            )
