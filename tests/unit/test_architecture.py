"""Packages import downward only, imports are acyclic, and light modules load no heavy library."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import raykd

SOURCE = Path(raykd.__file__).parent
# The packages and modules that each may import, besides itself and EVERYWHERE.
EVERYWHERE = {"errors", "compat", "display"}
ALLOWED: dict[str, set[str]] = {
    "display": set(),
    "errors": set(),
    "compat": set(),
    "storage": set(),
    "runtime": {"storage"},
    "config": {"storage"},
    "cluster": {"runtime", "config", "storage"},
    "identity": {"data", "config", "storage"},
    "data": {"storage", "config", "identity"},
    "models": {"storage", "config", "data"},
    "teacher": {"cluster", "data", "models", "config", "runtime", "storage", "identity"},
    "training": {"cluster", "data", "models", "config", "runtime", "storage", "identity"},
    "tuning": {"training", "teacher", "cluster", "data", "models", "config", "runtime", "storage", "identity"},
    "evaluation": {"training", "teacher", "cluster", "data", "models", "config", "runtime", "storage", "identity"},
    "analysis": {"data", "config", "storage"},
    "report": {"analysis", "training", "data", "config", "runtime", "storage"},
    "planning": {"identity", "tuning", "training", "models", "data", "cluster", "config", "runtime", "storage"},
    "demo": {"models", "data", "config", "storage"},
}
HEAVY = {"torch", "transformers", "peft", "deepspeed", "ray", "vllm"}
LIGHT_PACKAGES = ("storage", "runtime", "config", "analysis", "report", "planning")
LIGHT_MODULES = (
    "cli",
    "identity",
    "compat",
    "errors",
    "display",
    "cluster.resources",
    "cluster.nodes",
    "cluster.gpus",
    "cluster.engine",
)


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(file): file for file in SOURCE.rglob("*.py") if name_of(file)}


def imported(file: Path) -> set[str]:
    """The modules of raykd that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "raykd":
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix("raykd.")
                module = full if full in MODULES else str(node.module).removeprefix("raykd").removeprefix(".")
                found |= {module} - {""}
    return found


def test_packages_import_downward_only():
    upward = [
        f"{module} imports {other}"
        for module, file in MODULES.items()
        for other in imported(file)
        if (package := module.split(".")[0]) in ALLOWED
        and other.split(".")[0] != package
        and other.split(".")[0] not in ALLOWED[package] | EVERYWHERE
    ]
    assert upward == []


def test_every_package_has_its_allowed_imports():
    packages = {file.parent.name for file in SOURCE.glob("*/__init__.py")}
    assert packages == set(ALLOWED) - {"identity", *EVERYWHERE} | {"pipeline"}


def test_imports_are_acyclic():
    graph = {module: imported(file) for module, file in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_module_imports_demo_scripts():
    users = [module for module, file in MODULES.items() if any(each.startswith("demo") for each in imported(file))]
    assert [module for module in users if not module.startswith("demo")] == []


def test_light_modules_load_no_heavy_library():
    light = {name for name in MODULES if name.split(".")[0] in LIGHT_PACKAGES or name in LIGHT_MODULES}
    # `raykd prompts` renders with the models' tokenizers.
    light -= {"planning.preview"}
    code = f"""
import importlib, sys
for name in {sorted(light)!r}:
    importlib.import_module("raykd." + name)
    if loaded := sorted({HEAVY!r} & set(sys.modules)):
        sys.exit(f"{{name}} loads {{', '.join(loaded)}}")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_every_file_has_docstring_and_at_most_400_lines():
    for file in SOURCE.rglob("*.py"):
        text = file.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{file} has no docstring"
        assert len(text.splitlines()) <= 400, f"{file} has more than 400 lines"


def test_every_package_docstring_names_modules_to_begin_with():
    for file in SOURCE.glob("*/__init__.py"):
        first, _, rest = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")
        assert ": " in first and "Begin with `" in rest, file
        named = [name for name in re.findall(r"`([\w.]+)`", rest) if not (file.parent / name).exists()]
        assert [name for name in named if not (file.parent / f"{name}.py").exists()] == [], file


def test_every_requirement_is_pinned_exactly():
    for file in (SOURCE.parents[1] / "requirements").glob("*.txt"):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith(("#", "--"))]
        assert len(lines) > 50
        assert [line for line in lines if "==" not in line.split(";")[0]] == [], file


def test_only_tune_error_records_are_unpickled():
    loads = ("pickle.load", "torch.load(", "joblib.load", "yaml.load(", "yaml.unsafe_load")
    found = [
        file.name
        for file in SOURCE.rglob("*.py")
        for line in file.read_text().splitlines()
        if any(word in line for word in loads) and "weights_only=True" not in line
    ]
    assert found == ["callbacks.py"]


def test_test_module_names_are_unique():
    # pytest imports test modules by name: a second module of the same name fails when both are collected.
    names = sorted(file.name for file in SOURCE.parents[1].glob("tests/**/*.py"))
    assert sorted(set(names)) == names


def test_output_passes_through_display():
    """`print` and rich's own console would show the control characters of text from outside."""
    printing = {
        module
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console")
    }
    # A thread of `storage` reports a lost lease, and `storage` cannot import `runtime`.
    assert {module for module in printing if not module.startswith("demo")} == {"storage.lease"}
