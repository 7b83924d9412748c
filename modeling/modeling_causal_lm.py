"""A causal language model of Transformers, as it is, as the network of a block diffusion language model."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple

from .cache_block_diffusion import CommitCache
from .configuration_causal_lm import BlockDiffusionConfig
from .generation_block_diffusion import CACHE_NAME, BD3LMGenerationConfig, BlockDiffusionGenerationMixin
from .loss_block_diffusion import token_nats
from .network_block_diffusion import (
    BlockDiffusionLMMixin,
    BlockDiffusionOutput,
    BlockDiffusionPreTrainedMixin,
    NetworkOutput,
    accepts_past_key_values,
    check_one_input,
    prepare_denoising,
)
from .two_stream_block_diffusion import tokens_where


# What stock classes do to the logits of their head: Cohere's and Granite's scale them, Gemma's bound them.
LOGIT_CHANGES = {
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, divisor: logits / divisor,
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,
}


class BlockDiffusionPreTrainedModel(BlockDiffusionPreTrainedMixin, PreTrainedModel):
    """Loading and saving, common to the models of this file, which hold a stock network under its own names."""

    config_class = BlockDiffusionConfig
    config: BlockDiffusionConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    # A backend that brings its own attention (vLLM, SGLang) would run this model as a causal one.
    _supports_attention_backend = False
    auto_map = {
        "AutoConfig": "configuration_causal_lm.BlockDiffusionConfig",
        "AutoModel": "modeling_causal_lm.BlockDiffusionModel",
        "AutoModelForMaskedLM": "modeling_causal_lm.BlockDiffusionForMaskedLM",
        "AutoModelForCausalLM": "modeling_causal_lm.BlockDiffusionForMaskedLM",
    }

    def _take_modules(self, stock: PreTrainedModel) -> None:
        """Takes over the modules of a stock model, under their names, and what its class says of them."""
        self.base_model_prefix = stock.base_model_prefix
        names = [name for name, module in stock.named_children() if module is stock.get_output_embeddings()]
        if len(names) != 1:
            raise ValueError(f"`model` must have a head of one linear layer, but got {type(stock).__name__}.")
        self._head_name = names[0]
        for name, module in stock.named_children():
            setattr(self, name, module)
        for name in ("_tied_weights_keys", "_keys_to_ignore_on_load_unexpected"):
            setattr(self, name, getattr(type(stock), name, None))
        self.post_init()
        # That of the head is the stock class's; `post_init` has found that of the network.
        self._tp_plan = (getattr(type(stock), "_tp_plan", None) or {}) | self._tp_plan

    def _network(self, cache: Cache | None = None, use_cache: bool | None = None, **inputs: Any) -> Any:
        if inputs.pop("timesteps", None) is not None:
            raise ValueError("`timesteps` must be None for a network that is told no noise level, but got some.")
        limit, position_ids = self.config.max_position_embeddings, inputs["position_ids"]
        has_table = limit is not None and not hasattr(self.base_model, "rotary_emb")
        if has_table and not (position_ids.is_meta or torch.compiler.is_compiling()):
            # The host waits for values on a device: not where there are no more tokens than positions.
            num_tokens = position_ids.shape[-1] + (0 if cache is None else cache.get_seq_length())
            if (position_ids.is_cpu or num_tokens > limit) and (largest := int(position_ids.max())) >= limit:
                rule = f"below {limit}, for the network has learned so many positions"
                raise ValueError(f"`position_ids` must be {rule}, but got {largest}.")
        return self.base_model(return_dict=True, use_cache=cache is not None, **{CACHE_NAME: cache}, **inputs)


class BlockDiffusionModel(BlockDiffusionPreTrainedModel):
    """The network of a `config`, read by blocks, without the head."""

    _keys_to_ignore_on_load_unexpected = [r"^(lm_head|embed_out)\."]

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__(config)
        network = AutoModel.from_config(config.text_config)
        self.base_model_prefix = network.base_model_prefix
        setattr(self, self.base_model_prefix, network)
        self.post_init()

    @accepts_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        document_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> NetworkOutput:
        """
        A denoising pass that gives a `last_hidden_state` [batch, length, hidden]. `input_ids` or `inputs_embeds`,
        `attention_mask`, `position_ids`, `cache`, `use_cache`, `document_ids`, `kwargs` and the ValueError are those
        of [`BlockDiffusionLMMixin.forward`].
        """
        check_one_input(input_ids, inputs_embeds)
        cache = DynamicCache() if use_cache and cache is None else cache
        given = input_ids if inputs_embeds is None else inputs_embeds
        text = (attention_mask, position_ids, document_ids)
        position_ids, attention_mask = prepare_denoising(self.config, given, self.dtype, text, cache)
        kwargs.update(position_ids=position_ids, attention_mask=attention_mask, cache=cache)
        outputs = self._network(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return NetworkOutput(outputs.last_hidden_state, cache, outputs.hidden_states, outputs.attentions)


class BlockDiffusionForMaskedLM(BlockDiffusionLMMixin, BlockDiffusionPreTrainedModel, BlockDiffusionGenerationMixin):
    """
    A causal language model of Transformers as a block diffusion language model: the stock network of `config` and its
    head, whose weights keep their names, so that the stock class reads them too.
    """

    generation_config_class = BD3LMGenerationConfig
    # The mixin, which comes first, has one for networks of this package.
    _network = BlockDiffusionPreTrainedModel._network

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__(config)
        self._take_modules(AutoModelForCausalLM.from_config(config.text_config))

    @classmethod
    def from_causal_lm(
        cls,
        model: PreTrainedModel | str,
        block_size: int = BlockDiffusionConfig.block_size,
        mask_token_id: int | None = None,
        shift_logits: bool = True,
        clean_attention: str = "block",
        mask_token: str | None = None,
        **kwargs: Any,
    ) -> "BlockDiffusionForMaskedLM":
        """
        Makes a block diffusion model of an autoregressive one, which scores as before with block size 1.

        Args:
            model: a causal language model, whose modules are taken over, or the name or folder of one.
            block_size: tokens denoised together.
            mask_token_id: an id that no text uses; by default a new one. Where the embeddings have no row for it, they
                grow, and new rows start at the mean of the others.
            shift_logits, clean_attention: see [`BlockDiffusionConfig`].
            mask_token: in place of the id, a token that the tokenizer of a named `model` has.
            kwargs: for `AutoModelForCausalLM.from_pretrained`, with a name.

        Raises:
            ValueError: the network is none that block diffusion can take, or an argument breaks its rule.
        """
        if mask_token is not None:
            is_named = mask_token_id is None and not isinstance(model, nn.Module)
            vocabulary = AutoTokenizer.from_pretrained(model, **kwargs).get_vocab() if is_named else {}
            if mask_token not in vocabulary:
                raise ValueError(f"`mask_token` must be a token of a named `model`, but got {mask_token!r}.")
            mask_token_id = vocabulary[mask_token]
        if not isinstance(model, nn.Module):
            model, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **kwargs)
            if info["missing_keys"]:
                raise ValueError(f"`model` must be a whole checkpoint, but it lacks {sorted(info['missing_keys'])}.")
        elif kwargs:
            raise ValueError(f"`kwargs` are for a model that is loaded, but got {sorted(kwargs)} with a model.")
        is_training, num_rows = model.training, model.get_input_embeddings().weight.shape[0]
        text_config, attention = model.config.get_text_config(decoder=True), model.config._attn_implementation
        fields = {"block_size": block_size, "shift_logits": shift_logits, "clean_attention": clean_attention}
        BlockDiffusionConfig(text_config=text_config, **fields)
        mask_token_id = num_rows if mask_token_id is None else mask_token_id
        if mask_token_id >= num_rows:
            model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
            for part in (model.get_input_embeddings(), model.get_output_embeddings()):
                part.weight.data[num_rows:] = part.weight.data[:num_rows].float().mean(0)
        # Where it lay is nothing to be published.
        text_config._name_or_path = ""
        config = BlockDiffusionConfig(text_config=text_config, mask_token_id=mask_token_id, **fields)
        config._attn_implementation, config.dtype = attention, model.dtype
        with torch.device("meta"):
            adapted = cls(config)
        if not isinstance(model.base_model, type(adapted.base_model)):
            kind, given = (type(part.base_model).__name__ for part in (adapted, model))
            raise ValueError(f"`model` must have the network {kind}, of text alone and unwrapped, but got {given}.")
        # What says that the source was quantized or dispatched.
        kept = [name for name in vars(model) if name.startswith(("hf_", "is_loaded", "is_quantized", "quantization"))]
        vars(adapted).update({name: vars(model)[name] for name in kept})
        if "quantization_config" in vars(text_config):
            config.quantization_config = vars(text_config).pop("quantization_config")
        adapted._take_modules(model)
        if adapted.device.type != "meta" and attention != "flex_attention":
            adapted.eval()._check_network(model.eval())
        adapted.generation_config = BD3LMGenerationConfig.from_generation_config(model.generation_config)
        return adapted.train(is_training)

    @torch.no_grad()
    def _check_network(self, stock: PreTrainedModel) -> None:
        """
        Raises a ValueError unless a few ids are scored as by the stock model where they are read causally, and over
        [x_t ; x_0] as over a block against a cache.
        """
        mask_token_id, fields = self.config.mask_token_id, vars(self.config).copy()
        x_0 = (torch.arange(16, device=self.device).view(2, 8) * 7 + 3) % max(mask_token_id, 1) + (mask_token_id == 0)
        x_t = x_0.masked_fill(x_0 % 3 > 0, mask_token_id)
        try:
            self.config.update({"block_size": 4, "shift_logits": True, "clean_attention": "causal"})
            pairs = [(stock(x_0).logits[:, :-1], self(x_0, use_cache=True).logits[:, 1:])]
            self.config.update({"shift_logits": False, "clean_attention": "block"})
            cache = CommitCache(self(x_0[:, :4], use_cache=True).cache, 0)
            pairs.append((self(x_t[:, 4:], cache=cache).logits, self(x_t, clean_input_ids=x_0).logits[:, 4:]))
            errors = [((one - other).float().std() / one.float().std()).item() for one, other in pairs]
            # Rounding sends some tokens to other experts.
            is_exact = self.dtype == torch.float32 and not getattr(stock, "is_quantized", False)
            agrees = all(error <= (0.01 if is_exact else 0.1) for error in errors)
            fault = None if agrees else f"scores that differ ({errors[0]:.1g}, {errors[1]:.1g})"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        finally:
            vars(self.config).update(fields)
        if fault is not None:
            rule = "of a network and a head that score by the mask, positions and cache they are given"
            raise ValueError(f"`model` must be {rule}, but got {type(stock).__name__}, which gives {fault}.")

    def get_output_embeddings(self) -> nn.Module:
        """The head, under whatever name the stock class has it."""
        return getattr(self, self._head_name)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        setattr(self, self._head_name, new_embeddings)

    def _denoising_loss(
        self, x_0, labels, blocks, noise, num_items_in_batch, autoregressive_loss_weight: float = 0.0, **kwargs: Any
    ) -> BlockDiffusionOutput:
        """
        The loss of block diffusion; so much of that of the next token, as the clean stream scores it; and in training
        that of unevenly used experts, if the network's `output_router_logits` asks for it.
        """
        network, passes = self.config.text_config, []
        balances = self.training and kwargs.get("output_router_logits", getattr(network, "output_router_logits", None))
        if autoregressive_loss_weight and self.config.clean_attention != "causal":
            given = f"{autoregressive_loss_weight} with {self.config.clean_attention!r}"
            raise ValueError(f"`autoregressive_loss_weight` takes a `clean_attention` of 'causal', but got {given}.")
        if num_items_in_batch is None:
            num_items_in_batch = blocks.predicted.sum().clamp(min=1)
        if autoregressive_loss_weight or balances:
            kwargs["passes"] = passes
        outputs = super()._denoising_loss(x_0, labels, blocks, noise, num_items_in_batch, **kwargs)
        for streams, both in passes:
            if autoregressive_loss_weight:
                follows = blocks.predicted[:, 1:] & (blocks.position_ids.diff(dim=-1) == 1)
                clean_states = both.last_hidden_state[:, streams.num_noisy : -1]
                nats = self.token_nats(tokens_where(follows, clean_states), tokens_where(follows, labels[:, 1:]))
                outputs.loss = outputs.loss + autoregressive_loss_weight * nats.sum() / num_items_in_batch
            if balances:
                # Of all tokens of both streams but padding.
                scores, is_real = both.router_logits, (blocks.block_ids >= 0).expand(x_0.shape)
                is_real = is_real.repeat(1, len(scores[0]) // is_real.numel())
                num_experts, num_chosen = scores[0].shape[-1], network.num_experts_per_tok
                imbalance = load_balancing_loss_func(scores, num_experts, num_chosen, is_real)
                outputs.loss = outputs.loss + network.router_aux_loss_coef * imbalance
        return outputs

    def _two_stream_pass(self, x_t, x_0, blocks, timesteps, masked=None, passes=None, **kwargs: Any):
        if passes is None:
            return super()._two_stream_pass(x_t, x_0, blocks, timesteps, masked, **kwargs)
        # Next tokens and experts are those of all tokens.
        passes.append(super()._two_stream_pass(x_t, x_0, blocks, timesteps, **kwargs))
        return passes[-1]

    def _logit_changes(self) -> dict[str, float]:
        """What the stock class does to its logits, by the name of the field that says so."""
        fields = vars(self.config.text_config)
        return {name: fields[name] for name in LOGIT_CHANGES if fields.get(name) is not None}

    def _logits(self, hidden_states: Tensor) -> Tensor:
        logits = super()._logits(hidden_states)
        for name, value in self._logit_changes().items():
            logits = LOGIT_CHANGES[name](logits, value)
        return logits

    def token_nats(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """As the mixin's, of `hidden_states` [num_masked, hidden] and `targets`, by logits that are final."""
        # What is reported as likelihood, in evaluation mode, gives the mask token no probability.
        is_scored, is_changed = self.training and self.config.predicts_mask_token, bool(self._logit_changes())
        if not (is_changed or is_scored):
            return super().token_nats(hidden_states, targets)
        head = self._logits if is_changed else self.get_output_embeddings()
        return token_nats(hidden_states, targets, head, -1 if is_scored else self.config.mask_token_id)


BlockDiffusionConfig.register_for_auto_class()
BlockDiffusionModel.register_for_auto_class("AutoModel")
BlockDiffusionForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
