"""Text survives every tokenizer, whole or token by token."""

import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fused_ce.babygpt.checkpoint import load_checkpoint, load_model, save_checkpoint
from fused_ce.babygpt.config import ModelConfig
from fused_ce.babygpt.errors import UserError
from fused_ce.babygpt.sample import stream
from fused_ce.babygpt.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    make_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)

LEARNT = "the quick brown fox jumps over the lazy dog; 春江潮水连海平，海上明月共潮生。\n" * 20
FOREIGN = "naïve 词\r\n\t \U0001f600\x00 ﷽ e\u0301   end  "


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(LEARNT, 400)


@pytest.fixture(params=["chars", "bpe"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else CharTokenizer(LEARNT + FOREIGN)


@pytest.mark.parametrize("text", [LEARNT, FOREIGN, "", "\n", "生"], ids=ascii)
def test_text_survives_the_tokens(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    assert tokenizer.decode(tokens.tolist()) == text
    assert all(token < tokenizer.vocab_size for token in tokens.tolist())


def test_text_survives_token_by_token(tokenizer):
    text = LEARNT[:200] + FOREIGN
    decode = tokenizer.incremental_decoder()
    pieces = [decode([token]) for token in tokenizer.encode(text).tolist()]
    assert "".join(pieces) + decode([], final=True) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_tokenizer_is_made_again_from_plain_values(tokenizer, tmp_path):
    torch.save({"kind": tokenizer.kind, "vocabulary": tokenizer.vocabulary}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = make_tokenizer(**state)
    assert again.vocabulary == tokenizer.vocabulary and again.vocab_size == tokenizer.vocab_size
    assert again.encode(FOREIGN).tolist() == tokenizer.encode(FOREIGN).tolist()
    assert tokenizer_sha256(again) == tokenizer_sha256(tokenizer)


def test_a_text_without_a_prompt_begins_after_a_line_break(tokenizer):
    assert tokenizer.start == "\n" and len(tokenizer.encode(tokenizer.start)) == 1
    assert CharTokenizer("xyz").start == "x"


def test_characters_are_counted_once():
    tokenizer = CharTokenizer("banana")
    assert tokenizer.vocabulary == "abn" and tokenizer.vocab_size == 3
    assert tokenizer.encode("nab").tolist() == [2, 0, 1]


def test_large_vocabularies_take_32_bits():
    text = "".join(chr(c) for c in range(0x10000, 0x10000 + 2**16 + 1))
    tokens = CharTokenizer(text).encode(text)
    assert tokens.dtype == np.uint32 and tokens[-1] == 2**16
    assert CharTokenizer(text[:-1]).encode(text[:-1]).dtype == np.uint16


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match=r"lacks the characters '!' \(U\+0021\), '☃' \(U\+2603\)$"):
        CharTokenizer("ab").encode("a☃b!☃")
    with pytest.raises(UserError, match=r"'k' \(U\+006B\) and 15 more$"):
        CharTokenizer("a").encode("abcdefghijklmnopqrstuvwxyz")


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"U\+DCFF|not Unicode"):
        tokenizer.encode("the \udcff")


def test_bpe_learns_what_is_frequent(bpe):
    assert 256 < bpe.vocab_size < 400  # a short text has no more to learn
    assert len(bpe.encode(LEARNT)) < len(LEARNT) / 3
    assert len(bpe.encode("the quick brown fox")) == 4


def test_bpe_has_no_more_tokens_than_asked():
    assert BPETokenizer.train(LEARNT, 300).vocab_size == 300
    assert BPETokenizer.train("", 256).vocab_size == 256
    with pytest.raises(UserError, match="at least 256 tokens, got 255"):
        BPETokenizer.train(LEARNT, 255)


def test_bpe_learns_from_the_training_split_alone():
    tokenizer = train_tokenizer("bpe", LEARNT + "zyzzyva " * 99, LEARNT, 400)
    assert tokenizer.vocabulary == BPETokenizer.train(LEARNT, 400).vocabulary
    assert train_tokenizer("chars", "abc", "ab", 400).vocabulary == "abc"


def test_bpe_learns_the_same_in_every_process(bpe):
    code = (
        "from tests.babygpt.test_tokenizer import *; "
        "print(tokenizer_sha256(BPETokenizer.train(LEARNT, 400)))"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == tokenizer_sha256(bpe)


def test_every_byte_is_a_token(bpe):
    single = [token for token in range(bpe.vocab_size) if len(bpe._bytes[token]) == 1]
    assert {bpe._bytes[token][0] for token in single} == set(range(256))


def test_bytes_are_those_of_the_library(bpe):
    # Every character of up to two bytes, and some beyond: the library agrees on what a token is.
    text = "".join(map(chr, range(1, 0x800))) + FOREIGN
    assert bpe._bpe.decode(bpe.encode(text).tolist()) == text == bpe.decode(bpe.encode(text))


def test_bytes_that_are_no_characters_are_marked(bpe):
    half = bpe._bytes.index(b"\xe6")  # the first of three bytes
    letter = bpe._bytes.index(b"a")
    assert bpe.decode([half]) == "\ufffd" and bpe.decode([half, letter]) == "\ufffda"
    decode = bpe.incremental_decoder()
    assert decode([half]) == "" and decode([letter]) == "\ufffda"
    assert decode([half]) == "" and decode([], final=True) == "\ufffd"


@pytest.mark.parametrize(
    "vocabulary",
    [
        "",
        "{}",
        "not json",
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
    ids=["empty", "object", "text", "no-bytes"],
)
def test_a_vocabulary_that_is_none_is_refused(vocabulary):
    with pytest.raises(UserError, match="vocabulary"):
        make_tokenizer("bpe", vocabulary)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="--tokenizer must be one of chars, bpe, got 'words'"):
        make_tokenizer("words", "abc")
    with pytest.raises(UserError, match="at least one character"):
        make_tokenizer("chars", "")


def test_bpe_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs tokenizers: pip install 'fused_ce\[train\]'"):
        BPETokenizer.train(LEARNT, 300)


@pytest.fixture
def bpe_run(babygpt, flags, tmp_path):
    """The folder of a run of ten steps, and its flags."""
    flags = [*flags, "--tokenizer", "bpe", "--bpe-vocab-size", 270, "--out", tmp_path / "run"]
    status, out, _ = babygpt("train", *flags, "--max-steps", 10)
    assert status == 0 and "vocabulary 270" in out and "tokens to train on" in out
    return tmp_path / "run", flags


def test_a_run_on_bpe_is_resumed_sampled_and_evaluated(babygpt, bpe_run, text_file):
    folder, flags = bpe_run
    assert babygpt("train", *flags, "--max-steps", 20, "--resume")[0] == 0
    model, tokenizer, saved = load_model(folder)
    assert saved["step"] > 0 and tokenizer.vocab_size == model.config.vocab_size == 270
    status, out, _ = babygpt("sample", "--checkpoint", folder, "--prompt", "词 ☃", "--seed", 3)
    assert status == 0 and out.startswith("词 ☃")  # no prompt is unknown to bytes
    status, out, _ = babygpt("eval", "--checkpoint", folder)
    loss, bits = (
        float(re.search(rf"^{name} +([\d.]+)", out, re.MULTILINE)[1])
        for name in ("loss", "bits per character")
    )
    n_tokens = len(tokenizer.encode(text_file.read_text()[3600:]))
    assert f"{n_tokens} tokens" in out and "nats per token" in out
    assert bits == pytest.approx(loss * n_tokens / 400 / math.log(2), rel=1e-3)


def test_a_run_does_not_continue_with_another_vocabulary(babygpt, bpe_run):
    folder, flags = bpe_run
    status, _, err = babygpt("train", *flags, "--bpe-vocab-size", 260, "--resume")
    assert status == 1 and "--bpe-vocab-size cannot change with --resume" in err
    for path in (folder / "last.pt", folder / "best.pt"):
        state = load_checkpoint(path)
        state["vocabulary"] = state["vocabulary"].replace('"type":"BPE"', '"type": "BPE"')
        save_checkpoint(path, state)
    status, _, err = babygpt("train", *flags, "--max-steps", 20, "--resume")
    assert status == 1 and "--tokenizer bpe has learnt another vocabulary" in err


def test_a_sample_prints_whole_characters(bpe, capsys):
    class Model(torch.nn.Module):
        """Repeats a text, token by token."""

        def __init__(self, text):
            """Know the tokens of the text."""
            super().__init__()
            self.config = ModelConfig(bpe.vocab_size, 8, 0, 1, 1)
            self.tokens = iter(bpe.encode(text).tolist())
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, idx, *_, **__):
            """Score the next token of the text highest."""
            token = torch.tensor(next(self.tokens))
            logits = torch.nn.functional.one_hot(token, bpe.vocab_size).float()
            return logits.expand(*idx.shape, -1), None

    text = "naïve 词☃"
    n_tokens = len(bpe.encode(text))
    assert n_tokens > len(text)
    stream(Model(text), bpe, ">", n_tokens, temperature=0, seed=0)
    assert capsys.readouterr().out == f">{text}\n"
    stream(Model(text), bpe, ">", n_tokens - 1, temperature=0, seed=0)
    assert capsys.readouterr().out == f">{text[:-1]}\ufffd\n"


def test_bpe_learns_from_a_word_without_end_in_no_time():
    """Its time grows with the square of a word: 200,000 letters without a space took 20 seconds."""
    letters = torch.randint(4, (200_000,), generator=torch.Generator().manual_seed(0)).tolist()
    text = "".join("ACGT"[i] for i in letters)
    began = time.process_time()
    tokenizer = BPETokenizer.train(text, 400)
    tokens = tokenizer.encode(text)
    assert time.process_time() - began < 8
    assert tokenizer.decode(tokens.tolist()) == text and len(tokens) < len(text) / 3


@pytest.mark.parametrize("word", ["a", "\n", "\u00e9\u8bd7", "-7\U0001f600"], ids=ascii)
def test_bpe_gives_words_longer_than_its_pieces_back(word):
    text = word * 700 + "\u8bd7 " + word
    tokenizer = BPETokenizer.train(text, 300)
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert make_tokenizer("bpe", tokenizer.vocabulary).encode(text).tolist() == (
        tokenizer.encode(text).tolist()
    )
