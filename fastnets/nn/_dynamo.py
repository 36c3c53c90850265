"""Lets torch.compile trace our recurrent modules.

Dynamo refuses every instance of torch.nn.LSTM, GRU and RNN, subclasses included, unless its configuration allows
them. Importing dynamo takes longer than everything else here, so the switch is set when somebody else imports it.
"""

import importlib.abc
import importlib.util
import sys

_CONFIG = "torch._dynamo.config"


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds dynamo's configuration as usual, and allows recurrent modules in it once it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != _CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _allow(module)

        spec.loader.exec_module = exec_module
        return spec


def _allow(config) -> None:
    config.allow_rnn = True
    entry = getattr(config, "_config", {}).get("allow_rnn")
    if entry is not None:  # what is assigned counts in the assigning thread only, the default in every one
        entry.default = True


def allow_recurrent_modules() -> None:
    """Sets torch._dynamo.config.allow_rnn, now or as soon as torch._dynamo is imported."""
    if _CONFIG in sys.modules:
        _allow(sys.modules[_CONFIG])
    else:
        sys.meta_path.insert(0, _OnImport())
