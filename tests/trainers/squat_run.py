"""A training of a tiny model on a task, for tests and as a script: squat_run.py FOLDER OUT OPTIONS, the options as JSON."""

import json
import sys

import torch
from tiny_models import LABELS, make, token_ids
from trainers.processes import Slow

from optimum_zsaq import QuantScheme, QuantSpec, SQuATArguments, SQuATTrainer, calibrate, prepare


PLAIN = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
BY_HAND = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
RATES = {"learning_rate": 0.5, "scale_learning_rate": 0.5}


def model(name: str = "bert-cls", bits: int = 2, granularity: str = "row", static: bool = False, dropout: float = 0.0):
    """Fake-quantized, of weights large enough for their gradients to be no noise.

    Inputs are float by default: a last bit flips codes of inputs here and there, and no two orders of sums would agree.
    """
    off = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout} if name.startswith("bert") else {}
    found = make(name, **off)
    for p in found.parameters():
        if p.dim() > 1:
            p.data *= 6
    inputs = QuantSpec(8, "tensor", symmetric=False) if static else None
    prepare(found, QuantScheme(QuantSpec(bits, granularity), QuantSpec(4), inputs))
    return calibrate(found, [{"input_ids": token_ids(8, 7)}]) if static else found


def samples(count: int = 48, length: int = 7) -> list[dict]:
    ids = token_ids(count, length, seed=3)
    return [{"input_ids": row, "labels": row[0] % LABELS} for row in ids]


def trainer(folder, start=None, callbacks=None, data=None, teacher=None, **options) -> SQuATTrainer:
    defaults = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "scale_learning_rate": 3e-4}
    args = SQuATArguments(str(folder), **{**PLAIN, **defaults, **options})
    start = model() if start is None else start
    return SQuATTrainer(start, args, train_dataset=data or samples(), callbacks=callbacks, teacher=teacher)


def main() -> None:
    folder, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    resume, slow = options.pop("resume", None), options.pop("slow", False)
    start = model(dropout=options.pop("dropout", 0.0), static=options.pop("static", False))
    run = trainer(folder, start, [Slow()] if slow else None, **options)
    run.train(resume_from_checkpoint=resume)
    for name, p in run.model.named_parameters():
        if run.args.world_size > 1:
            same = p.detach().clone()
            torch.distributed.broadcast(same, 0)
            if not torch.equal(same, p):
                raise SystemExit(f"{name} differs between the processes")
    if run.args.process_index == 0:
        figures = [entry for entry in run.state.log_history if "loss" in entry]
        torch.save({"world": run.args.world_size, "model": run.model.state_dict(), "figures": figures}, out)
    run.save_model(f"{folder}/packed")


if __name__ == "__main__":
    main()
