"""Triton kernels; registered for CUDA devices in place of the plain-torch operators."""
