"""The house: imports go down only, and the lower floors load no heavy library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import raykd

SOURCE = Path(raykd.__file__).parent
FLOORS = [
    {"config", "tree", "engine", "sections", "space", "mistakes", "records", "storage", "strategies", "demo"}
    | {"location", "faults", "run_file"},
    {
        "prompts",
        "answers",
        "statistics",
        "placement",
        "progress",
        "signals",
        "adapters",
        "checkpoints",
        "targets",
        "losses",
        "comparison",
        "protocols",
        "spans",
        "effects",
        "measured",
        "completions",
        "selection",
        "job",
        "test_top_n",
        "table",
        "metrics",
        "shapes",
        "memory",
        "spent",
        "lease",
        "lock",
        "nodes",
        "rates",
        "budget",
        "nearest",
        "fitting",
        "identity",
    },
    {
        "attention",
        "heads",
        "models",
        "problems",
        "teacher",
        "generate",
        "student",
        "train",
        "evaluate",
        "rollout",
        "validation",
        "cluster",
        "watch",
        "hub_tokens",
        "replica",
        "endpoint",
        "packed",
        "serving",
    },
    {
        "variants",
        "study",
        "search",
        "tracking",
        "sweep",
        "scoreboard",
        "rounds",
        "trial",
        "results",
        "report_cost",
        "report_figures",
        "report_panels",
        "report_svg",
        "report_attention",
        "report_sweep",
        "report_tables",
        "report_text",
        "report",
        "journal",
        "harness",
        "preview",
        "needs",
        "attention_results",
        "disagreements",
        "pipeline",
        "plan",
        "cli",
        "scaffold",
        "__main__",
    },
]
# Sideways on the floor of the heavy libraries: to the modules that others build on.
SIDEWAYS = {"cluster", "watch", "heads", "student", "teacher", "replica", "packed", "models", "generate", "evaluate"}
SIDEWAYS |= {"validation", "endpoint"}
HEAVY = ("torch", "transformers", "peft", "deepspeed", "ray", "vllm")
LIGHT = [*sorted((FLOORS[0] | FLOORS[1]) - {"losses"}), "report", "cli"]


def floor_of(module: str) -> int:
    return next(number for number, modules in enumerate(FLOORS) if module in modules)


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "raykd":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raykd."):
            found.add(str(node.module).split(".")[1])
    return found - {"__version__"}


def test_every_module_has_a_floor():
    modules = {file.stem for file in SOURCE.glob("*.py")} - {"__init__"} | {"demo"}
    assert modules == set().union(*FLOORS)
    assert sum(len(floor) for floor in FLOORS) == len(modules)


@pytest.mark.parametrize("module", sorted(set().union(*FLOORS) - {"demo"}))
def test_imports_go_down(module: str):
    floor = floor_of(module)
    for other in imported(SOURCE / f"{module}.py"):
        below = floor_of(other) < floor
        sideways = floor_of(other) == floor and (floor in (0, 1, 3) or other in SIDEWAYS)
        assert below or sideways, f"{module} (floor {floor}) imports {other} (floor {floor_of(other)})"


def test_the_demonstration_is_built_on_the_vocabulary_and_pure_functions_only():
    for file in (SOURCE / "demo").glob("*.py"):
        others = imported(file) - {"demo"}
        assert all(floor_of(other) <= 1 for other in others), f"{file.name} imports {others}"


def test_light_modules_load_no_heavy_library():
    """One after the other in one interpreter, until one does."""
    code = f"""
import importlib, sys
for module in {LIGHT!r}:
    importlib.import_module("raykd." + module)
    if heavy := sorted(set(sys.modules) & set({HEAVY!r})):
        sys.exit(f"{{module}} loads {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_file_says_first_what_it_owns_and_holds_one_thing():
    for file in SOURCE.rglob("*.py"):
        text = file.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{file} has no docstring"
        assert len(text.splitlines()) <= 400, f"{file} holds more than one thing"


def test_every_package_is_pinned_exactly():
    for file in (SOURCE.parents[1] / "requirements").glob("*.txt"):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith(("#", "--"))]
        assert len(lines) > 50
        assert [line for line in lines if "==" not in line.split(";")[0]] == [], file


def test_nothing_but_tunes_own_record_of_an_error_is_unpickled():
    loads = ("pickle.load", "torch.load(", "joblib.load", "yaml.load(", "yaml.unsafe_load")
    found = [
        file.name
        for file in SOURCE.rglob("*.py")
        for line in file.read_text().splitlines()
        if any(word in line for word in loads) and "weights_only=True" not in line
    ]
    assert found == ["sweep.py"]


def test_no_two_test_modules_share_a_name():
    # pytest imports them by name alone: one of the two would fail to be collected, and only when both are asked for.
    names = sorted(file.name for file in SOURCE.parents[1].glob("tests/**/*.py"))
    assert sorted(set(names)) == names
