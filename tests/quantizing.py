"""
Quantizers, by name, and what each did to a model: for `test_quantizers.py`.

As a script, `python quantizing.py FOLDER REPORT NAME...` loads the model in FOLDER by its remote code, where this
package cannot be imported, once under each quantizer, and leaves the [`findings`] in the file REPORT.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def torchao(name: str) -> TorchAoConfig:
    import torchao.quantization as ao

    if name == "int4":
        # `Int4WeightOnlyConfig` has kernels for accelerators alone.
        return TorchAoConfig(ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)))
    return TorchAoConfig(getattr(ao, name)())


@dataclass
class Quantizer:
    """What Transformers is given as `quantization_config`, and what to expect of it."""

    library: str
    bits: int
    config: Callable[[], Any]
    # Whether `save_pretrained` takes such a model.
    saves: bool = True

    @property
    def tolerance(self) -> float:
        """By which share of the plain model's NELBO that of a quantized one may differ."""
        return 0.02 if self.bits == 8 else 0.05


QUANTIZERS = {
    "bitsandbytes-int8": Quantizer("bitsandbytes", 8, lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes-nf4": Quantizer("bitsandbytes", 4, nf4),
    "bitsandbytes-fp4": Quantizer("bitsandbytes", 4, lambda: BitsAndBytesConfig(load_in_4bit=True)),
    "torchao-int8": Quantizer("torchao", 8, lambda: torchao("Int8WeightOnlyConfig")),
    "torchao-int8-dynamic": Quantizer("torchao", 8, lambda: torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao-int4": Quantizer("torchao", 4, lambda: torchao("int4")),
    "quanto-int8": Quantizer("optimum.quanto", 8, lambda: QuantoConfig(weights="int8"), saves=False),
    "quanto-int4": Quantizer("optimum.quanto", 4, lambda: QuantoConfig(weights="int4"), saves=False),
}


def is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        return False


def is_quantized(module: nn.Module) -> bool:
    """Whether a projection is no longer one of torch's over a weight of torch's in floating point."""
    if type(module) is not nn.Linear:
        return True
    return type(module.weight) is not nn.Parameter or not module.weight.is_floating_point()


def quantized_share(model: nn.Module) -> float:
    """The share of the parameters of all layers' projections that are quantized."""
    config, total, quantized = model.config, 0, 0
    wide = config.hidden_size * config.intermediate_size
    for name, module in model.named_modules():
        part = name.rpartition(".")[2]
        if part in PROJECTIONS:
            numel = wide if part in ("up_proj", "down_proj") else config.hidden_size**2
            total += numel
            quantized += numel * is_quantized(module)
    expected = config.num_hidden_layers * (4 * config.hidden_size**2 + 2 * wide)
    assert total == expected, f"the layers hold {expected} parameters in projections, found {total}"
    return quantized / total


def kept_projections(model: nn.Module) -> list[str]:
    """Names of the projections that are as they were."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and not is_quantized(module)]


@torch.no_grad()
def nelbo(model: nn.Module, ids: torch.Tensor) -> float:
    """Nats per token of texts [batch, length], the mean over eight draws of the noise, the same for the same texts."""
    model.eval()
    return sum(model(input_ids=ids, labels=ids, noise_seed=seed).loss.item() for seed in range(8)) / 8


def findings(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    text = model.generate(ids[:2, :8], max_new_tokens=8, sampler="confidence", do_sample=False)
    return {
        "share": quantized_share(model),
        "kept": kept_projections(model),
        "nelbo": nelbo(model, ids),
        "text": text.tolist(),
    }


def main(folder: str, report: str, *names: str) -> None:
    sys.modules["bd3lm_hf"] = None  # import bd3lm_hf raises ImportError from here on
    ids, found = torch.load(Path(folder) / "texts.pt"), {}
    for name in names:
        quantization_config = QUANTIZERS[name].config()
        model = AutoModelForMaskedLM.from_pretrained(
            folder, trust_remote_code=True, quantization_config=quantization_config
        )
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        found[name] = findings(model, ids)
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
