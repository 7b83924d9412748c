"""Tools that take this model for one that predicts next tokens, or for BERT: each is refused or warned of."""

import json
import logging

import pytest
import torch
from conftest import random_model
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from bd3lm_hf import BD3LMForMaskedLM, BD3LMModel, CommitCache, evaluate_likelihood, train_tokenizer


TEXT = "def main(argv):\n    return 0\n" * 3
IDS = torch.arange(12).view(2, 6)
MASK = 22


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer({"text": [TEXT]}, 290)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    random_model(vocab_size=len(tokenizer), attn_implementation="sdpa", **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def warnings_of(caplog):
    """Function that calls what it is given, and returns the warnings of next-token scores that come of it."""

    def warnings_of(call):
        # Each message is logged once in a process.
        logging.Logger.warning_once.cache_clear()
        caplog.clear()
        call()
        return [message for message in caplog.messages if "has no scores of the next token" in message]

    return warnings_of


# serving engines


def test_vllm_and_sglang_find_no_class_that_their_transformers_backend_takes(folder):
    """vLLM asks the first class of `auto_map` whose name begins with AutoModel, SGLang that of "AutoModel"."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    names = [name for name in auto_map if name.startswith("AutoModel")]
    assert {"AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"} <= set(names)
    classes = [get_class_from_dynamic_module(auto_map[name], str(folder)) for name in names]
    for found in (*classes, BD3LMForMaskedLM, BD3LMModel):
        assert not found.is_backend_compatible()
    # The name must not end in what vLLM adapts to: it would look for another class of that stem.
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BD3LMForMaskedLM"]


@torch.no_grad()
def test_every_attention_implementation_can_be_chosen_and_changed(uncompiled_flex_attention):
    noisy = torch.where(torch.arange(6) % 2 == 1, MASK, IDS)
    reference = random_model(attn_implementation="eager")
    expected = reference(noisy).logits
    for implementation in ("sdpa", "flex_attention"):
        torch.testing.assert_close(random_model(attn_implementation=implementation)(noisy).logits, expected)
    for implementation in ("sdpa", "flex_attention", "eager"):
        reference.set_attn_implementation(implementation)
        assert reference.config._attn_implementation == implementation
        torch.testing.assert_close(reference(noisy).logits, expected)
        assert reference.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 10)


def test_continuous_batching_is_refused():
    model = random_model()
    calls = [
        model.init_continuous_batching,
        lambda: model.generate_batch([[1, 2, 3]], max_new_tokens=4),
        lambda: model.continuous_batching_context_manager().__enter__(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="`generate` must be called in place of `generate_batch`"):
            call()
    for arguments in (
        {"cache_implementation": "paged", "max_new_tokens": 4},
        {"generation_config": GenerationConfig(cache_implementation="paged", max_new_tokens=4)},
    ):
        with pytest.raises(ValueError, match="`cache_implementation` must not be 'paged'"):
            model.generate(IDS, **arguments)


# decoding


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ({"num_beams": 2}, "beam sample"),
        ({"num_beams": 2, "do_sample": False}, "beam search"),
        ({"num_beams": 4, "num_beam_groups": 2, "do_sample": False}, "group beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "contrastive search"),
        ({"constraints": [object()]}, "constrained beam search"),
        ({"force_words_ids": [[3]]}, "constrained beam search"),
        ({"dola_layers": "low"}, "dola generation"),
        ({"assistant_model": random_model()}, "assisted generation"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"assistant_early_exit": 1}, "assisted generation"),
    ],
)
@pytest.mark.parametrize("trust", [None, True])
def test_decoding_by_growing_prefixes_is_refused(arguments, mode, trust):
    with pytest.raises(
        ValueError, match=f"must be asked to sample or to be greedy, .* arguments of {mode}; `sampler`"
    ):
        random_model().generate(IDS, max_new_tokens=4, trust_remote_code=trust, **arguments)


# next-token scores of plain text


def test_scoring_plain_text_is_warned_of_once():
    model = random_model()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("bd3lm_hf.modeling.network_block_diffusion")
    logging.Logger.warning_once.cache_clear()
    logger.addHandler(handler)
    for _ in range(3):
        model(IDS)
        model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, logits_to_keep=3)
    logger.removeHandler(handler)
    (message,) = records
    for name in ("evaluate_likelihood", "bd3lm_hf.evaluation.harness", "BD3LMSFTTrainer"):
        assert name in message


def test_passes_as_they_are_meant_are_not_warned_of(warnings_of, folder):
    model, noisy = random_model(), torch.where(torch.arange(6) % 4 == 1, MASK, IDS)

    def fill_cache_by_hand():
        cache = model(IDS[:, :4], use_cache=True).cache
        model(IDS[:, 4:], cache=cache)
        model(noisy, cache=CommitCache(cache, 0))

    for call in (
        lambda: model(noisy),
        lambda: model(IDS, labels=IDS),
        lambda: model(noisy, clean_input_ids=IDS),
        lambda: model(IDS, clean_input_ids=IDS),
        fill_cache_by_hand,
        lambda: model(inputs_embeds=model.get_input_embeddings()(IDS)),
        lambda: model(IDS, output_hidden_states=True),
        lambda: model.model(IDS),
        lambda: AutoModel.from_pretrained(folder)(IDS),
        lambda: model.generate(IDS, max_new_tokens=9),
        lambda: model.generate(IDS, max_new_tokens=9, use_cache=False),
        lambda: model.generate(noisy, infill=True),
        lambda: evaluate_likelihood(AutoModelForCausalLM.from_pretrained(folder), IDS.tolist(), num_draws=1),
    ):
        assert warnings_of(call) == []
    # The negative control.
    assert len(warnings_of(lambda: model(IDS))) == 1


def test_only_the_first_passes_wait_for_the_device(monkeypatch):
    model, noisy = random_model(), torch.full_like(IDS, MASK)
    waits = []
    plain_bool = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: waits.append(1) or plain_bool(tensor))
    counts = []
    for _ in range(40):
        before = len(waits)
        model(noisy)
        counts.append(len(waits) - before)
    assert counts[0] > counts[-1] and len(set(counts[-5:])) == 1


def test_the_look_at_the_tokens_stops_no_tracer():
    model = random_model(attn_implementation="sdpa").requires_grad_(False)
    expected = model(IDS).logits

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).logits

    torch.testing.assert_close(torch.jit.trace(Logits(), IDS)(IDS), expected)
    torch.testing.assert_close(torch.fx.experimental.proxy_tensor.make_fx(Logits())(IDS)(IDS), expected)
    torch.testing.assert_close(torch.func.vmap(lambda ids: model(ids[None]).logits[0])(IDS), expected)
    torch.testing.assert_close(torch.compile(Logits(), backend="eager", fullgraph=True)(IDS), expected)
    torch.testing.assert_close(torch.export.export(Logits(), (IDS,)).module()(IDS), expected)
    with torch.device("meta"):
        assert BD3LMForMaskedLM(model.config)(IDS.to("meta")).logits.shape == (2, 6, 23)


def test_the_harness_own_model_for_causal_models_is_warned_of(warnings_of, tokenizer, folder):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'bd3lm-hf[lm-eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", batch_size=1, trust_remote_code=False)
    assert isinstance(model.model, BD3LMForMaskedLM)
    requests = [Instance("loglikelihood_rolling", {}, (TEXT[:40],), 0)]
    assert len(warnings_of(lambda: model.loglikelihood_rolling(requests))) == 1


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo"])
def test_trainers_of_trl_are_warned_of(warnings_of, name, tokenizer, folder, tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install 'bd3lm-hf[trl]'")
    from datasets import Dataset

    columns = {
        "sft": {"text": [TEXT] * 2},
        "dpo": {"prompt": ["def"] * 2, "chosen": [" main("] * 2, "rejected": [" argv"] * 2},
        "kto": {"prompt": ["def"] * 2, "completion": [" main("] * 2, "label": [True, False]},
        "grpo": {"prompt": ["def"] * 2},
    }[name]
    extra = {"reward_funcs": lambda completions, **kwargs: [0.0] * len(completions)} if name == "grpo" else {}
    arguments = getattr(trl, f"{name.upper()}Config")(tmp_path, report_to=[], use_cpu=True, bf16=False)
    trainer = getattr(trl, f"{name.upper()}Trainer")

    def construct():
        trainer(
            model=BD3LMForMaskedLM.from_pretrained(folder),
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            **extra,
        )

    (message,) = warnings_of(construct)
    assert message.startswith(f"A trainer of TRL was given this model (trl, {name})") and "BD3LMSFTTrainer" in message


# gaps


@pytest.mark.parametrize("given", ["model", "folder"])
def test_fill_mask_is_refused_and_names_the_pipeline_that_fills_gaps(given, tokenizer, folder):
    model = {"model": BD3LMForMaskedLM.from_pretrained(folder), "tokenizer": tokenizer}
    fill = pipeline("fill-mask", device="cpu", **(model if given == "model" else {"model": str(folder)}))
    for text in ("def [MASK](", "def [MASK](argv)[MASK]", ["[MASK]", "a [MASK]"]):
        with pytest.raises(ValueError, match="must be asked for 'text-infilling' in place of 'fill-mask'"):
            fill(text)
    filled = pipeline("text-infilling", device="cpu", **model)("def [MASK](")
    assert "[MASK]" not in filled["text"]
