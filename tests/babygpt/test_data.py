"""Text, tokens and batches."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from fused_ce.babygpt import data, get_batch, load_dataset
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.tokenizer import BPETokenizer


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


@pytest.fixture(params=["chars", "bpe"])
def kind(request):
    return request.param


def decoded(dataset):
    return "".join(dataset.tokenizer.decode(tokens.tolist()) for tokens in dataset.splits.values())


def test_a_dataset_is_the_text_split_90_to_10(text_file, kind):
    dataset = load_dataset(str(text_file), kind, 300)
    for tokens in dataset.splits.values():
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
    assert dataset.characters == {"train": 3600, "val": 400}
    assert dataset.tokenizer.decode(dataset.splits["val"].tolist()) == text_file.read_text()[3600:]
    assert decoded(dataset) == text_file.read_text()
    if kind == "chars":
        assert {name: len(tokens) for name, tokens in dataset.splits.items()} == dataset.characters


def test_bpe_has_seen_only_the_training_split(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat " * 36 + "zyzzyva " * 12)
    dataset = load_dataset(str(path), "bpe", 300)
    train = path.read_text()[: dataset.characters["train"]]
    assert dataset.tokenizer.vocabulary == BPETokenizer.train(train, 300).vocabulary


def test_what_was_prepared_is_described(text_file, cache, kind):
    dataset = load_dataset(str(text_file), kind, 300)
    (path,) = cache.glob("tokens/*/meta.json")
    meta = json.loads(path.read_text())
    assert meta["corpus"] == str(text_file) and meta["corpus_sha256"] == dataset.corpus_sha256
    assert meta["dtype"] == "uint16"
    assert meta["tokenizer"]["kind"] == kind
    assert meta["tokenizer"]["vocab_size"] == dataset.tokenizer.vocab_size
    assert meta["tokenizer"]["vocabulary"] == dataset.tokenizer.vocabulary
    for name, tokens in dataset.splits.items():
        assert meta["splits"][name]["tokens"] == len(tokens)
        assert meta["splits"][name]["characters"] == dataset.characters[name]


def test_large_vocabularies_are_stored_in_32_bits(tmp_path, cache):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(0x10000 + c) for c in range(2**16 + 1)), "utf-8")
    dataset = load_dataset(str(path))
    assert dataset.splits["val"].dtype == np.uint32 and dataset.splits["val"][-1] == 2**16
    assert decoded(load_dataset(str(path))) == path.read_text("utf-8")


def test_a_text_is_encoded_once(text_file, kind, monkeypatch):
    first = load_dataset(str(text_file), kind, 300)
    monkeypatch.setattr(data, "_encode", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(BPETokenizer, "train", lambda *_: pytest.fail("learnt again"))
    assert decoded(load_dataset(str(text_file), kind, 300)) == text_file.read_text()
    assert decoded(load_dataset(str(text_file), first.tokenizer)) == text_file.read_text()


def test_tokenizers_do_not_share_tokens(text_file):
    sizes = {
        load_dataset(str(text_file), *settings).tokenizer.vocab_size
        for settings in (["chars"], ["bpe", 260], ["bpe", 270])
    }
    assert sizes == {28, 260, 270}


def test_a_text_is_encoded_by_a_tokenizer_that_exists(text_file, tmp_path):
    tokenizer = load_dataset(str(text_file)).tokenizer
    other = tmp_path / "other.txt"
    other.write_text("a lazy fox " * 20)
    dataset = load_dataset(str(other), tokenizer)
    assert dataset.tokenizer is tokenizer and decoded(dataset) == other.read_text()
    other.write_text("☃" + "a lazy fox " * 20 + "ü", "utf-8")
    with pytest.raises(UserError, match=r"'ü' \(U\+00FC\), '☃' \(U\+2603\)"):
        load_dataset(str(other), tokenizer)  # one in each split


def test_a_changed_text_is_encoded_anew(text_file):
    before = load_dataset(str(text_file))
    text_file.write_text(text_file.read_text().replace("quick", "QUICK"))
    after = load_dataset(str(text_file))
    assert after.corpus_sha256 != before.corpus_sha256
    assert "Q" in after.tokenizer.vocabulary and "Q" not in before.tokenizer.vocabulary


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "bpe-300-*.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign", "emptied", "flipped"])
def test_a_damaged_cache_is_made_again(text_file, cache, name, damage):
    before = load_dataset(str(text_file), "bpe", 300)
    tokens = [split.tolist() for split in before.splits.values()]
    del before
    (path,) = cache.rglob(name)
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-4])
    elif damage == "foreign":
        path.write_bytes(b'{"kind": "chars"}'.ljust(len(content)))
    elif damage == "emptied":
        path.touch()
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    after = load_dataset(str(text_file), "bpe", 300)
    assert [split.tolist() for split in after.splits.values()] == tokens
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(content).digest()


def test_another_tokenizer_in_the_cache_is_not_used(text_file, tmp_path, cache):
    before = load_dataset(str(text_file), "bpe", 270).tokenizer.vocabulary
    (mine,) = cache.glob("tokenizers/*")
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    assert load_dataset(str(other), "bpe", 270).tokenizer.vocabulary != before
    (others,) = set(cache.glob("tokenizers/*")) - {mine}
    saved = json.loads(mine.read_text())
    for content in (
        others.read_text(),
        json.dumps(saved | {"vocabulary": json.loads(others.read_text())["vocabulary"]}),
    ):
        mine.write_text(content)
        assert load_dataset(str(text_file), "bpe", 270).tokenizer.vocabulary == before


def test_tokens_of_another_text_are_not_used(text_file, tmp_path, cache):
    load_dataset(str(text_file))
    (mine,) = cache.glob("tokens/*")
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    load_dataset(str(other))
    (others,) = set(cache.glob("tokens/*")) - {mine}
    shutil.rmtree(mine)
    others.rename(mine)
    assert decoded(load_dataset(str(text_file))) == text_file.read_text()


def test_a_byte_order_mark_is_no_character_of_the_text(text_file, kind):
    plain = load_dataset(str(text_file), kind, 300)
    text_file.write_bytes(b"\xef\xbb\xbf" + text_file.read_bytes())
    marked = load_dataset(str(text_file), kind, 300)
    assert marked.corpus_sha256 == plain.corpus_sha256 and decoded(marked) == decoded(plain)
    assert marked.tokenizer.vocabulary == plain.tokenizer.vocabulary


def test_a_text_is_named_alike_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert data.absolute("pydocs") == "pydocs" and data.absolute("/a/b.txt") == "/a/b.txt"
    assert data.absolute("b.txt") == str(tmp_path / "b.txt")
    assert data.absolute("b:c.txt") == str(tmp_path / "b:c.txt")
    assert data.absolute("ci:b.tgz") == data.absolute("ci") == "ci"


def test_a_text_too_short_for_a_window_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("ab")
    for _ in range(2):
        dataset = load_dataset(str(tmp_path / "text.txt"))
        assert {name: len(tokens) for name, tokens in dataset.splits.items()} == {
            "train": 1, "val": 1,
        }  # fmt: skip
    with pytest.raises(UserError, match="--block-size 1 needs at least 2 characters in the train"):
        data.require_windows(dataset.splits, 1, dataset.tokenizer.unit)


def test_a_cache_that_cannot_be_written_is_one_line(text_file, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FUSED_CE_CACHE", str(text_file))
    with pytest.raises(UserError, match="^the cache .* cannot be written: .*FUSED_CE_CACHE"):
        load_dataset(str(text_file), kind, 300)


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSED_CE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / ".cache" / "fused-ce"
