"""`bd3lm generate --data`: every row gets what `generate` gives it alone, once, whatever interrupts the run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from serving import make_tiny, save_tiny

from bd3lm_hf import BD3LMForMaskedLM
from bd3lm_hf.cli import main
from bd3lm_hf.serving.bulk import BulkWriter
from bd3lm_hf.serving.bulk_files import BulkOutput
from bd3lm_hf.serving.engine import Engine, EngineLimits
from bd3lm_hf.serving.requests import Stopped


FLAGS = ["--device", "cpu", "--batch_size", "4", "--max_new_tokens", "10", "--seed", "7", "--max_length", "128"]


@pytest.fixture(scope="module")
def tiny():
    return make_tiny()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return save_tiny(tiny, tmp_path_factory.mktemp("models") / "tiny")


def write_rows(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def read_results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def alone(tiny, ids, **options):
    """The new text that `generate` writes alone."""
    model, tokenizer = tiny
    sequence = model.generate(torch.tensor([ids]), **options)[0, len(ids) :]
    return tokenizer.decode(sequence, skip_special_tokens=True)


def encode(tiny, text):
    return [tiny[1].bos_token_id, *tiny[1](text, add_special_tokens=False)["input_ids"]]


def bulk(folder, tmp_path, *flags):
    files = ["--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    return main(["generate", str(folder), *files, *FLAGS, *flags])


def last_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_each_row_gets_what_generate_gives_it_alone(tiny, folder, tmp_path):
    chat = [{"role": "user", "content": "hello"}]
    rows = [
        {"prompt": "def main("},
        {"id": "a", "prompt": "import os", "max_new_tokens": 5, "seed": 1},
        {"id": 3, "messages": chat, "sampler": "confidence", "denoising_steps": 2},
        {"prompt": [3, 5, 8], "temperature": 0.5, "top_p": 0.9},
        {"id": None, "prompt": "x", "do_sample": False},
        {"prompt": "to be", "stop_strings": ["e", "a"]},
        *({"prompt": "y" * length} for length in range(1, 20)),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert bulk(folder, tmp_path) == 0
    results = sorted(read_results(tmp_path / "out.jsonl"), key=lambda result: result["index"])
    assert [result["index"] for result in results] == [*range(len(rows))]
    for row, result in zip(rows, results):
        assert {name: result.get(name) for name in ("id", "prompt", "messages")} == {
            name: row.get(name) for name in ("id", "prompt", "messages")
        }
        assert ("id" in result) == ("id" in row)
        options = {name: row[name] for name in row if name not in ("id", "prompt", "messages")}
        options = {"max_new_tokens": 10, "seed": 7 + result["index"]} | options
        assert result["seed"] == options["seed"]
        if "messages" in row:
            ids = tiny[1].apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = row["prompt"] if isinstance(row["prompt"], list) else encode(tiny, row["prompt"])
        if "stop_strings" in options:
            options["tokenizer"] = tiny[1]
        assert result["completion"] == alone(tiny, ids, **options)
        assert 0 < result["num_forwards"] and result["num_tokens"] <= options["max_new_tokens"]
    assert len({result["completion"] for result in results}) > 15


def test_gaps_are_filled_as_by_the_pipeline(tiny, tmp_path, folder):
    from bd3lm_hf import TextInfillingPipeline

    gaps = {"placeholder": "___", "gap_length": 3}
    write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "def ___(x):", "infill": gaps}, {"prompt": "a[MASK]b", "infill": True}]
    )
    assert bulk(folder, tmp_path) == 0
    results = sorted(read_results(tmp_path / "out.jsonl"), key=lambda result: result["index"])
    pipeline = TextInfillingPipeline(model=tiny[0], tokenizer=tiny[1])
    wanted = [pipeline("def ___(x):", **gaps, seed=7), pipeline("a[MASK]b", seed=8)]
    assert [result["text"] for result in results] == [texts["text"] for texts in wanted]
    assert [result["num_tokens"] for result in results] == [3, 1]


def test_a_row_that_fails_has_an_error_and_the_others_go_on(folder, tmp_path, capsys):
    wrong = {
        '{"prompt": "torn': "must be a JSON object",
        "[1]": "must be a JSON object",
        '{"prompt": "x", "id": 1e999}': "must be a JSON object",
        '{"id": 4}': "either `prompt` or `messages`",
        '{"prompt": "x", "temprature": 1}': "temprature: Extra inputs are not permitted",
        '{"prompt": "x", "sampler": "none"}': "`sampler` must be one of",
        '{"prompt": "x", "sampler": "entropy_bound", "entropy_bound": -1}': "entropy_bound: ",
        '{"prompt": [70000]}': "`prompt` must be of ids",
        '{"prompt": "' + "x" * 200 + '"}': "`prompt` must have 1 to 128 tokens",
        '{"prompt": "[MASK]"}': "must not hold the mask token",
        '{"prompt": "x", "infill": true}': "must mark gaps by",
    }
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, *wrong, {"prompt": "b"}])
    assert bulk(folder, tmp_path) == 0
    assert f"{len(wrong) + 2} rows in" in (told := capsys.readouterr().out) and f"{len(wrong)} of them with" in told
    results = sorted(read_results(tmp_path / "out.jsonl"), key=lambda result: result["index"])
    assert [index for index, result in enumerate(results) if "error" not in result] == [0, len(wrong) + 1]
    for result, message in zip(results[1:], wrong.values()):
        assert message in result["error"] and "completion" not in result
    assert results[4]["id"] == 4


def test_an_engine_that_stops_is_no_fault_of_a_row(tiny):
    engine = Engine(tiny[0], EngineLimits(num_slots=2, max_length=64, max_queue=8))
    engine.step = lambda: 1 / 0
    with engine, pytest.raises(Stopped):
        [*BulkWriter(engine, tiny[1], {"max_new_tokens": 4}).write((i, b'{"prompt": "x"}') for i in range(20))]


def check_that_it_goes_on(tiny, folder, tmp_path, num_rows):
    """Resumes a run of `num_rows` rows that was interrupted, which had written some and tore the line after them."""
    output = tmp_path / "out.jsonl"
    assert 0 < output.read_bytes().count(b"\n") < num_rows
    before = read_results(output) if output.read_bytes().endswith(b"\n") else []
    with open(output, "ab") as file:
        file.write(f'{{"index": {num_rows - 1}, "prompt": "r'.encode())
    assert bulk(folder, tmp_path) == 0
    results = read_results(output)
    assert results[: len(before)] == before
    assert sorted(result["index"] for result in results) == [*range(num_rows)]
    assert not any("error" in result for result in results)
    for result in results[:: num_rows // 4]:
        options = {"max_new_tokens": 24, "seed": 7 + result["index"]}
        assert result["completion"] == alone(tiny, encode(tiny, f"row {result['index']}"), **options)


def test_a_run_goes_on_where_it_was_interrupted(tiny, folder, tmp_path, monkeypatch):
    class Interrupted(BaseException):
        """What nobody catches."""

    def add(self, result):
        if len(self.done) == 7:
            raise Interrupted
        return written(self, result)

    written = BulkOutput.add
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"row {number}", "max_new_tokens": 24} for number in range(16)])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(BulkOutput, "add", add)
        bulk(folder, tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 7
    check_that_it_goes_on(tiny, folder, tmp_path, 16)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_killed(tiny, folder, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"row {number}", "max_new_tokens": 24} for number in range(60)])
    files = ["--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    command = [sys.executable, "-m", "bd3lm_hf.cli", "generate", str(folder), *files, *FLAGS]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    output = tmp_path / "out.jsonl"
    while not (output.exists() and output.stat().st_size > 400):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    check_that_it_goes_on(tiny, folder, tmp_path, 60)


def test_only_rows_without_a_result_are_written(folder, tmp_path, monkeypatch):
    submit, asked = BulkWriter.submit, []
    monkeypatch.setattr(BulkWriter, "submit", lambda self, index, *_: asked.append(index) or submit(self, index, *_))
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert bulk(folder, tmp_path) == 0
    output = tmp_path / "out.jsonl"
    first = output.read_text()
    assert bulk(folder, tmp_path) == 0 and output.read_text() == first
    # Rows at the end of the data, and those whose results somebody took away.
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    kept, gone = first.splitlines()
    output.write_text(f"{kept}\n")
    assert bulk(folder, tmp_path) == 0
    lines = output.read_text().splitlines()
    assert lines[0] == kept and len(lines) == 3 and gone in lines
    assert asked == [0, 1, json.loads(gone)["index"], 2]


def test_results_of_another_run_are_not_gone_on_with(tiny, folder, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    output = tmp_path / "out.jsonl"
    assert bulk(folder, tmp_path) == 0
    first = output.read_text()
    assert bulk(folder, tmp_path, "--temperature", "0.5") == 2
    assert "`settings` must be" in (told := last_line(capsys)) and "`--overwrite` begins anew" in told
    other = tmp_path / "other"
    BD3LMForMaskedLM(tiny[0].config).save_pretrained(other)
    tiny[1].save_pretrained(other)
    assert bulk(other, tmp_path) == 2
    assert "`model` must be" in last_line(capsys)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "B"}])
    assert bulk(folder, tmp_path) == 2
    assert "`data` must begin with the 2 rows" in last_line(capsys)
    assert output.read_text() == first
    assert bulk(folder, tmp_path, "--overwrite") == 0
    assert len(read_results(output)) == 2 and output.read_text() != first
    (tmp_path / "out.jsonl.run.json").unlink()
    assert bulk(folder, tmp_path) == 2
    assert "has no out.jsonl.run.json" in last_line(capsys)


def test_a_file_that_is_no_output_is_left_alone(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    path = tmp_path / "out.jsonl"
    with BulkOutput(path, tmp_path / "rows.jsonl", {}) as output:
        assert output.add({"index": 0}) and not output.add({"index": 0})
        with pytest.raises(OSError, match="written by another run"), BulkOutput(path, tmp_path / "rows.jsonl", {}):
            pass
    for wrong in ('{"index": 2}\n', '{"index": 0}\n', "text\n", "{}\n"):
        path.write_text('{"index": 0}\n' + wrong)
        with pytest.raises(ValueError, match="line 2 of"), BulkOutput(path, tmp_path / "rows.jsonl", {}):
            pass
        assert path.read_text() == '{"index": 0}\n' + wrong


def test_flags_that_do_not_go_together_are_one_line(folder, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    data = ["--data", str(tmp_path / "rows.jsonl")]
    for flags, message in (
        (data, "`data` must go with `output`"),
        (["--output", "x"], "`output` must go with `data`"),
        ([*data, "--output", str(tmp_path / "x"), "--json"], "`json` must not go with `data`"),
        ([*data, "--output", str(tmp_path / "x"), "a prompt"], "`prompts` must not go with `data`"),
        ([*data, "--output", str(tmp_path / "x"), "--replicas", "2"], "`replicas` must go with `ray`"),
        ([*data, "--output", str(tmp_path / "x"), "--sampler", "none"], "`sampler` must be one of"),
        (["--data", "missing", "--output", str(tmp_path / "x")], "`data` must be a file of rows, but got 'missing'"),
    ):
        assert main(["generate", str(folder), *flags]) == 2
        assert message in last_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
