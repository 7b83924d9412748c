"""The app's process keeps its memory under visitors who send what they like; and says what it takes."""

import html
import http.client
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from transformers import pipeline

from bd3lm_hf import train_tokenizer


pytest.importorskip("gradio", reason="needs gradio: pip install 'bd3lm-hf[app]'")

from bd3lm_hf.app import frames, likelihood, make_page, patience, writing  # noqa: E402


MIB = 2**20
NUM_VISITORS, SECONDS = 20, 45
# Sampler, steps, remasking, threshold, bound, temperature, top_p, seed and pace.
CHOICES = ["first_hitting", "", 0, "", 1, 1, 0.9, "3", 0]
MANY_STEPS = ["ancestral", "1000", 1, "", 1, 1, 0.9, "3", 0]
WORDS = "def main(path):\n    return path\n"


def visits():
    """What visitors send: the name of the event, its data, and whether they read the answer."""
    longest = (WORDS * 1000)[: writing.MOST_CHARACTERS]
    most = longest[:3000]
    return [
        ("write", ["a" * 150_000, 8, *CHOICES], True),
        ("write", ["\N{GRINNING FACE}" * writing.MOST_CHARACTERS, 8, *CHOICES], True),
        ("write", [most, 128, *CHOICES], False),
        ("write", [most, 128, *MANY_STEPS], False),
        ("write", [most, 128, *MANY_STEPS[:-1], 1], True),
        ("write", ["a", 10**9, *CHOICES], True),
        ("write", ["a", 8, "ancestral", "9" * 4000, 0, "", 1, 1, 0.9, "9" * 4000, 0], True),
        ("fill", ["___" * 5_000, 32, *CHOICES], True),
        ("fill", ["a___" * writing.MOST_GAPS, 8, *CHOICES], False),
        ("fill", ["a___" * 60, 10**9, *CHOICES], True),
        ("fill", ["[MASK]" * 3_000, 1, *CHOICES], True),
        ("write", [longest * 5000, 8, *CHOICES], True),
        ("write", [None, None, *[None] * 9], True),
    ]


def post(port, path, payload, timeout=20):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", path, json.dumps(payload), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def read(port, path, timeout=20):
    """The answer of an event, as far as it comes within a time."""
    connection, parts = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout), []
    try:
        connection.request("GET", path)
        response, deadline = connection.getresponse(), time.monotonic() + timeout
        while time.monotonic() < deadline and (part := response.read1(65536)):
            parts.append(part.decode(errors="replace"))
    finally:
        connection.close()
    return "".join(parts)


def visit(port, name, data, reads, timeout=20):
    status, answer = post(port, f"/gradio_api/call/{name}", {"data": data}, timeout)
    if status != 200:
        return str(status)
    return read(port, f"/gradio_api/call/{name}/{json.loads(answer)['event_id']}", timeout) if reads else ""


def resident(process, name):
    return int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024


def small_model():
    tokenizer = train_tokenizer({"text": [WORDS] * 9}, 280)
    model = random_model(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=2,
        max_position_embeddings=128,
        attn_implementation="sdpa",
    )
    return tokenizer, model


@pytest.fixture
def served(tmp_path):
    """`bd3lm app` of a small model in a process of its own: (process, port)."""
    tokenizer, model = small_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bd3lm_hf.cli", "app", str(tmp_path), "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                read(port, "/config", 5)
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.2)
        yield process, port
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def writer():
    tokenizer, model = small_model()
    return writing.Writer(pipeline("text-infilling", model=model, tokenizer=tokenizer, device="cpu"))


@pytest.mark.parametrize(
    ("event", "text", "number", "message"),
    [
        ("write", "a" * 150_000, 8, "`prompt` must have at most 20,000 characters on this page, but got 150,000."),
        ("write", "a" * 20_001, 8, "`prompt` must have at most 20,000 characters"),
        ("write", "\N{GRINNING FACE}" * 5_000, 8, "`prompt` and `max_new_tokens` must have at most 2,048 tokens"),
        ("write", "a", 10**9, "`max_new_tokens` must have at most 2,048 tokens together on this page, but got 2 and"),
        ("write", "a", -5, "but got 2 and -5."),
        ("fill", "a" * 20_001 + "___", 1, "`text` must have at most 20,000 characters"),
        ("fill", "___" * 101, 1, "`text` must have at most 100 gaps on this page, but got 101."),
        ("fill", "a___" * 100, 10**9, "`gap_length` must have at most 2,048 tokens"),
        ("fill", "a[MASK]" * 101, 1, "`text` must have at most 100 gaps on this page, but got 101."),
        ("fill", "[MASK]" * 2_048, 1, "`text` must have at most 2,048 tokens on this page, but got 2,049."),
    ],
)
def test_what_is_too_much_is_refused_with_its_limit(writer, event, text, number, message):
    text = text.replace("[MASK]", writer.tokenizer.mask_token)
    (shown,) = getattr(writer, event)(text, number, *CHOICES)
    assert message in html.unescape(shown[0])


def test_what_is_just_not_too_much_is_taken(writer):
    # The first step is there before the rest is computed.
    assert "alert" not in next(writer.write("a" * 2_000, 40, *CHOICES))[0]
    assert "alert" not in next(writer.fill("a___" * writing.MOST_GAPS, 3, *CHOICES))[0]


def test_the_page_says_what_it_takes(writer):
    page = make_page(writer.pipeline, "a model")
    said = [part["props"].get("info") or "" for part in page.get_config_file()["components"]]
    assert sum("20,000 characters and 100 gaps, and 2,048 tokens" in info for info in said) == 2


def test_generate_waits_for_who_looks_at_its_frames(writer, monkeypatch):
    prompt = torch.tensor([[0, 5, 6]])
    options = {"max_new_tokens": 30, "seed": 1}
    everything = list(frames.watch(writer.model, prompt, **options))
    monkeypatch.setattr(frames, "MOST_FRAMES_AHEAD", 3)
    clock, waits = ClockToBeSet(), threading.Event()

    class Queue(queue.Queue):
        num_put = 0

        def put(self, frame):
            # As one is taken and three wait.
            if self.num_put == 1 + 3:
                waits.set()
            super().put(frame)
            self.num_put += 1

    monkeypatch.setattr(frames, "time", clock)
    monkeypatch.setattr(frames, "queue", SimpleNamespace(Queue=Queue))
    start, others = time.perf_counter(), threading.enumerate()
    film = frames.watch(writer.model, prompt, **options)
    first = next(film)
    assert waits.wait(60)
    clock.ahead += 1000
    (thread,) = threads_of_frames(others)
    rest = list(film)
    assert [frame.tokens.tolist() for frame in [first, *rest]] == [frame.tokens.tolist() for frame in everything]
    # It was still at work after that, and that is not counted as its own time.
    assert not thread.is_alive()
    assert rest[-1].seconds < time.perf_counter() - start
    film = frames.watch(writer.model, prompt, **options)
    next(film)
    (thread,) = threads_of_frames(others)
    film.close()
    assert not thread.is_alive()


class ClockToBeSet:
    """A clock that may be set ahead: by `ahead` seconds."""

    ahead = 0.0

    def perf_counter(self):
        return time.perf_counter() + self.ahead


def threads_of_frames(others):
    """The threads in which `watch` has `generate` run, but for those among the others."""
    return [thread for thread in threading.enumerate() if "(work)" in thread.name and thread not in others]


def test_the_likelihood_in_parts_is_that_of_all_masks_at_once(writer, monkeypatch):
    tokens = torch.randint(4, 200, (40,), generator=torch.Generator().manual_seed(2))
    is_new = torch.arange(40) > 11
    at_once = likelihood.likelihood_of_new_tokens(writer.model, tokens, is_new)
    monkeypatch.setattr(likelihood, "MOST_AT_ONCE", 130)
    in_parts = likelihood.likelihood_of_new_tokens(writer.model, tokens, is_new)
    assert at_once.is_exact and in_parts.nelbo == pytest.approx(at_once.nelbo, rel=1e-6)


def test_steps_wait_for_a_visitor_and_end_for_one_who_has_gone(monkeypatch):
    messages, read = queue.Queue(), []
    steps = patience.waiting_for_reader(visited_page(messages), lambda number: iter(range(number)))

    def reader():
        while len(read) < 100:
            read.append(messages.get())
            time.sleep(0.001)

    thread = threading.Thread(target=reader)
    thread.start()
    most = 0
    for step in steps(visitor(), 100):
        messages.put(step)
        most = max(most, messages.qsize())
    thread.join()
    assert read == list(range(100)) and most <= patience.MOST_UNREAD
    monkeypatch.setattr(patience, "LONGEST_WAIT", 0.1)
    for step in steps(visitor(), 100):
        messages.put(step)
    assert step == patience.MOST_UNREAD - 1 and messages.empty()


def visitor():
    return SimpleNamespace(session_hash="abc")


def visited_page(messages):
    return SimpleNamespace(_queue=SimpleNamespace(pending_messages_per_session={"abc": messages}))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_the_process_stays_under_a_gibibyte_whatever_twenty_visitors_send(served):
    process, port = served
    assert "at most 20,000 characters" in visit(port, "write", ["a" * 150_000, 8, *CHOICES], True, 60)
    start, deadline = resident(process, "VmRSS"), time.monotonic() + SECONDS
    num_sent = [0] * NUM_VISITORS

    def behave(number):
        kinds = visits()
        while time.monotonic() < deadline:
            name, data, reads = kinds[(number + num_sent[number]) % len(kinds)]
            try:
                visit(port, name, data, reads, timeout=5)
            except (OSError, http.client.HTTPException):
                # The server hangs up on what is too long.
                pass
            num_sent[number] += 1

    visitors = [threading.Thread(target=behave, args=(number,)) for number in range(NUM_VISITORS)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert process.poll() is None and "block diffusion" in read(port, "/", 30)
    assert min(num_sent) >= 3
    grown = resident(process, "VmHWM") - start
    print(f"{sum(num_sent)} requests, {grown / MIB:.0f} MiB above the start")
    assert grown < 1024 * MIB
