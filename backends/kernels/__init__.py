"""Numba kernels shared by every backend, chosen by what an op says: attributes, types and proved ranges."""
