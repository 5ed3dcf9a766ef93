"""From a row to a model that is loaded, or quantized and saved.

load         `load(model, scheme)`, an `Lm` for a `with` block
quantizing   `quantize(model, scheme)`, a folder that says what it is
calibration  the text that is read while weights are quantized
merging      `merge(model)`, an adapter made part of its model's weights
fresh        `logits(folder, …)`, what a saved model says in another process
"""
