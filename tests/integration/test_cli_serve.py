"""`everalign serve`: what it refuses, what it says, and how it ends."""

import asyncio
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from cli_for_tests import run
from everalign.serving.app import create_app
from everalign.serving.server import description
from everalign.serving.settings import Access, GatewaySettings, UpstreamSettings
from upstream_for_tests import Script, UpstreamServer

URL = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in ("EVERALIGN_API_KEYS", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "Missing option '--upstream'"),
        (["--upstream", "nonsense"], "--upstream nonsense: must be URL or NAME=URL"),
        (["--upstream", "a=b=c"], "must be URL or NAME=URL"),
        (["--upstream", "http://169.254.169.254/"], "must not be a metadata service"),
        (["--upstream", "http://me:secret@host/"], "must be without user"),
        (["--upstream", URL, "--upstream", URL], "upstream 'default': is given twice"),
        (["--upstream", URL, "--host", "0.0.0.0"], "--host 0.0.0.0: without keys only this machine is served"),
        (["--upstream", URL, "--port", "70000"], "--port 70000: must be from 0"),
        (["--upstream", URL, "--mode", "strict"], "--mode strict: needs a corrector"),
        (["--upstream", URL, "--mode", "loud"], "--mode must be one of off, shadow, correct, strict, found 'loud'"),
        (["--upstream", URL, "--template", "aligner-1"], "--template: is for a corrector"),
        (["--upstream", URL, "--on-failure", "closed"], "--on-failure: is for a corrector"),
        (["--upstream", URL, "--fallback", "elsewhere"], "--fallback elsewhere: must be URL or URL#MODEL"),
        (["--upstream", URL, "--requests-per-minute", "0"], "--requests-per-minute: must be at least 1"),
        (["--upstream", URL, "--root-path", "/x"], "--root-path: every client of the proxy"),
        (["--upstream", URL, "--passthrough", "a b"], "--passthrough a b: must be"),
        (["--upstream", URL, "--forward-header", "cookie"], "--forward-header cookie: must be"),
        (["--upstream", URL, "--cors-origin", "app"], "--cors-origin app: must be as browsers send it"),
        (["--upstream", URL, "--keys-file", "none"], "--keys-file none: cannot be read"),
        (["--upstream", URL, "--strict-structured", "pass"], "--strict-structured: is for a corrector"),
        (["--upstream", URL, "--stream-by", "sentence"], "--stream-by: is for a corrector"),
        (["--upstream", URL, "--stream-by", "word"], "--stream-by: is for a corrector"),
        (
            ["--upstream", URL, "--corrector", "c", "--stream-by", "word"],
            "--stream-by must be one of answer, sentence, found 'word'",
        ),
        (
            ["--upstream", URL, "--corrector", "c", "--stream-by", "sentence", "--mode", "strict"],
            "--stream-by sentence: is not for --mode strict",
        ),
        (
            ["--upstream", URL, "--corrector", "c", "--stream-by", "sentence", "--approve", "length"],
            "--approve: judges whole answers",
        ),
        (["--upstream", URL, "--port", "0", "--access-log", "no/such/file"], "--access-log no/such/file: cannot be"),
        (["--upstream", URL, "--keep", "all"], "--keep: there is nothing to keep exchanges in"),
        (["--upstream", URL, "--redact", "all"], "--redact: there is nothing to keep exchanges in"),
        (["--upstream", URL, "--retention-days", "9"], "--retention-days: there is nothing to keep exchanges in"),
        (["--upstream", URL, "--port", "0", "--store", "sqlite:///f.db", "--redact", "faces"], "there is no 'faces'"),
        (["--upstream", URL, "--timeout", "0"], "--timeout must be a number above 0, found 0.0"),
        (["--upstream", URL, "--concurrency", "0"], "--concurrency must be a whole number of at least 1"),
        (["--upstream", URL, "--port", "0", "--corrector", "elsewhere"], "elsewhere"),
        (["--upstream", URL, "--port", "0", "--corrector", "http://127.0.0.1:9/v1"], "name the model"),
        (
            ["--upstream", URL, "--port", "0", "--corrector", f"{URL}#m", "--template", "aligner-1", "--gate", "-1"],
            "--gate: a server does not say how likely an answer is",
        ),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_bad_input(flags, expected, capsys):
    code, out, err = run(capsys, "serve", *flags)
    assert (code, out) == (2, ""), err
    assert expected in err
    assert "secret" not in err
    assert "Traceback" not in err


def test_bad_keys(capsys, monkeypatch):
    monkeypatch.setenv("EVERALIGN_API_KEYS", "a,,b")
    code, _, err = run(capsys, "serve", "--upstream", URL)
    assert code == 2
    assert "EVERALIGN_API_KEYS: a key is empty" in err


def test_a_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = run(capsys, "serve", "--upstream", URL, "--port", port)
    assert code == 2
    assert f"--port {port}: another program listens there; end it, or choose another port" in err


def test_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    code, _, err = run(capsys, "serve", "--upstream", URL)
    assert code == 2
    assert "pip install 'everalign[serve]'" in err


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_real_process_says_its_address_answers_and_ends_in_peace(end):
    environment = {**os.environ, "OPENAI_API_KEY": "upstream-key", "EVERALIGN_API_KEYS": "one, two"}
    with UpstreamServer(lambda _: Script("It is 4.")) as upstream:
        command = [sys.executable, "-m", "everalign", "serve", "--upstream", upstream.url, "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stderr is not None
            line = process.stderr.readline()
            url = re.fullmatch(r"serving (http://127\.0\.0\.1:\d+/v1), press Ctrl-C to stop\n", line)
            assert url, line
            body = {"model": "small", "messages": [{"role": "user", "content": "?"}]}
            for key, status in (("one", 200), ("two", 200), ("three", 401)):
                headers = {"authorization": f"Bearer {key}"}
                reply = httpx.post(f"{url[1]}/chat/completions", json=body, headers=headers, trust_env=False)
                assert reply.status_code == status
            assert upstream.requests[0].headers["authorization"] == "Bearer upstream-key"
            process.send_signal(end)
            rest = process.stderr.read()
            assert process.wait(20) == (0 if end == signal.SIGINT else -end)
    assert "Traceback" not in rest
    assert end != signal.SIGINT or rest.endswith("ended: all requests are finished\n")
    root = url[1].removesuffix("/v1")
    for told in (f"playground: {root}/", f"dashboard: {root}/dashboard", "mode: off", "corrector: none", "store: none",
                 "keys: 2 keys", f"upstream: default, {upstream.url}"):  # fmt: skip
        assert f"{told}\n" in rest
    assert "upstream-key" not in line + rest
    assert "warning" not in rest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_gateway_whose_corrector_is_elsewhere_is_small():
    environment = {**os.environ, "CORRECTOR_API_KEY": "corrector-key", "HF_HUB_OFFLINE": "1"}
    body = {"model": "small", "messages": [{"role": "user", "content": "?"}]}
    # As a server of corrections, the scripted one answers completions too.
    raw = b'{"choices": [{"index": 0, "text": "It is four.", "finish_reason": "stop"}]}'
    with UpstreamServer(lambda asked: Script(raw=raw) if "prompt" in asked else Script("It is 4.")) as upstream:
        command = [sys.executable, "-m", "everalign", "serve", "--upstream", upstream.url, "--port", "0"]
        command += ["--corrector", f"{upstream.url}#fixer", "--template", "everalign-1"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stderr is not None
            url = process.stderr.readline().split()[1].rstrip(",")
            reply = httpx.post(f"{url}/chat/completions", json=body, trust_env=False)
            maps = pathlib.Path(f"/proc/{process.pid}/maps").read_text()
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
            process.wait(20)
    assert reply.headers["x-everalign-correction"] == "applied"
    assert [seen.headers.get("authorization") for seen in upstream.requests] == [None, "Bearer corrector-key"]
    assert "libtorch" not in maps
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
    print(f"{resident:.0f} MB resident")
    assert resident < 120
    assert "warning: without keys only this machine is served" in rest


def test_a_judge_elsewhere_needs_no_torch_either():
    code = (
        "import sys\nfrom everalign.cli.correct_run import load_corrector, make_approver\n"
        "approver = make_approver('http://127.0.0.1:9/v1#judge', None)\n"
        "load_corrector('http://127.0.0.1:9/v1#m', 'everalign-1', {}, approver)\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_is_said_at_the_start():
    access = Access(no_auth=True, root_path="/x")
    gateway = create_app(GatewaySettings(upstreams=(UpstreamSettings("default", URL),), access=access)).state.gateway
    told = dict(description(gateway, "http://127.0.0.1:1/v1", "runs/c", "postgresql://me:secret@host/db"))
    assert told["playground"] == "http://127.0.0.1:1/x/"
    assert told["store"] == "postgresql://me:***@host/db"
    assert told["keys"] == "none; everybody who reaches the port is served"
    assert told["upstream"] == f"default, {URL}, without a key"
    assert "streams" not in told
    upstreams = (UpstreamSettings("default", URL),)
    gateway = create_app(GatewaySettings(upstreams=upstreams, stream_by="sentence")).state.gateway
    assert ("streams", "corrected by sentence") in description(gateway, "http://127.0.0.1:1/v1", "runs/c", None)


def test_an_upstream_that_is_away_is_said_at_the_start():
    warned = []
    app = create_app(GatewaySettings(upstreams=(UpstreamSettings("far", URL),)))
    app.state.warn = warned.append

    async def begin():
        async with app.router.lifespan_context(app):
            while not warned:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(begin(), 5))
    assert warned == [f"the upstream 'far', {URL}, does not answer: the upstream cannot be reached"]
