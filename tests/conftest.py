"""Shared fixtures: tiny random models made offline, and the original's fixture where this checkout has it."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # a test that wants the network fails at once instead of hanging
# One thread for each of the processes that tests run in, and for those that they start: bit for bit the same sums.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from make_tiny_checkpoint import make_model, make_processor
from PIL import Image


ROOT = Path(__file__).parent.parent
LONG_FILES = ("test_readme.py", "test_training_sharded.py", "test_training.py", "test_chatpose_tiny.py")
OFFICIAL = ROOT.parent / "shared" / "fixtures" / "official_tiny"


def pytest_configure(config):
    """Before `datasets` is imported: what tests load stays out of the user's cache."""
    cache = tempfile.TemporaryDirectory()
    config.add_cleanup(cache.cleanup)
    os.environ["HF_DATASETS_CACHE"] = cache.name


def pytest_collection_modifyitems(items):
    """Files with single long tests first: else one of two workers is left with them at the end."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def model(processor):
    return make_model(processor)


@pytest.fixture(scope="session")
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (40, 32, 3), dtype=np.uint8)) for _ in range(4)]


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, the one of the system: Playwright's own would have to be downloaded."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium, and none of chromium, chromium-browser and google-chrome is installed")
    with sync_api.sync_playwright() as playwright:
        # Containers have no user namespaces for the sandbox, and WebGL without a GPU is drawn by SwiftShader.
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def official():
    """The folder with a checkpoint of the original's layout and what the original code computed with it."""
    if not OFFICIAL.is_dir():
        pytest.skip(f"needs the original's fixture at {OFFICIAL}, which is not in this checkout")
    return OFFICIAL


@pytest.fixture(scope="session")
def converted(official, tmp_path_factory):
    """The original's fixture, converted."""
    from chatpose_hf.convert_chatpose_weights_to_hf import convert_checkpoint

    output = tmp_path_factory.mktemp("converted") / "chatpose"
    convert_checkpoint(official / "checkpoint", output, str(official / "vision_tower"))
    return output
