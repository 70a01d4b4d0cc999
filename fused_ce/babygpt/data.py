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
from fused_ce.babygpt.corpora import (
    DOWNLOADS,
    NAMES,
    cache_folder,
    read_text,
    text_sha256,
    writing_cache,
)
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.tokenizer import (
    BPETokenizer,
    Tokenizer,
    make_tokenizer,
    token_dtype,
    tokenizer_sha256,
    train_tokenizer,
)

TRAIN_SHARE = 0.9
BPE_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Dataset:
    """The tokens of a text, with the tokenizer that made them."""

    splits: dict[str, np.ndarray]  # "train" and "val", each (n,) uint16 or uint32
    characters: dict[str, int]  # of the text of each split
    tokenizer: Tokenizer
    corpus_sha256: str


def load_dataset(
    data: str, tokenizer: str | Tokenizer = "chars", bpe_vocab_size: int = BPE_VOCAB_SIZE
) -> Dataset:
    """Return the tokens of a corpus or file; they are encoded the first time and re-used later.

    The cache is addressed by the hashes of text and tokenizer, so a file that changes is encoded
    anew; what is found damaged there is made again. Any number of processes may do this at once.

    Args:
        data: the name of a corpus, or the path of a UTF-8 text file.
        tokenizer: "chars"; "bpe", which learns from the training split; or one that exists.
        bpe_vocab_size: tokens that "bpe" may have.

    Raises:
        UserError: the text cannot be had, has characters unknown to a tokenizer that exists, or
            the cache cannot be written.
    """
    text = load_text(data)
    sha256 = text_sha256(text)
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer(tokenizer, text, sha256, bpe_vocab_size)
    name = f"{tokenizer.kind}-{sha256[:16]}-{tokenizer_sha256(tokenizer)[:16]}"
    folder = cache_folder() / "tokens" / name
    try:
        return _open(folder, sha256, tokenizer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not whole
        _encode(data, text, folder, sha256, tokenizer)
        return _open(folder, sha256, tokenizer)


def load_text(data: str) -> str:
    """Return the text of a corpus or file, without the byte-order mark that an editor put first.

    Raises:
        UserError: the text cannot be had, or nowhere is a cache for it.
    """
    try:
        cache_folder()
    except RuntimeError:  # no HOME, and a user without an entry in passwd
        raise UserError(
            "there is no home folder for the cache: FUSED_CE_CACHE can name a folder"
        ) from None
    return read_text(data).removeprefix("\ufeff")


def absolute(data: str) -> str:
    """Return what --data names in a way that means the same from any folder.

    Of an archive that is the corpus, which has only one text: once read, it is in the cache.
    """
    corpus = data.partition(":")[0]
    return corpus if data in NAMES or corpus in DOWNLOADS else os.path.abspath(data)


def require_text_of_run(data: str) -> None:
    """Raise UserError if the text that a run was trained on is gone: nobody named it just now."""
    if data not in NAMES and not os.path.exists(data):
        raise UserError(
            f"the run was trained on {data}, which does not exist"
            f"{'' if os.path.isabs(data) else ' here'}: --data says where it is now"
        )


def split_text(text: str) -> dict[str, str]:
    """Return the first 90 % of the characters as "train", the rest as "val"."""
    n_train = int(TRAIN_SHARE * len(text))
    return {"train": text[:n_train], "val": text[n_train:]}


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


def _tokenizer(kind: str, text: str, sha256: str, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a text; what BPE learnt is in the cache the second time."""
    if kind != BPETokenizer.kind:
        return train_tokenizer(kind, text, "", vocab_size)
    path = cache_folder() / "tokenizers" / f"{kind}-{vocab_size}-{sha256[:16]}.json"
    try:
        saved = json.loads(path.read_bytes())
        tokenizer = make_tokenizer(kind, saved["vocabulary"])
        if saved == {"corpus_sha256": sha256, **_identity(tokenizer)}:
            return tokenizer
    except (OSError, ValueError, KeyError, TypeError, UserError):  # not there, or not whole
        pass
    tokenizer = train_tokenizer(kind, text, split_text(text)["train"], vocab_size)
    with writing_cache(path.parent), atomic_file(path) as file:
        file.write(json.dumps({"corpus_sha256": sha256, **_identity(tokenizer)}).encode())
    return tokenizer


def _identity(tokenizer: Tokenizer) -> dict[str, str | int]:
    """Return what makes the same tokenizer again, and its hash."""
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "vocabulary": tokenizer.vocabulary,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }


def _encode(data: str, text: str, folder: Path, sha256: str, tokenizer: Tokenizer) -> None:
    """Write train.bin, val.bin and then meta.json: what has a meta.json is complete."""
    parts = split_text(text)
    try:
        splits = {name: tokenizer.encode(part) for name, part in parts.items()}
    except UserError:
        tokenizer.encode(text)  # names what is unknown in either split
        raise
    meta = {
        "corpus": absolute(data),
        "corpus_sha256": sha256,
        "tokenizer": _identity(tokenizer),
        "dtype": np.dtype(token_dtype(tokenizer.vocab_size)).name,
        "splits": {
            name: {
                "characters": len(parts[name]),
                "tokens": len(tokens),
                "sha256": hashlib.sha256(tokens.data).hexdigest(),
            }
            for name, tokens in splits.items()
        },
    }
    with writing_cache(folder):
        for name, tokens in splits.items():
            with atomic_file(folder / f"{name}.bin") as file:
                file.write(tokens.tobytes())
        with atomic_file(folder / "meta.json") as file:
            file.write(json.dumps(meta, indent=1).encode())


def _open(folder: Path, sha256: str, tokenizer: Tokenizer) -> Dataset:
    """Map the files of a folder; any error says that they are not usable."""
    meta = json.loads((folder / "meta.json").read_bytes())
    dtype = token_dtype(tokenizer.vocab_size)
    if (
        meta["corpus_sha256"] != sha256
        or meta["tokenizer"] != _identity(tokenizer)
        or meta["dtype"] != np.dtype(dtype).name
    ):
        raise ValueError(f"{folder} holds other tokens")
    splits, characters = {}, {}
    for name in ("train", "val"):
        path, split = folder / f"{name}.bin", meta["splits"][name]
        if not split["tokens"]:  # an empty file cannot be mapped
            splits[name] = np.empty(0, dtype)
        else:
            splits[name] = np.memmap(path, dtype=dtype, mode="r")
        if hashlib.sha256(splits[name].data).hexdigest() != split["sha256"]:
            raise ValueError(f"{path} is damaged")
        characters[name] = split["characters"]
    return Dataset(splits, characters, tokenizer, sha256)


def require_windows(splits: dict[str, np.ndarray], block_size: int, unit: str = "token") -> None:
    """Raise UserError unless every split holds a window of block_size tokens and the next."""
    for name, tokens in splits.items():
        if len(tokens) <= block_size:
            raise UserError(
                f"--block-size {block_size} needs at least {block_size + 1} {unit}s in the "
                f"{name} split of --data, got {len(tokens)}"
            )
