"""Nucleus sampling on a CPU without sorting the vocabulary."""

import torch
from transformers import LogitsProcessorList, TopPLogitsWarper


class SelectingTopPLogitsWarper(TopPLogitsWarper):
    """
    `TopPLogitsWarper` that does not sort the vocabulary on a CPU, where that costs as much as a small model's forward.

    The nucleus lies among the likeliest `num_sorted` tokens, or it is wide: then a histogram of the scores tells in
    which of its bins the nucleus ends, and that bin alone is sorted. A vocabulary of a few thousand tokens takes no
    longer that way than to select from, so there that is the only way.
    """

    ignores_context = True
    num_sorted = 512
    num_bins = 2048
    # In nats below the likeliest token; the last bin holds what lies beyond.
    bin_width = 1 / 64

    @classmethod
    def of(cls, warper: TopPLogitsWarper) -> "SelectingTopPLogitsWarper":
        """The same warper as this."""
        return cls(warper.top_p, warper.filter_value, warper.min_tokens_to_keep)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        is_large = scores.shape[-1] > 4 * self.num_sorted and self.min_tokens_to_keep <= self.num_sorted
        if scores.device.type != "cpu" or not is_large:
            return super().__call__(input_ids, scores)
        if scores.shape[-1] <= 16 * self.num_sorted and self.min_tokens_to_keep == 1:
            return self._wide_nucleus(scores)
        likeliest, ids = scores.topk(self.num_sorted, dim=-1)
        probabilities = (likeliest - scores.logsumexp(-1, keepdim=True)).exp()
        before = probabilities.cumsum(-1) - probabilities
        kept = before < self.top_p
        is_wide = kept[:, -1].clone()
        kept[:, : self.min_tokens_to_keep] = True
        nucleus = likeliest.masked_fill(~kept, self.filter_value)
        nucleus = torch.full_like(scores, self.filter_value).scatter_(-1, ids, nucleus)
        if is_wide.any():
            nucleus[is_wide] = self._wide_nucleus(scores[is_wide])
        return nucleus

    def _wide_nucleus(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores [rows, vocab] without what lies outside the nucleus; rows of no distribution as they are."""
        probabilities = scores.softmax(-1)
        distance = scores.amax(-1, keepdim=True) - scores
        bins = (distance / self.bin_width).nan_to_num_(nan=0.0).clamp_(max=self.num_bins - 1).long()
        mass = torch.zeros(len(scores), self.num_bins, dtype=torch.float64)
        mass.scatter_add_(1, bins, probabilities.double())
        before = mass.cumsum(-1) - mass
        last = ((before < self.top_p).sum(-1, keepdim=True) - 1).clamp_(min=0)
        is_last = bins == last
        in_last, ids = scores.masked_fill(~is_last, -torch.inf).topk(int(is_last.sum(-1).max()), dim=-1)
        mass = probabilities.gather(1, ids).double()
        beyond = before.gather(1, last) + mass.cumsum(-1) - mass >= self.top_p
        # Of a row with fewer tokens in its bin than another the rest is not of that bin.
        beyond = beyond & is_last.gather(1, ids)
        # The likeliest token stays, even in a nucleus of nothing.
        beyond[:, 0] = False
        is_outside = (bins > last).scatter_(1, ids, beyond | (bins > last).gather(1, ids))
        return scores.masked_fill(is_outside, self.filter_value)


def with_selecting_nucleus(logits_processor: LogitsProcessorList) -> LogitsProcessorList:
    """The same processors, with [`SelectingTopPLogitsWarper`] for Transformers' own."""
    return LogitsProcessorList(
        SelectingTopPLogitsWarper.of(part) if type(part) is TopPLogitsWarper else part for part in logits_processor
    )
