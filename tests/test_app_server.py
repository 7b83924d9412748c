"""The page before a server: what it shows is what the server writes, for several visitors at once."""

import re
import time
from html import unescape

import pytest
import torch
from serving import KEY, NAME, make_tiny, running

from bd3lm_hf import TextInfillingPipeline
from bd3lm_hf.cli import main
from bd3lm_hf.serving.engine import EngineLimits


pytest.importorskip("gradio", reason="needs gradio: pip install 'bd3lm-hf[app]'")

from bd3lm_hf.app import launch_options  # noqa: E402
from bd3lm_hf.app.remote import Client, RemoteWriter, make_server_page  # noqa: E402


# Sampler, steps, remasking, threshold, bound, temperature, top-p, seed, delay.
CHOICES = ["first_hitting", "", 0, "", 1, 1, 0.9, "5", 0]
OPTIONS = {"temperature": 1.0, "top_p": 0.9, "seed": 5}


@pytest.fixture(scope="module")
def tiny():
    return make_tiny()


@pytest.fixture(scope="module")
def server(tiny):
    with running(*tiny, EngineLimits(num_slots=8, max_length=512)) as served:
        yield served


@pytest.fixture(scope="module")
def writer(server):
    return RemoteWriter(Client(f"{server[1]}/v1", KEY))


def alone(tiny, ids, **options):
    model, tokenizer = tiny
    return tokenizer.decode(model.generate(torch.tensor([ids]), **options)[0, len(ids) :], skip_special_tokens=True)


def encode(tiny, text):
    return [tiny[1].bos_token_id, *tiny[1](text, add_special_tokens=False)["input_ids"]]


def shown(html):
    """The text that a visitor sees."""
    return unescape(re.sub("<[^>]*>", "", html)).replace("\N{MIDDLE DOT}", "")


def test_the_page_shows_the_text_of_generate_and_its_drafts(tiny, writer):
    steps = [*writer.write("def main(", 12, *CHOICES)]
    assert shown(steps[-1][0]) == "def main(" + alone(tiny, encode(tiny, "def main("), max_new_tokens=12, **OPTIONS)
    # One token is revealed at each forward, so that every number of masked ones is seen.
    assert {1, 2, 3} <= {html.count('class="masked"') for html, _, _ in steps}
    figures = shown(steps[-1][2])
    assert "12new tokens" in figures and "12forwards" in figures and "5seed" in figures
    assert "need the model itself" in figures


def test_choices_are_those_of_generate(tiny, writer):
    choices = ["confidence", "2", 0, "", 1, 0, 0.9, "", 0]
    *_, (html, _, figures) = writer.write("abc", 8, *choices)
    options = {"sampler": "confidence", "denoising_steps": 2, "do_sample": False}
    assert shown(html) == "abc" + alone(tiny, encode(tiny, "abc"), max_new_tokens=8, **options)
    assert "4forwards" in shown(figures)


def test_a_chat_has_its_turns(tiny, writer):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    *_, (after, figures) = writer.chat("and?", 10, turns, *CHOICES)
    asked = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    asked.append({"role": "user", "content": "and?"})
    ids = tiny[1].apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert after == [*asked, {"role": "assistant", "content": alone(tiny, ids, max_new_tokens=10, **OPTIONS)}]
    assert "10new tokens" in shown(figures)


def test_gaps_are_filled(tiny, writer):
    *_, (html, _, figures) = writer.fill("def ___(x): ___", 3, *CHOICES)
    pipeline = TextInfillingPipeline(model=tiny[0], tokenizer=tiny[1])
    assert shown(html) == pipeline("def ___(x): ___", placeholder="___", gap_length=3, **OPTIONS)["text"]
    assert html.count('class="block"') == 2 and "6new tokens" in shown(figures)


def test_what_is_refused_is_a_message(writer):
    for steps, message in (
        (writer.write("x" * 30_000, 4, *CHOICES), "at most 20,000 characters"),
        (writer.write("x" * 600, 4, *CHOICES), "`prompt` must have 1 to 512 tokens"),
        (writer.write("x", 4, "confidence", "", 0, "much", 1, 1, 0.9, "", 0), "must be a number or empty"),
        (writer.write("x", 4, "confidence", "", 0, "7", 1, 1, 0.9, "", 0), "confidence_threshold"),
        (writer.fill("no gap", 4, *CHOICES), "must mark gaps"),
    ):
        *_, (html, _, figures) = steps
        assert message in shown(html) and 'role="alert"' in html and figures == ""
    *_, (turns, figures) = writer.chat("x" * 600, 4, [], *CHOICES)
    assert turns == [] and "must have 1 to 512 tokens" in shown(figures)


def test_a_server_that_does_not_answer_as_it_should_is_told_of(server, capsys):
    with pytest.raises(ValueError, match="API key is wrong or missing"):
        Client(server[1], "wrong")
    with pytest.raises(ValueError, match=f"`model` must be one of '{NAME}' at .*, but got 'other'"):
        Client(server[1], KEY, "other")
    assert main(["app", "--server", "http://127.0.0.1:9"]) == 2
    assert "The server at http://127.0.0.1:9 does not answer" in capsys.readouterr().err
    assert main(["app", "--server", server[1], "--device", "cpu"]) == 2
    assert "`device` must not go with `server`" in capsys.readouterr().err
    assert main(["app"]) == 2
    assert "`model` must be a checkpoint, or `server` an address" in capsys.readouterr().err


def test_several_visitors_are_written_for_at_once(tiny, server, monkeypatch):
    from gradio_client import Client as Visitor

    engine, url = server
    forward, most, end = engine._forward, 0, time.monotonic() + 60

    def forward_for_two(rows):
        # A text may be at its end before another visitor's has begun: so the first waits for the second.
        nonlocal most
        most = max(most, engine.num_running)
        forward(rows) if most > 1 or time.monotonic() > end else time.sleep(0.001)

    monkeypatch.setattr(engine, "_forward", forward_for_two)
    page = make_server_page(Client(url, KEY))
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        visitor = Visitor(address, verbose=False, httpx_kwargs={"timeout": 120})
        jobs = [
            visitor.submit(f"visitor {number}", 60, *CHOICES[:-2], str(number), 0, api_name="/write")
            for number in range(4)
        ]
        for number, job in enumerate(jobs):
            ids, options = encode(tiny, f"visitor {number}"), OPTIONS | {"seed": number}
            assert shown(job.result()[0]) == f"visitor {number}" + alone(tiny, ids, max_new_tokens=60, **options)
        assert most > 1
    finally:
        page.close()


def test_the_command_serves_the_page_of_a_server(server, monkeypatch):
    import gradio

    launched = []
    monkeypatch.setenv("BD3LM_API_KEY", KEY)
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched.append(page))
    assert main(["app", "--server", server[1]]) == 0
    assert launched[0].title == f"{NAME}: block diffusion"
    assert {function.api_name for function in launched[0].fns.values()} >= {"write", "chat", "fill"}


def test_a_visitor_who_leaves_frees_the_slot(server, writer):
    steps = writer.write("x", 400, *CHOICES)
    next(steps)
    steps.close()
    end = time.monotonic() + 60
    while server[0].num_running:
        assert time.monotonic() < end
        time.sleep(0.01)
