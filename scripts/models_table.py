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

import families  # type: ignore[import-not-found]

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
    """Return the table in Markdown: a row for the families of which the same is true."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, family in sorted(families.FAMILIES.items()):
        rows.setdefault(_columns(family), []).append(label(name))
    kinds = ["yes", "partly", "no"]
    order = sorted(
        rows,
        key=lambda row: (
            kinds.index(row[0].partition(":")[0]),
            *(cell != "yes" for cell in row),
            row,
        ),
    )
    return "\n".join(
        [
            "| attention | residual stream, SAEs | blocks of queries | batches | model types |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join([*row, ', '.join(rows[row])])} |" for row in order),
        ]
    )


def label(name: str) -> str:
    """Return how the table calls a family."""
    model_type, _, variant = name.partition(" ")
    return f"`{model_type}`" + (f" ({variant})" if variant else "")


def _columns(family: Any) -> tuple[str, ...]:
    if family.refused:
        return f"no: {family.refused}", "", "", ""
    return (
        "yes" if family.attention is None else f"partly: other blocks have {family.without}",
        "yes" if family.vectors else "no: several vectors a token",
        "yes" if family.by_blocks else "no",
        "yes" if family.together else "one prompt at a time",
    )


if __name__ == "__main__":
    raise SystemExit(main())
