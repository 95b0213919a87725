"""Report: an experiment's `results.csv`, `report.md` and `report.html`, and its tables in the terminal."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from raykd.analysis.scores import Proportion
from raykd.report import attention, cost, sweep, tables
from raykd.report.figures import HEADS, figures
from raykd.report.results import Results, read_results
from raykd.report.svg import Figure
from raykd.report.table import Table
from raykd.report.text import answer
from raykd.report.trials import TrialResult
from raykd.runtime.rich_console import cell
from raykd.storage import filesystem
from raykd.storage.files import write_text
from raykd.storage.paths import ExperimentPaths

LONGEST_WORD = 14
"""Number of characters of a word that are never wrapped in a table in the terminal."""
CSV_COLUMNS = (
    "arm",
    "seed",
    "accuracy_strict",
    "accuracy_strict_low",
    "accuracy_strict_high",
    "accuracy_flexible",
    "accuracy_flexible_low",
    "accuracy_flexible_high",
    "n",
    "errors",
    "num_samples",
    "majority_strict",
    "majority_flexible",
    "pass_strict",
    "pass_flexible",
    "format_rate",
    "format_rate_low",
    "format_rate_high",
    "accuracy_given_format",
    "truncated",
    "truncated_low",
    "truncated_high",
    "mean_tokens",
    "mean_tokens_low",
    "mean_tokens_high",
    "repetition",
    "train_rows",
    "train_steps",
    "target_tokens",
    "train_seconds",
    "loss_first",
    "loss_last",
    "trial_id",
    "status",
)
SWEEP_COLUMNS = (
    "validation_accuracy",
    "validation_accuracy_low",
    "validation_accuracy_high",
    "validation_loss",
    "validation_n",
    "validation_number",
    "gpu_seconds",
    "adapter",
)
"""Additional columns of a sweep's results.csv, besides one for each searched field."""
DEMONSTRATION = (
    "This run uses the built-in toy models or generated problems. It shows that every stage works and what a report "
    "contains. Its numbers say nothing about large language models or about the effect of prompts on them."
)


def write_report(folder: Path) -> Results:
    """Write results.csv, report.md with its figures, and report.html into an experiment's folder, each atomically.

    Args:
        folder: an experiment's folder (layout: `raykd.storage.paths`).

    Returns:
        The numbers that these files show.

    Raises:
        UserError: the folder is not an experiment's, or has neither trials nor predictions.
    """
    results = read_results(folder)
    write_text(ExperimentPaths(folder).results_csv, _csv(results))
    if results.attention:
        write_text(ExperimentPaths(folder).attention_csv, attention.heads_csv(results.attention))
        write_text(ExperimentPaths(folder).attention_correctness_csv, attention.correctness_csv(results.attention))
    plots = figures(results)
    _write_figures(plots, ExperimentPaths(folder).figures)
    write_text(ExperimentPaths(folder).report_md, _markdown(results, plots))
    write_text(ExperimentPaths(folder).report_html, _html(results, plots))
    return results


def result_tables(results: Results) -> list[RichTable]:
    """Return the terminal's tables: a sweep's trials and best points, and the accuracy of each arm."""
    shown = []
    if results.sweep:
        sweep_tables = (sweep.all_trials(results), sweep.best_points(results))
        shown = [_for_terminal(table, table.title) for table in sweep_tables if table.rows]
    return [*shown, _for_terminal(tables.result(results), results.name)]


def _for_terminal(shown: Table, title: str) -> RichTable:
    # A terminal is too narrow for the progress of a trial and for columns without any failure.
    kept = [
        number
        for number, column in enumerate(shown.columns)
        if column not in ("Validations", "Steps", "Time")
        and (column not in ("Errors", "Failed") or any(row[number] != "0" for row in shown.rows))
    ]
    table = RichTable(title=cell(title), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number in kept:
        column = shown.columns[number]
        # In a narrow terminal lines are wrapped between words.
        words = " ".join([column, *(row[number] for row in shown.rows)]).split()
        table.add_column(
            column,
            justify="left" if number in shown.text_columns else "right",
            min_width=min(max(map(len, words)), LONGEST_WORD),
            overflow="fold",
        )
    for row in shown.rows:
        # rich parses brackets in a string as markup, but not in a Text.
        table.add_row(*(cell(row[number]) for number in kept))
    return table


def _csv(results: Results) -> str:
    text = io.StringIO()
    paths = results.sweep.paths if results.sweep else []
    columns = [*CSV_COLUMNS[:2], *paths, *CSV_COLUMNS[2:], *(SWEEP_COLUMNS if results.sweep else ())]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for trial in results.trials:
        row = {column: getattr(trial, column, None) for column in CSV_COLUMNS} | _scores(trial)
        if results.sweep:
            row |= {path: _cell(trial.hparams.get(path)) for path in paths} | _validation(trial)
        writer.writerow(row)
    return text.getvalue()


def _scores(trial: TrialResult) -> dict[str, Any]:
    """Return the cells of a trial's predictions."""
    scores = trial.scores
    values = {
        "accuracy_strict": scores.strict,
        "accuracy_flexible": scores.flexible,
        "majority_strict": scores.majority_strict,
        "majority_flexible": scores.majority_flexible,
        "pass_strict": scores.pass_strict.get(scores.num_samples, Proportion()),
        "pass_flexible": scores.pass_flexible.get(scores.num_samples, Proportion()),
        "format_rate": scores.format_rate,
        "accuracy_given_format": scores.accuracy_given_format,
        "truncated": scores.truncated,
        "mean_tokens": scores.tokens,
        "repetition": scores.repetition,
    }
    row: dict[str, Any] = {"n": scores.n, "errors": scores.errors, "num_samples": scores.num_samples}
    for name, value in values.items():
        row[name] = value.value
        if f"{name}_low" in CSV_COLUMNS:
            row |= {f"{name}_low": value.low, f"{name}_high": value.high}
    return row


def _validation(trial: TrialResult) -> dict[str, Any]:
    """Return the cells of a sweep's trial."""
    validation, accuracy = trial.validation or {}, sweep.validation_share(trial)
    return {
        "validation_accuracy": accuracy.value,
        "validation_accuracy_low": accuracy.low,
        "validation_accuracy_high": accuracy.high,
        "validation_loss": validation.get("loss"),
        "validation_n": validation.get("n"),
        "validation_number": validation.get("number"),
        "gpu_seconds": trial.gpu_seconds,
        "adapter": trial.adapter,
    }


def _cell(value: Any) -> Any:
    """Return a value of the configuration as a cell."""
    return json.dumps(value) if isinstance(value, list | dict | bool) else value


def _write_figures(plots: list[Figure], folder: Path) -> None:
    """Write each figure to a file, and remove the files of an earlier report's other figures."""
    template = _templates().get_template("figure.svg.j2")
    names = {f"{figure.name}.svg" for figure in plots}
    for figure in plots:
        write_text(folder / f"{figure.name}.svg", _without_controls(template.render(figure=figure)))
    for file in filesystem.list_files(folder):
        if file.name not in names:
            file.unlink()


def _without_controls(text: str) -> str:
    """Return a text with the characters replaced that XML does not allow."""
    return re.sub("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]", "\ufffd", text)


def _markdown(results: Results, plots: list[Figure]) -> str:
    run, result = results.run, answer(results)
    blocks = [f"# {escape_markdown(results.name)}"]
    if run.demonstration:
        blocks.append(f"> **Demonstration.** {DEMONSTRATION}")
    blocks.append(f"**{escape_markdown(result.sentences[0])}** {escape_markdown(result.sentences[1])}")
    for lines in (result.remarks, results.notes):
        if lines:
            blocks.append("\n".join(f"- {escape_markdown(line)}" for line in lines))
    captions = set()
    for figure in plots:
        blocks.append(
            f"![{escape_markdown(figure.title)}]({ExperimentPaths(results.folder).figures.name}/{figure.name}.svg)"
        )
        # The figures of single heads share one caption.
        caption = "" if figure.caption in captions else f" {escape_markdown(figure.caption)}"
        blocks.append(f"*{escape_markdown(figure.title)}.*{caption}")
        captions.add(figure.caption)
    for table in tables.tables(results):
        blocks += [f"## {escape_markdown(table.title)}", _markdown_table(table)]
        if table.note:
            blocks.append(escape_markdown(table.note))
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    blocks.append("## Reproduction")
    # Indented lines are a code block, in which Markdown needs no escapes.
    blocks.append("\n".join(f"    {line}" for command in run.commands for line in command.splitlines()))
    made_with = f"raykd {run.raykd_version}; {versions}"
    blocks.append(f"{escape_markdown(made_with)}. Configuration: `experiment.yaml`.")
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    alignment = [":--" if number in table.text_columns else "--:" for number in range(len(table.columns))]
    header, *rows = ([escape_markdown(cell) for cell in cells] for cells in (table.columns, *table.rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, alignment, *rows))


def escape_markdown(text: str) -> str:
    """Return a text escaped for Markdown, on one line."""
    for character in "\\`*_[]|#~$":
        text = text.replace(character, "\\" + character)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Some viewers turn user names and URLs into links.
    text = text.replace("@", "&#64;").replace("://", "&#58;//").replace("www.", "www&#46;")
    return " ".join(text.split())


def _html(results: Results, plots: list[Figure]) -> str:
    by_name = {figure.name: figure for figure in plots}
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            results=results,
            run=results.run,
            answer=answer(results),
            demonstration=DEMONSTRATION,
            tables=tables,
            sweep=sweep,
            attention=attention,
            costs=cost,
            figures=by_name,
            head_figures=[figure for figure in plots if figure.name.startswith(HEADS)],
        )
    )


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("raykd.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
