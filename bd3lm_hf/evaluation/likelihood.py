"""How well a model predicts held-out text: a block diffusion model, or an autoregressive one on the same terms."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, reduce
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..data.collators import BD3LMDataCollator
from ..data.replacing import write_text
from ..data.tokenization import check_tokenizer, load_tokenizer
from .estimators import ESTIMATOR_NAMES, BlockDiffusionScorer, CausalScorer, DrawnNoise, ExactNoise
from .loading import check_json_files, load_whole, model_type_of
from .mode import evaluation_mode
from .networks import LANGUAGE_MODELS, is_block_diffusion, load_language_model
from .windows import Window, choose_window, cut_windows, most_predicted_in_a_block


# Blocks of up to so many tokens are evaluated exactly unless another estimator is named: 15 masks each.
EXACT_BY_DEFAULT = 4
# What `evaluate.load` takes.
NELBO_METRIC = str(Path(__file__).with_name("metrics") / "bd3lm_nelbo")
# An error that is known from fewer differences between draws than this (to about a quarter) ends no evaluation early.
STOPPING_DEGREES_OF_FREEDOM = 8


@dataclass
class Likelihood:
    """
    The negative evidence lower bound of a text under a model: an upper bound on its -log p, and -log p itself at block
    size 1 and under an autoregressive model.

    Attributes:
        nelbo: Nats per token, summed over the corpus and divided by its predicted tokens.
        standard_error: Of `nelbo` as an estimate for the text's source: how much it would vary with another sample of
            sequences and other draws of the noise. None for a single sequence.
        draw_standard_error: Of `nelbo` as an estimate for this very text: how much it would vary with other draws of
            the noise. 0 where no noise is drawn, None for a single draw.
        num_tokens: Predicted tokens.
        num_sequences: Sequences that hold one, over which `standard_error` is taken.
        num_bytes: UTF-8 bytes that the predicted tokens encode, if known.
        estimator: "exact", "stratified" or "monte_carlo".
        num_draws: Draws of the noise, over which `draw_standard_error` is taken; 0 for "exact".
        seed: Of the noise.
        target_error: The `draw_standard_error` that was asked for, if any.
        target_reached: Whether it was reached; None if none was asked for.
        block_size: Tokens per block; 1 for an autoregressive model.
        window: Tokens that were read at once, at most.
        stride: Tokens between the starts of two windows over a longer sequence.
        nelbo_per_position: Nats of the token at each position of the sequences, on average over those that predict
            one there; None where none does.
        num_tokens_per_position: Over how many sequences that is.
    """

    nelbo: float
    standard_error: float | None
    draw_standard_error: float | None
    num_tokens: int
    num_sequences: int
    num_bytes: int | None
    estimator: str
    num_draws: int
    seed: int
    target_error: float | None
    target_reached: bool | None
    block_size: int
    window: int
    stride: int
    nelbo_per_position: list[float | None]
    num_tokens_per_position: list[int]

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
        parts.append(f"{self.nelbo:.4f}{error} nats per token")
        drawn = ""
        if self.num_draws:
            drawn = f", {self.num_draws} draws"
            if self.draw_standard_error is not None:
                drawn += f" ± {self.draw_standard_error:.2g}"
        text = f"{', '.join(parts)} ({self.estimator}{drawn})"
        if self.target_reached is False:
            text += f"; NOT within the target error of {self.target_error:g}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """All attributes, perplexity and bits per byte."""
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as a JSON object; written to `path` as well if given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            write_text(path, text + "\n")
        return text


@torch.no_grad()
def evaluate_likelihood(
    model,
    sequences: Sequence[Sequence[int]],
    *,
    labels: Sequence[Sequence[int]] | None = None,
    estimator: str | None = None,
    num_draws: int = 2,
    target_error: float | None = None,
    max_draws: int = 64,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    num_bytes: int | None = None,
    progress: bool = True,
) -> Likelihood:
    """
    The NELBO of `sequences` (arXiv 2503.09573, Eq. 8), or -log p under an autoregressive model.

    A sequence longer than the window is read through windows that slide over it by whole blocks. Each token is
    predicted once, in the first window that holds it, so with `window - stride` tokens or more in front of it; a
    stride of one block gives every token the most that the window has. The first token of a sequence is read only, as
    the model's `ignore_bos` has it.

    Estimators. `exact` enumerates the masks of every block, 2^s - 1 at block size s. `stratified` draws how many
    tokens of a block are masked, then which, and has the same mean. `monte_carlo` draws t from [1e-3, 1] and masks
    each token by itself, which leaves out what t below that would add. At block size 1 all masks are one, and the
    figures those of an autoregressive model.

    Started in several processes by `accelerate launch`, each scores its share of the windows with a whole model, and
    all return the same as one process would. The draws depend on the seed and on the order of the sequences. The
    caller's random state and the model's mode are left as they were.

    Args:
        model: A block diffusion model, or an autoregressive one of Transformers (`AutoModelForCausalLM`).
        sequences: Token ids, one row per sequence, of any lengths.
        labels: What to predict at each token (not shifted), -100 for what is neither masked nor predicted; of the
            shapes of `sequences`. By default every token.
        estimator: "exact", "stratified" or "monte_carlo"; by default "exact" for block sizes up to 4 and
            autoregressive models, "stratified" for others.
        num_draws: Draws of the noise. In each, every window is read once with four noised copies.
        target_error: Go on drawing until `draw_standard_error` is at most this, in nats per token, ...
        max_draws: ... or so many draws are made; the result says whether it was reached.
        window: Tokens read at once, in whole blocks; by default the model's context (`max_position_embeddings`).
        stride: Tokens, in whole blocks, between the starts of windows over a longer sequence; by default half a
            window. A window of one block slides by all but one token.
        batch_size: Windows per forward pass.
        seed: Seed of the noise.
        num_bytes: UTF-8 bytes that the predicted tokens encode; needed for bits per byte.
        progress: Show a progress bar.

    Standard errors. With x_i the NELBO of sequence i (mean of its draws), n_i its predicted tokens and R = sum x_i /
    sum n_i, the standard error over sequences is that of a ratio estimator, sqrt(N / (N - 1) sum (x_i - R n_i)^2) /
    sum n_i; the x_i vary with the draws too, so it holds both sources. The standard error over D draws is
    sqrt(sum_w S_w^2 / D) / sum n_i, with S_w^2 the variance of window w between draws: windows and draws are
    independent.

    Raises:
        ValueError: there is no token to predict, ids are outside the vocabulary, an argument is outside its range,
            `exact` for blocks of too many tokens or a model that reads t, a model that is neither.
    """
    model = extract_model_from_parallel(model)
    for name, value in (("batch_size", batch_size), ("num_draws", num_draws)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if target_error is not None and not (target_error > 0 and max_draws >= max(num_draws, 2)):
        raise ValueError(
            "`target_error` must be positive, and `max_draws` at least `num_draws` and 2, but got "
            f"{target_error}, {max_draws} and {num_draws}."
        )
    if estimator is not None and estimator not in ESTIMATOR_NAMES:
        raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATOR_NAMES)}, but got {estimator!r}.")

    is_causal = _is_causal(model)
    config = model.config.get_text_config() if is_causal else model.config
    block_size, ignore_bos = (1, True) if is_causal else (config.block_size, config.ignore_bos)
    context = getattr(config, "max_position_embeddings", None)
    window, stride = choose_window(context, block_size, window, stride)
    windows = cut_windows(
        sequences, labels, window=window, stride=stride, vocab_size=config.vocab_size, predicts_first=not ignore_bos
    )
    tokens = _sum_per_sequence(windows, [(part.labels != -100).sum() for part in windows])
    num_tokens = int(tokens.sum())
    if num_tokens == 0:
        raise ValueError(
            f"`sequences` must hold a token to predict, but got {len(sequences)} sequences of at most "
            f"{max(map(len, sequences), default=0)} tokens"
            f"{', the first of which is only read' if ignore_bos else ''}."
        )
    if estimator is None:
        reads_t = not is_causal and config.time_conditioning
        estimator = "exact" if block_size <= EXACT_BY_DEFAULT and not reads_t else "stratified"
    if is_causal:
        if estimator != "exact":
            raise ValueError(f"`estimator` must be 'exact' for an autoregressive model, but got {estimator!r}.")
        scorer = CausalScorer(model)
    elif estimator == "exact":
        scorer = BlockDiffusionScorer(model, ExactNoise(config, most_predicted_in_a_block(windows, block_size)))
    else:
        scorer = BlockDiffusionScorer(model, DrawnNoise(config, estimator, seed))

    is_exact = estimator == "exact"
    most_draws = 1 if is_exact else num_draws if target_error is None else max_draws
    draws: list[np.ndarray] = []
    per_position = np.zeros((2, max(part.start + len(part.labels) for part in windows)))
    draw_error = 0.0 if is_exact else None
    collate = BD3LMDataCollator(config.pad_token_id or 0, ignore_bos)
    with evaluation_mode(model):
        while len(draws) < most_draws:
            nelbo = np.zeros(len(windows))
            for rows, scores in _score_share(scorer, windows, collate, batch_size, model.device, len(draws), progress):
                for row, score in zip(rows, scores, strict=True):
                    part = windows[row]
                    positions = slice(part.start, part.start + len(part.labels))
                    per_position[:, positions] += score[: len(part.labels)], part.labels != -100
                    nelbo[row] = score.sum()
            draws.append(_sum_over_processes(nelbo))
            if len(draws) > 1:
                variance = np.var(draws, axis=0, ddof=1).sum() / len(draws)
                draw_error = float(np.sqrt(variance) / num_tokens)
            is_known = len(draws) >= num_draws and len(windows) * (len(draws) - 1) >= STOPPING_DEGREES_OF_FREEDOM
            if target_error is not None and is_known and draw_error <= target_error:
                break

    nelbo = _sum_per_sequence(windows, np.mean(draws, axis=0))
    num_sequences = int((tokens > 0).sum())
    mean = nelbo.sum() / num_tokens
    standard_error = None
    if num_sequences > 1:
        squares = ((nelbo - mean * tokens) ** 2).sum()
        standard_error = float(np.sqrt(num_sequences / (num_sequences - 1) * squares) / num_tokens)
    position_nelbo, position_tokens = _sum_over_processes(per_position) / [[len(draws)], [len(draws)]]
    return Likelihood(
        nelbo=float(mean),
        standard_error=standard_error,
        draw_standard_error=draw_error,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        num_bytes=num_bytes,
        estimator=estimator,
        num_draws=0 if is_exact else len(draws),
        seed=seed,
        target_error=target_error,
        target_reached=None if target_error is None else draw_error <= target_error,
        block_size=block_size,
        window=window,
        stride=stride,
        nelbo_per_position=[
            float(nats / number) if number else None
            for nats, number in zip(position_nelbo, position_tokens, strict=True)
        ],
        num_tokens_per_position=[round(number) for number in position_tokens],
    )


def load_for_evaluation(
    model: str,
    tokenizer: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    A block diffusion or an autoregressive model, in evaluation mode on its device, and its tokenizer.

    Args:
        model: Folder or Hub id of a checkpoint.
        tokenizer: Folder or Hub id of a tokenizer; by default the one beside the model.
        device: By default this process's accelerator, if there is one.
        dtype: Of the weights.
        attn_implementation: By default Transformers' choice.

    Raises:
        ValueError: there is no such tokenizer or device, the tokenizer is not that of the model, or the checkpoint is
            not whole; see [`load_whole`].
    """
    check_json_files(model)
    loaded_tokenizer = load_tokenizer(tokenizer or model)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    options = {name: value for name, value in options.items() if value is not None}
    device = PartialState().device if device is None else device
    # The published checkpoints name types that Transformers doesn't know.
    model_type = model_type_of(model)
    if model_type in CONFIG_MAPPING_NAMES and model_type not in LANGUAGE_MODELS:
        loaded = load_whole(AutoModelForCausalLM, model, device=device, **options)
    else:
        loaded = load_language_model(model, device=device, **options)
        check_tokenizer(loaded_tokenizer, loaded.config)
    return loaded, loaded_tokenizer


def _is_causal(model) -> bool:
    """Whether a model is an autoregressive one, and no block diffusion model (which remote code may have loaded)."""
    if is_block_diffusion(model.config):
        return False
    if model.config.is_encoder_decoder or not _looks_back_only(model):
        raise ValueError(
            "`model` must be a BD3LMForMaskedLM or an adapted network (BlockDiffusionForMaskedLM), or an "
            "autoregressive model (AutoModelForCausalLM), but got a "
            f"{type(model).__name__}, whose scores depend on other tokens than those before."
        )
    return True


def _looks_back_only(model) -> bool:
    """Whether another last token leaves the scores before it; Transformers loads BERT as a causal model, too."""
    ids = torch.tensor([[0, 1, 0, 1]], device=model.device)
    changed = torch.tensor([[0, 1, 0, 0]], device=model.device)
    with evaluation_mode(model):
        first, other = (model(input_ids=row).logits[0, :-1].float() for row in (ids, changed))
    return bool((first - other).abs().max() < 1e-3 * first.std())


def _score_share(
    scorer: BlockDiffusionScorer | CausalScorer,
    windows: list[Window],
    collate: BD3LMDataCollator,
    batch_size: int,
    device: torch.device,
    draw: int,
    progress: bool,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """The numbers and the scores [batch, length] of the windows that fall to this process, in batches."""
    state = PartialState()
    # Windows of like lengths go together, and the processes get like shares.
    order = sorted(range(len(windows)), key=lambda row: -len(windows[row].labels))
    order = order[state.process_index :: state.num_processes]
    starts = range(0, len(order), batch_size)
    with tqdm(
        total=len(starts) * scorer.num_forwards,
        desc=f"Evaluating, pass {draw + 1}",
        unit=" forwards",
        disable=not (progress and state.is_main_process),
    ) as bar:
        for start in starts:
            rows = order[start : start + batch_size]
            batch = collate([{"input_ids": windows[row].input_ids, "labels": windows[row].labels} for row in rows])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            scores = np.zeros(batch["labels"].shape)
            for part in scorer.parts(batch, rows, draw):
                scores += part.cpu().double().numpy()
                bar.update()
            yield rows, scores


def _sum_over_processes(values: np.ndarray) -> np.ndarray:
    state = PartialState()
    if state.num_processes == 1:
        return values
    return reduce(torch.from_numpy(values).to(state.device), "sum").cpu().numpy()


def _sum_per_sequence(windows: list[Window], values: Sequence[float]) -> np.ndarray:
    """[windows] -> [sequences], float64."""
    return np.bincount([window.sequence for window in windows], weights=values)


def unigram_perplexity(
    train_sequences: Sequence[Sequence[int]], held_out_sequences: Sequence[Sequence[int]], vocab_size: int
) -> float:
    """
    Perplexity of the model that knows only how often each token occurs in the training text.

    Token frequencies are smoothed by adding one. The first token of a sequence is neither counted nor predicted, as
    in `evaluate_likelihood`.

    Args:
        train_sequences, held_out_sequences: Token ids, one row per sequence, of any lengths.
        vocab_size: Number of token ids.

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
