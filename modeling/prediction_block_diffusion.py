"""From the logits of masked positions to tokens: processors, drawing, and how sure the model is."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, generation


# Usual processors whose result does not depend on the tokens so far: any rows may share a call.
CONTEXT_FREE_PROCESSORS = (
    generation.LogitNormalization,
    generation.MinPLogitsWarper,
    generation.SuppressTokensLogitsProcessor,
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
)
CONFIDENCES = ("probability", "margin", "negative_entropy", "processed_probability")


def sample_tokens(scores: Tensor, uniform: Tensor) -> Tensor:
    """
    Draws ids [rows] from softmax(scores), `scores` [rows, vocab] in float32, by the inverse of its distribution
    function at one number in [0, 1) for each row, `uniform` [rows].
    """
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


@dataclass
class Prediction:
    """
    What one forward predicts.

    Attributes:
        tokens: a token for each candidate [batch, block_size]; arbitrary elsewhere.
        confidence: how sure the model is of it [batch, block_size], -inf elsewhere; None unless asked for.
        probability: the model's probability of it, before the processors [batch, block_size]; None unless asked for.
        logits, scores: before and after the processors [num_candidates, vocab].
    """

    tokens: Tensor
    confidence: Tensor | None
    probability: Tensor | None
    logits: Tensor
    scores: Tensor


class TokenPredictor:
    """Draws tokens from the processed logits of masked positions."""

    def __init__(self, logits_processor: LogitsProcessorList, do_sample: bool, mask_token_id: int):
        self.logits_processor = logits_processor
        self.shares_calls = all(isinstance(part, CONTEXT_FREE_PROCESSORS) for part in logits_processor)
        self.do_sample = do_sample
        self.mask_token_id = mask_token_id
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
            "for none, but got others from the `logits_processor` and the constraints, out of finite logits."
        )

    def predict(
        self, logits: Tensor, candidates: Tensor, columns: Tensor, context: Tensor, uniform: Tensor, kinds: tuple
    ) -> Prediction:
        """
        Args:
            logits: of the candidates, row after row [num_candidates, vocab], float32.
            candidates: the positions to predict, bool [batch, block_size].
            columns: where each row's block lies in `context` [batch, block_size].
            context: all tokens as [`Canvas.context`] gives them [batch, width].
            uniform: numbers in [0, 1) to draw with [batch, block_size].
            kinds: of the confidence and the probability that are asked for ([`confidence_of`]), None for none.
        """
        logits[:, self.mask_token_id] = -torch.inf
        self._is_finite = self._is_finite.to(logits.device) & logits.amax(-1).isfinite().all()
        scores = self._process(logits, candidates, columns, context)
        # A processor may have lifted the ban, such as one that is left with nothing to allow.
        scores[:, self.mask_token_id] = -torch.inf
        self._is_valid = self._is_valid.to(scores.device) & scores.amax(-1).isfinite().all()
        chosen = sample_tokens(scores, uniform[candidates]) if self.do_sample else scores.argmax(-1)
        tokens = torch.zeros_like(columns)
        tokens[candidates] = chosen
        confidence, probability = (self._confidence(kind, logits, scores, candidates, chosen) for kind in kinds)
        return Prediction(tokens, confidence, probability, logits, scores)

    def _confidence(self, kind: str | None, logits, scores, candidates, chosen) -> Tensor | None:
        if kind is None:
            return None
        confidence = torch.full(candidates.shape, -torch.inf, device=logits.device)
        # Of logits that are NaN too there is a least confident token, so that every block ends.
        least = torch.finfo(confidence.dtype).min
        log_probs = (scores if kind == "processed_probability" else logits).log_softmax(-1)
        confidence[candidates] = confidence_of(kind, log_probs, chosen).nan_to_num(least)
        return confidence

    def _process(self, logits: Tensor, candidates: Tensor, columns: Tensor, context: Tensor) -> Tensor:
        """Runs the logits processors on the candidates' scores [num_candidates, vocab]."""
        row_of, column_of = candidates.nonzero()[:, 0], columns[candidates]
        if self.shares_calls:
            return self.logits_processor(context[row_of], logits.clone())
        # A processor may read the tokens left of the predicted one, their number, and the index of the row: each
        # column is processed for the whole batch.
        scores = logits.clone()
        for column in column_of.unique().tolist():
            chosen = column_of == column
            batch_scores = logits.new_zeros(len(context), logits.shape[1])
            batch_scores[row_of[chosen]] = logits[chosen]
            scores[chosen] = self._process_column(context[:, :column], batch_scores)[row_of[chosen]]
        return scores

    def _process_column(self, context: Tensor, scores: Tensor) -> Tensor:
        """Runs the processors on the scores of one column [batch, vocab]; `context` [batch, columns before it]."""
        for processor in self.logits_processor:
            processed = processor(context, scores)
            if isinstance(processor, generation.NoRepeatNGramLogitsProcessor):
                # An n-gram begun by tokens that are not known yet repeats nothing.
                start = max(context.shape[1] - processor.ngram_size + 1, 0)
                is_known = (context[:, start:] != self.mask_token_id).all(-1, keepdim=True)
                processed = torch.where(is_known, processed, scores)
            scores = processed
        return scores
