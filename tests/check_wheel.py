"""`python -m tests.check_wheel dist`: what the wheel and the sdist of a folder hold, and say."""

import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

OF_WHEEL = [
    f"fused_ce/{name}"
    for name in (
        "py.typed", "cross_entropy.py", "kernels/fused.py", "babygpt/train.py",
        "integrations/transformers.py", "integrations/trl.py",
    )
]  # fmt: skip
OF_SDIST = [
    *OF_WHEEL, "pyproject.toml", "setup.py", "Makefile", "constraints.txt", "README.md",
    "CHANGELOG.md", "LICENSE", "kernels/fused.py", "tests/conftest.py",
    "tests/kernels/test_order.py",
    "benchmarks/gpu.py", "benchmarks/results/amd-epyc-2-threads-cpu.json", "docs/guide.md",
    "examples/plain_loop.py",
]  # fmt: skip


def wrong_with_wheel(path: Path) -> Iterator[str]:
    """The only top-level name is fused_ce: `kernels` is another distribution's."""
    wheel = zipfile.ZipFile(path)
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if tops != {"fused_ce"}:
        yield f"top-level names {sorted(tops)}, need fused_ce alone"
    yield from (f"{name} is missing" for name in OF_WHEEL if name not in names)
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode("utf-8")
    links = re.findall(r"\]\((?!https?:)[^)]*\)", text)
    if links:
        yield f"links that lead nowhere on a package index: {links}"
    if "Typing :: Typed" not in text or "# fused_ce" not in text:
        yield "metadata without its classifiers or its long description"


def wrong_with_sdist(path: Path) -> Iterator[str]:
    """It holds what its tests need, and nothing that a test has left."""
    with tarfile.open(path) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers()}
    yield from (f"{name} is missing" for name in OF_SDIST if name not in names)
    yield from (f"{name} does not belong there" for name in names if "__pycache__" in name)


def main(folder: str) -> int:
    """Print what is wrong with the one wheel and the one sdist; 0 if nothing is."""
    (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    problems = [f"{wheel.name}: {problem}" for problem in wrong_with_wheel(wheel)]
    problems += [f"{sdist.name}: {problem}" for problem in wrong_with_sdist(sdist)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{wheel.name} and {sdist.name} hold what they should")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
