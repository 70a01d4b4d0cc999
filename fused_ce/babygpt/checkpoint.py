"""Checkpoints: plain tensors and numbers, written whole, checked when read."""

import zipfile
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.config import ModelConfig, TrainConfig
from fused_ce.babygpt.data import absolute
from fused_ce.babygpt.errors import CheckpointError
from fused_ce.babygpt.model import BabyGPT
from fused_ce.babygpt.tokenizer import Tokenizer, make_tokenizer

KEYS = {
    "config", "model_config", "vocabulary", "corpus_sha256", "step", "best_val", "model",
    "optimizer", "schedule", "scaler", "generators",
}  # fmt: skip
KINDS = {
    "config": dict, "model_config": dict, "corpus_sha256": str, "step": int,
    "best_val": float, "model": dict, "optimizer": dict, "generators": list,
}  # fmt: skip


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state of plain tensors, numbers, strings, lists and dicts with the keys of KEYS."""
    try:
        with atomic_file(path) as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a disk that is full, say
            raise error.__context__ from None
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint, its tensors on the CPU; no code in the file is run.

    Raises:
        CheckpointError: the file is missing, damaged, or not a BabyGPT checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the check sums
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: the check sum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path} is damaged or not a checkpoint") from None
    except UnpicklingError:
        raise CheckpointError(
            f"{path} is not a BabyGPT checkpoint: it holds more than tensors and numbers"
        ) from None
    except PermissionError:
        raise CheckpointError(f"{path} cannot be read: permission denied") from None
    except CheckpointError:
        raise
    except Exception as error:  # a foreign file can make zip and pickle readers raise anything
        raise CheckpointError(f"{path} is damaged or not a checkpoint") from error
    if not isinstance(state, dict) or not KEYS <= state.keys():
        raise CheckpointError(f"{path} is not a BabyGPT checkpoint: entries are missing")
    if not all(isinstance(state[key], kind) for key, kind in KINDS.items()):
        raise CheckpointError(f"{path} is not a BabyGPT checkpoint: entries are of other kinds")
    return state


def config_to_plain(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as strings and numbers, without where the run lies.

    The text is named so that it is found from any folder.
    """
    plain = asdict(config)
    del plain["out"], plain["resume"], plain["overwrite"]
    plain["data"] = absolute(config.data)
    plain["decay_steps"] = config.decay_end  # a larger --max-steps leaves the schedule alone
    return plain


def config_from_plain(plain: dict[str, Any], folder: Path) -> TrainConfig:
    """Return the settings of a run that lies in a folder."""
    try:
        return TrainConfig(**plain, out=folder)
    except TypeError as error:
        raise CheckpointError(f"the run in {folder} has other settings: {error}") from error


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the intact checkpoint of a run with the most steps, and what is wrong with others.

    Raises:
        CheckpointError: none is there, or none is intact.
    """
    paths = [path for path in (folder / "last.pt", folder / "best.pt") if path.exists()]
    if not paths:
        raise CheckpointError(f"there is no run to continue in {folder}: no last.pt, no best.pt")
    states, problems = [], []
    for path in paths:
        try:
            states.append(load_checkpoint(path))
        except CheckpointError as error:
            problems.append(str(error))
    if not states:
        raise CheckpointError("no checkpoint is intact: " + "; ".join(problems))
    return max(states, key=lambda state: state["step"]), problems


def load_model(checkpoint: Path) -> tuple[BabyGPT, Tokenizer, dict[str, Any]]:
    """Return the model of a checkpoint, its tokenizer, and the whole state.

    Args:
        checkpoint: the file, or the folder of a run: best.pt is read, else last.pt.

    Raises:
        CheckpointError: there is none, or the one that would be used is damaged.
    """
    paths = [path for path in (checkpoint / "best.pt", checkpoint / "last.pt") if path.exists()]
    if checkpoint.is_file():
        paths = [checkpoint]
    if not paths:
        raise CheckpointError(f"there is no checkpoint in {checkpoint}: no best.pt, no last.pt")
    state = load_checkpoint(paths[0])
    try:
        model = BabyGPT(ModelConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
        kind = state["config"].get("tokenizer", "chars")
    except (TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{paths[0]} does not fit this version of BabyGPT") from error
    return model, make_tokenizer(kind, state["vocabulary"]), state
