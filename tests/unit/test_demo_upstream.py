"""The stand-in for an API that the tutorials and the playground are tried with."""

import threading

import httpx
import pytest

from everalign.demo.upstream import server

ASKED = [{"role": "user", "content": "How do I cook eggs?"}]
ANSWER = "Here is how: boil the eggs for seven minutes. Use a clean spoon."


@pytest.fixture
def client():
    with server(0) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{running.server_port}/v1", timeout=30) as found:
            yield found
        running.shutdown()
        thread.join()


def test_it_lists_its_model_as_the_playground_asks(client):
    assert [model["id"] for model in client.get("/models").json()["data"]] == ["small"]


def test_whole_and_streamed_it_gives_the_same_answer_every_time(client):
    body = {"model": "small", "messages": ASKED}
    whole = [client.post("/chat/completions", json=body).json() for _ in range(2)]
    assert [reply["choices"][0]["message"]["content"] for reply in whole] == [ANSWER, ANSWER]
    stream = client.post("/chat/completions", json=body | {"stream": True})
    assert stream.headers["content-type"] == "text/event-stream"
    assert ANSWER in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")


def test_any_other_question_gets_an_answer_too(client):
    body = {"model": "small", "messages": [{"role": "user", "content": "Who are you?"}]}
    reply = client.post("/chat/completions", json=body)
    assert "cooking" in reply.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"messages": []}', b'{"messages": 1}'])
def test_what_is_no_chat_request_is_refused(client, body):
    reply = client.post("/chat/completions", content=body)
    assert reply.status_code == 400
    assert "messages" in reply.json()["error"]["message"]
