"""The loss around a model trained by LSQ-QAT and around one trained by SQuAT: a cell of the study `squat` as a figure.

python examples/study/squat_landscape.py --data DATA --plot docs/figures/squat_landscape.png

Both are trained anew (SST-2, W2A8E2 with a scale a row, seed 0, about ten minutes of a core).
"""

import argparse
from pathlib import Path
from typing import Any

import squat
from zsaq import fields


TASK, SCHEME, SEED = "sst2", "w2a8e2-row", 0
METHODS = {"LSQ-QAT": "lsq", "SQuAT": "squat"}
REACH, POINTS, SENTENCES = 0.5, 15, 96


def trained(method: str, data: Path) -> Any:
    """The model of a cell."""
    train, _ = squat.sentences(TASK, data)
    model = squat.load(squat.float_model(TASK, SEED, data), **fields(SCHEME))
    run = squat.trainer(model, train, data, SEED, **{**squat.RECIPE, "rho": squat.RHO, **squat.METHODS[method]})
    run.train()
    return run.model.eval()


def main() -> None:
    from optimum_zsaq.report.landscape import draw_landscapes, loss_landscape

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the study's data and models")
    parser.add_argument("--plot", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()

    def loss(model: Any, batch: dict[str, Any]) -> tuple[Any, int]:
        return model(**batch).loss, len(batch["labels"])

    _, dev = squat.sentences(TASK, args.data)
    batches = squat.batches(dev[:SENTENCES], args.data, 48)
    found = {
        title: loss_landscape(trained(method, args.data), batches, loss, REACH, POINTS) for title, method in METHODS.items()
    }
    draw_landscapes(found, args.plot)


if __name__ == "__main__":
    main()
