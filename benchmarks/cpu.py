"""The CPU form of the suite, `make bench`: the table of ratios, printed as it is measured.

A time is the median of calls in turns (see measure.py); compilation is not counted. Peak memory is
what is allocated beyond logits and targets at the worst moment. GB/s are of the bytes that the case
has to move at least, beside `clone` of the same logits, which on a CPU pays for fresh pages. The
error is relative, against float64.

From hidden states (`--kind linear`) the ceiling is the bare matrix products, memory is beyond the
gradients too, and loss and gradients have an error each.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.cases import CPU_CASES, KINDS, TINY_CASES, TINY_LINEAR
from benchmarks.quiet import Patience
from benchmarks.records import Store, machine
from benchmarks.runner import missing_records, run_case


def main(arguments: list[str] | None = None) -> int:
    """Print the table and keep the records."""
    parser = argparse.ArgumentParser(prog="benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row, at least")
    patience_help = "seconds in all to wait for other processes and to time again"
    parser.add_argument("--patience", type=float, default=60.0, help=patience_help)
    parser.add_argument("--out", type=Path, default=Path("runs/cpu"), help="folder of results.json")
    parser.add_argument("--tiny", action="store_true", help="only try it, on tiny logits")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS, help="only these")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    about, store = machine(device), Store(options.out / "results.json")
    store.add(*missing_records(device, about))
    print(f"{about['gpu']}, torch {about['torch']}; mean loss")
    patience = Patience(options.patience)
    cases = TINY_CASES + TINY_LINEAR if options.tiny else CPU_CASES
    begun = None
    for case in (case for case in cases if case.kind in options.kind):
        of_linear = case.kind == "linear"
        header, row = (
            (tables.linear_header, tables.linear_row) if of_linear else (tables.header, tables.row)
        )
        peers = tables.peers_of("linear" if of_linear else "forward", device)
        if header is not begun:
            begun = header
            print(f"\n{header(peers)}")
        records = run_case(case, device, options.seconds, about, patience)
        store.add(*records)
        for measured in tables.by_case(records):
            print(row(measured, peers), flush=True)
    print("\n" + "\n".join(tables.notes(store.records)))
    print(f"results: {store.path} (`python -m benchmarks.report --add` takes them over)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
