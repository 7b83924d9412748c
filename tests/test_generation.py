"""Generation: the cache, the merged pass, batches, the window, and the arguments that people know from `generate`."""

import pytest
import torch
from conftest import DEVICE
from conftest import random_model as tiny_random_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from bd3lm_hf import BD3LMForMaskedLM, BD3LMGenerationConfig, CommitCache, EntropyStoppingCriteria


# Greedy decoding of random weights would repeat one token for ever; the ban makes the text depend on all before it.
DETERMINISTIC = {"sampler": "confidence", "do_sample": False, "no_repeat_ngram_size": 1}


def random_model(**overrides):
    return tiny_random_model(**{"vocab_size": 101, **overrides})


def varied(sequences, prompt_width):
    """Whether the text is one that would show a difference."""
    return len(sequences[:, prompt_width:].unique()) >= 15


def left_padded(prompts, pad_token_id=0):
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def random_prompts(lengths, seed=0, vocab_size=100):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (length,), generator=generator) for length in lengths]


def masked_blocks(model, ids, seed=1):
    """Each block of `ids` with about half of its tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.5, model.config.mask_token_id, ids)


class CountForwards:
    """How many positions each forward of the network was given."""

    def __init__(self, model):
        self.lengths = []
        model.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.lengths.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@torch.no_grad()
def test_cached_logits_equal_uncached_logits_past_the_window_too(attn_implementation, block_size):
    model = random_model(
        attn_implementation=attn_implementation, block_size=block_size, max_position_embeddings=2 * block_size
    )
    clean = torch.randint(0, 100, (2, 5 * block_size))
    noisy = masked_blocks(model, clean)
    cache = DynamicCache()
    for start in range(0, clean.shape[1], block_size):
        block = slice(start, start + block_size)
        cached = model(noisy[:, block], cache=CommitCache(cache, 0)).logits
        uncached = model(torch.cat([clean[:, :start], noisy[:, block]], dim=1)).logits[:, start:]
        torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=0)
        assert cache.get_seq_length() == start
        model(clean[:, block], cache=cache)


@pytest.mark.parametrize("make_cache", ["dynamic", "static", "sliding"])
@torch.no_grad()
def test_the_merged_pass_equals_committing_first_and_denoising_then(make_cache):
    model = random_model(block_size=4, max_position_embeddings=16)
    window = model.config.window_in_blocks * 4

    def cache():
        if make_cache == "static":
            return StaticCache(config=model.config, max_cache_len=64)
        if make_cache == "sliding":
            layers = [DynamicSlidingWindowLayer(sliding_window=window + 1) for _ in model.model.layers]
            result = DynamicCache()
            result.layers, result.layer_class_to_replicate = layers, None
            return result
        return DynamicCache()

    clean = torch.randint(0, 100, (2, 32))
    noisy = masked_blocks(model, clean)
    merged_cache, separate_cache = cache(), cache()
    for start in range(4, 32, 4):
        before, block = slice(start - 4, start), slice(start, start + 4)
        both = torch.cat([clean[:, before], noisy[:, block]], dim=1)
        merged = model(both, cache=CommitCache(merged_cache, 4)).logits[:, 4:]
        model(clean[:, before], cache=separate_cache)
        separate = model(noisy[:, block], cache=CommitCache(separate_cache, 0)).logits
        uncached = model(torch.cat([clean[:, :start], noisy[:, block]], dim=1)).logits[:, start:]
        torch.testing.assert_close(merged, separate, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged, uncached, atol=1e-5, rtol=0)


def test_the_cache_keeps_what_the_window_sees_and_no_more():
    model = random_model(block_size=4, max_position_embeddings=16, pad_token_id=0)
    inputs = left_padded(random_prompts([5, 10]))
    arguments = {**inputs, "max_new_tokens": 240, "seed": 0}
    output = model.generate(**arguments, return_dict_in_generate=True)
    cache = output.cache
    # 16 x the context; 12 tokens are what a block of 4 sees beside itself, and a row may be a block behind another.
    assert cache.get_seq_length() >= 240
    assert all(layer.keys.shape[-2] == 12 + 4 for layer in cache.layers)
    alone = model.generate(**left_padded(random_prompts([5])), max_new_tokens=240, return_dict_in_generate=True)
    assert all(layer.keys.shape[-2] == 12 for layer in alone.cache.layers)
    everything = DynamicCache()
    assert torch.equal(model.generate(**arguments, cache=everything), output.sequences)
    assert everything.layers[0].keys.shape[-2] >= 240


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("sampler", [{"denoising_steps": 2}, {"confidence_threshold": 0.2}, {}])
def test_batched_prompts_get_what_they_would_get_alone(attn_implementation, sampler):
    model = random_model(attn_implementation=attn_implementation, max_position_embeddings=24, pad_token_id=0)
    prompts = random_prompts([5, 8, 1, 11, 4])
    batch = model.generate(
        **left_padded(prompts), max_new_tokens=31, return_dict_in_generate=True, **DETERMINISTIC, **sampler
    )
    assert batch.sequences.shape == (5, 11 + 31) and varied(batch.sequences, 11)
    for row, prompt in enumerate(prompts):
        alone = model.generate(
            prompt[None], max_new_tokens=31, return_dict_in_generate=True, **DETERMINISTIC, **sampler
        )
        assert torch.equal(alone.sequences[0, -31:], batch.sequences[row, -31:])
        assert torch.equal(alone.sequences[0, :-31], prompt)
        assert alone.num_forward_passes[0] == batch.num_forward_passes[row]


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [[6], [5, 9, 2]])
def test_every_cache_gives_the_same_tokens_as_none(attn_implementation, lengths):
    model = random_model(attn_implementation=attn_implementation, max_position_embeddings=16, pad_token_id=0)
    arguments = {**left_padded(random_prompts(lengths)), "max_new_tokens": 26, "denoising_steps": 2, **DETERMINISTIC}
    expected = model.generate(**arguments, use_cache=False)
    assert varied(expected, max(lengths))
    caches = [
        {},
        {"cache_implementation": "static"},
        {"cache": DynamicCache()},
        {"cache": StaticCache(config=model.config, max_cache_len=64)},
    ]
    for cache in caches:
        assert torch.equal(model.generate(**arguments, **cache), expected), cache


def test_time_conditioned_generation_is_the_same_with_and_without_a_cache():
    model = random_model(time_conditioning=True, max_position_embeddings=16)
    arguments = {
        "input_ids": random_prompts([6])[0][None],
        "max_new_tokens": 22,
        "denoising_steps": 2,
        **DETERMINISTIC,
    }
    assert torch.equal(model.generate(**arguments), model.generate(**arguments, use_cache=False))
    plain = random_model(time_conditioning=False, max_position_embeddings=16)
    assert not torch.equal(model.generate(**arguments), plain.generate(**arguments))


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_first_hitting_takes_one_forward_per_token_and_none_to_commit(block_size):
    model = random_model(block_size=block_size)
    forwards = CountForwards(model)
    output = model.generate(
        random_prompts([block_size])[0][None], max_new_tokens=3 * block_size, return_dict_in_generate=True
    )
    assert output.num_forward_passes.tolist() == [3 * block_size]
    assert output.tokens_per_forward.tolist() == [1.0]
    # The prompt's block, and later each finished one, goes with the first pass over the next.
    assert forwards.lengths == ([2 * block_size] + [block_size] * (block_size - 1)) * 3


def test_confidence_reveals_equal_shares_and_parallel_decoding_saves_forwards():
    model = random_model(block_size=8)
    prompt = random_prompts([8])[0][None]
    for steps in (1, 2, 3, 8):
        output = model.generate(
            prompt, max_new_tokens=16, denoising_steps=steps, return_dict_in_generate=True, **DETERMINISTIC
        )
        assert output.num_forward_passes.tolist() == [2 * steps]
    certain = model.generate(
        prompt, max_new_tokens=16, confidence_threshold=1.0, return_dict_in_generate=True, **DETERMINISTIC
    )
    one_by_one = model.generate(prompt, max_new_tokens=16, denoising_steps=8, **DETERMINISTIC)
    assert torch.equal(certain.sequences, one_by_one)


@pytest.mark.parametrize("max_new_tokens", [1, 3, 4, 5, 11])
def test_max_new_tokens_is_exact(max_new_tokens):
    model = random_model(pad_token_id=0)
    inputs = left_padded(random_prompts([3, 4, 6]))
    sequences = model.generate(**inputs, max_new_tokens=max_new_tokens)
    assert sequences.shape == (3, 6 + max_new_tokens)
    assert not (sequences == model.config.mask_token_id).any()
    assert torch.equal(sequences[:, :6], inputs["input_ids"])


@pytest.mark.parametrize("position", [0, 2, 3, 4, 9])
def test_a_row_ends_at_its_eos_wherever_in_a_block_that_falls(position):
    """Each row is cut where its own first EOS falls, and the rest of the batch goes on."""
    model = random_model(pad_token_id=0)
    inputs = left_padded(random_prompts([3, 6]))
    free = model.generate(**inputs, max_new_tokens=12, **DETERMINISTIC)
    eos = int(free[0, 6 + position])
    ends = [next((i for i, token in enumerate(row[6:].tolist()) if token == eos), 11) for row in free]
    stopped = model.generate(**inputs, max_new_tokens=12, eos_token_id=eos, **DETERMINISTIC)
    assert stopped.shape[1] == 6 + max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(stopped[row, : 6 + end + 1], free[row, : 6 + end + 1])
        assert (stopped[row, 6 + end + 1 :] == 0).all()


def test_an_eos_in_the_prompt_ends_nothing():
    model = random_model(pad_token_id=0)
    prompt = torch.tensor([[3, 5, 7, 9, 5]])
    free = model.generate(prompt, max_new_tokens=8, suppress_tokens=[5], **DETERMINISTIC)
    stopped = model.generate(prompt, max_new_tokens=8, suppress_tokens=[5], eos_token_id=5, **DETERMINISTIC)
    assert torch.equal(free, stopped)


def test_forwards_behind_a_known_eos_are_saved_without_changing_the_text():
    model = random_model(block_size=16, pad_token_id=0)
    arguments = {"max_new_tokens": 16, "return_dict_in_generate": True}
    eos, saved = list(range(1, 80)), 0
    for seed in range(10):
        runs = []
        for eos_token_id in (None, eos):
            torch.manual_seed(seed)
            runs.append(model.generate(torch.tensor([[3] * 16]), eos_token_id=eos_token_id, **arguments))
        free, stopped = (run.sequences[0, 16:].tolist() for run in runs)
        end = next((index for index, token in enumerate(free) if token in eos), 15)
        assert stopped == free[: end + 1]
        assert runs[0].num_forward_passes.item() == 16
        saved += 16 - runs[1].num_forward_passes.item()
    # Until the token before the first EOS is known nothing can be saved; on average that is far from all the time.
    assert saved >= 20


def test_the_criteria_see_a_finished_block_token_by_token():
    class Record(StoppingCriteria):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(input_ids.clone())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    model, record = random_model(), Record()
    sequences = model.generate(
        random_prompts([5])[0][None], max_new_tokens=9, stopping_criteria=StoppingCriteriaList([record])
    )
    assert [ids.shape[1] for ids in record.seen] == list(range(6, 15))
    for ids in record.seen:
        assert torch.equal(ids, sequences[:, : ids.shape[1]])


def test_custom_criteria_stop_each_row_at_its_own_token():
    class ThirdToken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            ends = torch.tensor([8, 11])
            return input_ids.shape[1] == ends

    model = random_model(pad_token_id=0)
    inputs = left_padded(random_prompts([5, 6]))
    arguments = {**inputs, "max_new_tokens": 12, **DETERMINISTIC}
    free = model.generate(**arguments)
    stopped = model.generate(**arguments, stopping_criteria=StoppingCriteriaList([ThirdToken()]))
    assert stopped.shape == (2, 11)
    assert torch.equal(stopped[1], free[1, :11])
    assert torch.equal(stopped[0], torch.cat([free[0, :8], torch.zeros(3, dtype=torch.long)]))


def test_entropy_stop_ends_a_row_that_repeats_itself():
    model = random_model(pad_token_id=0)
    arguments = {"input_ids": torch.tensor([[3, 4]]), "max_new_tokens": 40}
    repeats = model.generate(
        **arguments, suppress_tokens=[*range(1, 100)], entropy_stop_threshold=0.5, entropy_stop_window=8
    )
    # Two prompt tokens and n zeros: the entropy of the last 8 is 0.377 nats with 7 zeros and one 4, 0.736 with 6
    # zeros.
    assert repeats.shape[1] == 9
    assert model.generate(**arguments, entropy_stop_threshold=0.1, entropy_stop_window=8).shape[1] == 42


def test_the_entropy_of_the_window_is_that_of_its_histogram():
    tokens = torch.tensor([[7, 1, 1, 2, 3, 3, 3, 3, 1], [7, 5, 5, 5, 5, 5, 5, 5, 5]])
    p = torch.tensor([3, 1, 4]) / 8
    entropy = -(p * p.log()).sum().item()
    assert EntropyStoppingCriteria(entropy + 1e-4, 8)(tokens, None).tolist() == [True, True]
    assert EntropyStoppingCriteria(entropy - 1e-4, 8)(tokens, None).tolist() == [False, True]
    # A row with fewer real tokens than the window goes on.
    assert EntropyStoppingCriteria(9.0, 8, torch.tensor([0, 2]))(tokens, None).tolist() == [True, False]


def test_num_return_sequences_repeats_each_prompt_in_place():
    model = random_model(pad_token_id=0)
    inputs = left_padded(random_prompts([3, 5]))
    sequences = model.generate(**inputs, max_new_tokens=10, num_return_sequences=3)
    assert torch.equal(sequences[:, :5], inputs["input_ids"].repeat_interleave(3, dim=0))
    assert len({tuple(row.tolist()) for row in sequences}) == 6


def test_a_seed_repeats_the_run_exactly_and_another_changes_it():
    model = random_model()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(random_prompts([5])[0][None], max_new_tokens=24))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("warper", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"min_p": 1.0}])
def test_warpers_reach_the_predictions_of_the_masked_positions(warper):
    """Each of these leaves the most probable token alone; greedy decoding with the same order of positions agrees."""
    model = random_model()
    prompt = random_prompts([5])[0][None]
    arguments = {"max_new_tokens": 12, "sampler": "confidence", "denoising_steps": 4}
    greedy = model.generate(prompt, do_sample=False, **arguments)
    assert torch.equal(model.generate(prompt, do_sample=True, **warper, **arguments), greedy)


def test_every_processor_sees_the_tokens_left_of_the_predicted_one():
    """The width tells the column; what stands right of it, or is padding, is not shown."""

    class Record(LogitsProcessor):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores):
            self.seen.append((input_ids.clone(), scores.shape))
            return scores

    model, record = random_model(pad_token_id=0), Record()
    mask_token_id = model.config.mask_token_id
    inputs = left_padded(random_prompts([3, 6]))
    sequences = model.generate(
        **inputs, max_new_tokens=7, logits_processor=LogitsProcessorList([record]), sampler="confidence"
    )
    assert {ids.shape[1] for ids, _ in record.seen} == set(range(6, 13))
    for ids, shape in record.seen:
        assert shape == (2, model.config.vocab_size)
        assert (ids[0, :3] == mask_token_id).all()
        revealed = ids != mask_token_id
        assert torch.equal(ids[revealed], sequences[:, : ids.shape[1]][revealed])


def test_minimum_lengths_hold():
    model = random_model(pad_token_id=0)
    inputs = left_padded(random_prompts([3, 5]))
    eos = list(range(1, 100))
    for min_new_tokens in (1, 4, 6):
        sequences = model.generate(**inputs, max_new_tokens=9, eos_token_id=eos, min_new_tokens=min_new_tokens)
        assert (sequences[:, 5 : 5 + min_new_tokens] == 0).all()


def test_no_n_gram_repeats_where_text_grows_from_left_to_right():
    """With blocks of one token all tokens to the left are known, and the ban is as hard as for other models."""
    model = random_model(vocab_size=9, block_size=1)
    sequences = model.generate(torch.tensor([[3]]), max_new_tokens=30, no_repeat_ngram_size=2, seed=0)[0].tolist()
    bigrams = list(zip(sequences, sequences[1:]))
    assert len(set(bigrams)) == len(bigrams) == 30
    free = model.generate(torch.tensor([[3]]), max_new_tokens=30, seed=0)[0].tolist()
    assert len(set(zip(free, free[1:]))) < 30


@pytest.mark.parametrize("ngram_size", [2, 3])
def test_n_gram_bans_know_nothing_of_padding_or_unknown_tokens(ngram_size):
    """A small vocabulary, so that bans are frequent; each row is what it is alone."""
    model = random_model(vocab_size=12, pad_token_id=0)
    arguments = {"max_new_tokens": 20, "sampler": "confidence", "do_sample": False, "denoising_steps": 2}
    prompts = random_prompts([2, 7, 5, 9, 3, 6, 4, 8], vocab_size=11)
    batch = model.generate(**left_padded(prompts), no_repeat_ngram_size=ngram_size, **arguments)
    assert not torch.equal(batch, model.generate(**left_padded(prompts), **arguments))
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], no_repeat_ngram_size=ngram_size, **arguments)
        assert torch.equal(alone[0, -20:], batch[row, -20:])


def test_prefix_allowed_tokens_are_asked_with_the_row_and_its_own_prefix():
    model = random_model(pad_token_id=0)
    inputs = left_padded(random_prompts([3, 5]))
    sequences = model.generate(
        **inputs, max_new_tokens=9, prefix_allowed_tokens_fn=lambda row, prefix: [7 + row, 9 + len(prefix) % 2]
    )
    for row in range(2):
        for column in range(5, 14):
            assert sequences[row, column] in (7 + row, 9 + column % 2)


class RecordingStreamer(BaseStreamer):
    def __init__(self):
        self.pieces, self.drafts, self.ended = [], [], False

    def put(self, value):
        # Streamers get what they show on the CPU.
        assert value.device.type == "cpu"
        self.pieces.append(value.to(DEVICE, copy=True))

    def put_draft(self, value):
        self.drafts.append(value.clone())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_then_finished_blocks_and_the_drafts_between():
    model, streamer = random_model(), RecordingStreamer()
    prompt = random_prompts([6])[0][None]
    sequences = model.generate(prompt, max_new_tokens=9, streamer=streamer)
    assert torch.equal(torch.cat([piece.flatten() for piece in streamer.pieces]), sequences[0])
    assert [piece.numel() for piece in streamer.pieces] == [6, 2, 4, 3]
    assert len(streamer.drafts) == 9 and streamer.ended
    masked = [int((draft == model.config.mask_token_id).sum()) for draft in streamer.drafts]
    assert masked == [1, 0, 3, 2, 1, 0, 2, 1, 0]


def test_a_streamer_of_a_batch_gets_columns_as_soon_as_every_row_has_them():
    model, streamer = random_model(pad_token_id=0), RecordingStreamer()
    inputs = left_padded(random_prompts([3, 6]))
    free = model.generate(**inputs, max_new_tokens=12, **DETERMINISTIC)
    sequences = model.generate(
        **inputs, max_new_tokens=12, eos_token_id=int(free[0, 8]), streamer=streamer, **DETERMINISTIC
    )
    assert torch.equal(torch.stack(streamer.pieces[1:], dim=1), sequences[:, 6:])


def test_scores_are_those_the_tokens_were_drawn_from():
    model = random_model()
    output = model.generate(
        random_prompts([6])[0][None],
        max_new_tokens=7,
        top_k=3,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len(output.scores) == len(output.logits) == 7
    for token, scores, logits in zip(output.sequences[0, 6:], output.scores, output.logits):
        finite = scores[0].isfinite()
        assert finite.sum() == 3 and finite[token]
        assert set(logits[0].topk(3).indices.tolist()) == set(finite.nonzero().flatten().tolist())


def test_a_returned_cache_continues_with_the_result_of_one_go():
    model = random_model()
    prompt = random_prompts([5])[0][None]
    whole = model.generate(prompt, max_new_tokens=15, **DETERMINISTIC)
    first = model.generate(prompt, max_new_tokens=7, return_dict_in_generate=True, **DETERMINISTIC)
    assert first.cache.get_seq_length() == 8
    second = model.generate(first.sequences, max_new_tokens=8, cache=first.cache, **DETERMINISTIC)
    assert torch.equal(second, whole)


def test_generation_config_survives_saving_and_plain_configs_are_taken(tmp_path):
    model = random_model()
    model.generation_config.sampler = "confidence"
    model.generation_config.denoising_steps = 2
    model.save_pretrained(tmp_path)
    loaded = BD3LMForMaskedLM.from_pretrained(tmp_path).to(DEVICE)
    assert isinstance(loaded.generation_config, BD3LMGenerationConfig)
    assert (loaded.generation_config.sampler, loaded.generation_config.denoising_steps) == ("confidence", 2)
    prompt = random_prompts([4])[0][None]
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=8, do_sample=False), expected)
    plain = GenerationConfig(max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(prompt, generation_config=plain), expected)
    loaded.generation_config = GenerationConfig(max_new_tokens=8)
    output = loaded.generate(prompt, denoising_steps=1, sampler="confidence", return_dict_in_generate=True)
    assert output.num_forward_passes.tolist() == [2]


@torch.no_grad()
def test_the_returned_cache_is_that_of_the_returned_text_also_for_rows_that_ended():
    class StopFirst(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] == 6, False])

    output = random_model(pad_token_id=7).generate(
        **left_padded(random_prompts([4, 4])),
        max_new_tokens=12,
        stopping_criteria=StoppingCriteriaList([StopFirst()]),
        return_dict_in_generate=True,
        **DETERMINISTIC,
    )
    assert (output.sequences[0, 6:] == 7).all() and output.sequences.shape == (2, 16)
    model = random_model()
    fresh = DynamicCache()
    model(output.sequences[:, :12], cache=fresh)
    assert output.cache.get_seq_length() == 12
    for kept, expected in zip(output.cache.layers, fresh.layers):
        torch.testing.assert_close(kept.keys, expected.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(kept.values, expected.values, atol=1e-5, rtol=0)


def test_an_offloaded_model_generates_and_has_a_loss():
    from accelerate import cpu_offload

    model = random_model()
    prompt = random_prompts([5])[0][None]
    expected = model.generate(prompt, max_new_tokens=9, **DETERMINISTIC)
    torch.manual_seed(0)
    loss = model(expected, labels=expected).loss.item()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(prompt, max_new_tokens=9, **DETERMINISTIC), expected)
    torch.manual_seed(0)
    assert model(expected, labels=expected).loss.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("do_sample", [True, False])
def test_scores_that_leave_no_token_are_an_error(do_sample):
    model, prompt = random_model(eos_token_id=None), torch.tensor([[1, 2]])
    arguments = {"max_new_tokens": 6, "do_sample": do_sample}
    everything = list(range(model.config.vocab_size))
    only_mask = {"prefix_allowed_tokens_fn": lambda row, text: [model.config.mask_token_id]}
    for constraint in ({"suppress_tokens": everything}, only_mask):
        with pytest.raises(ValueError, match="must be finite for at least one token that may be drawn"):
            model.generate(prompt, **arguments, **constraint)
    with torch.no_grad():
        model.lm_head.bias[3] = torch.nan
    with pytest.raises(ValueError, match="must be finite, but the model gave NaN"):
        model.generate(prompt, **arguments)


def test_infilling_without_a_gap_generates_no_tokens_per_forward():
    output = random_model(eos_token_id=None).generate(
        torch.tensor([[1, 2]]), infill=True, return_dict_in_generate=True
    )
    assert output.tokens_per_forward.tolist() == [0.0]
