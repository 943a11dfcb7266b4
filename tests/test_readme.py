"""README.md: every command parses, every file named is there."""

import re
import shlex

from conftest import ROOT

import data_filter
import eval_steering
import train_steering

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    "data_filter.py": data_filter,
    "eval_steering.py": eval_steering,
    "train_steering.py": train_steering,
}


def test_every_command_in_the_readme_parses():
    commands = re.findall(r"^    python (\w+\.py) (.*)$", README, re.MULTILINE)
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, arguments in commands:
        SCRIPTS[script].parse_args(shlex.split(arguments))


def test_original_run_is_the_published_one():
    (line,) = re.findall(
        r"^    python train_steering.py (.*--run-name original)$", README, re.MULTILINE
    )
    args = train_steering.parse_args(shlex.split(line))
    assert (args.layer, args.batch_size, args.gradient_accumulation) == (22, 4, 16)
    assert (args.lr, args.dtype, args.max_steps, args.save_every) == (5e-4, "bf16", 100, 5)


def test_every_file_in_the_tree_is_there_and_every_script_is_in_it():
    tree = README.split("## Files")[1].split("```")[1]
    names = [line.split()[0] for line in tree.strip().splitlines()]
    assert all((ROOT / name).exists() for name in names)
    assert {path.name for path in ROOT.glob("*.py")} <= set(names)


def test_help_names_every_default_once(capsys):
    for module in SCRIPTS.values():
        try:
            module.parse_args(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        text = capsys.readouterr().out
        assert "(default: " in text and "%(default)" not in text
