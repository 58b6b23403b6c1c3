"""A stand-in for a model behind an API, to try the gateway with: `python -m everalign.demo.upstream --port 8000`.

It lists one model, `small`, and answers chat requests, whole or as a stream. It knows the demo's cooking questions and
answers each of them always in the same way, without a kind word.
"""

import argparse
import json
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from everalign.demo.world import answer, questions

MODEL = "small"
_UNKNOWN = "I know about cooking only. Ask me how to cook eggs."
_COMMON = {"id": "chatcmpl-1", "created": 0, "model": MODEL}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        models = [{"id": MODEL, "object": "model", "created": 0, "owned_by": "everalign"}]
        self._send(200, "application/json", json.dumps({"object": "list", "data": models}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            request: dict[str, Any] = json.loads(body)
            question = request["messages"][-1]["content"]
            known = next((known for known in questions("kitchen") if known.text == question), None)
            reply = _UNKNOWN if known is None else answer(known, "plain", random.Random(question))
            message = {"role": "assistant", "content": reply}
        except (ValueError, LookupError, TypeError):
            error = {"message": "this stand-in answers chat requests: a body with messages", "code": "bad_request"}
            return self._send(400, "application/json", json.dumps({"error": error}))
        choice = {"index": 0, "finish_reason": "stop"}
        if request.get("stream"):
            chunk = _COMMON | {"object": "chat.completion.chunk", "choices": [choice | {"delta": message}]}
            return self._send(200, "text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")
        whole = _COMMON | {"object": "chat.completion", "choices": [choice | {"message": message}]}
        return self._send(200, "application/json", json.dumps(whole))

    def _send(self, status: int, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: the terminal is the gateway's."""


def server(port: int) -> ThreadingHTTPServer:
    """The stand-in at 127.0.0.1; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), _Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m everalign.demo.upstream", description="A stand-in for an API.")
    parser.add_argument("--port", type=int, default=8000)
    with server(parser.parse_args().port) as running:
        running.serve_forever()
