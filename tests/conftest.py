"What all tests share: long ones run only when asked for, real studies where they are."

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before Triton is imported: programs for a GPU run in its interpreter


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes minutes; runs by `-m full` only")


def pytest_collection_modifyitems(config, items):
    "Leave out what is marked `full`, unless marks or a single test were asked for."
    if config.option.markexpr or any("::" in arg for arg in config.args):
        return
    full = [i for i in items if i.get_closest_marker("full")]
    config.hook.pytest_deselected(items=full)
    items[:] = [i for i in items if i not in full]


@pytest.fixture(scope="session")
def test_data() -> Path:
    "The folder that holds cxr_pairs/ and gpt2_bpe/; skips where it is not at hand."
    folder = os.environ.get("CVT2DISTILGPT2_TEST_DATA")
    if not folder:
        pytest.skip(
            "CVT2DISTILGPT2_TEST_DATA does not name the folder with cxr_pairs/ and gpt2_bpe/"
        )
    return Path(folder)
