"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from statistics import fmean

import pytest

from hbp import cli
from hbp.core import registry

demo = pytest.mark.skipif(
    any(find_spec(module) is None for module in cli.compare.DEMO), reason="the extra hbp[demo] is not installed"
)
ROWS = 1 + 2 + 2 * 2 + 1  # exact, the fixed point at k = 1 and 3, highway at these with both chunks, and with a rank


def compare(*arguments):
    return [sys.executable, "-m", "hbp", "compare", *arguments]


def test_info_names_every_backend(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in registry.LIBRARIES)


@demo
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_compare_writes_all_it_promises(cell, tmp_path, capsys):
    folder = tmp_path / "made" / "if missing"
    assert cli.main(["compare", "--steps", "3", "--cell", cell, "--output", str(folder), "--seed", "5"]) == 0
    document = json.loads((folder / "compare.json").read_text())
    assert document["complete"] is True
    assert document["settings"]["seed"] == 5
    assert len(document["runs"]) == ROWS
    for run in document["runs"]:
        assert len(run["losses"]) == len(run["backward_ms"]) == run["steps"] == 3
        assert 0 <= run["test_accuracy"] <= 1
        assert 0 < run["backward_share"] < 1
        k, S = run["mean_rounds"], run["chunk"]
        assert k == (run["iterations"] if run["tolerance"] is None else fmean(run["rounds"]))
        assert run["block_steps"] == (64 if k is None else S * (k + 1))
        assert run["losses"][0] == pytest.approx(document["runs"][0]["losses"][0], rel=1e-5)  # the same start
    cosines = {(run["method"], run["iterations"], run["chunk"]): run["mean_cosine"] for run in document["runs"]}
    assert cosines["exact", None, 1] == pytest.approx(1)
    assert max(cosines["fixed point", 1, 1], cosines["highway", 1, 1]) < cosines["highway", 3, 8] - 1e-3
    (ranked,) = [run for run in document["runs"] if run["rank"]]
    assert (ranked["rank"], ranked["iterations"], ranked["tolerance"], len(ranked["rounds"])) == (8, None, 0.1, 3)
    assert 1 <= ranked["mean_rounds"] <= 4
    assert ranked["mean_cosine"] > 0.99
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert " block " in printed
    assert "…" not in printed  # 80 columns hold the table
    assert printed.count("highway") == 5
    assert printed.count("fixed point") == 2


@demo
def test_enough_iterations_or_chunks_train_as_exact_backprop_does(tmp_path):
    arguments = [
        "compare",
        "--steps",
        "4",
        "--iterations",
        "1",
        "8",
        "64",
        "--chunks",
        "1",
        "8",
        "--ranks",
        "0",
        "32",
        "--tolerance",
        "none",
        "--output",
        str(tmp_path),
    ]
    assert cli.main(arguments) == 0
    by_options = {
        (run["method"], run["iterations"], run["rank"] or run["chunk"]): run
        for run in json.loads((tmp_path / "compare.json").read_text())["runs"]
    }
    exact = by_options["exact", None, 1]["losses"]
    for options in (("fixed point", 64, 1), ("highway", 64, 1), ("highway", 8, 8), ("highway", 1, 32)):
        assert by_options[options]["losses"] == pytest.approx(exact, rel=1e-4)
    assert by_options["fixed point", 1, 1]["mean_cosine"] < 0.999


@demo
def test_other_backends_train_alike(library, tmp_path):
    losses = {}
    for name in {"numpy", library.name}:
        folder = tmp_path / name
        arguments = ["--backend", name, "--steps", "3", "--iterations", "1", "--chunks", "8", "--output", str(folder)]
        assert cli.main(["compare", *arguments]) == 0
        losses[name] = [run["losses"] for run in json.loads((folder / "compare.json").read_text())["runs"]]
    for ours, reference in zip(losses[library.name], losses["numpy"], strict=True):
        assert ours == pytest.approx(reference, rel=1e-4)


@demo
@pytest.mark.parametrize("at", [1, 7, 12])
def test_interrupted_compare_keeps_what_was_finished(at, tmp_path, capsys, monkeypatch):
    from hbp.demo import compare

    step, calls = compare.Trainer.step, []

    def interrupted(trainer, x, y):
        calls.append(trainer)
        if len(calls) > at:
            raise KeyboardInterrupt
        step(trainer, x, y)

    monkeypatch.setattr(compare.Trainer, "step", interrupted)
    arguments = ["--steps", "1000", "--iterations", "1", "--chunks", "1", "--ranks", "0", "--output", str(tmp_path)]
    assert cli.main(["compare", *arguments]) == cli.INTERRUPTED
    printed = capsys.readouterr().out
    if at < 3:
        assert "nothing to show" in printed
        return
    assert f"{at // 3} of 1000 steps" in printed
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["complete"] is False
    assert [run["steps"] for run in document["runs"]] == [at // 3] * 3
    assert all(len(run["update_ms"]) == at // 3 for run in document["runs"])


@demo
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--iterations", "-1"], "'-1' is not an integer of at least 0"),
        (["--iterations", "1.5"], "'1.5' is not an integer of at least 0"),
        (["--chunks", "0"], "'0' is not an integer of at least 1"),
        (["--steps", "0"], "'0' is not an integer of at least 1"),
        (["--threads", "0"], "'0' is not an integer of at least 1"),
        (["--threads", "100000"], "--threads 100000 is more than the"),
        (["--backend", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["--ranks", "many"], "'many' is not an integer of at least 0"),
        (["--ranks", "33"], "--ranks 33 is more than the 32 units; give at most that"),
        (["--ranks", "auto", "0", "auto"], "--ranks names a value twice: auto 0 auto"),
        (["--ranks", "auto", "--backend", "jax"], "--ranks auto needs the weights' numbers"),
        (["--tolerance", "2"], "'2' is no fraction of the gradient from 0 to 1, nor none"),
        (["--tolerance", "nan"], "'nan' is no fraction of the gradient from 0 to 1, nor none"),
        (["--chunks", "8", "8"], "--chunks names a value twice: 8 8"),
        (["--output", "/dev/null/folder"], "cannot write to the output folder '/dev/null/folder'"),
    ],
)
def test_bad_input_is_one_sentence_before_training(arguments, said):
    child = subprocess.run(compare(*arguments), capture_output=True, text=True, check=False)
    assert child.returncode == 2
    assert said in child.stderr
    assert "Traceback" not in child.stderr
    assert child.stdout == ""


@demo
@pytest.mark.parametrize("name", cli.compare.OUTPUTS)
def test_a_folder_in_the_place_of_a_result_is_said_before_training(name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    assert cli.main(["compare", "--steps", "1", "--output", str(tmp_path)]) == 2
    assert "Is a directory; give another with --output" in capsys.readouterr().err


@demo
def test_compare_loads_its_own_backend_only(tmp_path):
    code = (
        "import sys; from hbp.cli import main; "
        f"assert main(['compare', '--steps', '1', '--iterations', '0', '--output', {str(tmp_path)!r}]) == 0; "
        "assert not {'torch', 'jax', 'cupy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_interruption_anywhere_is_one_word(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.hbp, "available", interrupted)
    assert cli.main(["info"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "hbp: interrupted\n"


@demo
def test_a_backend_that_is_missing_is_said_before_training(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["compare", "--backend", "torch", "--output", str(tmp_path / "untouched")]) == 2
    assert "pip install 'hbp[torch]'" in capsys.readouterr().err
    assert not (tmp_path / "untouched").exists()


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli.compare, "find_spec", lambda _: None)
    assert cli.main(["compare"]) == 2
    assert "pip install 'hbp[demo]'" in capsys.readouterr().err
