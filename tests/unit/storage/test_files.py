"""Files: atomic writes, errors that name the file, and Parquet tables."""

from pathlib import Path

import pyarrow as pa
import pytest

from raykd.storage import files


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file.json"
    files.write_json(file, {"old": True})
    with pytest.raises(TypeError):
        files.write_json(file, {"new": object()})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        files.write_json(file, {"new": True})
    monkeypatch.undo()
    assert files.read_json(file) == {"old": True}
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_refused_write_names_the_file(tmp_path: Path):
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(OSError, match=r"folder/file\.json"):
        files.write_json(tmp_path / "folder" / "file.json", {})


def test_table_is_read_whole_by_columns_and_in_batches(storage: Path):
    file = storage / "split" / "train.parquet"
    files.write_table(file, pa.table({"row_id": ["a", "b"], "value": [1, 2]}))
    assert files.read_table(file).column_names == ["row_id", "value"]
    assert files.read_table(file, ["value"]).to_pydict() == {"value": [1, 2]}
    assert sum(len(batch) for batch in files.read_batches(file)) == files.num_rows(file) == 2
