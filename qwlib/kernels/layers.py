"""bitsandbytes' 4-bit layers with the products of `linear4bit`, and some of them in one launch.

Query, key and value read the same input, and so do gate and up. Each has too few rows to keep every multiprocessor busy until its
end, and together they leave fewer idle. Modules, names and weights stay what they are: the first layer that is called multiplies
by all of them and keeps the other results, and a layer that is called with the very same tensor takes its own. Whatever is not
that case (another input, one that was written to meanwhile, a layer with hooks, one that an adapter has replaced) is multiplied
on its own.
"""

from collections import Counter

import bitsandbytes as bnb
import torch
from torch import nn

from . import linear4bit

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names in transformers' models


def take(model, layers, dtype) -> dict[str, int]:
    """Make those `layers` of `model` that can be multiplied here `OwnLinear4bit`: how many can't, by their reason.

    `dtype`: the type that they compute in.
    """
    reasons = Counter()
    for layer in layers:
        why = "something has replaced its forward" if "forward" in vars(layer) else None
        if why := why or linear4bit.obstacle(layer.weight, dtype):
            reasons[why] += 1
        else:
            layer.__class__ = OwnLinear4bit
            layer.gain = linear4bit.gain_of(layer.weight, dtype)
    for parent in model.modules():
        for names in JOINED:
            join(parent, names)
    return dict(reasons)


class OwnLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer on a GPU: `linear4bit` for up to 64 rows, else dequantized first; with gradients as bitsandbytes.

    `joined`: layers that read the same input, and the place of this one among them.
    """

    gain, joined = None, None

    def forward(self, x):
        inputs, bias = x.to(self.compute_dtype), None if self.bias is None else self.bias.to(self.compute_dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            out = bnb.matmul_4bit(inputs, self.weight, bias=bias, quant_state=self.weight.quant_state)
        elif inputs.numel() > linear4bit.MOST * self.in_features:
            out = nn.functional.linear(inputs, linear4bit.dequantize(self.weight, inputs.dtype), bias)
        else:
            out = self.joined[0].product(self.joined[1], x) if self.joined and inputs is x else None
            if out is None:
                (out,) = linear4bit.multiply(inputs, [self.weight], self.gain, [] if bias is None else [bias])
        return out.to(x.dtype)


def join(parent, names) -> None:
    """Let the layers `names` of `parent` be multiplied in one launch, if they are there and alike."""
    layers = [parent._modules.get(name) for name in names]
    if not all(isinstance(layer, OwnLinear4bit) for layer in layers):
        return

    def kind(layer):
        state = layer.weight.quant_state
        stored = state.quant_type, state.nested, state.blocksize, layer.weight.device, layer.in_features
        return *stored, layer.gain, layer.compute_dtype, layer.bias is None

    states = [layer.weight.quant_state for layer in layers]
    codes = [state.state2.code for state in states if state.nested]
    if len(set(map(kind, layers))) == 1 and all(torch.equal(code, codes[0]) for code in codes):
        together = Joined(parent, names, layers)
        for place, layer in enumerate(layers):
            layer.joined = together, place


class Joined:
    """Layers `names` of `parent` that are multiplied in one launch."""

    def __init__(self, parent, names, layers):
        self.parent, self.names, self.layers = parent, names, layers
        self.held = None  # (the input, its version, results that nobody has taken yet)

    def product(self, place: int, x):
        """The result of layer `place` for x, None where that layer is to be multiplied on its own."""
        version, held = _version(x), self.held
        if held is None or held[0] is not x or held[1] != version:
            if not self.whole():
                return None
            self.held = held = x, version, dict(enumerate(self.multiply(x)))
        result = held[2].pop(place, None)
        if not held[2]:
            self.held = None
        return result

    def whole(self) -> bool:
        """Whether all layers are still where they were, and nothing looks at them or changes what they read or give."""
        return all(
            self.parent._modules.get(name) is layer and not layer._forward_hooks and not layer._forward_pre_hooks
            for name, layer in zip(self.names, self.layers, strict=True)
        )

    def multiply(self, x) -> list:
        """The results of all layers, in order."""
        biases = [layer.bias.to(x.dtype) for layer in self.layers if layer.bias is not None]
        return linear4bit.multiply(x, [layer.weight for layer in self.layers], self.layers[0].gain, biases)


def _version(x) -> int:
    """A number that changes when a tensor is written to. It is 0 where nobody counts: in inference mode."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
