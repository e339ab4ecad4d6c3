"""What compression costs in quality, measured through the product's own runner, caches and kernels."""
