"""Text to tokens and back: characters, or byte-level BPE; either is made again from one string."""

import codecs
import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fused_ce.babygpt.errors import UserError

# Takes more tokens and returns the text that is complete; with final=True also what is not.
IncrementalDecoder = Callable[..., str]

# Bytes of a word that BPE learns from as one: its time grows with their square, and a text without
# spaces, of genes say, is one word.
LONGEST_WORD = 256


class Tokenizer(Protocol):
    """What a tokenizer has; `make_tokenizer(kind, vocabulary)` makes an equal one."""

    @property
    def kind(self) -> str:
        """ "chars" or "bpe"."""
        ...

    @property
    def unit(self) -> str:
        """What a person calls a token."""
        ...

    @property
    def vocabulary(self) -> str:
        """Everything that it learnt."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        ...

    @property
    def start(self) -> str:
        """What a text without a prompt is taken to follow."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, (n,) uint16 or uint32."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens."""
        ...

    def incremental_decoder(self) -> IncrementalDecoder:
        """Return `decode(tokens, final=False)` for a text whose tokens come bit by bit."""
        ...


class CharTokenizer:
    """One token for each character of a vocabulary; tokens follow the order of code points."""

    kind = "chars"
    unit = "character"

    def __init__(self, vocabulary: str):
        """Take the distinct characters of any text as the vocabulary."""
        if not vocabulary:
            raise UserError("a vocabulary needs at least one character, got none")
        self.vocabulary = "".join(sorted(set(vocabulary)))
        self._code_points = _code_points(self.vocabulary)

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return len(self.vocabulary)

    @property
    def start(self) -> str:
        """A line break, else the first character."""
        return "\n" if "\n" in self.vocabulary else self.vocabulary[0]

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, (len(text),) uint16 or uint32.

        Raises:
            UserError: the text has characters that the vocabulary lacks; the message names them.
        """
        code_points = _code_points(text)
        tokens = np.searchsorted(self._code_points, code_points)
        tokens = np.minimum(tokens, self.vocab_size - 1)
        unknown = np.unique(code_points[self._code_points[tokens] != code_points])
        if len(unknown):
            names = ", ".join(f"{chr(c)!r} (U+{c:04X})" for c in unknown[:10].tolist())
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise UserError(f"the model's vocabulary lacks the characters {names}{more}")
        return tokens.astype(token_dtype(self.vocab_size))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens."""
        return "".join(self.vocabulary[token] for token in tokens)

    def incremental_decoder(self) -> IncrementalDecoder:
        """Return `decode(tokens, final=False)`: a token is a character, so all text is complete."""
        return lambda tokens, final=False: self.decode(tokens)


class BPETokenizer:
    """Byte-level BPE: frequent sequences of bytes are tokens, and so is every single byte.

    Any text has tokens, and they give it back exactly. The vocabulary is the JSON of the
    `tokenizers` library.
    """

    kind = "bpe"
    unit = "token"
    start = "\n"

    def __init__(self, vocabulary: str):
        """Take the JSON of a tokenizer that `train` made.

        Raises:
            UserError: it is not that, or the tokenizers library is not installed.
        """
        library = _tokenizers()
        try:
            self._bpe = library.Tokenizer.from_str(vocabulary)
            byte_of = _byte_of_character()
            names = sorted(self._bpe.get_vocab().items(), key=lambda item: item[1])
            self._bytes = [bytes(byte_of[character] for character in name) for name, _ in names]
            tokens = [token for _, token in names]
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"the vocabulary is not one of byte-level BPE: {error}") from None
        if tokens != list(range(len(tokens))) or not {bytes([b]) for b in range(256)} <= set(
            self._bytes
        ):
            raise UserError("the vocabulary of byte-level BPE needs a token for each of 256 bytes")
        self.vocabulary = vocabulary

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "BPETokenizer":
        """Learn from a text; the same text always gives the same tokenizer.

        Args:
            text: what to learn from: the training split alone.
            vocab_size: tokens to have at most, 256 or more; a short text has fewer to learn.

        Raises:
            UserError: vocab_size is too small, or the tokenizers library is not installed.
        """
        if vocab_size < 256:
            raise UserError(f"byte-level BPE needs at least 256 tokens, got {vocab_size}")
        library = _tokenizers()
        bpe = library.Tokenizer(library.models.BPE())
        words = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        pieces = library.pre_tokenizers.Split(
            library.Regex(f".{{1,{LONGEST_WORD}}}"), behavior="isolated"
        )
        bpe.pre_tokenizer = library.pre_tokenizers.Sequence([words, pieces])
        bpe.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(_byte_of_character()),
            show_progress=False,
        )
        bpe.train_from_iterator([text], trainer)
        bpe.pre_tokenizer = words  # to encode a long word takes no time
        return cls(bpe.to_str())

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return len(self._bytes)

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, (n,) uint16 or uint32.

        Raises:
            UserError: the text has half a surrogate pair, which UTF-8 cannot write.
        """
        try:
            tokens = self._bpe.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):  # both say it, in different versions
            raise UserError("the text is not Unicode: UTF-8 cannot write it") from None
        return np.array(tokens, dtype=token_dtype(self.vocab_size))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.incremental_decoder()(tokens, final=True)

    def incremental_decoder(self) -> IncrementalDecoder:
        """Return `decode(tokens, final=False)`, which keeps the bytes of half a character back."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")

        def decode(tokens: Sequence[int], final: bool = False) -> str:
            return utf8.decode(b"".join(self._bytes[token] for token in tokens), final)

        return decode


TOKENIZERS: dict[str, type[CharTokenizer] | type[BPETokenizer]] = {
    "chars": CharTokenizer, "bpe": BPETokenizer,
}  # fmt: skip


def make_tokenizer(kind: str, vocabulary: str) -> Tokenizer:
    """Return the tokenizer that had this kind and vocabulary.

    Raises:
        UserError: there is no such kind, or the vocabulary is not one of it.
    """
    if kind not in TOKENIZERS:
        raise UserError(f"--tokenizer must be one of {', '.join(TOKENIZERS)}, got {kind!r}")
    return TOKENIZERS[kind](vocabulary)


def train_tokenizer(kind: str, text: str, train_text: str, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a text.

    Args:
        kind: "chars" takes every character of the text, "bpe" learns from its training split.
        text: all of it.
        train_text: its training split.
        vocab_size: tokens that "bpe" may have; "chars" has as many as there are characters.

    Raises:
        UserError: there is no such kind, or vocab_size is too small for it.
    """
    if kind == BPETokenizer.kind:
        return BPETokenizer.train(train_text, vocab_size)
    return make_tokenizer(kind, text)


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return the hash that a tokenizer is known by."""
    content = f"{tokenizer.kind}\n{tokenizer.vocabulary}"
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the smaller of uint16 and uint32 that holds every token."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _code_points(text: str) -> np.ndarray:
    # A prompt of bytes that are not UTF-8 arrives as lone surrogates: to be named, not to fail.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    GPT-2 writes a byte that is a printable character of Latin-1 as that character, and the others,
    in their order, as those from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + i): byte for i, byte in enumerate(others)},
    }


def _tokenizers():
    """Import the tokenizers library, which only BPE needs."""
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise UserError("--tokenizer bpe needs tokenizers: pip install 'fused_ce[train]'") from None
    return tokenizers
