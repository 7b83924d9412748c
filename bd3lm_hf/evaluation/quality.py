"""How good sampled text is: perplexity under a judge, entropy, diversity, repetition, and length."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .estimate import Estimate
from .mode import evaluation_mode
from .networks import is_block_diffusion
from .windows import Window, choose_window, cut_windows


NGRAM_SIZES = (1, 2, 3, 4)


class _Result:
    """JSON of a dataclass of figures and estimates."""

    def to_dict(self) -> dict:
        """Every figure; an `Estimate` as `{"value": ..., "standard_error": ...}`, the latter None for one sample."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON; written to `path` as well if given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def _plain(value):
    if isinstance(value, Estimate):
        error = value.standard_error
        return {"value": value.value, "standard_error": None if math.isnan(error) else error}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value


@dataclass
class GenerativePerplexity(_Result):
    """
    What a judge makes of texts.

    Attributes:
        nll: Negative log-likelihood under the judge in nats per token: summed over all texts and divided by their
            scored tokens. Its standard error, over texts, is that of a ratio estimator.
        num_tokens: Tokens scored, in the judge's vocabulary.
        num_texts: Texts.
        num_unscored_texts: Those among them without a scored token: too short.
        window: Most tokens that the judge read at once.
        stride: Tokens between the starts of two windows.
    """

    nll: Estimate
    num_tokens: int
    num_texts: int
    num_unscored_texts: int
    window: int
    stride: int

    @property
    def perplexity(self) -> Estimate:
        """exp(nll); the standard error is the first order of that of `nll`."""
        value = float(np.exp(self.nll.value))
        return Estimate(value, value * self.nll.influence)

    def to_dict(self) -> dict:
        return {"perplexity": _plain(self.perplexity), **super().to_dict()}

    def __str__(self) -> str:
        return f"generative perplexity {self.perplexity} ({self.nll} nats per token, {self.num_tokens:,} tokens)"


@torch.no_grad()
def generative_perplexity(
    texts: Sequence[str],
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int | None = None,
    stride: int | None = None,
    add_start_token: bool | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> GenerativePerplexity:
    """
    Perplexity of texts under an autoregressive language model that did not write them, as SEDD (arXiv 2310.16834) and
    BD3-LM (arXiv 2503.09573) report it under GPT-2.

    1. The texts are tokenized anew, with the judge's tokenizer. Special tokens that are spelled out count as such.
    2. The judge reads windows that begin `stride` tokens apart. A token is scored in the first window that holds it:
       once, behind `window - stride` tokens or more, or all that there are. What it gets does not depend on the text
       behind it.
    3. The first token of a text is context, and not scored; see `add_start_token`. EOS is context wherever it stands:
       the published evaluation counts neither.

    It says nothing about diversity: repetitive text has a low perplexity. Read it beside the entropy of the samples.

    Args:
        texts: The samples.
        judge: Any causal `AutoModelForCausalLM`.
        tokenizer: That of the judge.
        window: Tokens that the judge reads at once. (default: its `max_position_embeddings`)
        stride: Tokens between the starts of two windows; the fewer, the more context, and the more passes. (default:
            half a window; of GPT-2's, 512, as published)
        add_start_token: Put BOS in front of each text, from which its first token is scored. (default: what the
            tokenizer does by itself: Llama's does, GPT-2's does not)
        batch_size: Windows per forward pass. The logits hold `batch_size * window * vocab_size` numbers.
        progress: Show a progress bar.

    Raises:
        ValueError: if `judge` is not causal, the tokenizer has more tokens than the judge, the window is longer than
            the judge's context, unknown, or not longer than the stride, there is no BOS to put in front, a text is no
            string, or no token can be scored.
    """
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts must hold strings, but text {index} is {text!r:.50}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    context = getattr(judge.config.get_text_config(), "max_position_embeddings", None)
    window, stride = choose_window(context, 1, window, stride)
    vocab_size = judge.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, but the judge's vocabulary has {vocab_size}; it takes the "
            "judge's own tokenizer"
        )

    rows = _tokenize(texts, tokenizer, add_start_token)
    labels = [np.where(ids == tokenizer.eos_token_id, -100, ids) for ids in rows]
    windows = cut_windows(rows, labels, window=window, stride=stride, vocab_size=vocab_size)
    if not windows:
        raise ValueError(f"texts holds no token to score ({len(rows)} texts); the first of each is only context")
    # Windows of one length need no padding.
    windows.sort(key=lambda part: len(part.input_ids), reverse=True)
    nll, num_tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    with (
        evaluation_mode(judge),
        tqdm(total=len(windows), desc="Judging", unit=" windows", disable=not progress) as bar,
    ):
        _check_causal(judge)
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            for part, part_nll in zip(batch, _score(judge, batch), strict=True):
                nll[part.sequence] += part_nll
                num_tokens[part.sequence] += (part.labels != -100).sum()
            bar.update(len(batch))

    total = int(num_tokens.sum())
    mean = nll.sum() / total
    return GenerativePerplexity(
        nll=Estimate(float(mean), (nll - mean * num_tokens) / total),
        num_tokens=total,
        num_texts=len(rows),
        num_unscored_texts=int((num_tokens == 0).sum()),
        window=window,
        stride=stride,
    )


def _check_causal(judge: PreTrainedModel) -> None:
    """What is loaded by `AutoModelForCausalLM` may be a masked model, whose likelihood would be far too high."""
    ids = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]], device=judge.device)
    logits = judge(input_ids=ids, use_cache=False).logits
    first, second = logits[:, :-1].float()
    # Two rows of a batch may be rounded differently, if at all.
    rounding = 64 * torch.finfo(logits.dtype).eps * first.abs().max()
    if is_block_diffusion(judge.config) or (first - second).abs().max() > rounding:
        raise ValueError(
            f"judge must be an autoregressive model, but a {type(judge).__name__} sees the tokens that it predicts"
        )


def _tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, add_start_token: bool | None
) -> list[np.ndarray]:
    bos = tokenizer.bos_token_id
    if add_start_token is None:
        add_start_token = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    if add_start_token and bos is None:
        raise ValueError("add_start_token=True needs a tokenizer with a BOS token")
    start = [bos] if add_start_token else []
    # Tokenizers take no empty list.
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if len(texts) else []
    return [np.array(ids if ids[:1] == start else start + ids, dtype=np.int64) for ids in encoded]


def _score(judge: PreTrainedModel, windows: list[Window]) -> list[float]:
    """The sum of -log p(token | tokens before) over the labels of each window, in nats."""
    # Padding lies behind the tokens, where a causal model does not see it.
    input_ids = torch.zeros(len(windows), max(len(part.input_ids) for part in windows), dtype=torch.long)
    labels, attention_mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
    for index, part in enumerate(windows):
        length = len(part.input_ids)
        input_ids[index, :length] = torch.from_numpy(part.input_ids)
        labels[index, :length] = torch.from_numpy(part.labels)
        attention_mask[index, :length] = 1
    input_ids, labels, attention_mask = (tensor.to(judge.device) for tensor in (input_ids, labels, attention_mask))
    logits = judge(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    # One row at a time: a float32 copy of all logits may not fit beside them.
    return [
        torch.nn.functional.cross_entropy(row_logits[:-1].float(), row_labels[1:], reduction="none")
        .double()
        .sum()
        .item()
        for row_logits, row_labels in zip(logits, labels, strict=True)
    ]


def token_entropy(ids: Sequence[int]) -> float:
    """
    Entropy of the token frequencies of a sample, -sum_v p_v log p_v with p_v = count of v / length, in nats.

    The unigram entropy of sample-quality tables (Zheng et al., arXiv 2409.02908). It is at most log(length), and grows
    with the length: compare samples of one length.

    Raises:
        ValueError: if there are no tokens.
    """
    if len(ids) == 0:
        raise ValueError("ids must hold at least one token")
    counts = np.unique(np.asarray(ids), return_counts=True)[1]
    frequencies = counts / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum() + 0.0)


def repetition(ids: Sequence[int], n: int) -> float:
    """
    The share of a sample's n-grams that repeat earlier ones: 1 - |unique n-grams| / |n-grams|.

    seq-rep-n of Welleck et al., arXiv 1908.04319.

    Raises:
        ValueError: if the sample has no n-gram.
    """
    grams = _ngrams(ids, n)
    if not grams:
        raise ValueError(f"n={n}: a sample of {len(ids)} tokens has no such n-gram")
    return 1 - len(grams) / sum(grams.values())


def distinct(samples: Sequence[Sequence[int]], n: int) -> Estimate:
    """
    Distinct n-grams of all samples together, divided by all their n-grams.

    distinct-n of Li et al., arXiv 1510.03055, with the n-grams for the denominator instead of the tokens. It falls
    with the number and length of samples: compare only sets of one size. The standard error is the jackknife's, over
    samples.

    Raises:
        ValueError: if no sample has an n-gram.
    """
    grams = [_ngrams(ids, n) for ids in samples]
    holders = Counter(gram for counts in grams for gram in counts)
    totals = np.array([sum(counts.values()) for counts in grams])
    total = int(totals.sum())
    if total == 0:
        raise ValueError(f"n={n}: none of {len(grams)} samples has such an n-gram")
    value = len(holders) / total
    # What is left without each sample: the n-grams that it alone holds are gone.
    own = np.array([sum(holders[gram] == 1 for gram in counts) for counts in grams])
    rest = total - totals
    without = np.divide(len(holders) - own, rest, out=np.full(len(grams), value), where=rest > 0)
    return Estimate(value, (len(grams) - 1) / len(grams) * (without.mean() - without))


def _ngrams(ids: Sequence[int], n: int) -> Counter:
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    ids = [int(token) for token in ids]
    return Counter(zip(*(ids[start:] for start in range(n))))


@dataclass
class SampleStatistics(_Result):
    """
    What can be said of samples without a judge. Standard errors are over samples.

    Attributes:
        entropy: Mean `token_entropy` of a sample, in nats.
        distinct: `distinct` of all samples, for each n; None where no sample is that long.
        repetition: Mean `repetition` of a sample, for each n, over those that have n tokens; None where there is none.
        length: Mean tokens of a sample, without the boundary tokens.
        length_quantiles: Fewest, quartiles, and most tokens.
        ended_by_eos: Share of the samples that end with EOS, rather than for want of room; None without an EOS token.
        num_samples: Samples.
        num_empty_samples: Those among them without tokens, which have a length but no entropy.
    """

    entropy: Estimate | None
    distinct: dict[int, Estimate | None]
    repetition: dict[int, Estimate | None]
    length: Estimate
    length_quantiles: list[float]
    ended_by_eos: Estimate | None
    num_samples: int
    num_empty_samples: int

    def __str__(self) -> str:
        lines = [f"token entropy {self.entropy} nats", f"length {self.length} tokens"]
        lines += [f"distinct-{n} {value}" for n, value in self.distinct.items()]
        lines += [f"rep-{n} {value}" for n, value in self.repetition.items()]
        if self.ended_by_eos is not None:
            lines.append(f"ended by EOS {self.ended_by_eos}")
        return "\n".join(lines)


def sample_statistics(
    samples: Sequence[Sequence[int]],
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    ngram_sizes: Sequence[int] = NGRAM_SIZES,
) -> SampleStatistics:
    """
    Entropy, diversity, repetition and lengths of samples of token ids.

    BOS in front, and EOS and padding at the end, are no part of a sample, and it is ended by EOS if EOS is among the
    latter. EOS inside, between the documents of a sample of fixed length, is a token like any other. (The published
    code counts the entropy with all of them, in the judge's vocabulary.)

    Args:
        samples: Token ids, each [length], as `generate` returns or a tokenizer reads them.
        bos_token_id, eos_token_id, pad_token_id: Those of the tokenizer that the ids belong to.
        ngram_sizes: The n of distinct-n and rep-n.

    Raises:
        ValueError: if there are no samples.
    """
    if len(samples) == 0:
        raise ValueError("samples must hold at least one sample")
    rows, ended = [], []
    for sample in samples:
        ids = [int(token) for token in sample]
        start = int(bool(ids) and ids[0] == bos_token_id)
        end = len(ids)
        while end > start and ids[end - 1] in (eos_token_id, pad_token_id):
            end -= 1
        rows.append(ids[start:end])
        ended.append(eos_token_id in ids[end:])
    lengths = np.array([len(ids) for ids in rows])
    return SampleStatistics(
        entropy=_mean([token_entropy(ids) for ids in rows if ids]),
        distinct={n: distinct(rows, n) if lengths.max() >= n else None for n in ngram_sizes},
        repetition={n: _mean([repetition(ids, n) for ids in rows if len(ids) >= n]) for n in ngram_sizes},
        length=_mean(lengths),
        length_quantiles=np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]).tolist(),
        ended_by_eos=None if eos_token_id is None else _mean(ended),
        num_samples=len(rows),
        num_empty_samples=int((lengths == 0).sum()),
    )


def _mean(values: Sequence[float]) -> Estimate | None:
    if len(values) == 0:
        return None
    values = np.asarray(values, dtype=np.float64)
    mean = values.mean()
    return Estimate(float(mean), (values - mean) / len(values))
