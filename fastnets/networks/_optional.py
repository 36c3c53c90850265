"""Packages that only the networks need; they come with `pip install 'fastnets[networks]'`."""

import importlib
from types import ModuleType


class MissingPackageError(ImportError):
    """A package of the extra `networks` is not installed; the message says which and how to get it."""


def require(module: str, package: str | None = None) -> ModuleType:
    """Imports `module` of PyPI's `package` (default: the module's first name)."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.split(".")[0]
        raise MissingPackageError(
            f"this network needs the package {package} ({error}): pip install 'fastnets[networks]'"
        ) from error
