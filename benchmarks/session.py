"""A run of the suite on one machine: its device, its files, its clock."""

import contextlib
import faulthandler
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from benchmarks.measure import give_back_memory, in_a_line
from benchmarks.records import Record, Store, machine
from benchmarks.runner import DeviceLost

FILES = (
    "results.json", "log.txt", "sweep.json", "tests.log", "tests.xml", "sanitize.log", "begun.json"
)  # fmt: skip

LAST_ITEM = 0.97  # of the time: what then still runs is brought to its end
STUCK = 120.0  # seconds after which an item that should take fifteen ends the process


class Item(Protocol):
    """What a part measures at a time."""

    label: str


@dataclass(frozen=True)
class Part:
    """Things to measure one after the other, until its share of the time is used up."""

    items: Callable[["Session"], Sequence[Item]]
    run: Callable[["Session", Any], None]
    minutes: float  # what it wants of nine; what another part leaves over is shared out
    on_request: bool = False  # only where --only names it
    whole: bool = False  # an item watches the part's time itself


@dataclass
class Session:
    """What every part needs."""

    device: torch.device
    quick: bool = False
    out: Path | None = None
    store: Store | None = None
    log: TextIO | None = None
    about: dict[str, str] = field(default_factory=dict)
    deadline: float = float("inf")  # of the running part, by time.monotonic
    left_out: list[str] = field(default_factory=list)
    begun: dict[str, bool] = field(default_factory=dict)  # items, and whether they ended

    @classmethod
    def begin(cls, device: torch.device, out: Path, quick: bool, go_on: bool = False) -> "Session":
        """Make the folder with its results.json and log.txt; or go on with them."""
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES if not go_on else ():  # of an earlier run
            (out / name).unlink(missing_ok=True)
        begun = begun_in(out)
        died = [f"{label}: its process ended" for label, ended in begun.items() if not ended]
        return cls(
            device, quick, out, Store(out / "results.json", go_on), open(out / "log.txt", "a"),
            machine(device), left_out=died, begun=begun,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """How long to time the providers of a case."""
        return 0.05 if self.device.type == "cpu" else 0.15 if self.quick else 0.5

    @property
    def seconds_left(self) -> float:
        """Of the running part."""
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line, and keep it in the log."""
        print(text, flush=True)
        if self.log:
            print(text, file=self.log, flush=True)

    def note(self, label: str, ended: bool) -> None:
        """That an item begins or ended: a later process passes it over."""
        self.begun[label] = ended
        if self.out:
            (self.out / "begun.json").write_text(json.dumps(self.begun, indent=1))

    def add(self, *records: Record) -> None:
        """Keep records, and say them."""
        self.store.add(*records)
        for record in records:
            self.say("  " + line(record))


def begun_in(out: Path) -> dict[str, bool]:
    """The items that a folder's run has begun, and whether they came to an end."""
    path = out / "begun.json"
    return json.loads(path.read_text()) if path.exists() else {}


def line(record: Record) -> str:
    """A record for reading while it runs."""
    if record.ms_median is None:
        return f"{record.provider:18} {record.note}"
    text = f"{record.provider:18} {record.ms_median:9.4f} ms ±{record.ms_spread or 0:.4f}"
    if record.gb_per_s is not None:
        text += f"  {record.gb_per_s:7.1f} GB/s"
    if record.fraction_of_clone is not None:
        text += f"  {record.fraction_of_clone:6.1%} of clone"
    if record.fraction_of_products is not None:
        text += f"  {record.fraction_of_products:6.1%} of products"
    if record.peak_bytes is not None:
        text += f"  {record.peak_bytes / 2**20:9.1f} MiB"
    if record.error is not None:
        text += f"  error {record.error:.1e}"
    return text + (f"  {record.note}" if record.note else "")


def run_parts(session: Session, parts: dict[str, Part], minutes: float) -> None:
    """Every part in its order; what time did not allow ends up in `left_out`.

    Raises:
        DeviceLost: the GPU does not answer any more; the results until then are kept.
    """
    end = time.monotonic() + 60 * minutes * LAST_ITEM
    waiting = dict(parts)
    while waiting:
        wanted = sum(part.minutes for part in waiting.values())
        name = next(iter(waiting))
        part = waiting.pop(name)
        now = time.monotonic()
        session.deadline = now + max(0.0, end - now) * part.minutes / wanted
        session.say(f"== {name}: {max(0.0, session.seconds_left):.0f} s")
        for item in part.items(session):
            label = f"{name}: {item.label}"
            if label in session.begun:
                continue
            if session.seconds_left <= 0:
                session.left_out.append(label)
                continue
            session.note(label, ended=False)
            session.say(f"{item.label}")
            try:
                with _watched(session, session.seconds_left + 30 if part.whole else STUCK):
                    part.run(session, item)
            except DeviceLost:
                session.left_out.append(f"{label}: the GPU was lost")
                raise
            except Exception as error:
                session.say(f"  failed: {in_a_line(error)}")
                session.left_out.append(f"{label} ({in_a_line(error)})")
            session.note(label, ended=True)
            give_back_memory(session.device)


@contextlib.contextmanager
def _watched(session: Session, seconds: float) -> Iterator[None]:
    """A kernel that never ends would take all of the time: say where, and end the process."""
    if session.device.type == "cuda":
        faulthandler.dump_traceback_later(seconds, exit=True, file=session.log)
    try:
        yield
    finally:
        if session.device.type == "cuda":
            faulthandler.cancel_dump_traceback_later()
