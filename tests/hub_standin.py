"""A local stand-in of the Hugging Face Hub's HTTP interface: what huggingface_hub asks to upload and to download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The repositories of a stand-in, by name: the bytes of every file by path. ``asked`` lists the requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """Answers for ``hub``, which a subclass names."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def missing(self, code: str) -> None:
        self.reply(404, b"{}", X_Error_Code=code, X_Error_Message=f"{code} at the stand-in", X_Repo_Commit=COMMIT)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        if "/resolve/" in path:
            name, _, rest = path.partition("/resolve/")
            files = self.hub.repositories.get(name)
            if files is None:
                return self.missing("RepoNotFound")
            content = files.get(rest.partition("/")[2])
            if content is None:
                return self.missing("EntryNotFound")
            return self.reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        name = path.removeprefix("api/models/").partition("/revision")[0].partition("/tree")[0]
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound")
        files = self.hub.repositories[name]
        if "/tree" in path:
            listed = [{"type": "file", "path": p, "size": len(c), "oid": COMMIT} for p, c in files.items()]
            return self.json(listed)
        return self.json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": p} for p in files], "tags": []})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"POST {path}")
        if path == "api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.hub.repositories.setdefault(name, {})
            return self.json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if path == "api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "/commit/" in path:
            name = path.removeprefix("api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            url = f"{self.hub.url}/{name}/commit/{COMMIT}"
            return self.json({"commitUrl": url, "commitOid": COMMIT, "success": True, "pullRequestUrl": None})
        return self.missing("EntryNotFound")


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve an empty hub on the loopback address until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
