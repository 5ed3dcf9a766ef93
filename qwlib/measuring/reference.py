"""The scores of a 16-bit reference, kept on disk so that a quantized model can be compared without both in memory.

A reference is a folder with `scores.bin` (positions × vocabulary in the model's own type, so nothing is lost) and
`facts.json`, which is written last: a folder without it is unfinished. One position of a 49,152-word vocabulary takes
98 kB, so the file is bounded: what lies beyond the limit is scored but not compared.

What it leaves out: compression. llama.cpp keeps 16-bit log-probabilities in half the space of float32; a 16-bit model's
own scores take the same 16 bits and lose nothing.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import files
from ..errors import QwlibError

LIMIT = 4_000_000_000  # bytes


class Reference:
    """Kept scores: `start`, `add` and `finish` write them; `check`, `rewind` and `take` read them."""

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.folder, self.limit, self.facts, self._at, self._room = Path(folder), limit, {}, 0, 0

    @classmethod
    @contextlib.contextmanager
    def temporary(cls, limit: int = LIMIT) -> Iterator["Reference"]:
        """A new one in the cache folder, removed at the end; what killed processes left there is removed first."""
        import psutil

        home = files.cache_dir() / "references"
        home.mkdir(parents=True, exist_ok=True)
        for left in home.iterdir():
            pid = left.name.partition("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
        folder = tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=home)
        try:
            yield cls(Path(folder), limit)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def read(cls, folder: Path) -> "Reference":
        """A finished one.

        Raises QwlibError where it is missing or unfinished.
        """
        out = cls(folder)
        try:
            out.facts = json.loads((out.folder / "facts.json").read_text())
        except (OSError, ValueError):
            raise QwlibError(f"there is no finished reference in {folder}: measure the 16-bit model first") from None
        return out

    @property
    def name(self) -> str:
        """Model and scheme whose scores these are."""
        return self.facts["name"]

    @property
    def tokens(self) -> int:
        """Positions that were kept."""
        return self.facts["tokens"]

    @property
    def noise_floor(self) -> float:
        """Mean divergence of the reference from itself along another path, in nats a token."""
        return self.facts["noise_floor"]

    def start(self, lm, **facts) -> None:
        """Begin an empty one for `lm`, as long as the limit and half of the disk's free space allow.

        `facts` must be the same for whoever is compared.
        """
        self.facts = facts | {
            "name": f"{lm.row.name} {lm.scheme.name}",
            "vocabulary": lm.vocabulary,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "tokens": 0,
        }
        room = min(self.limit, shutil.disk_usage(self.folder).free // 2)
        self._room = room // (lm.vocabulary * lm.dtype.itemsize)
        (self.folder / "scores.bin").write_bytes(b"")

    def add(self, scores) -> None:
        """Keep a slice (positions × vocabulary, float32, made from the model's own type) if it and all before it fit."""
        import torch

        if self.tokens + len(scores) > self._room:
            self._room = 0
            return
        own = scores.to(getattr(torch, self.facts["dtype"])).cpu().contiguous()
        with open(self.folder / "scores.bin", "ab") as file:
            file.write(memoryview(own.view(torch.uint8).numpy()))
        self.facts["tokens"] += len(scores)

    def finish(self, noise_floor: float) -> None:
        """Write the facts, which makes it a reference that can be read."""
        self.facts["noise_floor"] = noise_floor
        files.write_text(self.folder / "facts.json", json.dumps(self.facts))

    def rewind(self) -> None:
        """`take` starts at the first position again."""
        self._at = 0

    def check(self, lm, **facts) -> None:
        """Raises QwlibError where `lm` has another vocabulary, or `facts` differ."""
        for key, value in {"vocabulary": lm.vocabulary, **facts}.items():
            if self.facts.get(key) != value:
                raise QwlibError(f"{self.name} can't be the reference: its {key} is {self.facts.get(key)}, not {value}")

    def take(self, count: int, device):
        """The next `count` positions (count × vocabulary, float32, on `device`), or None when no more were kept."""
        import torch

        dtype, width = getattr(torch, self.facts["dtype"]), self.facts["vocabulary"]
        if self._at + count > self.tokens:
            return None
        with open(self.folder / "scores.bin", "rb") as file:
            file.seek(self._at * width * dtype.itemsize)
            raw = bytearray(file.read(count * width * dtype.itemsize))
        self._at += count
        return torch.frombuffer(raw, dtype=dtype).view(count, width).to(device, torch.float32)
