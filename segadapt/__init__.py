"""segadapt: semantic segmentation that stays right when the world changes."""

__version__ = "0.1.0"
