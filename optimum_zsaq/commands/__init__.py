"""`optimum-cli zsaq ...`: one file a sub-command. Imported at every call of optimum's CLI, so imports are light."""

from .zsaq import ZSAQCommand


__all__ = ["ZSAQCommand"]
