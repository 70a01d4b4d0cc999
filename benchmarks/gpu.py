"""The GPU suite: `python3 -m benchmarks.gpu --out DIR`, from a checkout that need not be installed.

It takes whichever torch and Triton are there, needs no network, and ends within --minutes. Each
result is written as it comes: results.json (records, see records.py), log.txt, tests.log and
tests.xml, and on request sweep.json and sanitize.log. `python -m benchmarks.report --add
DIR/results.json` takes the records over.

The parts run in a process of their own. Where it loses the GPU (an illegal access), crashes or
hangs, another goes on behind the case that did it.
"""

import argparse
import contextlib
import faulthandler
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import ceilings, cuda_tests, launch_cost, sweep, training
from benchmarks.cases import FURTHER, HEADLINE, LINEAR, TINY_CASES, TINY_LINEAR, Case
from benchmarks.providers import PROVIDERS, missing
from benchmarks.runner import DeviceLost, missing_records, run_case
from benchmarks.session import Part, Session, begun_in, run_parts

GRACE = 15.0  # seconds beyond the time limit, before what does not end is ended
LEAST = 20.0  # seconds that are worth another process


def headline(session: Session) -> list[Case]:
    """What the project promises first: bfloat16, 8,192 rows, the vocabularies of large models."""
    if session.device.type == "cpu":
        return TINY_CASES[:2]
    return HEADLINE[::3] if session.quick else HEADLINE


def linear(session: Session) -> list[Case]:
    """From hidden states to the loss and both gradients, with the heads of large models."""
    if session.device.type == "cpu":
        return TINY_LINEAR
    return LINEAR[:1] if session.quick else LINEAR


def kernels(session: Session) -> list[Case]:
    """All further cases."""
    if session.device.type == "cpu":
        return TINY_CASES[2:]
    return FURTHER[::6] if session.quick else FURTHER


def measure_case(session: Session, case: Case) -> None:
    """Times, memory and errors of every provider."""
    session.add(*run_case(case, session.device, session.seconds, session.about))


# What a part leaves of its minutes is shared out among those after it.
PARTS = {
    "ceilings": Part(ceilings.ceilings, ceilings.run, minutes=0.3),
    "headline": Part(headline, measure_case, minutes=2.9),
    "tests": Part(cuda_tests.tests, cuda_tests.run, minutes=1.9, whole=True),
    "linear": Part(linear, measure_case, minutes=1.4),
    "training": Part(training.trainings, training.run, minutes=0.7),
    "launch": Part(launch_cost.cases, launch_cost.run, minutes=0.5),
    "kernels": Part(kernels, measure_case, minutes=1.3),
    "sweep": Part(sweep.sweeps, sweep.run, minutes=3.0, on_request=True, whole=True),
    "sanitize": Part(
        cuda_tests.sanitized, cuda_tests.run, minutes=9.0, on_request=True, whole=True
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 0 unless the GPU was lost for good."""
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
    if device.type == "cuda" and options.until is None:
        command = [sys.executable, "-m", "benchmarks.gpu", *(arguments or sys.argv[1:])]
        return supervise(command, options.out, options.minutes)
    go_on = options.until is not None and options.go_on
    session = Session.begin(device, options.out, options.quick, go_on)
    if device.type == "cuda":
        faulthandler.enable(session.log)
    session.say(", ".join(f"{key} {value}" for key, value in session.about.items()))
    session.say(_driver(device))
    for record in () if go_on else missing_records(device, session.about):
        session.add(record)
    minutes = options.minutes if options.until is None else (options.until - time.time()) / 60
    try:
        run_parts(session, {name: PARTS[name] for name in names}, minutes)
    except DeviceLost as error:
        session.say(f"the GPU does not answer any more: {error}")
        return 1
    finally:
        session.say("\nleft out: " + ("\n  ".join(["", *session.left_out]) or "nothing"))
        session.say(f"results: {session.store.path}")
        if device.type == "cuda":
            faulthandler.disable()
        session.log.close()
    return 0


def supervise(command: list[str], out: Path, minutes: float) -> int:
    """Run the command in processes one after the other, while each brings at least one item."""
    until = time.time() + 60 * minutes
    begun, go_on = 0, ()
    (out / "begun.json").unlink(missing_ok=True)
    while True:
        process = subprocess.Popen([*command, "--until", str(until), *go_on])
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=max(1.0, until - time.time()) + GRACE)
        if code is None:
            process.kill()
            process.wait()
            print("stopped at the time limit", flush=True)
            return 1
        before, begun = begun, len(begun_in(out))
        if code == 0 or begun == before or until - time.time() < LEAST:
            return code and 1
        print(f"the process ended with status {code}: another goes on", flush=True)
        go_on = ("--go-on",)


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
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # for the process that works
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        help="cpu tries the suite without a GPU, with tiny cases")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
