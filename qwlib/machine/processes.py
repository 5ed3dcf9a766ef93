"""Processes that qwlib starts: how their threads wait, and why one ended.

PyTorch's products on a CPU are loops of OpenMP, and a thread that is done early spins until the next loop begins. GNU's OpenMP
spins for 300,000 rounds: on an idle machine that costs nothing, but where other work wants the cores, each
thread spins away the time that the one it waits for needs. `SPINS` rounds are enough for the gap between two layers, and let go
of a core that somebody else wants. To sleep at once (`OMP_WAIT_POLICY=passive`) made decoding 43 % slower on an idle machine.
Measured by benchmarks/neighbour.py; the figures are in docs/measured.md.

Source: GCC's manual of libgomp, environment variables OMP_WAIT_POLICY and GOMP_SPINCOUNT.
"""

import os
import signal

SPINS = 5000


def environment() -> dict[str, str]:
    """The environment for a process that multiplies: this one's, with `SPINS` where nobody has chosen how threads wait."""
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    return dict(os.environ) | ({} if chosen else {"GOMP_SPINCOUNT": str(SPINS)})


def last_word(code: int, stderr: str) -> str | None:
    """Why a process ended badly: its signal, or its last word; None if it ended well."""
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else f"the process ended with code {code} and no word"
