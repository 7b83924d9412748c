"""
Self-speculation: a block diffusion model drafts, and the autoregressive model that it still is decides.

A network whose clean stream is causal (`clean_attention="causal"`; TiDAR, arXiv 2511.08923) holds two models of the
same weights: its clean stream gives the next token's distribution, and its noisy stream predicts a whole block at
once. The first verifies drafts of the second by the rejection rule of speculative sampling. What is written has the
distribution of the autoregressive model, exactly; the drafts decide how many forwards that takes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList

from ..modeling.attention_block_diffusion import MaskKind, Tokens, block_diffusion_mask, token_block_ids
from ..modeling.cache_block_diffusion import CommitCache
from ..modeling.diffusion_block_diffusion import generator_of
from ..modeling.generation_block_diffusion import BD3LMGenerationConfig
from ..modeling.guidance_block_diffusion import Guidance
from ..modeling.network_block_diffusion import BD3LMGenerateOutput
from ..modeling.prediction_block_diffusion import ignores_context
from .acceptance import accept_draft, draw, token_distributions


# Arguments of `generate` that have no meaning here, or would be lost.
REFUSED = (
    "infill",
    "output_scores",
    "output_logits",
    "output_reveal",
    "entropy_stop_threshold",
    "cache_implementation",
)


def self_speculative(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: BD3LMGenerationConfig,
    streamer: Any = None,
    predraft: bool = True,
    **model_kwargs: Any,
) -> BD3LMGenerateOutput | Tensor:
    """
    For `model.generate(..., custom_generate=self_speculative)`: writes text with the distribution of the
    autoregressive model that is the network's clean stream, in fewer forwards than tokens. Greedily it writes that
    model's greedy text. Processors act alike on drafts and on what verifies them.

    1. Run the network on the tokens not cached yet, causally, the draft among them, and on masked blocks after it.
    2. Accept the draft as far as the rejection rule goes, and draw the token after it from what that leaves.
    3. Draft a block from the masked one that comes after the accepted tokens.
    4. Cut the cache back to what was accepted, and each row where it ends.

    The network verifies and drafts in one forward, which gives from one token up to `block_size`. In float32 it scores
    a token among others as it does alone, to 1e-5 or so; in bfloat16 to no more than two digits, so that where two
    tokens are about equally likely the text may go another way than one token after the other would.

    Args:
        input_ids, attention_mask: prompts [batch, length], padded on the left.
        predraft: draft after each number of tokens that may be accepted, up to `block_size` masked blocks in one
            forward (as TiDAR does), so that no forward is without a draft; otherwise only for the case that all are.
        model, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs: as `generate` hands them
            over. A `sampler` and its arguments have no part in it.

    Returns:
        The texts [batch, longest], or with `return_dict_in_generate` a [`BD3LMGenerateOutput`] of them and of the
        forwards that each row took.

    Raises:
        ValueError: a network whose clean stream is not causal, or an argument that has no meaning here.
    """
    config = model.config
    _check(config, input_ids, logits_processor, generation_config, model_kwargs)
    attention_mask = model_kwargs.get("attention_mask")
    text = _Text.of_prompts(input_ids, attention_mask, stopping_criteria, generation_config, config)
    chooser = _Chooser(logits_processor, generation_config.do_sample is not False, text, config.mask_token_id)
    drafter = _Drafter(model, text, predraft)
    numbers = _Numbers(generation_config, len(input_ids), 2 * config.block_size - 1, input_ids.device)
    num_forwards = torch.zeros_like(text.length)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while text.unfinished.any():
        num_forwards += text.unfinished
        uniform = numbers.draw()
        target = drafter.forward()
        drafted = drafter.draft.shape[1]
        target = torch.stack([chooser(target[:, i], drafter.with_draft(), i) for i in range(drafted + 1)], dim=1)
        num_accepted, rest = accept_draft(drafter.draft, drafter.drafted_from, target, uniform[:, 1 : 1 + drafted])
        new = torch.cat([drafter.draft, drafter.draft[:, :0].new_zeros(len(rest), 1)], dim=1)
        new.scatter_(1, num_accepted[:, None], draw(rest, uniform[:, 0])[:, None])
        drafter.settle(num_accepted)
        text.add(new, num_accepted + 1, stopping_criteria)
        drafter.draft_next(num_accepted, chooser, uniform[:, config.block_size :])
        if streamer is not None:
            text.show(streamer)
    if streamer is not None:
        streamer.end()
    sequences = text.ids[:, : int(text.length.max())]
    if not generation_config.return_dict_in_generate:
        return sequences
    num_new = text.length - input_ids.shape[1]
    noted = {"num_forward_passes": num_forwards, "tokens_per_forward": num_new / num_forwards.clamp(min=1)}
    return BD3LMGenerateOutput(sequences=sequences, **noted)


def _check(config, input_ids: Tensor, processors, generation_config, model_kwargs: dict[str, Any]) -> None:
    clean_attention = getattr(config, "clean_attention", "block")
    if clean_attention != "causal":
        raise ValueError(
            "`clean_attention` of the model must be 'causal' for self-speculation, whose drafts are verified by the "
            f"autoregressive model that the clean stream is then, but got {clean_attention!r}."
        )
    for name in REFUSED:
        if getattr(generation_config, name, None):
            got = getattr(generation_config, name)
            raise ValueError(f"`{name}` must be left out of self-speculation, but got {got!r}.")
    if any(isinstance(processor, Guidance) for processor in processors):
        raise ValueError("`guidance_scale` must be 1 or None in self-speculation, but got another one.")
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    if cache is None or cache.get_seq_length():
        got = "`use_cache=False`" if cache is None else f"a `cache` of {cache.get_seq_length()} positions"
        raise ValueError(f"Self-speculation must begin with an empty cache of its own, but got {got}.")
    if (input_ids == config.mask_token_id).any():
        raise ValueError(f"`input_ids` must not hold the mask token ({config.mask_token_id}).")


class _Numbers:
    """Uniform numbers of each forward: with seeds, each row's come from a generator of its own."""

    def __init__(self, generation_config, batch_size: int, count: int, device: torch.device):
        self.shape, self.device = (batch_size, count), device
        seeds = generation_config.row_seeds(batch_size)
        self.generators = None if seeds is None else [generator_of(f"{seed} speculation") for seed in seeds]

    def draw(self) -> Tensor:
        """[batch, count]"""
        if self.generators is None:
            return torch.rand(self.shape, device=self.device)
        rows = [torch.rand(self.shape[1], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(self.device)


@dataclass
class _Text:
    """
    The rows, prompts first, and how far each has come.

    Attributes:
        ids: [batch, prompt width + room for new tokens].
        first_column: where each row's prompt begins [batch].
        length: columns of each row that are known [batch].
        unfinished: rows that go on, bool [batch].
        max_length: columns that the text may have.
        pad_token_id: what comes after the end of a row.
        num_shown: columns that a streamer has seen.
    """

    ids: Tensor
    first_column: Tensor
    length: Tensor
    unfinished: Tensor
    max_length: int
    pad_token_id: Any
    num_shown: int

    @classmethod
    def of_prompts(cls, input_ids, attention_mask, criteria, generation_config, config) -> "_Text":
        batch_size, width = input_ids.shape
        pad_token_id = generation_config._pad_token_tensor
        may_end_apart = any(not isinstance(criterion, MaxLengthCriteria) for criterion in criteria)
        if pad_token_id is None and batch_size > 1 and may_end_apart:
            raise ValueError("`pad_token_id` must be set for rows that may end at different lengths, but got None.")
        room = generation_config.max_length - width + config.block_size
        ids = torch.cat([input_ids, input_ids.new_full((batch_size, room), config.mask_token_id)], dim=1)
        length = torch.full((batch_size,), width, device=input_ids.device)
        first_column = length - width if attention_mask is None else width - attention_mask.long().sum(-1)
        sizes = (generation_config.max_length, pad_token_id, width)
        return cls(ids, first_column, length, torch.ones_like(length, dtype=torch.bool), *sizes)

    def add(self, new: Tensor, count: Tensor, criteria: StoppingCriteriaList) -> None:
        """
        Adds to each unfinished row the first `count` [batch] of its `new` tokens [batch, most], and shows them to the
        stopping criteria one after the other, as an autoregressive model would.
        """
        columns = self.length[:, None] + torch.arange(new.shape[1], device=new.device)
        is_new = (columns < (self.length + count)[:, None]) & (columns < self.max_length) & self.unfinished[:, None]
        columns = columns.clamp(max=self.ids.shape[1] - 1)
        self.ids.scatter_(1, columns, torch.where(is_new, new, self.ids.gather(1, columns)))
        before, end = self.length.clone(), self.length + is_new.sum(-1)
        for column in range(int(before[self.unfinished].min()), int(end.max())):
            stops = criteria(self.ids[:, : column + 1], None).to(end.device)
            reached = self.unfinished & (before <= column) & (column < end)
            self.length += reached
            self.unfinished &= ~(reached & (stops | (column + 1 == self.max_length)))
        if self.pad_token_id is not None:
            after_end = torch.arange(self.ids.shape[1], device=new.device) >= self.length[:, None]
            self.ids.masked_fill_(after_end & ~self.unfinished[:, None], self.pad_token_id)

    def show(self, streamer: Any) -> None:
        """Gives a streamer the columns that are known in every row."""
        known = torch.where(self.unfinished, self.length, self.max_length)
        ready = min(int(known.min()), int(self.length.max()))
        columns = self.ids[:, self.num_shown : ready].cpu()
        self.num_shown = ready
        for tokens in columns if len(columns) == 1 else columns.unbind(1):
            streamer.put(tokens)


class _Chooser:
    """From logits to the probabilities that a token is drawn from: the mask token has none, and processors act."""

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, text: _Text, mask_token_id: int):
        self.processors, self.do_sample, self.mask_token_id, self.text = processors, do_sample, mask_token_id, text
        self.ignores_context = all(ignores_context(processor) for processor in processors)
        columns = torch.arange(text.ids.shape[1], device=text.ids.device)
        self.is_padding = columns < text.first_column[:, None]

    def __call__(self, logits: Tensor, ids: Tensor, offset: int) -> Tensor:
        """
        Of the token `offset` places after the last known one of each row, where `ids` [batch, columns] are the text
        with what comes between: probabilities [batch, vocab] of `logits` [batch, vocab].
        """
        mask_token_id = torch.tensor(self.mask_token_id, device=logits.device)
        scores = logits.float().index_fill(-1, mask_token_id, -torch.inf)
        if self.ignores_context:
            scores = self.processors(ids, scores)
        elif len(self.processors):
            # A processor sees texts of one length: every row is shown, and those of that length are taken.
            raw, scores = scores, scores.clone()
            context = ids.masked_fill(self.is_padding, self.mask_token_id)
            columns = self.text.length + offset
            for length in columns[self.text.unfinished].unique().tolist():
                processed = self.processors(context[:, :length], raw.clone())
                scores = torch.where((columns == length)[:, None], processed, scores)
        return token_distributions(scores, self.do_sample)


class _Drafter:
    """The passes over the network: its cache, the draft that is to be verified, and the masked blocks of the next."""

    def __init__(self, model: PreTrainedModel, text: _Text, predraft: bool):
        self.model, self.config, self.text, self.predraft = model, model.config, text, predraft
        # Whole layers: masks say what a layer with a sliding window sees.
        self.cache: Cache = DynamicCache()
        self.kind = MaskKind.of(self.config, model.dtype)
        ids, vocab_size, limit = text.ids, self.config.vocab_size, self.config.max_position_embeddings
        # A masked block may end after the last position that a network without rotation has learned.
        has_table = limit is not None and not hasattr(model.base_model, "rotary_emb")
        self.last_position = limit - 1 if has_table else torch.iinfo(torch.long).max
        width = int(text.length[0])
        # Real tokens before each column of the prompts; -1 marks what nobody sees.
        positions = torch.arange(width, device=ids.device) - text.first_column[:, None]
        self.pending, self.pending_positions = ids[:, :width], positions.clamp(min=-1)
        self.cached_positions = positions[:, :0]
        self.draft = ids[:, :0]
        self.drafted_from = torch.zeros(len(ids), 1, vocab_size, device=ids.device)
        self.draft_length = torch.zeros_like(text.length)
        self.block_logits: Tensor | None = None

    def with_draft(self) -> Tensor:
        """The text with the draft after each row's last known token [batch, columns]."""
        columns = self.text.length[:, None] + torch.arange(self.draft.shape[1], device=self.draft.device)
        return self.text.ids.scatter(1, columns, self.draft)

    def forward(self) -> Tensor:
        """
        One forward over the known tokens that are not cached yet, the draft, and masked blocks; it commits the first
        two. Logits of each drafted token and of the one after [batch, drafted + 1, vocab].
        """
        size, drafted, num_clean = self.config.block_size, self.draft.shape[1], self.pending.shape[1]
        device = self.draft.device
        steps = torch.arange(max(size, drafted), device=device)
        next_position = (self.text.length - self.text.first_column)[:, None]
        is_surplus = steps[:drafted] >= self.draft_length[:, None]
        draft_positions = (next_position + steps[:drafted]).masked_fill(is_surplus, -1)
        clean = torch.cat([self.pending_positions, draft_positions], dim=1)
        clean = clean.masked_fill(~self.text.unfinished[:, None], -1)
        # 1. Where masked blocks begin: after each number of accepted tokens, or after the whole draft.
        accepted = torch.arange(drafted + 1, device=device)[None] if self.predraft else self.draft_length[:, None]
        start = (next_position + accepted).repeat_interleave(size, dim=1)
        noisy = (start + steps[:size].repeat(accepted.shape[1])).clamp(max=self.last_position)
        query = self._tokens(clean, start, noisy)
        key = self._tokens(torch.cat([self.cached_positions, clean], dim=1), start, noisy)
        ids = torch.cat([self.pending, self.draft, noisy.new_full(noisy.shape, self.config.mask_token_id)], dim=1)
        # 2. What is read: the tokens after the last known one, and of each masked block all but the first.
        width = num_clean + drafted
        blocks = torch.arange(noisy.shape[1], device=device).unflatten(0, (-1, size))[:, 1:].flatten()
        first = num_clean - (0 if self.config.shift_logits else 1)
        kept = torch.cat([first + torch.arange(drafted + 1, device=device), width + blocks])
        self.cached_positions = torch.cat([self.cached_positions, clean], dim=1)
        logits = self.model(
            input_ids=ids,
            position_ids=query.position_ids.clamp(min=0),
            attention_mask=block_diffusion_mask(query, key, self.kind),
            cache=CommitCache(self.cache, width),
            logits_to_keep=kept,
        ).logits
        self.block_logits = logits[:, drafted + 1 :].unflatten(1, (accepted.shape[1], size - 1))
        return logits[:, : drafted + 1]

    def _tokens(self, clean: Tensor, start: Tensor, noisy: Tensor) -> Tokens:
        """
        Clean tokens at their positions [batch, clean], -1 for none, each a block of its own, and the masked blocks,
        each a copy that sees the clean tokens before its `start` [batch, noisy].
        """
        block_ids = token_block_ids(torch.cat([clean, start], dim=1), 1, torch.cat([clean < 0, start < 0], dim=1))
        copies = torch.arange(start.shape[1], device=start.device) // self.config.block_size + 1
        streams = torch.cat([torch.zeros_like(clean[0]), copies])[None]
        return Tokens(block_ids, torch.cat([clean, noisy], dim=1), streams)

    def settle(self, num_accepted: Tensor) -> None:
        """Cuts the cache back to what was accepted in the row where that is most, and others' rest out of sight."""
        drafted = self.draft.shape[1]
        most = int(num_accepted[self.text.unfinished].max())
        if drafted > most:
            self.cache.crop(most - drafted)
        positions = self.cached_positions[:, : self.cached_positions.shape[1] - (drafted - most)]
        rejected = torch.arange(most, device=positions.device) >= num_accepted[:, None]
        self.cached_positions = positions.clone()
        self.cached_positions[:, positions.shape[1] - most :].masked_fill_(rejected, -1)

    def draft_next(self, num_accepted: Tensor, chooser: _Chooser, uniform: Tensor) -> None:
        """
        Drafts the tokens of a block after the first, which is each row's last known token now, from the masked block
        that began there; `uniform` are numbers in [0, 1) [batch, block_size - 1].
        """
        num_drafted, rows = self.config.block_size - 1, torch.arange(len(num_accepted), device=num_accepted.device)
        is_drafted = torch.ones_like(self.text.unfinished)
        if not self.predraft:
            is_drafted, num_accepted = num_accepted == self.draft_length, torch.zeros_like(num_accepted)
        last = self.text.length[:, None] - 1
        self.pending, self.pending_positions = self.text.ids.gather(1, last), last - self.text.first_column[:, None]
        logits, self.draft, drafted_from = self.block_logits[rows, num_accepted], self.draft[:, :0], []
        for index in range(num_drafted if is_drafted.any() else 0):
            drafted_from.append(chooser(logits[:, index], self.with_draft(), index))
            token = draw(drafted_from[-1], uniform[:, index])
            self.draft = torch.cat([self.draft, token[:, None]], dim=1)
        # None that would come after the longest text.
        num_drafted = (self.text.max_length - self.text.length).clamp(min=0, max=self.draft.shape[1])
        self.draft_length = torch.where(is_drafted, num_drafted, 0)
        drafted_from.append(torch.zeros_like(self.drafted_from[:, 0]))
        is_drafted = torch.arange(len(drafted_from), device=last.device) < self.draft_length[:, None]
        self.drafted_from = torch.stack(drafted_from, dim=1) * is_drafted[..., None]
