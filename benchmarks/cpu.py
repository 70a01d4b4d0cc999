"""Forward and backward of the mean loss on this machine's CPU, beside eager and compiled PyTorch.

Times are medians of rounds in which the providers take turns, so that what else the machine does
falls on all of them; compilation is not counted. Peak memory is what is allocated beyond logits and
targets at the worst moment, as a multiple of the logits.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fused_ce import fused_cross_entropy

CASES = [  # rows, vocabulary: BabyGPT's sizes, then a small and a usual batch of a language model
    (1024, 65),
    (8192, 65),
    (65536, 65),
    (512, 6148),
    (8192, 6148),
    (512, 32000),
    (2048, 32000),
    (1024, 50257),
    (512, 128256),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def providers() -> dict[str, Callable]:
    """What is compared; every one is called as loss(logits, targets)."""
    torch.compiler.reset()  # one shape, one compilation: no dynamic shapes for torch to lose by
    return {
        "fused_ce": fused_cross_entropy,
        "torch": F.cross_entropy,
        "torch.compile": torch.compile(F.cross_entropy, dynamic=False),
    }


def forward_backward(loss_fn: Callable, logits: torch.Tensor, targets: torch.Tensor) -> None:
    """One training step's use of a loss; the gradient is dropped, not accumulated."""
    logits.grad = None
    loss_fn(logits, targets).backward()


def interleaved_medians(calls: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Median milliseconds of each call, over at least seven rounds."""
    for call in calls.values():
        call()
        call()
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["torch"]) < 7:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable) -> int:
    """The most bytes that were allocated at once during a call, beyond what was there before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak


def gradient_error(loss_fn: Callable, logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Largest error of the gradient against float64, relative to the largest gradient."""
    exact = logits.detach().double().requires_grad_()
    forward_backward(F.cross_entropy, exact, targets)
    forward_backward(loss_fn, logits, targets)
    return float((logits.grad - exact.grad).abs().max() / exact.grad.abs().max())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table")
    seconds = parser.parse_args().seconds
    print(
        f"{_cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        "forward + backward, mean\n"
    )
    print(
        "| dtype | rows | vocabulary | fused_ce ms | torch ms | torch.compile ms | × torch "
        "| × compiled | peak memory, × logits: fused_ce | torch | compiled "
        "| gradient error: fused_ce | torch | compiled |"
    )
    print("|---" * 14 + "|")
    for dtype_name, dtype in DTYPES.items():
        for n_rows, vocab_size in CASES:
            print(_row(dtype_name, dtype, n_rows, vocab_size, seconds), flush=True)


def _row(dtype_name, dtype, n_rows, vocab_size, seconds) -> str:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(n_rows, vocab_size, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (n_rows,), generator=generator)
    functions = providers()
    calls = {
        name: lambda f=function: forward_backward(f, logits, targets)
        for name, function in functions.items()
    }
    errors = {name: gradient_error(f, logits, targets) for name, f in functions.items()}
    times = interleaved_medians(calls, seconds)
    size = logits.numel() * logits.element_size()
    logits.grad = None
    peaks = {}
    for name, call in calls.items():
        peaks[name] = peak_bytes(call) / size
        logits.grad = None
    cells = [dtype_name, f"{n_rows:,}", f"{vocab_size:,}"]
    cells += [f"{times[name]:.2f}" for name in functions]
    cells += [f"{times[name] / times['fused_ce']:.2f}" for name in ("torch", "torch.compile")]
    cells += [f"{peaks[name]:.2f}" for name in functions]
    cells += [f"{errors[name]:.1e}" for name in functions]
    return "| " + " | ".join(cells) + " |"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
