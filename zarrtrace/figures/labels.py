"""Texts as labels: visible white space, known glyphs, room for each."""

from __future__ import annotations

import functools
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text

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
    """Return layer, feature and label, as ``L25 · 250 money``.

    Parameters
    ----------
    layer, feature
        Block and latent.
    labels
        Result of :func:`zarrtrace.index.names_of`.
    limit
        Characters of the label to keep; longer ones end in ``…``.
    """
    text = drawable((labels or {}).get((layer, feature), ""))
    text = text if len(text) <= limit else text[: limit - 1].rstrip() + _ELLIPSIS
    return f"L{layer} · {feature} {text}".rstrip()


def name_points(
    ax: Axes,
    named: Iterable[tuple[str, np.ndarray]],
    points: np.ndarray,
    *,
    most: int,
    size: float = 5.5,
    colour: str = "#555555",
    clear: float = 1.2,
) -> None:
    """Write names beside points, clear of all points and of each other.

    A name stands at the nearest free place around its point, and a line joins them. A name without
    a free place is left out.

    Parameters
    ----------
    ax
        Axes whose limits and size are final.
    named
        Names and their points ``(x, y)`` in data coordinates, the most important ones first.
    points
        All points ``(point, 2)`` that no name may cover.
    most
        Names to write at most.
    size
        Font size in points.
    colour
        Colour of names.
    clear
        Distance of a name from the middle of a point, in points; by default half of a marker.
    """
    scale = _POINTS_PER_INCH / ax.figure.dpi
    space = np.reshape(ax.bbox.extents, (2, 2)) * scale
    obstacles = ax.transData.transform(points) * scale
    boxes: list[np.ndarray] = []
    for name, point in named:
        if len(boxes) == most:
            break
        text = ax.annotate(
            name, tuple(point), (0, 0), textcoords="offset points", fontsize=size, color=colour,
            ha="center", va="center", parse_math=False,
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "lw": 0.3, "color": "#888888", "shrinkB": 1},
        )  # fmt: skip
        measured = Text.get_window_extent(text)  # without its line
        # At 100 dots per inch, hinted letters are a tenth narrower than in print.
        half = np.array([measured.width * 1.1, measured.height]) * scale / 2 + 0.5
        anchor = ax.transData.transform(point) * scale
        offset = _free_offset(anchor, half, space, obstacles, boxes, clear)
        if offset is None:
            text.remove()
            continue
        text.set_position(tuple(offset))
        boxes.append(np.stack([anchor + offset - half, anchor + offset + half]))
        line = _line(anchor, offset)
        obstacles = np.concatenate([obstacles, line[~_inside(line, boxes[-1])]])


def _free_offset(
    anchor: np.ndarray, half: np.ndarray, space: np.ndarray, obstacles: np.ndarray,
    boxes: Sequence[np.ndarray], clear: float,
) -> np.ndarray | None:  # fmt: skip
    """Return the nearest offset at which a box is in `space` and clear of all else."""
    for offset in _around(half):
        box = np.stack([anchor + offset - half, anchor + offset + half])
        line = _line(anchor, offset)
        if not (
            (box[0] < space[0]).any()
            or (box[1] > space[1]).any()
            or _inside(obstacles, box, clear).any()
            or any(_inside(line, other).any() or _overlap(box, other) for other in boxes)
        ):
            return offset
    return None


def _line(anchor: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return points on the line from a point to the middle of its name."""
    return np.asarray(anchor + np.linspace(0.0, 1.0, 20)[:, None] * offset)


def _around(half: np.ndarray) -> Iterator[np.ndarray]:
    """Yield offsets of a box around a point, the nearest first."""
    turns = np.radians([0, 180, 25, 155, -25, -155, 50, 130, -50, -130, 90, -90])
    for distance in (3, 7, 12, 18, 26, 36, 48, 62):
        for turn in turns:
            yield np.array([np.cos(turn), np.sin(turn)]) * (half + distance)


def _inside(points: np.ndarray, box: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Whether points are in a box ``(corner, xy)`` with a margin."""
    found = (points > box[0] - margin) & (points < box[1] + margin)
    return np.asarray(found.all(axis=1))


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(((one[0] < other[1]) & (other[0] < one[1])).all())


def drawable(text: str) -> str:
    """Return `text` with characters that the font lacks as code points.

    Spaces stay as they are: texts are names of scenarios, spans and models.
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
        Number of positions.
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
        Rotation of the labels, in degrees.
    limit
        Characters of a label to keep.
    """
    shown = thinned(len(texts), inches, size, keep)
    axis.set_ticks(shown, labels=[token_label(texts[i], limit=limit) for i in shown])
    for position, label in zip(shown, axis.get_ticklabels(), strict=True):
        label.set(fontsize=size, rotation=rotation, parse_math=False)
        if colours and position in colours:
            label.set(color=colours[position])
