"""`everalign serve`: what it refuses, what it says, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from cli_for_tests import run
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
        (["--upstream", "http://169.254.169.254/"], "is an address of credentials"),
        (["--upstream", "http://me:secret@host/"], "must be without user"),
        (["--upstream", URL, "--upstream", URL], "upstream 'default': is given twice"),
        (["--upstream", URL, "--host", "0.0.0.0"], "--host 0.0.0.0: without keys only this machine is served"),
        (["--upstream", URL, "--port", "70000"], "--port 70000: must be from 0"),
        (["--upstream", URL, "--mode", "strict"], "--mode strict: needs a corrector"),
        (["--upstream", URL, "--mode", "loud"], "mode: must be one of off, shadow, correct, strict, found 'loud'"),
        (["--upstream", URL, "--template", "aligner-1"], "--template: is for a corrector"),
        (["--upstream", URL, "--on-failure", "closed"], "--on-failure: is for a corrector"),
        (["--upstream", URL, "--keep", "all"], "--keep: there is nothing to keep exchanges in"),
        (["--upstream", URL, "--redact", "all"], "--redact: there is nothing to keep exchanges in"),
        (["--upstream", URL, "--retention-days", "9"], "--retention-days: there is nothing to keep exchanges in"),
        (["--upstream", URL, "--port", "0", "--store", "sqlite:///f.db", "--redact", "faces"], "there is no 'faces'"),
        (["--upstream", URL, "--timeout", "0"], "timeout total: must be above 0 seconds"),
        (["--upstream", URL, "--concurrency", "0"], "limit concurrency: must be a whole number of at least 1"),
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
            url = re.fullmatch(r"serving (http://127\.0\.0\.1:\d+/v1), Ctrl-C ends it\n", line)
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
    assert end != signal.SIGINT or rest == "ended: all requests are finished\n"
