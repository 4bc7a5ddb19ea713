"""What a finished training without data tells its user: on the terminal and on the model card, from its recipe alone."""

from typing import Any


ROUNDED, TRAINED = "rounded", "trained"


def won_lines(data: dict[str, Any]) -> list[str]:
    """A line a kind of input, then which state was kept and why, and what it took.

    Args:
        data (`dict`): what `zero_shot.train_on_load` returned.
    """
    took = f"{data['count']:,} generated sequences, {data['seconds']} s; all figures are of inputs that were not trained on"
    return [*(_probe_line(data, name) for name in data["won"][ROUNDED]), kept_line(data), took]


def _probe_line(data: dict[str, Any], name: str) -> str:
    won, kept = data["won"], data["kept"]
    figure = "output" if "output" in won[ROUNDED][name] else "discrepancy"
    before, after = won[ROUNDED][name], won[kept][name]
    parts = [f"distance from the float model {_number(before[figure])} rounded, {_number(after[figure])} now"]
    if "agreement" in before:
        parts.append(f"equal answers {100 * before['agreement']:.1f} %, now {100 * after['agreement']:.1f} %")
    return f"{name}: {'; '.join(parts)}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def kept_line(data: dict[str, Any]) -> str:
    """Which state is returned, and what was wrong with the ones after it."""
    kept = data["kept"]
    if kept == TRAINED:
        worse = data["worse"].get(kept)
        return f"kept: the trained model{f', which is worse than rounding on {_listed(worse)}' if worse else ''}"
    why = [f"training stopped ({data['stopped']})"] if "stopped" in data else []
    why += [f"{stage} was worse than rounding on {_listed(names)}" for stage, names in data["worse"].items() if names]
    because = "; ".join(why) or "no other state was clearly nearer to the float model"
    return f"kept: {'rounding, nothing of the training' if kept == ROUNDED else f'the state {kept!r}'}, because {because}"


def _listed(names: list[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)
