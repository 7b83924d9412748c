"""lm-evaluation-harness: its command on a task of local files, and what each kind of request is answered."""

import importlib
import itertools
import json
import math
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

from bd3lm_hf import evaluate_likelihood, train_tokenizer
from bd3lm_hf.cli import main


pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'bd3lm-hf[lm-eval]'")

DOCUMENTS = ["def main(argv):\n    return 0\n" * 6, "print('naïve')\n", "", "a = 1\nb = [a, a]\n" * 3]
PAIRS = [
    ("def main(", "argv):\n    return"),
    ("", "print"),
    ("a = 1\nb =", " [a, a]"),
    ("def main(argv):\n" * 9 + "a", " = 0\n"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer({"text": DOCUMENTS}, 290)
    model = random_model(
        vocab_size=len(tokenizer), max_position_embeddings=32, attn_implementation="sdpa", pad_token_id=2
    )
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    lines = [json.dumps({"text": text, "context": "def", "answer": " main"}) for text in DOCUMENTS if text]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def harness(checkpoint):
    from bd3lm_hf.evaluation.harness import BD3LMHarness

    return BD3LMHarness(checkpoint / "model", device="cpu", batch_size=3)


def requests(*arguments):
    return [SimpleNamespace(args=values) for values in arguments]


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
"""
KINDS = {
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: [" main", " print"]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "local_generation": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 6, until: ["\\n"]}
metric_list: [{metric: exact_match}]
""",
}


def run_command(arguments, folder, monkeypatch):
    """Runs `python -m bd3lm_hf.evaluation.harness` in this process, which spares importing everything once more."""
    from lm_eval.api.registry import model_registry

    known = {name: target for name, target in model_registry.items() if name != "bd3lm"}
    monkeypatch.setattr(model_registry, "_objs", known)
    monkeypatch.setattr(sys, "argv", ["bd3lm_hf.evaluation.harness", *map(str, arguments)])
    monkeypatch.chdir(folder)
    runpy.run_module("bd3lm_hf.evaluation.harness", run_name="__main__")


def test_the_command_agrees_with_bd3lm_evaluate_on_a_local_task(checkpoint, tmp_path, monkeypatch):
    data = checkpoint / "documents.jsonl"
    for name, kind in KINDS.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, path=data) + kind, encoding="utf-8")
    arguments = ["--model", "bd3lm", "--model_args", f"pretrained={checkpoint / 'model'}", "--device", "cpu"]
    arguments += ["--tasks", ",".join(KINDS), "--include_path", tmp_path, "--batch_size", 2]
    run_command([*arguments, "--log_samples", "--output_path", "results.json"], tmp_path, monkeypatch)
    (path,) = tmp_path.glob("**/results*.json")
    results = json.loads(path.read_text())
    assert results["config"]["estimator"] == "exact" and set(results["results"]) == set(KINDS)
    likelihood = tmp_path / "likelihood.json"
    arguments = [checkpoint / "model", "--data", data, "--window", "--json", likelihood, "--device", "cpu"]
    assert main(["evaluate", *map(str, arguments)]) in (0, None)
    expected = json.loads(likelihood.read_text())
    bits_per_byte = results["results"]["local_rolling"]["bits_per_byte,none"]
    assert bits_per_byte == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    (samples,) = tmp_path.glob("**/samples_local_rolling*.jsonl")
    values = [float(json.loads(line)["resps"][0][0]) for line in samples.read_text().splitlines()]
    assert -sum(values) == pytest.approx(expected["nelbo"] * expected["num_tokens"], rel=1e-6)


@pytest.mark.parametrize("estimator", ["exact", "stratified", "monte_carlo"])
@pytest.mark.parametrize("score_eos", [True, False])
def test_rolling_log_likelihood_is_the_nelbo_of_each_document(checkpoint, harness, estimator, score_eos):
    from bd3lm_hf.evaluation.harness import BD3LMHarness

    tokenizer, model = harness.tokenizer, harness.model
    lm = BD3LMHarness(checkpoint / "model", device="cpu", batch_size=3, estimator=estimator, score_eos=score_eos)
    values = lm.loglikelihood_rolling(requests(*((text,) for text in DOCUMENTS)), disable_tqdm=True)
    assert values[2] == 0
    sequences = [
        [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        + [tokenizer.eos_token_id] * score_eos
        for text in DOCUMENTS
        if text
    ]
    whole = evaluate_likelihood(model, sequences, estimator=estimator, progress=False)
    assert -sum(values) == pytest.approx(whole.nelbo * whole.num_tokens, rel=1e-6)
    if estimator == "exact":
        alone = [evaluate_likelihood(model, [ids], estimator=estimator, progress=False) for ids in sequences]
        expected = [-each.nelbo * each.num_tokens for each in alone]
        assert [value for value in values if value] == pytest.approx(expected, rel=1e-6)


def enumerated(model, context, continuation):
    """-NELBO of a continuation, from one denoising pass for each set of masked tokens of each block."""
    ids, size = torch.tensor([context + continuation]), model.config.block_size
    total = 0.0
    for start in range(0, ids.shape[1], size):
        predicted = range(max(start, len(context)), min(start + size, ids.shape[1]))
        for k in range(1, len(predicted) + 1):
            for masked in itertools.combinations(predicted, k):
                x_t = ids[:, : start + size].index_fill(1, torch.tensor(masked), model.config.mask_token_id)
                with torch.no_grad():
                    logits = model(x_t).logits[0, list(masked)]
                logits[:, model.config.mask_token_id] = -torch.inf
                log_probs = logits.log_softmax(-1).gather(1, ids[0, list(masked), None])
                total += log_probs.sum().item() / (k * math.comb(len(predicted), k))
    return total


def test_only_the_continuation_is_predicted_behind_a_context_that_is_read(harness):
    values = [value for value, _ in harness.loglikelihood(requests(*PAIRS), disable_tqdm=True)]
    for (context, continuation), value in zip(PAIRS, values):
        context_ids = harness.tok_encode(context)
        ids = harness.tok_encode(context + continuation)[len(context_ids) :]
        while len(context_ids) + len(ids) > 32:
            context_ids = context_ids[4:]
        assert value == pytest.approx(enumerated(harness.model, context_ids, ids), rel=1e-4)
    assert len(harness.tok_encode(PAIRS[-1][0])) > 32


def test_a_continuation_is_greedy_where_greedy_generation_writes_it(harness):
    contexts = [harness.tok_encode(text) for text in ("def main(", "a = 1\nb")]
    arguments = {"sampler": "confidence", "do_sample": False, "max_new_tokens": 7}
    greedy = [harness.model.generate(torch.tensor([ids]), **arguments)[0, len(ids) :].tolist() for ids in contexts]
    pairs = [(("", ""), ids, written) for ids, written in zip(contexts, greedy)]
    other = [(("", ""), ids, [*written[:-1], written[-1] - 1]) for ids, written in zip(contexts, greedy)]
    answers = harness._loglikelihood_tokens(pairs + other, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in answers] == [True, True, False, False]


def test_generation_is_greedy_stops_at_strings_and_does_not_depend_on_the_batch(harness):
    settings = {"until": [], "max_gen_toks": 12}
    texts = ["def main(", "a = 1", "print(", "def"]
    written = harness.generate_until(requests(*((text, settings) for text in texts)), disable_tqdm=True)
    ids = torch.tensor([harness.tok_encode(texts[2])])
    expected = harness.model.generate(ids, sampler="confidence", do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert written[2] == harness.tokenizer.decode(expected, skip_special_tokens=True) and written[2]
    stop = next(character for character in written[2][2:] if character.isascii())
    cut = harness.generate_until(requests((texts[2], {**settings, "until": [stop]})), disable_tqdm=True)
    assert cut == [written[2].split(stop)[0]]
    sampled = {**settings, "do_sample": True, "temperature": 0.9}
    drawn = harness.generate_until(requests(*((text, sampled) for text in texts)), disable_tqdm=True)
    assert drawn == harness.generate_until(requests(*((text, sampled) for text in texts)), disable_tqdm=True)
    assert drawn != written


def test_special_tokens_of_a_text_are_text_and_those_of_a_chat_are_not(checkpoint):
    from bd3lm_hf.evaluation.harness import BD3LMHarness

    lm = BD3LMHarness(checkpoint / "model", device="cpu")
    bos, eos = lm.prefix_token_id, lm.eot_token_id
    assert lm.tok_encode("</s>")[0] == bos and eos not in lm.tok_encode("</s>")
    lm.tokenizer.chat_template = "<s>{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    text = lm.apply_chat_template([{"role": "user", "content": "def"}])
    assert lm.tok_encode(text)[0] == bos and lm.tok_encode(text)[-1] == eos and lm.tok_encode(text).count(bos) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "auto"}, "`batch_size` must be an integer >= 1, but got 'auto'"),
        ({"estimator": "best"}, "`estimator` must be one of exact, stratified, monte_carlo, but got 'best'"),
        ({"num_draws": 0}, "`num_draws` must be an integer >= 1, but got 0"),
        ({"denoising_stepz": 2}, "`denoising_stepz` is an argument neither of this model nor of `generate`"),
        ({"sampler": "magic"}, "`sampler` must be one of first_hitting"),
        ({"window": 30}, "`window` must be at least 2 tokens"),
    ],
)
def test_arguments_out_of_range_are_refused(checkpoint, arguments, message):
    from bd3lm_hf.evaluation.harness import BD3LMHarness

    with pytest.raises(ValueError, match=message):
        BD3LMHarness(checkpoint / "model", device="cpu", **arguments)


def test_without_the_harness_the_error_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "bd3lm_hf.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"needs lm-evaluation-harness: pip install 'bd3lm-hf\[lm-eval\]'"):
        importlib.import_module("bd3lm_hf.evaluation.harness")
