"""
Block Discrete Denoising Diffusion Language Models (BD3-LMs, arXiv 2503.09573) for Hugging Face Transformers.

Here stands what people type; everything else is imported from its room, such as
`from bd3lm_hf.evaluation.variance import gradient_variance`.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .kernels import attach
from .modeling.cache_block_diffusion import CommitCache
from .modeling.configuration_bd3lm import BD3LMConfig
from .modeling.configuration_causal_lm import BlockDiffusionConfig
from .modeling.denoising_block_diffusion import EntropyStoppingCriteria
from .modeling.generation_block_diffusion import BD3LMGenerationConfig, BlockDiffusionGenerationMixin
from .modeling.infilling_block_diffusion import TextInfillingPipeline
from .modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel, BD3LMPreTrainedModel
from .modeling.modeling_causal_lm import BlockDiffusionForMaskedLM, BlockDiffusionModel
from .modeling.samplers_block_diffusion import (
    SAMPLERS,
    AncestralSampler,
    ConfidenceSampler,
    EntropyBoundSampler,
    FirstHittingSampler,
    Sampler,
    SequentialSampler,
)
from .registration import register_with_transformers


if TYPE_CHECKING:
    from .data.collators import BD3LMDataCollator
    from .data.corpora import load_corpus
    from .data.documents import load_documents, pack_documents
    from .data.finetuning import prepare_finetuning
    from .data.tokenization import load_tokenizer, train_tokenizer
    from .evaluation.likelihood import evaluate_likelihood, load_for_evaluation
    from .evaluation.quality import generative_perplexity
    from .hub.adaptation import adapt
    from .hub.conversion import convert_checkpoint
    from .hub.publishing import push_to_hub
    from .noise.sampler import NoiseSampler
    from .plots import plot_attention_pattern, plot_denoising, plot_noise_schedules, plot_training
    from .training.arguments import BD3LMTrainingArguments
    from .training.trainer import BD3LMTrainer


__version__ = "0.2.0"

__all__ = [
    "AncestralSampler",
    "BD3LMConfig",
    "BD3LMDataCollator",
    "BD3LMForMaskedLM",
    "BD3LMGenerationConfig",
    "BD3LMModel",
    "BD3LMPreTrainedModel",
    "BD3LMTrainer",
    "BD3LMTrainingArguments",
    "BlockDiffusionConfig",
    "BlockDiffusionForMaskedLM",
    "BlockDiffusionGenerationMixin",
    "BlockDiffusionModel",
    "CommitCache",
    "ConfidenceSampler",
    "EntropyBoundSampler",
    "EntropyStoppingCriteria",
    "FirstHittingSampler",
    "NoiseSampler",
    "SAMPLERS",
    "Sampler",
    "SequentialSampler",
    "TextInfillingPipeline",
    "adapt",
    "convert_checkpoint",
    "evaluate_likelihood",
    "generative_perplexity",
    "load_corpus",
    "load_documents",
    "load_for_evaluation",
    "load_tokenizer",
    "pack_documents",
    "plot_attention_pattern",
    "plot_denoising",
    "plot_noise_schedules",
    "plot_training",
    "prepare_finetuning",
    "push_to_hub",
    "train_tokenizer",
]

# Imported when they are asked for: with them come `datasets`, Accelerate or the Trainer.
_MODULES = {
    "BD3LMDataCollator": "data.collators",
    "BD3LMTrainer": "training.trainer",
    "BD3LMTrainingArguments": "training.arguments",
    "NoiseSampler": "noise.sampler",
    "adapt": "hub.adaptation",
    "convert_checkpoint": "hub.conversion",
    "evaluate_likelihood": "evaluation.likelihood",
    "generative_perplexity": "evaluation.quality",
    "load_corpus": "data.corpora",
    "load_documents": "data.documents",
    "load_for_evaluation": "evaluation.likelihood",
    "load_tokenizer": "data.tokenization",
    "pack_documents": "data.documents",
    "plot_attention_pattern": "plots",
    "plot_denoising": "plots",
    "plot_noise_schedules": "plots",
    "plot_training": "plots",
    "prepare_finetuning": "data.finetuning",
    "push_to_hub": "hub.publishing",
    "train_tokenizer": "data.tokenization",
}

register_with_transformers()
# BD3LM_KERNELS=0 leaves the models to plain torch.
if os.environ.get("BD3LM_KERNELS", "1") != "0":
    attach()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
