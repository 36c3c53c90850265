"""fastnets: convolution, recurrent and attention layers for PyTorch on kernels of their own."""

from importlib.metadata import PackageNotFoundError, version

from . import functional, nn
from .convert import convert, revert
from .dispatch import backend
from .explain import explain

try:
    __version__ = version("fastnets")
except PackageNotFoundError:  # used from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "backend", "convert", "explain", "functional", "nn", "revert"]
