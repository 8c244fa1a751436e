"""A hub on a loopback port that accepts uploads, can fail, and serves models and datasets."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Hub(BaseHTTPRequestHandler):
    """The requests of an upload; `server.seen` keeps every request."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.command, self.path, self.headers, body))
        url = f"http://127.0.0.1:{self.server.server_port}/me/axes"
        answers = {
            "/api/repos/create": lambda: {"url": url},
            "/api/validate-yaml": lambda: {"errors": [], "warnings": []},
            "/api/models/me/axes/preupload/main": lambda: {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
            },
            "/api/models/me/axes/commit/main": lambda: {"commitUrl": f"{url}/commit/abc", "commitOid": "abc"},
        }
        found = self.path in answers
        answer = json.dumps(answers[self.path]() if found else {"error": self.path}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self):
        self.headers["Content-Length"] = "0"
        self.do_POST()

    def log_message(self, *_):
        """Prints nothing."""


class FailingHub(Hub):
    """Answers requests for `server.failing` (the end of a path) with an error status."""

    def do_POST(self):
        path, status = self.server.failing
        if not self.path.endswith(path):
            super().do_POST()
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps({"error": "the server's reason\nin two lines"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


class Repositories(BaseHTTPRequestHandler):
    """Serves the folders `server.root`/owner/name as models and datasets; everything else is answered with 404."""

    def do_GET(self):
        path, commit = self.path.partition("?")[0], "a" * 40
        match = re.fullmatch(r"(/api)?(/datasets|/models)?(/owner/\w+)(.*)", path)
        content, headers = None, {"X-Repo-Commit": commit}
        if match:
            folder = self.server.root / match[3][1:]
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            place = re.fullmatch(r"/(revision|tree|resolve)/[^/]+/?(.*)", match[4])
            if match[1] and (match[4] == "" or place[1] == "revision"):
                siblings = [{"rfilename": name} for name in files]
                content = json.dumps({"id": match[3][1:], "sha": commit, "siblings": siblings}).encode()
            elif match[1] and place[1] == "tree":
                entries = [
                    {"type": kind, "path": file.relative_to(folder).as_posix(), "oid": commit, "size": 1}
                    for file in (folder / place[2]).rglob("*")
                    for kind in ["file" if file.is_file() else "directory"]
                ]
                content = json.dumps(entries).encode()
            elif place and place[1] == "resolve" and place[2] in files:
                content = files[place[2]].read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            else:
                headers["X-Error-Code"] = "EntryNotFound"
        self.send_response(404 if content is None else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_):
        """Prints nothing."""


class Storage(Repositories):
    """A hub that stores commits below `server.root` and serves them."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.command, self.path, self.headers, body))
        match = re.fullmatch(r"/api/models/(owner/\w+)/(preupload|commit)/main", self.path)
        url = f"http://127.0.0.1:{self.server.server_port}/owner/axes"
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            (self.server.root / wanted.get("organization", "owner") / wanted["name"]).mkdir(
                parents=True, exist_ok=True
            )
            answer = {"url": url}
        elif match and match[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif match:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    path = self.server.root / match[1] / row["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(row["value"]["content"]))
            answer = {"commitUrl": f"{url}/commit/abc", "commitOid": "abc"}
        else:
            answer = {"errors": [], "warnings": []}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        match = re.match(r"/api/models/(owner/\w+)", self.path)
        if match and not (self.server.root / match[1]).exists():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        super().do_GET()


class Slow(Repositories):
    """Does not answer the first `server.silent` requests within the clients' timeouts."""

    def do_GET(self):
        self.server.seen.append(self.path)
        if len(self.server.seen) <= self.server.silent:
            self.server.given_up.wait(20)
            return
        super().do_GET()

    do_HEAD = do_GET


@contextlib.contextmanager
def serving(handler, **attributes):
    """Starts a server on a free port; `seen` keeps its requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(seen=[], **attributes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def taken_for_the_hub(server):
    """Makes this process use the server as the hub."""
    from huggingface_hub import close_session, constants

    with pytest.MonkeyPatch.context() as patch:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        patch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"  # computed from the other constant at import
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setenv("NO_PROXY", "*")
        close_session()  # a session reads the proxy settings when it is created
        yield
    close_session()


def environment(server, folder, **more):
    """Returns the environment of a child process that uses the server as the hub."""
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*",
        "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **more,
    }  # fmt: skip


def uploaded(server):
    """Returns {path: content} of the only commit."""
    (commit,) = (body for _, path, _, body in server.seen if path.endswith("/commit/main"))
    rows = [row["value"] for row in map(json.loads, commit.splitlines()) if row["key"] == "file"]
    return {row["path"]: base64.b64decode(row["content"]) for row in rows}
