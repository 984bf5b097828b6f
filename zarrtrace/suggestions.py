"""Remedies for names that do not exist: the one that was probably meant, and those there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

_SHOWN = 20
# Comparing takes about 20 microseconds a name.
_COMPARED = 20_000


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like `name`; None if none is like it."""
    import difflib  # noqa: PLC0415 -- needed for mistakes only

    names = list(itertools.islice(known, _COMPARED))
    folded = {one.casefold(): one for one in reversed(names)}
    found = difflib.get_close_matches(name.casefold(), folded, n=1)
    return folded[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str], *, label: str = "There are") -> str:
    """Return the remedy for a name that does not exist.

    Parameters
    ----------
    name
        The unknown name.
    known
        The names that exist.
    label
        How the list of them begins.

    Examples
    --------
    >>> did_you_mean("balence", ["goal", "balance"])
    "Did you mean 'balance'? There are: goal, balance."
    """
    names = list(known)
    near = closest(name, names)
    more = len(names) - _SHOWN
    listed = ", ".join(names[:_SHOWN]) or "none"
    return (
        (f"Did you mean {near!r}? " if near is not None else "")
        + f"{label}: {listed}"
        + (f" and {more} more." if more > 0 else ".")
    )


def closest_path(path: Path) -> Path | None:
    """Return the existing path that differs from `path` in one misspelt name; None if none does."""
    for at in range(1, len(path.parts) + 1):
        here = Path(*path.parts[:at])
        if here.exists():
            continue
        try:
            near = closest(here.name, (one.name for one in here.parent.iterdir()))
        except OSError:  # the parent is a file, or may not be listed
            return None
        found = None if near is None else here.with_name(near).joinpath(*path.parts[at:])
        return found if found is not None and found.exists() else None
    return None
