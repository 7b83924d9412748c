"""
Block diffusion language models in lm-evaluation-harness, as its model `bd3lm`.

The harness looks for no plugins; it knows a model once the module that registers it has been imported. So

    python -m bd3lm_hf.evaluation.harness --model bd3lm --model_args pretrained=my-model --tasks wikitext

is the command `lm_eval` after that import, with the same arguments. From Python, import this module and call
`lm_eval.simple_evaluate(model="bd3lm", ...)`.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.collators import BD3LMDataCollator
from ..data.tokenization import encode_documents
from ..modeling.generation_block_diffusion import BD3LMGenerationConfig
from .estimators import ESTIMATOR_NAMES, BlockDiffusionScorer, DrawnNoise, ExactNoise
from .likelihood import EXACT_BY_DEFAULT, _score_share, _sum_over_processes, load_for_evaluation
from .mode import evaluation_mode
from .networks import is_block_diffusion
from .windows import choose_window, cut_windows, most_predicted_in_a_block


try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError(
        "`bd3lm_hf.evaluation.harness` needs lm-evaluation-harness: pip install 'bd3lm-hf[lm-eval]'"
    ) from error


@register_model("bd3lm")
class BD3LMHarness(TemplateLM):
    """
    A block diffusion model as lm-evaluation-harness asks for it.

    Log-likelihoods are lower bounds, the negative NELBO in nats, by the estimators of [`evaluate_likelihood`]; at
    block size 1 they are exact.

    - `loglikelihood`: the context is read, and only the continuation is masked and predicted. A context too long for
      the window loses whole blocks on its left. `is_greedy` says whether greedy generation from the context, of as
      many tokens as the continuation has, writes the continuation.
    - `loglikelihood_rolling`: each document with BOS in front and, unless `score_eos=False`, EOS behind, read through
      the windows of `bd3lm evaluate --window`. Sums and, from "stratified" and "monte_carlo", draws are the same as
      there for a task that is run by itself. The harness's own models score no EOS.
    - `generate_until`: greedily unless the task samples. Each request draws with `seed` + its number.

    Greedy generation is `do_sample=False` with the sampler "confidence", one token per forward, unless another is
    named: the likeliest token where the model is surest.

    Special tokens that are spelled out in a text are read as ordinary text, unless a chat template wrote it. In
    several processes (`accelerate launch -m bd3lm_hf.evaluation.harness ...`) the windows are shared out, generation
    is not.

    Args:
        pretrained: Folder or Hub id of a checkpoint.
        tokenizer, device, dtype, attn_implementation: See [`load_for_evaluation`].
        batch_size: Windows, or prompts, per forward pass.
        max_batch_size: Taken because the harness passes it; nothing is searched for.
        estimator: "exact", "stratified" or "monte_carlo"; by default "exact" for block sizes up to 4, else
            "stratified".
        num_draws: Draws of the noise, four noised copies each; "exact" needs none.
        window, stride: Tokens read at once, and by which the window slides; see [`evaluate_likelihood`].
        seed: Of the noise and of generation.
        score_eos: Whether a document's EOS is part of its rolling log-likelihood.
        max_gen_toks: New tokens for tasks that name no number.
        generation: Further arguments of `generate`, such as `sampler` or `denoising_steps`; a task's own go before.

    Raises:
        ValueError: an argument is out of range or unknown, or the checkpoint is no block diffusion model.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        estimator: str | None = None,
        num_draws: int = 2,
        window: int | None = None,
        stride: int | None = None,
        seed: int = 0,
        score_eos: bool = True,
        max_gen_toks: int = 256,
        **generation: Any,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` must be an integer >= 1, but got {batch_size!r}.")
        if estimator is not None and estimator not in ESTIMATOR_NAMES:
            raise ValueError(f"`estimator` must be one of {', '.join(ESTIMATOR_NAMES)}, but got {estimator!r}.")
        if num_draws < 1:
            raise ValueError(f"`num_draws` must be an integer >= 1, but got {num_draws!r}.")
        if unknown := sorted(set(generation) - set(vars(BD3LMGenerationConfig()))):
            raise ValueError(f"`{unknown[0]}` is an argument neither of this model nor of `generate`.")
        BD3LMGenerationConfig(**generation)
        options = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
        self.model, self.tokenizer = load_for_evaluation(str(pretrained), tokenizer, **options)
        config = self.config = self.model.config
        if not is_block_diffusion(config):
            raise ValueError(
                f"`pretrained` must be a block diffusion model, but {pretrained!r} is a {config.model_type!r}; the "
                "harness's `--model hf` evaluates it."
            )
        is_enumerable = config.block_size <= EXACT_BY_DEFAULT and not config.time_conditioning
        self.estimator = estimator or ("exact" if is_enumerable else "stratified")
        self.window, self.stride = choose_window(config.max_position_embeddings, config.block_size, window, stride)
        self.batch_size, self.num_draws, self.seed = int(batch_size), num_draws, seed
        self.score_eos, self.max_gen_toks, self.generation = score_eos, max_gen_toks, generation
        self._device = self.model.device
        self._writes_chats = False

    @property
    def eot_token_id(self) -> int:
        """Ends a document: EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Begins a document: BOS."""
        return self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Tokens that are read at once."""
        return self.window

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes of the model beside the results."""
        names = ("estimator", "window", "stride", "score_eos", "generation")
        return {"block_size": self.config.block_size} | {name: getattr(self, name) for name in names}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; the special tokens of the template are read as such from then on."""
        self._writes_chats = True
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with BOS in front unless it begins with it or `add_special_tokens` is False."""
        ids = self.tokenizer(
            string, add_special_tokens=False, split_special_tokens=not self._writes_chats, verbose=False
        )["input_ids"]
        needs_bos = add_special_tokens is not False and ids[:1] != [self.prefix_token_id]
        return [self.prefix_token_id] * needs_bos + ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each document, in nats; 0 for an empty one."""
        texts = [request.args[0] for request in requests]
        encoded = iter(encode_documents(texts, self.tokenizer))
        sequences = [next(encoded) if text else [] for text in texts]
        if not self.score_eos:
            sequences = [ids[:-1] for ids in sequences]
        values = (-self._nelbo(sequences, sequences, disable_tqdm)).tolist()
        for text, value in zip(texts, values, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return values

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy generation writes it) of each continuation."""
        sequences, labels = [], []
        for _, context, continuation in requests:
            surplus = len(context) + len(continuation) - self.window
            # Blocks keep their tokens; one that is predicted is never cut off.
            surplus = min(-(-max(surplus, 0) // self.config.block_size) * self.config.block_size, len(context) - 1)
            surplus -= surplus % self.config.block_size
            sequences.append(context[surplus:] + continuation)
            labels.append([-100] * (len(context) - surplus) + continuation)
        values = (-self._nelbo(sequences, labels, disable_tqdm)).tolist()
        contexts, lengths = [request[1] for request in requests], [len(request[2]) for request in requests]
        greedy = self._continue(contexts, lengths, disable_tqdm, **self._greedy())
        results = []
        for (pair, _, continuation), value, written in zip(requests, values, greedy, strict=True):
            results.append((value, written[: len(continuation)] == continuation))
            self.cache_hook.add_partial("loglikelihood", pair, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written behind each context, up to the first of the task's stop strings or EOS."""
        texts: list[str] = [""] * len(requests)
        settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        for setting in dict.fromkeys(settings):
            rows = [row for row, other in enumerate(settings) if other == setting]
            arguments = dict(normalize_gen_kwargs(json.loads(setting), self.max_gen_toks))
            until, length = [stop for stop in arguments.pop("until") if stop], arguments.pop("max_gen_toks")
            if not arguments["do_sample"]:
                arguments.pop("temperature", None)
                arguments = self._greedy() | arguments
            if until:
                arguments |= {"stop_strings": until, "tokenizer": self.tokenizer}
            contexts = [self.tok_encode(requests[row].args[0]) for row in rows]
            written = self._continue(contexts, [length] * len(rows), disable_tqdm, numbers=rows, **arguments)
            for row, ids in zip(rows, written, strict=True):
                ids = list(itertools.takewhile(lambda token: token != self.eot_token_id, ids))
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                texts[row] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial("generate_until", requests[row].args, texts[row])
        return texts

    def _nelbo(
        self, sequences: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], disable_tqdm: bool
    ) -> np.ndarray:
        """The NELBO of each sequence, in nats, float64 [sequences]; see [`evaluate_likelihood`]."""
        config = self.config
        windows = cut_windows(
            sequences,
            labels,
            window=self.window,
            stride=self.stride,
            vocab_size=config.vocab_size,
            predicts_first=not config.ignore_bos,
        )
        if self.estimator == "exact":
            noise, num_draws = ExactNoise(config, most_predicted_in_a_block(windows, config.block_size)), 1
        else:
            noise, num_draws = DrawnNoise(config, self.estimator, self.seed), self.num_draws
        scorer = BlockDiffusionScorer(self.model, noise)
        collate = BD3LMDataCollator(config.pad_token_id or 0, config.ignore_bos)
        nelbo = np.zeros(len(windows))
        with torch.no_grad(), evaluation_mode(self.model):
            for draw in range(num_draws):
                for rows, scores in _score_share(
                    scorer, windows, collate, self.batch_size, self.device, draw, not disable_tqdm
                ):
                    nelbo[rows] += scores.sum(-1)
        nelbo = _sum_over_processes(nelbo) / num_draws
        return np.bincount([window.sequence for window in windows], weights=nelbo, minlength=len(sequences))

    def _greedy(self) -> dict[str, Any]:
        return {"do_sample": False, "sampler": self.generation.get("sampler", "confidence")}

    def _continue(
        self,
        contexts: Sequence[list[int]],
        lengths: Sequence[int],
        disable_tqdm: bool,
        numbers: Sequence[int] | None = None,
        **arguments: Any,
    ) -> list[list[int]]:
        """So many new tokens behind each context, padded behind an EOS."""
        written: list[list[int]] = [[]] * len(contexts)
        seeds = [self.seed + number for number in (numbers or range(len(contexts)))]
        batches = list(_batches(contexts, lengths, self.batch_size))
        for rows in tqdm(batches, desc="Generating", unit=" batches", disable=disable_tqdm):
            inputs = {"input_ids": [contexts[row] for row in rows]}
            inputs = self.tokenizer.pad(inputs, padding_side="left", return_tensors="pt").to(self.device)
            sequences = self.model.generate(
                **inputs,
                **self.generation | arguments,
                max_new_tokens=lengths[rows[0]],
                seed=[seeds[row] for row in rows],
                eos_token_id=self.eot_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            for row, ids in zip(rows, sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                written[row] = ids
        return written


def _batches(contexts: Sequence[list[int]], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows that are continued by equally many tokens, those of like lengths together; none of no tokens."""
    order = sorted(range(len(contexts)), key=lambda row: (lengths[row], len(contexts[row])), reverse=True)
    for length, rows in itertools.groupby(order, key=lambda row: lengths[row]):
        if length:
            rows = list(rows)
            yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
