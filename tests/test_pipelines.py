"""Pipelines: text generation with chats, batches and a streamer; infilling here, and where only the checkpoint is."""

import json
import math
import shutil

import pytest
import torch
from conftest import random_model
from test_hub import run_without_the_package, word_tokenizer
from transformers import PreTrainedTokenizerFast, TextStreamer, pipeline

from bd3lm_hf import BD3LMForMaskedLM, BD3LMGenerationConfig, TextInfillingPipeline, train_tokenizer


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = [{"role": "user", "content": "What is a block?"}]
GREEDY = {"sampler": "confidence", "do_sample": False}
TEXT = "def main(argv):\n    print('Grüße')  # naïve\n    return 0\n" * 4


@pytest.fixture(scope="module")
def tokenizer():
    trained = train_tokenizer({"text": [TEXT, "user: What is a block?\nassistant: A part of the text.\n"]}, 320)
    trained.chat_template = TEMPLATE
    return trained


@pytest.fixture(scope="module")
def model(tokenizer):
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return random_model(vocab_size=len(tokenizer), attn_implementation="sdpa", **ids)


@pytest.fixture
def generate(model, tokenizer):
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture
def fill(model, tokenizer):
    return pipeline("text-infilling", model=model, tokenizer=tokenizer, device="cpu")


# text generation


def test_a_chat_is_answered_with_what_generate_writes_behind_the_template(generate, model, tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=12, **GREEDY)[0, prompt["input_ids"].shape[1] :]
    expected = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
    assert expected["content"]
    (output,) = generate(CHAT, max_new_tokens=12, **GREEDY)
    assert output["generated_text"] == [*CHAT, expected]
    (again,) = generate([*CHAT, {"role": "assistant", "content": "A part"}], max_new_tokens=4, **GREEDY)
    assert len(again["generated_text"]) == 2 and again["generated_text"][-1]["content"].startswith("A part")


def test_chats_and_texts_of_a_batch_get_what_they_get_alone(generate):
    chats = [CHAT, [{"role": "user", "content": "def main(argv): what is it?"}], CHAT + CHAT]
    for prompts in (chats, ["def", "print('Grüße')  # naïve", "return 0"]):
        alone = [generate(prompt, max_new_tokens=10, **GREEDY) for prompt in prompts]
        assert generate(prompts, max_new_tokens=10, batch_size=3, **GREEDY) == alone


def test_a_streamer_is_handed_through_and_prints_the_new_text(generate, tokenizer, capsys):
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (output,) = generate("def main", max_new_tokens=12, return_full_text=False, streamer=streamer, **GREEDY)
    assert output["generated_text"] and capsys.readouterr().out == output["generated_text"] + "\n"


def test_several_texts_stop_strings_and_what_generate_tells_besides(generate, tokenizer):
    outputs = generate("def main", max_new_tokens=8, num_return_sequences=3, seed=1)
    assert len({output["generated_text"] for output in outputs}) == 3
    # Bytes of cut characters are no text to stop at.
    vocabulary = range(len(tokenizer))
    plain = {"suppress_tokens": [token for token in vocabulary if not tokenizer.decode([token]).isalnum()], "seed": 4}
    (text,) = generate("def main", max_new_tokens=24, return_full_text=False, **plain)
    (ids,) = generate("def main", max_new_tokens=24, return_tensors=True, **plain)
    # Of one token: early versions of Transformers stop at each token of a sequence.
    stop = tokenizer.decode(ids["generated_token_ids"][-18])
    (cut,) = generate("def main", max_new_tokens=24, return_full_text=False, stop_sequence=stop, **plain)
    assert text["generated_text"].startswith(cut["generated_text"]) and stop in cut["generated_text"]
    assert len(cut["generated_text"]) < len(text["generated_text"])
    (output,) = generate("def", max_new_tokens=6, return_dict_in_generate=True, output_reveal=True, **GREEDY)
    # Early versions of Transformers leave a dimension of the sequences of one text.
    passes, reveal_steps = (torch.tensor(output[name]).flatten() for name in ("num_forward_passes", "reveal_steps"))
    assert passes.tolist() == [6] and sorted(reveal_steps.tolist())[-6:] == [1, 2, 3, 4, 5, 6]


# infilling


def test_gaps_are_filled_and_the_given_text_stays(fill, tokenizer):
    text = "def main([MASK][MASK]):\n    print('Grüße')[MASK]# naïve\n[MASK][MASK][MASK]"
    output = fill(text, seed=0)
    assert [len(span["token_ids"]) for span in output["spans"]] == [2, 1, 3]
    rebuilt, end = "", 0
    given = ["def main(", "):\n    print('Grüße')", "# naïve\n", ""]
    for before, span in zip(given, output["spans"]):
        assert output["text"][end : span["start"]] == before
        assert output["text"][span["start"] : span["end"]] == span["text"] == tokenizer.decode(span["token_ids"])
        rebuilt, end = rebuilt + before + span["text"], span["end"]
    assert rebuilt + given[-1] == output["text"]
    assert not set(tokenizer.all_special_ids) & {token for span in output["spans"] for token in span["token_ids"]}


def test_scores_are_the_probabilities_of_the_tokens_when_they_were_revealed(fill, model, tokenizer):
    before = [tokenizer.bos_token_id, *tokenizer("def main(", add_special_tokens=False)["input_ids"]]
    behind = tokenizer("):\n", add_special_tokens=False)["input_ids"]
    span = fill("def main([MASK][MASK]):\n", temperature=0.3, **{**GREEDY, "do_sample": True}, seed=5)["spans"][0]
    ids = torch.tensor([before + span["token_ids"] + behind])
    masks = [len(before), len(before) + 1]
    expected = {}
    for first, second in (masks, masks[::-1]):
        # Revealed in this order: the first with both masked, the second with the other known.
        scores = {}
        for position, hidden in ((first, masks), (second, [second])):
            x_t = ids.index_fill(1, torch.tensor(hidden), tokenizer.mask_token_id)
            with torch.no_grad():
                logits = model(x_t).logits[0, position]
            logits[tokenizer.mask_token_id] = -torch.inf
            scores[position] = logits.softmax(-1)[ids[0, position]].item()
        expected[first] = [scores[position] for position in masks]
    assert any(span["token_scores"] == pytest.approx(scores, rel=1e-4) for scores in expected.values())
    assert span["score"] == pytest.approx(math.sqrt(math.prod(span["token_scores"])))


def test_a_placeholder_marks_gaps_of_any_lengths(fill):
    marked = "def main(...):\n    return ...\n"
    masked = "def main([MASK][MASK]):\n    return [MASK][MASK][MASK]\n"
    expected = fill(masked, **GREEDY)
    assert fill(marked, placeholder="...", gap_length=[2, 3], **GREEDY) == expected
    assert fill({"text": marked, "gap_length": [2, 3]}, placeholder="...", **GREEDY) == expected
    assert [len(span["token_ids"]) for span in fill("a [MASK] b", gap_length=5)["spans"]] == [5]
    assert len(fill("a ....", placeholder="..", gap_length=2)["spans"]) == 1


def test_texts_of_a_batch_are_filled_as_they_are_alone(fill):
    texts = [
        "def [MASK](argv)",
        "[MASK][MASK]",
        {"text": "print(_)  # naïve", "gap_length": 6},
        "a longer text [MASK]",
    ]
    texts[2]["text"] = texts[2]["text"].replace("_", "[MASK]")
    alone = [fill(text, **GREEDY) for text in texts]
    batched = fill(texts, batch_size=3, **GREEDY)
    for one, other in zip(alone, batched):
        for span, same in zip(one["spans"], other["spans"], strict=True):
            assert span.pop("token_scores") == pytest.approx(same.pop("token_scores"), rel=1e-4)
            assert span.pop("score") == pytest.approx(same.pop("score"), rel=1e-4)
    assert alone == batched
    assert list(fill(iter_texts(texts), **GREEDY))[3]["text"] == alone[3]["text"]


def iter_texts(texts):
    yield from texts


def test_several_fillings_of_one_text(fill):
    outputs = fill("def [MASK][MASK][MASK](argv)", num_return_sequences=4, seed=2)
    assert len({output["text"] for output in outputs}) == 4
    several = fill(["def [MASK]", "[MASK][MASK] argv"], num_return_sequences=2, batch_size=2)
    assert [len(outputs) for outputs in several] == [2, 2]
    assert all(output["text"].endswith(" argv") for output in several[1])


def test_special_tokens_are_written_only_where_they_are_asked_for(model, tokenizer, fill):
    eos = tokenizer.eos_token_id
    bias = torch.zeros(len(tokenizer))
    bias[eos] = 50.0
    original = model.lm_head.bias.data
    model.lm_head.bias.data = original + bias
    try:
        assert fill("def [MASK](", seed=0)["spans"][0]["token_ids"] != [eos]
        span = fill("def [MASK](", seed=0, suppress_tokens=[])["spans"][0]
        assert span["token_ids"] == [eos] and span["text"] == tokenizer.eos_token and span["score"] > 0.99
    finally:
        model.lm_head.bias.data = original


def test_a_generation_configuration_counts_and_nothing_is_written_behind_the_text(model, fill, monkeypatch):
    configured = fill("def [MASK][MASK](", generation_config=BD3LMGenerationConfig(**GREEDY))
    assert configured == fill("def [MASK][MASK](", **GREEDY)
    monkeypatch.setattr(model, "generation_config", BD3LMGenerationConfig(max_new_tokens=5, pad_token_id=2, **GREEDY))
    assert fill("def [MASK][MASK](")["text"] == configured["text"]


def test_arguments_given_to_the_pipeline_are_defaults_which_a_call_or_its_configuration_replaces(model, tokenizer):
    text = "def [MASK][MASK][MASK](\n[MASK][MASK]"
    plain = pipeline("text-infilling", model=model, tokenizer=tokenizer, device="cpu")
    fill = pipeline("text-infilling", model=model, tokenizer=tokenizer, device="cpu", temperature=5.0, seed=4)
    assert fill(text) == plain(text, temperature=5.0, seed=4) != plain(text, seed=4)
    assert fill(text, temperature=1.0) == plain(text, seed=4)
    assert fill(text, generation_config=BD3LMGenerationConfig(seed=4)) == plain(text, seed=4)
    assert fill(text, seed=5) == plain(text, temperature=5.0, seed=5) != fill(text)


def test_a_tokenizer_that_does_not_keep_spaces():
    model = random_model(pad_token_id=21)
    fill = TextInfillingPipeline(model=model, tokenizer=word_tokenizer(23), device="cpu")
    output = fill("w1   w2 [MASK] w3", **GREEDY)
    (span,) = output["spans"]
    assert output["text"] == f"w1 w2{span['text']} w3" and span["text"].split()[0].startswith("w")
    assert output["text"][span["start"] : span["end"]] == span["text"]


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ("no gap", {}, r"`inputs` must mark gaps by '\[MASK\]', but got a text without one: 'no gap'"),
        ("a _ b", {"placeholder": ""}, "`placeholder` must be a string of at least one character, but got ''"),
        ("a _ [MASK]", {"placeholder": "_"}, r"by the `placeholder` '_' alone, but got a text that holds '\[MASK\]'"),
        ("a [MASK]", {"gap_length": 0}, "`gap_length` must be an integer >= 1, or a list of one for each of the 1"),
        ("a [MASK]", {"gap_length": [1, 2]}, r"each of the 1 marks in the text, but got \[1, 2\]"),
        ({"words": "a"}, {}, r"`inputs` must have the keys 'text' and 'gap_length', but got \['words'\]"),
        (3, {}, "`inputs` must be texts, but got a int"),
        ("a [MASK]", {"max_new_tokens": 3}, "`max_new_tokens` must not be given: gaps are filled"),
        ("a [MASK]", {"sampler": "magic"}, "`sampler` must be one of first_hitting"),
    ],
)
def test_what_cannot_be_filled_is_refused(fill, inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        fill(inputs, **arguments)


def test_another_mask_token_or_model_is_refused(model, tokenizer):
    stranger = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(ValueError, match="`tokenizer` must have the model's mask token, of id 319, .* None"):
        pipeline("text-infilling", model=model, tokenizer=stranger, device="cpu")


# carried by the checkpoint


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_checkpoint_carries_the_pipeline_and_hands_it_on(saved, fill, tmp_path):
    entry = json.loads((saved / "config.json").read_text())["custom_pipelines"]
    assert entry == {
        "text-infilling": {
            "impl": "infilling_block_diffusion.TextInfillingPipeline",
            "pt": ["AutoModelForMaskedLM"],
            "type": "text",
        }
    }
    BD3LMForMaskedLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    fill.save_pretrained(tmp_path / "pipeline")
    for folder in (tmp_path / "again", tmp_path / "pipeline"):
        assert json.loads((folder / "config.json").read_text())["custom_pipelines"] == entry
        assert (folder / "infilling_block_diffusion.py").is_file()


def test_the_checkpoint_fills_gaps_without_the_package(saved, fill, tmp_path):
    text = "def main([MASK][MASK]):\n    return [MASK]\n"
    expected = fill(text, **GREEDY)
    shutil.copytree(saved, tmp_path / "model")
    run_without_the_package(
        f"""
        from transformers import pipeline
        expected, text = {expected!r}, {text!r}
        for saved_by in ("us", "them"):
            fill = pipeline("text-infilling", model="model", trust_remote_code=True, device="cpu")
            assert type(fill).__module__.startswith("transformers_modules")
            output = fill(text, sampler="confidence", do_sample=False)
            assert output["text"] == expected["text"], output
            for span, other in zip(output["spans"], expected["spans"], strict=True):
                assert abs(span["score"] - other["score"]) < 1e-4, (span, other)
            several = fill([text] * 3, batch_size=2, sampler="confidence", do_sample=False)
            assert [each["text"] for each in several] == [expected["text"]] * 3
            if saved_by == "us":
                # What remote code saves carries the pipeline on.
                import shutil
                fill.model.save_pretrained("copy")
                fill.tokenizer.save_pretrained("copy")
                shutil.rmtree("model")
                shutil.move("copy", "model")
        try:
            pipeline("text-infilling", model="model", device="cpu")
        except ValueError as error:
            assert "trust_remote_code" in str(error)
        else:
            raise SystemExit("ran without trust")
        """,
        tmp_path,
    )
