"""Every promise is tested on every backend; the Triton kernels run interpreted, on CPU tensors.

`TRITON_INTERPRET=0 pytest -m cuda` runs the same tests with compiled kernels on a GPU.
`FUSED_CE_TEST_SEED=1 pytest` runs them on other numbers.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is first imported

import pytest
import torch
from devices import CUDA, INTERPRETED, entered
from oracle import SEED

for name in ("FUSED_CE_BACKEND", "FUSED_CE_DEBUG"):  # what someone's shell exports is not tested
    os.environ.pop(name, None)


def _patch_the_language_once():
    """Make the interpreter three times as fast.

    At a launch it replaces the functions of triton.language, and again at each call of a device
    function, when all are replaced already: once a launch is enough.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        known = set(map(id, function.__globals__.values()))
        known = frozenset({id(interpreter.tl), id(interpreter.tl.core)} & known)
        if known in patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        scope = patch(function)
        patched.add(known)
        restore = scope.restore

        def restore_and_forget():
            patched.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    if hasattr(interpreter, "_LangPatchScope"):  # as Triton 3.7 has it
        interpreter._patch_lang = patch_once


if INTERPRETED:
    _patch_the_language_once()


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
    """What nobody writes shows: memory that is asked for uninitialised comes filled with NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return allocate_nan
