"""Gives `optimum-cli` its `zsaq` command. Optimum imports this file at every call of its CLI, so it must stay light."""

from optimum_zsaq.commands import ZSAQCommand


REGISTER_COMMANDS = [ZSAQCommand]
