"""`python -m tests.check_wheel dist`: the wheel holds fused_ce, kernels inside it, nothing else."""

import sys
import zipfile
from pathlib import Path


def main(folder: str) -> int:
    """Print what is wrong with the one wheel of a folder; 0 if nothing is."""
    (wheel,) = Path(folder).glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    needed = {
        f"fused_ce/{name}.py"
        for name in ("cross_entropy", "kernels/fused", "babygpt/train", "integrations/transformers")
    }
    problems = (
        [f"top-level names {sorted(tops)}, need fused_ce alone"] if tops != {"fused_ce"} else []
    )
    problems += [f"{name} is missing" for name in sorted(needed - set(names))]
    for problem in problems:
        print(f"{wheel.name}: {problem}", file=sys.stderr)
    if not problems:
        print(f"{wheel.name}: {len(names)} files under fused_ce/")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
