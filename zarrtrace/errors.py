"""Every exception that zarrtrace raises on purpose.

::

    ZarrtraceError
    ├── UsageError                  the request itself is wrong (exit code 2)
    │   ├── ScenarioError           a scenario file or entry
    │   └── ConfigError             options that fit neither the model nor each other
    ├── CaptureError                the model or its SAEs
    │   ├── ModelError              unknown, gated, or not capturable exactly
    │   ├── SAEError                missing for a layer, or does not fit the model
    │   └── NonFiniteError          NaN or infinity would be stored
    ├── ClusterError                a Dask cluster cannot be reached, or loses its workers
    ├── StoreError                  what is on disk
    │   ├── NotATraceError          exists, but is neither a run nor a trace
    │   ├── FormatVersionError      written by a newer zarrtrace
    │   ├── IncompleteError         layers or scenarios are missing (exit code 3)
    │   ├── IntegrityError          bytes are not the ones that were written
    │   ├── ConfigMismatchError     resumed with another configuration
    │   ├── LockedError             another process is writing the run
    │   ├── RemoteError             an object store cannot be reached, or refuses
    │   └── NoSpaceError            the disk is full
    └── NPZError                    a folder in the documented NPZ layout

Each message says what failed, why that usually happens and what to do about it. The one warning,
:class:`SharedTemplateWarning`, is a ``UserWarning``.
"""

from __future__ import annotations

from zarrtrace.text import terminal_text, without_secrets


class ZarrtraceError(Exception):
    """Base of all errors that zarrtrace raises on purpose.

    Messages quote files, servers and addresses: control characters are escaped in them, and secrets
    in addresses left out, because a message ends on a terminal, in a notebook or in a log.

    Parameters
    ----------
    what
        The failure, with the name of the thing it failed on.
    why
        The usual cause, if one is known.
    remedy
        The next step for the user.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = (
            without_secrets(terminal_text(part, lines=True)) for part in (what, why, remedy)
        )
        super().__init__("\n".join(part for part in (self.what, self.why, self.remedy) if part))

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (Dask workers); keyword arguments need help to survive.
        return _rebuild, (type(self), self.what, self.why, self.remedy)


def _rebuild(kind: type[ZarrtraceError], what: str, why: str, remedy: str) -> ZarrtraceError:
    return kind(what, why=why, remedy=remedy)


def readable(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def install_command(extras: str = "") -> str:
    """Return how to install zarrtrace with extras: no package index has it."""
    what = f"'.[{extras}]'" if extras else "."
    return f"In an up-to-date clone of zarrtrace's repository, run: pip install {what}"


def missing_for_cluster(error: ModuleNotFoundError) -> ConfigError:
    """Return the error that says what a Dask cluster needs."""
    return ConfigError(
        f"a cluster needs {error.name}, which is not installed",
        why="Everything works in one process without it, so it is an extra.",
        remedy=install_command("cluster"),
    )


class UsageError(ZarrtraceError):
    """The request itself is wrong."""

    exit_code = 2


class ScenarioError(UsageError):
    """A scenario file, or an entry of one, cannot be used."""


class ConfigError(UsageError):
    """Options do not fit the model, the SAEs or each other."""


class CaptureError(ZarrtraceError):
    """Something about the model or its SAEs."""


class ModelError(CaptureError):
    """The model cannot be loaded, or cannot be captured exactly."""


class SAEError(CaptureError):
    """An SAE is missing for a layer, or does not fit the model."""


class NonFiniteError(CaptureError):
    """The model computed NaN or infinity, or values exceed the stored precision."""


class ClusterError(ZarrtraceError):
    """A Dask cluster cannot be reached, has workers that differ, or loses them."""


class StoreError(ZarrtraceError):
    """Something about what is on disk."""


class NotATraceError(StoreError):
    """The path exists, but is neither a run nor a trace."""


class FormatVersionError(StoreError):
    """The store was written by a newer zarrtrace, or before the first release."""


class IncompleteError(StoreError):
    """Layers or scenarios are missing."""

    exit_code = 3


class IntegrityError(StoreError):
    """Stored bytes are not the ones that were written."""


class ConfigMismatchError(StoreError, UsageError):
    """A run was resumed with another configuration."""


class LockedError(StoreError):
    """Another process is writing the run."""


class RemoteError(StoreError):
    """An object store cannot be reached, or refuses."""


class NoSpaceError(StoreError):
    """The disk is full."""


class NPZError(ZarrtraceError):
    """A folder in the documented NPZ layout cannot be read or written."""


class SharedTemplateWarning(UserWarning):
    """Scenarios that are variants of few templates were compared as if independent."""
