"""A hub on this machine, with the part of the Hugging Face hub's HTTP interface that pushing and fetching need."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0" * 40


class Repository(BaseHTTPRequestHandler):
    """A repository of any name: committed files are in `server.files`, the paths of requests in `server.requests`."""

    server: Any

    def do_POST(self) -> None:
        body = self.read_body()
        self.server.requests.append(self.path)
        url = f"http://{self.headers['Host']}/org/tiny"
        if self.path == "/api/repos/create":
            self.answer({"url": url})
        elif self.path == "/api/validate-yaml":
            if "license: my own" in json.loads(body)["content"]:
                self.answer({"errors": [{"message": '"license" must be one of'}]}, 400)
            else:
                self.answer({"errors": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer({"files": modes})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        files = self.server.files
        name = self.path.rpartition("/")[2]
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
                for path, content in files.items()
            ]
            self.answer(entries)
        elif "/revision/" in self.path and files:
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": "org/tiny", "sha": COMMIT, "siblings": siblings})
        elif name in files:
            self.answer(files[name])
        else:
            self.answer({}, 404)

    do_HEAD = do_GET

    def read_body(self) -> bytes:
        """The body of a request, whole or in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def answer(self, content: Any, status: int = 200) -> None:
        """Send bytes as they are, and everything else as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", digest(body))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing: `requests` has it all."""


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def local_hub() -> Iterator[Any]:
    """An empty server at `address`, on the loopback interface."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    server.files = {}
    server.requests = []
    server.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
