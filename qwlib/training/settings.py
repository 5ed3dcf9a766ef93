"""How a model is trained: the settings, and which values they may have."""

import math
from dataclasses import asdict, dataclass

from ..errors import QwlibError, unknown, whole_number

METHODS = ("lora", "rslora", "dora", "full")
# transformers' names
OPTIMIZERS = {"adamw": "adamw_torch", "adamw-8bit": "adamw_bnb_8bit", "paged": "paged_adamw_32bit"}


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    `method`: `lora`, `rslora` (scaled by 1/√rank, arXiv 2312.03732), `dora` (with learnt magnitudes, arXiv 2402.09353), or
    `full`, which trains all weights in float32. `rank`, `alpha`, `dropout`: of an adapter, whose output is multiplied by alpha ÷
    rank. `targets`: names of linear layers such as `q_proj`; without any, all of them but the output head, as in the QLoRA paper
    (arXiv 2305.14314).

    `steps` comes before `epochs`. A step is `accumulate` batches of `batch` examples. The learning rate rises for the share
    `warmup` of the steps and then falls along a cosine to 0. `longest`: tokens that an example may have. `optimizer`: `adamw`,
    `adamw-8bit`, or `paged`, which moves to the host what does not fit into a GPU. `recompute`: activations are computed again
    in the backward pass and not kept (gradient checkpointing). `shard`: on several GPUs the weights are split over
    them (`sharded`), which takes less memory a GPU and is slower. On one GPU it changes nothing.

    `emphasis`: how many times a token counts that an example emphasises (`examples.read`). A guard's answer has some twenty
    tokens, and one of them is the verdict.

    `validation`: the share of the examples that is held back; the weights with the lowest loss on it are kept. `every`: steps
    between two validations, and between two checkpoints; a tenth of the run if it is not given. `patience`: validations without
    a lower loss after which training stops.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    epochs: float = 1
    steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    longest: int = 512
    emphasis: float = 1
    validation: float = 0.1
    patience: int | None = None
    every: int | None = None
    optimizer: str = "adamw"
    recompute: bool = False
    shard: bool = False
    seed: int = 0

    @classmethod
    def of(cls, **settings) -> "Settings":
        """The settings of these names.

        Raises QwlibError for a name that is none of them, and for a value that is not allowed.
        """
        try:
            return cls(**settings)
        except TypeError as error:
            known = ", ".join(cls.__dataclass_fields__)
            raise QwlibError(f"{str(error).partition('() ')[2] or error}: settings are {known}") from None

    def __post_init__(self):
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("rank", "batch", "accumulate", "longest", "steps", "every", "patience"):
            if getattr(self, name) is not None:
                whole_number(getattr(self, name), name)
        whole_number(self.seed, "seed", 0)
        for name in ("epochs", "learning_rate", "alpha", "emphasis", "dropout", "warmup", "validation"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise QwlibError(f"{name} is a number, not {getattr(self, name)!r}")
        if not isinstance(self.targets, tuple | list) or not all(isinstance(name, str) for name in self.targets):
            raise QwlibError(f"targets are names of layers in a tuple, not {self.targets!r}")
        for name in ("epochs", "learning_rate", "alpha", "emphasis"):
            if not 0 < getattr(self, name) < math.inf:
                raise QwlibError(f"{name} must be more than 0, not {getattr(self, name)}")
        for name in ("dropout", "warmup", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise QwlibError(f"{name} is a share from 0 to less than 1, not {getattr(self, name)}")
        if self.patience and not self.validation:
            raise QwlibError("patience needs validation: a share of the examples to hold back")

    def steps_over(self, count: int) -> int:
        """The steps of a run over so many examples: the last batch of a pass may be smaller, and so may its last step."""
        batches = math.ceil(count / self.batch)
        return self.steps or math.ceil(self.epochs * math.ceil(batches / self.accumulate))

    def told(self) -> dict:
        """The settings that are set, as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}
