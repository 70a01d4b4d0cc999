"""The tests marked `cuda`, on the real kernels, in a process of their own with a time limit."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.session import Session

ROOT = Path(__file__).resolve().parents[1]
WORKERS = max(1, min(14, (os.cpu_count() or 1) - 2))  # most of their time compiles kernels
# BabyGPT's tests need packages that a machine for kernels need not have, and without them not even
# its conftest.py is imported: pytest would then run no test at all.
WITHOUT = ("tests/babygpt", "tests/benchmarks")
LAST_WORDS = 10.0  # seconds that pytest has to print the failures of a run that is cut short
REDUCED = "misaligned or outside or slice or ignored"  # what compute-sanitizer gets
OUTCOMES = ("passed", "failed", "error", "skipped")


@dataclass(frozen=True)
class Command:
    """A run of pytest, and where its output goes."""

    label: str
    arguments: tuple[str, ...]
    log: str


def tests(session: Session) -> list[Command]:
    """All of them; a few for a quick run."""
    few = ("-k", REDUCED) if session.quick else ()
    parallel = ("-n", str(WORKERS), "--max-worker-restart", "40")
    parallel = parallel if importlib.util.find_spec("xdist") else ()
    arguments = (*_pytest(), *parallel, *few, "--junitxml", "tests.xml")
    return [Command("pytest -m cuda", arguments, "tests.log")]


def sanitized(session: Session) -> list[Command]:
    """A reduced list under compute-sanitizer, which makes it many times slower."""
    tool = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99")
    arguments = (*tool, *_pytest(), "-k", REDUCED)
    return [Command("compute-sanitizer pytest -m cuda", arguments, "sanitize.log")]


def _pytest() -> tuple[str, ...]:
    ignored = (word for folder in WITHOUT for word in ("--ignore", folder))
    options = ("-m", "cuda", "-v", "--tb", "short", "--continue-on-collection-errors")
    plugin = ("-p", "benchmarks.pytest_gpu", "-p", "no:cacheprovider")
    return (sys.executable, "-m", "pytest", "tests", *ignored, *options, *plugin)


def run(session: Session, command: Command) -> None:
    """Run it until the part's time is up; what it printed until then is kept."""
    if shutil.which(command.arguments[0]) is None:
        session.say(f"  missing: {command.arguments[0]} is not on the PATH")
        return
    out = session.out.resolve()
    arguments = [str(out / a) if a == "tests.xml" else a for a in command.arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "2"}
    with open(out / command.log, "w") as log:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(1.0, session.seconds_left - LAST_WORDS))
            session.say(f"  finished with exit status {code}")
        except subprocess.TimeoutExpired:
            session.say("  stopped at its time limit")
            session.left_out.append(f"{command.label}: stopped at its time limit")
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=LAST_WORDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with pytest's workers
            process.wait()
    counts, failed = summary(out / command.log, out / "tests.xml")
    session.say("  " + (", ".join(f"{n} {name}" for name, n in counts.items()) or "no test ran"))
    for name in failed:
        session.say(f"  failed: {name}")


def summary(log: Path, junit: Path) -> tuple[dict[str, int], list[str]]:
    """How many tests had which outcome, and the names of those that failed.

    From junit's file; where the run was cut and there is none, from the lines of the log.
    """
    outcomes = _from_log(log)
    if junit.exists() and log.name == "tests.log":
        with contextlib.suppress(ElementTree.ParseError):
            outcomes = _from_junit(junit)
    counts = Counter(outcomes.values())
    failed = [name for name, outcome in outcomes.items() if outcome in ("failed", "error")]
    return {name: counts[name] for name in OUTCOMES if counts[name]}, failed


def _from_junit(path: Path) -> dict[str, str]:
    outcomes = {}
    for test in ElementTree.parse(path).iter("testcase"):
        kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
        found = [kinds[child.tag] for child in test if child.tag in kinds]
        outcomes[f"{test.get('classname')}::{test.get('name')}"] = found[0] if found else "passed"
    return outcomes


def _from_log(path: Path) -> dict[str, str]:
    """`tests/x.py::name PASSED [ 1%]`, or with workers `[gw0] [ 1%] PASSED tests/x.py::name`."""
    alone = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")
    worker = re.compile(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) (\S+::.+?)\s*$")
    outcomes = {}
    for line in path.read_text(errors="replace").splitlines():
        if match := alone.match(line):
            outcomes[match[1]] = match[2].lower()
        elif match := worker.match(line):
            outcomes[match[2]] = match[1].lower()
    return outcomes
