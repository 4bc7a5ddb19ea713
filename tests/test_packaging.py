"""What is installed: the package, its alias, the command, and nothing in Optimum's own name spaces."""

import importlib
import os
import pickle
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import optimum_zsaq


ROOT = Path(__file__).parent.parent


def test_alias_is_the_same_modules():
    import optimum.zsaq
    import optimum.zsaq.integrations.configs
    import optimum.zsaq.surgery
    from optimum.zsaq import PreQuantConfig

    assert optimum.zsaq is optimum_zsaq
    assert optimum.zsaq.surgery is importlib.import_module("optimum_zsaq.surgery")
    assert optimum.zsaq.surgery.__spec__.name == "optimum_zsaq.surgery"
    assert PreQuantConfig is optimum_zsaq.PreQuantConfig
    assert pickle.loads(pickle.dumps(PreQuantConfig(weight_bits=3))) == PreQuantConfig(weight_bits=3)


def test_alias_of_a_module_that_does_not_exist():
    with pytest.raises(ModuleNotFoundError, match=r"optimum\.zsaq\.nothing"):
        importlib.import_module("optimum.zsaq.nothing")


def test_public_names_exist_and_are_documented():
    docs = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    assert optimum_zsaq.__all__ == sorted(optimum_zsaq.__all__)
    for name in optimum_zsaq.__all__:
        assert getattr(optimum_zsaq, name).__doc__, name
        assert name in docs, f"{name} is not in the docs"


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has"):
        optimum_zsaq.nothing  # noqa: B018


def test_entry_point_and_version():
    (entry,) = [e for e in metadata.entry_points(group="torch.backends") if e.name == "optimum_zsaq"]
    assert callable(entry.load())
    assert metadata.version("optimum-zsaq") == optimum_zsaq.__version__


def test_requirements_have_upper_bounds():
    required = [line for line in metadata.requires("optimum-zsaq") if "extra" not in line]
    assert len(required) >= 6
    assert all("<" in line for line in required), required


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools writes build/ and *.egg-info beside pyproject.toml
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_content(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "optimum_zsaq/py.typed" in names
    assert "optimum_zsaq/demo/model/model.safetensors" in names
    assert "optimum/zsaq/__init__.py" in names
    assert "optimum/commands/register/register_zsaq.py" in names
    foreign = {"optimum/__init__.py", "optimum/commands/__init__.py", "optimum/commands/register/__init__.py"}
    assert not foreign & set(names)
    assert any(name.endswith("licenses/docs/LICENSE") for name in names)
    tracked = subprocess.run(["git", "ls-files", "optimum_zsaq"], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = [name for name in tracked.stdout.split() if name.endswith(".py") and "_namespace" not in name]
    assert set(modules) <= set(names)
    demo = sum(i.compress_size for i in zipfile.ZipFile(wheel).infolist() if i.filename.startswith("optimum_zsaq/demo/"))
    assert demo <= 4 * 2**20


def test_wheel_works_when_installed(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    code = """
import optimum.zsaq, optimum_zsaq
from optimum.zsaq import pack
assert optimum.zsaq is optimum_zsaq
print(optimum_zsaq.__file__)"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
