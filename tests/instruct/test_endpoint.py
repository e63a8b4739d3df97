"""The HTTP side: what is sent, what is tried again, what ends a run, and that the key stays secret."""

import email.utils
import socket
import time
from collections.abc import Iterable

import pytest

from llm_jax.errors import ConfigError
from llm_jax.instruct.self_instruct import (
    Answer,
    Endpoint,
    EndpointConfig,
    GeneratorError,
    Request,
    endpoint,
)
from tests.instruct.stub_endpoint import serving


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("TEST_KEY", "sk-secret-123")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def stub():
    with serving() as server:
        server.write = lambda prompt: f"echo of {prompt}"
        yield server


def request(number: int, stage: str = "instructions") -> Request:
    return Request(key=f"en/0/{stage}/{number:02d}", prompt=f"p{number}", max_tokens=5, temperature=0.5,
                   top_p=0.9, stop=("\n9.",), seed=11 + number)  # fmt: skip


def ask(stub, count: int = 1, **settings) -> list[Answer]:
    config = EndpointConfig(**{"url": stub.url, "model": "m", "attempts": 3, **settings})
    found = [
        a for part in Endpoint(config).answers([request(n) for n in range(count)]) for a in part
    ]
    return sorted(found, key=lambda answer: answer.key)


def collect(parts: Iterable[list[Answer]], found: list[Answer]) -> None:
    for part in parts:
        found += part


def test_a_completion_is_asked_for_with_all_settings(stub):
    (answer,) = ask(stub, presence_penalty=1.5, key_variable="TEST_KEY")
    assert answer == Answer(key="en/0/instructions/00", text="echo of p0", finished="stop")
    assert stub.paths == {"/v1/completions"}
    assert stub.bodies == [
        {"model": "m", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "stop": ["\n9."], "seed": 11,
         "presence_penalty": 1.5, "prompt": "p0"}
    ]  # fmt: skip
    assert stub.headers[0]["Authorization"] == "Bearer sk-secret-123"


def test_a_chat_completion_is_a_users_message_and_a_seed_can_be_left_out(stub):
    (answer,) = ask(stub, api="chat", send_seed=False)
    assert answer.text == "echo of p0"
    assert stub.paths == {"/v1/chat/completions"}
    assert stub.bodies[0]["messages"] == [{"role": "user", "content": "p0"}]
    assert not {"seed", "prompt", "presence_penalty"} & set(stub.bodies[0])
    assert "Authorization" not in stub.headers[0]


def test_no_more_requests_are_under_way_than_allowed(stub):
    stub.delay = 0.02
    assert len(ask(stub, count=12, concurrency=3)) == 12
    assert 1 < stub.most_at_once <= 3


@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "408", "drop", "half", "html", "no choices", "hang"]
)
def test_what_may_pass_is_tried_again(stub, fault):
    stub.fault = lambda key, attempt: fault if attempt < 3 else ""
    (answer,) = ask(stub, timeout_seconds=0.3 if fault == "hang" else 30.0)
    assert answer.text == "echo of p0"
    assert stub.tries.total() == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_that_a_server_asks_for_is_kept(stub, form):
    begun = time.time()
    # a date is in whole seconds: the next but one is at least one away
    stub.retry_after = (
        "0.4" if form == "seconds" else email.utils.formatdate(begun + 2, usegmt=True)
    )
    stub.fault = lambda key, attempt: "429" if attempt == 1 else ""
    ask(stub)
    assert time.time() - begun >= (0.4 if form == "seconds" else 0.9)


@pytest.mark.parametrize("value", ["", "soon", "nan", "-5", "Mon, 99 Foo"])
def test_a_pause_that_cannot_be_read_is_none(value):
    assert endpoint._retry_after(value) == 0


@pytest.mark.parametrize(
    ("status", "told"),
    [("401", "see endpoint.key_variable"), ("404", "see endpoint.url and endpoint.model"),
     ("400", "change the settings"), ("302", "HTTP 302")],
)  # fmt: skip
def test_any_other_status_ends_the_run_in_one_line_without_the_key(stub, status, told):
    stub.fault = lambda key, attempt: status
    with pytest.raises(GeneratorError, match=told) as error:
        ask(stub, key_variable="TEST_KEY")
    assert "\n" not in str(error.value)
    assert "fault Bearer ***" in str(error.value)  # the server repeated it, the line does not
    assert "secret" not in str(error.value)
    assert stub.tries.total() == 1


def test_a_failure_that_does_not_pass_keeps_the_answers_of_the_others(stub):
    stub.fault = lambda key, attempt: "500" if key.endswith("03") else ""
    config = EndpointConfig(url=stub.url, model="m", attempts=2, concurrency=4)
    found: list[Answer] = []
    with pytest.raises(GeneratorError, match=r"HTTP 500 .* after 2 attempts the run stops"):
        collect(Endpoint(config).answers([request(n) for n in range(4)]), found)
    assert sorted(answer.key[-2:] for answer in found) == ["00", "01", "02"]


def test_nobody_listening_is_told_with_the_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    config = EndpointConfig(url=url, model="m", attempts=2)
    with pytest.raises(GeneratorError, match=f"{url}/completions: no connection"):
        list(Endpoint(config).answers([request(0)]))


@pytest.mark.parametrize("fault", ["html", "no choices", "list", "number", "deep"])
def test_a_reply_that_is_no_completion_is_a_counted_failure(stub, fault):
    stub.fault = lambda key, attempt: fault if key.endswith("01") else ""
    answers = ask(stub, count=3)
    assert [answer.finished for answer in answers] == ["stop", "failed", "stop"]
    assert "no completion" in answers[1].text or "whose text is a int" in answers[1].text


def test_nothing_but_such_replies_ends_the_run_and_none_is_kept(stub):
    stub.fault = lambda key, attempt: "html"
    config = EndpointConfig(url=stub.url, model="m", attempts=1, concurrency=2)
    found: list[Answer] = []
    with pytest.raises(GeneratorError, match="10 requests in a row got no usable reply"):
        collect(Endpoint(config).answers([request(n) for n in range(20)]), found)
    assert found == []
    assert stub.tries.total() < 14


def test_text_that_is_rubbish_is_an_answer_and_half_a_character_is_mended(stub):
    for text in ("\x00\x07", "\ud800", ""):
        stub.write = lambda prompt, text=text: text
        assert ask(stub)[0].text == text.replace("\ud800", "?")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "localhost:8000"}, "endpoint.url='localhost:8000' must look like"),
        ({"url": "ftp://host/v1"}, "must look like"),
        ({"url": "http://me:pw@host/v1"}, "neither user, password nor query"),
        ({"url": "http://host/v1?key=pw"}, "neither user, password nor query"),
        ({"url": "http://host/v1", "model": ""}, "endpoint.model=''"),
        ({"concurrency": 0}, "endpoint.concurrency=0"),
        ({"attempts": 0}, "endpoint.attempts=0"),
        ({"timeout_seconds": 0.0}, "endpoint.timeout_seconds=0.0"),
        ({"presence_penalty": 3.0}, "endpoint.presence_penalty=3.0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings, told):
    with pytest.raises(ConfigError, match=told) as error:
        EndpointConfig(**{"url": "", "model": "m", **settings})
    assert "pw" not in str(error.value)


@pytest.mark.parametrize(("value", "told"), [("", "is not set"), ("sk\n", "no HTTP header may")])
def test_a_key_that_is_not_there_or_no_key_is_refused(monkeypatch, value, told):
    monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(ConfigError, match=told):
        Endpoint(EndpointConfig(url="http://host/v1", model="m", key_variable="TEST_KEY"))
