"""``python -m aam_kernels.verify [--quick] [--device D] [--operation O] [--impl I] [--json FILE]``.

Prints a table of every operation, implementation and dtype: errors against float64 on this machine,
times, what failed; then torch's own attention backends with padding masks. Exits with 1 when one of
our implementations failed, with 2 when asked for what does not exist. From Python:
``aam_kernels.verify(...)``.
"""

import sys
from types import ModuleType

from aam_kernels._verification import VerificationReport, main, verify

__all__ = ["VerificationReport", "main", "verify"]


class _CallableModule(ModuleType):
    """Importing this module hides the function of its name in the package; calling still works."""

    __call__ = staticmethod(verify)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
