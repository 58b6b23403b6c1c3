"""The gateway's OpenAPI schema, and requests made from it at random: no reply is a failure of the gateway."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_gateway_modes import MemoryStore

from everalign.serving.app import create_app
from everalign.serving.gateway import make_corrections
from everalign.serving.settings import GatewaySettings, UpstreamSettings
from upstream_for_tests import HTTP, Fake, UpstreamServer, serving


@pytest.fixture(scope="module")
def gateway():
    with UpstreamServer() as upstream, serving(upstream, corrector=Fake(), store=MemoryStore()) as running:
        yield running


@pytest.fixture(scope="module")
def api(gateway):
    return schemathesis.openapi.from_url(f"{gateway.url[:-3]}/openapi.json")


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.mark.parametrize("generation", list(schemathesis.GenerationMode))
@pytest.mark.parametrize(
    "operation",
    ["POST /v1/chat/completions", "POST /v1/feedback", "GET /v1/models", "GET /v1/models/{model}", "GET /ready"],
)
def test_no_request_made_from_the_schema_breaks_the_gateway(operation, generation, api):
    method, path = operation.split()

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy(generation_mode=generation))
    def call(case):
        case.call_and_validate(checks=CHECKS)

    try:
        call()
    except Unsatisfiable:
        pytest.skip("nothing about this request can be wrong")


def test_it_still_works_afterwards(gateway):
    body = {"model": "small", "messages": [{"role": "user", "content": "?"}]}
    assert HTTP.post(f"{gateway.url}/chat/completions", json=body).status_code == 200


def test_unknown_paths_and_methods_are_said_in_the_clients_own_words(gateway):
    root = gateway.url.removesuffix("/v1")
    for reply in (HTTP.get(f"{root}/nowhere"), HTTP.post(f"{root}/health")):
        assert reply.json()["error"]["code"] == "unknown_url"


def test_the_schema_names_every_route():
    made = GatewaySettings(upstreams=(UpstreamSettings("a", "http://127.0.0.1:9/v1"),))
    paths = create_app(made, corrections=make_corrections(made, Fake(), "v1")).openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/v1/feedback", "/health", "/ready", "/metrics"} <= set(paths)
