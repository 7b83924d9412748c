"""lm-evaluation-harness asks the server: tasks that generate get the texts of `generate`, others a clear refusal."""

import json

import pytest
import torch
from serving import KEY, NAME, make_tiny, running


pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'bd3lm-hf[lm-eval]'")
pytest.importorskip("tenacity", reason="needs what the harness asks servers with: pip install 'lm-eval[api]'")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "b"
"""
GENERATION = """
generation_kwargs: {until: ["q"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
TEXTS = ["def main(", "import", "a = 1"]


@pytest.fixture(scope="module")
def tiny():
    return make_tiny()


@pytest.fixture
def evaluate(tiny, tmp_path, monkeypatch):
    """Function kind of task -> what the harness finds with the server's help."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tiny[1].save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    for kind, more in (("generate_until", GENERATION), ("loglikelihood", "metric_list: [{metric: acc}]")):
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(name=f"my_{kind}", path=data, kind=kind) + more)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def run(kind, url):
        where = {"base_url": f"{url}/v1/completions", "model": NAME, "tokenizer": str(tmp_path / "tokenizer")}
        where |= {"num_concurrent": 2, "max_retries": 1, "max_length": 256}
        options = {"tasks": [f"my_{kind}"], "task_manager": tasks, "log_samples": True, "bootstrap_iters": 0}
        return lm_eval.simple_evaluate(model="local-completions", model_args=where, **options)

    return run


def test_tasks_that_generate_get_the_texts_of_generate(tiny, evaluate):
    model, tokenizer = tiny
    with running(model, tokenizer) as (engine, url):
        found = evaluate("generate_until", url)
        assert engine.counts.ended == len(TEXTS)
    for sample in found["samples"]["my_generate_until"]:
        ids = torch.tensor([tokenizer(sample["doc"]["text"])["input_ids"]])
        written = model.generate(ids, max_new_tokens=12, do_sample=False, seed=1234)[0, ids.shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        assert sample["resps"] == [[text.partition("q")[0]]]


def test_tasks_of_likelihoods_are_refused(tiny, evaluate, caplog):
    with running(*tiny) as (engine, url):
        with pytest.raises(Exception):  # noqa: B017
            evaluate("loglikelihood", url)
        assert engine.counts.ended == 0
    assert "`logprobs` must be 0 with `echo`" in caplog.text
