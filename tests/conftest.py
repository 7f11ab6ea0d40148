from __future__ import annotations

import gc
import os

import pytest
import torch

torch.set_num_threads(1)  # test files run side by side, one a core


def pytest_collection_finish() -> None:
    # Every recovery collects garbage; what was imported need not be looked through each time.
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def look_through_little() -> None:
    """The same for what the test modules before have imported and keep."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def forget_the_precision() -> None:
    """Transformers 4 leaves that of one run's arguments in the environment, for the next run's."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
