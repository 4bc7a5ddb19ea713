"""Outlier adapters for PEFT: a model is quantized once, and a task trains its few outlier weights alone (PreQuant).

`OutlierConfig` and `OutlierModel` are registered with PEFT when this module is imported: `get_peft_model`, `add_adapter`,
`load_adapter`, `AutoPeftModelFor...`, `disable_adapter`, `save_pretrained` and Trainer then work as with its own methods.

Source: PreQuant (https://huggingface.co/papers/2306.00014), second stage. About 0.5 % of the weights is the paper's; the
criterion, the start value and everything else here is our choice (docs/methods/prequant_adapters.md).
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


try:
    from peft.config import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear_layers
    from peft.utils.other import AuxiliaryTrainingWrapper
    from peft.utils.peft_types import PeftType, register_peft_method
except ImportError as fault:
    raise ImportError("outlier adapters are a method of PEFT; run `pip install 'optimum-zsaq[peft]'`") from fault

from ..algorithms.outliers import STORED, check_choice, choose_outliers
from ..kinds import kind_of, reader_of
from ..layers import LowBitLayer
from ..surgery import low_bit_layers
from .fingerprint import check_fingerprint, fingerprint
from .outlier_layer import NO_MERGE, OutlierLinear


logger = logging.getLogger(__name__)

METHOD = "optimum_zsaq"  # without this package PEFT says KeyError: 'OPTIMUM_ZSAQ', which names what to install
STARTS = ("residual", "zero")
FRACTION = 0.005


@dataclass
class OutlierConfig(PeftConfig):
    """An adapter of outlier weights.

    Args:
        target_modules (`list[str]` or `str`, *optional*): as in PEFT: last parts of names, a regular expression, or
            "all-linear". None: every low-bit Linear layer, or of a float model every one but heads.
        exclude_modules (`list[str]` or `str`, *optional*): layers of these that get none.
        modules_to_save (`list[str]`, *optional*): modules that are trained and saved whole, such as a new head.
        fraction (`float`): share of the weights that are trained, in (0, 1); not used with criterion="stored".
        criterion (`str`, *optional*): "magnitude", "deviation" (from the mean, in sigmas), "error" (|W - Q(W)|, on a
            fake-quantized base), "random", or "stored": the outliers that the base stores. None: "stored" if all layers
            store some, else "magnitude".
        scope (`str`): "matrix": the share of each matrix, "row": of each row, "model": of all matrices together.
        start (`str`): "residual": the model starts as the base is, with the residuals that it stores. "zero": the residuals
            that it stores at trained positions are left out at the start.
        seed (`int`): of criterion="random".
        train_biases (`bool`): also train a bias for each layer that has one.
        train_norms (`bool`): also train the normalization layers, as `modules_to_save` would.
        train_scales (`bool`): also train the step sizes: a factor a row, or one of layers with one scale.
        counts, base_fingerprint (`dict`, *optional*): how many weights of each layer, and of which base; written when an
            adapter is made, read when it is loaded.
        check_base (`bool`): refuse to load the adapter onto another base than its own. Never saved.

    Raises:
        ValueError: an illegal value.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    fraction: float = field(default=FRACTION)
    criterion: str | None = field(default=None)
    scope: str = field(default="matrix")
    start: str = field(default="residual")
    seed: int = field(default=0)
    train_biases: bool = field(default=False)
    train_norms: bool = field(default=False)
    train_scales: bool = field(default=False)
    counts: dict[str, int] | None = field(default=None)
    base_fingerprint: dict[str, str] | None = field(default=None)
    check_base: bool = field(default=True)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType[METHOD.upper()]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        check_choice(self.criterion or STORED, self.fraction, self.scope)
        if self.start not in STARTS:
            raise ValueError(f"start={self.start!r} is unknown; use one of {STARTS}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} is not an integer; use one, such as 0")
        self.from_file = self.counts is not None  # no field: the same object may be used for another new adapter

    def to_dict(self) -> dict[str, Any]:
        """The fields that are saved."""
        fields = super().to_dict()
        del fields["check_base"]
        return fields


class OutlierModel(BaseTuner):
    """A model with outlier adapters on its Linear layers."""

    prefix: str = f"{METHOD}_"
    tuner_layer_cls = OutlierLinear
    target_module_mapping: dict[str, list[str]] = {}

    # Adding ------------------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with a config of the adapter's own: what is written into it is no matter of other adapters."""
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: OutlierConfig, model_config: dict) -> OutlierConfig:
        if peft_config.target_modules is None:
            whole = tuple(peft_config.modules_to_save or ())
            peft_config.target_modules = {name for name in default_targets(self.model) if not _inside(name, whole)}
        if peft_config.train_norms:
            peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), *norm_names(self.model)})
        return peft_config

    def _prepare_model(self, peft_config: OutlierConfig, model: nn.Module) -> None:
        """Everything that may fail, before the model is changed: layers, fingerprint, positions."""
        include_all_linear_layers(peft_config, model)
        _check_trainable(peft_config, model)
        if any(layer.merged for _, layer in self._layers()):
            raise ValueError("adapters are merged into the weights; call unmerge_adapter() before adding another one")
        targets = find_targets(peft_config, model)
        self._positions: dict[str, torch.Tensor | None] = dict.fromkeys(targets)
        if not targets:
            return  # PEFT says so
        _check_present({**dict(low_bit_layers(model)), **targets})
        if peft_config.from_file:
            if peft_config.check_base:
                check_fingerprint(fingerprint(model, targets), peft_config.base_fingerprint or {})
            _check_counts(peft_config, targets)
            return
        criterion = peft_config.criterion or _default_criterion(targets)
        if criterion == STORED and peft_config.fraction != FRACTION:
            logger.warning(
                "fraction=%s is not used: criterion='stored' trains the outliers that the base stores; "
                "set criterion='magnitude' to train that share",
                peft_config.fraction,
            )
        found = fingerprint(model, targets)
        choice = (criterion, peft_config.fraction, peft_config.scope, peft_config.seed)
        self._positions = choose_outliers(targets, *choice)
        peft_config.criterion, peft_config.base_fingerprint = criterion, found
        peft_config.counts = {name: len(positions) for name, positions in self._positions.items()}

    def _create_and_replace(
        self,
        peft_config: OutlierConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target if isinstance(target, OutlierLinear) else OutlierLinear(target)
        layer.add(adapter_name, peft_config, peft_config.counts[current_key], self._positions.pop(current_key))
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT calls around a forward pass.

        Raises:
            ValueError: `adapter_names` asks for another adapter for each sample.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r}: outlier adapters are one for a whole batch; call "
                "set_adapter(name) and pass its samples alone"
            )
        yield

    # Leaving -----------------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        """Before anything is changed.

        Raises:
            ValueError: a layer is low-bit, or shares its weight with another one.
        """
        super()._check_merge_allowed()
        if any(isinstance(layer.get_base_layer(), LowBitLayer) for _, layer in self._layers()):
            raise ValueError(NO_MERGE)
        self._check_unshared(self._layers())

    def _check_unshared(self, layers: list[tuple[str, OutlierLinear]]) -> None:
        holders = Counter(id(weight) for module in self.model.modules() for weight in module.parameters(recurse=False))
        for name, layer in layers:
            base = layer.get_base_layer()
            if not isinstance(base, LowBitLayer) and holders[id(base.weight)] > 1:
                raise ValueError(
                    f"{name} shares its weight with another layer, which would change too; keep its adapter, or leave the "
                    "layer out of target_modules"
                )

    def _layers(self) -> list[tuple[str, OutlierLinear]]:
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, OutlierLinear)]

    def store_and_unload(self) -> nn.Module:
        """The base model with the active adapters inside it, disabled or not, and without PEFT: it saves and loads as any
        low-bit model.

        Low-bit layers store the adapters' values among their outliers; float ones take them into their weights. A head that
        the adapter brought takes its place.

        Returns:
            `nn.Module`: the base model, changed in place.

        Raises:
            ValueError: no adapter is active, or a layer cannot store what was trained; the message names it. Nothing is
                changed then.
        """
        if not self.active_adapters:
            raise ValueError("no adapter is active, so there is nothing to store; call set_adapter(name), or unload()")
        for name, layer in self._layers():
            try:
                layer.check_store()
            except ValueError as fault:
                raise ValueError(f"{name} cannot store its adapter: {fault}") from fault
        self._check_unshared([(name, layer) for name, layer in self._layers() if layer.active_names()])
        shares = [self.peft_config[name].fraction for name in self.active_adapters]
        for _, layer in self._layers():
            layer.store(shares[0])
        model = self._unload_and_optionally_merge(merge=False)
        reader_of(model).changed(model)
        return model


def default_targets(model: nn.Module) -> dict[str, nn.Module]:
    """The low-bit Linear layers of a model, or if it has none its float ones but heads: name -> base layer.

    Raises:
        ValueError: adapters of another method hold some.
    """
    found = _outer_layers(model)
    held = [name for name, module in found.items() if isinstance(module, BaseTunerLayer)]
    if held:
        raise ValueError(
            f"target_modules=None means every Linear layer, but {held[0]} and {len(held) - 1} more hold another method's "
            "adapters; name layers that hold none in target_modules"
        )
    layers = {name: base for name, base in found.items() if (k := kind_of(base)) and not k.table}
    low_bit = {name: base for name, base in layers.items() if isinstance(base, LowBitLayer) and base.owner is base}
    heads = reader_of(model).facts(model).heads
    return low_bit or {name: base for name, base in layers.items() if name not in heads}


def _outer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, outlier adapters as their base layers; not what is inside adapters and modules_to_save."""
    inside: list[str] = []
    found = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside.append(name)
        found[name] = module.get_base_layer() if isinstance(module, OutlierLinear) else module
    return found


def find_targets(config: OutlierConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The layers that a config names: name -> base layer.

    Raises:
        TypeError: one of them is no Linear layer.
    """
    names = {name: base for name, base in _outer_layers(model).items() if name and check_target_module_exists(config, name)}
    for name, base in names.items():
        kind = kind_of(base)
        if kind is not None and not kind.table:
            continue
        what = "an embedding table" if isinstance(base, nn.Embedding) else f"a {type(base).__name__}"
        raise TypeError(
            f"target_modules={config.target_modules!r} names {name}, which is {what}; outlier adapters sit on Linear "
            "layers and Conv1D, float, fake-quantized or packed. Leave it out, or name it in exclude_modules"
        )
    return names


def norm_names(model: nn.Module) -> set[str]:
    """What PEFT finds a model's normalization layers, and no others, by: last parts of their names, or whole names."""
    modules = {
        name: module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        for name, module in _outer_layers(model).items()
    }
    norms = {name for name, module in modules.items() if "Norm" in type(module).__name__ and not list(module.children())}
    others = [name for name in modules if name and name not in norms]
    lasts = {name: name.rpartition(".")[2] for name in norms}
    return {name if any(other.endswith(last) for other in others) else last for name, last in lasts.items()}


def _inside(name: str, modules_to_save: tuple[str, ...]) -> bool:
    """Whether a module is one of those that PEFT trains whole, or in one."""
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(modules_to_save) for count in range(1, len(parts) + 1))


def _check_trainable(config: OutlierConfig, model: nn.Module) -> None:
    """Raise a ValueError if a layer that holds integers is to be trained whole."""
    wanted = tuple(config.modules_to_save or ())
    for name, layer in low_bit_layers(model):
        if not _inside(name, wanted):
            continue
        if layer.owner is not layer:
            raise ValueError(
                f"modules_to_save={sorted(wanted)} names {name}, which reads another layer's weight: a copy of it has none "
                "to train; leave it out"
            )
        if not all(own.is_floating_point() for own in layer.parameters(recurse=False)):
            raise ValueError(
                f"modules_to_save={sorted(wanted)} names {name}, which is low-bit: its codes or positions are integers and "
                "cannot be trained; leave it out, or keep it float by modules_to_not_convert when the base is quantized"
            )


def _check_present(layers: dict[str, nn.Module]) -> None:
    """Raise a ValueError if weights are somewhere else: positions are chosen, and bases known, by values."""
    for name, layer in layers.items():
        if layer.weight is not None and layer.weight.device.type == "meta":
            raise ValueError(
                f"{name} is offloaded or on the meta device; load the whole base into memory before its adapters"
            )


def _default_criterion(targets: dict[str, nn.Module]) -> str:
    stores = (
        isinstance(base, LowBitLayer) and base.owner.weight_outlier_positions is not None for base in targets.values()
    )
    return STORED if all(stores) else "magnitude"


def _check_counts(config: OutlierConfig, targets: dict[str, nn.Module]) -> None:
    if config.counts.keys() != targets.keys():
        extra, missing = sorted(config.counts.keys() - targets.keys()), sorted(targets.keys() - config.counts.keys())
        raise ValueError(
            f"the adapter sits on other layers than target_modules names in this model: it lacks {missing[:3]} and has "
            f"{extra[:3]} beside; load it onto the class of model that it was trained on"
        )


def register_outliers() -> None:
    """Make the method known to PEFT, whose list of methods is closed; does nothing when it is."""
    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_, member.__objclass__ = name, name, PeftType
        member._sort_order_ = len(PeftType.__members__)
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    if PeftType[name] not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=METHOD, config_cls=OutlierConfig, model_cls=OutlierModel)


register_outliers()
