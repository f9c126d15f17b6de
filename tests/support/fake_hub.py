"""A Hub on this machine, as far as huggingface_hub asks it: repositories are made, and commits are kept in memory."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """What was sent."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.branches: set[str] = set()
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.refused: tuple[int, str] | None = None
        """Status and error code of every answer."""
        self.url = ""


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run one; it is gone afterwards."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = hub.repositories.get(self.path.removeprefix("/api/models/"))
            if known is not None and hub.refused is None:
                private = bool(known.get("private")) or known.get("visibility") == "private"
                self._answer({"id": self.path.removeprefix("/api/models/"), "private": private})
                return
            status, code = hub.refused or (404, "RepoNotFound")
            self._answer({"error": code}, status, {"X-Error-Code": code})

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if hub.refused is not None:
                self._answer({"error": hub.refused[1]}, hub.refused[0], {"X-Error-Code": hub.refused[1]})
            elif self.path == "/api/repos/create":
                asked = json.loads(sent)
                hub.repositories[asked["organization"] + "/" + asked["name"]] = asked
                self._answer({"url": f"{hub.url}/{asked['organization']}/{asked['name']}"})
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/branch/" in self.path:
                hub.branches.add(self.path.rsplit("/", 1)[1])
                self._answer({})
            elif "/preupload/" in self.path:
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(sent)["files"]
                ]
                self._answer({"files": files})
            else:
                assert "/commit/" in self.path, self.path
                for line in sent.splitlines():
                    part = json.loads(line)
                    if part["key"] == "file":
                        hub.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
                    else:
                        hub.commits.append(part["value"]["summary"])
                name = self.path.split("/commit/")[0].removeprefix("/api/models/")
                self._answer({"commitUrl": f"{hub.url}/{name}/commit/abc", "commitOid": "abc", "success": True})

        def _answer(self, data: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
