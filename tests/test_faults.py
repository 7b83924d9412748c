"""What a user's tools do with a model: silent mistakes are refused, and what is repeated gives the same again."""

import itertools
import re

import pytest
import torch
from conftest import random_model, tiny_config
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bd3lm_hf import BD3LMForMaskedLM, BD3LMGenerationConfig
from bd3lm_hf.data.collators import BD3LMDataCollator
from bd3lm_hf.modeling.loss_block_diffusion import token_nats


SAMPLERS = {
    "first_hitting": {},
    "ancestral": {"denoising_steps": 3},
    "remasking": {"sampler": "ancestral", "denoising_steps": 3, "remask_cap": 0.5},
    "confidence": {"denoising_steps": 3},
    "negative_entropy": {"sampler": "confidence", "confidence": "negative_entropy"},
    "threshold": {"sampler": "confidence", "confidence_threshold": 0.3},
    "entropy_bound": {"entropy_bound": 1.0},
}
PROMPTS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return {"sampler": request.param, **SAMPLERS[request.param]}


@pytest.fixture
def model():
    return random_model(attn_implementation="sdpa", bos_token_id=0, eos_token_id=None, pad_token_id=0)


def texts(lengths, number=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(22, (lengths[index % len(lengths)],), generator=generator) for index in range(number)]
    return [{"input_ids": row, "labels": row} for row in rows]


def plain_trainer(folder, model, rows=None, trainer_class=Trainer, args_class=TrainingArguments, **kwargs):
    """The plain Trainer, whose further arguments come first and then those of its `TrainingArguments`."""
    rows = texts([16]) if rows is None else rows
    names = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics", "callbacks")
    of_trainer = {name: kwargs.pop(name) for name in names if name in kwargs}
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-2}
    args = args_class(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **{**arguments, **kwargs})
    collator = BD3LMDataCollator(0, model.config.ignore_bos)
    return trainer_class(model, args, collator, train_dataset=rows, eval_dataset=rows, **of_trainer)


# The plain Trainer.


@pytest.mark.parametrize(
    "asked",
    [{"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda outputs, labels, **kwargs: outputs.logits.sum()}],
    ids=lambda asked: next(iter(asked)),
)
@pytest.mark.parametrize("call", ["train", "evaluate"])
def test_losses_of_clean_logits_are_refused_in_the_plain_trainer(tmp_path, model, asked, call):
    trainer = plain_trainer(tmp_path, model, **asked)
    with pytest.raises(
        ValueError, match="`num_items_in_batch` goes with `labels`.* `label_smoothing_factor` and `comp"
    ):
        getattr(trainer, call)()


def test_a_metric_of_the_plain_trainer_is_handed_no_logits(tmp_path, model):
    """`compute_metrics` and `preprocess_logits_for_metrics` have nothing that could be taken for a prediction."""
    seen = []

    def preprocess_logits_for_metrics(logits, labels):
        seen.append(logits)
        return logits

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"seen": len(seen)}

    trainer = plain_trainer(
        tmp_path,
        model,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    metrics = trainer.evaluate()
    assert seen == [(), ()] and metrics["eval_seen"] == 2
    assert metrics["eval_loss"] == plain_trainer(tmp_path, model).evaluate()["eval_loss"]


def test_the_plain_trainers_evaluation_of_the_same_weights_is_the_same(tmp_path, model):
    trainer = plain_trainer(tmp_path, model)
    first = trainer.evaluate()["eval_loss"]
    torch.rand(7)
    assert trainer.evaluate()["eval_loss"] == first
    with torch.no_grad():
        model.lm_head.bias[3] += 1
    assert trainer.evaluate()["eval_loss"] != first


def test_the_best_model_of_the_plain_trainer_has_the_loss_that_made_it_the_best(tmp_path, model):
    trainer = plain_trainer(
        tmp_path,
        model,
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(losses)) == 6 and trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


# Greedy decoding.


def test_greedy_decoding_gives_one_text(model, sampler):
    """With any cache and without, whatever torch's generator has drawn before, alone and in a batch."""
    arguments = {**sampler, "max_new_tokens": 11, "do_sample": False, "repetition_penalty": 3.0}
    expected = model.generate(PROMPTS, **arguments)
    assert len(expected[:, 5:].unique()) > 3
    for cache in (
        {},
        {"use_cache": False},
        {"cache": DynamicCache(config=model.config)},
        {"cache": StaticCache(config=model.config, max_cache_len=32)},
        {"cache_implementation": "static"},
    ):
        torch.rand(5)
        assert torch.equal(model.generate(PROMPTS, **arguments, **cache), expected)
    for row in range(2):
        assert torch.equal(model.generate(PROMPTS[row : row + 1], **arguments), expected[row : row + 1])
    padded = torch.tensor([[0, 0, 0, 1, 2], PROMPTS[1].tolist()])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    together = model.generate(padded, attention_mask=mask, **arguments)
    assert torch.equal(together[1], expected[1])
    assert torch.equal(together[0, 3:], model.generate(padded[:1, 3:], **arguments)[0])


# Generation settings.


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.generation_config, "temperature", 0.7),
        lambda model: setattr(model, "generation_config", BD3LMGenerationConfig(temperature=0.7)),
        lambda model: setattr(model, "generation_config", GenerationConfig(temperature=0.7)),
    ],
    ids=["attribute", "config", "plain_config"],
)
def test_sampling_arguments_without_do_sample_are_saved_and_read(tmp_path, model, change):
    change(model)
    model.save_pretrained(tmp_path)
    plain = GenerationConfig.from_pretrained(tmp_path)
    plain.validate(strict=True)
    assert plain.temperature == 0.7 and plain.do_sample
    loaded = BD3LMForMaskedLM.from_pretrained(tmp_path).generation_config
    assert isinstance(loaded, BD3LMGenerationConfig) and loaded.temperature == 0.7 and loaded.do_sample
    # A sampling argument beside a plain refusal to sample stays the mistake that it is.
    model.generation_config.do_sample = False
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "greedy")


def test_a_generation_config_without_do_sample_is_saved_and_read(tmp_path):
    config = BD3LMGenerationConfig(top_p=0.9)
    config.save_pretrained(tmp_path)
    plain = GenerationConfig.from_pretrained(tmp_path)
    plain.validate(strict=True)
    assert (plain.top_p, plain.do_sample, config.do_sample) == (0.9, True, None)


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_ids_of_any_integer_dtype_are_taken(model, dtype):
    ids = PROMPTS.to(dtype)
    torch.testing.assert_close(model(ids).logits, model(PROMPTS).logits)
    torch.testing.assert_close(model(ids, labels=ids).loss, model(PROMPTS, labels=PROMPTS).loss)
    torch.testing.assert_close(model(ids, clean_input_ids=ids).logits, model(PROMPTS, clean_input_ids=PROMPTS).logits)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    sequences = model.generate(ids, **arguments)
    assert sequences.dtype == torch.int64 and torch.equal(sequences, model.generate(PROMPTS, **arguments))
    guided = model.generate(PROMPTS, guidance_scale=2.0, negative_prompt_ids=ids.flip(0), **arguments)
    expected = model.generate(PROMPTS, guidance_scale=2.0, negative_prompt_ids=PROMPTS.flip(0), **arguments)
    assert torch.equal(guided, expected) and not torch.equal(guided, sequences)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype_are_taken(model, dtype):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    arguments = {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 3.0}
    expected = model.generate(PROMPTS, attention_mask=mask, **arguments)
    assert torch.equal(model.generate(PROMPTS, attention_mask=mask.to(dtype), **arguments), expected)
    assert not torch.equal(model.generate(PROMPTS, **arguments), expected)
    for labels in ({}, {"labels": PROMPTS}):
        outputs = [model(PROMPTS, attention_mask=one, **labels) for one in (mask, mask.to(dtype))]
        torch.testing.assert_close(*(output.logits if output.loss is None else output.loss for output in outputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_no_integers_are_refused(model, dtype):
    ids = PROMPTS.to(dtype)
    with pytest.raises(ValueError, match=f"`input_ids` must be of an integer dtype, but got {dtype}"):
        model(ids)
    with pytest.raises(ValueError, match=f"`labels` must be of an integer dtype, but got {dtype}"):
        model(PROMPTS, labels=ids)
    with pytest.raises(ValueError, match=f"`input_ids` must be of an integer dtype, but got {dtype}"):
        model.generate(ids, max_new_tokens=2)


# Sizes.


def test_a_resize_that_drops_the_mask_token_is_refused(model):
    expected = model(PROMPTS).logits
    for arguments in ({"new_num_tokens": 22}, {"new_num_tokens": 18, "pad_to_multiple_of": 2}):
        with pytest.raises(ValueError, match=r"`new_num_tokens` must be at least 23, for the mask token .* but got"):
            model.resize_token_embeddings(**arguments)
    assert torch.equal(model(PROMPTS).logits, expected)
    assert model.resize_token_embeddings(20, pad_to_multiple_of=8).num_embeddings == 24
    model.resize_token_embeddings(40)
    torch.testing.assert_close(model(PROMPTS).logits[..., :23], expected)
    model.resize_token_embeddings(23)
    torch.testing.assert_close(model(PROMPTS).logits, expected)
    assert model.config.vocab_size == 23 and model.config.mask_token_id == 22


# Transforms of torch.


@pytest.mark.parametrize("labels", [{}, {"labels": PROMPTS}], ids=["logits", "loss"])
def test_torch_func_gives_the_gradients_of_backward(model, labels):
    parameters = dict(model.named_parameters())

    def value(parameters):
        output = torch.func.functional_call(model, parameters, (PROMPTS,), labels)
        return output.loss if labels else output.logits.square().mean()

    gradients = torch.func.grad(value)(parameters)
    value(parameters).backward()
    assert parameters["lm_head.weight"].grad.norm() > 0
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_gives_the_logits_of_other_texts(model):
    traced = torch.jit.trace(model, (PROMPTS,), strict=False, check_trace=False)
    other = PROMPTS.flip(0) + 1
    torch.testing.assert_close(traced(other)["logits"], model(other).logits)
    model.config.return_dict = False
    as_tuple = torch.jit.trace(model, (PROMPTS,), check_trace=False)
    torch.testing.assert_close(as_tuple(other)[0], model(other)[0])
    assert isinstance(model(PROMPTS, labels=PROMPTS), tuple)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [(), ("labels",), ("labels", "attention_mask")], ids="+".join)
def test_a_pass_over_shapes_alone_has_gradients(training, arguments):
    with torch.device("meta"):
        model = BD3LMForMaskedLM(tiny_config()).train(training)
        ids = torch.ones(2, 8, dtype=torch.long)
        output = model(ids, **dict.fromkeys(arguments, ids))
    assert output.loss.shape == () if arguments else output.logits.shape == (2, 8, 23)
    (output.loss if arguments else output.logits.sum()).backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


# Compilers.


def test_generate_calls_a_compiled_forward():
    model = random_model(attn_implementation="sdpa", num_hidden_layers=1)
    arguments = {"max_new_tokens": 3, "sampler": "confidence", "denoising_steps": 1, "do_sample": False}
    expected = model.generate(PROMPTS, **arguments)
    runs = []

    def backend(graph, example_inputs):
        def run(*args):
            runs.append(len(args))
            return graph(*args)

        return run

    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(model.generate(PROMPTS, **arguments), expected)
    assert runs


def test_nats_are_not_compiled_anew_for_each_number_of_tokens():
    torch._dynamo.reset()
    head, num_graphs = torch.nn.Linear(8, 23), []
    compiled = torch.compile(lambda *args: token_nats(*args, head, 22), backend="aot_eager")
    for number in (12, 17, 9, 20, 5, 14):
        states, targets = torch.randn(number, 8, requires_grad=True), torch.randint(22, (number,))
        nats = compiled(states, targets)
        torch.testing.assert_close(nats, token_nats(states, targets, head, 22))
        nats.sum().backward()
        num_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert num_graphs[1] == num_graphs[-1]


@pytest.mark.parametrize("trainer", ["plain", pytest.param("bd3lm", marks=pytest.mark.slow)])
def test_lengths_that_vary_are_compiled_twice(tmp_path, trainer):
    """Once for the first length and once for all others."""
    from bd3lm_hf import BD3LMTrainer, BD3LMTrainingArguments

    classes = {"plain": (Trainer, TrainingArguments), "bd3lm": (BD3LMTrainer, BD3LMTrainingArguments)}[trainer]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows = texts([12, 17, 9, 20, 14, 23, 11, 31], number=16)
    arguments = {"max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 1, "torch_compile": True}
    arguments |= {"torch_compile_backend": "aot_eager", "train_sampling_strategy": "sequential"}
    model = random_model(attn_implementation="sdpa", num_hidden_layers=1)
    trainer = plain_trainer(tmp_path, model, rows, *classes, **arguments)
    num_graphs = []

    class Counting(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            num_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    trainer.add_callback(Counting())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and all(0 < loss < 20 for loss in losses)
    assert 0 < num_graphs[0] < num_graphs[2] == num_graphs[-1]


# Logits that are no numbers.


class Spoil(LogitsProcessor):
    """Writes a value into the scores of one token, or of all."""

    def __init__(self, value, tokens):
        self.value, self.tokens = value, tokens

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.tokens] = self.value
        return scores


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("weight", ["lm_head.bias", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_an_error_of_generate(model, sampler, do_sample, weight, value):
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[3] = value
    for warper in ({}, {"top_p": 0.9, "top_k": 5}) if do_sample else ({},):
        with pytest.raises(ValueError, match="logits of a masked token must be finite, but the model gave NaN or inf"):
            model.generate(PROMPTS, max_new_tokens=6, do_sample=do_sample, **sampler, **warper)


@pytest.mark.parametrize("do_sample", [True, False])
def test_scores_that_are_no_numbers_are_an_error_of_the_processors(model, sampler, do_sample):
    for value, tokens in itertools.product((torch.nan, torch.inf), ([3], slice(None))):
        with pytest.raises(
            ValueError, match="got others from the `logits_processor` and the constraints, out of finite"
        ):
            model.generate(
                PROMPTS,
                max_new_tokens=6,
                do_sample=do_sample,
                logits_processor=[Spoil(value, tokens)],
                **sampler,
            )
    # A token may be banned.
    banned = model.generate(
        PROMPTS, max_new_tokens=6, do_sample=do_sample, logits_processor=[Spoil(-torch.inf, [3])], **sampler
    )
    assert (banned[:, 5:] != 3).all()


def test_logits_that_are_repaired_end_every_block(model, sampler):
    with torch.no_grad():
        model.lm_head.bias[3] = torch.nan
    sequences = model.generate(PROMPTS, max_new_tokens=6, remove_invalid_values=True, **sampler)
    assert sequences.shape == (2, 11) and (sequences != 22).all()


# Adapters of tied embeddings.


@pytest.mark.parametrize(
    "arguments",
    [
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": [1, 2], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        None,
    ],
    ids=["tokens", "tied_tokens", "tied_embeddings", "tied_head", "token_adapter"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_leaves_out_the_heads_bias_is_refused(arguments):
    peft = pytest.importorskip("peft")

    def adapted(**overrides):
        if arguments is None:
            config = peft.TrainableTokensConfig(token_indices=[1, 2])
        else:
            config = peft.LoraConfig(target_modules=["q_proj"], **arguments)
        return peft.get_peft_model(random_model(**overrides), config).eval()

    for labels in ({}, {"labels": PROMPTS}):
        with pytest.raises(ValueError, match=re.escape("`lm_head` must keep its bias, which PEFT leaves out where")):
            adapted(tie_word_embeddings=True)(input_ids=PROMPTS, **labels)
    if arguments is None or "lm_head" not in arguments.get("modules_to_save", []):
        torch.testing.assert_close(adapted()(input_ids=PROMPTS).logits, random_model()(PROMPTS).logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_embeddings_of_a_tied_model_are_adapted_as_the_error_says():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = random_model(tie_word_embeddings=True)
    expected = model(PROMPTS).logits
    torch.testing.assert_close(peft.get_peft_model(model, config).eval()(input_ids=PROMPTS).logits, expected)
