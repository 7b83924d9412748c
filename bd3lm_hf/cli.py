"""The command `bd3lm`."""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


DESCRIPTION = """\
Block diffusion language models: train, evaluate, sample and convert them.

  bd3lm demo       train a small model on the Python standard library and watch it write (5 minutes on 2 CPU cores)
  bd3lm train      train a model on a text file, a folder, a Hub dataset or the built-in corpus
  bd3lm evaluate   perplexity and bits per byte of a text under a model
  bd3lm generate   continue prompts
  bd3lm convert    bring a published checkpoint, or one of the published training code, into this package's format

`bd3lm COMMAND --help` explains a command, with examples."""

# Where `bd3lm train` differs from `TrainingArguments`; the learning rate is the BD3-LM paper's.
TRAINING_DEFAULTS = {
    "output_dir": "bd3lm-trained",
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "logging_steps": 50,
    "save_total_limit": 2,
    "seed": 0,
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines; a default is shown where there is one."""

    def _get_help_string(self, action):
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "%(default)" in text:
            return text
        return f"{text} (default: %(default)s)"


# Arguments of `load_documents`, which owns their defaults.
SOURCE_OPTIONS = ("split", "text_column", "dataset_config")


@dataclass
class DataArguments:
    _argument_group_name = "data"

    data: str = field(
        metadata={
            "help": "What to train on: a text file, a folder of them (.txt, .md, .rst, .py), a table (.jsonl, .json, "
            ".csv, .parquet), the id of a dataset on the Hub, or `builtin`: the Python standard library's own source."
        }
    )
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Held-out text, given like --data. Without it a part of --data is held out."},
    )
    held_out_fraction: float = field(
        default=0.1, metadata={"help": "The share of --data's documents to hold out, if there is no --eval_data."}
    )
    max_bytes: int | None = field(
        default=None, metadata={"help": "Train on at most this many bytes of text (drawn document by document)."}
    )
    max_eval_sequences: int = field(
        default=256, metadata={"help": "Evaluate on at most this many held-out sequences, drawn at random."}
    )
    num_draws: int | None = field(
        default=None, metadata={"help": "Draws of the noise that a likelihood is averaged over. (default: 4)"}
    )
    split: str | None = field(
        default=None, metadata={"help": "The split of a Hub dataset, e.g. 'train[:10%%]'. (default: train)"}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "The configuration of a Hub dataset that has several."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "The column of a Hub dataset or table that holds the text. (default: text)"}
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


def _config_field(help_text: str):
    """A field of `BD3LMConfig`, which owns the default; `train_arguments` puts it into the help."""
    return field(default=None, metadata={"help": help_text})


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model: str | None = field(
        default=None,
        metadata={"help": "Continue from this checkpoint (folder or Hub id). Without it a new model is trained."},
    )
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
    noise_schedule: str | None = _config_field("loglinear, square, square_root, log or cosine.")
    noise_interval: list[float] | None = _config_field("Two numbers: the interval of t that training draws from.")
    hidden_dropout: float | None = _config_field("Dropout probability.")
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flex_attention or flash_attention_2. (default: Transformers')"}
    )

    # What a checkpoint's weights do not depend on, so that training may go on with another value.
    ADJUSTABLE = ("block_size", "noise_schedule", "noise_interval", "hidden_dropout")

    def config_fields(self) -> dict:
        """The fields of `BD3LMConfig` that were given."""
        others = ("model", "attn_implementation")
        return {name: value for name, value in asdict(self).items() if value is not None and name not in others}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for mistakes in what was asked for, told in one line on stderr."""
    parser = argparse.ArgumentParser(prog="bd3lm", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("bd3lm-hf"))
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own arguments")
    args = parser.parse_args(argv)
    show_traceback = "--traceback" in args.arguments
    arguments = [argument for argument in args.arguments if argument != "--traceback"]
    try:
        return COMMANDS[args.command](arguments) or 0
    except (ValueError, OSError) as error:
        if show_traceback:
            raise
        print(f"bd3lm {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser(command: str, description: str, parser_class: Callable = argparse.ArgumentParser, **kwargs):
    parser = parser_class(
        prog=f"bd3lm {command}", description=description, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs
    )
    # `main` reads it; it stands here for the help.
    parser.add_argument("--traceback", action="store_true", help="Show where an error was raised.")
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of a checkpoint.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of a tokenizer. (default: the one beside the model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the accelerator, if there is one)")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="Type of the weights."
    )
    parser.add_argument(
        "--attn_implementation", help="eager, sdpa, flex_attention or flash_attention_2. (default: Transformers')"
    )


def _load(args: argparse.Namespace):
    """The model that the arguments name, in evaluation mode on its device, and its tokenizer."""
    import torch

    from .data import check_tokenizer, load_tokenizer
    from .modeling.modeling_bd3lm import BD3LMForMaskedLM

    tokenizer = load_tokenizer(args.tokenizer or args.model)
    model = BD3LMForMaskedLM.from_pretrained(
        args.model, dtype=args.dtype, **_given(args, ["attn_implementation"])
    ).eval()
    check_tokenizer(tokenizer, model.config)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model.to(args.device or accelerator or "cpu"), tokenizer


def _given(args, names: Sequence[str]) -> dict:
    """The arguments that were given; the defaults of the others belong to whom they are passed to."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


TRAIN_DESCRIPTION = """\
Train a block diffusion language model with transformers.Trainer.

Held-out text is scored before and after training. The output folder holds the model (with the code that loads it
where this package is not installed), its tokenizer, `metrics.json`, and what Trainer writes.

examples:
  bd3lm train --data builtin --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4 \\
      --block_size 4 --length 256 --max_steps 500
  bd3lm train --data corpus.txt --tokenizer gpt2 --block_size 16 --length 1024 --bf16 --output_dir my-model
  bd3lm train --data Salesforce/wikitext --dataset_config wikitext-103-raw-v1 --vocab_size 16384 --num_train_epochs 2
  bd3lm train --data corpus.txt --model my-model --block_size 4            fine-tune to a smaller block
  bd3lm train ... --output_dir my-model --resume_from_checkpoint last      go on after an interruption

Every argument of transformers.TrainingArguments is accepted."""


def train(argv: Sequence[str]) -> None:
    """`bd3lm train`."""
    train_model(*train_arguments(argv))


def train_arguments(argv: Sequence[str]) -> tuple:
    """What the flags of `bd3lm train` say: `DataArguments`, `ModelArguments` and `transformers.TrainingArguments`."""
    import torch
    from transformers import HfArgumentParser, TrainingArguments

    from .modeling.configuration_bd3lm import BD3LMConfig

    parser = _parser(
        "train",
        TRAIN_DESCRIPTION,
        parser_class=HfArgumentParser,
        dataclass_types=[DataArguments, ModelArguments, TrainingArguments],
        usage="bd3lm train --data DATA [...]",
    )
    for name in (item.name for item in fields(ModelArguments) if hasattr(BD3LMConfig, item.name)):
        action = parser._option_string_actions[f"--{name}"]
        if "default" not in action.help:
            action.help += f" (default: {getattr(BD3LMConfig, name)})"
    # HfArgumentParser lists the hundred flags of TrainingArguments first; they are what a reader needs last.
    parser._optionals.title = "options, and the arguments of transformers.TrainingArguments"
    parser._action_groups.sort(key=lambda group: group is parser._optionals)
    on_gpu = torch.cuda.is_available()
    parser.set_defaults(
        **TRAINING_DEFAULTS, bf16=on_gpu and torch.cuda.is_bf16_supported(), dataloader_pin_memory=on_gpu
    )
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[:3]


def train_model(data_args: DataArguments, model_args: ModelArguments, training_args) -> dict:
    """
    Train as `bd3lm train` does: corpus, tokenizer, model, likelihood, training, likelihood, saving.

    Args:
        training_args: `transformers.TrainingArguments`.

    Returns:
        What `metrics.json` holds: `before` and `after` (likelihood of the held-out text, see `Likelihood`),
        `unigram_perplexity` of the same text, and Trainer's `train` metrics.

    Raises:
        ValueError: if the arguments do not go together, or the corpus or tokenizer cannot be used.
    """
    from transformers import Trainer, set_seed

    from .data import PackedSequenceCollator, check_tokenizer
    from .evaluation import evaluate_likelihood, unigram_perplexity

    set_seed(training_args.seed)
    checkpoint = _checkpoint_to_resume(training_args)
    with training_args.main_process_first(desc="preparing the data"):
        splits = _load_splits(data_args, training_args.seed)
        tokenizer = _load_or_train_tokenizer(data_args, model_args, checkpoint, splits["train"])
    model = _load_or_create_model(data_args, model_args, tokenizer)
    check_tokenizer(tokenizer, model.config)
    with training_args.main_process_first(desc="packing the data"):
        train_set, held_out_set = _pack(splits, tokenizer, data_args, model.config, training_args.seed)

    is_main = training_args.process_index == 0
    if is_main:
        print(
            f"{model.num_parameters():,} parameters, block size {model.config.block_size}, "
            f"vocabulary of {len(tokenizer):,} tokens\n{len(train_set):,} training and {len(held_out_set):,} "
            f"held-out sequences of {len(train_set[0]['input_ids'])} tokens"
        )

    def score(name):
        likelihood = evaluate_likelihood(
            model.to(training_args.device),
            held_out_set["input_ids"],
            batch_size=training_args.per_device_eval_batch_size,
            seed=training_args.seed,
            num_bytes=sum(held_out_set["num_bytes"]),
            progress=is_main,
            **_given(data_args, ["num_draws"]),
        )
        if is_main:
            print(f"{name}: {likelihood}")
        return likelihood

    before = score("before training")
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_set,
        eval_dataset=held_out_set,
        processing_class=tokenizer,
        data_collator=PackedSequenceCollator(tokenizer.pad_token_id, model.config.ignore_bos),
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    after = score("after training")

    metrics = {
        "before": json.loads(before.to_json()),
        "after": json.loads(after.to_json()),
        "unigram_perplexity": unigram_perplexity(
            train_set["input_ids"], held_out_set["input_ids"], model.config.vocab_size
        ),
        "train": result.metrics,
    }
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("eval", {f"eval_{name}": value for name, value in metrics["after"].items()})
    if is_main:
        print(f"a unigram model: perplexity {metrics['unigram_perplexity']:.2f}")
        path = Path(training_args.output_dir, "metrics.json")
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        print(f"saved to {training_args.output_dir}")
    return metrics


def _checkpoint_to_resume(training_args) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = training_args.resume_from_checkpoint
    if checkpoint in ("last", "true", "True"):
        folder = Path(training_args.output_dir)
        checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
        if checkpoint is None:
            raise ValueError(
                f"resume_from_checkpoint={training_args.resume_from_checkpoint!r}: there is no checkpoint in "
                f"output_dir={training_args.output_dir!r}"
            )
    elif checkpoint is not None and not Path(checkpoint).is_dir():
        raise ValueError(f"resume_from_checkpoint={checkpoint!r} is no folder; it takes a checkpoint folder or `last`")
    return checkpoint


def _load_splits(data_args: DataArguments, seed: int):
    from datasets import DatasetDict

    from .data import limit_bytes, load_documents, split_documents

    options = _given(data_args, SOURCE_OPTIONS)
    documents = load_documents(data_args.data, **options)
    if data_args.eval_data is None:
        splits = split_documents(documents, data_args.held_out_fraction, seed)
    else:
        splits = DatasetDict(train=documents, held_out=load_documents(data_args.eval_data, **options))
    if data_args.max_bytes is not None:
        splits["train"] = limit_bytes(splits["train"], data_args.max_bytes)
    return splits


def _load_or_train_tokenizer(data_args, model_args, checkpoint, documents):
    from .data import load_tokenizer, train_tokenizer

    name_or_path = data_args.tokenizer or checkpoint or model_args.model
    return load_tokenizer(name_or_path) if name_or_path else train_tokenizer(documents, data_args.vocab_size)


def _load_or_create_model(data_args, model_args, tokenizer):
    from .modeling.configuration_bd3lm import BD3LMConfig
    from .modeling.modeling_bd3lm import BD3LMForMaskedLM

    config_fields = model_args.config_fields()
    attention = _given(model_args, ["attn_implementation"])
    if model_args.model is not None:
        fixed = sorted(config_fields.keys() - set(ModelArguments.ADJUSTABLE))
        if fixed:
            raise ValueError(
                f"--{fixed[0]} cannot change what --model={model_args.model!r} was made with; with --model the "
                f"configuration takes only {', '.join(ModelArguments.ADJUSTABLE)}"
            )
        block_size = config_fields.pop("block_size", None)
        model = BD3LMForMaskedLM.from_pretrained(model_args.model, **config_fields, **attention)
        if block_size is not None:
            # Loading insists on the checkpoint's own, which is what generating with it needs.
            model.config.block_size = block_size
            model.config.validate()
        return model
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


def _pack(splits, tokenizer, data_args, config, seed):
    """The training sequences and the held-out ones."""
    from .data import draw_sequences, pack_documents

    length = config.max_position_embeddings if data_args.length is None else data_args.length
    if length % config.block_size:
        raise ValueError(f"length={length} must be a multiple of block_size={config.block_size}")
    train_set = pack_documents(splits["train"], tokenizer, length)
    held_out_set = pack_documents(splits["held_out"], tokenizer, length, drop_remainder=False)
    return train_set, draw_sequences(held_out_set, data_args.max_eval_sequences, seed)


EVALUATE_DESCRIPTION = """\
Perplexity and bits per byte of a text under a model.

The text is cut into sequences of --length tokens; every token but the BOS in front of each is predicted. At block
size 1 the figures are exact, otherwise an upper bound, estimated with --num_draws draws of the noise.

examples:
  bd3lm evaluate bd3lm-demo --data corpus.txt --json likelihood.json
  bd3lm evaluate my-model --data Salesforce/wikitext --dataset_config wikitext-103-raw-v1 --split test
  bd3lm evaluate kuleshov-group/bd3lm-owt-block_size4 --tokenizer gpt2 --data corpus.txt --num_draws 16"""


def evaluate(argv: Sequence[str]) -> None:
    """`bd3lm evaluate`."""
    from .data import draw_sequences, load_documents, pack_documents
    from .evaluation import evaluate_likelihood

    help_texts = {item.name: item.metadata["help"] for item in fields(DataArguments)}
    parser = _parser("evaluate", EVALUATE_DESCRIPTION)
    _add_model_arguments(parser)
    parser.add_argument("--data", required=True, help=help_texts["data"].replace("train on", "score"))
    for name in SOURCE_OPTIONS:
        parser.add_argument(f"--{name}", help=help_texts[name])
    parser.add_argument("--length", type=int, help="Tokens per sequence. (default: the model's context)")
    parser.add_argument("--max_eval_sequences", type=int, help="Score this many sequences. (default: all)")
    parser.add_argument("--num_draws", type=int, help=help_texts["num_draws"])
    parser.add_argument("--batch_size", type=int, help="Sequences per forward pass. (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise, and of drawing sequences.")
    parser.add_argument("--json", metavar="FILE", help="Write the figures to this file as well.")
    args = parser.parse_args(argv)

    model, tokenizer = _load(args)
    documents = load_documents(args.data, **_given(args, SOURCE_OPTIONS))
    length = model.config.max_position_embeddings if args.length is None else args.length
    sequences = pack_documents(documents, tokenizer, length, drop_remainder=False)
    if args.max_eval_sequences is not None:
        sequences = draw_sequences(sequences, args.max_eval_sequences, args.seed)
    likelihood = evaluate_likelihood(
        model,
        sequences["input_ids"],
        seed=args.seed,
        num_bytes=sum(sequences["num_bytes"]),
        **_given(args, ["batch_size", "num_draws"]),
    )
    print(likelihood)
    if args.json:
        likelihood.to_json(args.json)


GENERATE_DESCRIPTION = """\
Continue prompts, block by block.

Prompts come from the command line, or one per line from stdin; without any, the model starts from nothing. A single
prompt in a terminal is shown as it is denoised.

examples:
  bd3lm generate bd3lm-demo "def main():"
  bd3lm generate bd3lm-demo "import os" --max_new_tokens 100 --temperature 0.8 --top_p 0.9 --seed 1
  bd3lm generate bd3lm-demo --sampler confidence --confidence_threshold 0.9 "class Parser:"
  bd3lm generate bd3lm-demo --json < prompts.txt > texts.jsonl"""

# Arguments of `generate` that are passed on as they are; the model's generation configuration owns their defaults.
GENERATION_ARGUMENTS = {
    "temperature": (float, "Divides the logits; below 1 the model takes fewer risks."),
    "top_k": (int, "Sample from the k likeliest tokens."),
    "top_p": (float, "Sample from the likeliest tokens that have this probability together."),
    "min_p": (float, "Sample from tokens at least this likely, relative to the likeliest."),
    "repetition_penalty": (float, "Above 1, tokens that occurred become less likely."),
    "no_repeat_ngram_size": (int, "Avoid a token that would repeat a sequence of this many, as far as it is known."),
    "num_return_sequences": (int, "Texts per prompt."),
    "sampler": (str, "Which tokens a step reveals: first_hitting or confidence."),
    "denoising_steps": (int, "Steps per block of the confidence sampler."),
    "confidence_threshold": (float, "Reveal every token that is at least this probable (confidence sampler)."),
    "entropy_stop_threshold": (float, "End a text whose last tokens have less entropy than this, in nats."),
    "entropy_stop_window": (int, "How many last tokens --entropy_stop_threshold looks at."),
}


def generate(argv: Sequence[str]) -> None:
    """`bd3lm generate`."""
    parser = _parser("generate", GENERATE_DESCRIPTION)
    _add_model_arguments(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="Texts to continue. (default: lines of stdin)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Tokens to write.")
    parser.add_argument(
        "--do_sample", action=argparse.BooleanOptionalAction, help="Sample tokens, or take the likeliest."
    )
    for name, (value_type, help_text) in GENERATION_ARGUMENTS.items():
        parser.add_argument(f"--{name}", type=value_type, help=help_text)
    parser.add_argument("--batch_size", type=int, default=16, help="Prompts continued at once.")
    parser.add_argument("--seed", type=int, help="Repeats a run exactly.")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="Show the text as it is denoised. (default: for a single text in a terminal)",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object per text: prompt and text.")
    args = parser.parse_intermixed_args(argv)

    from_stdin = not args.prompts and not sys.stdin.isatty()
    prompts = (sys.stdin.read().splitlines() if from_stdin else args.prompts) or [""]
    single = len(prompts) == 1 and args.num_return_sequences in (None, 1) and not args.json
    if args.stream and not single:
        raise ValueError(f"stream takes a single text without --json; it got {len(prompts)} prompts")
    stream = args.stream if args.stream is not None else single and sys.stdout.isatty()
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} must be at least 1")

    from tqdm.auto import tqdm
    from transformers import TextDiffusionStreamer, set_seed

    from .data import encode_prompts

    model, tokenizer = _load(args)
    if args.seed is not None:
        set_seed(args.seed)
    options = _given(args, ["max_new_tokens", "do_sample", *GENERATION_ARGUMENTS])
    starts = range(0, len(prompts), args.batch_size)
    for start in tqdm(starts, desc="Generating", unit=" batches", disable=len(starts) < 2):
        batch = prompts[start : start + args.batch_size]
        streamer = TextDiffusionStreamer(tokenizer, skip_special_tokens=True) if stream else None
        inputs = encode_prompts(batch, tokenizer).to(model.device)
        sequences = model.generate(**inputs, streamer=streamer, **options)
        if stream:
            continue
        texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
        texts_per_prompt = len(texts) // len(batch)
        for index, text in enumerate(texts):
            prompt = batch[index // texts_per_prompt]
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) if args.json else text)


CONVERT_DESCRIPTION = """\
Bring a checkpoint into this package's format, with the code that loads it where this package is not installed.

SOURCE is a published checkpoint (folder or Hub id) or a Lightning .ckpt of the published training code.

examples:
  bd3lm convert kuleshov-group/bd3lm-owt-block_size4 bd3lm-block4 --tokenizer gpt2
  bd3lm convert last.ckpt my-model --no-ema"""


def convert(argv: Sequence[str]) -> None:
    """`bd3lm convert`."""
    parser = _parser("convert", CONVERT_DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", help="A published checkpoint, or a .ckpt file.")
    parser.add_argument("destination", metavar="DEST", help="The folder to write.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of a tokenizer to save with it, mask token added.")
    parser.add_argument(
        "--ema",
        dest="use_ema",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="Of a .ckpt, take the moving average of the weights rather than the weights.",
    )
    sizes = ("num_attention_heads", "block_size", "max_position_embeddings", "mask_token_id")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, help="Of a .ckpt that does not say it.")
    args = parser.parse_args(argv)

    from .conversion import convert_checkpoint

    convert_checkpoint(
        args.source, args.destination, tokenizer=args.tokenizer, use_ema=args.use_ema, **_given(args, sizes)
    )
    print(f"saved to {args.destination}")


def demo(argv: Sequence[str]) -> int:
    """`bd3lm demo`."""
    parser = _parser("demo", "Train a small block diffusion model on the Python standard library, and watch it write.")
    parser.add_argument("--output_dir", default="bd3lm-demo", help="Where the model is saved.")
    args, training_flags = parser.parse_known_args(argv)

    from .demo import run_demo

    return run_demo(args.output_dir, training_flags)


COMMANDS = {"demo": demo, "train": train, "evaluate": evaluate, "generate": generate, "convert": convert}


if __name__ == "__main__":
    sys.exit(main())
