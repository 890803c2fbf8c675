"""Bit widths as an integer program: what can be chosen, what it costs and loses, and the exact solution."""
