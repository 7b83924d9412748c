"""Plots show what they are given: reveals, the attention rule, schedules, logged figures. `bd3lm plot` writes them."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import random_model

from bd3lm_hf import plot_attention_pattern, plot_denoising, plot_noise_schedules, plot_training, train_tokenizer
from bd3lm_hf.cli import main
from bd3lm_hf.plots import loss_variance


pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'bd3lm-hf[plots]'")

HISTORY = [
    {"step": 2, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 1.5},
    {"step": 4, "eval_loss": 2.5, "eval_nelbo": 2.5, "eval_perplexity": math.exp(2.5)},
    {"step": 4, "noise_interval_beta": 0.3, "noise_interval_omega": 0.8},
    {"step": 4, "loss": 2.0, "learning_rate": 5e-4, "grad_norm": 1.0},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    tokenizer = train_tokenizer({"text": ["def main($x$):\n"]}, 270)
    model = random_model(vocab_size=len(tokenizer), pad_token_id=2)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    return folder, model, tokenizer


def image_of(axes, index=-1):
    return np.ma.filled(axes.images[index].get_array().astype(float), np.nan)


def test_denoising_shows_each_token_where_it_was_revealed_and_how_sure_it_was(checkpoint):
    _, model, tokenizer = checkpoint
    prompt = torch.tensor([[3, 5, 7]])
    options = {"sampler": "confidence", "confidence_threshold": 0.02, "seed": 0}
    output = model.generate(
        prompt, max_new_tokens=9, return_dict_in_generate=True, output_reveal=True, eos_token_id=None, **options
    )
    axes = plot_denoising(output, tokenizer, block_size=4).axes[0]
    shown = image_of(axes)
    assert shown.shape == (9, int(output.num_forward_passes[0]))
    for token, (step, probability) in enumerate(zip(output.reveal_steps[0, 3:], output.token_probabilities[0, 3:])):
        assert np.flatnonzero(~np.isnan(shown[token])).tolist() == [step - 1]
        assert shown[token, step - 1] == pytest.approx(probability.item())
        # A token that is known stays known.
        assert (~np.isnan(image_of(axes, 0)[token])).tolist() == (
            np.arange(1, shown.shape[1] + 1) >= step.item()
        ).tolist()
    # Blocks end at positions 4 and 8, the first and the fifth new token.
    assert [line.get_ydata()[0] for line in axes.lines] == [0.5, 4.5]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [repr(tokenizer.decode([i]))[1:-1].replace(" ", "·") for i in output.sequences[0, 3:].tolist()]
    figure = plot_denoising(output, tokenizer)
    assert not figure.axes[0].lines


def test_denoising_says_what_is_missing(checkpoint):
    _, model, tokenizer = checkpoint
    plain = model.generate(torch.tensor([[3]]), max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="`output` must come from `generate.*output_reveal=True"):
        plot_denoising(plain, tokenizer)
    output = model.generate(torch.tensor([[3]]), max_new_tokens=2, return_dict_in_generate=True, output_reveal=True)
    with pytest.raises(ValueError, match=r"`row` must be in \[0, 1\), but got 1"):
        plot_denoising(output, tokenizer, row=1)


def test_the_attention_pattern_is_the_one_that_the_network_has():
    figure = plot_attention_pattern(6, 4)
    shown = image_of(figure.axes[0]) > 0
    model = random_model(max_position_embeddings=8)
    noisy, clean = torch.randint(22, (1, 6)), torch.randint(22, (1, 6))
    with torch.no_grad():
        weights = model(noisy, clean_input_ids=clean, output_attentions=True).attentions[0][0, 0]
    assert np.array_equal(shown, (weights > 0).numpy())
    near = image_of(plot_attention_pattern(12, 4, window=1).axes[0]) > 0
    assert near[8, 16] and not near[8, 12] and image_of(plot_attention_pattern(12, 4).axes[0])[8, 12] > 0


@pytest.mark.parametrize("interval", [(1e-3, 1.0), (0.3, 0.8)])
def test_the_variance_of_linear_masking_is_what_integration_by_hand_gives(interval):
    beta, omega = interval
    expected = [(math.log(omega / beta) / (omega - beta) - 1) / size for size in (1, 4, 64)]
    assert loss_variance("loglinear", [1, 4, 64], interval) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("schedule", ["square", "square_root", "log", "cosine"])
def test_the_variance_of_a_schedule_is_that_of_draws(schedule):
    from bd3lm_hf.modeling.diffusion_block_diffusion import NOISE_SCHEDULES

    generator = torch.Generator().manual_seed(0)
    t = 0.3 + 0.6 * torch.rand(400_000, generator=generator, dtype=torch.float64)
    p, w = NOISE_SCHEDULES[schedule].mask_probability(t), NOISE_SCHEDULES[schedule].loss_weight(t)
    losses = w * torch.binomial(torch.full_like(p, 4), p, generator=generator) / 4
    drawn = (losses.var() / losses.mean() ** 2).item()
    assert loss_variance(schedule, [4], (0.3, 0.9)) == pytest.approx([drawn], rel=0.02)


def test_schedules_are_drawn_as_they_are_named():
    masking, weighting, varying = plot_noise_schedules(["loglinear", "cosine"], noise_interval=(0.3, 0.8)).axes
    assert [line.get_label() for line in masking.lines] == ["loglinear", "cosine"]
    t, p = masking.lines[0].get_data()
    assert np.allclose(t, p) and np.allclose(weighting.lines[0].get_ydata(), 1 / t)
    assert list(varying.lines[1].get_ydata()) == loss_variance("cosine", [2**power for power in range(11)], (0.3, 0.8))


def test_training_curves_are_the_logged_figures(checkpoint):
    figure = plot_training(checkpoint[0])
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert list(panels) == ["nats per token", "learning rate", "gradient norm", "noise interval, t"]
    drawn = {line.get_label(): list(zip(*line.get_data())) for axes in panels.values() for line in axes.lines}
    assert drawn["training loss"] == [(2, 3.0), (4, 2.0)] and drawn["eval_nelbo"] == [(4, 2.5)]
    assert drawn["omega"] == [(4, 0.8)] and "eval_loss" not in drawn
    plain = plot_training({"log_history": [{"step": 1, "eval_loss": 2.0}]})
    assert [line.get_label() for line in plain.axes[0].lines] == ["eval_loss"] and len(plain.axes) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_attention_pattern(0), "`length` must be from 1 to 256 tokens, but got 0"),
        (lambda: plot_attention_pattern(4, 8), r"`block_size` must be from 1 to `length` \(4\), but got 8"),
        (lambda: plot_attention_pattern(window=-1), "`window` must be a number of blocks >= 0, but got -1"),
        (lambda: plot_noise_schedules([]), "`schedules` must name at least one of loglinear"),
        (lambda: plot_noise_schedules(["sine"]), "`schedule` must be one of loglinear.*, but got 'sine'"),
        (lambda: plot_noise_schedules(noise_interval=(0.0, 1.0)), "0 < beta < omega, but got"),
        (lambda: plot_training("nowhere"), "`trainer_state` must be a trainer_state.json or a folder with one"),
        (lambda: plot_training({"log_history": []}), "`trainer_state` must hold logged figures, but got none"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_each_kind_is_written_by_its_command(checkpoint, tmp_path, capsys):
    folder = str(checkpoint[0])
    commands = {
        "denoising.png": ["denoising", folder, "def", "--max_new_tokens", "6", "--seed", "1", "--device", "cpu"],
        "attention.svg": ["attention", "--length", "8", "--block_size", "2"],
        "schedules.png": ["schedules", "--noise_interval", "0.3", "0.8", "--dpi", "50"],
        "training.svg": ["training", folder],
    }
    for name, words in commands.items():
        assert main(["plot", *words, "--output", str(tmp_path / name)]) == 0
        start = b"\x89PNG" if name.endswith("png") else b"<?xml"
        assert (tmp_path / name).read_bytes().startswith(start)
    assert main(["plot", "attention", "--length", "0"]) == 2
    assert "bd3lm plot: error: `length` must be" in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Plots need matplotlib: pip install 'bd3lm-hf\[plots\]'"):
        plot_attention_pattern()
