"""A stand-in for the Hugging Face Hub, for tests: repositories are folders on this machine.

    with serve_hub(tmp_path) as env:
        run_python("from svqvae_hf import SVQVAE; SVQVAE.from_pretrained('org/name')", env)

For `org/name`, a model or data set, `tmp_path/hub/org/name/main` holds the files of the main branch, `.../refs/pr/1`
the files of the first pull request, and `.../settings.json` the arguments of its creation. Write `{"gated": true}`
there to gate it. The client reads its endpoint at import, so it runs in a process of its own.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

REPO = r"(?P<repo>[^/]+/[^/]+)"
LICENSES = ("apache-2.0", "cc-by-4.0", "mit", "other", "unknown")
API = rf"/api/(models|datasets)/{REPO}"


class HubError(Exception):
    """A response other than 200. The client tells errors by its code."""


@contextmanager
def serve_hub(folder: Path) -> Iterator[dict[str, str]]:
    """Serves the repositories in `folder/hub`. Yields the environment of a process to which they are the Hub."""
    root = folder / "hub"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"root": root}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # polls for its shutdown
    try:
        yield {
            **os.environ,
            **{"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "hf_home")},
            **{"HF_TOKEN": "hf_stand_in", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
            **{f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")},
        }
    finally:
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]) -> None:
    """Makes the repositories of [`serve_hub`] the Hub of this process, for uploads only."""
    monkeypatch.setattr(constants, "ENDPOINT", env["HF_ENDPOINT"])
    monkeypatch.setenv("HF_TOKEN", env["HF_TOKEN"])


def run_python(code: str, env: Mapping[str, str], *args: str | Path) -> str:
    """Runs code in a new process with this environment and these arguments. Returns its output."""
    command = [sys.executable, "-c", f"import gc; gc.disable()\n{code}", *map(str, args)]  # imports are faster without
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        if self.path == "/fault":
            return self._send(b"", 503)
        return self._route(
            {
                rf"(/datasets)?/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": self._resolve,
                rf"{API}(/revision/(?P<revision>[^/]+))?": self._info,
                rf"{API}/tree/(?P<revision>[^/]+)": self._tree,
                rf"{API}/tree/(?P<revision>[^/]+)/(?P<folder>.+)": self._tree,
            }
        )

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self._route(
            {
                r"/api/repos/create": self._create,
                r"/api/validate-yaml": self._validate_card,
                rf"{API}/preupload/(?P<revision>[^/]+)": self._preupload,
                rf"{API}/commit/(?P<revision>[^/]+)": self._commit,
            }
        )

    def _route(self, routes: Mapping[str, Callable[..., None]]) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        try:
            for pattern, answer in routes.items():
                if match := re.fullmatch(pattern, path):
                    return answer(**{name: unquote(value or "main") for name, value in match.groupdict().items()})
            raise HubError(404, "RouteNotFound")
        except HubError as error:
            status, code = error.args
            self._send(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})

    def _create(self) -> None:
        self._check_login()
        settings = json.loads(self.body)
        repo = f"{settings['organization'] or 'user'}/{settings['name']}"
        status = 409 if (self.root / repo).exists() else 200
        if status == 200:
            (self.root / repo / "main").mkdir(parents=True)
            (self.root / repo / "settings.json").write_text(json.dumps(settings))
        self._send_json({"url": f"{self._endpoint}/{repo}", "id": repo}, status)

    def _validate_card(self) -> None:
        """Answers with the errors in the metadata of a card, as the Hub does."""
        parts = json.loads(self.body)["content"].split("---\n", 2)
        metadata = {}
        if len(parts) > 1:
            metadata = yaml.safe_load(parts[1])
        names = [("datasets", name) for name in metadata.get("datasets", [])]
        if "base_model" in metadata:
            names.append(("base_model", metadata["base_model"]))
        errors = []
        for field, name in names:
            if not re.fullmatch(REPO, name):
                errors.append({"message": f'"{field}" with value "{name}" is not valid.'})
        if metadata.get("license", "mit") not in LICENSES:
            errors.append({"message": '"license" must be one of the known ones.'})
        warnings = [] if metadata else [{"message": "empty metadata"}]
        self._send_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _preupload(self, repo: str, revision: str) -> None:
        self._check_login()
        self._branch(repo, revision)
        mode = {"uploadMode": "regular", "shouldIgnore": False}
        self._send_json({"files": [mode | {"path": file["path"]} for file in json.loads(self.body)["files"]]})

    def _commit(self, repo: str, revision: str) -> None:
        self._check_login()
        branch = self._branch(repo, revision)
        answer = {}
        if "create_pr=1" in urlsplit(self.path).query:
            number = len(list((self.root / repo).glob("refs/pr/*"))) + 1
            branch = Path(shutil.copytree(branch, self.root / repo / f"refs/pr/{number}"))
            answer = {"pullRequestUrl": f"{self._endpoint}/{repo}/discussions/{number}"}
        for line in map(json.loads, self.body.splitlines()):
            if line["key"] == "file":
                file = branch / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        sha = self._sha(branch)
        self._send_json({"commitUrl": f"{self._endpoint}/{repo}/commit/{sha}", "commitOid": sha, **answer})

    def _info(self, repo: str, revision: str) -> None:
        branch = self._branch(repo, revision)
        siblings = [{"rfilename": name} for name in self._files(branch)]
        self._send_json({"id": repo, "sha": self._sha(branch), "siblings": siblings, "tags": []})

    def _tree(self, repo: str, revision: str, folder: str = "") -> None:
        branch = self._branch(repo, revision)
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        entries = []
        for path in sorted((branch / folder).rglob("*") if recursive else (branch / folder).glob("*")):
            about = {"path": path.relative_to(branch).as_posix(), "oid": self._sha(branch)}
            size = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
            entries.append(about | size)
        self._send_json(entries)

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        branch = self._branch(repo, revision)
        file = self._files(branch).get(path)
        if file is None:
            return self._send(b"{}", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self._sha(branch)})
        content = file.read_bytes()
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._send(content, headers={"X-Repo-Commit": self._sha(branch), "ETag": etag})

    def _check_login(self) -> None:
        if "Authorization" not in self.headers:
            raise HubError(401, "Unauthorized")

    def _branch(self, repo: str, revision: str) -> Path:
        """Folder of a branch, found by its name or commit."""
        if not (self.root / repo).is_dir():
            raise HubError(404, "RepoNotFound")
        if json.loads((self.root / repo / "settings.json").read_text()).get("gated"):
            raise HubError(403, "GatedRepo")
        branches = [self.root / repo / "main", *(self.root / repo).glob("refs/pr/*")]
        for branch in branches:
            if revision in (branch.relative_to(self.root / repo).as_posix(), self._sha(branch)):
                return branch
        raise HubError(404, "RevisionNotFound")

    @staticmethod
    def _files(branch: Path) -> dict[str, Path]:
        files = sorted(file for file in branch.rglob("*") if file.is_file())
        return {file.relative_to(branch).as_posix(): file for file in files}

    def _sha(self, branch: Path) -> str:
        content = hashlib.sha1(str(branch).encode())
        for name, file in self._files(branch).items():
            content.update(name.encode() + file.read_bytes())
        return content.hexdigest()

    @property
    def _endpoint(self) -> str:
        return f"http://{self.headers['Host']}"

    def _send_json(self, content: object, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status)

    def _send(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output clean."""
