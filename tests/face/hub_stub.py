"""A stand-in for the Hub's HTTP API: makes repositories, takes uploads and commits, and keeps what it was given."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TOKEN = "hf_" + "x" * 34


class StubHub(ThreadingHTTPServer):
    """The server, and what reached it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.requests: list[str] = []
        self.created: list[dict] = []
        self.commits: list[dict] = []
        self.blobs: dict[str, bytes] = {}
        self.status: dict[str, int] = {}  # by a part of the path: what is answered instead

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self) -> dict[str, bytes]:
        """Contents of the repository after all commits."""
        found = {}
        for commit in self.commits:
            for line in commit["lines"]:
                value = line["value"]
                if line["key"] == "file":
                    assert value["encoding"] == "base64"
                    found[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    content = self.blobs[value["oid"]]
                    assert (hashlib.sha256(content).hexdigest(), len(content)) == (value["oid"], value["size"])
                    found[value["path"]] = content
        return found


class StubHandler(BaseHTTPRequestHandler):
    """One request."""

    server: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Quiet."""

    def answer(self, document=None, status=200, headers=()):
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refused(self) -> bool:
        for part, status in self.server.status.items():
            if part in self.path:
                headers = [("X-Error-Code", "RepoNotFound")] if status == 404 else []
                self.answer({"error": f"stub says {status}"}, status, headers)
                return True
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/upload"):
            self.answer({"error": "Invalid username or password."}, 401)
            return True
        return False

    def do_POST(self):
        content = self.body()
        path = self.path.partition("?")[0]
        self.server.requests.append(f"POST {path}")
        if self.refused():
            return
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            given = json.loads(content)
            self.server.created.append(given)
            self.answer({"url": f"{self.server.endpoint}/{given['organization']}/{given['name']}"})
        elif "/preupload/" in path:
            listed = json.loads(content)["files"]
            for file in listed:
                assert len(base64.b64decode(file["sample"])) <= 512
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".mp4")) else "regular",
                    "shouldIgnore": False,
                }
                for file in listed
            ]
            self.answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(content)
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.endpoint}/upload/{one['oid']}", "header": {}}}}
                for one in asked["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            lines = [json.loads(line) for line in content.splitlines()]
            self.server.commits.append({"path": path, "lines": lines})
            oid = hashlib.sha1(content).hexdigest()
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            url = f"{self.server.endpoint}/{repository}/commit/{oid}"
            self.answer({"commitUrl": url, "commitOid": oid, "hookOutput": ""})
        else:
            self.answer({"error": f"stub does not know {path}"}, 500)

    def do_PUT(self):
        content = self.body()
        self.server.requests.append("PUT /upload")
        if self.refused():
            return
        self.server.blobs[self.path.rpartition("/")[2]] = content
        self.answer()

    def do_GET(self):
        self.server.requests.append(f"GET {self.path}")
        if self.refused():
            return
        self.answer({"error": "nothing to read here"}, 404)


@contextmanager
def stub_hub():
    """A running stub, stopped at the end."""
    server = StubHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
