"""
Tensor parallelism (`tp_plan="auto"`): every projection has a place in the plan, and two processes that hold half of
each compute what one computes that holds all.
"""

import json
import re

import pytest
import torch
from adapted import adapted_lm
from conftest import random_model
from transformers import AutoModelForMaskedLM
from transformers.distributed import DistributedConfig


# Transformers 5.17 splits even vocabularies alone.
EVEN = {"vocab_size": 24}
GEMMA = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
NEOX = {"num_key_value_heads": None}


def adapted(model_type, **overrides):
    return adapted_lm(model_type=model_type, overrides=EVEN | overrides, block_size=4)


MODELS = {
    "bd3lm": lambda: random_model(attn_implementation="sdpa", **EVEN),
    "bd3lm_tied": lambda: random_model(attn_implementation="sdpa", tie_word_embeddings=True, **EVEN),
    "llama": lambda: adapted("llama"),
    "llama_tied": lambda: adapted("llama", tie_word_embeddings=True),
    "qwen3": lambda: adapted("qwen3"),
    "gemma3": lambda: adapted("gemma3_text", tie_word_embeddings=True, **GEMMA),
    "gpt_neox": lambda: adapted("gpt_neox", **NEOX),
}
# What every device holds whole: small, or what the stock plan leaves so.
WHOLE = r"norm|noise_embedding|adaln_modulation|layernorm"
GENERATIONS = {
    "first_hitting": {},
    "static": {"cache_implementation": "static"},
    "confidence": {"sampler": "confidence", "do_sample": False},
}


def ids():
    return torch.randint(22, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_every_projection_has_a_place_in_the_plan_and_every_place_is_one(name):
    model = MODELS[name]()
    modules = {re.sub(r"\.\d+\.", ".*.", module): part for module, part in model.named_modules()}
    plan = model.tp_plan
    assert plan.keys() <= modules.keys()
    projections = {
        module for module, part in modules.items() if type(part) is torch.nn.Linear and not re.search(WHOLE, module)
    }
    assert len(projections) > 4 and projections <= plan.keys()
    assert {plan[name] for name in projections} == {"colwise", "rowwise", "colwise_gather_output"}
    assert plan[[name for name, part in modules.items() if part is model.get_output_embeddings()][0]].endswith(
        "output"
    )


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (MODELS["bd3lm"], 3, "must be a divisor of the number of heads of keys and values, 2, but got 3"),
        (MODELS["llama"], 4, "must be a divisor of the number of heads of keys and values, 2, but got 4"),
        (MODELS["gpt_neox"], 3, "must be a divisor of the number of heads of keys and values, 4, but got 3"),
        (lambda: adapted("gpt2"), 2, "must be 1 for 'gpt2', whose network has no tensor-parallel plan, but got 2"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(make, size, message):
    model = make()
    with pytest.raises(ValueError, match=f"`tp_size` {message}"):
        type(model).maybe_distribute_model(model, DistributedConfig(tp_size=size), None)


def test_what_can_be_split_is_not_refused():
    for model, config in (
        (MODELS["bd3lm"](), DistributedConfig(tp_size=2)),
        # Gathered before they are taken apart into heads.
        (adapted("olmo2", num_attention_heads=4, num_key_value_heads=2), DistributedConfig(tp_size=4)),
        (adapted("gpt2"), DistributedConfig(tp_size=2, tp_plan={"transformer.h.*.mlp.c_fc": "colwise"})),
        (adapted("gpt2"), DistributedConfig(tp_size=1)),
        (adapted("gpt2"), None),
    ):
        assert type(model).maybe_distribute_model(model, config, None) is model


def compute(model, seed=0):
    """What a model scores, writes, and learns from a text."""
    found = {}
    with torch.no_grad():
        found["logits"] = model.eval()(ids()).logits
    for name, options in GENERATIONS.items():
        torch.manual_seed(seed)
        found[name] = model.generate(ids()[:, :5], max_new_tokens=13, **options)
    torch.manual_seed(seed)
    loss = model.train()(input_ids=ids(), labels=ids()).loss
    loss.backward()
    found["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[f"gradient of {name}"] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def of_process(rank, folder, names):
    """A process of two: writes what it has computed, the shapes that it holds, and what a whole model computes."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in names:
        model = AutoModelForMaskedLM.from_pretrained(f"{folder}/{name}", tp_plan="auto")
        shares = {
            key: [
                parameter.numel(),
                parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel(),
            ]
            for key, parameter in model.named_parameters()
        }
        with open(f"{folder}/{name}/shares-{rank}.json", "w") as file:
            json.dump(shares, file)
        torch.save(compute(model), f"{folder}/{name}/found-{rank}.pt")
        # Gathered, and written by the first process.
        model.save_pretrained(f"{folder}/{name}/saved")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
    torch.multiprocessing.spawn(of_process, (str(folder), [*MODELS]), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_compute_what_one_computes(two_processes, name):
    folder = two_processes / name
    expected = compute(AutoModelForMaskedLM.from_pretrained(folder))
    for rank in range(2):
        found = torch.load(folder / f"found-{rank}.pt")
        assert found.keys() == expected.keys()
        for key, value in found.items():
            if key in GENERATIONS:
                assert torch.equal(value, expected[key]), key
            else:
                scale = expected[key].abs().max().item()
                torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5 * max(scale, 1), msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_holds_half_of_every_projection(two_processes, name):
    shares = [json.loads((two_processes / name / f"shares-{rank}.json").read_text()) for rank in range(2)]
    for key, (numel, own) in shares[0].items():
        other = shares[1][key][1]
        # Of a projection that adds its input's halves up, the bias is added once. Transformers 5.17 splits an
        # embedding only where it is the head too.
        is_whole = re.search(WHOLE, key) or key.endswith("bias") and own == numel
        is_whole = is_whole or "embed" in key and "lm_head.weight" in shares[0] and own == numel
        assert own == other == (numel if is_whole else numel / 2), key


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_split_model_is_saved_as_one(two_processes, name):
    folder = two_processes / name
    saved, expected = (AutoModelForMaskedLM.from_pretrained(path) for path in (folder / "saved", folder))
    torch.testing.assert_close(saved.state_dict(), expected.state_dict(), rtol=0, atol=0)
