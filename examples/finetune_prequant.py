"""Quantize a pre-trained encoder once, then tune its outlier weights for a task: an adapter of some hundred kilobytes.

    python examples/finetune_prequant.py --model MODEL --base base --train train.tsv --dev dev.tsv --adapter sst2

The TSV files have the columns "sentence" and "label". `base` is made if it is not there, and used as it is if it is: run
this again with other files and another --adapter, and both tasks share one base.
"""

import argparse
import sys
from pathlib import Path
from typing import Any


def quantize(model: str, folder: Path, bits: int) -> None:
    """The base of all tasks: no task's data is needed."""
    from transformers import AutoModel, AutoTokenizer

    from optimum_zsaq import PreQuantConfig

    config = PreQuantConfig(weight_bits=bits, embedding_bits=bits, outliers=0.005)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    AutoModel.from_pretrained(model, quantization_config=config).save_pretrained(folder)  # last: then the base is whole


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """Train an adapter on the base, save it, load it again, and return the metrics of that one."""
    import numpy as np
    import torch
    from peft import AutoPeftModelForSequenceClassification, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

    from optimum_zsaq import OutlierConfig
    from optimum_zsaq.integrations.data import read_file

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    train, dev = (
        read_file(file).map(lambda row: tokenizer(row["sentence"], truncation=True, max_length=128))
        for file in (args.train, args.dev)
    )
    labels = {"num_labels": max(train["label"]) + 1}
    base = AutoModelForSequenceClassification.from_pretrained(args.base, **labels)
    model = get_peft_model(base, OutlierConfig(task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    options = {"per_device_train_batch_size": 32, "learning_rate": args.learning_rate, "num_train_epochs": args.epochs}
    options |= {"warmup_steps": 0.06, "report_to": "none", "save_strategy": "no", "use_cpu": not torch.cuda.is_available()}
    arguments = TrainingArguments(str(args.adapter), seed=args.seed, **options)

    def right(found: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))}

    Trainer(model, arguments, train_dataset=train, processing_class=tokenizer).train()
    model.save_pretrained(args.adapter)
    again = AutoPeftModelForSequenceClassification.from_pretrained(args.adapter, **labels)
    judge = Trainer(again, arguments, eval_dataset=dev, processing_class=tokenizer, compute_metrics=right)
    return judge.evaluate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a float model's folder or its id on the Hub")
    parser.add_argument("--base", type=Path, required=True, help="folder of the quantized base")
    parser.add_argument("--bits", type=int, help="of weights and embeddings, when the base is made (default: 4)")
    parser.add_argument("--train", type=Path, required=True, help="TSV file to train on")
    parser.add_argument("--dev", type=Path, required=True, help="TSV file to measure on")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="(default: 0.01)")
    parser.add_argument("--epochs", type=float, default=2.0, help="(default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = (args.base / "config.json").exists()
    if made and args.bits is not None:
        parser.error(f"--bits is for making a base; {args.base} is there already: leave it out, or name another --base")
    if not made:
        quantize(args.model, args.base, 4 if args.bits is None else args.bits)
    print(f"accuracy {tune(args)['eval_accuracy']:.4f}")
    size = (args.adapter / "adapter_model.safetensors").stat().st_size
    print(f"the adapter has {size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
