"""A training of a tiny student, for tests and as a script: zsaq_run.py FOLDER OUT OPTIONS, the options as JSON."""

import copy
import json
import sys

import torch
from tiny_models import make
from trainers.processes import Slow

from optimum_zsaq import PreQuantConfig, ZSAQArguments, ZSAQTrainer, prepare
from optimum_zsaq.algorithms.forms import SequenceForm
from optimum_zsaq.algorithms.generators import Generator, PriorSource, token_prior


GAIN = {"llama-tied": 3, "t5-tied": 1, "bart-tied": 15}  # new weights are so small that layers hardly change what passes
PLAIN = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
SHARP = {"rho": 0.05, "generator_every": 2, "generator_learning_rate": 0.02}


def models(name: str = "bert-cls", bits: int = 2, **settings):
    """A teacher and its rounded student."""
    teacher = make(name)
    for p in teacher.parameters():
        if p.dim() > 1:
            p.data *= GAIN.get(name, 6)
    scheme = PreQuantConfig(weight_bits=bits, embedding_bits=4, **settings).scheme()
    return teacher, prepare(copy.deepcopy(teacher), scheme)


def tiny_generator(teacher, seed: int = 0) -> Generator:
    table = teacher.get_input_embeddings().weight
    prior = token_prior(table, [0, 1, 2], 0.0)
    form = SequenceForm(first=(1,), last=(2,), shortest=5, longest=12)
    return Generator(PriorSource(prior), table, prior, form, candidates=64, width=8, seed=seed)


def trainer(folder, name: str = "bert-cls", student=None, teacher=None, callbacks=None, **options) -> ZSAQTrainer:
    if teacher is None:
        teacher, made = models(name)
        student = made if student is None else student
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "scale_learning_rate": 3e-4}
    args = ZSAQArguments(str(folder), **{**PLAIN, **defaults, **options})
    return ZSAQTrainer(student, args, teacher=teacher, generator=tiny_generator(teacher), callbacks=callbacks)


def main() -> None:
    folder, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    resume, slow = options.pop("resume", None), options.pop("slow", False)
    run = trainer(folder, callbacks=[Slow()] if slow else None, **options)
    run.train(resume_from_checkpoint=resume)
    for name, p in run.model.named_parameters():
        if run.args.world_size > 1:
            same = p.detach().clone()
            torch.distributed.broadcast(same, 0)
            if not torch.equal(same, p):
                raise SystemExit(f"{name} differs between the processes")
    if run.args.process_index == 0:
        figures = [entry for entry in run.state.log_history if "loss" in entry]
        stored = {"world": run.args.world_size, "student": run.model.state_dict(), "figures": figures}
        torch.save({**stored, "generator": run.minimax.generator.state_dict()}, out)
    run.save_model(f"{folder}/packed")


if __name__ == "__main__":
    main()
