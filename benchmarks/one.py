"""One case of one provider, a few calls: for a profiler, which makes every call slow.

What a kernel reads from memory, and what the caches spare it, on an NVIDIA GPU:

    ncu --clock-control none --profile-from-start off --metrics \\
    gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,\\
    l1tex__t_sector_hit_rate.pct,lts__t_sector_hit_rate.pct,launch__registers_per_thread \\
    python3 -m benchmarks.one forward_backward 8192 128256 bfloat16

`--profile-from-start off` leaves out what draws the inputs and compiles; ncu empties the caches
before each kernel (`--cache-control none` does not).
"""

import argparse
import sys

import torch

from benchmarks.cases import DTYPES, KINDS, Case
from benchmarks.inputs import inputs_of
from benchmarks.measure import synchronize
from benchmarks.providers import OURS, PROVIDERS
from benchmarks.runner import work_of


def main(arguments: list[str] | None = None) -> int:
    """Call the provider."""
    parser = argparse.ArgumentParser(prog="benchmarks.one", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("n_rows", type=int)
    parser.add_argument("vocab_size", type=int)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--hidden-size", type=int, default=4096, help="of the kind linear")
    parser.add_argument("--sliced", action="store_true", help="no row begins on 16 bytes")
    parser.add_argument("--provider", choices=PROVIDERS, default=OURS)
    parser.add_argument("--calls", type=int, default=1, help="that are profiled, after two others")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    hidden_size = options.hidden_size if options.kind == "linear" else None
    case = Case(
        options.kind, options.n_rows, options.vocab_size, options.dtype, options.sliced,
        hidden_size=hidden_size,
    )  # fmt: skip
    device, provider = torch.device(options.device), PROVIDERS[options.provider]
    if options.kind not in provider.kinds or provider.missing(device):
        why = provider.missing(device) or f"has no {options.kind}"
        sys.exit(f"{options.provider}: {why}")
    inputs = inputs_of(case, device, count=1)
    work = work_of(provider.make(case), provider, inputs)
    for _ in range(2):  # the first compiles
        work.call(*work.prepare())
    for _ in range(options.calls):
        prepared = work.prepare()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.start()
        work.call(*prepared)
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.profiler.stop()
    print(f"{options.provider}: {case.label}, {options.calls} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
