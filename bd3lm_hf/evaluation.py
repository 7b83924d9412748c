"""How well a model predicts held-out text."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .collators import BD3LMDataCollator
from .modeling.diffusion_bd3lm import NOISE_SCHEDULES

# Whoever measures likelihood may ask how much its estimates vary.
from .variance import Estimate, gradient_variance, nelbo_variance, noise_interval_grid  # noqa: F401


@dataclass
class Likelihood:
    """
    The negative evidence lower bound of a text under a model: exact at block size 1, otherwise an estimate of an upper
    bound, less the little that t below 1e-3 would add.

    Attributes:
        nelbo: Nats per token, summed over the corpus and divided by its predicted tokens.
        standard_error: Of `nelbo` as an estimate for the text's source: how much it would vary with another sample of
            sequences and other draws of the noise. None for a single sequence.
        draw_standard_error: Of `nelbo` as an estimate for this very text: how much it would vary with other draws of
            the noise. 0 where no noise is drawn, None for a single draw.
        num_tokens: Predicted tokens.
        num_sequences: Sequences, over which `standard_error` is taken.
        num_draws: Draws of the noise, over which `draw_standard_error` is taken.
        num_bytes: UTF-8 bytes that the predicted tokens encode, if known.
    """

    nelbo: float
    standard_error: float | None
    draw_standard_error: float | None
    num_tokens: int
    num_sequences: int
    num_draws: int
    num_bytes: int | None = None

    @property
    def perplexity(self) -> float:
        """exp(nelbo), over the corpus."""
        return torch.tensor(self.nelbo, dtype=torch.float64).exp().item()

    @property
    def bits_per_byte(self) -> float | None:
        """The NELBO of the corpus in bits, divided by its bytes: comparable between tokenizers."""
        if self.num_bytes is None:
            return None
        return self.nelbo * self.num_tokens / math.log(2) / self.num_bytes

    def __str__(self) -> str:
        parts = [f"perplexity {self.perplexity:.2f}"]
        if self.num_bytes is not None:
            parts.append(f"{self.bits_per_byte:.3f} bits per byte")
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return ", ".join([*parts, f"{self.nelbo:.4f}{error} nats per token"])

    def to_json(self, path: str | Path | None = None) -> str:
        """All attributes, perplexity and bits per byte as a JSON object; written to `path` as well if given."""
        text = json.dumps(
            {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}, indent=2
        )
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


@torch.no_grad()
def evaluate_likelihood(
    model,
    sequences: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    num_draws: int = 4,
    seed: int = 0,
    num_bytes: int | None = None,
    progress: bool = True,
) -> Likelihood:
    """
    Monte Carlo estimate of the NELBO of `sequences`, with noise levels from the full interval.

    The model's own loss in evaluation mode is averaged over `num_draws` draws of noise level and mask for each block.
    At block size 1 every token is masked by itself, with certainty: one pass gives the exact autoregressive
    log-likelihood, and `num_draws` does not apply. (A time-conditioned model is no autoregressive one: its noise level
    matters.)

    The same seed and batch size repeat the same draws. The caller's random state and the model's mode are left as
    they were.

    Args:
        model: A `BD3LMForMaskedLM`.
        sequences: Token ids, one row per sequence, of any lengths.
        batch_size: Sequences per forward pass.
        num_draws: Passes over all sequences.
        num_bytes: UTF-8 bytes that the predicted tokens encode; needed for bits per byte.
        progress: Show a progress bar.

    Standard errors. With x_i the NELBO of sequence i (mean of its draws), n_i its predicted tokens and R = sum x_i /
    sum n_i, the standard error over sequences is that of a ratio estimator, sqrt(N / (N - 1) sum (x_i - R n_i)^2) /
    sum n_i; the x_i vary with the draws too, so it holds both sources. Noise levels are stratified across a batch,
    which correlates its sequences negatively: the estimate errs on the large side. The standard error over draws is
    that of the mean of the corpus totals, which are independent.

    Raises:
        ValueError: if there is no predicted token, or `batch_size` or `num_draws` is not positive.
    """
    for name, value in (("batch_size", batch_size), ("num_draws", num_draws)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    config = model.config
    rows = [torch.as_tensor(ids, dtype=torch.long) for ids in sequences]
    tokens = np.array([len(row) - config.ignore_bos for row in rows], dtype=np.int64)
    if tokens.sum() == 0:
        raise ValueError(f"sequences holds no token to predict ({len(rows)} sequences)")

    # Masked with certainty, a token has the weight of t = 1, which only the loglinear schedule sets to 1.
    exact = config.block_size == 1 and not config.time_conditioning
    weight = float(NOISE_SCHEDULES[config.noise_schedule].loss_weight(torch.tensor(1.0))) if exact else 1.0
    num_draws = 1 if exact else num_draws
    noise = {"noise_interval": (1.0, 1.0)} if exact else {}
    collate = BD3LMDataCollator(pad_token_id=config.pad_token_id or 0, ignore_bos=config.ignore_bos)
    nelbo = np.zeros((num_draws, len(rows)))

    was_training = model.training
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            tqdm(total=nelbo.size, desc="Evaluating", unit=" sequences", disable=not progress) as bar,
        ):
            torch.manual_seed(seed)
            for draw in range(num_draws):
                for start in range(0, len(rows), batch_size):
                    batch = collate([{"input_ids": row} for row in rows[start : start + batch_size]])
                    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                    nelbo_per_token = model(**batch, **noise).nelbo
                    nelbo[draw, start : start + batch_size] = nelbo_per_token.double().sum(dim=1).cpu() / weight
                    bar.update(len(nelbo_per_token))
    finally:
        model.train(was_training)

    nelbo_per_sequence = nelbo.mean(axis=0)
    nelbo_per_corpus = nelbo.sum(axis=1)
    num_tokens = int(tokens.sum())
    mean = nelbo_per_corpus.mean() / num_tokens
    standard_error = draw_standard_error = None
    if len(rows) > 1:
        squares = ((nelbo_per_sequence - mean * tokens) ** 2).sum()
        standard_error = float(np.sqrt(len(rows) / (len(rows) - 1) * squares) / num_tokens)
    if exact:
        draw_standard_error = 0.0
    elif num_draws > 1:
        draw_standard_error = float(nelbo_per_corpus.std(ddof=1) / np.sqrt(num_draws) / num_tokens)
    return Likelihood(
        nelbo=float(mean),
        standard_error=standard_error,
        draw_standard_error=draw_standard_error,
        num_tokens=num_tokens,
        num_sequences=len(rows),
        num_draws=num_draws,
        num_bytes=num_bytes,
    )


def unigram_perplexity(
    train_sequences: Sequence[Sequence[int]], held_out_sequences: Sequence[Sequence[int]], vocab_size: int
) -> float:
    """
    Perplexity of the model that knows only how often each token occurs in the training text.

    Token frequencies are smoothed by adding one. The first token of a sequence is neither counted nor predicted, as
    in `evaluate_likelihood`.

    Raises:
        ValueError: if there is no predicted token on either side, or an id is outside the vocabulary.
    """
    counts = []
    for name, sequences in (("train_sequences", train_sequences), ("held_out_sequences", held_out_sequences)):
        ids = np.concatenate([np.asarray(row, dtype=np.int64)[1:] for row in sequences] or [np.empty(0, np.int64)])
        if len(ids) == 0:
            raise ValueError(f"{name} holds no token to predict")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"{name} holds ids from {ids.min()} to {ids.max()}; it takes 0 to {vocab_size - 1}")
        counts.append(np.bincount(ids, minlength=vocab_size))
    train, held_out = counts
    log_probs = np.log(train + 1) - np.log(train.sum() + vocab_size)
    return float(np.exp(-(held_out * log_probs).sum() / held_out.sum()))
