import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Indexes and embedded sets of each test go to a folder of their own."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MIMFAST_CACHE", str(path))
    return path
