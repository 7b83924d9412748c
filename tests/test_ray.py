"""On Ray: a replica that is killed under load loses nothing it had not begun to stream; a killed bulk run goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from serving import KEY, make_tiny, save_tiny


ray = pytest.importorskip("ray", reason="needs Ray: pip install 'bd3lm-hf[ray]'")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[1]
HEADERS = {"Authorization": f"Bearer {KEY}"}
# Of a machine on which much else runs, where Ray would give up on a process that imports torch.
PATIENT = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Its workers would give way to everything else, and get nothing where all cores are taken.
    "RAY_worker_niceness": "0",
    # It would end replicas where others fill the memory.
    "RAY_memory_monitor_refresh_ms": "0",
}
# Ray gives its own processes 30 seconds to start, whatever it is told.
TOO_BUSY = "The current node timed out during startup"


@pytest.fixture(scope="module")
def tiny():
    return make_tiny()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return save_tiny(tiny, tmp_path_factory.mktemp("models") / "tiny")


@contextmanager
def command(folder, *flags):
    """`bd3lm` with a Ray of its own, which ends with it."""
    line = [sys.executable, "-m", "bd3lm_hf.cli", flags[0], str(folder), *flags[1:], "--device", "cpu", "--ray"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | PATIENT | {"PYTHONPATH": paths, "BD3LM_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with open(folder.parent / "errors.txt", "ab") as errors:
        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()


def children(process):
    """Number -> name of all processes that descend from one."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                number, name = int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parents[number] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            names[number] = name
    found, waiting = {}, [process.pid]
    while waiting:
        parent = waiting.pop()
        below = [number for number in parents if parents[number] == parent]
        found |= {number: names[number] for number in below}
        waiting += below
    return found


def replicas(process):
    return [number for number, name in children(process).items() if "ServeReplica:bd3lm:model" in name]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def alone(tiny, text, **options):
    model, tokenizer = tiny
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    sequence = model.generate(torch.tensor([ids]), **options)[0, len(ids) :]
    return tokenizer.decode(sequence, skip_special_tokens=True)


def test_a_bulk_run_that_is_killed_goes_on(tiny, folder, tmp_path):
    rows = [{"prompt": f"row {number}", "max_new_tokens": 32} for number in range(96)]
    data, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ["--data", str(data), "--output", str(output), "--batch_size", "4", "--seed", "7", "--max_length", "128"]
    flags += ["--replicas", "2", "--num_cpus", "0.3"]
    with command(folder, "generate", *flags) as process:
        while not (output.exists() and output.read_bytes().count(b"\n")):
            assert process.poll() is None
            time.sleep(0.02)
        below = children(process)
        process.kill()
        process.wait()
    # Ray ends its own processes with their driver, except where it is killed as well.
    for number in below:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert 0 < output.read_bytes().count(b"\n") < len(rows)
    with open(output, "ab") as file:
        file.write(b'{"index": 95, "prompt": "r')
    with command(folder, "generate", *flags) as process:
        assert process.wait(1200) == 0
    results = sorted(
        (json.loads(line) for line in output.read_text().splitlines()), key=lambda result: result["index"]
    )
    assert [result["index"] for result in results] == [*range(len(rows))]
    for result in results:
        wanted = alone(tiny, f"row {result['index']}", max_new_tokens=32, seed=7 + result["index"])
        assert result["completion"] == wanted


@pytest.fixture(scope="module")
def served(folder):
    flags = ["--replicas", "2", "--num_cpus", "0.3", "--num_slots", "4", "--max_length", "256"]
    for _ in range(3):
        port = free_port()
        with command(folder, "serve", "--port", str(port), *flags) as process:
            line, errors = process.stdout.readline(), (folder.parent / "errors.txt").read_text()
            if line or TOO_BUSY not in "".join(errors.splitlines()[-1:]):
                assert line == f"tiny is served at http://127.0.0.1:{port}/v1\n", errors
                yield process, f"http://127.0.0.1:{port}"
                return
    pytest.fail(errors)


def length_of(seed):
    # No two of those that are written at once end together.
    return 80 + 20 * (seed % 7)


def ask(url, seed, stream, begun=None):
    """The text of a request and whether it ended with an error; a stream is read to its end, and `begun` meanwhile."""
    length = length_of(seed)
    body = {"model": "tiny", "prompt": f"request {seed}", "max_tokens": length, "seed": seed, "stream": stream}
    if not stream:
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=600)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"], False
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=HEADERS, timeout=600) as answer:
        assert answer.status_code == 200
        events = []
        for line in filter(None, answer.iter_lines()):
            events.append(line.removeprefix("data: "))
            if begun is not None:
                begun.add(seed)
    if begun is not None:
        begun.remove(seed)
    if events[-1] == "[DONE]":
        return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]), False
    # It had begun, and says how it ended.
    assert len(events) > 1 and json.loads(events[-1])["error"]["code"] == "server_lost"
    return None, True


def test_a_replica_that_is_killed_loses_no_request_that_had_not_begun(tiny, served):
    process, url = served
    before = replicas(process)
    assert len(before) == 2
    begun = set()
    with ThreadPoolExecutor(24) as threads:
        # Eight are written at once, four by each replica, so that most wait.
        asked = [threads.submit(ask, url, seed, seed % 4 != 0, begun) for seed in range(24)]
        while len(begun) < 5:
            assert not all(answer.done() for answer in asked)
            time.sleep(0.01)
        # Both replicas have a stream that has begun.
        os.kill(before[0], signal.SIGKILL)
        answers = [answer.result() for answer in asked]
    num_cut = sum(is_cut for _, is_cut in answers)
    assert 1 <= num_cut <= 4
    for seed, (text, is_cut) in enumerate(answers):
        if not is_cut:
            assert text == alone(tiny, f"request {seed}", max_new_tokens=length_of(seed), seed=seed), seed
    # It is replaced, by one that answers.
    end = time.monotonic() + 400
    while len([number for number in replicas(process) if number != before[0]]) < 2:
        assert time.monotonic() < end
        time.sleep(1)
    assert before[0] not in replicas(process)
    with ThreadPoolExecutor(12) as threads:
        answers = [*threads.map(lambda seed: ask(url, seed, False), range(100, 112))]
    assert not any(is_cut for _, is_cut in answers)


def test_the_gateway_speaks_as_the_server_does(served):
    _, url = served
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
    models = httpx.get(f"{url}/v1/models", headers=HEADERS, timeout=60).json()["data"]
    assert [(card["id"], card["max_model_len"]) for card in models] == [("tiny", 256)]
    for body, status in (
        ({"model": "tiny", "prompt": "x", "max_tokens": 0}, 400),
        ({"model": "other", "prompt": "x"}, 404),
        ({"model": "tiny", "prompt": "x" * 2**20}, 413),
    ):
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60)
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert httpx.get(f"{url}/nothing", headers=HEADERS, timeout=60).json()["error"]["message"] == "Not Found"
    body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "stream": True}
    # A client that leaves frees its slot: more of them than there are would else be in the way.
    for _ in range(10):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60) as answer:
            next(answer.iter_lines())
    assert ask(url, 1, False)[0]
