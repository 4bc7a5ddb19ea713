"""`optimum-cli zsaq inspect`: what a checkpoint holds and will need, without loading it."""

from argparse import ArgumentParser, Namespace
from typing import Any

from .common import Command, add_common_arguments, size_text, table


_PARTS = {
    "codes": "codes",
    "scales": "scales, zero points",
    "outliers": "outlier positions and residuals",
    "float": "what stays float",
    "markers": "markers (a byte a row)",
    "headers": "file headers",
}


class InspectCommand(Command):
    """Show layers, bits and bytes of a checkpoint."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("model", help="folder or Hub id of a low-bit (or float) checkpoint")
        parser.add_argument("--all", action="store_true", help="a row for every layer, repeated blocks too")
        add_common_arguments(parser)

    def execute(self, args: Namespace) -> dict[str, Any]:
        """Read config and headers."""
        from transformers.utils.logging import set_verbosity_error

        from ..report.inspection import inspect_checkpoint

        set_verbosity_error()
        return inspect_checkpoint(args.model)

    def show(self, result: dict[str, Any]) -> None:
        """Layers, then bytes on disk, then memory."""
        from ..report.inspection import group_layers

        print(f"{result['model']}: {result['architecture']}, {_state(result)}\n")
        layers = [{**layer, "count": 1} for layer in result["layers"]]
        rows = layers if self.args.all else group_layers(result["layers"])
        print(table(("layer", "n", "shape", "weights", "inputs", "outliers", "kernel", "bytes"), map(_row, rows)))
        if result["dynamic"] and result["dynamic"] < 1.0:
            share = f"{100 * result['dynamic']:.1f} %"
            print(f"\n{share} of the multiply-adds have inputs that one stored range cannot hold: they have one a token")
        print("\non disk")
        sizes = result["bytes"]
        for part, title in _PARTS.items():
            if sizes.get(part):
                print(f"  {title:32} {sizes[part]:>15,}")
        print(f"  {'all files':32} {sizes['on_disk']:>15,}  ({sizes['ratio']:.3f} x what codes, scales and floats need)")
        memory = result["memory"]
        print("\nmemory of the weights, before loading (estimate)")
        print(f"  runtime='small': {size_text(memory['small'])}, runtime='fast': {size_text(memory['fast'])}")
        print(f"  largest dense weight that the reference kernel makes in a call: {size_text(memory['largest_call'])}")


def _state(result: dict[str, Any]) -> str:
    if result["packed"] is None:
        return "float"
    return f"{'packed' if result['packed'] else 'fake-quantized'}, algorithm {result['algorithm']}"


def _row(layer: dict[str, Any]) -> tuple:
    weights = "float" if layer["bits"] is None else f"W{layer['bits']} {layer['granularity']}"
    if layer["tied"]:
        weights += ", tied"
    shape = "x".join(map(str, layer["shape"]))
    outliers = layer["outliers"] or None
    return layer["name"], layer["count"], shape, weights, layer["inputs"], outliers, layer["kernel"], layer["bytes"]
