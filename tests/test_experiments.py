"""The harness of the experiments: what it keeps, goes on from, shows and refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the experiments draw with matplotlib")
pytest.importorskip("rich", reason="the experiments show their progress with rich")
pytest.importorskip("threadpoolctl", reason="the experiments limit threads with threadpoolctl")

from experiments import catalog, folder
from experiments.__main__ import main
from experiments.experiment import Claim, Experiment, Section


@dataclass(frozen=True)
class Counting:
    """Counts to ten, and keeps what it counted; may be killed once."""

    key: str
    seed: int = 0
    alone: bool = False
    what: str = "counting"

    def check(self) -> int:
        return 8

    def estimate(self) -> dict[str, Any]:
        return {"seconds": 0.5, "steps": 10, "how": "counting on fingers"}

    def perform(self, context: Any) -> dict[str, Any]:
        start = int(context.checkpoint.read_text()) if context.checkpoint.exists() else 0
        for i in range(start, 10):
            if i == 5 and not start and self.key == "killed":
                folder.replace(context.checkpoint, lambda path: path.write_text("5"))
                raise KeyboardInterrupt
            context.advance(i, 10)
        return {"count": 10, "began": start, "seed": self.seed}


def _section(request: Any, records: Any) -> Section:
    count = sum(record["count"] for record in records.values())
    return Section([Claim("ten each", f"{count} in all", "a multiple of ten", count % 10 == 0)], "Text.")


@pytest.fixture
def counting(monkeypatch):
    def use(*works: Counting) -> None:
        one = Experiment("counting", "To count", lambda request: works, _section)
        monkeypatch.setattr(catalog, "MODULES", ("counting",))
        monkeypatch.setitem(sys.modules, "experiments.counting", SimpleNamespace(EXPERIMENT=one))

    return use


BACKEND = next((name for name in ("torch", "jax") if find_spec(name)), None)
pytestmark = pytest.mark.skipif(BACKEND is None, reason="the experiments train with PyTorch or JAX")


def run(tmp_path, *names_and_options):
    return main([*names_and_options, "--out", str(tmp_path / "out"), "--backend", str(BACKEND)])


def test_records_and_page(counting, tmp_path, capsys):
    counting(Counting("a"), Counting("b", seed=1))
    assert run(tmp_path, "counting") == 0
    record = json.loads((tmp_path / "out/records/b.json").read_text())
    assert (record["count"], record["seed"], record["alone"]) == (10, 1, True)
    document = json.loads((tmp_path / "out/experiments.json").read_text())
    assert document["environment"]["versions"]["numpy"]
    assert "commit" in record
    here = document["environment"]["processor"]
    assert record["processor"] == here
    page = (tmp_path / "out/README.md").read_text()
    assert "| [To count](#counting) | ten each | 20 in all | yes |" in page
    (tmp_path / "out/README.md").unlink()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/README.md").read_text() == page
    (tmp_path / "out/records/b.json").write_text(json.dumps(record | {"processor": "Zuse Z3"}))  # went on elsewhere
    assert main(["report", str(tmp_path / "out")]) == 0
    assert " and ".join(sorted((here, "Zuse Z3"))) in (tmp_path / "out/README.md").read_text()


def test_goes_on_where_it_was_interrupted(counting, tmp_path):
    counting(Counting("a"), Counting("killed"), Counting("z"))
    assert run(tmp_path, "counting") == 130
    assert {path.stem for path in (tmp_path / "out/records").iterdir()} == {"a"}
    before = (tmp_path / "out/records/a.json").stat().st_mtime_ns
    assert run(tmp_path, "counting") == 0
    assert json.loads((tmp_path / "out/records/killed.json").read_text())["began"] == 5
    assert (tmp_path / "out/records/a.json").stat().st_mtime_ns == before
    assert not list((tmp_path / "out/checkpoints").iterdir())


def test_side_by_side(counting, tmp_path):
    counting(Counting("a"), Counting("b"), Counting("timed", alone=True))
    assert run(tmp_path, "counting", "--jobs", "2") == 0
    found = [json.loads((tmp_path / f"out/records/{key}.json").read_text()) for key in ("a", "b", "timed")]
    assert [record["alone"] for record in found] == [False, False, True]
    counting(Counting("killed"), *(Counting(f"later{i}") for i in range(20)))
    assert run(tmp_path, "counting", "--jobs", "2") == 130
    assert run(tmp_path, "counting", "--jobs", "2") == 0
    assert json.loads((tmp_path / "out/records/killed.json").read_text())["began"] == 5
    counting(Counting("a", alone=True))  # a time that was taken beside others is taken again
    assert run(tmp_path, "counting") == 0
    assert json.loads((tmp_path / "out/records/a.json").read_text())["alone"] is True


def test_dry_run_does_nothing(counting, tmp_path, capsys):
    counting(Counting("a"), Counting("b"))
    assert run(tmp_path, "counting", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "2 pieces of work, about 0.0 minutes" in told
    assert told.endswith("seconds are estimated by counting on fingers\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["fig99"], "there is no experiment 'fig99'; give some of counting, or all"),
        (["counting", "--seeds", "0"], "--seeds is 0; give 1 or more"),
        (["counting", "--seeds", "-1"], "--seeds is -1; give 1 or more"),
        (["counting", "--threads", "0"], "--threads is 0; give 1 or more"),
        (["counting", "--data", "/nowhere"], "--data /nowhere is no folder; give the one with the data sets"),
    ],
)
def test_bad_input_is_one_sentence(counting, tmp_path, capsys, given, sentence):
    counting(Counting("a"))
    assert run(tmp_path, *given) == 2
    assert capsys.readouterr().err == f"experiments: {sentence}\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings(counting, tmp_path, capsys):
    counting(Counting("a"))
    assert run(tmp_path, "counting") == 0
    assert run(tmp_path, "counting", "--steps", "5") == 2
    assert "belongs to other settings (steps None instead of 5); give another folder" in capsys.readouterr().err
    assert run(tmp_path, "counting", "--seeds", "4") == 0  # more seeds are no other settings
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    assert main(["counting", "--out", str(tmp_path / "full"), "--backend", str(BACKEND)]) == 2
    assert "holds other things than experiments" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "full")]) == 2
    assert "holds no records of experiments" in capsys.readouterr().err


def test_a_full_disk(counting, tmp_path, capsys, monkeypatch):
    counting(Counting("a"))
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert run(tmp_path, "counting") == 2
    assert "make room or give another folder" in capsys.readouterr().err
    assert not list((tmp_path / "out/records").iterdir())
    monkeypatch.undo()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    folder.write(path, {"a": 1})

    def full(target):
        target.write_text("{")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        folder.replace(path, full)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["record.json"]
