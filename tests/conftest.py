"""
What the tests share: the device, the folder of outside material, tiny configurations, weights with something to say.

`--device cuda` runs the tests of `ON_DEVICE` there: the models of this file are on it, and so are the tensors that
test files make without saying where. What the package makes is where the package puts it.
"""

import math
import os
import sys
from pathlib import Path


# Before torch is imported, and for the processes that tests start: models as small as these are slower on two threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors.torch import load_file
from simulated_gpu import SimulatedGpu
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM
from bd3lm_hf.modeling import diffusion_block_diffusion


TESTS = Path(__file__).parent
# Where models and tensors of the tests are: `--device`, of the device "simulated" the one that is simulated.
DEVICE = torch.device("cpu")
# The tests that run on any device.
ON_DEVICE = (
    "test_adapted_distribution.py",
    "test_adapted_generation.py",
    "test_adapted_networks.py",
    "test_adapted_training.py",
    "test_continuation.py",
    "test_copies.py",
    "test_diffusion.py",
    "test_errors.py",
    "test_evaluation.py",
    "test_family_samplers.py",
    "test_first_hitting.py",
    "test_fixture.py",
    "test_fuzz.py",
    "test_generation.py",
    "test_gpu.py",
    "test_guidance.py",
    "test_infill.py",
    "test_loss.py",
    "test_modeling.py",
    "test_parity.py",
    "test_parity_adapted.py",
    "test_peft.py",
    "test_recipes.py",
    "test_reference.py",
    "test_samplers.py",
    "test_seeds.py",
    "test_stopping.py",
    "test_trainer.py",
    "test_training_modes.py",
    "test_variance.py",
)
FACTORIES = (
    torch.arange,
    torch.as_tensor,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
)


class OnDevice(TorchFunctionMode):
    """
    Tensors that test files make are on `DEVICE`, unless they say otherwise.

    Random numbers are drawn where their generator is, so that they are the same on every device. A default device of
    torch's would do so for the package as well, and hide what it forgets to put on its inputs' device.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)
        made_by = Path(sys._getframe(1).f_code.co_filename)
        if func not in FACTORIES or made_by.parent != TESTS or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        return func(*args, **kwargs, device=DEVICE if generator is None else generator.device).to(DEVICE)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="cpu, cuda, cuda:1, ..., or simulated: a GPU whose work the CPU does (tests/simulated_gpu.py)",
    )


def pytest_configure(config):
    global DEVICE
    device = config.getoption("--device")
    if device == "cpu":
        return
    if device == "simulated":
        simulated_gpu = SimulatedGpu()
        simulated_gpu.__enter__()
        config.add_cleanup(lambda: simulated_gpu.__exit__(None, None, None))
    elif not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device} needs a CUDA device, which is not here")
    DEVICE = torch.device("cuda" if device == "simulated" else device)
    on_device = OnDevice()
    on_device.__enter__()
    config.add_cleanup(lambda: on_device.__exit__(None, None, None))


def pytest_ignore_collect(collection_path, config):
    is_test = collection_path.name.startswith("test_")
    if is_test and config.getoption("--device") != "cpu" and collection_path.name not in ON_DEVICE:
        return True


@pytest.fixture(scope="session")
def shared_dir():
    """The folder `shared` beside the checkout, with the outputs of the published implementation."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` beside the checkout, which is not here")
    return folder


@pytest.fixture(scope="session")
def find_parity_folder(request):
    """Function (name, kind) -> folder of a published checkpoint: some lie here, the others in `shared`."""

    def find(name, kind="parity"):
        here = Path(__file__).resolve().parent / kind / name
        return here if here.is_dir() else request.getfixturevalue("shared_dir") / kind / name

    return find


def load_tensors(path):
    """The tensors of a safetensors file, on `DEVICE`."""
    return {name: tensor.to(DEVICE) for name, tensor in load_file(path).items()}


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

    The model is on `DEVICE` from then on. A freshly initialised model has zero modulation and zero logits, before
    which any two masks look the same.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter, std, mean=0.0):
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    training = model.training
    model.to(DEVICE).eval()
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
    """A `BD3LMForMaskedLM` of `tiny_config(**overrides)` in eval mode on `DEVICE`, with the weights of `randomize`."""
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

        def noise_of_text(x_0, blocks, noise_interval, seed=0):
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
