"""The CPU form of the suite, `make bench`: the table of ratios, printed as it is measured.

A time is the median of calls in turns (see measure.py); compilation is not counted. Peak memory is
what is allocated beyond logits and targets at the worst moment. GB/s are of the bytes that the case
has to move at least, beside `clone` of the same logits, which on a CPU pays for fresh pages. The
error is relative, against float64.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.cases import CPU_CASES, TINY_CASES
from benchmarks.providers import PROVIDERS
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
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    about, store = machine(device), Store(options.out / "results.json")
    store.add(*missing_records(device, about))
    peers = [name for name in tables.PEERS if not PROVIDERS[name].missing(device)]
    print(f"{about['gpu']}, torch {about['torch']}; mean loss\n\n{tables.header(peers)}")
    patience = Patience(options.patience)
    for case in TINY_CASES if options.tiny else CPU_CASES:
        records = run_case(case, device, options.seconds, about, patience)
        store.add(*records)
        for measured in tables.by_case(records):
            print(tables.row(measured, peers), flush=True)
    print("\n" + "\n".join(tables.notes(store.records)))
    print(f"results: {store.path} (`python -m benchmarks.report --add` takes them over)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
