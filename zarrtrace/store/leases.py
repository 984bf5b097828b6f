"""Locks in object stores.

A lock is an object that names its owner. Nothing there notices that a process has died, so every
owner has another object, its heartbeat, that it writes again and again. Whoever finds a lock
watches its owner's heartbeat: if it changes, the owner is alive; if it is gone, or stays the same
for :data:`SECONDS_DEAD`, the lock is taken over. Clocks of different machines are never compared.
A process that could not write its heartbeat for about as long first sees whether it is still there,
and writes nothing more if it is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence

from zarrtrace.errors import LockedError, StoreError
from zarrtrace.store.objects import Changed, ObjectPath, guard, unguard

#: Between two heartbeats; after so long without one, an owner counts as dead.
SECONDS_A_BEAT, SECONDS_DEAD = 5.0, 30.0


class Lease:
    """One owner of some locks; to be taken once and given back once.

    Parameters
    ----------
    beats
        Folder of the heartbeats.
    locks
        The objects; everybody must name them in the same order.
    subjects
        What must not be written to once the locks are lost.
    """

    def __init__(
        self, beats: ObjectPath, locks: Sequence[ObjectPath], subjects: Sequence[ObjectPath]
    ) -> None:
        self._owner, self._count = uuid.uuid4().hex, 0
        self._beat, self._beats = beats / self._owner, beats
        self._locks, self._subjects = tuple(locks), tuple(subjects)
        self._held: list[ObjectPath] = []
        self._renewed = 0.0
        self._guarding = self._lost = False
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="zarrtrace-lease", daemon=True)

    def take(self, *, seconds: float) -> ObjectPath | None:
        """Take all locks, or return the one whose owner is still alive after so many seconds."""
        until = time.monotonic() + seconds
        self._write_beat(first=True)
        self._thread.start()
        try:
            refused = self._take_all(until)
        except BaseException:
            self.give_back()
            raise
        if refused:
            self.give_back()
            return refused
        for subject in self._subjects:
            guard(subject, self.check)
        self._guarding = True
        return None

    def _take_all(self, until: float) -> ObjectPath | None:
        taken_over = []
        for lock in self._locks:
            while not self._take_free(lock):
                wait_for_owner(lock, self._beats, until)
                if self._write_over_dead(lock):
                    taken_over.append(lock)
                    break
                if time.monotonic() > until and _owner(lock) is not None:
                    return lock
        if taken_over:
            # Some servers know no condition: of two that write, the later one has the lock.
            time.sleep(SECONDS_A_BEAT)
            return next((lock for lock in taken_over if _owner(lock) != self._owner), None)
        return None

    def _content(self) -> bytes:
        said = {"owner": self._owner, "host": socket.gethostname(), "process": os.getpid()}
        return json.dumps(said).encode()

    def _take_free(self, lock: ObjectPath) -> bool:
        with contextlib.suppress(Changed):
            lock.backend.create(lock.key, self._content())
            self._held.append(lock)
            return True
        return False

    def _write_over_dead(self, lock: ObjectPath) -> bool:
        try:
            found = lock.backend.get(lock.key)
            if _is_there(self._beats, _owner_in(found.data)):
                return False
            lock.backend.replace(lock.key, self._content(), found.tag)
        except (Changed, FileNotFoundError):
            return False
        self._held.append(lock)
        return True

    def _write_beat(self, *, first: bool = False) -> None:
        """Write the heartbeat; raise Changed or FileNotFoundError if we were declared dead."""
        with self._mutex:
            started = time.monotonic()
            self._count += 1
            content = json.dumps({"beat": self._count}).encode()
            if first:
                self._beat.backend.create(self._beat.key, content)
            else:
                found = self._beat.backend.get(self._beat.key)
                if self._held and _owner(self._held[0]) != self._owner:
                    raise Changed
                self._beat.backend.replace(self._beat.key, content, found.tag)
            self._renewed = started

    def _go_on(self) -> None:
        while not self._ended.wait(SECONDS_A_BEAT):
            try:
                self._write_beat()
            except (Changed, FileNotFoundError):
                self._lost = True
                return
            except StoreError:
                continue  # cannot be reached now; check() counts the seconds

    def check(self) -> None:
        """Refuse to go on once the locks are lost; after a long silence, ask.

        Raises
        ------
        LockedError
        RemoteError
            If the store cannot be asked.
        """
        if not self._lost and time.monotonic() - self._renewed > SECONDS_DEAD - SECONDS_A_BEAT:
            try:
                self._write_beat()
            except (Changed, FileNotFoundError):
                self._lost = True
        if self._lost:
            raise LockedError(
                f"{self._subjects[0]}: this process has lost its lock",
                why="Another process took it over: the network, or this process, stood still for "
                f"{SECONDS_DEAD:.0f} seconds.",
                remedy="Run the same command again; it goes on where the run is.",
            )

    def give_back(self) -> None:
        """Let others have the locks."""
        for subject in self._subjects if self._guarding else ():
            unguard(subject)
        self._ended.set()
        self._thread.join()
        # What fails here expires by itself.
        with contextlib.suppress(StoreError):
            if not self._lost:
                mine = [lock for lock in self._held if _owner(lock) == self._owner]
                self._beat.backend.delete([lock.key for lock in mine])
            self._beat.backend.delete([self._beat.key])


def wait_for_owner(lock: ObjectPath, beats: ObjectPath, until: float) -> None:
    """Wait until a lock is gone, or its owner dead, or until a time; then return.

    The heartbeat of an owner that is found dead is removed, so that it learns of it.
    """
    while (owner := _owner(lock)) is not None:
        before, since = _beat_of(beats, owner), time.monotonic()
        if before is None:
            return
        while (now := _beat_of(beats, owner)) == before:
            if time.monotonic() - since > SECONDS_DEAD:
                lock.backend.delete([(beats / owner).key])
                return
            time.sleep(SECONDS_A_BEAT / 5)
        if now is not None and time.monotonic() > until:
            return


def _owner(lock: ObjectPath) -> str | None:
    try:
        return _owner_in(lock.read_bytes())
    except FileNotFoundError:
        return None


def _owner_in(content: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        owner = json.loads(content)["owner"]
        if isinstance(owner, str) and owner.isalnum():
            return owner
    return "nobody"  # has no heartbeat


def _beat_of(beats: ObjectPath, owner: str) -> bytes | None:
    try:
        return (beats / owner).read_bytes()
    except FileNotFoundError:
        return None


def _is_there(beats: ObjectPath, owner: str) -> bool:
    return _beat_of(beats, owner) is not None
