"""Kernels shared by every backend, chosen by what an op says. Nothing else imports numba."""
