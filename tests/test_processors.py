"""What each processor of Transformers means here: every line of the table in docs/generation.md."""

from pathlib import Path

import pytest
import torch
from conftest import random_model
from test_generation import left_padded, random_prompts
from transformers import LogitsProcessor, LogitsProcessorList, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation import TemperatureLogitsWarper


PAGE = Path(__file__).parents[1] / "docs" / "generation.md"
VOCAB, MASK, EOS = 61, 60, 59
RECORD = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_reveal": True}


@pytest.fixture(scope="module")
def model():
    return random_model(
        vocab_size=VOCAB, block_size=8, eos_token_id=EOS, pad_token_id=0, attn_implementation="sdpa", bos_token_id=1
    )


def generate(model, prompt=(5, 3), **arguments):
    return model.generate(
        torch.tensor([prompt]), **{"max_new_tokens": 14, "seed": 0, "eos_token_id": None, **arguments}
    )


def known_when_revealed(output, width):
    """For each new column: (its column, the text as it was before the forward that revealed it)."""
    text, steps = output.sequences[0], output.reveal_steps[0]
    for column in range(width, len(text)):
        yield column, torch.where(steps < steps[column], text, MASK)


def bans(output, width=2):
    """For each new column: (the text then, the ids that may not be drawn there)."""
    for (column, text), scores in zip(known_when_revealed(output, width), output.scores):
        yield column, text.tolist(), set((scores[0] == -torch.inf).nonzero().flatten().tolist()) - {MASK}


def sequence_bias(model):
    words = [[left, right] for left in range(20) for right in range(30, 60)]
    output = generate(model, **RECORD, sequence_bias={tuple(word): 2.0 for word in words})
    num_right = 0
    for (column, text), scores, logits in zip(known_when_revealed(output, 2), output.scores, output.logits):
        text = [*text.tolist(), MASK]
        for token in range(60):
            expected = 2.0 * ([text[column - 1], token] in words) + 2.0 * ([token, text[column + 1]] in words)
            assert (scores - logits)[0, token].item() == pytest.approx(expected, abs=1e-5)
            num_right += [token, text[column + 1]] in words
    assert num_right > 0


def bad_words_ids(model):
    words = [[left, right] for left in range(20) for right in range(30, 60)]
    num_right = 0
    for column, text, banned in bans(generate(model, **RECORD, bad_words_ids=words)):
        right = ([*text, MASK])[column + 1]
        after = {token for token in range(60) if [text[column - 1], token] in words}
        before = {token for token in range(60) if [token, right] in words}
        assert banned == after | before
        num_right += len(before)
    assert num_right > 0


def no_repeat_ngram_size(model):
    prompt = random_prompts([40], vocab_size=59)[0].tolist()
    num_right = 0
    for column, text, banned in bans(generate(model, prompt, **RECORD, no_repeat_ngram_size=2), 40):
        pairs = [pair for pair in zip(text, text[1:]) if MASK not in pair]
        right = ([*text, MASK])[column + 1]
        before = {first for first, second in pairs if second == right}
        assert banned == before | {second for first, second in pairs if first == text[column - 1]} - {MASK}
        num_right += len(before)
    assert num_right > 0


def encoder_no_repeat_ngram_size(model):
    prompt = random_prompts([40], vocab_size=59)[0].tolist()
    num_right = 0
    for column, text, banned in bans(generate(model, prompt, **RECORD, encoder_no_repeat_ngram_size=2), 40):
        pairs = [*zip(prompt, prompt[1:])]
        before = {first for first, second in pairs if second == ([*text, MASK])[column + 1]}
        assert banned == before | {second for first, second in pairs if first == text[column - 1]}
        num_right += len(before)
    assert num_right > 0


def repetition_penalty(model):
    output = generate(model, **RECORD, repetition_penalty=2.0)
    num_right = 0
    for (column, text), scores, logits in zip(known_when_revealed(output, 2), output.scores, output.logits):
        changed = set((scores != logits)[0].nonzero().flatten().tolist())
        assert changed == set(text.tolist()) - {MASK}
        num_right += len(set(text[column:].tolist()) - set(text[:column].tolist()) - {MASK})
    assert num_right > 0


def encoder_repetition_penalty(model):
    output = generate(model, **RECORD, encoder_repetition_penalty=2.0)
    for scores, logits in zip(output.scores, output.logits):
        assert (scores != logits)[0].nonzero().flatten().tolist() == [3, 5]


def suppress_tokens(model):
    assert all(banned == {4, 9} for _, _, banned in bans(generate(model, **RECORD, suppress_tokens=[4, 9])))


def begin_suppress_tokens(model):
    output = generate(model, **RECORD, begin_suppress_tokens=[4, 9])
    assert [banned for _, _, banned in bans(output)] == [{4, 9}, *[set()] * 13]


def min_new_tokens(model):
    for arguments in ({"min_new_tokens": 5}, {"min_length": 7}):
        output = generate(model, **RECORD, **arguments, eos_token_id=EOS, suppress_tokens=[4])
        assert [banned for _, _, banned in bans(output)][:6] == [{4, EOS}] * 5 + [{4}]


def forced_eos_token_id(model):
    assert generate(model, forced_eos_token_id=EOS)[0, -1] == EOS


def forced_bos_token_id(model):
    assert generate(model, (5,), forced_bos_token_id=17)[0, 1] == 17


def exponential_decay_length_penalty(model):
    output = generate(model, **RECORD, eos_token_id=EOS, exponential_decay_length_penalty=(4, 1.5))
    for place, (scores, logits) in enumerate(zip(output.scores, output.logits)):
        expected = logits[0, EOS].abs() * (1.5 ** max(place - 4, 0) - 1)
        torch.testing.assert_close((scores - logits)[0, EOS], expected)


def prefix_allowed_tokens_fn(model):
    seen = {}

    def allowed(row, prefix):
        seen[len(prefix)] = prefix.tolist()
        return [7, 8, 9]

    output = generate(model, **RECORD, prefix_allowed_tokens_fn=allowed)
    for column, text, banned in bans(output):
        assert seen[column] == text[:column] and banned == set(range(60)) - {7, 8, 9}
    assert any(MASK in prefix for prefix in seen.values())


def temperature(model):
    prompts = left_padded(random_prompts([3, 9], vocab_size=59))
    for arguments in (
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.4},
        {"min_p": 0.5},
        {"top_h": 0.4},
        {"typical_p": 0.4},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.05},
        {"renormalize_logits": True},
    ):
        output = model.generate(**prompts, max_new_tokens=14, seed=0, eos_token_id=None, **arguments, **RECORD)
        processor = model._get_logits_processor(model.generation_config.__class__(do_sample=True, **arguments), 9)
        for scores, logits in zip(output.scores, output.logits):
            torch.testing.assert_close(scores, processor(None, logits))
            assert not torch.equal(scores, logits)


def remove_invalid_values(model):
    everything = [[token] for token in range(60)]
    with pytest.raises(ValueError, match="must be finite for at least one token"):
        generate(model, bad_words_ids=everything)
    assert MASK not in generate(model, bad_words_ids=everything, remove_invalid_values=True)
    bans = {"bad_words_ids": everything[20:], "remove_invalid_values": True}
    assert (generate(model, (5, 3), **bans) < 20).all()


def guidance_scale(model):
    output = generate(model, **RECORD, guidance_scale=2.0, suppress_tokens=[4])
    assert not torch.equal(output.sequences, generate(model, suppress_tokens=[4]))
    assert all(banned == {4} for _, _, banned in bans(output))
    assert all(((scores == logits)[0, :4]).all() for scores, logits in zip(output.scores, output.logits))


def watermarking_config(model):
    output = generate(model, **RECORD, watermarking_config=WatermarkingConfig(bias=3.0))
    lists = {}
    for (column, text), scores, logits in zip(known_when_revealed(output, 2), output.scores, output.logits):
        green = frozenset(((scores - logits)[0] > 1).nonzero().flatten().tolist())
        assert lists.setdefault(int(text[column - 1]), green) == green and len(green) in (14, 15)
    assert MASK in lists and len(set(lists.values())) == len(lists)
    with pytest.raises(ValueError, match="`watermarking_config` must be a `WatermarkingConfig`, but got SynthID's"):
        generate(model, watermarking_config=SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3))


def logits_processor(model):
    class Record(LogitsProcessor):
        def __init__(self):
            self.seen = {}

        def __call__(self, input_ids, scores):
            self.seen[input_ids.shape[1]] = input_ids[0].tolist()
            return scores

    record = Record()
    output = generate(model, **RECORD, logits_processor=LogitsProcessorList([record]))
    for column, text in known_when_revealed(output, 2):
        assert record.seen[column] == text[:column].tolist()


CHECKS = [
    bad_words_ids,
    sequence_bias,
    no_repeat_ngram_size,
    encoder_no_repeat_ngram_size,
    repetition_penalty,
    encoder_repetition_penalty,
    temperature,
    suppress_tokens,
    begin_suppress_tokens,
    min_new_tokens,
    forced_bos_token_id,
    forced_eos_token_id,
    exponential_decay_length_penalty,
    prefix_allowed_tokens_fn,
    watermarking_config,
    logits_processor,
    guidance_scale,
    remove_invalid_values,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_processor_means_what_the_table_says(model, check):
    check(model)


def test_every_line_of_the_table_is_shown_by_a_test():
    table = PAGE.read_text(encoding="utf-8").partition("## Processors")[2].partition("\n## ")[0]
    names = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert names == [check.__name__ for check in CHECKS]


def test_a_subclass_of_a_processor_that_reads_no_token_may_read_them(model):
    widths = set()

    class Cooling(TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            widths.add(input_ids.shape[1])
            return super().__call__(input_ids, scores)

    generate(model, logits_processor=LogitsProcessorList([Cooling(2.0)]))
    assert widths == set(range(2, 16))
