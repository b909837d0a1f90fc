"""Who may import whom: data flows one way, and the Hub-facing files stay copyable."""

import ast
import re
import sys

import pytest
from conftest import ROOT


PACKAGE = ROOT / "src" / "chatpose_hf"
HUB_FILES = {
    "rotations": set(),
    "configuration_chatpose": {"rotations"},
    "tokenization_chatpose": set(),
    "modeling_chatpose": {"rotations", "configuration_chatpose"},
    "person_crop": set(),
    "processing_chatpose": {"rotations", "configuration_chatpose", "person_crop"},
    "pipeline_chatpose": {"rotations", "configuration_chatpose", "modeling_chatpose", "processing_chatpose"},
}
# The layer of each other file; a file may import from lower layers. Below `MODEL_LAYER` nothing knows the model: bodies,
# pictures, files and data take poses, wherever they come from.
MODEL_LAYER = 10
LAYERS = {
    "atomic_write": 1,
    "metrics": 1,
    "figures": 2,
    "processes": 1,
    "settings_file": 1,
    "array_files": 1,
    "image_files": 1,
    "batch_log": 2,
    "card": 2,
    "pose_files": 2,
    "smpl_files": 2,
    "render": 3,
    "body": 3,
    "export": 4,
    "report": 4,
    "data": 1,  # the table of sources
    "data.rows": 2,
    "data.prompts": 3,
    "data.source": 4,
    "data.mixture": 4,
    "baselines": 4,
    "data.pose_codes": 4,
    "pose_protocols": 5,
    "data.captions": 5,
    "data.endpoint": 4,
    "data.mocap_files": 2,
    "data.motion_folder": 6,
    "data.amass": 7,
    "data.bedlam": 6,
    "data.cmu": 7,
    "data.hmr2": 6,
    "data.hmr2_evaluation": 6,
    "data.key_poses": 6,
    "data.llava": 6,
    "data.mocap": 8,
    "data.posescript": 8,
    "data.rpe_refined": 6,
    "data.threedpw": 6,
    "data.rpe": 9,
    "data.spg": 9,
    "data.synthetic": 8,
    "data.compositions": 9,
    "data.near_duplicates": 6,
    "data.instruction_states": 5,
    "data.instructions": 6,
    "data.chats": 6,
    "data.pose_chats": 9,
    "data.prepare": 9,
    "batch_generate": 10,
    "checkpoints": 10,
    "muon": 1,
    "collator": 10,
    "pose_losses": 10,
    "adapters": 10,
    "retrieval": 10,
    "trainer": 11,
    "training": 12,
    "hub": 12,
    "questions": 11,
    "answers": 12,
    "measures": 12,
    "evaluation": 13,
    "train_retrieval": 13,
    "convert_chatpose_tokenizer_to_hf": 10,
    "convert_chatpose_weights_to_hf": 10,
    "app": 11,
    "cli": 14,
    "__init__": 14,
}
# One lazy import goes up: it makes `save_pretrained` copy the pipeline's file beside the weights. Adapters take the
# classes by the package's names, which registers them.
EXCEPTIONS = {
    ("adapters", "__init__"),
    ("answers", "__init__"),
    ("modeling_chatpose", "pipeline_chatpose"),
    ("convert_chatpose_weights_to_hf", "convert_chatpose_tokenizer_to_hf"),
}


def module_name(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("data/*.py")])}


def imports(name):
    """(module names inside the package, top-level names outside, nodes) of every import, lazy ones too."""
    folder = name.split(".")[:-1] if FILES[name].name != "__init__.py" else [name] * (name != "__init__")
    own, others, nodes = set(), set(), []
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            nodes.append(node)
            if node.level == 0:
                others.add(node.module.split(".")[0])
                continue
            module = [*folder[: len(folder) + 1 - node.level], *(node.module or "").split(".")]
            module = ".".join(filter(None, module))
            # `from .data import SOURCES` takes a name, `from . import data` a module.
            found = {f"{module}.{alias.name}".lstrip(".") for alias in node.names} & FILES.keys()
            own |= found or {module or "__init__"}
        elif isinstance(node, ast.Import):
            nodes.append(node)
            others |= {alias.name.split(".")[0] for alias in node.names}
    return own, others, nodes


def test_the_docs_name_every_file():
    told = set(re.findall(r"`([\w.]+)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    assert FILES.keys() - told == {"__init__", "data"}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    own, _, _ = imports(name)
    allowed = HUB_FILES.get(name, set())
    if name not in HUB_FILES:
        assert name in LAYERS, f"{name} is in no layer: add it to docs and to this test"
        allowed = set(HUB_FILES) if LAYERS[name] >= MODEL_LAYER else {"rotations", "person_crop"}
        allowed |= {other for other, layer in LAYERS.items() if layer < LAYERS[name]}
        allowed |= {"__init__"} if name == "cli" else set()
    forbidden = {other for other in own - allowed if (name, other) not in EXCEPTIONS}
    assert not forbidden, f"{name} imports {forbidden}"


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_can_be_copied(name):
    _, others, nodes = imports(name)
    third_party = others - set(sys.stdlib_module_names)
    assert third_party <= {"torch", "transformers", "huggingface_hub"}, third_party
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module is not None
            assert "." not in node.module
    # transformers looks for relative imports in the text, docstrings included.
    text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    for module in re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE):
        assert module in HUB_FILES


def test_importing_the_package_loads_nothing_heavy():
    import subprocess

    code = "import sys, chatpose_hf; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
