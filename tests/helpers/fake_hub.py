"""A Hugging Face hub on loopback, as far as huggingface_hub 2.4.0 asks for one."""

import contextlib
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """files: {"owner/name/path": bytes}. damage: names of files that arrive with one byte changed."""

    def __init__(self, files):
        self.files, self.damage = files, set()
        self.requests = []  # (method, path)

    def gets(self, name) -> int:
        """Return how often a file was transferred."""
        return sum(method == "GET" and path.endswith(name) for method, path in self.requests)


@contextlib.contextmanager
def serve(files):
    """A running FakeHub; its address for HF_ENDPOINT is hub.endpoint."""
    hub = FakeHub(files)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                return self.file(f"{match[1]}/{match[2]}", match[2].split("/")[-1])
            self.reply(404)

        do_HEAD = do_GET

        def file(self, key, name):
            body = hub.files.get(key)
            if body is None:
                return self.reply(404, X_Error_Code="EntryNotFound")
            sha256 = hashlib.sha256(body).hexdigest()
            about = {"X-Repo-Commit": REVISION, "X-Linked-Size": len(body), "X-Linked-Etag": f'"{sha256}"',
                     "ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
            if name in hub.damage:
                body = bytes([body[0] ^ 1]) + body[1:]
            self.reply(200, body, **about)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
