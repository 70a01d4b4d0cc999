"""Where the text comes from: a corpus that is always there, or any UTF-8 file."""

from pathlib import Path

from fused_ce.babygpt.errors import UserError


def pydocs() -> str:
    """Return the help texts of the Python language: half a million characters, no download."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


CORPORA = {"pydocs": pydocs}


def read_text(data: str) -> str:
    """Return the text of a corpus by its name, or of a file by its path.

    Raises:
        UserError: there is no such corpus or file, or the file is not UTF-8 text.
    """
    if data in CORPORA:
        return CORPORA[data]()
    path = Path(data)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"--data must be {' or '.join(CORPORA)} or a text file, {data!r} {what}")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data must be UTF-8 text, {data!r} is not: {error.reason} at byte {error.start}"
        ) from None
    if len(text) < 2:
        raise UserError(f"--data must have at least 2 characters, {data!r} has {len(text)}")
    return text
