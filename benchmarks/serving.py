"""
The engine beside `generate`: 16 requests at once, one after the other, and as one batch; how long a newcomer waits.

    python -m benchmarks.serving --sizes small --device cpu
    python -m benchmarks.serving --soak 600

`--soak` asks a server at random for so many seconds: texts and streams, of which some are cancelled and some clients
leave. It fails unless memory stays flat, all slots are free in the end and every request was answered.
"""

import argparse
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from bd3lm_hf.serving.engine import Engine, EngineLimits
from bd3lm_hf.serving.requests import Ended, Failed, Request, Written

from .common import BLOCK_SIZE, SIZES, interleaved_medians, make_bd3lm, resident_memory_mib


NUM_REQUESTS, PROMPT_LENGTH, NUM_NEW = 16, 64, 64
OPTIONS = {"top_p": 0.9}
# Of the memory after the first quarter of a soak.
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


def soak(seconds: float, num_clients: int = 16) -> None:
    """Random requests, cancellations and clients that leave, for so many seconds."""
    model = make_bd3lm(SIZES["small"]).eval()
    end, memory = time.monotonic() + seconds, []
    kinds = ("answered", "failed", "cancelled", "unanswered")

    def client(number: int) -> dict[str, int]:
        rng, counts = random.Random(number), dict.fromkeys(kinds, 0)
        while time.monotonic() < end:
            prompt = [rng.randrange(1, 1000) for _ in range(rng.randrange(1, 400))]
            is_over, told = threading.Event(), []

            def listen(event: Any, told=told, is_over=is_over) -> None:
                told.append(event)
                if isinstance(event, (Ended, Failed)):
                    is_over.set()

            options = {"seed": rng.randrange(2**31), "sampler": rng.choice(["first_hitting", "confidence"])}
            request = Request(prompt, rng.randrange(1, 40), listen, options, wants_reveal=rng.random() < 0.3)
            engine.submit(request)
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.3)
                request.cancel()
                counts["cancelled"] += 1
            elif not is_over.wait(120):
                counts["unanswered"] += 1
            else:
                counts["answered" if isinstance(told[-1], Ended) else "failed"] += 1
        return counts

    with (
        Engine(model, EngineLimits(num_slots=8, max_length=448)) as engine,
        ThreadPoolExecutor(num_clients) as threads,
    ):
        futures = [threads.submit(client, number) for number in range(num_clients)]
        while time.monotonic() < end:
            time.sleep(min(seconds / 40, 10))
            memory.append(resident_memory_mib())
        total = {kind: sum(future.result()[kind] for future in futures) for kind in kinds}
        while engine.num_running or engine.num_waiting:
            time.sleep(0.1)
        num_free = len(engine._slots.free)
    early, late = max(memory[: len(memory) // 4]), max(memory[-len(memory) // 4 :])
    print(f"{total}, {num_free} of 8 slots free, {early:.0f} MiB, then {late:.0f} MiB ({late / early - 1:+.1%})")
    assert num_free == 8 and not total["failed"] and not total["unanswered"] and late <= early * (1 + MOST_GROWTH)


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
