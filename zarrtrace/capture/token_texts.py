"""Texts of tokens, and which tokens are special."""

from __future__ import annotations

from typing import Any

import numpy as np

# SentencePiece writes a space so.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of special tokens, also of those that only chat templates write."""
    added = tokenizer.added_tokens_decoder
    return frozenset(
        [*tokenizer.all_special_ids, *(token for token, one in added.items() if one.special)]
    )


class TokenTexts(dict[int, str]):
    """Text of each token by its id, with the white space that it stands for.

    Each is looked up once: a tokenizer takes about ten microseconds.

    Parameters
    ----------
    tokenizer
        Does not change while this is used.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        """Ask the tokenizer."""
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a model's vocabulary may be larger than its tokenizer's
            text = ""
        elif _SPACE in piece:  # decode() would strip it
            text = piece.replace(_SPACE, " ")
        else:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        self[token] = text
        return text

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Return the text of each token of an array; empty for ids that stand for no token."""
        found = np.empty(ids.size, dtype=object)
        found[:] = [self[token] for token in ids.ravel().tolist()]
        return found.reshape(ids.shape)
