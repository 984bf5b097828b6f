"""Looking one feature up in a run's index: one small chunk an array, on runs of any size."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping, Sequence

import numpy as np

from zarrtrace.errors import ConfigError, IntegrityError, ScenarioError, ZarrtraceError
from zarrtrace.format.index_layout import INDEX_TOKENS
from zarrtrace.index.labels import label_of
from zarrtrace.index.tables import find_in_table
from zarrtrace.index.uses import AFTER, BEFORE, FeatureUse, Text, TokenUse, no_values
from zarrtrace.scenarios import check_trace_name
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import (
    RunIndex,
    kind_of,
    read_sample_texts,
    read_special,
    read_table,
    read_token_texts,
    read_trace,
)
from zarrtrace.suggestions import did_you_mean

# Texts of tokens by position, and the positions of generated ones.
_Texts = tuple[dict[int, str], Container[int]]


def find_feature(
    run: Address,
    layer: int,
    feature: int,
    *,
    top: int = INDEX_TOKENS,
    array: str = "features",
    special: bool = False,
    text: Text = "all",
) -> FeatureUse:
    """Say which tokens drive a feature, from the index of a run or a table.

    A table is read itself if it has no index, or that of another table, or one that counts special
    tokens where they are not asked for, or the other way round.

    Parameters
    ----------
    run
        Folder of the run or the table, or its address.
    layer, feature
        Block and latent.
    top
        Number of tokens, at most 20.
    array
        ``features``, or ``features_<name>`` for further SAEs on a layer.
    special
        Whether to count special tokens (BOS, chat markers), too. If the index of a run counts them
        and they are not asked for, they are left out of the tokens alone, and the result says so.
    text
        List tokens of prompts, or generated ones, only: with an index, those of them that are among
        the 20 strongest tokens. Maximum, mean and frequency stay those of all tokens.

    Raises
    ------
    StoreError
        If a run of traces has no index.
    IntegrityError
        If the index is damaged, or that of another run.
    ConfigError
        If the index has no such array, layer or feature, or no values of the array in that layer,
        holds fewer tokens, or leaves out the special tokens that are asked for.
    """
    if not 1 <= top <= INDEX_TOKENS:
        raise ConfigError(f"top={top}: the index holds {INDEX_TOKENS} tokens", remedy="Give fewer.")
    run = locate(run)
    index = _index_of(run, special=special)
    if index is None:
        return find_in_table(run, layer, feature, top=top, array=array, special=special, text=text)
    known = index.attributes
    if special and not known.special:
        raise ConfigError(
            f"{run}: the index leaves out special tokens",
            why="It does so unless it is built with them.",
            remedy=f"Build it with them: 'zarrtrace index {run} --special'.",
        )
    if array not in known.features:
        raise ConfigError(
            f"{run}: the index has no {array!r}",
            remedy=did_you_mean(
                array,
                [name for name in known.features if name != "features"],
                label="Beside 'features' it has",
            ),
        )
    if layer not in known.layers or not 0 <= feature < known.features[array]:
        raise ConfigError(
            f"{run}: the index has no feature {feature} of layer {layer}",
            why=f"It has layers {known.layers[0]} to {known.layers[-1]} and features 0 to "
            f"{known.features[array] - 1}.",
            remedy="Give one of these.",
        )
    suffix, at = array.removeprefix("features"), known.layers.index(layer)

    def value(name: str, *rest: slice) -> list[float]:
        found: list[float] = index.read(f"{name}{suffix}", at, feature, *rest).tolist()
        return found

    strongest = zip(
        *(
            value(f"token_{name}", slice(0, INDEX_TOKENS))
            for name in ("activation", "scenario", "position")
        ),
        strict=True,
    )
    maximum, mean, frequency = (
        float(index.read(f"{name}{suffix}", at, feature))
        for name in ("maximum", "mean", "frequency")
    )
    if np.isnan(frequency):  # a fraction of no tokens
        counted = index.read(f"tokens{suffix}", slice(None))
        having = [n for n, tokens in zip(known.layers, counted, strict=True) if tokens]
        raise no_values(run, layer, array, having)
    return FeatureUse(
        layer=layer,
        feature=feature,
        array=array,
        maximum=maximum,
        mean=mean,
        frequency=frequency,
        tokens=_tokens(
            run,
            index,
            [one for one in strongest if one[0] != 0],
            top,
            special=special,
            text=text,
        ),
        special=known.special,
        indexed=known.indexed,
        scenarios=known.scenarios,
        label=label_of(run, layer, feature, array),
    )


def _index_of(run: Location, *, special: bool) -> RunIndex | None:
    """Return the index of a run or a table; None for a table that has not the index needed."""
    try:
        index = RunIndex(run)
    except ZarrtraceError:
        if not _is_table(run):
            raise
        return None
    is_of_table = index.attributes.table is not None
    if is_of_table and (
        read_table(run).attributes.seal != index.attributes.table
        or index.attributes.special != special
    ):
        return None
    return index


def _is_table(path: Location) -> bool:
    with contextlib.suppress(ZarrtraceError):
        return kind_of(path) == "table"
    return False


def _tokens(
    run: Location,
    index: RunIndex,
    strongest: list[tuple[float, float, float]],
    top: int,
    *,
    special: bool,
    text: Text,
) -> tuple[TokenUse, ...]:
    """Add names and texts to activations; special tokens are left out unless asked for."""
    if strongest and index.attributes.special and not special:
        strongest = _without_special(run, index, strongest)
    if text == "all":
        strongest = strongest[:top]
    numbers = sorted({int(number) for _, number, _ in strongest})
    if numbers and numbers[-1] >= index.attributes.scenarios:
        raise _of_another_run(run)
    found = _texts_of_run if index.attributes.table is None else _texts_of_table
    names, texts = found(run, index, numbers)
    out = []
    for activation, number, position in strongest:
        (words, generated), here = texts[int(number)], int(position)
        if here not in words:
            raise _of_another_run(run)
        before = _neighbours(words, range(here - 1, here - 1 - BEFORE, -1))
        out.append(
            TokenUse(
                activation=activation,
                scenario=names[int(number)],
                position=here,
                token=words[here],
                before="".join(reversed(before)),
                after="".join(_neighbours(words, range(here + 1, here + 1 + AFTER))),
                generated=here in generated,
            )
        )
    is_listed = {"all": (False, True), "prompt": (False,), "generated": (True,)}[text]
    return tuple(one for one in out if one.generated in is_listed)[:top]


def _without_special(
    run: Location, index: RunIndex, strongest: list[tuple[float, float, float]]
) -> list[tuple[float, float, float]]:
    """Leave out the special tokens of a run."""
    places: dict[int, list[int]] = {}
    for _, number, position in strongest:
        places.setdefault(int(number), []).append(int(position))
    if max(places) >= index.attributes.scenarios:
        raise _of_another_run(run)
    special: set[tuple[int, int]] = set()
    for number, positions in places.items():
        trace = read_trace(run / _name(run, index, number))
        found = read_special(trace, np.array(positions))
        special |= {(number, at) for at, is_one in zip(positions, found, strict=True) if is_one}
    return [one for one in strongest if (int(one[1]), int(one[2])) not in special]


def _neighbours(words: Mapping[int, str], positions: Sequence[int]) -> list[str]:
    """Return the texts of tokens up to the first that is not stored."""
    out = []
    for position in positions:
        if position not in words:
            break
        out.append(words[position])
    return out


def _texts_of_run(
    run: Location, index: RunIndex, numbers: Sequence[int]
) -> tuple[dict[int, str], dict[int, _Texts]]:
    """Read names of scenarios, and texts of their tokens by position."""
    names = {number: _name(run, index, number) for number in numbers}
    found: dict[int, _Texts] = {}
    for number, name in names.items():
        texts, prompt = read_token_texts(run / name)
        found[number] = dict(enumerate(texts)), range(prompt, len(texts))
    return names, found


def _texts_of_table(
    run: Location, index: RunIndex, numbers: Sequence[int]
) -> tuple[dict[int, str], dict[int, _Texts]]:
    table = read_table(run)
    samples = table.encodings["scenario"].shape[0]
    starts = [*index.read("start", slice(None)).tolist(), samples]
    texts = read_sample_texts(table, [(starts[number], starts[number + 1]) for number in numbers])
    names = index.read("scenario", np.asarray(numbers, np.int64))
    return (
        dict(zip(numbers, map(str, names), strict=True)),
        dict(zip(numbers, texts, strict=True)),
    )


def _of_another_run(run: Location) -> IntegrityError:
    return IntegrityError(
        f"{run}: its index is not of what is there now",
        why="The run was replaced since, or the index is damaged.",
        remedy="Build the index again: 'zarrtrace index --rebuild'.",
    )


def _name(run: Location, index: RunIndex, number: int) -> str:
    # It becomes a path: a file from elsewhere must not lead out of the run.
    try:
        return check_trace_name(str(index.read("scenario", number)))
    except ScenarioError as error:
        raise ConfigError(f"{run}: the index names {error.what}", remedy="Do not use it.") from None
