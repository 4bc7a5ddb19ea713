"""Memory of MREM of a model whose float weights stay on the disk; prints JSON.

    python examples/study/mrem_offload.py --blocks 64

A random Llama is written in safetensors files, one a block, and another process quantizes it with
`MREMConfig(offload=True)` and one block a stage. To see it under a limit, on Linux with systemd:

    systemd-run --user --scope -p MemoryMax=1G -p MemorySwapMax=0 python examples/study/mrem_offload.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_zsaq import MREMConfig


_SIZES = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
_TEXTS = [" ".join(f"w{2 + (7 * i + 11 * j) % 900}" for j in range(16)) for i in range(32)]


def write(folder: Path, blocks: int) -> int:
    """A random checkpoint, a file a block; gives its bytes."""
    config = LlamaConfig(**_SIZES, num_hidden_layers=blocks)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator, files = torch.Generator().manual_seed(0), {}
    for name in shapes:
        block = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{block}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {n: torch.empty(shapes[n]).normal_(std=0.02, generator=generator) for n in names if len(shapes[n]) > 1}
        tensors |= {n: torch.ones(shapes[n]) for n in names if len(shapes[n]) == 1}
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, config.vocab_size)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def private_bytes() -> int:
    """Memory of this process that no file backs, which the kernel cannot take back; Linux."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def quantize(folder: Path) -> dict[str, Any]:
    """Load a checkpoint in 3 bits; gives the most private memory that this process has had meanwhile."""
    done, peaks = threading.Event(), [private_bytes()]

    def watch() -> None:
        while not done.wait(0.005):
            peaks.append(private_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    blocks = LlamaConfig.from_pretrained(folder).num_hidden_layers
    config = MREMConfig(weight_bits=3, calibration_data=_TEXTS, stages=blocks, steps=2, batch_size=8, offload=True)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    done.set()
    watcher.join()
    packed = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"packed_bytes": packed, "before_bytes": peaks[0], "peak_bytes": max(peaks)}


def measure(blocks: int) -> dict[str, Any]:
    """Write a checkpoint and quantize it in a process of its own.

    Raises:
        subprocess.CalledProcessError: that process failed, or was killed for its memory; its error is shown.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "model")
        size = write(folder, blocks)
        command = [sys.executable, __file__, "--of", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"checkpoint_bytes": size, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=64, help="of the model, 13 MB each (default: 64)")
    parser.add_argument("--of", type=Path, help="quantize the checkpoint in this folder, in this process")
    args = parser.parse_args()
    print(json.dumps(quantize(args.of) if args.of else measure(args.blocks)))


if __name__ == "__main__":
    main()
