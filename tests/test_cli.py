"""The command `bd3lm`, called as a user calls it."""

import io
import json
import math
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion import PublishedModel
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from bd3lm_hf import BD3LMConfig, BD3LMForMaskedLM
from bd3lm_hf.cli import COMMANDS, main, progress
from bd3lm_hf.cli.demo import run_demo
from bd3lm_hf.cli.train import train_arguments


TINY_MODEL = [
    *("--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--cond_dim", "16"),
    *("--hidden_dropout", "0", "--initializer_range", "0.2", "--block_size", "4", "--length", "32"),
]
QUICK = ["--learning_rate", "1e-2", "--per_device_train_batch_size", "8", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text that is easy to predict from context: counting, over and over."""
    path = tmp_path_factory.mktemp("corpus") / "counting.txt"
    path.write_text("zero one two three four five six seven eight nine\n" * 400, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The folder that a short `bd3lm train` leaves, which also evaluates on the first lines of the corpus."""
    folder = tmp_path_factory.mktemp("trained")
    held_out = folder / "held_out.txt"
    held_out.write_text("".join(corpus.read_text().splitlines(keepends=True)[:20]))
    arguments = ["--data", corpus, "--eval_data", held_out, "--vocab_size", "300", "--output_dir", folder / "model"]
    steps = ["--max_steps", "150", "--save_steps", "100", "--seed", "3"]
    assert main(["train", *map(str, arguments), *TINY_MODEL, *QUICK, *steps]) == 0
    return folder / "model"


def error_of(argv, capsys):
    """The one line that a command which must fail leaves on stderr."""
    assert main([str(argument) for argument in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"bd3lm {argv[0]}: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: bd3lm {command}" in text
    assert "--verbose" in text and "--traceback" in text
    if command != "demo":
        assert f"examples:\n  bd3lm {command} " in text


def test_the_help_of_train_starts_with_its_own_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    flags = ("--data DATA  ", "--block_size BLOCK", "--learning_rate LEARN")
    data, model, training = (text.index(flag) for flag in flags)
    assert data < model < training
    assert re.match(r"[^(]*\(default:\s+16\)", text[model:])
    assert re.match(r"[^(]*\(default:\s+0\.0003\)", text[training:])


def test_the_installed_command_lists_its_commands():
    result = subprocess.run([sys.executable, "-m", "bd3lm_hf.cli", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for command in COMMANDS:
        assert f"  bd3lm {command} " in result.stdout


def test_the_command_tells_its_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code in (None, 0)
    assert capsys.readouterr().out.strip() == version("bd3lm-hf")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["sing"])
    assert exit_info.value.code == 2
    assert "invalid choice: 'sing'" in capsys.readouterr().err


# train


def test_training_improves_the_perplexity_of_held_out_text(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["after"]["perplexity"] < 0.5 * metrics["before"]["perplexity"]
    assert metrics["after"]["perplexity"] < 0.9 * metrics["unigram_perplexity"]
    # A new model finds every token but the mask token equally likely.
    uniform = math.log(BD3LMConfig.from_pretrained(trained).vocab_size - 1)
    before = metrics["before"]
    assert before["nelbo"] == pytest.approx(uniform, abs=4 * before["nelbo_standard_error"])
    assert before["nelbo_standard_error"] < 0.2 * uniform
    assert metrics["train"]["epoch"] > 0


def test_training_saves_model_tokenizer_and_metrics(trained):
    model = BD3LMForMaskedLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert (model.config.block_size, model.config.max_position_embeddings) == (4, 32)
    results = json.loads((trained / "all_results.json").read_text())
    metrics = json.loads((trained / "metrics.json").read_text())
    assert results["eval_perplexity"] == metrics["after"]["perplexity"]
    assert results["train_loss"] == metrics["train"]["train_loss"]
    assert (trained / "modeling_bd3lm.py").is_file()


def test_resuming_goes_on_from_the_last_checkpoint(trained, corpus, tmp_path):
    def train(output_dir, *flags):
        arguments = ["train", "--data", str(corpus), "--vocab_size", "300", "--output_dir", str(output_dir)]
        # The steps before the interruption must not know how many were to come.
        constant = ["--lr_scheduler_type", "constant", "--save_steps", "2"]
        return main([*arguments, *TINY_MODEL, *QUICK, *constant, *flags])

    assert train(tmp_path / "straight", "--max_steps", "4") == 0
    assert train(tmp_path / "resumed", "--max_steps", "2") == 0
    assert train(tmp_path / "resumed", "--max_steps", "4", "--resume_from_checkpoint", "last") == 0
    state = json.loads((tmp_path / "resumed" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), name

    # A run from scratch would have come to the same weights; it knows nothing of a change to the checkpoint.
    checkpoint = tmp_path / "resumed" / "checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert train(tmp_path / "changed", "--max_steps", "4", "--resume_from_checkpoint", str(checkpoint)) == 2
    # Who changes a checkpoint on purpose says so.
    (checkpoint / "checkpoint_manifest.json").unlink()
    assert train(tmp_path / "changed", "--max_steps", "4", "--resume_from_checkpoint", str(checkpoint)) == 0
    changed = load_file(tmp_path / "changed" / "model.safetensors")["model.norm.weight"]
    assert torch.allclose(changed, straight["model.norm.weight"] + 1, atol=0.1)


def test_a_checkpoint_can_be_trained_on_with_another_block_size(trained, corpus, tmp_path):
    flags = ["--block_size", "2", "--max_steps", "1", "--save_strategy", "no", "--max_eval_sequences", "8"]
    arguments = ["--data", corpus, "--model", trained, "--output_dir", tmp_path]
    assert main(["train", *map(str, arguments), *QUICK, *flags]) == 0
    config = BD3LMConfig.from_pretrained(tmp_path)
    assert (config.block_size, config.hidden_size) == (2, 32)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    # It starts from what the checkpoint had learnt, not from scratch.
    assert metrics["before"]["perplexity"] < 0.5 * config.vocab_size


def test_every_training_argument_reaches_the_trainer():
    flags = ["--adam_beta2", "0.9", "--gradient_accumulation_steps", "3", "--noise_interval", "0.3", "0.8"]
    data_args, model_args, training_args = train_arguments(["--data", "builtin", "--block_size", "8", *flags])
    assert (training_args.adam_beta2, training_args.gradient_accumulation_steps) == (0.9, 3)
    assert (training_args.noise_interval, training_args.ema_decay) == ((0.3, 0.8), 0.9999)
    assert model_args.config_fields() == {"block_size": 8}
    assert training_args.learning_rate == 3e-4
    if not torch.cuda.is_available():
        assert not training_args.bf16


def test_training_mistakes_are_one_line(trained, corpus, tmp_path, capsys):
    train = ["train", "--data", corpus, "--output_dir", tmp_path / "out"]
    assert "'missing.txt' does not exist" in error_of(["train", "--data", "missing.txt"], capsys)
    assert "length=30 must be a multiple of block_size=4" in error_of(
        [*train, *TINY_MODEL, "--vocab_size", "300", "--length", "30"], capsys
    )
    assert "--hidden_size cannot change what --model=" in error_of(
        [*train, "--model", trained, "--hidden_size", "64"], capsys
    )
    assert "there is no whole checkpoint in" in error_of([*train, "--resume_from_checkpoint", "last"], capsys)
    assert "`resume_from_checkpoint` (elsewhere) is no whole checkpoint" in error_of(
        [*train, "--resume_from_checkpoint", "elsewhere"], capsys
    )
    assert "must be another folder than --model's" in error_of(
        [*train[:-1], trained, "--model", trained, "--lora_rank", "2"], capsys
    )
    assert "vocab_size=10 is too small" in error_of([*train, "--vocab_size", "10"], capsys)


def test_a_tokenizer_of_another_model_is_refused(trained, corpus, shared_dir, tmp_path, capsys):
    gpt2 = shared_dir / "tokenizers" / "gpt2"
    train = ["train", "--data", corpus, "--model", trained, "--tokenizer", gpt2, "--output_dir", tmp_path]
    assert "the tokenizer has 50258 tokens, but the model's vocab_size is" in error_of(train, capsys)
    evaluate = ["evaluate", trained, "--data", corpus, "--tokenizer", gpt2]
    assert "the tokenizer has 50258 tokens, but the model's vocab_size is" in error_of(evaluate, capsys)


@pytest.mark.parametrize("flag", ["--verbose", "--traceback"])
def test_the_traceback_is_shown_before_the_line_when_asked_for(flag, capsys):
    assert main(["train", "--data", "missing.txt", flag]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error and "load_table" in error
    assert error.strip().splitlines()[-1].startswith("bd3lm train: error: data='missing.txt' does not exist")


# evaluate


def test_evaluate_agrees_with_what_training_reported(trained, tmp_path, capsys):
    held_out = trained.parent / "held_out.txt"
    figures = tmp_path / "likelihood.json"
    flags = ["--estimator", "stratified", "--batch_size", "16", "--seed", "3", "--json", str(figures)]
    assert main(["evaluate", str(trained), "--data", str(held_out), *flags]) == 0
    reported = json.loads((trained / "metrics.json").read_text())["after"]
    measured = json.loads(figures.read_text())
    error = math.hypot(measured["draw_standard_error"], reported["nelbo_standard_error"])
    assert measured["nelbo"] == pytest.approx(reported["nelbo"], abs=4 * error)
    assert 0 < error < 0.2 * measured["nelbo"]
    assert (measured["estimator"], measured["num_draws"], measured["seed"]) == ("stratified", 2, 3)
    assert measured["num_bytes"] == held_out.stat().st_size
    printed = capsys.readouterr().out
    assert f"perplexity {measured['perplexity']:.2f}" in printed
    assert f"{measured['bits_per_byte']:.3f} bits per byte" in printed


def test_evaluate_reads_a_corpus_of_the_literature_as_papers_do(trained, tmp_path):
    text, figures = tmp_path / "wiki.test.tokens", tmp_path / "figures.json"
    text.write_text(" = Heading = \n\n It was well @-@ known , he said . \n" * 40)
    scores = []
    for flags in (["--corpus", "wikitext2", "--split", "test"], []):
        assert main(["evaluate", str(trained), "--data", str(text), "--json", str(figures), *flags]) == 0
        scores.append(json.loads(figures.read_text()))
    # " @-@ ", " ," and " ." lose their blanks.
    assert scores[0]["num_bytes"] < scores[1]["num_bytes"]


def test_evaluate_scores_familiar_text_better_than_noise(trained, corpus, tmp_path):
    noise = tmp_path / "noise.txt"
    noise.write_text("qXv#9 ~~pL 00z! KjW@ %%rtY ;;;u\n" * 20)
    perplexities = []
    for text in (corpus, noise):
        figures = tmp_path / "figures.json"
        flags = ["--max_eval_sequences", "8", "--num_draws", "2", "--json", str(figures)]
        assert main(["evaluate", str(trained), "--data", str(text), *flags]) == 0
        assert json.loads(figures.read_text())["num_sequences"] == 8
        perplexities.append(json.loads(figures.read_text())["perplexity"])
    assert perplexities[1] > 3 * perplexities[0]


def test_evaluate_slides_a_window_over_each_document(trained, corpus, tmp_path, capsys):
    lines = corpus.read_text().splitlines()
    documents = tmp_path / "documents.jsonl"
    texts = ["", *("\n".join(lines[:number]) for number in (1, 30))]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    figures = tmp_path / "figures.json"

    def evaluate(*flags):
        assert main(["evaluate", str(trained), "--data", str(documents), "--json", str(figures), *flags]) == 0
        return json.loads(figures.read_text()), capsys.readouterr().out

    measured, _ = evaluate("--window", "--stride", "4")
    assert (measured["estimator"], measured["window"], measured["stride"]) == ("exact", 32, 4)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    # Each token but BOS, EOS among them.
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts[1:]]
    assert (measured["num_tokens"], measured["num_sequences"]) == (sum(lengths), 2)
    assert len(measured["nelbo_per_position"]) == 1 + lengths[-1] > 32
    assert measured["num_bytes"] == sum(map(len, texts))
    less_context, printed = evaluate(
        "--window", "8", "--estimator", "monte_carlo", "--target_error", "1e-9", *("--max_draws", "3")
    )
    assert (less_context["window"], less_context["num_draws"], less_context["target_reached"]) == (8, 3, False)
    assert "NOT within the target error of 1e-09" in printed


def test_evaluate_scores_an_autoregressive_model_on_the_same_tokens(trained, corpus, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    results = []
    for model in (trained, tmp_path / "gpt2"):
        flags = ["--max_eval_sequences", "4", "--json", str(tmp_path / "figures.json")]
        assert main(["evaluate", str(model), "--data", str(corpus), *flags]) == 0
        results.append(json.loads((tmp_path / "figures.json").read_text()))
    ours, theirs = results
    for name in ("num_tokens", "num_bytes", "num_sequences", "window", "estimator"):
        assert ours[name] == theirs[name], name
    assert (ours["block_size"], theirs["block_size"]) == (4, 1)
    # Untrained, it finds all tokens about equally likely.
    assert theirs["nelbo"] == pytest.approx(math.log(len(tokenizer)), rel=0.02)


def test_evaluation_mistakes_are_one_line(trained, corpus, tmp_path, capsys):
    evaluate = ["evaluate", trained, "--data", corpus]
    assert "num_draws=0 must be at least 1" in error_of([*evaluate, "--num_draws", "0"], capsys)
    assert "--stride takes --window" in error_of([*evaluate, "--stride", "4"], capsys)
    assert "--window excludes --length" in error_of([*evaluate, "--window", "--length", "8"], capsys)
    assert "`window` must be at least 2 tokens" in error_of([*evaluate, "--window", "6"], capsys)
    assert "num_sequences=0 must be at least 1" in error_of([*evaluate, "--max_eval_sequences", "0"], capsys)
    assert "tokenizer=" in error_of(["evaluate", tmp_path, "--data", corpus], capsys)


# generate


def json_lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_generate_continues_prompts_from_arguments(trained, capsys):
    prompts = ["zero one two", "five"]
    flags = ["--max_new_tokens", "9", "--num_return_sequences", "2", "--json"]
    assert main(["generate", str(trained), *prompts, *flags]) == 0
    rows = json_lines(capsys)
    assert [row["prompt"] for row in rows] == ["zero one two", "zero one two", "five", "five"]
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for row in rows:
        assert row["text"].startswith(row["prompt"])
        # Sampled tokens need not be the shortest spelling of their text.
        assert 0 < len(tokenizer(row["text"][len(row["prompt"]) :])["input_ids"]) - 1 <= 9


def test_generate_reads_prompts_from_stdin_line_by_line(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("zero one\nfour\nseven eight\n"))
    assert main(["generate", str(trained), "--max_new_tokens", "5", "--batch_size", "2", "--json"]) == 0
    assert [row["prompt"] for row in json_lines(capsys)] == ["zero one", "four", "seven eight"]


def test_generate_starts_from_nothing_without_a_prompt(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["generate", str(trained), "--max_new_tokens", "8", "--seed", "0"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_seed_repeats_generation_and_another_changes_it(trained, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(trained), "zero", "--max_new_tokens", "24", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_prompts_in_a_batch_get_what_they_would_get_alone(trained, capsys):
    # One step per block: where several are as sure as 1.0 rounds, the last digit would decide which comes first.
    greedy = ["--max_new_tokens", "12", "--no-do_sample", "--sampler", "confidence", "--denoising_steps", "1"]
    greedy.append("--json")
    prompts = ["zero one two", "six", "nine zero one two three"]
    assert main(["generate", str(trained), *prompts, *greedy]) == 0
    together = json_lines(capsys)
    for prompt, row in zip(prompts, together):
        assert main(["generate", str(trained), prompt, *greedy]) == 0
        assert json_lines(capsys) == [row]


def test_stream_shows_drafts_and_ends_with_the_text(trained, capsys):
    flags = ["--max_new_tokens", "8", "--seed", "1"]
    assert main(["generate", str(trained), "zero one", *flags, "--no-stream"]) == 0
    text = capsys.readouterr().out.strip()
    assert main(["generate", str(trained), "zero one", *flags, "--stream"]) == 0
    streamed = capsys.readouterr().out
    draft, restore = "\0337\033[33m", "\0338\033[J"
    assert streamed.count(draft) >= 8
    shown = "".join(part.split(restore)[-1] for part in streamed.split("\0337"))
    assert shown.strip() == text


def test_generate_fills_the_gaps_of_prompts(trained, capsys):
    prompts = ["zero one[MASK][MASK] three", "six[MASK]"]
    assert main(["generate", str(trained), *prompts, "--infill", "--json", "--seed", "1"]) == 0
    rows = json_lines(capsys)
    assert [row["prompt"] for row in rows] == prompts
    assert rows[0]["text"].startswith("zero one") and rows[0]["text"].endswith(" three")
    assert main(["generate", str(trained), prompts[0], "--infill", "--seed", "1", "--no-stream"]) == 0
    text = capsys.readouterr().out.strip()
    assert main(["generate", str(trained), prompts[0], "--infill", "--seed", "1", "--stream"]) == 0
    shown = "".join(part.split("\0338\033[J")[-1] for part in capsys.readouterr().out.split("\0337"))
    assert shown.strip() == text and "MASK" not in text
    assert "only `infill=True` fills in" in error_of(["generate", trained, prompts[0]], capsys)


def test_generate_shows_how_far_it_is_where_it_takes_long(trained, capsys, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    # Longer than the context, and read in one batch with one of a single word.
    prompts = ["zero one two three four five six seven " * 9, "zero"]
    width, steps = len(tokenizer(prompts[0])["input_ids"]), []
    update = progress.GenerationProgress.update

    def noted(bar, n=1):
        steps.append((bar.n + n, bar.total))
        return update(bar, n)

    monkeypatch.setattr(progress.GenerationProgress, "update", noted)
    command = ["generate", str(trained), *prompts, "--max_new_tokens", "12", "--seed", "0"]
    assert main(command) == 0
    quick = capsys.readouterr()
    assert "Generating" not in quick.err
    # Prompts are read, then each position is written in both rows.
    numbers = [number for number, _ in steps]
    assert numbers == sorted(numbers) and {total for _, total in steps} == {2 * (width + 12)}
    assert {2 * width + 2 * index for index in range(13)} <= set(numbers) and numbers[-1] == 2 * (width + 12)

    monkeypatch.setattr(progress, "DELAY", 0.0)
    steps.clear()
    assert main([*command, "--batch_size", "1"]) == 0
    slow = capsys.readouterr()
    assert "Generating: 100%" in slow.err and slow.out
    assert steps[-1][0] == steps[-1][1] == width + 2 + 2 * 12
    assert main([*command[:2], "zero", "--stream"]) == 0
    assert "Generating" not in capsys.readouterr().err


def test_evaluate_shows_how_far_it_is(trained, corpus, capsys):
    assert main(["evaluate", str(trained), "--data", str(corpus), "--window", "--max_eval_sequences", "1"]) == 0
    error = capsys.readouterr().err
    done = [int(number) for number in re.findall(r"Evaluating, pass 1:.*? (\d+)/\d+ ", error)]
    assert len(done) > 3 and done == sorted(done) and f"{done[-1]}/{done[-1]}" in error


def test_generation_mistakes_are_one_line(trained, tmp_path, capsys):
    generate = ["generate", trained, "zero", "one"]
    assert "stream takes a single text" in error_of([*generate, "--stream"], capsys)
    assert "batch_size=0 must be at least 1" in error_of([*generate, "--batch_size", "0"], capsys)
    assert "sampler" in error_of([*generate, "--sampler", "guess"], capsys)
    assert "tokenizer=" in error_of(["generate", tmp_path, "zero"], capsys)


# convert


def test_convert_writes_a_published_checkpoint_in_this_format(find_parity_folder, tmp_path, capsys):
    source = find_parity_folder("bd3lm_block4")
    assert main(["convert", str(source), str(tmp_path / "converted")]) == 0
    assert "saved to" in capsys.readouterr().out
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["model_type"] == "bd3lm" and "auto_map" in config
    converted = BD3LMForMaskedLM.from_pretrained(tmp_path / "converted")
    published = load_file(source / "model.safetensors")
    (name,) = [name for name in published if name.endswith("vocab_embed.embedding")]
    assert torch.equal(converted.model.embed_tokens.weight, published[name])


def test_convert_takes_the_sizes_that_a_ckpt_does_not_say(tmp_path, capsys):
    published = PublishedModel()
    parameters = {name: value.detach() for name, value in published.state_dict().items()}
    torch.save({"state_dict": parameters}, tmp_path / "last.ckpt")
    command = ["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "out"), "--no-ema"]
    assert "max_position_embeddings" in error_of(command, capsys)
    assert main([*command, "--block_size=4", "--max_position_embeddings=16"]) == 0
    config = BD3LMConfig.from_pretrained(tmp_path / "out")
    assert (config.block_size, config.max_position_embeddings) == (4, 16)


def test_conversion_mistakes_are_one_line(tmp_path, capsys):
    assert error_of(["convert", tmp_path / "missing.ckpt", tmp_path / "out"], capsys)


# demo


def test_the_demo_fails_if_the_model_learnt_nothing(tmp_path, capfd):
    flags = ["--max_steps=1", "--max_bytes=100000", "--hidden_size=32", "--max_eval_sequences=8"]
    assert run_demo(str(tmp_path), flags) == 1
    output = capfd.readouterr()
    assert "a third of the unigram model's" in output.err
    assert "the finished text:\ndef " in output.out


@pytest.mark.slow
def test_the_demo_succeeds(tmp_path, capfd):
    assert main(["demo", "--output_dir", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["after"]["perplexity"] < metrics["unigram_perplexity"] / 3
    assert "the finished text:\ndef " in capfd.readouterr().out
