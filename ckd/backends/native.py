"""`ckd._C`, the compiled kernels, or the reason why it is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

missing: str | None = None
if TYPE_CHECKING:
    from ckd import _C
else:
    try:
        from ckd import _C
    except ImportError as error:
        _C = None
        missing = f"ckd._C is not installed ({error}); python -m ckd.info says why"

__all__ = ["_C", "missing"]
