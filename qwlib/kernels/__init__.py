"""CUDA kernels of our own, for bitsandbytes' 4-bit layers on a GPU. They are compiled when they are first used.

compiling   CUDA source to a loaded kernel: NVRTC through torch, and binaries on disk
linear4bit  products of few rows and 4-bit weights, and 4-bit weights in 16 bits
layers      bitsandbytes' layers with these products, and some of them in one launch
profiles    times on an H100 that notebook 07 shows; a GPU's kernels sorted into kinds of work
"""
