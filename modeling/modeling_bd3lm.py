"""The network of a BD3-LM (arXiv 2503.09573): a transformer whose layers are modulated by the noise level."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import eager_attention_forward
from transformers.utils.output_capturing import capture_outputs

from .configuration_bd3lm import BD3LMConfig
from .generation_block_diffusion import BD3LMGenerationConfig, BlockDiffusionGenerationMixin
from .network_block_diffusion import (
    BlockDiffusionLMMixin,
    BlockDiffusionPreTrainedMixin,
    NetworkOutput,
    accepts_past_key_values,
    check_one_input,
    prepare_denoising,
)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A projection that starts at zero: every branch closed, every token equally likely, as in the published code."""
    linear = nn.Linear(in_features, out_features)
    linear.starts_at_zero = True
    return linear


class BD3LMNoiseEmbedding(nn.Module):
    """Embeds the noise level sigma: 256 sinusoidal features (cosines, then sines), then an MLP with SiLU between."""

    num_features = 256

    def __init__(self, config: BD3LMConfig):
        super().__init__()
        self.linear_1 = nn.Linear(self.num_features, config.cond_dim)
        self.linear_2 = nn.Linear(config.cond_dim, config.cond_dim)

    def forward(self, sigma: Tensor) -> Tensor:
        """sigma of any shape -> [*shape, cond_dim]."""
        half = self.num_features // 2
        exponents = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = sigma[..., None].float() * torch.exp(-math.log(10000) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        # A projection that a quantizer put here may have no such weight; it takes any floating point.
        weight = getattr(self.linear_1, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            features = features.to(weight.dtype)
        return self.linear_2(nn.functional.silu(self.linear_1(features)))


def rotary_embedding(config: BD3LMConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """
    Cosines and sines of the rotary embedding (arXiv 2104.09864), halves paired as in GPT-NeoX: each [batch, 1, length,
    head_dim], from position_ids [batch, length].
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device) / config.head_dim
    angles = position_ids[..., None].float() / config.rope_theta**exponents
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary_pos_emb(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [batch, heads, length, head_dim] at their positions; under autocast angles are more precise."""
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)


class BD3LMAttention(nn.Module):
    """Multi-head attention with rotary positions; who sees whom is in the mask."""

    def __init__(self, config: BD3LMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        size = config.hidden_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs: Any):
        """
        [batch, length, hidden] -> the same shape, and attention weights where the implementation has them, by cosines
        and sines of positions [batch or 1, 1, length, head_dim]. Without a mask every query sees every key.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, *position_embeddings), apply_rotary_pos_emb(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        if "flash" in implementation and attention_mask is not None:
            # The flash kernels know no such mask: SDPA computes the same.
            implementation = "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), weights


class BD3LMMLP(nn.Module):
    """Two projections with tanh-approximated GELU between."""

    def __init__(self, config: BD3LMConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, length, hidden] -> [batch, length, hidden]."""
        return self.down_proj(nn.functional.gelu(self.up_proj(hidden_states), approximate="tanh"))


class BD3LMDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a layer norm and gated by the noise level (arXiv 2212.09748, adaLN-Zero)."""

    def __init__(self, config: BD3LMConfig, layer_idx: int):
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=False)
        self.self_attn = BD3LMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=False)
        self.mlp = BD3LMMLP(config)
        if config.adaln:
            self.adaln_modulation = zero_linear(config.cond_dim, 6 * config.hidden_size)

    def forward(self, hidden_states, attention_mask, position_embeddings, condition=None, cache=None, **kwargs: Any):
        """
        [batch, length, hidden] -> the same shape, under the embedded noise level `condition` [batch or 1, length or 1,
        cond_dim], which is None without `adaln`; the other arguments are those of [`BD3LMAttention`].
        """
        modulation = (None,) * 6
        if condition is not None:
            modulation = self.adaln_modulation(condition).to(hidden_states.dtype).chunk(6, dim=-1)
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
        branch = modulate(self.input_layernorm(hidden_states), attn_shift, attn_scale)
        branch, _ = self.self_attn(branch, position_embeddings, attention_mask, cache=cache, **kwargs)
        hidden_states = self.add(hidden_states, branch, attn_gate)
        branch = modulate(self.post_attention_layernorm(hidden_states), mlp_shift, mlp_scale)
        return self.add(hidden_states, self.mlp(branch), mlp_gate)

    def add(self, residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        """residual + gate * dropout(branch), [batch, length, hidden]."""
        branch = nn.functional.dropout(branch, self.hidden_dropout, self.training)
        return residual + (branch if gate is None else gate * branch)


def modulate(states: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """x * (1 + scale) + shift, [batch, length, hidden]; None leaves it as it is."""
    return states if shift is None else states * (1 + scale) + shift


class BD3LMPreTrainedModel(BlockDiffusionPreTrainedMixin, PreTrainedModel):
    """Loading, saving and initialisation, common to the models of this file."""

    config_class = BD3LMConfig
    config: BD3LMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BD3LMDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # A backend that brings its own attention (vLLM, SGLang) would run this model as a causal one.
    _supports_attention_backend = False
    # Small, and everything passes through them: quantizers leave them as they are, and float16 does not round them.
    # Quantizers match these from the start of a module's (torchao: a parameter's) name, so they allow for parents.
    _keep_in_fp32_modules = [r"(?:.+\.)?noise_embedding", r"(?:.+\.)?adaln_modulation"]
    # Buffers of the published code: the rotary frequencies follow from the config, the interval is in it.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"sampling_eps_(min|max)"]
    _can_record_outputs = {"hidden_states": BD3LMDecoderLayer, "attentions": BD3LMAttention}
    auto_map = {
        "AutoConfig": f"{BD3LMConfig.__module__.split('.')[-1]}.BD3LMConfig",
        "AutoModel": f"{__name__.split('.')[-1]}.BD3LMModel",
        "AutoModelForMaskedLM": f"{__name__.split('.')[-1]}.BD3LMForMaskedLM",
        "AutoModelForCausalLM": f"{__name__.split('.')[-1]}.BD3LMForMaskedLM",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class BD3LMModel(BD3LMPreTrainedModel):
    """The transformer of a `config`, without the output projection (arXiv 2503.09573)."""

    _keys_to_ignore_on_load_unexpected = [*BD3LMPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]

    def __init__(self, config: BD3LMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.adaln:
            self.noise_embedding = BD3LMNoiseEmbedding(config)
        self.layers = nn.ModuleList([BD3LMDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=False)
        if config.adaln:
            self.adaln_modulation = zero_linear(config.cond_dim, 2 * config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @accepts_past_key_values
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        timesteps: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> NetworkOutput:
        """
        One pass over tokens, by default a denoising pass, that gives a `last_hidden_state` [batch, length, hidden].
        `timesteps` are sigma of each row [batch] or token [batch, length], None meaning 0; `input_ids`,
        `attention_mask`, `position_ids`, `cache`, `inputs_embeds`, `use_cache`, `document_ids` and `kwargs` are those
        of [`BlockDiffusionLMMixin.forward`], as is the ValueError, which training by `flex_attention` on a CPU is too.
        """
        check_one_input(input_ids, inputs_embeds)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        is_flex = self.config._attn_implementation == "flex_attention"
        if is_flex and hidden_states.requires_grad and hidden_states.device.type == "cpu":
            rule, got = "'sdpa' or 'eager' to train on a CPU", "'flex_attention', which has no backward pass there"
            raise ValueError(f"`attn_implementation` must be {rule}, but got {got}.")
        text, dtype = (attention_mask, position_ids, document_ids), hidden_states.dtype
        position_ids, attention_mask = prepare_denoising(self.config, hidden_states, dtype, text, cache)
        condition = self.condition(timesteps, hidden_states.device)
        position_embeddings = rotary_embedding(self.config, position_ids, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, position_embeddings, condition, cache=cache, **kwargs)
        hidden_states = self.norm(hidden_states)
        if condition is not None:
            shift, scale = self.adaln_modulation(condition).to(hidden_states.dtype).chunk(2, dim=-1)
            hidden_states = modulate(hidden_states, shift, scale)
        return NetworkOutput(last_hidden_state=hidden_states, cache=cache)

    def condition(self, sigma: Tensor | None, device: torch.device) -> Tensor | None:
        """
        The embedded noise level [batch or 1, length or 1, cond_dim] on a `device`, None without `adaln`, from `sigma`
        of each row [batch] or token [batch, length]; None means 0, as does everything without `time_conditioning`.
        """
        if not self.config.adaln:
            return None
        if sigma is None or not self.config.time_conditioning:
            sigma = torch.zeros(1, 1, device=device)
        return nn.functional.silu(self.noise_embedding(sigma if sigma.dim() == 2 else sigma[:, None]))


class BD3LMForMaskedLM(BlockDiffusionLMMixin, BD3LMPreTrainedModel, BlockDiffusionGenerationMixin):
    """A block diffusion language model (arXiv 2503.09573): the transformer of a `config` and its output projection."""

    generation_config_class = BD3LMGenerationConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: BD3LMConfig):
        super().__init__(config)
        self.model = BD3LMModel(config)
        # Tied to the embeddings, the projection starts as they do.
        make_linear = nn.Linear if config.tie_word_embeddings else zero_linear
        self.lm_head = make_linear(config.hidden_size, config.vocab_size)
        self.post_init()


BD3LMConfig.register_for_auto_class()
BD3LMModel.register_for_auto_class("AutoModel")
BD3LMForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
