"""Run a study, or go on with it.

    python examples/study/run.py prequant --data /path/to/data --results docs/results

Finished cells are in RESULTS/STUDY.jsonl, one line each, and are skipped; Ctrl-C loses only what is running. Then
`tables.py` writes the tables.
"""

import argparse
import sys
from pathlib import Path

from runner import run_study


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="name of a study: a module beside this file, such as prequant")
    parser.add_argument("--data", type=Path, required=True, help="folder with the study's data and models")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSONL files")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side, one thread each (default: 2)")
    args = parser.parse_args()
    if not (Path(__file__).parent / f"{args.study}.py").is_file():
        parser.error(f"there is no study {args.study!r} beside {Path(__file__).name}")
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder")
    try:
        failed = run_study(args.study, args.data, args.results / f"{args.study}.jsonl", args.workers)
    except KeyboardInterrupt:
        print("interrupted; finished cells are kept, start again to go on", file=sys.stderr)
        return 130
    if failed:
        print(f"{failed} cell(s) failed; start again to retry them", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
