"""`optimum-cli zsaq quantize`: load a model in low bits and save it."""

import os
import shutil
import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .common import Command, add_common_arguments, size_text


_SHARED = ("steps", "batch_size", "sequence_length", "learning_rate", "start", "state")
_TRAINING = {  # fields that only those that train have
    "prequant": (),
    "zsaq": (*_SHARED, "rho", "generator", "generator_every", "guard"),
    "mrem": (*_SHARED, "stages", "parallel", "offload"),
}
ALGORITHMS = tuple(_TRAINING)

_EXAMPLES = """examples:
  optimum-cli zsaq quantize --model bert-base-uncased --output out --weight-bits 4 --embedding-bits 4
  optimum-cli zsaq quantize --model ./my-model --output out --weight-bits 3 --granularity group --group-size 64
  optimum-cli zsaq quantize --model ./my-model --output out --activations static --calibration-data texts.txt
  optimum-cli zsaq quantize --model ./my-model --output out --algorithm zsaq --weight-bits 2 --dry-run
  optimum-cli zsaq quantize --model ./my-model --output out --algorithm zsaq --weight-bits 2 --generator facebook/opt-350m
  optimum-cli zsaq quantize --model ./my-model --output out --algorithm mrem --weight-bits 2 --calibration-data texts.txt
"""


_ALGORITHM_HELP = "prequant: data-free rounding; zsaq: training without data; mrem: on texts (default: prequant)"
_GRANULARITY_HELP = (
    "row, tensor or group: 4.5, 3.5, 2.5 bits a weight in groups of 64, scale and minimum included; auto (default): group "
    "for decoders at up to 6 bits, else row"
)
_RANGES_HELP = (
    "mse, minmax, signed, lsq; ternary (2 bits); energy (errors count by what inputs carry; of decoders the "
    "default); auto (default): by scheme and kind of model"
)
_DATA_HELP = "file of texts, for mrem or for static ranges; mrem: zero-shot for generated ones (ranges: sampled tokens)"


def bits_or_none(text: str) -> int | None:
    """argparse type: an integer, or "none" for float."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is neither a number of bits nor 'none'") from None


class QuantizeCommand(Command):
    """Quantize a model and save it."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.epilog, parser.formatter_class = _EXAMPLES, RawDescriptionHelpFormatter
        parser.add_argument("--model", required=True, help="folder or Hub id of a float model")
        parser.add_argument("--output", required=True, type=Path, help="folder to write; it must not exist yet")
        parser.add_argument("--algorithm", choices=ALGORITHMS, default="prequant", help=_ALGORITHM_HELP)
        parser.add_argument("--weight-bits", type=int, default=4, help="2 to 8, of Linear layers (default: 4)")
        parser.add_argument("--embedding-bits", type=bits_or_none, default=8, help="2 to 8 or none (default: 8)")
        parser.add_argument("--activation-bits", type=bits_or_none, default=8, help="2 to 8 or none (default: 8)")
        _add_layout(parser)
        parser.add_argument("--outliers", type=float, help="share of each matrix kept as float residuals, e.g. 0.005")
        parser.add_argument("--outlier-scope", default="matrix", help="matrix: its largest; row: as many of each row")
        parser.add_argument("--activations", default="dynamic", help="dynamic or static (default: dynamic)")
        parser.add_argument("--calibration-data", help=_DATA_HELP)
        parser.add_argument("--calibration-samples", type=int, help="texts used of it (default: 128, mrem: 1024)")
        parser.add_argument("--seed", type=int, default=0, help="of sampled or generated token sequences (default: 0)")
        parser.add_argument("--steps", type=int, help="zsaq: all; mrem: of each stage (default: 200; 120, decoders 60)")
        parser.add_argument("--batch-size", type=int, help="zsaq, mrem: sequences a step (default: 16; 32; decoders 8)")
        parser.add_argument(
            "--sequence-length",
            type=int,
            help="zsaq, mrem: tokens of the longest (default: 128; zsaq, encoder-decoders: 32; mrem, decoders: 256)",
        )
        parser.add_argument(
            "--learning-rate",
            type=float,
            help="zsaq, mrem: of the weights (default: by the bits, zsaq 3e-4 to 3e-5, mrem 3e-4 or 1e-4, decoders 1e-3 to "
            "1e-4)",
        )
        parser.add_argument("--rho", type=float, help="zsaq: radius of SAM, 0 for none (default: 0)")
        parser.add_argument("--generator", help="zsaq: noise, teacher, or a causal language model (default: auto)")
        parser.add_argument("--generator-every", type=int, help="zsaq: steps for one ascent, 0 for none (default: 0)")
        parser.add_argument("--start", help="zsaq, mrem: auto, compensated or rounding (default: auto)")
        parser.add_argument(
            "--state", metavar="FILE", help="zsaq, mrem: keep the training here; the same command goes on from it"
        )
        parser.add_argument(
            "--no-guard",
            dest="guard",
            action="store_false",
            default=None,
            help="zsaq: keep what training ends with, even where it is worse than rounding",
        )
        parser.add_argument("--stages", type=int, help="mrem: into how many the model is cut (default: 4)")
        parser.add_argument("--parallel", action="store_true", default=None, help="mrem: train all stages at once")
        parser.add_argument("--offload", action="store_true", default=None, help="mrem: float blocks stay on disk")
        parser.add_argument("--dry-run", action="store_true", help="zsaq: say what it would take, write nothing")
        parser.add_argument(
            "--modules-to-not-convert",
            nargs="+",
            metavar="NAME",
            help="layers that stay float, e.g. pooler encoder.layer.0",
        )
        parser.add_argument("--task", help="load the model for this task (default: as it was saved)")
        parser.add_argument("--dtype", help="of what stays float: float32, bfloat16, float16 (default: the checkpoint's)")
        parser.add_argument("--max-shard-size", default="5GB", help="largest file (default: 5GB)")
        add_common_arguments(parser)

    def execute(self, args: Namespace) -> dict[str, Any]:
        """Quantize, save beside the output folder, and rename."""
        _check_output(args.output)
        config = _quantization_config(args)
        if args.dry_run:
            return _plan(args, config)
        start = time.perf_counter()
        model = _load(args, config)
        if int(os.environ.get("RANK", "0")):  # of all processes under a launcher the first saves
            return {"saved": False}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{args.output.name}-", dir=args.output.parent))
        try:
            complete = staging / args.output.name
            model.save_pretrained(complete, max_shard_size=args.max_shard_size)
            has_tokenizer = _save_tokenizer(args.model, complete)
            complete.rename(args.output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return _result(args, model, has_tokenizer, time.perf_counter() - start)

    def show(self, result: dict[str, Any]) -> None:
        """One line a fact, what to type next, and what training won."""
        if "plan" in result:
            _show_plan(result["plan"])
        if "output" not in result:
            return
        sizes = result["bytes"]
        print(f"{result['layers']} layers in low bits, {result['seconds']:.1f} s")
        print(f"on disk {size_text(sizes['on_disk'])}, as float16 {size_text(sizes['as_float16'])}")
        if result["float_layers"]:
            print(f"float: {', '.join(result['float_layers'])}")
        if not result["tokenizer"]:
            print("no tokenizer was found beside the model, so none was saved")
        print(f"saved to {result['output']}; look into it: optimum-cli zsaq inspect {result['output']}")
        for line in result["won"]:
            print(line)

    def left(self, args: Namespace) -> str:
        """What an interrupted command leaves behind, for people."""
        if args.state is None or not any(Path(args.state).parent.glob(f"{Path(args.state).name}*")):
            return super().left(args)
        return f"the training is kept in {args.state}, run the same command again to go on"


def _add_layout(parser: ArgumentParser) -> None:
    """Which weights share a scale, and what stands beside it."""
    parser.add_argument("--granularity", default="auto", help=_GRANULARITY_HELP)
    parser.add_argument("--group-size", type=int, help="weights that share a scale, with groups (default: 64)")
    sign = parser.add_mutually_exclusive_group()
    sign.add_argument("--symmetric", action="store_true", default=None, help="weights without zero point or minimum")
    sign.add_argument(
        "--asymmetric", dest="symmetric", action="store_false", help="weights with one (default: groups alone)"
    )
    parser.add_argument("--ranges", help=_RANGES_HELP)
    parser.add_argument(
        "--smoothing",
        type=float,
        help="power of an input channel's size that moves into the weights first, 0 to 1 (default: 0.7 for decoders with "
        "static inputs, or with low-bit inputs and more than 6 bits; else 0)",
    )


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty; nothing is overwritten, choose another --output")


def _quantization_config(args: Namespace) -> Any:
    from ..integrations.configs import ALGORITHMS as CONFIGS
    from ..integrations.registration import register

    register()
    names = dict.fromkeys(name for names in _TRAINING.values() for name in names)
    training = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    _check_training(args.algorithm, training)
    if args.calibration_samples is not None:
        training["calibration_samples"] = args.calibration_samples
    return CONFIGS[args.algorithm](
        **training,
        weight_bits=args.weight_bits,
        embedding_bits=args.embedding_bits,
        activation_bits=args.activation_bits,
        granularity=args.granularity,
        group_size=args.group_size,
        symmetric=args.symmetric,
        **({} if args.ranges is None else {"ranges": args.ranges}),
        activations=args.activations,
        modules_to_not_convert=args.modules_to_not_convert,
        outliers=args.outliers,
        outlier_scope=args.outlier_scope,
        smoothing=args.smoothing,
        calibration_data=args.calibration_data,
        seed=args.seed,
    )


def _check_training(algorithm: str, given: Iterable[str]) -> None:
    foreign = [name for name in given if name not in _TRAINING[algorithm]]
    if foreign:
        options = ", ".join("--no-guard" if name == "guard" else f"--{name.replace('_', '-')}" for name in foreign)
        able = [name for name, known in _TRAINING.items() if set(foreign) <= set(known)] or ["zsaq"]
        does = "does none" if algorithm == "prequant" else "has no such option"
        raise ValueError(
            f"{options} is for training and --algorithm {algorithm} {does}; add --algorithm {' or '.join(able)}"
        )


def _plan(args: Namespace, config: Any) -> dict[str, Any]:
    from ..integrations.plan import plan_training

    if args.algorithm != "zsaq":
        raise ValueError(f"--dry-run is for --algorithm zsaq and got --algorithm {args.algorithm}; add --algorithm zsaq")
    return {"plan": plan_training(_load(args, None), config)}


def _show_plan(plan: dict[str, Any]) -> None:
    seconds = plan["seconds"]
    written = f"write {plan['sequences']:,} sequences" if plan["sequences"] else "write nothing"
    print(f"generator {plan['generator']}: {written}, {seconds['writing']:.0f} s")
    print(f"start {plan['start']}: {seconds['starting']:.0f} s")
    print(f"training {plan['steps']:,} steps: {seconds['training']:.0f} s")
    print(f"together {seconds['all'] / 60:.1f} min on this machine, peak memory {size_text(plan['peak_bytes'])}")
    print("nothing was written; leave out --dry-run to do it")


def _load(args: Namespace, config: Any) -> Any:
    import torch

    from ..integrations.tasks import load_config, model_class

    stored = load_config(args.model)
    if getattr(stored, "quantization_config", None) is not None:
        raise ValueError(f"{args.model} is quantized already; give --model the float model it was made from")
    options = {} if config is None else {"quantization_config": config}
    if args.dtype is not None:
        dtypes = ("float32", "bfloat16", "float16")
        if args.dtype not in dtypes:
            raise ValueError(f"--dtype {args.dtype} is unknown; use one of {dtypes}")
        options["dtype"] = getattr(torch, args.dtype)
    return model_class(stored, args.task).from_pretrained(args.model, **options)


def _save_tokenizer(model: str, folder: Path) -> bool:
    from ..integrations.tasks import load_tokenizer

    try:
        tokenizer = load_tokenizer(model)
    except ValueError:
        return False
    tokenizer.save_pretrained(folder)
    return True


def _result(args: Namespace, model: Any, has_tokenizer: bool, seconds: float) -> dict[str, Any]:
    from ..integrations.closing import won_lines
    from ..integrations.reconstruct import won_lines as reconstructed_lines
    from ..size import measure_size
    from ..surgery import low_bit_layers

    size, data = measure_size(model), model.config.quantization_config.recipe["calibration"] or {}
    on_disk = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    return {
        "output": str(args.output),
        "algorithm": args.algorithm,
        "layers": len(list(low_bit_layers(model))),
        "float_layers": model.config.quantization_config.modules["float"],
        "tokenizer": has_tokenizer,
        "bytes": {**size.bytes, "on_disk": on_disk, "as_float16": 2 * size.parameters},
        "won": (reconstructed_lines if args.algorithm == "mrem" else won_lines)(data) if "won" in data else [],
        "seconds": seconds,
    }
