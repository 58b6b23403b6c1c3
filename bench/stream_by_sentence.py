"""How soon a client reads the first corrected word: streams by answer and by sentence, beside the upstream itself.

    python bench/stream_by_sentence.py

The upstream writes 30 tokens a second. The corrector is the embedded model, taught as the demo's is, but with answers
to one to three cooking questions at once, so that they have up to nine sentences. It is trained once, in a minute, and
kept. Both gateways are processes of their own; each request is made in all ways in turn.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.table import Table

from common import OUT, write_result
from everalign.correction.corrector import Corrected, Corrector
from everalign.correction.training import train_corrector
from everalign.data.records import Correction, CorrectionSet
from everalign.demo.run import OPTIONS, demo_answers
from everalign.modeling.loading import TINY, load_tokenizer
from gateway import free_port, running

MOST = 3  # questions at once
TAUGHT_ROWS, COMPARED = 400, 60
WAYS = ("upstream", "by answer", "by sentence")


class Asked(NamedTuple):
    """Several questions at once, an answer to all of them, and how it should be."""

    question: str
    answer: str
    correction: str


def asked(split: str, count: int) -> list[Asked]:
    """Requests with one to three questions, one in four of them with answers that are right."""
    draw = random.Random(split)
    rows = demo_answers(split, {"train": 240, "test": 120}[split])
    wrong, right = rows[::2], rows[1::2]
    found = []
    for number in range(count):
        some = draw.sample(right if number % 4 == 3 else wrong, draw.randint(1, MOST))
        texts = ((row.question.text, row.answer, row.correction) for row in some)
        found.append(Asked(*map(" ".join, zip(*texts, strict=True))))
    return found


def corrector_folder() -> Path:
    """The corrector's folder; it is trained if it is not there yet."""
    folder = OUT / "sentence_corrector"
    if not folder.exists():
        taught = CorrectionSet(tuple(Correction(*row) for row in asked("train", TAUGHT_ROWS)), "demo")
        train_corrector(TINY, taught, folder, options=OPTIONS, log=print)
    return folder


class Upstream(BaseHTTPRequestHandler):
    """Streams the `pieces` that a request brings, at a fixed rate."""

    rate = 30.0
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self._begin("application/json")
        self.wfile.write(b'{"object": "list", "data": []}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._begin("text/event-stream")
        began = time.perf_counter()
        for number, piece in enumerate([*body["pieces"], None], start=1):
            time.sleep(max(0.0, began + number / self.rate - time.perf_counter()))
            delta = {"content": piece} if piece else {}
            choice = {"index": 0, "delta": delta, "finish_reason": None if piece else "stop"}
            chunk = {"id": "c1", "created": 1, "model": "m", "object": "chat.completion.chunk", "choices": [choice]}
            self.wfile.write(b"data: %s\n\n" % json.dumps(chunk).encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""


def ask(port: int, question: str, pieces: list[str]) -> dict[str, Any]:
    """Ask for a stream; returns its text, the seconds to its first text and to its end, and the corrector's passes."""
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": question}], "pieces": pieces}
    body["stream_options"] = {"include_usage": True}
    text, first, passes = "", 0.0, 0
    began = time.perf_counter()
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    with httpx.stream("POST", address, json=body, timeout=60, trust_env=False) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            passes = ((event.get("usage") or {}).get("corrector") or {}).get("forward_passes", passes)
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    text += piece
    return {"text": text, "first": first, "end": time.perf_counter() - began, "passes": passes}


def measure(ports: dict[str, int], requests: list[Asked]) -> list[dict[str, Any]]:
    """Make each request in all ways; returns what each of them gave."""
    tokenizer, found = load_tokenizer(TINY), []
    for question, answer, _ in requests:
        offsets = tokenizer(answer, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        cuts = sorted({0, len(answer), *(start for start, _ in offsets)})
        pieces = [answer[a:b] for a, b in pairwise(cuts)]
        replies = {way: ask(port, question, pieces) for way, port in ports.items()}
        found.append({"tokens": len(pieces), "answer": answer, **replies})
    return found


def compare(folder: Path) -> dict[str, int]:
    """Correct held-out answers whole and by sentence, as if each sentence were corrected as soon as it ends."""
    corrector, rows = Corrector.from_pretrained(folder), asked("test", COMPARED)
    whole = corrector.correct_batch([(row.question, row.answer) for row in rows])
    parted: list[Corrected] = []
    for row in rows:
        *_, result = corrector.stream_by_sentence(row.question, list(row.answer))
        assert isinstance(result, Corrected)
        parted.append(result)
    return {
        "answers": len(rows),
        "same": sum(a.text == b.text for a, b in zip(whole, parted, strict=True)),
        "right as they come": sum(row.answer == row.correction for row in rows),
        "right, whole": sum(one.text == row.correction for one, row in zip(whole, rows, strict=True)),
        "right, by sentence": sum(one.text == row.correction for one, row in zip(parted, rows, strict=True)),
        "passes, whole": sum(one.forward_passes or 0 for one in whole),
        "passes, by sentence": sum(one.forward_passes or 0 for one in parted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--rate", type=float, default=30.0, help="tokens that the upstream writes in a second")
    arguments = parser.parse_args()
    folder = corrector_folder()
    compared = compare(folder)
    Upstream.rate = arguments.rate
    with ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Upstream))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        ports = {"upstream": server.server_port}
        for way in WAYS[1:]:
            ports[way] = port = free_port()
            command = (sys.executable, "-m", "everalign", "serve", "--corrector", str(folder), "--port", str(port))
            by = ("--stream-by", way.removeprefix("by "))
            upstream = ("--upstream", f"http://127.0.0.1:{server.server_port}/v1")
            stack.enter_context(running(*command, *upstream, *by, port=port))
        for way in WAYS[1:]:
            # It listens before its corrector is loaded, and answers afterwards.
            httpx.get(f"http://127.0.0.1:{ports[way]}/health", timeout=300, trust_env=False).raise_for_status()
        measure(ports, asked("test", 1))  # the first request of a process takes longer
        found = measure(ports, asked("test", arguments.requests))
    report(found, compared, vars(arguments))


def report(found: list[dict[str, Any]], compared: dict[str, int], settings: dict[str, Any]) -> None:
    """Print the tables, and write the results."""
    table = Table(title=f"{len(found)} streams of {statistics.mean(row['tokens'] for row in found):.0f} tokens")
    for column in ("text leaves", "first text, s", "of the upstream's time", "end, s", "forward passes"):
        table.add_column(column, justify="left" if column == "text leaves" else "right")
    for way in WAYS:
        first, end = (statistics.median(row[way][name] for row in found) for name in ("first", "end"))
        share = statistics.median(row[way]["first"] / row["upstream"]["end"] for row in found)
        passes = statistics.mean(row[way]["passes"] for row in found)
        table.add_row(way, f"{first:.2f}", f"{share:.0%}", f"{end:.2f}", f"{passes:.1f}")
    Console(width=120).print(table)
    print(", ".join(f"{name}: {count}" for name, count in compared.items()))
    write_result(OUT / "stream_by_sentence.json", {"settings": settings, "compared": compared, "results": found})


if __name__ == "__main__":
    main()
