"""Numbers that remember the text that a file has for them."""

from __future__ import annotations


class WrittenNumber:
    """A number whose text Python would write differently: ``1.50``, ``+5``, ``0x1F``."""

    text: str

    def __str__(self) -> str:
        return self.text


class _WrittenInt(WrittenNumber, int):
    pass


class _WrittenFloat(WrittenNumber, float):
    pass


def written_number(number: float, text: str) -> float:
    """Return a number, int or float, that is `text` where it is turned into text.

    >>> balance = written_number(1.5, "1.50")
    >>> f"{balance}", balance == 1.5
    ('1.50', True)
    """
    if str(number) == text:
        return number
    kept = _WrittenInt(number) if isinstance(number, int) else _WrittenFloat(number)
    kept.text = text
    return kept
