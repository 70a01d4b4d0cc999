"""A pytest plugin: what tests on a shared GPU must not do to each other.

After an illegal access nothing runs on the GPU any more in that process, and every later test
would fail with it: its worker ends, pytest-xdist names the test and starts another worker. And
what a test held goes back to the GPU, on which other workers want gigabytes as well.
"""

import os
import time

import pytest
import torch

KEPT_BYTES = 1 << 30  # of a worker, for its next tests
LONG = (
    "test_properties.py"  # many kernels a test: at the end of a run one worker would compile them
)


def pytest_collection_modifyitems(items):
    """The long tests first."""
    items.sort(key=lambda item: LONG not in item.nodeid)


def pytest_runtest_logfinish():
    """After every test, in the process that ran it: pytest-xdist's own has no tensors."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > KEPT_BYTES:
            torch.cuda.empty_cache()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(f"the GPU does not answer any more: {error}", returncode=1)
        time.sleep(0.5)  # the report of the test is on its way
        os._exit(1)
