"""Report cost: processor time and its price."""

from pathlib import Path

import pytest

from raykd.pipeline import run_record
from raykd.report.cost import processors
from raykd.report.results import read_results
from raykd.storage.files import read_json, write_json
from synthetic import Experiment, drawn


def table(folder: Path, prices: str = "", **seconds_by_role):
    experiment = Experiment(folder)
    for seed in (0, 1):
        record = {"seconds": 1800.0, "num_workers": 4, "accelerator": "gpu"}
        experiment.trial("none", seed, drawn("none", seed, 0.5, 1.0, 5), **record)
    experiment.run["processor_seconds"] = seconds_by_role
    experiment.write()
    with (folder / "experiment.yaml").open("a") as file:
        file.write(prices)
    return processors(read_results(folder))


def test_processor_seconds_include_training(tmp_path: Path):
    found = table(tmp_path, teacher={"gpu": 7200.0}, attention={"cpu": 36.0})
    assert found.columns == ["Section", "Processor", "Processor-seconds (at most)", "Processor-hours (at most)"]
    assert found.rows == [
        ["teacher", "GPU", "7,200", "2.00"],
        ["attention", "CPU", "36", "0.01"],
        ["train", "GPU", "14,400", "4.00"],
    ]
    assert "prices.gpu_hour" in found.note


@pytest.mark.parametrize(
    ("prices", "teacher", "total"),
    [
        ("prices: {gpu_hour: 2.5}\n", "5.00", ["all with a price", "15.00"]),
        ("prices: {gpu_hour: 2.5, teacher_gpu_hour: 4, cpu_hour: 1, currency: EUR}\n", "8.00", ["all", "18.01"]),
    ],
)
def test_cost_is_processor_hours_times_price(tmp_path: Path, prices: str, teacher: str, total: list[str]):
    found = table(tmp_path, prices, teacher={"gpu": 7200.0}, attention={"cpu": 36.0})
    assert found.columns[-1] == ("Cost, EUR (at most)" if "EUR" in prices else "Cost, USD (at most)")
    assert found.rows[0][-1] == teacher
    assert found.rows[2][-1] == "10.00"
    assert [found.rows[3][0], found.rows[3][-1]] == total


def test_processor_time_adds_up_and_is_recorded_after_failure(tmp_path: Path):
    write_json(tmp_path / "run.json", {"stages": {}})
    for _ in range(2):
        with run_record.track_processors(tmp_path, "teacher", "gpu", 16):
            pass
    with pytest.raises(RuntimeError, match="lost"), run_record.track_processors(tmp_path, "teacher", "cpu", 2):
        raise RuntimeError("lost")
    recorded = read_json(tmp_path / "run.json")["processor_seconds"]["teacher"]
    assert set(recorded) == {"gpu", "cpu"} and all(0 <= seconds < 5 for seconds in recorded.values())
