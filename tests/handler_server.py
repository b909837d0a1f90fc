"""Serves a release's handler.py as the server of Inference Endpoints does: `python tests/handler_server.py FOLDER [PORT]`.

JSON in, JSON out; what the handler raises becomes `{"error": ...}` and status 400.
"""

import importlib.util
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def load_handler(folder):
    """The module handler.py of a folder."""
    spec = importlib.util.spec_from_file_location("handler", Path(folder) / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_server(handler, port=0):
    """A server on this machine, a thread a request. Port 0 takes any that is free."""

    class Requests(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                status, answer = 200, handler(json.loads(body))
            except Exception as error:
                status, answer = 400, {"error": str(error), "kind": type(error).__name__}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Requests)


if __name__ == "__main__":
    folder, port = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    server = make_server(load_handler(folder).EndpointHandler(folder), port)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()
