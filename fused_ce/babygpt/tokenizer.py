"""Characters to tokens and back."""

import numpy as np

from fused_ce.babygpt.errors import UserError


class CharTokenizer:
    """One token for each character of a vocabulary; tokens follow the order of code points."""

    def __init__(self, vocabulary: str):
        """Take the distinct characters of any text as the vocabulary."""
        self.vocabulary = "".join(sorted(set(vocabulary)))
        self._code_points = _code_points(self.vocabulary)

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return len(self.vocabulary)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smaller of uint16 and uint32 that holds every token."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

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
        return tokens.astype(self.dtype)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of the tokens."""
        return "".join(self.vocabulary[token] for token in tokens)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
