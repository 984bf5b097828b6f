"""Optional packages that an extraction needs."""

from __future__ import annotations

import os
from typing import Any

from zarrtrace.errors import ConfigError, install_command
from zarrtrace.machine import no_garbage


def capture_package() -> Any:
    """Return :mod:`zarrtrace.capture`, which needs torch.

    Raises
    ------
    ConfigError
        If the extra ``extract`` is not installed.
    """
    set_environment()
    try:
        with no_garbage():
            from zarrtrace import capture  # noqa: PLC0415 -- torch takes seconds
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"extracting needs {error.name}, which is not installed",
            why="Reading and analysing work without torch, so it is an extra.",
            remedy=install_command("extract"),
        ) from error
    return capture


def set_environment() -> None:
    """Set the environment variables that torch reads once, when it is loaded."""
    # Torch's threads spin while they wait for each other, and take the cores from the writers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # On a GPU: memory that one size of tensors leaves is used for others.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
