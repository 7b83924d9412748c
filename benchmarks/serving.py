"""
The engine beside `generate`: 16 requests at once, one after the other, and as one batch; how long a newcomer waits.

    python -m benchmarks.serving --sizes small --device cpu
    python -m benchmarks.serving --soak 600

`--soak` asks a server at random for so many seconds, over loopback: texts and streams, of which some clients leave in
the middle or while they wait. It fails unless memory stays flat after the first quarter, all slots are free in the end
and every client that stayed was answered, or told that the queue is full.
"""

import argparse
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bd3lm_hf.serving.api import make_app
from bd3lm_hf.serving.engine import Engine, EngineLimits
from bd3lm_hf.serving.requests import Ended, Failed, Request, Written
from bd3lm_hf.serving.running import BackgroundServer

from .common import BLOCK_SIZE, SIZES, interleaved_medians, make_bd3lm, resident_memory_mib


NUM_REQUESTS, PROMPT_LENGTH, NUM_NEW = 16, 64, 64
OPTIONS = {"top_p": 0.9}
# Of the memory before a quarter of a soak is over.
MOST_GROWTH = 0.05


def submit(engine: Engine, prompt: list[int], seed: int, num_new: int = NUM_NEW) -> tuple[threading.Event, list[Any]]:
    """Asks for a text; the event that is set at its end, and (time, event) of all that is told."""
    is_over, told = threading.Event(), []

    def listen(event: Any) -> None:
        told.append((time.perf_counter(), event))
        if isinstance(event, (Ended, Failed)):
            is_over.set()

    engine.submit(Request(prompt, num_new, listen, {**OPTIONS, "seed": seed}))
    return is_over, told


def measure_size(name: str, device: str, repeats: int) -> None:
    """Prints a row of the table for one size."""
    model = make_bd3lm(SIZES[name]).to(device).eval()
    ids = torch.randint(1, 1000, (NUM_REQUESTS, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    prompts = ids.tolist()

    def one_after_the_other() -> None:
        for seed, prompt in enumerate(prompts[:4]):
            submit(engine, prompt, seed)[0].wait()

    def at_once() -> None:
        for is_over, _ in [submit(engine, prompt, seed) for seed, prompt in enumerate(prompts)]:
            is_over.wait()

    def as_a_batch() -> None:
        model.generate(ids.to(device), max_new_tokens=NUM_NEW, seed=0, **OPTIONS)

    # A slot that has read a prompt would spare reading it again, which is not what is compared.
    limits = EngineLimits(num_slots=NUM_REQUESTS + 1, max_length=PROMPT_LENGTH + 4 * NUM_NEW)
    with Engine(model, limits) as engine:
        steps = {"one": one_after_the_other, "many": at_once, "batch": as_a_batch}
        seconds = interleaved_medians(steps, repeats)
        one = 4 * NUM_NEW / seconds["one"]
        many, batch = (NUM_REQUESTS * NUM_NEW / seconds[kind] for kind in ("many", "batch"))
        print("| size | one after the other | 16 at once | x | `generate`, batch of 16 | x |")
        print("| --- | --- | --- | --- | --- | --- |")
        print(f"| {name} | {one:.0f} | {many:.0f} | {many / one:.2f} | {batch:.0f} | {many / batch:.2f} |")
        newcomer(engine, prompts)


def newcomer(engine: Engine, prompts: list[list[int]]) -> None:
    """Prints how many forwards and seconds a request waits for its first block while 16 others are written."""
    others = [submit(engine, prompt, seed, 4 * NUM_NEW) for seed, prompt in enumerate(prompts)]
    while engine.num_running < NUM_REQUESTS:
        time.sleep(0.001)
    before, start = engine.counts.forwards, time.perf_counter()
    is_over, told = submit(engine, [*reversed(prompts[0])], 99, BLOCK_SIZE)
    is_over.wait()
    first = next(moment for moment, event in told if isinstance(event, Written))
    num_forwards = engine.counts.forwards - before
    print(
        f"a newcomer's first block: {first - start:.3f} s, {num_forwards} forwards, {BLOCK_SIZE} of them its own steps"
    )
    for is_done, _ in others:
        is_done.wait()


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words w0, w1, ..."""
    vocabulary = {f"w{index}": index for index in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w0", mask_token=f"w{vocab_size - 1}")


def ask_at_random(client: httpx.Client, rng: random.Random) -> str:
    """One client's request, and what came of it."""
    sampler = {"sampler": rng.choice(["first_hitting", "confidence"])}
    prompt = [rng.randrange(1, 1000) for _ in range(rng.randrange(1, 400))]
    body = {"model": "soak", "prompt": prompt, "max_tokens": rng.randrange(1, 40), "block_diffusion": sampler}
    body |= {"seed": rng.randrange(2**31), "logprobs": 0 if rng.random() < 0.3 else None, "n": rng.choice([1, 1, 2])}
    kind = rng.choice(["whole", "stream", "leaves a stream", "leaves"])
    try:
        if kind in ("whole", "leaves"):
            timeout = 300 if kind == "whole" else rng.random() * 2
            answer = client.post("/v1/completions", json=body, timeout=timeout)
            return "answered" if answer.status_code == 200 else str(answer.status_code)
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}, timeout=300) as answer:
            if answer.status_code != 200:
                return str(answer.status_code)
            num_left = rng.randrange(4) if kind == "leaves a stream" else None
            for number, line in enumerate(answer.iter_lines()):
                if number == num_left:
                    return "left"
                if line == "data: [DONE]":
                    return "answered"
        return "unanswered"
    except httpx.TimeoutException:
        return "left" if kind == "leaves" else "unanswered"


def soak(seconds: float, num_clients: int = 16) -> None:
    """Clients of a server who ask at random for so many seconds: see the head of this file."""
    model = make_bd3lm(SIZES["small"]).eval()
    engine = Engine(model, EngineLimits(num_slots=8, max_length=448, max_queue=8))
    app = make_app(engine, word_tokenizer(model.config.vocab_size), "soak")
    outcomes: Counter[str] = Counter()
    memory: list[float] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=server.url) as http:
            while time.monotonic() < end:
                outcome = ask_at_random(http, rng)
                outcomes[outcome] += 1
                time.sleep(outcome == "429")

    with BackgroundServer(app) as server, ThreadPoolExecutor(num_clients) as threads:
        end = time.monotonic() + seconds
        futures = [threads.submit(client, number) for number in range(num_clients)]
        while time.monotonic() < end:
            time.sleep(seconds / 60)
            memory.append(resident_memory_mib())
        for future in futures:
            future.result()
        end = time.monotonic() + 30
        while (engine.num_running or engine.num_waiting) and time.monotonic() < end:
            time.sleep(0.1)
        is_free, counts = engine.num_running == engine.num_waiting == 0, engine.counts
    # Of the first quarter, in which programs for products of all sizes are made, the last moments count.
    warm = memory[len(memory) // 8 : len(memory) // 4]
    early, late = max(warm), max(memory[-len(warm) :])
    print(f"{dict(outcomes)}; {counts}; all slots free: {is_free}")
    print(f"memory in MiB: {' '.join(f'{value:.0f}' for value in memory[:: max(len(memory) // 20, 1)])}")
    print(f"{early:.0f} MiB before a quarter of the time, {late:.0f} MiB in the end ({late / early - 1:+.1%})")
    assert set(outcomes) <= {"answered", "left", "429"} and outcomes["answered"] and outcomes["left"]
    assert is_free and not counts.failed and late <= early * (1 + MOST_GROWTH)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; the median counts")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="ask at random for so long, and measure nothing")
    args = parser.parse_args()
    if args.soak is not None:
        soak(args.soak)
        return
    for name in args.sizes:
        measure_size(name, args.device, args.repeats)


if __name__ == "__main__":
    main()
