"""OpenAI's own client against the server: every answer is the one that `generate` gives alone."""

import http.client
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from serving import KEY, NAME, held, make_tiny, running
from transformers import StopStringCriteria

from bd3lm_hf import TextInfillingPipeline
from bd3lm_hf.serving.engine import EngineLimits


SAMPLERS = (
    {},
    {"sampler": "confidence", "denoising_steps": 2},
    {"sampler": "confidence", "confidence_threshold": 0.3},
    {"sampler": "entropy_bound", "entropy_bound": 1.0},
    {"sampler": "ancestral", "denoising_steps": 3},
)
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def tiny():
    return make_tiny()


@pytest.fixture(scope="module")
def server(tiny):
    with running(*tiny, EngineLimits(num_slots=8, max_length=256, max_queue=64)) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key=KEY, max_retries=0)


def encode(tokenizer, text):
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def alone(tiny, ids, **options):
    """The new ids that `generate` writes alone."""
    model, tokenizer = tiny
    return model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()


def text_of(tiny, ids):
    return tiny[1].decode(ids, skip_special_tokens=True)


def words(rng, length):
    return "".join(rng.choice("abcdefgh ,.") for _ in range(length))


def ask_and_compare(tiny, client, seed, length):
    """One client with a seed: what it gets, and what `generate` gives."""
    rng = random.Random(seed)
    prompt, options = words(rng, length), SAMPLERS[seed % len(SAMPLERS)]
    max_tokens = rng.randrange(1, 17)
    asked = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "seed": seed}
    if seed % 3:
        got = client.completions.create(**asked, extra_body={"block_diffusion": options}).choices[0].text
    else:
        parts = client.completions.create(**asked, stream=True, extra_body={"block_diffusion": options})
        got = "".join(part.choices[0].text for part in parts)
    ids = encode(tiny[1], prompt)
    return got, text_of(tiny, alone(tiny, ids, max_new_tokens=max_tokens, seed=seed, **options))


def test_64_clients_at_once_get_what_each_would_get_alone(tiny, client, server):
    lengths = [1 + 3 * seed % 100 for seed in range(64)]
    with ThreadPoolExecutor(64) as threads:
        pairs = [*threads.map(lambda seed: ask_and_compare(tiny, client, seed, lengths[seed]), range(64))]
    assert [got for got, _ in pairs] == [wanted for _, wanted in pairs]
    # They are no two alike, so that none could have another's.
    assert len({got for got, _ in pairs}) > 50
    assert server[0].num_running == server[0].num_waiting == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_64_clients_with_prompts_of_1_to_2000_tokens(tiny):
    lengths = [1 + 31 * seed % 1999 for seed in range(62)] + [1999, 1998]
    limits = EngineLimits(num_slots=16, max_length=2048)
    with running(*tiny, limits) as (engine, url), ThreadPoolExecutor(64) as threads:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=600)
        pairs = [*threads.map(lambda seed: ask_and_compare(tiny, client, seed, lengths[seed]), range(64))]
        assert engine.counts.ended == 64
    assert [got for got, _ in pairs] == [wanted for _, wanted in pairs]


def test_a_chat_is_written_by_its_template_whole_and_streamed(tiny, client):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    ids = tiny[1].apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    wanted = alone(tiny, ids, max_new_tokens=14, seed=5, temperature=0.5, top_p=0.9)
    asked = {"model": NAME, "messages": messages, "seed": 5, "temperature": 0.5, "top_p": 0.9}
    answer = client.chat.completions.create(**asked, max_completion_tokens=14)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", text_of(tiny, wanted))
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == len(wanted)
    assert answer.usage.tokens_per_forward == len(wanted) / answer.usage.forwards
    parts = [
        *client.chat.completions.create(
            **asked, max_tokens=14, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
    ]
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == text_of(tiny, wanted)
    assert parts[0].choices[0].delta.role == "assistant" and parts[-2].choices[0].finish_reason == "length"
    # A chunk for each block, not one for all.
    assert len([part for part in parts[:-1] if part.choices[0].delta.content]) >= 3
    assert parts[-1].usage == answer.usage
    entries = [entry for part in parts[:-1] if part.choices[0].logprobs for entry in part.choices[0].logprobs.content]
    assert [entry.token for entry in entries] == [tiny[1].decode([token]) for token in wanted]


def test_n_choices_have_the_seeds_that_follow_and_several_prompts_their_order(tiny, client):
    prompts = ["first", "the second"]
    answer = client.completions.create(model=NAME, prompt=prompts, n=3, seed=40, max_tokens=9)
    wanted = [
        text_of(tiny, alone(tiny, encode(tiny[1], prompt), max_new_tokens=9, seed=40 + copy))
        for prompt in prompts
        for copy in range(3)
    ]
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [*range(6)]
    assert [choice.block_diffusion["seed"] for choice in answer.choices] == [40, 41, 42] * 2
    # Without a seed there is one all the same, by which the text can be had again.
    seed = (choice := client.completions.create(model=NAME, prompt="first").choices[0]).block_diffusion["seed"]
    assert choice.text == client.completions.create(model=NAME, prompt="first", seed=seed).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_the_first_stop_string(tiny, client, stream):
    ids = encode(tiny[1], "stop here")
    without = {str(token): -100 for token in tiny[1].all_special_ids}
    bias = {(int(token),): -100.0 for token in without}
    new = alone(tiny, ids, max_new_tokens=60, seed=3, sequence_bias=bias)
    whole = text_of(tiny, new)
    pairs = [text_of(tiny, new[index : index + 2]) for index in range(12, 50)]
    stop = next(pair for pair in pairs if "\ufffd" not in pair and whole.index(pair) > 9)
    stops = [stop, "never comes"]
    criterion = StopStringCriteria(tiny[1], stops)
    wanted = alone(tiny, ids, max_new_tokens=60, seed=3, sequence_bias=bias, stopping_criteria=[criterion])
    asked = {"model": NAME, "prompt": "stop here", "max_tokens": 60, "seed": 3, "stop": stops, "logit_bias": without}
    if stream:
        parts = [*client.completions.create(**asked, stream=True)]
        text, reason = "".join(part.choices[0].text for part in parts), parts[-1].choices[0].finish_reason
    else:
        answer = client.completions.create(**asked)
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert answer.usage.completion_tokens == len(wanted) < 60
    assert text == whole[: whole.index(stop)] and reason == "stop"


def test_eos_ends_a_text_and_the_length_does_too(tiny, client):
    ids, eos = encode(tiny[1], "end"), tiny[1].eos_token_id
    bias = {str(eos): 20.0}
    wanted = alone(tiny, ids, max_new_tokens=60, seed=1, sequence_bias={(eos,): 20.0})
    assert wanted[-1] == eos and 1 < len(wanted) < 60
    answer = client.completions.create(model=NAME, prompt="end", max_tokens=60, seed=1, logit_bias=bias)
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text == text_of(tiny, wanted)
    short = client.completions.create(model=NAME, prompt="end", max_tokens=1, seed=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 1)
    # Of a character that lacks bytes nothing is lost.
    assert short.choices[0].text == text_of(tiny, alone(tiny, ids, max_new_tokens=1, seed=2))


def test_log_probabilities_are_those_of_the_reveal(tiny, client):
    ids = encode(tiny[1], "how sure")
    answer = client.completions.create(model=NAME, prompt=ids, max_tokens=10, seed=6, logprobs=0, echo=True)
    output = tiny[0].generate(
        torch.tensor([ids]), max_new_tokens=10, seed=6, return_dict_in_generate=True, output_reveal=True
    )
    new = output.sequences[0, len(ids) :]
    told = answer.choices[0].logprobs
    torch.testing.assert_close(
        torch.tensor(told.token_logprobs), output.token_probabilities[0, len(ids) :].log(), atol=1e-4, rtol=1e-4
    )
    assert told.tokens == [tiny[1].decode([token]) for token in new.tolist()]
    assert answer.choices[0].text == "how sure" + text_of(tiny, new)
    assert told.text_offset[0] == len("how sure")


def test_gaps_are_filled_as_the_pipeline_fills_them(tiny, client, server):
    fill = TextInfillingPipeline(model=tiny[0], tokenizer=tiny[1])
    wanted = fill("ab___cd___e", placeholder="___", gap_length=[2, 3], seed=3, sampler="confidence")
    fields = {"model": NAME, "seed": 3, "block_diffusion": {"sampler": "confidence"}}
    gaps = {"placeholder": "___", "gap_length": [2, 3]}
    by_path = httpx.post(
        f"{server[1]}/v1/infill", json={**fields, **gaps, "text": "ab___cd___e"}, headers=HEADERS, timeout=60
    ).json()
    options = {"block_diffusion": {"sampler": "confidence", "infill": gaps}}
    by_extension = client.completions.create(model=NAME, prompt="ab___cd___e", seed=3, extra_body=options)
    assert by_path["choices"][0]["text"] == by_extension.choices[0].text == wanted["text"]
    for span, expected in zip(by_path["choices"][0]["block_diffusion"]["spans"], wanted["spans"], strict=True):
        assert span["token_ids"] == expected["token_ids"]
        assert span["token_scores"] == pytest.approx(expected["token_scores"], rel=1e-3)
    assert by_extension.usage.completion_tokens == 5


def test_drafts_are_streamed_where_they_are_asked_for(tiny, client):
    options = {"block_diffusion": {"stream_drafts": True}}
    parts = [*client.completions.create(model=NAME, prompt="d", seed=1, max_tokens=8, stream=True, extra_body=options)]
    drafts = [
        part.choices[0].block_diffusion["draft"] for part in parts if hasattr(part.choices[0], "block_diffusion")
    ]
    numbers = [draft.count("[MASK]") for draft in drafts]
    assert len(drafts) == 8 and numbers[0] > numbers[1] > numbers[2]
    wanted = alone(tiny, encode(tiny[1], "d"), max_new_tokens=8, seed=1)
    assert "".join(part.choices[0].text for part in parts) == text_of(tiny, wanted)


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_leaves_frees_its_slot(tiny, client, server):
    engine, url = server
    before = engine.counts.cancelled
    asked = {"model": NAME, "prompt": "x", "max_tokens": 250, "seed": 0}
    with held(engine):
        stream = client.completions.create(**asked, n=4, stream=True)
        next(iter(stream))
        assert engine.num_running == 4
        stream.close()
        wait_until(lambda: engine.num_running == 0)
    assert engine.counts.cancelled == before + 4
    # One who waits for a whole answer may leave, too.
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    with held(engine):
        connection.request("POST", "/v1/completions", json.dumps({**asked, "n": 8}), HEADERS)
        wait_until(lambda: engine.num_running == 8)
        connection.close()
        wait_until(lambda: engine.num_running == engine.num_waiting == 0)
    assert engine.counts.cancelled == before + 4 + 8


def test_past_the_queue_there_is_429_and_later_room_again(tiny):
    with running(*tiny, EngineLimits(num_slots=1, max_length=128, max_queue=1)) as (engine, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        with pytest.raises(openai.RateLimitError, match="Too many requests wait") as caught:
            client.completions.create(model=NAME, prompt="x", n=3, max_tokens=50)
        assert caught.value.response.headers["retry-after"] == "1"
        answer = client.completions.create(model=NAME, prompt="x", n=2, max_tokens=2, seed=0)
        assert answer.usage.completion_tokens == 4


def test_what_fails_on_the_server_says_so_and_no_more(tiny):
    model, tokenizer = make_tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("!")["input_ids"][0]] = torch.nan
    with running(model, tokenizer) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        with pytest.raises(openai.InternalServerError, match="the server's log says why") as caught:
            client.completions.create(model=NAME, prompt="oh!", logit_bias={"0": -100})
        assert "/" not in caught.value.body["message"] and "NaN" not in str(caught.value)
        with pytest.raises(openai.APIError, match="the server's log says why"):
            [*client.completions.create(model=NAME, prompt="oh!", stream=True)]
        bias = {str(tokenizer("!")["input_ids"][0]): -100}
        answer = client.completions.create(model=NAME, prompt="oh", logit_bias=bias, seed=0)
        assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "`model` must be 'tiny', but got 'other'"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 300}, "`prompt` must have 1 to 256 tokens with the 300 new ones, but got 2"),
        ({"temperature": float("nan")}, "temperature"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"suffix": "x"}, "suffix: Extra inputs are not permitted"),
        ({"prompt": [1, 1000]}, "`prompt` must be of ids in [0, "),
        ({"prompt": "a[MASK]"}, "must not hold the mask token"),
        ({"prompt": ["a"] * 65}, "must ask for at most 64 texts together, but got 65"),
        ({"logit_bias": {"1000": 1}}, "`logit_bias` must be of tokens in [0, "),
        ({"logit_bias": {"x": 1}}, "`logit_bias` must have ids of tokens as keys, but got 'x'"),
        ({"block_diffusion": {"sampler": "x"}}, "`sampler` must be one of first_hitting"),
        ({"block_diffusion": {"entropy_bound": 1}}, "`entropy_bound` is an argument of the sampler 'entropy_bound'"),
        (
            {"block_diffusion": {"sampler": "confidence", "denoising_steps": 2, "confidence_threshold": 0.5}},
            "`denoising_steps` and `confidence_threshold` are two rules",
        ),
        ({"block_diffusion": {"min_new_tokens": 17}}, "`min_new_tokens` must be at most `max_tokens`, 16, but got 17"),
        # A few bytes that ask for more than there is memory.
        (
            {"prompt": "a__b__", "block_diffusion": {"infill": {"placeholder": "_", "gap_length": 2**31 - 1}}},
            f"`gap_length` must be of at most 256 tokens together, but got {4 * (2**31 - 1)}",
        ),
        (
            {"prompt": "[MASK]", "block_diffusion": {"infill": {"gap_length": [2**31 - 1]}}},
            "`gap_length` must be of at most 256 tokens together",
        ),
        ({"block_diffusion": {"infill": True}}, "`inputs` must mark gaps by '[MASK]', but got a text without one"),
    ],
)
def test_mistakes_are_told(server, change, message):
    body = {"model": NAME, "prompt": "x", "seed": 0, **change}
    url, options = f"{server[1]}/v1/completions", {"headers": HEADERS, "timeout": 60}
    answer = httpx.post(url, content=json.dumps(body), **options)
    assert answer.status_code == (404 if "model" in change else 400)
    error = answer.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    # Told before the stream begins, where a client sees the status.
    streamed = httpx.post(url, content=json.dumps(body | {"stream": True}), **options)
    assert streamed.status_code == answer.status_code


def test_models_health_and_metrics(client, server):
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len) == (NAME, 256) and client.models.retrieve(NAME) == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(f"{server[1]}/health", timeout=60).json() == {"status": "ok"}
    client.completions.create(model=NAME, prompt="x", max_tokens=5)
    text = httpx.get(f"{server[1]}/metrics", headers=HEADERS, timeout=60).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["bd3lm_ended_total"]) == server[0].counts.ended > 0
    assert float(values["bd3lm_request_seconds_count"]) > 0 and float(values["bd3lm_first_block_seconds_count"]) > 0
    assert float(values["bd3lm_slots"]) == 8 and float(values["bd3lm_slots_in_use"]) == 0


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/metrics", "/docs", "/nothing", "/openapi.json"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}])
def test_without_the_key_there_is_401_and_nothing_else(server, path, headers):
    for method in ("GET", "POST"):
        answer = httpx.request(method, server[1] + path, headers=headers, content=b"{}" * 10, timeout=60)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert "server" not in answer.headers and "/" not in answer.json()["error"]["message"]
