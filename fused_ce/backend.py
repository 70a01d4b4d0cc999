"""Which implementation computes the loss: the only place that knows devices."""

import contextlib
import contextvars
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from fused_ce import cpu

BACKENDS = ("auto", "triton", "cpu", "reference")
TRITON_DEVICES = ("cuda", "xpu")  # ROCm calls its device "cuda" too

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "fused_ce_backend", default=None
)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation for the calls inside the `with` block, in this thread or task.

    Args:
        name: "auto" (CUDA, ROCm and XPU tensors to Triton, CPU tensors to the row-blocked PyTorch
            path, anything else to the reference), "triton", "cpu" or "reference". The environment
            variable FUSED_CE_BACKEND sets the default.

    Raises:
        ValueError: another name.
    """
    token = _chosen.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        hint = ""
        if name in TRITON_DEVICES:
            hint = f': "auto" and "triton" compute {name} tensors where they are'
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}{hint}")
    return name


def choose(device: torch.device) -> str:
    """The implementation for tensors on `device`: "triton", "cpu" or "reference".

    A compiled graph keeps the one that was chosen when it was compiled.
    """
    name = _chosen.get() or _checked(
        os.environ.get("FUSED_CE_BACKEND") or "auto", "FUSED_CE_BACKEND"
    )
    if name == "auto":
        return _automatic(device)
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, got {device}")
    if name == "triton":
        _require_triton(device)
    return name


# What torch.compiler.assume_constant_result sets; that imports all of Dynamo.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function may have any


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _automatic(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    if device.type not in TRITON_DEVICES:
        return "reference"
    if not _has_triton():
        warnings.warn(
            "Triton is not installed: fused_cross_entropy runs its slow reference on the GPU; "
            "`pip install triton`",
            stacklevel=4,
        )
        return "reference"
    return "triton"


def _require_triton(device: torch.device) -> None:
    if not _has_triton():
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    if device.type in TRITON_DEVICES:
        return
    if device.type != "cpu" or not is_interpreted():
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, got {device}; to run the kernels on CPU "
            "tensors set TRITON_INTERPRET=1 before the first import"
        )


def is_interpreted() -> bool:
    """Whether the kernels were imported under TRITON_INTERPRET=1."""
    import triton

    from fused_ce.kernels import forward

    return not isinstance(forward.cross_entropy_forward_kernel.jitted, triton.JITFunction)


@functools.cache
def implementation(name: str) -> ModuleType:
    """The module behind a name of `choose`; Triton is imported here and nowhere earlier."""
    if name == "triton":
        from fused_ce.kernels import launch

        return launch
    return cpu
