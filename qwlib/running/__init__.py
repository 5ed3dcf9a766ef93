"""A loaded model, and what decodes it.

lm         `Lm`: `stream`, `logits`, `prefix`, `use`, `save`
engines    what reads token ids and gives scores: transformers' models
causal     whether a model is a causal decoder, and how it takes padding
padding    batches of rows of different lengths
stepwise   the same for libraries with a model of their own
decoding   a step as one CUDA graph
sampling   the next token from scores
streaming  when each token came
"""
