"""A loaded model, and what decodes it.

lm         `Lm`: `stream`, `logits`, `prefix`, `use`, `save`
engines    what reads token ids and gives scores: transformers' models, and everybody else's
decoding   a step as one CUDA graph
sampling   the next token from scores
streaming  when each token came
"""
