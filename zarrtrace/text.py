"""Text from elsewhere (files, models, prompts, servers) made safe for where it is shown.

One function a medium. All of them write control, format and bidirectional characters as escapes:
raw, they clear a terminal, fill the clipboard (OSC 52), or reorder what stands beside them.
"""

from __future__ import annotations

import re
import unicodedata

_MARKDOWN = re.compile(r"([`*_{}\[\]<>()#+!~$&-])")
# Readers of tables differ on backslashes before the end of a cell.
_MARKDOWN_ENTITIES = {ord("\\"): "&#92;", ord("|"): "&#124;"}

_REMOVED = "***"
# The password of an address may hold characters that should have been quoted; a port is none.
_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://[^\s/@:?#]*:)(?!\d+/)[^\s'\"]*@", re.IGNORECASE)
_WEB_USER = re.compile(r"(https?://)[^\s/@:?#'\"]+@", re.IGNORECASE)
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s?#'\"<>]*[?#])[^\s'\"<>:]*", re.IGNORECASE)
# Arrays of a trace or an index are no secrets.
_ARRAYS = r"(?:next|key|query)_token|token_(?:id|activation|scenario|position)"
_SETTING = re.compile(
    rf"(?<![\w-])((?!skip_|{_ARRAYS})[\w-]*(?:signature|secret|password|passphrase|token|credential|access_?key|account_?key|\bsig)"
    r"[\w-]*(?:=|['\"]\s*:\s*)['\"]?)[^\s&'\",;)]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"(\b(?:bearer|basic|sharedkey)\s+)[^\s'\",;]{8,}", re.IGNORECASE)


def terminal_text(text: str, *, lines: bool = False) -> str:
    r"""Return text that a terminal shows and does not obey.

    Parameters
    ----------
    text
        Any text.
    lines
        Whether it may have several lines; otherwise ``\n`` is written as an escape, too.

    Examples
    --------
    >>> terminal_text("a\x1b[2Jb\u202ec")
    'a\\x1b[2Jb\\u202ec'
    """
    if text.isprintable():  # nearly all is
        return text
    return "".join(
        one if _is_harmless(one) or (lines and one == "\n") else _escape(one) for one in text
    )


def _is_harmless(character: str) -> bool:
    # Spaces of other scripts are not "printable", but do nothing.
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def markdown_text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line, also within a table."""
    plain = terminal_text(" ".join(text.split()))
    parts = (part.translate(_MARKDOWN_ENTITIES) for part in _MARKDOWN.split(plain))
    return "".join(f"\\{part}" if at % 2 else part for at, part in enumerate(parts))


def html_text(text: str) -> str:
    """Return text that HTML shows as it is, within an element or a quoted attribute."""
    import html  # noqa: PLC0415 -- its table of entities takes longer than the command line's help

    return html.escape(terminal_text(text))


def without_secrets(text: str) -> str:
    """Return text without what gives access: passwords, signatures and queries of addresses.

    Examples
    --------
    >>> without_secrets("https://host/run?X-Amz-Signature=0123: not found")
    'https://host/run?***: not found'
    """
    for pattern in (_PASSWORD, _WEB_USER):
        text = pattern.sub(rf"\1{_REMOVED}@", text)
    for pattern in (_QUERY, _SETTING, _HEADER):
        text = pattern.sub(rf"\1{_REMOVED}", text)
    return text
