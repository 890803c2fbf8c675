"""The independent checker of certificates: what is stated of an op's operands must imply what is stated of the op.

It shares no code with the prover: it reads ops by mnemonic and attribute, and does its own arithmetic, on Python ints
and on int64 where magnitudes show that every sum fits. It takes for granted what makes a graph legal apart from its
facts: names, shapes, types and attributes, invariants 1 to 6 of `qir.verifier`.

`claims` reads certificates, `check` walks over a graph, `rules` has a rule for each op, with `sums` and `arithmetic`;
`correlated` and `functionals` are the rule `affine`.
"""

from qir.checker.check import check_certificate

__all__ = ["check_certificate"]
