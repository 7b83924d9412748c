"""Completions are learned and prompts are not, whatever the format; packed examples are as if each were alone."""

import copy
import logging

import pytest
import torch
from conftest import random_model
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import Trainer, TrainingArguments

from bd3lm_hf import BD3LMDataCollator, prepare_finetuning, train_tokenizer
from bd3lm_hf.data import finetuning
from bd3lm_hf.data.finetuning import pack_examples
from bd3lm_hf.data.tokenization import encode_prompts


# ChatML, as it marks the answers, and as it does without.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# One that writes no EOS and names nobody.
PLAIN = "{% for message in messages %}{{ '> ' + message['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '> ' }}{% endif %}"
)
# One that shows the thoughts of the last answer only.
FORGETFUL_MARKED = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if loop.last %}{{ '<think></think>' }}{% endif %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORGETFUL = FORGETFUL_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

PAIRS = [
    {"prompt": "What is 2 + 2?", "completion": " Four, I am told."},
    {"prompt": "", "completion": "Without a prompt"},
    {"prompt": "Größe in µm: ", "completion": "3"},
    {"prompt": "A long prompt " * 5, "completion": "and its end"},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four, or so I am told."},
]


@pytest.fixture(scope="module")
def trained_tokenizer():
    texts = [pair["prompt"] + pair["completion"] for pair in PAIRS] + [message["content"] for message in CHAT]
    return train_tokenizer(Dataset.from_dict({"text": texts}), vocab_size=300)


@pytest.fixture
def tokenizer(trained_tokenizer):
    """A tokenizer of its own for each test."""
    return copy.deepcopy(trained_tokenizer)


@pytest.fixture
def chat_tokenizer(tokenizer):
    """With the special tokens of ChatML, whose turns end with EOS."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = MARKED
    return tokenizer


def pairs(rows=PAIRS):
    return Dataset.from_list(rows)


def chats(*chats):
    return Dataset.from_list([{"messages": chat} for chat in chats])


def predicted_texts(example, tokenizer):
    """The text of each run of labels; what lies between is not predicted."""
    runs, previous = [], -100
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            runs[-1:] = [[*runs[-1], label]] if previous != -100 else [*runs[-1:], [label]]
        previous = label
    return [tokenizer.decode(run) for run in runs]


def model_for(tokenizer, **overrides):
    return random_model(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, **overrides)


# Prompts and completions


def test_prompt_and_completion_are_whole_and_only_the_completion_is_predicted(tokenizer):
    for pair, example in zip(PAIRS, prepare_finetuning(pairs(), tokenizer), strict=True):
        expected = tokenizer.bos_token + pair["prompt"] + pair["completion"] + tokenizer.eos_token
        assert tokenizer.decode(example["input_ids"]) == expected
        assert predicted_texts(example, tokenizer) == [pair["completion"] + tokenizer.eos_token]


def test_a_prompt_has_the_tokens_that_the_model_is_prompted_with(tokenizer):
    # Tokenized as a whole, letters on both sides of the border make one token.
    pair = {"prompt": "A long pro", "completion": "mpt and its end"}
    (example,) = prepare_finetuning(pairs([pair]), tokenizer)
    (prompted,) = encode_prompts([pair["prompt"]], tokenizer)["input_ids"].tolist()
    whole = tokenizer(pair["prompt"] + pair["completion"])["input_ids"]
    assert whole[: len(prompted)] != prompted
    assert example["input_ids"][: len(prompted)] == prompted
    assert example["labels"][: len(prompted) + 1].count(-100) == len(prompted)


def test_a_completion_that_ends_with_eos_gets_no_other(tokenizer):
    rows = [{"prompt": "a", "completion": "b" + end} for end in ("", tokenizer.eos_token)]
    first, second = prepare_finetuning(pairs(rows), tokenizer)
    assert first == second
    assert first["labels"].count(tokenizer.eos_token_id) == 1


def test_a_prompt_that_starts_with_bos_gets_no_other(tokenizer):
    rows = [{"prompt": start + "a", "completion": "b"} for start in ("", tokenizer.bos_token)]
    first, second = prepare_finetuning(pairs(rows), tokenizer)
    assert first == second
    assert first["input_ids"].count(tokenizer.bos_token_id) == 1


def test_no_bos_is_made_up(tokenizer):
    tokenizer.bos_token = None
    (example,) = prepare_finetuning(pairs(PAIRS[:1]), tokenizer)
    assert tokenizer.decode(example["input_ids"]) == "What is 2 + 2? Four, I am told." + tokenizer.eos_token


def test_other_columns_are_dropped(tokenizer):
    rows = [{**PAIRS[0], "source": "somewhere", "score": 1.5}]
    assert list(prepare_finetuning(pairs(rows), tokenizer)) == list(prepare_finetuning(pairs(PAIRS[:1]), tokenizer))


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_eos_fills_the_last_block_and_is_predicted(tokenizer, block_size):
    filled = prepare_finetuning(pairs(), tokenizer, block_size=block_size)
    for example, expected in zip(filled, prepare_finetuning(pairs(), tokenizer), strict=True):
        missing = len(example["input_ids"]) - len(expected["input_ids"])
        assert len(example["input_ids"]) % block_size == 0 <= missing < block_size
        for name in ("input_ids", "labels"):
            assert example[name] == expected[name] + [tokenizer.eos_token_id] * missing


@pytest.mark.parametrize("max_length", [None, 64])
@torch.no_grad()
def test_prompt_tokens_are_never_masked_and_carry_no_loss(tokenizer, max_length, recorded_draws):
    examples = prepare_finetuning(pairs(), tokenizer)
    batch = BD3LMDataCollator(tokenizer.pad_token_id)(
        list(examples if max_length is None else pack_examples(examples, max_length))
    )
    is_completion = batch["labels"] != -100
    assert is_completion.sum() == sum(len([i for i in row if i != -100]) for row in examples["labels"])
    model = model_for(tokenizer, max_position_embeddings=128).train()
    ever_masked = torch.zeros_like(is_completion)
    torch.manual_seed(0)
    for _ in range(40):
        output = model(**batch)
        x_t = recorded_draws[-1][2]
        assert torch.equal(x_t[~is_completion], batch["input_ids"][~is_completion])
        assert (output.token_nelbo[~is_completion] == 0).all()
        assert output.loss.item() == pytest.approx((output.token_nelbo.sum() / is_completion.sum()).item(), rel=1e-5)
        ever_masked |= x_t == tokenizer.mask_token_id
    assert torch.equal(ever_masked, is_completion)


def test_prompts_are_read_though_they_are_not_predicted(tokenizer, chosen_draws):
    rows = [{"prompt": prompt, "completion": " Four"} for prompt in ("XY", "YX")]
    batch = BD3LMDataCollator(tokenizer.pad_token_id)(list(prepare_finetuning(pairs(rows), tokenizer)))
    assert "attention_mask" not in batch
    chosen_draws(torch.full(batch["labels"].shape, 0.5), torch.ones_like(batch["labels"], dtype=torch.bool))
    nelbo = model_for(tokenizer)(**batch).token_nelbo
    predicted = batch["labels"][0] != -100
    assert (nelbo[0] - nelbo[1]).abs()[predicted].min() > 1e-3


# Chats


def test_templates_with_and_without_marks_give_the_same(chat_tokenizer):
    # Chats of one turn and of two, with and without a system message.
    dataset = chats(CHAT, CHAT[:3], CHAT[1:3], CHAT[3:])
    marked = list(prepare_finetuning(dataset, chat_tokenizer))
    chat_tokenizer.chat_template = UNMARKED
    assert list(prepare_finetuning(dataset, chat_tokenizer)) == marked


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_all_turns_of_the_assistant_are_predicted_and_nothing_else(chat_tokenizer, template):
    chat_tokenizer.chat_template = template
    (example,) = prepare_finetuning(chats(CHAT), chat_tokenizer)
    assert predicted_texts(example, chat_tokenizer) == ["Yes.<|im_end|>", "Four, or so I am told.<|im_end|>"]
    rendered = chat_tokenizer.apply_chat_template(CHAT, tokenize=False)
    # BOS, which the template does not write, and without the line break that it writes after the last EOS.
    assert chat_tokenizer.decode(example["input_ids"]) == chat_tokenizer.bos_token + rendered.removesuffix("\n")


def test_the_prompt_of_a_chat_is_what_the_model_is_prompted_with(chat_tokenizer):
    (example,) = prepare_finetuning(chats(CHAT[:3]), chat_tokenizer)
    prompt = chat_tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    assert example["input_ids"][1 : len(prompt) + 1] == prompt
    assert example["labels"][: len(prompt) + 2].count(-100) == len(prompt) + 1


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_a_bos_of_the_template_is_not_doubled(chat_tokenizer, template):
    chat_tokenizer.chat_template = template
    without = list(prepare_finetuning(chats(CHAT), chat_tokenizer))
    chat_tokenizer.chat_template = "{{ bos_token }}" + template
    assert list(prepare_finetuning(chats(CHAT), chat_tokenizer)) == without


def test_a_template_without_eos_gets_one_right_after_the_last_answer(chat_tokenizer):
    chat_tokenizer.chat_template = PLAIN
    (example,) = prepare_finetuning(chats(CHAT[1:]), chat_tokenizer)
    # Whether the line break is the answer's or the template's, only marks would tell.
    assert predicted_texts(example, chat_tokenizer) == ["Yes.\n", "Four, or so I am told.\n<|im_end|>"]
    chat_tokenizer.chat_template = (
        "{% for message in messages %}{{ '> ' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )
    (example,) = prepare_finetuning(chats(CHAT[1:]), chat_tokenizer)
    assert predicted_texts(example, chat_tokenizer) == ["Yes.", "Four, or so I am told.<|im_end|>"]
    assert example["labels"][-1] == chat_tokenizer.eos_token_id


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_of_a_chat_cut_in_two_only_the_completion_is_predicted(chat_tokenizer, template):
    chat_tokenizer.chat_template = template
    dataset = Dataset.from_list([{"prompt": CHAT[:start], "completion": CHAT[start:]} for start in (2, 3, 4)])
    first, second, third = prepare_finetuning(dataset, chat_tokenizer)
    assert first == prepare_finetuning(chats(CHAT), chat_tokenizer)[0]
    for example in (second, third):
        assert example["input_ids"] == first["input_ids"]
        assert predicted_texts(example, chat_tokenizer) == ["Four, or so I am told.<|im_end|>"]


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_separate_turns_end_with_their_answer(chat_tokenizer, template):
    chat_tokenizer.chat_template = template
    first, second = prepare_finetuning(chats(CHAT), chat_tokenizer, separate_turns=True)
    assert first == prepare_finetuning(chats(CHAT[:3]), chat_tokenizer)[0]
    assert second["input_ids"] == prepare_finetuning(chats(CHAT), chat_tokenizer)[0]["input_ids"]
    assert predicted_texts(second, chat_tokenizer) == ["Four, or so I am told.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_needs_marks_or_separate_turns(chat_tokenizer):
    chat_tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match="example 0 .* answer in message 4 differently .* or separate_turns=True"):
        prepare_finetuning(chats(CHAT), chat_tokenizer)
    chat_tokenizer.chat_template = FORGETFUL_MARKED
    (example,) = prepare_finetuning(chats(CHAT), chat_tokenizer)
    answers = ["Yes.<|im_end|>", "<think></think>Four, or so I am told.<|im_end|>"]
    assert predicted_texts(example, chat_tokenizer) == answers
    dataset = Dataset.from_list([{"prompt": CHAT[:3], "completion": CHAT[3:]}])
    with pytest.raises(ValueError, match="example 0 .* renders an answer before message 3 differently"):
        prepare_finetuning(dataset, chat_tokenizer)


@pytest.mark.parametrize("template", [FORGETFUL, FORGETFUL_MARKED])
def test_separate_turns_are_rendered_as_the_last_of_their_chat(chat_tokenizer, template):
    chat_tokenizer.chat_template = template
    first, second = prepare_finetuning(chats(CHAT), chat_tokenizer, separate_turns=True)
    for example, answer in ((first, "Yes.<|im_end|>"), (second, "Four, or so I am told.<|im_end|>")):
        assert predicted_texts(example, chat_tokenizer) == ["<think></think>" + answer]
    assert "<think></think>Yes" not in chat_tokenizer.decode(second["input_ids"])


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_the_template_gets_the_tools(chat_tokenizer, template):
    chat_tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool['name'] }};{% endfor %}" + template
    rows = [{"messages": CHAT, "tools": [{"name": "clock"}, {"name": "scales"}]}]
    (example,) = prepare_finetuning(Dataset.from_list(rows), chat_tokenizer)
    assert chat_tokenizer.decode(example["input_ids"]).startswith("<s>clock;scales;<|im_start|>system")


# Length


def test_examples_that_are_too_long_are_refused_unless_told_otherwise(tokenizer):
    lengths = [len(ids) for ids in prepare_finetuning(pairs(), tokenizer)["input_ids"]]
    longest = max(lengths)
    assert len(prepare_finetuning(pairs(), tokenizer, max_length=longest)) == len(PAIRS)
    number = lengths.index(longest)
    with pytest.raises(ValueError, match=f"example {number} .*: {longest} tokens .* max_length={longest - 1}"):
        prepare_finetuning(pairs(), tokenizer, max_length=longest - 1)


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that are logged."""
    messages = []
    monkeypatch.setattr(logging.getLogger(finetuning.__name__), "warning", messages.append)
    return messages


@pytest.mark.parametrize("streaming", [False, True])
def test_examples_that_are_too_long_are_dropped_and_counted(tokenizer, warnings, streaming):
    whole = list(prepare_finetuning(pairs(), tokenizer))
    max_length = sorted(len(example["input_ids"]) for example in whole)[1]
    dataset = pairs().to_iterable_dataset() if streaming else pairs()
    kept = prepare_finetuning(dataset, tokenizer, max_length=max_length, truncation="drop")
    assert list(kept) == [example for example in whole if len(example["input_ids"]) <= max_length]
    assert warnings == [f"2 of 4 examples are longer than max_length={max_length}: 0 are cut, 2 dropped."]


@pytest.mark.parametrize("streaming", [False, True])
def test_examples_that_are_too_long_are_cut_on_the_right_unless_no_label_is_left(tokenizer, warnings, streaming):
    whole = list(prepare_finetuning(pairs(), tokenizer))
    prompt_lengths = [example["labels"].count(-100) for example in whole]
    max_length = prompt_lengths[0] + 2
    assert max(prompt_lengths) >= max_length < len(whole[0]["input_ids"])
    dataset = pairs().to_iterable_dataset() if streaming else pairs()
    kept = prepare_finetuning(dataset, tokenizer, max_length=max_length, truncation="right")
    assert list(kept) == [
        {name: column[:max_length] for name, column in example.items()}
        for example, prompt_length in zip(whole, prompt_lengths)
        if prompt_length < max_length
    ]
    num_long = sum(len(example["input_ids"]) > max_length for example in whole)
    num_dropped = sum(prompt_length >= max_length for prompt_length in prompt_lengths)
    assert warnings == [
        f"{num_long} of 4 examples are longer than max_length={max_length}: {num_long - num_dropped} are cut, "
        f"{num_dropped} dropped."
    ]


def test_nothing_is_said_of_what_fits(tokenizer, warnings):
    assert len(prepare_finetuning(pairs(), tokenizer, max_length=1000, truncation="drop")) == len(PAIRS)
    assert warnings == []


# Packing


def random_examples(lengths, seed=0):
    """Examples of these lengths, the first third of each a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(22, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]} for ids in rows]


LENGTHS = [3, 17, 9, 30, 2, 11, 8, 23, 5, 12]


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("ignore_bos", [True, False])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_documents_packed_together_give_the_losses_that_they_give_alone(
    block_size, ignore_bos, attn_implementation, chosen_draws
):
    examples = random_examples(LENGTHS)
    packed = pack_examples(Dataset.from_list(examples), 32)
    model = random_model(3, attn_implementation, block_size=block_size, ignore_bos=ignore_bos)
    collate = BD3LMDataCollator(pad_token_id=0, ignore_bos=ignore_bos)
    generator = torch.Generator().manual_seed(1)
    # The draws belong to the documents: one t for each block, and which of the tokens are masked.
    draws = {
        tuple(example["input_ids"]): (
            0.1 + 0.9 * torch.rand(-(-len(example["input_ids"]) // block_size), generator=generator),
            torch.rand(len(example["input_ids"]), generator=generator) < 0.6,
        )
        for example in examples
    }

    def losses(features, documents_of_rows):
        """The nelbo of each document, [its length], and the loss of the batch; documents stand row by row."""
        batch = collate(features)
        num_rows, length = batch["input_ids"].shape
        t, masked = torch.ones(num_rows, length + 1), torch.zeros(num_rows, length, dtype=torch.bool)
        for row, documents in enumerate(documents_of_rows):
            times, flags = (torch.cat(parts) for parts in zip(*(draws[document] for document in documents)))
            t[row, : len(times)], masked[row, : len(flags)] = times, flags
        chosen_draws(t, masked)
        output = model(**batch)
        found = {}
        for row, documents in enumerate(documents_of_rows):
            parts = output.token_nelbo[row, : sum(map(len, documents))].split(
                [len(document) for document in documents]
            )
            found.update(zip(documents, parts, strict=True))
        return found, output.loss

    documents_of_rows = []
    for row in packed:
        ids, documents = torch.tensor(row["input_ids"]), torch.tensor(row["document_ids"])
        documents_of_rows.append([tuple(ids[documents == number].tolist()) for number in documents.unique()])
    assert max(map(len, documents_of_rows)) >= 3
    together, loss_together = losses(list(packed), documents_of_rows)
    one_a_row, loss_one_a_row = losses(examples, [[document] for document in draws])
    assert together.keys() == one_a_row.keys() == draws.keys()
    for example in examples:
        document = tuple(example["input_ids"])
        alone, _ = losses([example], [[document]])
        assert len(document) < 4 or alone[document].max() > 0.1
        for found in (together, one_a_row):
            torch.testing.assert_close(found[document], alone[document], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss_together, loss_one_a_row, rtol=0, atol=1e-5)


def test_packing_splits_loses_and_repeats_nothing():
    examples = random_examples(LENGTHS)
    unpacked = []
    for row in pack_examples(Dataset.from_list(examples), 32):
        assert len(row["input_ids"]) <= 32
        assert row["document_ids"] == sorted(row["document_ids"])
        assert set(row["document_ids"]) == set(range(1, max(row["document_ids"]) + 1))
        documents = torch.tensor(row["document_ids"])
        for number in documents.unique():
            columns = (documents == number).nonzero()[:, 0].tolist()
            unpacked.append({name: [row[name][column] for column in columns] for name in ("input_ids", "labels")})
    assert sorted(unpacked, key=str) == sorted(examples, key=str)


def test_packing_fills_the_rows_and_keeps_the_order_as_far_as_that_goes():
    # Taken as they come, these would need four rows.
    rows = pack_examples(Dataset.from_list(random_examples([4, 7, 3, 6, 8, 2])), 10)
    sizes = [torch.tensor(row["document_ids"]).unique(return_counts=True)[1].tolist() for row in rows]
    assert sizes == [[4, 6], [7, 3], [8, 2]]


def test_an_example_without_labels_is_predicted_as_a_whole():
    (row,) = pack_examples(Dataset.from_dict({"input_ids": [[1, 2], [1, 3, 4]]}), 8)
    assert row == {"input_ids": [1, 2, 1, 3, 4], "labels": [1, 2, 1, 3, 4], "document_ids": [1, 1, 2, 2, 2]}


@pytest.mark.parametrize("streaming", [False, True])
def test_trainer_hands_the_documents_on(tokenizer, tmp_path, streaming):
    # Trainer drops the columns that are no arguments of `forward`, and documents would see each other.
    dataset = pairs().to_iterable_dataset() if streaming else pairs()
    trainer = Trainer(
        model_for(tokenizer),
        TrainingArguments(tmp_path, per_device_train_batch_size=4, use_cpu=True, report_to=[], max_steps=1),
        train_dataset=pack_examples(prepare_finetuning(dataset, tokenizer), 64),
        data_collator=BD3LMDataCollator(tokenizer.pad_token_id),
    )
    (batch,) = trainer.get_train_dataloader()
    assert batch["document_ids"].max() > 1


# Streams


def stream(rows):
    """A stream that knows its columns only once it is read."""
    return IterableDataset.from_generator(lambda: iter(rows))


def test_a_stream_is_prepared_and_packed_as_a_table_is(chat_tokenizer):
    for rows in (PAIRS, [{"messages": CHAT}, {"messages": CHAT[:3]}]):
        options = {"max_length": 60, "truncation": "drop", "separate_turns": True}
        expected = pack_examples(prepare_finetuning(Dataset.from_list(rows), chat_tokenizer, **options), 96)
        prepared = prepare_finetuning(stream(rows), chat_tokenizer, **options)
        packed = pack_examples(prepared, 96)
        assert isinstance(packed, IterableDataset)
        assert packed.column_names == expected.column_names == ["input_ids", "labels", "document_ids"]
        assert list(packed) == list(expected)


def test_a_stream_is_read_only_as_far_as_it_is_needed(tokenizer, monkeypatch):
    monkeypatch.setattr(finetuning, "BATCH_SIZE", 4)
    read = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield {"prompt": f"{number}", "completion": " is a number"}

    packed = pack_examples(prepare_finetuning(IterableDataset.from_generator(rows), tokenizer), 64)
    assert len(list(packed.take(2))) == 2
    assert len(read) < 20


# Errors


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}], r"columns of one format, but has \['text', 'label'\]; the formats are"),
        ([{"prompt": "a", "chosen": "b"}], r"columns of one format, but has \['prompt', 'chosen'\]"),
        ([{**PAIRS[0], "messages": CHAT}], r"columns of one format, but has \['prompt', 'completion', 'messages'\]"),
        ([PAIRS[0], {"prompt": "a", "completion": ""}], "example 1 of the dataset: the completion is empty"),
        ([{"prompt": "a", "completion": None}], "example 0 .*: prompt='a' is of no format"),
        ([{"prompt": "a [MASK]", "completion": "b"}], r"example 0 .*: the mask token '\[MASK\]' stands in the text"),
        ([{"prompt": "a", "completion": "[MASK]"}], "example 0 .*: the mask token"),
        ([{"messages": []}], r"example 0 .*: messages=\[\] is of no format"),
        ([{"messages": ["hello"]}], r"example 0 .*: messages=\['hello'\] is of no format"),
        ([{"messages": CHAT[:2]}], r"example 0 .*: .* no turn is the assistant's; the roles are \['system', 'user'\]"),
        (
            [{"prompt": CHAT[:3], "completion": CHAT[:2]}],
            "example 0 .*: there is nothing to predict: no turn is the assistant's",
        ),
        (
            [{"messages": [*CHAT[:2], {"role": "assistant", "content": ""}]}],
            "example 0 .*: message 2 is empty, a completion without content",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_examples_that_teach_nothing_are_refused(chat_tokenizer, rows, message, streaming):
    with pytest.raises(ValueError, match=message):
        list(prepare_finetuning(stream(rows) if streaming else Dataset.from_list(rows), chat_tokenizer))


def test_a_chat_that_starts_with_its_answer_needs_marks(chat_tokenizer):
    (example,) = prepare_finetuning(chats(CHAT[2:]), chat_tokenizer)
    assert predicted_texts(example, chat_tokenizer)[0] == "Yes.<|im_end|>"
    chat_tokenizer.chat_template = UNMARKED
    with pytest.raises(ValueError, match="example 0 .*: message 0 is the assistant's"):
        prepare_finetuning(chats(CHAT[2:]), chat_tokenizer)


def test_a_tokenizer_that_cannot_serve_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match="example 0 .*: messages need a chat template, but tokenizer.chat_template is"
    ):
        prepare_finetuning(chats(CHAT), tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="example 1 .*: the prompt is empty, and the tokenizer has no BOS token"):
        prepare_finetuning(pairs(), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an EOS token"):
        prepare_finetuning(pairs(), tokenizer)


def test_arguments_that_do_not_serve_are_refused(tokenizer):
    with pytest.raises(ValueError, match="truncation='left' must be one of 'error', 'right', 'drop'"):
        prepare_finetuning(pairs(), tokenizer, max_length=8, truncation="left")
    with pytest.raises(ValueError, match="truncation='drop' goes with a max_length"):
        prepare_finetuning(pairs(), tokenizer, truncation="drop")
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        prepare_finetuning(pairs(), tokenizer, block_size=0)
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        prepare_finetuning(pairs(), tokenizer, max_length=1)
    with pytest.raises(ValueError, match="max_length=2, truncation='drop' leave none of the examples"):
        prepare_finetuning(pairs(), tokenizer, max_length=2, truncation="drop")
    with pytest.raises(ValueError, match=r"got a DatasetDict with the splits \['train'\]; take one of them"):
        prepare_finetuning(DatasetDict(train=pairs()), tokenizer)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": [[1]]}, r"must have the column 'input_ids', but has \['tokens'\]"),
        ({"input_ids": [[1]], "document_ids": [[1]]}, "so it is packed already"),
        ({"input_ids": [[1], [1] * 9]}, "example 1 of the dataset has 9 tokens; with max_length=8 it takes 1 to 8"),
        ({"input_ids": [[1], []]}, "example 1 of the dataset has 0 tokens"),
        ({"input_ids": [[1], [1, 2]], "labels": [[1], [2]]}, "example 1 of the dataset has 1 labels for 2 input_ids"),
        ({"input_ids": [[1], [1, 2]], "attention_mask": [[1], [1, 0]]}, "example 1 of the dataset is padded"),
    ],
)
def test_examples_that_cannot_be_packed_are_refused(columns, message):
    dataset = Dataset.from_dict(columns)
    for examples in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match=message):
            list(pack_examples(examples, 8))
