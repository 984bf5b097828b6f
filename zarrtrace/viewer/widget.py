"""The page as a widget that reads chunks through the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anywidget
import numpy as np
import traitlets
import xarray as xr

from zarrtrace.text import terminal_text, without_secrets
from zarrtrace.viewer.layout import Layout
from zarrtrace.viewer.page_files import page_file, single_page

_TRAITS = ("scenario", "layer", "head", "token", "feature")
#: Values beside those of the trace: the mean of heads, no feature.
_NONE = {"head": -1, "feature": -1}


class ViewWidget(anywidget.AnyWidget):
    """The page of a run of any size, in a notebook.

    Attributes
    ----------
    scenario
        Name of the scenario that is shown.
    layer
        The decoder block.
    head
        The query head; -1 for the mean of all.
    token
        Position of the chosen token.
    feature
        The SAE feature whose drawer is open; -1 for none.
    command
        Command that shows the same in a browser.

    Notes
    -----
    The first five are traits: reading one gives what the page shows, setting one changes the page,
    and ``observe`` calls back. A value that the scenario does not have raises
    :class:`traitlets.TraitError`.
    """

    scenario = traitlets.Unicode().tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    head = traitlets.Int(-1).tag(sync=True)
    token = traitlets.Int().tag(sync=True)
    feature = traitlets.Int(-1).tag(sync=True)
    height = traitlets.Int(800).tag(sync=True)
    _is_chosen = traitlets.Bool().tag(sync=True)
    _page = traitlets.Unicode().tag(sync=True)
    _sandbox = traitlets.Unicode().tag(sync=True)
    _esm = page_file("widget.js").decode()

    def __init__(
        self,
        layout: Layout,
        command: str,
        view: str,
        *,
        sandbox: str,
        height: int,
        scenario: str,
        choice: Mapping[str, int],
    ) -> None:
        self._layout = layout
        self.command = command
        self._has_layer = "layer" in choice
        spans = layout.traces[scenario].attrs["spans"]
        first = {"layer": _labels(layout.traces[scenario], "layer")[0]}
        super().__init__(
            scenario=scenario,
            token=spans["decision"]["tokens"][-1],
            height=height,
            _page=single_page({}, view, from_kernel=True).decode(),
            _sandbox=sandbox,
            **first | dict(choice),
        )
        self.on_msg(self._answer)
        self.observe(self._choose, [*_TRAITS])

    def __repr__(self) -> str:
        """Return the current view and the command that shows it."""
        # The page chooses a layer when it is first shown, if nobody has.
        layer = f", layer {self.layer}" if self._has_layer or self._is_chosen else ""
        return f"<zarrtrace view of {self.scenario}{layer}; in a browser: {self.command}>"

    def _choose(self, _change: object) -> None:
        """Note that the page no longer opens on its own choice."""
        self._is_chosen = True

    def _answer(self, _widget: Any, content: Mapping[str, Any], _buffers: Sequence[Any]) -> None:
        """Send the page a file of the bundle that it asks for."""
        number, path = content.get("id"), str(content.get("path"))
        try:
            file = self._layout.read(path)
        except KeyError:
            self.send({"id": number, "error": f"{path} is missing."})
        except Exception as error:  # noqa: BLE001 -- a damaged chunk must not stop the others
            why = without_secrets(terminal_text(str(error), lines=True))
            self.send({"id": number, "error": f"This part of the run cannot be read: {why}"})
        else:
            self.send({"id": number}, [file])

    @traitlets.validate("scenario")
    def _known_scenario(self, proposal: Mapping[str, Any]) -> str:
        name = str(proposal["value"])
        if name not in self._layout.traces:
            raise traitlets.TraitError(f"the view has no scenario {name!r}")
        return name

    @traitlets.validate("layer", "head", "token", "feature")
    def _in_scenario(self, proposal: Mapping[str, Any]) -> int:
        trait, value = proposal["trait"].name, int(proposal["value"])
        there = _labels(self._layout.traces[self.scenario], trait)
        if value not in there and value != _NONE.get(trait):
            said = f"{there[0]} to {there[-1]}" if there else "none"
            raise traitlets.TraitError(f"{self.scenario} has no {trait} {value}: it has {said}")
        return value


def _labels(ds: xr.Dataset, trait: str) -> list[int]:
    """Return the values that a trait can take in a trace."""
    if trait == "feature":
        arrays = [ds[name] for name in ds if str(name).startswith("features")]
        return [*range(max((array.shape[-1] for array in arrays), default=0))]
    dim = "key" if trait == "token" else trait
    return np.asarray(ds[dim]).tolist() if dim in ds else []
