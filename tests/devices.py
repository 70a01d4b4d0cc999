"""Where tests run: on which device, by which backend."""

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
