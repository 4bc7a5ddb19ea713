"""What a Trainer of fake-quantized models writes: checkpoints to go on from, and packed models for everybody else."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from ..algorithms.step_sizes import has_adapter
from ..integrations.quantizer import attach_quantizer
from ..kinds import kind_of
from ..surgery import low_bit_layers, pack, skeleton


class PackedSaving:
    """For a subclass of `Trainer`: it trains float weights, and what a user saves or pushes is packed.

    A `checkpoint-*` holds the float weights, to go on from, and says `packed: false`. `save_model` and `push_to_hub` write
    a packed copy with its own model card, whose recipe names the trainer; the model itself stays as it is. Of a model with
    an adapter of PEFT both write the adapter.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the packed model; only the main process does.

        Args:
            output_dir (`str`, *optional*): by default `args.output_dir`.

        Source: transformers' Trainer, which says `_internal_call` where it writes a checkpoint (with a folder) and before
        it pushes (without one).
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        checkpoint = _internal_call and output_dir is not None
        trained = any(type(layer) is kind_of(layer).fake for _, layer in low_bit_layers(model)) and not has_adapter(model)
        sharded = getattr(model, "is_distributed_loading_by_transformers", False)
        if not trained or (not sharded and (checkpoint or not self.args.should_save)):
            super().save_model(output_dir, _internal_call)
            return
        copied = _gathered(model) if sharded else copy.deepcopy(model)
        if not self.args.should_save:
            return
        trained_model, self.model = self.model, copied if checkpoint else self._packed(copied)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = trained_model

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Nothing where `save_model` has written one: the Trainer's knows nothing of low bits."""
        if not (Path(self.args.output_dir) / "README.md").exists():
            super().create_model_card(*args, **options)

    def _packed(self, model: PreTrainedModel) -> PreTrainedModel:
        packed = pack(model)
        config = packed.config.quantization_config
        made = {"trainer": type(self).__name__, "steps": self.state.global_step, "seed": self.args.seed}
        config.recipe = {**(config.recipe or {}), "training": made}
        return packed

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        """As the Trainer's; it would start at step 0 from the weights of a checkpoint that was interrupted.

        Raises:
            ValueError: the checkpoint's last file is missing.
        """
        if not (Path(resume_from_checkpoint) / TRAINER_STATE_NAME).is_file():
            raise ValueError(
                f"{resume_from_checkpoint} has no {TRAINER_STATE_NAME}: it was interrupted while it was written, or is no "
                "checkpoint of a Trainer; delete it and resume from the one before"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _gathered(model: PreTrainedModel) -> PreTrainedModel:
    """A copy, not sharded, of a fake-quantized model that is sharded over processes; each of them has to make it."""
    config = copy.deepcopy(model.config)
    quantization = config.quantization_config
    del config.quantization_config
    config.distributed_config = None  # else saving would wait for the other processes
    with torch.random.fork_rng():
        copied = type(model)(config)
    copied = copied.to(torch.float32).eval()
    skeleton(copied, quantization.table(copied), packed=False)
    state = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in model.state_dict().items()}
    copied.load_state_dict({name: value.to("cpu") for name, value in state.items()})
    copied.config.quantization_config = quantization
    attach_quantizer(copied)
    return copied
