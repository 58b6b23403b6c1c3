"""The gateway before a real server: `transformers serve` with the tiny assistant, and the official SDK in front."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from everalign.modeling.loading import tiny_assistant_path
from everalign.serving.settings import UpstreamSettings
from upstream_for_tests import Fake, serving

MODEL = str(tiny_assistant_path())
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "How should I store eggs?"}], "max_tokens": 40}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def real():
    """`transformers serve` on a free port."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        f"{port}",
    ]
    process = subprocess.Popen(
        [*command, "--device", "cpu", MODEL],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 90
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                break
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            pytest.fail(f"transformers serve ended: {process.stderr.read()[-2000:]}")
        assert time.monotonic() < until, "transformers serve did not start"
        time.sleep(0.2)
    yield UpstreamSettings("default", f"http://127.0.0.1:{port}/v1")
    process.send_signal(signal.SIGINT)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def client(served):
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


def test_plain_and_streamed_answers_pass_and_are_corrected(real):
    with serving(real, corrector=Fake()) as served:
        sdk = client(served)
        plain = sdk.chat.completions.create(**ASKED, extra_headers={"x-everalign-mode": "off"})
        text = plain.choices[0].message.content
        assert text.strip()
        corrected = sdk.chat.completions.create(**ASKED)
        assert corrected.choices[0].message.content == f"{text} (fake)"
        streamed = sdk.chat.completions.create(**ASKED, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
        assert "".join(pieces) == f"{text} (fake)"


def test_its_errors_reach_the_client_in_the_sdk_s_terms(real):
    with serving(real, corrector=Fake()) as served, pytest.raises(openai.APIStatusError):
        client(served).chat.completions.create(model="no/such-model", messages=ASKED["messages"])
