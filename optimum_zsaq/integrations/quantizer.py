"""transformers' loading and saving of low-bit models: the hooks that `from_pretrained` calls (quantizers/base.py)."""

import copy
import logging
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers.base import HfQuantizer

from ..algorithms.offload import OffloadedBlocks
from ..kinds import kind_of
from ..layers import FakeQuantTransposedLinear, LowBitLayer, PackedEmbedding, PackedLinear, PackedTransposedLinear
from ..layers.common import INTEGERS, SCALES, STEP_SIZES
from ..surgery import (
    blocks,
    low_bit_layers,
    quantize_weight,
    select,
    set_runtime,
    skeleton,
    swap,
    unpack,
)
from .checkpoint import CheckpointError, header, is_read, verify_files
from .configs import LowBitConfig, body_name
from .recipe import calibrate_on_load, write_recipe
from .reconstruct import reconstruct_on_load
from .rounding import round_on_load
from .saving import attach_saving, detach_saving
from .zero_shot import train_on_load


logger = logging.getLogger(__name__)

_TRAINING = {"zsaq": train_on_load, "mrem": reconstruct_on_load, "prequant": round_on_load}
_MARKER_DTYPE = torch.float8_e4m3fn  # the marker's zeros take one byte a row on disk


class QuantizeOnLoad(ConversionOps):
    """Turns one float weight into codes and scales as soon as it is read."""

    def __init__(self, quantizer: "LowBitQuantizer"):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, **_: Any) -> dict[str, Tensor]:
        """{source: weight} -> {full name: tensor} of the packed layer, or of the layer it is tied to."""
        ((_, weight),) = input_dict.items()
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(name)
        if layer.owner is not layer:
            layer = layer.owner
            name = next(n for n, module in model.named_modules() if module is layer)
        config = self.quantizer.quantization_config
        try:
            self._check(name, layer, weight)
            tensors = quantize_weight(layer, weight, config.ranges_for(model), config.packed)
            self._check_tie(name, layer, tensors)
        except ValueError as error:  # transformers would bury it in a table; it is raised when all weights are read
            self.quantizer.failures.append(str(error) if name in str(error) else f"{name}: {error}")
            tensors = {key: torch.zeros_like(p, device=weight.device) for key, p in layer.named_parameters(recurse=False)}
            tensors.pop("bias", None)
        self.quantizer.found.add(name)
        if config.packed:
            tensors["weight"] = weight.new_zeros(layer.weight.shape)  # in the dtype that transformers keeps it in
        tensors |= layer.uncalibrated_input_tensors(weight.device)
        trainable = {"weight"} if not config.packed else set()
        return {f"{name}.{key}": nn.Parameter(value, requires_grad=key in trainable) for key, value in tensors.items()}

    def _check(self, name: str, layer: LowBitLayer, weight: Tensor) -> None:
        transposed = isinstance(layer, PackedTransposedLinear | FakeQuantTransposedLinear)
        expected = layer.shape[::-1] if transposed else layer.shape
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"the checkpoint's {name}.weight has shape {tuple(weight.shape)} instead of {expected}; a model that is "
                "sharded while it loads is quantized in one process first, saved, and loaded sharded then"
            )

    def _check_tie(self, name: str, layer: LowBitLayer, tensors: dict[str, Tensor]) -> None:
        if name in self.quantizer.found and not all(torch.equal(getattr(layer, key), t) for key, t in tensors.items()):
            raise ValueError(
                f"the checkpoint has another weight for a layer that is tied to {name} by its config; "
                "load it with tie_word_embeddings=False"
            )


class OffloadOnLoad(ConversionOps):
    """Writes a float weight of a block to a file as soon as it is read."""

    def __init__(self, quantizer: "LowBitQuantizer"):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, **_: Any) -> dict[str, Tensor]:
        """{source: weight} -> {full name: an empty Parameter on the device "meta"}."""
        ((_, weight),) = input_dict.items()
        weight = weight[0] if isinstance(weight, list) else weight
        failures, expected = self.quantizer.failures, model.get_parameter(full_layer_name).shape
        if weight.shape != expected:
            failures.append(
                f"the checkpoint's {full_layer_name} has shape {tuple(weight.shape)} instead of {tuple(expected)}"
            )
        try:
            if not failures:  # transformers would bury an error in a table; it is raised when all weights are read
                self.quantizer.offloaded.put(full_layer_name, weight)
        except OSError as error:
            failures.append(
                f"offload=True could not write {full_layer_name} into a temporary folder: {error}; free as much space as "
                "the float model takes, or set the environment variable TMPDIR to a folder that has it"
            )
        return {full_layer_name: nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)}


class LowBitQuantizer(HfQuantizer):
    """Loads and saves low-bit models for transformers; one class for every algorithm.

    `found` names the layers whose weights were quantized as they were read; the others are new, and become float layers
    again. `failures` says of which weights that was impossible, `absent` which saved tensors the files do not name,
    `offloaded` has the weights that are not to be in memory all at once.
    """

    requires_calibration = False
    quantization_config: LowBitConfig

    def __init__(self, quantization_config: LowBitConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:  # the user's object is not ours to write the table and the recipe into
            self.quantization_config = copy.copy(quantization_config)
        self.found: set[str] = set()
        self.failures: list[str] = []
        self.absent: set[str] = set()
        self.offloaded: OffloadedBlocks | None = None
        self._device_map: Any = None

    @property
    def is_trainable(self) -> bool:
        """Through adapters on a packed model, or as it is when fake-quantized."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Only a fake-quantized model has float weights to train."""
        return not self.quantization_config.packed

    @property
    def is_compileable(self) -> bool:
        """Packed layers are operators to torch.compile; `generate` may compile its decoding step."""
        return True

    def is_serializable(self) -> bool:
        """Every state can be saved."""
        return True

    # Loading ---------------------------------------------------------------------------------------------------------

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse what would load wrong numbers.

        Raises:
            ValueError: layers would be offloaded to disk: a weight that is quantized onto disk would be read from the float
                checkpoint again, and a tied head would read codes that are on no device.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "the layers of a low-bit model cannot be offloaded to disk (device_map has 'disk'); it takes far less "
                "memory than a float one, so use device_map='cpu' or leave device_map out"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Remember where the model goes; nothing is changed."""
        self._device_map = device_map
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float16 is slow and imprecise on CPUs: a float16 checkpoint loads as float32 there, unless the user said so."""
        if dtype == torch.float16 and _on_cpu(self._device_map) and _user_dtype() in (None, "auto"):
            logger.warning("The checkpoint is float16; on CPU its float part is loaded as float32 (dtype= overrides this).")
            return torch.float32
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        if not self.pre_quantized:
            table = select(model, config.scheme(model))
            if not config.runs_float_model(model):  # else the float model is run first
                skeleton(model, table, config.packed)
            if getattr(config, "offload", False):
                self.offloaded = OffloadedBlocks(blocks(model), config.ranges)
            return model
        if config.modules is None:
            raise CheckpointError(
                "the quantization_config of this checkpoint has no table of modules, so it cannot be read; "
                "restore config.json from where the checkpoint came from"
            )
        files = [str(file) for file in checkpoint_files or []]
        for file in files:
            if config.packed and not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{file} is no safetensors file and has no checksums; save with save_pretrained again"
                )
        files = [file for file in files if file.endswith(".safetensors")]
        self.absent = verify_files(files, config.stored_table(), required=config.packed)
        skeleton(model, config.table(model), config.packed)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """The float weight of a layer that is packed on load, or a Parameter that is offloaded."""
        layer_name, _, name = param_name.rpartition(".")
        module = model.get_submodule(layer_name)
        if self.offloaded is not None:
            return self.offloaded.holds(param_name) and name in module._parameters
        return not self.pre_quantized and name == "weight" and isinstance(module, LowBitLayer)

    def get_quantize_ops(self) -> ConversionOps:
        """What is done to such a weight."""
        return QuantizeOnLoad(self) if self.offloaded is None else OffloadOnLoad(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        config = self.quantization_config
        if self.failures:
            self.offloaded = None
            raise ValueError("; ".join(self.failures))
        self._check_complete(model)
        self._restore_new_layers(model)
        trains = not self.pre_quantized and config.runs_float_model(model)
        offload = {} if self.offloaded is None else {"offloaded": self.offloaded}
        trained = _TRAINING[config.algorithm](model, config, **offload) if trains else None
        self.offloaded = None  # its folder goes with it
        learned = STEP_SIZES if config.learns_step_sizes and not config.packed else ()
        for _, layer in low_bit_layers(model):
            for name in (*SCALES, *INTEGERS):
                if layer._parameters.get(name) is not None:
                    layer._parameters[name].requires_grad_(name in learned)
            if isinstance(layer, PackedLinear | PackedEmbedding):
                layer.weight.requires_grad_(False)
        set_runtime(model, config.runtime, config.kernel)
        if not self.pre_quantized:
            data = trained or calibrate_on_load(model, config)
            config.calibration_data = None  # the model must not carry its user's texts
            config.describe_model(model)
            write_recipe(model, config, data)
        attach_saving(model)
        return model

    def _check_complete(self, model: PreTrainedModel) -> None:
        """Every tensor that was saved and that this model has must have been read; transformers would make a random one."""
        absent = {body_name(model, name) for name in self.absent}
        lost = [name for name, p in model.named_parameters() if body_name(model, name) in absent and not is_read(p)]
        if lost:
            raise CheckpointError(
                f"the checkpoint is incomplete or damaged: it was saved with {lost[:3]}, which its files do not have; "
                "download or save it again"
            )

    def _restore_new_layers(self, model: PreTrainedModel) -> None:
        """Layers that the checkpoint does not contain become float layers with the model's own initialisation."""
        layers = {name: layer for name, layer in low_bit_layers(model) if layer.owner is layer}
        new = [name for name, layer in layers.items() if not self._was_read(name, layer)]
        if not new:
            return
        swap(model, dict.fromkeys(new, _empty_float), {n: layers[n].spec for n in new})
        for name in new:
            model._init_weights(model.get_submodule(name))
        logger.warning("Not in the checkpoint, newly initialised and left float: %s", ", ".join(new))

    def _was_read(self, name: str, layer: LowBitLayer) -> bool:
        if not self.pre_quantized:
            return name in self.found
        if not self.quantization_config.packed:
            return True
        tensors = ("weight_codes", "weight_scale", "weight_zero_point", "weight_minimum", "weight_outlier_positions")
        read = [is_read(getattr(layer, t)) for t in tensors if getattr(layer, t) is not None]
        if any(read) and not all(read):
            raise CheckpointError(
                f"the config and the weights disagree: the checkpoint lacks some tensors of {name}; "
                "take config.json and the safetensors files from the same checkpoint"
            )
        return all(read)

    # Saving and leaving ----------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What is written: tied layers once, markers in one byte a row, table and checksums in the header."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError("a model sharded over processes cannot be saved; load it in one process and save it there")
        self.quantization_config.describe_model(model)
        _check_calibrated(model)
        state_dict = model.state_dict()
        for name, layer in low_bit_layers(model):
            if isinstance(layer, PackedLinear | PackedEmbedding):
                key = f"{name}.weight"
                if layer.owner is not layer:
                    del state_dict[key]
                else:
                    state_dict[key] = torch.zeros_like(state_dict[key], dtype=_MARKER_DTYPE, device="cpu")
        for key, tensor in state_dict.items():
            if tensor.device.type == "meta":
                state_dict[key] = load_offloaded_parameter(model, key)
        return state_dict, header(state_dict, self.quantization_config.stored_table())

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        unpack(model, dtype)
        for parameter in model.parameters():  # not the buffers: some are more precise than the model on purpose
            parameter.data = parameter.data.to(dtype)
        return model


def _check_calibrated(model: PreTrainedModel) -> None:
    for name, layer in low_bit_layers(model):
        if layer.input_scale is not None and layer.input_scale.isnan().any():
            raise ValueError(f"the static input range of {name} was never set; call optimum_zsaq.calibrate(model, batches)")


def _empty_float(layer: LowBitLayer, _: Any) -> nn.Module:
    return kind_of(layer).build(layer, layer.weight.new_zeros(*layer.shape))


def _on_cpu(device_map: Any) -> bool:
    if device_map is None:
        return torch.get_default_device().type == "cpu"
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(str(device) == "cpu" for device in devices) or not torch.accelerator.is_available()


def _user_dtype() -> Any:
    """The `dtype=` that the user gave `from_pretrained`; transformers hands `update_dtype` only what it resolved it to."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained" and "dtype" in frame.f_locals:
            return frame.f_locals["dtype"]
        frame = frame.f_back
    return torch.float16


def attach_quantizer(model: PreTrainedModel) -> None:
    """Make a model that `prepare`, `pack` or `unpack` changed save and reload as what it is now."""
    layers = [layer for _, layer in low_bit_layers(model)]
    if not layers:
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
        detach_saving(model)
        return
    config = getattr(model.config, "quantization_config", None)
    if type(config) is LowBitConfig or not isinstance(config, LowBitConfig):  # no algorithm made it: the layers tell all
        config = _config_of(layers)
    config.packed = all(isinstance(layer, PackedLinear | PackedEmbedding) for layer in layers)
    config.describe_model(model)
    if config.recipe is None:
        write_recipe(model, config, None)
    model.config.quantization_config = config
    model.hf_quantizer = LowBitQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method
    attach_saving(model)


def _config_of(layers: list[LowBitLayer]) -> LowBitConfig:
    """A config whose settings say what the layers are."""
    own = [layer for layer in layers if layer.owner is layer]
    linear = Counter(layer.spec for layer in own if not kind_of(layer).table).most_common(1)
    tables = Counter(layer.spec for layer in own if kind_of(layer).table).most_common(1)
    main = (linear or tables)[0][0]
    inputs = main.inputs
    return LowBitConfig(
        weight_bits=main.weight.bits,
        embedding_bits=tables[0][0].weight.bits if tables else None,
        activation_bits=inputs.bits if inputs else None,
        granularity=main.weight.granularity,
        group_size=main.weight.group_size,
        symmetric=main.weight.symmetric,
        minimum=main.weight.minimum or None,
        ranges="ternary" if main.weight.ternary else "mse",
        activations="static" if inputs and inputs.granularity == "tensor" else "dynamic",
        outliers=main.outliers or None,
        outlier_scope=main.outlier_scope,
    )
