"""Block Discrete Denoising Diffusion Language Models (BD3-LMs, arXiv 2503.09573) for Hugging Face Transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .conversion import convert_checkpoint
from .modeling.configuration_bd3lm import BD3LMConfig
from .modeling.diffusion_bd3lm import (
    FULL_NOISE_INTERVAL,
    NOISE_SCHEDULES,
    NoiseSchedule,
    forward_process,
    sample_timesteps,
    subs_log_probs,
)
from .modeling.generation_bd3lm import (
    BD3LMGenerateOutput,
    BD3LMGenerationConfig,
    BlockDiffusionGenerationMixin,
    CommitCache,
    EntropyStoppingCriteria,
)
from .modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel, BD3LMOutput, BD3LMPreTrainedModel
from .modeling.samplers_bd3lm import SAMPLERS, ConfidenceSampler, FirstHittingSampler, Sampler


__version__ = "0.1.0"

AutoConfig.register(BD3LMConfig.model_type, BD3LMConfig)
AutoModel.register(BD3LMConfig, BD3LMModel)
AutoModelForMaskedLM.register(BD3LMConfig, BD3LMForMaskedLM)
AutoModelForCausalLM.register(BD3LMConfig, BD3LMForMaskedLM)
