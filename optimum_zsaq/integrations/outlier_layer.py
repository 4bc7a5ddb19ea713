"""The layer of an outlier adapter: a Linear layer in whichever state, and the few weights that are trained on top of it.

With W the weight that the base layer computes with, S an adapter's values at its positions, m its step-size factors (one a
row, or one) and b its biases, the layer computes

    y = m * (x' @ (W + S).T) + bias + b

where x' is the input as the base layer sees it, quantized if its scheme says so. S is trained; m and b where asked for.
On a packed base the kernel gets S together with the outliers that the layer stores, so that the result is bit for bit that
of a model that stores their sum. On other bases S is multiplied by itself. No dense S is ever made.
"""

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..algorithms.outliers import weight_shape
from ..kernels import OutlierProducts
from ..kernels.prepacked import stamp
from ..kinds import kind_of
from ..layers import LowBitLayer, PackedLinear
from ..ops import sum_at_positions, union_of_positions


POSITIONS, VALUES = "optimum_zsaq_positions", "optimum_zsaq_values"
BIASES, SCALES = "optimum_zsaq_biases", "optimum_zsaq_scales"
NO_MERGE = (
    "trained outliers are float and cannot be merged into integer codes without rounding them away; call "
    "store_and_unload(), which puts them among the outliers that the low-bit layers store beside their codes"
)
_NOT_LOADED = -1


class OutlierLinear(nn.Module, BaseTunerLayer):
    """A Linear layer with outlier adapters, by name.

    Shapes of one adapter: positions (k,) int32 ascending, in the flattened (O, I) weight; values (k,) float32; biases (O,)
    float32; scales (O,) or (1,) float32. A weight may be one of several adapters.
    """

    adapter_layer_names = (VALUES, BIASES, SCALES)
    other_param_names = (POSITIONS,)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = weight_shape(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        setattr(self, POSITIONS, BufferDict(persistent=True))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merges: list[list[tuple[str, tuple, Tensor]]] = []
        self._unions: dict[tuple[str, ...], tuple] = {}
        self.register_load_state_dict_post_hook(_after_loading)

    def _adapter(self, kind: str) -> Any:
        return getattr(self, kind)

    # Adding ------------------------------------------------------------------------------------------------------------

    def add(self, name: str, config: Any, count: int, positions: Tensor | None) -> None:
        """Add an adapter; without `positions` it is one that will be loaded, with `count` of them.

        Raises:
            ValueError: step sizes shall be trained on a float layer.
        """
        base = self.get_base_layer()
        if config.train_scales and not isinstance(base, LowBitLayer):
            raise ValueError("train_scales=True trains step sizes, which a float layer has none of; use train_scales=False")
        device = base.weight.device
        self._unions.clear()  # there may have been an adapter of this name
        values = torch.zeros(count, device=device)
        if positions is None:
            positions = torch.full((count,), _NOT_LOADED, dtype=torch.int32, device=device)
        elif config.start == "zero":
            values = -self._stored_at(positions)
        self._adapter(POSITIONS)[name] = positions
        self._adapter(VALUES)[name] = nn.Parameter(values)
        if config.train_biases and base.bias is not None:
            self._adapter(BIASES)[name] = nn.Parameter(torch.zeros(self.out_features, device=device))
        if config.train_scales:
            rows = 1 if base.owner.spec.weight.granularity == "tensor" else self.out_features
            self._adapter(SCALES)[name] = nn.Parameter(torch.ones(rows, device=device))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; graphs of torch.compile find what they need of the positions worked out."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._work_out()

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; nothing that was kept of the adapter stays."""
        super().delete_adapter(adapter_name)
        self._work_out(anew=True)

    def _apply(self, fn: Any, recurse: bool = True) -> "OutlierLinear":
        result = super()._apply(fn, recurse)
        self._work_out(anew=True)
        return result

    def _work_out(self, anew: bool = False) -> None:
        """Keep the union of the active adapters' positions, once they have values; `anew`: forget what was kept."""
        if anew:
            self._unions.clear()
        if not all(self._is_loaded(name) for name in self.active_names()):
            return
        if isinstance(self.get_base_layer(), PackedLinear):
            groups, stored = ([self.active_names()] if self.active_names() else []), self._stored()
        else:
            groups, stored = [(name,) for name in self.active_names()], None
        for names in groups:
            if names not in self._unions:
                self._union(names, stored)

    def _is_loaded(self, name: str) -> bool:
        positions = self._adapter(POSITIONS)[name]
        return positions.device.type != "meta" and (not len(positions) or int(positions[0]) != _NOT_LOADED)

    def _stored(self) -> tuple[Tensor, Tensor] | None:
        base = self.get_base_layer()
        if not isinstance(base, LowBitLayer) or base.owner.weight_outlier_positions is None:
            return None
        return base.owner.weight_outlier_positions, base.owner.weight_outlier_values

    def _stored_at(self, positions: Tensor) -> Tensor:
        """The residuals that the base stores at some positions, 0 elsewhere. Shapes: (k,) int32 -> (k,) float32."""
        stored = self._stored()
        if stored is None:
            return torch.zeros(len(positions), device=positions.device)
        where = torch.searchsorted(stored[0], positions).clamp(max=len(stored[0]) - 1)
        return torch.where(stored[0][where] == positions, stored[1].detach()[where], 0.0)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but values stay float32, whatever dtype the base has."""
        device = device or self.get_base_layer().weight.device
        for kind in (*self.adapter_layer_names, POSITIONS):
            tensors = self._adapter(kind)
            if adapter_name in tensors and tensors[adapter_name].device.type != "meta":
                tensors[adapter_name] = tensors[adapter_name].to(device)
        self._work_out(anew=True)

    # Running -----------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., I) -> (..., O), in the dtype that the base layer gives."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = () if self.disable_adapters or self.merged else self.active_names()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        base = self.base_layer
        if isinstance(base, PackedLinear):
            return self._rescaled(base(x, *args, outliers=self.outliers(names), **kwargs), names)
        y = base(x, *args, **kwargs)
        inputs = base.quantize_inputs(x) if isinstance(base, LowBitLayer) else x
        for name in names:
            y = y + self._products(inputs, name).to(y.dtype)
        return self._rescaled(y, names)

    def active_names(self) -> tuple[str, ...]:
        """The active adapters that sit on this layer."""
        return tuple(name for name in self.active_adapters if name in self._adapter(VALUES))

    def outliers(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
        """What the base stores and the values of adapters, added up. None if there are none at all.

        Shapes: -> positions (k,) int32 ascending, values (k,) float32, differentiable in the adapters'.
        """
        stored = self._stored()
        parts = [self._adapter(VALUES)[name].float() for name in names]
        parts = parts if stored is None else [stored[1], *parts]
        positions, where = self._union(names, stored)
        if not len(positions):
            return None
        return positions, sum_at_positions(parts, where, len(positions))  # not kept: a write to `.data` would not be seen

    def _union(self, names: tuple[str, ...], stored: tuple[Tensor, Tensor] | None) -> tuple[Tensor, list[Tensor | None]]:
        """The positions of adapters, and of the base's outliers, and where each one's are among them."""
        kept = self._unions.get(names)
        if kept is not None and torch.compiler.is_compiling():
            return kept[1]
        parts = [self._adapter(POSITIONS)[name] for name in names]
        parts = parts if stored is None else [stored[0], *parts]
        wanted = [stamp(part) for part in parts]
        if kept is None or kept[0] != wanted:
            for name in names:
                self._check_positions(name)
            with torch.inference_mode(False):
                # with the parts, so that no other tensor gets their stamps
                kept = self._unions[names] = (wanted, union_of_positions(parts), parts)
        return kept[1]

    def _check_positions(self, name: str) -> None:
        positions = self._adapter(POSITIONS)[name]
        if not len(positions):
            return
        if (positions == _NOT_LOADED).all():
            raise ValueError(
                f"the positions of adapter {name!r} were never loaded: its config comes from a file, its tensors do not; "
                "load both with PeftModel.from_pretrained, or make a new OutlierConfig for a new adapter"
            )
        lowest, highest, weights = int(positions[0]), int(positions[-1]), self.out_features * self.in_features
        if lowest < 0 or highest >= weights or (positions[1:] <= positions[:-1]).any():
            raise ValueError(
                f"the positions of adapter {name!r} do not lie ascending among the {weights} weights of its layer; "
                "the adapter's file is damaged or belongs to another model"
            )

    def _products(self, x: Tensor, name: str) -> Tensor:
        """S of one adapter by itself. Shapes: x (..., I) -> (..., O) float32."""
        (positions, _), values = self._union((name,), None), self._adapter(VALUES)[name].float()
        if not torch.compiler.is_compiling():
            return OutlierProducts.apply(x, values, positions, self.out_features)
        index = positions.long()
        terms = x.float()[..., index % self.in_features] * values
        y = terms.new_zeros(*x.shape[:-1], self.out_features)
        return y.index_add(-1, index // self.in_features, terms)

    def _rescaled(self, y: Tensor, names: tuple[str, ...]) -> Tensor:
        """Step sizes and biases of the adapters, where they train any. Shapes: (..., O) -> (..., O)."""
        scale, bias, dtype = self._scale(names), self._bias(names), y.dtype
        if scale is not None:
            own = self.get_base_layer().bias
            y = y * scale if own is None else torch.addcmul(own * (1.0 - scale), y, scale)
        return (y if bias is None else y + bias).to(dtype)

    def _scale(self, names: tuple[str, ...]) -> Tensor | None:
        found = [self._adapter(SCALES)[name] for name in names if name in self._adapter(SCALES)]
        return torch.stack(found).prod(dim=0) if found else None

    def _bias(self, names: tuple[str, ...]) -> Tensor | None:
        found = [self._adapter(BIASES)[name] for name in names if name in self._adapter(BIASES)]
        return torch.stack(found).sum(dim=0) if found else None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without what is kept between calls."""
        return {**self.__dict__, "_unions": {}}

    # Merging -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight and bias of a float layer; `unmerge` restores them bit for bit.

        Raises:
            ValueError: the layer is low-bit, or with `safe_merge` the sum is not finite.
        """
        base = self.get_base_layer()
        if isinstance(base, LowBitLayer):
            raise ValueError(NO_MERGE)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self._adapter(VALUES):
                continue
            positions, _ = self._union((name,), None)
            places = (positions.long() // self.in_features, positions.long() % self.in_features)
            changes = [("weight", places, self._adapter(VALUES)[name])]
            if name in self._adapter(BIASES):
                changes.append(("bias", (slice(None),), self._adapter(BIASES)[name]))
            before = [(kind, where, self._mergeable(kind)[where].clone()) for kind, where, _ in changes]
            merged = [
                (old.float() + new.float()).to(old.dtype) for (_, _, old), (_, _, new) in zip(before, changes, strict=True)
            ]
            if safe_merge and not all(torch.isfinite(values).all() for values in merged):
                raise ValueError(f"the adapter {name!r} makes weights that are not finite; it seems to be broken")
            for (kind, where, _), values in zip(before, merged, strict=True):
                self._mergeable(kind)[where] = values
            self._before_merges.append(before)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out again: what they had changed is as it was, bit for bit."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            for kind, where, values in self._before_merges.pop():
                tensor = self._mergeable(kind)  # as it is now: the model may have been moved, cast or copied
                tensor[tuple(w.to(tensor.device) if isinstance(w, Tensor) else w for w in where)] = values.to(tensor)

    def _mergeable(self, kind: str) -> Tensor:
        """The weight as (O, I), or the bias, of a float base layer, sharing its memory."""
        base = self.get_base_layer()
        return base.bias.data if kind == "bias" else kind_of(base).fake.oriented(base.weight.data)

    def check_store(self) -> None:
        """Raise a ValueError if `store` would not compute what this layer does."""
        base, names = self.get_base_layer(), self.active_names()
        if not isinstance(base, LowBitLayer) or not names:
            return
        if len(self._union(names, self._stored())[0]) == self.out_features * self.in_features:
            raise ValueError("its outliers would be all of its weights; store_and_unload needs codes beside them")
        if base.owner is not base:
            raise ValueError("it reads another layer's weight, which would change too; leave it out of target_modules")
        if not isinstance(base, PackedLinear) and self._scale(names) is not None:
            raise ValueError("trained step sizes would round its float weights anew; call optimum_zsaq.pack first")

    @torch.no_grad()
    def store(self, share: float) -> None:
        """Put the active adapters into the base layer for good: among the outliers that it stores, or into a float weight.

        `share` is what the base's spec says of its outliers, if it gives their number.
        """
        base, names = self.get_base_layer(), self.active_names()
        if not names:
            return
        if not isinstance(base, LowBitLayer):
            self.merge()
            return
        stored, scale, bias = self._stored(), self._scale(names), self._bias(names)
        parts = [self._adapter(VALUES)[name].float() for name in names]
        positions, where = self._union(names, stored)
        values = sum_at_positions(parts if stored is None else [stored[1], *parts], where, len(positions))
        if scale is not None:
            base.scale_rows(scale)
            values = values * (scale if len(scale) == 1 else scale[positions.long() // self.in_features])
        if bias is not None:
            base.bias.add_(bias.to(base.bias.dtype))
        if isinstance(base, PackedLinear):
            base.drop_prepacked()
        base.store_outliers(positions.clone(), values.clone(), share)


def _after_loading(layer: OutlierLinear, _: Any) -> None:
    layer._work_out(anew=True)
