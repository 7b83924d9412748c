"""The network of a BD3-LM: a transformer over blocks of noisy tokens and the clean tokens before them."""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention_bd3lm import (
    DOCUMENT_STRIDE,
    TwoStreamLayout,
    denoising_pattern,
    select_tokens,
    visibility_code,
)
from .configuration_bd3lm import BD3LMConfig
from .diffusion_bd3lm import (
    FULL_NOISE_INTERVAL,
    NOISE_SCHEDULES,
    forward_process,
    sample_timesteps,
    sigma_from_mask_probability,
)
from .generation_bd3lm import BD3LMGenerationConfig, BlockDiffusionGenerationMixin
from .layers_bd3lm import (
    BD3LMAttention,
    BD3LMDecoderLayer,
    BD3LMLayerNorm,
    BD3LMNoiseEmbedding,
    Modulation,
    folded,
    modulation_parts,
    rotary_embedding,
    select_modulation,
    zero_linear,
)
from .linear_bd3lm import BD3LMLinear
from .loss_bd3lm import subs_loss
from .text_bd3lm import TextBlocks, text_code


@dataclass
class BD3LMOutput(ModelOutput):
    """
    Output of [`BD3LMForMaskedLM`].

    Args:
        loss: sum of the weighted token losses / number of predicted tokens, in nats per token; a scalar.
        logits: raw scores of the token *at* each position [batch, length, vocab]; None where a loss was asked for.
        past_key_values: the cache, where one was given or asked for.
        hidden_states: with `output_hidden_states`, the embeddings and the states after each layer.
        attentions: with `output_attentions`, the attention weights of each layer.
        nelbo: w(t) * -log x_theta of each masked token and 0 elsewhere, in nats, without gradient [batch, length];
            summed over the noised copies of the text.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    nelbo: torch.Tensor | None = None


class BD3LMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, common to the models of this file."""

    config_class = BD3LMConfig
    config: BD3LMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BD3LMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Buffers of the published code: the rotary frequencies follow from the config, the interval stands in it.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"sampling_eps_(min|max)"]
    _can_record_outputs = {"hidden_states": BD3LMDecoderLayer, "attentions": BD3LMAttention}

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Transformers would look for the attention interface in this file; it is called in attention_bd3lm.py.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`; with the package `bd3lm_hf` it reads the published checkpoints as well.

        Args:
            pretrained_model_name_or_path: folder or repository id on the Hub.
            model_args, kwargs: as Transformers takes them.
            output_loading_info: return (model, which tensors were missing, unexpected or of another shape).

        Raises:
            ValueError: a published checkpoint lacks tensors of the model or has others.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if model.config.is_published_format and (info["missing_keys"] or info["unexpected_keys"]):
            raise ValueError(
                f"`pretrained_model_name_or_path` ({pretrained_model_name_or_path}) is a checkpoint in the published "
                "format whose tensors must be exactly those of the model, but it lacks "
                f"{sorted(info['missing_keys'])} and has the unknown {sorted(info['unexpected_keys'])}. Reading this "
                "format needs the package bd3lm_hf."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        As `PreTrainedModel.save_pretrained`, with the sources of the model and of its pipeline beside the weights, for
        `trust_remote_code=True`.
        """
        # Transformers copies what this file imports; the network has no need of it.
        from .infilling_bd3lm import CUSTOM_PIPELINES

        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        # A checkpoint read in the published format is saved in this one.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)


class BD3LMModel(BD3LMPreTrainedModel):
    """
    The transformer without the output projection (arXiv 2503.09573).

    Args:
        config: sizes of the network.
    """

    _keys_to_ignore_on_load_unexpected = [*BD3LMPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]

    def __init__(self, config: BD3LMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.adaln:
            self.noise_embedding = BD3LMNoiseEmbedding(config)
        self.layers = nn.ModuleList([BD3LMDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = BD3LMLayerNorm(config.hidden_size, config.layer_norm_eps)
        if config.adaln:
            self.adaln_modulation = zero_linear(config.cond_dim, 2 * config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        clean_input_ids: torch.LongTensor | None = None,
        timesteps: torch.Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: torch.LongTensor | None = None,
        layout: TwoStreamLayout | None = None,
        kept_positions: torch.LongTensor | None = None,
        modulations: list[Modulation] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        A denoising pass over `input_ids`, or with `clean_input_ids` the two-stream pass over [input_ids ;
        clean_input_ids].

        Args:
            input_ids: ids, masked ones among them [batch, length]; with `clean_input_ids` also several noised copies
                of the text, one after the other [batch, copies * length].
            attention_mask: 0 at padding [batch, cached + length].
            position_ids: positions, counted in real tokens of each row [batch, length]. A document begins wherever
                they do not go up by one. Together with a cache also those of the cached tokens [batch, cached +
                length], in any columns, negative for those that are hidden.
            past_key_values: cache of the blocks before; every position given here is written to it (see
                `CommitCache`).
            inputs_embeds: embeddings in place of `input_ids` [batch, length, hidden].
            clean_input_ids: x_0 [batch, length]; `input_ids` is x_t then.
            timesteps: sigma of each row [batch], for all that is given, or of each token of `input_ids`; clean tokens
                have sigma 0 then. None means 0.
            use_cache: make a cache if none is given.
            document_ids: equal for the tokens of one document of a packed row [batch, length].
            layout: which tokens of the two streams are computed; all by default.
            kept_positions: columns of `input_ids` whose final states are wanted in a denoising pass [batch, kept].
            modulations: what `constant_modulations` returned, to spare computing it again.
            kwargs: `output_hidden_states`, `output_attentions` and what else the attention function takes.

        Returns:
            `last_hidden_state` [batch, length, hidden], or of the kept columns or the layout's queries alone.

        Raises:
            ValueError: arguments that exclude each other, shapes that do not fit, training under `flex_attention` on
                a CPU.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given, but got both or neither.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        text = given if clean_input_ids is None else clean_input_ids
        expected_shape = (text.shape[0], past_length + text.shape[1])
        if attention_mask is not None and attention_mask.shape != expected_shape:
            raise ValueError(
                "`attention_mask` must be of shape [batch, cached + length] = "
                f"{[int(size) for size in expected_shape]}, but got {list(attention_mask.shape)}."
            )

        implementation, window = self.config._attn_implementation, self.config.window_in_blocks
        if clean_input_ids is None:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            position_ids, query_code, key_code = self._denoising_pass(
                hidden_states, attention_mask, position_ids, past_key_values, document_ids
            )
            sigma = timesteps if timesteps is None or timesteps.dim() > 1 else timesteps[:, None]
            selection = kept_positions
            pattern = last_pattern = denoising_pattern(implementation, query_code, key_code, window)
            if selection is not None and key_code is not None:
                query_code = select_tokens(query_code[..., None], selection).squeeze(-1)
                last_pattern = denoising_pattern(implementation, query_code, key_code, window)
        else:
            if inputs_embeds is not None or past_key_values is not None:
                raise ValueError(
                    "`clean_input_ids` goes with `input_ids` alone, but got `inputs_embeds` or `past_key_values` "
                    "with it."
                )
            num_copies = input_ids.shape[1] // clean_input_ids.shape[1] if clean_input_ids.shape[1] else 1
            if input_ids.shape != (text.shape[0], num_copies * text.shape[1]):
                raise ValueError(
                    "`clean_input_ids` must be of the shape of `input_ids`, or of each of the noised copies in it, "
                    f"but got {list(text.shape)} for {list(input_ids.shape)}."
                )
            if layout is None:
                _, code = text_code(self.config, clean_input_ids, attention_mask, position_ids, document_ids)
                layout = TwoStreamLayout.of_all_tokens(code, self.config.block_size, window, num_copies)
            hidden_states, position_ids, sigma = self._two_stream_pass(
                input_ids, clean_input_ids, attention_mask, position_ids, document_ids, timesteps, layout
            )
            selection = layout.final_selection
            pattern, last_pattern = (layout.pattern(implementation, last_layer) for last_layer in (False, True))

        if (
            self.config._attn_implementation == "flex_attention"
            and hidden_states.requires_grad
            and hidden_states.device.type == "cpu"
        ):
            raise ValueError(
                "`attn_implementation` is 'flex_attention', which has no backward pass on a CPU; take 'sdpa' to "
                "train there."
            )

        condition = None if modulations is not None else self._condition(sigma, hidden_states.device)
        rotary = rotary_embedding(self.config, position_ids, hidden_states.dtype)
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            hidden_states = layer(
                hidden_states,
                last_pattern if is_last else pattern,
                rotary,
                condition,
                None if modulations is None else modulations[index],
                selection if is_last else None,
                past_key_values,
                **kwargs,
            )
        modulation = self._final_modulation(condition) if modulations is None else modulations[-1]
        hidden_states = self.norm(hidden_states, *select_modulation(modulation, selection))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def constant_modulations(self, device: torch.device) -> list[Modulation] | None:
        """
        The modulation of each layer and of the output at sigma 0; None where the network tells noise levels apart.

        Args:
            device: where the tensors are wanted.

        Returns:
            for each layer the shift, scale and gate of attention and those of the MLP, and last the shift and scale of
            the output, each [hidden] and as [`folded`] leaves them; None in their place without `adaln`.
        """
        if self.config.adaln and self.config.time_conditioning:
            return None
        condition = self._condition(None, device)
        modulations = []
        for layer in self.layers:
            parts = layer.modulation(condition)
            parts = folded(layer.input_layernorm, parts[:3]) + folded(layer.post_attention_layernorm, parts[3:])
            modulations.append(parts)
        return [*modulations, folded(self.norm, self._final_modulation(condition))]

    def _final_modulation(self, condition: torch.Tensor | None) -> Modulation:
        return (None, None) if condition is None else modulation_parts(self.adaln_modulation, condition, 2)

    def _denoising_pass(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        document_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Positions, and the visibility codes of queries and keys; these are None where every query sees every key."""
        config = self.config
        length, device = hidden_states.shape[1], hidden_states.device
        if past_key_values is None:
            is_plain = attention_mask is None and position_ids is None and document_ids is None
            position_ids, code = text_code(config, hidden_states, attention_mask, position_ids, document_ids)
            return position_ids, *((None, None) if is_plain and length <= config.block_size else (code, code))

        if document_ids is not None:
            raise ValueError("`document_ids` describes whole rows and can't go with `past_key_values`.")
        past_length = past_key_values.get_seq_length()
        num_keys, first_key = past_key_values.get_mask_sizes(length, 0)
        columns = torch.arange(length, device=device)[None] + past_length
        if attention_mask is None and position_ids is None and isinstance(past_length, int):
            block, last_block = past_length // config.block_size, (past_length + length - 1) // config.block_size
            first_visible = (block - config.window_in_blocks) * config.block_size
            if block == last_block and first_visible <= first_key and num_keys == past_length - first_key + length:
                return columns, None, None
        if position_ids is not None and position_ids.shape[1] > length:
            hidden = position_ids < 0
            if attention_mask is not None:
                hidden = hidden | (attention_mask == 0)
            code = visibility_code(position_ids, config.block_size, hidden)
            # A static cache has more columns than there are tokens.
            num_missing = first_key + num_keys - code.shape[1]
            key_code = nn.functional.pad(code[:, first_key:], (0, num_missing), value=-DOCUMENT_STRIDE)
            return position_ids[:, -length:], code[:, -length:], key_code
        if position_ids is None:
            if attention_mask is None:
                position_ids = columns
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        # Keys are known by their column; each row's positions lag behind its columns by its left padding.
        padding = columns[:, -1:] - position_ids[:, -1:]
        key_columns = torch.arange(num_keys, device=device)[None] + first_key
        key_positions = key_columns - padding
        hidden_key = (key_positions < 0) | (key_columns >= past_length + length)
        query_padding = None
        if attention_mask is not None:
            is_padding = attention_mask == 0
            query_padding = is_padding[:, -length:]
            hidden_key = hidden_key | is_padding[:, key_columns[0].clamp(max=is_padding.shape[1] - 1)]
        query_code = visibility_code(position_ids, config.block_size, query_padding)
        key_code = visibility_code(key_positions, config.block_size, hidden_key)
        return position_ids, query_code, key_code

    def _two_stream_pass(
        self,
        input_ids: torch.Tensor,
        clean_input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        timesteps: torch.Tensor | None,
        layout: TwoStreamLayout,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Embeddings, positions and noise levels of [noisy ; clean], as far as the layout holds them."""
        num_clean = layout.num_clean
        position_ids, _ = text_code(self.config, clean_input_ids, attention_mask, position_ids, document_ids)

        def both(noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
            noisy = layout.select_noisy(noisy)
            return torch.cat([noisy, clean[:, :num_clean].expand(noisy.shape[0], -1)], dim=1)

        hidden_states = self.embed_tokens(both(input_ids, clean_input_ids))
        if timesteps is not None:
            timesteps = timesteps[:, None] if timesteps.dim() == 1 else both(timesteps, torch.zeros_like(timesteps))
        noisy_positions = position_ids.repeat(1, layout.num_copies)
        return hidden_states, both(noisy_positions, position_ids), timesteps

    def _condition(self, sigma: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """The embedded noise level: one for everything [cond_dim], or [batch, 1 or length, cond_dim]."""
        if not self.config.adaln:
            return None
        if sigma is None or not self.config.time_conditioning:
            sigma = torch.zeros((), device=device)
        return nn.functional.silu(self.noise_embedding(sigma))


class BD3LMForMaskedLM(BD3LMPreTrainedModel, BlockDiffusionGenerationMixin):
    """
    A block diffusion language model (arXiv 2503.09573): the transformer and its output projection.

    Args:
        config: sizes of the network, and the noise it is trained under.
    """

    generation_config_class = BD3LMGenerationConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: BD3LMConfig):
        super().__init__(config)
        self.model = BD3LMModel(config)
        # Tied to the embeddings, the projection starts as they do.
        make_linear = BD3LMLinear if config.tie_word_embeddings else zero_linear
        self.lm_head = make_linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        clean_input_ids: torch.LongTensor | None = None,
        timesteps: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        document_ids: torch.LongTensor | None = None,
        noise_interval: tuple[float, float] | None = None,
        loss_weights: torch.FloatTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BD3LMOutput:
        """
        Scores of the token *at* each position, or with `labels` the block diffusion loss.

        Without `labels`, `input_ids` are the ids that the network reads, masked ones among them, and `logits` are
        raw: the SUBS rules are applied where they are used ([`subs_log_probs`]). With `labels`, `input_ids` is the
        text x_0; noise is drawn here from torch's global generator, and no logits are returned. Noise drawn elsewhere
        comes as x_t in `input_ids`, x_0 in `clean_input_ids`, and the `loss_weights`.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds: see [`BD3LMModel.forward`].
            clean_input_ids, timesteps, use_cache, document_ids: see [`BD3LMModel.forward`].
            labels: the clean id of each token to be predicted, -100 for tokens that are neither masked nor predicted
                (prompts, padding) [batch, length]; not shifted.
            logits_to_keep: compute the logits of the last so many positions, or of these positions; 0 means all.
            noise_interval: (beta, omega) that t is drawn from, in place of `config.noise_interval` when training and
                of the full interval otherwise.
            loss_weights: weight in the loss of each masked token of `input_ids`, of its shape; goes with `labels` and
                `clean_input_ids`.
            num_items_in_batch: denominator of the loss in place of the number of predicted tokens.
            kwargs: see [`BD3LMModel.forward`].

        Returns:
            a [`BD3LMOutput`], with `logits` [batch, length, vocab] of the kept positions, or with `labels` the `loss`
            in nats per predicted token.

        Raises:
            ValueError: see [`BD3LMModel.forward`]; `labels` together with what only a denoising pass takes, or
                holding the mask token; noise of which a part is missing.
        """
        if labels is not None:
            if input_ids is None or past_key_values is not None:
                raise ValueError(
                    "`labels` go with `input_ids`, but got `inputs_embeds` or `past_key_values` with them."
                )
            text = {
                "labels": labels,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "document_ids": document_ids,
            }
            if clean_input_ids is None:
                if timesteps is not None or loss_weights is not None:
                    raise ValueError(
                        "`labels` without `clean_input_ids` ask for noise to be drawn here, but got `timesteps` or "
                        "`loss_weights`, which belong to noise drawn elsewhere."
                    )
                blocks = TextBlocks.of_batch(self.config, input_ids, **text)
                noise = self._draw_noise(input_ids, blocks, noise_interval)
                text["clean_input_ids"] = input_ids
            elif loss_weights is None or noise_interval is not None:
                raise ValueError(
                    "`labels` with `clean_input_ids` take noise drawn elsewhere, so `loss_weights` must be given and "
                    f"`noise_interval` not, but got {type(loss_weights).__name__} and {noise_interval}."
                )
            else:
                blocks = TextBlocks.of_batch(self.config, clean_input_ids, **text)
                noise = {"input_ids": input_ids, "timesteps": timesteps, "loss_weights": loss_weights}
                text["clean_input_ids"] = clean_input_ids
            return self._denoising_loss(blocks, **noise, **text, num_items_in_batch=num_items_in_batch, **kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            clean_input_ids=clean_input_ids,
            timesteps=timesteps,
            use_cache=use_cache,
            document_ids=document_ids,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return BD3LMOutput(
            logits=self.lm_head(outputs.last_hidden_state[:, kept]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _draw_noise(
        self, x_0: torch.Tensor, blocks: TextBlocks, noise_interval: tuple[float, float] | None
    ) -> dict[str, torch.Tensor | None]:
        """One draw of t per block and of x_t; what goes with the text to [`_denoising_loss`]."""
        config = self.config
        if noise_interval is None:
            noise_interval = config.noise_interval if self.training else FULL_NOISE_INTERVAL
        schedule = NOISE_SCHEDULES[config.noise_schedule]
        num_blocks = int(blocks.block.max()) + 1
        t = sample_timesteps(x_0.shape[0], num_blocks, noise_interval, device=x_0.device).gather(1, blocks.block)
        mask_probability = schedule.mask_probability(t)
        return {
            "input_ids": forward_process(x_0, mask_probability, config.mask_token_id, maskable=blocks.predicted),
            "timesteps": sigma_from_mask_probability(mask_probability) if config.time_conditioning else None,
            "loss_weights": schedule.loss_weight(t),
        }

    def _denoising_loss(
        self,
        blocks: TextBlocks,
        input_ids: torch.Tensor,
        timesteps: torch.Tensor | None,
        loss_weights: torch.Tensor,
        clean_input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None,
        **kwargs: Any,
    ) -> BD3LMOutput:
        """The NELBO estimate of arXiv 2503.09573, Eq. 8, over the x_t in `input_ids`."""
        config = self.config
        if loss_weights.shape != input_ids.shape:
            raise ValueError(
                f"`loss_weights` must be of the shape of `input_ids`, {list(input_ids.shape)}, but got "
                f"{list(loss_weights.shape)}."
            )
        num_copies = input_ids.shape[1] // clean_input_ids.shape[1]
        masked = (input_ids == config.mask_token_id) & blocks.predicted.repeat(1, num_copies)
        if config._attn_implementation == "flex_attention":
            # Its block masks are made per shape, so the shapes stay the same at every step.
            is_plain = all(kwargs[name] is None for name in ("attention_mask", "position_ids", "document_ids"))
            layout = TwoStreamLayout.of_all_tokens(
                blocks.code, config.block_size, config.window_in_blocks, num_copies, is_plain
            )
            is_prediction = masked
        else:
            layout, is_prediction = TwoStreamLayout.of_predictions(
                blocks.code, masked, config.block_size, config.window_in_blocks
            )
        outputs = self.model(
            input_ids=input_ids, clean_input_ids=clean_input_ids, timesteps=timesteps, layout=layout, **kwargs
        )
        if num_items_in_batch is None:
            num_items_in_batch = blocks.predicted.sum().clamp(min=1)
        weights = loss_weights[masked].float()
        loss, nats = subs_loss(
            outputs.last_hidden_state[is_prediction],
            labels.repeat(1, num_copies)[masked],
            weights,
            self.lm_head,
            config.mask_token_id,
        )
        nelbo = torch.zeros(input_ids.shape, dtype=torch.float32, device=input_ids.device)
        nelbo[masked] = weights * nats
        return BD3LMOutput(
            loss=loss / num_items_in_batch,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            nelbo=nelbo.unflatten(1, (num_copies, -1)).sum(1),
        )


AUTO_MAP = {
    "AutoConfig": f"{BD3LMConfig.__module__.split('.')[-1]}.BD3LMConfig",
    "AutoModel": f"{__name__.split('.')[-1]}.BD3LMModel",
    "AutoModelForMaskedLM": f"{__name__.split('.')[-1]}.BD3LMForMaskedLM",
    "AutoModelForCausalLM": f"{__name__.split('.')[-1]}.BD3LMForMaskedLM",
}
BD3LMConfig.register_for_auto_class()
BD3LMModel.register_for_auto_class("AutoModel")
BD3LMForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
