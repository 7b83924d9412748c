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


def sample_tokens(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draws ids [rows] from softmax(`scores`) in float32 [rows, vocab] by inversion, at `uniform` in [0, 1) [rows]."""
    cumulative = scores.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding up to the total would choose the last id, whatever its probability.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Scores without a finite value, which `TokenPredictor.check` reports, would give an id past the last.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=scores.shape[-1] - 1)


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
    What one forward predicts: `tokens` [batch, block_size] at the `candidates`, bool of that shape, arbitrary ones
    elsewhere, out of `logits` before and `scores` after the processors [num_candidates, vocab].
    """

    candidates: Tensor
    tokens: Tensor
    logits: Tensor
    scores: Tensor

    def confidence(self, kind: str) -> Tensor:
        """How sure the model itself is of each token by [`confidence_of`], -inf elsewhere [batch, block_size]."""
        confidence = torch.full(self.candidates.shape, -torch.inf, device=self.logits.device)
        scores = self.scores if kind == "processed_probability" else self.logits
        values = confidence_of(kind, scores.log_softmax(-1), self.tokens[self.candidates])
        # Of logits that are NaN too there is a least confident token, so that every block ends.
        confidence[self.candidates] = values.nan_to_num(torch.finfo(values.dtype).min)
        return confidence


class TokenPredictor:
    """Draws tokens from the processed logits of masked positions, in the context of `prompts` [batch, width]."""

    def __init__(self, logits_processor: LogitsProcessorList, do_sample: bool, mask_token_id: int, prompts: Tensor):
        if any(isinstance(part, generation.SynthIDTextWatermarkLogitsProcessor) for part in logits_processor):
            wrong_kind = "SynthID's, whose processor must be called for one token after the other"
            raise ValueError(f"`watermarking_config` must be a `WatermarkingConfig`, but got {wrong_kind}.")
        self.logits_processor, self.do_sample = logits_processor, do_sample
        self.mask_token_id, self.prompts = mask_token_id, prompts
        self.reads_context = not all(map(ignores_context, logits_processor))
        self._is_valid = self._is_finite = torch.tensor(True)

    def check(self) -> None:
        """Raises a ValueError if scores so far were NaN, infinite or left no token to draw; waits for the device."""
        if self._is_valid:
            return
        if not self._is_finite:
            raise ValueError(
                "The logits of a masked token must be finite, but the model gave NaN or infinite ones; look for such "
                "numbers among its weights, or load it in a dtype of a wider range."
            )
        raise ValueError(
            "The scores of a masked token must be finite for at least one token that may be drawn, and NaN or +inf "
            "for none, but got others from the `logits_processor` and the constraints, out of finite logits; the "
            "tokens on both sides of one may together ban all that it could be."
        )

    def predict(self, logits: Tensor, candidates: Tensor, columns: Tensor, context: Tensor, uniform: Tensor):
        """
        The [`Prediction`] of the `candidates`, bool [batch, block_size], from their `logits`, row after row
        [num_candidates, vocab], in float32, with numbers `uniform` in [0, 1) to draw with [batch, block_size]. Each
        row's block lies at its `columns` [batch, block_size] of the `context`, [`Canvas.context`] [batch, width].
        """
        logits[:, self.mask_token_id] = -torch.inf
        self._is_finite = self._is_finite.to(logits.device) & logits.amax(-1).isfinite().all()
        scores = self._process(logits, candidates.nonzero()[:, 0], columns[candidates], context)
        # A processor may have lifted the ban, such as one that is left with nothing to allow.
        scores[:, self.mask_token_id] = -torch.inf
        self._is_valid = self._is_valid.to(scores.device) & scores.amax(-1).isfinite().all()
        chosen = sample_tokens(scores, uniform[candidates]) if self.do_sample else scores.argmax(-1)
        return Prediction(candidates, torch.zeros_like(columns).masked_scatter(candidates, chosen), logits, scores)

    def settle(self, prediction: Prediction, revealed: Tensor, columns: Tensor, context: Tensor, uniform: Tensor):
        """
        Predicts tokens that are `revealed` together, bool [batch, block_size], once more from left to right, each in a
        context with those before it, if a processor reads that; arguments as in `predict`.
        """
        if not self.reads_context or revealed.sum(-1).amax() < 2:
            return
        for index in range(1, columns.shape[1]):
            chosen = revealed & (torch.arange(columns.shape[1], device=columns.device) == index)
            if (which := chosen[prediction.candidates]).any():
                known = torch.where(revealed, prediction.tokens, context.gather(1, columns))[:, :index]
                known = context.scatter(1, columns[:, :index], known)
                drawn = self.predict(prediction.logits[which], chosen, columns, known, uniform)
                prediction.scores[which], prediction.tokens[chosen] = drawn.scores, drawn.tokens[chosen]

    def _process(self, logits: Tensor, row: Tensor, column: Tensor, context: Tensor) -> Tensor:
        """Runs the processors on the scores [rows, vocab] of the tokens at `column` of `row` of the context [rows]."""
        # A row's text is as long as the whole context, and is copied for those alone that read it.
        scores, no_text = logits.clone(), context.new_empty(len(row), 0)
        for processor in self.logits_processor:
            if ignores_context(processor):
                scores = processor(no_text, scores)
            elif type(processor) in BIASES:
                # It adds the bias of single tokens alone to an empty text.
                scores, biases = processor(no_text, scores), processor.sequence_bias
                scores = add_sequence_bias(scores, biases, context[row], column, self.mask_token_id)
            elif type(processor) in N_GRAM_BANS:
                text = context[row]
                source = text if type(processor) is N_GRAM_BANS[0] else self.prompts[row]
                scores = ban_n_grams(scores, processor.ngram_size, text, column, source, self.mask_token_id)
            else:
                scores = self._by_column(processor, scores, row, column, context)
        return scores

    def _by_column(self, processor: LogitsProcessor, scores: Tensor, row: Tensor, column: Tensor, context: Tensor):
        """As `_process`; a processor that may read the tokens before, their number and the row has a whole column."""
        # What is repeated may also come after the token.
        reads_all = isinstance(processor, generation.RepetitionPenaltyLogitsProcessor)
        processed = scores.clone()
        for end in column.unique().tolist():
            chosen = column == end
            batch_scores = scores.new_zeros(len(context), scores.shape[1])
            batch_scores[row[chosen]] = scores[chosen]
            processed[chosen] = processor(context if reads_all else context[:, :end], batch_scores)[row[chosen]]
        return processed
