"""The training loss: an unbiased bound, over the right tokens, at the promised cost."""

import math

import pytest
import reference
import torch
from conftest import DEVICE, random_model, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.modeling import loss_block_diffusion
from bd3lm_hf.modeling.loss_block_diffusion import chunked_nats, token_nats


# How many standard errors an average may lie from its expectation: with 100 batches, about 1 false alarm in 10,000.
STANDARD_ERRORS = 4
NUM_BATCHES = 100


def text(model, length=8, seed=0, batch_size=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size - 1, (batch_size, length), generator=generator)


def know_nothing_model(**overrides):
    """A model that gives every token but the mask the same probability."""
    model = BD3LMForMaskedLM(tiny_config(**overrides)).to(DEVICE)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    return model


def exact_subset_losses(model, x_0, ignore_bos=False):
    """For each block of x_0 [1, L], its maskable positions and the reference's loss under each of its masks."""
    state, size, found = model.state_dict(), model.config.block_size, []
    for start in range(0, x_0.shape[1], size):
        block = [i for i in range(start, min(start + size, x_0.shape[1])) if i > 0 or not ignore_bos]

        def logits_of(x_t):
            return reference.two_stream_logits(state, model.config, x_t, x_0)

        losses = reference.block_subset_losses(logits_of, x_0, block, model.config.mask_token_id)
        found.append((block, {subset: loss.item() for subset, loss in losses.items()}))
    return found


@torch.no_grad()
def estimates(model, x_0, batch_size=250, seed=0, **kwargs):
    """Mean over each of NUM_BATCHES batches of copies of x_0 of the loss per text, [NUM_BATCHES, L] in nats."""
    torch.manual_seed(seed)
    copies = x_0.expand(batch_size, -1)
    # In evaluation mode the same text meets the same noise.
    model.train()
    batches = [
        model(input_ids=copies, labels=copies, **kwargs).token_nelbo.double().mean(0) for _ in range(NUM_BATCHES)
    ]
    return torch.stack(batches)


def deviates(samples, expected):
    """By how many standard errors the mean of `samples` [batches] lies from `expected`; batches are independent."""
    return ((samples.mean(0) - expected) / (samples.std(0) / math.sqrt(len(samples)))).item()


class TestUnbiasedBound:
    """Averages of many draws against the exact sum over all masks of each block; s = 4, and a short last block."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        return random_model(
            seed=1, attn_implementation="sdpa", vocab_size=9, hidden_size=16, num_hidden_layers=1, ignore_bos=False
        )

    @pytest.fixture(scope="class")
    @classmethod
    def x_0(cls, model):
        return text(model, length=10)

    @pytest.fixture(scope="class")
    @classmethod
    def subset_losses(cls, model, x_0):
        return exact_subset_losses(model, x_0)

    def test_full_interval_equals_the_rao_blackwell_sum(self, model, x_0, subset_losses):
        # Its variance diverges, but only as log(number of draws): the ratio to the standard error stays normal.
        samples = estimates(model, x_0, noise_interval=(0.0, 1.0))
        for block, losses in subset_losses:
            expected = reference.rao_blackwell_nelbo(losses, len(block))
            assert abs(deviates(samples[:, block].sum(-1), expected)) < STANDARD_ERRORS

    def test_the_threshold_would_notice_a_bias_of_five_percent(self, model, x_0, subset_losses):
        samples = estimates(model, x_0, noise_interval=(0.0, 1.0)).sum(-1)
        expected = sum(reference.rao_blackwell_nelbo(losses, len(block)) for block, losses in subset_losses)
        assert abs(deviates(samples, 1.05 * expected)) > STANDARD_ERRORS

    @pytest.mark.parametrize("interval", [(1e-3, 1.0), (0.3, 0.8)])
    @pytest.mark.parametrize("schedule", ["loglinear", "square", "square_root", "log", "cosine"])
    def test_each_schedule_and_interval_equals_its_integral(
        self, model, x_0, subset_losses, schedule, interval, monkeypatch
    ):
        monkeypatch.setattr(model.config, "noise_schedule", schedule)
        samples = estimates(model, x_0, batch_size=100, noise_interval=interval).sum(-1)
        expected = sum(
            reference.interval_nelbo(losses, len(block), schedule, interval) for block, losses in subset_losses
        )
        assert abs(deviates(samples, expected)) < STANDARD_ERRORS

    def test_the_integral_over_the_full_interval_is_the_rao_blackwell_sum(self, subset_losses):
        # The reference against itself, by two roads: quadrature over t, and the sum over the number of masked tokens.
        for block, losses in subset_losses:
            exact = reference.rao_blackwell_nelbo(losses, len(block))
            for schedule, tolerance in (("loglinear", 1e-6), ("log", 1e-6), ("square", 2e-3), ("square_root", 2e-3)):
                integral = reference.interval_nelbo(losses, len(block), schedule, (0.0, 1.0)).item()
                assert integral == pytest.approx(exact, rel=tolerance), schedule

    def test_ignored_first_token_leaves_the_bound_of_the_rest(self, model, x_0, monkeypatch):
        monkeypatch.setattr(model.config, "ignore_bos", True)
        samples = estimates(model, x_0, batch_size=100, noise_interval=(0.2, 1.0))
        assert not samples[:, 0].any()
        expected = sum(
            reference.interval_nelbo(losses, len(block), "loglinear", (0.2, 1.0))
            for block, losses in exact_subset_losses(model, x_0, ignore_bos=True)
        )
        assert abs(deviates(samples.sum(-1), expected)) < STANDARD_ERRORS


class TestAutoregressiveCase:
    """Block size 1 with t = 1 is the log-likelihood of an autoregressive model, without any noise."""

    @pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
    @torch.no_grad()
    def test_equals_the_log_likelihood_computed_token_by_token(self, attn_implementation):
        model = random_model(2, attn_implementation, block_size=1, ignore_bos=False)
        x_0, mask = text(model, 12, batch_size=3), model.config.mask_token_id
        # The chain rule with plain passes: read the tokens before, ask for the next one.
        expected = torch.zeros(x_0.shape, dtype=torch.float64)
        for i in range(x_0.shape[1]):
            ids = torch.cat([x_0[:, :i], torch.full((3, 1), mask)], dim=1)
            log_probs = reference.subs_log_probs(model(input_ids=ids).logits.double(), ids, mask)
            expected[:, i] = -log_probs[:, -1].gather(-1, x_0[:, i : i + 1]).squeeze(-1)
        output = model(input_ids=x_0, labels=x_0, noise_interval=(1.0, 1.0))
        torch.testing.assert_close(output.token_nelbo.double(), expected, rtol=0, atol=2e-5)
        assert output.loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)

    @torch.no_grad()
    def test_does_not_depend_on_the_random_seed(self):
        model = random_model(2, "sdpa", block_size=1)
        x_0 = text(model, 12)
        losses = [
            (torch.manual_seed(seed), model(input_ids=x_0, labels=x_0, noise_interval=(1.0, 1.0)).loss.item())[1]
            for seed in (0, 1)
        ]
        assert losses[0] == losses[1] > 0


class TestWhichTokensCount:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        return random_model(3, "sdpa")

    @torch.no_grad()
    def test_labels_of_minus_100_are_neither_masked_nor_predicted(self, model, recorded_draws):
        x_0 = text(model, 18, batch_size=4)
        labels = x_0.masked_fill(torch.rand(x_0.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -100)
        labels[:, 0] = -100
        output = model(input_ids=x_0, labels=labels, noise_interval=(1.0, 1.0))
        predicted = labels != -100
        _, _, x_t = recorded_draws[-1]
        assert torch.equal(x_t == model.config.mask_token_id, predicted)
        assert torch.equal(output.token_nelbo > 0, predicted)
        assert output.loss.item() == pytest.approx(output.token_nelbo.sum().item() / predicted.sum().item(), rel=1e-6)

    @torch.no_grad()
    def test_a_prompt_of_minus_100_is_still_read(self, model):
        x_0 = text(model, 16)
        labels = x_0.clone()
        labels[:, :6] = -100
        other = x_0.clone()
        other[:, 5] = (other[:, 5] + 1) % (model.config.vocab_size - 1)
        first, second = (
            model(input_ids=ids, labels=labels, noise_interval=(1.0, 1.0)).token_nelbo for ids in (x_0, other)
        )
        assert (first - second)[:, 6:].abs().max() > 1e-3

    @torch.no_grad()
    def test_the_targets_are_the_labels_and_the_text_is_what_is_read(self, model):
        x_0 = text(model, 16)
        labels = (x_0 + 1) % (model.config.vocab_size - 1)
        nelbo = model(input_ids=x_0, labels=labels, noise_interval=(1.0, 1.0)).token_nelbo
        x_t = torch.full_like(x_0, model.config.mask_token_id)
        x_t[:, 0] = x_0[:, 0]
        logits = reference.two_stream_logits(model.state_dict(), model.config, x_t, x_0)
        log_probs = reference.subs_log_probs(logits, x_t, model.config.mask_token_id)
        expected = -log_probs.gather(-1, labels[..., None]).squeeze(-1)
        torch.testing.assert_close(nelbo[:, 1:].double(), expected[:, 1:], rtol=0, atol=2e-5)

    @pytest.mark.parametrize("ignore_bos", [True, False])
    @torch.no_grad()
    def test_ignore_bos_leaves_out_the_first_token_of_each_row(self, model, ignore_bos, monkeypatch):
        monkeypatch.setattr(model.config, "ignore_bos", ignore_bos)
        x_0 = text(model, 10, batch_size=3)
        real = torch.tensor([10, 7, 2])
        attention_mask = (torch.arange(10) >= (10 - real)[:, None]).long()
        output = model(
            input_ids=x_0,
            attention_mask=attention_mask,
            labels=x_0.masked_fill(attention_mask == 0, -100),
            noise_interval=(1.0, 1.0),
        )
        counted = (output.token_nelbo > 0).sum(-1)
        assert torch.equal(counted, real - 1 if ignore_bos else real)
        first = output.token_nelbo[torch.arange(3), 10 - real]
        assert (first > 0).tolist() == [not ignore_bos] * 3
        assert output.loss.item() == pytest.approx(output.token_nelbo.sum().item() / counted.sum().item(), rel=1e-6)

    @torch.no_grad()
    def test_num_items_in_batch_replaces_the_denominator(self, model):
        x_0 = text(model, 18, batch_size=2)
        losses = []
        for num_items in (None, 7, torch.tensor(70)):
            torch.manual_seed(0)
            losses.append(model(input_ids=x_0, labels=x_0, num_items_in_batch=num_items))
        total = losses[0].token_nelbo.sum().item()
        assert losses[0].loss.item() == pytest.approx(total / (2 * 17), rel=1e-6)
        assert losses[1].loss.item() == pytest.approx(total / 7, rel=1e-6)
        assert losses[2].loss.item() == pytest.approx(total / 70, rel=1e-6)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
    @torch.no_grad()
    def test_padding_changes_nothing(self, side, attn_implementation):
        model = random_model(4, attn_implementation)
        x_0, pad = text(model, 11), torch.full((1, 6), 5)
        padded, is_real = torch.cat([pad, x_0], 1), torch.cat([torch.zeros(1, 6), torch.ones(1, 11)], 1).long()
        if side == "right":
            padded, is_real = padded.roll(-6, 1), is_real.roll(-6, 1)
        alone = model(input_ids=x_0, labels=x_0, noise_interval=(1.0, 1.0))
        output = model(
            input_ids=padded,
            attention_mask=is_real,
            labels=padded.masked_fill(is_real == 0, -100),
            noise_interval=(1.0, 1.0),
        )
        assert output.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)
        torch.testing.assert_close(output.token_nelbo[is_real.bool()], alone.token_nelbo[0], rtol=0, atol=2e-5)
        assert not output.token_nelbo[is_real == 0].any()

    def test_the_mask_token_as_a_label_is_refused(self, model):
        x_0 = text(model, 8)
        labels = x_0.clone()
        labels[0, 3] = model.config.mask_token_id
        with pytest.raises(ValueError, match=rf"`labels`.*mask token \({model.config.mask_token_id}\).*-100"):
            model(input_ids=x_0, labels=labels)

    @pytest.mark.parametrize("name", ["labels", "attention_mask"])
    def test_arguments_of_another_shape_are_refused(self, model, name):
        x_0 = text(model, 8)
        arguments = {"labels": x_0, name: torch.ones(1, 7, dtype=torch.long)}
        with pytest.raises(ValueError, match=rf"`{name}` must be of the shape.*\[1, 8\].*\[1, 7\]"):
            model(input_ids=x_0, **arguments)

    @pytest.mark.parametrize("interval", [(0.6, 0.4), (-0.1, 1.0), (0.0, 1.5)])
    def test_a_bad_noise_interval_is_refused(self, model, interval):
        x_0 = text(model, 8)
        with pytest.raises(ValueError, match="`noise_interval`.*0 <= beta <= omega <= 1"):
            model(input_ids=x_0, labels=x_0, noise_interval=interval)

    @pytest.mark.parametrize("extra", ["timesteps", "loss_weights"])
    def test_parts_of_noise_drawn_elsewhere_without_its_text_are_refused(self, model, extra):
        x_0 = text(model, 8)
        with pytest.raises(ValueError, match="noise to be drawn here.*`timesteps` or `loss_weights`"):
            model(input_ids=x_0, labels=x_0, **{extra: torch.zeros(x_0.shape)})

    def test_noise_drawn_elsewhere_comes_with_its_weights(self, model):
        x_0 = text(model, 8)
        with pytest.raises(ValueError, match="`loss_weights` must be given"):
            model(input_ids=x_0, clean_input_ids=x_0, labels=x_0)


class TestWhichTimes:
    """A model that knows nothing gives every token log(V - 1) nats, so that nelbo = log(V - 1) / t shows t."""

    @staticmethod
    def times(training, **kwargs):
        model = know_nothing_model(noise_interval=(0.45, 0.95)).train(training)
        x_0 = text(model, 32, batch_size=64)
        torch.manual_seed(0)
        with torch.no_grad():
            nelbo = model(input_ids=x_0, labels=x_0, **kwargs).token_nelbo
        return math.log(model.config.vocab_size - 1) / nelbo[nelbo > 0].double()

    def test_training_draws_from_the_interval_of_the_config(self):
        t = self.times(training=True)
        assert 0.45 - 1e-5 <= t.min() < 0.46 and 0.94 < t.max() <= 0.95 + 1e-5

    def test_evaluation_draws_from_the_full_interval(self):
        t = self.times(training=False)
        assert 1e-3 - 1e-5 <= t.min() < 0.1 and 0.98 < t.max() <= 1 + 1e-5

    @pytest.mark.parametrize("training", [True, False])
    def test_an_interval_given_to_the_call_is_the_one_that_counts(self, training):
        t = self.times(training, noise_interval=(0.7, 0.75))
        assert 0.7 - 1e-5 <= t.min() and t.max() <= 0.75 + 1e-5


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


class TestCost:
    # One row of logits outweighs all else: [L, V] alone is larger than any mask, activation or weight of the model.
    vocab_size, batch_size, length = 2003, 4, 64

    def model(self):
        return random_model(5, "sdpa", vocab_size=self.vocab_size, noise_interval=(0.4, 0.6), ignore_bos=False).train()

    def largest(self, model, **kwargs):
        x_0 = text(model, self.length, batch_size=self.batch_size)
        torch.manual_seed(0)
        with LargestTensor() as mode:
            output = model(input_ids=x_0, **({"labels": x_0} | kwargs))
            if output.loss is not None:
                output.loss.backward()
        return mode.numel, output

    def test_training_makes_logits_only_where_a_token_is_masked(self):
        numel, output = self.largest(self.model())
        num_masked = (output.token_nelbo > 0).sum().item()
        assert 0 < num_masked < 0.7 * self.batch_size * self.length
        assert output.logits is None
        assert numel <= num_masked * self.vocab_size < self.batch_size * self.length * self.vocab_size

    def test_a_denoising_pass_makes_all_of_them(self):
        numel, _ = self.largest(self.model(), labels=None)
        assert numel == self.batch_size * self.length * self.vocab_size

    def test_logits_are_made_in_chunks_of_a_bounded_size(self, monkeypatch):
        for name in ("CHUNK_NUMEL", "CHUNK_NUMEL_ON_CPU"):
            monkeypatch.setattr(loss_block_diffusion, name, 20 * self.vocab_size)
        numel, _ = self.largest(self.model(), noise_interval=(1.0, 1.0))
        # What is left are the weights and, on an accelerator, whose streams are whole, the scores of two heads.
        scores = 0 if DEVICE.type == "cpu" else self.batch_size * 2 * (2 * self.length) ** 2
        assert numel <= max(20 * self.vocab_size, self.vocab_size * 32, scores)


class TestTokenNats:
    """The loss of hidden states against plain autograd through dense log-probabilities."""

    mask_token_id = 3

    def case(self, bias=True):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(50, 8, generator=generator, requires_grad=True)
        projection = torch.nn.Linear(8, 11, bias=bias).to(DEVICE)
        with torch.no_grad():
            projection.weight.copy_(torch.randn(11, 8, generator=generator))
        targets = torch.randint(3, (50,), generator=generator)
        targets[::3] = 7
        return hidden, targets, torch.rand(50, generator=generator) * 10, projection

    def dense(self, hidden, targets, projection):
        logits = projection(hidden)
        kept = torch.arange(11) != self.mask_token_id
        log_normaliser = torch.logsumexp(logits[:, kept], dim=-1)
        return log_normaliser - logits.gather(-1, targets[:, None]).squeeze(-1)

    def assert_equal_gradients(self, nats, expected, weights, inputs):
        """Under a weight for each token, as nobody knows it before the backward pass."""
        actual = torch.autograd.grad((3 * weights * nats).sum(), inputs)
        wanted = torch.autograd.grad((3 * weights * expected).sum(), inputs)
        for gradient, reference_gradient in zip(actual, wanted, strict=True):
            torch.testing.assert_close(gradient, reference_gradient, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("chunk_rows", [1, 7, 50, 1000])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("function", [token_nats, chunked_nats])
    def test_value_and_gradients_whatever_the_chunk(self, function, chunk_rows, bias, monkeypatch):
        for name in ("CHUNK_NUMEL", "CHUNK_NUMEL_ON_CPU"):
            monkeypatch.setattr(loss_block_diffusion, name, chunk_rows * 11)
        hidden, targets, weights, projection = self.case(bias)
        chunk_size = (chunk_rows,) if function is chunked_nats else ()
        nats = function(hidden, targets, projection, self.mask_token_id, *chunk_size)
        expected = self.dense(hidden, targets, projection)
        torch.testing.assert_close(nats, expected)
        self.assert_equal_gradients(nats, expected, weights, [hidden, *projection.parameters()])

    def test_a_wrapped_projection_goes_through_its_own_forward(self):
        class Doubled(torch.nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        hidden, targets, weights, plain = self.case()
        wrapped = Doubled(8, 11).to(DEVICE)
        wrapped.load_state_dict(plain.state_dict())
        doubled = torch.nn.Linear(8, 11).to(DEVICE)
        doubled.load_state_dict({name: 2 * value for name, value in plain.state_dict().items()})
        nats, expected = token_nats(hidden, targets, wrapped, self.mask_token_id), self.dense(hidden, targets, doubled)
        torch.testing.assert_close(nats, expected)
        self.assert_equal_gradients(nats, expected, weights, [hidden])

    def test_a_frozen_projection_passes_the_gradient_on(self):
        hidden, targets, weights, projection = self.case()
        projection.requires_grad_(False)
        nats = token_nats(hidden, targets, projection, self.mask_token_id)
        self.assert_equal_gradients(nats, self.dense(hidden, targets, projection), weights, [hidden])


@torch.no_grad()
def test_the_loss_of_a_half_precision_model_is_accumulated_in_float32():
    # Each of the 4096 tokens costs exactly log(V - 1) nats, which bfloat16 can neither hold nor sum.
    model = know_nothing_model(ignore_bos=False).to(torch.bfloat16).eval()
    x_0 = text(model, 64, batch_size=64)
    output = model(input_ids=x_0, labels=x_0, noise_interval=(1.0, 1.0))
    assert output.loss.dtype == output.token_nelbo.dtype == torch.float32
    assert output.loss.item() == pytest.approx(math.log(model.config.vocab_size - 1), rel=1e-6)


def test_a_new_model_starts_with_closed_branches_and_equal_probabilities():
    # As in the published code (adaLN-Zero, and an output projection of zeros).
    model = BD3LMForMaskedLM(tiny_config()).to(DEVICE)
    for name, parameter in model.named_parameters():
        if "adaln_modulation" in name or name.startswith("lm_head"):
            assert not parameter.any(), name
    assert not model(input_ids=text(model, 8)).logits.any()
