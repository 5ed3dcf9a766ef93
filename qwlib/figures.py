"""How every figure here looks: one palette, and axes that bear units.

The palette is that of Okabe and Ito (2008), whose colours can be told apart with every common colour blindness; the ground is
white, so that a figure reads the same on a dark page.
"""

import io
import itertools

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")
INK = "#333333"
# the same scheme or code book looks alike in every figure: its family has a colour, and within the family it has a marker
_FAMILIES = (
    ("bf16", "16-bit", "even", "fp16", "fp32"),
    ("nf4",),
    ("fp4",),
    ("int8", "8-bit"),
    ("gguf",),
    ("gptq", "awq", "autoround"),
    ("onnx", "hqq", "torchao", "exl"),
)
_MARKERS = {
    "fp16": "s",
    "fp32": "D",
    "nf4": "s",
    "nf4-dq": "D",
    "nf4-mixed": "v",
    "nf4-all": "p",
    "fp4": "^",
    "fp4-dq": "<",
    "int8": "X",
    "gguf-bf16": "*",
    "gguf-q8_0": "h",
    "gguf-q6_k": ">",
    "gguf-q5_k_m": "8",
    "gguf-q4_k_m": "P",
    "gguf-q4_1": "d",
    "gguf-q4_0": "D",
    "gguf-q3_k_m": "v",
    "gguf-q2_k": "s",
    "gptq-4bit": "s",
    "awq-4bit": "^",
    "autoround-4bit": "d",
    "autoround-4bit-awq": "<",
    "autoround-4bit-gguf": ">",
    "onnx-int4": "s",
    "hqq-4bit": "^",
    "torchao-int8": "X",
    "torchao-int4": "D",
    "exl2-4bit": "v",
    "exl3-4bit": "P",
    "exl3-2bit": "p",
}
_OTHERS = "*hH8"  # of variants


def looks(names) -> dict[str, dict]:
    """Each name's `color` and `marker`, as matplotlib calls them.

    A name that starts with no known family takes one of the colours that the others leave. A variant (`nf4-dq, merged`) takes
    another marker beside what it is a variant of.
    """
    families = {
        name: next((n for n, starts in enumerate(_FAMILIES) if name.lower().startswith(starts)), None) for name in names
    }
    spare = itertools.cycle([n for n in range(len(COLOURS)) if n not in families.values()] or range(len(COLOURS)))
    found, taken = {}, set()
    for name, number in families.items():
        colour = COLOURS[next(spare) if number is None else number]
        known, variant, _ = name.lower().partition(",")
        markers = [_MARKERS.get(known, "o"), *(_OTHERS if variant else "")]
        marker = next((marker for marker in markers if (colour, marker) not in taken), markers[0])
        taken.add((colour, marker))
        found[name] = {"color": colour, "marker": marker}
    return found


def axes(width: float = 7.0, height: float = 3.2, columns: int = 1):
    """(figure, its axes in a row), with the look that all figures here share; sizes in inches."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure that a notebook shows although pyplot never heard of it, so that it is shown once."""

        def _repr_png_(self):
            png = io.BytesIO()
            self.savefig(png, format="png")
            return png.getvalue()

    figure = Shown(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes
