"""The trained models of `benchmarks.quality`: a BD3-LM, a GPT-2 of the same size, and a second GPT-2 that judges."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, load_documents, load_tokenizer, pack_documents, train_tokenizer
from bd3lm_hf.data.documents import draw_sequences, limit_bytes, split_documents
from bd3lm_hf.training.arguments import BD3LMTrainingArguments
from bd3lm_hf.training.trainer import BD3LMTrainer


@dataclass(frozen=True)
class Recipe:
    """
    What is trained on what.

    The BD3-LM begins at block size 1, as an autoregressive model, and goes on at `block_size`; both together are as
    many steps as the GPT-2 has. The judge differs from the GPT-2 by its seed, its batches and its number of steps.
    """

    data: str = "builtin"
    max_bytes: int = 4_000_000
    vocab_size: int = 4096
    length: int = 128
    block_size: int = 8
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 3
    batch_size: int = 8
    learning_rate: float = 3e-3
    num_steps: int = 900
    num_autoregressive_steps: int = 400
    num_judge_steps: int = 1300


# A narrow model learns to attend much sooner from weights of the order of 1 / sqrt(hidden_size).
INITIALIZER_RANGE = 0.07
# Blocks with few masked tokens, which infilling meets, are seldom drawn from later intervals.
NOISE_INTERVAL = (0.1, 1.0)


@dataclass
class TrainedModels:
    """
    Attributes:
        bd3lm, gpt2, judge: in evaluation mode.
        tokenizer: of all three.
        held_out: packed sequences of text that none of them has seen, lists of ids [length].
    """

    bd3lm: BD3LMForMaskedLM
    gpt2: GPT2LMHeadModel
    judge: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase
    held_out: list[list[int]]


def train_or_load(recipe: Recipe, folder: Path, num_held_out: int) -> TrainedModels:
    """
    The models of a recipe. What is in `folder` is loaded, and training that was interrupted goes on.

    Raises:
        ValueError: `folder` holds models of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "recipe.json"
    if record.exists() and json.loads(record.read_text()) != asdict(recipe):
        raise ValueError(
            f"`output_dir` {folder} holds models of another recipe, {record.read_text()}; take a new one."
        )
    record.write_text(json.dumps(asdict(recipe), indent=2) + "\n")

    splits = split_documents(load_documents(recipe.data), 0.1)
    documents = limit_bytes(splits["train"], recipe.max_bytes)
    if (folder / "tokenizer").exists():
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
    else:
        tokenizer = train_tokenizer(documents, recipe.vocab_size)
        tokenizer.save_pretrained(folder / "tokenizer")
    train = pack_documents(documents, tokenizer, recipe.length)
    held_out = draw_sequences(pack_documents(splits["held_out"], tokenizer, recipe.length), num_held_out)
    how = (recipe, train, tokenizer)
    return TrainedModels(
        bd3lm=_train_bd3lm(folder, *how).eval(),
        gpt2=_train_gpt2(folder / "gpt2", *how, recipe.num_steps, seed=1).eval(),
        judge=_train_gpt2(folder / "judge", *how, recipe.num_judge_steps, seed=2).eval(),
        tokenizer=tokenizer,
        held_out=held_out["input_ids"],
    )


def _train_bd3lm(folder: Path, recipe: Recipe, train: Dataset, tokenizer: PreTrainedTokenizerBase):
    model, num_steps = _make_bd3lm(recipe, tokenizer), recipe.num_autoregressive_steps
    phases = {
        # At block size 1 and t = 1 the bound is the autoregressive likelihood.
        "bd3lm-start": (1, (1.0, 1.0), num_steps),
        "bd3lm": (recipe.block_size, NOISE_INTERVAL, recipe.num_steps - num_steps),
    }
    for seed, (name, (block_size, noise_interval, num_steps)) in enumerate(phases.items()):
        model.config.block_size = block_size
        arguments = BD3LMTrainingArguments(
            noise_interval=list(noise_interval),
            fix_noise_interval=True,
            masking="exact_count",
            **_arguments(folder / name, recipe, num_steps, seed),
        )
        model = _train(model, BD3LMTrainer, arguments, train)
    return model


def _train_gpt2(
    folder: Path, recipe: Recipe, train: Dataset, tokenizer: PreTrainedTokenizerBase, num_steps: int, seed: int
):
    set_seed(seed)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = TrainingArguments(**_arguments(folder, recipe, num_steps, seed))
    return _train(_make_gpt2(recipe, tokenizer), Trainer, arguments, train, collator)


def _arguments(folder: Path, recipe: Recipe, num_steps: int, seed: int) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "max_steps": num_steps,
        "save_steps": max(num_steps // 4, 1),
        "save_total_limit": 1,
        "report_to": [],
        "dataloader_pin_memory": False,
        "logging_steps": 50,
        "seed": seed,
    }


def _train(model: PreTrainedModel, trainer_class, arguments: TrainingArguments, train: Dataset, collator=None):
    """Trains a model, or loads what has been trained in the folder of these arguments, or goes on with it."""
    folder = Path(arguments.output_dir)
    if (folder / "config.json").exists():
        return type(model).from_pretrained(folder)
    trainer = trainer_class(model, arguments, train_dataset=train, data_collator=collator)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    trainer.save_model()
    return model


def _make_bd3lm(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> BD3LMForMaskedLM:
    set_seed(0)
    return BD3LMForMaskedLM(
        BD3LMConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            max_position_embeddings=recipe.length,
            block_size=recipe.block_size,
            hidden_dropout=0.0,
            tie_word_embeddings=True,
            initializer_range=INITIALIZER_RANGE,
            mask_token_id=tokenizer.mask_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _make_gpt2(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=recipe.length,
            n_embd=recipe.hidden_size,
            n_layer=recipe.num_layers,
            n_head=recipe.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=INITIALIZER_RANGE,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
