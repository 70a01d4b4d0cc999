"""Every promise is tested on every backend; the Triton kernels run interpreted, on CPU tensors.

`TRITON_INTERPRET=0 pytest -m cuda` runs the same tests with compiled kernels on a GPU.
`FUSED_CE_TEST_SEED=1 pytest` runs them on other numbers.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is first imported

import pytest
import torch
from devices import (
    CUDA,
    INTERPRETED,
    entered,
    fill_uninitialised_memory,
    patch_the_language_once,
)
from oracle import SEED
from ranks import Pool

for name in ("FUSED_CE_BACKEND", "FUSED_CE_DEBUG"):  # what someone's shell exports is not tested
    os.environ.pop(name, None)

if INTERPRETED:
    patch_the_language_once()


@pytest.hookimpl(tryfirst=True)  # before what is slow is left out
def pytest_collection_modifyitems(items):
    """`@pytest.mark.thinned`: of a test's interpreted cases two thirds are slow.

    They are sizes, dtypes and options of one kernel, which the other backends have all of.
    """
    seen = {}
    for item in items:
        if item.get_closest_marker("thinned") and "triton" in item.callspec.id.split("-"):
            at = seen[item.originalname, item.path] = (
                seen.get((item.originalname, item.path), -1) + 1
            )
            if at % 3:
                item.add_marker("slow")


def pytest_configure(config):
    # exp2 of a large negative number and the like: meant, and silent on a GPU
    for message in (
        "overflow encountered", "invalid value encountered", "divide by zero encountered",
        "All-NaN slice encountered",
    ):  # fmt: skip
        for module in (r"triton\.runtime\.interpreter", r"numpy\..*"):
            config.addinivalue_line("filterwarnings", f"ignore:{message}:RuntimeWarning:{module}")


@pytest.fixture(params=["cpu", "triton", "reference", CUDA])
def device(request):
    """Any backend."""
    with entered(request.param) as where:
        yield where


@pytest.fixture(params=["cpu", "reference", CUDA])
def compiled_device(request):
    """All but the interpreter, for what takes hundreds of calls."""
    with entered(request.param) as where:
        yield where


@pytest.fixture
def interpreter():
    """The Triton kernels on CPU tensors, alone."""
    with entered("triton") as where:
        yield where


@pytest.fixture(params=["cpu", "triton", CUDA])
def fused_device(request):
    """The backends with a gradient of their own."""
    with entered(request.param) as where:
        yield where


@pytest.fixture(params=["triton", CUDA])
def kernel_device(request):
    """The Triton kernels, interpreted or on a GPU."""
    with entered(request.param) as where:
        yield where


@pytest.fixture(params=["cpu", "reference"])
def host_device(request):
    """The backends that read the targets before they compute."""
    with entered(request.param) as where:
        yield where


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """What nobody writes shows."""
    fill_uninitialised_memory(monkeypatch)


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    """The processes that tests of several ranks share."""
    processes = Pool(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.end()
