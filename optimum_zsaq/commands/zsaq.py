"""`optimum-cli zsaq`: the command that holds the others."""

from argparse import RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .bench import BenchCommand
from .demo import DemoCommand
from .evaluate import EvaluateCommand
from .inspect import InspectCommand
from .quantize import QuantizeCommand


class ZSAQCommand(BaseOptimumCLICommand):
    """Low-bit language models: quantize, evaluate, inspect, bench, demo."""

    COMMAND = CommandInfo("zsaq", help="Low-bit language models: quantize, evaluate, inspect, bench, demo.")
    SUBCOMMANDS = (
        CommandInfo("quantize", "Quantize a model and save it.", QuantizeCommand, RawDescriptionHelpFormatter),
        CommandInfo(
            "evaluate", "Measure a model, low-bit or float, on a task.", EvaluateCommand, RawDescriptionHelpFormatter
        ),
        CommandInfo("inspect", "Show layers, bits and bytes of a checkpoint.", InspectCommand, RawDescriptionHelpFormatter),
        CommandInfo("bench", "Time a model against other packages.", BenchCommand, RawDescriptionHelpFormatter),
        CommandInfo("demo", "Quantize a small language model and compare.", DemoCommand, RawDescriptionHelpFormatter),
    )
