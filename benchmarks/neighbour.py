"""How threads wait: a process alone on the machine, and next to three processes that keep its cores busy.

    python benchmarks/neighbour.py [--scheme bf16] [--rounds 3]

Each figure is a process of its own that loads the embedded model and decodes 16 tokens a few times: the best of them, in seconds.
The options take turns. Alone, the best round of each counts. Next to the others, the median counts.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

WAYS = {
    "OpenMP default": {},
    "qwlib's processes": None,  # processes.environment
    "sleep at once": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def child(scheme: str, times: int) -> None:
    """Decode in this process, and print the seconds of the quickest answer."""
    import qwlib

    with qwlib.load("smollm2-135m", scheme, device="cpu") as lm:
        ids, took = lm.encode("Quantization maps many values to few."), []
        lm.stream(ids, new_tokens=2)
        for _ in range(times):
            began = time.perf_counter()
            lm.stream(ids, new_tokens=16)
            took.append(time.perf_counter() - began)
    print(min(took))


def seconds(scheme: str, way: dict | None, times: int) -> float:
    from qwlib.machine import processes

    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    waiting = {"GOMP_SPINCOUNT": str(processes.SPINS)} if way is None else way
    call = [sys.executable, __file__, "--scheme", scheme, "--child", str(times)]
    return float(subprocess.run(call, env=plain | waiting, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scheme", default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int, help="for its own use")
    asked = parser.parse_args()
    if asked.child:
        child(asked.scheme, asked.child)
        return
    from qwlib.machine import processor

    print(f"{processor.name()}, {len(os.sched_getaffinity(0))} cores, {asked.scheme}, 16 tokens: seconds")
    alone = {name: [] for name in WAYS}
    for _ in range(asked.rounds):
        for name, way in WAYS.items():
            alone[name].append(seconds(asked.scheme, way, 8))
    beside = {name: [] for name in WAYS}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        for _ in range(asked.rounds):
            for name, way in WAYS.items():
                beside[name].append(seconds(asked.scheme, way, 1))
    finally:
        for each in busy:
            each.kill()
            each.wait()
    first = next(iter(WAYS))
    print(f"{'':22} {'alone':>7} {'':>6} {'busy':>8}")
    for name in WAYS:
        mine, other = min(alone[name]), statistics.median(beside[name])
        share, gain = mine / min(alone[first]), statistics.median(beside[first]) / other
        print(f"{name:22} {mine:7.2f} {share:5.0%} {other:8.2f}  {gain:.1f} times as fast")


if __name__ == "__main__":
    main()
