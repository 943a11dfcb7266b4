"""README.md: every command parses, every file named is there."""

import re
import shlex

import pytest
import torch
from conftest import ROOT

import data_filter
import eval_steering
import export_vector
import hook_model as hm
import train_steering

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPE = (ROOT / "bench" / "RECIPE.md").read_text(encoding="utf-8")
SCRIPTS = {
    "data_filter.py": data_filter,
    "eval_steering.py": eval_steering,
    "export_vector.py": export_vector,
    "train_steering.py": train_steering,
}


def test_every_command_in_the_readme_parses():
    joined = re.sub(r"\\\n\s+", "", README)
    commands = re.findall(r"^    python (\w+\.py) (.*)$", joined, re.MULTILINE)
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, arguments in commands:
        SCRIPTS[script].parse_args(shlex.split(arguments))


def test_original_run_is_the_published_one():
    (line,) = re.findall(
        r"^    python train_steering.py (.*--run-name original)$", RECIPE, re.MULTILINE
    )
    args = train_steering.parse_args(shlex.split(line))
    assert (args.layer, args.batch_size, args.gradient_accumulation) == (22, 4, 16)
    assert (args.lr, args.dtype, args.max_steps, args.save_every) == (5e-4, "bf16", 100, 5)


@pytest.fixture
def vectors(tiny_folder, tmp_path, monkeypatch):
    """The folders PIRATE and POET of the README, in the working directory: {name: vector}."""
    monkeypatch.chdir(tmp_path)
    model = hm.load_model(tiny_folder, 1)
    found = {}
    for seed, name in enumerate(("PIRATE", "POET")):
        found[name] = 0.02 * torch.randn(32, generator=torch.Generator().manual_seed(seed))
        model.set_vector(found[name])
        (tmp_path / name).mkdir()
        model.save_vector(tmp_path / name / "steering_vector.safetensors")
    return found


def test_every_snippet_of_using_a_vector_runs(vectors, tiny_folder, capsys):
    section = README.split("## Use a vector")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    *first, second = code.split("\n\n")
    first = "\n".join(first)
    assert first.count("Qwen/Qwen3-32B") == first.count("layer=22") == 1
    names = {}
    exec(first.replace("Qwen/Qwen3-32B", tiny_folder).replace("layer=22", "layer=1"), names)
    answers = capsys.readouterr().out
    assert torch.equal(names["model"].steering.vector, vectors["PIRATE"])
    exec(second, names)
    said = capsys.readouterr().out
    both = 0.7 * vectors["PIRATE"] + 0.5 * vectors["POET"]
    assert torch.allclose(names["model"].steering.vector, both, atol=1e-6)
    texts = re.split(r"^(?:0|1|1\.5) ", said, flags=re.MULTILINE)[1:]
    model, inputs, chat = (names[key] for key in ("model", "inputs", "chat"))
    plain = chat.answers(inputs, model.model.generate(**inputs, max_new_tokens=100))[0]
    assert texts[1].rstrip() == plain  # at scale 1, which a plain call has
    with model.steering_off():
        plain = chat.answers(inputs, model.model.generate(**inputs, max_new_tokens=100))[0]
    assert texts[0].rstrip() == plain != texts[2].rstrip()
    assert answers.strip() and plain not in answers


def test_every_file_that_is_named_is_there_and_every_script_is_named():
    names = set(re.findall(r"`((?:[\w]+/)*[\w]+(?:\.py|\.sh|\.md|/))`", README))
    left_behind = {"samples.md", "report.md", "imported/", "logs/"}  # by a run
    assert all((ROOT / name).exists() for name in names - left_behind), names
    assert {path.name for path in ROOT.glob("*.py")} <= names


def test_readme_can_be_read_in_ten_minutes():
    lines = README.splitlines()
    assert len(lines) <= 260 and max(map(len, lines)) <= 110


def test_help_names_every_default_once(capsys):
    for module in SCRIPTS.values():
        try:
            module.parse_args(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        text = capsys.readouterr().out
        assert "(default: " in text and "%(default)" not in text
