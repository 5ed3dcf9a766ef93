"""torchao: PyTorch's own quantized tensors, laid over the linear layers while transformers loads them."""

from . import hf


def fill(lm, source: str) -> None:
    """Load and quantize; the head stays as it is."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kind = Int8WeightOnlyConfig() if lm.scheme.linear == "int8" else Int4WeightOnlyConfig(group_size=lm.scheme.group)
    hf.read(lm, source, TorchAoConfig(kind))
    hf.finish(lm)
