"""The page in headless Chromium, served by a Space in a process without this package."""

import json
import time
from urllib.parse import urlsplit

import pytest
from conftest import random_model

from bd3lm_hf import evaluate_likelihood, train_tokenizer
from bd3lm_hf.hub.space import write_space


pytest.importorskip("gradio", reason="needs gradio: pip install 'bd3lm-hf[app]'")
pytest.importorskip("selenium", reason="needs selenium, to drive a browser")

from visitor import CHROMEDRIVER, CHROMIUM, Visitor, chromium, served  # noqa: E402


if CHROMIUM is None or CHROMEDRIVER is None:
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

# Notes the masks, the revealed tokens and their colours whenever the text changes.
OBSERVE = """
window.frames_seen = [];
const note = () => window.frames_seen.push([
    document.querySelectorAll("#text .masked").length,
    [...document.querySelectorAll("#text .token")].map(token => getComputedStyle(token).backgroundColor),
]);
const changes = {childList: true, subtree: true, characterData: true};
new MutationObserver(note).observe(document.querySelector("#text"), changes);
"""
TRICKY = "<script>document.title = 'run'</script> {{x}} ${7*7} <b>bold</b>"


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = train_tokenizer({"text": ["def main(path):\n    return\n"] * 9}, 280)
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 2}
    return random_model(vocab_size=len(tokenizer), max_position_embeddings=128, **ids), tokenizer


@pytest.fixture(scope="module")
def address(model_and_tokenizer, tmp_path_factory):
    """Where a Space of a tiny model is served."""
    folder = tmp_path_factory.mktemp("space")
    write_space(folder, *model_and_tokenizer, name="tiny")
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visitor(browser, address):
    return Visitor(browser, address)


def test_one_types_a_prompt_and_watches_the_blocks_being_denoised(visitor, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    visitor.browser.execute_script(OBSERVE)
    visitor.type("prompt", "def main")
    visitor.type("seed", "3")
    # A browser that is slow shows what came meanwhile at once.
    visitor.type("pause", "0.15")
    visitor.press("write")
    figures = visitor.finish()
    prompt = tokenizer("def main", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=64, top_p=0.9, seed=3, return_dict_in_generate=True)
    text = tokenizer.decode(expected.sequences[0, 1:], clean_up_tokenization_spaces=False)
    # Line ends are drawn by CSS; a token within a character is a dot.
    assert visitor.text("text").replace("\N{MIDDLE DOT}", "") == text.strip()

    seen = visitor.browser.execute_script("return window.frames_seen")
    masked = [number for number, _ in seen if number]
    assert len(set(masked)) > 20 and masked == sorted(masked, reverse=True) and seen[-1][0] == 0
    assert all(len(before) <= len(after) for (_, before), (_, after) in zip(seen, seen[1:]))
    # Four hues of more than one strength.
    assert len(seen[-1][1]) == 64 and len(set(seen[-1][1])) > 8

    assert (figures["new tokens"], figures["forwards"], figures["tokens/forward"]) == ("64", "64", "1.00")
    labels = expected.sequences.clone()
    labels[:, : prompt["input_ids"].shape[1]] = -100
    likelihood = evaluate_likelihood(model, expected.sequences.tolist(), labels=labels.tolist(), progress=False)
    assert figures["perplexity"] == f"{likelihood.perplexity:.1f}" and figures["seed"] == "3"


def test_one_switches_sampler_and_steps(visitor):
    visitor.type("prompt", "def main")
    assert not visitor.all("#denoising_steps")
    visitor.type("pause", "0")
    visitor.choose("confidence")
    visitor.until(lambda: visitor.all("#denoising_steps"))
    visitor.type("denoising_steps", "2")
    visitor.press("write")
    # 64 tokens behind a prompt that begins a block: all but the first and the last block are whole.
    assert 32 <= int(visitor.finish()["forwards"]) <= 35
    assert len(visitor.all("#legend .chip")) == 2 + 4
    visitor.type("confidence_threshold", "0.5")
    visitor.press("write")
    assert "`denoising_steps` and `confidence_threshold` are two rules" in visitor.error()


def test_one_fills_the_gaps_of_a_text(visitor):
    visitor.open_tab("Fill gaps")
    visitor.until(lambda: visitor.all("#gapped textarea")[0].is_displayed())
    visitor.type("gapped", "no gap")
    visitor.press("fill")
    assert visitor.error() == "`inputs` must mark gaps by '___', but got a text without one: 'no gap'"
    visitor.type("gapped", "def ___(path): return ___.")
    visitor.press("fill")
    assert visitor.finish()["new tokens"] == "8"
    text = visitor.text("text")
    assert text.startswith("def ") and "(path): return " in text and text.endswith(".") and "___" not in text
    assert len(visitor.all("#text .token")) == 8 and not visitor.all("#text .masked")


def test_what_is_typed_is_text_and_no_markup(visitor):
    visitor.type("pause", "0")
    visitor.type("prompt", TRICKY)
    visitor.press("write")
    visitor.finish()
    assert visitor.text("text").startswith(TRICKY)
    assert not visitor.all("#text b, #text script") and visitor.browser.title == "tiny: block diffusion"
    visitor.type("seed", "<b>1</b>")
    visitor.press("write")
    assert visitor.error() == "`seed` must be an integer or empty, but got '<b>1</b>'."


def stays(visitor, name, seconds):
    before = visitor.text(name)
    time.sleep(seconds)
    return visitor.text(name) == before


def test_one_stops_a_text_and_starts_another(visitor):
    visitor.type("pause", "1")
    visitor.type("prompt", "def main")
    visitor.press("write")
    visitor.until(lambda: visitor.all("#text .token"))
    visitor.press("stop_write")
    visitor.type("pause", "0")
    visitor.until(lambda: stays(visitor, "figures", seconds=2.4))
    assert "nats per token" not in visitor.text("figures")
    visitor.press("write")
    assert visitor.finish()["new tokens"] == "64"


def test_the_page_asks_no_other_machine_and_has_no_errors(browser, address):
    browser.get_log("performance")
    Visitor(browser, f"{address}/?__theme=dark")
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in requests if event["method"] == "Network.requestWillBeSent"]
    hosts = {urlsplit(url).netloc for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {urlsplit(address).netloc}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
