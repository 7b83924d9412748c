"""Texts from ids: a stop string ends a text where Transformers' criterion ends it, whatever its tokens are."""

import random

import pytest
import torch
from adapted import byte_tokenizer
from transformers import StopStringCriteria

from bd3lm_hf.serving.texts import StopTexts


# Tokens of several characters, which overlap stop strings in every way.
MERGED = ("ab", "abc", "b\u0120a", "\u0120a", "\u0120\u0120", "bca", "ca\u00c3", "\u00a9a")
STOPS = (["bca", " a", "é"], ["aé", "a  b", "never seen"], ["b"])


@pytest.mark.parametrize("merged", [(), MERGED])
def test_stop_strings_end_a_text_as_those_of_transformers_do(merged):
    tokenizer, rng = byte_tokenizer(*merged), random.Random(0)
    criteria = [[kind(tokenizer, stops) for kind in (StopTexts, StopStringCriteria)] for stops in STOPS]
    vocabulary = tokenizer.get_vocab()
    pieces = [vocabulary[part] for part in ("a", "b", "c", "\u0120", "\u00c3", "\u00a9", *merged)]
    num_ends = 0
    for _ in range(60):
        ids = torch.tensor([[rng.choice(pieces) for _ in range(12)] for _ in range(2)])
        for length in range(1, 13):
            for own, theirs in criteria:
                ends = own(ids[:, :length], None)
                assert ends.tolist() == theirs(ids[:, :length], None).tolist(), tokenizer.batch_decode(ids[:, :length])
                num_ends += int(ends.sum())
    assert num_ends > 100
