import re

import pytest

from flax_transformer.serving.openapi import describe
from flax_transformer.serving.service import Service


def routes_of(client):
    """The methods of each route, but for HEAD."""
    return {(route.path, method) for route in client.app.routes for method in route.methods if method not in ("HEAD",)}


def test_each_route_is_described(client):
    description = client.get("/spec").json()
    described = {(path, method.upper()) for path, methods in description["paths"].items() for method in methods}
    assert described == routes_of(client) - {("/", "GET"), ("/docs", "GET")}
    assert description == describe(client.service.limits)


def test_the_documentation_lists_them_without_scripts_or_other_hosts(client):
    answer = client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    for path in client.get("/spec").json()["paths"]:
        assert path in answer.text
    assert "<script" not in answer.text and not re.search(r"(src|href)=.?https?:", answer.text)


@pytest.mark.peers
@pytest.mark.parametrize("examples", [4, pytest.param(420, marks=pytest.mark.slow)])
def test_no_request_that_the_description_suggests_or_forbids_makes_the_server_fail(make_client, monkeypatch, examples):
    """More than 5,000 cases with the larger number: schemathesis makes examples for each of the operations."""
    schemathesis = pytest.importorskip("schemathesis", reason="`make peers` installs schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    monkeypatch.setattr("flax_transformer.serving.service.SEARCHES", 1)  # each other kind would be compiled
    client = make_client(characters=2000)
    schema = schemathesis.openapi.from_asgi("/spec", client.app)
    cases = 0

    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case):
            nonlocal cases
            cases += 1
            answer = case.call()
            assert answer.status_code < 500, (case, answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()) == {"error"} and "Traceback" not in answer.text

        check()
    assert cases >= examples and isinstance(client.service, Service)
