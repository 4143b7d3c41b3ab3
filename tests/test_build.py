"""What an installation must hold, whatever the library does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kvstrata
from kvstrata import _core

PACKAGE = Path(kvstrata.__file__).parent
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"accelerate", "cachebox", "gguf", "torch", "transformers"}


def public(names: object) -> set[str]:
    return {name for name in vars(names) if not name.startswith("_")}


def declared(body: list[ast.stmt]) -> set[str]:
    """The names that a stub gives to functions, classes and variables."""
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)} | {
        node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_the_native_module_lies_in_the_package() -> None:
    assert Path(str(_core.__file__)).parent == PACKAGE


def test_the_version_is_the_one_of_the_project() -> None:
    assert kvstrata.__version__ == PROJECT["version"]


def test_the_plain_installation_needs_no_heavy_package() -> None:
    plain = {re.split(r"[^\w-]", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert "numpy" in plain
    assert not plain & HEAVY


def test_importing_the_package_imports_no_heavy_package() -> None:
    program = f"import sys, kvstrata, kvstrata.cli; print(sorted({HEAVY!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_the_cores_folders_include_only_those_above_them_and_python_only_in_the_last() -> None:
    folders = ["base", "codecs", "policy", "memory", "store", "bindings"]
    for number, folder in enumerate(folders):
        for source in (ROOT / "core" / folder).iterdir():
            included = re.findall(r'#include ["<]([^">]+)', source.read_text())
            others = {name.split("/")[0] for name in included if "/" in name} & set(folders)
            assert others <= set(folders[:number]), source
            assert folder == "bindings" or not any("nanobind" in name or "Python.h" in name for name in included), (
                source
            )


def test_the_type_stub_names_what_the_native_module_has() -> None:
    stub = ast.parse((PACKAGE / "_core.pyi").read_text())
    assert public(_core) - declared(stub.body) == set()
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            assert public(getattr(_core, node.name)) - declared(node.body) == set(), node.name


def test_type_checkers_take_the_types_of_the_package() -> None:
    assert (PACKAGE / "py.typed").is_file()
