"""What a run leaves to look at: a line of JSON for each evaluation, and the loss curve."""

import json
from pathlib import Path

from fused_ce.babygpt.atomic import atomic_file


class Record:
    """The evaluations of a run, in memory and in log.jsonl.

    Args:
        path: the file.
        until_step: keep what the file has up to this step, as a run continued from there does;
            None starts an empty file.
    """

    def __init__(self, path: Path, until_step: int | None = None):
        """Read what is to be kept, and write the file anew with just that."""
        self.path = path
        self.rows: list[dict] = []
        if until_step is not None and path.exists():
            self.rows = [row for row in _read_rows(path) if row["step"] <= until_step]
        with atomic_file(path) as file:
            file.writelines(_line(row) for row in self.rows)

    def has(self, step: int) -> bool:
        """Whether this step, the latest at most, is recorded."""
        return bool(self.rows) and self.rows[-1]["step"] == step

    def append(self, row: dict) -> None:
        """Add an evaluation; it is in the file when this returns."""
        self.rows.append(row)
        with open(self.path, "ab") as file:
            file.write(_line(row))


def plot_losses(rows: list[dict], path: Path) -> None:
    """Draw the train and validation losses of the rows as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    for split in ("train", "val"):
        losses = [row[split] for row in rows]
        axes.plot(steps, losses, marker=".", label=f"{split}, {losses[-1]:.3f} at the end")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _line(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _read_rows(path: Path) -> list[dict]:
    """Return the rows of a log up to the first that is torn, as a crash may leave the last."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
