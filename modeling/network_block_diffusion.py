"""
The seam between block diffusion and a network: what every block diffusion language model does, whatever its network.

A network is anything that does this, and a stock decoder of Transformers does it as it is:

    hidden_states = network(input_ids | inputs_embeds, position_ids, attention_mask, cache)   # [batch, length, hidden]
    logits        = head(hidden_states)                                                       # [batch, length, vocab]

The mask is data ([`block_diffusion_mask`]) and passes through untouched. The network is called in two ways only: over
[x_t ; x_0] in training ([`TwoStreams`]), and over new tokens against a cache in a denoising pass.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.utils import ModelOutput, can_return_tuple, logging
from transformers.utils.import_utils import is_tracing

from .attention_block_diffusion import block_diffusion_mask, denoising_positions_and_blocks
from .diffusion_block_diffusion import (
    FULL_NOISE_INTERVAL,
    NOISE_SCHEDULES,
    forward_process,
    sample_timesteps,
    sigma_from_mask_probability,
)
from .loss_block_diffusion import token_nats
from .two_stream_block_diffusion import TextBlocks, TwoStreams, positions_and_blocks, tokens_where


logger = logging.get_logger(__name__)

NO_NEXT_TOKEN_SCORES = (
    "%s, but a block diffusion model has no scores of the next token: its logits score the token at each position, "
    "which it sees unless it is masked. To evaluate, take `bd3lm_hf.evaluate_likelihood`, or `python -m "
    "bd3lm_hf.evaluation.harness --model bd3lm` for lm-evaluation-harness; to train, give `labels` to the model, or "
    "take `BD3LMTrainer` or `BD3LMSFTTrainer`."
)


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
    """
    Output of a network.

    Args:
        last_hidden_state: [batch, length, hidden].
        cache: where one was given or asked for.
        hidden_states: with `output_hidden_states`, the embeddings and the states after each layer.
        attentions: with `output_attentions`, the attention weights of each layer.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


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

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    token_nelbo: torch.Tensor | None = None

    def __setitem__(self, key, value):
        if key == "input_ids":
            # `FillMaskPipeline` alone puts them here. It would propose the mask token as well, and fill a gap from
            # earlier ones that are still open.
            raise ValueError(
                "`pipeline` must be asked for 'text-infilling' in place of 'fill-mask', which takes the scores of one "
                "pass over all gaps for probabilities."
            )
        super().__setitem__(key, value)


def accepts_past_key_values(method: Callable) -> Callable:
    """Lets a method that takes `cache` be called with `past_key_values`, its name before Transformers 5.24."""

    @functools.wraps(method)
    def wrapper(self, *args: Any, **kwargs: Any):
        if "past_key_values" in kwargs:
            past_key_values = kwargs.pop("past_key_values")
            if past_key_values is not None:
                if kwargs.get("cache") is not None:
                    raise ValueError("`cache` and `past_key_values` are one argument, but got both; give `cache`.")
                kwargs["cache"] = past_key_values
        return method(self, *args, **kwargs)

    return wrapper


def prepare_denoising(
    config,
    given: torch.Tensor,
    dtype: torch.dtype,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Any]:
    """
    Positions and mask of a denoising pass, as the network takes them.

    Args:
        config: the model's.
        given: ids [batch, length] or embeddings [batch, length, hidden].
        dtype: that of the hidden states.
        attention_mask: 0 at padding [batch, cached + length]; or a mask that was prepared already, which is returned.
        position_ids: counted in real tokens of each row [batch, length].
        cache: of the blocks before.
        document_ids: equal for the tokens of one document of a packed row [batch, length].

    Returns:
        (position_ids [batch or 1, length], the mask).

    Raises:
        ValueError: shapes that do not fit, `document_ids` with a cache.
    """
    shape, device = given.shape[:2], given.device
    cached_length = 0 if cache is None else cache.get_seq_length()
    if is_prepared(attention_mask):
        if position_ids is None:
            position_ids = torch.arange(shape[1], device=device)[None] + cached_length
        return position_ids, attention_mask
    expected_shape = (shape[0], cached_length + shape[1])
    if attention_mask is not None and attention_mask.shape != expected_shape:
        raise ValueError(
            "`attention_mask` must be of shape [batch, cached + length] = "
            f"{[int(size) for size in expected_shape]}, but got {list(attention_mask.shape)}."
        )
    if cache is None:
        text = (attention_mask, position_ids, document_ids)
        position_ids, query_blocks = positions_and_blocks(config, shape, device, *text)
        key_blocks = query_blocks
    else:
        if document_ids is not None:
            raise ValueError("`document_ids` describes whole rows and can't go with `cache`, but got both.")
        position_ids, query_blocks, key_blocks = denoising_positions_and_blocks(
            config, shape[1], device, attention_mask, position_ids, cache
        )
    mask = block_diffusion_mask(query_blocks, key_blocks, config.window_in_blocks, config._attn_implementation, dtype)
    return position_ids, mask


def is_prepared(attention_mask: Any) -> bool:
    """Whether this is a mask as the network takes it, in place of a mark of padding [batch, length]."""
    return attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2)


def as_int64(name: str, ids: torch.Tensor) -> torch.Tensor:
    """
    Ids of any integer dtype as int64.

    Raises:
        ValueError: these are no integers.
    """
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"`{name}` must be of an integer dtype, but got {ids.dtype}.")
    return ids.long()


def check_head(head: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: PEFT has put in the place of a head that has a bias one that has none.
    """
    plain = getattr(head, "original_module", getattr(head, "base_layer", None))
    copies = getattr(head, "modules_to_save", {}).values()
    drops_bias = hasattr(head, "token_adapter") or hasattr(head, "trainable_tokens_delta")
    if getattr(plain, "bias", None) is not None and (drops_bias or any(copy.bias is None for copy in copies)):
        raise ValueError(
            "`lm_head` must keep its bias, which PEFT leaves out where `trainable_token_indices` or "
            f"`ensure_weight_tying` ties it to the embeddings, but got a {type(head).__name__}; adapt "
            "`target_modules=['embed_tokens']`, or a model without `tie_word_embeddings`."
        )


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The states whose logits are wanted.

    Args:
        hidden_states: [batch, length, hidden].
        logits_to_keep: so many of the last ones, 0 for all; or columns [kept], or columns of each row [batch, kept].
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))


class BlockDiffusionLMMixin:
    """
    `forward` of a block diffusion language model over any network; see the head of this file.

    The class that it is mixed into has the network as `model`, the head as `lm_head`, and a `config` with
    `block_size`, `mask_token_id`, `noise_schedule`, `noise_interval`, `ignore_bos`, `time_conditioning` and
    `window_in_blocks`.
    """

    # The look for mask tokens waits for the device: only so many passes are looked at.
    _num_checks_left = 32

    def add_model_tags(self, tags: list[str] | str) -> None:
        """As in Transformers; by its tags a trainer of TRL introduces itself, and those train on next tokens."""
        super().add_model_tags(tags)
        if "trl" in tags and "block-diffusion" not in tags:
            logger.warning_once(NO_NEXT_TOKEN_SCORES, f"A trainer of TRL was given this model ({', '.join(tags)})")

    def _warn_of_next_tokens(self, input_ids: torch.Tensor) -> None:
        """Warns, once, where logits are asked for of tokens [batch, length] of which none is masked."""
        if not self._num_checks_left or is_tracing(input_ids):
            return
        self._num_checks_left -= 1
        try:
            all_clean = not (input_ids == self.config.mask_token_id).any()
        except RuntimeError:
            # On `meta`, under `vmap` and under tracers there are no values.
            return
        if all_clean:
            logger.warning_once(NO_NEXT_TOKEN_SCORES, "Logits were asked for of `input_ids` without a mask token")

    @accepts_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        clean_input_ids: torch.LongTensor | None = None,
        timesteps: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        document_ids: torch.LongTensor | None = None,
        noise_interval: tuple[float, float] | None = None,
        noise_seed: int = 0,
        loss_weights: torch.FloatTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BlockDiffusionOutput:
        """
        Scores of the token *at* each position, or with `labels` the block diffusion loss.

        * `input_ids` alone: a denoising pass. They are the ids that the network reads, masked ones among them, and
          `logits` are raw: the SUBS rules are applied where they are used ([`subs_log_probs`]).
        * With `clean_input_ids`: the pass over [x_t ; x_0], with x_t in `input_ids`; `logits` belong to x_t.
        * With `labels`: `input_ids` is the text x_0, and the loss is returned. Noise is drawn here: in training mode
          from torch's global generator, t from `config.noise_interval`; in evaluation mode t from the full interval,
          and the same noise for the same text. Noise drawn elsewhere comes as x_t in `input_ids`, x_0 in
          `clean_input_ids`, and the `loss_weights`.

        Args:
            input_ids: ids [batch, length]; x_t may hold several noised copies of the text, one after the other
                [batch, copies * length].
            attention_mask: 0 at padding [batch, cached + length]; or in a denoising pass a mask as the network takes
                it ([`block_diffusion_mask`]), which passes through untouched.
            position_ids: positions, counted in real tokens of each row [batch, length]. A document begins wherever
                they do not go up by one.
            cache: cache of the blocks before; every position given here is written to it (see [`CommitCache`]).
                `past_key_values` is the same argument.
            inputs_embeds: embeddings in place of `input_ids` [batch, length, hidden].
            clean_input_ids: x_0 [batch, length].
            timesteps: sigma of each row [batch], for all that is given, or of each token of `input_ids`; clean tokens
                have sigma 0 then. None means 0.
            labels: the clean id of each token to be predicted, -100 for tokens that are neither masked nor predicted
                (prompts, padding) [batch, length]; not shifted.
            use_cache: make a cache if none is given.
            logits_to_keep: compute the logits of the last so many positions, or of these columns [kept], or of these
                columns of each row [batch, kept]; 0 means all.
            document_ids: equal for the tokens of one document of a packed row [batch, length].
            noise_interval: (beta, omega) that t is drawn from, in place of the one above.
            noise_seed: in evaluation mode the same text meets other noise under another number.
            loss_weights: weight in the loss of each masked token of `input_ids`, of its shape; goes with `labels` and
                `clean_input_ids`.
            num_items_in_batch: denominator of the loss in place of the number of predicted tokens.
            kwargs: `output_hidden_states`, `output_attentions` and what else the network takes.

        Returns:
            a [`BlockDiffusionOutput`], with `logits` [batch, length, vocab] of the kept positions, or with `labels`
            the `loss` in nats per predicted token.

        Raises:
            ValueError: arguments that exclude each other, shapes that do not fit, labels that hold the mask token,
                noise of which a part is missing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given, but got both or neither.")
        check_head(self.lm_head)
        if labels is None and num_items_in_batch is not None:
            raise ValueError(
                "`num_items_in_batch` goes with `labels`, but got none. Trainer takes the labels away for "
                "`label_smoothing_factor` and `compute_loss_func`, which would teach the model to copy its input: set "
                "neither of them."
            )
        input_ids, clean_input_ids, labels = (
            ids if ids is None else as_int64(name, ids)
            for name, ids in (("input_ids", input_ids), ("clean_input_ids", clean_input_ids), ("labels", labels))
        )
        text = {"attention_mask": attention_mask, "position_ids": position_ids, "document_ids": document_ids}
        if labels is not None or clean_input_ids is not None:
            if inputs_embeds is not None or cache is not None:
                raise ValueError(
                    "`labels` and `clean_input_ids` go with `input_ids`, but got `inputs_embeds` or `cache` with them."
                )
        if labels is not None:
            if clean_input_ids is None:
                if timesteps is not None or loss_weights is not None:
                    raise ValueError(
                        "`labels` without `clean_input_ids` ask for noise to be drawn here, but got `timesteps` or "
                        "`loss_weights`, which belong to noise drawn elsewhere."
                    )
                clean_input_ids = input_ids
                blocks = TextBlocks.of_batch(self.config, clean_input_ids, labels, **text)
                input_ids, timesteps, loss_weights = self._draw_noise(
                    clean_input_ids, blocks, noise_interval, noise_seed
                )
            elif loss_weights is None or noise_interval is not None:
                raise ValueError(
                    "`labels` with `clean_input_ids` take noise drawn elsewhere, so `loss_weights` must be given and "
                    f"`noise_interval` not, but got {type(loss_weights).__name__} and {noise_interval}."
                )
            else:
                blocks = TextBlocks.of_batch(self.config, clean_input_ids, labels, **text)
            noise = (input_ids, timesteps, loss_weights)
            return self._denoising_loss(clean_input_ids, labels, blocks, *noise, num_items_in_batch, **kwargs)
        if clean_input_ids is not None:
            blocks = TextBlocks.of_batch(self.config, clean_input_ids, torch.full_like(clean_input_ids, -100), **text)
            streams = self._two_streams(input_ids, clean_input_ids, blocks, timesteps)
            outputs = self._run_network(streams, **kwargs)
            hidden_states = outputs.last_hidden_state[:, : streams.num_noisy]
        else:
            if use_cache and cache is None:
                cache = DynamicCache(config=self.config)
            # Clean text may fill a cache, or be read for its hidden states; `generate` prepares its masks.
            reads_clean_text = cache is not None or kwargs.get("output_hidden_states") or is_prepared(attention_mask)
            if inputs_embeds is None and not reads_clean_text:
                self._warn_of_next_tokens(input_ids)
            given = input_ids if inputs_embeds is None else inputs_embeds
            text["position_ids"], text["attention_mask"] = prepare_denoising(
                self.config, given, self.dtype, cache=cache, **text
            )
            del text["document_ids"]
            if timesteps is not None:
                kwargs["timesteps"] = timesteps
            if inputs_embeds is not None:
                kwargs["inputs_embeds"] = inputs_embeds
            outputs = self.model(
                input_ids=input_ids, cache=cache, use_cache=use_cache, return_dict=True, **text, **kwargs
            )
            hidden_states = outputs.last_hidden_state
        return BlockDiffusionOutput(
            logits=self._logits(select_positions(hidden_states, logits_to_keep)),
            cache=cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Raw scores of the final hidden states [batch, kept, hidden] -> [batch, kept, vocab]."""
        return self.lm_head(hidden_states)

    def _two_streams(
        self,
        x_t: torch.Tensor,
        x_0: torch.Tensor,
        blocks: TextBlocks,
        timesteps: torch.Tensor | None,
        masked: torch.Tensor | None = None,
    ) -> TwoStreams:
        """The input of the network for [x_t ; x_0]: on a CPU without what the `masked` tokens do not depend on."""
        num_copies = x_t.shape[1] // x_0.shape[1] if x_0.shape[1] else 1
        if x_t.shape != (x_0.shape[0], num_copies * x_0.shape[1]):
            raise ValueError(
                "`clean_input_ids` must be of the shape of `input_ids`, or of each of the noised copies in it, "
                f"but got {list(x_0.shape)} for {list(x_t.shape)}."
            )
        is_on_cpu = x_0.device.type == "cpu" and self.config._attn_implementation != "flex_attention"
        if not is_on_cpu or torch.compiler.is_compiling():
            # Shapes that depend on the shape of the batch alone.
            masked = None
        return TwoStreams.of_noise(self.config, blocks, x_t, x_0, timesteps, self.dtype, masked)

    def _run_network(self, streams: TwoStreams, **kwargs: Any):
        if streams.timesteps is not None:
            kwargs["timesteps"] = streams.timesteps
        return self.model(
            input_ids=streams.input_ids,
            attention_mask=streams.attention_mask,
            position_ids=streams.position_ids,
            return_dict=True,
            **kwargs,
        )

    def _draw_noise(
        self, x_0: torch.Tensor, blocks: TextBlocks, noise_interval: tuple[float, float] | None, noise_seed: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
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

    def _denoising_loss(
        self,
        x_0: torch.Tensor,
        labels: torch.Tensor,
        blocks: TextBlocks,
        x_t: torch.Tensor,
        timesteps: torch.Tensor | None,
        loss_weights: torch.Tensor,
        num_items_in_batch: int | torch.Tensor | None,
        **kwargs: Any,
    ) -> BlockDiffusionOutput:
        """The NELBO estimate of arXiv 2503.09573, Eq. 8, over the noised ids `x_t`."""
        config = self.config
        if loss_weights.shape != x_t.shape:
            raise ValueError(
                f"`loss_weights` must be of the shape of `input_ids`, {list(x_t.shape)}, but got "
                f"{list(loss_weights.shape)}."
            )
        num_copies = x_t.shape[1] // max(x_0.shape[1], 1)
        masked = (x_t == config.mask_token_id) & blocks.predicted.repeat(1, num_copies)
        streams = self._two_streams(x_t, x_0, blocks, timesteps, masked)
        outputs = self._run_network(streams, **kwargs)
        if num_items_in_batch is None:
            num_items_in_batch = blocks.predicted.sum().clamp(min=1)
        nelbo = torch.zeros(x_t.shape, dtype=torch.float32, device=x_t.device)
        nats = self.token_nats(streams.of_predictions(outputs.last_hidden_state, masked), labels, masked)
        nelbo = nelbo.masked_scatter(masked, tokens_where(masked, loss_weights).float() * nats)
        nelbo = nelbo.unflatten(1, (num_copies, -1)).sum(1)
        return BlockDiffusionOutput(
            loss=nelbo.sum() / num_items_in_batch,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_nelbo=nelbo,
        )

    def token_nats(self, hidden_states: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """
        -log x_theta of the masked tokens.

        Args:
            hidden_states: theirs [num_masked, hidden].
            labels: clean ids [batch, length].
            masked: which tokens these are, bool [batch, copies * length].

        Returns:
            nats [num_masked], float32, differentiable.
        """
        num_copies = masked.shape[1] // max(labels.shape[1], 1)
        targets = tokens_where(masked, labels.repeat(1, num_copies))
        return token_nats(hidden_states, targets, self.lm_head, self.config.mask_token_id)


def noise_of_text(
    x_0: torch.Tensor, blocks: TextBlocks, noise_interval: tuple[float, float], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Noise that depends on the text of each row alone, so that two evaluations of the same weights agree.

    t is stratified over the blocks of a row.

    Args:
        x_0: ids [batch, length].
        blocks: those of `x_0`.
        noise_interval: (beta, omega) that t is drawn from.
        seed: another number gives other noise.

    Returns:
        (t of each token, that of its block; a uniform number in [0, 1) for each predicted token, 1 for others), both
        [batch, length], float32. Blocks without a predicted token have t = 0.
    """
    t, uniform = torch.zeros(x_0.shape), torch.ones(x_0.shape)
    predicted, block, ids = blocks.predicted.cpu(), blocks.block.cpu(), x_0.cpu()
    for row in range(len(x_0)):
        chosen = predicted[row]
        if not chosen.any():
            continue
        text = str((seed, ids[row][chosen].tolist())).encode()
        digest = hashlib.blake2b(text, digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        drawn_blocks = block[row][chosen].unique()
        t_of_block = torch.zeros(int(block[row].max()) + 1)
        t_of_block[drawn_blocks] = sample_timesteps(1, len(drawn_blocks), noise_interval, generator=generator)[0]
        t[row] = t_of_block[block[row]]
        uniform[row, chosen] = torch.rand(int(chosen.sum()), generator=generator)
    return t.to(x_0.device), uniform.to(x_0.device)
