"""A run on a static web host with TLS and ranges: read by plain xarray, and by us."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import fakes
import numpy as np
import processes
import pytest
import s3_servers
from aiohttp import web

pytestmark = [
    pytest.mark.long,  # each read in a process of its own
    pytest.mark.skipif(
        not s3_servers.BIN.is_dir() and "ZARRTRACE_REQUIRE_SERVERS" not in os.environ,
        reason="no .venv-servers (scripts/servers.sh makes it)",
    ),
]

_PLAIN = """
import sys
import numpy as np
import xarray as xr

tree = xr.open_datatree(sys.argv[1], engine="zarr")
for name, node in tree.children.items():
    for key, values in node.to_dataset().variables.items():
        if values.dtype.kind in "iuf":
            np.save(f"{sys.argv[2]}/{name}.{key}.npy", values.values)
"""
_OURS = """
import sys
import numpy as np
import zarrtrace as zt

run = zt.open_run(sys.argv[1])
for name in run.children:
    for key, values in zt.open_trace(f"{sys.argv[1]}/{name}").variables.items():
        assert (run[name][key].values == values.values).all(), key
        if values.dtype.kind in "iuf":
            np.save(f"{sys.argv[2]}/{name}.{key}.npy", values.values)
"""


COMMAND = "from zarrtrace.cli import main; main()"


class Host:
    """Serves a folder; remembers the ranges that were asked for."""

    def __init__(self, folder: Path, certificates: Path) -> None:
        self.ranges: list[str] = []
        self.port = s3_servers.free_port()
        self._folder, self._certificates = folder, certificates
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()

    @web.middleware
    async def _remember(self, request: web.Request, handler: object) -> web.StreamResponse:
        if "Range" in request.headers:
            self.ranges.append(request.headers["Range"])
        return await handler(request)  # type: ignore[operator,no-any-return]

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(middlewares=[self._remember])
        app.router.add_static("/", self._folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            self._certificates / "server.pem", self._certificates / "server.key"
        )
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=context)
        self._loop.run_until_complete(site.start())
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    def wait(self) -> None:
        assert self._started.wait(30)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


def ran(code: str, *arguments: object) -> None:
    """Run code in a process of its own: those who read https keep what they trust."""
    done = processes.python(code, *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    trustme = [s3_servers.BIN / "python", "-m", "trustme", "-q", "-d", certificates]
    subprocess.run([*map(str, trustme), "-i", "localhost"], check=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "client.pem"))
    (tmp_path / "www").mkdir()
    found = Host(tmp_path / "www", certificates)
    thread = threading.Thread(target=found.run)
    thread.start()
    found.wait()
    yield found
    found.stop()
    thread.join()


@pytest.mark.parametrize("code", [_PLAIN, _OURS], ids=["xarray", "zarrtrace"])
def test_over_https(code: str, host: Host, tmp_path: Path) -> None:
    made = fakes.make_run(tmp_path / "www", tokens=(40, 9), features=5000)
    (tmp_path / "out").mkdir()
    ran(code, f"https://localhost:{host.port}/run", tmp_path / "out")
    for scenario, truth in made.truth.items():
        for name, expected in truth.items():
            if expected.dtype.kind in "iuf":
                found = np.load(tmp_path / "out" / f"{scenario}.{name}.npy")
                np.testing.assert_array_equal(found, expected, err_msg=name)


def test_parts_are_ranges_and_commands_read_it(host: Host, tmp_path: Path) -> None:
    fakes.make_run(tmp_path / "www", tokens=40, features=20_000)
    address = f"https://localhost:{host.port}/run"
    code = "import sys, zarrtrace as zt\nzt.open_run(sys.argv[1]).Safe_1.features[:, -1, 7].values"
    ran(code, address)
    assert len(host.ranges) == 4  # the index of the file, and a chunk of each of three layers
    for command in ("info", "verify"):
        ran(COMMAND, command, address)
    ran(COMMAND, "copy", address, tmp_path / "copy", "-q")
    assert fakes.files_in(tmp_path / "copy") == fakes.files_in(tmp_path / "www" / "run")
    refused = processes.python(COMMAND, "index", address)
    assert refused.returncode == 2
    assert "read only" in refused.stderr
