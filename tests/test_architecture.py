"""The floors of the package and the rules of its code, read from the sources without importing them."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimum_zsaq
from optimum_zsaq.kernels import KERNELS


ROOT = Path(optimum_zsaq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = {
    "native": 0,
    "spec": 0,
    "ops": 1,
    "kernels": 1,
    "layers": 2,
    "kinds": 3,
    "surgery": 3,
    "size": 4,
    "algorithms": 4,
    "integrations": 5,
    "trainers": 5,
    "export": 5,
    "report": 5,
    "commands": 6,
}
SIDEWAYS = {  # imports within one floor
    ("kernels", "ops"),
    ("surgery", "kinds"),
    ("report", "integrations"),
    ("trainers", "integrations"),
}
STANDALONE = {"__init__", "autoload", "demo", "_namespace"}  # no floor: package names, start-up, data
ARCHITECTURES = set(
    "albert bart bert bloom codegen deberta distilbert electra falcon gemma gpt gpt2 gptj gptneo llama marian mbart "
    "mistral mixtral mpt opt pegasus phi qwen qwen2 qwen3 roberta t5 mt5 whisper xlnet".split()
)
FORBIDDEN = {"qweight", "manager", "helper", "helpers"}


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: "ops", "surgery", "__init__"."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def file_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The absolute names that nodes import: "torch.nn", "optimum_zsaq.ops.affine", "optimum_zsaq.ops.quantize"."""
    package = ("optimum_zsaq", *path.relative_to(ROOT).parts[:-1])
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def every_import(path: Path) -> set[str]:
    """Wherever they stand: in functions too."""
    return set(imported(path, ast.walk(parse(path))))


def low(path: Path) -> bool:
    return FLOORS.get(part_of(path), 9) <= 4


LOW_FILES = [path for path in FILES if low(path)]


def test_every_file_has_a_floor():
    assert {part_of(path) for path in FILES} <= {*FLOORS, *STANDALONE}
    assert {"spec", "ops", "kernels", "layers", "surgery", "algorithms"} <= {part_of(path) for path in FILES}


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in FLOORS], ids=file_id)
def test_imports_point_down(path):
    own = part_of(path)
    for name in every_import(path):
        if not name.startswith("optimum_zsaq.") or name == "optimum_zsaq.__version__":
            continue
        other = name.split(".")[1]
        assert other in FLOORS, f"{name}: the parts above are reached through no import"
        allowed = other == own or FLOORS[other] < FLOORS[own] or (own, other) in SIDEWAYS
        assert allowed, f"floor {FLOORS[own]} ({own}) imports {name} of floor {FLOORS[other]}"


@pytest.mark.parametrize("path", LOW_FILES, ids=file_id)
def test_lower_floors_know_torch_and_the_standard_library_alone(path):
    roots = {name.split(".")[0] for name in every_import(path)}
    allowed = {"torch", "optimum_zsaq", *sys.stdlib_module_names}
    assert roots <= (allowed | {"triton"} if path.name == "triton_matmul.py" else allowed)


@pytest.mark.parametrize("name", ["autoload.py", "__init__.py"])
def test_start_up_imports_the_standard_library_alone(name):
    roots = {name.split(".")[0] for name in every_import(ROOT / name)}
    assert roots <= sys.stdlib_module_names


def test_no_import_cycle():
    """Among module-level imports; a package's `__init__` is a module like any other."""
    modules = {
        ".".join(("optimum_zsaq", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p for p in FILES
    }
    graph = {}
    for name, path in modules.items():
        targets = {n if n in modules else n.rpartition(".")[0] for n in imported(path, iter(parse(path).body))}
        graph[name] = {target for target in targets if target in modules and target != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def documentation(tree: ast.Module) -> set[int]:
    """The ids of the nodes that are docstrings."""
    owners = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    bodies = (n.body[0] for n in owners if n.body and isinstance(n.body[0], ast.Expr))
    return {id(first.value) for first in bodies if isinstance(first.value, ast.Constant)}


def words(tree: ast.Module, strings: bool) -> Iterator[tuple[int, str]]:
    """(line, word) of all names in the code, split at underscores and capitals; with those of strings that are no
    docstrings."""
    skip = documentation(tree)
    for node in ast.walk(tree):
        fields = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
        if isinstance(node, ast.Constant):
            fields = [node.value] if strings and isinstance(node.value, str) and id(node) not in skip else []
        for text in fields:
            split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
            for word in re.findall(r"[a-z0-9]+", f"{split} {text}".lower()):
                yield getattr(node, "lineno", 0), word


def test_words_are_seen():
    """The two checks below rest on it."""
    source = '"""bert"""\nclass GPT2Layer:\n    manager_of = "opt"\n    def f(self, qweight: "T5") -> None: ...\n'
    found = {word for _, word in words(ast.parse(source), strings=True)}
    assert {"gpt2layer", "manager", "opt", "qweight", "t5"} <= found
    assert "bert" not in found
    assert "opt" not in {word for _, word in words(ast.parse(source), strings=False)}


@pytest.mark.parametrize("path", LOW_FILES, ids=file_id)
def test_lower_floors_name_no_architecture(path):
    assert not [(line, word) for line, word in words(parse(path), strings=True) if word in ARCHITECTURES]


@pytest.mark.parametrize("path", FILES, ids=file_id)
class TestEveryFile:
    def test_forbidden_names(self, path):
        """`qweight` is taken for the weight by PEFT; the others say nothing. Imports and operators are named by others."""
        tree = parse(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                node.module = None
                for alias in node.names:
                    alias.name = ""
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.ops."):
                node.attr = ""
        assert not [(line, word) for line, word in words(tree, strings=False) if word in FORBIDDEN]
        assert not {*FORBIDDEN, "util", "utils"} & set(path.stem.split("_"))

    def test_no_star_import(self, path):
        assert not [name for name in every_import(path) if name.endswith(".*")]

    def test_no_assert(self, path):
        """They vanish under `python -O`; a caller's fault gets an exception with a message."""
        assert not [node.lineno for node in ast.walk(parse(path)) if isinstance(node, ast.Assert)]

    def test_every_exception_has_a_message(self, path):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Raise) and node.exc is not None:
                bare = isinstance(node.exc, ast.Name) and node.exc.id[0].isupper()
                empty = isinstance(node.exc, ast.Call) and not node.exc.args and not node.exc.keywords
                assert not bare, f"line {node.lineno}: raise {ast.unparse(node.exc)}"
                assert not empty, f"line {node.lineno}: raise {ast.unparse(node.exc)}"

    def test_sizes(self, path):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"

    def test_says_what_it_does(self, path):
        """A file starts with a docstring; one that only marks a package may be empty."""
        tree = parse(path)
        assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_public_names_are_documented(path):
    """Every class and function without an underscore, and every method of such a class, says what it does."""
    for node in parse(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_no_class_or_function_name_has_a_width_in_it():
    """Bit-width, symmetry and granularity are data, never names; a kernel has the name of the arithmetic it computes in."""
    for path in LOW_FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                name = re.sub("|".join(KERNELS), "", node.name.lower())
                assert not re.search(r"[2-8]_?bit|int[2-8]|w[2-8]", name), f"{file_id(path)}: {node.name}"
