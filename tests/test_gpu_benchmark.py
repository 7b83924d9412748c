"""`make gpu` at a tiny size on a CPU: every line, what fails, what there is no time for, and what is counted."""

import json
import time
from types import SimpleNamespace

import fake_lines
import pytest
import torch
from conftest import randomize
from pages import DOCS
from transformers import LlamaConfig, LlamaForCausalLM

from bd3lm_hf import BlockDiffusionForMaskedLM
from benchmarks.common import peak_tflops
from benchmarks.dense import dense_loss, stock_two_stream_logits
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import processes
from benchmarks.gpu.lines import Line, all_lines, compiled_way
from benchmarks.gpu.measuring import counts_of, longest_kernels
from benchmarks.gpu.networks import SIZES, TINY, flops_per_token, make_model
from benchmarks.gpu.results import Results
from benchmarks.gpu.suite import SuiteRun, summary_of


LINES = all_lines(["published", "adapted"], ["training", "generation"], many=2)
ON_CPU = ["--device", "cpu", "--size", "tiny", "--processes", "0", "--skip", "tests"]


def read_lines(folder):
    first, *rows = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    assert set(first) == {"about"}
    return {(row["part"], row["network"], row["model"]): row for row in rows}


def test_every_line_runs_or_says_how_it_fails(tmp_path):
    assert gpu.run([*ON_CPU, "--results", str(tmp_path)]) == 1
    rows = read_lines(tmp_path)
    assert list(rows) == [line.key for line in LINES]
    for line in LINES:
        row = rows[line.key]
        if line.part == "training" and line.attention == "flex_attention":
            assert row["state"].startswith("fails: ") and "flex" in row["state"].lower()
        else:
            assert row["tokens_per_second"] > 0 and row["flops_per_token"] > 0
        if line.note:
            # Four tokens a forward, and a little for the prompt.
            assert 0.25 <= row["forwards_per_token"] < 0.5
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| training") == 12 and table.count("\n| generation") == 20
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_parts_are_left_out_and_what_there_is_no_time_for_says_so(tmp_path):
    flags = [*ON_CPU, "generation", "adapted", "--seconds", "0", "--results", str(tmp_path)]
    assert gpu.run(flags) == 0
    rows = read_lines(tmp_path)
    assert {(part, network) for part, network, _ in rows} == {("training", "published")}
    assert {row["state"] for row in rows.values()} == {"not run: no time left"}


def test_further_ways_to_compile_are_lines_of_their_own(tmp_path):
    flags = [*ON_CPU, "generation", "adapted", "--results", str(tmp_path)]
    assert gpu.run([*flags, "--ways", "sdpa:reduce-overhead:0.8"]) == 1
    rows = read_lines(tmp_path)
    row = rows["training", "published", "block diffusion, compiled, sdpa, reduce-overhead, memory budget 0.8"]
    assert row["tokens_per_second"] > 0 and len(rows) == 7
    way = compiled_way("flex_attention:max-autotune:0.5")
    assert way.arguments == {"mode": "max-autotune", "memory_budget": 0.5} and way.attention == "flex_attention"
    assert compiled_way("sdpa:default").arguments == {}
    for text in ("sdpa", "eager:default", "sdpa:fast", "sdpa:default:little", "sdpa:default:1:2"):
        with pytest.raises(ValueError, match=r"`ways` must be of the form ATTENTION:MODE\[:BUDGET\] with .*, but got"):
            compiled_way(text)


def test_the_longest_kernels_come_first_and_what_the_host_does_not_at_all():
    def event(key, microseconds, count, on_host=0):
        return SimpleNamespace(key=key, self_device_time_total=microseconds, count=count, cpu_time_total=on_host)

    events = [
        event("short", 100, 2),
        event("aten::mm", 9000, 1, on_host=5),
        event("long", 3000, 4),
        event("none", 0, 1),
    ]
    assert longest_kernels(events, 2) == [("long", 1.5, 2.0), ("short", 0.05, 1.0)]


class TimeFromTheFirstLine:
    """A clock that stands still until a line is ready: how long a process takes to start is nobody's doing."""

    def __init__(self, log):
        self.log, self.stood = log, time.monotonic()

    def monotonic(self):
        if not (self.log.exists() and " ready " in self.log.read_text()):
            self.stood = time.monotonic()
        return time.monotonic() - self.stood


def fake_run(tmp_path, notes, seconds, monkeypatch):
    lines = [Line("training", "published", "autoregressive", note=note) for note in notes]
    results = Results(tmp_path, lines, {"sentence": "On nothing."})
    log = tmp_path / "log"
    where, clock = ("tiny", "cpu", str(log)), TimeFromTheFirstLine(log)
    monkeypatch.setattr(processes, "time", clock)
    processes.measure_lines(lines, where, seconds, 3, results.keep, lambda end: None, fake_lines.start)
    assert clock.monotonic() < seconds + 3
    states = {row["model"].split(", ")[-1]: row.get("state", "measured") for row in read_lines(tmp_path).values()}
    return results, states, log.read_text().splitlines()


def test_a_process_that_dies_or_fails_takes_no_other_line_with_it(tmp_path, monkeypatch):
    notes = ["dies", "first", "fails", "dies late", "second"]
    results, states, log = fake_run(tmp_path, notes, 600, monkeypatch)
    assert states == {
        "dies": "fails: its process ended with status 3",
        "first": "measured",
        "fails": "fails: ValueError: no such thing",
        "dies late": "fails: its process ended with status 4",
        "second": "measured",
    }
    assert results.failed
    # Measured is one at a time, with nothing being prepared.
    times = {}
    for line in log:
        note, what, when = line.rsplit(" ", 2)
        times[note, what] = float(when)
    ready = max(when for (_, what), when in times.items() if what == "ready")
    spans = sorted((times[note, "measures"], times[note, "over"]) for note in ("first", "second"))
    assert ready < spans[0][0] < spans[0][1] <= spans[1][0]
    assert not any(start <= times["dies late", "measures"] < end for start, end in spans)


def test_a_line_that_hangs_is_ended_in_time_and_the_others_are_measured(tmp_path, monkeypatch):
    results, states, _ = fake_run(tmp_path, ["hangs", "first"], 19, monkeypatch)
    assert states == {"hangs": "not run: no time left, after preparing", "first": "measured"}
    assert not results.failed


def test_operations_are_those_of_the_formula():
    size = SIZES["full"].published
    layers, head = 12 * 12 * size.hidden_size**2, size.hidden_size * size.vocab_size
    attention = 12 * 12 * size.hidden_size * size.length / 2
    with torch.device("meta"):
        models = {name: make_model(Line("training", "published", name), SIZES["full"]) for name in NAMES}
    for name, expected in {
        "autoregressive": 6 * (layers + head) + attention,
        "block diffusion": 6 * (2 * layers + head / 2) + 2 * attention,
        "paper": 6 * (2 * layers + head / 2) + 2 * attention,
    }.items():
        assert flops_per_token(Line("training", "published", name), models[name], size.length) == expected
    line = Line("generation", "published", "autoregressive")
    assert flops_per_token(line, models["autoregressive"], size.length) == 2 * (layers + head)
    # Grouped queries and a gated MLP: hidden 32, of 2 heads of 4 the keys and values, 48 wide.
    line = Line("training", "adapted", "autoregressive")
    layers, head = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 32 * 64
    expected = 6 * (layers + head) + 12 * 2 * 32 * 32 / 2
    assert flops_per_token(line, make_model(line, SIZES["tiny"]), 32) == expected


NAMES = ("autoregressive", "block diffusion", "paper")


@pytest.mark.parametrize(
    "name,peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA H2000", None),
    ],
)
def test_the_peak_is_that_of_the_device(name, peak):
    assert peak_tflops(name) == peak


def test_what_the_profiler_does_itself_is_not_counted():
    def event(name, start, end):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))

    within = [event("cudaLaunchKernel", 12, 13), event("cuLaunchKernelEx", 14, 15), event("cudaGraphLaunch", 16, 17)]
    events = [
        event("cudaDeviceSynchronize", 5, 6), event("measured", 10, 40), *within, event("aten::mul", 20, 21),
        event("cudaStreamSynchronize", 22, 23), event("cudaDeviceSynchronize", 41, 50),
    ]  # fmt: skip
    assert counts_of(events, 2) == (1.5, 0.5)


def test_the_papers_formulation_of_a_stock_network_is_what_the_model_computes():
    stock = LlamaForCausalLM(LlamaConfig(**TINY, bos_token_id=0, eos_token_id=0))
    model = BlockDiffusionForMaskedLM.from_causal_lm(stock, block_size=4, shift_logits=False)
    randomize(model)
    x_t, x_0 = torch.randint(64, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=x_t, clean_input_ids=x_0).logits
        torch.testing.assert_close(stock_two_stream_logits(model, x_t, x_0), expected)
    torch.manual_seed(0)
    expected = model.train()(input_ids=x_0, labels=x_0).loss
    torch.manual_seed(0)
    torch.testing.assert_close(dense_loss(model, x_0), expected)


def test_the_numbers_of_tests_are_read_from_the_last_line_that_has_them():
    log = "3 failed\nSKIPPED [2] x: 1 skipped\n12 passed, 3 skipped, 1 failed, 4 warnings in 9.0s\n\n"
    assert summary_of(log) == {"passed": 12, "skipped": 3, "failed": 1}
    assert summary_of("Killed") == {}


def test_the_page_of_benchmarks_names_the_device_or_says_not_run():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8").split("\n## On a GPU\n")[1]
    # The version before this one had another, an H100.
    this_version = page.split("Version 0.1.0")[0]
    assert "\n| " in this_version
    assert "NVIDIA" in this_version or "not run" in this_version


@pytest.mark.slow
def test_the_test_suite_runs_beside(tmp_path):
    suite = SuiteRun("cpu", tmp_path / "tests.txt", 1, ["tests/test_diffusion.py"])
    result = suite.wait(time.monotonic() + 600)
    assert result["passed"] > 3 and "fail" not in result["state"]
    suite = SuiteRun("cpu", tmp_path / "tests.txt", 1, ["tests/test_generation.py"])
    assert suite.wait(time.monotonic() + 1)["state"].endswith("then no time left")
