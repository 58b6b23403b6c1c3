"""The same calls directly and through the gateway, by the clients that people use, compared field by field.

`make test-clients` installs the clients, apart from Everalign's own libraries, and runs this; `make test` skips it. A
gateway that passes answers on (mode `off`) must be invisible but for the answers' ids, by which feedback is given. One
whose corrector changes nothing may also cut a stream in other places, and adds fields of its own.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from clients import scripted_upstream
from everalign.serving.settings import UpstreamSettings
from upstream_for_tests import Fake, Running, serving

HERE = Path(__file__).parent
PYTHON = os.environ.get("EVERALIGN_CLIENTS_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="make test-clients installs the clients that this needs")
CLIENTS = [
    "openai_python.py",
    "openai_node.mjs",
    "langchain_client.py",
    "llama_index_client.py",
    "pydantic_ai_client.py",
    "instructor_client.py",
    "litellm_client.py",
    "ai_sdk.mjs",
]
ANSWER_ID = re.compile(r"\b(chatcmpl|resp)[-_]\w+")
OURS = ("everalign", "corrector")
"""What the gateway says of a correction, and what it says that the corrector used."""
TEXTS = ("content", "text", "delta", "arguments")
"""Fields whose values in the pieces of a stream are put together again."""


@pytest.fixture(scope="module")
def upstream():
    running = Running(scripted_upstream.app())
    running.start()
    yield running.url
    running.stop()


def called(client, url):
    """What a client's calls gave, by their names."""
    program = PYTHON if client.endswith(".py") else shutil.which("node")
    if program is None:
        pytest.skip("needs Node.js")
    done = subprocess.run([program, HERE / client, url, "client-key"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(ANSWER_ID.sub("an answer's id", done.stdout.strip().splitlines()[-1]))


@pytest.fixture(scope="module")
def directly(upstream):
    """What a client's calls gave without a gateway; each client is asked once."""
    found = {}

    def ask(client):
        if client not in found:
            found[client] = called(client, upstream)
        return dict(found[client])

    return ask


@pytest.mark.parametrize("client", CLIENTS)
def test_a_gateway_that_passes_on_is_not_seen(client, upstream, directly):
    with serving(UpstreamSettings("default", upstream, "upstream-key"), keys=("client-key",)) as gateway:
        assert called(client, gateway.url) == directly(client)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_corrector_that_changes_nothing_changes_nothing(client, upstream, directly):
    through = UpstreamSettings("default", upstream, "upstream-key")
    with serving(through, corrector=Fake(lambda answer: answer), keys=("client-key",), mode="correct") as gateway:
        found, expected = called(client, gateway.url), directly(client)
    assert found.keys() == expected.keys()
    if "models" in expected:
        assert found.pop("models") == [*expected.pop("models"), "small:aligned"]
    for call in expected:
        assert whole(found[call]) == whole(expected[call]), call


def whole(found):
    """What a call gave, without our own fields; a stream as the values of each field, texts put together."""
    if not isinstance(found, list) or not all(isinstance(piece, dict) for piece in found):
        return stripped(found)
    texts, others = {}, {}
    for piece in found:
        for path, value in leaves(piece):
            if path[-1] in TEXTS and isinstance(value, str):
                texts[path] = texts.get(path, "") + value
            elif path[-1] != "sequence_number" and value not in others.setdefault(path, []):
                others[path].append(value)
    return texts, others


def stripped(found):
    if isinstance(found, dict):
        return {name: stripped(value) for name, value in found.items() if name not in OURS}
    return [stripped(value) for value in found] if isinstance(found, list) else found


def leaves(piece, path=()):
    """All values in a piece of a stream with the names that lead to them; an event's type begins its fields' names."""
    kind = (piece["type"],) if isinstance(piece, dict) and isinstance(piece.get("type"), str) and not path else ()
    if isinstance(piece, dict) and piece:
        for name, value in piece.items():
            if name not in OURS:
                yield from leaves(value, (*path, *kind, name))
    elif isinstance(piece, list) and piece:
        for i, value in enumerate(piece):
            yield from leaves(value, (*path, i))
    else:
        yield path, piece
