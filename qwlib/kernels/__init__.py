"""Kernels of our own, on request. They are compiled when they are first used.

compiling   CUDA source to a loaded kernel: NVRTC through torch, and binaries on disk
linear4bit  a 4-bit linear layer for few rows
"""
