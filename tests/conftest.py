"""What the tests share: the folder of outside material, tiny configurations, and weights with something to say."""

import math
import os
from pathlib import Path


# Before torch is imported, and for the processes that tests start: models as small as these are slower on two threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.nn.attention import flex_attention

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM
from bd3lm_hf.modeling import diffusion_block_diffusion


@pytest.fixture(scope="session")
def shared_dir():
    """The folder `shared` beside the checkout, with the outputs of the published implementation."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` beside the checkout, which is not here")
    return folder


@pytest.fixture(scope="session")
def find_parity_folder(request):
    """Function name -> folder of a checkpoint in the published format: one lies here, the others in `shared`."""

    def find(name):
        here = Path(__file__).resolve().parent / "parity" / name
        return here if here.is_dir() else request.getfixturevalue("shared_dir") / "parity" / name

    return find


def tiny_config(**overrides):
    """A configuration small enough for hundreds of passes in a second; without dropout unless asked for."""
    fields = {
        "vocab_size": 23,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "block_size": 4,
        "hidden_dropout": 0.0,
        "cond_dim": 16,
    }
    return BD3LMConfig(**{**fields, **overrides})


def randomize(model, seed=0, logit_std=1.0):
    """
    Redraws every parameter in place, so that attention is far from uniform, every branch counts, and the logits over
    random ids have a standard deviation of about `logit_std`. Returns the model.

    A freshly initialised model has zero modulation and zero logits, before which any two masks look the same.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter, std, mean=0.0):
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    training = model.training
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                normal(parameter, 0.2, mean=1.0)
            elif name.endswith("bias"):
                normal(parameter, 0.5 if "adaln" in name else 0.2)
            elif "embed" in name and "noise" not in name:
                normal(parameter, 1.0)
            elif "q_proj" in name or "k_proj" in name:
                normal(parameter, 1.5 / math.sqrt(parameter.shape[-1]))
            else:
                normal(parameter, 1 / math.sqrt(parameter.shape[-1]))
        if isinstance(model, BD3LMForMaskedLM):
            ids = torch.randint(model.config.vocab_size, (1, 64), generator=generator)
            scale = logit_std / model(input_ids=ids).logits.std()
            model.lm_head.weight.mul_(scale)
            if model.lm_head.bias is not None:
                model.lm_head.bias.mul_(scale)
    return model.train(training)


def random_model(seed=0, attn_implementation="eager", **overrides):
    """A `BD3LMForMaskedLM` of `tiny_config(**overrides)` in eval mode, with the weights of `randomize`."""
    config = tiny_config(**overrides)
    model = BD3LMForMaskedLM._from_config(config, attn_implementation=attn_implementation)
    return randomize(model, seed).eval()


@pytest.fixture
def chosen_draws(monkeypatch):
    """
    Function (t [B, blocks], masked [B, L]) after which the training pass meets these draws instead of random ones.

    What may be masked at all remains the model's decision.
    """

    def choose(t, masked):
        def sample_timesteps(batch_size, num_blocks, *args, **kwargs):
            assert batch_size == t.shape[0] and num_blocks <= t.shape[1]
            return t[:, :num_blocks]

        def forward_process(x_0, mask_probability, mask_token_id, maskable=None, **kwargs):
            chosen = masked if maskable is None else masked & maskable
            return torch.where(chosen, mask_token_id, x_0)

        def noise_of_text(x_0, blocks, noise_interval):
            return t.gather(1, blocks.block), None

        monkeypatch.setattr("bd3lm_hf.modeling.network_block_diffusion.sample_timesteps", sample_timesteps)
        monkeypatch.setattr("bd3lm_hf.modeling.network_block_diffusion.forward_process", forward_process)
        monkeypatch.setattr("bd3lm_hf.modeling.network_block_diffusion.noise_of_text", noise_of_text)

    return choose


@pytest.fixture
def recorded_draws(monkeypatch):
    """
    List to which every training pass adds the draws it met, as (t [B, blocks], p [B, L], x_t [B, L]).

    The draws themselves are the package's own.
    """
    draws, times = [], []

    def sample_timesteps(*args, **kwargs):
        times.append(diffusion_block_diffusion.sample_timesteps(*args, **kwargs))
        return times[-1]

    def forward_process(x_0, mask_probability, *args, **kwargs):
        x_t = diffusion_block_diffusion.forward_process(x_0, mask_probability, *args, **kwargs)
        draws.append((times[-1], mask_probability.expand(x_t.shape).clone(), x_t.clone()))
        return x_t

    monkeypatch.setattr("bd3lm_hf.modeling.network_block_diffusion.sample_timesteps", sample_timesteps)
    monkeypatch.setattr("bd3lm_hf.modeling.network_block_diffusion.forward_process", forward_process)
    return draws


@pytest.fixture
def uncompiled_flex_attention(monkeypatch):
    """FlexAttention with its mask function evaluated as it is written: compilation takes many seconds per shape."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with torch.compiler.set_stance("force_eager"):
        yield
