"""qwlib: load a language model under a 4-bit scheme, measure it honestly, write down what was found."""

from . import catalog, schemes
from .errors import QwlibError
from .estimates import estimate
from .lm import Lm
from .loading import banner, load

__all__ = ["Lm", "QwlibError", "banner", "catalog", "estimate", "load", "schemes"]
__version__ = "0.1.0"
