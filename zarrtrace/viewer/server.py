"""Live server of a bundle's files, made when asked for."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from zarrtrace.errors import ConfigError
from zarrtrace.storage import Address
from zarrtrace.text import terminal_text, without_secrets
from zarrtrace.viewer.layout import Layout

_CACHE_BYTES = 256 * 2**20
# A browser opens six. More connections than this are refused at once.
_MOST_CONNECTIONS = 64
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_BUSY = "".join(
    [
        "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n",
        *(f"{name}: {value}\r\n" for name, value in _HEADERS.items()),
        "\r\n",
    ]
).encode()


class Server:
    """Server of one run on one address; a context manager.

    The page's address holds a random token, and nothing is served without it: other users of the
    machine reach a loopback address, too.

    Parameters
    ----------
    path
        A run, or a trace that stands alone.
    host
        Address to bind.
    port
        0 for a free one.
    scenarios
        Only these; all if None.

    Raises
    ------
    ConfigError
        If the address cannot be bound.
    """

    def __init__(
        self,
        path: Address,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        scenarios: Sequence[str] | None = None,
    ) -> None:
        self.layout = Layout(path, scenarios=scenarios, is_live=True)
        self.loopback = _is_loopback(host)
        self.prefix = f"/{secrets.token_urlsafe(16)}/"
        self._made: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        owner = self

        class Handler(_Handler):
            server_of_run = owner

        try:
            self._http = _HTTP(host, port, Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {error}",
                why="The port is taken, or the address is not one of this machine's.",
                remedy="Leave --port out for a free one; --host 127.0.0.1 always works.",
            ) from error
        self.port = int(self._http.server_address[1])
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.port}{self.prefix}"
        names = {"127.0.0.1", "localhost", "[::1]", shown}
        self.hosts = {f"{name}:{self.port}" for name in names} | (
            names if self.port == 80 else set()
        )

    def __enter__(self) -> Server:
        threading.Thread(target=self.run, name="zarrtrace view", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def run(self) -> None:
        """Serve until interrupted."""
        self._http.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Release the port of a server that ran in this thread."""
        self._http.server_close()

    def forget(self) -> None:
        """Drop all cached files."""
        with self._lock:
            self._made.clear()

    def file(self, name: str) -> bytes:
        """Return a file of the bundle, which is then cached.

        Raises
        ------
        KeyError
            If the bundle has no such file.
        """
        with self._lock:
            if name in self._made:
                self._made.move_to_end(name)
                return self._made[name]
        content = self.layout.read(name)
        if name.startswith("data/"):
            with self._lock:
                self._made[name] = content
                while sum(map(len, self._made.values())) > _CACHE_BYTES:
                    self._made.popitem(last=False)
        return content


class _HTTP(ThreadingHTTPServer):
    """A server with one thread for each of a few connections."""

    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[_Handler]) -> None:
        self.address_family = _family(host)
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__((host, port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.sendall(_BUSY)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that closes a page drops its connections.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_of_run: Server
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # answers to HTTP/0.9 have no headers
    server_version, sys_version = "zarrtrace", ""
    disable_nagle_algorithm = True
    wbufsize = -1  # header and body in one packet
    timeout = 60

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        owner = self.server_of_run
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            # A body is not read: what follows on the connection must not count as a request.
            self.close_connection = True
        if owner.loopback and self.headers.get("Host", "") not in owner.hosts:
            # A page elsewhere whose name was pointed at this machine must not read the run.
            self._send(403, b"This server answers to its own address only.\n", body=body)
            return
        path = unquote(urlsplit(self.path).path, errors="surrogateescape")
        given = path[: len(owner.prefix)].encode(errors="surrogateescape")
        if not secrets.compare_digest(given, owner.prefix.encode()):
            self._send(404, b"Not found.\n", body=body)
            return
        name = path[len(owner.prefix) :] or "index.html"
        try:
            content = owner.file(name)
        except KeyError:
            self._send(404, b"Not found.\n", body=body)
        except Exception as error:  # noqa: BLE001 -- a damaged chunk must not stop the others
            why = without_secrets(terminal_text(str(error), lines=True))
            self._send(500, f"This part of the run cannot be read: {why}\n".encode(), body=body)
        else:
            kind = _TYPES.get(Path(name).suffix, "application/octet-stream")
            self._send(200, content, kind, body=body)

    def _send(
        self, code: int, content: bytes, kind: str = "text/plain; charset=utf-8", *, body: bool
    ) -> None:
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if body:
            # The browser may have turned to another layer in the meantime.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a bad request with the same headers as others."""
        del explain
        self.close_connection = True
        said = terminal_text(message or HTTPStatus(code).phrase)
        self._send(code, f"{said}\n".encode(), body=self.command != "HEAD")

    def handle_expect_100(self) -> bool:
        """Send no interim answer: no body is read."""
        return True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log nothing: a page makes hundreds of requests."""


def serve(
    path: Address,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    scenarios: Sequence[str] | None = None,
) -> Server:
    """Return a bound :class:`Server` of a run, not yet serving."""
    return Server(path, host=host, port=port, scenarios=scenarios)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _family(host: str) -> int:
    return int(socket.AF_INET6 if ":" in host else socket.AF_INET)
