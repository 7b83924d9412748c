"""The model card: what a `TrainingSummary` holds, as metadata that the Hub reads and as text for people."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling.generation_block_diffusion import BD3LMGenerationConfig
from .published_files import is_repo_id
from .training_summary import TrainingSummary


TEMPLATE_FILE = Path(__file__).with_name("model_card_template.md")
TAGS = ("bd3lm", "block-diffusion", "text-generation", "custom_code")
# Neutral ones: text of the training data is not for this package to publish.
WIDGET_PROMPTS = ("The", "In the beginning")
MAX_TABLE_ROWS = 20
ESTIMATORS = {
    "exact": "exact: every mask of a block counts",
    "stratified": "drawn: how many tokens of a block are masked, stratified over all blocks, then which",
    "monte_carlo": "drawn: the noise level and the mask of each block",
}
# How a sampler reveals the tokens of a block, its arguments, and its forward passes per block of s tokens.
SAMPLER_TABLE = {
    "first_hitting": ("one token per forward, at a place drawn uniformly; follows the model exactly", "none", "{s}"),
    "ancestral": (
        "the reverse process in equal steps",
        "`denoising_steps`, `noise_schedule`, `remask_cap`",
        "at most `denoising_steps`",
    ),
    "confidence": (
        "the tokens that the model is surest of",
        "`denoising_steps`, or `confidence_threshold`; `confidence`",
        "`denoising_steps`, or 1 to {s}",
    ),
    "sequential": (
        "from left to right",
        "`denoising_steps`, or `tokens_per_step`",
        "`denoising_steps`, or {s} / `tokens_per_step`",
    ),
    "entropy_bound": (
        "the most certain tokens, as long as their entropies stay within a bound",
        "`entropy_bound`",
        "1 to {s}",
    ),
}


def create_model_card(summary: TrainingSummary, repo_id: str) -> ModelCard:
    """
    The card of a model.

    Args:
        summary: What happened to it.
        repo_id: Where it is loaded from in the card's examples: an id on the Hub, or a folder.

    Returns:
        The card; its figures stand in the metadata (`model-index`) in full, and rounded in the text.
    """
    stated, model = summary.stated, summary.model
    name = stated.get("model_name") or repo_id.rstrip("/").split("/")[-1]
    prompts = list(stated.get("widget_prompts") or WIDGET_PROMPTS)
    named_datasets = _strings(stated.get("dataset"))
    evaluated = [evaluation["dataset"] for evaluation in summary.final_evaluations if evaluation["dataset"]]
    dataset_ids = [item["id"] for item in [*summary.train_datasets, *evaluated]]
    dataset_ids += [item for item in named_datasets if "/" in item and is_repo_id(item) and not Path(item).exists()]
    base_model = summary.base_model or (None if summary.adapter else model.get("adapted_from"))
    results = [result for item in summary.final_evaluations for result in _eval_results(item, summary)]
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=("adapter" if summary.adapter else "finetune") if base_model else None,
        datasets=list(dict.fromkeys(dataset_ids)) or None,
        eval_results=results or None,
        language=stated.get("language"),
        library_name="peft" if summary.adapter else "transformers",
        license=stated.get("license"),
        model_name=name if results else None,
        pipeline_tag="text-generation",
        tags=[*TAGS, *(["lora"] if summary.adapter else []), *_strings(stated.get("tags"))],
        widget=[{"text": prompt} for prompt in prompts],
    )
    # The last step may have been evaluated while training and again afterwards.
    rows = list({(row["name"], row["weights_step"], row["averaged"]): row for row in summary.evaluations}.values())
    if len(rows) > MAX_TABLE_ROWS:
        rows = [*rows[:: math.ceil(len(rows) / (MAX_TABLE_ROWS - 1))], rows[-1]]
    block_size = model.get("block_size")
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE_FILE),
        name=name,
        repo_id=repo_id,
        summary=summary,
        model=model,
        prompt=prompts[0],
        named_datasets=named_datasets,
        evaluations=[_evaluation_row(evaluation) for evaluation in summary.final_evaluations],
        course=[_evaluation_row(row) for row in rows] if len(rows) > 1 else [],
        estimators=ESTIMATORS,
        default_sampler=BD3LMGenerationConfig._get_default_generation_params()["sampler"],
        samplers=[
            (sampler, how, arguments, passes.format(s=block_size or "s"))
            for sampler, (how, arguments, passes) in SAMPLER_TABLE.items()
        ],
        sampler_results=markdown_table(stated.get("sampler_results") or []),
        figure=figure,
    )


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """
    Rows of the same columns as a table.

    Raises:
        ValueError: `rows` is no list of mappings with the same keys.
    """
    if not rows:
        return ""
    if not all(isinstance(row, Mapping) and list(row) == list(rows[0]) for row in rows):
        raise ValueError(f"`sampler_results` must be a list of mappings with the same keys, but got {rows!r}.")
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([figure(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(value: Any) -> str:
    """A number with four significant digits, at least; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4f}" if 1 <= abs(value) < 1e5 else f"{value:.4g}"


def _strings(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _eval_results(evaluation: Mapping[str, Any], summary: TrainingSummary) -> list[EvalResult]:
    """The likelihood under one set of data: what is not finite can't stand in the metadata."""
    nelbo, error = evaluation["nelbo"], evaluation["standard_error"]
    bits = evaluation["bits_per_byte"]
    dataset = evaluation["dataset"] or {}
    # By the delta method: perplexity is exp(nelbo), bits per byte are proportional to it.
    metrics = [
        ("nelbo", "Negative evidence lower bound (nats per token)", nelbo, error),
        (
            "perplexity",
            "Perplexity (upper bound)",
            evaluation["perplexity"],
            error and error * evaluation["perplexity"],
        ),
        ("bits_per_byte", "Bits per byte (upper bound)", bits, error and bits and error * bits / nelbo),
    ]
    arguments = {"estimator": evaluation["estimator"], "block_size": summary.model.get("block_size")}
    if evaluation["num_sequences"] is not None:
        arguments["num_sequences"] = evaluation["num_sequences"]
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Language modelling",
            dataset_type=dataset.get("id") or re.sub(r"\W+", "-", evaluation["name"]),
            dataset_name=dataset.get("id") or evaluation["name"],
            dataset_config=dataset.get("config"),
            dataset_split=dataset.get("split"),
            dataset_revision=dataset.get("revision"),
            metric_type=metric,
            metric_name=name,
            metric_value=value,
            metric_args=arguments
            if error is None or not math.isfinite(error)
            else {"standard_error": error, **arguments},
        )
        for metric, name, value, error in metrics
        if value is not None and math.isfinite(value)
    ]


def _evaluation_row(evaluation: Mapping[str, Any]) -> dict[str, str]:
    error = evaluation["standard_error"]
    row = {item: figure(value) for item, value in evaluation.items() if item != "dataset"}
    if error is not None:
        row["nelbo"] += f" ± {figure(error)}"
    return row
