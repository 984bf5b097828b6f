"""Continuations that were generated, kept until the run or the table that holds them is whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from zarrtrace.errors import StoreError
from zarrtrace.identity import differences, refuse_other
from zarrtrace.records import Continuation
from zarrtrace.scenarios import split_trace_name
from zarrtrace.storage import Location, disk
from zarrtrace.storage.locks import FileLock
from zarrtrace.store.array import open_array
from zarrtrace.store.journal import Line, decode_line, encode_line
from zarrtrace.store.metadata import read_scenario
from zarrtrace.store.nodes import NONSENSE
from zarrtrace.store.publish import beside
from zarrtrace.store.staged import staging_folder


class Repeat(NamedTuple):
    """A continuation's place: the name of a scenario, and its number."""

    scenario: str
    number: int


class ContinuationFile:
    """The continuations of a run or a table, appended as they are generated; a context manager.

    It stands beside the run, and is locked while it is open. Its lines are those of a
    :mod:`journal <zarrtrace.store.journal>`: the first holds the settings, each other one a
    continuation and the digest of its prompt. The first line that does not hold ends it.

    Parameters
    ----------
    run
        Folder of the run or table, or its address.
    settings
        Options that decide the continuations, JSON values only.
    is_first_check
        Whether nobody has compared the settings yet: others are refused then, and replaced if not.
    accept_versions
        Whether libraries may have other versions than those that began.

    Raises
    ------
    ConfigMismatchError
        If it was begun with other settings.
    LockedError
        If another process generates continuations of the run.
    """

    def __init__(
        self,
        run: Location,
        settings: Mapping[str, Any],
        *,
        is_first_check: bool = False,
        accept_versions: bool = False,
    ) -> None:
        self._run, self._settings = run, settings
        self._is_first_check, self._accept_versions = is_first_check, accept_versions
        self._path = _path(run)

    def __enter__(self) -> Self:
        with disk.explained(self._run):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(beside(self._path, "lock"), self._run)
            try:
                self._open()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.release()

    def _open(self) -> None:
        self._file = self._path.open("a+b")
        try:
            self._file.seek(0)
            header = decode_line(self._file.readline())
            stored = None if header is None else header.get("settings")
            if isinstance(stored, dict):
                if self._is_first_check:
                    accepted = self._accept_versions
                    refuse_other(self._run, stored, self._settings, accept_versions=accepted)
                others = differences(_without_versions(stored), _without_versions(self._settings))
            if not isinstance(stored, dict) or others:
                self._file.truncate(0)
                self._file.write(encode_line({"settings": self._settings}))
                self._file.flush()
            self._end = self._file.tell()
        except BaseException:
            self._file.close()
            raise

    def take(self, wanted: Mapping[Repeat, str]) -> dict[Repeat, Continuation]:
        """Read the next continuations, up to the first that is not wanted.

        Parameters
        ----------
        wanted
            Digest of the prompt by continuation.
        """
        found: dict[Repeat, Continuation] = {}
        with disk.explained(self._run):
            self._file.seek(self._end)
            while (line := decode_line(self._file.readline())) is not None:
                try:
                    key, digest, continuation = _read(line)
                except NONSENSE:  # nobody wrote such a line
                    break
                if wanted.get(key) != digest or key in found:
                    break
                found[key] = continuation
                self._end = self._file.tell()
        return found

    def add(self, made: Mapping[Repeat, Continuation], digests: Mapping[Repeat, str]) -> None:
        """Append continuations behind those that were taken; what stands there is removed."""
        with disk.explained(self._run):
            self._file.truncate(self._end)
            for key, one in made.items():
                self._file.write(encode_line({**_line(key, one), "prompt": digests[key]}))
            self._file.flush()
            self._end = self._file.tell()


def remove_continuations(run: Location) -> None:
    """Remove the continuations that are kept beside a run, which holds them now."""
    with disk.explained(run):
        _path(run).unlink(missing_ok=True)


def _path(run: Location) -> Path:
    run = run.resolved()
    return beside(run.path or staging_folder(run), "continuations")


def _without_versions(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "versions"}


def _line(key: Repeat, one: Continuation) -> Line:
    return {**key._asdict(), **one._asdict()}


def _read(line: Line) -> tuple[Repeat, str, Continuation]:
    key = Repeat(line["scenario"], line["number"])
    tokens, text = tuple(line["tokens"]), line["text"]
    if not tokens or not all(type(one) is int for one in tokens) or not isinstance(text, str):
        raise TypeError(f"no continuation: {line}")
    if line["ended_by"] not in ("length", "stop", "end_of_sequence"):
        raise ValueError(f"ended by {line['ended_by']!r}")
    return key, line["prompt"], Continuation(tokens, text, line["ended_by"])


def stored_continuations(run: Location, names: Iterable[str]) -> dict[Repeat, Continuation]:
    """Read the continuations of a run's complete traces; those that cannot be read are left out.

    Parameters
    ----------
    names
        Names of traces.
    """

    def read(name: str) -> tuple[Repeat, Continuation] | None:
        with contextlib.suppress(StoreError):
            trace = read_scenario(run, name)
            if (made := trace.attributes.generation) is not None:
                ids = open_array(trace, "token_id").load()[made.prompt_tokens :].tolist()
                scenario, repeat = split_trace_name(name)
                place = Repeat(scenario, repeat or 0)
                return place, Continuation(tuple(ids), made.text, made.ended_by)
        return None

    return dict(one for one in run.each(read, run.present([*names])) if one is not None)
