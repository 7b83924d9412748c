"""What happened to a model, recorded where a run saves it and kept beside its weights, for its card to tell."""

import contextlib
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..data.replacing import write_text
from ..evaluation.networks import fact_of_network, language_model_class, stock_config
from ..noise.intervals import chosen_noise_intervals
from .published_files import ADAPTER_CONFIG_FILE, SUMMARY_FILE, is_on_hub, is_repo_id, read_object, weight_files


# The moving average of the weights, in a checkpoint of training.
EMA_FILE = "ema.safetensors"

# What a reader needs in order to train alike. Paths, tokens and what belongs to one machine are not among them.
CARD_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "noise_schedule",
    "noise_interval",
    "fix_noise_interval",
    "noise_interval_search_every",
    "antithetic_sampling",
    "masking",
    "num_noise_samples",
    "complementary_masks",
    "noise_level_per",
    "loss_weight",
    "autoregressive_loss_weight",
    "confidence_loss_weight",
    "clean_attention",
    "mask_token_learning_rate",
    "block_size_schedule",
    "ema_decay",
    "export_ema",
    "divergence",
    "teacher_top_k",
    "on_policy_fraction",
    "rollout_prompt_length",
    "path_steps",
    "loss_type",
    "beta",
    "label_smoothing",
    "num_generations",
    "num_iterations",
    "steps_per_generation",
    "max_completion_length",
    "epsilon",
    "scale_rewards",
)
# What a user may tell of a model; see `bd3lm_hf.push_to_hub`.
STATED = ("license", "language", "tags", "dataset", "model_name", "widget_prompts", "sampler_results")
CONFIG_FACTS = (
    "block_size",
    "max_position_embeddings",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "noise_schedule",
    "noise_interval",
    "time_conditioning",
    "bos_token_id",
)
# Of an autoregressive network that was adapted: where it came from, and how it is read.
ADAPTED_FACTS = ("adapted_from", "shift_logits", "clean_attention", "mask_token_id")
ADAPTER_FACTS = ("peft_type", "r", "lora_alpha", "use_dora")


@dataclass
class TrainingSummary:
    """
    What happened to a model, as far as its card tells it. Holds no path and no text of the data.

    Attributes:
        model: The facts of the configuration that `CONFIG_FACTS` names, `num_parameters`, and the `sampler` that
            `generate` uses by default.
        base_model: Id on the Hub of the model that training went on from, or that an adapter belongs to.
        has_unnamed_base: Whether it came from elsewhere. No folder is named: to others its name says nothing, and its
            path may tell of whose it is.
        adapter: The facts of the adapter that `ADAPTER_FACTS` names and its `num_parameters`; None for a whole model.
        has_tokenizer: Whether a tokenizer lies beside the weights.
        noise_interval: `chosen_by` ("search", "fixed" or "default"); after a search also the `step` of the last one,
            its `nelbo_variance` and the `nelbo_variance_of_full_interval`, in (nats per token)^2. "full" where there
            is no interval to choose.
        recipe: What the `loss` was in the place of likelihood, in words, the `teacher` or `reference` that it had (see
            [`named_in_card`]), and the names of the `rewards`. Empty for likelihood.
        training: Steps, epochs, tokens that were predicted, seconds, mean loss (nats per token), sequences; empty if
            there was no training.
        weights_step: Step of training that the saved weights are those of.
        averaged: Whether they are the moving average.
        evaluations: In their order: `name` of the data, `weights_step` and `averaged` of the weights that were
            evaluated, `nelbo` (nats per token) and its `standard_error`, `perplexity`, `bits_per_byte`, `estimator`,
            `num_sequences`, `dataset` (see `train_datasets`).
        train_datasets: Those of the Hub: `id`, `revision`, `config` and `split` of each.
        arguments: The arguments of training that `CARD_ARGUMENTS` names.
        versions: Versions of the packages.
        stated: What only the user knows; see `STATED`.
    """

    model: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    has_unnamed_base: bool = False
    adapter: dict[str, Any] | None = None
    has_tokenizer: bool = False
    noise_interval: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    weights_step: int = 0
    averaged: bool = False
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    train_datasets: list[dict[str, Any]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_trainer(cls, trainer, averaged: bool = False) -> "TrainingSummary":
        """
        Args:
            trainer: A `BD3LMTrainer`, or another that publishes as it does.
            averaged: Whether the weights that are saved are the moving average.
        """
        args, state, config = trainer.args, trainer.state, trainer.config
        model = trainer.accelerator.unwrap_model(trainer.model)
        adapter = getattr(model, "peft_config", {}).get("default")
        base = config._name_or_path if adapter is None else adapter.base_model_name_or_path
        base_model = trainer.base_model_in_card or (base if is_on_hub(base) else None)
        generation_config = getattr(model, "generation_config", None)
        weights_step = state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and not trainer.is_in_train:
            weights_step = state.best_global_step
        summary = cls(
            model={
                **_config_facts(config),
                "num_parameters": sum(
                    weight.numel() for name, weight in model.named_parameters() if not _is_of_adapter(name)
                ),
                "sampler": getattr(generation_config, "sampler", None),
            },
            base_model=base_model,
            has_unnamed_base=bool(base) and base_model is None,
            adapter=None if adapter is None else _adapter_facts(adapter.to_dict(), model),
            has_tokenizer=trainer.processing_class is not None,
            noise_interval=_noise_interval_facts(args, state.log_history),
            recipe=trainer.recipe_in_card() if state.global_step else {},
            training=_training_facts(trainer),
            weights_step=weights_step,
            averaged=averaged,
            train_datasets=datasets_of_the_hub(trainer.train_dataset),
            arguments=_argument_facts(args) if state.global_step else {},
            versions=package_versions(adapter is not None),
            stated=dict(trainer.stated_in_card),
        )
        summary.evaluations = _evaluations(trainer, weights_step)
        # As it will be read again: tuples become lists.
        return cls(**json.loads(summary.to_json()))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "TrainingSummary":
        """What was recorded in a saved folder; of one without a record, what its configuration tells."""
        folder = Path(folder)
        path = folder / SUMMARY_FILE
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        if path.is_file():
            try:
                recorded = read_object(path)
                if "base_folder" in recorded:
                    # Version 0.1 took any name of what was no folder any more for an id.
                    base_folder, base = recorded.pop("base_folder"), recorded.get("base_model")
                    recorded["base_model"] = base if is_on_hub(base) else None
                    recorded["has_unnamed_base"] = bool(base_folder or base) and recorded["base_model"] is None
                if recorded.get("base_model") is not None and not is_repo_id(recorded["base_model"]):
                    recorded |= {"base_model": None, "has_unnamed_base": True}
                return cls(**{**recorded, "has_tokenizer": has_tokenizer})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path} is no record of training that this version can read: {error}") from error
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            adapter = read_object(folder / ADAPTER_CONFIG_FILE)
            base = adapter.get("base_model_name_or_path") or None
            return cls(
                base_model=base if is_on_hub(base) else None,
                has_unnamed_base=base is not None and not is_on_hub(base),
                adapter={**_adapter_facts(adapter), "num_parameters": _num_parameters(folder)},
                has_tokenizer=has_tokenizer,
                versions=package_versions(with_peft=True),
            )
        generation = folder / GENERATION_CONFIG_NAME
        sampler = read_object(generation).get("sampler") if generation.is_file() else None
        config = folder / CONFIG_NAME
        config = language_model_class(folder).config_class.from_pretrained(folder) if config.is_file() else None
        facts = {} if config is None else _config_facts(config)
        return cls(
            model={**facts, "num_parameters": _num_parameters(folder), "sampler": sampler},
            has_tokenizer=has_tokenizer,
            versions=package_versions(),
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def save(self, folder: str | Path) -> None:
        write_text(Path(folder, SUMMARY_FILE), self.to_json())

    @property
    def final_evaluations(self) -> list[dict[str, Any]]:
        """The last evaluation of the saved weights on each set of data."""
        of_these_weights = [
            evaluation
            for evaluation in self.evaluations
            if (evaluation["weights_step"], evaluation["averaged"]) == (self.weights_step, self.averaged)
        ]
        return list({evaluation["name"]: evaluation for evaluation in of_these_weights}.values())

    def add_likelihood(self, name: str, likelihood: Mapping[str, Any]) -> None:
        """
        Adds what `bd3lm evaluate --json` or [`Likelihood.to_json`] wrote of these weights.

        Raises:
            ValueError: it is no such thing.
        """
        if not isinstance(likelihood, Mapping) or not {"nelbo", "perplexity"} <= set(likelihood):
            raise ValueError(
                f"`likelihood` ({name}) must hold what `bd3lm evaluate --json` writes: nelbo, perplexity."
            )
        block_size = self.model.get("block_size")
        if likelihood.get("block_size", block_size) != block_size:
            raise ValueError(
                f"`likelihood` ({name}) was measured at block size {likelihood['block_size']}, but the model's is "
                f"{block_size}."
            )
        is_exact = block_size == 1 and not self.model.get("time_conditioning")
        self.evaluations.append(
            {
                "name": name,
                "weights_step": self.weights_step,
                "averaged": self.averaged,
                "estimator": likelihood.get("estimator") or ("exact" if is_exact else "monte_carlo"),
                "dataset": None,
                **{
                    key: likelihood.get(key)
                    for key in ("nelbo", "standard_error", "perplexity", "bits_per_byte", "num_sequences")
                },
            }
        )


def package_versions(with_peft: bool = False) -> dict[str, str]:
    """The versions of what trains, by package as far as it is installed, and of Python."""
    packages = ("bd3lm-hf", "transformers", "torch", "datasets", "tokenizers", *(["peft"] if with_peft else []))
    versions = {}
    for name in packages:
        # Without an install the package runs from its checkout, and training needs no `datasets`.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions | {"python": platform.python_version()}


def datasets_of_the_hub(dataset: Any) -> list[dict[str, Any]]:
    """Which datasets of the Hub a dataset was made from, as far as it knows: id, revision, configuration, split."""
    info = getattr(dataset, "info", None)
    found = {}
    for url in getattr(info, "download_checksums", None) or {}:
        match = re.match(r"hf://datasets/([^@]+)@([^/]+)/", str(url))
        if match:
            split = getattr(dataset, "split", None)
            found[match[1]] = {
                "id": match[1],
                "revision": match[2],
                "config": info.config_name,
                "split": None if split is None else str(split),
            }
    return list(found.values())


def _config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    facts = {name: fact_of_network(config, name) for name in CONFIG_FACTS}
    network = stock_config(config)
    if network is not None:
        facts |= {name: getattr(config, name, None) for name in ADAPTED_FACTS}
        facts["network"] = network.model_type
    return {**facts, "noise_interval": list(config.noise_interval)}


def _is_of_adapter(name: str) -> bool:
    return "lora_" in name or ".modules_to_save." in name


def _adapter_facts(adapter: Mapping[str, Any], model=None) -> dict[str, Any]:
    facts = {name: adapter.get(name) for name in ADAPTER_FACTS}
    facts["peft_type"] = getattr(facts["peft_type"], "value", facts["peft_type"])
    if model is not None:
        facts["num_parameters"] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return facts


def _num_parameters(folder: Path) -> int:
    """Elements of all tensors of a saved model or adapter, read from the headers of its files."""
    total = 0
    for name in weight_files(folder, (folder / ADAPTER_CONFIG_FILE).is_file()):
        with safe_open(folder / name, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _argument_facts(args) -> dict[str, Any]:
    """Those that were given or have a value, and of the two that end training the one in force."""
    not_in_force = "num_train_epochs" if args.max_steps > 0 else "max_steps"
    facts = {name: getattr(args, name, None) for name in CARD_ARGUMENTS if name != not_in_force}
    return {name: value for name, value in facts.items() if value is not None}


def _noise_interval_facts(args, log_history: list[dict]) -> dict[str, Any]:
    chosen = chosen_noise_intervals(log_history)
    if chosen:
        last = [entry for entry in log_history if "noise_interval_beta" in entry][-1]
        names = ("step", "nelbo_variance", "nelbo_variance_of_full_interval")
        return {"chosen_by": "search", "num_searches": len(chosen), **{name: last[name] for name in names}}
    if not hasattr(args, "fix_noise_interval"):
        return {"chosen_by": "full"}
    is_fixed = args.fix_noise_interval or args.noise_interval is not None
    return {"chosen_by": "fixed" if is_fixed else "default"}


def named_in_card(name: str | None) -> str | None:
    """A model by its name or folder: an id on the Hub, "itself" for None, and None for one that is not named."""
    return "itself" if name is None else name if is_on_hub(name) else None


def _training_facts(trainer) -> dict[str, Any]:
    state, dataset = trainer.state, trainer.train_dataset
    if not state.global_step:
        return {}
    ends = [entry for entry in state.log_history if "train_runtime" in entry]
    end = ends[-1] if ends else {}
    return {
        "num_steps": state.global_step,
        "num_epochs": state.epoch,
        "num_tokens": int(state.num_input_tokens_seen) or None,
        "seconds": end.get("train_runtime"),
        "train_loss": end.get("train_loss"),
        "num_sequences": len(dataset) if hasattr(dataset, "__len__") else None,
    }


def _evaluations(trainer, weights_step: int) -> list[dict[str, Any]]:
    """
    The evaluations in the log, and before training. While training they are of the moving average, if there is one;
    afterwards of what the model has then.
    """
    args, config, state = trainer.args, trainer.config, trainer.state
    history = [*(trainer.history_before if state.global_step else []), *state.log_history]
    ends = [index for index, entry in enumerate(history) if "train_runtime" in entry]
    end = ends[-1] if ends and not trainer.is_in_train else len(history)
    has_average = bool(getattr(args, "ema_decay", 0))
    is_exact = config.block_size == 1 and not config.time_conditioning
    estimator = "exact" if is_exact else "monte_carlo" if config.time_conditioning else "stratified"
    found = []
    for index, entry in enumerate(history):
        for key in entry:
            if not key.endswith("_nelbo_standard_error"):
                continue
            prefix = key.removesuffix("_nelbo_standard_error")
            name = prefix.removeprefix("eval").strip("_") or "held-out text"
            dataset = trainer.eval_dataset
            if isinstance(dataset, dict):
                dataset = dataset.get(name)
            elif not prefix.startswith("eval"):
                # Another dataset, given to `evaluate` itself.
                dataset = None
            of_hub = datasets_of_the_hub(dataset)
            is_after = index > end
            found.append(
                {
                    "name": name,
                    "weights_step": weights_step if is_after else entry["step"],
                    "averaged": has_average and entry["step"] > 0 and (not is_after or args.export_ema),
                    "nelbo": entry[f"{prefix}_nelbo"],
                    "standard_error": entry[key],
                    "perplexity": entry[f"{prefix}_perplexity"],
                    "bits_per_byte": entry.get(f"{prefix}_bits_per_byte"),
                    "estimator": estimator,
                    "num_sequences": len(dataset) if hasattr(dataset, "__len__") else None,
                    "dataset": of_hub[0] if of_hub else None,
                }
            )
    return found
