"""kernels/dispatch.py: what the driver is given without Triton's dispatch, and what is cached."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fused_ce.kernels.dispatch import Kernel, kernel  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@kernel
def add_kernel(x_ptr, out_ptr, size: tl.int32, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < size)
    tl.store(out_ptr + cols, x * 2 if TWICE else x, mask=cols < size)


def test_numbers_and_pointers_are_not_specialised():
    assert isinstance(add_kernel, Kernel) and add_kernel.constants == ["BLOCK", "TWICE"]
    jitted = add_kernel.jitted
    if hasattr(jitted, "params"):  # the interpreter keeps none
        plain = {p.name: (p.do_not_specialize, p.do_not_specialize_on_alignment)
                 for p in jitted.params if not p.is_constexpr}  # fmt: skip
        assert plain == {"x_ptr": (False, True), "out_ptr": (False, True), "size": (True, False)}


def test_every_call_computes_with_its_own_arguments(kernel_device):
    """The second of each kind is the one that may come from the cache."""
    for dtype in (torch.float32, torch.float16, torch.float32):
        for twice in (True, False, True):
            for size in (16, 1, 5):
                x = torch.arange(20.0, device=kernel_device).to(dtype)[3:]
                out = torch.full_like(x, -1.0)
                add_kernel.launch((1, 1), (x, out), (size,), 1, BLOCK=16, TWICE=twice)
                assert torch.equal(out[:size], x[:size] * (2 if twice else 1))
                assert (out[size:] == -1).all()


def test_the_driver_is_given_what_triton_would_give_it():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.host_cost", "--arguments"],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    pairs = json.loads(result.stdout)
    assert len(pairs) == 8
    for by_triton, by_us in pairs:
        assert by_triton and by_us == by_triton
