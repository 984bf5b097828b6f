"""HTML of the page of figures; every text is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from zarrtrace.figures.files import PAGE_MARK
from zarrtrace.text import html_text

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #555; --line: #ccc; --paper: #fff;
        --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #aaa; --line: #444; --paper: #14171c; --link: #8ab8ff; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
a { color: var(--link); }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
h3 { margin: 0 0 0.5rem; font-size: 1rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
           gap: 2rem 1.5rem; }
figure { margin: 0; }
/* Figures are printed on white, on dark pages too. */
figure img { width: 100%; height: 15rem; object-fit: contain; background: #fff;
             box-sizing: border-box; padding: 0.5rem; border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: 0.9rem; }
code { font-size: 0.85rem; user-select: all; }
dt { font-weight: 600; } dd { margin: 0 0 0.3rem; }
"""
_POLICY = "script-src 'none'; object-src 'none'; base-uri 'none'"
_NAMES = {"model": "Model", "sae_release": "SAE release", "zarrtrace_version": "Extracted with "
          "zarrtrace", "figures_version": "Drawn with zarrtrace"}  # fmt: skip


def opening(title: str, metadata: Mapping[str, str], note: str, sections: Sequence[str]) -> str:
    """Return the page up to its first section.

    Parameters
    ----------
    title
        Title of the page.
    metadata
        Result of :func:`zarrtrace.figures.metadata_of`.
    note
        A sentence below the title; may be empty.
    sections
        Names of the sections that :func:`section` starts, in order.
    """
    facts = "".join(
        f"<dt>{html_text(label)}</dt><dd>{html_text(metadata[key])}</dd>"
        for key, label in _NAMES.items()
        if key in metadata
    )
    links = "\n".join(
        f'<a href="#s{number}">{html_text(name)}</a>' for number, name in enumerate(sections)
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            PAGE_MARK,
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html_text(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{html_text(title)}</h1>",
            f"<p>{html_text(note)}</p>" if note else "",
            f"<dl>{facts}</dl><nav>{links}</nav>",
        ]
    )


def section(number: int, name: str, path: str, view: Mapping[str, str]) -> str:
    """Return a scenario's heading and the command that opens the viewer."""
    command = shlex.join(["zarrtrace", "view", path, "--show", urlencode(view, quote_via=quote)])
    return (
        f'<h2 id="s{number}">{html_text(name)}</h2>\n'
        f"<p>In the viewer: <code>{html_text(command)}</code></p>"
    )


def thumbnails(items: Sequence[str]) -> str:
    """Return a grid of pictures, each made by :func:`thumbnail`."""
    return '<div class="figures">\n' + "\n".join(items) + "\n</div>"


def thumbnail(title: str, caption: str, files: Sequence[str]) -> str:
    """Return a picture that opens in full, with caption and files."""
    links = " · ".join(
        f'<a href="{quote(file)}">{html_text(Path(file).suffix[1:].upper())}</a>' for file in files
    )
    image = next((file for file in files if file.endswith(".png")), None)
    shown = (
        f'<a href="{quote(image)}">'
        f'<img src="{quote(image)}" loading="lazy" alt="{html_text(title)}"></a>'
        if image
        else ""
    )
    return (
        f"<figure><h3>{html_text(title)}</h3>{shown}"
        f"<figcaption>{html_text(caption)} {links}</figcaption></figure>"
    )


def not_drawn(reasons: Mapping[tuple[str, str], Sequence[str]]) -> str:
    """Return a list of figures that were not drawn.

    Parameters
    ----------
    reasons
        By title and reason, the scenarios.
    """
    if not reasons:
        return ""
    items = "".join(
        f"<li><b>{html_text(title)}</b> ({html_text(', '.join(where))}): {html_text(why)}</li>"
        for (title, why), where in reasons.items()
    )
    return f"<h2>Not drawn</h2><ul>{items}</ul>"
