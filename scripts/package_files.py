"""Compare the files of an sdist and a wheel with those that git tracks.

An sdist holds what is tracked but the settings of this repository; a wheel holds ``zarrtrace/``.

    python scripts/package_files.py dist/*
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Tracked files that an sdist leaves out.
LEFT_OUT = (".ci/",)
#: Files that the build adds.
ADDED = {"PKG-INFO"}


def tracked() -> set[str]:
    """Return the files that git tracks and that are still there."""
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}


def of_sdist(path: Path) -> set[str]:
    """Return the files of an sdist, without the folder that holds them."""
    with tarfile.open(path) as archive:
        names = [member.name for member in archive if not member.isdir()]
    return {name.partition("/")[2] for name in names} - ADDED


def of_wheel(path: Path) -> set[str]:
    """Return the files of a wheel that belong to no metadata."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return {name for name in names if ".dist-info/" not in name}


def main() -> None:
    """Fail if a distribution lacks a tracked file or holds another one."""
    known = tracked()
    wrong = False
    for path in map(Path, sys.argv[1:]):
        if path.suffix == ".whl":
            found, wanted = of_wheel(path), {one for one in known if one.startswith("zarrtrace/")}
        else:
            found = of_sdist(path)
            wanted = {one for one in known if not one.startswith(LEFT_OUT)}
        print(f"{path.name}: {len(found)} files, {path.stat().st_size / 1e6:.1f} MB")
        for said, names in (("lacks", wanted - found), ("also holds", found - wanted)):
            wrong = wrong or bool(names)
            print(*(f"  {said} {name}" for name in sorted(names)), sep="\n", end="\n" * bool(names))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
