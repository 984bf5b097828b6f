"""Templates: values in braces, spans in marks."""

from __future__ import annotations

import re
from collections.abc import Mapping

from zarrtrace.errors import ScenarioError
from zarrtrace.scenarios.names import DECISION, IDENTIFIER
from zarrtrace.scenarios.spans import CharRange
from zarrtrace.suggestions import closest

_MARK = rf"\[\[(?P<mark>{IDENTIFIER}):|(?P<close>\]\])"
_MARK_TOKEN = re.compile(rf"{_MARK}|(?P<value>(?!))")
_TEMPLATE_TOKEN = re.compile(rf"\{{\{{|\}}\}}|\{{(?P<value>{IDENTIFIER})\}}|{_MARK}|[{{}}]")


def value_names(template: str) -> list[str]:
    """Return the names of the values that a template takes."""
    found = (match["value"] for match in _TEMPLATE_TOKEN.finditer(template))
    return list(dict.fromkeys(name for name in found if name))


def render_template(
    template: str, values: Mapping[str, object]
) -> tuple[str, dict[str, tuple[CharRange, ...]]]:
    """Fill a template and find its marked spans.

    Parameters
    ----------
    template
        ``{name}`` takes a value, ``[[span:text]]`` marks a span (values may stand inside, other
        marks may not), ``{{`` and ``}}`` are braces. A span marked twice has two ranges.
    values
        Values by name; a list or tuple is joined with ``", "``. Values are text, never template.

    Returns
    -------
    prompt, spans
        The text, and the character ranges of each marked span in it.

    Raises
    ------
    ScenarioError
        If a value is missing, a mark is nested, empty or not closed, or a brace stands alone.
    """
    return _rendered(template, _TEMPLATE_TOKEN, values)


def read_marks(text: str) -> tuple[str, dict[str, tuple[CharRange, ...]]]:
    """Take marks ``[[span:text]]`` out of a prompt, whose other characters are literal.

    Returns
    -------
    prompt, spans
        As of :func:`render_template`.

    Raises
    ------
    ScenarioError
        If a mark is nested, empty or not closed.
    """
    return _rendered(text, _MARK_TOKEN, {})


def _rendered(
    template: str, tokens: re.Pattern[str], values: Mapping[str, object]
) -> tuple[str, dict[str, tuple[CharRange, ...]]]:
    out: list[str] = []
    length = at = 0
    opened: tuple[str, int] | None = None
    spans: dict[str, list[CharRange]] = {}
    for match in tokens.finditer(template):
        text = template[at : match.start()]
        at = match.end()
        token, start = match[0], length + len(text)
        if match["value"]:
            text += _render_value(match["value"], values)
        elif match["mark"]:
            if opened or match["mark"] == DECISION:
                raise ScenarioError(
                    f"the text opens span {match['mark']!r} "
                    + (f"inside span {opened[0]!r}" if opened else "by mark"),
                    remedy=f"Marks do not nest, and {DECISION!r} is always the last token.",
                )
            opened = (match["mark"], start)
        elif match["close"]:
            if opened is None:
                text += token
            else:
                name, begin = opened
                if begin == start:
                    raise ScenarioError(f"span {name!r} is empty", remedy="Mark some text.")
                spans.setdefault(name, []).append((begin, start))
                opened = None
        elif token in ("{{", "}}"):
            text += token[0]
        else:
            raise ScenarioError(
                f"the template has a lone {token!r} at character {match.start()}",
                remedy="Write '{{' or '}}' for a brace; '{name}' takes a value.",
            )
        out.append(text)
        length += len(text)
    if opened:
        raise ScenarioError(
            f"span {opened[0]!r} is never closed", remedy="Write [[name:text]] around its text."
        )
    out.append(template[at:])
    return "".join(out), {name: tuple(ranges) for name, ranges in spans.items()}


def text_of(name: str, value: object) -> str:
    """Return a value as a prompt holds it."""
    try:
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        raise ScenarioError(
            f"value {name!r} is a number with too many digits", remedy="Write it as text."
        ) from None


def _render_value(name: str, values: Mapping[str, object]) -> str:
    if name not in values:
        close = closest(name, values)
        hint = f" Did you mean {close!r}?" if close else ""
        raise ScenarioError(
            f"the template needs a value {name!r}",
            remedy=f"Add it to 'values' or 'defaults'.{hint}",
        )
    return text_of(name, values[name])
