"""Code counts: a run knows by which code it was made, and is not mixed with another's unasked.

The hashes are of a copy of the sources here, which the tests edit; the running code stays as it is.
"""

import json
import shutil

import pytest
from conftest import QUICK, ROOT, StopAfter, command, steps_in, the_folder

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

    def edit(self, name, old, new):
        path = self.folder / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: {text.count(old)} x {old!r}"
        path.write_text(text.replace(old, new))
        rs.source_hashes.cache_clear()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(rs, "ROOT", tmp_path / "project")
    yield Sources(tmp_path / "project")
    rs.source_hashes.cache_clear()


def double_the_loss(sources):
    old = "return torch.nn.functional.cross_entropy("
    sources.edit("train_steering.py", old, old.replace("return", "return 2 *"))


def test_finished_run_by_other_code_warns_names_the_file_and_is_marked(
    sources, data_root, tiny_folder, tmp_path, capsys
):
    base = command(data_root, tiny_folder, tmp_path / "runs")
    assert ts.main(base) == 0
    vector = the_folder(tmp_path / "runs").joinpath("steering_vector.safetensors").read_bytes()
    capsys.readouterr()
    assert ts.main(base) == 0 and "WARNING" not in capsys.readouterr().out
    double_the_loss(sources)
    sources.edit("steering/fast_path.py", "HEAD_TOKENS = 256", "HEAD_TOKENS = 128")
    assert ts.main(base) == 0
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert "by other code: steering/fast_path.py, train_steering.py" in warning
    assert ts.main([*base, "--write-todo", str(tmp_path / "todo")]) == 0
    said = capsys.readouterr()
    assert (
        tmp_path / "todo"
    ).read_text() == "" and "1 of the finished runs are by other code" in said.err
    assert ev.main(["--run", str(tmp_path / "runs"), "--report-only"]) == 0
    assert "other code" in capsys.readouterr().out
    assert "other code" in (tmp_path / "runs" / "report.md").read_text()
    now = the_folder(tmp_path / "runs").joinpath("steering_vector.safetensors").read_bytes()
    assert now == vector


def test_a_reworded_comment_warns_and_what_the_training_does_not_import_counts_nothing(
    sources, data_root, tiny_folder, tmp_path, capsys
):
    base = command(data_root, tiny_folder, tmp_path / "runs")
    assert ts.main(base) == 0
    before = rs.source_hashes("train_steering.py")
    sources.edit("evaluation/measures.py", "MIN_ROWS = 0.8, 5", "MIN_ROWS = 0.8, 6")
    assert rs.source_hashes("train_steering.py") == before
    sources.edit("train_steering.py", "            # Rows of this step;", "            # The rows;")
    capsys.readouterr()
    assert ts.main(base) == 0
    assert "by other code: train_steering.py" in capsys.readouterr().out


def test_file_that_the_training_imports_newly_counts_too(sources):
    before = rs.source_hashes("train_steering.py")
    assert "steering/chat_format.py" in before and "evaluation/measures.py" not in before
    (sources.folder / "my_loss.py").write_text("def loss(logits):\n    return logits\n")
    sources.edit(
        "train_steering.py", "import data_filter\n", "import data_filter\nimport my_loss\n"
    )
    after = rs.source_hashes("train_steering.py")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"train_steering.py", "my_loss.py"}
    (sources.folder / "my_losses").mkdir()
    (sources.folder / "my_losses" / "__init__.py").write_text("from my_losses.kl import kl\n")
    (sources.folder / "my_losses" / "kl.py").write_text("kl = 1\n")
    sources.edit("my_loss.py", "def loss", "import my_losses\n\n\ndef loss")
    assert {"my_losses/__init__.py", "my_losses/kl.py"} <= set(
        rs.source_hashes("train_steering.py")
    )


def test_unfinished_run_by_other_code_is_refused_and_both_ways_on_work(
    sources, data_root, tiny_folder, tmp_path, monkeypatch, capsys
):
    base = command(data_root, tiny_folder, tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(ts, "StopRequest", lambda: StopAfter(3))
        assert ts.main(base) == 75
    folder = the_folder(tmp_path / "runs")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    double_the_loss(sources)
    capsys.readouterr()
    assert ts.main(base) == 2
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "error" in text]
    assert "by other code (train_steering.py)" in line
    assert "--restart" in line and "--accept-code-change" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.copytree(tmp_path / "runs", tmp_path / "other")
    assert ts.main([*base, "--accept-code-change"]) == 0
    assert "WARNING: going on with other code: train_steering.py" in capsys.readouterr().out
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6]
    record = json.loads((folder / "run.json").read_text())
    assert record["code_changes"] == ["train_steering.py"] and record["status"] == "done"
    assert ev.main(["--run", str(tmp_path / "runs"), "--report-only"]) == 0
    assert "code changed midway" in capsys.readouterr().out
    fresh = [*base, "--output-dir", str(tmp_path / "other"), "--restart"]
    assert ts.main(fresh) == 0
    record = json.loads((the_folder(tmp_path / "other") / "run.json").read_text())
    assert record["code_changes"] == []


def test_accepted_change_is_remembered_through_another_stop(
    sources, data_root, tiny_folder, tmp_path, monkeypatch
):
    base = command(data_root, tiny_folder, tmp_path / "runs")
    for stop, more in ((3, []), (3, ["--accept-code-change"])):
        with monkeypatch.context() as patch:
            patch.setattr(ts, "StopRequest", lambda stop=stop: StopAfter(stop))
            assert ts.main([*base, *more]) == 75
        if not more:
            double_the_loss(sources)
    assert ts.main(base) == 0  # the code is that of the newest checkpoint: nothing to ask
    record = json.loads((the_folder(tmp_path / "runs") / "run.json").read_text())
    assert record["code_changes"] == ["train_steering.py"]


def test_evaluation_by_other_code_is_kept_and_named(
    sources, data_root, tiny_folder, tmp_path, capsys
):
    assert ts.main(command(data_root, tiny_folder, tmp_path / "runs")) == 0
    evaluate = ["--run", str(the_folder(tmp_path / "runs")), *QUICK]
    assert ev.main(evaluate) == 0
    sources.edit("evaluation/summary.py", '"NLL/token"', '"NLL"')  # shows numbers, makes none
    capsys.readouterr()
    assert ev.main(evaluate) == 0 and "WARNING" not in capsys.readouterr().err
    sources.edit("evaluation/measures.py", "return -logits.float()", "return -2 * logits.float()")
    assert ev.main(evaluate) == 0
    error = capsys.readouterr().err
    assert "eval.json is by other code (evaluation/measures.py): --restart" in error
