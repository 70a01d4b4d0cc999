"""kernels/dispatch.py: what the driver is given without Triton's dispatch, and what is cached."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
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


@pytest.fixture
def dispatch(monkeypatch):
    """A dispatch in Triton's place that compiles at every call: the launches of each binary."""
    binaries = []

    def compile_and_launch(*arguments, **constants):
        binary = mock.MagicMock(spec=triton.compiler.CompiledKernel)
        binaries.append(binary.__getitem__)
        return binary

    monkeypatch.setattr(add_kernel, "jitted", {(7, 1): compile_and_launch})
    monkeypatch.setattr(add_kernel, "compiled", {})
    return binaries


def test_another_dtype_constant_or_warp_is_another_binary(dispatch):
    """Each is compiled once; a second call launches it with its own numbers, constants in order."""
    x, out = torch.zeros(4), torch.zeros(4)
    calls = [
        ((x, out), 1, dict(BLOCK=4, TWICE=True)), ((x.half(), out), 1, dict(BLOCK=4, TWICE=True)),
        ((x, out.half()), 1, dict(BLOCK=4, TWICE=True)), ((x, None), 1, dict(BLOCK=4, TWICE=True)),
        ((x, out), 2, dict(BLOCK=4, TWICE=True)), ((x, out), 1, dict(BLOCK=8, TWICE=True)),
        ((x, out), 1, dict(BLOCK=4, TWICE=False)),
        ((x.to("meta"), out), 1, dict(BLOCK=4, TWICE=True)),
    ]  # fmt: skip
    for _ in range(2):
        for size, (tensors, num_warps, constants) in enumerate(calls):
            add_kernel.launch((7, 1), tensors, (size,), num_warps, **constants)
    assert len(dispatch) == len(calls)
    for size, (launch, (tensors, _, constants)) in enumerate(zip(dispatch, calls, strict=True)):
        launch.assert_called_once_with((7, 1, 1))
        launch.return_value.assert_called_once()
        *given, number, block, twice = launch.return_value.call_args.args
        assert given[0] is tensors[0] and given[1] is tensors[1]
        assert [number, block, twice] == [size, *constants.values()]


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
