"""Servers of object storage on loopback, in processes of their own, and a proxy in front of them.

They run from a virtual environment of their own, ``.venv-servers`` (``scripts/servers.sh`` makes
it): moto's server, which keeps everything in memory, and OpenStack Swift, which keeps it on disk.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import obstore
from obstore.store import S3Store

from zarrtrace.storage import Location, locate

BIN = Path(__file__).parent.parent / ".venv-servers" / "bin"
USER, PASSWORD = "test:tester", "testing"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": USER,
    "AWS_SECRET_ACCESS_KEY": PASSWORD,
    "AWS_REGION": "us-east-1",
}
BUCKET = "runs"
#: Which server: moto, or swift (scripts/test_swift).
SERVER = os.environ.get("ZARRTRACE_S3_SERVER", "moto")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Processes:
    """A server made of some processes; it can be killed and started again."""

    def __init__(self, commands: list[list[str]], ports: list[int], log: Path) -> None:
        self._commands, self._ports, self._log = commands, ports, log
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the first one last: without others, Swift's proxy says that there is no bucket."""
        first, *others = zip(self._commands, self._ports, strict=True)
        self._running = []
        for some in (others, [first]):
            with self._log.open("ab") as log:
                self._running += [
                    subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                    for command, _ in some
                ]
            until = time.monotonic() + 60
            while not all(answers(port) for _, port in some):
                if time.monotonic() > until:
                    raise TimeoutError(self._log.read_text(errors="replace")[-2000:])
                time.sleep(0.1)

    def kill(self) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running = []


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[tuple[Processes, int]]:
    """Run moto's server; what it holds goes with it."""
    port = free_port()
    command = [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = Processes([command], [port], folder / "moto.log")
    with _running(server):
        yield server, port


@contextlib.contextmanager
def swift(folder: Path) -> Iterator[tuple[Processes, int]]:
    """Run Swift's proxy, account, container and object servers, with its S3 API."""
    ports = {name: free_port() for name in ("proxy", "account", "container", "object")}
    (folder / "disks" / "one").mkdir(parents=True, exist_ok=True)
    for name, content in _configuration(folder, ports).items():
        (folder / name).write_text(content, encoding="utf-8")
    rings = [f"{name}:{ports[name]}" for name in ("account", "container", "object")]
    subprocess.run([str(BIN / "python"), "-c", _RINGS, str(folder), *rings], check=True)
    commands = [
        ["env", f"SWIFT_DIR={folder}", str(BIN / f"swift-{name}-server"), f"{folder}/{name}.conf"]
        for name in ports
    ]
    server = Processes(commands, list(ports.values()), folder / "swift.log")
    with _running(server):
        yield server, ports["proxy"]


@contextlib.contextmanager
def _running(server: Processes) -> Iterator[None]:
    try:
        server.start()
        yield
    finally:
        server.kill()


_RINGS = """
import sys
from swift.common.ring import RingBuilder
folder, *servers = sys.argv[1:]
for server in servers:
    name, port = server.split(":")
    builder = RingBuilder(part_power=2, replicas=1, min_part_hours=0)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port),
                     "device": "one", "weight": 1})
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{name}.ring.gz")
"""


def make_bucket(address: str, name: str) -> None:
    """Create a bucket, with what the environment says of credentials."""
    store = S3Store(name, endpoint=address, client_options={"allow_http": True})
    url = obstore.sign(store, "PUT", "", expires_in=timedelta(minutes=1))
    host, _, path = url.removeprefix("http://").partition("/")
    connection = HTTPConnection(host, timeout=60)
    connection.request("PUT", f"/{path}")
    answer = connection.getresponse()
    assert answer.status < 300, answer.read()
    connection.close()


def _configuration(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    common = f"""
[DEFAULT]
bind_ip = 127.0.0.1
swift_dir = {folder}
devices = {folder}/disks
mount_check = false
fallocate_reserve = 0
user = {getpass.getuser()}
workers = 0
log_level = ERROR
"""
    files = {"swift.conf": "[swift-hash]\nswift_hash_path_suffix = test\n"}
    for name in ("account", "container", "object"):
        files[f"{name}.conf"] = f"""{common}
bind_port = {ports[name]}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
    files["proxy.conf"] = f"""{common}
bind_port = {ports["proxy"]}
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats bulk s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
force_swift_request_proxy_log = false
min_segment_size = 1048576
[filter:tempauth]
use = egg:swift#tempauth
user_{USER.replace(":", "_")} = {PASSWORD} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""
    return files


class Request(NamedTuple):
    """A request that the proxy saw."""

    method: str
    path: str
    headers: dict[str, str]


class Proxy:
    """Passes requests on, counts them, and fails as a test wants; a context manager.

    Attributes
    ----------
    seen
        All requests since the test cleared it.
    most
        Most requests under way at once.
    fault
        Called for each request; returns a status to answer with instead, or None. It may sleep.
    google
        Whether clients speak Google's interface.
    """

    def __init__(self, target: int, *, google: bool = False) -> None:
        self.seen: list[Request] = []
        self.fault: Callable[[Request], int | None] = lambda _: None
        self.google = google
        self.port = free_port()
        self._target = target
        self.most = self._now = 0
        self._mutex = threading.Lock()
        self._http: ThreadingHTTPServer | None = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count a request that is under way."""
        with self._mutex:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            yield
        finally:
            with self._mutex:
                self._now -= 1

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        owner = self

        class Handler(_Handler):
            proxy = owner

        class _HTTP(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

        self._http = _HTTP(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def kill(self) -> None:
        """Refuse connections, as a server that is gone does."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def __enter__(self) -> Proxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Server(NamedTuple):
    """A server with a bucket, seen through a proxy."""

    processes: Processes
    proxy: Proxy

    def folder(self) -> Location:
        """Return a folder of the test's own."""
        name = f"{BUCKET}/{uuid.uuid4().hex}"
        if self.proxy.google:  # the service account's key says where its endpoint is
            return locate(f"gs://{name}", {"allow_http": "true"})
        return locate(f"s3://{name}", {"endpoint": self.proxy.address})

    @contextlib.contextmanager
    def google(self, key: Path) -> Iterator[Server]:
        """Speak Google's XML interface to the same server; `key` gets a service account's key."""
        with Proxy(self.proxy._target, google=True) as proxy:
            nobody = dict.fromkeys(["client_email", "private_key", "private_key_id"], "")
            where = {"gcs_base_url": proxy.address, "disable_oauth": True}
            key.write_text(json.dumps({**nobody, **where}), encoding="utf-8")
            yield Server(self.processes, proxy)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Run the server that was chosen, with a bucket."""
    start = {"moto": moto, "swift": swift}[SERVER]
    os.environ.update(CREDENTIALS)
    with start(folder) as (processes, port), Proxy(port) as proxy:
        make_bucket(f"http://127.0.0.1:{port}", BUCKET)
        yield Server(processes, proxy)


def _from_google(path: str, headers: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Say to S3 what was said to Google: their XML interfaces differ in names of headers."""
    own = {name.lower(): value for name, value in headers.items()}
    # moto does not check it, but looks into it for the service that is meant.
    own["authorization"] = "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request"
    if source := own.pop("x-goog-copy-source", None):
        own["x-amz-copy-source"] = unquote(source)
    name, mark, query = path.partition("?")
    return f"{unquote(name)}{mark}{query}", own


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def _pass_on(self) -> None:
        with self.proxy.counting():
            self._pass_one_on()

    def _pass_one_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        self.proxy.seen.append(request)
        status = self.proxy.fault(request)
        if self.proxy._http is None:  # killed: answers nobody who is still connected
            self.close_connection = True
            return
        if status is not None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = HTTPConnection("127.0.0.1", self.proxy._target, timeout=60)
        # The host's name is signed: it stays.
        path, headers = self.path, dict(self.headers.items())
        if self.proxy.google:
            path, headers = _from_google(path, headers)
        try:
            connection.request(self.command, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except OSError:
            self.close_connection = True
            return
        finally:
            connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass
