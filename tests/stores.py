"""Stores of files to read from: a web server that fails as it is told to, and an object store."""

import hashlib
import html
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class WebStore:
    """What is served, and how it is to fail."""

    folder: Path
    address: str = ""
    faults: deque[str] = field(default_factory=deque)
    """Each request for bytes takes one: `500`, `429`, `drop` (nothing is sent), `short` (half of it), `slow`."""
    denied: set[str] = field(default_factory=set)
    """Paths that answer 403."""
    ranges: bool = True
    """Whether parts are sent."""
    listed: bool = True
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    """Path, first byte and end of each request for bytes that was answered as asked."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, store: WebStore, *args: Any):
        self.store = store
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        store, name = self.store, self.path.partition("?")[0].strip("/")
        path = store.folder / name
        if name in store.denied:
            return self._send(403, b"denied", body)
        if path.is_dir() and store.listed:
            links = "".join(f'<a href="{html.escape(p.name)}{"/" * p.is_dir()}">x</a>' for p in sorted(path.iterdir()))
            return self._send(200, f"<html>{links}</html>".encode(), body, {"Content-Type": "text/html"})
        if not path.is_file():
            return self._send(404, b"nothing", body)
        data = path.read_bytes()
        about = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes" if store.ranges else "none"}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, end = (int(found[1]), int(found[2]) + 1) if found and store.ranges else (0, len(data))
        fault = store.faults.popleft() if body and store.faults else ""
        if fault.isdecimal():
            return self._send(int(fault), b"sorry", body)
        if fault == "drop":
            self.close_connection = True
            return None
        part = data[first:end]
        if fault == "short":
            self.close_connection = True
            return self._send(206, part, body, about, sent=len(part) // 2)
        if body:
            store.asked.append((name, first, first + len(part)))
        return self._send(206 if found and store.ranges else 200, part, body, about)

    def _send(
        self, status: int, data: bytes, body: bool, more: dict[str, str] | None = None, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(more or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:sent])


@contextmanager
def web_store(folder: Path) -> Iterator[WebStore]:
    """Serve a folder at a free port."""
    store = WebStore(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, store))
    server.daemon_threads = True
    store.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
