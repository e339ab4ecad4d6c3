"""Steps on a GPU: Triton kernels over pages, a compiled model, decode steps as CUDA graphs."""
