"""Object stores through obstore: Amazon S3, Google Cloud Storage, Azure, web servers, memory."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from zarrtrace.errors import ConfigError, RemoteError
from zarrtrace.storage.backend import Content, first_line, import_package

_AZURE = frozenset({"az", "adl", "azure", "abfs", "abfss"})
#: Kinds of addresses that obstore opens.
SCHEMES = frozenset({"s3", "s3a", "gs", "http", "https", "memory", *_AZURE})

# Objects above this size are sent in parts, a few at a time.
_PART, _PARTS_AT_ONCE = 8 * 2**20, 4
# Reads this close to each other become one request.
_CLOSE = 2**18
# Waiting times are drawn between the initial one and `base` times the one before, so that with a
# small base they hardly grow, and a number of retries is used up in seconds.
_RETRIES: Any = {
    "max_retries": 200,
    "retry_timeout": dt.timedelta(minutes=2),
    "backoff": {
        "init_backoff": dt.timedelta(milliseconds=100),
        "max_backoff": dt.timedelta(seconds=10),
        "base": 4,
    },
}
# obstore does not repeat a listing, copy or deletion whose answer was cut short: how often it is
# asked for, and what obstore 0.12 says then.
_ATTEMPTS, _CUT_SHORT = 5, ("response body", "body error", "invalid list response")
_CLIENT = {"connect_timeout": "10s", "timeout": "60s"}
# Options of the HTTP client, not of the store.
_OF_CLIENT = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "proxy_url",
        "proxy_ca_certificate",
        "proxy_excludes",
        "timeout",
        "user_agent",
    }
)


class ObjectStore:
    """A store of obstore, as a :class:`~zarrtrace.storage.backend.WritableBackend`.

    Web servers can neither be written to nor list their keys.
    """

    def __init__(self, base: str, options: Mapping[str, str]) -> None:
        self._base = base
        scheme = base.partition("://")[0]
        self._obstore = import_package("obstore", scheme)
        self._has_answered = False
        self._lacks_suffixes = scheme in _AZURE  # "the last 100 bytes" is no request there
        self.writable = self.listable = scheme not in ("http", "https")
        try:
            self._patient, self._prefix = _open(base, options, _RETRIES)
            # A wrong address, or missing credentials, is said soon.
            hasty = {**_RETRIES, "retry_timeout": dt.timedelta(seconds=10)}
            self._hasty, _ = _open(base, options, hasty)
        except (ValueError, self._obstore.exceptions.BaseError) as error:
            raise ConfigError(
                f"{base}: {first_line(error)}",
                why="The address, or an option that was given for it, is not understood.",
                remedy="Options are those of obstore's store for this kind of address.",
            ) from None  # the cause quotes addresses, with signatures

    @property
    def _store(self) -> Any:
        return self._patient if self._has_answered else self._hasty

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        known = self._obstore.exceptions
        try:
            yield
            self._has_answered = True
        except FileNotFoundError:
            self._has_answered = True
            raise
        except (known.PermissionDeniedError, known.UnauthenticatedError) as error:
            raise RemoteError(
                f"{self._base}/{key}: access denied: {first_line(error)}",
                why="Credentials are taken from the environment, as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY.",
                remedy="Set them; for a public bucket, --storage-option skip_signature=true.",
            ) from None  # the cause quotes addresses
        except known.BaseError as error:
            raise RemoteError(
                f"{self._base}/{key}: {first_line(error)}",
                why="The store cannot be reached, or there are no credentials for it in the "
                "environment; requests were repeated.",
                remedy="Check these, and run the same command again: what is stored stays.",
            ) from None  # the cause quotes addresses

    def get(self, key: str, last: int | None = None) -> Content:
        """Read an object, or its last bytes."""
        if last is not None and self._lacks_suffixes:
            size = self.size(key)
            return Content(self.get_ranges(key, [(max(0, size - last), size)])[0], size)
        options = None if last is None else {"range": {"suffix": last}}
        with self._explained(key):
            found = self._obstore.get(self._store, self._prefix + key, options=options)
            return Content(found.bytes().to_bytes(), found.meta["size"])

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges of an object; neighbours in one request."""
        starts, ends = zip(*ranges, strict=True)
        with self._explained(key):
            found = self._obstore.get_ranges(
                self._store, self._prefix + key, starts=starts, ends=ends, coalesce=_CLOSE
            )
            return [one.to_bytes() for one in found]

    def size(self, key: str) -> int:
        """Return the size of an object."""
        with self._explained(key):
            return int(self._obstore.head(self._store, self._prefix + key)["size"])

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object."""
        with self._explained(key):
            self._obstore.put(
                self._store,
                self._prefix + key,
                data,
                chunk_size=_PART,
                max_concurrency=_PARTS_AT_ONCE,
            )

    def copy(self, source: str, target: str) -> None:
        """Copy an object within the store."""
        names = self._prefix + source, self._prefix + target
        self._repeated(source, lambda: self._obstore.copy(self._store, *names))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects."""
        if keys:
            names = [self._prefix + key for key in keys]
            with contextlib.suppress(FileNotFoundError):
                self._repeated(keys[0], lambda: self._obstore.delete(self._store, names))

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of every object below a folder."""
        below = self._prefix + folder
        pages = self._repeated(folder, lambda: list(self._obstore.list(self._store, below)))
        return {
            one["path"].removeprefix(self._prefix): int(one["size"])
            for page in pages
            for one in page
        }

    def children(self, folder: str) -> list[str]:
        """Return the names in a folder."""
        below = (self._prefix + folder).rstrip("/") or None
        found = self._repeated(
            folder, lambda: self._obstore.list_with_delimiter(self._store, below)
        )
        paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def _repeated(self, key: str, ask: Any, attempts: int = _ATTEMPTS) -> Any:
        """List, copy or delete, again if the answer was cut short: obstore repeats all others."""
        try:
            with self._explained(key):
                return ask()
        except RemoteError as error:
            if attempts == 1 or not any(one in error.what for one in _CUT_SHORT):
                raise
        return self._repeated(key, ask, attempts - 1)


def _open(base: str, options: Mapping[str, str], retries: Any) -> tuple[Any, str]:
    """Return a store of obstore, and the prefix of its keys."""
    from obstore.store import HTTPStore, from_url  # noqa: PLC0415

    scheme, _, rest = base.partition("://")
    if scheme == "memory":
        return _memory(os.getpid()), f"{rest}/"
    client: Any = {**_CLIENT, **{key: value for key, value in options.items() if key in _OF_CLIENT}}
    config: Any = {key: value for key, value in options.items() if key not in _OF_CLIENT}
    if _asks_for_http(scheme, config):
        client.setdefault("allow_http", "true")
    if scheme in ("http", "https"):
        if config:
            raise ValueError(f"unknown option {next(iter(config))!r}")
        return HTTPStore.from_url(base, client_options=client, retry_config=retries), ""
    store = from_url(base, config=config or None, client_options=client, retry_config=retries)
    return store, ""


@cache
def _memory(_process: int) -> Any:
    from obstore.store import MemoryStore  # noqa: PLC0415

    return MemoryStore()


def _asks_for_http(scheme: str, config: Mapping[str, str]) -> bool:
    """Whether an address or an endpoint names http explicitly."""
    asked = [scheme + "://", *(value for key, value in config.items() if "endpoint" in key)]
    if scheme in ("s3", "s3a"):
        asked += [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")]
    return any(one.startswith("http://") for one in asked)
