"""Quantizers: what they quantize, how much worse a trained model gets by it; it is saved, loaded and tuned."""

import copy
import json
import math
import os
import random
import subprocess
import sys

import pytest
import quantizing
import torch
from quantizing import PROJECTIONS, QUANTIZERS, findings, is_installed, kept_projections, nelbo, quantized_share
from torch import nn
from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, QuantoConfig

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, BD3LMModel, kernels


NUM_WORDS, LENGTH, NUM_LAYERS = 4, 32, 2
KEPT = {
    "lm_head",
    "model.adaln_modulation",
    *(f"model.layers.{index}.adaln_modulation" for index in range(NUM_LAYERS)),
    "model.noise_embedding.linear_1",
    "model.noise_embedding.linear_2",
}


def needs(library):
    reason = f"needs {library}: pip install 'bd3lm-hf[quantizers]'"
    return pytest.mark.skipif(not is_installed(library), reason=reason)


def each_quantizer(names=QUANTIZERS):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=needs(QUANTIZERS[name].library)) for name in names]
    )


class Language:
    """Words of random letters, drawn independently and equally often: log(4) nats a word."""

    def __init__(self, seed):
        generator = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.words = ["".join(generator.choices(letters, k=generator.randint(3, 6))) for _ in range(NUM_WORDS)]
        text = " ".join(generator.choices(self.words, k=6000))
        self.ids = torch.tensor([(" " + letters).index(letter) for letter in text])
        # Nats per token, the spaces among them.
        self.entropy = math.log(NUM_WORDS) / (sum(len(word) + 1 for word in self.words) / NUM_WORDS)

    def batch(self, generator, size=16):
        starts = torch.randint(len(self.ids) - 3000, (size,), generator=generator)
        return torch.stack([self.ids[start : start + LENGTH] for start in starts])

    def held_out(self):
        return self.ids[-64 * LENGTH :].view(64, LENGTH)


def train(model, language, steps, learning_rate):
    """Trains what is trainable; the loss of each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    generator, losses = torch.Generator().manual_seed(0), []
    torch.manual_seed(0)
    model.train()
    for _ in range(steps):
        ids = language.batch(generator)
        loss = model(input_ids=ids, labels=ids, noise_interval=(0.3, 0.8)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture(scope="module")
def language():
    return Language(seed=0)


@pytest.fixture(scope="module")
def folder(language, tmp_path_factory):
    """A trained model, and texts that it has not seen."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = BD3LMConfig(
        vocab_size=28,
        hidden_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        max_position_embeddings=64,
        block_size=4,
        hidden_dropout=0.0,
        cond_dim=32,
        ignore_bos=False,
    )
    model = BD3LMForMaskedLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            # Open the gates, which spares hundreds of steps.
            layer.adaln_modulation.bias.view(6, -1)[[2, 5]] = 1.0
    # By plain torch: what rounding does to a training run is not the matter here.
    with kernels.detached():
        train(model, language, steps=150, learning_rate=5e-3)
    model.save_pretrained(folder)
    torch.save(language.held_out(), folder / "texts.pt")
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    return BD3LMForMaskedLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(language):
    return language.held_out()


@pytest.fixture(scope="module")
def plain_nelbo(plain, texts):
    return nelbo(plain, texts)


def load(folder, name):
    return BD3LMForMaskedLM.from_pretrained(folder, quantization_config=QUANTIZERS[name].config())


def check(found, plain_nelbo, tolerance):
    assert found["share"] >= 0.9
    assert set(found["kept"]) == KEPT
    assert abs(found["nelbo"] / plain_nelbo - 1) < tolerance


def test_the_model_that_is_quantized_has_learned_something(language, plain_nelbo):
    """Without which a NELBO would tell nothing: what a model that knows nothing says, no quantizer can spoil."""
    assert language.entropy < plain_nelbo < 0.3 * math.log(27)


@each_quantizer()
def test_the_projections_are_quantized_and_the_nelbo_stays(folder, texts, plain, plain_nelbo, name):
    model = load(folder, name)
    check(findings(model, texts), plain_nelbo, QUANTIZERS[name].tolerance)
    for kept in KEPT:
        assert torch.equal(model.get_submodule(kept).weight, plain.get_submodule(kept).weight), kept


@needs("optimum.quanto")
def test_two_bits_are_too_few_for_the_nelbo_to_stay(folder, texts, plain_nelbo):
    """The control: this measure does tell a spoilt model."""
    # With the head: what the projections alone lose differs between versions of torch.
    config = QuantoConfig(weights="int2", modules_to_not_convert=["nothing"])
    model = BD3LMForMaskedLM.from_pretrained(folder, quantization_config=config)
    assert nelbo(model, texts) > 1.05 * plain_nelbo


@each_quantizer([name for name, quantizer in QUANTIZERS.items() if quantizer.saves])
def test_a_quantized_model_is_saved_and_loaded_exactly(folder, texts, tmp_path, name):
    model = load(folder, name)
    model.save_pretrained(tmp_path)
    plain_size, size = ((path / "model.safetensors").stat().st_size for path in (folder, tmp_path))
    assert size < 0.8 * plain_size or name == "torchao-int4"
    again = BD3LMForMaskedLM.from_pretrained(tmp_path)
    assert quantized_share(again) == quantized_share(model) and set(kept_projections(again)) == KEPT
    with torch.no_grad():
        assert torch.equal(again(texts).logits, model(texts).logits)


@needs("optimum.quanto")
def test_a_model_of_quanto_is_saved_by_quanto(folder, texts, plain, tmp_path):
    from optimum.quanto import quantization_map, requantize
    from safetensors.torch import load_file, save_file

    model = load(folder, "quanto-int4").eval()
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    again = BD3LMForMaskedLM(plain.config).eval()
    weights = load_file(tmp_path / "weights.safetensors")
    requantize(again, weights, quantization_map(model), device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(again(texts).logits, model(texts).logits)


def test_remote_code_is_quantized_as_the_package_is(folder, texts, plain_nelbo, tmp_path):
    names = [name for name, quantizer in QUANTIZERS.items() if is_installed(quantizer.library)]
    if not names:
        pytest.skip("needs a quantizer: pip install 'bd3lm-hf[quantizers]'")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    report = tmp_path / "report.json"
    command = [sys.executable, quantizing.__file__, str(folder), str(report), *names]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-6000:]
    found = json.loads(report.read_text())
    assert set(found) == set(names)
    for name in names:
        check(found[name], plain_nelbo, QUANTIZERS[name].tolerance)
        assert found[name]["text"] == findings(load(folder, name), texts)["text"], name


# Training on top of it.


@pytest.mark.parametrize("name", ["bitsandbytes-nf4", "bitsandbytes-int8"])
@needs("bitsandbytes")
def test_an_adapter_learns_on_a_quantized_model(folder, tmp_path, name):
    peft = pytest.importorskip("peft")
    language = Language(seed=1)
    texts = language.held_out()
    before = nelbo(load(folder, name), texts)
    # Another copy: on some CPUs bitsandbytes packs 4 bit weights when it evaluates, and can't train them then.
    base = peft.prepare_model_for_kbit_training(load(folder, name))
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
    adapted = {module.rpartition(".")[2] for module, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert adapted >= set(PROJECTIONS)
    frozen = {key: weight.clone() for key, weight in model.named_parameters() if not weight.requires_grad}
    losses = train(model, language, steps=25, learning_rate=1e-2)
    assert all(torch.equal(model.get_parameter(key), weight) for key, weight in frozen.items())
    after = nelbo(model, texts)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and after < 0.8 * before

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder, name), tmp_path)
    assert nelbo(again, texts) == pytest.approx(after, rel=1e-5)


# What is left out, by default and on request.


@needs("bitsandbytes")
def test_a_list_of_exceptions_takes_the_place_of_the_head_and_goes_with_the_noise(folder, texts, plain_nelbo):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["down_proj"])
    model = BD3LMForMaskedLM.from_pretrained(folder, quantization_config=config)
    down = {f"model.layers.{index}.mlp.down_proj" for index in range(NUM_LAYERS)}
    assert set(kept_projections(model)) == KEPT - {"lm_head"} | down
    assert abs(nelbo(model, texts) / plain_nelbo - 1) < 0.02


@needs("torchao")
@pytest.mark.parametrize("name", ["torchao-int8", "torchao-int4"])
def test_the_loss_goes_through_a_head_with_weights_of_torchao(folder, texts, plain_nelbo, name):
    import torchao.quantization as ao

    model = BD3LMForMaskedLM.from_pretrained(folder)
    ao.quantize_(model, QUANTIZERS[name].config().quant_type)
    assert type(model.lm_head) is nn.Linear and kept_projections(model) == []
    assert abs(nelbo(model, texts) / plain_nelbo - 1) < QUANTIZERS[name].tolerance


def test_the_loss_goes_through_the_hooks_of_a_head(plain, texts, plain_nelbo):
    """Tensor parallelism gathers the logits in such a hook."""
    handle = plain.lm_head.register_forward_hook(lambda module, args, logits: 0 * logits)
    try:
        # One of 28 tokens, the mask token excepted.
        expected = math.log(27) / plain_nelbo
        assert nelbo(plain, texts) > 0.8 * expected * plain_nelbo
    finally:
        handle.remove()
    assert nelbo(plain, texts) == plain_nelbo


@pytest.mark.parametrize("model_class", [BD3LMModel, BD3LMForMaskedLM])
def test_float16_does_not_round_the_noise_embedding_and_the_modulation(folder, model_class):
    model = model_class.from_pretrained(folder, dtype=torch.float16)
    in_float32 = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    assert in_float32 == {name for name, _ in model.named_parameters() if "noise_embed" in name or "adaln" in name}


def test_a_float16_model_runs(folder, texts, plain_nelbo):
    model = BD3LMForMaskedLM.from_pretrained(folder, dtype=torch.float16)
    assert nelbo(model, texts) == pytest.approx(plain_nelbo, rel=0.01)
    assert model.generate(texts[:2, :8], max_new_tokens=8).shape == (2, 16)


# Quantizers outside of Transformers.


def projections_of(model):
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]


def quantize_by_torch(model):
    return quantize_dynamic(model, dict.fromkeys(projections_of(model), default_dynamic_qconfig))


def test_quantize_dynamic_quantizes_the_projections(plain, texts, plain_nelbo, tmp_path):
    model = quantize_by_torch(plain)
    check(findings(model, texts), plain_nelbo, 0.02)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = quantize_by_torch(BD3LMForMaskedLM(plain.config).eval())
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=False))
    assert torch.equal(again(texts).logits, model(texts).logits)


def test_quantize_dynamic_may_quantize_everything(plain, texts, plain_nelbo):
    model = quantize_dynamic(plain, {nn.Linear})
    found = findings(model, texts)
    assert found["share"] == 1 and found["kept"] == []
    assert abs(found["nelbo"] / plain_nelbo - 1) < 0.02


def quantize_by_hqq(model, num_bits, parts=PROJECTIONS):
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    config = BaseQuantizeConfig(nbits=num_bits, group_size=64)
    tags = {f"{'mlp' if part in PROJECTIONS[4:] else 'self_attn'}.{part}": config for part in parts}
    AutoHQQHFModel.quantize_model(model, tags if parts else config, compute_dtype=torch.float32, device="cpu")
    return model


@needs("hqq")
@pytest.mark.parametrize(("num_bits", "tolerance"), [(8, 0.02), (4, 0.05)])
def test_hqq_quantizes_the_projections(plain, texts, plain_nelbo, tmp_path, num_bits, tolerance):
    model = quantize_by_hqq(copy.deepcopy(plain), num_bits)
    check(findings(model, texts), plain_nelbo, tolerance)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = quantize_by_hqq(BD3LMForMaskedLM(plain.config).eval(), num_bits)
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(again(texts).logits, model(texts).logits)


@needs("hqq")
def test_hqq_may_quantize_the_noise_embedding_as_well(plain, texts, plain_nelbo):
    model = quantize_by_hqq(copy.deepcopy(plain), 8, parts=())
    assert kept_projections(model) == ["lm_head"]
    assert abs(nelbo(model, texts) / plain_nelbo - 1) < 0.02


@needs("hqq")
def test_hqq_by_transformers_does_for_this_model_what_it_does_for_llama(folder, tmp_path):
    """Transformers 5.17 to 5.24 have a `HqqConfig` and nothing behind it."""
    from transformers import HqqConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)

    def attempt(model_class, path):
        try:
            model_class.from_pretrained(path, quantization_config=HqqConfig(nbits=8, group_size=64))
        except Exception as error:
            return type(error), str(error)

    assert attempt(BD3LMForMaskedLM, folder) == attempt(LlamaForCausalLM, tmp_path)
