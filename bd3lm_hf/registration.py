"""What Transformers is told of this package: its Auto classes, its pipeline, and the published format."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.pipelines import PIPELINE_REGISTRY

from .hub.conversion import register_published_format
from .hub.families import register_families
from .hub.tensor_parallel import register_tensor_parallel_check
from .modeling.configuration_bd3lm import BD3LMConfig
from .modeling.configuration_causal_lm import BlockDiffusionConfig
from .modeling.infilling_block_diffusion import TEXT_INFILLING, TextInfillingPipeline
from .modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel
from .modeling.modeling_causal_lm import BlockDiffusionForMaskedLM, BlockDiffusionModel


def register_with_transformers() -> None:
    """
    Makes the classes of this package known to `AutoConfig`, `AutoModel`, `AutoModelForMaskedLM`,
    `AutoModelForCausalLM` and `pipeline`, and published formats to `from_pretrained`.
    """
    networks = [
        (BD3LMConfig, BD3LMModel, BD3LMForMaskedLM),
        (BlockDiffusionConfig, BlockDiffusionModel, BlockDiffusionForMaskedLM),
    ]
    for config_class, model_class, language_model_class in networks:
        AutoConfig.register(config_class.model_type, config_class)
        AutoModel.register(config_class, model_class)
        AutoModelForMaskedLM.register(config_class, language_model_class)
        AutoModelForCausalLM.register(config_class, language_model_class)
    PIPELINE_REGISTRY.register_pipeline(
        TEXT_INFILLING, TextInfillingPipeline, pt_model=AutoModelForMaskedLM, type="text"
    )
    register_published_format()
    register_families()
    register_tensor_parallel_check()
