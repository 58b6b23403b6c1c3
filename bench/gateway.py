"""What the gateway adds to an upstream's own time: many clients at once, with the gateway and without it, in turn.

    python bench/gateway.py
    python bench/gateway.py --litellm /path/to/venv/bin/litellm     # a peer beside it
    python bench/gateway.py --clients 500 --answer-seconds 20       # 500 streams at once

The upstream is scripted: it answers after a second, or in twenty pieces during one (`--answer-seconds`). Nothing is
corrected (mode off). Each contender is a process of its own, as are the upstream and the clients.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import OUT, write_result

PIECES = 20
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
KINDS = {"whole": False, "stream": True}
LITELLM = """
model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "http://127.0.0.1:{port}/v1", api_key: none}}
general_settings: {{dangerously_permit_weak_or_unset_master_key: true}}
"""


# ---- the upstream ----


async def answer(seconds: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection."""
    head = {"id": "c1", "created": 1, "model": "m"}
    message = {"role": "assistant", "content": "word " * PIECES}
    whole = {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    deltas = [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}] * PIECES
    deltas.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    chunks = [{**head, "object": "chat.completion.chunk", "choices": [delta]} for delta in deltas]
    events = [b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks] + [b"data: [DONE]\n\n"]
    try:
        while True:
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(headers.split(b"content-length:")[1].split(b"\r\n")[0])
            asked = json.loads(await reader.readexactly(length))
            if not asked.get("stream"):
                await asyncio.sleep(seconds)
                body = json.dumps(whole).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
                )
                writer.write(body)
                continue
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for event in events:
                await asyncio.sleep(seconds / len(events))
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            writer.write(b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def upstream(port: int, seconds: float) -> None:
    """Serve until killed."""
    async with await asyncio.start_server(partial(answer, seconds), "127.0.0.1", port, backlog=1024) as server:
        await server.serve_forever()


# ---- the clients ----


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: bool) -> float:
    """Return the seconds that one request takes."""
    body = json.dumps({**BODY, "stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    began = time.perf_counter()
    writer.write(f"{head}authorization: Bearer none\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    headers = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b" 200 " not in headers[:20]:
        raise RuntimeError(f"not answered: {headers[:80]!r}")
    if b"content-length:" in headers:
        await reader.readexactly(int(headers.split(b"content-length:")[1].split(b"\r\n")[0]))
        return time.perf_counter() - began
    while size := int(await reader.readline(), 16):
        await reader.readexactly(size + 2)
    await reader.readline()
    return time.perf_counter() - began


async def client(port: int, until: float, pause: float, stream: bool, found: list[float]) -> None:
    """Ask again and again, with pauses, so that clients do not march in step."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        await asyncio.sleep(random.random() * pause)
        found.append(await ask(reader, writer, stream))
    writer.close()


async def load(port: int, arguments: argparse.Namespace, seconds: float, stream: bool) -> list[float]:
    """Return the seconds of all requests of many clients, the quickest first."""
    found: list[float] = []
    until = time.perf_counter() + seconds
    pause = arguments.answer_seconds / 2
    await asyncio.gather(*(client(port, until, pause, stream, found) for _ in range(arguments.clients)))
    return sorted(found)


# ---- the contenders ----


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextmanager
def running(*command: str, port: int) -> Iterator[int]:
    """A process that listens at a port; yields its id."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    sys.exit(f"{command[0]} did not start")
                time.sleep(0.1)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def resident(process: int) -> float:
    """A process's memory in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor(process: int) -> float:
    """Seconds of processor time of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def quantile(found: list[float], share: float) -> float:
    """A quantile in milliseconds."""
    return 1000 * found[int(share * (len(found) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load for each contender and kind")
    parser.add_argument("--rounds", type=int, default=3, help="in which the seconds are divided, contenders in turn")
    parser.add_argument("--answer-seconds", type=float, default=1.0, help="that the upstream takes for an answer")
    parser.add_argument("--litellm", help="its command, in an environment of its own")
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.upstream:
        asyncio.run(upstream(arguments.upstream, arguments.answer_seconds))
        return
    with ExitStack() as stack:
        behind = free_port()
        scripted = ("--upstream", str(behind), "--answer-seconds", str(arguments.answer_seconds))
        stack.enter_context(running(sys.executable, __file__, *scripted, port=behind))
        contenders: dict[str, tuple[int, int | None]] = {"direct": (behind, None)}
        port = free_port()
        serve = (sys.executable, "-m", "everalign", "serve", "--upstream", f"http://127.0.0.1:{behind}/v1")
        contenders["everalign"] = (port, stack.enter_context(running(*serve, "--port", str(port), port=port)))
        if arguments.litellm:
            port, config = free_port(), Path(stack.enter_context(tempfile.TemporaryDirectory())) / "litellm.yaml"
            config.write_text(LITELLM.format(port=behind))
            command = (arguments.litellm, "--config", str(config), "--host", "127.0.0.1", "--port", str(port))
            contenders["litellm"] = (port, stack.enter_context(running(*command, port=port)))
        measure(arguments, contenders)


def measure(arguments: argparse.Namespace, contenders: dict[str, tuple[int, int | None]]) -> None:
    """Load the contenders in turn, and tell of it."""
    table = Table(title=f"{arguments.clients} clients, milliseconds above the upstream's own time")
    columns = ("answer", "through", "requests", "p50", "p99", "processor ms a request", "MiB before", "after")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    results: list[dict[str, Any]] = []
    for kind, stream in KINDS.items():
        found: dict[str, list[float]] = {name: [] for name in contenders}
        spent, memory = dict.fromkeys(contenders, 0.0), {name: resident(p) for name, (_, p) in contenders.items() if p}
        for port, _ in contenders.values():
            asyncio.run(load(port, arguments, 1.0, stream))
        for _ in range(arguments.rounds):
            for name, (port, process) in contenders.items():
                before = processor(process) if process else 0.0
                found[name] += asyncio.run(load(port, arguments, arguments.seconds / arguments.rounds, stream))
                spent[name] += (processor(process) if process else 0.0) - before
        direct = sorted(found["direct"])
        for name, (_, process) in contenders.items():
            times = sorted(found[name])
            p50, p99 = (quantile(times, share) - quantile(direct, share) for share in (0.5, 0.99))
            cost = 1000 * spent[name] / len(times)
            after = resident(process) if process else 0.0
            row = {"answer": kind, "through": name, "requests": len(times), "p50": p50, "p99": p99}
            results.append({**row, "processor_ms": cost, "before": memory.get(name), "after": after})
            figures = (f"{p50:+.1f}", f"{p99:+.1f}", f"{cost:.2f}", f"{memory.get(name, 0):.0f}", f"{after:.0f}")
            table.add_row(kind, name, str(len(times)), *figures)
    Console(width=120).print(table)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("upstream", "litellm")}
    write_result(OUT / "gateway.json", {"settings": settings, "results": results})


if __name__ == "__main__":
    main()
