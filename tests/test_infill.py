"""Infilling: gaps are filled, given tokens stay, and both sides of a gap within its block are read."""

import pytest
import reference
import torch
from conftest import DEVICE, random_model
from test_first_hitting import ALPHA, BATCH_SIZE, EOS, MASK, NUM_SAMPLES, chi_square_p_value, conditionals_of
from test_generation import left_padded, random_prompts
from transformers import TextDiffusionStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from bd3lm_hf import train_tokenizer


@pytest.fixture
def model():
    return random_model(vocab_size=101, attn_implementation="sdpa", eos_token_id=None, pad_token_id=0)


def with_gaps(prompts, gaps):
    """The prompts with the tokens at these positions masked (100)."""
    return [prompt.scatter(0, torch.tensor(gap), 100) for prompt, gap in zip(prompts, gaps)]


# In the middle of a block, over the border of two, a whole block, at the end of the text, and none at all.
GAPS = [[5], [2, 3, 4, 5], [4, 5, 6, 7, 12], [9, 10], []]
LENGTHS = [11, 9, 16, 11, 6]


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral", "confidence", "entropy_bound"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_gap_is_filled_and_every_given_token_stays(model, sampler, use_cache):
    prompts = with_gaps(random_prompts(LENGTHS), GAPS)
    inputs = left_padded(prompts)
    filled = model.generate(**inputs, infill=True, sampler=sampler, use_cache=use_cache, seed=2)
    assert filled.shape == inputs["input_ids"].shape
    given = inputs["input_ids"] != 100
    assert torch.equal(filled[given], inputs["input_ids"][given])
    assert not (filled == 100).any()
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], infill=True, sampler=sampler, seed=2 + row)
        assert torch.equal(alone[0], filled[row, -len(prompt) :])


def test_text_can_go_on_behind_the_gaps(model):
    (prompt,) = with_gaps(random_prompts([10]), [[3, 8]])
    text = model.generate(prompt[None], infill=True, max_new_tokens=7, seed=0)
    assert text.shape == (1, 17) and not (text == 100).any()
    filled = model.generate(prompt[None], infill=True, seed=0)
    # Up to the block in which the text goes on, both are filled alike.
    assert torch.equal(text[:, :8], filled[:, :8])
    longer = model.generate(filled[:, :8], max_new_tokens=9, seed=0)
    assert longer.shape == text.shape


def test_only_the_blocks_of_gaps_are_denoised(model):
    (prompt,) = with_gaps(random_prompts([40]), [[21, 30]])
    output = model.generate(prompt[None], infill=True, return_dict_in_generate=True)
    assert output.num_forward_passes.tolist() == [2]


def test_a_gap_is_filled_from_both_sides_with_the_distribution_of_the_reverse_process():
    model = random_model(
        seed=3,
        attn_implementation="sdpa",
        vocab_size=5,
        hidden_size=16,
        block_size=4,
        num_hidden_layers=1,
        eos_token_id=None,
        pad_token_id=EOS,
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    text = (2, 0, 1, 1, 0, MASK, 2, MASK)
    distribution = reference.first_hitting_distribution(conditionals_of(model), text, frozenset({5, 7}))
    torch.manual_seed(0)
    prompts = torch.tensor([text]).expand(BATCH_SIZE, -1)
    mask = torch.ones_like(prompts)
    samples = torch.cat(
        [
            model.generate(prompts, attention_mask=mask, infill=True, suppress_tokens=[EOS])
            for _ in range(NUM_SAMPLES // BATCH_SIZE)
        ]
    )
    assert chi_square_p_value(samples, distribution) > ALPHA


def test_a_mask_token_is_refused_unless_infilling_was_asked_for(model):
    with pytest.raises(ValueError, match="`input_ids` must not hold the mask token .100., which only `infill=True`"):
        model.generate(torch.tensor([[1, 100, 2]]), max_new_tokens=4)


class RecordingStreamer(BaseStreamer):
    """Keeps what it is shown: finished tokens, and the drafts of each block."""

    def __init__(self):
        self.shown, self.drafts, self.has_ended = [], [], False

    def put(self, value):
        # Streamers get what they show on the CPU.
        assert value.device.type == "cpu"
        self.shown.append(value.to(DEVICE))

    def put_draft(self, value):
        self.drafts.append(value.tolist())

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral", "confidence", "entropy_bound"])
@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 6}], ids=["fill", "fill_and_write"])
@pytest.mark.parametrize(("gaps", "length"), [*zip(GAPS, LENGTHS), ([0], 9), ([1, 17], 19)])
def test_a_streamer_is_shown_the_filled_text_and_no_gap(model, sampler, options, gaps, length):
    (prompt,) = with_gaps(random_prompts([length]), [gaps])
    streamer = RecordingStreamer()
    filled = model.generate(prompt[None], infill=True, sampler=sampler, seed=4, streamer=streamer, **options)
    first = min(gaps, default=length)
    assert torch.equal(streamer.shown[0], filled[:, :first]) and streamer.has_ended
    assert torch.equal(torch.cat([streamer.shown[0][0], *streamer.shown[1:]]), filled[0])
    # In pieces, as blocks are finished, each after its drafts.
    assert all(len(piece) <= 4 for piece in streamer.shown[1:])
    assert len(streamer.drafts) >= len({column // 4 for column in gaps})
    for draft in streamer.drafts:
        assert any(
            all(token in (100, known) for token, known in zip(draft, piece.tolist(), strict=True))
            for piece in streamer.shown[1:]
            if len(piece) == len(draft)
        )


def test_a_streamer_of_several_rows_is_shown_filled_columns(model):
    inputs = left_padded(with_gaps(random_prompts(LENGTHS), GAPS))
    streamer = RecordingStreamer()
    filled = model.generate(**inputs, infill=True, seed=2, streamer=streamer)
    prompts, *columns = streamer.shown
    assert torch.equal(torch.cat([prompts, *(column[:, None] for column in columns)], dim=1), filled)
    assert 0 < prompts.shape[1] < filled.shape[1] and not (prompts == 100).any()


def test_the_streamers_of_transformers_show_the_filled_text(capsys):
    tokenizer = train_tokenizer({"text": ["def main(path):\n    return\n"] * 9}, 280)
    ids = {"mask_token_id": tokenizer.mask_token_id, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 2}
    model = random_model(vocab_size=len(tokenizer), **ids)
    inputs = tokenizer("def [MASK][MASK](path):\n    return [MASK]", return_tensors="pt").to(model.device)
    options = {"infill": True, "seed": 1, "suppress_tokens": tokenizer.all_special_ids}
    for streamer_class in (TextStreamer, TextDiffusionStreamer):
        filled = model.generate(**inputs, **options, streamer=streamer_class(tokenizer))
        shown = capsys.readouterr().out
        # What a terminal shows in the end: each draft is taken back.
        shown = "".join(part.split("\0338\033[J")[-1] for part in shown.split("\0337"))
        assert shown == tokenizer.decode(filled[0]) + "\n" and "[MASK]" not in shown
