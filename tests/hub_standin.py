"""A Hub on this machine for the tests: as much of its HTTP interface as `push_to_hub` uses, and what it was sent."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubStandin:
    """Keeps the files of every commit, by repository and path."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.unknown: list[str] = []
        self.url = ""

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'someone'}/{wanted['name'].split('/')[-1]}"
            self.files.setdefault(name, {})
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        parts = path.split("/")
        name = "/".join(parts[3:5])
        if parts[5:6] == ["preupload"]:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in names]}
        if parts[5:6] == ["commit"]:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.files[name][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "header":
                    self.messages.append(item["value"]["summary"])
            number = f"{len(self.messages):040x}"
            return {"success": True, "commitOid": number, "commitUrl": f"{self.url}/{name}/commit/{number}"}
        self.unknown.append(path)
        return None


@contextmanager
def hub(monkeypatch: Any) -> Iterator[HubStandin]:
    """While open, what this process sends to the Hub goes to the stand-in that it yields."""
    standin = HubStandin()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = standin.answer(self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    standin.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", standin.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield standin
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
