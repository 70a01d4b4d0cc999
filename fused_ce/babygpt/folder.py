"""The folder of a run: which files are ours, so that nobody else's is replaced or removed."""

import json
import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import safetensors

from fused_ce.babygpt.checkpoint import load_checkpoint
from fused_ce.babygpt.errors import CheckpointError, UserError
from fused_ce.babygpt.record import read_rows
from fused_ce.babygpt.surroundings import warn

RUN_FILES = ("last.pt", "best.pt", "log.jsonl", "loss.png", "weights.safetensors")
OPTIONAL_FILES = ("steps.jsonl",)
COMPARISON_FILES = ("compare.json", "compare.png")
CHECKPOINTS = ("last.pt", "best.pt")
MARK = "fused_ce.babygpt"  # what our pictures and weights say that they were made by


def claim(
    folder: Path, files: Iterable[str], *, overwrite: bool, resumable: bool = True
) -> list[Path]:
    """Return those of the files that are there already, all of a run of ours, to be replaced.

    Raises:
        UserError: the folder is a file, or holds a run and overwrite is not set, or one of the
            files is somebody else's.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out must be a folder, {folder} is a file")
    there = [folder / name for name in files if os.path.lexists(folder / name)]
    foreign = [path for path in there if not is_ours(path)]
    if len(foreign) < len(there) and not overwrite:
        resume = "--resume continues it, " if resumable else ""
        raise UserError(
            f"{folder} holds a run already: {resume}another --out leaves it alone, "
            "--overwrite replaces it"
        )
    refuse_foreign(foreign)
    return there


def refuse_foreign(paths: Iterable[Path]) -> None:
    """Raise UserError if there are any."""
    for path in paths:
        raise UserError(
            f"{path} is in the way: it is not, or no longer, a file of a run of BabyGPT, and is "
            "never replaced; move it, or choose another --out"
        )


def set_aside_foreign(folder: Path) -> None:
    """Rename what has the name of a checkpoint and is none, before a run that goes on writes it."""
    for path in (folder / name for name in CHECKPOINTS):
        if os.path.lexists(path) and not is_ours(path):
            kept = next(
                kept
                for kept in (folder / f"{path.name}.damaged{n or ''}" for n in count())
                if not os.path.lexists(kept)
            )
            path.rename(kept)
            warn(f"{path} is kept as {kept.name}")


def is_ours(path: Path) -> bool:
    """Whether a file with one of the names above was left, whole, by a run or a comparison."""
    try:
        return _KINDS[path.suffix](path)
    except (OSError, ValueError, CheckpointError, safetensors.SafetensorError):
        return False


def remove_temporary(folder: Path, files: Iterable[str]) -> None:
    """Remove what a crash left half-written, see `atomic_file`."""
    for name in files:
        for path in folder.glob(f".{name}.*.tmp"):
            if path.suffixes[-2][1:].isdigit():  # the number of the process
                path.unlink(missing_ok=True)


def _is_checkpoint(path: Path) -> bool:
    load_checkpoint(path)
    return True


def _is_log(path: Path) -> bool:
    """Whether the first line is a row of ours, or what a crash left of one."""
    needed = {"step", "loss", "seconds"} if path.stem == "steps" else {"step", "train", "val", "lr"}
    rows = read_rows(path)
    if rows:
        return needed <= rows[0].keys()
    content = path.read_bytes()
    return b"\n" not in content and content[:9] == b'{"step": '[: len(content)]


def _is_comparison(path: Path) -> bool:
    content = json.loads(path.read_bytes())
    return isinstance(content, dict) and content.keys() == {"config", "losses"}


def _is_picture(path: Path) -> bool:
    with open(path, "rb") as file:  # the text chunks come before the pixels
        return f"Software\0{MARK}".encode() in file.read(4096)


def _are_weights(path: Path) -> bool:
    with safetensors.safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("made_by") == MARK


_KINDS = {
    ".pt": _is_checkpoint, ".jsonl": _is_log, ".json": _is_comparison, ".png": _is_picture,
    ".safetensors": _are_weights,
}  # fmt: skip
