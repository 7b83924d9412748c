"""`bd3lm train`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .common import DATA_HELP, SOURCE_OPTIONS, given, make_parser


DESCRIPTION = """\
Train a block diffusion language model with BD3LMTrainer, or fine-tune one on prompts and completions or chats.

Held-out text is scored before and after training. The output folder holds the model (with the code that loads it
where this package is not installed), its tokenizer, `metrics.json`, and what Trainer writes.

examples:
  bd3lm train --data builtin --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4 \\
      --block_size 4 --length 256 --max_steps 500
  bd3lm train --data corpus.txt --tokenizer gpt2 --block_size 16 --length 1024 --bf16 --output_dir my-model
  bd3lm train --data Salesforce/wikitext --dataset_config wikitext-103-raw-v1 --vocab_size 16384 --num_train_epochs 2
  bd3lm train --data lm1b --eval_data lm1b --eval_split test --tokenizer gpt2 --length 128
  bd3lm train --data corpus.txt --model my-model --block_size 4            go on with smaller blocks
  bd3lm train --examples chats.jsonl --model my-model --lora_rank 16       fine-tune an adapter
  bd3lm train ... --output_dir my-model --resume_from_checkpoint last      go on after an interruption

Every argument of BD3LMTrainingArguments, and so of transformers.TrainingArguments, is accepted."""

# Where `bd3lm train` differs from `BD3LMTrainingArguments`; the learning rate is the BD3-LM paper's.
TRAINING_DEFAULTS = {
    "output_dir": "bd3lm-trained",
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 16,
    "logging_steps": 50,
    "save_total_limit": 2,
    "seed": 0,
}


@dataclass
class DataArguments:
    """What to train on."""

    _argument_group_name = "data"

    data: str | None = field(default=None, metadata={"help": f"What to train on: {DATA_HELP}"})
    examples: str | None = field(
        default=None,
        metadata={
            "help": "In place of --data: a table (.jsonl, .json, .csv, .parquet) or Hub dataset with the columns "
            "`prompt` and `completion`, or `messages` (chats). Only completions are learnt."
        },
    )
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Held-out text or examples, given likewise. Without it a part is held out."},
    )
    held_out_fraction: float = field(
        default=0.1, metadata={"help": "The share of the documents to hold out, if there is no --eval_data."}
    )
    max_bytes: int | None = field(
        default=None, metadata={"help": "Train on at most this many bytes of text (drawn document by document)."}
    )
    max_eval_sequences: int = field(
        default=256, metadata={"help": "Evaluate on at most this many held-out sequences, drawn at random."}
    )
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Read --data and --eval_data as copies of this corpus, detokenized and split as in papers: "
            "wikitext2, wikitext103, ptb, lm1b, lambada, ag_news, scientific_papers_pubmed, scientific_papers_arxiv, "
            "openwebtext or text8. --data takes these names, too, for the copies on the Hub."
        },
    )
    split: str | None = field(default=None, metadata={"help": SOURCE_OPTIONS["split"]})
    eval_split: str | None = field(
        default=None, metadata={"help": "The split of --eval_data, e.g. validation. (default: --split)"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": SOURCE_OPTIONS["dataset_config"]})
    text_column: str | None = field(default=None, metadata={"help": SOURCE_OPTIONS["text_column"]})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read --data or --examples while training, without a copy; needs --eval_data, --max_steps and a "
            "tokenizer."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a tokenizer. Without it, --model's is used or one is trained."},
    )
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary of a tokenizer that is trained."})
    length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per training sequence, a multiple of the block size. (default: the model's context)"
        },
    )
    packing: bool = field(
        default=False, metadata={"help": "Put several of --examples into one sequence, unseen by each other."}
    )
    truncation: str = field(
        default="error", metadata={"help": "What becomes of --examples longer than --length: error, right or drop."}
    )


def _config_field(help_text: str):
    """A field of `BD3LMConfig`, which owns the default; `train_arguments` puts it into the help."""
    return field(default=None, metadata={"help": help_text})


@dataclass
class ModelArguments:
    """What to train: a new model of these sizes, or one that is there."""

    _argument_group_name = "model"

    model: str | None = field(
        default=None,
        metadata={"help": "Continue from this checkpoint (folder or Hub id). Without it a new model is trained."},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train a LoRA adapter of this rank on all linear layers of --model; in an adapted network, on "
            "the mask token's embedding as well."
        },
    )
    use_dora: bool = field(default=False, metadata={"help": "Decompose the adapted weights (DoRA)."})
    hidden_size: int | None = _config_field("Width of the residual stream.")
    num_hidden_layers: int | None = _config_field("Transformer layers.")
    num_attention_heads: int | None = _config_field("Attention heads per layer.")
    intermediate_size: int | None = _config_field("Width of the MLP. (default: 4 x --hidden_size)")
    cond_dim: int | None = _config_field("Width of the noise level's embedding.")
    adaln: bool | None = _config_field("Modulate the layers by the noise level.")
    time_conditioning: bool | None = _config_field("Feed the noise level to the modulation.")
    tie_word_embeddings: bool | None = _config_field("Share the embedding matrix with the output projection.")
    initializer_range: float | None = _config_field("Standard deviation of the initial weights.")
    max_position_embeddings: int | None = field(
        default=None, metadata={"help": "Context in tokens. (default: --length, or else BD3LMConfig's)"}
    )
    block_size: int | None = _config_field("Tokens denoised together; with --model, changes the checkpoint's.")
    hidden_dropout: float | None = _config_field("Dropout probability.")
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flex_attention or flash_attention_2. (default: Transformers')"}
    )

    # What a checkpoint's weights do not depend on, so that training may go on with another value.
    ADJUSTABLE = ("block_size", "hidden_dropout")

    def config_fields(self) -> dict:
        """The fields of `BD3LMConfig` that were given."""
        others = ("model", "lora_rank", "use_dora", "attn_implementation")
        return {name: value for name, value in asdict(self).items() if value is not None and name not in others}


def run(argv: Sequence[str]) -> None:
    """`bd3lm train`."""
    train_model(*train_arguments(argv))


def train_arguments(argv: Sequence[str]) -> tuple:
    """What the flags of `bd3lm train` say: `DataArguments`, `ModelArguments` and `BD3LMTrainingArguments`."""
    import torch
    from transformers import HfArgumentParser

    from ..modeling.configuration_bd3lm import BD3LMConfig
    from ..training.arguments import BD3LMTrainingArguments

    parser = make_parser(
        "train",
        DESCRIPTION,
        parser_class=HfArgumentParser,
        dataclass_types=[DataArguments, ModelArguments, BD3LMTrainingArguments],
        usage="bd3lm train (--data DATA | --examples EXAMPLES) [...]",
    )
    for name in (item.name for item in fields(ModelArguments) if hasattr(BD3LMConfig, item.name)):
        action = parser._option_string_actions[f"--{name}"]
        if "default" not in action.help:
            action.help += f" (default: {getattr(BD3LMConfig, name)})"
    # HfArgumentParser lists the hundred flags of TrainingArguments first; they are what a reader needs last.
    parser._optionals.title = "options, and the arguments of BD3LMTrainingArguments"
    parser._action_groups.sort(key=lambda group: group is parser._optionals)
    on_gpu = torch.cuda.is_available()
    parser.set_defaults(
        **TRAINING_DEFAULTS, bf16=on_gpu and torch.cuda.is_bf16_supported(), dataloader_pin_memory=on_gpu
    )
    data_args, model_args, training_args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[:3]
    _check_arguments(data_args, model_args, training_args)
    return data_args, model_args, training_args


def _check_arguments(data_args: DataArguments, model_args: ModelArguments, training_args) -> None:
    if (data_args.data is None) == (data_args.examples is None):
        raise ValueError(
            f"one of --data and --examples must be given, but got {data_args.data!r} and {data_args.examples!r}"
        )
    if data_args.corpus is not None and data_args.examples is not None:
        raise ValueError(f"--corpus={data_args.corpus} goes with --data, not with --examples")
    if data_args.eval_split is not None and data_args.eval_data is None:
        raise ValueError(f"--eval_split={data_args.eval_split} is the split of --eval_data, which must be given")
    if data_args.packing and data_args.examples is None:
        raise ValueError("--packing goes with --examples; the documents of --data are always packed")
    if model_args.lora_rank is not None and model_args.model is None:
        raise ValueError("--lora_rank adapts a trained model, so --model must be given")
    if data_args.streaming:
        needed = {
            "--eval_data": data_args.eval_data is not None,
            "--max_steps": training_args.max_steps > 0,
            "--tokenizer or --model": (data_args.tokenizer or model_args.model) is not None,
        }
        for name, is_given in needed.items():
            if not is_given:
                raise ValueError(f"--streaming needs {name}: a stream can't be read beforehand")


def train_model(data_args: DataArguments, model_args: ModelArguments, training_args) -> dict:
    """
    Train as `bd3lm train` does: data, tokenizer, model, likelihood, training, likelihood, saving.

    Args:
        training_args: `BD3LMTrainingArguments`.

    Returns:
        What `metrics.json` holds: `before` and `after` (metrics of the held-out sequences, see `BD3LMTrainer`),
        `unigram_perplexity` of the same text (None for a stream and for examples), and Trainer's `train` metrics.

    Raises:
        ValueError: if the arguments do not go together, or the corpus or tokenizer cannot be used.
    """
    from transformers import set_seed

    from ..data.tokenization import check_tokenizer
    from ..evaluation.likelihood import unigram_perplexity
    from ..training.trainer import BD3LMTrainer

    set_seed(training_args.seed)
    checkpoint = _checkpoint_to_resume(training_args)
    with training_args.main_process_first(desc="preparing the data"):
        splits = _load_splits(data_args, training_args.seed)
        tokenizer = _load_or_train_tokenizer(data_args, model_args, checkpoint, splits)
    model = _load_or_create_model(data_args, model_args, tokenizer, training_args)
    check_tokenizer(tokenizer, model.config)
    with training_args.main_process_first(desc="packing the data"):
        train_set, held_out_set = _sequences(splits, tokenizer, data_args, model.config, training_args.seed)

    trainer = BD3LMTrainer(
        model,
        training_args,
        train_dataset=train_set,
        eval_dataset=held_out_set,
        processing_class=tokenizer,
    )
    show = print if trainer.is_world_process_zero() else lambda text: None
    size = "a stream of" if data_args.streaming else f"{len(train_set):,}"
    show(
        f"{model.num_parameters():,} parameters, {model.num_parameters(only_trainable=True):,} of them trained; block "
        f"size {model.config.block_size}, vocabulary of {len(tokenizer):,} tokens\n"
        f"{size} training and {len(held_out_set):,} held-out sequences"
    )

    def score(name: str) -> dict[str, float]:
        metrics = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
        bits = f", {metrics['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in metrics else ""
        show(
            f"{name}: perplexity {metrics['perplexity']:.2f}{bits}, {metrics['nelbo']:.4f} ± "
            f"{metrics['nelbo_standard_error']:.4f} nats per token"
        )
        return metrics

    before = score("before training")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    after = score("after training")

    unigram = None
    if not data_args.streaming and data_args.examples is None:
        unigram = unigram_perplexity(train_set["input_ids"], held_out_set["input_ids"], model.config.vocab_size)
        show(f"a unigram model: perplexity {unigram:.2f}")
    metrics = {"before": before, "after": after, "unigram_perplexity": unigram, "train": result.metrics}
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("eval", {f"eval_{name}": value for name, value in after.items()})
    if trainer.is_world_process_zero():
        path = Path(training_args.output_dir, "metrics.json")
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    show(f"saved to {training_args.output_dir}")
    return metrics


def _checkpoint_to_resume(training_args) -> str | None:
    from ..training.checkpoints import check_complete, last_complete_checkpoint

    checkpoint = training_args.resume_from_checkpoint
    if checkpoint in ("last", "true", "True"):
        return last_complete_checkpoint(training_args.output_dir)
    if checkpoint is not None:
        check_complete(checkpoint)
    return checkpoint


def _load_splits(data_args: DataArguments, seed: int):
    from datasets import DatasetDict, IterableDatasetDict

    from ..data.corpora import load_corpus
    from ..data.documents import limit_bytes, load_table, split_documents

    load, options = load_corpus, given(data_args, ["corpus", *SOURCE_OPTIONS])
    if data_args.examples is not None:
        load = load_table
        options.pop("text_column", None)
    documents = load(data_args.examples or data_args.data, streaming=data_args.streaming, **options)
    if data_args.eval_data is not None:
        if data_args.eval_split is not None:
            options["split"] = data_args.eval_split
        held_out = load(data_args.eval_data, **options)
        splits = (IterableDatasetDict if data_args.streaming else DatasetDict)(train=documents)
        splits["held_out"] = held_out
    elif data_args.examples is not None:
        parts = documents.train_test_split(test_size=data_args.held_out_fraction, seed=seed)
        splits = DatasetDict(train=parts["train"], held_out=parts["test"])
    else:
        splits = split_documents(documents, data_args.held_out_fraction, seed)
    if data_args.max_bytes is not None:
        splits["train"] = limit_bytes(splits["train"], data_args.max_bytes)
    return splits


def _load_or_train_tokenizer(data_args, model_args, checkpoint, splits):
    from ..data.tokenization import load_tokenizer, train_tokenizer

    name_or_path = data_args.tokenizer or checkpoint or model_args.model
    if name_or_path:
        return load_tokenizer(name_or_path)
    if data_args.examples is not None:
        raise ValueError("--examples need the tokenizer of a trained --model, or --tokenizer")
    return train_tokenizer(splits["train"], data_args.vocab_size)


def _load_or_create_model(data_args, model_args, tokenizer, training_args):
    from ..evaluation.networks import language_model_class
    from ..modeling.configuration_bd3lm import BD3LMConfig
    from ..modeling.modeling_bd3lm import BD3LMForMaskedLM

    config_fields = model_args.config_fields()
    attention = given(model_args, ["attn_implementation"])
    if model_args.model is None:
        if data_args.length is not None:
            config_fields.setdefault("max_position_embeddings", data_args.length)
        config = BD3LMConfig(
            vocab_size=len(tokenizer),
            mask_token_id=tokenizer.mask_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config_fields,
            **attention,
        )
        return BD3LMForMaskedLM(config)
    model_class = language_model_class(model_args.model)
    # An adapted network has fields of its own.
    adjustable = [name for name in ModelArguments.ADJUSTABLE if hasattr(model_class.config_class, name)]
    fixed = sorted(config_fields.keys() - set(adjustable))
    if fixed:
        raise ValueError(
            f"--{fixed[0]} cannot change what --model={model_args.model!r} was made with; with --model the "
            f"configuration takes only {', '.join(adjustable)}"
        )
    block_size = config_fields.pop("block_size", None)
    # Small updates would be lost in weights of lower precision; below an adapter they stay as they are.
    dtype = {"dtype": "float32"} if model_args.lora_rank is None else {}
    model = model_class.from_pretrained(model_args.model, **config_fields, **attention, **dtype)
    if block_size not in (None, model.config.block_size):
        if training_args.process_index == 0:
            print(
                f"block size {model.config.block_size} -> {block_size}: no weight depends on it, and training teaches "
                "the model to predict blocks of this size (arXiv 2503.09573, Sec. 6)"
            )
        # Loading insists on the checkpoint's own, which is what generating with it needs.
        model.config.block_size = block_size
        model.config.validate()
    return model if model_args.lora_rank is None else _adapted(model, model_args)


def _adapted(model, model_args: ModelArguments):
    from ..evaluation.networks import stock_config

    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("--lora_rank needs the package peft: pip install 'bd3lm-hf[peft]'") from error

    # The mask token that an adapted network was given has an embedding to learn, too.
    is_adapted = stock_config(model.config) is not None
    config = LoraConfig(
        # What PEFT calls a model that generates text; its Auto class loads the adapter together with the base.
        task_type="CAUSAL_LM",
        r=model_args.lora_rank,
        lora_alpha=2 * model_args.lora_rank,
        target_modules="all-linear",
        use_dora=model_args.use_dora,
        trainable_token_indices=[model.config.mask_token_id] if is_adapted else None,
    )
    return get_peft_model(model, config)


def _sequences(splits, tokenizer, data_args: DataArguments, config, seed: int):
    """The training sequences and the held-out ones."""
    from ..data.documents import draw_sequences, pack_documents
    from ..data.finetuning import pack_examples, prepare_finetuning

    length = config.max_position_embeddings if data_args.length is None else data_args.length
    if data_args.examples is not None:
        train_set, held_out_set = (
            prepare_finetuning(
                splits[name],
                tokenizer,
                max_length=length,
                truncation=data_args.truncation,
                block_size=config.block_size,
            )
            for name in ("train", "held_out")
        )
        if data_args.packing:
            train_set = pack_examples(train_set, length)
        return train_set, draw_sequences(held_out_set, data_args.max_eval_sequences, seed)
    if length % config.block_size:
        raise ValueError(f"length={length} must be a multiple of block_size={config.block_size}")
    train_set = pack_documents(splits["train"], tokenizer, length)
    held_out_set = pack_documents(splits["held_out"], tokenizer, length, drop_remainder=False)
    return train_set, draw_sequences(held_out_set, data_args.max_eval_sequences, seed)
