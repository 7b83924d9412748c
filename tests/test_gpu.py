"""What only a GPU can show: `python -m pytest tests/test_gpu.py` there; everywhere else these tests are skipped."""

import pytest
import torch
from conftest import random_model
from transformers.utils import is_flash_attn_2_available


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, which is not here")


@pytest.fixture
def ids():
    return torch.randint(0, 22, (3, 64), generator=torch.Generator().manual_seed(0)).cuda()


def gpu_model(attn_implementation, dtype=torch.float32):
    return random_model(attn_implementation=attn_implementation).to("cuda", dtype)


def loss_and_gradients(model, ids):
    torch.manual_seed(0)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention"])
def test_training_agrees_with_the_dense_reference(attn_implementation, ids):
    expected_loss, expected = loss_and_gradients(gpu_model("eager"), ids)
    loss, gradients = loss_and_gradients(gpu_model(attn_implementation), ids)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=0)
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_logits_agree_with_those_of_the_cpu(attn_implementation, ids):
    expected = random_model().cpu()(ids.cpu()).logits
    torch.testing.assert_close(gpu_model(attn_implementation)(ids).logits.cpu(), expected, rtol=0, atol=1e-2)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs the package flash-attn, which is not here")
@torch.no_grad()
def test_flash_attention_denoises_a_block_against_the_cache_as_sdpa_does(ids):
    texts = [
        gpu_model(implementation, torch.bfloat16).generate(
            ids[:, :8], max_new_tokens=4, sampler="confidence", do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )
        for implementation in ("flash_attention_2", "sdpa")
    ]  # fmt: skip
    torch.testing.assert_close(texts[0].logits[0], texts[1].logits[0], rtol=0, atol=0.1)


def test_bfloat16_by_autocast_trains_as_float32_does(ids):
    model = gpu_model("sdpa")
    expected, gradients = loss_and_gradients(model, ids)
    gradients = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss, rounded = loss_and_gradients(model, ids)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.02)
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        error = (rounded[name] - gradients[name]).norm() / gradients[name].norm()
        assert 0 < error < 0.1, name


@torch.no_grad()
def test_nothing_is_left_on_the_cpu_by_a_trainer(ids, tmp_path):
    """Rows as lists, which need no `datasets`."""
    from bd3lm_hf import BD3LMTrainer, BD3LMTrainingArguments

    rows = [{"input_ids": row} for row in ids.tolist()]
    args = BD3LMTrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], save_strategy="no", bf16=True, per_device_eval_batch_size=3
    )
    trainer = BD3LMTrainer(random_model(attn_implementation="sdpa"), args, train_dataset=rows, eval_dataset=rows)
    with torch.enable_grad():
        trainer.train()
    assert 0 < trainer.evaluate()["eval_nelbo"] < 10
    assert trainer.model.device.type == "cuda"


def test_generation_is_the_same_with_every_cache(ids):
    model = gpu_model("sdpa")
    arguments = {"max_new_tokens": 24, "sampler": "confidence", "do_sample": False, "denoising_steps": 2}
    expected = model.generate(ids[:, :6], use_cache=False, **arguments)
    assert torch.equal(model.generate(ids[:, :6], **arguments), expected)
    assert torch.equal(model.generate(ids[:, :6], cache_implementation="static", **arguments), expected)
