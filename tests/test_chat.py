"""eval_steering.py --chat, through a pseudo-terminal as a person has one, and its parts."""

import contextlib
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

import eval_steering as ev
from evaluation import chat as ec
from steering.files import read_json, write_json
from steering.finished import read_run
from steering.vector_file import VECTOR_FILE, load_vector, save_vector

NAMES = {"pirate": 1, "travel agent": 2, "travel": 3}


def test_personas_are_named_with_spaces_and_with_scales_or_without():
    assert ec.match_personas(["pirate"], NAMES) == [("pirate", None)]
    assert ec.match_personas(["travel", "agent", "0.7", "pirate"], NAMES) == [
        ("travel agent", 0.7), ("pirate", None)
    ]  # fmt: skip
    assert ec.match_personas(["travel", "2", "travel", "agent", "-1"], NAMES) == [
        ("travel", 2.0), ("travel agent", -1.0)
    ]  # fmt: skip
    assert ec.match_personas([], NAMES) == []
    assert ec.match_personas(["Travel", "AGENT"], NAMES) == [("travel agent", None)]
    with pytest.raises(ValueError, match='"pirat" is no persona or scale; perhaps pirate'):
        ec.match_personas(["pirat"], NAMES)
    with pytest.raises(ValueError, match='"2" is no persona'):
        ec.match_personas(["pirate", "1", "2"], NAMES)
    for text in ("1_0", "nan", "inf", "0x1", "\uff11", "1,5", "--1", "1e", "."):
        with pytest.raises(ValueError, match=f'"{text}" is no persona or scale'):
            ec.match_personas(["pirate", text], NAMES)
    with pytest.raises(ValueError, match="pirate is there twice"):
        ec.match_personas(["pirate", "1", "pirate"], NAMES)


@pytest.mark.parametrize(
    ("text", "scale"),
    [("2", 2), ("-0.5", -0.5), ("+.7", 0.7), ("3.", 3), ("1e-3", 0.001), ("2E1", 20), ("007", 7)],
)
def test_scale_is_a_number_as_people_write_it(text, scale):
    assert ec.match_personas(["pirate", text], NAMES) == [("pirate", scale)]
    talk = ec.Talk({"pirate": (SimpleNamespace(args={"layer": 1}), None)}, None, None, None)
    talk.command(f"/scale {text}")
    assert talk.used == [("pirate", scale)]


@pytest.mark.parametrize("text", ["1_0", "nan", "inf", "\uff11", "1 2", "", "ten"])
def test_scale_that_is_none_is_refused_and_changes_nothing(text):
    talk = ec.Talk({"pirate": (SimpleNamespace(args={"layer": 1}), 1.5)}, None, None, None)
    with pytest.raises(ValueError, match="/scale takes a number"):
        talk.command(f"/scale {text}")
    assert talk.label() == "pirate x1.5> "


def test_every_name_that_a_run_may_have_can_be_typed():
    names = ["pirate+noir_detective", "travel agent+poet", "two  spaces", "7", "layer1/m__role__a"]
    for name in names:
        assert ec.match_personas(f"{name} 0.5".split(), names) == [(name, 0.5)]
    typed = "7 2 Travel Agent+Poet pirate+noir_detective -1"
    both = ec.match_personas(typed.split(), names)
    assert both == [("7", 2.0), ("travel agent+poet", None), ("pirate+noir_detective", -1.0)]


@pytest.fixture
def two_runs(finished, tmp_path):
    """A folder of two runs: one that is evaluated, and its opposite under another name."""
    for name in ("pirate", "sailor"):
        shutil.copytree(finished, tmp_path / "runs" / f"src__role__{name}")
        record = read_json(tmp_path / "runs" / f"src__role__{name}" / "run.json")
        write_json(
            tmp_path / "runs" / f"src__role__{name}" / "run.json",
            record | {"dataset": f"src__role__{name}"},
        )
    write_json(tmp_path / "runs/src__role__pirate/eval.json", {"recommended": {"scale": 1.3}})
    path = tmp_path / "runs/src__role__sailor" / VECTOR_FILE
    vector, metadata = load_vector(path)
    save_vector(path, -50 * vector, metadata)
    return tmp_path / "runs"


class Terminal:
    """A process on a pseudo-terminal; said: all that it has printed since the last `type`."""

    def __init__(self, command):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=ROOT,
            env=os.environ | {"TERM": "dumb"}, preexec_fn=self.own_terminal,
        )  # fmt: skip
        os.close(slave)
        self.said = ""

    @staticmethod
    def own_terminal():
        """In the child: its terminal sends it Ctrl-C."""
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text):
        self.said = ""
        os.write(self.master, text.encode())

    def interrupt(self, text):
        """Press Ctrl-C at a prompt, and give what is said up to this text. Once more if need be, as
        a user would: one in some thousands, pressed at once after a prompt, goes unheard."""
        for _ in range(9):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(text, seconds=10)
        return self.until(text)

    def until(self, text, seconds=200, longer_than=0):
        """Everything said, once this text is in it, and that many characters are."""
        end = time.time() + seconds
        while text not in self.said or len(self.said) <= longer_than:
            assert time.time() < end, f"no {text!r} in {self.said[-2000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.said += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the process has ended
                    assert text in self.said, f"no {text!r} in {self.said[-2000:]!r}"
        return self.said

    def ask(self, line, prompt):
        """What is said between a line and the next prompt."""
        self.type(line + "\n")
        whole = self.until(prompt)
        return whole.split(line, 1)[1].rsplit(prompt, 1)[0].strip()


def test_a_conversation_through_a_pseudo_terminal(two_runs):
    command = [sys.executable, "eval_steering.py", "--run", str(two_runs), "--chat"]
    terminal = Terminal([*command, "--max-new-tokens", "8", "--temperature", "0.02"])
    try:
        said = terminal.until("pirate x1.3> ")  # its evaluation recommends that
        assert "layer 1; personas" in said and "pirate x1.3, sailor x1" in said
        first = terminal.ask("Who are you?", "pirate x1.3> ")
        assert first and first.endswith("[cut: --max-new-tokens 8]")
        assert terminal.ask("/again", "pirate x1.3> ") != first
        assert "it sees what was said" in terminal.ask("/off", "plain model> ")
        terminal.ask("/on", "pirate x1.3> ")
        assert terminal.ask("/new", "pirate x1.3> ") == ""
        assert terminal.ask("/scale 2", "pirate x2> ") == ""
        assert terminal.ask("/persona sailor", "sailor x1> ") == ""
        other = terminal.ask("Who are you?", "sailor x1> ")
        terminal.ask("/off", "plain model> ")
        terminal.ask("/new", "plain model> ")
        plain = terminal.ask("Who are you?", "plain model> ")
        assert plain != other
        said = terminal.ask("/prompted", "prompted as sailor> ")
        assert "system prompt of sailor: Be a pirate." in said
        assert terminal.ask("And where from?", "prompted as sailor> ")
        both = "pirate x0.7 + sailor x0.5> "
        assert "it sees what was said" in terminal.ask("/both pirate 0.7 sailor 0.5", both)
        assert terminal.ask("What now?", both)
        assert 'error: "pirat" is no persona' in terminal.ask("/persona pirat", both)
        assert "error: /scale takes a number" in terminal.ask("/scale big", both)
        assert "error: scale inf" in terminal.ask("/scale 1e999", both)
        assert "error: /what is no command" in terminal.ask("/what", both)
        assert "error: /off takes nothing" in terminal.ask("/off please", both)
        assert "/prompted" in terminal.ask("/help", both)
        assert "Ctrl-D leaves" in terminal.interrupt(both)
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()


def test_ctrl_c_stops_an_answer_and_not_the_program(two_runs):
    command = [sys.executable, "eval_steering.py", "--run", str(two_runs), "--chat"]
    terminal = Terminal([*command, "--max-new-tokens", "1900"])
    try:
        terminal.until("pirate x1.3> ")
        terminal.type("Talk on!\n")
        terminal.until("Talk on!")
        terminal.until(" ", longer_than=100)  # some words of it
        os.write(terminal.master, b"\x03")
        said = terminal.until(" ...")
        assert "Traceback" not in said
        terminal.until("pirate x1.3> ")
        terminal.type("x " * 300 + "\n")
        terminal.until("model takes; /new forgets it")
        terminal.until("pirate x1.3> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()


def test_bytes_that_are_no_text_are_asked_as_what_is_left_of_them(two_runs):
    command = [sys.executable, "eval_steering.py", "--run", str(two_runs), "--max-new-tokens", "2"]
    found = subprocess.run(
        [*command, "--chat"], input=b"Who \xff\xfe?\n/quit\n", capture_output=True, cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:surrogateescape"},  # as LC_ALL=C has it
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert b"error" not in found.stdout + found.stderr
    assert b"[cut: --max-new-tokens 2]" in found.stdout
    folder = next(two_runs.iterdir())
    few = ["--max-new-tokens", "2", "--scales", "1"]
    assert ev.main(["--run", str(folder), "--prompt", "Who \udcff?", *few]) == 0


def test_vectors_of_other_layers_or_models_do_not_go_together(two_runs, capsys):
    runs = [read_run(path) for path in sorted(two_runs.iterdir())]
    talk = ec.Talk({"a": (runs[0], None), "b": (runs[1], 2.0)}, None, None, None)
    talk.use([("b", None), ("a", 0.5)])
    assert talk.label() == "b x2 + a x0.5> "
    runs[1].args["layer"] = 2
    with pytest.raises(ValueError, match=r"different layers \(\[1, 2\]\)"):
        talk.use([("a", 1.0), ("b", 1.0)])
    assert talk.label() == "b x2 + a x0.5> "  # as it was
    runs[1].args["model"] = "another"
    with pytest.raises(ValueError, match="several models"):
        ec.personas(runs, None, False)
