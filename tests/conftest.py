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
def forget_earlier_arguments() -> None:
    """Transformers 4 leaves some of one run's arguments in the environment, for the next run's."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_")):
            del os.environ[name]
