"""Where tests run: on which device, by which backend, and in what state of it."""

import contextlib
import os

import pytest
import torch

from fused_ce import backend

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@contextlib.contextmanager
def entered(name):
    """The device whose tensors `name` takes, with that backend chosen."""
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if INTERPRETED:
            pytest.skip("the kernels are interpreted: TRITON_INTERPRET=0 pytest -m cuda")
        yield "cuda"
        return
    if name == "triton":
        pytest.importorskip("triton")
        if not INTERPRETED:
            pytest.skip("the kernels are compiled: they need a GPU, see the cuda tests")
    with backend(name):
        yield "cpu"


def patch_the_language_once():
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


def fill_uninitialised_memory(monkeypatch):
    """Memory that is asked for uninitialised comes filled with NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return allocate_nan
