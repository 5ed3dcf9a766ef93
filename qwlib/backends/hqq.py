"""HQQ: scales and zero points fitted to the weights alone, by half-quadratic splitting; no text is read.

Its own files are pickles, so it is quantized while it is loaded. transformers' way to it (`HqqConfig`) raises
NotImplementedError since version 5, hence HQQ's own calls.
"""

from . import hf


def fill(lm, source: str) -> None:
    """Load the 16-bit model, then replace its linear layers, the head left out."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    hf.read(lm, source)
    wanted = BaseQuantizeConfig(nbits=4, group_size=lm.scheme.group)
    AutoHQQHFModel.quantize_model(lm.model, quant_config=wanted, compute_dtype=lm.dtype, device=str(lm.device))
    hf.finish(lm)
    layers = [module for module in lm.model.modules() if isinstance(module, HQQLinear)]
    lm.engine.beside = [part for layer in layers for part in (layer.meta["scale"], layer.meta["zero"])]
