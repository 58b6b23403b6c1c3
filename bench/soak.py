"""A gateway under faults at random: does every request end in time, and is nothing lost that was said to be kept?

    python bench/soak.py                    # ten minutes
    python bench/soak.py --seconds 60

Upstream and corrector are scripted, in a process of their own; `everalign serve` stands in another. What goes wrong is
drawn for every request: the upstream hangs, cuts its answer off, answers with an error or with nonsense, drips; the
corrector hangs, fails, writes nonsense; the client leaves. Every half a minute the store is locked for some seconds.
A request is late when it takes longer than the gateway's own deadlines together. Faults show in the table as what
clients were told; what must be zero are late requests, requests under way at the end, and lost feedback.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from rich.console import Console
from rich.table import Table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from common import OUT, write_result

UPSTREAM_SECONDS, CORRECTION_SECONDS, STORE_SECONDS = 4.0, 2.0, 1.0
# What may pass after all deadlines: a busy machine, and the one attempt more of a client that does not retry.
SLACK = 3.0
DEADLINE = 2 * UPSTREAM_SECONDS + CORRECTION_SECONDS + STORE_SECONDS + SLACK
LOCKED_EVERY, LOCKED_FOR = 30.0, 4.0
UPSTREAM_FAULTS = ("hang", "cut", "error", "limit", "nonsense", "drip")
CORRECTOR_FAULTS = ("corrector hangs", "corrector fails", "corrector raves")
FINE = 0.6
KEYS = ("one", "two", "three")
TEXT = "The answer is that it depends on the weather, and on who asks. " * 3


# ---- upstream and corrector ----


async def peer(port: int) -> None:
    """Serve as upstream under /up and as corrector under /fix until killed."""
    routes = [
        Route("/up/v1/models", _models),
        Route("/up/v1/chat/completions", _chat, methods=["POST"]),
        Route("/fix/v1/completions", _fix, methods=["POST"]),
        Route("/fix/v1/models", _models),
    ]
    config = uvicorn.Config(Starlette(routes=routes), port=port, log_level="critical")
    await uvicorn.Server(config).serve()


async def _models(_: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "x"}]})


async def _chat(request: Request) -> Response:
    body = await request.json()
    fault = body["messages"][-1]["content"].partition(":")[0]
    if fault == "hang":
        await asyncio.sleep(60)
    if fault in ("error", "limit"):
        error = {"message": "scripted", "type": "server_error", "param": None, "code": None}
        return JSONResponse({"error": error}, 500 if fault == "error" else 429)
    if fault == "nonsense":
        return Response(b"<html>not now</html>", media_type="text/html")
    if body.get("stream"):
        return StreamingResponse(_events(body, fault), media_type="text/event-stream")
    if fault == "cut":
        return StreamingResponse(_half(), media_type="application/json")
    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    return JSONResponse({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


async def _fix(request: Request) -> Response:
    prompt = (await request.json())["prompt"]
    if "corrector hangs" in prompt:
        await asyncio.sleep(60)
    if "corrector fails" in prompt:
        return JSONResponse({"error": {"message": "scripted"}}, 500)
    text = "x" * 100_000 if "corrector raves" in prompt else TEXT.replace("weather", "season")
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    return JSONResponse({"id": "t", "object": "text_completion", "created": 1, "model": "c", "choices": [choice]})


async def _events(body: dict[str, Any], fault: str) -> AsyncIterator[str]:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    for i in range(0, len(TEXT), 8):
        if fault == "cut" and i > 40:
            raise ConnectionError("scripted")
        await asyncio.sleep(0.5 if fault == "drip" else 0.005)
        choice = {"index": 0, "delta": {"content": TEXT[i : i + 8]}, "finish_reason": None}
        yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
    yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
    yield "data: [DONE]\n\n"


async def _half() -> AsyncIterator[bytes]:
    yield b'{"id": "c", "object": "chat.comp'
    raise ConnectionError("scripted")


# ---- the clients ----


class Seen:
    """What the clients saw."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.seconds: list[float] = []
        self.late: list[str] = []
        self.acknowledged: list[tuple[str, str]] = []
        self.store_failures = self.refused_feedback = 0


async def client(base: str, number: int, until: float, seen: Seen) -> None:
    """Ask again and again; the faults are drawn by the client's number."""
    draw, key = random.Random(number), KEYS[number % len(KEYS)]
    async with httpx.AsyncClient(base_url=base, headers={"authorization": f"Bearer {key}"}, timeout=60) as http:
        while time.monotonic() < until:
            fault = "fine" if draw.random() < FINE else draw.choice([*UPSTREAM_FAULTS, *CORRECTOR_FAULTS, "leaves"])
            stream, began = draw.random() < 0.5, time.monotonic()
            patience = draw.uniform(0.05, 1.0) if fault == "leaves" else 60.0
            try:
                asking = ask(http, f"{fault}: {draw.random()}", stream)
                outcome, answer, stored = await asyncio.wait_for(asking, patience)
            except asyncio.TimeoutError:
                outcome, answer, stored = "left", None, False
            except httpx.HTTPError as error:
                outcome, answer, stored = type(error).__name__, None, False
            taken = time.monotonic() - began
            seen.outcomes[(fault, outcome)] += 1
            if fault != "leaves":
                seen.seconds.append(taken)
                if taken > DEADLINE:
                    seen.late.append(f"{fault}, {'streamed' if stream else 'whole'}: {taken:.1f} s, {outcome}")
            if answer is not None and not stored:
                seen.store_failures += 1
            if answer is not None and stored:
                await give(http, answer, key, draw, seen)
            await asyncio.sleep(draw.random() * 0.2)


async def ask(http: httpx.AsyncClient, text: str, stream: bool) -> tuple[str, str | None, bool]:
    """Return what the client was told, the answer's id and whether it is kept."""
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": stream, "store": True}
    async with http.stream("POST", "/chat/completions", json=body) as reply:
        content = (await reply.aread()).decode()
    if reply.status_code != 200:
        return str(reply.status_code), None, False
    if not stream:
        found = json.loads(content)
        return f"200 {found['everalign']['correction']}", found["id"], bool(found["everalign"].get("stored"))
    events = [line[6:] for line in content.split("\n\n") if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        return "stream ended with " + ("an error" if '"error"' in events[-1] else "nothing"), None, False
    chunks = [json.loads(event) for event in events[:-1]]
    about: dict[str, Any] = next((chunk["everalign"] for chunk in chunks if "everalign" in chunk), {})
    return f"200 {about.get('correction')}", chunks[0]["id"], bool(about.get("stored"))


async def give(http: httpx.AsyncClient, answer: str, key: str, draw: random.Random, seen: Seen) -> None:
    """Give feedback, and remember it where the gateway says that it has it."""
    body = {"id": answer, "rating": draw.choice([-1, 1])}
    began = time.monotonic()
    reply = await http.post("/feedback", json=body)
    if time.monotonic() - began > STORE_SECONDS + SLACK:
        seen.late.append(f"feedback: {time.monotonic() - began:.1f} s, {reply.status_code}")
    if reply.is_success:
        seen.acknowledged.append((answer, key))
    else:
        seen.refused_feedback += 1


# ---- the trial ----


async def lock_the_store(path: Path, until: float) -> int:
    """Hold the database's write lock for some seconds, again and again; returns how often."""
    times = 0
    while time.monotonic() + LOCKED_EVERY < until:
        await asyncio.sleep(LOCKED_EVERY - LOCKED_FOR)
        connection = sqlite3.connect(path, isolation_level=None, timeout=LOCKED_FOR)
        connection.execute("BEGIN IMMEDIATE")
        await asyncio.sleep(LOCKED_FOR)
        connection.execute("ROLLBACK")
        connection.close()
        times += 1
    return times


async def watch_memory(process: int, until: float, sizes: list[int]) -> None:
    """Note a process's resident size every five seconds, in bytes."""
    while time.monotonic() < until:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                sizes.append(int(line.split()[1]) * 1024)
        await asyncio.sleep(5)


@contextmanager
def running(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process, for as long as the `with` block; what it says of each fault is not shown."""
    with subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def answers(url: str) -> None:
    """Wait until a server answers."""
    async with httpx.AsyncClient() as http:
        for _ in range(600):
            with suppress(httpx.HTTPError):
                await http.get(url)
                return
            await asyncio.sleep(0.1)
    sys.exit(f"{url} does not answer")


def number_of(metrics: str, name: str) -> float:
    """The value of a metric without labels."""
    return next(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(f"everalign_{name} "))


async def soak(seconds: float, clients: int, base: str, store: Path, process: int) -> dict[str, Any]:
    """Let the clients loose, and look at what remains."""
    seen, sizes, until = Seen(), list[int](), time.monotonic() + seconds
    locking = asyncio.create_task(lock_the_store(store, until))
    watching = asyncio.create_task(watch_memory(process, until, sizes))
    await asyncio.gather(*(client(base, number, until, seen) for number in range(clients)))
    locks = await locking
    await watching
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEYS[0]}"}) as http:
        for _ in range(100):  # what nobody waits for any more may take its deadline to end
            metrics = (await http.get(base.removesuffix("/v1") + "/metrics")).text
            left = {name: number_of(metrics, name) for name in ("in_flight", "correction_queue", "store_queue")}
            if not any(left.values()):
                break
            await asyncio.sleep(DEADLINE / 100)
    with sqlite3.connect(store) as connection:
        kept = {row[0] for row in connection.execute("SELECT exchange FROM everalign_feedback")}
    third = max(1, len(sizes) // 3)
    return {
        "requests": sum(seen.outcomes.values()),
        "outcomes": {" / ".join(pair): count for pair, count in sorted(seen.outcomes.items())},
        "slowest_seconds": max(seen.seconds),
        "deadline_seconds": DEADLINE,
        "late": seen.late,
        "left_at_the_end": left,
        "store_locked": locks,
        "answers_said_not_to_be_kept": seen.store_failures,
        "feedback_acknowledged": len(seen.acknowledged),
        "feedback_refused": seen.refused_feedback,
        "feedback_lost": sum(answer not in kept for answer, _ in seen.acknowledged),
        "resident_mib": {
            "first third": statistics.median(sizes[:third]) / 2**20,
            "last third": statistics.median(sizes[-third:]) / 2**20,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--output", type=Path, default=OUT / "soak.json")
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        asyncio.run(peer(arguments.peer))
        return
    up, port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "feedback.db"
        flags = (
            *("--upstream", f"http://127.0.0.1:{up}/up/v1", "--port", str(port), "--store", f"sqlite:///{store}"),
            *("--corrector", f"http://127.0.0.1:{up}/fix/v1#c", "--template", "everalign-1"),
            *("--timeout", str(UPSTREAM_SECONDS), "--correction-timeout", str(CORRECTION_SECONDS)),
            *("--store-timeout", str(STORE_SECONDS)),
        )
        with (
            running(sys.executable, __file__, "--peer", str(up)),
            running(sys.executable, "-m", "everalign", "serve", *flags, EVERALIGN_API_KEYS=",".join(KEYS)) as gateway,
        ):
            base = f"http://127.0.0.1:{port}/v1"
            asyncio.run(answers(f"http://127.0.0.1:{up}/up/v1/models"))
            asyncio.run(answers(f"http://127.0.0.1:{port}/health"))
            found = asyncio.run(soak(arguments.seconds, arguments.clients, base, store, gateway.pid))
    table = Table("what the client was told", "requests", title=f"{found['requests']} requests")
    for name, count in found["outcomes"].items():
        table.add_row(name, str(count))
    Console(width=120).print(table)
    for name, value in found.items():
        if name != "outcomes":
            print(f"{name.replace('_', ' ')}: {value}")
    write_result(arguments.output, {"seconds": arguments.seconds, "clients": arguments.clients, **found})
    if found["late"] or any(found["left_at_the_end"].values()) or found["feedback_lost"]:
        sys.exit("NOT PASSED: late or lost, see above")


if __name__ == "__main__":
    main()
