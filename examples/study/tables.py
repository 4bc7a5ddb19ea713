"""Write a study's tables into a document, between `<!-- table:NAME -->` and `<!-- /table -->`.

    python examples/study/tables.py prequant --results docs/results --write docs/methods/prequant.md

Without `--write` all tables are printed. `--check` changes nothing and fails if the document is not up to date. A document
that holds the tables of several studies is written with all of them: `tables.py language_models language_model_peers ...`.
"""

import argparse
import importlib
import re
import sys
from pathlib import Path

from runner import read_results


_BLOCK = re.compile(r"(<!-- table:(?P<name>[^ ]*) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)


def fill(text: str, tables: dict[str, str]) -> str:
    """The text with each marked block replaced by the table of its name.

    Raises:
        ValueError: a marker without an end, without a table, or no marker for a table.
    """
    blocks = list(_BLOCK.finditer(text))
    if len(blocks) != text.count("<!-- table:") or any("<!-- table:" in block["body"] for block in blocks):
        raise ValueError("a <!-- table:NAME --> has no <!-- /table --> after it; add the end marker")
    names = {block["name"] for block in blocks}
    if names != set(tables):
        raise ValueError(
            f"the document marks tables {sorted(names - set(tables))} that the study does not make, and lacks markers for "
            f"{sorted(set(tables) - names)}; write <!-- table:NAME --> and <!-- /table --> for each of {sorted(tables)}"
        )
    return _BLOCK.sub(lambda block: f"{block[1]}{tables[block['name']].strip()}\n{block[4]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="study", help="a module beside this file, such as prequant")
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSONL files")
    parser.add_argument("--write", type=Path, help="Markdown file with markers")
    parser.add_argument("--check", action="store_true", help="only say whether --write's file is up to date")
    args = parser.parse_args()
    tables: dict[str, str] = {}
    for study in args.studies:
        found = importlib.import_module(study).tables(read_results(args.results / f"{study}.jsonl"))
        if twice := sorted(set(tables) & set(found)):
            parser.error(f"two of {args.studies} make the tables {twice}; write them into documents of their own")
        tables |= found
    if args.write is None:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables.items()))
        return 0
    old = args.write.read_text(encoding="utf-8")
    new = fill(old, tables)
    if args.check and new != old:
        print(f"{args.write} is not what {args.results} says; run this without --check", file=sys.stderr)
        return 1
    if new != old:
        args.write.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
