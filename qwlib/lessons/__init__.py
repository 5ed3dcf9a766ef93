"""Ideas built from nothing, as the notebooks teach them; each equals what the library or bitsandbytes does, and tests say so.

integers     evenly spaced levels: scale, zero point, packing
fourbit      NF4 and FP4: code books, blocks, double quantization
pictures     figures that explain them
lowrank      a LoRA layer, forward and backward
exercises    whether an answer is right
predictions  whether a prediction held, in one line
"""
