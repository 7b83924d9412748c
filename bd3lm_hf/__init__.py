"""Block Discrete Denoising Diffusion Language Models (BD3-LMs, arXiv 2503.09573) for Hugging Face Transformers."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .conversion import convert_checkpoint, from_published_state_dict, to_published_state_dict
from .modeling.configuration_bd3lm import BD3LMConfig
from .modeling.denoising_bd3lm import CommitCache, EntropyStoppingCriteria
from .modeling.diffusion_bd3lm import (
    FULL_NOISE_INTERVAL,
    NOISE_SCHEDULES,
    NoiseSchedule,
    forward_process,
    sample_timesteps,
    subs_log_probs,
)
from .modeling.generation_bd3lm import BD3LMGenerateOutput, BD3LMGenerationConfig, BlockDiffusionGenerationMixin
from .modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel, BD3LMOutput, BD3LMPreTrainedModel
from .modeling.samplers_bd3lm import SAMPLERS, ConfidenceSampler, FirstHittingSampler, Sampler


__version__ = "0.1.0"

__all__ = [
    "BD3LMConfig",
    "BD3LMForMaskedLM",
    "BD3LMGenerateOutput",
    "BD3LMGenerationConfig",
    "BD3LMModel",
    "BD3LMOutput",
    "BD3LMPreTrainedModel",
    "BlockDiffusionGenerationMixin",
    "CommitCache",
    "ConfidenceSampler",
    "EntropyStoppingCriteria",
    "FULL_NOISE_INTERVAL",
    "FirstHittingSampler",
    "Likelihood",
    "NOISE_SCHEDULES",
    "NoiseSchedule",
    "SAMPLERS",
    "Sampler",
    "convert_checkpoint",
    "evaluate_likelihood",
    "forward_process",
    "from_published_state_dict",
    "load_documents",
    "load_tokenizer",
    "pack_documents",
    "sample_timesteps",
    "split_documents",
    "subs_log_probs",
    "to_published_state_dict",
    "train_tokenizer",
    "unigram_perplexity",
]

AutoConfig.register(BD3LMConfig.model_type, BD3LMConfig)
AutoModel.register(BD3LMConfig, BD3LMModel)
AutoModelForMaskedLM.register(BD3LMConfig, BD3LMForMaskedLM)
AutoModelForCausalLM.register(BD3LMConfig, BD3LMForMaskedLM)


# What needs the package `datasets` is imported when it is asked for.
_LAZY = {
    "Likelihood": "evaluation",
    "evaluate_likelihood": "evaluation",
    "load_documents": "data",
    "load_tokenizer": "data",
    "pack_documents": "data",
    "split_documents": "data",
    "train_tokenizer": "data",
    "unigram_perplexity": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
