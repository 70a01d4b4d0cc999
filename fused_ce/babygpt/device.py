"""Where a model runs, and how much memory it takes there."""

import re
import sys
from pathlib import Path

import torch

from fused_ce.babygpt.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Return the device of "auto", "cpu" or "cuda".

    Raises:
        UserError: there is no GPU that PyTorch can use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that PyTorch can use; there is none")
    return torch.device(name)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that tensors had on the GPU, or that the process had on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # on Linux the other figure is at least that of the process that started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:  # no such file
        found = None
    if found is not None:
        return 1024 * int(found[1])
    import resource  # not on Windows, where `sample` and `eval` work all the same

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
