"""Have the demo's language model write the text that `optimum-cli zsaq demo` measures perplexity on.

The package ships no text of others: the model samples from its own distribution (temperature 1, no truncation). On such
text the logarithm of (quantized perplexity / float perplexity) estimates KL(float || quantized) a token.

    python examples/demo_model/write_text.py --model optimum_zsaq/demo/model
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model; sample.txt is written there")
    parser.add_argument("--sequences", type=int, default=112)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    newline = tokenizer("\n")["input_ids"][0]
    start = torch.full((args.sequences, 1), newline)
    ids = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        min_new_tokens=args.length,
        max_new_tokens=args.length,
        pad_token_id=0,
    )
    text = "\n".join(tokenizer.decode(row[1:], skip_special_tokens=True) for row in ids)
    (args.model / "sample.txt").write_text(text, encoding="utf-8")
    print(f"{len(tokenizer(text, verbose=False)['input_ids'])} tokens, {len(text)} characters")


if __name__ == "__main__":
    main()
