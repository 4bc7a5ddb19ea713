"""A training of a model that is sharded over two processes (FSDP2): squat_fsdp_run.py CHECKPOINT FOLDER OUT OPTIONS."""

import json
import sys

import torch
from torch.distributed.tensor import DTensor
from trainers.squat_run import samples, trainer
from transformers import BertForSequenceClassification
from transformers.distributed import DistributedConfig


def main() -> None:
    checkpoint, folder, out, options = *sys.argv[1:4], json.loads(sys.argv[4])
    start = BertForSequenceClassification.from_pretrained(checkpoint, distributed_config=DistributedConfig(fsdp_size=2))
    run = trainer(folder, start, data=samples(), **options)
    run.train()
    sharded = sorted(name for name, p in start.named_parameters() if isinstance(p, DTensor))
    state = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in start.state_dict().items()}
    figures = [entry for entry in run.state.log_history if "loss" in entry]
    run.save_model(f"{folder}/packed")
    if run.args.process_index == 0:
        torch.save({"world": run.args.world_size, "sharded": sharded, "model": state, "figures": figures}, out)


if __name__ == "__main__":
    main()
