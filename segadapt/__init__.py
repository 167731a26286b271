"""segadapt: semantic segmentation that stays right when the world changes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segadapt.api import Adapter, load

__version__ = "0.1.0"
__all__ = ["Adapter", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """From Python, see docs/api.md; imported at first use, as it imports torch."""
    if name in ("Adapter", "load"):
        from segadapt import api

        return getattr(api, name)
    raise AttributeError(f"module 'segadapt' has no attribute {name!r}")
