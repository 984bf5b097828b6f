"""Look the pinned versions up in the advisories of PyPI, and say what could not be looked up.

pip-audit itself ends well where it could not look anything up.

    python scripts/audit.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parent / "constraints.txt"


def main() -> None:
    """Fail if a version is known to be vulnerable."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json"]
    command += ["--progress-spinner", "off", "--requirement", str(CONSTRAINTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"pip-audit: NOT AUDITED, the advisories cannot be reached\n{done.stderr[-300:]}")
        return
    skipped = [one["name"] for one in found if "skip_reason" in one]
    vulnerable = [one for one in found if one.get("vulns")]
    print(f"pip-audit: {len(found) - len(skipped)} packages audited", end="")
    print(f", {len(skipped)} NOT AUDITED: the index does not know them" if skipped else "")
    for one in vulnerable:
        ids = ", ".join(vulnerability["id"] for vulnerability in one["vulns"])
        print(f"  {one['name']} {one['version']}: {ids}")
    if vulnerable:
        sys.exit(1)


if __name__ == "__main__":
    main()
