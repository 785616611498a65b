import json

import numpy as np
import pytest

from mimfast._check import UserError
from mimfast.data import parquet as module
from mimfast.data.loader import Loader
from mimfast.data.sources import open_source
from mimfast.testing.images import encode, picture

PNG = encode(picture(8, 8), "PNG")


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"a\.parquet' needs the package pyarrow, .* not installed: pip install pyarrow"
    ):
        open_source(str(tmp_path / "a.parquet"))


def table(first, rows, names=("cat", "dog"), declared=True, **more):
    pa = pytest.importorskip("pyarrow")
    images = [{"bytes": PNG + bytes([first + i]), "path": f"{i}.png"} for i in range(rows)]
    columns = {
        "thumb": pa.array([b"small"] * rows),
        "image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "label": pa.array([(first + i) % 2 for i in range(rows)], pa.int64()),
    }
    made = pa.table({**columns, **more})
    if not declared:
        return made
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path, *args, group=2, **options):
    import pyarrow.parquet as pq

    made = table(*args, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, row_group_size=group)


@pytest.mark.parametrize("declared", [True, False])
def test_parquet(tmp_path, monkeypatch, declared):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(module, "_KEPT_BYTES", 100)
    write(tmp_path / "data" / "train-00000-of-00002.parquet", 0, 5, declared=declared)
    write(tmp_path / "data" / "train-00001-of-00002.parquet", 5, 3, declared=declared)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", 90, 2, declared=declared)
    (tmp_path / "README.md").write_text("about")
    source = open_source(str(tmp_path))
    assert len(source) == 8
    assert [source.read(i)[-1] for i in (7, 0, 5, 1, 6, 2, 4, 3)] == [7, 0, 5, 1, 6, 2, 4, 3]
    assert [source.name(i) for i in (0, 4, 5)] == [
        "train-00000-of-00002-0000000", "train-00000-of-00002-0000004", "train-00001-of-00002-0000000",
    ]  # fmt: skip
    assert [source.label(i) for i in range(8)] == [0, 1] * 4
    assert source.classes == (["cat", "dog"] if declared else ["0", "1"])
    assert len(source._kept) == 1
    with Loader(source, 8, 8, seed=0, workers=2) as loader:
        assert next(loader).labels is not None
        assert loader.bad.count == 0


@pytest.mark.parametrize("stream", [True, False])
def test_arrow(tmp_path, stream):
    pa = pytest.importorskip("pyarrow")
    made = table(0, 5)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(tmp_path / "data-0.arrow"), made.schema) as writer:
        writer.write_table(made, max_chunksize=2)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    (tmp_path / "dataset_info.json").write_text("{}")
    for spec in (tmp_path, tmp_path / "data-0.arrow"):
        source = open_source(str(spec))
        assert [source.read(i)[-1] for i in range(5)] == list(range(5))
        assert source.classes == ["cat", "dog"]
        assert np.array_equal([source.label(i) for i in range(5)], [0, 1, 0, 1, 0])


def test_rows_without_bytes_are_bad_images(tmp_path):
    pa = pytest.importorskip("pyarrow")
    rows = [{"bytes": None, "path": "/elsewhere/1.png"}, None, {"bytes": PNG, "path": None}]
    image = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    write(tmp_path / "a.parquet", 0, 3, image=image)
    source = open_source(str(tmp_path / "a.parquet"))
    for i in (0, 1):
        with pytest.raises(OSError, match="no image bytes"):
            source.read(i)
    with Loader(source, 8, 3, seed=0) as loader:
        next(loader)
        assert sorted(loader.bad.names) == ["a-0000000", "a-0000001"]


def test_bad_files(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"a\.parquet' cannot be read \(.*\), expected a whole parquet file"):
        open_source(str(tmp_path / "a.parquet"))
    write(tmp_path / "b.parquet", 0, 5)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"b\.parquet' cannot be read"):
        open_source(str(tmp_path / "b.parquet"))
    write(tmp_path / "c.parquet", 0, 0)
    with pytest.raises(UserError, match=r"c\.parquet' has no rows in 1 files"):
        open_source(str(tmp_path / "c.parquet"))


def test_columns_that_leave_no_choice(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for name, columns in (("a", {"text": ["x"]}), ("b", {"left": [b"1"], "right": [b"2"]})):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        with pytest.raises(
            UserError, match=rf"{name}\.parquet' has columns .*, expected one of images because [02] hold"
        ):
            open_source(str(tmp_path / f"{name}.parquet"))
    pq.write_table(pa.table({"picture_bytes": [PNG], "id": [1]}), tmp_path / "c.parquet")
    source = open_source(str(tmp_path / "c.parquet"))
    assert source.read(0) == PNG
    assert source.classes is None
