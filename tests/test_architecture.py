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
    "processing_chatpose": {"rotations", "configuration_chatpose"},
    "pipeline_chatpose": {"rotations", "configuration_chatpose", "modeling_chatpose", "processing_chatpose"},
}
# The layer of each other file; a file may import from lower layers. Below 5 nothing knows the model: bodies, pictures
# and files take poses, wherever they come from.
LAYERS = {
    "atomic_write": 1,
    "array_files": 1,
    "image_files": 1,
    "pose_files": 2,
    "smpl_files": 2,
    "render": 3,
    "body": 3,
    "export": 4,
    "batch_generate": 5,
    "app": 6,
    "convert_chatpose_tokenizer_to_hf": 5,
    "convert_chatpose_weights_to_hf": 5,
    "cli": 7,
    "__init__": 7,
}
# One lazy import goes up: it makes `save_pretrained` copy the pipeline's file beside the weights.
EXCEPTIONS = {
    ("modeling_chatpose", "pipeline_chatpose"),
    ("convert_chatpose_weights_to_hf", "convert_chatpose_tokenizer_to_hf"),
}


def imports(path):
    """(module names inside the package, top-level names outside, nodes) of every import, lazy ones too."""
    own, others, nodes = set(), set(), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            nodes.append(node)
            if node.level == 0:
                others.add(node.module.split(".")[0])
            elif node.module:
                own.add(node.module.split(".")[0])
            else:
                own |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").is_file()}
        elif isinstance(node, ast.Import):
            nodes.append(node)
            others |= {alias.name.split(".")[0] for alias in node.names}
    return own, others, nodes


FILES = sorted(path.stem for path in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    own, _, _ = imports(PACKAGE / f"{name}.py")
    allowed = HUB_FILES.get(name, set())
    if name not in HUB_FILES:
        assert name in LAYERS, f"{name}.py is in no layer: add it to docs and to this test"
        allowed = (set(HUB_FILES) if LAYERS[name] >= 5 else {"rotations"}) | {
            other for other, layer in LAYERS.items() if layer < LAYERS[name]
        }
        allowed |= {"__init__"} if name == "cli" else set()
    forbidden = {other for other in own - allowed if (name, other) not in EXCEPTIONS}
    assert not forbidden, f"{name}.py imports {forbidden}"


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_files_can_be_copied(name):
    _, others, nodes = imports(PACKAGE / f"{name}.py")
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
