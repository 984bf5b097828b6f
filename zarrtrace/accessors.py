"""``.zt`` on datasets and trees of xarray, however they were opened.

:func:`zarrtrace.open_trace`, :func:`zarrtrace.open_run` and :func:`zarrtrace.extract` register it;
who opens a trace with xarray alone imports this module.

>>> import xarray as xr
>>> import zarrtrace.accessors
>>> ds = xr.open_zarr("runs/demo/Risky_40")
>>> ds.zt.span("balance")
[50, 51]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from zarrtrace.errors import ConfigError, NotATraceError
from zarrtrace.scenarios import span
from zarrtrace.scenarios.metadata import free_name
from zarrtrace.storage import Location, locate

if TYPE_CHECKING:
    import pandas as pd

    from zarrtrace.viewer.notebook import View
    from zarrtrace.viewer.widget import ViewWidget

# Where xarray's own readers say what they opened, and our options of an object store.
_SOURCE = "source"
_OPTIONS = "storage_options"


def source_of(path: Location) -> dict[str, Any]:
    """Return the encoding of what was opened at a path: where ``view`` finds it again."""
    if path.path is not None:
        return {_SOURCE: str(path.path.absolute())}
    return {_SOURCE: str(path), **({_OPTIONS: dict(path.options)} if path.options else {})}


class TraceAccessor:
    """A trace: its spans, its tokens, where it comes from, a view of it."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    def span(self, name: str) -> list[int]:
        """Return the token positions of a span: labels of ``key``, and of ``query`` if stored.

        Parameters
        ----------
        name
            A span of the scenario, or ``"decision"``.

        Raises
        ------
        ScenarioError
            If the trace has no such span.
        """
        self._attributes()
        return span(self._ds, name)

    @property
    def tokens(self) -> list[str]:
        """Text of each token, along ``key``."""
        self._attributes()
        return [str(text) for text in np.atleast_1d(self._ds["key_token"])]

    @property
    def prompt(self) -> str | None:
        """Text of the prompt without special tokens; None if it is not known."""
        found: str | None = self._attributes()["prompt"]
        return found

    @property
    def completion(self) -> str | None:
        """Text that the model generated behind the prompt; None if it generated none."""
        generation = self._attributes().get("generation")
        return None if generation is None else str(generation["text"])

    @property
    def choice(self) -> str | None:
        """Name of the option that was found in the completion; None if none was."""
        found: str | None = self._attributes().get("choice")
        return found

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, SAEs, layers, versions of libraries, and where the trace is stored."""
        return _provenance(self._attributes(), self._ds.encoding)

    def view(
        self,
        *,
        layer: int | None = None,
        head: int | None = None,
        height: int = 800,
        static: bool = False,
    ) -> View | ViewWidget:
        """Show the stored trace in a notebook, in the page of ``zarrtrace view``.

        Parameters
        ----------
        layer, head
            The decoder block and the query head to show first. Without both, those that attend
            most to a span; without `head` alone, the mean of heads.
        height
            Height in pixels.
        static
            A page that is saved with the notebook, even if a widget could be shown.

        Returns
        -------
        ViewWidget or View
            As the last value of a cell, the page, with the layers that the dataset has and values
            as they are stored. With the extra ``notebook`` (anywidget) a widget, which reads
            chunks through the kernel; its traits `scenario`, `layer`, `head`, `token` and
            `feature` can be read and set. Otherwise the whole page, or a command that shows it if
            it takes more than 20 MB.

        Raises
        ------
        ConfigError
            If it is not known where the trace is stored, or it has no such layer or head.
        IntegrityError
            If the trace was replaced since it was opened.
        """
        attributes = self._attributes()
        source = _location(self._ds.encoding, attributes["scenario"])
        if attributes.get("seal") is None:  # not complete: only its run leads to it
            source = source.parent
        return _view(
            source,
            {attributes["scenario"]: attributes},
            attributes["scenario"],
            {"layer": layer, "head": head},
            height,
            layers=np.atleast_1d(self._ds["layer"]).tolist() if "layer" in self._ds else None,
            static=static,
        )

    def _attributes(self) -> Mapping[Any, Any]:
        return _attributes_of(self._ds, "trace")


class RunAccessor:
    """A run: its scenarios, where it comes from, a view of it."""

    def __init__(self, run: xr.DataTree) -> None:
        self._run = run

    @property
    def scenarios(self) -> pd.DataFrame:
        """A row a scenario, or a repeat: number of tokens, tags, metadata, prompt.

        Generated text adds ``scenario_name`` and ``repeat`` if there are several, ``choice`` and
        ``completion``. Metadata called as one of these columns is ``metadata_NAME``.
        """
        import pandas as pd  # noqa: PLC0415 -- with xarray it is there

        traces = self._traces()
        found = {name: node.attrs.get("metadata", {}) for name, node in traces.items()}
        columns = {column for metadata in found.values() for column in metadata}
        generated = {name: _generated(node.attrs) for name, node in traces.items()}
        own = {"tokens", "tags", "prompt"}.union(*generated.values())
        rows = {
            name: {
                "tokens": node.sizes["key"],
                "tags": ", ".join(node.attrs["tags"]),
                **{free_name(one, own, columns): value for one, value in found[name].items()},
                "prompt": node.attrs["prompt"],
                **generated[name],
            }
            for name, node in traces.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("scenario")

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, SAEs, layers, versions of libraries, and where the run is stored."""
        first = next(iter(self._traces().values()))
        return _provenance(first.attrs, self._run.encoding)

    def view(
        self,
        *,
        scenario: str | None = None,
        layer: int | None = None,
        head: int | None = None,
        height: int = 800,
        static: bool = False,
    ) -> View | ViewWidget:
        """Show the stored run in a notebook, in the page of ``zarrtrace view``.

        Parameters
        ----------
        scenario
            The scenario to show first; the first one if None.
        layer, head, height, static
            As for a trace's ``view``.

        Returns
        -------
        ViewWidget or View
            As for a trace's ``view``, with a menu of the tree's scenarios. If a page of all of
            them takes more than 20 MB, it holds `scenario` alone; if that does, too, it is a
            command that shows the run.

        Raises
        ------
        ConfigError
            If it is not known where the run is stored, or it has no such scenario, layer or head.
        IntegrityError
            If the run was replaced since it was opened.
        """
        traces = self._traces()
        if scenario is not None and scenario not in traces:
            raise ConfigError(
                f"the run has no scenario {scenario!r}", remedy=f"It has: {', '.join(traces)}."
            )
        return _view(
            _location(self._run.encoding, self._run.name or "run"),
            {name: node.attrs for name, node in traces.items()},
            scenario or next(iter(traces)),
            {"layer": layer, "head": head},
            height,
            static=static,
        )

    def _traces(self) -> dict[str, xr.DataTree]:
        _attributes_of(self._run, "run")
        found = {name: node for name, node in self._run.children.items() if node.has_data}
        if not found:
            raise ConfigError("the tree holds no scenario", remedy="Open the run again.")
        return found


def _generated(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what is known of a generated text; nothing of a prompt alone."""
    generation = attributes.get("generation")
    if generation is None:
        return {}
    repeat = attributes.get("repeat")
    of = {} if repeat is None else {"scenario_name": attributes["scenario"], "repeat": repeat}
    return {**of, "choice": attributes.get("choice"), "completion": generation["text"]}


class TableAccessor:
    """A table of samples: its scenarios, where it comes from."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    @property
    def scenarios(self) -> pd.DataFrame:
        """A row a scenario, or a repeat: number of samples, tags, metadata, choice.

        Metadata called ``samples`` is ``metadata_samples``.
        """
        ds, attributes = self._ds, _attributes_of(self._ds, "table")
        known = ("tags", *attributes["metadata"], "choice")
        columns = [name for name in dict.fromkeys(known) if name in ds.coords]
        frame = ds[["scenario", *columns]].reset_coords()[["scenario", *columns]].to_dataframe()
        keys = ["scenario"]
        if "repeat" in ds.coords and "repeat" not in attributes["metadata"]:
            keys, frame["repeat"] = ["scenario", "repeat"], ds["repeat"].to_numpy()
        by_scenario = frame.groupby(keys, sort=False)
        first = by_scenario.first()
        first = first.rename(columns={"samples": free_name("samples", {"samples"}, columns)})
        first.insert(0, "samples", by_scenario.size())
        return first

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, SAEs, layers, versions of libraries, and where the table is stored."""
        return _provenance(_attributes_of(self._ds, "table"), self._ds.encoding)


def _accessor_of_dataset(ds: xr.Dataset) -> TraceAccessor | TableAccessor:
    """Return what a table offers, or a trace."""
    return TableAccessor(ds) if ds.attrs.get("kind") == "table" else TraceAccessor(ds)


xr.register_dataset_accessor("zt")(_accessor_of_dataset)  # type: ignore[no-untyped-call]


def _accessor_of(node: xr.DataTree) -> RunAccessor | TraceAccessor:
    """Return what a run offers, or the trace that is a node of its tree."""
    if node.attrs.get("kind") != "trace":
        return RunAccessor(node)
    ds = node.to_dataset()
    if _SOURCE in node.root.encoding:  # xarray.open_datatree says it of the whole tree only
        root = node.root.encoding
        ds.encoding = {**root, _SOURCE: f"{root[_SOURCE]}{node.path}".rstrip("/")}
    return TraceAccessor(ds)


xr.register_datatree_accessor("zt")(_accessor_of)  # type: ignore[no-untyped-call]


def _attributes_of(data: xr.Dataset | xr.DataTree, kind: str) -> Mapping[Any, Any]:
    """Return the attributes of a trace or a run; refuse other data."""
    if data.attrs.get("kind") == kind:
        return data.attrs
    raise NotATraceError(
        f"not a {kind} of zarrtrace",
        why="Its attributes are gone: some operations of xarray drop them.",
        remedy=f"Open it with zarrtrace.open_{kind}, and use .zt on the result of that.",
    )


def _provenance(attributes: Mapping[Any, Any], encoding: Mapping[Any, Any]) -> dict[str, Any]:
    model = attributes["model"] or {}
    return {
        "model": model.get("id"),
        **{key: model.get(key) for key in ("revision", "fingerprint", "architecture", "dtype")},
        "saes": {
            array: {key: sae[key] for key in ("release", "hook_name", "architecture", "d_sae")}
            for array, sae in attributes["saes"].items()
        },
        "layers": attributes["layers"],
        "versions": dict(attributes["versions"]),
        "source": encoding.get(_SOURCE),
    }


def _location(encoding: Mapping[Any, Any], name: str) -> Location:
    if _SOURCE not in encoding:
        raise ConfigError(
            f"{name}: where it is stored is not known",
            why="Some operations drop it, and xarray.open_datatree says it of the tree only.",
            remedy="Use .zt.view() on what zarrtrace.open_trace or zarrtrace.open_run returns.",
        )
    return locate(encoding[_SOURCE], encoding.get(_OPTIONS))


def _view(
    source: Location,
    traces: Mapping[str, Mapping[Any, Any]],
    scenario: str,
    choice: Mapping[str, int | None],
    height: int,
    layers: list[int] | None = None,
    *,
    static: bool = False,
) -> View | ViewWidget:
    from zarrtrace.viewer.notebook import show  # noqa: PLC0415 -- a floor above this one

    seals = {name: attributes.get("seal") for name, attributes in traces.items()}
    return show(
        source,
        seals,
        scenario=scenario,
        choice=choice,
        layers=layers,
        height=height,
        static=static,
    )
