"""Looking one feature up in a run's index: one small chunk an array, on runs of any size."""

from __future__ import annotations

import contextlib

from zarrtrace.errors import ConfigError, IntegrityError, ScenarioError, ZarrtraceError
from zarrtrace.format.index_layout import INDEX_TOKENS
from zarrtrace.index.tables import find_in_table
from zarrtrace.index.uses import AFTER, BEFORE, FeatureUse, TokenUse
from zarrtrace.scenarios import check_name
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import RunIndex, kind_of, read_token_texts
from zarrtrace.suggestions import did_you_mean


def find_feature(
    run: Address,
    layer: int,
    feature: int,
    *,
    top: int = INDEX_TOKENS,
    array: str = "features",
) -> FeatureUse:
    """Say which tokens drive a feature, from the run's index, or from a table.

    Parameters
    ----------
    run
        Folder of the run or the table, or its address.
    layer, feature
        Block and latent.
    top
        How many tokens, at most 20.
    array
        ``features``, or ``features_<name>`` for further SAEs on a layer.

    Raises
    ------
    StoreError
        If the run has no index.
    ConfigError
        If the index has no such array, layer or feature, or holds fewer tokens.
    """
    if not 1 <= top <= INDEX_TOKENS:
        raise ConfigError(f"top={top}: the index holds {INDEX_TOKENS} tokens", remedy="Give fewer.")
    try:
        index = RunIndex(run)
    except ZarrtraceError:
        path = locate(run)
        if not _is_table(path):
            raise
        return find_in_table(path, layer, feature, top=top, array=array)
    known = index.attributes
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
        *(value(f"token_{name}", slice(0, top)) for name in ("activation", "scenario", "position")),
        strict=True,
    )
    maximum, mean, frequency = (
        float(index.read(f"{name}{suffix}", at, feature))
        for name in ("maximum", "mean", "frequency")
    )
    return FeatureUse(
        layer=layer,
        feature=feature,
        array=array,
        maximum=maximum,
        mean=mean,
        frequency=frequency,
        tokens=_tokens(locate(run), index, [one for one in strongest if one[0] != 0]),
        indexed=known.indexed,
        scenarios=known.scenarios,
    )


def _is_table(path: Location) -> bool:
    with contextlib.suppress(ZarrtraceError):
        return kind_of(path) == "table"
    return False


def _tokens(
    run: Location, index: RunIndex, strongest: list[tuple[float, float, float]]
) -> tuple[TokenUse, ...]:
    """Add names and texts to activations, numbers of scenarios and positions."""
    numbers = sorted({int(number) for _, number, _ in strongest})
    names = {number: _name(run, index, number) for number in numbers}
    texts = {number: read_token_texts(run / name) for number, name in names.items()}
    out = []
    for activation, number, position in strongest:
        words, here = texts[int(number)], int(position)
        if here >= len(words):
            raise _of_another_run(run)
        out.append(
            TokenUse(
                activation=activation,
                scenario=names[int(number)],
                position=here,
                token=words[here],
                before="".join(words[max(0, here - BEFORE) : here]),
                after="".join(words[here + 1 : here + 1 + AFTER]),
            )
        )
    return tuple(out)


def _of_another_run(run: Location) -> IntegrityError:
    return IntegrityError(
        f"{run}: its index speaks of tokens that the run does not have",
        why="The index is that of another run, or damaged.",
        remedy="Build the index again: 'zarrtrace index --rebuild'.",
    )


def _name(run: Location, index: RunIndex, number: int) -> str:
    if number >= index.attributes.scenarios:
        raise _of_another_run(run)
    # It becomes a path: a file from elsewhere must not lead out of the run.
    try:
        return check_name(str(index.read("scenario", number)))
    except ScenarioError as error:
        raise ConfigError(f"{run}: the index names {error.what}", remedy="Do not use it.") from None
