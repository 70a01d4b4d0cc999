"""Results as records: one JSON a machine, written whole after every record."""

import importlib
import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Record:
    """One provider in one case on one machine; None is what was not, or could not be, measured."""

    gpu: str  # or the CPU, which is then said
    torch: str
    triton: str
    date: str
    case: str
    n_rows: int | None
    vocab_size: int | None
    dtype: str | None
    provider: str
    ms_median: float | None = None
    ms_spread: float | None = None  # between the quartiles
    gb_per_s: float | None = None  # the bytes that the case has to move, over the median
    fraction_of_clone: float | None = None  # of the GB/s of `clone` on the same logits, same run
    peak_bytes: int | None = None  # beyond the inputs
    error: float | None = None  # relative, against float64: the gradient's, else the loss's
    note: str | None = None  # why there is no time, or what else there is to say
    # What records of before "linear" have not.
    hidden_size: int | None = None  # of "linear"
    fraction_of_products: float | None = None  # of the speed of the bare matrix products, same run
    loss_error: float | None = None  # relative, against float64; `error` is the largest gradient's

    @property
    def key(self) -> tuple:
        """What is measured, whoever is measured."""
        return self.case, self.n_rows, self.hidden_size, self.vocab_size, self.dtype

    @property
    def sizes(self) -> str:
        """Rows, of "linear" the size of hidden states, and vocabulary, for reading."""
        sizes = (self.n_rows, self.hidden_size, self.vocab_size)
        return " × ".join(f"{size:,}" for size in sizes if size is not None)


def machine(device: torch.device) -> dict[str, str]:
    """The fields of a record that say where and when."""
    return {
        "gpu": _device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": date.today().isoformat(),
    }


class Store:
    """Records in a file that is complete after every one of them: a cut run keeps what it had."""

    def __init__(self, path: Path, go_on: bool = False):
        """Begin an empty file, or go on with the one that is there."""
        self.path = path
        self.records: list[Record] = read(path) if go_on and path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        write(self.records, path)

    def add(self, *records: Record) -> None:
        """Write them."""
        self.records.extend(records)
        write(self.records, self.path)


def write(records: Iterable[Record], path: Path) -> None:
    """Replace the file by these records, whole or not at all."""
    lines = ",\n".join(" " + json.dumps(asdict(record)) for record in records)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(f"[\n{lines}\n]\n" if lines else "[]\n")
    os.replace(temporary, path)


def read(path: Path) -> list[Record]:
    """The records of a file; keys that are not known are left out."""
    known = {field.name for field in fields(Record)}
    return [
        Record(**{key: value for key, value in record.items() if key in known})
        for record in json.loads(path.read_text())
    ]


def merge(old: list[Record], new: list[Record]) -> list[Record]:
    """The new records, and of the old those of cases that the new do not have.

    A case is replaced as a whole: a ratio is only fair between providers of the same run.
    """
    replaced = {record.key for record in new}
    return [record for record in old if record.key not in replaced] + new


def file_name(gpu: str) -> str:
    """`NVIDIA H100 80GB HBM3` as nvidia-h100-80gb-hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads (CPU)"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    """Of what is imported: a build of PyTorch may bring it under another distribution's name."""
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return "none"
