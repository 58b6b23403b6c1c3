"""The gateway before a real server: `transformers serve` with the tiny assistant, and the official SDK in front."""

import multiprocessing
import os
import signal
import socket
import sys
import time

import httpx
import openai
import pytest

from everalign.modeling.loading import tiny_assistant_path
from everalign.serving.settings import UpstreamSettings
from upstream_for_tests import HTTP, Fake, serving

MODEL = str(tiny_assistant_path())
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "How should I store eggs?"}], "max_tokens": 40}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def serve(port):
    from transformers.cli import transformers

    sys.argv = ["transformers", "serve", "--host", "127.0.0.1", "--port", f"{port}", "--device", "cpu", MODEL]
    transformers.main()


@pytest.fixture(scope="module")
def real():
    """`transformers serve` on a free port, in a process forked from this one, which has imported transformers."""
    port = free_port()
    process = multiprocessing.get_context("fork").Process(target=serve, args=(port,), daemon=True)
    process.start()
    until = time.monotonic() + 90
    while True:
        try:
            if HTTP.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert process.is_alive(), f"transformers serve ended with {process.exitcode}"
        assert time.monotonic() < until, "transformers serve did not start"
        time.sleep(0.2)
    yield UpstreamSettings("default", f"http://127.0.0.1:{port}/v1")
    os.kill(process.pid, signal.SIGINT)
    process.join(15)
    if process.is_alive():
        process.kill()
        process.join()


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
