"""Where rows end: at the very token at which a rule first holds, wherever in a block, and each row by itself."""

import math

import pytest
import torch
from conftest import random_model
from test_generation import left_padded, random_prompts
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


BLOCK_SIZE = 4
LENGTHS = [5, 8, 2]
NUM_NEW = 22
PAD = 0
SAMPLERS = {
    "first_hitting": {},
    "ancestral": {"denoising_steps": 2},
    "remasking": {"sampler": "ancestral", "denoising_steps": 3, "remask_cap": 0.5},
    "confidence": {"denoising_steps": 2},
    "entropy_bound": {"entropy_bound": 2.0},
}
# Of one letter and of two, so that a string may begin and end inside a token.
TOKENS = ["<pad>", *"abcdefg", *(first + second for first in "abcde" for second in "bdfg"), "<bos>", "<mask>"]


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {token: id_ for id_, token in enumerate(TOKENS)}
    backend = Tokenizer(models.BPE(vocab, merges=[tuple(token) for token in TOKENS if len(token) == 2]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", mask_token="<mask>")


@pytest.fixture(params=SAMPLERS)
def generate(request):
    """Texts of three rows, each with a seed of its own; what stops them only cuts them."""
    model = random_model(
        vocab_size=len(TOKENS),
        block_size=BLOCK_SIZE,
        max_position_embeddings=64,
        bos_token_id=len(TOKENS) - 2,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    prompts = random_prompts(LENGTHS, vocab_size=len(TOKENS) - 2)
    inputs = left_padded(prompts)
    sampler = {"sampler": request.param, **SAMPLERS[request.param]}

    def new_tokens(**stopping):
        arguments = {"max_new_tokens": NUM_NEW, "seed": 3, "suppress_tokens": [PAD], **sampler, **stopping}
        return model.generate(**inputs, **arguments)[:, max(LENGTHS) :]

    new_tokens.prompts = [prompt.tolist() for prompt in prompts]
    return new_tokens


def check_ends(actual, free, ends):
    """Rows are those of `free` up to the index at which each ends, and padding behind."""
    assert actual.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(actual[row, : end + 1], free[row, : end + 1])
        assert (actual[row, end + 1 :] == PAD).all()


def places(row):
    """For each place in a block, the indices of new tokens of this row that stand there."""
    return [
        [index for index in range(NUM_NEW) if (LENGTHS[row] + index) % BLOCK_SIZE == place]
        for place in range(BLOCK_SIZE)
    ]


def first_index(values, holds):
    return next((index for index, value in enumerate(values) if holds(value)), NUM_NEW - 1)


def test_eos(generate):
    free = generate()
    for row in range(3):
        blocks_apart = False
        for indices in places(row):
            eos = int(free[row, indices[2]])
            ends = [first_index(other.tolist(), lambda token, eos=eos: token == eos) for other in free]
            check_ends(generate(eos_token_id=eos), free, ends)
            blocks_apart |= len({(length + end) // BLOCK_SIZE for length, end in zip(LENGTHS, ends)}) > 1
        assert blocks_apart


def test_several_eos_tokens_and_the_one_that_is_found_first(generate):
    free = generate()
    eos = [int(free[0, 9]), int(free[1, 4]), int(free[2, 15])]
    ends = [first_index(row.tolist(), lambda token: token in eos) for row in free]
    check_ends(generate(eos_token_id=eos), free, ends)


def test_stop_strings_that_end_inside_a_token_and_begin_in_another(generate, tokenizer):
    free = generate()
    texts = [[TOKENS[token] for token in row] for row in free.tolist()]
    prompts = ["".join(TOKENS[token] for token in prompt) for prompt in generate.prompts]
    for row in range(3):
        for indices in places(row):
            tokens = texts[row][: indices[2] + 1]
            string = (tokens[-2] + tokens[-1])[-3:] if len(tokens[-1]) == 1 else tokens[-2] + tokens[-1][0]
            ends = [ends_with_string(other, string, prompt) for other, prompt in zip(texts, prompts)]
            check_ends(generate(stop_strings=[string], tokenizer=tokenizer), free, ends)


def ends_with_string(tokens, string, prompt=""):
    """The first token with which the string is complete, which may begin in the prompt: it ends in this token."""
    for index in range(len(tokens)):
        before, text = prompt + "".join(tokens[:index]), prompt + "".join(tokens[: index + 1])
        found = text.find(string, max(0, len(before) - len(string) + 1))
        if found >= 0 and found + len(string) > len(before):
            return index
    return NUM_NEW - 1


def test_entropy(generate):
    window, free = 6, generate()
    entropies = [
        [entropy(prompt + row[: index + 1], window) for index in range(NUM_NEW)]
        for prompt, row in zip(generate.prompts, free.tolist())
    ]
    for row in range(3):
        seen = math.inf
        for value in entropies[row]:
            # A window that is less varied than all before it: a threshold between them stops the row right there.
            if value < seen - 1e-6:
                threshold = value + 1e-6 if math.isinf(seen) else (value + seen) / 2
                ends = [first_index(other, lambda nats, threshold=threshold: nats < threshold) for other in entropies]
                stopped = generate(entropy_stop_threshold=threshold, entropy_stop_window=window)
                check_ends(stopped, free, ends)
                seen = value


def entropy(tokens, window):
    """Of the last tokens' histogram in nats; infinite where there are fewer."""
    if len(tokens) < window:
        return math.inf
    counts = [tokens[-window:].count(token) for token in set(tokens[-window:])]
    return -sum(count / window * math.log(count / window) for count in counts)


@pytest.mark.parametrize("num_new", range(1, 10))
def test_max_new_tokens(generate, num_new):
    text = generate(max_new_tokens=num_new)
    assert text.shape[1] == num_new
    assert (text < len(TOKENS) - 1).all() and (text != PAD).all()


def test_the_rule_that_holds_first_ends_a_row(generate, tokenizer):
    free = generate()
    texts = [[TOKENS[token] for token in row] for row in free.tolist()]
    eos, string = int(free[0, 6]), texts[1][10] + texts[1][11]
    ends = [
        min(first_index(row.tolist(), lambda token: token == eos), ends_with_string(text, string), 16)
        for row, text in zip(free, texts)
    ]
    stopped = generate(
        eos_token_id=eos,
        stop_strings=[string],
        tokenizer=tokenizer,
        stopping_criteria=[lambda ids, scores, **_: torch.full((3,), ids.shape[1] >= max(LENGTHS) + 17)],
    )
    check_ends(stopped, free, ends)
