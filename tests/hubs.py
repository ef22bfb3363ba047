"""As much of two stores' interfaces as reading takes: the Hugging Face Hub, and buckets of Google Cloud Storage."""

import base64
import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Store:
    """What is served, how it is to fail, and what was asked for."""

    def __init__(self, folder: Path):
        self.folder, self.address = folder, ""
        self.faults: deque[int] = deque()
        """Each request for bytes takes one: a status, or 0 for none."""
        self.sent: list[tuple[str, int]] = []
        """Name and number of bytes of each answer to a request for bytes."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, store: Store, *args: Any):
        self.store = store
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, data: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(more or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200, more: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(more or {})})

    def _bytes(self, path: Path) -> None:
        if self.command == "GET" and self.store.faults and (status := self.store.faults.popleft()):
            return self._send(status, b"sorry")
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(found[1]) if found else 0
        part = data[first : int(found[2]) + 1 if found and found[2] else None]
        self.store.sent.append((path.name, len(part)))
        about = {"ETag": hashlib.sha1(data).hexdigest(), "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        return self._send(206 if found else 200, part, about)


class _Hub(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        if found := re.fullmatch(r"/datasets/(\w+/\w+)/resolve/\w+/(.+)", path):
            file = self.store.folder / found[1] / found[2]
            return self._bytes(file) if file.is_file() else self._nothing("EntryNotFound")
        if not (found := re.match(r"/api/datasets/(\w+/\w+)", path)) or not (self.store.folder / found[1]).is_dir():
            return self._nothing("RepoNotFound")
        repository = self.store.folder / found[1]
        if listed := re.fullmatch(r"/tree/\w+/?(.*)", path[found.end() :]):
            folder = repository / listed[1]
            within = folder.rglob("*") if "recursive=true" in query.lower() else folder.glob("*")
            return self._json([_entry(repository, entry) for entry in sorted(within)])
        return self._json({"id": found[1], "sha": "0" * 40, "private": False, "tags": [], "downloads": 0, "likes": 0})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        repository = self.store.folder / self.path.split("/paths-info")[0].removeprefix("/api/datasets/")
        self._json([_entry(repository, repository / path) for path in paths if (repository / path).exists()])

    def _nothing(self, what: str) -> None:
        self._json({"error": what}, 404, {"X-Error-Code": what, "X-Error-Message": what})


def _entry(repository: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(repository))
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    data = path.read_bytes()
    found = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
    return found | {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}


class _Bucket(_Handler):
    def do_GET(self) -> None:
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/(\w+)/o(?:/(.+))?", urlsplit(self.path).path)
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        if found is None or not (bucket := self.store.folder / found[1]).is_dir():
            return self._json({"error": {"code": 404, "message": "The specified bucket does not exist."}}, 404)
        if found[2] is None:
            return self._json(_listing(bucket, query.get("prefix", ""), query.get("delimiter", "")))
        path = bucket / unquote(found[2])
        if not path.is_file():
            return self._json({"error": {"code": 404, "message": "No such object"}}, 404)
        return self._bytes(path) if query.get("alt") == "media" else self._json(_object(bucket, path))


def _object(bucket: Path, path: Path) -> dict[str, Any]:
    data, name = path.read_bytes(), str(path.relative_to(bucket))
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    about = {"kind": "storage#object", "bucket": bucket.name, "name": name, "id": f"{bucket.name}/{name}/1"}
    times = {"updated": "2026-01-01T00:00:00Z", "timeCreated": "2026-01-01T00:00:00Z"}
    return {**about, **times, "size": str(len(data)), "md5Hash": md5, "etag": "CAE=", "generation": "1"}


def _listing(bucket: Path, prefix: str, delimiter: str) -> dict[str, Any]:
    items, folders = [], set()
    for path in sorted(path for path in bucket.rglob("*") if path.is_file()):
        name = str(path.relative_to(bucket))
        if name.startswith(prefix):
            first, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                folders.add(prefix + first + delimiter)
            else:
                items.append(_object(bucket, path))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


@contextmanager
def hub(folder: Path) -> Iterator[Store]:
    """Serve `folder/<owner>/<name>/...` as data sets of the Hugging Face Hub."""
    with _served(Store(folder), _Hub) as store:
        yield store


@contextmanager
def buckets(folder: Path) -> Iterator[Store]:
    """Serve `folder/<bucket>/...` as Google Cloud Storage does."""
    with _served(Store(folder), _Bucket) as store:
        yield store


@contextmanager
def _served(store: Store, handler: type[_Handler]) -> Iterator[Store]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, store))
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
