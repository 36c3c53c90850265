"""Drop-in modules: subclasses of torch.nn's that override the forward path and nothing else."""

from .softmax import Softmax

__all__ = ["Softmax"]
