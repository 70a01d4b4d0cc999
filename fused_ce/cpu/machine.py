"""What depends on the machine: its exponentials, its products of 16 bits, its pages."""

import contextlib
import ctypes
import functools
import math
import sys
from collections.abc import Callable

import torch

LOG2E = math.log2(math.e)
HUGE_PAGE = 2 << 20
KEPT = 32 << 20  # bytes: up to here malloc keeps what is freed, and nothing is touched anew
MADV_HUGEPAGE = 14  # of Linux


def _is_intel() -> bool:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return "GenuineIntel" in file.read(256)  # the first lines of the first core
    return False


# MKL's exponential takes on Intel's processors the time of exp2 and spares a product; on AMD's it
# takes four times that of exp2, which is PyTorch's own.
IS_INTEL = _is_intel()
SERIAL = 1 << 15  # elements that PyTorch computes on one thread; MKL's wakes others from 2,048 on


def exponential(n_elements: int) -> tuple[Callable, float]:
    """(power, unit): the exponential of d, of so many elements, is `power(d * unit)`."""
    return (torch.exp, 1.0) if IS_INTEL and n_elements > SERIAL else (torch.exp2, LOG2E)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether matrix products of this dtype of 16 bits are faster than those of float32 copies.

    Only if the processor has instructions for them; without, PyTorch's take four times as long.
    """
    names = {
        torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }[dtype]
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def _madvise():
    """The system's, or None."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_system_madvise = _madvise()


def ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Let the system back memory that nobody has written yet by pages of 2 MiB, if it wants to.

    A gradient comes from the system anew at each call, and the first touch of a page of 4 KiB is
    most of what writing it costs: 1.64 ns an element of float32 on one core, 0.75 in huge pages,
    0.50 where the memory was there before.
    """
    size = tensor.numel() * tensor.element_size()
    if _system_madvise is not None and size > KEPT:
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        last = (tensor.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
        _system_madvise(first, last - first, MADV_HUGEPAGE)  # it may do nothing
