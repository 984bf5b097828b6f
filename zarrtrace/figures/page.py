"""All figures of a run, and a page that shows them."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from zarrtrace.analysis.traces import traces
from zarrtrace.errors import ConfigError, NotATraceError, ZarrtraceError
from zarrtrace.figures import catalogue, gallery
from zarrtrace.figures.drawing import PRINT_DPI, box_of
from zarrtrace.figures.files import is_own, metadata_of, save
from zarrtrace.scenarios import chosen_names
from zarrtrace.storage import Address, Location, locate
from zarrtrace.store import kind_of, open_run, read_run, refuse_inside

#: Callable that gets ``done, total`` and the name of the figure that was drawn last.
Progress = Callable[[int, int, str], None]

FORMATS = ("png", "pdf")
#: A PDF takes as long as a PNG, half of it for its fonts: PDFs are written if asked for.
DEFAULT_FORMATS = ("png",)
#: Scenarios that are drawn one by one, at most.
MOST_DRAWN = 50
# Below so many figures a worker, starting it takes longer than it saves.
_WORTH_A_WORKER = 12


def draw_run(
    path: Address,
    output: str | Path,
    *,
    scenarios: Sequence[str] | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    dpi: float = PRINT_DPI,
    special: bool = False,
    overwrite: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Draw all figures of a run, and a page that shows them.

    Parameters
    ----------
    path
        Folder of the run, or of one of its traces, which is then the scenario to draw one by one.
    output
        Folder to write to; it is made if it does not exist. Figures that zarrtrace drew there
        earlier are replaced by those of the same name.
    scenarios
        Scenarios to draw one by one; if None all of them, or :data:`MOST_DRAWN` evenly spaced ones.
        Figures over scenarios take all, or ``catalogue.MOST_COMPARED`` evenly spaced ones.
    formats
        Formats to write: ``"png"``, ``"pdf"`` or both.
    dpi
        Dots per inch of the PNGs, and of the images within the PDFs.
    special
        Whether to draw activations at special tokens (BOS, chat markers) and count their words.
    overwrite
        Replace files of the same name that zarrtrace did not write.
    workers
        Number of processes at most; small runs are drawn in this one.
    progress
        Callable that gets the number of figures done, of all, and the last one's name.

    Returns
    -------
    Path
        The page. It names figures that could not be drawn, and why.

    Raises
    ------
    ScenarioError
        If the run has no such scenario.
    ConfigError
        If a format is another one, `output` is in a run, or files there would be replaced that
        zarrtrace did not write, and `overwrite` is false.
    NotATraceError, FormatVersionError, IncompleteError, IntegrityError
        As for :func:`zarrtrace.open_run`.
    """
    path, output = locate(path), Path(output)
    refuse_inside(output)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(
            f"cannot write figures as {unknown[0]!r}" if unknown else "no format was given",
            remedy=f"There are: {', '.join(FORMATS)}.",
        )
    path, scenarios = run_of(path, scenarios)
    known = read_run(path).attributes.scenarios
    names = (
        catalogue.evenly_spaced(known, MOST_DRAWN)
        if scenarios is None
        else chosen_names(known, scenarios)
    )
    catalogue.forget()
    run = catalogue.open_compared(path)
    tasks = _tasks(names, has_bands="bands" in run.attrs)
    if not overwrite:
        _refuse_others(output, tasks, formats)
    output.mkdir(parents=True, exist_ok=True)
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


def run_of(
    path: Location, scenarios: Sequence[str] | None
) -> tuple[Location, Sequence[str] | None]:
    """Return a run and the scenarios to draw one by one; of a trace its run and its name."""
    if kind_of(path) != "trace":
        return path, scenarios
    is_named = path.path is None or path.path.name not in ("", "..")
    trace = path if is_named else path.resolved()
    try:
        names = read_run(trace.parent).attributes.scenarios
    except NotATraceError:  # a copy of a trace stands alone, and is refused as no run
        return path, scenarios
    if trace.name not in names:
        return path, scenarios
    return trace.parent, chosen_names([trace.name], scenarios)


def sampled(names: Sequence[str], chosen: Sequence[str] | None) -> str:
    """Say which scenarios are drawn; empty if all of them are."""
    parts = []
    if len(names) > catalogue.MOST_COMPARED:
        parts.append(f"figures over scenarios take {catalogue.MOST_COMPARED:,}")
    if chosen is None and len(names) > MOST_DRAWN:
        parts.append(f"{MOST_DRAWN} are drawn one by one (--scenario NAME draws others)")
    said = f"Of {len(names):,} scenarios, evenly spaced: {', '.join(parts)}."
    return said if parts else ""


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


def _drawing_of(task: _Task) -> catalogue.Drawing:
    known = catalogue.OF_RUN if task.scenario is None else catalogue.OF_SCENARIO
    return next(drawing for drawing in known if drawing.key == task.key)


def _tasks(scenarios: Sequence[str], *, has_bands: bool) -> list[_Task]:
    """List the figures of a run, those over scenarios first."""
    tasks = [
        _Task(drawing.key, None, f"run_{drawing.key}")
        for drawing in catalogue.OF_RUN
        if has_bands or not drawing.needs_bands
    ]
    return tasks + [
        _Task(drawing.key, name, f"{stem}_{drawing.key}")
        for name, stem in zip(scenarios, _stems(scenarios), strict=True)
        for drawing in catalogue.OF_SCENARIO
    ]


def _refuse_others(output: Path, tasks: Sequence[_Task], formats: Sequence[str]) -> None:
    """Refuse to replace a page or a picture that zarrtrace did not write."""
    there = {file.name: file for file in output.glob("*")}
    names = ["index.html", *(f"{task.stem}.{ending}" for task in tasks for ending in formats)]
    others = [name for name in names if name in there and not is_own(there[name])]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ConfigError(
            f"{output / others[0]}{more}: there already, and not written by 'zarrtrace figures'",
            why="Figures have the names of their scenarios, and the page is called index.html.",
            remedy="Choose another --output, or replace these files with --overwrite.",
        )


# --- drawing -----------------------------------------------------------------------------------


def _draw(
    path: Location,
    output: str,
    task: _Task,
    *,
    formats: tuple[str, ...],
    dpi: float,
    special: bool = False,
) -> _Result:
    drawing = _drawing_of(task)
    try:
        run = catalogue.open_compared(path)
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
    found = traces(catalogue.open_compared(path))
    return found[name] if name in found else traces(open_run(path, scenarios=[name]))[name]


def _collect_seldom() -> None:
    """Collect garbage less often: a figure is 100,000 objects in cycles, which are in use."""
    gc.freeze()
    gc.set_threshold(20_000)


def _in_processes(
    draw: Callable[[_Task], _Result], tasks: Sequence[_Task], workers: int
) -> Iterator[_Result]:
    """Draw in several processes; yield results as they come."""
    if workers < 2:
        yield from map(draw, tasks)
        return
    # Not forked: Zarr and dask keep threads, which do not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers - 1, context, initializer=_collect_seldom) as pool:
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
    """Return distinct names of files of letters, digits, dots and dashes."""
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
            drawing = _drawing_of(result.task)
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
        view["layer"] = str(catalogue.strongest_layer(run[name].to_dataset()))
    return view


def _reasons(results: Sequence[_Result]) -> dict[tuple[str, str], list[str]]:
    """Return scenarios without a figure, by title and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        if result.why_not:
            title = _drawing_of(result.task).title
            # The reason names the scenario; without it, scenarios with the same one are together.
            own = result.why_not.removeprefix(f"{result.task.scenario}: ")
            reasons.setdefault((title, own), []).append(result.task.scenario or "all scenarios")
    return reasons
