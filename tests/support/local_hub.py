"""A hub of this machine: as much of the Hugging Face hub's HTTP interface as pushing and fetching a model take."""

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
    """One of any name, which keeps what is committed in `server.files` and what is asked in `server.asked`."""

    server: Any

    def do_POST(self) -> None:
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        )
        while "Content-Length" not in self.headers and (size := int(self.rfile.readline(), 16)):  # chunks
            body += self.rfile.read(size)
            self.rfile.readline()
        self.server.asked.append(self.path)
        here = f"http://{self.headers['Host']}/org/tiny"
        if self.path == "/api/repos/create":
            self.answer({"url": here})
        elif self.path == "/api/validate-yaml":
            known = "license: my own" not in json.loads(body)["content"]
            self.answer(
                {"errors": [] if known else [{"message": '"license" must be one of'}]}, 200 if known else 400
            )
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            told = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer({"files": told})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{here}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        files, name = self.server.files, self.path.rpartition("/")[2]
        if "/tree/" in self.path:
            self.answer(
                [{"type": "file", "path": n, "size": len(b), "oid": digest(b)} for n, b in files.items()]
            )
        elif "/revision/" in self.path and files:
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": "org/tiny", "sha": COMMIT, "siblings": siblings})
        elif name in files:
            self.answer(files[name])
        else:
            self.answer({}, 404)

    do_HEAD = do_GET

    def answer(self, told: Any, status: int = 200) -> None:
        body = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(status)
        for key, value in {
            "Content-Length": len(body),
            "X-Repo-Commit": COMMIT,
            "ETag": digest(body),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *told: object) -> None:
        """Nothing: the tests look at `asked`."""


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def local_hub() -> Iterator[Any]:
    """A server at `address`, empty."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Repository)
    server.files, server.asked, server.address = {}, [], f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
