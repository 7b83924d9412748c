"""Prompts with completions, chats and short documents -> tokenized examples and packed rows."""

import re
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .documents import column_names, map_batches


logger = logging.get_logger(__name__)

Message = dict[str, Any]

FORMATS = (
    '{"prompt": text, "completion": text}, {"messages": messages} or {"prompt": messages, "completion": messages}, '
    'where messages are a list of {"role": ..., "content": ...}'
)
TRUNCATIONS = ("error", "right", "drop")
# A batch of examples is packed by itself: a thousand leave little room unused.
BATCH_SIZE = 1000
# As Transformers recognises it.
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def prepare_finetuning(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    truncation: str = "error",
    separate_turns: bool = False,
    block_size: int | None = None,
) -> Dataset | IterableDataset:
    """
    Tokenize examples of prompts and what shall follow them, with labels for the latter alone.

    An example is one of

    - `{"prompt": text, "completion": text}`;
    - `{"messages": [{"role": ..., "content": ...}, ...]}`: a chat, rendered by the tokenizer's chat template, in which
      all turns of the assistant are predicted. A column `tools` is handed to the template;
    - `{"prompt": messages, "completion": messages}`: a chat in which the assistant's turns of the completion are
      predicted.

    Other columns are dropped. The labels of prompts are -100: the model neither masks nor predicts them.

    1. Prompt and completion are tokenized apart and joined, so that the prompt has the tokens that it has when the
       model continues it: no token reaches across the border. Special tokens spelled out in a text count as such.
    2. What of a chat is predicted is what the template marks by `{% generation %}`, if it does; then the text is
       tokenized as a whole. Otherwise each turn of the assistant goes from the end of its generation prompt to the EOS
       in it, or to its end where the template writes no EOS; it is tokenized apart.
    3. An example ends with its last predicted token, and with EOS behind it if it is no EOS, so that the model learns
       to stop. What a template writes after that is cut off: generation never gets there, and it would stand in
       the last block, visible, telling the model where the text ends.
    4. BOS stands in front, if the tokenizer has one.
    5. With `block_size`, further EOS fill the last block, predicted as well. In generation every block is full: a
       model that met only texts which end where their last block ends has not learned to stop inside of one, nor
       what stands behind the stop.

    A turn of the assistant that is not the last shares its last block with the start of the next message, which is
    visible there in training, but not in generation. `separate_turns` avoids that.

    Args:
        dataset: A table or a stream. (A stream is read, and mistakes in it are found, as it is iterated over.)
        tokenizer: With an EOS token, and for chats a chat template.
        max_length: The most tokens of an example, special ones included.
        truncation: What becomes of longer examples: `"error"` refuses them, `"right"` cuts off what is too much (also
            the EOS; what has no label left is dropped), `"drop"` leaves them out. How many were cut or dropped
            is logged.
        separate_turns: Make an example of each predicted turn of a chat, which ends there, instead of one of all.
        block_size: The model's `config.block_size`, to fill the last block; by default it is left as it is.

    Returns:
        What `dataset` is, a table or a stream, with the columns `input_ids` and `labels`, of equal length.

    Raises:
        ValueError: if the columns are those of no format or of two, an argument is none of what it takes, or (naming
            the example) a completion is empty, no turn is the assistant's, the mask token stands in a text, a chat
            template is missing or renders a chat differently as it goes on, or an example is too long.
    """
    columns = column_names(dataset)
    if ("messages" in columns) == ({"prompt", "completion"} <= set(columns)):
        raise ValueError(f"dataset must have the columns of one format, but has {columns}; the formats are {FORMATS}")
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation={truncation!r} must be one of {', '.join(map(repr, TRUNCATIONS))}")
    if max_length is None and truncation != "error":
        raise ValueError(f"truncation={truncation!r} goes with a max_length, but max_length is None")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length} must be at least 2: one token to predict, and one before it")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an EOS token for the end of a completion; `load_tokenizer` gives it one")

    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    tokenized = map_batches(
        dataset,
        _tokenize_batch,
        features,
        batch_size=BATCH_SIZE,
        desc="Tokenizing",
        with_indices=True,
        tokenizer=tokenizer,
        separate_turns=separate_turns,
        block_size=block_size or 1,
        max_length=max_length if truncation == "error" else None,
    )
    if truncation == "error":
        return tokenized
    is_stream = isinstance(dataset, IterableDataset)
    prepared = map_batches(
        tokenized,
        _truncate_batch,
        features,
        batch_size=BATCH_SIZE,
        desc="Truncating",
        max_length=max_length,
        cut=truncation == "right",
        log=is_stream,
    )
    if not is_stream:
        # Counted here, as a map that is found in `datasets`' cache does not run.
        lengths = pc.list_value_length(tokenized.with_format("arrow")[:]["input_ids"])
        num_long = pc.sum(pc.greater(lengths, max_length)).as_py() or 0
        _log_truncation(num_long, len(tokenized) - len(prepared), len(tokenized), max_length)
        if len(prepared) == 0:
            raise ValueError(f"max_length={max_length}, truncation={truncation!r} leave none of the examples")
    return prepared


def pack_examples(dataset: Dataset | IterableDataset, max_length: int) -> Dataset | IterableDataset:
    """
    Put several tokenized examples into one row, as documents that do not see each other.

    No example is split. Each batch of 1000 examples is packed by itself, the longest first, each into the first row
    with room for it; inside a row, and from row to row, they keep the order of the dataset as far as that goes.

    The losses are those that the examples have alone. Positions and blocks start anew with each document; with the
    model's `ignore_bos`, the first token of each is not predicted.

    Args:
        dataset: A table or a stream with the column `input_ids` and, unless every token is to be predicted, `labels`:
            what `prepare_finetuning` returns. Other columns are dropped.
        max_length: The most tokens of a row.

    Returns:
        What `dataset` is, a table or a stream, with the columns `input_ids`, `labels` and `document_ids` (1, 2, ... in
        each row), of equal length. `BD3LMDataCollator` makes batches of it.

    Raises:
        ValueError: if there is no `input_ids`, the dataset is packed already, or (naming the example) an example is
            empty, padded or longer than `max_length`, or its labels are of another length.
    """
    columns = column_names(dataset)
    if "input_ids" not in columns:
        raise ValueError(f"dataset must have the column 'input_ids', but has {columns}; `prepare_finetuning` makes it")
    if "document_ids" in columns:
        raise ValueError("dataset has the column 'document_ids', so it is packed already; it takes what was not")
    names = ("input_ids", "labels", "document_ids")
    return map_batches(
        dataset,
        _pack_batch,
        Features({name: List(Value("int32")) for name in names}),
        batch_size=BATCH_SIZE,
        desc="Packing",
        with_indices=True,
        max_length=max_length,
    )


def _tokenize_batch(batch, indices, tokenizer, separate_turns, block_size, max_length):
    examples = []
    for index, *values in zip(indices, *batch.values(), strict=True):
        try:
            for ids, predicted in _tokenize_example(dict(zip(batch, values)), tokenizer, separate_turns):
                ids, predicted = _finish(ids, predicted, tokenizer, block_size)
                if max_length is not None and len(ids) > max_length:
                    raise ValueError(
                        f"{len(ids)} tokens are more than max_length={max_length}; truncation='right' cuts such "
                        "examples, 'drop' leaves them out"
                    )
                examples.append((ids, [i if is_predicted else -100 for i, is_predicted in zip(ids, predicted)]))
        except ValueError as error:
            raise ValueError(f"example {index} of the dataset: {error}") from error
    return {"input_ids": [ids for ids, _ in examples], "labels": [labels for _, labels in examples]}


def _tokenize_example(example, tokenizer, separate_turns) -> list[tuple[list[int], list[bool]]]:
    """Of each example that is made of this one, the tokens of its texts, and whether they are predicted."""
    if "messages" in example:
        messages, num_given = _messages(example, "messages"), 0
    elif isinstance(example["prompt"], str) and isinstance(example["completion"], str):
        if not example["completion"]:
            raise ValueError("the completion is empty")
        segments = [(example["prompt"], False), (example["completion"], True)]
        return [_tokenize_segments(segments, tokenizer)]
    else:
        prompt = _messages(example, "prompt")
        messages, num_given = prompt + _messages(example, "completion"), len(prompt)

    turns = [i for i, message in enumerate(messages) if i >= num_given and message["role"] == "assistant"]
    if not turns:
        raise ValueError(
            f"there is nothing to predict: no turn is the assistant's; the roles are {[m['role'] for m in messages]}"
        )
    for turn in turns:
        if not any(value for key, value in messages[turn].items() if key != "role"):
            raise ValueError(f"message {turn} is empty, a completion without content")
    if tokenizer.chat_template is None:
        raise ValueError("messages need a chat template, but tokenizer.chat_template is None")
    tools = example.get("tools")
    has_marks = GENERATION_MARK.search(tokenizer.get_chat_template(tools=tools))
    tokenize_chat = _tokenize_by_marks if has_marks else _tokenize_by_prefixes
    chats = [(messages[: turn + 1], turn) for turn in turns] if separate_turns else [(messages, num_given)]
    return [tokenize_chat(chat, num_given, tokenizer, tools) for chat, num_given in chats]


def _messages(example: dict[str, Any], column: str) -> list[Message]:
    messages = example[column]
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and "role" in m for m in messages)
    ):
        raise ValueError(f"{column}={messages!r} is of no format; the formats are {FORMATS}")
    return messages


def _tokenize_by_marks(messages, num_given, tokenizer, tools) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and whether they are predicted: what is marked, but for the first `num_given` messages."""

    def tokenize(messages):
        encoded = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return encoded["input_ids"], encoded["assistant_masks"]

    ids, marks = tokenize(messages)
    marked = [column for column, mark in enumerate(marks) if mark]
    if any(message["role"] == "assistant" for message in messages[:num_given]):
        given = [token for token, mark in zip(*tokenize(messages[:num_given])) if mark]
        if [ids[column] for column in marked[: len(given)]] != given:
            raise ValueError(
                f"the chat template renders an answer before message {num_given} differently once the chat goes on, "
                "so what is given cannot be told from what is predicted"
            )
        marked = marked[len(given) :]
    marked = set(marked)
    return ids, [column in marked for column in range(len(ids))]


def _tokenize_by_prefixes(messages, num_given, tokenizer, tools) -> tuple[list[int], list[bool]]:
    """The same for a template without marks: what follows a generation prompt is predicted."""

    def render(num_messages: int, **kwargs) -> str:
        return tokenizer.apply_chat_template(messages[:num_messages], tools=tools, tokenize=False, **kwargs)

    segments, text = [], ""
    for turn in (i for i, message in enumerate(messages) if i >= num_given and message["role"] == "assistant"):
        if turn == 0:
            raise ValueError("message 0 is the assistant's: without one before it, there is no prompt")
        prompt, answered = render(turn, add_generation_prompt=True), render(turn + 1)
        if not (prompt.startswith(text) and answered.startswith(prompt)):
            raise ValueError(
                f"the chat template renders what comes before the answer in message {turn} differently once the chat "
                "goes on, so the answers cannot be told apart; it takes a template that marks them by "
                "{% generation %}, or separate_turns=True"
            )
        segments += [(prompt[len(text) :], False), (answered[len(prompt) :], True)]
        text = answered
    return _tokenize_segments(segments, tokenizer)


def _tokenize_segments(segments, tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of texts that are tokenized apart; of a predicted one, what comes after its EOS is not predicted."""
    ids, predicted = [], []
    for text, is_predicted in segments:
        segment = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        end = len(segment)
        if is_predicted and tokenizer.eos_token_id in segment:
            end -= segment[::-1].index(tokenizer.eos_token_id)
        ids += segment
        predicted += [is_predicted] * end + [False] * (len(segment) - end)
    return ids, predicted


def _finish(ids, predicted, tokenizer, block_size) -> tuple[list[int], list[bool]]:
    """BOS in front, and behind the last predicted token EOS, one at least, up to the end of the block."""
    bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id in ids:
        raise ValueError(f"the mask token {tokenizer.mask_token!r} stands in the text, which must not hold it")
    if True not in predicted:
        raise ValueError("there is nothing to predict: the completion has no token")
    length = len(predicted) - predicted[::-1].index(True)
    ids, predicted = ids[:length], predicted[:length]
    if ids[-1] != eos_token_id:
        ids, predicted = [*ids, eos_token_id], [*predicted, True]
    if bos_token_id is not None and (predicted[0] or ids[0] != bos_token_id):
        ids, predicted = [bos_token_id, *ids], [False, *predicted]
    if predicted[0]:
        raise ValueError("the prompt is empty, and the tokenizer has no BOS token to start from")
    missing = -len(ids) % block_size
    return ids + [eos_token_id] * missing, predicted + [True] * missing


def _truncate_batch(batch, max_length, cut, log):
    examples = list(zip(batch["input_ids"], batch["labels"], strict=True))
    if cut:
        kept = [(ids[:max_length], labels[:max_length]) for ids, labels in examples]
        kept = [(ids, labels) for ids, labels in kept if any(label != -100 for label in labels)]
    else:
        kept = [(ids, labels) for ids, labels in examples if len(ids) <= max_length]
    if log:
        num_long = sum(len(ids) > max_length for ids, _ in examples)
        _log_truncation(num_long, len(examples) - len(kept), len(examples), max_length)
    return {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}


def _log_truncation(num_long: int, num_dropped: int, num_examples: int, max_length: int) -> None:
    if num_long:
        logger.warning(
            f"{num_long} of {num_examples} examples are longer than max_length={max_length}: "
            f"{num_long - num_dropped} are cut, {num_dropped} dropped."
        )


def _pack_batch(batch, indices, max_length):
    examples = list(zip(indices, batch["input_ids"], batch.get("labels", batch["input_ids"]), strict=True))
    for index, mask in zip(indices, batch.get("attention_mask", [])):
        if 0 in mask:
            raise ValueError(f"example {index} of the dataset is padded: its attention_mask has zeros; it takes ones")
    for index, ids, labels in examples:
        if not 0 < len(ids) <= max_length:
            raise ValueError(
                f"example {index} of the dataset has {len(ids)} tokens; with max_length={max_length} it takes 1 to "
                f"{max_length}"
            )
        if len(labels) != len(ids):
            raise ValueError(
                f"example {index} of the dataset has {len(labels)} labels for {len(ids)} input_ids; it takes as many"
            )
    rows, room = [], []
    for number in sorted(range(len(examples)), key=lambda number: -len(examples[number][1])):
        length = len(examples[number][1])
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(number)
        room[row] -= length
    packed = {"input_ids": [], "labels": [], "document_ids": []}
    for row in sorted(sorted(row) for row in rows):
        packed["input_ids"].append([token for number in row for token in examples[number][1]])
        packed["labels"].append([label for number in row for label in examples[number][2]])
        packed["document_ids"].append(
            [document for document, number in enumerate(row, start=1) for _ in examples[number][1]]
        )
    return packed
