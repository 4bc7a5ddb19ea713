"""Peak memory of MREM-S with some stages, or of QAT of the whole model (0 stages), in a process of its own; prints JSON.

    python examples/study/mrem_memory.py 3

A random BERT of 12 blocks, whose table is small, so that what is measured is the blocks' weights, gradients and moments.
"""

import json
import resource
import sys
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from optimum_zsaq import MREMConfig, prepare
from optimum_zsaq.algorithms.reconstruction import ReconstructionSettings, make_optimizer
from optimum_zsaq.integrations.reconstruct import start_reconstruction


_SIZES = {"vocab_size": 1000, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_SIZES |= {"intermediate_size": 1536, "max_position_embeddings": 64}


def peak() -> int:
    """Bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(stages: int) -> dict[str, Any]:
    """What training two steps takes, above what the process took before there was a model."""
    torch.manual_seed(0)
    ids = torch.randint(1000, (8, 4, 16))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]
    options = {"weight_bits": 2, "embedding_bits": 4, "ranges": "minmax", "autocast": "float32", "steps": 2}
    options |= {"start": "rounding"}  # compensation is most of the time, and is left out
    config, before = MREMConfig(**options, stages=stages or None), peak()
    model = BertForSequenceClassification(BertConfig(**_SIZES)).eval()
    parameters = sum(p.numel() for p in model.parameters())
    if stages:
        for _ in start_reconstruction(model, config, batches).steps():
            pass
    else:
        prepare(model, config.scheme(), config.ranges)
        weights = [p for name, p in model.named_parameters() if p.is_floating_point() and not name.endswith("_scale")]
        optimizer, _ = make_optimizer(weights, [], ReconstructionSettings())
        for batch in batches[:2]:
            model(**batch, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"peak_bytes": peak() - before, "parameters": parameters}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
