"""All figures of a run, and a page that shows them."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from zarrtrace import analysis
from zarrtrace.analysis.positions import spans_before
from zarrtrace.analysis.trace_arrays import require
from zarrtrace.analysis.traces import Data, tags, traces
from zarrtrace.errors import ConfigError, ScenarioError, ZarrtraceError
from zarrtrace.figures import contrasts, features, flow, gallery, heatmaps, integrated
from zarrtrace.figures.files import box_of, metadata_of, save
from zarrtrace.index import names_of, read_labels
from zarrtrace.scenarios import DECISION, chosen_names
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import open_run, read_run

#: Is told ``done, total`` and the name of the figure that was drawn last.
Progress = Callable[[int, int, str], None]

FORMATS = ("png", "pdf")
#: A PDF takes as long as a PNG, half of it for its fonts: PDFs are written if asked for.
DEFAULT_FORMATS = ("png",)
#: Scenarios that are drawn one by one, and those that figures over scenarios take, at most.
MOST_DRAWN, MOST_COMPARED = 50, 1000
# Features that get a bar each.
_FEATURES_DRAWN = 8
# Features that may have a name in the volcano plot, which has room for a few of them.
_FEATURES_NAMED = 32
# Below so many figures a worker, starting it takes longer than it saves.
_WORTH_A_WORKER = 12


def draw_run(
    path: Address,
    output: str | Path,
    *,
    scenarios: Sequence[str] | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    dpi: float = 300,
    special: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Draw the whole set of figures of a run, and a page ``index.html`` that shows them.

    Parameters
    ----------
    path
        Folder of the run.
    output
        Folder to write to; made if it is not there. Files of the same name are replaced.
    scenarios
        Scenarios to draw one by one; if None all of them, or :data:`MOST_DRAWN` evenly spaced ones.
        Figures over scenarios always take all, or :data:`MOST_COMPARED` evenly spaced ones.
    formats
        Of ``"png"`` and ``"pdf"``.
    dpi
        Dots per inch of the PNGs, and of the images within the PDFs.
    special
        Whether to draw activations at special tokens (BOS, chat markers), and to count their words,
        too.
    workers
        Processes to draw in; small runs are drawn in this one.
    progress
        Is told how many of how many figures are done, and the last one's name.

    Returns
    -------
    Path
        The page. It names what could not be drawn, and why.

    Raises
    ------
    ScenarioError
        If the run has no such scenario.
    ConfigError
        If a format is neither.
    NotATraceError, FormatVersionError, IncompleteError, IntegrityError
        As for :func:`zarrtrace.open_run`.
    """
    path, output = locate(path), Path(output)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(
            f"cannot write figures as {unknown[0]!r}" if unknown else "no format was given",
            remedy=f"There are: {', '.join(FORMATS)}.",
        )
    known = read_run(path).attributes.scenarios
    names = _evenly(known, MOST_DRAWN) if scenarios is None else chosen_names(known, scenarios)
    run = _open(path)
    output.mkdir(parents=True, exist_ok=True)
    tasks = _tasks(names, has_bands="bands" in run.attrs)
    draw = functools.partial(
        _draw, path, str(output), formats=tuple(dict.fromkeys(formats)), dpi=dpi, special=special
    )
    results = []
    for result in _in_processes(draw, tasks, min(workers, len(tasks) // _WORTH_A_WORKER)):
        results.append(result)
        if progress:
            progress(len(results), len(tasks), result.task.stem)
    results.sort(key=lambda result: tasks.index(result.task))
    page = output / "index.html"
    note = sampled(known, scenarios)
    page.write_text(_page(run, names, results, note, at=str(path)), encoding="utf-8")
    return page


def sampled(names: Sequence[str], chosen: Sequence[str] | None) -> str:
    """Say which scenarios of a run are drawn; empty if all of them are."""
    parts = []
    if len(names) > MOST_COMPARED:
        parts.append(f"figures over scenarios take {MOST_COMPARED:,}")
    if chosen is None and len(names) > MOST_DRAWN:
        parts.append(f"{MOST_DRAWN} are drawn one by one (--scenario NAME draws others)")
    said = f"Of {len(names):,} scenarios, evenly spaced: {', '.join(parts)}."
    return said if parts else ""


def _evenly(names: Sequence[str], most: int) -> Sequence[str]:
    """Return at most so many names, evenly spaced."""
    if len(names) <= most:
        return names
    return [names[number * len(names) // most] for number in range(most)]


def _tasks(scenarios: Sequence[str], *, has_bands: bool) -> list[_Task]:
    """List the figures of a run, those over scenarios first."""
    tasks = [
        _Task(drawing.key, None, f"run_{drawing.key}")
        for drawing in _OF_RUN
        if has_bands or drawing.make is not _bands
    ]
    return tasks + [
        _Task(drawing.key, name, f"{stem}_{drawing.key}")
        for name, stem in zip(scenarios, _stems(scenarios), strict=True)
        for drawing in _OF_SCENARIO
    ]


def default_groups(data: Data) -> dict[str, list[str]]:
    """Return the two groups of scenarios to compare, by tag.

    The two tags that most scenarios have, each without the scenarios that have both; nothing if
    there are not two such groups.
    """
    members: dict[str, list[str]] = {}
    for name, ds in traces(data).items():
        for tag in tags(ds):
            members.setdefault(tag, []).append(name)
    pair = sorted(members, key=lambda tag: -len(members[tag]))[:2]
    if len(pair) < 2:
        return {}
    both = set(members[pair[0]]) & set(members[pair[1]])
    groups = {tag: [name for name in members[tag] if name not in both] for tag in pair}
    return groups if all(groups.values()) else {}


def strongest_layer(ds: xr.Dataset) -> int:
    """Return the layer in which the decision attends most to the spans."""
    spans = spans_before(ds, [DECISION])
    if not spans:
        require(ds, "attention_mean")
        return int(np.asarray(ds["layer"])[-1])
    strength = analysis.attention_to(ds, spans, reduce="sum").sum("source")
    return int(strength.fillna(0).idxmax("layer"))


# --- what there is to draw ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    key: str
    scenario: str | None
    stem: str


@dataclass(frozen=True)
class _Result:
    task: _Task
    files: tuple[str, ...] = ()
    why_not: str = ""


@dataclass(frozen=True)
class _Drawing:
    """A figure of the set: `make` takes the run's path and run or trace, returns what it shows."""

    key: str
    title: str
    caption: str
    make: Callable[..., tuple[Figure, Any]]
    has_special: bool = False


def _figure(ax: Any) -> Figure:
    found = ax.get_figure(root=True)
    assert isinstance(found, Figure)  # noqa: S101 -- it was just made
    return found


def _two_groups(run: xr.DataTree) -> tuple[str, str]:
    groups = default_groups(run)
    if not groups:
        raise ScenarioError(
            "the run has no two groups of scenarios to compare",
            why="Groups are tags, and fewer than two tags have scenarios of their own.",
        )
    first, second = groups
    return first, second


def _contrast(run: xr.DataTree, **options: Any) -> xr.Dataset:
    groups = [default_groups(run)[name] for name in _two_groups(run)]
    return analysis.contrast(run, *groups, **options)


def _pathways(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = analysis.attention_to(run)
    groups = default_groups(run) or None
    return flow.pathway_strength(result, groups=groups, bands=run.attrs.get("bands")), result


def _critical(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = analysis.critical_layers(run)
    return _figure(contrasts.critical_chart(result)), result


def _difference(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = _contrast(run, what="attention")
    return _figure(contrasts.difference_map(result, names=_two_groups(run))), result


def _difference_heads(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = _contrast(run, what="attention", heads="each")
    return contrasts.difference_heads(result, names=_two_groups(run)), result


def _names(path: Location, contrast: xr.Dataset) -> dict[tuple[int, int], str]:
    """Name the features of a contrast by labels, else by words of the index, if there is one."""
    layers, found = (contrast[name].values.tolist() for name in ("layer", "feature"))
    return names_of(path, zip(layers, found, strict=True))


def _volcano(path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = _contrast(run)
    groups, labels = _two_groups(run), _names(path, result.isel(row=slice(_FEATURES_NAMED)))
    return _figure(contrasts.volcano(result, names=groups, labels=labels)), result


def _trajectory(path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    strongest = _contrast(run).isel(row=slice(_FEATURES_DRAWN))
    pairs = zip(
        strongest["layer"].values.tolist(), strongest["feature"].values.tolist(), strict=True
    )
    result = analysis.feature_trajectory(run, list(pairs))
    groups, labels = default_groups(run), _names(path, strongest)
    return _figure(features.trajectory(result, groups=groups, labels=labels)), result


def _locality(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = analysis.attention_locality(run)
    return flow.locality(result, bands=run.attrs.get("bands")), result


def _bands(_path: Location, run: xr.DataTree) -> tuple[Figure, Any]:
    result = analysis.layer_bands(run)
    return flow.bands(result, groups=default_groups(run) or None), result


_OF_RUN = (
    _Drawing("pathways", "Pathways to the decision",
             "Attention of the decision to one token of each span, by layer, mean over heads. "
             "Thin: scenarios; thick: means of groups.", _pathways),
    _Drawing("critical", "Critical layers",
             "How many times the attention that tokens beside it get goes to a span (log₂; dots: "
             "more than placebo groups of tokens of the same prompts, Benjamini–Hochberg).",
             _critical),
    _Drawing("bands", "Hypothesised bands",
             "Whether attention is local, then about the task, then about the decision. Dashed: "
             "means of bands; below the name, how much the hypothesised band exceeds the others, "
             "with its 95 % interval over scenarios, and p over places of the bands.", _bands),
    _Drawing("locality", "Locality of attention",
             "How far back attention reaches, by layer: mean over heads and scenarios, and the "
             "range of heads. Shaded, if the suite file states any: bands of layers.", _locality),
    _Drawing("difference", "Difference map",
             "Attention of the decision to the spans, one group less the other. Dots: "
             "p_familywise of zarrtrace analyze contrast, as in the plot of features.",
             _difference),
    _Drawing("heads", "Difference by head",
             "As the difference map, for every head.", _difference_heads),
    _Drawing("volcano", "Features that separate the groups",
             "Every feature active at the decision. Names are layer · latent index. Heights are "
             "Welch's p-values, which assume normal activations; colours are corrected p-values, "
             "p_familywise of zarrtrace analyze contrast.", _volcano),
    _Drawing("trajectory", "Activation of the strongest such features",
             "At the decision: means of the groups, and a dot a scenario. A bar each, because SAEs "
             "of two layers share no features.", _trajectory),
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def _words(path: Location, *, special: bool) -> xr.Dataset:
    return analysis.word_associations(_open(path), strip=True, special=special)


@functools.lru_cache(maxsize=1)
def _labels(path: Location) -> dict[tuple[int, int], str]:
    found = read_labels(path, array="features")
    keys = zip(found["layer"].tolist(), found["feature"].tolist(), strict=True)
    return dict(zip(keys, found["label"].tolist(), strict=True))


def _integrated(path: Location, ds: xr.Dataset, *, special: bool) -> tuple[Figure, Any]:
    require(ds, "attention_mean", "features")
    words, labels = _words(path, special=special), _labels(path)
    return integrated.integrated_view(ds, words=words, labels=labels, special=special), ds


def _timeline(_path: Location, ds: xr.Dataset, *, special: bool) -> tuple[Figure, Any]:
    return _figure(features.feature_timeline(ds, special=special)), ds


_OF_SCENARIO = (
    _Drawing("integrated", "Features, words and tokens",
             "Above: attention of the decision to every token. Below: features active at a span "
             "and at the decision, strongest on the pathway, with the words that activate them "
             "most over the whole run.", _integrated, has_special=True),
    _Drawing("layers", "Attention by layer",
             "Mean over heads, divided by what uniform attention would give; query downwards, key "
             "to the right; one scale for all layers.",
             lambda _, ds: (heatmaps.attention_layers(ds), ds)),
    _Drawing("heads", "Heads of one layer",
             "The layer in which the decision attends most to the spans, divided by what uniform "
             "attention would give.",
             lambda _, ds: (heatmaps.attention_heads(ds, strongest_layer(ds)), ds)),
    _Drawing("flow", "Attention flow",
             "Share of attention from span to span, layers downwards; left, apart, on the first "
             "token; right: rollout (Abnar & Zuidema 2020). Shares below 15 % of the largest, or "
             "below twice what uniform attention would give, are left out.",
             lambda _, ds: (flow.flow_diagram(ds), ds)),
    _Drawing("timeline", "Feature timeline",
             "Activation of each token's strongest feature, by layer.",
             _timeline, has_special=True),
)  # fmt: skip
_BY_KEY = {(of_run, drawing.key): drawing
           for of_run, drawings in ((True, _OF_RUN), (False, _OF_SCENARIO))
           for drawing in drawings}  # fmt: skip


# --- drawing -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _open(path: Location) -> xr.DataTree:
    # Once a process; traces of a run are small beside what drawing them takes.
    names = read_run(path).attributes.scenarios
    return open_run(path, scenarios=_evenly(names, MOST_COMPARED))


def _draw(
    path: Location,
    output: str,
    task: _Task,
    *,
    formats: tuple[str, ...],
    dpi: float,
    special: bool = False,
) -> _Result:
    drawing = _BY_KEY[task.scenario is None, task.key]
    try:
        run = _open(path)
        if task.scenario is None:
            figure, shown = drawing.make(path, run)
            title = drawing.title
        else:
            options = {"special": special} if drawing.has_special else {}
            figure, shown = drawing.make(path, _trace(path, task.scenario), **options)
            title = f"{task.scenario}: {drawing.title}"
        files = [f"{task.stem}.{ending}" for ending in formats]
        box = box_of(figure)
        for file in files:
            save(figure, Path(output) / file, shown, title=title, dpi=dpi, box=box)
    except ZarrtraceError as error:
        return _Result(task, why_not=" ".join(part for part in (error.what, error.why) if part))
    return _Result(task, tuple(files))


def _trace(path: Location, name: str) -> xr.Dataset:
    found = traces(_open(path))
    return found[name] if name in found else traces(open_run(path, scenarios=[name]))[name]


def _in_processes(
    draw: Callable[[_Task], _Result], tasks: Sequence[_Task], workers: int
) -> Iterator[_Result]:
    """Draw in this process and `workers` - 1 others; yield results as they come."""
    if workers < 2:
        yield from map(draw, tasks)
        return
    # Not forked: Zarr and dask keep threads, which do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers - 1, mp_context=context) as pool:
        try:
            theirs = {pool.submit(draw, task): task for task in tasks}
            # The others import for seconds, and this process has done so: it draws from the end.
            for own, task in reversed(list(theirs.items())):
                if not own.cancel():
                    break
                del theirs[own]
                yield draw(task)
                for done in [one for one in theirs if one.done()]:
                    del theirs[done]
                    yield done.result()
            for done in as_completed(theirs):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _stems(names: Iterable[str]) -> list[str]:
    """Return names of files: nothing in them but letters, digits, dots and dashes, no two alike."""
    stems: list[str] = []
    for name in names:
        stem = re.sub(r"[^\w-]+", "_", name, flags=re.ASCII).strip("_") or "scenario"
        taken = {other.lower() for other in (*stems, "run")}
        number, candidate = 2, stem
        while candidate.lower() in taken:
            number, candidate = number + 1, f"{stem}_{number}"
        stems.append(candidate)
    return stems


# --- the page ----------------------------------------------------------------------------------


def _page(
    run: xr.DataTree,
    names: Sequence[str],
    results: Sequence[_Result],
    note: str = "",
    *,
    at: str,
) -> str:
    """Return the page; every text from the run is escaped."""
    by_scenario: dict[str | None, list[str]] = {None: [], **{name: [] for name in names}}
    for result in results:
        if not result.why_not:
            drawing = _BY_KEY[result.task.scenario is None, result.task.key]
            item = gallery.thumbnail(drawing.title, drawing.caption, result.files)
            by_scenario[result.task.scenario].append(item)
    parts = [
        gallery.opening(f"Figures of {run.name or 'a run'}", metadata_of(run), note, names),
        "<h2>Over all scenarios</h2>",
        gallery.thumbnails(by_scenario[None]),
    ]
    for number, name in enumerate(names):
        parts.append(gallery.section(number, name, at, _view_of(run, name)))
        parts.append(gallery.thumbnails(by_scenario[name]))
    return "\n".join([*parts, gallery.not_drawn(_reasons(results)), "</body></html>", ""])


def _view_of(run: xr.DataTree, name: str) -> dict[str, str]:
    """Return the viewer's place at which a scenario's heads are drawn."""
    view = {"scenario": name}
    with contextlib.suppress(ZarrtraceError, KeyError):  # not all runs have attention
        view["layer"] = str(strongest_layer(run[name].to_dataset()))
    return view


def _reasons(results: Sequence[_Result]) -> dict[tuple[str, str], list[str]]:
    """Return, by title and reason, the scenarios of figures that were not drawn."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.why_not:
            title = _BY_KEY[result.task.scenario is None, result.task.key].title
            # The reason names the scenario; without it, scenarios with the same one are together.
            own = result.why_not.removeprefix(f"{result.task.scenario}: ")
            reasons.setdefault((title, own), []).append(result.task.scenario or "all scenarios")
    return reasons
