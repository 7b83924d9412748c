"""The gateway before the replicas, with replicas that answer, wait and die as they are told."""

import asyncio
import json

import httpx
import numpy as np
import pytest
import torch
from serving import held, make_tiny, save_adapter


pytest.importorskip("ray", reason="needs Ray: pip install 'bd3lm-hf[ray]'")

from ray.exceptions import ActorDiedError  # noqa: E402
from ray.serve.exceptions import BackPressureError  # noqa: E402

from bd3lm_hf.cli.serve import application  # noqa: E402
from bd3lm_hf.serving.api import ServerLimits  # noqa: E402
from bd3lm_hf.serving.engine import EngineLimits  # noqa: E402
from bd3lm_hf.serving.ray_data import BlockWriter  # noqa: E402
from bd3lm_hf.serving.ray_serve import Placement, Replica, _deployment_of, _gateway_app, make_application  # noqa: E402


LOST, FULL = ActorDiedError(), BackPressureError(num_queued_requests=1, max_queued_requests=1)
JSON = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
EVENTS = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def part(text, more=True):
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Stream:
    """What a replica sends, of which an exception is raised in its turn."""

    def __init__(self, script):
        self.script, self.is_cancelled = [*script], False

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if not self.script:
            raise StopAsyncIteration
        if isinstance(message := self.script.pop(0), Exception):
            raise message
        return message

    def cancel(self):
        self.is_cancelled = True


class Handle:
    """A model, each of whose calls follows the next of some scripts."""

    def __init__(self, *scripts):
        self.scripts, self.calls, self.streams = [*scripts], [], []
        self.answer = self

    def options(self, stream):
        assert stream
        return self

    def remote(self, *call):
        self.calls.append(call)
        self.streams.append(Stream(self.scripts.pop(0)))
        return self.streams[-1]


def ask(handles, method="POST", path="/v1/completions", **request):
    async def send():
        app = _gateway_app(handles, ServerLimits(max_body=200))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def test_a_request_whose_replica_dies_before_it_answers_is_asked_of_another():
    body = b'{"model": "a", "prompt": "x"}'
    for script in ([LOST], [JSON, LOST]):
        handle = Handle(script, [LOST], [JSON, part('{"text": 1}', more=False)])
        answer = ask({"a": handle}, content=body, headers={"Content-Type": "application/json", "Cookie": "secret"})
        assert (answer.status_code, answer.json()) == (200, {"text": 1})
        sent = ("POST", "/v1/completions", [(b"content-type", b"application/json")], body)
        assert handle.calls == [sent] * 3


def test_a_request_that_loses_three_replicas_is_given_up():
    answer = ask({"a": Handle(*[[LOST]] * 4)}, content=b"{}")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "server_lost"


def test_a_stream_that_has_begun_ends_with_an_error():
    handle = Handle([EVENTS, part("data: 1\n\n"), part("data: 2\n\n"), LOST])
    answer = ask({"a": handle}, content=b"{}")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/event-stream"
    first, second, last, rest = answer.text.split("\n\n")
    assert (first, second, rest) == ("data: 1", "data: 2", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_lost"
    assert len(handle.calls) == 1 and handle.streams[0].is_cancelled


def test_a_stream_comes_whole():
    handle = Handle([EVENTS, part("data: 1\n\n"), part("data: [DONE]\n\n"), part("", more=False)])
    assert ask({"a": handle}, content=b"{}").text == "data: 1\n\ndata: [DONE]\n\n"


def test_a_fault_of_the_application_is_not_asked_again():
    handle = Handle([ValueError("a secret")], [])
    with pytest.raises(ValueError, match="a secret"):
        ask({"a": handle}, content=b"{}")
    assert len(handle.calls) == 1


def test_more_requests_than_may_wait_are_refused():
    answer = ask({"a": Handle([FULL])}, content=b"{}")
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_large_body_is_refused():
    handle = Handle()
    answer = ask({"a": handle}, content=b" " * 201)
    assert answer.status_code == 413 and handle.calls == []


def test_each_model_gets_its_requests():
    def handles():
        return {name: Handle([JSON, part(f'"{name}"', more=False)]) for name in ("a", "b")}

    for model, wanted in (("a", "a"), ("b", "b"), ("b:adapter", "b"), (None, "a"), (3, "a")):
        assert ask(handles(), content=json.dumps({"model": model})).json() == wanted
    for body in (b"", b"{", b"[]", b"[" * 190):
        assert ask(handles(), content=body).json() == "a"
    answer = ask(handles(), content=b'{"model": "c"}')
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "`model` must be one of 'a', 'b', but got 'c'."
    assert ask(handles(), "GET", "/v1/models/b").json() == "b"
    assert ask(handles(), "GET", "/v1/models/c").status_code == 404
    # With one model its application says what is wrong with the name.
    assert ask({"a": handles()["a"]}, content=b'{"model": "c"}').json() == "a"


def test_models_of_similar_names_have_deployments_of_their_own():
    names = ["a/b", "a#b", "a_b", "a_sb", "a_nb", "a__b", "a_/b", "a/_b"]
    deployments = {_deployment_of(name) for name in names}
    assert len(deployments) == len(names) and not any({"/", "#"} & set(name) for name in deployments)


def test_the_list_of_models_and_the_health_are_those_of_all():
    cards = {name: Handle([JSON, part(json.dumps({"data": [{"id": name}]}), more=False)]) for name in ("a", "b")}
    assert ask(cards, "GET", "/v1/models").json() == {"object": "list", "data": [{"id": "a"}, {"id": "b"}]}
    well = {name: Handle([JSON, part("{}", more=False)]) for name in ("a", "b")}
    assert ask(well, "GET", "/health").json() == {"status": "ok"}
    ill = {"a": Handle([JSON, part("{}", more=False)]), "b": Handle([{**JSON, "status": 503}, part("{}", more=False)])}
    assert ask(ill, "GET", "/health").status_code == 503
    assert ask(well, "GET", "/metrics").status_code == 404


def test_a_replica_answers_as_the_server_does_and_ends_with_its_caller():
    limits = EngineLimits(num_slots=2, max_length=256)
    replica = Replica(Placement(make_tiny, limits), "tiny", ServerLimits())
    headers = [(b"content-type", b"application/json")]
    body = {"model": "tiny", "prompt": "x", "max_tokens": 8, "seed": 1}

    async def ask_it():
        call = ("POST", "/v1/completions", headers, json.dumps(body).encode())
        start, text = [message async for message in replica.answer(*call)]
        assert start["status"] == 200
        streamed = json.dumps(body | {"stream": True, "max_tokens": 200}).encode()
        with held(replica._engine):
            stream = replica.answer("POST", "/v1/completions", headers, streamed)
            assert (await anext(stream))["status"] == 200 and (await anext(stream))["more_body"]
            await stream.aclose()
            for _ in range(6000):
                if replica._engine.num_running == 0:
                    break
                await asyncio.sleep(0.01)
        assert replica._engine.num_running == 0 and replica._engine.counts.cancelled == 1
        return json.loads(text["body"])["choices"][0]["text"]

    text = asyncio.run(ask_it())
    model, tokenizer = make_tiny()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("x", add_special_tokens=False)["input_ids"]]])
    alone = model.generate(ids, max_new_tokens=8, seed=1)[0, ids.shape[1] :]
    assert text == tokenizer.decode(alone, skip_special_tokens=True)
    replica.check_health()
    replica._engine.close()
    with pytest.raises(RuntimeError, match="The engine stopped"):
        replica.check_health()


def test_a_replica_has_the_adapters_of_its_placement(tmp_path):
    save_adapter(lambda: make_tiny()[0], tmp_path / "poems", 0)
    placed = Placement(
        make_tiny, EngineLimits(num_slots=2, max_length=64), adapters={"poems": str(tmp_path / "poems")}
    )
    replica = Replica(placed, "tiny", ServerLimits())

    async def texts_of(*names):
        texts = []
        for name in names:
            body = json.dumps({"model": name, "prompt": "x", "max_tokens": 8, "seed": 1}).encode()
            call = ("POST", "/v1/completions", [(b"content-type", b"application/json")], body)
            start, text = [message async for message in replica.answer(*call)]
            texts.append((start["status"], json.loads(text["body"]).get("choices", [{}])[0].get("text")))
        return texts

    own, poems, prose = asyncio.run(texts_of("tiny", "tiny:poems", "tiny:prose"))
    assert own[0] == poems[0] == 200 and own[1] != poems[1] and prose == (404, None)
    replica._engine.close()


def test_an_actor_takes_as_many_rows_as_ray_hands_over():
    writer = BlockWriter(make_tiny, EngineLimits(num_slots=2, max_length=64, max_queue=1), {"max_new_tokens": 4})
    rows = [{"index": np.arange(start, start + 8), "line": np.array(['{"prompt": "x"}'] * 8)} for start in (0, 8, 16)]

    async def write():
        return await asyncio.gather(*map(writer, rows))

    results = [json.loads(result) for block in asyncio.run(write()) for result in block["result"]]
    assert [result["index"] for result in results] == [*range(24)]
    assert all("completion" in result for result in results)
    writer._engine.close()
    (told,) = asyncio.run(writer(rows[0]))["result"]
    assert json.loads(told) == {"stopped": "The engine is closed."}


def test_placements_say_what_ray_is_asked_for():
    limits = EngineLimits(num_slots=4, max_length=64, max_queue=9)
    options = Placement(lambda: None, limits, replicas=2, num_cpus=0.5, num_gpus=1).options()
    assert options["num_replicas"] == 2 and options["max_queued_requests"] == 9
    assert options["ray_actor_options"] == {"num_cpus": 0.5, "num_gpus": 1}
    scaled = Placement(lambda: None, limits, replicas=2, max_replicas=5).options()["autoscaling_config"]
    assert scaled == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 4}
    with pytest.raises(ValueError, match="at least one model"):
        make_application({}, None, ServerLimits())


def test_a_configuration_of_ray_serve_has_the_flags_of_the_command():
    assert application({"model": "a", "replicas": 2, "num_slots": 8, "also": ["b=folder/b", "c"]}) is not None
    with pytest.raises(ValueError, match="`also` must be of models with names of their own, but got 'x/a'"):
        application({"model": "a", "also": ["x/a"]})
    with pytest.raises(ValueError, match="`num_slots` must be a positive integer"):
        application({"model": "a", "num_slots": 0})
    with pytest.raises(ValueError, match="`adapter` must be NAME=FOLDER, but got 'poems'"):
        application({"model": "a", "adapter": ["poems"]})


def test_adapters_are_those_of_the_first_model(tmp_path, monkeypatch):
    placements = {}
    monkeypatch.setattr("bd3lm_hf.serving.ray_serve.make_application", lambda placed, *_: placements.update(placed))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poems").mkdir()
    application({"model": "a", "also": ["b"], "adapter": ["poems=poems", "code=somebody/code"]})
    # A replica has another working folder.
    assert placements["a"].adapters == {"poems": str(tmp_path / "poems"), "code": "somebody/code"}
    assert placements["b"].adapters == {}
