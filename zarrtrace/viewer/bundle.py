"""Write a bundle: a folder for any host, or one HTML file."""

from __future__ import annotations

import base64
import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from zarrtrace.errors import ConfigError, StoreError
from zarrtrace.storage import Address, disk, locate
from zarrtrace.storage.locks import take_lock
from zarrtrace.store import old_of, put_in_place, refuse_inside
from zarrtrace.viewer.layout import Layout, sample
from zarrtrace.viewer.page_files import DATA_ELEMENT, PAGE_FILES, page_file, single_page
from zarrtrace.viewer.traces import MOST_SCENARIOS

#: A larger single file is refused: browsers hold all of it in memory, base64 and all.
MAX_HTML_BYTES = 150 * 10**6
#: Above this, attention in a single file is rounded to 8 bits.
_EIGHT_BIT_FROM = 40 * 10**6

Progress = Callable[[int, int], None]


class Estimate(NamedTuple):
    """Size of a bundle before it is written.

    Attributes
    ----------
    bytes
        Expected size, from a few compressed chunks of each array.
    files
        Number of files; 1 for a single HTML file.
    eight_bit
        Whether attention will be rounded to 8 bits.
    """

    bytes: int
    files: int
    eight_bit: bool


def estimate(layout: Layout, output: str | Path) -> Estimate:
    """Estimate how large a bundle will be."""
    total = 0
    for path, array in layout.arrays.items():
        places = sample(array)
        sampled = sum(len(layout.read(f"data/{path}/c/{'/'.join(map(str, at))}")) for at in places)
        count = sum(1 for _ in array.grid())
        total += sampled * count // max(1, len(places))
    total += sum(len(layout.read(file)) for file in layout.label_files())
    for files in (layout.scenario_files(), layout.context_files()):
        some = files[:: max(1, len(files) // 16)]
        total += sum(len(layout.read(file)) for file in some) * len(files) // max(1, len(some))
    total += len(layout.index) + sum(len(page_file(name)) for name in PAGE_FILES)
    if _is_html(output):
        return Estimate(total * 4 // 3, 1, layout.eight_bit)
    return Estimate(total, sum(1 for _ in layout.files()), layout.eight_bit)


def plan(
    run: Address,
    output: str | Path,
    *,
    scenarios: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    eight_bit_from: int = _EIGHT_BIT_FROM,
) -> tuple[Layout, Estimate]:
    """Choose the content of a bundle.

    Attention in a large single file is rounded to 8 bits.

    Raises
    ------
    ConfigError
        If there are more than :data:`~zarrtrace.viewer.traces.MOST_SCENARIOS` scenarios.
    """
    layout = Layout(run, scenarios=scenarios, layers=layers)
    if layout.traces.is_large:
        raise ConfigError(
            f"{run}: {len(layout.traces):,} scenarios, a bundle holds at most {MOST_SCENARIOS}",
            why="It copies all their values, with the words and contrasts of every feature.",
            remedy="Choose some: --scenario NAME, repeatable. 'zarrtrace info' lists them, and "
            "'zarrtrace view' shows a run of any size.",
        )
    found = estimate(layout, output)
    if _is_html(output) and found.bytes > eight_bit_from:
        layout = Layout(run, scenarios=scenarios, layers=layers, eight_bit=True)
        found = estimate(layout, output)
    return layout, found


def write_bundle(
    layout: Layout,
    output: str | Path,
    *,
    max_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a bundle.

    Parameters
    ----------
    layout
        Content of the bundle, from :func:`plan`.
    output
        A folder, or a file ending in ``.html``. It appears when it is whole.
    max_bytes
        Refuse to write more; for a single file :data:`MAX_HTML_BYTES` if None.
    overwrite
        Whether to replace a bundle that is there.
    progress
        Called with the numbers of files done and of all.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    ConfigError
        If `output` exists (and is no bundle, or `overwrite` is not set) or is in a run, or the
        limit is passed.
    NoSpaceError
        If the disk is full.
    """
    refuse_inside(output)
    output = Path(locate(output).resolved())
    _remove_left(output)
    _check_output(output, overwrite=overwrite)
    limit = MAX_HTML_BYTES if max_bytes is None and _is_html(output) else max_bytes
    with disk.explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with _workspace(output) as made:
            whole = made / "whole"
            if _is_html(output):
                written = _write_html(layout, whole, limit, progress)
                whole.replace(output)
            else:
                written = _write_folder(layout, whole, limit, progress)
                put_in_place(whole, output)
    return written


@contextlib.contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    """Yield a folder beside the output, which later calls clean up.

    If this process is killed, the next call removes the folder.
    """
    while True:
        made = Path(tempfile.mkdtemp(dir=output.parent, prefix=_prefix(output)))
        handle = os.open(made, os.O_RDONLY)
        with contextlib.suppress(StoreError):  # no locks there: nobody removes it, either
            if not take_lock(handle, made):  # another call takes it for a left-over
                os.close(handle)
                continue
        break
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(handle)


def _prefix(output: Path) -> str:
    return f".{output.name}.zarrtrace-bundle-"


def _remove_left(output: Path) -> None:
    """Remove the folders of killed calls.

    A live call holds the lock of its folder.

    Where folders cannot be exchanged, the folder may hold the bundle that was being replaced,
    which is put back.
    """
    for folder in output.parent.glob(f"{glob.escape(_prefix(output))}*"):
        whole = folder / "whole"
        if folder.is_symlink() or not folder.is_dir():
            continue
        if not set(folder.iterdir()) <= {whole, old_of(whole)}:
            continue
        handle = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(StoreError):
                if take_lock(handle, folder):
                    if old_of(whole).is_dir() and not output.exists():
                        old_of(whole).rename(output)
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def refuse_larger(size: int, limit: int | None, *, is_page: bool = False) -> None:
    """Refuse a size above a limit.

    Parameters
    ----------
    size, limit
        Bytes; no limit if None.
    is_page
        Whether all of it is one HTML file.

    Raises
    ------
    ConfigError
    """
    if limit is not None and size > limit:
        # A folder has no limit of its own, and is often larger: it keeps attention in full.
        is_own = is_page and limit == MAX_HTML_BYTES
        folder = ", or write a folder in place of a single file" if is_own else ""
        raise ConfigError(
            f"the bundle would take {size / 1e6:.1f} MB or more, above the limit of "
            f"{limit / 1e6:.1f} MB",
            why="Attention of every head takes most of it.",
            remedy="Choose fewer scenarios (--scenario) or layers (--layers), or raise --max-size"
            f"{folder}.",
        )


def _is_html(output: str | Path) -> bool:
    return Path(output).suffix.lower() in (".html", ".htm")


def _check_output(output: Path, *, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    other = _other_than_a_bundle(output)
    if not overwrite or other is not None:
        raise ConfigError(
            f"{output} exists" + ("" if other is None else f", and is no bundle: {other}"),
            remedy="Choose another path" + (", or give --overwrite." if other is None else "."),
        )


def _other_than_a_bundle(output: Path) -> str | None:
    """Return why a path is no bundle, None if it is one.

    A bundle that is replaced is removed: nothing else may be.
    """
    if _is_html(output):
        if not output.is_file() or DATA_ELEMENT.encode() not in output.read_bytes():
            return "it was not written by 'zarrtrace bundle'"
        return None
    if not output.is_dir():
        return "it is a file"
    known = {*PAGE_FILES, "index.json", "data"}
    strange = sorted(path.name for path in output.iterdir() if path.name not in known)
    if strange:
        return f"it holds {strange[0]}"
    try:
        found = json.loads((locate(output) / "index.json").read())  # a pipe is not waited for
        ours = {"version", "title", "scenarios"} <= set(found)
    except (OSError, ValueError, TypeError, StoreError):
        ours = False
    return None if ours else "its index.json is not that of a bundle"


def _contents(layout: Layout, progress: Progress | None) -> Iterator[tuple[str, bytes]]:
    files = list(layout.files())
    for done, file in enumerate(files, 1):
        yield file, layout.read(file)
        if progress:
            progress(done, len(files))


def _write_folder(
    layout: Layout, folder: Path, limit: int | None, progress: Progress | None
) -> int:
    total = 0
    for file, content in _contents(layout, progress):
        total += len(content)
        refuse_larger(total, limit)
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return total


def _write_html(layout: Layout, path: Path, limit: int | None, progress: Progress | None) -> int:
    page = page_of(layout, limit=limit, progress=progress)
    path.write_bytes(page)
    return len(page)


def page_of(
    layout: Layout, *, view: str = "", limit: int | None = None, progress: Progress | None = None
) -> bytes:
    """Return a bundle as one HTML page.

    Parameters
    ----------
    layout
        Content of the page.
    view
        First view, written like the part of an address behind ``#``.
    limit
        Bytes that it may take.
    progress
        Called with the numbers of files done and of all.

    Raises
    ------
    ConfigError
        If the limit is passed.
    """
    total = 0
    files: dict[str, str] = {}
    for file, content in _contents(layout, progress):
        if file.startswith("data/") and file.endswith("zarr.json"):
            continue  # the page reads index.json
        if file not in PAGE_FILES:
            files[file] = base64.b64encode(content).decode()
            total += len(files[file])
            refuse_larger(total, limit, is_page=True)
    page = single_page(files, view)
    refuse_larger(len(page), limit, is_page=True)
    return page
