"""From the logits of masked positions to tokens: processors, drawing, and how sure the model is."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, generation


# Usual processors whose result does not depend on the tokens so far: any rows may share a call.
CONTEXT_FREE_PROCESSORS = (
    generation.LogitNormalization,
    generation.MinPLogitsWarper,
    generation.SuppressTokensLogitsProcessor,
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
)
# Those of sequences of tokens, of which any token may be the last to be revealed.
BIASES = (generation.SequenceBiasLogitsProcessor, generation.NoBadWordsLogitsProcessor)
N_GRAM_BANS = (generation.NoRepeatNGramLogitsProcessor, generation.EncoderNoRepeatNGramLogitsProcessor)
CONFIDENCES = ("probability", "margin", "negative_entropy", "processed_probability")


def ignores_context(processor: LogitsProcessor) -> bool:
    """Whether a processor reads no token; a class of somebody's own may, unless it says that it does not."""
    return type(processor) in CONTEXT_FREE_PROCESSORS or getattr(processor, "ignores_context", False)


def reads_whole_context(processor: LogitsProcessor) -> bool:
    """Whether a processor reads the tokens on both sides, in whichever order: any rows may share a call."""
    is_penalty = type(processor) is generation.RepetitionPenaltyLogitsProcessor
    return is_penalty and not isinstance(getattr(processor, "prompt_ignore_length", None), Tensor)


def least_length(processor: LogitsProcessor) -> int | None:
    """How many tokens must come before an EOS, for a processor that reads no more of them than their number."""
    if type(processor) is generation.MinLengthLogitsProcessor:
        return processor.min_length
    is_of_new = type(processor) is generation.MinNewTokensLengthLogitsProcessor
    return processor.prompt_length_to_skip + processor.min_new_tokens if is_of_new else None


def sample_tokens(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """
    Draws ids [rows] from softmax(`scores`) in float32 [rows, vocab] by inversion, at `uniform` in [0, 1) [rows]; and
    the sum of the probabilities [rows], which is NaN for scores that are no distribution.
    """
    cumulative = scores.softmax(-1).cumsum(-1)
    # In float32, where the largest number below 1 is 1 - 2**-24, no product is rounded up to the total.
    total = cumulative[:, -1]
    ids = torch.searchsorted(cumulative, (uniform * total)[:, None], right=True).squeeze(-1)
    # NaN would give an id past the last.
    return ids.clamp(max=scores.shape[-1] - 1), total


def confidence_of(kind: str, log_probs: Tensor, tokens: Tensor) -> Tensor:
    """
    How sure a model is of its predictions [num_candidates], larger is surer, from `log_probs` [num_candidates, vocab]:
    the "probability" of the drawn `tokens` [num_candidates], the "margin" of the likeliest token before the second, or
    the "negative_entropy" in nats. A "processed_probability" is one under scores that the processors have changed.
    """
    if kind in ("probability", "processed_probability"):
        return log_probs.gather(-1, tokens[:, None]).squeeze(-1).exp()
    if kind == "margin":
        first, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
        return first - second
    # The mask token has the log-probability -inf, and 0 * -inf is no number.
    return (log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def around_tokens(text: Tensor, size: int, unknown: int) -> Tensor:
    """Each token of `text` [rows, length] with `size - 1` on either side of it [rows, length, 2 size - 1]."""
    return torch.nn.functional.pad(text, (size - 1, size - 1), value=unknown).unfold(1, 2 * size - 1, 1)


def add_sequence_bias(scores: Tensor, sequence_bias: dict, text: Tensor, column: Tensor, unknown: int) -> Tensor:
    """
    `scores` [rows, vocab] of the tokens at `column` [rows] of `text` [rows, length], plus the bias of each sequence of
    several tokens that they would complete, whichever place of it they take.
    """
    rules = {ids: bias for ids, bias in sequence_bias.items() if unknown not in ids}
    for size in sorted({len(ids) for ids in rules} - {1}):
        of_size = {ids: bias for ids, bias in rules.items() if len(ids) == size}
        ids, bias = column.new_tensor([*of_size]), scores.new_tensor([*of_size.values()])
        around = around_tokens(text, size, unknown)[torch.arange(len(text), device=text.device), column]
        # What begins k tokens before the predicted one has it in place k.
        is_own = torch.eye(size, dtype=torch.bool, device=text.device).flip(0)
        is_complete = ((around.unfold(1, size, 1)[:, None] == ids[:, None]) | is_own).all(-1)
        scores = scores.index_add(1, ids.flip(1).flatten(), torch.where(is_complete, bias[:, None], 0.0).flatten(1))
    return scores


def ban_n_grams(scores: Tensor, size: int, text: Tensor, column: Tensor, source: Tensor, unknown: int) -> Tensor:
    """
    `scores` [rows, vocab] of the tokens at `column` [rows] of `text` [rows, length], without those that would complete
    an n-gram of so many tokens that is in the `source`: in `text` itself, or in another one.
    """
    around = around_tokens(text, size, unknown)[torch.arange(len(text), device=text.device), column][:, None]
    others = around_tokens(source, size, unknown)
    if source is text:
        # An n-gram may overlap the one that it repeats: the predicted token is then the one that it is compared with.
        offset = column[:, None] - torch.arange(text.shape[1], device=text.device)
        is_own = torch.arange(1 - size, size, device=text.device) == offset[..., None]
        others = torch.where(is_own, source[..., None], others)
    is_same = (others == around) & (around != unknown)
    is_same[..., size - 1] = source != unknown
    is_banned = is_same.unfold(-1, size, 1).all(-1).any(-1)
    return scores.scatter_add(1, source, torch.where(is_banned, -torch.inf, 0.0))


@dataclass
class Prediction:
    """
    What one forward predicts: at the places `kept` of the block, of which some are candidates, both [batch, kept], the
    `tokens`, arbitrary ones elsewhere [batch, block_size], out of `logits` before and `scores` after the processors
    [batch * kept, vocab].
    """

    kept: Tensor
    is_candidate: Tensor
    tokens: Tensor
    logits: Tensor
    scores: Tensor

    def confidence(self, kind: str) -> Tensor:
        """How sure the model itself is of each token by [`confidence_of`], -inf elsewhere [batch, block_size]."""
        scores = self.scores if kind == "processed_probability" else self.logits
        values = confidence_of(kind, scores.log_softmax(-1), self.tokens.gather(1, self.kept).flatten())
        # Of logits that are NaN too there is a least confident token, so that every block ends.
        values = values.nan_to_num(torch.finfo(values.dtype).min).view(self.kept.shape)
        values = values.masked_fill(~self.is_candidate, -torch.inf)
        return values.new_full(self.tokens.shape, -torch.inf).scatter(1, self.kept, values)


class TokenPredictor:
    """Draws tokens from the processed logits of masked positions, in the context of `prompts` [batch, width]."""

    def __init__(self, logits_processor: LogitsProcessorList, do_sample: bool, mask_token_id: int, prompts: Tensor):
        if any(isinstance(part, generation.SynthIDTextWatermarkLogitsProcessor) for part in logits_processor):
            wrong_kind = "SynthID's, whose processor must be called for one token after the other"
            raise ValueError(f"`watermarking_config` must be a `WatermarkingConfig`, but got {wrong_kind}.")
        self.logits_processor, self.do_sample = logits_processor, do_sample
        self.mask_token_id, self.prompts = mask_token_id, prompts
        self.reads_context = any(not ignores_context(part) and least_length(part) is None for part in logits_processor)
        # Finite as long as what they are sums of is: of logits the largest of each candidate.
        self._sum_of_logits = self.sum_of_scores = torch.zeros((), device=prompts.device)

    def complain(self) -> None:
        """Raises a ValueError of scores that were NaN, infinite or left no token, whose sum so is not finite."""
        if not self.logits_processor or not self._sum_of_logits.isfinite():
            got = "NaN or infinite ones; look for such numbers among its weights, or load it in a dtype of wider range"
            raise ValueError(f"The logits of a masked token must be finite, but the model gave {got}.")
        raise ValueError(
            "The scores of a masked token must be finite for at least one token that may be drawn, and NaN or +inf "
            "for none, but got others from the `logits_processor` and the constraints, out of finite logits; the "
            "tokens on both sides of one may together ban all that it could be."
        )

    def predict(
        self, logits: Tensor, kept: Tensor, is_candidate: Tensor, columns: Tensor, context: Tensor, uniform: Tensor
    ) -> Prediction:
        """
        The [`Prediction`] of the tokens at `kept`, from their `logits` [batch * kept, vocab], in float32, with numbers
        `uniform` in [0, 1) to draw with [batch, block_size]. Each row's block lies at its `columns` [batch,
        block_size] of the `context`, [`Canvas.context`] [batch, width], which is None where no processor reads it.
        """
        logits[:, self.mask_token_id] = -torch.inf
        scores, candidates = logits, is_candidate.flatten()
        if self.logits_processor:
            self._sum_of_logits = self._sum_of_logits + torch.where(candidates, logits.amax(-1), 0.0).sum()
            scores = self._process(logits, is_candidate, columns.gather(1, kept), context)
            # A processor may have lifted the ban, such as one that is left with nothing to allow.
            scores[:, self.mask_token_id] = -torch.inf
        if self.do_sample:
            chosen, largest = sample_tokens(scores, uniform.gather(1, kept).flatten())
        else:
            largest, chosen = scores.max(-1)
        self.sum_of_scores = self.sum_of_scores + torch.where(candidates, largest, 0.0).sum()
        tokens = torch.zeros_like(columns).scatter(1, kept, chosen.view(kept.shape))
        return Prediction(kept, is_candidate, tokens, logits, scores)

    def settle(self, prediction: Prediction, revealed: Tensor, columns: Tensor, context: Tensor, uniform: Tensor):
        """
        Predicts tokens that are `revealed` together, bool [batch, block_size], once more from left to right, each in a
        context with those before it, if a processor reads that; arguments as in `predict`.
        """
        num_kept = prediction.kept.shape[1]
        if not self.reads_context or num_kept == 1 or revealed.sum(-1).amax() < 2:
            return
        logits, scores = (part.view(len(columns), num_kept, -1) for part in (prediction.logits, prediction.scores))
        for index in range(1, columns.shape[1]):
            is_chosen = prediction.is_candidate & (prediction.kept == index) & revealed[:, index, None]
            if is_chosen.any():
                known = torch.where(revealed, prediction.tokens, context.gather(1, columns))[:, :index]
                known = context.scatter(1, columns[:, :index], known)
                place = is_chosen.int().argmax(-1)
                row = torch.arange(len(place), device=place.device)
                chosen = is_chosen.any(-1, keepdim=True)
                kept = torch.full_like(chosen, index, dtype=torch.long)
                drawn = self.predict(logits[row, place], kept, chosen, columns, known, uniform)
                scores[row, place] = torch.where(chosen, drawn.scores, scores[row, place])
                tokens = prediction.tokens[:, index]
                prediction.tokens[:, index] = torch.where(chosen[:, 0], drawn.tokens[:, index], tokens)

    def _process(self, logits: Tensor, is_candidate: Tensor, column: Tensor, context: Tensor | None) -> Tensor:
        """The scores [rows * kept, vocab] of candidates at `column` of the context, both [rows, kept], processed."""
        scores, no_text, text = logits.clone(), column.new_empty(column.numel(), 0), context
        if context is not None and column.shape[1] > 1:
            text = context.repeat_interleave(column.shape[1], dim=0)
        for processor in self.logits_processor:
            if ignores_context(processor):
                scores = processor(no_text, scores)
            elif (least := least_length(processor)) is not None:
                # On an empty text it bans every EOS.
                scores = torch.where(column.flatten()[:, None] < least, processor(no_text, scores), scores)
            elif type(processor) in BIASES:
                # It adds the bias of single tokens alone to an empty text.
                scores, biases = processor(no_text, scores), processor.sequence_bias
                scores = add_sequence_bias(scores, biases, text, column.flatten(), self.mask_token_id)
            elif type(processor) in N_GRAM_BANS:
                prompts = self.prompts.repeat_interleave(column.shape[1], dim=0)
                source = text if type(processor) is N_GRAM_BANS[0] else prompts
                scores = ban_n_grams(scores, processor.ngram_size, text, column.flatten(), source, self.mask_token_id)
            elif reads_whole_context(processor):
                scores = processor(text, scores)
            else:
                scores = self._by_column(processor, scores, is_candidate, column, context)
        return scores

    def _by_column(
        self, processor: LogitsProcessor, scores: Tensor, is_candidate: Tensor, column: Tensor, context: Tensor
    ) -> Tensor:
        """As `_process`; a processor that may read the tokens before, their number and the row has a whole column."""
        # What is repeated may also come after the token.
        reads_all = isinstance(processor, generation.RepetitionPenaltyLogitsProcessor)
        row = torch.arange(len(scores), device=column.device) // column.shape[1]
        is_candidate, column, processed = is_candidate.flatten(), column.flatten(), scores.clone()
        for end in column[is_candidate].unique().tolist():
            chosen = is_candidate & (column == end)
            batch_scores = scores.new_zeros(len(context), scores.shape[1])
            batch_scores[row[chosen]] = scores[chosen]
            processed[chosen] = processor(context if reads_all else context[:, :end], batch_scores)[row[chosen]]
        return processed
