"""llama.cpp's own quantizer on a Llama of transformers: a GGUF file of the float model, quantized, read back.

Needs `pip install gguf` and llama.cpp's shared libraries; the environment variable LLAMA_CPP names their folder:

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    export LLAMA_CPP=$PWD/package/bins/linux-x64

Rows of queries and keys stay in transformers' order, which llama.cpp could not run: blocks lie within a row, so that the
order changes no value.
"""

import ctypes
import json
import os
import tempfile
from pathlib import Path
from typing import Any


FILE_TYPES = {"q4_0": 2, "q4_k_m": 15, "q3_k_m": 12, "q2_k": 10}  # llama_ftype of llama.h
LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_F32 = 0  # ggml_type


class _Importance(ctypes.Structure):
    """llama_model_imatrix_data: one of an array that a null name ends."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Parameters(ctypes.Structure):
    """llama_model_quantize_params of v0.5.0, and room for what later versions add."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int),
        ("output_type", ctypes.c_int),
        ("embedding_type", ctypes.c_int),
        ("flags", ctypes.c_bool * 6),
        ("importance", ctypes.POINTER(_Importance)),
        ("room", ctypes.c_byte * 256),
    )


def quantize_gguf(model: Any, kind: str, importance: dict[str, Any] | None = None) -> dict[str, tuple[Any, int]]:
    """What llama.cpp makes of the Linear layers of a Llama.

    Args:
        model: a `LlamaForCausalLM`, float.
        kind (`str`): one of `FILE_TYPES`.
        importance (`dict[str, torch.Tensor]`, *optional*): mean square of each input channel (I,), by layer.

    Returns:
        `dict[str, tuple[torch.Tensor, int]]`: the values (O, I) float32 and the bytes in the file, by layer.

    Raises:
        ImportError: no gguf, or no llama.cpp. RuntimeError: llama.cpp failed.
    """
    gguf, library = _gguf(), _library()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.gguf"), Path(folder, "quantized.gguf")
        _write(gguf, model, source)
        parameters = library.llama_model_quantize_default_params()
        parameters.threads, parameters.file_type, parameters.embedding_type = 1, FILE_TYPES[kind], _F32
        kept = _importance_array(importance or {})
        parameters.importance = kept if importance else None
        if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp did not quantize to {kind!r}; see what it printed above")
        return _read(gguf, target)


def version() -> str:
    """Which llama.cpp it is."""
    found = _folder() / "_nlcBuildMetadata.json"
    release = json.loads(found.read_text())["buildOptions"]["llamaCpp"]["release"] if found.exists() else "?"
    return f"llama.cpp {release}"


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("llama.cpp's files are written and read with gguf; pip install gguf") from error
    return gguf


def _folder() -> Path:
    folder = Path(os.environ.get("LLAMA_CPP", ""))
    if not list(folder.glob("libllama*.so")):
        raise ImportError(f"LLAMA_CPP={str(folder)!r} holds no libllama*.so; see the first lines of {Path(__file__).name}")
    return folder


def _library() -> Any:
    folder = _folder()
    for name in ("libggml-base*.so", "libggml.*so", "libllama.*so"):
        library = ctypes.CDLL(str(next(folder.glob(name))), ctypes.RTLD_GLOBAL)
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters)]
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_backend_init()
    return library


def _importance_array(importance: dict[str, Any]) -> Any:
    names = {layer: short for short, layer in LAYERS.items()}
    entries = []
    for name, squares in importance.items():
        _, _, block, layer = name.split(".", 3)
        data = (ctypes.c_float * len(squares))(*squares.tolist())
        entries.append(_Importance(f"blk.{block}.{names[layer]}.weight".encode(), data, len(squares)))
    return (_Importance * (len(entries) + 1))(*entries)


def _write(gguf: Any, model: Any, path: Path) -> None:
    """Every tensor in float32, with what llama.cpp asks of a Llama."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(_F32)
    base = model.model
    writer.add_tensor("token_embd.weight", base.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", base.norm.weight.detach().numpy())
    for number, block in enumerate(base.layers):
        norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        for short, name in {**LAYERS, **norms}.items():
            weight = block.get_submodule(name).weight.detach().float().numpy()
            writer.add_tensor(f"blk.{number}.{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(gguf: Any, path: Path) -> dict[str, tuple[Any, int]]:
    import torch

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        _, block, short, *_ = [*tensor.name.split("."), "", "", ""]
        if short in LAYERS:
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            found[f"model.layers.{block}.{LAYERS[short]}"] = values, int(tensor.n_bytes)
    return found
