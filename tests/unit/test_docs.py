"""Documents: links resolve, commands parse, experiments load, generated pages are current."""

import importlib.util
import io
import re
import shlex
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from raykd.cli import _parser
from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.planning.cost import Rates
from raykd.planning.tables import plan_tables
from raykd.scaffold import shipped_configs
from raykd.storage import paths

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "cluster/README.md", ROOT / "src/raykd/demo/README.md"]
)
MODELS = {"teacher": {"model": "a"}, "student": {"model": "b"}}
FENCE = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:\s*(?:\S*/)?raykd|.* -- raykd|.*python (?:\S*/)?rayjobs/run\.py) ([a-z-].*)$")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of each `raykd` command in the page's fenced blocks."""
    found = []
    for language, block in FENCE.findall(page.read_text("utf-8")):
        if language:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if match := COMMAND.match(line):
                found.append(shlex.split(match[1], comments=True))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path):
    text = FENCE.sub("", page.read_text("utf-8"))
    if page == ROOT / "README.md":
        # A package index shows this page without the linked files.
        assert not re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)\)", text), "a relative link"
        text = re.sub(r"https://(github\.com|raw\.githubusercontent\.com)/raykd/raykd/(blob/)?main/", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path):
    configs = shipped_configs()
    for words in commands(page):
        options, more = _parser().parse_known_args(words)
        assert not [word for word in more if "=" not in word or word.startswith("-")], words
        file = getattr(options, "file", "mine.yaml")
        is_shipped = file in configs or (ROOT / file).is_file()
        assert is_shipped or re.match(r"(mine\.yaml|storage/|FILE|FOLDER)", file), f"{file}: no such configuration"


def test_command_parser_finds_commands():
    assert len([words for page in PAGES for words in commands(page)]) >= 15


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_experiments_load(page: Path):
    for language, block in FENCE.findall(page.read_text("utf-8")):
        if language != "yaml":
            continue
        tree = yaml.safe_load(block)
        if not isinstance(tree, dict) or not set(tree) & set(Experiment.model_fields):
            continue
        tree = {"name": "documented"} | MODELS | tree
        for section in MODELS:
            tree[section] = MODELS[section] | tree[section]
        assert Experiment.model_validate(tree)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_report_image_is_small():
    assert (ROOT / "docs/images/report.png").stat().st_size < 300_000


def test_configuration_page_is_current():
    spec = importlib.util.spec_from_file_location("config_docs", ROOT / "tools" / "config_docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text("utf-8") == module.page(), "docs/configuration.md is stale: run `make docs`"


def test_configuration_sections_have_anchors():
    page = ROOT / "docs" / "configuration.md"
    assert {"dataset", "teacherengine", "targetsrollout", "sweepspacepath"} <= anchors(page)


@pytest.mark.parametrize(
    "layout", [paths.ExperimentPaths, paths.TrialPaths, paths.RoundPaths], ids=lambda each: each.__name__
)
def test_architecture_names_every_path(layout: type):
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    (tree,) = [block for _, block in FENCE.findall(page) if block.startswith("<storage>/")]
    properties = [name for name, value in vars(layout).items() if isinstance(value, property)]
    names = {getattr(layout(Path("folder")), name).name for name in properties}
    assert len(names) >= 3
    assert [name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", tree)] == []


def test_stage_table_matches_plan_output():
    page = (ROOT / "docs" / "clusters.md").read_text("utf-8")
    tables, _ = plan_tables(load_experiment(ROOT / "configs" / "quickstart.yaml"), None, Rates())
    (stages,) = [table for table in tables if str(table.title) == "Stages"]
    output = io.StringIO()
    console = Console(width=120, file=output)
    console.print(stages)
    printed = [line.rstrip() for line in output.getvalue().splitlines() if line.strip()]
    assert len(printed) == 7 and [line for line in printed if line not in page] == []
