"""A real server of an OpenAI-compatible API: `transformers serve`, which answers, corrects and streams."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from cli_for_tests import run as cli
from everalign import Corrector
from everalign.correction.corrector import CorrectionOptions
from everalign.correction.engines import EndpointEngine, EngineOutput
from everalign.correction.generators import EndpointAnswers
from everalign.correction.local_engine import LocalEngine
from everalign.correction.templates import get_template
from everalign.llm_client import ChatClient, ChatError
from everalign.modeling.loading import load_model, load_tokenizer, tiny_assistant_path

pytestmark = pytest.mark.slow

PAIRS = [
    ("How do I boil an egg?", "Put it into boiling water for eight minutes."),
    ("Where is the key?", "No."),
    ("Write a line.", "Roses are red, violets are blue, and this line is longer than the others by a good bit."),
]
LIMIT = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address and what it says; it serves the embedded assistant in fp32."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    said = tmp_path_factory.mktemp("server") / "log"
    command = [Path(sys.executable).parent / "transformers", "serve", tiny_assistant_path()]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with said.open("w") as log:
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log, env=environment)
    try:
        for _ in range(240):
            assert process.poll() is None, said.read_text()
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", said
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def client(server):
    return ChatClient(server[0], str(tiny_assistant_path()), "", concurrency=2)


def test_the_server_corrects_as_the_model_in_this_process_does(client):
    remote = EndpointEngine(client, get_template("everalign-1"))
    local = LocalEngine.from_pretrained(tiny_assistant_path(), template="everalign-1", device="cpu")
    found, expected = remote.write(PAIRS, None, LIMIT), local.write(PAIRS, None, LIMIT)
    assert [(one.text, one.finished) for one in found] == [(one.text, one.finished) for one in expected]
    assert all(one.output_tokens for one in found)
    for pair, one in zip(PAIRS, found, strict=True):
        *parts, last = remote.stream_events(pair, None, LIMIT)
        assert isinstance(last, EngineOutput)
        assert (last.text, last.finished) == (one.text, one.finished)
        assert all(last.text.startswith(part) for part in parts)


def test_the_server_answers_as_the_model_in_this_process_does(client, tmp_path):
    model, tokenizer, longest = load_model("tiny"), load_tokenizer("tiny"), 160
    expected = []
    for question, _ in PAIRS:
        asked = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**ids, do_sample=False, max_new_tokens=longest)[0, ids["input_ids"].shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        expected.append(text if len(written) < longest else None)
    source = EndpointAnswers(client, temperature=0.0, max_new_tokens=longest)
    questions = [question for question, _ in PAIRS]
    found = source.answer(questions, tmp_path / "rows.jsonl", keep_going=True, progress=lambda *_: None)
    assert found.texts == expected
    assert any(expected)


def test_a_file_is_corrected_from_the_command_line(server, tmp_path, capsys):
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in PAIRS]
    (tmp_path / "answers.jsonl").write_text("\n".join(rows))
    code, _, error = cli(
        capsys,
        *("correct", "run", "--corrector", f"{server[0]}#{tiny_assistant_path()}", "--template", "everalign-1"),
        *("--data", str(tmp_path / "answers.jsonl"), "--output", str(tmp_path / "out.jsonl")),
        *("--max-new-tokens", str(LIMIT)),
    )
    assert code == 0, error
    remote = Corrector.from_endpoint(server[0], str(tiny_assistant_path()), template="everalign-1", api_key="")
    expected = remote.correct_batch(PAIRS, CorrectionOptions(max_new_tokens=LIMIT))
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["correction"] for row in written] == [one.text for one in expected]


def test_another_model_than_the_served_one_is_a_clear_error(server):
    other = ChatClient(server[0], "another", "", retries=0)
    with pytest.raises(ChatError, match="Server is pinned to") as caught:
        other.complete([{"role": "user", "content": "hello"}])
    assert caught.value.refused
