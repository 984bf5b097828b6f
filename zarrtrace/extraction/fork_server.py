"""The process that workers of this machine are forked from: it imports libraries once, for all.

Importing torch and sae-lens takes a core ten seconds. The fork server begins before Dask is
imported, and the weights are read into the system's file cache meanwhile.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection

from zarrtrace.errors import ConfigError
from zarrtrace.extraction.options import Options
from zarrtrace.extraction.packages import capture_package, set_environment
from zarrtrace.extraction.processes import SHARE
from zarrtrace.extraction.reading_ahead import ReadAhead, weight_files
from zarrtrace.machine import cpus


def start(workers: int, options: Options) -> bool:
    """Start the process, and read weights; returns False where the system forks no such ones.

    Parameters
    ----------
    workers
        Number of workers that this machine will have.
    options
        Options of the extraction, which say what is imported and read.
    """
    if sys.platform != "linux":  # macOS's own libraries do not survive a fork
        return False
    modules = ["zarrtrace.extraction.fork_imports", "zarrtrace.capture.saes"]
    multiprocessing.set_forkserver_preload(modules if options.features else modules[:1])
    before = dict(os.environ)
    # Ctrl-C ends these processes through their client, also while they import libraries. What
    # multiprocessing starts first lets SIGINT through again.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        os.environ.update(environment(workers))
        # sae-lens asks for a GPU while it is imported. Asked through NVML, CUDA still works in
        # processes that are forked afterwards.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        set_environment()
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if options.own_model and options.device != "cpu":
        ReadAhead().add(weight_files(options.own_model, options.revision))
    return True


def environment(workers: int) -> dict[str, str]:
    """Return environment variables that share this machine's cores among workers."""
    share = str(max(1, cpus() // workers))
    threads = os.environ.get("OMP_NUM_THREADS", share)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, SHARE: share}


def gpu_count() -> int | None:
    """Wait for the imports, and count GPUs; None if workers that are forked could not use them."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(
        target=_send_count, args=(there,), daemon=True
    )
    process.start()
    there.close()
    try:
        found: int | None = here.recv()
    except EOFError:  # workers that are started as usual say why it ended
        found = None
    process.join()
    return found


def _send_count(there: Connection) -> None:
    # The client was interrupted, or torch is not installed, which workers say.
    with suppress(BrokenPipeError, ConfigError):
        capture = capture_package()
        there.send(None if capture.was_forked_from_gpu() else capture.gpu_count())
