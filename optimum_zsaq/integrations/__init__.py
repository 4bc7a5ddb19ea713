"""What knows transformers, optimum, datasets and the Hub. The modules are imported by name; none is imported here."""

import transformers.modeling_utils  # noqa: F401 -- autoload registers us right after it: not while we need it ourselves
