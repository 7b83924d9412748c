"""What a user did wrong is one line of the command and exit 2, an interruption one line and exit 130."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import random_model
from test_conversion import PublishedModel
from transformers import GPT2Config, GPT2LMHeadModel

from bd3lm_hf import train_tokenizer
from bd3lm_hf.cli import COMMANDS, main


NAN = float("nan")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, and beside it a text, samples, and an autoregressive judge."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = train_tokenizer({"text": ["def main(path):\n    return\n"] * 9}, 280)
    ids = {"mask_token_id": tokenizer.mask_token_id, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = random_model(vocab_size=len(tokenizer), max_position_embeddings=32, attn_implementation="sdpa", **ids)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0)
    for name, part in (("model", model.to("cpu")), ("judge", GPT2LMHeadModel(config))):
        part.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("def main(path):\n    return\n" * 20)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of all that, to be spoilt."""
    return shutil.copytree(whole, tmp_path / "copy")


def line_of(argv, capsys, code=2, prog=None):
    """The one line that a command which must fail leaves on stderr; what shows progress and logs come before."""
    capsys.readouterr()
    try:
        returned = main([str(argument) for argument in argv])
    except SystemExit as error:
        returned = error.code
    assert returned == code
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count(f"{prog or f'bd3lm {argv[0]}'}: ") == 1
    line = error.splitlines()[-1]
    assert line.startswith(f"{prog or f'bd3lm {argv[0]}'}: ") and error.endswith("\n")
    return line


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Models that cannot be read.


def cut_by_a_byte(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


UNREADABLE = {
    "cut": (cut_by_a_byte, "not fully covered"),
    "empty_weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors|header"),
    "text_for_weights": (lambda folder: (folder / "model.safetensors").write_text("weights " * 99), "eader"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "must be a JSON mapping, but got a list"),
    "number": (lambda folder: (folder / "config.json").write_text("3"), "must be a JSON mapping, but got a int"),
    "cut_config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bd'),
        "must be JSON, but is not",
    ),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "must be JSON, but is not"),
    # Transformers would go on without.
    "cut_settings": (
        lambda folder: (folder / "generation_config.json").write_text('{"temperature": 0.'),
        "`generation_config.json`",
    ),
    "settings": (lambda folder: (folder / "generation_config.json").write_text("[]"), "`generation_config.json`"),
    "setting": (lambda folder: (folder / "generation_config.json").write_text('{"top_p": "x"}'), "`top_p` must be"),
    "size": (lambda folder: change_json(folder / "config.json", hidden_size="32"), "`hidden_size` must be an integer"),
    "flag": (lambda folder: change_json(folder / "config.json", adaln="no"), "`adaln` must be of the type bool"),
    "interval": (lambda folder: change_json(folder / "config.json", noise_interval=3), "`noise_interval` must be of"),
    "dtype": (lambda folder: change_json(folder / "config.json", dtype="float17"), "float17"),
    "layers": (lambda folder: change_json(folder / "config.json", num_hidden_layers=10**8), "must be at most 10000"),
    "context": (
        lambda folder: change_json(folder / "config.json", max_position_embeddings=10**12),
        "`max_position_embeddings` must be at most",
    ),
    "width": (lambda folder: change_json(folder / "config.json", hidden_size=2**20), "of shape"),
    "vocabulary": (
        lambda folder: change_json(folder / "config.json", vocab_size=10**11),
        "embed_tokens.weight of shape",
    ),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("[1]"), "tokenizer="),
    "cut_tokenizer": (lambda folder: (folder / "tokenizer.json").write_text('{"version'), "tokenizer="),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_model_that_cannot_be_read_is_one_line(copy, kind, capsys):
    spoil, message = UNREADABLE[kind]
    spoil(copy / "model")
    start = time.monotonic()
    for command in (["generate", copy / "model", "def"], ["evaluate", copy / "model", "--data", copy / "text.txt"]):
        line = line_of(command, capsys)
        assert any(part in line for part in message.split("|")), line
    assert time.monotonic() - start < 20


def test_an_absurd_judge_is_refused_before_it_is_built(copy, capsys):
    change_json(copy / "judge" / "config.json", n_layer=10**8)
    line = line_of(["quality", copy / "text.txt", "--judge", copy / "judge"], capsys)
    assert "`num_hidden_layers` must be at most 10000, but got 100000000" in line


def test_a_new_model_of_an_absurd_size_is_refused_before_it_is_built(copy, capsys):
    train = ["train", "--data", copy / "text.txt", "--tokenizer", copy / "model", "--output_dir", copy / "out"]
    wide = ["--hidden_size", "1048576", "--num_attention_heads", "2", "--num_hidden_layers", "2", "--length", "32"]
    assert "must describe a model that fits into this machine's memory" in line_of([*train, *wide], capsys)
    assert "must be at most 10000" in line_of([*train, "--num_hidden_layers", "100000000"], capsys)
    wide[1] = str(2**40)
    assert "`config` must describe a model that can be built" in line_of([*train, *wide], capsys)


# Checkpoints of the published training code.


def save_ckpt(path, **options):
    weights = {name: value.detach() for name, value in PublishedModel().state_dict().items()}
    torch.save({"state_dict": weights}, path, **options)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: (save_ckpt(path), path.write_bytes(path.read_bytes()[:-100])),
        lambda path: (save_ckpt(path), path.write_bytes(path.read_bytes()[:1000])),
        lambda path: path.write_text("no checkpoint at all"),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"state_dict": {"backbone.vocab_embed.embedding": 3}}, path),
        lambda path: torch.save({"state_dict": {1: torch.ones(2)}}, path),
        lambda path: torch.save({"state_dict": {"backbone.blocks.1000000000.norm1.weight": torch.ones(2)}}, path),
        lambda path: torch.save([1, 2], path, _use_new_zipfile_serialization=False),
    ],
    ids=["empty", "end_cut", "beginning", "text", "list", "number", "number_for_name", "absurd_layer", "legacy_list"],
)
def test_a_ckpt_that_cannot_be_read_is_one_line(tmp_path, write, capsys):
    write(tmp_path / "last.ckpt")
    sizes = ["--block_size", "4", "--max_position_embeddings", "16"]
    line = line_of(["convert", tmp_path / "last.ckpt", tmp_path / "out", "--no-ema", *sizes], capsys)
    assert "last.ckpt" in line or "`state_dict` must" in line
    assert not (tmp_path / "out").exists()


def test_a_legacy_ckpt_is_converted(tmp_path, capsys):
    save_ckpt(tmp_path / "last.ckpt", _use_new_zipfile_serialization=False)
    sizes = ["--block_size=4", "--max_position_embeddings=16"]
    command = ["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "out"), "--no-ema", *sizes]
    assert main(command) == 0 and (tmp_path / "out" / "model.safetensors").is_file()


# Arguments.


@pytest.mark.parametrize("device", ["zzz", "cuda:99", "meta", ""])
def test_a_device_that_there_is_not_is_one_line(whole, device, capsys):
    for command in (
        ["generate", whole / "model", "def"],
        ["evaluate", whole / "model", "--data", whole / "text.txt"],
        ["quality", whole / "text.txt", "--judge", whole / "judge"],
    ):
        assert f"but got {device!r}" in line_of([*command, "--device", device], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_p", "2"], "`top_p` must be a number in [0, 1], but got 2.0"),
        (["--top_p", "-0.1"], "`top_p` must be a number in [0, 1], but got -0.1"),
        (["--top_p", "nan"], "`top_p` must be a number in [0, 1], but got nan"),
        (["--no_repeat_ngram_size", "-3"], "`no_repeat_ngram_size` must be an integer >= 0, but got -3"),
        (["--min_p", "2"], "min_p"),
        (["--temperature", "-1"], "temperature"),
        (["--max_new_tokens", "-5"], "max_new_tokens"),
        (["--num_return_sequences", "0"], "num_return_sequences"),
        (["--seed", "-1"], "eed must be"),
    ],
)
def test_a_sampling_argument_out_of_its_range_is_one_line(whole, flags, message, capsys):
    assert message in line_of(["generate", whole / "model", "def", *flags], capsys)


@pytest.mark.parametrize("port", ["99999", "65536", "0", "-1", "http", "80.5"])
def test_a_port_that_there_is_not_is_one_line(whole, port, capsys):
    line = line_of(["app", whole / "model", f"--port={port}"], capsys)
    assert "--port: must be from 1 to 65535" in line and "`bd3lm app --help` explains" in line


@pytest.mark.parametrize(
    ("argv", "prog"),
    [
        (["generate"], None),
        (["generate", "model", "--top_p", "x"], None),
        (["train", "--max_steps", "many"], None),
        (["plot", "training"], "bd3lm plot training"),
        (["sing"], "bd3lm"),
        ([], "bd3lm"),
    ],
)
def test_what_the_parser_refuses_is_one_line_without_the_usage(argv, prog, capsys):
    assert "usage:" not in line_of(argv, capsys, prog=prog)
    with pytest.raises(SystemExit):
        main(argv)
    assert len(capsys.readouterr().err.splitlines()) == 1


# Prompts and data.


def test_a_closed_standard_input_is_one_line(whole, monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    for stdin in (None, closed):
        monkeypatch.setattr(sys, "stdin", stdin)
        line = line_of(["generate", whole / "model"], capsys)
        assert "prompts must be given as arguments or on standard input, but that is closed" in line
        assert main(["generate", str(whole / "model"), "def", "--max_new_tokens", "2"]) == 0


@pytest.mark.parametrize("prompt", ["def \udcff", "\ud800"])
def test_a_prompt_that_is_no_text_is_one_line(whole, prompt, monkeypatch, capsys):
    assert "prompts must be UTF-8 text, but prompt 2" in line_of(["generate", whole / "model", "a", prompt], capsys)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"a\nb\n{prompt}\n"))
    assert "but prompt 3 is" in line_of(["generate", whole / "model"], capsys)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("n.jsonl", '{"text": 1}\n{"text": 2}\n', "int64"),
        ("n.csv", "text\n1.5\n2\n", "float64"),
        ("n.jsonl", '{"text": true}\n', "bool"),
        ("n.jsonl", '{"text": ["a"]}\n', "List"),
        ("n.json", "[1, 2, 3]", "int64"),
    ],
)
def test_a_column_that_holds_no_text_is_one_line(whole, tmp_path, name, content, kind, capsys):
    (tmp_path / name).write_text(content)
    for command in (
        ["evaluate", whole / "model", "--data"],
        ["train", "--tokenizer", whole / "model", "--output_dir", tmp_path / "out", "--data"],
        ["quality", "--judge", whole / "judge"],
    ):
        assert f"must hold text, but it holds {kind}" in line_of([*command, tmp_path / name], capsys)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '"x"',
        "null",
        '{"log_history": 3}',
        '{"log_history": [1]}',
        '{"log_history": [{"loss": "low", "step": 1}]}',
        '{"log_history": [{"loss": 1.5}]}',
        '{"log_his',
        "[" * 100_000,
    ],
)
def test_a_trainer_state_of_the_wrong_type_is_one_line(tmp_path, content, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "trainer_state.json").write_text(content)
    command = ["plot", "training", tmp_path, "--output", tmp_path / "training.png"]
    assert line_of(command, capsys).startswith("bd3lm plot: error: ")
    assert not (tmp_path / "training.png").exists()


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--likelihood=a=", "[]", "must hold a JSON object, but got []"),
        ("--likelihood=a=", "3", "must hold a JSON object, but got 3"),
        ("--likelihood=a=", '{"nelbo', "is no JSON"),
        ("--sampler_results=", "3", "must hold a JSON list, but got 3"),
        ("--sampler_results=", "[3]", "`sampler_results` must be a list of mappings"),
        ("--card=", None, "No such file"),
    ],
)
def test_figures_of_the_wrong_type_are_one_line(whole, tmp_path, flag, content, message, capsys):
    if content is not None:
        (tmp_path / "file.json").write_text(content)
    push = ["push", whole / "model", "user/name", "--dry_run", f"{flag}{tmp_path / 'file.json'}"]
    assert message in line_of(push, capsys)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "3", '{"a'])
def test_a_folder_with_json_of_the_wrong_type_is_not_published(copy, name, content, capsys):
    (copy / "model" / name).write_text(content)
    assert f"`{name}` of" in line_of(["push", copy / "model", "user/name", "--dry_run"], capsys)


# Disks.


def test_a_full_disk_is_one_line(whole, capsys, monkeypatch):
    command = ["evaluate", whole / "model", "--data", whole / "text.txt", "--json", "/dev/full"]
    assert "No space left on device" in line_of(command, capsys)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert "No space left on device" in line_of(["generate", whole / "model", "def", "--json"], capsys)


@contextmanager
def room_for(num_bytes):
    """Within it no file may be longer, as on a disk that is nearly full."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("num_bytes", [100, 20_000])
def test_a_disk_without_room_for_the_weights_is_one_line(find_parity_folder, tmp_path, num_bytes, capsys):
    with room_for(num_bytes):
        line_of(["convert", find_parity_folder("bd3lm_block4"), tmp_path / "out"], capsys)


def test_a_disk_without_room_for_a_checkpoint_is_one_line(whole, tmp_path, capsys):
    flags = ["--max_steps", "1", "--save_steps", "1", "--max_eval_sequences", "2", "--disable_tqdm", "true"]
    train = ["train", "--data", whole / "text.txt", "--model", whole / "model", "--output_dir", tmp_path, *flags]
    with room_for(20_000):
        line_of(train, capsys)


def test_a_file_that_could_not_be_written_is_refused_before_the_work(whole, tmp_path, capsys):
    evaluate = ["evaluate", whole / "model", "--data", whole / "text.txt", "--json"]
    for path in (tmp_path, tmp_path / "missing" / "figures.json"):
        assert "must be in a folder that is there" in line_of([*evaluate, path], capsys)
        assert not capsys.readouterr().out


# Streams and signals.


def test_a_closed_standard_output_is_one_line(whole, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["generate", str(whole / "model"), "def"]) == 2
    assert "bd3lm generate: error: standard output must be open, but is closed" in capsys.readouterr().err


def test_a_reader_that_has_left_is_no_error(whole, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main(["generate", str(whole / "model"), "def", "--max_new_tokens", "2"]) == 141
    assert "bd3lm generate" not in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interruption_is_one_line_in_every_command(command, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"bd3lm_hf.cli.{command}.run", interrupted)
    assert line_of([command], capsys, code=130) == f"bd3lm {command}: interrupted"
    assert main([command, "--verbose"]) == 130
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_the_package_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("bd3lm_hf.cli.generate.run", lambda argv: {}["missing"])
    with pytest.raises(KeyError):
        main(["generate"])


def test_flags_after_two_dashes_are_prompts(whole, capsys):
    assert main(["generate", str(whole / "model"), "--max_new_tokens", "1", "--json", "--", "--verbose"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "--verbose"


def start(*argv, **kwargs):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", "bd3lm_hf.cli", *map(str, argv)], env=environment, **{**pipes, **kwargs}
    )


@pytest.mark.slow
def test_an_interrupted_process_ends_with_130(whole):
    generate = ["generate", whole / "model", "def", "--max_new_tokens", "1000000"]
    for argv, sign in ((generate, "tokens"), (["app", whole / "model"], "Running on")):
        process = start(*argv)
        stream = process.stdout if argv[0] == "app" else process.stderr
        read = ""
        while sign not in read:
            read += (character := stream.read(1))
            assert character, read
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in error
        assert error.strip().splitlines()[-1] == f"bd3lm {argv[0]}: interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 3])
def test_a_process_that_is_interrupted_while_it_imports_ends_with_130(seconds):
    script = "import sys, bd3lm_command; print('started', flush=True); sys.exit(bd3lm_command.main())"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script, "demo"], **pipes)
    assert process.stdout.readline() == "started\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.strip().splitlines()[-1] in ("bd3lm: interrupted", "bd3lm demo: interrupted")


@pytest.mark.slow
def test_a_process_whose_output_does_not_arrive_ends_with_one_line(whole):
    with open("/dev/full", "w") as full:
        process = start("generate", whole / "model", "def", "--max_new_tokens", "2", stdout=full)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in error and "Exception ignored" not in error
    assert error.strip().splitlines()[-1] == "bd3lm generate: error: [Errno 28] No space left on device"
