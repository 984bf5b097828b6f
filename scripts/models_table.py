"""Write the table of models into a README, or check that it is current.

    python scripts/models_table.py zarrtrace/extraction/README.md [--check]

The table stands between two comments and is made of tests/families.py, whose claims
tests/test_families.py checks against transformers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import families

BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("readme", type=Path, help="file that holds the two comments")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it differs")
    given = parser.parse_args()
    before = given.readme.read_text(encoding="utf-8")
    after = with_table(before)
    if given.check:
        if before != after:
            print(f"{given.readme}: its table of models is not current", file=sys.stderr)
        return int(before != after)
    given.readme.write_text(after, encoding="utf-8")
    return 0


def with_table(text: str) -> str:
    """Return a README's text with the current table.

    Raises
    ------
    SystemExit
        If the two comments are not there, each once and in their order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end) or BEGIN in tail or END in tail:
        raise SystemExit(f"the file must hold {BEGIN} and then {END}, each once")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def table() -> str:
    """Return the table in Markdown."""
    rows = [_row(name, family) for name, family in sorted(families.FAMILIES.items())]
    return "\n".join(
        [
            "| model type | attention | residual stream and SAEs | by blocks | batches |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


def _row(name: str, family: Any) -> tuple[str, ...]:
    model_type, _, variant = name.partition(" ")
    label = f"`{model_type}`" + (f" ({variant})" if variant else "")
    if family.refused:
        return label, f"no: {family.refused}", "", "", ""
    return (
        label,
        "yes" if family.attention is None else f"partly: other blocks have {family.without}",
        "yes" if family.vectors else "no: several vectors a token",
        "yes" if family.by_blocks else "no",
        "yes" if family.together else "one prompt at a time",
    )


if __name__ == "__main__":
    raise SystemExit(main())
