"""What Transformers is told of this package: its Auto classes, its pipeline, and the published format."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.pipelines import PIPELINE_REGISTRY

from .hub.conversion import register_published_format
from .modeling.configuration_bd3lm import BD3LMConfig
from .modeling.infilling_block_diffusion import TEXT_INFILLING, TextInfillingPipeline
from .modeling.modeling_bd3lm import BD3LMForMaskedLM, BD3LMModel


def register_with_transformers() -> None:
    """
    Makes the classes of this package known to `AutoConfig`, `AutoModel`, `AutoModelForMaskedLM`,
    `AutoModelForCausalLM` and `pipeline`, and the published format to `from_pretrained`.
    """
    AutoConfig.register(BD3LMConfig.model_type, BD3LMConfig)
    AutoModel.register(BD3LMConfig, BD3LMModel)
    AutoModelForMaskedLM.register(BD3LMConfig, BD3LMForMaskedLM)
    AutoModelForCausalLM.register(BD3LMConfig, BD3LMForMaskedLM)
    PIPELINE_REGISTRY.register_pipeline(
        TEXT_INFILLING, TextInfillingPipeline, pt_model=AutoModelForMaskedLM, type="text"
    )
    register_published_format()
