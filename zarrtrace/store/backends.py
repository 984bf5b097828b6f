"""Object stores: obstore where it has a backend, fsspec elsewhere."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from zarrtrace.errors import ConfigError, RemoteError
from zarrtrace.store.objects import Backend, Changed, Content, Tag

_OBSTORE = {"s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https", "memory"}
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
_CLIENT = {"connect_timeout": "10s", "timeout": "60s"}
# Options that are the HTTP client's and not the store's.
_OF_CLIENT = {"allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url",
              "proxy_ca_certificate", "proxy_excludes", "timeout", "user_agent"}  # fmt: skip


def connect(base: str, options: Mapping[str, str]) -> Backend:
    """Return the store at an address.

    Raises
    ------
    ConfigError
        If nothing installed knows this kind of address, or one of the options.
    """
    scheme = base.partition("://")[0]
    if scheme in _OBSTORE:
        return _Obstore(base, options)
    return _Fsspec(base, options)


def _package(name: str, scheme: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{scheme}:// needs {name}, which is not installed",
            why="Runs on a disk do not need it, so it is an extra.",
            remedy="pip install 'zarrtrace[cloud]'",
        ) from error


class _Obstore:
    """Amazon S3, Google Cloud Storage, Azure, web servers and memory, through obstore."""

    def __init__(self, base: str, options: Mapping[str, str]) -> None:
        self._base = base
        scheme = base.partition("://")[0]
        self._obstore = _package("obstore", scheme)
        self._conditional: bool | None = None
        self._answered = False
        self.writable = self.listable = scheme not in ("http", "https")
        try:
            self._patient, self._prefix = _open_obstore(base, options, _RETRIES)
            # A wrong address, or no credentials, is said soon.
            hasty = {**_RETRIES, "retry_timeout": dt.timedelta(seconds=10)}
            self._hasty, _ = _open_obstore(base, options, hasty)
            # Not every server replaces an object on a condition; a refusal is not repeated.
            self._once, _ = _open_obstore(base, options, {"max_retries": 0})
        except (ValueError, self._obstore.exceptions.BaseError) as error:
            raise ConfigError(
                f"{base}: {_first_line(error)}",
                why="The address, or an option that was given for it, is not understood.",
                remedy="Options are those of obstore's store for this kind of address.",
            ) from None  # the cause quotes addresses, with what signs them

    @property
    def _store(self) -> Any:
        return self._patient if self._answered else self._hasty

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        known = self._obstore.exceptions
        try:
            yield
            self._answered = True
        except FileNotFoundError:
            self._answered = True
            raise
        except (known.AlreadyExistsError, known.PreconditionError) as error:
            raise Changed from error
        except (known.PermissionDeniedError, known.UnauthenticatedError) as error:
            raise RemoteError(
                f"{self._base}/{key}: access denied: {_first_line(error)}",
                why="Credentials are taken from the environment, as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY.",
                remedy="Set them; for a public bucket, --storage-option skip_signature=true.",
            ) from None
        except known.BaseError as error:
            raise RemoteError(
                f"{self._base}/{key}: {_first_line(error)}",
                why="The store cannot be reached, or there are no credentials for it in the "
                "environment; requests were repeated.",
                remedy="Check these, and run the same command again: what is stored stays.",
            ) from None

    def get(self, key: str) -> Content:
        with self._explained(key):
            found = self._obstore.get(self._store, self._prefix + key)
            return Content(found.bytes().to_bytes(), found.meta["size"], _tag(found.meta))

    def get_end(self, key: str, length: int) -> Content:
        with self._explained(key):
            options = {"range": {"suffix": length}}
            found = self._obstore.get(self._store, self._prefix + key, options=options)
            return Content(found.bytes().to_bytes(), found.meta["size"], _tag(found.meta))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        starts, ends = zip(*ranges, strict=True)
        with self._explained(key):
            found = self._obstore.get_ranges(
                self._store, self._prefix + key, starts=starts, ends=ends, coalesce=_CLOSE
            )
            return [one.to_bytes() for one in found]

    def size(self, key: str) -> int:
        with self._explained(key):
            return int(self._obstore.head(self._store, self._prefix + key)["size"])

    def put(self, key: str, data: bytes) -> None:
        self._refuse_read_only()
        with self._explained(key):
            self._obstore.put(
                self._store,
                self._prefix + key,
                data,
                chunk_size=_PART,
                max_concurrency=_PARTS_AT_ONCE,
            )

    def create(self, key: str, data: bytes) -> Tag:
        return self._put_if(key, data, "create")

    def replace(self, key: str, data: bytes, tag: Tag) -> Tag:
        mode = dict(tag or ())
        if self._conditional is None and tag is not None:
            try:
                put = self._put_if(key, data, mode, once=True)
            except Changed:
                self._conditional = True
                raise
            except RemoteError as error:
                if "501" in str(error) or "not implemented" in str(error).lower():
                    self._conditional = False
            else:
                self._conditional = True
                return put
        if self._conditional is False or tag is None:
            if self.get(key).tag != tag:
                raise Changed
            return self._put_if(key, data, "overwrite")
        return self._put_if(key, data, mode)

    def _put_if(self, key: str, data: bytes, mode: Any, *, once: bool = False) -> Tag:
        self._refuse_read_only()
        try:
            with self._explained(key):
                store = self._once if once else self._store
                put = self._obstore.put(store, self._prefix + key, data, mode=mode)
                return _tag(put)
        except Changed:
            # An attempt whose answer was lost may have been ours.
            with contextlib.suppress(FileNotFoundError):
                found = self.get(key)
                if found.data == data:
                    return found.tag
            raise

    def copy(self, source: str, target: str) -> None:
        with self._explained(source):
            self._obstore.copy(self._store, self._prefix + source, self._prefix + target)

    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            with contextlib.suppress(FileNotFoundError), self._explained(keys[0]):
                self._obstore.delete(self._store, [self._prefix + key for key in keys])

    def sizes(self, prefix: str) -> dict[str, int]:
        with self._explained(prefix):
            folder = self._prefix + prefix.rstrip("/")
            return {
                one["path"].removeprefix(self._prefix): int(one["size"])
                for some in self._obstore.list(self._store, folder)
                for one in some
            }

    def children(self, prefix: str) -> list[str]:
        folder = (self._prefix + prefix).rstrip("/")
        with self._explained(prefix):
            found = self._obstore.list_with_delimiter(self._store, folder or None)
        paths = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def zarr_store(self, *, read_only: bool) -> tuple[Any, str]:
        from zarr.storage import ObjectStore  # noqa: PLC0415

        return ObjectStore(self._store, read_only=read_only), self._prefix

    def _refuse_read_only(self) -> None:
        if not self.writable:
            raise RemoteError(
                f"{self._base}: is read-only",
                why="A web server is read from.",
                remedy="Write to the bucket behind it, as s3://bucket/run.",
            )


class _Fsspec:
    """Whatever else fsspec knows: sftp, HDFS, WebDAV and so on."""

    def __init__(self, base: str, options: Mapping[str, str]) -> None:
        self._base = base
        scheme = base.partition("://")[0]
        fsspec = _package("fsspec", scheme)
        try:
            self._files, self._root = fsspec.core.url_to_fs(base, **options)
        except Exception as error:  # noqa: BLE001 -- an unknown scheme, a missing package, options, a refusal
            raise ConfigError(
                f"{base}: {_first_line(error)}",
                why="Neither obstore nor fsspec opens such an address here.",
                remedy="Check it, and install the package that fsspec wants for it, if any.",
            ) from None
        self.writable = self.listable = True

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(f"{self._base}/{key}") from error
        except FileExistsError as error:
            raise Changed from error
        except Exception as error:  # noqa: BLE001 -- what packages behind fsspec raise is their own
            raise RemoteError(
                f"{self._base}/{key}: {_first_line(error) or type(error).__name__}",
                why="The server cannot be reached, or refuses.",
                remedy="Check address and credentials, and run the same command again.",
            ) from None

    def get(self, key: str) -> Content:
        with self._explained(key):
            data = bytes(self._files.cat_file(self._path(key)))
        return Content(data, len(data), (("hash", hashlib.blake2b(data).hexdigest()),))

    def get_end(self, key: str, length: int) -> Content:
        size = self.size(key)
        return Content(self.get_ranges(key, [(max(0, size - length), size)])[0], size, None)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self._explained(key):
            return [bytes(self._files.cat_file(self._path(key), *one)) for one in ranges]

    def size(self, key: str) -> int:
        with self._explained(key):
            found = self._files.info(self._path(key))
        if found["type"] != "file":
            raise FileNotFoundError(f"{self._base}/{key}")
        return int(found["size"])

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._explained(key):
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(f"{path}.partial", data)
            self._files.mv(f"{path}.partial", path)

    def create(self, key: str, data: bytes) -> Tag:
        with self._explained(key):
            self._files.makedirs(self._path(key).rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(self._path(key), data, mode="create")
        return self.get(key).tag

    def replace(self, key: str, data: bytes, tag: Tag) -> Tag:
        if self.get(key).tag != tag:
            raise Changed
        self.put(key, data)
        return self.get(key).tag

    def copy(self, source: str, target: str) -> None:
        self.put(target, self.get(source).data)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            with contextlib.suppress(FileNotFoundError), self._explained(key):
                self._files.rm_file(self._path(key))

    def sizes(self, prefix: str) -> dict[str, int]:
        with self._explained(prefix):
            found = self._files.find(self._path(prefix.rstrip("/")), detail=True)
        return {path[len(self._root) + 1 :]: int(one["size"]) for path, one in found.items()}

    def children(self, prefix: str) -> list[str]:
        try:
            with self._explained(prefix):
                found = self._files.ls(self._path(prefix.rstrip("/")), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def zarr_store(self, *, read_only: bool) -> tuple[Any, str]:
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper  # noqa: PLC0415
        from zarr.storage import FsspecStore  # noqa: PLC0415

        files = self._files
        if not files.async_impl:
            files = AsyncFileSystemWrapper(files, asynchronous=True)
        return FsspecStore(files, read_only=read_only, path=self._root), ""


def _open_obstore(base: str, options: Mapping[str, str], retries: Any) -> tuple[Any, str]:
    """Return a store of obstore's, and what its keys begin with."""
    from obstore.store import HTTPStore, from_url  # noqa: PLC0415

    scheme, _, rest = base.partition("://")
    if scheme == "memory":
        return _memory(os.getpid()), f"{rest}/"
    client: Any = {**_CLIENT, **{key: value for key, value in options.items() if key in _OF_CLIENT}}
    config: Any = {key: value for key, value in options.items() if key not in _OF_CLIENT}
    if _plain_http(scheme, config):
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


def _plain_http(scheme: str, config: Mapping[str, str]) -> bool:
    """Whether somebody asked for http by its name."""
    asked = [scheme + "://", *(value for key, value in config.items() if "endpoint" in key)]
    if scheme in ("s3", "s3a"):
        asked += [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")]
    return any(one.startswith("http://") for one in asked)


def _tag(found: Mapping[str, Any]) -> Tag:
    # Of which a store makes its condition: Google's versions, others their ETags.
    kept = ((name, found.get(name)) for name in ("e_tag", "version"))
    return tuple((name, value) for name, value in kept if value) or None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
