"""What a call costs the host: the time of everything but the kernels, without a GPU.

`python -m benchmarks.host_cost` compiles the kernels for sm_90 and launches them on a driver that
does nothing: through Triton's dispatch, as `fused_ce` launches them, and through the operators of
torch.library, which compiled graphs call and eager code does not.
"""

import argparse
import contextlib
import json
import os
import timeit
from collections.abc import Callable, Iterator
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # triton reads it when it is first imported

import torch
from triton.compiler import CompiledKernel

from benchmarks import codegen
from fused_ce import fused_cross_entropy
from fused_ce.kernels.dispatch import Kernel

SHAPES = ((200, 65), (200, 6148), (200, 50257), (2, 50257))


@contextlib.contextmanager
def launches_do_nothing() -> Iterator[list[tuple]]:
    """CPU tensors go to the kernels, and no kernel runs; yields what the driver would be given."""
    codegen.compile_for("sm_90")
    given = []
    with (
        mock.patch.object(CompiledKernel, "_init_handles", lambda self: None),
        mock.patch.object(CompiledKernel, "function", 0, create=True),
        mock.patch.object(CompiledKernel, "run", lambda self, *a: given.append(a)),
        mock.patch("fused_ce.cross_entropy.choose", lambda device: "triton"),
    ):
        yield given


def through_triton(self, grid, tensors, numbers, num_warps, **constants) -> None:
    """`Kernel.launch` by Triton's own dispatch."""
    self.jitted[grid](*tensors, *numbers, **constants, num_warps=num_warps)


def by_triton():
    """Launches go through Triton's own dispatch."""
    return mock.patch.object(Kernel, "launch", through_triton)


@contextlib.contextmanager
def by_operators() -> Iterator[None]:
    """Calls go through the operators of torch.library."""
    with (
        mock.patch("fused_ce.cross_entropy.is_traced", lambda logits: True),
        mock.patch("fused_ce.row_losses.is_traced", lambda logits: True),
    ):
        yield


def _timed(call: Callable, given: list, number: int = 200) -> float:
    """Seconds a call."""
    seconds = timeit.timeit(call, number=number) / number
    given.clear()  # it holds the buffers of every launch
    return seconds


def calls(n_rows: int, vocab_size: int) -> dict[str, Callable]:
    """What is timed, by name."""
    logits = torch.empty(n_rows, vocab_size, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(n_rows, dtype=torch.long)

    def forward():
        with torch.no_grad():
            fused_cross_entropy(logits, targets)

    def forward_backward():
        logits.grad = None
        fused_cross_entropy(logits, targets).backward()

    return {"forward": forward, "forward + backward": forward_backward}


def arguments_of_both() -> list[tuple[list, list]]:
    """For each call what the driver is given by Triton's dispatch, and by ours."""
    pairs = []
    with launches_do_nothing() as given:
        for shape in SHAPES:
            for call in calls(*shape).values():
                call()  # compiles, by Triton's dispatch
                sides = []
                for launch in (through_triton, Kernel.launch):
                    given.clear()
                    with mock.patch.object(Kernel, "launch", launch):
                        call()
                    sides.append([[_plain(a) for a in arguments] for arguments in given])
                pairs.append(tuple(sides))
    return pairs


def _plain(argument):
    if isinstance(argument, torch.Tensor):  # buffers of the call itself are at other addresses
        return [str(argument.dtype), list(argument.shape), list(argument.stride())]
    return repr(argument).split(" at 0x")[0]


def main() -> None:
    """Print the table, or both sides' arguments as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arguments", action="store_true", help="print what the driver is given")
    if parser.parse_args().arguments:
        print(json.dumps(arguments_of_both()))
        return
    print(
        "| rows | vocabulary | call | launches | µs by Triton's dispatch | µs | µs by operators |"
    )
    print("|---" * 7 + "|")
    with launches_do_nothing() as given:
        for shape in SHAPES:
            for name, call in calls(*shape).items():
                call()
                given.clear()
                call()
                cells = [f"{shape[0]:,}", f"{shape[1]:,}", name, len(given)]
                for way in (by_triton, contextlib.nullcontext, by_operators):
                    with way():
                        best = min(_timed(call, given) for _ in range(15))
                    cells.append(f"{best * 1e6:.0f}")
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
