"""Block Discrete Denoising Diffusion Language Models (BD3-LMs, arXiv 2503.09573) for Hugging Face Transformers."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .kernels import attach
from .registration import register_with_transformers


if TYPE_CHECKING:
    from .collators import BD3LMDataCollator
    from .conversion import convert_checkpoint, from_published_state_dict, to_published_state_dict
    from .corpora import CORPORA, Corpus, detokenize, load_corpus
    from .data import load_documents, pack_documents, split_documents
    from .evaluation import NELBO_METRIC, Likelihood, evaluate_likelihood, load_for_evaluation, unigram_perplexity
    from .finetuning import pack_examples, prepare_finetuning
    from .hub import push_to_hub
    from .modeling.cache_block_diffusion import CommitCache
    from .modeling.configuration_bd3lm import BD3LMConfig
    from .modeling.diffusion_block_diffusion import (
        FULL_NOISE_INTERVAL,
        NOISE_SCHEDULES,
        NoiseSchedule,
        forward_process,
        sample_timesteps,
        subs_log_probs,
    )
    from .modeling.generation_block_diffusion import (
        BD3LMGenerateOutput,
        BD3LMGenerationConfig,
        BlockDiffusionGenerationMixin,
    )
    from .modeling.infilling_block_diffusion import TextInfillingPipeline
    from .modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel, BD3LMPreTrainedModel
    from .modeling.progress_block_diffusion import EntropyStoppingCriteria
    from .modeling.samplers_block_diffusion import (
        SAMPLERS,
        AncestralSampler,
        ConfidenceSampler,
        EntropyBoundSampler,
        FirstHittingSampler,
        Sampler,
    )
    from .noise import NoiseSampler
    from .plots import loss_variance, plot_attention_pattern, plot_denoising, plot_noise_schedules, plot_training
    from .quality import GenerativePerplexity, SampleStatistics, generative_perplexity, sample_statistics
    from .tokenization import load_tokenizer, token_byte_counts, train_tokenizer
    from .trainer import BD3LMTrainer
    from .training_args import BD3LMTrainingArguments
    from .variance import Estimate, gradient_variance, nelbo_variance, noise_interval_grid
    from .windows import encode_documents


__version__ = "0.1.0"

__all__ = [
    "AncestralSampler",
    "BD3LMConfig",
    "BD3LMDataCollator",
    "BD3LMForMaskedLM",
    "BD3LMGenerateOutput",
    "BD3LMGenerationConfig",
    "BD3LMModel",
    "BlockDiffusionOutput",
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

# Imported when they are asked for: to import a model takes longer than to import torch and Transformers.
_MODULES = {
    "AncestralSampler": "modeling.samplers_block_diffusion",
    "BD3LMConfig": "modeling.configuration_bd3lm",
    "BD3LMDataCollator": "collators",
    "BD3LMForMaskedLM": "modeling.modeling_bd3lm",
    "BD3LMGenerateOutput": "modeling.generation_block_diffusion",
    "BD3LMGenerationConfig": "modeling.generation_block_diffusion",
    "BD3LMModel": "modeling.modeling_bd3lm",
    "BlockDiffusionOutput": "modeling.network_block_diffusion",
    "BD3LMPreTrainedModel": "modeling.modeling_bd3lm",
    "BD3LMTrainer": "trainer",
    "BD3LMTrainingArguments": "training_args",
    "BlockDiffusionGenerationMixin": "modeling.generation_block_diffusion",
    "CORPORA": "corpora",
    "CommitCache": "modeling.cache_block_diffusion",
    "ConfidenceSampler": "modeling.samplers_block_diffusion",
    "Corpus": "corpora",
    "EntropyBoundSampler": "modeling.samplers_block_diffusion",
    "EntropyStoppingCriteria": "modeling.progress_block_diffusion",
    "Estimate": "variance",
    "FULL_NOISE_INTERVAL": "modeling.diffusion_block_diffusion",
    "FirstHittingSampler": "modeling.samplers_block_diffusion",
    "GenerativePerplexity": "quality",
    "Likelihood": "evaluation",
    "NELBO_METRIC": "evaluation",
    "NOISE_SCHEDULES": "modeling.diffusion_block_diffusion",
    "NoiseSampler": "noise",
    "NoiseSchedule": "modeling.diffusion_block_diffusion",
    "SAMPLERS": "modeling.samplers_block_diffusion",
    "SampleStatistics": "quality",
    "Sampler": "modeling.samplers_block_diffusion",
    "TextInfillingPipeline": "modeling.infilling_block_diffusion",
    "convert_checkpoint": "conversion",
    "detokenize": "corpora",
    "encode_documents": "windows",
    "evaluate_likelihood": "evaluation",
    "forward_process": "modeling.diffusion_block_diffusion",
    "from_published_state_dict": "conversion",
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
    "sample_timesteps": "modeling.diffusion_block_diffusion",
    "split_documents": "data",
    "subs_log_probs": "modeling.diffusion_block_diffusion",
    "to_published_state_dict": "conversion",
    "token_byte_counts": "tokenization",
    "train_tokenizer": "tokenization",
    "unigram_perplexity": "evaluation",
}

register_with_transformers()
# BD3LM_KERNELS=0 leaves the models to plain torch.
if os.environ.get("BD3LM_KERNELS", "1") != "0":
    attach()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
