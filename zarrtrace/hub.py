"""The Hugging Face hub: what of it is on this machine, and whether it can be reached."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from zarrtrace.errors import ModelError

# Seconds for a connection; the hub's own client asks for each file six times, for half a minute.
_SECONDS = 3
_ENDPOINT = "https://huggingface.co"


def snapshot_folder(model: str, revision: str | None = None) -> Path:
    """Return where a model's files are on this machine, if they are.

    Parameters
    ----------
    model
        A folder, or an id on the hub.
    revision
        Commit, tag or branch on the hub.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    repository = hub / f"models--{model.replace('/', '--')}"
    name = revision or "main"
    try:
        commit = (repository / "refs" / name).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = name
    return repository / "snapshots" / commit


def refuse_absent(model: str, revision: str | None = None) -> None:
    """Refuse a model that is neither on this machine nor to be had, before torch is imported.

    Raises
    ------
    ModelError
    """
    refuse_non_model_folder(model)
    if (snapshot_folder(model, revision) / "config.json").is_file():
        return
    if _is_offline() or not is_reachable():
        raise not_reached(model)


def refuse_non_model_folder(model: str) -> None:
    """Refuse a path that does not lead to a model.

    Raises
    ------
    ModelError
        If `model` can only be a path, and is no folder that holds a model.
    """
    path = Path(model)
    if path.is_absolute() or model.startswith("."):
        if not path.is_dir():
            raise ModelError(f"{model}: no such folder", remedy="Check --model.")
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{model}: holds no config.json",
                why="It is not a model in Hugging Face's layout.",
                remedy="Give the folder that save_pretrained wrote.",
            )


def not_reached(model: str) -> ModelError:
    """Say that a model is not here, and that the hub cannot be asked for it."""
    return ModelError(
        f"{model}: not in the local cache, and the Hugging Face hub cannot be reached",
        why="There is no connection, or HF_HUB_OFFLINE is set.",
        remedy="Connect, or copy the model into HF_HOME; check the spelling of --model, too.",
    )


def is_reachable() -> bool:
    """Whether the hub's server accepts a connection within three seconds.

    Behind a proxy it is taken for reachable: the proxy alone knows.
    """
    client = _client()
    given = client.ENDPOINT if client else os.environ.get("HF_ENDPOINT")
    address = urlsplit(given or _ENDPOINT)
    if address.scheme in getproxies() or not address.hostname:
        return True
    port = address.port or (80 if address.scheme == "http" else 443)
    reached: list[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((address.hostname, port), timeout=_SECONDS).close()
            reached.append(True)

    # In a thread: looking up a name knows no time limit.
    thread = threading.Thread(target=connect, name="zarrtrace-hub", daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return bool(reached)


@contextlib.contextmanager
def cache_if_unreachable(*names: str | None) -> Iterator[None]:
    """Have the hub's client use its cache alone, if the hub cannot be reached.

    Parameters
    ----------
    names
        The model and the release of SAEs; folders, and None, need no hub.
    """
    if all(name is None or Path(name).is_dir() for name in names):
        yield
        return
    from huggingface_hub import constants  # noqa: PLC0415 -- an extra

    if constants.HF_HUB_OFFLINE or is_reachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _client() -> Any:
    """Return the settings of the hub's client if it is imported, which takes a second."""
    return sys.modules.get("huggingface_hub.constants")


def _is_offline() -> bool:
    if client := _client():
        return bool(client.HF_HUB_OFFLINE)
    given = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return given.upper() in ("1", "ON", "YES", "TRUE")
