"""Whatever is sent, the server answers in OpenAI's words and goes on; `bd3lm serve` says in one line what is wrong."""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch
from pydantic import ValidationError
from serving import KEY, NAME, make_tiny

from bd3lm_hf.cli import main
from bd3lm_hf.serving.api import ServerLimits, make_app
from bd3lm_hf.serving.engine import Engine, EngineLimits
from bd3lm_hf.serving.protocol import CompletionRequest
from bd3lm_hf.serving.running import BackgroundServer


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/infill")
HEADERS = {"Authorization": f"Bearer {KEY}"}
# Values that fit no field, or few.
WRONG = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**30,
    "",
    "x",
    "\ud800",
    "\x00",
    [],
    {},
    [[]],
    [None],
    {"a": {"b": []}},
    "9" * 50,
)
VALID = {
    PATHS[0]: {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    PATHS[1]: {"model": NAME, "prompt": "hi", "max_tokens": 2},
    PATHS[2]: {"model": NAME, "text": "a___b", "placeholder": "___"},
}
FIELDS = (
    "model prompt messages text n stream stream_options temperature top_p seed stop logit_bias presence_penalty "
    "frequency_penalty user block_diffusion max_tokens logprobs echo best_of placeholder gap_length top_logprobs tools"
).split()
OPTIONS = (
    "sampler denoising_steps confidence_threshold confidence tokens_per_step sub_block_size entropy_bound "
    "noise_schedule remask_cap top_k min_p repetition_penalty min_new_tokens infill stream_drafts nonsense"
).split()


def malformed(rng):
    """A path, and a body that is wrong in one way or several."""
    path = rng.choice(PATHS)
    body = json.loads(json.dumps(VALID[path]))
    kind = rng.randrange(6)
    if kind == 0:
        text = json.dumps(body)
        return path, text[: rng.randrange(len(text))].encode()
    if kind == 1:
        return path, bytes(rng.randrange(256) for _ in range(rng.randrange(1, 60)))
    if kind == 2:
        return path, json.dumps(rng.choice(WRONG)).encode()
    if kind == 3:
        del body[rng.choice([name for name in body if name not in ("max_tokens", "prompt", "placeholder")])]
    elif kind == 4:
        body["block_diffusion"] = {rng.choice(OPTIONS): rng.choice(WRONG), "nonsense": 1}
    else:
        body[rng.choice(FIELDS)] = rng.choice(WRONG)
        body["no_such_field"] = rng.choice(WRONG)
    return path, json.dumps(body).encode()


def test_2000_malformed_requests_get_4xx_and_the_server_goes_on():
    engine = Engine(make_tiny()[0], EngineLimits(num_slots=2, max_length=64))
    app = make_app(engine, make_tiny()[1], NAME, KEY, ServerLimits(max_body=2000))
    rng = random.Random(0)

    async def send():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=HEADERS) as client:
            for _ in range(2000):
                path, body = malformed(rng)
                answer = await client.post(path, content=body)
                error = answer.json()["error"]
                assert 400 <= answer.status_code < 500, (path, body, answer.text)
                assert error["message"] and "bd3lm_hf" not in answer.text and "site-packages" not in answer.text
            assert (await client.post(PATHS[1], content=b" " * 3000)).status_code == 413
            assert (await client.get(PATHS[1])).status_code == 405
            assert (await client.get("/v1/nothing")).status_code == 404
            for path in PATHS:
                answer = await client.post(path, json=VALID[path])
                assert answer.status_code == 200, answer.text

    with engine:
        asyncio.run(send())
    assert (engine.num_running, engine.counts.failed, engine.counts.ended) == (0, 0, 3)


def test_the_likelihood_of_a_prompt_is_refused():
    # lm-evaluation-harness would take what is told of new tokens for it.
    body = {"model": NAME, "prompt": "hi", "max_tokens": 1, "echo": True}
    for logprobs in (1, True):
        with pytest.raises(ValidationError, match="`logprobs` must be 0 with `echo`"):
            CompletionRequest.model_validate(body | {"logprobs": logprobs})
    assert CompletionRequest.model_validate(body | {"logprobs": 0}).echo


@pytest.mark.parametrize("item", ["{}", "[{}]", "-1", "null", '"a",1'])
def test_of_a_long_list_that_is_wrong_one_fault_is_looked_for(item):
    # A megabyte would have a million of them, of a kilobyte each.
    body = f'{{"model": "{NAME}", "prompt": [{",".join([item] * 1000)}]}}'
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate_json(body)
    assert caught.value.error_count() < 10


def test_a_client_that_leaves_while_it_asks_is_no_fault_of_the_server(caplog):
    app = make_app(Engine(make_tiny()[0], EngineLimits(num_slots=1, max_length=64)), make_tiny()[1], NAME)
    came = [{"type": "http.request", "body": b'{"mod', "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return came.pop(0) if len(came) > 1 else came[0]

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": PATHS[1], "headers": [], "query_string": b""}
    asyncio.run(app({**scope, "http_version": "1.1", "raw_path": b""}, receive, send))
    assert not caplog.records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    for part in make_tiny():
        part.save_pretrained(folder)
    return folder


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_the_command_serves_what_it_is_given(folder, monkeypatch, capsys):
    answers = []

    def serve(app, listening):
        options = {"headers": HEADERS, "timeout": 60}
        with BackgroundServer(app) as server, httpx.Client(base_url=server.url, **options) as client:
            body = {"model": "small", "prompt": "x", "seed": 1, "max_tokens": 4}
            answers.append(client.post("/v1/completions", json=body))
            answers.append(client.get("/v1/models"))
            answers.append(client.post("/v1/completions", content=b" " * 3000))
            answers.append(httpx.get(f"{server.url}/v1/models", timeout=60))

    monkeypatch.setattr("bd3lm_hf.serving.running.serve", serve)
    monkeypatch.setenv("BD3LM_API_KEY", KEY)
    flags = ["--name", "small", "--port", str(free_port()), "--max_length", "99", "--max_body", "2000"]
    assert main(["serve", str(folder), *flags, "--device", "cpu"]) == 0
    assert [answer.status_code for answer in answers] == [200, 200, 413, 401]
    assert answers[0].json()["usage"]["completion_tokens"] == 4
    assert answers[1].json()["data"][0]["max_model_len"] == 99
    assert "small is served at http://127.0.0.1:" in capsys.readouterr().out


def test_a_client_that_does_not_read_misses_drafts_and_no_text():
    engine = Engine(model := make_tiny()[0], EngineLimits(num_slots=1, max_length=256))
    app, sent = make_app(engine, make_tiny()[1], NAME), []
    body = {"model": NAME, "prompt": "x", "max_tokens": 240, "seed": 1, "stream": True, "logit_bias": {"1": -100}}
    body["block_diffusion"] = {"stream_drafts": True}
    scope = {"type": "http", "method": "POST", "path": PATHS[1], "headers": [], "query_string": b""}

    async def ask():
        may_read, came = asyncio.Event(), [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive():
            return came.pop() if came else await asyncio.Event().wait()

        async def send(message):
            await may_read.wait()
            sent.append(message)

        asked = asyncio.ensure_future(app({**scope, "http_version": "1.1", "raw_path": b""}, receive, send))
        while engine.counts.forwards < 8:
            await asyncio.sleep(0.001)
        # The loop is late, too: what it would put in the queue piles up elsewhere.
        while not engine.counts.ended:
            time.sleep(0.001)
        may_read.set()
        await asked

    with engine:
        asyncio.run(ask())
    lines = b"".join(message.get("body", b"") for message in sent).decode().split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert 32 < sum("block_diffusion" in choice for choice in choices) < 100
    bias = {"sequence_bias": [[[1], -100.0]]}
    ids = torch.tensor([[make_tiny()[1].bos_token_id, *make_tiny()[1]("x", add_special_tokens=False)["input_ids"]]])
    new = model.generate(ids, max_new_tokens=240, seed=1, **bias)[0, ids.shape[1] :]
    assert "".join(choice["text"] for choice in choices) == make_tiny()[1].decode(new, skip_special_tokens=True)


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(folder):
    port = free_port()
    command = [sys.executable, "-m", "bd3lm_hf.cli", "serve", str(folder), "--port", str(port), "--num_slots", "2"]
    environment = os.environ | {"BD3LM_API_KEY": KEY}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"tiny is served at http://127.0.0.1:{port}/v1\n"
        url, body = f"http://127.0.0.1:{port}", {"model": "tiny", "prompt": "x", "seed": 1, "max_tokens": 4}
        wait_until_it_answers(f"{url}/health")
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        process.send_signal(2)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, 130) and "Traceback" not in errors


def wait_until_it_answers(url, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return httpx.get(url)
        except httpx.HTTPError:
            time.sleep(0.05)
    raise AssertionError("no answer")


def test_what_keeps_it_from_serving_is_one_line(folder, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(folder), "--port", port]) == 2
    assert "in use" in last_line(capsys)
    assert main(["serve", str(folder), "--num_slots", "0"]) == 2
    assert "`num_slots` must be a positive integer, but got 0" in last_line(capsys)
    assert main(["serve", str(folder), "--max_body", "-1"]) == 2
    assert "`max_body` must be a positive integer, but got -1" in last_line(capsys)
    monkeypatch.setenv("BD3LM_API_KEY", "")
    assert main(["serve", str(folder)]) == 2
    assert "BD3LM_API_KEY must be a key of printable ASCII characters" in last_line(capsys)


def last_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]
