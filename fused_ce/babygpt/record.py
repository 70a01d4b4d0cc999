"""What a run leaves to look at: lines of JSON, and TensorBoard's files."""

import json
import math
from pathlib import Path
from typing import Any

from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.errors import UserError

EVENTS_SUFFIX = ".babygpt"


class Record:
    """Rows of a run, the evaluations say, in memory and as lines of JSON in a file.

    Args:
        path: the file.
        until_step: keep what the file has up to this step, as a run continued from there does;
            None starts anew.
    """

    def __init__(self, path: Path, until_step: int | None = None):
        """Read what is to be kept, and write the file anew with just that, if there is one."""
        self.path = path
        self.rows: list[dict] = []
        if not path.exists():
            return
        if until_step is not None:
            self.rows = [row for row in read_rows(path) if row["step"] <= until_step]
        with atomic_file(path) as file:
            file.writelines(_line(row) for row in self.rows)

    def has(self, step: int) -> bool:
        """Whether this step, the latest at most, is recorded."""
        return bool(self.rows) and self.rows[-1]["step"] == step

    def append(self, row: dict) -> None:
        """Add a row; it is in the file when this returns."""
        self.rows.append(row)
        with open(self.path, "ab") as file:
            file.write(_line(row))


class TensorBoard:
    """The numbers of an evaluation as TensorBoard shows them.

    Args:
        folder: where the files are.
        until_step: forget what the files have beyond this step, as a run continued from there
            does; None removes the files of a run before.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, until_step: int | None = None):
        """Open a file for this process."""
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        if until_step is None:
            for path in folder.glob(f"events.out.tfevents.*{EVENTS_SUFFIX}"):  # others' stay
                path.unlink()
        purge_step = None if until_step is None else until_step + 1
        self._writer = SummaryWriter(
            str(folder), purge_step=purge_step, filename_suffix=EVENTS_SUFFIX
        )

    def append(self, row: dict) -> None:
        """Add an evaluation; it is in the file when this returns."""
        for name, value in row.items():
            if name != "step":
                group = "loss/" if name in ("train", "val") else ""
                self._writer.add_scalar(group + name, value, row["step"])
        self._writer.flush()


def require_tensorboard() -> None:
    """Raise UserError unless TensorBoard is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard: pip install tensorboard") from None


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Return JSON that every reader takes: what is not finite, as losses are after a run has
    diverged, is null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, indent=indent, allow_nan=False).encode()


def _line(row: dict) -> bytes:
    return to_json(row) + b"\n"


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a log up to the first that is torn, as a crash may leave the last.

    A null is a number that was not finite, and comes back as NaN.
    """
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def differences(rows: list[dict], others: list[dict], name: str) -> list[float]:
    """Return how far two curves are apart at each step."""
    return [abs(row[name] - other[name]) for row, other in zip(rows, others, strict=True)]
