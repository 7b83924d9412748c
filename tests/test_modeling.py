"""What a Transformers user expects beyond numbers: precisions, checkpointing, outputs, the initial state."""

import contextlib
import math

import pytest
import torch
from conftest import DEVICE, random_model, tiny_config

from bd3lm_hf import BD3LMForMaskedLM, BD3LMModel


def loss_and_gradients(model, ids, context=None, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    with context or contextlib.nullcontext():
        loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.fixture
def ids():
    return torch.randint(0, 22, (3, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_gradient_checkpointing_changes_no_gradient(attn_implementation, ids):
    model = random_model(attn_implementation=attn_implementation, time_conditioning=True).train()
    loss, gradients = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed_gradients = loss_and_gradients(model, ids)
    assert torch.equal(loss, checkpointed_loss)
    assert gradients.keys() == checkpointed_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, msg=name)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_bfloat16_and_autocast_give_the_loss_to_their_precision(attn_implementation, ids):
    model = random_model(attn_implementation=attn_implementation).train()
    loss, gradients = loss_and_gradients(model, ids)
    half = random_model(attn_implementation=attn_implementation).train().to(torch.bfloat16)
    for other, context in ((model, torch.autocast("cpu", dtype=torch.bfloat16)), (half, None)):
        other_loss, other_gradients = loss_and_gradients(other, ids, context)
        assert other_loss.dtype == torch.float32
        torch.testing.assert_close(other_loss, loss, rtol=0.01, atol=0)
        for name in ("lm_head.weight", "model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"):
            error = (other_gradients[name].float() - gradients[name]).norm() / gradients[name].norm()
            assert error < 0.1, name


def test_a_new_model_finds_every_token_equally_likely(ids):
    model = BD3LMForMaskedLM(tiny_config()).to(DEVICE)
    assert torch.equal(model(ids).logits, torch.zeros(3, 64, 23))
    output = model(ids, labels=ids, noise_interval=(1.0, 1.0))
    # 22 tokens, the mask token having no probability.
    assert math.isclose(output.loss.item(), math.log(22), rel_tol=1e-6)
    tied = BD3LMForMaskedLM(tiny_config(tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and tied.lm_head.weight.abs().max() > 0


@torch.no_grad()
def test_embeddings_may_be_given_in_place_of_ids(ids):
    model = random_model()
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(embedded, model(ids).logits)


@torch.no_grad()
def test_logits_are_computed_only_where_they_are_kept(ids):
    model = random_model()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=5).logits, logits[:, -5:])
    kept = torch.tensor([3, 17, 40])
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, logits[:, kept])


@torch.no_grad()
def test_hidden_states_and_attentions_come_when_asked_for(ids):
    model = random_model(attn_implementation="eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in output.hidden_states] == [(3, 64, 32)] * 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert len(output.attentions) == 2
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 64))
        # The first block sees itself and nothing behind it.
        assert (weights[:, :, :4, 4:] == 0).all() and (weights[:, :, :4, :4] > 0).all()


@torch.no_grad()
def test_the_base_model_is_the_network_below_the_projection(ids, tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    base = BD3LMModel.from_pretrained(tmp_path).to(DEVICE)
    torch.testing.assert_close(model.lm_head(base(ids).last_hidden_state), model(ids).logits)


def test_a_batch_without_predicted_tokens_has_no_loss(ids):
    model = random_model().train()
    output = model(ids, labels=torch.full_like(ids, -100))
    output.loss.backward()
    assert output.loss.item() == 0


def test_the_loss_takes_a_wrapped_output_projection_too(ids):
    """An adapter or a quantized layer in place of the projection is called, not read."""
    model = random_model().train()
    loss, gradients = loss_and_gradients(model, ids)
    plain = model.lm_head

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = plain

        def forward(self, states):
            return self.base_layer(states)

    model.lm_head = Wrapped()
    wrapped_loss, wrapped_gradients = loss_and_gradients(model, ids)
    torch.testing.assert_close(wrapped_loss, loss)
    torch.testing.assert_close(wrapped_gradients["lm_head.base_layer.weight"], gradients["lm_head.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(wrapped_gradients[name], gradients[name])


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_losses_and_stops_compiling(ids, monkeypatch):
    from torch._dynamo.utils import counters
    from torch._inductor import config

    monkeypatch.setattr(config, "fallback_random", True)
    model = random_model(attn_implementation="sdpa").train()
    compiled, num_graphs = torch.compile(model), []
    # The noise, and with it the number of tokens of each stream, differs from step to step.
    for step in range(10):
        loss, gradients = loss_and_gradients(model, ids, seed=step)
        compiled_loss, compiled_gradients = loss_and_gradients(compiled, ids, seed=step)
        torch.testing.assert_close(compiled_loss, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(compiled_gradients[f"_orig_mod.{name}"], gradient, atol=1e-5, rtol=1e-4)
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[6] == num_graphs[-1]
