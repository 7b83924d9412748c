"""What can't be the network of a block diffusion model is refused by name and reason, before anything is trained."""

import json

import pytest
import torch
from adapted_cases import GREEDY, MASK, VOCAB_SIZE, adapt, random_ids, stock_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from bd3lm_hf import SAMPLERS, BD3LMForMaskedLM, BlockDiffusionConfig, BlockDiffusionForMaskedLM


STATE = "layers of the type|keeps a state of the text"
LATENT = "has latent attention, whose cache can't be cut"
ALIBI = "has positions in its scores"
ENCODER = "is an encoder-decoder"
REFUSED = [
    ("mamba", {}, STATE),
    ("mamba2", {}, STATE),
    ("jamba", {}, STATE),
    ("bamba", {}, STATE),
    ("zamba2", {}, STATE),
    ("falcon_h1", {}, STATE),
    ("recurrent_gemma", {}, STATE),
    ("qwen3_next", {}, STATE),
    ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, STATE),
    ("llama4_text", {"attention_chunk_size": 4}, "layers of the type chunked_attention"),
    ("deepseek_v2", {}, LATENT),
    ("deepseek_v3", {}, LATENT),
    ("bloom", {}, ALIBI),
    ("mpt", {}, ALIBI),
    ("falcon", {"alibi": True}, ALIBI),
    ("t5", {}, ENCODER),
    ("bart", {}, ENCODER),
    ("bart", {"is_encoder_decoder": False}, ENCODER),
]


@pytest.mark.parametrize(("model_type", "fields", "reason"), REFUSED)
def test_configurations_of_other_networks_are_refused(model_type, fields, reason):
    text_config = AutoConfig.for_model(model_type, **fields)
    with pytest.raises(ValueError, match=f"`text_config` must be .*'{model_type}', which .*({reason})"):
        BlockDiffusionConfig(text_config=text_config)


def tiny(model_type, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


class Capped(LlamaForCausalLM):
    """A head that nobody can know of."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = torch.tanh(outputs.logits)
        return outputs


class Deaf(LlamaModel):
    """A network that reads every mask as causal."""

    def forward(self, *args, attention_mask=None, **kwargs):
        return super().forward(*args, attention_mask=None, **kwargs)


def capped():
    model = stock_model("llama")
    model.__class__ = Capped
    return model


def deaf():
    model = stock_model("llama")
    model.model.__class__ = Deaf
    return model


LOCAL = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 5}
UNKNOWN = {
    # Its layers hold a causal mask of their own, to which ours only adds.
    "GPTNeoForCausalLM": lambda: tiny("gpt_neo", **LOCAL),
    # A recurrent network whose configuration doesn't say so.
    "RwkvForCausalLM": lambda: tiny("rwkv"),
    # Between its network and its last layer lies another one.
    "ModernBertDecoderForCausalLM": lambda: tiny(
        "modernbert-decoder", intermediate_size=48, pad_token_id=0, bos_token_id=0, eos_token_id=1
    ),
    # It takes no mask with two dimensions of tokens.
    "OpenAIGPTLMHeadModel": lambda: tiny("openai-gpt"),
    "Capped": capped,
    "LlamaForCausalLM": deaf,
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("block_size", [1, 4])
def test_networks_that_do_otherwise_than_asked_are_found_out(name, block_size):
    source = UNKNOWN[name]()
    with pytest.raises(ValueError, match=f"`model` must be of a network .* but got {name}, which gives"):
        BlockDiffusionForMaskedLM.from_causal_lm(source, block_size=block_size, mask_token_id=MASK)


def test_the_probe_leaves_no_trace():
    for training in (True, False):
        source = stock_model("llama").train(training)
        state, generator = {name: value.clone() for name, value in source.state_dict().items()}, torch.get_rng_state()
        model = BlockDiffusionForMaskedLM.from_causal_lm(
            source, block_size=7, mask_token_id=MASK, shift_logits=False, clean_attention="causal"
        )
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model.training == training
        config = model.config
        assert (config.block_size, config.shift_logits, config.clean_attention) == (7, False, "causal")


def test_a_head_that_is_no_linear_layer_is_refused():
    source = tiny("bert", is_decoder=True, intermediate_size=48)
    with pytest.raises(ValueError, match="`model` must have a head of one linear layer, but got BertLMHeadModel"):
        BlockDiffusionForMaskedLM.from_causal_lm(source, mask_token_id=MASK)


def test_a_model_of_images_and_text_is_refused():
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": VOCAB_SIZE}
    vision = {
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "image_size": 28,
    }
    config = Gemma3Config(text_config={**text, "num_attention_heads": 2, "head_dim": 16}, vision_config=vision)
    source = Gemma3ForConditionalGeneration(config)
    with pytest.raises(
        ValueError, match="must have the network Gemma3TextModel, of text alone .* but got Gemma3Model"
    ):
        BlockDiffusionForMaskedLM.from_causal_lm(source, mask_token_id=MASK)


def test_a_model_with_adapters_around_it_is_refused():
    peft = pytest.importorskip("peft")
    source = peft.get_peft_model(stock_model("llama"), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(
        ValueError, match="must have the network LlamaModel, of text alone and unwrapped, but got Lora"
    ):
        BlockDiffusionForMaskedLM.from_causal_lm(source, mask_token_id=MASK)


def test_a_block_diffusion_model_is_no_source():
    with pytest.raises(ValueError, match="`model` must|`text_config` must"):
        BlockDiffusionForMaskedLM.from_causal_lm(adapt("llama"), mask_token_id=MASK)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "`block_size` must be an integer >= 1, but got 0"),
        ({"shift_logits": "clean"}, "`shift_logits` must be False, True or 'noisy', but got 'clean'"),
        ({"clean_attention": "full"}, "`clean_attention` must be 'block' or 'causal', but got 'full'"),
        ({"mask_token_id": VOCAB_SIZE}, f"`mask_token_id` must be an id inside the vocabulary.* got {VOCAB_SIZE}"),
        ({"ignore_bos": False}, "`ignore_bos` must be true with `shift_logits`.* but got False"),
        ({"noise_interval": (0.5, 0.1)}, "`noise_interval` must be a pair"),
    ],
)
def test_fields_that_break_their_rule_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockDiffusionConfig(text_config=stock_model("llama").config, **fields)


def test_a_table_of_positions_ends_with_an_error_that_says_so():
    model, message = adapt("gpt2"), "`position_ids` must be below 64, for the network has learned so many"
    ids = random_ids(1, 66)
    for call in (
        lambda: model(input_ids=ids),
        lambda: model(input_ids=ids.repeat(1, 2), labels=ids.repeat(1, 2)),
        lambda: model(input_ids=ids[:, :4], position_ids=torch.arange(61, 65)[None]),
        lambda: model.generate(ids[:, :60], max_new_tokens=5, **GREEDY),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.generate(ids[:, :60], max_new_tokens=4, **GREEDY).shape == (1, 64)
    # Rotary positions go on.
    assert adapt("llama").generate(ids[:, :60], max_new_tokens=6, **GREEDY).shape == (1, 66)


def test_a_noise_level_is_told_to_no_stock_network():
    with pytest.raises(ValueError, match="`timesteps` must be None for a network that is told no noise level"):
        adapt("llama")(input_ids=random_ids(1, 8), timesteps=torch.ones(1))


def test_a_cache_whose_layers_hold_different_texts_is_refused():
    model, ids = adapt("gemma3"), random_ids(1, 12)
    cache = DynamicCache(config=model.config)
    stock_model("gemma3")(ids[:, :8], past_key_values=cache)
    message = "`cache` must hold the whole text in all layers, but got sliding ones among them"
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids[:, 8:], cache=cache)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, max_new_tokens=4, cache=cache)


# what foreign tools do


def test_serving_engines_and_continuous_batching_do_not_take_an_adapted_network(tmp_path):
    model = adapt("llama")
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    for name in [name for name in auto_map if name.startswith("AutoModel")]:
        assert not get_class_from_dynamic_module(auto_map[name], str(tmp_path)).is_backend_compatible()
    # Of the network itself it is true.
    assert LlamaForCausalLM.is_backend_compatible()
    with pytest.raises(ValueError, match="`generate` must be called in place of `generate_batch`"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=4)
    with pytest.raises(ValueError, match="`cache_implementation` must not be 'paged'"):
        model.generate(random_ids(1, 8), cache_implementation="paged", max_new_tokens=4)


def test_losses_of_clean_logits_are_refused():
    ids = random_ids(2, 8)
    with pytest.raises(ValueError, match="`num_items_in_batch` goes with `labels`.* `label_smoothing_factor` and"):
        adapt("llama")(input_ids=ids, num_items_in_batch=torch.tensor(16))


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("weight", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_weights_that_are_no_numbers_are_an_error_of_generate(weight, do_sample):
    model = adapt("llama")
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[3] = torch.nan
    for sampler in SAMPLERS:
        with pytest.raises(ValueError, match="logits of a masked token must be finite, but the model gave NaN or inf"):
            model.generate(random_ids(1, 6), max_new_tokens=6, sampler=sampler, do_sample=do_sample)


def test_a_resize_that_drops_the_mask_token_is_refused():
    model = adapt("llama")
    with pytest.raises(ValueError, match=f"`new_num_tokens` must be at least {VOCAB_SIZE}, for the mask token"):
        model.resize_token_embeddings(MASK)
    assert model.resize_token_embeddings(80).num_embeddings == 80 == model.config.vocab_size


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_integers_of_any_dtype_transforms_and_tracers_give_what_the_model_gives():
    model, ids = adapt("llama"), random_ids(2, 8)
    expected = model(input_ids=ids).logits
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(model(input_ids=ids.to(dtype)).logits, expected)
    traced = torch.jit.trace(model, (ids.flip(0),), strict=False, check_trace=False)
    torch.testing.assert_close(traced(ids)["logits"], expected)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (), {"input_ids": ids, "labels": ids}).loss

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    assert parameters["lm_head.weight"].grad.norm() > 0
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_infilling_of_a_first_token_is_refused_where_nothing_predicts_it():
    ids = random_ids(1, 8)
    ids[0, 0] = MASK
    with pytest.raises(ValueError, match="`input_ids` must begin with a known token, since `shift_logits`"):
        adapt("llama").generate(ids, infill=True, **GREEDY)
    assert (adapt("llama", shift_logits=False).generate(ids, infill=True, **GREEDY) != MASK).all()


def test_flash_attention_which_knows_no_masks_is_refused(tmp_path):
    model = adapt("llama")
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        model.set_attn_implementation("flash_attention_2")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        BlockDiffusionForMaskedLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_the_class_of_the_published_network_refuses_a_folder_of_another_model(tmp_path):
    for model, model_type in ((adapt("llama"), "block_diffusion"), (stock_model("gpt2"), "gpt2")):
        model.save_pretrained(tmp_path / model_type)
        message = f"`model_type` must be 'bd3lm' or 'mdlm', but got '{model_type}': `AutoModelForMaskedLM` finds"
        with pytest.raises(ValueError, match=message):
            BD3LMForMaskedLM.from_pretrained(tmp_path / model_type)
