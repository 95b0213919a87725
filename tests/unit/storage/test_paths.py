"""Paths: every file of a run has a name in the layout."""

from pathlib import Path

from raykd.report.build import write_report
from raykd.storage.files import write_json
from raykd.storage.paths import ExperimentPaths, RoundPaths, StoragePaths, TrialPaths, split_file
from synthetic import full_experiment


def named_paths(layout: ExperimentPaths | TrialPaths | RoundPaths) -> set[Path]:
    """Return the values of all properties of a layout."""
    return {getattr(layout, name) for name, member in vars(type(layout)).items() if isinstance(member, property)}


def unnamed(layout: ExperimentPaths | TrialPaths | RoundPaths) -> list[Path]:
    return sorted(set(layout.folder.iterdir()) - named_paths(layout))


def test_finished_experiment_holds_only_named_files(tmp_path: Path):
    folder = StoragePaths(tmp_path).experiment("primes")
    experiment = full_experiment(folder)
    experiment.attention({"none-0": ("none", 0), "ground_truth-0": ("ground_truth", 0)})
    experiment.write()
    write_report(folder)

    paths = ExperimentPaths(folder)
    assert unnamed(paths) == []
    trials = list(paths.trials.iterdir())
    assert len(trials) == 12
    assert [unnamed(TrialPaths(trial)) for trial in trials] == [[]] * 12
    assert paths.results_csv.is_file()
    assert paths.attention_csv.is_file()
    assert paths.report_html.is_file()


def test_unknown_file_is_found(tmp_path: Path):
    write_json(tmp_path / "scratch.json", {})
    assert unnamed(ExperimentPaths(tmp_path)) == [tmp_path / "scratch.json"]


def test_layout_matches_its_documentation():
    folder = Path("storage/experiments/primes")
    for layout in (ExperimentPaths(folder), TrialPaths(folder), RoundPaths(folder)):
        for path in named_paths(layout):
            assert path.name in (type(layout).__doc__ or ""), path


def test_paths_below_the_storage_folder():
    storage = StoragePaths(Path("storage"))
    assert storage.experiment("primes") == Path("storage/experiments/primes")
    assert split_file(storage.problems("key"), "train") == Path("storage/problems/key/train.parquet")
    trial = ExperimentPaths(storage.experiment("primes")).trial("none-s0")
    assert RoundPaths(TrialPaths(trial).round(2)).record == trial / "rounds" / "2" / "round.json"
