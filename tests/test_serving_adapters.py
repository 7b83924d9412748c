"""Adapters chosen per request: each text is the one that `generate` writes with that adapter alone."""

import random
from contextlib import contextmanager

import openai
import pytest
import torch
from serving import KEY, NAME, ask, make_adapted, make_model, make_tiny, prompt, run_all, running, save_adapter

from bd3lm_hf.cli import main
from bd3lm_hf.serving.adapters import Adapters, parse_adapters
from bd3lm_hf.serving.engine import Engine, EngineLimits
from bd3lm_hf.serving.requests import Ended, Request, Written


peft = pytest.importorskip("peft")
MODELS = {"own": make_model, "adapted": lambda: make_adapted(shift_logits=True), "bytes": lambda: make_tiny()[0]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each kind of model the folders of two adapters, by name."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        kind: {name: save_adapter(make, root / kind / name, seed) for seed, name in enumerate(("poems", "code"))}
        for kind, make in MODELS.items()
    }


def alone(make, folders, request):
    """What `generate` writes with the adapter of a request and no other."""
    model = make()
    if request.adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(folders[request.adapter])).merge_and_unload()
    output = model.eval().generate(
        torch.tensor([request.input_ids]), max_new_tokens=request.max_new_tokens, **request.options
    )
    return output[0, len(request.input_ids) :].tolist()


def ask_of(adapter, *arguments, **options):
    request, events = ask(*arguments, **options)
    request.adapter = adapter
    return request, events


@pytest.mark.parametrize("kind", ["own", "adapted"])
@torch.no_grad()
def test_each_text_is_that_of_its_adapter_alone(kind, folders):
    model, rng = MODELS[kind](), random.Random(0)
    last = min(model.config.mask_token_id, 99)
    engine = Engine(model, EngineLimits(num_slots=4, max_length=96), Adapters(model, folders[kind]))
    # All begin alike, so that what a slot holds of another adapter would be of use, if it were not wrong.
    shared = [rng.randrange(1, last) for _ in range(21)]
    asked = []
    for seed in range(9):
        adapter = (None, "poems", "code")[seed % 3]
        asked.append(ask_of(adapter, shared + [rng.randrange(1, last)] * (seed % 2), 10, seed // 3))
        engine.submit(asked[-1][0])
        engine.step()
    run_all(engine)
    texts = [events[-1].token_ids for _, events in asked]
    assert texts == [alone(MODELS[kind], folders[kind], request) for request, _ in asked]
    # The same prompt and seed; the adapters make the difference.
    assert texts[0] != texts[1] and texts[1] != texts[2] and texts[0] != texts[2]
    # What is of the same adapter is still read once.
    assert engine.counts.reused_tokens > 0


@torch.no_grad()
def test_adapters_take_turns_however_many_requests_each_has(folders):
    model, rng = make_model(), random.Random(1)
    engine = Engine(model, EngineLimits(num_slots=8, max_length=96), Adapters(model, folders["own"]))
    many = [ask_of(None, prompt(rng, 3), 24, seed, eos_token_id=100) for seed in range(6)]
    few = [ask_of(name, prompt(rng, 3), 24, 9, eos_token_id=100) for name in ("poems", "code")]
    engine.submit(*(request for request, _ in (*many, *few)))
    for _ in range(3 * 12):
        engine.step()
    written = [
        sum(len(event.token_ids) for event in events if isinstance(event, Written)) for _, events in (*many, *few)
    ]
    # A token for each forward, and each adapter a third of the forwards; told are the blocks that are whole.
    assert written == [9] * 8
    run_all(engine)
    assert all(isinstance(events[-1], Ended) for _, events in (*many, *few))


@contextmanager
def serving(folders):
    model, tokenizer = make_tiny()
    with running(model, tokenizer, adapters=Adapters(model, folders["bytes"])) as (_, url):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0), tokenizer


def test_clients_name_an_adapter_after_the_model(folders):
    with serving(folders) as (client, tokenizer):
        names = [NAME, f"{NAME}:poems", f"{NAME}:code"]
        assert [card.id for card in client.models.list().data] == names
        assert client.models.retrieve(names[1]).id == names[1]
        ids = [tokenizer.bos_token_id, *tokenizer("hello", add_special_tokens=False)["input_ids"]]
        for name, adapter in zip(names, (None, "poems", "code"), strict=True):
            answer = client.completions.create(model=name, prompt="hello", max_tokens=12, seed=3)
            request = Request(ids, 12, print, {"seed": 3}, adapter=adapter)
            wanted = alone(MODELS["bytes"], folders["bytes"], request)
            assert answer.choices[0].text == tokenizer.decode(wanted, skip_special_tokens=True)
            assert answer.model == name
        for name in (f"{NAME}:prose", f"{NAME}:", "poems", f"other:{names[1]}"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.completions.create(model=name, prompt="hello")
            assert caught.value.code == "model_not_found" and caught.value.param == "model"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(f"{NAME}:prose")


def test_what_is_no_adapter_of_the_model_is_refused(folders, tmp_path, capsys):
    model = make_model()
    with pytest.raises(ValueError, match="`adapter` must have a name of letters, digits, '_' and '-', but got 'a.b'"):
        Adapters(model, {"a.b": folders["own"]["code"]})
    for folder in (folders["adapted"]["code"], tmp_path / "nothing"):
        with pytest.raises(ValueError, match="`adapter` 'code' must be a LoRA adapter of this model, but got "):
            Adapters(make_model(), {"code": folder})
    peft.PromptTuningConfig(num_virtual_tokens=2).save_pretrained(tmp_path / "soft")
    with pytest.raises(ValueError, match="`peft_type` must be one that changes layers, but got 'PROMPT_TUNING'"):
        Adapters(make_model(), {"soft": tmp_path / "soft"})
    engine = Engine(model, EngineLimits(num_slots=1, max_length=64))
    with pytest.raises(ValueError, match="`adapter` must be None for a model without adapters, but got 'code'"):
        engine.submit(ask_of("code", [1, 2])[0])
    engine = Engine(model, EngineLimits(num_slots=1, max_length=64), Adapters(model, folders["own"]))
    with pytest.raises(ValueError, match="`adapter` must be one of poems, code, but got 'prose'"):
        engine.submit(ask_of("prose", [1, 2])[0])
    assert parse_adapters(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for texts, message in ((["a"], "must be NAME=FOLDER"), (["=b"], "NAME=FOLDER"), (["a=b", "a=c"], "'a' twice")):
        with pytest.raises(ValueError, match=message):
            parse_adapters(texts)
    assert main(["serve", "nothing", "--adapter", "code"]) == 2
    assert "`adapter` must be NAME=FOLDER, but got 'code'" in capsys.readouterr().err.splitlines()[-1]
