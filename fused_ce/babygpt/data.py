"""Text to memory-mapped tokens, encoded once, and tokens to random batches."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.corpora import read_text
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.tokenizer import CharTokenizer

TRAIN_SHARE = 0.9


@dataclass(frozen=True)
class Dataset:
    """The tokens of a text, with the vocabulary that made them."""

    splits: dict[str, np.ndarray]  # "train" and "val", each (n,) uint16 or uint32
    tokenizer: CharTokenizer
    corpus_sha256: str


def cache_folder() -> Path:
    """Return the folder of the encoded texts: FUSED_CE_CACHE, else ~/.cache/fused-ce."""
    return Path(os.environ.get("FUSED_CE_CACHE") or "~/.cache/fused-ce").expanduser()


def load_dataset(data: str) -> Dataset:
    """Return the tokens of a corpus or file; they are encoded the first time and re-used later.

    The cache is addressed by the hash of the text, so a file that changes is encoded anew.

    Raises:
        UserError: the text cannot be read.
    """
    text = read_text(data)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    folder = cache_folder() / f"chars-{sha256[:16]}"
    try:
        return _open(folder, sha256)
    except (OSError, ValueError, KeyError):  # not there yet, or not whole
        _encode(text, folder, sha256)
        return _open(folder, sha256)


def split_tokens(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return the first 90 % of the tokens as "train", the rest as "val"."""
    n_train = int(TRAIN_SHARE * len(tokens))
    return {"train": tokens[:n_train], "val": tokens[n_train:]}


def get_batch(
    data: np.ndarray | Tensor,
    batch_size: int,
    block_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw random windows, and the same windows one token later.

    Args:
        data: (n,) tokens: a memmap, an array or a tensor, of any integer dtype.
        batch_size: windows to draw.
        block_size: tokens in a window.
        generator: where the randomness comes from; None is PyTorch's global generator.
        device: where the batch goes; a copy to CUDA does not wait.

    Returns:
        x and y, each (batch_size, block_size) int64, with y[:, t] the token after x[:, t].

    Raises:
        ValueError: data is shorter than block_size + 1, or a size is not positive.
    """
    if batch_size < 1 or block_size < 1:
        raise ValueError(
            f"batch_size and block_size must be positive, got {batch_size}, {block_size}"
        )
    n_windows = len(data) - block_size
    if n_windows < 1:
        raise ValueError(
            f"windows of {block_size} tokens and the next need at least {block_size + 1} tokens, "
            f"got {len(data)}"
        )
    starts = torch.randint(n_windows, (batch_size, 1), generator=generator)
    positions = starts + torch.arange(block_size + 1)
    if isinstance(data, Tensor):
        windows = data[positions.to(data.device)].long()
    else:
        windows = torch.from_numpy(np.asarray(data)[positions.numpy()].astype(np.int64))
    device = torch.device(device)
    if device.type == "cuda" and windows.device.type == "cpu":
        windows = windows.pin_memory()
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _encode(text: str, folder: Path, sha256: str) -> None:
    """Write train.bin, val.bin and then meta.json: what has a meta.json is complete."""
    tokenizer = CharTokenizer(text)
    splits = split_tokens(tokenizer.encode(text))
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens in splits.items():
        with atomic_file(folder / f"{name}.bin") as file:
            file.write(tokens.tobytes())
    meta = {
        "corpus_sha256": sha256,
        "vocabulary": tokenizer.vocabulary,
        "dtype": np.dtype(tokenizer.dtype).name,
        "sizes": {name: len(tokens) for name, tokens in splits.items()},
    }
    with atomic_file(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())


def _open(folder: Path, sha256: str) -> Dataset:
    """Map the files of a folder; any error says that they are not usable."""
    meta = json.loads((folder / "meta.json").read_bytes())
    if meta["corpus_sha256"] != sha256:
        raise ValueError(f"{folder} holds another text")
    splits = {}
    for name, size in meta["sizes"].items():
        splits[name] = np.memmap(folder / f"{name}.bin", dtype=meta["dtype"], mode="r")
        if len(splits[name]) != size:
            raise ValueError(f"{folder / name}.bin is truncated")
    return Dataset(splits, CharTokenizer(meta["vocabulary"]), sha256)


def require_windows(splits: dict[str, np.ndarray], block_size: int) -> None:
    """Raise UserError unless every split holds a window of block_size tokens and the next."""
    for name, tokens in splits.items():
        if len(tokens) <= block_size:
            raise UserError(
                f"--block-size {block_size} needs at least {block_size + 1} characters in the "
                f"{name} split of --data, got {len(tokens)}"
            )
