"""Processes that qwlib starts: how their threads wait, how they begin and end, and why one ended.

PyTorch's products on a CPU are loops of OpenMP, and a thread that is done early spins until the next loop begins. GNU's OpenMP
spins for 300,000 rounds: on an idle machine that costs nothing, but where other work wants the cores, each
thread spins away the time that the one it waits for needs. `SPINS` rounds are enough for the gap between two layers, and let go
of a core that somebody else wants. To sleep at once (`OMP_WAIT_POLICY=passive`) made decoding 43 % slower on an idle machine.
Measured by benchmarks/neighbour.py; the figures are in docs/measured.md.

Source: GCC's manual of libgomp, environment variables OMP_WAIT_POLICY and GOMP_SPINCOUNT.
"""

import contextlib
import gc
import os
import signal
import sys
import threading

SPINS = 5000
HEAVY = "transformers.modeling_utils"


def environment() -> dict[str, str]:
    """The environment for a process that multiplies: this one's, with `SPINS` where nobody has chosen how threads wait."""
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    return dict(os.environ) | ({} if chosen else {"GOMP_SPINCOUNT": str(SPINS)})


@contextlib.contextmanager
def importing():
    """While modules are imported, nothing is collected: torch and transformers make 400,000 objects that stay.

    Python goes through them again and again meanwhile and finds nothing: 1 second of 4 (two cores of an AMD EPYC, AVX512-BF16).
    Where transformers came, later collections pass over what is there by then: 0.3 seconds each, and every model that goes is
    followed by some. No model of transformers is there yet, which would stay as well.
    """
    enabled, before = gc.isenabled(), HEAVY in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if not before and HEAVY in sys.modules:
            gc.collect()
            gc.freeze()
        if enabled:
            gc.enable()


@contextlib.contextmanager
def without(name: str):
    """While modules are imported, the package of that name counts as not installed: for what is optional and slow.

    jsonschema builds a grammar of internationalized addresses as it is imported, if `rfc3987_syntax` is there (JupyterLab brings
    it): 1.2 of the 1.8 seconds that papermill and nbconvert take to be imported, for a check that notebooks have no use for.
    """
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


@contextlib.contextmanager
def within(seconds: float):
    """Raises TimeoutError in what takes longer: in the main thread of a process on Linux or macOS; elsewhere it only runs.

    Python's loops and its regular expressions are ended so, one call of a library in C is not.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)  # again and again: code that catches everything catches it once
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def whole_process():
    """Around all that a process of qwlib's own does: at its end only modules are left to collect, which takes a second."""
    try:
        yield
    finally:
        gc.freeze()


def last_word(code: int, stderr: str) -> str | None:
    """Why a process ended badly: its signal, or its last word; None if it ended well."""
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else f"the process ended with code {code} and no word"
