"""What `bench` compares: one entry of `CONTESTANTS` a way to run a model.

To add one, write a function that loads a model from a checkpoint folder and returns something that is called as a
transformers model is, and enter it in `CONTESTANTS`; if it can save what it made, a second function does, so that loading
is measured alone. One of your own needs no entry: `--contestants my_module:MY_CONTESTANT` takes a `Contestant` from a
module that Python finds. Other packages are in `peers.py`; nothing heavy is imported before a function is called.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from . import peers
from .workloads import ENCODER, KINDS


@dataclass(frozen=True)
class Contestant:
    """A way to run a model.

    Args:
        title (`str`): what it is, in a few words.
        load (`Callable[[Path, Job], Callable]`): checkpoint folder -> model.
        prepare (`Callable[[Path, Path, Job], None]`, *optional*): float folder, folder to write: saves what `load` reads,
            in a process of its own. None: `load` reads the float checkpoint, and its time and memory include quantizing.
        packages (`tuple[str, ...]`): modules that must be installed; imported before memory is measured.
        kinds (`tuple[str, ...]`): the kinds of models that it runs.
        checkpoint (`str`, *optional*): contestants of the same text here load what one of them prepared.
        default (`bool`): whether it runs unless contestants are named.
    """

    title: str
    load: Callable[[Path, peers.Job], Callable]
    prepare: Callable[[Path, Path, peers.Job], None] | None = None
    packages: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS
    checkpoint: str | None = None
    default: bool = True

    @property
    def quantizes_on_load(self) -> bool:
        """Whether what is loaded is the float checkpoint."""
        return self.prepare is None


_CALIBRATION_SAMPLES = 32  # enough to run as fast; sampling them takes long on a decoder


def _ours(weight_bits: int, *, dtype: str = "float32", runtime: str = "fast", **settings: Any) -> Contestant:
    """A packed checkpoint of this package; tables have 8 bits beside 8-bit weights and 4 bits beside fewer."""
    activation_bits = settings.setdefault("activation_bits", 8)
    usual = {"embedding_bits": 8 if weight_bits == 8 else 4, "granularity": "row", "symmetric": True, "ranges": "mse"}
    settings = {"weight_bits": weight_bits, **usual, **settings}
    if settings.get("activations") == "static":
        settings["calibration_samples"] = _CALIBRATION_SAMPLES

    def prepare(source: Path, folder: Path, job: peers.Job) -> None:
        from ..integrations.prequant import PreQuantConfig

        config = PreQuantConfig(**settings, seed=job.seed)
        peers.from_folder(source, dtype, quantization_config=config).save_pretrained(folder)

    def load(folder: Path, job: peers.Job) -> Callable:
        from ..integrations.prequant import PreQuantConfig

        return peers.from_folder(folder, dtype, quantization_config=PreQuantConfig(**settings, runtime=runtime))

    inputs = "float inputs" if activation_bits is None else f"{settings.get('activations', 'dynamic')} 8-bit inputs"
    group = f" in groups of {settings['group_size']}" if "group_size" in settings else ""
    title = f"this package, {weight_bits}-bit weights{group}, {inputs}, {dtype}, runtime={runtime!r}"
    checkpoint = f"{dtype} {sorted(settings.items())}"
    return Contestant(title, load, prepare, packages=("optimum_zsaq.integrations.registration",), checkpoint=checkpoint)


def _compiled(contestant: Contestant) -> Contestant:
    def load(folder: Path, job: peers.Job) -> Callable:
        import torch

        return torch.compile(contestant.load(folder, job))

    return replace(contestant, title=f"{contestant.title}, torch.compile", load=load, default=False)


def _on_request(contestant: Contestant) -> Contestant:
    return replace(contestant, default=False)


def _openvino(title: str, precision: str, quantized: bool = False) -> Contestant:
    save, packages = peers.save_openvino, ("openvino",)
    if quantized:
        save, packages = peers.save_openvino_quantized, ("openvino", "nncf")
    return Contestant(f"OpenVINO, {title}", peers.load_openvino(precision), save, packages, (ENCODER,), save.__name__)


def _groups_of_32(weight_bits: int) -> Contestant:
    """The scheme of decoders, in smaller groups: minima and float16 scales, and 8 bits for tables and the head."""
    group = {"granularity": "group", "group_size": 32, "symmetric": False, "minimum": True, "embedding_bits": 8}
    return _on_request(_ours(weight_bits, **group, ranges="minmax"))


_ONNX = ("onnxruntime", "onnxscript")

CONTESTANTS: dict[str, Contestant] = {
    "zsaq-w8a8": _ours(8),
    "zsaq-w8a8-static": _ours(8, activations="static"),
    "zsaq-w4a8": _ours(4),
    "zsaq-w4a8-static": _ours(4, activations="static"),
    "zsaq-w4": _ours(4, activation_bits=None, dtype="bfloat16"),
    "zsaq-w4-fp32": _ours(4, activation_bits=None),
    "zsaq-w4a8-small": _ours(4, runtime="small"),
    "zsaq-w3a8-small": _ours(3, runtime="small"),
    "zsaq-w2a8-small": _ours(2, runtime="small"),
    "zsaq-w4-g64": _on_request(_ours(4, activation_bits=None, dtype="bfloat16", granularity="group", group_size=64)),
    "zsaq-w4a8-g32": _groups_of_32(4),
    "zsaq-w3a8-g32": _groups_of_32(3),
    "zsaq-w2a8-g32": _groups_of_32(2),
    "zsaq-w8a8-bf16": _on_request(_ours(8, dtype="bfloat16")),
    "zsaq-w4a8-bf16": _on_request(_ours(4, dtype="bfloat16")),
    "zsaq-w8a8-compiled": _compiled(_ours(8)),
    "zsaq-w8a8-static-compiled": _compiled(_ours(8, activations="static")),
    "zsaq-w4a8-compiled": _compiled(_ours(4)),
    "zsaq-w4-compiled": _compiled(_ours(4, activation_bits=None, dtype="bfloat16")),
    "torch-fp32": Contestant("PyTorch, float32", peers.load_float32, peers.save_float32),
    "torch-bf16": Contestant("PyTorch, bfloat16", peers.load_bfloat16, peers.save_bfloat16),
    "torch-ao": Contestant("torch.ao quantize_dynamic, 8-bit weights and inputs", peers.load_dynamic),
    "torchao-int8": Contestant(
        "torchao Int8DynamicActivationInt8WeightConfig, float32", peers.load_torchao, packages=("torchao",)
    ),
    "bitsandbytes-nf4": Contestant(
        "bitsandbytes 4-bit nf4, bfloat16, heads float", peers.load_nf4, peers.save_nf4, ("bitsandbytes",)
    ),
    "quanto-int8": Contestant(
        "optimum-quanto 8-bit weights, bfloat16, heads float", peers.load_quanto("int8"), packages=("optimum.quanto",)
    ),
    "quanto-int4": Contestant(
        "optimum-quanto 4-bit weights, bfloat16, heads float", peers.load_quanto("int4"), packages=("optimum.quanto",)
    ),
    "onnxruntime-fp32": Contestant("ONNX Runtime, float32", peers.load_onnx, peers.save_onnx, _ONNX, (ENCODER,)),
    "onnxruntime-dynamic": Contestant(
        "ONNX Runtime quantize_dynamic, 8-bit weights and inputs",
        peers.load_onnx,
        peers.save_onnx_dynamic,
        _ONNX,
        (ENCODER,),
    ),
    "openvino-fp32": _openvino("float32", "f32"),
    "openvino-bf16": _openvino("float32 on disk, bfloat16 hint", "bf16"),
    "openvino-w8a8": _openvino("nncf.quantize, 8-bit weights, static 8-bit inputs", "f32", quantized=True),
    "openvino-w8a8-bf16": _openvino(
        "nncf.quantize, 8-bit weights, static 8-bit inputs, bfloat16 hint", "bf16", quantized=True
    ),
}


def find_contestant(name: str) -> Contestant:
    """The contestant of a name of `CONTESTANTS`, or of `module:ATTRIBUTE`.

    Raises:
        ValueError: there is none.
    """
    if name in CONTESTANTS:
        return CONTESTANTS[name]
    module, _, attribute = name.partition(":")
    if attribute:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"--contestants {name} is not found ({error}); write module:ATTRIBUTE of a module on PYTHONPATH"
            ) from error
        if isinstance(found, Contestant):
            return found
        raise ValueError(f"--contestants {name} is a {type(found).__name__}; it must be a {Contestant.__name__}")
    near = get_close_matches(name, CONTESTANTS, n=1)
    hint = f"did you mean {near[0]}? All names" if near else "the names"
    raise ValueError(f"--contestants {name} is unknown; {hint}: {', '.join(CONTESTANTS)}")


def default_contestants() -> list[str]:
    """The names that run unless others are given."""
    return [name for name, contestant in CONTESTANTS.items() if contestant.default]


def why_skipped(contestant: Contestant, kind: str) -> str | None:
    """Why a contestant cannot run here at all: a kind of model, a package that is not installed. None: it can be tried."""
    if kind not in contestant.kinds:
        return f"it is run on {' and '.join(contestant.kinds)} models only here, and this is a {kind} model"
    for package in contestant.packages:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{package} is not installed; run: pip install {peers.DISTRIBUTIONS.get(package, package)}"
    return None
