"""Body models of the official files' layout with made-up numbers, and those files: `.npz`, and `.pkl` as chumpy left it.

`python tests/make_smpl_files.py DIR` writes `SMPL_NEUTRAL.pkl`, `SMPLH_NEUTRAL.pkl` and `SMPLX_NEUTRAL.npz`.
"""

import contextlib
import pickle
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np


BODY = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19]


def _fingers(wrist, first):
    """Parents of five chains of three joints."""
    return [wrist if joint % 3 == 0 else first + joint - 1 for joint in range(15)]


PARENTS = {
    "smpl": [*BODY, 20, 21],
    "smplh": [*BODY, *_fingers(20, 22), *_fingers(21, 37)],
    "smplx": [*BODY, 15, 15, 15, *_fingers(20, 25), *_fingers(21, 40)],
}


def make_model(kind="smpl", vertices=None, seed=0):
    """A `smpl`, `smplh` or `smplx` of full size or fewer vertices; `smplx` has 10 shape and 10 expression directions."""
    shapes = 20 if kind == "smplx" else 10
    faces = 2 * vertices - 4 if vertices else {"smplx": 20908}.get(kind, 13776)
    vertices = vertices or {"smplx": 10475}.get(kind, 6890)
    model = make_model_of(PARENTS[kind], vertices, faces, shapes, seed)
    generator = np.random.default_rng(seed + 1)
    if kind != "smpl":
        for side in "lr":
            model[f"hands_components{side}"] = np.linalg.qr(generator.normal(size=(45, 45)))[0]
        for side in "lr":
            model[f"hands_mean{side}"] = generator.normal(scale=0.2, size=45)
    if kind == "smplx":
        model["lmk_faces_idx"] = generator.integers(faces, size=51)
        model["lmk_bary_coords"] = generator.dirichlet(np.ones(3), size=51)
        model["dynamic_lmk_faces_idx"] = generator.integers(faces, size=(79, 17))
        model["dynamic_lmk_bary_coords"] = generator.dirichlet(np.ones(3), size=(79, 17))
    return model


def make_model_of(parents, vertices, faces, shapes, seed=0):
    """A cloud of vertices around each joint of a random skeleton whose bones are 20 cm long, in a strip of triangles."""
    generator = np.random.default_rng(seed)
    count = len(parents)
    joints = np.zeros((count, 3))
    for joint in range(1, count):
        step = generator.normal(size=3)
        joints[joint] = joints[parents[joint]] + 0.2 * step / np.linalg.norm(step)
    nearest = np.arange(vertices) * count // vertices  # neighbours in the strip, neighbours on the body
    weights = np.zeros((vertices, count))
    shares = generator.dirichlet([8, 1, 1, 1], size=vertices) * (
        np.arange(4) < generator.integers(1, 5, vertices)[:, None]
    )
    for vertex, joint in enumerate(nearest):
        for share in shares[vertex]:
            weights[vertex, joint] += share
            joint = max(parents[joint], 0)
    weights /= weights.sum(1, keepdims=True)
    v_template = joints[nearest] + generator.normal(scale=0.03, size=(vertices, 3))
    regressor = np.zeros((count, vertices))
    for joint in range(count):
        own = np.flatnonzero(nearest == joint)[:20]
        regressor[joint, own] = generator.dirichlet(np.ones(len(own)))
    strip = np.arange(vertices - 2)[:, None] + np.arange(3)
    return {
        "v_template": v_template,
        "shapedirs": generator.normal(scale=0.01, size=(vertices, 3, shapes)),
        "posedirs": generator.normal(scale=0.001, size=(vertices, 3, 9 * (count - 1))),
        "J_regressor": regressor,
        "weights": weights,
        "kintree_table": np.array([[2**32 - 1, *parents[1:]], range(count)], dtype=np.uint32),
        "f": np.concatenate([strip, strip[:, ::-1]])[:faces].astype(np.uint32),
        "J": regressor @ v_template,
        "bs_type": "lrotmin",
        "bs_style": "lbs",
    }


@contextlib.contextmanager
def imitated_chumpy():
    """Stand-ins of chumpy's and scipy's classes under the real names, which pickle alike; gone afterwards."""
    names = {"chumpy.ch": ["Ch"], "chumpy.reordering": ["Select", "Reshape"], "scipy.sparse.csc": ["csc_matrix"]}
    modules = {name: types.ModuleType(name) for name in ["chumpy", "scipy", "scipy.sparse", *names]}
    classes = {}
    for module, members in names.items():
        for name in members:
            classes[name] = type(name, (), {"__module__": module})
            setattr(modules[module], name, classes[name])
    with mock.patch.dict(sys.modules, modules):
        yield classes


def imitate(class_, **state):
    made = class_()
    made.__dict__.update(state)
    return made


def dump_model(model, protocol=2):
    """The model as the official pickles hold it."""
    with imitated_chumpy() as classes:

        def wrap(array):
            return imitate(classes["Ch"], x=array, _dirty_vars={"x"}, _itr=None, _depends_on_deps={}, _status="new")

        dense, shapedirs, weights = model["J_regressor"], model["shapedirs"], model["weights"]
        columns, rows = np.nonzero(dense.T)
        more = np.concatenate([shapedirs, shapedirs[:, :, :2]], axis=2)
        chosen = np.arange(more.size).reshape(more.shape)[:, :, : shapedirs.shape[2]]
        layout = {
            **model,
            "v_template": wrap(model["v_template"]),
            "shapedirs": imitate(
                classes["Select"], a=wrap(more), idxs=chosen.ravel(), preferred_shape=shapedirs.shape
            ),
            "weights": imitate(classes["Reshape"], a=wrap(weights.ravel()), newshape=weights.shape),
            "J_regressor": imitate(
                classes["csc_matrix"],
                _shape=dense.shape,
                maxprint=50,
                data=dense[rows, columns],
                indices=rows.astype(np.int32),
                indptr=np.cumsum([0, *np.bincount(columns, minlength=dense.shape[1])]).astype(np.int32),
            ),
        }
        return pickle.dumps(layout, protocol)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SMPL_NEUTRAL.pkl").write_bytes(dump_model(make_model("smpl")))
    (folder / "SMPLH_NEUTRAL.pkl").write_bytes(dump_model(make_model("smplh")))
    np.savez(folder / "SMPLX_NEUTRAL.npz", **make_model("smplx"))
