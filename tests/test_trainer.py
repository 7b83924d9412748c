"""BD3LMTrainer: what it evaluates, chooses, averages and refuses. Resuming and processes have tests of their own."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import DEVICE, random_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from bd3lm_hf import (
    BD3LMConfig,
    BD3LMTrainer,
    BD3LMTrainingArguments,
    NoiseSampler,
    evaluate_likelihood,
    train_tokenizer,
)
from bd3lm_hf.evaluation.variance import nelbo_variance
from bd3lm_hf.noise.intervals import noise_interval_grid


STANDARD_ERRORS = 4


def rows(number=24, lengths=(16,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(22, (lengths[index % len(lengths)],), generator=generator).tolist()}
        for index in range(number)
    ]


@pytest.fixture
def make_trainer(tmp_path):
    def make(model=None, train_dataset=None, eval_dataset=None, data_collator=None, tokenizer=None, **overrides):
        arguments = {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": DEVICE.type == "cpu",
            "disable_tqdm": True,
            **overrides,
        }
        return BD3LMTrainer(
            random_model(0, "sdpa") if model is None else model,
            BD3LMTrainingArguments(str(tmp_path), **arguments),
            data_collator,
            train_dataset=rows() if train_dataset is None else train_dataset,
            eval_dataset=rows(seed=1) if eval_dataset is None else eval_dataset,
            processing_class=tokenizer,
        )

    return make


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class TestEvaluation:
    def test_estimates_the_exact_bound(self, make_trainer):
        eval_dataset = rows(8, seed=2)
        trainer = make_trainer(eval_dataset=eval_dataset)
        x_0, state = torch.tensor([row["input_ids"] for row in eval_dataset]), trainer.model.state_dict()

        def logits_of(x_t):
            return reference.two_stream_logits(state, trainer.config, x_t, x_0)

        total = 0
        for start in range(0, 16, 4):
            block = range(max(start, 1), start + 4)
            losses = reference.block_subset_losses(logits_of, x_0, block, trainer.config.mask_token_id)
            total += reference.interval_nelbo(losses, len(block), "loglinear", (1e-3, 1.0)).sum().item()
        exact, samples = total / (8 * 15), []
        for seed in range(30):
            trainer.args.seed = seed
            samples.append(trainer.evaluate()["eval_nelbo"])
        error = np.std(samples, ddof=1) / math.sqrt(30)
        assert abs(np.mean(samples) - exact) < STANDARD_ERRORS * error < 0.05 * exact

    def test_is_the_same_for_every_batch_size_and_random_state(self, make_trainer):
        def evaluate(lengths, **overrides):
            return make_trainer(eval_dataset=rows(lengths=lengths, seed=1), **overrides).evaluate()

        for lengths in ((16,), (16, 9, 5)):
            first = evaluate(lengths)
            for size in (1, 5, 24):
                torch.manual_seed(size)
                metrics = evaluate(lengths, per_device_eval_batch_size=size)
                for name in ("eval_nelbo", "eval_nelbo_standard_error", "eval_nelbo_variance"):
                    assert metrics[name] == pytest.approx(first[name], rel=1e-5), name
            assert evaluate(lengths, seed=1)["eval_nelbo"] != pytest.approx(first["eval_nelbo"], rel=1e-3)

    def test_at_block_size_1_is_the_autoregressive_log_likelihood(self, make_trainer):
        model, eval_dataset = random_model(0, "sdpa", block_size=1), rows(lengths=(16, 11), seed=1)
        exact = evaluate_likelihood(model, [row["input_ids"] for row in eval_dataset], progress=False)
        assert exact.draw_standard_error == 0
        metrics = make_trainer(model, eval_dataset=eval_dataset).evaluate()
        assert metrics["eval_nelbo"] == pytest.approx(exact.nelbo, rel=1e-5)
        assert metrics["eval_nelbo_standard_error"] == pytest.approx(exact.standard_error, rel=1e-4)

    def test_loss_and_perplexity_are_those_of_the_bound(self, make_trainer):
        metrics = make_trainer().evaluate()
        assert metrics["eval_loss"] == metrics["eval_nelbo"]
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_nelbo"]))
        assert "eval_bits_per_byte" not in metrics

    @pytest.mark.parametrize("masking", ["bernoulli", "exact_count"])
    def test_the_variance_is_that_of_training(self, make_trainer, masking):
        trainer = make_trainer(
            eval_dataset=rows(160, seed=1), masking=masking, noise_interval=(0.3, 0.8), fix_noise_interval=True
        )
        brute_force = nelbo_variance(
            trainer.model,
            [row["input_ids"] for row in rows(160, seed=1)],
            (0.3, 0.8),
            masking=masking,
            num_draws=2,
            batch_size=50,
            progress=False,
        )
        error = math.sqrt(2) * brute_force.standard_error
        assert abs(trainer.evaluate()["eval_nelbo_variance"] - brute_force.value) < STANDARD_ERRORS * error
        assert error < 0.1 * brute_force.value

    def test_bits_per_byte_count_the_bytes_of_the_predicted_text(self, make_trainer):
        texts = ["naïve café, twice", "plain text of many words", "def f(x):\n    return x", "…"] * 6
        datasets = pytest.importorskip("datasets")
        tokenizer = train_tokenizer(datasets.Dataset.from_dict({"text": texts}), 280)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        model = random_model(0, "sdpa", vocab_size=280, mask_token_id=tokenizer.mask_token_id)
        dataset = [{"input_ids": row} for row in ids]
        metrics = make_trainer(model, dataset, dataset, tokenizer=tokenizer).evaluate()
        num_tokens = sum(len(row) - 1 for row in ids)
        num_bytes = sum(len(text.encode()) for text in texts)
        expected = metrics["eval_nelbo"] * num_tokens / math.log(2) / num_bytes
        assert metrics["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-5)

    def test_tokens_of_unknown_bytes_have_no_bits_per_byte(self, make_trainer):
        backend = Tokenizer(models.WordLevel({str(number): number for number in range(23)}, unk_token="0"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0")
        assert "eval_bits_per_byte" not in make_trainer(tokenizer=tokenizer).evaluate()

    def test_predict_gives_the_same_figures(self, make_trainer):
        trainer = make_trainer()
        output, metrics = trainer.predict(trainer.eval_dataset), trainer.evaluate()
        assert output.predictions is None
        for name in ("nelbo", "nelbo_standard_error", "perplexity", "nelbo_variance", "loss"):
            assert output.metrics[f"test_{name}"] == metrics[f"eval_{name}"], name

    def test_several_datasets_have_metrics_each(self, make_trainer):
        datasets = {"one": rows(seed=1), "two": rows(8, seed=2)}
        trainer = make_trainer(eval_dataset=datasets)
        metrics = trainer.evaluate()
        for name, dataset in datasets.items():
            alone = make_trainer(eval_dataset=dataset).evaluate()
            assert metrics[f"eval_{name}_nelbo"] == alone["eval_nelbo"]
            assert metrics[f"eval_{name}_perplexity"] == alone["eval_perplexity"]

    def test_streams_are_evaluated_and_trained_on(self, make_trainer):
        datasets = pytest.importorskip("datasets")

        def stream():
            return datasets.IterableDataset.from_generator(lambda: iter(rows(seed=1)))

        metrics = [
            make_trainer(eval_dataset=stream(), per_device_eval_batch_size=size).evaluate() for size in (5, 5, 8)
        ]
        assert metrics[0]["eval_nelbo"] == metrics[1]["eval_nelbo"] == pytest.approx(metrics[2]["eval_nelbo"])
        trainer = make_trainer(train_dataset=stream())
        trainer.train()
        assert trainer.state.global_step == 4


@pytest.fixture
def drawn_intervals(monkeypatch):
    """List to which every draw of noise adds its interval."""
    drawn, draw = [], NoiseSampler.draw

    def recording_draw(self, config, noise_interval, *args, **kwargs):
        drawn.append(tuple(noise_interval))
        return draw(self, config, noise_interval, *args, **kwargs)

    monkeypatch.setattr(NoiseSampler, "draw", recording_draw)
    return drawn


class TestSearch:
    def test_the_chosen_interval_is_used_by_the_next_step_and_saved(self, make_trainer, drawn_intervals, tmp_path):
        trainer = make_trainer(eval_strategy="steps", eval_steps=2, noise_interval=(0.4, 0.6), ema_decay=0.0)
        trainer.train()
        (beta, _), (omega, _) = logged(trainer, "noise_interval_beta"), logged(trainer, "noise_interval_omega")
        chosen = (beta, omega)
        assert chosen in noise_interval_grid() and chosen != (1e-3, 1.0)
        # 2 steps, 3 batches of evaluation under the full interval, and the same again.
        assert drawn_intervals == [(0.4, 0.6)] * 2 + [(1e-3, 1.0)] * 3 + [chosen] * 2 + [(1e-3, 1.0)] * 3
        trainer.save_model()
        last = (logged(trainer, "noise_interval_beta")[1], logged(trainer, "noise_interval_omega")[1])
        assert tuple(BD3LMConfig.from_pretrained(tmp_path).noise_interval) == last == trainer.config.noise_interval

    def test_takes_the_interval_of_least_variance(self, make_trainer):
        trainer = make_trainer(eval_strategy="steps", eval_steps=4, eval_dataset=rows(100, seed=1), ema_decay=0.0)
        trainer.train()
        chosen, sequences = trainer.config.noise_interval, [row["input_ids"] for row in rows(100, seed=1)]
        found = {
            interval: nelbo_variance(trainer.model, sequences, interval, num_draws=2, batch_size=50, progress=False)
            for interval in ((1e-3, 1.0), (0.2, 0.8), chosen)
        }
        assert min(found, key=lambda interval: found[interval].value) == chosen
        (variance,), (of_full,) = logged(trainer, "nelbo_variance"), logged(trainer, "nelbo_variance_of_full_interval")
        assert variance == logged(trainer, "eval_nelbo_variance")[0] < of_full
        error = math.sqrt(2) * found[chosen].standard_error
        assert abs(variance - found[chosen].value) < STANDARD_ERRORS * error < 0.5 * variance

    def test_fix_noise_interval_turns_it_off(self, make_trainer, drawn_intervals):
        trainer = make_trainer(
            eval_strategy="steps", eval_steps=1, noise_interval=(0.4, 0.6), fix_noise_interval=True, max_steps=3
        )
        trainer.train()
        assert not logged(trainer, "noise_interval_beta")
        assert drawn_intervals == ([(0.4, 0.6)] + [(1e-3, 1.0)] * 3) * 3
        assert tuple(trainer.config.noise_interval) == (0.4, 0.6)

    @pytest.mark.parametrize("every, steps", [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [1, 4])])
    def test_takes_place_at_every_so_many_evaluations(self, make_trainer, every, steps):
        trainer = make_trainer(eval_strategy="steps", eval_steps=1, max_steps=5, noise_interval_search_every=every)
        trainer.train()
        found = [entry["step"] for entry in trainer.state.log_history if "noise_interval_beta" in entry]
        assert found == steps and len(logged(trainer, "eval_nelbo")) == 5

    def test_takes_place_once_where_there_are_several_datasets(self, make_trainer):
        trainer = make_trainer(
            eval_strategy="steps", eval_steps=2, eval_dataset={"one": rows(seed=1), "two": rows(8, seed=2)}
        )
        trainer.train()
        assert len(logged(trainer, "noise_interval_beta")) == 2 == len(logged(trainer, "eval_two_nelbo"))
        assert logged(trainer, "nelbo_variance") == logged(trainer, "eval_one_nelbo_variance")

    def test_does_not_take_place_outside_training(self, make_trainer):
        trainer = make_trainer()
        trainer.evaluate()
        assert tuple(trainer.config.noise_interval) == (1e-3, 1.0)

    def test_the_model_keeps_its_interval_and_schedule_unless_told(self, make_trainer):
        def config(**overrides):
            model = random_model(0, "sdpa", noise_schedule="cosine", noise_interval=(0.3, 0.8))
            return make_trainer(model, **overrides).model.config

        assert (config().noise_schedule, tuple(config().noise_interval)) == ("cosine", (0.3, 0.8))
        told = config(noise_schedule="log", noise_interval=[0.2, 0.9])
        assert (told.noise_schedule, tuple(told.noise_interval)) == ("log", (0.2, 0.9))


class TestBlockSizeSchedule:
    @pytest.mark.parametrize("schedule", [{0: 16, 2: 4, 3: 2}, ["0:16", "2:4", "3:2"]])
    def test_each_step_has_its_block_size(self, make_trainer, schedule):
        trainer, sizes = make_trainer(block_size_schedule=schedule), []

        class Record(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                sizes.append(model.config.block_size)

        trainer.add_callback(Record())
        trainer.train()
        assert sizes == [16, 16, 4, 2] and trainer.config.block_size == 2

    def test_before_its_first_entry_the_model_keeps_its_own(self, make_trainer):
        trainer = make_trainer(block_size_schedule={3: 2})
        trainer.train()
        plain = make_trainer(fix_noise_interval=True)
        plain.train()
        losses, of_plain = logged(trainer, "loss"), logged(plain, "loss")
        assert losses[:3] == of_plain[:3] and losses[3] != of_plain[3]


class TestMovingAverage:
    """Four steps; `weights` are those after each, and `averages` what torch's running mean makes of them by hand."""

    @staticmethod
    def run(make_trainer, monkeypatch, **overrides):
        trainer, weights, evaluated = make_trainer(eval_strategy="steps", eval_steps=2, **overrides), [], []
        head = trainer.model.lm_head.weight

        class Record(TrainerCallback):
            def on_optimizer_step(self, args, state, control, **kwargs):
                weights.append(head.detach().clone())

        prediction_step = trainer.prediction_step

        def recording_step(*args, **kwargs):
            evaluated.append(head.detach().clone())
            return prediction_step(*args, **kwargs)

        monkeypatch.setattr(trainer, "prediction_step", recording_step)
        trainer.add_callback(Record())
        trainer.train()
        return weights, evaluated[:: len(evaluated) // 2], head.detach()

    @staticmethod
    def averages(weights, decay):
        found = [weights[0]]
        for number, weight in enumerate(weights[1:], start=1):
            d = min(decay, (1 + number) / (10 + number))
            found.append(d * found[-1] + (1 - d) * weight)
        return found

    @pytest.mark.parametrize("decay", [0.9999, 0.1])
    def test_is_evaluated_and_exported(self, make_trainer, monkeypatch, decay):
        weights, evaluated, final = self.run(make_trainer, monkeypatch, ema_decay=decay)
        averages = self.averages(weights, decay)
        torch.testing.assert_close(torch.stack(evaluated), torch.stack([averages[1], averages[3]]))
        torch.testing.assert_close(final, averages[3])
        assert (averages[3] - weights[3]).abs().max() > 1e-4

    def test_is_kept_out_of_the_model_if_it_is_not_to_be_exported(self, make_trainer, monkeypatch):
        weights, evaluated, final = self.run(make_trainer, monkeypatch, export_ema=False)
        torch.testing.assert_close(evaluated[1], self.averages(weights, 0.9999)[3])
        assert torch.equal(final, weights[3])

    def test_can_be_turned_off(self, make_trainer, monkeypatch):
        weights, evaluated, final = self.run(make_trainer, monkeypatch, ema_decay=0.0)
        assert torch.equal(evaluated[0], weights[1]) and torch.equal(evaluated[1], weights[3])
        assert torch.equal(final, weights[3])


class TestPlainCollators:
    """Batches of others: only predicted tokens count, whoever made them."""

    @staticmethod
    def losses_and_counts(trainer, monkeypatch):
        counts, compute_loss = [], trainer.compute_loss

        def recording_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            counts.append(int(num_items_in_batch))
            return compute_loss(model, inputs, return_outputs, num_items_in_batch)

        monkeypatch.setattr(trainer, "compute_loss", recording_loss)
        trainer.train()
        return logged(trainer, "loss"), counts

    @pytest.mark.parametrize("ignore_bos", [True, False])
    def test_default_data_collator(self, make_trainer, monkeypatch, ignore_bos):
        def train(data_collator):
            model = random_model(0, "sdpa", ignore_bos=ignore_bos)
            trainer = make_trainer(model, data_collator=data_collator, gradient_accumulation_steps=2)
            return self.losses_and_counts(trainer, monkeypatch)

        losses, counts = train(default_data_collator)
        assert counts == [8 * (15 if ignore_bos else 16)] * 8
        assert losses == train(None)[0]

    def test_data_collator_for_language_modeling(self, make_trainer, monkeypatch):
        backend = Tokenizer(models.WordLevel({str(number): number for number in range(23)}, unk_token="0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="21")
        # Its labels leave out every padding token, so the text must not hold any.
        dataset = [
            {"input_ids": [token % 21 for token in row["input_ids"]]} for row in rows(16, lengths=(16, 10, 7), seed=3)
        ]
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        losses, counts = self.losses_and_counts(
            make_trainer(train_dataset=dataset, data_collator=collator, train_sampling_strategy="sequential"),
            monkeypatch,
        )
        lengths = [len(row["input_ids"]) - 1 for row in dataset]
        assert counts == [sum(lengths[start : start + 4]) for start in range(0, 16, 4)]
        expected, _ = self.losses_and_counts(
            make_trainer(train_dataset=dataset, train_sampling_strategy="sequential"), monkeypatch
        )
        assert losses == pytest.approx(expected, rel=1e-5)

    def test_a_collator_that_masks_tokens_itself_is_refused(self, make_trainer):
        backend = Tokenizer(models.WordLevel({str(number): number for number in range(23)}, unk_token="0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="21", mask_token="22")
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.5)
        with pytest.raises(ValueError, match=r"mask token \(22\)"):
            make_trainer(data_collator=collator).train()


class TestErrors:
    """Each is found before the first step."""

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"noise_interval": (0.8, 0.3)}, "`noise_interval`.*0 <= beta <= omega <= 1.*0.8, 0.3"),
            ({"noise_interval": (-0.1, 1.0)}, "`noise_interval`.*0 <= beta <= omega <= 1.*-0.1"),
            ({"noise_interval": (0.0, 1.5)}, "`noise_interval`.*0 <= beta <= omega <= 1.*1.5"),
            ({"noise_interval": [0.5]}, "`noise_interval` must be a pair.*0.5"),
            ({"noise_schedule": "linear"}, "`noise_schedule` must be one of loglinear.*'linear'"),
            ({"noise_interval_search_every": 0}, "`noise_interval_search_every` must be at least 1, but got 0"),
            ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\), but got 1.0"),
            ({"ema_decay": -0.5}, r"`ema_decay` must be in \[0, 1\), but got -0.5"),
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` must be 0.*0.1"),
            ({"block_size_schedule": ["0-16"]}, "`block_size_schedule` takes STEP:SIZE entries.*0-16"),
            ({"block_size_schedule": {}}, "`block_size_schedule` takes steps >= 0 and sizes >= 1"),
            ({"block_size_schedule": {0: 0}}, "`block_size_schedule` takes steps >= 0 and sizes >= 1.*0: 0"),
            ({"block_size_schedule": {0: 128}}, r"`block_size_schedule`.*`max_position_embeddings` \(64\).*128"),
            ({"block_size_schedule": {0: 4, 9: 32}}, "`block_size` must be at most the length.*32.*16 tokens"),
            ({"masking": "gaussian"}, "`masking` must be one of bernoulli, exact_count, but got 'gaussian'"),
            ({"num_noise_samples": 0}, "`num_noise_samples` must be at least 1, but got 0"),
            ({"complementary_masks": True}, "`complementary_masks` takes `num_noise_samples` = 2.*got 1"),
        ],
    )
    def test_arguments_outside_their_range(self, make_trainer, arguments, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(**arguments)

    @pytest.mark.parametrize(
        "name, dataset, message",
        [
            ("train_dataset", [{"text": "a"}], "`train_dataset` must have the column `input_ids`, but has text"),
            ("eval_dataset", [{"text": "a"}] * 8, "`eval_dataset` must have the column `input_ids`"),
            ("train_dataset", rows(lengths=(3,)), "`block_size` must be at most the length.*got 4.*`train_.*3 tokens"),
            (
                "train_dataset",
                [*rows(2), {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3]}],
                "`labels` of row 2 of `train_dataset` must be as long as its `input_ids`, 4.*length 3",
            ),
            (
                "eval_dataset",
                {"one": rows(), "two": [{"input_ids": [1] * 8, "attention_mask": [1]}] * 8},
                r"`attention_mask` of row 0 of `eval_dataset\['two'\]`",
            ),
            ("eval_dataset", rows(7), "`eval_dataset` must fill one batch, but has 7 rows.*8 on 1 process"),
            ("eval_dataset", {"one": rows(), "two": rows(7)}, r"`eval_dataset\['two'\]` must fill one batch"),
        ],
    )
    def test_datasets(self, make_trainer, name, dataset, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(**{name: dataset})

    def test_complementary_masks_for_a_model_that_reads_t(self, make_trainer):
        model = random_model(0, "sdpa", time_conditioning=True)
        with pytest.raises(ValueError, match="`complementary_masks`.*must not read the time"):
            make_trainer(model, num_noise_samples=2, complementary_masks=True)

    def test_a_model_of_another_kind(self, make_trainer):
        with pytest.raises(ValueError, match="`model` must be a BD3LMForMaskedLM or a PeftModel.*Linear"):
            make_trainer(torch.nn.Linear(2, 2))

    def test_arguments_of_another_kind(self, tmp_path):
        with pytest.raises(ValueError, match="`args` must be BD3LMTrainingArguments, but got TrainingArguments"):
            BD3LMTrainer(random_model(0), TrainingArguments(str(tmp_path)), train_dataset=rows())

    @pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
    def test_functions_of_logits(self, tmp_path, name):
        with pytest.raises(ValueError, match=f"`{name}` must be None"):
            BD3LMTrainer(random_model(0), BD3LMTrainingArguments(str(tmp_path)), **{name: print})

    def test_an_average_of_half_precision_weights(self, make_trainer):
        trainer = make_trainer(random_model(0, "sdpa").to(torch.bfloat16))
        with pytest.raises(ValueError, match="`ema_decay`.*bfloat16"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_a_mask_token_in_the_text(self, make_trainer):
        with pytest.raises(ValueError, match=r"mask token \(22\)"):
            make_trainer(train_dataset=[{"input_ids": [22] * 16}] * 8).train()
