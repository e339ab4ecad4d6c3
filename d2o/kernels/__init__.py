"""Triton kernels; each op has its torch twin in :mod:`d2o.kernels.reference`."""
