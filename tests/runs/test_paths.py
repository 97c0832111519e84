"""Files of a configuration are found from any directory; names are names."""

from hfedmoe.config import DataConfig, ModelConfig, RunConfig
from hfedmoe.runs.paths import with_absolute_paths


def test_what_is_here_gets_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/model")
    for name in ("rows.csv", "a.csv", "b.csv"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    data = DataConfig(source="rows.csv", test="a.csv", clients=["a.csv", "./b.csv"])
    names = {"./a/model": "a/model", "a/model": "a/model", "a/../a/model": "a/model", "link": "link"}
    for name, path in names.items():
        found = with_absolute_paths(RunConfig(model=ModelConfig(name=name), clients={"count": 2}, data=data))
        assert found.model.name == str(tmp_path / path)
    assert (found.data.source, found.data.test) == (str(tmp_path / "rows.csv"), str(tmp_path / "a.csv"))
    assert found.data.clients == [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    assert with_absolute_paths(found) == found


def test_names_of_hfedmoe_and_of_the_hub_stay(tmp_path, monkeypatch):
    for name in ("tiny", "reuters-r8", "piqa", "validation"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for model, source in (("tiny", "reuters-r8"), ("who/what", "piqa"), ("./gone", "who/rows")):
        config = RunConfig(model=ModelConfig(name=model), data=DataConfig(source=source, test="validation"))
        assert with_absolute_paths(config) == config
