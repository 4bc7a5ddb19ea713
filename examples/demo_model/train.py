"""Train the small language model that `optimum-cli zsaq demo` quantizes.

A 1.7 M parameter Llama with tied embeddings and its own byte-level BPE of 4,096 tokens, trained on WikiText-2
(CC BY-SA 3.0) and stored as float16 (3.4 MB). It shows what quantization costs a real model; it does not write well.
The one in the package was made by this command, 38 minutes on one core:

    python examples/demo_model/train.py --data /path/to/wikitext-2 --output optimum_zsaq/demo/model

`--data` is a folder with `train.txt`, `valid.txt` and `test.txt`. Then `write_text.py` has it write the demo's test text.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt, valid.txt, test.txt")
    parser.add_argument("--output", type=Path, required=True, help="folder the model is written to")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--window", type=int, default=128, help="tokens a training sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor, window: int = 256) -> float:
    model.eval()
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    model.train()
    return math.exp(sum(losses) / len(losses))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, valid: torch.Tensor, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.05, anneal_strategy="cos"
    )
    start = time.time()
    for step in range(1, args.steps + 1):
        offsets = torch.randint(len(tokens) - args.window, (args.batch_size,), generator=generator)
        batch = torch.stack([tokens[o : o + args.window] for o in offsets])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"step {step}/{args.steps} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
        if step % 2000 == 0:
            print(f"  validation perplexity {perplexity(model, valid[:25_600]):.2f}", flush=True)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    text = (args.data / "train.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    valid = torch.tensor(tokenizer((args.data / "valid.txt").read_text(encoding="utf-8"))["input_ids"])
    print(f"{len(tokens)} training tokens", flush=True)
    model = build_model()
    train(model, tokens, valid, args)
    args.output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    test = (args.data / "test.txt").read_text(encoding="utf-8")[:120_000]
    test_tokens = torch.tensor(tokenizer(test)["input_ids"])
    figures = {"parameters": model.num_parameters(), "test_perplexity": perplexity(model.float(), test_tokens)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
