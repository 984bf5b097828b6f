"""Token text as labels: visible white space, no glyph that the font lacks, thinned when crowded."""

from __future__ import annotations

import functools
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties, findfont, get_font

#: Labels of features by layer and feature.
FeatureLabels = Mapping[tuple[int, int], str]

_VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_ELLIPSIS = "…"
# Distance from line to line, in units of the font size, below which labels touch.
_LINE = 1.15
_POINTS_PER_INCH = 72


def token_label(text: str, *, limit: int = 14) -> str:
    r"""Return a token's text as it can be drawn and told apart.

    Parameters
    ----------
    text
        A token's text.
    limit
        Characters to keep; longer labels end in ``…``.

    Returns
    -------
    str
        ``·`` for a space, ``↵`` for a newline, ``⇥`` for a tab; ``<U+1F3B0>`` for what has no glyph
        in the current font (``rcParams["font.family"]``, which may name several) or none at all
        (control, format and combining characters); ``""`` (two quotes) for an empty token.

    Examples
    --------
    >>> token_label(" balance"), token_label(".\n")
    ('·balance', '.↵')
    """
    pieces = [_drawn(character) for character in text] or ['""']
    if sum(map(len, pieces)) <= limit:
        return "".join(pieces)
    kept, room = [], limit - len(_ELLIPSIS)
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        kept.append(piece)
    return "".join(kept or pieces[:1]) + _ELLIPSIS


def feature_label(
    layer: int, feature: int, labels: FeatureLabels | None = None, *, limit: int = 24
) -> str:
    """Return a layer and a feature with its label, as ``L25 · 250 money``.

    Parameters
    ----------
    layer, feature
        Block and latent.
    labels
        What :func:`zarrtrace.index.names_of` returned.
    limit
        Characters of the label to keep; longer ones end in ``…``.
    """
    text = drawable((labels or {}).get((layer, feature), ""))
    text = text if len(text) <= limit else text[: limit - 1].rstrip() + _ELLIPSIS
    return f"L{layer} · {feature} {text}".rstrip()


def drawable(text: str) -> str:
    """Return `text` with every character that the font lacks written as its code point.

    For names (scenarios, spans, models), whose spaces stay as they are.
    """
    return "".join(c if c == " " else _drawn(c) for c in text)


def wrapped(text: str, width: int) -> str:
    """Return `text` in lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(text, width))


def _drawn(character: str) -> str:
    visible = _VISIBLE.get(character, character)
    # Right-to-left overrides and joiners change their neighbours, combining marks sit on them.
    if unicodedata.category(character)[0] in "CM" and character not in _VISIBLE:
        return f"<U+{ord(character):04X}>"
    return visible if ord(visible) in _glyphs() else f"<U+{ord(character):04X}>"


def _glyphs() -> frozenset[int]:
    return _glyphs_of(tuple(mpl.rcParams["font.family"]), tuple(mpl.rcParams["font.sans-serif"]))


@functools.lru_cache(maxsize=8)
def _glyphs_of(families: tuple[str, ...], _sans: tuple[str, ...]) -> frozenset[int]:
    # The second argument is only a key: it decides what the family "sans-serif" means.
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    return frozenset().union(*(font.get_charmap() for font in fonts))


def thinned(count: int, inches: float, size: float, keep: Iterable[int] = ()) -> list[int]:
    """Choose which of `count` labels fit side by side along an axis.

    Parameters
    ----------
    count
        How many positions there are.
    inches
        Length of the axis.
    size
        Font size in points.
    keep
        Positions that go first, in order of importance.

    Returns
    -------
    list of int
        Sorted positions, no two nearer than a line's height.
    """
    fits = max(1, math.floor(inches * _POINTS_PER_INCH / (size * _LINE)))
    gap = max(1, math.ceil(count / fits))
    chosen: set[int] = set()
    for position in (*keep, *range(0, count, gap)):
        if chosen.isdisjoint(range(position - gap + 1, position + gap)):
            chosen.add(position)
    return sorted(chosen)


def label_tokens(
    axis: Axis,
    texts: Sequence[str],
    *,
    inches: float,
    keep: Iterable[int] = (),
    colours: dict[int, str] | None = None,
    size: float = 5.5,
    rotation: float = 0,
    limit: int = 14,
) -> None:
    """Put token texts on an axis, where there is room for them.

    Parameters
    ----------
    axis
        ``ax.xaxis`` or ``ax.yaxis`` of an image with one cell a token.
    texts
        Texts of all tokens.
    inches
        Length of the axis.
    keep
        Tokens whose label goes first.
    colours
        Colours of some tokens' labels.
    size
        Font size in points.
    rotation
        Of the labels, in degrees.
    limit
        Characters of a label to keep.
    """
    shown = thinned(len(texts), inches, size, keep)
    axis.set_ticks(shown, labels=[token_label(texts[i], limit=limit) for i in shown])
    for position, label in zip(shown, axis.get_ticklabels(), strict=True):
        label.set(fontsize=size, rotation=rotation, parse_math=False)
        if colours and position in colours:
            label.set(color=colours[position])
