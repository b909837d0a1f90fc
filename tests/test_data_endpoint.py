"""A model at an OpenAI-compatible server: answers, faults, and what a run that was killed goes on with."""

import base64
import io
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from chat_server import ChatServer
from PIL import Image


pytest.importorskip("openai", reason="needs the package openai")

from chatpose_hf.data import endpoint as endpoint_module
from chatpose_hf.data.endpoint import Endpoint, parse_object


KEY = "sk-very-secret-0123456789"


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_ask_when_the_model_answers_then_the_object_and_the_server_got_prompt_and_picture(tmp_path):
    with ChatServer(lambda *_: '{"a": 1}', key=KEY) as server:
        endpoint = Endpoint(server.url, "m", KEY, temperature=0.5)
        assert endpoint.ask("What?", [picture()]) == {"a": 1}
    (request,) = server.requests
    assert (request["model"], request["temperature"]) == ("m", 0.5)
    text, image = request["messages"][0]["content"]
    assert text == {"type": "text", "text": "What?"}
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == picture()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"a": {"b": "}"}}', {"a": {"b": "}"}}),
        ('Sure!\n```json\n{"a": 1}\n```\nAnything else?', {"a": 1}),
        ('A set {x} and then {"a": 2} {"b": 3}', {"a": 2}),
        ('```json\n{"a": ["b,]", "c",\n ], "d": {"e": 1,}, }\n```', {"a": ["b ]", "c"], "d": {"e": 1}}),
        ('{"a": "b,]"}', {"a": "b,]"}),
        ('<think>As {"a": "..."}, say?</think>{"a": 1}', {"a": 1}),
        ("[1, 2]", None),
        ("", None),
        (None, None),
        ([{"type": "text", "text": "{}"}], None),
        ('{"a": ' * 5000, None),
    ],
)
def test_parse_object_of_text(text, wanted):
    assert parse_object(text) == wanted


def test_ask_when_busy_then_waits_as_long_as_it_is_told():
    times = []

    def reply(number, prompt, urls):
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}, '{"error": {"message": "slow down"}}') if number == 0 else '{"a": 1}'

    with ChatServer(reply) as server:
        assert Endpoint(server.url, "m").ask("What?") == {"a": 1}
    assert len(times) == 2
    assert 0.95 < times[1] - times[0] < 10


def test_ask_when_the_server_breaks_once_then_asks_again():
    with ChatServer(lambda number, *_: '{"a": 1}' if number else (500, {"retry-after-ms": "10"}, "oops")) as server:
        assert Endpoint(server.url, "m").ask("What?") == {"a": 1}
    assert len(server.requests) == 2


def test_ask_when_the_server_stays_broken_then_says_so(monkeypatch):
    monkeypatch.setattr(endpoint_module, "_MAX_RETRIES", 1)
    with (
        ChatServer(lambda *_: (503, {"retry-after-ms": "10"}, "oops")) as server,
        pytest.raises(ValueError, match=r"answered 503 .* try again later"),
    ):
        Endpoint(server.url, "m").ask("What?")
    assert len(server.requests) == 2


def test_ask_when_the_server_is_slow_once_then_asks_again(monkeypatch):
    monkeypatch.setattr(endpoint_module, "_TIMEOUT", 0.3)
    is_over = threading.Event()

    def reply(number, prompt, urls):
        if number == 0:
            is_over.wait(5)
        return '{"a": 1}'

    with ChatServer(reply) as server:
        assert Endpoint(server.url, "m").ask("What?") == {"a": 1}
        is_over.set()
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "bad",
    [
        "I cannot",
        (200, {}, "not json"),
        (200, {}, "[]"),
        (200, {}, '"choices"'),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"choices": {}}'),
        (200, {}, '{"choices": null}'),
        (200, {}, '{"choices": [{"message": {"content": null}}]}'),
        (200, {}, '{"choices": [{"message": {"content": [{"a": 1}]}}]}'),
        (200, {}, "[" * 100_000),
        (200, {"Content-Type": "text/html"}, "<p>"),
    ],
    ids=range(11),
)
def test_ask_when_an_answer_is_unusable_then_asks_again_up_to_three_times(bad, tmp_path):
    with ChatServer(lambda number, *_: bad if number < 2 else '{"a": 1}') as server:
        assert Endpoint(server.url, "m").ask("What?") == {"a": 1}
    assert len(server.requests) == 3
    with ChatServer(lambda *_: bad) as server:
        assert Endpoint(server.url, "m", cache=tmp_path / "cache.jsonl").ask("What?") is None
    assert len(server.requests) == 3
    assert not (tmp_path / "cache.jsonl").exists()


def test_ask_with_the_wrong_key_then_says_what_to_check_and_not_the_key(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    with ChatServer(lambda *_: "{}", key="another") as server:
        for given, environment in ((KEY, None), (None, KEY)):
            if environment:
                monkeypatch.setenv("OPENAI_API_KEY", environment)
            endpoint = Endpoint(server.url, "m", given, cache=tmp_path / "cache.jsonl")
            with pytest.raises(ValueError, match=r"answered 401 .*OPENAI_API_KEY") as caught:
                endpoint.ask("What?")
            assert KEY not in str(caught.value)
            assert caught.value.__suppress_context__  # no traceback shows the client's error, which has the key
            assert KEY not in repr(endpoint) + str(endpoint.settings())
    assert "openai" in {record.name.split(".")[0] for record in caplog.records}
    assert KEY not in caplog.text
    assert len(server.requests) == 2
    assert not (tmp_path / "cache.jsonl").exists()


def test_ask_with_a_key_that_was_copied_badly_then_mended_or_refused_but_not_shown(caplog):
    caplog.set_level(logging.DEBUG)
    with ChatServer(lambda *_: '{"a": 1}', key=KEY) as server:
        assert Endpoint(server.url, "m", f"{KEY}\n").ask("What?") == {"a": 1}
        for bad in (f"{KEY}\nX: y", f"{KEY}\u2026"):
            with pytest.raises(ValueError, match="expected a key of printable ASCII") as caught:
                Endpoint(server.url, "m", bad).ask("What?")
            assert KEY not in str(caught.value)
    assert len(server.requests) == 1
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("status", "advice"), [(400, "takes pictures"), (403, "may use this model"), (404, "ends in /v1")]
)
def test_ask_when_refused_then_says_what_to_check(status, advice):
    with (
        ChatServer(lambda *_: (status, {}, '{"error": {"message": "no"}}')) as server,
        pytest.raises(ValueError, match=f"answered {status} .*{advice}"),
    ):
        Endpoint(server.url, "m").ask("What?")
    assert len(server.requests) == 1


def test_ask_when_nobody_listens_then_says_what_to_check(monkeypatch):
    monkeypatch.setattr(endpoint_module, "_MAX_RETRIES", 1)
    with ChatServer(lambda *_: "{}") as server:
        url = server.url
    with pytest.raises(ValueError, match=r"cannot reach http:.* check the URL"):
        Endpoint(url, "m").ask("What?")


def test_cache_when_run_again_then_no_requests_but_for_what_differs(tmp_path):
    cache = tmp_path / "new" / "cache.jsonl"
    with ChatServer(lambda number, *_: json.dumps({"n": number, "text": "é\u2028"})) as server:
        first = Endpoint(server.url, "m", KEY, cache=cache).ask("What?", [picture()])
        again = Endpoint(server.url, "m", cache=cache)
        assert again.ask("What?", [picture()]) == first == {"n": 0, "text": "é\u2028"}
        assert len(server.requests) == 1
        assert again.ask("What?")["n"] == 1
        assert again.ask("Why?", [picture()])["n"] == 2
        assert Endpoint(server.url, "m2", cache=cache).ask("What?", [picture()])["n"] == 3
        assert Endpoint(server.url, "m", temperature=1, cache=cache).ask("What?", [picture()])["n"] == 4
    assert KEY not in cache.read_text()


def test_cache_when_a_line_is_torn_then_only_that_one_is_asked_again(tmp_path):
    cache = tmp_path / "cache.jsonl"
    with ChatServer(lambda number, prompt, urls: json.dumps({"prompt": prompt})) as server:
        for prompt in "abc":
            Endpoint(server.url, "m", cache=cache).ask(prompt)
        cache.write_bytes(cache.read_bytes()[:-10])
        again = Endpoint(server.url, "m", cache=cache)
        assert [again.ask(prompt)["prompt"] for prompt in "abc"] == ["a", "b", "c"]
        assert len(server.requests) == 4
        assert [Endpoint(server.url, "m", cache=cache).ask(prompt)["prompt"] for prompt in "abc"] == ["a", "b", "c"]
        assert len(server.requests) == 4


def test_cache_when_killed_and_run_again_then_no_answer_is_asked_for_twice(tmp_path):
    cache = tmp_path / "cache.jsonl"
    prompts = [str(number) for number in range(8)]
    code = (
        "import sys; from chatpose_hf.data.endpoint import Endpoint\n"
        "list(Endpoint(sys.argv[1], 'm', cache=sys.argv[2], concurrency=1).ask_all((p, ()) for p in sys.argv[3:]))"
    )
    process = None
    is_killed = threading.Event()

    def reply(number, prompt, urls):
        if number == 5:
            process.send_signal(signal.SIGKILL)
            is_killed.set()
        return json.dumps({"prompt": prompt})

    with ChatServer(reply) as server:
        source = Path(endpoint_module.__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(source)}
        process = subprocess.Popen([sys.executable, "-c", code, server.url, cache, *prompts], env=environment)
        assert is_killed.wait(60)
        assert process.wait(60) == -signal.SIGKILL
        assert len(server.requests) == 6
        answers = list(Endpoint(server.url, "m", cache=cache).ask_all((prompt, ()) for prompt in prompts))
    assert [answer["prompt"] for answer in answers] == prompts
    asked = sorted(request["messages"][0]["content"][0]["text"] for request in server.requests)
    assert asked == sorted([*prompts, "5"])  # the one that was under way


def test_ask_all_when_one_answer_is_taken_then_few_are_asked_for():
    taken = []
    go_on = threading.Event()

    def questions():
        for number in range(100):
            taken.append(number)
            yield str(number), ()

    def reply(number, prompt, urls):
        if prompt != "0":
            go_on.wait(5)
        return json.dumps({"prompt": prompt})

    with ChatServer(reply) as server:
        answers = Endpoint(server.url, "m", concurrency=2).ask_all(questions())
        assert next(answers) == {"prompt": "0"}
        assert taken == [0, 1, 2, 3]
        threading.Timer(0.2, go_on.set).start()
        answers.close()
        assert len(server.requests) <= 3  # two are under way, the last is not begun


def test_ask_all_then_in_order_and_several_at_once(tmp_path):
    together = threading.Barrier(3, timeout=5)

    def reply(number, prompt, urls):
        together.wait()  # breaks, a 500 for the client, where fewer than three come at once
        time.sleep(0.02 * (6 - int(prompt)))
        return json.dumps({"prompt": prompt})

    cache = tmp_path / "cache.jsonl"
    with ChatServer(reply) as server:
        endpoint = Endpoint(server.url, "m", cache=cache, concurrency=3)
        answers = endpoint.ask_all([(str(number), []) for number in range(6)])
        assert [answer["prompt"] for answer in answers] == list("012345")
    lines = [json.loads(line) for line in cache.read_text().splitlines() if line]
    assert sorted(line["answer"]["prompt"] for line in lines) == list("012345")


def test_ask_all_when_refused_then_stops():
    with ChatServer(lambda *_: "{}", key="another") as server:
        with pytest.raises(ValueError, match="401"):
            list(Endpoint(server.url, "m", KEY, concurrency=2).ask_all((str(number), []) for number in range(200)))
        assert len(server.requests) < 10


def test_endpoint_when_pickled_after_use_then_works():
    with ChatServer(lambda *_: '{"a": 1}', key=KEY) as server:
        endpoint = Endpoint(server.url, "m", KEY)
        endpoint.ask("What?")
        copy = pickle.loads(pickle.dumps(endpoint))
        assert copy.ask("What?") == {"a": 1}
    assert len(server.requests) == 2  # no cache was named


def test_endpoint_without_the_client_then_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"chatpose_hf\[build\]"):
        Endpoint("http://localhost/v1", "m")


def test_endpoint_without_an_url_then_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    assert Endpoint(None, "m").base_url == "http://localhost:1/v1"
    assert Endpoint("http://localhost:2/v1", "m").base_url == "http://localhost:2/v1"


@pytest.mark.parametrize("arguments", [("localhost", "m"), ("http://localhost", ""), (None, "m")])
def test_endpoint_with_bad_arguments_then_says_so(arguments, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="expected an http"):
        Endpoint(*arguments)


def test_endpoint_with_a_password_in_the_url_then_refused_and_not_shown():
    with pytest.raises(ValueError, match="without a name and a password") as caught:
        Endpoint(f"http://me:{KEY}@localhost/v1", "m")
    assert KEY not in str(caught.value)
