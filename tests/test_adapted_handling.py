"""What people do to models of Transformers, done to adapted ones: copies, dtypes, adapters, quantizers, offloading."""

import copy
import pickle

import pytest
import torch
from adapted_cases import GREEDY, MASK, THREE, VOCAB_SIZE, adapt, close, noised, random_ids, stock_model
from quantizing import QUANTIZERS, is_installed
from transformers import AutoModelForCausalLM

from bd3lm_hf import BlockDiffusionForMaskedLM, BlockDiffusionModel
from bd3lm_hf.kernels import detached, is_attached


TIED = "qwen3"
IDS = random_ids(2, 12)


def scores(model):
    with torch.no_grad():
        return model(noised(IDS)).logits


def text(model):
    return model.generate(IDS, max_new_tokens=6, **GREEDY)


def is_tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", ["llama", TIED, "gpt2", "gemma3"])
def test_a_new_mask_token_starts_at_the_mean_and_changes_no_score(name):
    expected = stock_model(name)(IDS).logits
    model = BlockDiffusionForMaskedLM.from_causal_lm(stock_model(name), block_size=1)
    assert model.config.mask_token_id == VOCAB_SIZE and model.config.vocab_size == VOCAB_SIZE + 1
    close(model(IDS).logits[:, 1:, :VOCAB_SIZE], expected[:, :-1])
    weight = model.get_input_embeddings().weight
    close(weight[VOCAB_SIZE], weight[:VOCAB_SIZE].mean(0))
    assert is_tied(model) == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("name", [TIED, "gpt2", "gemma3"])
def test_resized_embeddings_are_saved_and_loaded(name, tmp_path):
    model = adapt(name)
    expected, was_tied = scores(model), is_tied(model)
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 80
    close(scores(model)[..., :VOCAB_SIZE], expected)
    with pytest.raises(ValueError, match="`new_num_tokens` must be at least 67, for the mask token to stay"):
        model.resize_token_embeddings(60)
    model.save_pretrained(tmp_path)
    again = BlockDiffusionForMaskedLM.from_pretrained(tmp_path)
    close(scores(again), scores(model))
    assert is_tied(again) == is_tied(model) == was_tied


@pytest.mark.parametrize("name", ["llama", TIED, "gpt2"])
def test_copies_and_pickles_compute_the_same(name):
    model = adapt(name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(scores(other), scores(model))
        assert torch.equal(text(other), text(model)) and is_tied(other) == is_tied(model)
        other.get_input_embeddings().weight.data.zero_()
    assert model.get_input_embeddings().weight.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3"])
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant):
    def gradients(model):
        torch.manual_seed(0)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    expected, model = gradients(adapt(name).train()), adapt(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for actual, gradient in zip(gradients(model), expected, strict=True):
        close(actual, gradient)


@pytest.mark.parametrize("name", THREE)
def test_hidden_states_and_attentions_of_all_passes_are_returned(name):
    model, wanted = adapt(name, "eager"), {"output_hidden_states": True, "output_attentions": True}
    passes = {12: model(IDS, **wanted), 24: model(noised(IDS), clean_input_ids=IDS, **wanted)}
    for length, outputs in passes.items():
        assert len(outputs.hidden_states) == 3 and outputs.hidden_states[0].shape == (2, length, 32)
        assert len(outputs.attentions) == 2 and outputs.attentions[1].shape == (2, 2, length, length)
    assert model(IDS, labels=IDS, **wanted).hidden_states is not None
    assert isinstance(model(IDS, return_dict=False), tuple)
    network = BlockDiffusionModel(model.config)
    assert network(IDS, return_dict=False)[0].shape == (2, 12, 32)
    assert len(network(IDS, **wanted).attentions) == 2


@pytest.mark.parametrize(("name", "kind"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt2", "sdpa")])
def test_bfloat16_is_near_float32(name, kind):
    model, exact = adapt(name, kind, dtype=torch.bfloat16), adapt(name, kind)
    difference = (scores(model).float() - scores(exact)).std() / scores(exact).std()
    assert model.dtype == torch.bfloat16 and 0 < difference < 0.05
    model(IDS, labels=IDS).loss.backward()
    for options in ({}, {"cache_implementation": "static"}):
        assert model.generate(IDS, max_new_tokens=5, **GREEDY, **options).shape == (2, 17)
    with torch.autocast("cpu", torch.bfloat16):
        exact(IDS, labels=IDS).loss.backward()
        assert text(exact).shape == (2, 18)


@pytest.mark.parametrize("name", ["llama", TIED, "gpt2"])
def test_offloaded_to_disk_it_computes_the_same(name, tmp_path):
    model = adapt(name)
    model.save_pretrained(tmp_path / "saved")
    prefix, device_map = model.base_model_prefix, {}
    for part, module in model.base_model.named_children():
        numbers = range(len(module)) if isinstance(module, torch.nn.ModuleList) else [None]
        for number in numbers:
            device_map[f"{prefix}.{part}" if number is None else f"{prefix}.{part}.{number}"] = (
                "disk" if number == 1 else "cpu"
            )
    device_map["lm_head"] = "cpu"
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    loaded = BlockDiffusionForMaskedLM.from_pretrained(tmp_path / "saved", **options)
    model.config.text_config.save_pretrained(tmp_path / "saved")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options)
    for other in (loaded, BlockDiffusionForMaskedLM.from_causal_lm(source, mask_token_id=MASK)):
        close(scores(other), scores(model))
        assert torch.equal(text(other), text(model))


@pytest.mark.parametrize(("name", "kind"), [("llama", "sdpa"), ("gemma2", "eager"), (TIED, "sdpa")])
def test_kernels_change_no_number(name, kind):
    model = adapt(name, kind)

    def numbers():
        inputs = {"clean_input_ids": IDS, "labels": IDS, "loss_weights": torch.ones(IDS.shape)}
        loss = model(noised(IDS), **inputs).loss
        return loss, torch.autograd.grad(loss, model.get_output_embeddings().weight)[0], text(model)

    assert is_attached(model)
    attached = numbers()
    with detached():
        assert not is_attached(model)
        for actual, expected in zip(attached, numbers(), strict=True):
            close(actual, expected)


LORA = {"target_modules": "all-linear"}
ADAPTERS = [
    ("llama", LORA),
    ("gpt2", LORA),
    ("llama", {**LORA, "use_dora": True}),
    (TIED, {**LORA, "modules_to_save": ["lm_head", "embed_tokens"]}),
    (TIED, {**LORA, "trainable_token_indices": [MASK]}),
]


@pytest.mark.parametrize(("name", "options"), ADAPTERS)
def test_adapters_are_trained_saved_loaded_and_merged(name, options, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights="use_dora" in options, **options)
    model = peft.get_peft_model(adapt(name), config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert (scores(model) - scores(adapt(name))).abs().max() > 1e-3
    again = peft.PeftModel.from_pretrained(adapt(name), tmp_path / "adapter").eval()
    close(scores(again), scores(model))
    merged = again.merge_and_unload()
    torch.testing.assert_close(scores(merged), scores(model), atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    close(scores(BlockDiffusionForMaskedLM.from_pretrained(tmp_path / "merged")), scores(merged))


def test_an_adapter_is_trained_on_a_quantized_network(tmp_path):
    peft = pytest.importorskip("peft")
    if not is_installed("bitsandbytes"):
        pytest.skip("needs bitsandbytes, which is not installed")
    torch.manual_seed(0)
    stock = stock_model("llama", hidden_size=128, intermediate_size=128, head_dim=64)
    stock.save_pretrained(tmp_path)
    quantization_config = QUANTIZERS["bitsandbytes-nf4"].config()
    source = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization_config)
    adapted = BlockDiffusionForMaskedLM.from_causal_lm(source, mask_token_id=MASK)
    model = peft.prepare_model_for_kbit_training(adapted)
    assert model.is_loaded_in_4bit and model.is_gradient_checkpointing
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(model(input_ids=IDS, labels=IDS, noise_interval=(0.5, 0.9)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize("name", ["bitsandbytes-int8", "bitsandbytes-nf4", "torchao-int8"])
def test_quantized_models_load_adapt_and_score_nearly_as_before(name, tmp_path):
    quantizer = QUANTIZERS[name]
    if not is_installed(quantizer.library):
        pytest.skip(f"needs {quantizer.library}, which is not installed")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    model = adapt("llama", overrides=sizes)
    expected = scores(model)
    model.save_pretrained(tmp_path)
    loaded = BlockDiffusionForMaskedLM.from_pretrained(tmp_path, quantization_config=quantizer.config())
    model.config.text_config.save_pretrained(tmp_path)
    source = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantizer.config())
    adapted = BlockDiffusionForMaskedLM.from_causal_lm(source, mask_token_id=MASK)
    for other in (loaded, adapted):
        assert type(other.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
        difference = (scores(other).float() - expected).std() / expected.std()
        assert 0 < difference < (0.1 if quantizer.bits == 8 else 0.5)
        assert text(other).shape == (2, 18)
    close(scores(adapted), scores(loaded))
    # What was adapted while quantized is saved and loaded as such.
    adapted.save_pretrained(tmp_path / "quantized")
    again = BlockDiffusionForMaskedLM.from_pretrained(tmp_path / "quantized")
    assert not any("quantization_config" in vars(part.config.text_config) for part in (adapted, again))
    assert type(again.model.layers[0].mlp.up_proj.weight) is type(adapted.model.layers[0].mlp.up_proj.weight)
    close(scores(again), scores(adapted))
