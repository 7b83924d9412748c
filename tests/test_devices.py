"""
What a GPU would refuse, found without one: tensors on two devices, and operations that CUDA lacks for a dtype.

The simulated GPU computes what the CPU computes; it has no kernels of its own (tests/test_gpu.py needs a GPU).
"""

import pytest
import torch
from conftest import random_model
from cuda_dtypes import lacks_cuda, read_table
from simulated_gpu import GpuTensor, SimulatedGpu
from transformers import DynamicCache, StaticCache

from bd3lm_hf import evaluate_likelihood
from bd3lm_hf.data.collators import BD3LMDataCollator
from bd3lm_hf.evaluation.block_losses import block_statistics, draw_noise
from bd3lm_hf.modeling.diffusion_block_diffusion import forward_process, sample_timesteps
from bd3lm_hf.noise.sampler import NoiseSampler


PADDING = [0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10


def ids(device, width=10):
    return torch.randint(1, 22, (2, width), generator=torch.Generator().manual_seed(0)).to(device)


def left_padded(device):
    return {"attention_mask": torch.tensor(PADDING).to(device)}


def loss_and_gradient(device, text=None, **overrides):
    model = random_model(attn_implementation="sdpa", **overrides).to(device)
    x_0 = ids(device, 16)
    torch.manual_seed(0)
    output = model.train()(x_0, labels=x_0, **(text or {}))
    output.loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    return torch.cat([output.token_nelbo.detach().flatten(), gradient.flatten()])


def packed_loss(device):
    document_ids = torch.tensor([[0] * 6 + [1] * 10, [0] * 16]).to(device)
    return loss_and_gradient(device, {"document_ids": document_ids})


def padded_loss(device):
    attention_mask = torch.tensor([[0] * 5 + [1] * 11, [1] * 16]).to(device)
    return loss_and_gradient(device, {"attention_mask": attention_mask}, time_conditioning=True)


@torch.no_grad()
def evaluated_loss(device):
    return random_model(attn_implementation="eager").to(device)(ids(device, 16), labels=ids(device, 16)).token_nelbo


def noised_copies(device):
    model = random_model(attn_implementation="sdpa", time_conditioning=True).to(device)
    batch = {"input_ids": ids(device, 16), "labels": ids(device, 16)}
    noise, blocks = draw_noise(NoiseSampler(num_copies=2), model.config, (0.1, 0.9), batch, seed=(0,))
    return model.train()(**{**batch, **noise.inputs(batch["input_ids"])}).token_nelbo.detach()


@torch.no_grad()
def scored_blocks(device):
    model = random_model(attn_implementation="sdpa").to(device)
    batch = BD3LMDataCollator(0, True)([{"input_ids": row} for row in ids("cpu", 16).tolist()])
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    noise, blocks = draw_noise(NoiseSampler(), model.config, (0.1, 0.9), batch, seed=(0,))
    return block_statistics(model, batch, noise, blocks, token_bytes=torch.ones(23, dtype=torch.long))


def likelihood(estimator):
    def of(device):
        model = random_model(attn_implementation="sdpa", block_size=2 if estimator == "exact" else 4).to(device)
        sequences = ids("cpu", 12).tolist()
        result = evaluate_likelihood(model, sequences, estimator=estimator, num_draws=1, progress=False)
        return torch.tensor(result.nelbo_per_position[1:])

    return of


def generated(padded=True, cache=None, config=None, **arguments):
    def of(device):
        model = random_model(attn_implementation="sdpa", **(config or {})).to(device)
        torch.manual_seed(0)
        given = {"max_new_tokens": 9, "seed": 0, "pad_token_id": 0, **arguments}
        if padded:
            given |= left_padded(device)
        if cache is not None:
            given["past_key_values"] = cache(model)
        if "negative_prompt_ids" in given:
            given["negative_prompt_ids"] = ids(device, 5)
        text = ids(device)
        if given.get("infill"):
            text[:, [5, 7]] = model.config.mask_token_id
        output = model.generate(
            text, return_dict_in_generate=True, output_scores=True, output_logits=True, output_reveal=True, **given
        )
        return torch.cat([output.sequences.flatten().float(), *(scores.flatten() for scores in output.scores)])

    return of


def continued(device):
    model = random_model(attn_implementation="sdpa").to(device)
    first = model.generate(ids(device), max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    return model.generate(first.sequences, max_new_tokens=9, do_sample=False, past_key_values=first.cache)


WORK = {
    "loss": loss_and_gradient,
    "loss, time-conditioned": lambda device: loss_and_gradient(device, time_conditioning=True),
    "loss, padded": padded_loss,
    "loss, packed": packed_loss,
    "loss in evaluation mode": evaluated_loss,
    "loss of noised copies": noised_copies,
    "block statistics": scored_blocks,
    "exact likelihood": likelihood("exact"),
    "stratified likelihood": likelihood("stratified"),
    "first_hitting": generated(sampler="first_hitting", config={"time_conditioning": True}),
    "ancestral": generated(sampler="ancestral", denoising_steps=3, remask_cap=0.3),
    "confidence": generated(sampler="confidence", confidence_threshold=0.3, eos_token_id=3),
    "margin": generated(sampler="confidence", denoising_steps=2, confidence="margin", do_sample=False),
    "entropy_bound": generated(sampler="entropy_bound", entropy_bound=1.0),
    "processors": generated(top_p=0.9, top_k=5, temperature=0.7, no_repeat_ngram_size=2, repetition_penalty=1.2),
    "stopping": generated(entropy_stop_threshold=2.0, entropy_stop_window=8, eos_token_id=[3, 4]),
    "no cache": generated(use_cache=False),
    "static cache": generated(cache_implementation="static"),
    "dynamic cache": generated(padded=False, cache=lambda model: DynamicCache(config=model.config)),
    "given static cache": generated(
        padded=False, cache=lambda model: StaticCache(config=model.config, max_cache_len=40)
    ),
    "sliding window": generated(config={"max_position_embeddings": 12}, max_new_tokens=20),
    "continuation": continued,
    "infilling": generated(infill=True),
    "guidance": generated(padded=False, guidance_scale=1.5),
    "guidance by a negative prompt": generated(guidance_scale=1.5, negative_prompt_ids=True),
}


TABLE = read_table()


def operations_on_gpu(work):
    """What `work` gives on the simulated GPU, and {operation: whether CUDA lacks it, None where nobody says}."""
    with SimulatedGpu():
        result = work("cuda").cpu()
        return result, {operation: lacks_cuda(operation, TABLE) for operation in GpuTensor.operations}


@pytest.mark.parametrize("name", WORK)
def test_a_gpu_computes_what_the_cpu_computes(name):
    expected = WORK[name]("cpu")
    result, operations = operations_on_gpu(WORK[name])
    torch.testing.assert_close(result, expected)
    assert len(operations) > 20
    assert {operation for operation, is_lacking in operations.items() if is_lacking is not False} == set()


def test_an_operation_that_cuda_lacks_is_found():
    """What training went by in version 0.1.0, and what died on a GPU."""

    def any_per_block(device, dtype=torch.bool):
        flags = torch.ones(2, 8, dtype=dtype).to(device)
        block = torch.arange(8).to(device).expand(2, -1) // 4
        return torch.zeros_like(flags[:, :2]).scatter_reduce(1, block, flags, "amax")

    _, operations = operations_on_gpu(any_per_block)
    assert {operation for operation, is_lacking in operations.items() if is_lacking is not False} == {
        ("scatter_reduce", ("amax",), torch.bool)
    }
    _, operations = operations_on_gpu(lambda device: any_per_block(device, torch.int32))
    assert not any(operations.values())


@pytest.mark.parametrize(
    ("module", "name", "forgets", "work"),
    [
        ("samplers", "BlockNoise.uniform", lambda noise: torch.rand(noise.shape), "first_hitting"),
        ("network", "noise_of_text", lambda x_0, *_: (torch.ones(x_0.shape),) * 2, "loss in evaluation mode"),
        ("network", "sample_timesteps", lambda rows, blocks, *_, **__: torch.rand(rows, blocks), "loss"),
        ("denoising", "sigma_from_mask_probability", lambda p: torch.ones(len(p)), "first_hitting"),
    ],
)
def test_a_tensor_that_stays_on_the_cpu_is_found(monkeypatch, module, name, forgets, work):
    monkeypatch.setattr(f"bd3lm_hf.modeling.{module}_block_diffusion.{name}", forgets)
    with SimulatedGpu(), pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        WORK[work]("cuda")


def test_a_generator_of_the_other_device_is_found():
    with SimulatedGpu(), pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())


def test_noise_of_a_generator_on_the_cpu_comes_to_the_device_of_the_text():
    def drawn(device):
        x_0, generator = ids(device), torch.Generator().manual_seed(0)
        t = sample_timesteps(2, 5, (0.0, 1.0), generator=generator, device=device).repeat_interleave(2, dim=1)
        return forward_process(x_0, t, 22, generator=generator)

    expected = drawn("cpu")
    assert (expected == 22).any()
    with SimulatedGpu():
        noised = drawn("cuda")
        assert noised.device.type == "cuda" and torch.equal(noised.cpu(), expected)


def test_a_module_that_moves_keeps_its_values_and_gradients_cross_devices():
    weight = torch.ones(3, requires_grad=True)
    with SimulatedGpu():
        moved = weight.to("cuda")
        assert (moved.device.type, moved.cpu().device.type, moved.tolist()) == ("cuda", "cpu", [1.0] * 3)
        (moved * 2).sum().backward()
        model = random_model()
        expected = model.state_dict()
        assert model.to("cuda").device.type == "cuda"
        assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
