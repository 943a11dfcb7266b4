"""README.md, here and in folders: commands parse, snippets run, examples are read, files exist."""

import json
import re
import shlex

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

import data_filter
import eval_steering
import export_vector
import hook_model as hm
import train_steering

PAGES = {  # by the folder that a page lies in
    folder: (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for folder in (".", "steering", "evaluation", "interop")
}
README = PAGES["."]
RECIPE = (ROOT / "bench" / "RECIPE.md").read_text(encoding="utf-8")
SCRIPTS = {
    "data_filter.py": data_filter,
    "eval_steering.py": eval_steering,
    "export_vector.py": export_vector,
    "train_steering.py": train_steering,
}
LEAST = {  # what each script needs before it parses
    "data_filter.py": [],
    "eval_steering.py": ["--run", "RUN"],
    "export_vector.py": ["RUN", "--format", "pt", "--out", "OUT"],
    "train_steering.py": ["--dataset", "NAME"],
}
LEFT_BEHIND = {"samples.md", "imported/", "logs/"}  # by a run, not in the project


def commands_of(page):
    """(script, options) of every command in an indented block of a page."""
    joined = re.sub(r"\\\n\s+", "", page)
    return re.findall(r"^ {4}(?:python|torchrun.*?) (\w+\.py)(?: (.*))?$", joined, re.MULTILINE)


def help_of(module, capsys, monkeypatch):
    """{option: its entry in --help, on one line}."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out.split("\noptions:\n")[1]
    parts = re.split(r"^  (?:-h, )?(--[\w-]+)", text, flags=re.MULTILINE)
    return {
        option: " ".join(entry.split("\n\n")[0].split())  # without the next group's title
        for option, entry in zip(parts[1::2], parts[2::2], strict=True)
    }


def section_of(page, title):
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


# ------------------------------------------------------------------ commands and options


@pytest.mark.parametrize("folder", PAGES)
def test_every_command_in_a_readme_parses(folder):
    commands = commands_of(PAGES[folder])
    assert commands
    for script, options in commands:
        SCRIPTS[script].parse_args(shlex.split(options))


def test_the_readme_shows_every_script():
    assert {script for script, _ in commands_of(README)} == set(SCRIPTS)


def test_options_and_variables_of_the_shell_loop_are_its_own():
    calls = re.findall(r"run_all_roles\.sh roles\.txt ([^';\n]*)", README)
    assert len(calls) == 2  # tmux and Slurm
    for options in calls:
        train_steering.parse_args(["--list-file", "roles.txt", *shlex.split(options)])
    loop = (ROOT / "run_all_roles.sh").read_text(encoding="utf-8")
    section = section_of(README, "All personas")
    variables = {*re.findall(r"\b([A-Z_]{4,})=", section)}
    assert {"DATA_ROOT", "ONLY", "LIMIT", "GPUS", "DRY_RUN"} <= variables
    for name in variables:
        assert re.search(rf"^#   {name} +\w", loop, re.MULTILINE), name  # in its header
        assert re.search(rf"\${{{name}[:}}-]", loop.split("set -euo")[1]), name  # and in its code
    for form in ("`bash run_all_roles.sh status`", "`--help`"):
        assert form in section
    assert re.search(r"^#   bash run_all_roles\.sh status", loop, re.MULTILINE)
    assert "|| $1 == --help ]]" in loop and "if [[ $command == status ]]" in loop


@pytest.mark.parametrize("folder", PAGES)
def test_every_option_that_the_text_names_is_there(folder, capsys, monkeypatch):
    known = {}
    for script, module in SCRIPTS.items():
        known[script] = {"--help", *help_of(module, capsys, monkeypatch)}
    of_any = set.union(*known.values())
    text = re.sub(r"^```.*?^```|^    .*?$", "", PAGES[folder], flags=re.MULTILINE | re.DOTALL)
    count = 0
    for span in re.findall(r"`([^`]+)`", text):
        options = re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
        assert {*options} <= known.get(span.split()[0], of_any), span
        count += len(options)
    assert count > 0


def test_original_run_is_the_published_one():
    (line,) = re.findall(
        r"^    python train_steering.py (.*--run-name original)$", RECIPE, re.MULTILINE
    )
    args = train_steering.parse_args(shlex.split(line))
    assert (args.layer, args.batch_size, args.gradient_accumulation) == ([22], 4, 16)
    assert (args.lr, args.dtype, args.max_steps, args.save_every) == (5e-4, "bf16", 100, 5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_default_once(script, capsys, monkeypatch):
    entries = help_of(SCRIPTS[script], capsys, monkeypatch)
    args = vars(SCRIPTS[script].parse_args(LEAST[script]))
    with_default = 0
    for option, entry in entries.items():
        value = args.get(option.removeprefix("--").replace("-", "_"))
        given = option in LEAST[script] or option in ("--help", "--from")
        if given or value is None or value is False:
            assert "(default: " not in entry, f"{option}: {entry}"
            continue
        assert entry.count("(default: ") == 1, f"{option}: {entry}"
        assert entry.endswith(f"(default: {value})"), f"{option}: {entry}"
        with_default += 1
    assert with_default > 0


# ------------------------------------------------------------------ snippets and examples


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


def answers_without_us(folder, names, vector, tokens=100):
    """Answers to a snippet's inputs by transformers alone, with a hook that adds a vector."""
    chat, inputs = names["chat"], names["inputs"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=names["model"].model.dtype).eval()

    def add(module, arguments, output):
        if isinstance(output, tuple):  # older versions of transformers
            return (output[0] + vector.to(output[0].dtype), *output[1:])
        return output + vector.to(output.dtype)

    model.model.layers[1].register_forward_hook(add)
    # `generate` hands the head a strided slice, which rounds differently in bf16.
    model.lm_head.register_forward_pre_hook(lambda module, given: given[0].contiguous())
    return chat.answers(inputs, model.generate(**inputs, max_new_tokens=tokens))


def test_every_snippet_of_using_a_vector_runs(vectors, tiny_folder, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", section_of(README, "Use a vector"), re.DOTALL)
    *first, second = code.split("\n\n")
    first = "\n".join(first)
    assert first.count("Qwen/Qwen3-32B") == first.count("layer=22") == 1
    names = {}
    exec(first.replace("Qwen/Qwen3-32B", tiny_folder).replace("layer=22", "layer=1"), names)
    pirate = capsys.readouterr().out
    plain = answers_without_us(tiny_folder, names, torch.zeros(32))
    expected = answers_without_us(tiny_folder, names, vectors["PIRATE"])
    assert len(expected) == 2 and pirate == "".join(f"{answer}\n" for answer in expected)
    assert expected[0] != plain[0] and expected[1] != plain[1]  # so the vector was at work
    exec(second, names)
    printed = capsys.readouterr().out
    pirate, poet = vectors["PIRATE"], vectors["POET"]
    texts = []
    for i, vector in enumerate([0 * poet, 1.5 * pirate, poet, 0.7 * pirate + 0.5 * poet]):
        assert torch.allclose(names["vectors"][i], vector, atol=1e-6)
        texts.append(answers_without_us(tiny_folder, names, vector, tokens=60)[i])
    assert plain[0].startswith(texts[0]) and len({*texts}) == 4
    assert printed == "".join(f"{text}\n" for text in texts)


def json_blocks(text):
    """The objects in the indented blocks of a text."""
    blocks = re.findall(r"(?:^ {4,}\S.*\n)+", text + "\n", re.MULTILINE)
    return [json.loads(block) for block in blocks if block.lstrip().startswith("{")]


def kept_rows(root, name, **more):
    """The rows that the filter keeps of a dataset."""
    options = data_filter.DataOptions(data_root=str(root), **more)
    found = data_filter.filter_dataset(name, options.datasets(), options)
    assert found.total == 1 and not found.problems, found.problems
    return found.rows


def write_line(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) + "\n")


def test_the_example_of_a_data_line_is_read_and_kept(tmp_path):
    (row,) = json_blocks(section_of(README, "Data layouts"))
    write_line(tmp_path / "me__role__pirate.jsonl", row)
    (kept,) = kept_rows(tmp_path, "me__role__pirate")
    assert (kept["question"], kept["extract_score"]) == ("Why?", 3)
    assert kept["messages"][-1]["content"] == "Arr!"


def test_the_example_of_each_layout_is_read_and_kept(tmp_path):
    response, scores, row = json_blocks(section_of(PAGES["steering"], "Data layouts"))
    places = {  # in the order of that section: responses, and what scores are called
        "raw": ("raw/gemma-2-27b/roles_240", "extract_scores", {}),
        "assistant-axis": ("axis", "scores", {"source_model": "gemma-2-27b", "kind": "role"}),
    }
    for place, folder_of_scores, more in places.values():
        write_line(tmp_path / place / "responses" / "pirate.jsonl", response)
        write_line(tmp_path / place / folder_of_scores / "pirate.json", scores)
        root = tmp_path / place.split("/")[0]
        (kept,) = kept_rows(root, "gemma-2-27b__role__pirate", **more)
        assert kept["messages"][-1]["content"] == "Arr!" and kept["extract_score"] == 3
    write_line(tmp_path / "own" / "me__role__pirate.jsonl", row)
    assert len(kept_rows(tmp_path / "own", "me__role__pirate")) == 1


# ------------------------------------------------------------------ files and length


@pytest.mark.parametrize("folder", PAGES)
def test_every_file_that_is_named_is_there(folder):
    page = PAGES[folder]
    names = {*re.findall(r"`((?:[\w]+/)*[\w]+(?:\.py|\.sh|\.md|/))`", page)} - LEFT_BEHIND
    names |= {link for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link}
    assert names
    for name in names:
        assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name
    for name, file in re.findall(r"`(\w+)` in `([\w/]+\.py)`", page):
        code = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {name}\b", code, re.MULTILINE), f"{name} in {file}"


def test_the_tree_names_every_script_and_folder():
    (tree,) = re.findall(r"^```\n(.*?)^```", section_of(README, "Change it"), re.M | re.DOTALL)
    named = set()
    for line in tree.splitlines():
        names, comment = re.fullmatch(r"((?:\S+ )+) +(\S.*)", line).groups()
        named |= {*names.split()}
        assert comment
    ignored = (ROOT / ".gitignore").read_text().split()
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
    there = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]}
    missing = (there | (folders - {*ignored})) - named
    assert not missing and all((ROOT / name).exists() for name in named), (missing, named)


def test_readme_can_be_read_in_ten_minutes():
    lines = README.splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 110
    assert len(README.split()) <= 10 * 200  # words a minute
