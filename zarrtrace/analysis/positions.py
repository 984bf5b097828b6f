"""Places in a prompt: spans, token positions, and those that a trace stores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xarray as xr

from zarrtrace.analysis.tables import Before, is_table, table_spans
from zarrtrace.analysis.traces import Scenarios, scenario_of, trace_attributes, traces
from zarrtrace.errors import ConfigError, ScenarioError
from zarrtrace.scenarios import DECISION, span
from zarrtrace.suggestions import did_you_mean

#: A span's name, a token position (negative from the end), several positions, or where a span is
#: decided.
Place = str | int | Sequence[int] | Before


def has_span(ds: xr.Dataset, name: str) -> bool:
    """Tell whether a trace has the span `name`."""
    return name in trace_attributes(ds)["spans"]


def span_names(data: Scenarios) -> list[str]:
    """Return the spans of any scenario, in order of first use, ``decision`` last."""
    if is_table(data):
        return table_spans(data)
    found = dict.fromkeys(n for ds in traces(data).values() for n in trace_attributes(ds)["spans"])
    return [n for n in found if n != DECISION] + ([DECISION] if DECISION in found else [])


def spans_before(data: Scenarios, targets: Sequence[Place]) -> list[str]:
    """Return the spans that targets can attend to, without the decision.

    Spans of generated text are none of them where all targets are in the prompt.
    """
    runs = traces(data).values()
    names = [name for name in span_names(data) if name != DECISION]
    return [name for name in names if any(_is_before(ds, name, targets) for ds in runs)]


def _is_before(ds: xr.Dataset, name: str, targets: Sequence[Place]) -> bool:
    if not has_span(ds, name):
        return False
    first = min(span(ds, name), default=0)
    generation = ds.attrs.get("generation")
    if generation is None or first < generation["prompt_tokens"]:
        return True
    return any(max(positions(ds, target)) >= first for target in present(ds, targets))


def positions(ds: xr.Dataset, place: Place) -> list[int]:
    """Return the token positions (labels of ``key``) of a place.

    Not each of them need be stored: :func:`stored_positions`, :func:`require_queries`.

    Parameters
    ----------
    ds
        A trace, or a part of one.
    place
        A span's name, a position (negative from the end), or several.

    Raises
    ------
    ScenarioError
        If the trace has no such span or no such position.
    """
    if isinstance(place, str):
        trace_attributes(ds)
        found = span(ds, place)
    elif isinstance(place, Before):
        found = [span(ds, place.span)[0] - 1]
    else:
        tokens = token_labels(ds)
        given = [int(place)] if isinstance(place, int | np.integer) else [int(i) for i in place]
        found = [int(tokens[i]) if -len(tokens) <= i < 0 else i for i in given]
    have = set(token_labels(ds).tolist())
    outside = [position for position in found if position not in have]
    if outside or not found:
        raise ScenarioError(
            f"{scenario_of(ds)}: {label(place)!r} covers "
            + (f"token {outside[0]}, which is not there" if outside else "no token"),
            why=f"The trace has {len(have)} tokens, positions {min(have)} to {max(have)}."
            if have
            else "The trace has no tokens.",
            remedy="Give a span or positions of these tokens.",
        )
    return found


def stored_positions(ds: xr.Dataset, place: Place) -> list[int]:
    """Return the token positions (labels of ``query``) of a place, all of which are stored.

    Raises
    ------
    ConfigError
        If one of them is not stored: the scenario was extracted with chosen positions.
    ScenarioError
        As :func:`positions`.
    """
    found = positions(ds, place)
    absent = sorted(set(found) - set(query_labels(ds).tolist()))
    if absent:
        raise not_stored(ds, "token", absent)
    return found


def query_labels(ds: xr.Dataset) -> np.ndarray:
    """Return the token positions that a trace (or a part of one) stores."""
    return np.asarray(ds["query"].values)


def token_labels(ds: xr.Dataset) -> np.ndarray:
    """Return the token positions that a trace (or a part of one) has as keys: the prompt's."""
    return np.asarray(ds["key"].values)


def not_stored(ds: xr.Dataset, what: str, absent: list[int]) -> ConfigError:
    """Return the error that a trace does not store something at token positions."""
    others = f" (nor of {len(absent) - 1} others)" if len(absent) > 1 else ""
    return ConfigError(
        f"{scenario_of(ds)}: {what} {absent[0]} is not stored{others}",
        why="The scenario was extracted with chosen positions (--positions or "
        "--attention-positions), or this is a part of a trace.",
        remedy="Choose among the stored positions, or extract the scenario with more of them.",
    )


def label(place: Place) -> str:
    """Return what a place is called in results."""
    if isinstance(place, str):
        return place
    if isinstance(place, Before):
        return f"before {place.span}"
    if isinstance(place, int | np.integer):
        return str(int(place))
    return ",".join(str(int(i)) for i in place)


def as_places(given: Place | Sequence[Place]) -> tuple[list[Place], bool]:
    """Return the places `given`, and whether they were a list of places.

    Several integers are one place; a sequence with a name in it is several.
    """
    if isinstance(given, str | int | np.integer | Before):
        return [given], False
    whole = [item for item in given if isinstance(item, int | np.integer)]
    if whole and len(whole) == len(given):
        return [[int(item) for item in whole]], False
    return list(given), True


def present(ds: xr.Dataset, places: Iterable[Place]) -> list[Place]:
    """Return those of `places` that a trace has: only span names can be absent."""
    return [place for place in places if (name := _span_of(place)) is None or has_span(ds, name)]


def _span_of(place: Place) -> str | None:
    """Return the span that a place is given by."""
    return place.span if isinstance(place, Before) else place if isinstance(place, str) else None


def require_places(data: Scenarios, places: Iterable[Place]) -> None:
    """Refuse a span that no scenario has.

    Raises
    ------
    ScenarioError
        Naming the span and those that exist.
    """
    known = span_names(data)
    for name in map(_span_of, places):
        if name is not None and name not in known:
            raise ScenarioError(
                f"no scenario has a span {name!r}",
                why="Spans are named in the scenarios file.",
                remedy=did_you_mean(name, known),
            )


def stored_queries(ds: xr.Dataset) -> np.ndarray:
    """Return the positions whose rows of attention are stored."""
    dim = "attention_query" if "attention_query" in ds.dims else "query"
    return np.asarray(ds[dim].values)


def require_queries(ds: xr.Dataset, wanted: Iterable[int]) -> None:
    """Refuse rows of attention that were not stored.

    Raises
    ------
    ConfigError
        Naming the scenario and a row.
    """
    absent = sorted(set(wanted) - set(stored_queries(ds).tolist()))
    if absent:
        raise not_stored(ds, "attention of token", absent)
