"""Command line: raykd init|plan|prompts|run|sweep|generate|train|evaluate|attention|report|compare."""

import argparse
import dataclasses
import logging
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raykd import __version__, errors, scaffold
from raykd.config.errors import one_line
from raykd.config.experiment import Experiment
from raykd.config.loading import load_experiment
from raykd.errors import UserError
from raykd.runtime.console import append_to_log, print_status
from raykd.storage import filesystem, lock
from raykd.storage.paths import ExperimentPaths, StoragePaths

LOG_WIDTH = 160
_EPILOG = """\
FILE is an experiment's YAML file, or the name of a configuration that raykd ships:

  {configs}

Any of its fields can be set on the command line:

  raykd run quickstart name=mine train.learning_rate=3e-4 'seeds=[0, 1, 2]'

The stages work on the same folders as `run`, one at a time. What is complete is skipped, so every command can be
given again after whatever ended it. With RAY_ADDRESS set they run on that Ray cluster, else on this machine.
"""

_STAGES = {
    "plan": "in what the arms differ and what they need, before anything is started; refuses what cannot fit",
    "prompts": "what teacher and student are sent for a problem, by their own chat templates, with token counts",
    "run": "the whole experiment, from problems to report",
    "sweep": "the same with a section `sweep`: search hyper-parameters, choose by validation, test what was chosen",
    "generate": "have the primed teacher answer the training problems",
    "train": "train the students, a Ray Tune trial for each arm and seed",
    "evaluate": "have all students answer the test problems in one engine",
    "attention": "measure what the students' attention heads look at while they read the same solutions",
    "report": "write results.csv, report.md and report.html",
}


_RATES = {
    "generation_rate": "completion tokens a second of one replica of the teacher",
    "training_rate": "target tokens a second of one training worker",
    "eval_rate": "tokens a second of the engine of the students",
    "completion_tokens": "tokens of a completion of the teacher, in the mean",
    "answer_tokens": "tokens of a student's answer, in the mean",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status (0 done, 1 a fault or a trial that failed, 2 a mistake in the input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parsed(arguments)
    command = shlex.join(["raykd", *arguments])
    # vLLM greets on import; the engines, which have logs of their own, are told otherwise.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    folder = None
    try:
        if options.stage == "compare":
            return _compare(options)
        if options.stage == "init":
            return scaffold.init(options)
        if options.stage == "report":
            return _report(options, command)
        experiment = load_experiment(scaffold.find_config(options.file), options.overrides)
        if options.stage in ("plan", "prompts"):
            return _preview(options, experiment)
        if options.stage == "sweep" and experiment.sweep is None:
            raise UserError(f"{options.file}: has no section `sweep`; write one, or use `raykd run`")
        folder = _folder(experiment)
        with lock.folder_lock(folder, command, show=print_status):
            return _run_stage(options.stage, experiment, command, getattr(options, "retry_failed", False))
    except KeyboardInterrupt as stopped:
        print(f"raykd: stopped; the same command goes on from here: {command}", file=sys.stderr)
        return getattr(stopped, "status", 130)
    except Exception as fault:
        return _tell(fault, folder)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed. Fields may be set before and behind options, which argparse takes for a mistake."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if strange := [each for each in more if each.startswith("-") or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if more:
        options.overrides = [*options.overrides, *more]
    return options


def _tell(fault: Exception, folder: Path | None) -> int:
    """Print an exception on one line, keep its traceback, and return the exit status.

    Args:
        fault: what ended the command.
        folder: the experiment's folder, whose log takes the traceback; None where no stage was begun.
    """
    stated = errors.reported_error(fault)
    if isinstance(stated, UserError):
        print(f"raykd: {one_line(str(stated))}", file=sys.stderr)
        return 2
    refused = errors.os_error_message(fault)
    if refused:
        line = f"a file cannot be read or written: {refused}; make room, mend its permissions, or set another `storage`"
    elif stated:
        line = str(stated)
    elif errors.is_cluster_error(fault):
        line = errors.root_cause(fault)
    else:
        # A bug, or a fault of a library.
        line = f"unexpected error: {type(fault).__name__}: {fault}"
    text, kept = "".join(traceback.format_exception(fault)), ""
    if folder:
        log = append_to_log(ExperimentPaths(folder).log, text)
        kept = f". All that is there is kept; the same command goes on. Log: {log}"
    elif not refused and not stated:
        print(text, end="", file=sys.stderr)
    print(f"raykd: {one_line(line)}{kept}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raykd",
        description="Distil a language model on Ray, and measure what the teacher's prompt was worth.",
        epilog=_EPILOG.format(configs="\n  ".join(scaffold.shipped_configs())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raykd {__version__}")
    stages = parser.add_subparsers(dest="stage", metavar="COMMAND", required=True)
    for name, text in _STAGES.items():
        stage = stages.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        also = ", or its folder, storage/experiments/NAME" if name == "report" else ""
        file_help = f"the experiment's YAML file, or the name of a shipped configuration{also}"
        stage.add_argument("file", metavar="FILE", help=file_help)
        if name == "prompts":
            stage.add_argument("--problem", default="0", metavar="N", help="number or id of a training problem (0)")
        if name == "plan":
            _add_plan(stage)
        if name == "sweep":
            stage.add_argument("--retry-failed", action="store_true", help="try trials that failed once more")
        told = "fields to set, values as YAML"
        stage.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=told)
    scaffold.add_parser(stages)
    compare = stages.add_parser(
        "compare",
        help="the test problems that one of two students has right and the other not, with both texts",
        description="Show how two students' answers to the same test problems differ: the counts, the paired "
        "difference, and each problem that one alone has right, with both texts. RUN is an experiment's folder, "
        "FOLDER:ARM where it has several arms, FOLDER:ARM:SEED for a certain seed.",
    )
    for name in ("first", "second"):
        compare.add_argument(name, metavar="RUN", help="storage/experiments/NAME[:ARM[:SEED]]")
    compare.add_argument("--score", choices=("strict", "flexible"), default="strict", help="what is right (strict)")
    compare.add_argument("--limit", type=int, default=10, metavar="N", help="problems shown of each kind, 0: all (10)")
    return parser


def _add_plan(stage: argparse.ArgumentParser) -> None:
    cluster = "a `ray up` file, or `live` for the running cluster that RAY_ADDRESS names: what there is, or may be"
    stage.add_argument("--cluster", metavar="FILE", help=cluster)
    stage.add_argument("--rates-from", metavar="RUN", help="an earlier run's folder, whose rates are taken")
    for name, text in _RATES.items():
        stage.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="N", help=text)


def _compare(options: argparse.Namespace) -> int:
    from raykd.report.compare_runs import compare

    print(compare(options.first, options.second, options.score, options.limit or None))
    return 0


def _preview(options: argparse.Namespace, experiment: Experiment) -> int:
    from rich.console import Console

    from raykd.planning.preview import arms_table, describe_search, render_prompts

    if options.stage == "plan":
        found = describe_search(experiment)
        Console().print(arms_table(experiment))
        print(found, end="\n" if found else "")
        _show_needs(options, experiment)
    else:
        print(render_prompts(experiment, options.problem))
    return 0


def _show_needs(options: argparse.Namespace, experiment: Experiment) -> None:
    """Prints what an experiment needs, and raises UserError where it cannot run."""
    from rich.console import Console

    from raykd.cluster.nodes import from_ray, read_cluster_file
    from raykd.planning import cost
    from raykd.planning.tables import plan_tables

    cluster = None
    if options.cluster:
        cluster = from_ray(_live()) if options.cluster == "live" else read_cluster_file(Path(options.cluster))
    known = cost.measured_rates(filesystem.resolve(options.rates_from)) if options.rates_from else cost.Rates()
    told = _rates_of(options)
    tables, refused = plan_tables(experiment, cluster, dataclasses.replace(known, **told))
    # In a log lines may be long; a terminal knows its width.
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    for table in tables:
        console.print(table)
    if refused:
        raise UserError(f"{options.file} does not fit: {refused}")


def _rates_of(options: argparse.Namespace) -> dict[str, float]:
    """The rates that were typed.

    Raises:
        UserError: where one is not above 0.
    """
    told = {name: value for name in _RATES if (value := getattr(options, name)) is not None}
    if bad := [f"--{name.replace('_', '-')} {value:g}" for name, value in told.items() if not 0 < value < math.inf]:
        raise UserError(f"{', '.join(bad)}: should be above 0")
    return {name.removesuffix("_rate"): value for name, value in told.items()}


def _live() -> list[dict[str, Any]]:
    """The nodes of the cluster that RAY_ADDRESS names, as for the stages: no other is joined that may run here.

    Raises:
        UserError: where there is none.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise UserError("--cluster live: set RAY_ADDRESS to the cluster's (auto: one on this machine)")
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    # A ValueError where it is no address.
    except (ConnectionError, ValueError):
        raise UserError(f"--cluster live: no Ray cluster at RAY_ADDRESS={address}") from None
    try:
        return ray.nodes()
    finally:
        ray.shutdown()


def _run_stage(stage: str, experiment: Experiment, command: str, retry_failed: bool) -> int:
    # Not before the experiment was read: torch and Ray take seconds, a typing error should not.
    from raykd.cluster.connection import connected
    from raykd.pipeline import preflight, run
    from raykd.pipeline.plan import resolve

    if stage in ("run", "sweep"):
        run.run_experiment(experiment, command, retry_failed, stage)
    else:
        plan = resolve(experiment)
        run.start(plan, command)
        steps: dict[str, Callable[..., Any]] = {
            "generate": run.generate_completions,
            "train": run.train_students,
            "evaluate": run.make_predictions,
            "attention": run.measure_attention,
        }
        with connected(plan.log, experiment.name, stage) as resources:
            preflight.preflight(plan, resources, [stage])
            steps[stage](plan, resources)
        run.record_results(plan)
        print(f"{stage}: done; {plan.folder}", file=sys.stderr)
        return 0
    return _show_results(_folder(experiment))


def _report(options: argparse.Namespace, command: str) -> int:
    """Render a finished experiment from its folder alone: neither its models nor Ray need be here."""
    folder = _finished(options.file, options.overrides)
    if not filesystem.is_remote(folder) and not folder.is_dir():
        raise UserError(f"{folder}: no such folder, nothing to report yet; `raykd run` makes it")
    from raykd.report.build import write_report

    with lock.folder_lock(folder, command):
        write_report(folder)
        return _show_results(folder)


def _finished(file: str, overrides: Sequence[str]) -> Path:
    """Return the experiment's folder that `report` is given, by itself or by the experiment's YAML file."""
    if "://" in file or Path(file).is_dir():
        if overrides:
            raise UserError(f"{overrides[0]!r}: {file} is a folder; fields can be set where FILE is a YAML file")
        return filesystem.resolve(file)
    experiment = load_experiment(scaffold.find_config(file), overrides)
    folder = _folder(experiment)
    # What the folder holds may be another experiment of that name.
    from raykd.pipeline import run_record

    run_record.check_compatible(experiment, folder)
    return folder


def _folder(experiment: Experiment) -> Path:
    return StoragePaths(filesystem.resolve(experiment.storage)).experiment(experiment.name)


def _show_results(folder: Path) -> int:
    """Prints the result table, and tells whether a trial failed."""
    from rich.console import Console

    from raykd.report.build import result_tables
    from raykd.report.results import read_results

    results = read_results(folder, with_attention=False)
    # In a log lines may be long; a terminal knows its width.
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    for table in result_tables(results):
        console.print(table)
    console.print(f"report: {ExperimentPaths(folder).report_html}", soft_wrap=True)
    return 1 if any(trial.status == "failed" for trial in results.trials) else 0


if __name__ == "__main__":
    sys.exit(main())
