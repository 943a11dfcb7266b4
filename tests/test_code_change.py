"""Code counts: a run knows by which code it was made, and is not mixed with another's unasked.

The hashes are of a copy of the sources here, which the tests edit; the running code stays as it is.
"""

import shutil

import pytest
from conftest import QUICK, ROOT, StopAfter, steps_in

import eval_steering as ev
import train_steering as ts
from steering import run as rs


class Sources:
    """A copy of the project's sources that is taken for the project."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("steering", "evaluation", "interop"):
            shutil.copytree(ROOT / name, folder / name)
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        rs.source_hashes.cache_clear()

    def add(self, name, text):
        """Put lines at the start of a file, which need not be there yet."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + (path.read_text() if path.exists() else ""))
        rs.source_hashes.cache_clear()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.setattr(rs, "ROOT", folder)
    yield Sources(folder)
    rs.source_hashes.cache_clear()


@pytest.fixture
def stopped(training, monkeypatch):
    """A function: train with more options until a signal comes in the third step."""

    def train_and_stop(flags=""):
        with monkeypatch.context() as patch:
            patch.setattr(ts, "StopRequest", lambda: StopAfter(3))
            training(flags, code=75)

    return train_and_stop


def shown(training, capsys):
    """What the report says of the runs, on the console and in report.csv."""
    capsys.readouterr()
    assert ev.main(["--run", str(training.output), "--report-only"]) == 0
    return capsys.readouterr().out, (training.output / "report.csv").read_text()


def test_finished_run_by_other_code_warns_names_the_files_and_is_marked(
    sources, training, tmp_path, capsys
):
    training()
    vector = training.vector
    assert "WARNING" not in training()
    sources.add("train_steering.py", "# A reworded comment.\n")
    sources.add("steering/fast_path.py", "# Another one.\n")
    (warning,) = [line for line in training().splitlines() if "WARNING" in line]
    assert "by other code: steering/fast_path.py, train_steering.py" in warning
    said = training(f"--write-todo {tmp_path / 'todo'}")
    assert (tmp_path / "todo").read_text() == ""
    assert "1 of the finished runs are by other code" in said
    for text in shown(training, capsys):
        assert "other code" in text
    assert training.vector.equal(vector)


def test_files_that_the_training_imports_count_newly_or_through_others_and_no_others(sources):
    before = rs.source_hashes("train_steering.py")
    sources.add("evaluation/stats.py", "# Nothing that a training imports.\n")
    assert rs.source_hashes("train_steering.py") == before
    assert "steering/chat_format.py" in before
    sources.add("my_loss.py", "import my_losses\n")
    sources.add("my_losses/__init__.py", "from my_losses.kl import kl\n")
    sources.add("my_losses/kl.py", "kl = 1\n")
    sources.add("data_filter.py", "import my_loss\n")
    after = rs.source_hashes("train_steering.py")
    new = {"my_loss.py", "my_losses/__init__.py", "my_losses/kl.py"}
    assert {*rs.changed_sources(before, after)} == {"data_filter.py", *new}


def test_unfinished_run_by_other_code_is_refused_and_both_ways_on_work(
    sources, training, stopped, tmp_path, capsys
):
    stopped()
    folder = training.folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sources.add("train_steering.py", "# Another loss.\n")
    (line,) = [text for text in training(code=2).splitlines() if "error" in text]
    assert "by other code (train_steering.py)" in line
    assert "--restart" in line and "--accept-code-change" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.copytree(training.output, tmp_path / "other")
    said = training("--accept-code-change")
    assert "WARNING: going on with other code: train_steering.py" in said
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6]
    assert training.record["code_changes"] == ["train_steering.py"]
    for text in shown(training, capsys):
        assert "code changed midway" in text
    training.output = tmp_path / "other"
    training(f"--output-dir {training.output} --restart")
    assert training.record["status"] == "done" and training.record["code_changes"] == []


def test_accepted_change_is_remembered_through_another_stop(sources, training, stopped):
    stopped()
    sources.add("train_steering.py", "# Another loss.\n")
    stopped("--accept-code-change")
    training()  # the code is that of the newest checkpoint: nothing to ask
    assert training.record["code_changes"] == ["train_steering.py"]


def test_evaluation_by_other_code_is_kept_and_named(sources, training, capsys):
    training()

    def evaluated():
        capsys.readouterr()
        assert ev.main(["--run", str(training.folder), *QUICK]) == 0
        return capsys.readouterr().err

    evaluated()
    sources.add("evaluation/summary.py", "# It shows numbers, and makes none.\n")
    assert "WARNING" not in evaluated()
    sources.add("evaluation/likelihood.py", "# It makes numbers.\n")
    assert "eval.json is by other code (evaluation/likelihood.py): --restart" in evaluated()
