"""The GPU suite: `python3 -m benchmarks.gpu --out DIR`, from a checkout that need not be installed.

It takes whichever torch and Triton are there, needs no network, and ends within --minutes. Each
result is written as it comes: results.json (records, see records.py), log.txt, tests.log and
tests.xml, and on request sweep.json and sanitize.log. `python -m benchmarks.report --add
DIR/results.json` takes the records over.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import ceilings, cuda_tests, launch_cost, sweep, training
from benchmarks.cases import FURTHER, HEADLINE, TINY_CASES, Case
from benchmarks.providers import PROVIDERS, missing
from benchmarks.runner import DeviceLost, missing_records, run_case
from benchmarks.session import Part, Session, run_parts


def headline(session: Session) -> list[Case]:
    """What the project promises first: bfloat16, 8,192 rows, the vocabularies of large models."""
    if session.device.type == "cpu":
        return TINY_CASES[:2]
    return HEADLINE[::3] if session.quick else HEADLINE


def kernels(session: Session) -> list[Case]:
    """All further cases."""
    if session.device.type == "cpu":
        return TINY_CASES[2:]
    return FURTHER[::6] if session.quick else FURTHER


def measure_case(session: Session, case: Case) -> None:
    """Times, memory and errors of every provider."""
    session.add(*run_case(case, session.device, session.seconds, session.about))


PARTS = {
    "ceilings": Part(ceilings.ceilings, ceilings.run, minutes=0.4),
    "headline": Part(headline, measure_case, minutes=2.2),
    "tests": Part(cuda_tests.tests, cuda_tests.run, minutes=2.0),
    "training": Part(training.trainings, training.run, minutes=1.2),
    "launch": Part(launch_cost.cases, launch_cost.run, minutes=0.7),
    "kernels": Part(kernels, measure_case, minutes=2.2),
    "sweep": Part(sweep.sweeps, sweep.run, minutes=9.0, on_request=True),
    "sanitize": Part(cuda_tests.sanitized, cuda_tests.run, minutes=9.0, on_request=True),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 0 unless the GPU was lost."""
    options = _parser().parse_args(arguments)
    names = _chosen(options)
    device = torch.device(options.device or "cuda")
    if options.dry_run:
        print(plan(Session(device, options.quick), names))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a GPU that PyTorch can use; --device cpu --quick tries it")
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 would time the interpreter: unset it")
    session = Session.begin(device, options.out, options.quick)
    session.say(", ".join(f"{key} {value}" for key, value in session.about.items()))
    session.say(_driver(device))
    for record in missing_records(device, session.about):
        session.add(record)
    try:
        run_parts(session, {name: PARTS[name] for name in names}, options.minutes)
    except DeviceLost as error:
        session.say(f"the GPU does not answer any more: {error}")
        return 1
    finally:
        session.say("\nleft out: " + ("\n  ".join(["", *session.left_out]) or "nothing"))
        session.say(f"results: {session.store.path}")
        session.log.close()
    return 0


def plan(session: Session, names: list[str]) -> str:
    """What a run would do: every part, case and provider."""
    absent = missing(session.device)
    lines = []
    for name in names:
        lines.append(f"{name}: {PARTS[name].minutes} of 9 minutes")
        for item in PARTS[name].items(session):
            lines.append(f"  {item.label}")
            if isinstance(item, Case):
                offer = [p for p, provider in PROVIDERS.items() if item.kind in provider.kinds]
                lines[-1] += ": " + ", ".join(p + " (missing)" * (p in absent) for p in offer)
    lines += [f"missing: {name}, {reason}" for name, reason in absent.items()]
    linear = [name for name, provider in PROVIDERS.items() if provider.kinds == ("linear",)]
    lines += [f"no case yet for: {name} (linear)" for name in linear]
    return "\n".join(lines)


def _chosen(options) -> list[str]:
    """The parts in their order."""
    asked = options.only.split(",") if options.only else []
    asked += ["sanitize"] if options.sanitize else []
    if wrong := [name for name in asked if name not in PARTS]:
        sys.exit(f"--only takes {', '.join(PARTS)}; got {', '.join(wrong)}")
    if options.dry_run and not asked:
        return list(PARTS)
    return [
        name for name, part in PARTS.items() if name in asked or not asked and not part.on_request
    ]


def _driver(device: torch.device) -> str:
    """Driver, memory and clocks of the GPU, as nvidia-smi says them."""
    if device.type == "cpu":
        return "no GPU: tiny cases, to try the suite"
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi: none"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--only", help=f"parts, with commas between: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a few cases of each part")
    parser.add_argument("--dry-run", action="store_true", help="list what would run")
    parser.add_argument("--sanitize", action="store_true", help="the same as --only sanitize")
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        help="cpu tries the suite without a GPU, with tiny cases")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
