"""D2O: dynamic discriminative operations on KV caches (arXiv 2406.13035). Tensors in, tensors out."""
