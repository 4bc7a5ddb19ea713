"""What knows transformers, optimum, datasets and the Hub. The modules are imported by name; none is imported here."""

# Autoload registers us as soon as these two are imported, in this order: not later, while our own modules need them.
import torch  # noqa: F401, I001
import transformers.modeling_utils  # noqa: F401
