"""What a backend must pass: `check_backend` makes vectors from its contract and holds its kernels to them.

    from qir.testing import check_backend
    print(check_backend("my-chip"))  # or a Backend, or the path of a .toml file

Not loaded by `import qir`.
"""

from __future__ import annotations

from qir.testing.conformance import CheckResult, Report, check_backend
from qir.testing.goldens import golden_texts, replay

__all__ = ["CheckResult", "Report", "check_backend", "golden_texts", "replay"]
