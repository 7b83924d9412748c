"""Block Discrete Denoising Diffusion Language Models (BD3-LMs, arXiv 2503.09573) for Hugging Face Transformers."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.pipelines import PIPELINE_REGISTRY

from .collators import BD3LMDataCollator
from .conversion import convert_checkpoint, from_published_state_dict, to_published_state_dict
from .modeling.cache_bd3lm import CommitCache
from .modeling.configuration_bd3lm import BD3LMConfig
from .modeling.denoising_bd3lm import EntropyStoppingCriteria
from .modeling.diffusion_bd3lm import (
    FULL_NOISE_INTERVAL,
    NOISE_SCHEDULES,
    NoiseSchedule,
    forward_process,
    sample_timesteps,
    subs_log_probs,
)
from .modeling.generation_bd3lm import BD3LMGenerateOutput, BD3LMGenerationConfig, BlockDiffusionGenerationMixin
from .modeling.infilling_bd3lm import TEXT_INFILLING, TextInfillingPipeline
from .modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel, BD3LMOutput, BD3LMPreTrainedModel
from .modeling.samplers_bd3lm import (
    SAMPLERS,
    AncestralSampler,
    ConfidenceSampler,
    EntropyBoundSampler,
    FirstHittingSampler,
    Sampler,
)


__version__ = "0.1.0"

__all__ = [
    "AncestralSampler",
    "BD3LMConfig",
    "BD3LMDataCollator",
    "BD3LMForMaskedLM",
    "BD3LMGenerateOutput",
    "BD3LMGenerationConfig",
    "BD3LMModel",
    "BD3LMOutput",
    "BD3LMPreTrainedModel",
    "BD3LMTrainer",
    "BD3LMTrainingArguments",
    "BlockDiffusionGenerationMixin",
    "CORPORA",
    "CommitCache",
    "ConfidenceSampler",
    "Corpus",
    "EntropyBoundSampler",
    "EntropyStoppingCriteria",
    "Estimate",
    "FULL_NOISE_INTERVAL",
    "FirstHittingSampler",
    "GenerativePerplexity",
    "Likelihood",
    "NELBO_METRIC",
    "NOISE_SCHEDULES",
    "NoiseSampler",
    "NoiseSchedule",
    "SAMPLERS",
    "SampleStatistics",
    "Sampler",
    "TextInfillingPipeline",
    "convert_checkpoint",
    "detokenize",
    "encode_documents",
    "evaluate_likelihood",
    "forward_process",
    "from_published_state_dict",
    "generative_perplexity",
    "gradient_variance",
    "load_corpus",
    "load_documents",
    "load_for_evaluation",
    "load_tokenizer",
    "loss_variance",
    "nelbo_variance",
    "noise_interval_grid",
    "pack_documents",
    "pack_examples",
    "plot_attention_pattern",
    "plot_denoising",
    "plot_noise_schedules",
    "plot_training",
    "prepare_finetuning",
    "push_to_hub",
    "sample_statistics",
    "sample_timesteps",
    "split_documents",
    "subs_log_probs",
    "to_published_state_dict",
    "token_byte_counts",
    "train_tokenizer",
    "unigram_perplexity",
]

AutoConfig.register(BD3LMConfig.model_type, BD3LMConfig)
AutoModel.register(BD3LMConfig, BD3LMModel)
AutoModelForMaskedLM.register(BD3LMConfig, BD3LMForMaskedLM)
AutoModelForCausalLM.register(BD3LMConfig, BD3LMForMaskedLM)
PIPELINE_REGISTRY.register_pipeline(TEXT_INFILLING, TextInfillingPipeline, pt_model=AutoModelForMaskedLM, type="text")


# What needs Trainer or the package `datasets`, slow to import, is imported when it is asked for.
_LAZY = {
    "BD3LMTrainer": "trainer",
    "BD3LMTrainingArguments": "training_args",
    "CORPORA": "corpora",
    "Corpus": "corpora",
    "Estimate": "variance",
    "GenerativePerplexity": "quality",
    "Likelihood": "evaluation",
    "NELBO_METRIC": "evaluation",
    "NoiseSampler": "noise",
    "SampleStatistics": "quality",
    "detokenize": "corpora",
    "encode_documents": "windows",
    "evaluate_likelihood": "evaluation",
    "generative_perplexity": "quality",
    "gradient_variance": "variance",
    "load_corpus": "corpora",
    "load_documents": "data",
    "load_for_evaluation": "evaluation",
    "load_tokenizer": "tokenization",
    "loss_variance": "plots",
    "nelbo_variance": "variance",
    "noise_interval_grid": "variance",
    "pack_documents": "data",
    "pack_examples": "finetuning",
    "plot_attention_pattern": "plots",
    "plot_denoising": "plots",
    "plot_noise_schedules": "plots",
    "plot_training": "plots",
    "prepare_finetuning": "finetuning",
    "push_to_hub": "hub",
    "sample_statistics": "quality",
    "split_documents": "data",
    "token_byte_counts": "tokenization",
    "train_tokenizer": "tokenization",
    "unigram_perplexity": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
