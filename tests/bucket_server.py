"""A stand-in for storage buckets of the Hub: `folder/buckets/org/name` holds the files of `hf://buckets/org/name`.

    with serve_buckets(tmp_path) as env:
        run_python(UPLOADS + "...", env)

The client uploads the content of files to a store of its own protocol (Xet), by compiled code. `UPLOADS` replaces that
client by one that sends the content to this server. All other requests are the client's own.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = r"(?P<bucket>[^/]+/[^/]+)"
DATE = "2026-01-01T00:00:00.000Z"

UPLOADS = """
import hashlib, os, pathlib, types, urllib.request
from huggingface_hub.utils import _xet

class Commit:
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def start_upload_bytes(self, content, **_):
        name = hashlib.sha256(content).hexdigest()
        request = urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/content/{name}", content, method="PUT")
        urllib.request.urlopen(request).close()
        info = types.SimpleNamespace(hash=name, file_size=len(content))
        return types.SimpleNamespace(result=lambda: types.SimpleNamespace(xet_info=info))
    def start_upload_file(self, path, **_):
        return self.start_upload_bytes(pathlib.Path(path).read_bytes())

_xet.get_xet_session = lambda: types.SimpleNamespace(new_upload_commit=lambda **_: Commit())
"""


@contextmanager
def serve_buckets(folder: Path) -> Iterator[dict[str, str]]:
    """Serves the buckets in `folder/buckets`. Yields the environment of a process to which they are the Hub's."""
    root = folder / "buckets"
    (folder / "content").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (BucketHandler,), {"root": root}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # polls for its shutdown
    try:
        env = dict(os.environ)
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        env["HF_HOME"] = str(folder / "hf_home")
        env["HF_TOKEN"] = "hf_stand_in"
        env["NO_PROXY"] = "127.0.0.1"
        env["no_proxy"] = "127.0.0.1"
        env["HF_HUB_DISABLE_TELEMETRY"] = "1"
        env["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        yield env
    finally:
        server.shutdown()
        server.server_close()


class BucketHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if match := re.fullmatch(rf"/api/buckets/{BUCKET}", url.path):
            return self._describe(match["bucket"])
        if match := re.fullmatch(rf"/api/buckets/{BUCKET}/tree(/(?P<prefix>.*))?", url.path):
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            return self._list(match["bucket"], unquote(match["prefix"] or ""), recursive)
        if match := re.fullmatch(rf"/buckets/{BUCKET}/resolve/(?P<path>.+)", url.path):
            return self._read(match["bucket"], unquote(match["path"]))
        return self._send(b"{}", 404)

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == name
        (self.root.parent / "content" / name).write_bytes(content)
        self._send(b"{}")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        match = re.fullmatch(rf"/api/buckets/{BUCKET}/batch", urlsplit(self.path).path)
        if match is None or "Authorization" not in self.headers:
            return self._send(b"{}", 404)
        for line in content.splitlines():
            operation = json.loads(line)
            path = self.root / match["bucket"] / operation["path"]
            if operation["type"] == "addFile":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((self.root.parent / "content" / operation["xetHash"]).read_bytes())
            else:
                path.unlink(missing_ok=True)
        return self._send(json.dumps({"success": True, "failed": []}).encode())

    def _describe(self, bucket: str) -> None:
        if not (self.root / bucket).is_dir():
            return self._send(b"{}", 404, {"X-Error-Code": "BucketNotFound"})
        facts = {"id": bucket, "private": True, "createdAt": DATE, "size": 0, "totalFiles": 0}
        return self._send(json.dumps(facts).encode())

    def _list(self, bucket: str, prefix: str, recursive: bool) -> None:
        entries = []
        folders = set()
        for file in sorted((self.root / bucket).rglob("*")):
            path = file.relative_to(self.root / bucket).as_posix()
            if not file.is_file() or not path.startswith(prefix):
                continue
            below = path[len(prefix) :].lstrip("/")
            if not recursive and "/" in below:
                folders.add(path[: -len(below)] + below.split("/")[0])
                continue
            checksum = hashlib.sha256(file.read_bytes()).hexdigest()
            entries.append(
                {"type": "file", "path": path, "size": file.stat().st_size, "xetHash": checksum, "mtime": DATE}
            )
        for folder in sorted(folders):
            entries.append({"type": "directory", "path": folder, "uploadedAt": DATE})
        self._send(json.dumps(entries).encode())

    def _read(self, bucket: str, path: str) -> None:
        file = self.root / bucket / path
        if not file.is_file():
            return self._send(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            return self._send(content[int(match[1]) : int(match[2]) + 1], 206)
        return self._send(content)

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output clean."""
