"""Text, tokens and batches."""

import numpy as np
import pytest
import torch

from fused_ce.babygpt import data, get_batch, load_dataset
from fused_ce.babygpt.corpora import read_text
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.tokenizer import CharTokenizer


@pytest.fixture(params=["array", "memmap", "tensor"])
def tokens(request, tmp_path):
    """0, 1, ..., 99: a token is its own position."""
    if request.param == "tensor":
        return torch.arange(100)
    array = np.arange(100, dtype=np.uint16)
    if request.param == "memmap":
        array.tofile(tmp_path / "tokens.bin")
        return np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    return array


def test_y_is_x_one_token_later(tokens):
    x, y = get_batch(tokens, 5, 8)
    assert x.shape == y.shape == (5, 8)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:] - x[:, :-1], torch.ones(5, 7, dtype=torch.int64))
    assert torch.equal(y, x + 1)


def test_every_window_can_be_drawn(tokens):
    x, y = get_batch(tokens, 4000, 90)
    assert set(x[:, 0].tolist()) == set(range(10))
    assert y.max() == 99


def test_the_only_window_is_drawn():
    x, y = get_batch(np.arange(9), 2, 8)
    assert x.tolist() == [list(range(8))] * 2 and y.tolist() == [list(range(1, 9))] * 2


def test_data_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="at least 9 tokens, got 8"):
        get_batch(np.arange(8), 2, 8)


@pytest.mark.parametrize("sizes", [(0, 8), (2, 0)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match="must be positive"):
        get_batch(np.arange(9), *sizes)


def test_batches_follow_the_generator(tokens):
    def draw(seed):
        return get_batch(tokens, 6, 8, generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_generator_leaves_the_global_one_alone(tokens):
    before = torch.get_rng_state()
    get_batch(tokens, 6, 8, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_text_survives_the_tokens():
    text = "naïve 词\r\n\U0001f600 end"
    tokenizer = CharTokenizer(text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16 and len(tokens) == len(text)
    assert tokenizer.decode(tokens.tolist()) == text
    assert tokenizer.vocab_size == len(set(text))


def test_large_vocabularies_take_32_bits():
    text = "".join(chr(c) for c in range(0x10000, 0x10000 + 2**16 + 1))
    tokens = CharTokenizer(text).encode(text)
    assert tokens.dtype == np.uint32 and tokens[-1] == 2**16


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match=r"lacks the characters '!' \(U\+0021\), '☃' \(U\+2603\)$"):
        CharTokenizer("ab").encode("a☃b!☃")


def test_pydocs_is_half_a_million_characters():
    text = read_text("pydocs")
    assert len(text) > 400_000 and len(set(text)) > 90


def test_a_dataset_is_the_text_split_90_to_10(text_file):
    dataset = load_dataset(str(text_file))
    train, val = dataset.splits["train"], dataset.splits["val"]
    assert isinstance(train, np.memmap) and train.dtype == np.uint16
    assert len(train) == 3600 and len(val) == 400
    decoded = dataset.tokenizer.decode([*train.tolist(), *val.tolist()])
    assert decoded == text_file.read_text()


def test_a_text_is_encoded_once(text_file, monkeypatch):
    load_dataset(str(text_file))
    monkeypatch.setattr(data, "_encode", lambda *_: pytest.fail("encoded again"))
    assert len(load_dataset(str(text_file)).splits["train"]) == 3600


def test_a_changed_text_is_encoded_anew(text_file):
    before = load_dataset(str(text_file))
    text_file.write_text(text_file.read_text().replace("quick", "QUICK"))
    after = load_dataset(str(text_file))
    assert after.corpus_sha256 != before.corpus_sha256
    assert "Q" in after.tokenizer.vocabulary and "Q" not in before.tokenizer.vocabulary


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_cache_is_made_again(text_file, cache, name, damage):
    before = [tokens.tolist() for tokens in load_dataset(str(text_file)).splits.values()]
    (path,) = cache.glob(f"*/{name}")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-4])
    after = [tokens.tolist() for tokens in load_dataset(str(text_file)).splits.values()]
    assert after == before


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSED_CE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / ".cache" / "fused-ce"


def test_unusable_files_are_refused(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    for name, words in [
        ("latin1.txt", "UTF-8.*byte 3"),
        ("empty.txt", "at least 2 characters"),
        ("missing.txt", "does not exist"),
        ("", "is a folder"),
    ]:
        with pytest.raises(UserError, match=words):
            load_dataset(str(tmp_path / name))
