"""Other packages as contestants of `bench`: how each is given a float checkpoint folder, as its own documentation says.

Functions return a model that is called as a transformers model is. Nothing heavy is imported before one is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


DISTRIBUTIONS = {"optimum.quanto": "optimum-quanto"}  # module: what pip installs, where the names differ
_EXAMPLE = (2, 16)  # rows and tokens that a graph is traced with
_CALIBRATION = (16, 1, 128)  # batches, rows, tokens of random ids for static ranges


@dataclass(frozen=True)
class Job:
    """What a contestant must know besides the folder.

    Args:
        threads (`int`): processor threads.
        seed (`int`): of random token ids.
    """

    threads: int
    seed: int


def from_folder(folder: Path, dtype: str, **options: Any) -> Any:
    """The model of a checkpoint folder, in the class it was saved with."""
    import torch

    from ..integrations.registration import register
    from ..integrations.tasks import load_config, model_class

    register()
    cls = model_class(load_config(str(folder)))
    return cls.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()


def float_layers(folder: Path) -> list[str] | None:
    """The heads, and the Linear layers that share a table's weight: what 4-bit layouts cannot hold. None where none are."""
    import torch

    from ..integrations.registration import register
    from ..integrations.tasks import load_config, model_class
    from ..kinds import reader_of

    register()
    config = load_config(str(folder))
    with torch.device("meta"):
        model = model_class(config)(config)
    facts = reader_of(model).facts(model)
    found = {*facts.heads, *facts.tied}
    return sorted(name for name in found if isinstance(model.get_submodule(name), torch.nn.Linear)) or None


# PyTorch -------------------------------------------------------------------------------------------------------------


def load_float32(folder: Path, job: Job) -> Any:
    """The float model."""
    return from_folder(folder, "float32")


def save_float32(source: Path, folder: Path, job: Job) -> None:
    """A checkpoint of float32 weights."""
    from_folder(source, "float32").save_pretrained(folder)


def load_bfloat16(folder: Path, job: Job) -> Any:
    """The float model in half of the memory."""
    return from_folder(folder, "bfloat16")


def save_bfloat16(source: Path, folder: Path, job: Job) -> None:
    """A checkpoint of bfloat16 weights."""
    from_folder(source, "bfloat16").save_pretrained(folder)


def load_dynamic(folder: Path, job: Job) -> Any:
    """Dynamic quantization that comes with PyTorch."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = from_folder(folder, "float32")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


def load_torchao(folder: Path, job: Job) -> Any:
    """torchao through transformers."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return from_folder(folder, "float32", quantization_config=config)


# Weight-only, through transformers -----------------------------------------------------------------------------------


def save_nf4(source: Path, folder: Path, job: Job) -> None:
    """Quantize and save, before any forward: saving after one damages such a model."""
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=float_layers(source),
    )
    from_folder(source, "bfloat16", quantization_config=config).save_pretrained(folder)


def load_nf4(folder: Path, job: Job) -> Any:
    """The saved model."""
    return from_folder(folder, "bfloat16")


def load_quanto(weights: str) -> Callable[[Path, Job], Any]:
    """Loader of 8-bit ("int8") or 4-bit ("int4") weights; transformers cannot save them."""

    def load(folder: Path, job: Job) -> Any:
        from transformers import QuantoConfig

        skipped = [*(float_layers(folder) or ()), ".*pooler"]  # its 4-bit kernel refuses a pooler's strided input
        config = QuantoConfig(weights=weights, modules_to_not_convert=skipped)
        return from_folder(folder, "bfloat16", quantization_config=config)

    return load


# ONNX Runtime --------------------------------------------------------------------------------------------------------


def _graph(source: Path) -> tuple[Any, tuple[Any, Any]]:
    """The float model with the inputs (token ids, mask) and one output, and examples of the two."""
    import torch

    class Graph(torch.nn.Module):
        """Positional inputs and one output tensor, as tracers want them."""

        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            """Logits or hidden states."""
            return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]

    ids = torch.ones(_EXAMPLE, dtype=torch.int64)
    return Graph(from_folder(source, "float32")).eval(), (ids, torch.ones_like(ids))


def save_onnx(source: Path, folder: Path, job: Job) -> None:
    """Export with rows and tokens that vary."""
    import torch

    model, example = _graph(source)
    folder.mkdir(parents=True, exist_ok=True)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        model,
        example,
        folder / "model.onnx",
        dynamo=True,
        input_names=["input_ids", "attention_mask"],
        output_names=["output"],
        dynamic_shapes=(axes, axes),
        external_data=False,
        verbose=False,
    )


def save_onnx_dynamic(source: Path, folder: Path, job: Job) -> None:
    """Export, then quantize the weights per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    save_onnx(source, folder, job)
    exported = folder / "model.onnx"
    exported = exported.rename(folder / "float.onnx")
    try:
        quantize_dynamic(exported, folder / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
    finally:
        exported.unlink()


def load_onnx(folder: Path, job: Job) -> Callable:
    """A session on the CPU."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}

    def model(**inputs: Any) -> tuple[Any]:
        feed = {name: value.numpy() for name, value in inputs.items() if name in names}
        return (torch.from_numpy(session.run(None, feed)[0]),)

    return model


# OpenVINO ------------------------------------------------------------------------------------------------------------


def _convert(source: Path) -> Any:
    import openvino
    import torch

    model, example = _graph(source)
    with torch.no_grad():
        return openvino.convert_model(model, example_input=example, input=[[-1, -1], [-1, -1]])


def _save_openvino(model: Any, folder: Path) -> None:
    import openvino

    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def save_openvino(source: Path, folder: Path, job: Job) -> None:
    """Convert."""
    _save_openvino(_convert(source), folder)


def save_openvino_quantized(source: Path, folder: Path, job: Job) -> None:
    """Convert, then quantize weights and inputs; ranges and SmoothQuant from random tokens."""
    import nncf

    from ..integrations.tasks import load_config
    from .workloads import token_batch

    count, rows, length = _CALIBRATION
    config = load_config(str(source))
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    batches = [tuple(token_batch(config, rows, length, job.seed + i).values()) for i in range(count)]
    data = nncf.Dataset([tuple(part.numpy() for part in batch) for batch in batches])
    model = nncf.quantize(_convert(source), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=count)
    _save_openvino(model, folder)


def load_openvino(precision: str) -> Callable[[Path, Job], Callable]:
    """Loader for the CPU; what is not quantized runs in `precision`: "f32" or "bf16"."""

    def load(folder: Path, job: Job) -> Callable:
        import openvino
        import torch

        options = {
            "INFERENCE_NUM_THREADS": job.threads,
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", options)

        def model(**inputs: Any) -> tuple[Any]:
            feed = [inputs[name].numpy() for name in ("input_ids", "attention_mask")]
            return (torch.from_numpy(compiled(feed)[0]),)

        return model

    return load
