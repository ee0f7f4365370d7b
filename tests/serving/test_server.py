import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import pytest

from flax_transformer.decoding.machine import Machine
from tests.serving.conftest import sentence, wait_until

FIELDS = {"q": "a dog runs", "source": "en", "target": "de"}


def post(address, path="/translate", timeout=20, headers=(), **fields):
    """The status and the answer, read as JSON."""
    body = json.dumps(FIELDS | fields).encode()
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json", **dict(headers)})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def connect(server):
    host, port = server.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head(length, path="/translate"):
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def read_all(connection):
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


@pytest.fixture
def held(monkeypatch):
    """Keeps the engine from telling what it has decoded until the event is set."""
    go_on, collect = threading.Event(), Machine.collect

    def wait(machine):
        assert go_on.wait(20)
        return collect(machine)

    monkeypatch.setattr(Machine, "collect", wait)
    yield go_on
    go_on.set()


def test_eight_clients_at_once_get_what_each_gets_alone(make_server, served):
    server = make_server()
    texts = [sentence(number, 2 + number % 5) for number in range(48)]
    expected = [served.translator.translate([text], served.search)[0] for text in texts]
    found = [None] * len(texts)

    def ask(first):
        for number in range(first, len(texts), 8):
            found[number] = post(server.address, q=texts[number])

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(200, {"translatedText": text}) for text in expected]
    assert server.service.desk.open == 0


@pytest.mark.parametrize("path", ["/translate", "/explain", "/stream"])
def test_a_client_that_goes_away_frees_its_slots(make_server, held, path):
    server = make_server()
    body = json.dumps(FIELDS | {"q": "a dog.\n" * 20}).encode()
    connection = connect(server)
    connection.sendall(head(len(body), path) + body)
    wait_until(lambda: server.service.desk.open)
    connection.close()
    wait_until(lambda: server.service.desk.open == 0)
    held.set()
    engine = server.service.models.served[0].translator.engine
    wait_until(lambda: engine.slots[0] == 0)
    assert post(server.address)[0] == 200


def test_a_slow_writer_is_told_so_and_one_that_sends_no_request_is_hung_up_on(make_server):
    server = make_server(read_s=1.0)
    slow, silent, half = connect(server), connect(server), connect(server)
    slow.sendall(head(100) + b'{"q": "a')
    half.sendall(b"POST /translate HTT")
    answer = read_all(slow)
    assert answer.startswith(b"HTTP/1.1 408") and b"1 seconds" in answer
    assert read_all(silent) == b"" and read_all(half) == b""
    assert post(server.address)[0] == 200


def test_a_reader_that_takes_nothing_is_hung_up_on(make_server):
    server = make_server(read_s=0.5)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = server.address.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    text = "1 " * 200_000  # comes back as it is, and is more than buffers hold
    body = json.dumps(FIELDS | {"q": text}).encode()
    connection.sendall(head(len(body)) + body)
    wait_until(lambda: len(server.server_state.connections) == 1)
    wait_until(lambda: not server.server_state.connections)
    connection.close()
    assert post(server.address)[0] == 200


def test_a_connection_in_use_is_not_hung_up_on(make_server):
    server = make_server(read_s=1.0)
    body = json.dumps(FIELDS).encode()
    connection = connect(server)
    for _ in range(5):
        time.sleep(0.3)
        connection.sendall(head(len(body)) + body)
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("proxies", "second"), [("127.0.0.1", 200), ("", 429)])
def test_only_a_trusted_proxy_tells_whose_request_it_is(make_server, proxies, second):
    server = make_server(requests_a_minute=1, proxies=proxies)
    found = [post(server.address, headers={"X-Forwarded-For": f"10.0.0.{number}"})[0] for number in (1, 2)]
    assert found == [200, second]


def test_all_bodies_together_have_a_limit_which_one_alone_may_exceed(make_server):
    server = make_server(queue_bytes=1000)
    slow = connect(server)
    slow.sendall(head(900) + b"a" * 600)
    wait_until(lambda: server.service.bytes == 600)
    status, answer = post(server.address, q="1 " * 300)
    assert status == 503 and "600 bytes and room for 1000" in answer["error"]
    assert post(server.address)[0] == 200
    slow.close()
    wait_until(lambda: server.service.bytes == 0)
    assert post(server.address, q="1 " * 1000)[0] == 200 and server.service.bytes == 0


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(make_server):
    server = make_server(body_bytes=1000)
    connection = connect(server)
    connection.sendall(head(10**9))
    assert connection.recv(65536).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9\r\n\r\n", b"A" * 100_000])
def test_what_is_not_http_is_an_error_of_the_client(make_server, sent):
    server = make_server()
    connection = connect(server)
    connection.sendall(sent)
    assert read_all(connection).startswith(b"HTTP/1.1 400")
    assert post(server.address)[0] == 200


def test_beyond_its_connections_a_server_refuses(make_server):
    server = make_server(connections=3)
    waiting = [connect(server) for _ in range(3)]
    wait_until(lambda: len(server.server_state.connections) == 3)
    connection = connect(server)
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 503")
    for each in waiting:
        each.close()
    wait_until(lambda: len(server.server_state.connections) <= 1)
    assert post(server.address)[0] == 200


def no_memory():
    """More than any device has; jax's own error."""
    return jnp.zeros(2**50, "int8").block_until_ready()


def no_such_key():
    """An error whose message has a text of the request."""
    return {}[FIELDS["q"]]


@pytest.mark.parametrize(("failing", "status", "told"), [(no_memory, 503, "memory"), (no_such_key, 500, "KeyError")])
def test_an_error_of_the_device_ends_what_it_decodes_and_nothing_else(
    make_server, monkeypatch, caplog, failing, status, told
):
    server, go_on = make_server(), threading.Event()

    def fail(machine):
        assert go_on.wait(20)
        failing()

    with monkeypatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setattr(Machine, "collect", fail)
        asked = [pool.submit(post, server.address, path) for path in ("/translate", "/explain") * 3]
        body = json.dumps(FIELDS).encode()
        stream = connect(server)
        stream.sendall(head(len(body), "/stream") + body)
        wait_until(lambda: server.service.desk.open == 7)
        go_on.set()
        answers = [each.result() for each in asked]
        events = stream.recv(65536)
        while b"event: error" not in events:
            events += stream.recv(65536)
    assert [code for code, _ in answers] == [status] * 6 and all(told in answer["error"] for _, answer in answers)
    assert told.encode() in events and b"event: done" not in events
    assert "dog" not in caplog.text
    engine = server.service.models.served[0].translator.engine
    assert server.service.desk.open == 0 and engine.slots[0] == 0
    assert [post(server.address, path)[0] for path in ("/translate", "/explain")] == [200, 200]


@contextlib.contextmanager
def load(address, end):
    """Eight clients ask again and again until nobody listens; yields the statuses of their answers.

    `end` makes the server end, whatever happens before. What is no answer, such as half of one, is raised at the end.
    """
    statuses = []

    def ask(number):
        while True:
            try:
                statuses.append(post(address, q=sentence(number))[0])
            except (ConnectionError, urllib.error.URLError):
                return

    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        try:
            yield statuses
        finally:
            end()
    for each in asked:
        each.result()


def test_a_server_that_is_told_to_end_under_load_loses_no_answer_that_was_begun(make_server):
    server = make_server()

    def end():
        server.should_exit = True

    with load(server.address, end) as statuses:
        wait_until(lambda: len(statuses) > 40)
    server.thread.join(20)
    assert not server.thread.is_alive() and server.service.desk.open == 0
    assert statuses.count(200) > 40 and set(statuses) <= {200, 503}
    samples = [sample for family in server.service.metrics.requests.collect() for sample in family.samples]
    assert sum(sample.value for sample in samples if sample.name.endswith("_total")) == len(statuses)


def test_a_server_that_is_told_to_end_answers_what_it_has_and_refuses_the_rest(make_server, held):
    server = make_server()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(server.address)))
    thread.start()
    wait_until(lambda: server.service.desk.open)
    server.should_exit = True
    wait_until(lambda: server.service.stopping)
    status, answer = post(server.address)
    assert status == 503 and "stopping" in answer["error"]
    held.set()
    thread.join(20)
    server.thread.join(20)
    assert [status for status, _ in answers] == [200] and not server.thread.is_alive()


def test_what_takes_longer_than_the_end_may_last_is_given_up(make_server, held):
    server = make_server(shutdown_s=1.5)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(server.address)))
    thread.start()
    wait_until(lambda: server.service.desk.open)
    begun = time.monotonic()
    server.should_exit = True
    server.thread.join(20)
    assert not server.thread.is_alive() and time.monotonic() - begun < 4
    thread.join(20)
    ((status, answer),) = answers
    assert status == 503 and "stopping" in answer["error"]


def test_the_end_does_not_wait_for_work_that_cannot_be_stopped(make_server, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def divide(text):
        begun.set()
        go_on.wait(20)

    monkeypatch.setattr("flax_transformer.serving.exploring.divide", divide)
    server = make_server(shutdown_s=1.5)
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(post, server.address, "/explain")
        assert begun.wait(20)
        since = time.monotonic()
        server.should_exit = True
        server.thread.join(20)
        took, ended = time.monotonic() - since, server.threads.end(0.1)
        go_on.set()
        assert asked.result()[0] == 503
    assert took < 6 and not ended and server.threads.end(20)


def test_a_request_that_is_still_being_sent_when_the_server_ends_is_told_so(make_server):
    server = make_server()
    body = json.dumps(FIELDS).encode()
    client = connect(server)
    client.sendall(head(len(body)) + body[:5])
    wait_until(lambda: server.service.bytes)
    server.should_exit = True
    wait_until(lambda: server.service.stopping)
    client.sendall(body[5:])
    answer = read_all(client)
    assert b" 503 " in answer.split(b"\r\n")[0] and b"stopping" in answer


@pytest.fixture
def workdir(tmp_path, trained):
    trained.save(tmp_path / "run")
    return str(tmp_path / "run")


@pytest.mark.slow
def test_sigterm_under_load_loses_no_answer_that_was_begun(workdir):
    command = [sys.executable, "-m", "flax_transformer", "serve", f"--model=en-de={workdir}", "--port=0"]
    command += ["--compile_longest=16", "--batch_tokens=64", "--shutdown_seconds=10", "--compile_all"]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        address = next(found[1] for line in process.stdout if (found := re.match(r"ready: (\S+)", line)))
        with load(address, process.kill) as statuses:
            wait_until(lambda: len(statuses) > 20, 120)
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
            took = time.monotonic() - begun
    finally:
        process.kill()
    assert process.returncode == 0 and errors == ""
    assert took < 20 and statuses.count(200) > 20 and set(statuses) <= {200, 503}
