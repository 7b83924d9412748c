"""Long texts are read and scored in pieces: the same numbers, in memory that does not grow with the text's square."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model
from transformers import DynamicCache, StaticCache

from bd3lm_hf import evaluate_likelihood
from bd3lm_hf.evaluation import pieces
from bd3lm_hf.evaluation.block_losses import BlockLosses
from bd3lm_hf.modeling import denoising_block_diffusion
from bd3lm_hf.modeling.cache_block_diffusion import CommitCache


LENGTH, PIECE = 150, 12
AT_ONCE = 10**6
CACHES = {
    "sliding": lambda model: {},
    "none": lambda model: {"use_cache": False},
    "static": lambda model: {"cache_implementation": "static"},
    "dynamic": lambda model: {"past_key_values": DynamicCache()},
    "given static": lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=LENGTH + 40)},
}
KINDS = {
    "sdpa": {"attn_implementation": "sdpa"},
    "eager": {},
    "long window": {"max_position_embeddings": 64},
    "no window": {"max_position_embeddings": 4},
    "time": {"time_conditioning": True, "attn_implementation": "sdpa"},
}


def texts(model, num_rows=1, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, model.config.vocab_size - 1, (num_rows, length), generator=generator)


def padding(lengths, width):
    return (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


def write(model, monkeypatch, piece_size, input_ids, attention_mask=None, **options):
    monkeypatch.setattr(denoising_block_diffusion, "PIECE_SIZE", piece_size)
    options = {"max_new_tokens": 9, "seed": 3, "return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(input_ids, attention_mask=attention_mask, **options)


def assert_same(output, expected):
    assert torch.equal(output.sequences, expected.sequences)
    for logits, others in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_read_in_pieces_gives_the_logits_of_one_pass(monkeypatch, kind, cache):
    model = random_model(**KINDS[kind])
    ids, lengths = texts(model, 3), [LENGTH, 21, LENGTH - 7]
    for rows, attention_mask in ((ids[:1], None), (ids, padding(lengths, LENGTH))):
        expected = write(model, monkeypatch, AT_ONCE, rows, attention_mask, **CACHES[cache](model))
        assert_same(write(model, monkeypatch, PIECE, rows, attention_mask, **CACHES[cache](model)), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_a_prompt_in_pieces_gives_the_logits_of_the_dense_pass_over_all_of_it(monkeypatch, cache):
    model = random_model(max_position_embeddings=32)
    ids = texts(model)
    output = write(model, monkeypatch, PIECE, ids, max_new_tokens=2, **CACHES[cache](model))
    last = LENGTH // 4 * 4
    masked = torch.cat([ids, torch.full((1, last + 4 - LENGTH), model.config.mask_token_id)], dim=1)
    with torch.no_grad():
        dense = model(masked).logits[0, LENGTH:]
    # The two new tokens are in one block; the one that was revealed first saw no other.
    revealed = write(model, monkeypatch, PIECE, ids, max_new_tokens=2, output_reveal=True).reveal_steps
    first = int(revealed[0, -2:].argmin())
    dense[:, model.config.mask_token_id] = output.logits[first][0, model.config.mask_token_id]
    torch.testing.assert_close(output.logits[first][0], dense[first], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", CACHES)
def test_negative_prompts_and_gaps_are_read_in_pieces_too(monkeypatch, cache):
    model = random_model(max_position_embeddings=32, attn_implementation="sdpa")
    ids = texts(model, 2)
    guided = {"guidance_scale": 2.0, "negative_prompt_ids": texts(model, 2, 77, seed=1)}
    gapped = ids.clone()
    # After the first gap all of the text is pending until the second.
    gapped[:, 2:4] = gapped[:, 131:137] = gapped[0, 90] = model.config.mask_token_id
    for rows, options in ((ids, guided), (gapped, {"infill": True})):
        both = [write(model, monkeypatch, size, rows, **options, **CACHES[cache](model)) for size in (AT_ONCE, PIECE)]
        assert_same(*both)


@pytest.mark.parametrize("context", [32, 4])
@pytest.mark.parametrize("cache", ["sliding", "dynamic", "given static"])
def test_a_returned_cache_serves_rows_that_agree_with_it_for_unlike_lengths(monkeypatch, cache, context):
    model = random_model(max_position_embeddings=context)
    first = write(model, monkeypatch, PIECE, texts(model, 2, 60), **CACHES[cache](model))
    # One row goes on, one begins anew: between what the first has in the cache and what is new lie columns that hold
    # nothing of it, many more than a window or a piece.
    # What is new is longer than the window of 28, and no longer than that of two layers: what the next blocks see has
    # seen the cached ones.
    ids = torch.cat([first.sequences, texts(model, 2, 40, seed=1)], dim=1)
    ids[1] = texts(model, 1, ids.shape[1], seed=2)
    for padded in (0, 30):
        attention_mask = padding([ids.shape[1], ids.shape[1] - padded], ids.shape[1])
        expected = write(model, monkeypatch, AT_ONCE, ids, attention_mask)
        given = copy.deepcopy(first.cache)
        assert_same(write(model, monkeypatch, PIECE, ids, attention_mask, past_key_values=given), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES)
def test_no_mask_grows_with_the_text(monkeypatch, implementation, cache):
    model = random_model(max_position_embeddings=32, attn_implementation=implementation)
    sizes = []

    def note(module, args, kwargs):
        sizes[-1] = max(sizes[-1], kwargs["attention_mask"].shape[-2:].numel())

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    options = {} if cache == "given static" else CACHES[cache](model)
    for length in (100, 1_000):
        sizes.append(0)
        if cache == "dynamic":
            options = {"past_key_values": DynamicCache()}
        write(model, monkeypatch, 48, texts(model, 1, length), max_new_tokens=1, **options)
    # Steps on a block read all of a dynamic or static cache, which is not the square of anything.
    steps = 8 * 1_100 if "sliding" != cache != "none" else 0
    assert sizes[1] <= max(sizes[0], steps, (48 + 4) * (48 + 32 + 4))


def test_of_what_a_cache_returns_seen_leaves_out_columns_and_keeps_all():
    states = torch.randn(1, 2, 6, 4)
    cache = DynamicCache()
    keys, values = CommitCache(cache, 4, slice(1, 5)).update(states, -states, 0)
    assert torch.equal(keys, states[:, :, 1:5]) and torch.equal(values, -states[:, :, 1:5])
    assert torch.equal(cache.layers[0].keys, states[:, :, :4])


SCORED = {
    "sdpa": {"attn_implementation": "sdpa", "max_position_embeddings": 128},
    "eager": {"max_position_embeddings": 128},
    "short window": {"max_position_embeddings": 32},
    "time": {"time_conditioning": True, "max_position_embeddings": 128},
    "tied": {"tie_word_embeddings": True, "max_position_embeddings": 64, "ignore_bos": False},
}


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [
        ("sdpa", "exact"),
        ("tied", "exact"),
        *((kind, name) for kind in SCORED for name in ("stratified", "monte_carlo")),
    ],
)
def test_texts_that_are_scored_in_pieces_have_the_likelihood_of_one_pass(monkeypatch, kind, estimator):
    model = random_model(**SCORED[kind])
    sequences = [texts(model, 1, length, seed=length)[0].tolist() for length in (200, 130, 101, 37, 6)]
    labels = [row if number % 2 else [-100] * (len(row) - 5) + row[-5:] for number, row in enumerate(sequences)]
    found = []
    for most in (AT_ONCE, 100):
        monkeypatch.setattr(pieces, "MOST_AT_ONCE", most)
        options = {"estimator": estimator, "batch_size": 3, "progress": False}
        found.append([evaluate_likelihood(model, sequences, labels=some, **options) for some in (None, labels)])
    for dense, in_pieces in zip(*found, strict=True):
        assert in_pieces.nelbo == pytest.approx(dense.nelbo, rel=1e-6)
        nats = [[value or 0 for value in result.nelbo_per_position] for result in (in_pieces, dense)]
        assert nats[0] == pytest.approx(nats[1], rel=1e-4, abs=1e-5)


def test_losses_of_blocks_are_the_same_in_pieces(monkeypatch):
    model = random_model(max_position_embeddings=32, attn_implementation="sdpa")
    sequences = [texts(model, 1, length, seed=length)[0].tolist() for length in (150, 131, 40)]
    dense = BlockLosses.of_sequences(model, sequences, progress=False)
    monkeypatch.setattr(pieces, "MOST_AT_ONCE", 40)
    in_pieces = BlockLosses.of_sequences(model, sequences, progress=False)
    assert in_pieces.loss == pytest.approx(dense.loss, rel=1e-4, abs=1e-5)


def test_pieces_end_where_all_rows_end_a_block():
    block_ids = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, -(2**32), -(2**32), -(2**32), -(2**32), -(2**32)]])
    assert pieces.piece_bounds(block_ids, 4) == [(0, 4), (4, 8)]
    assert pieces.piece_bounds(block_ids, 5) == [(0, 4), (4, 8)]
    assert pieces.piece_bounds(block_ids, 1) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert pieces.piece_bounds(block_ids, 8) == [(0, 8)]
    # Rows that begin in different places of a block have no piece in common.
    assert pieces.piece_bounds(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]]), 2) == [(0, 4)]


MEMORY = """
import resource, sys
import torch
from transformers import DynamicCache
from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM, evaluate_likelihood

what, length, context, implementation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = BD3LMConfig(
    vocab_size=259, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, block_size=16, mask_token_id=258,
    max_position_embeddings=context, cond_dim=32,
)
model = BD3LMForMaskedLM._from_config(config, attn_implementation=implementation).eval()
ids = torch.randint(4, 250, (1, length), generator=torch.Generator().manual_seed(0))
options = {
    "dynamic": {"past_key_values": DynamicCache()}, "static": {"cache_implementation": "static"},
    "none": {"use_cache": False}, "infill": {"infill": True}, "negative": {"guidance_scale": 2.0},
}.get(what, {"max_new_tokens": 16})
if what == "infill":
    ids[0, -9:-1] = 258
    ids[0, 66] = 258
else:
    options = {"max_new_tokens": 16, **options}
if what == "negative":
    options["negative_prompt_ids"] = ids.flip(1)
model.generate(ids[:, :50], max_new_tokens=16, infill=what == "infill")
evaluate_likelihood(model, [ids[0, :64].tolist()], progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if what == "evaluate":
    evaluate_likelihood(model, [ids[0].tolist()] * 2, batch_size=2, num_draws=1, progress=False)
else:
    model.generate(ids, seed=0, **options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def mebibytes_above_the_model(*arguments):
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "implementation"),
    [
        ("sliding", "sdpa"),
        ("sliding", "eager"),
        # These hold 94 MiB of keys and values for 32,000 tokens.
        ("dynamic", "sdpa"),
        ("static", "sdpa"),
        ("negative", "sdpa"),
        ("infill", "sdpa"),
    ],
)
def test_a_prompt_of_32000_tokens_takes_less_than_200_mebibytes(what, implementation):
    assert mebibytes_above_the_model(what, 32_000, 1_024, implementation) < 200


@pytest.mark.slow
def test_without_a_cache_and_in_scoring_memory_is_bounded_too():
    assert mebibytes_above_the_model("none", 8_000, 256, "sdpa") < 200
    assert mebibytes_above_the_model("evaluate", 2_048, 2_048, "sdpa") < 200
