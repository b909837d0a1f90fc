"""A server for tests that speaks as much of OpenAI's protocol as `Endpoint` uses, and does what a test tells it to."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """
    Args:
        reply (`Callable[[int, str, list[str]], str | tuple[int, dict, str]]`):
            From the request's number (from 0), its prompt and its pictures' URLs to the model's words, or to the
            status, headers and body of another response.
        key (`str`, *optional*): the one that is let in; any by default.

    Attributes:
        requests (`list[dict]`): the bodies that came.
    """

    def __init__(self, reply: Callable, key: str | None = None):
        self.requests: list[dict] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(request)
                sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
                content = request["messages"][0]["content"]
                prompt = "".join(part["text"] for part in content if part["type"] == "text")
                urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
                if key is not None and sent != key:
                    # Some servers do show the key that they refuse.
                    answer = (401, {}, json.dumps({"error": {"message": f"Incorrect key: {sent}"}}))
                elif self.path != "/v1/chat/completions":
                    answer = (404, {}, "{}")
                else:
                    answer = reply(number, prompt, urls)
                if isinstance(answer, str):
                    message = {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": answer},
                    }
                    completion = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
                    answer = (200, {}, json.dumps({**completion, "choices": [message]}))
                status, headers, body = answer
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
