"""The app: frames are what `generate` reveals, figures are those of the package, and nothing shown is markup."""

import json
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import random_model
from pages import DOCS, commands
from transformers import pipeline

from bd3lm_hf import SAMPLERS, evaluate_likelihood, train_tokenizer
from bd3lm_hf.cli import main
from bd3lm_hf.modeling.samplers_block_diffusion import SAMPLER_ARGUMENTS


pytest.importorskip("gradio", reason="needs gradio: pip install 'bd3lm-hf[app]'")

from bd3lm_hf.app import drawing, frames, likelihood, writing  # noqa: E402


# Sampler, steps, remasking, threshold, bound, temperature, top_p, seed and pace.
CHOICES = ("first_hitting", "", 0, "", 0, 1, 0.9, "3", 0)
SAMPLER_OPTIONS = [
    {"sampler": "first_hitting"},
    {"sampler": "ancestral", "denoising_steps": 3},
    {"sampler": "ancestral", "denoising_steps": 6, "remask_cap": 0.5},
    {"sampler": "confidence", "denoising_steps": 2},
    {"sampler": "entropy_bound", "entropy_bound": 6.0},
]


@pytest.fixture(scope="module")
def filler():
    """The pipeline of a tiny model with a byte-level tokenizer, one of whose tokens is `<script>`."""
    tokenizer = train_tokenizer({"text": ["def main(path):\n    return\n"] * 9}, 280)
    tokenizer.add_tokens(["<script>"])
    model = random_model(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=2,
    )
    return pipeline("text-infilling", model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture
def writer(filler):
    return writing.Writer(filler)


class Page(HTMLParser):
    """What HTML shows: its text, and the classes, styles and titles of its elements."""

    def __init__(self, html):
        super().__init__()
        self.text, self.elements = "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of_class(self, name):
        return [attrs for _, attrs in self.elements if name in attrs.get("class", "").split()]


def prompt_of(model, length=6, gaps=()):
    prompt = torch.randint(
        4, model.config.vocab_size - 1, (1, length), generator=torch.Generator().manual_seed(length)
    )
    prompt[:, list(gaps)] = model.config.mask_token_id
    return prompt


@pytest.mark.parametrize("options", SAMPLER_OPTIONS)
@pytest.mark.parametrize("infill", [False, True])
def test_frames_are_what_generate_reveals(filler, options, infill):
    model = filler.model
    prompt = prompt_of(model, 11, gaps=[1, 4, 5, 6, 10] if infill else [])
    options = {**options, "seed": 5, **({"infill": True} if infill else {"max_new_tokens": 9})}
    expected = model.generate(prompt, return_dict_in_generate=True, output_reveal=True, **options)
    shown = list(frames.watch(model, prompt, **options))
    *before, last = shown
    assert torch.equal(last.tokens, expected.sequences[0]) and torch.equal(last.reveal_steps, expected.reveal_steps[0])
    assert torch.equal(last.probabilities.isnan(), last.is_given)
    assert [frame.is_last for frame in shown] == [False] * len(before) + [True]
    assert last.num_forwards == int(expected.num_forward_passes[0])
    assert last.is_given.tolist() == [token != model.config.mask_token_id for token in prompt[0]] + [False] * (
        0 if infill else 9
    )
    remasks = "remask_cap" in options
    for frame in before:
        revealed = frame.tokens != model.config.mask_token_id
        if not remasks:
            # Known are the given tokens, and those of the forwards so far.
            assert torch.equal(revealed, last.reveal_steps <= frame.num_forwards)
            assert torch.equal(frame.tokens[revealed], last.tokens[revealed])
    masked = [int((frame.tokens == model.config.mask_token_id).sum()) for frame in shown]
    assert masked[-1] == 0 and (remasks or masked == sorted(masked, reverse=True))
    if remasks and not infill:
        assert masked != sorted(masked, reverse=True)


def test_a_streamer_is_shown_what_is_revealed_only_where_that_is_recorded(filler):
    class Streamer(frames.BaseStreamer):
        calls = []

        def put(self, value): ...

        def end(self): ...

        def put_reveal(self, tokens, reveal_steps, token_probabilities):
            self.calls.append((tokens.shape, reveal_steps.shape, token_probabilities.shape))

    prompt = prompt_of(filler.model).repeat(2, 1)
    filler.model.generate(prompt, max_new_tokens=3, streamer=Streamer())
    assert Streamer.calls == []
    record = {"return_dict_in_generate": True, "output_reveal": True}
    filler.model.generate(prompt, max_new_tokens=3, streamer=Streamer(), **record)
    assert Streamer.calls == [((2, 9),) * 3] * 3


def test_generate_ends_when_nobody_watches_any_more(filler, monkeypatch):
    put_reveal, steps = frames.FrameStreamer.put_reveal, []

    def waits_for_the_end_of_watching(streamer, *args):
        steps.append(threading.current_thread())
        deadline = time.monotonic() + 60
        while len(steps) == 2 and streamer.is_watched and time.monotonic() < deadline:
            time.sleep(0.01)
        put_reveal(streamer, *args)

    monkeypatch.setattr(frames.FrameStreamer, "put_reveal", waits_for_the_end_of_watching)
    watched = frames.watch(filler.model, prompt_of(filler.model), max_new_tokens=26)
    next(watched)
    watched.close()
    assert len(steps) == 2 and not steps[0].is_alive()


def test_what_generate_refuses_is_raised_where_one_watches(filler):
    with pytest.raises(ValueError, match="`denoising_steps` must be an integer >= 1, but got 0"):
        list(frames.watch(filler.model, prompt_of(filler.model), max_new_tokens=2, denoising_steps=0))


def test_pieces_add_up_to_the_text_and_hold_whole_characters(filler):
    tokenizer = filler.tokenizer
    ids = [token for char in "aé漢🧩\n b" for token in tokenizer.convert_tokens_to_ids(list_of_bytes(char))]
    pieces = drawing.pieces_of(ids, tokenizer)
    assert len(pieces) == len(ids) and "".join(pieces) == "aé漢🧩\n b"
    assert [piece for piece in pieces if piece] == list("aé漢🧩\n b")
    # What ends within a character says so.
    assert drawing.pieces_of(ids[:2], tokenizer) == ["a", "\N{REPLACEMENT CHARACTER}"]


def list_of_bytes(text):
    """The byte-level tokens of each byte of a text."""
    from tokenizers.pre_tokenizers import ByteLevel

    (pre_tokenized,) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return list(pre_tokenized[0])


def test_nothing_of_a_text_is_markup(filler):
    tokenizer = filler.tokenizer
    text = "<script>alert(1)</script> <b title='\"'>&amp;\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.convert_tokens_to_ids("<script>")
    frame = frames.Frame(
        tokens=torch.tensor(ids),
        is_given=torch.arange(len(ids)) >= len(ids) - 3,
        reveal_steps=torch.arange(len(ids)) + 1,
        probabilities=torch.full((len(ids),), 0.5),
        num_forwards=len(ids) - 3,
        seconds=1.0,
        is_last=True,
    )
    html = drawing.draw_text(frame, tokenizer, mask_token_id=99999, block_size=4, forwards_per_block=4)
    page = Page(html)
    assert page.text == text and {tag for tag, _ in page.elements} == {"div", "span"}
    error = Page(drawing.draw_error("<script> & <b>"))
    assert error.text == "<script> & <b>" and {tag for tag, _ in error.elements} == {"div"}


def test_colours_say_when_a_token_was_revealed_and_how_probable_it_was():
    tokenizer = train_tokenizer({"text": ["abc"]}, 260)
    mask = tokenizer.mask_token_id
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    frame = frames.Frame(
        tokens=torch.tensor([0, a, b, c, a, mask, c, mask]),
        is_given=torch.tensor([True, True, *[False] * 6]),
        reveal_steps=torch.tensor([0, 0, 2, 1, 3, 0, 4, 0]),
        probabilities=torch.tensor([torch.nan, torch.nan, 1.0, 1e-3, 0.1, torch.nan, 1e-9, torch.nan]),
        num_forwards=4,
        seconds=1.0,
        is_last=False,
    )
    page = Page(
        drawing.draw_text(frame, tokenizer, mask_token_id=mask, block_size=4, forwards_per_block=4, num_hidden=1)
    )
    assert page.text == "abcac" and len(page.of_class("masked")) == 2 and len(page.of_class("block")) == 2
    styles = [re.fullmatch(r"--h:(\d+);--a:([\d.]+)", token["style"]).groups() for token in page.of_class("token")]
    hues, strengths = zip(*((int(hue), float(strength)) for hue, strength in styles))
    # The second, first, first and second forward of their blocks.
    assert hues[0] == hues[3] != hues[1] == hues[2] == drawing.FIRST_HUE
    assert strengths == (1.0, 0.15, 0.72, 0.15)
    assert [token["class"] for token in page.of_class("token")] == ["token"] * 3 + ["token now"]
    assert page.of_class("token")[0]["title"] == "'b': forward 2 of its block, 2 of the text, probability 1"
    chips = Page(drawing.draw_legend(4)).of_class("chip")
    assert chips[0]["style"] == f"--h:{drawing.FIRST_HUE};--a:1.00" and chips[3]["style"].startswith("--h:30;")
    assert len(Page(drawing.draw_legend(100)).of_class("chip")) == drawing.MOST_CHIPS + 4


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_the_perplexity_is_that_of_the_package(block_size):
    model = random_model(block_size=block_size)
    tokens = prompt_of(model, 15)[0]
    gaps = torch.isin(torch.arange(15), torch.tensor([0, 4, 5, 9]))
    for is_new in (torch.arange(15) > 6, gaps):
        measured = likelihood.likelihood_of_new_tokens(model, tokens, is_new)
        labels = tokens.masked_fill(~is_new, -100)
        expected = evaluate_likelihood(
            model, [tokens.tolist()], labels=[labels.tolist()], estimator="exact", progress=False
        )
        assert measured.nelbo == pytest.approx(expected.nelbo, rel=1e-5)
        assert measured.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert measured.is_exact and measured.standard_error == 0
        assert measured.is_bound == (block_size > 1)
    with pytest.raises(ValueError, match="`is_new` must mark at least one token"):
        likelihood.likelihood_of_new_tokens(model, tokens, torch.zeros(15, dtype=torch.bool))


@pytest.mark.parametrize("overrides", [{"block_size": 8}, {"block_size": 4, "time_conditioning": True}])
def test_the_perplexity_of_large_blocks_is_drawn_and_says_how_well_it_is_known(overrides):
    model = random_model(**overrides)
    tokens = prompt_of(model, 15)[0]
    is_new = torch.arange(15) > 5
    state = torch.get_rng_state()
    drawn = likelihood.likelihood_of_new_tokens(model, tokens, is_new)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn == likelihood.likelihood_of_new_tokens(model, tokens, is_new)
    estimator = "stratified" if model.config.time_conditioning else "exact"
    labels = tokens.masked_fill(~is_new, -100)
    expected = evaluate_likelihood(
        model, [tokens.tolist()], labels=[labels.tolist()], estimator=estimator, num_draws=200, progress=False
    )
    assert 0 < drawn.standard_error < 0.3 * drawn.nelbo and not drawn.is_exact and drawn.is_bound
    assert abs(drawn.nelbo - expected.nelbo) < 4 * drawn.standard_error + 4 * expected.draw_standard_error


def test_the_page_offers_the_samplers_of_the_package_and_their_arguments():
    assert list(writing.SAMPLERS) == list(SAMPLERS)
    for name, samplers in writing.TAKEN_BY.items():
        assert list(samplers) == [sampler for sampler, names in SAMPLER_ARGUMENTS.items() if name in names]


def test_writing_goes_from_masks_to_the_text_and_its_figures(writer, filler):
    shown = list(writer.write("def main", 7, *CHOICES))
    prompt = filler.tokenizer("def main", return_tensors="pt")
    expected = filler.model.generate(**prompt, max_new_tokens=7, top_p=0.9, seed=3, return_dict_in_generate=True)
    first, last = Page(shown[0][0]), Page(shown[-1][0])
    assert len(first.of_class("masked")) == 6 and not last.of_class("masked")
    text = filler.tokenizer.decode(expected.sequences[0, 1:], clean_up_tokenization_spaces=False)
    assert last.text.replace("\N{MIDDLE DOT}", "") == text
    figures = figures_of(shown[-1][2])
    assert (figures["new tokens"], figures["forwards"], figures["seed"]) == ("7", "7", "3")
    assert figures["tokens/forward"] == f"{expected.tokens_per_forward.item():.2f}"
    labels = expected.sequences[0].clone()
    labels[: prompt["input_ids"].shape[1]] = -100
    likelihood = evaluate_likelihood(
        filler.model, expected.sequences.tolist(), labels=[labels.tolist()], progress=False
    )
    assert likelihood.estimator == "exact" and figures["perplexity"] == f"{likelihood.perplexity:.1f}"
    assert figures_of(shown[0][2])["perplexity"] == "\N{NO-BREAK SPACE}"


def figures_of(html):
    """The figures by name, off what `draw_figures` makes."""
    cards = re.findall(r'<div class="value">(.*?)</div><div class="name">(.*?)</div>', html)
    return {name: Page(value).text for value, name in cards}


def test_steps_and_gaps_reach_generate(writer, filler):
    fast = ("confidence", "2", 0, "", 0, 0, 0.9, "3", 0)
    *_, (_, legend, figures) = writer.write("def main", 8, *fast)
    # Three blocks, of which the first begins with the prompt.
    assert 1.3 <= float(figures_of(figures)["tokens/forward"]) <= 2
    assert len(Page(legend).of_class("chip")) == 2 + 4
    *_, (html, _, figures) = writer.fill("def ___(path):\n    ___", 3, *CHOICES)
    assert figures_of(figures)["new tokens"] == "6"
    page = Page(html)
    assert page.text.startswith("def ") and "(path):\n    " in page.text and len(page.of_class("token")) == 6
    *_, (_, _, figures) = writer.fill("def [MASK][MASK](path)", 5, *CHOICES)
    assert figures_of(figures)["new tokens"] == "2"


def test_gaps_are_not_filled_with_special_tokens(writer, filler, monkeypatch):
    special_ids = filler.tokenizer.all_special_ids
    likely = filler.model.lm_head.bias.detach().index_fill(0, torch.tensor(special_ids), 50.0)
    monkeypatch.setattr(filler.model.lm_head.bias, "data", likely)
    shown = {}
    for mode, text in (("fill", "def ___"), ("write", "def ")):
        *_, (html, _, _) = getattr(writer, mode)(text, 8, *CHOICES)
        shown[mode] = any(token in Page(html).text for token in filler.tokenizer.all_special_tokens)
    assert shown == {"fill": False, "write": True}


@pytest.mark.parametrize(
    ("mode", "text", "changed", "message"),
    [
        ("fill", "nothing", {}, "`inputs` must mark gaps by '___', but got a text without one: 'nothing'"),
        ("write", "a [MASK]", {}, "`input_ids` must not hold the mask token"),
        ("write", "a", {0: "confidence", 1: "2", 3: "0.9"}, "two rules of the 'confidence' sampler of which one"),
        ("write", "a", {0: "confidence", 3: "2"}, "`confidence_threshold` must be in (0, 1], but got 2.0"),
        ("write", "a", {0: "ancestral", 1: "two"}, "`denoising_steps` must be an integer or empty, but got 'two'"),
        (
            "write",
            "a",
            {0: "confidence", 3: "much"},
            "`confidence_threshold` must be a number or empty, but got 'much'",
        ),
        (
            "write",
            "a",
            {0: "ancestral", 1: "1" + 19 * "0"},
            "`denoising_steps` must be at most 1000 here, but got 10000000000000000000",
        ),
        ("write", "a", {7: "-1"}, "`seed` must be an integer >= 0"),
    ],
)
def test_what_is_refused_is_a_message_in_place_of_the_text(writer, mode, text, changed, message):
    choices = [changed.get(index, choice) for index, choice in enumerate(CHOICES)]
    *_, (html, legend, figures) = getattr(writer, mode)(text, 4, *choices)
    page = Page(html)
    assert message in page.text and [attrs.get("role") for _, attrs in page.elements] == [None, "alert"]
    assert legend == figures == ""


def test_arguments_of_other_samplers_count_for_nothing(writer):
    *_, (html, _, _) = writer.write("a", 4, "first_hitting", "2", 0.5, "0.9", 3, 1, 0.9, "", 0)
    assert not Page(html).of_class("bd3lm-error")


@pytest.fixture(scope="module")
def checkpoint(filler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "it's"
    for part in (filler.model, filler.tokenizer):
        part.save_pretrained(folder)
    return folder


def test_the_command_serves_the_page_of_a_checkpoint(checkpoint, monkeypatch):
    import gradio

    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched.append((page, options)))
    assert main(["app", str(checkpoint), "--port", "7777", "--device", "cpu"]) == 0
    ((page, options),) = launched
    assert (options["server_name"], options["server_port"]) == ("127.0.0.1", 7777)
    assert page.title == "it's: block diffusion" and not page.analytics_enabled
    assert {dependency.api_name for dependency in page.fns.values()} >= {"write", "fill"}


@pytest.fixture
def served_page(filler):
    """The address of a page, and the folder in which gradio keeps files."""
    from bd3lm_hf.app import launch_options, make_page

    page = make_page(filler, "tiny")
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **launch_options())
    yield address.rstrip("/"), Path(page.app.uploaded_file_dir)
    page.close()


def post(address, body, content_type="application/json"):
    """The status and the content of the answer to a request."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, data=body, headers={"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_page_takes_no_files(served_page):
    address, folder = served_page
    secret = f"no file {time.time_ns()}"
    head = 'Content-Disposition: form-data; name="files"; filename="a.txt"'
    form = f"--border\r\n{head}\r\nContent-Type: text/plain\r\n\r\n{secret}\r\n--border--\r\n".encode()
    for path in ("upload", "upload/", "upload?upload_id=1", "process_recording", "component_server", "call/write"):
        for start in ("", "/gradio_api"):
            status, answer = post(f"{address}{start}/{path}", form, "multipart/form-data; boundary=border")
            assert (status, answer) == (403, "This page takes no files.")
    assert post(f"{address}/gradio_api/upload", secret.encode(), "text/plain")[0] == 403
    # Gradio would take a file by its path or address, too.
    for named in ({"path": "/etc/hostname"}, {"path": "x", "url": f"{address}/config"}):
        data = [{**named, "meta": {"_type": "gradio.FileData"}}, 4, *CHOICES]
        body = json.dumps({"data": data})
        for spelled in (body, body.replace("gradio.", "gradio\\u002e")):
            assert post(f"{address}/gradio_api/call/write", spelled.encode())[0] == 403
    assert post(f"{address}/gradio_api/call/write", b" " * 1_000_001)[0] == 413
    kept = [path for path in folder.rglob("*") if path.is_file() and secret in path.read_text(errors="replace")]
    assert kept == []


def test_the_page_takes_texts(served_page):
    address, _ = served_page
    status, answer = post(f"{address}/gradio_api/call/fill", {"data": ["def ___", 4, *CHOICES]})
    assert status == 200
    event = json.loads(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/fill/{event}", timeout=60) as answer:
        assert "nats per token" in answer.read().decode()


def test_a_space_is_written_into_a_new_folder_alone(checkpoint, tmp_path, capsys):
    folder = tmp_path / "space"
    command = ["app", str(checkpoint), "--device", "cpu", "--space", str(folder)]
    assert main(command) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"app.py", "requirements.txt", "README.md", ".gitattributes", "model", "denoising_page"}
    _, front_matter, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(front_matter)
    import gradio

    assert (settings["sdk"], settings["sdk_version"]) == ("gradio", gradio.__version__)
    assert settings["app_file"] == "app.py" and settings["title"] == "it's"
    required = (folder / "requirements.txt").read_text().split()
    assert {re.split("[>=<]", line)[0] for line in required} == {"torch", "transformers", "numpy", "safetensors"}
    compile((folder / "app.py").read_text(encoding="utf-8"), "app.py", "exec")
    assert main(command) == 2
    assert f"`--space` must be a new or an empty folder, but {folder} holds" in capsys.readouterr().err


def test_the_commands_of_the_page_on_the_app_run(checkpoint, monkeypatch, tmp_path):
    import gradio

    (tmp_path / "bd3lm-demo").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched.append(page.title))
    card = {"id": "of a server", "block_size": 4, "max_model_len": 64}
    monkeypatch.setattr("bd3lm_hf.app.remote.Client", lambda url, *_: SimpleNamespace(url=url, card=card))
    assert [main(words) for words in commands(DOCS / "app.md")] == [0, 0, 0]
    assert launched == ["bd3lm-demo: block diffusion", "of a server: block diffusion"]
    assert (tmp_path / "my-space" / "app.py").is_file()


def test_without_gradio_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("bd3lm_hf.app")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"The app needs gradio: pip install 'bd3lm-hf\[app\]'"):
        import bd3lm_hf.app  # noqa: F401
