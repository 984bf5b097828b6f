"""Names of features: their labels, else their strongest words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from zarrtrace.errors import ConfigError
from zarrtrace.format.layout import INDEX
from zarrtrace.index.finding import find_feature
from zarrtrace.index.labels import home_of, read_labels
from zarrtrace.storage import Address

#: How many words stand for a feature without a label.
WORDS = 3


def names_of(
    run: Address,
    features: Iterable[tuple[int, int]],
    *,
    array: str = "features",
    words: int = WORDS,
) -> dict[tuple[int, int], str]:
    """Name features: by their labels, else by the words that drive them most.

    Parameters
    ----------
    run
        A run, a table, or a trace of a run.
    features
        Pairs of a layer and a feature.
    array
        ``features``, or ``features_<name>`` for further SAEs on a layer.
    words
        Number of words for a feature without a label, from the index, if there is one: the
        texts of its strongest tokens, in quotes. Each feature takes some milliseconds; 0 for none.

    Returns
    -------
    dict
        Names by layer and feature; those without label and words are left out.

    Raises
    ------
    IntegrityError
        If labels or index are damaged.
    """
    asked = list(dict.fromkeys((int(layer), int(feature)) for layer, feature in features))
    if not asked:
        return {}
    found = read_labels(run, array=array, layers={layer for layer, _ in asked})
    keys = zip(found["layer"].tolist(), found["feature"].tolist(), strict=True)
    labels = dict(zip(keys, found["label"].tolist(), strict=True))
    names = {pair: str(labels[pair]) for pair in asked if pair in labels}
    home = home_of(run, INDEX)
    if words and (home / INDEX / "zarr.json").is_file():
        for layer, feature in (pair for pair in asked if pair not in names):
            with contextlib.suppress(ConfigError):  # the index lacks this layer
                use = find_feature(home, layer, feature, array=array)
                strongest = distinct_words((one.token for one in use.tokens), words)
                if strongest:
                    names[layer, feature] = ", ".join(f'"{text}"' for text in strongest)
    return names


def distinct_words(texts: Iterable[str], words: int) -> list[str]:
    """Return the first different words among texts of tokens, strongest token first."""
    return [text for text in dict.fromkeys(text.strip() for text in texts) if text][:words]
