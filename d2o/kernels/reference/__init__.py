"""The kernels' torch twins: slow, plain, and what the parity tests hold the kernels to."""
