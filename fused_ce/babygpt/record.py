"""What a run leaves to look at: lines of JSON, the loss curve, and TensorBoard's files."""

import json
from pathlib import Path

from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.errors import UserError


class Record:
    """Rows of a run, the evaluations say, in memory and as lines of JSON in a file.

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
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
        purge_step = None if until_step is None else until_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

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


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a log up to the first that is torn, as a crash may leave the last."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
