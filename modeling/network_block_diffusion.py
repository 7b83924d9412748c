"""
The seam between block diffusion and a network: what every block diffusion language model does, whatever its network.

A network is anything that does this, and a stock decoder of Transformers does it as it is:

    hidden_states = network(input_ids | inputs_embeds, position_ids, attention_mask, cache)   # [batch, length, hidden]
    logits        = head(hidden_states)                                                       # [batch, length, vocab]

The mask is data ([`block_diffusion_mask`]) and passes through untouched. The network is called in two ways only: over
[x_t ; x_0] in training ([`TwoStreams`]), and over new tokens against a cache in a denoising pass.
"""

import copy
import functools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.utils import ModelOutput, can_return_tuple, logging
from transformers.utils.import_utils import is_tracing

from .attention_block_diffusion import MaskKind, Tokens, block_diffusion_mask, denoising_tokens, without_masked
from .cache_block_diffusion import read_whole_text
from .diffusion_block_diffusion import (
    FULL_NOISE_INTERVAL,
    NOISE_SCHEDULES,
    forward_process,
    generator_of,
    sample_timesteps,
    sigma_from_mask_probability,
)
from .loss_block_diffusion import token_nats
from .two_stream_block_diffusion import TextBlocks, TwoStreams, check_shape, positions_and_blocks, tokens_where


logger = logging.get_logger(__name__)

NO_NEXT_TOKEN_SCORES = (
    "%s, but a block diffusion model has no scores of the next token: its logits score the token at each position, "
    "which it sees unless it is masked. To evaluate, take `bd3lm_hf.evaluate_likelihood`, or `python -m "
    "bd3lm_hf.evaluation.harness --model bd3lm` for lm-evaluation-harness; to train, give `labels` to the model, or "
    "take `BD3LMTrainer` or `BD3LMSFTTrainer`."
)


def accepts_past_key_values(method: Callable) -> Callable:
    """Lets a method that takes `cache` be called with `past_key_values`, its name before Transformers 5.24."""

    @functools.wraps(method)
    def wrapper(self, *args: Any, **kwargs: Any):
        if (past_key_values := kwargs.pop("past_key_values", None)) is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("`cache` and `past_key_values` are one argument, but got both; give `cache`.")
            kwargs["cache"] = past_key_values
        return method(self, *args, **kwargs)

    return wrapper


class CacheOutput(ModelOutput):
    """An output whose `cache` can be read as `past_key_values` too, its name before Transformers 5.24."""

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache

    def __getitem__(self, key):
        return super().__getitem__("cache" if key == "past_key_values" else key)

    def __contains__(self, key) -> bool:
        return super().__contains__("cache" if key == "past_key_values" else key)

    def get(self, key, default=None):
        return self[key] if key in self else default


@dataclass
class NetworkOutput(CacheOutput):
    """Output of a network: `last_hidden_state` [batch, length, hidden], and fields of [`BlockDiffusionOutput`]."""

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BlockDiffusionOutput(CacheOutput):
    """
    Output of a block diffusion language model.

    Args:
        loss: sum of `token_nelbo` / number of predicted tokens, in nats per token; a scalar.
        logits: raw scores of the token *at* each position [batch, length, vocab]; None where a loss was asked for.
        cache: the cache, where one was given or asked for; also readable as `past_key_values`.
        hidden_states: with `output_hidden_states`, the embeddings and the states after each layer.
        attentions: with `output_attentions`, the attention weights of each layer.
        token_nelbo: w(t) * -log x_theta of each masked token and 0 elsewhere, in nats [batch, length]; summed over the
            noised copies of the text; differentiable.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    token_nelbo: Tensor | None = None

    def __setitem__(self, key, value):
        if key == "input_ids":
            # `FillMaskPipeline` alone puts them here; it would fill a gap from earlier ones that are still open.
            reason = "which takes the scores of one pass over all gaps for probabilities"
            raise ValueError(f"`pipeline` must be asked for 'text-infilling' in place of 'fill-mask', {reason}.")
        super().__setitem__(key, value)


@dataclass
class BD3LMGenerateOutput(CacheOutput):
    """
    Output of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: prompts and generated tokens [batch, prompt length + generated length].
        scores: with `output_scores`, for each generated column what its token was drawn from [batch, vocab].
        logits: with `output_logits`, the same before the processors.
        num_forward_passes: forwards in which the row had masked tokens [batch].
        tokens_per_forward: generated tokens, up to the end of the row / `num_forward_passes` [batch].
        reveal_steps: with `output_reveal`, which of the row's forwards revealed each token, from 1; 0 for given tokens
            and padding, of the shape of `sequences`.
        token_probabilities: with `output_reveal`, the model's probability of each token when it was revealed, before
            the processors; NaN for given tokens and padding, of the shape of `sequences`.
        cache: holds every block but the last; also readable as `past_key_values`. Given to `generate` again it spares
            computing the blocks that the new prompts begin with, of any lengths in the rows of the batch.
    """

    sequences: torch.LongTensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: Tensor | None = None
    reveal_steps: torch.LongTensor | None = None
    token_probabilities: torch.FloatTensor | None = None
    cache: Cache | None = None


def prepare_denoising(config, given: Tensor, dtype: torch.dtype, text: tuple, cache: Cache | None) -> tuple:
    """
    (positions [batch or 1, length], mask) of a denoising pass as the network takes them, for hidden states of a
    `dtype`; a mask that was prepared already stays as it is. `given` are ids [batch, length] or embeddings [batch,
    length, hidden], `text` is (attention_mask, position_ids, document_ids) as in [`BlockDiffusionLMMixin.forward`].
    Raises a ValueError for shapes that do not fit and `document_ids` with a cache.
    """
    attention_mask, position_ids, document_ids = text
    (batch_size, length), device = given.shape[:2], given.device
    cached_length = 0 if cache is None else cache.get_seq_length()
    if is_prepared(attention_mask):
        if position_ids is None:
            position_ids = torch.arange(length, device=device)[None] + cached_length
        return position_ids, attention_mask
    expected_shape = (batch_size, cached_length + length)
    if attention_mask is not None and attention_mask.shape != expected_shape:
        rule = f"of shape [batch, cached + length] = {[int(size) for size in expected_shape]}"
        raise ValueError(f"`attention_mask` must be {rule}, but got {list(attention_mask.shape)}.")
    if cache is None:
        position_ids, block_ids = positions_and_blocks(config, given.shape[:2], device, text)
        query = key = Tokens(block_ids, position_ids)
    else:
        if document_ids is not None:
            raise ValueError("`document_ids` describes whole rows and can't go with `cache`, but got both.")
        read_whole_text(cache)
        query, key = denoising_tokens(config, length, device, attention_mask, position_ids, cache)
    if config.clean_attention == "causal":
        # Blocks without a masked token are read as clean ones.
        is_masked = given == config.mask_token_id if given.dim() == 2 else torch.ones_like(given[..., 0])
        query = query._replace(is_causal=without_masked(query.block_ids, is_masked))
    return query.position_ids, block_diffusion_mask(query, key, MaskKind.of(config, dtype))


def is_prepared(attention_mask: Any) -> bool:
    """Whether this is a mask as the network takes it, in place of a mark of padding [batch, length]."""
    return attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)


def as_int64(name: str, ids: Tensor | None) -> Tensor | None:
    """Ids [...] of any integer dtype as int64, or None; raises a ValueError where these are no integers."""
    if ids is not None and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(f"`{name}` must be of an integer dtype, but got {ids.dtype}.")
    return None if ids is None else ids.long()


def check_one_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Raises a ValueError unless exactly one of them is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given, but got both or neither.")


def check_head(head: torch.nn.Module) -> None:
    """Raises a ValueError where PEFT has put in the place of a head that has a bias one that has none."""
    plain = getattr(head, "original_module", getattr(head, "base_layer", None))
    copies = getattr(head, "modules_to_save", {}).values()
    drops_bias = hasattr(head, "token_adapter") or hasattr(head, "trainable_tokens_delta")
    if getattr(plain, "bias", None) is not None and (drops_bias or any(copy.bias is None for copy in copies)):
        raise ValueError(
            "`lm_head` must keep its bias, which PEFT leaves out where `trainable_token_indices` or "
            f"`ensure_weight_tying` ties it to the embeddings, but got a {type(head).__name__}; adapt "
            "`target_modules=['embed_tokens']`, or a model without `tie_word_embeddings`."
        )


def select_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The states [batch, length, hidden] -> [batch, kept, hidden] of which `forward` is asked for logits."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))


class BlockDiffusionPreTrainedMixin:
    """Resizing and saving of a model; the class that it is mixed into has an `auto_map` of its remote code."""

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, *args, **kwargs) -> nn.Embedding:
        """As `PreTrainedModel.resize_token_embeddings`; raises a ValueError if the mask token would be dropped."""
        multiple, mask_token_id = pad_to_multiple_of or 1, self.config.mask_token_id
        if new_num_tokens is not None and -(-new_num_tokens // multiple) * multiple <= mask_token_id:
            rule = f"at least {mask_token_id + 1}, for the mask token to stay, whose id is `config.mask_token_id`"
            raise ValueError(f"`new_num_tokens` must be {rule}, but got {new_num_tokens}.")
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, and the sources beside the weights; raises a ValueError for a file."""
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, but {save_directory} is a file.")
        # Transformers copies what this file imports; the network has no need of it.
        from .infilling_block_diffusion import CUSTOM_PIPELINES

        self.config.auto_map = dict(self.auto_map)
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        if self.can_generate():
            # A plain one takes sampling arguments without `do_sample` for a mistake.
            self.generation_config = self.generation_config_class.from_generation_config(self.generation_config)
        # A checkpoint read in the published format is saved in this one.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)


class BlockDiffusionLMMixin:
    """
    `forward` of a block diffusion language model over any network; see the head of this file. The class that it is
    mixed into has the network as `base_model`, the head as `get_output_embeddings()`, and a `config` like BD3LMConfig.
    """

    # The look for mask tokens waits for the device: only so many passes are looked at.
    _num_checks_left = 32

    def add_model_tags(self, tags: list[str] | str) -> None:
        """As in Transformers; by its tags a trainer of TRL introduces itself, and those train on next tokens."""
        super().add_model_tags(tags)
        if "trl" in tags and "block-diffusion" not in tags:
            logger.warning_once(NO_NEXT_TOKEN_SCORES, f"A trainer of TRL was given this model ({', '.join(tags)})")

    def _warn_of_next_tokens(self, input_ids: Tensor) -> None:
        """Warns, once, where logits are asked for of tokens [batch, length] of which none is masked."""
        if not self._num_checks_left or is_tracing(input_ids):
            return
        self._num_checks_left -= 1
        # On `meta`, under `vmap` and under tracers there are no values.
        with suppress(RuntimeError):
            if not (input_ids == self.config.mask_token_id).any():
                logger.warning_once(NO_NEXT_TOKEN_SCORES, "Logits were asked for of `input_ids` without a mask token")

    @accepts_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        clean_input_ids: torch.LongTensor | None = None,
        timesteps: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: torch.LongTensor | None = None,
        noise_interval: tuple[float, float] | None = None,
        noise_seed: int = 0,
        loss_weights: torch.FloatTensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> BlockDiffusionOutput:
        """
        Scores [batch, kept, vocab] of the token *at* each position, or with `labels` the block diffusion loss.

        * `input_ids` alone: a denoising pass over the ids that the network reads, masked ones among them. `logits` are
          raw; [`subs_log_probs`] applies the SUBS rules to them.
        * With `clean_input_ids`: the pass over [x_t ; x_0], with x_t in `input_ids`; `logits` belong to x_t.
        * With `labels`: `input_ids` is the text x_0; the `loss` is in nats per predicted token. Noise is drawn here:
          in training mode from torch's global generator, t from `config.noise_interval`; in evaluation mode t from the
          full interval, and the same noise for the same text. Noise drawn elsewhere comes as x_t in `input_ids`, x_0
          in `clean_input_ids`, and the `loss_weights`.

        Args:
            input_ids: ids [batch, length]; in x_t noised copies may follow one another [batch, copies * length].
            attention_mask: 0 at padding [batch, cached + length]; or in a denoising pass a mask as the network takes
                it ([`block_diffusion_mask`]), which passes through untouched.
            position_ids: counted in real tokens [batch, length]; a document begins where they do not go up by one.
            cache: of the blocks before, or `past_key_values`; every position given is added to it ([`CommitCache`]).
            inputs_embeds: embeddings in place of `input_ids` [batch, length, hidden].
            clean_input_ids: x_0 [batch, length].
            timesteps: sigma of each row [batch], or of each token of `input_ids`, clean ones having 0; None means 0.
            labels: the clean id of each token to be predicted, -100 for tokens that are neither masked nor predicted
                (prompts, padding) [batch, length]; not shifted.
            use_cache: make a cache if none is given.
            logits_to_keep: the last so many positions to score, or columns [kept] or [batch, kept]; 0 means all.
            document_ids: equal for the tokens of one document of a packed row [batch, length].
            noise_interval: (beta, omega) that t is drawn from, in place of the one above.
            noise_seed: in evaluation mode another number gives the same text other noise.
            loss_weights: weight in the loss of each masked token of `input_ids`, of its shape.
            num_items_in_batch: denominator of the loss in place of the number of predicted tokens.
            kwargs: `output_hidden_states`, `output_attentions` and what else the network takes.

        Raises:
            ValueError: arguments that exclude each other, wrong shapes, the mask token in labels, noise given in part.
        """
        check_one_input(input_ids, inputs_embeds)
        check_head(self.get_output_embeddings())
        if labels is None and num_items_in_batch is not None:
            raise ValueError(
                "`num_items_in_batch` goes with `labels`, but got none. Trainer takes the labels away for "
                "`label_smoothing_factor` and `compute_loss_func`, which would teach the model to copy its input: set "
                "neither of them."
            )
        input_ids, labels = as_int64("input_ids", input_ids), as_int64("labels", labels)
        clean_input_ids = as_int64("clean_input_ids", clean_input_ids)
        text = (attention_mask, position_ids, document_ids)
        if (labels is not None or clean_input_ids is not None) and (inputs_embeds is not None or cache is not None):
            got = "`inputs_embeds` or `cache` with them"
            raise ValueError(f"`labels` and `clean_input_ids` go with `input_ids`, but got {got}.")
        if labels is not None:
            x_0 = input_ids if clean_input_ids is None else clean_input_ids
            if clean_input_ids is None and (timesteps is not None or loss_weights is not None):
                got = "`timesteps` or `loss_weights`, which belong to noise drawn elsewhere"
                raise ValueError(f"`labels` without `clean_input_ids` ask for noise to be drawn here, but got {got}.")
            if clean_input_ids is not None and (loss_weights is None or noise_interval is not None):
                rule = "noise drawn elsewhere, so `loss_weights` must be given and `noise_interval` not"
                got = f"{type(loss_weights).__name__} and {noise_interval}"
                raise ValueError(f"`labels` with `clean_input_ids` take {rule}, but got {got}.")
            blocks = self._text_blocks(x_0, labels, *text)
            given = clean_input_ids is not None and (input_ids, timesteps, loss_weights)
            noise = given or self._draw_noise(x_0, blocks, noise_interval, noise_seed)
            return self._denoising_loss(x_0, labels, blocks, noise, num_items_in_batch, **kwargs)
        if clean_input_ids is not None:
            blocks = self._text_blocks(clean_input_ids, torch.full_like(clean_input_ids, -100), *text)
            streams, outputs = self._two_stream_pass(input_ids, clean_input_ids, blocks, timesteps, **kwargs)
            hidden_states = streams.noisy_states(outputs.last_hidden_state)
        else:
            if use_cache and cache is None:
                cache = DynamicCache(config=self.config)
            outputs = self._denoising_pass(input_ids, inputs_embeds, text, cache, timesteps, use_cache, **kwargs)
            hidden_states = outputs.last_hidden_state
            if self.config.shift_logits:
                # Of the first position given nothing is known: `generate` keeps what the pass before said of it.
                hidden_states = torch.cat([hidden_states[:, :1], hidden_states[:, :-1]], dim=1)
        logits = self._logits(select_positions(hidden_states, logits_to_keep))
        return BlockDiffusionOutput(None, logits, cache, outputs.hidden_states, outputs.attentions)

    def _text_blocks(self, x_0: Tensor, labels: Tensor, *text: Tensor | None) -> TextBlocks:
        return TextBlocks.of_batch(self.config, x_0, labels, *text)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Raw scores of the final hidden states [batch, kept, hidden] -> [batch, kept, vocab]."""
        return self.get_output_embeddings()(hidden_states)

    def _network(self, **inputs: Any):
        """Calls the network: the output has a `last_hidden_state` [batch, length, hidden]."""
        return self.base_model(return_dict=True, **inputs)

    def _denoising_pass(self, input_ids, inputs_embeds, text, cache, timesteps, use_cache, **kwargs: Any):
        """The output of the network over new tokens; `text` is their (attention_mask, position_ids, document_ids)."""
        # Clean text may fill a cache, or be read for its hidden states; `generate` prepares its masks.
        reads_clean_text = cache is not None or kwargs.get("output_hidden_states") or is_prepared(text[0])
        if inputs_embeds is None and not reads_clean_text:
            self._warn_of_next_tokens(input_ids)
        given = input_ids if inputs_embeds is None else inputs_embeds
        position_ids, attention_mask = prepare_denoising(self.config, given, self.dtype, text, cache)
        kwargs.update(position_ids=position_ids, attention_mask=attention_mask, cache=cache, use_cache=use_cache)
        return self._network(input_ids=input_ids, inputs_embeds=inputs_embeds, timesteps=timesteps, **kwargs)

    def _two_stream_pass(self, x_t, x_0, blocks, timesteps, masked=None, **kwargs: Any) -> tuple[TwoStreams, Any]:
        """[x_t ; x_0] and the network's output."""
        streams = self._two_streams(x_t, x_0, blocks, timesteps, masked)
        kwargs.update(position_ids=streams.position_ids, attention_mask=streams.attention_mask)
        return streams, self._network(input_ids=streams.input_ids, timesteps=streams.timesteps, **kwargs)

    def _two_streams(self, x_t, x_0, blocks, timesteps, masked=None) -> TwoStreams:
        """[x_t ; x_0]: on a CPU without what the `masked` tokens do not depend on."""
        num_copies = x_t.shape[1] // x_0.shape[1] if x_0.shape[1] else 1
        if x_t.shape != (x_0.shape[0], num_copies * x_0.shape[1]):
            rule = "of the shape of `input_ids`, or of each of the noised copies in it"
            raise ValueError(f"`clean_input_ids` must be {rule}, but got {list(x_0.shape)} for {list(x_t.shape)}.")
        is_flex = self.config.get_text_config(decoder=True)._attn_implementation == "flex_attention"
        # In training alone: what a likelihood is reported of, and written by, reads clean text.
        reads_noisy = self.training and self.config.shift_logits == "noisy"
        if x_0.device.type != "cpu" or is_flex or torch.compiler.is_compiling() or reads_noisy:
            # Shapes that depend on the shape of the batch alone, and every token's predecessor in x_t.
            masked = None
        return TwoStreams.of_noise(self.config, blocks, x_t, x_0, timesteps, self.dtype, masked, reads_noisy)

    def _draw_noise(self, x_0, blocks, noise_interval, noise_seed) -> tuple[Tensor, Tensor | None, Tensor]:
        """One draw of t per block and of x_t: (x_t, sigma of each token or None, weight of each token in the loss)."""
        config, schedule, uniform = self.config, NOISE_SCHEDULES[self.config.noise_schedule], None
        if self.training or x_0.is_meta:
            interval = config.noise_interval if noise_interval is None else noise_interval
            t = sample_timesteps(*blocks.shape, interval, device=x_0.device).gather(1, blocks.block)
        else:
            interval = FULL_NOISE_INTERVAL if noise_interval is None else noise_interval
            t, uniform = noise_of_text(x_0, blocks, interval, noise_seed)
        mask_probability = schedule.mask_probability(t)
        x_t = forward_process(x_0, mask_probability, config.mask_token_id, maskable=blocks.predicted, uniform=uniform)
        timesteps = sigma_from_mask_probability(mask_probability) if config.time_conditioning else None
        return x_t, timesteps, schedule.loss_weight(t)

    def _denoising_loss(self, x_0, labels, blocks, noise, num_items_in_batch, **kwargs: Any) -> BlockDiffusionOutput:
        """The NELBO estimate of arXiv 2503.09573, Eq. 8, over `noise`: (x_t, sigma or None, weights in the loss)."""
        x_t, timesteps, loss_weights = noise
        check_shape("loss_weights", loss_weights, "input_ids", x_t.shape)
        num_copies = x_t.shape[1] // max(x_0.shape[1], 1)
        masked = (x_t == self.config.mask_token_id) & blocks.predicted.repeat(1, num_copies)
        streams, outputs = self._two_stream_pass(x_t, x_0, blocks, timesteps, masked, **kwargs)
        if num_items_in_batch is None:
            num_items_in_batch = blocks.predicted.sum().clamp(min=1)
        targets = tokens_where(masked, labels.repeat(1, num_copies))
        hidden = streams.of_predictions(outputs.last_hidden_state, masked)
        nats = tokens_where(masked, loss_weights).float() * self.token_nats(hidden, targets)
        nelbo = torch.zeros(x_t.shape, dtype=torch.float32, device=x_t.device)
        nelbo = nelbo.masked_scatter(masked, nats).unflatten(1, (num_copies, -1)).sum(1)
        states = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return BlockDiffusionOutput(loss=nelbo.sum() / num_items_in_batch, token_nelbo=nelbo, **states)

    def token_nats(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """[`token_nats`] by this model's head, of states [num_masked, hidden] and their clean ids [num_masked]."""
        return token_nats(hidden_states, targets, self.get_output_embeddings(), self.config.mask_token_id)


def noise_of_text(x_0: Tensor, blocks: TextBlocks, noise_interval: tuple, seed: int = 0) -> tuple[Tensor, Tensor]:
    """
    Noise that depends on the text `x_0` [batch, length] of each row and a seed alone, so that two evaluations of the
    same weights agree: (t of each token's block, stratified over the blocks of a row, 0 without a predicted token;
    a uniform number in [0, 1) for each predicted token, 1 for others), both [batch, length], float32.
    """
    t, uniform = torch.zeros(x_0.shape), torch.ones(x_0.shape)
    for row, (chosen, block, ids) in enumerate(zip(blocks.predicted.cpu(), blocks.block.cpu(), x_0.cpu())):
        if chosen.any():
            generator = generator_of(str((seed, ids[chosen].tolist())))
            drawn_blocks = block[chosen].unique()
            t_of_block = torch.zeros(int(block.max()) + 1)
            t_of_block[drawn_blocks] = sample_timesteps(1, len(drawn_blocks), noise_interval, generator=generator)[0]
            t[row] = t_of_block[block]
            uniform[row, chosen] = torch.rand(int(chosen.sum()), generator=generator)
    return t.to(x_0.device), uniform.to(x_0.device)
