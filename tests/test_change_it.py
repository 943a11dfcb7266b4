"""README's edits of "Change it", and those that must not be ignored, in copies of the project."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, persona_rows, raw_row, write_raw

from data_filter import DataOptions, split_dataset
from hook_model import ResidualHook, load_chat, load_model
from steering.fast_path import FastPath, token_mean
from steering.vector_file import VECTOR_FILE, load_vector
from train_steering import token_loss

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Runs main functions one after the other in one process: [[script, arguments ...], ...]; a training
# whose script is "train_steering!" is stopped, as by SIGTERM, in its third step.
DRIVER = """
import importlib, json, sys
import train_steering

class Stop:
    steps, in_loop = 0, False
    @property
    def exit_code(self):
        self.steps += 1
        return 75 if self.steps >= 3 else None

real, codes = train_steering.StopRequest, []
for name, *arguments in json.loads(sys.argv[1]):
    train_steering.StopRequest = Stop if name.endswith("!") else real
    codes.append(importlib.import_module(name.rstrip("!")).main(arguments))
print("codes", codes)
"""


def edits():
    """{start of its title: (title, lines)} of the edits in README."""
    block = README.split("## Change it")[1].split("```diff\n")[1].split("```")[0]
    parts = re.findall(r"^# (.*)\n((?:[-+ ].*\n)+)", block, re.MULTILINE)
    return {title.split(":")[0]: (title, lines.splitlines()) for title, lines in parts}


class Project:
    """A copy of the project with a small model and data, in which edits are tried."""

    def __init__(self, folder, tiny_folder):
        self.folder = folder
        for name in ("steering", "evaluation", "interop"):
            shutil.copytree(ROOT / name, folder / name)
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        (folder / "tiny").symlink_to(tiny_folder)
        rows, scores = persona_rows(40)
        write_raw(folder / "data", "pirate", rows, scores)
        plain = [
            raw_row(f"Question number {i}?", f"It is {i}!", "default", 0, i) for i in range(40)
        ]
        write_raw(folder / "data", "0_default", plain, None)

    def edit(self, name):
        """Apply one of README's edits: "-" and " " lines must be there, "+" lines are put in."""
        title, lines = edits()[name]
        self.apply(re.search(r"[\w/]+\.py", title)[0], lines)

    def apply(self, file, lines):
        """Apply the lines of a diff to a file."""
        path = self.folder / file
        text = path.read_text().splitlines()
        place = None
        for line in lines:
            if line[0] == "+":
                text.insert(place, line[1:])
                place += 1
                continue
            assert text.count(line[1:]) == 1, f"{path.name}: {line[1:]!r}"
            place = text.index(line[1:])
            if line[0] == "-":
                del text[place]
            else:
                place += 1
        path.write_text("\n".join(text) + "\n")

    def run(self, *commands):
        """Run main functions in one process: (exit codes, what was printed)."""
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(commands)],
            cwd=self.folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        *printed, codes = done.stdout.strip().splitlines()
        return json.loads(codes.removeprefix("codes ")), "\n".join([*printed, done.stderr])

    def train(self, output, *more, script="train_steering"):
        """The command of a short training."""
        where = ["--data-root", "data", "--model", "tiny", "--output-dir", output, "--layer", "1"]
        how = ["--lr", "0.05", "--dtype", "fp32", "--device", "cpu", "--max-steps", "6"]
        how += ["--save-every", "1", "--val-every", "2", "--val-fraction", "0.2"]
        return [
            script,
            *where,
            *how,
            "--init-scale",
            "0.5",
            "--dataset",
            "src__role__pirate",
            *more,
        ]

    def evaluate(self, output):
        quick = ["--num-samples", "2", "--max-new-tokens", "6", "--scales", "1"]
        return ["eval_steering", "--run", output, *quick]

    def found(self, output):
        """The run folder below an output folder."""
        (path,) = self.folder.glob(f"{output}/*/layer1/src__role__*/run.json")
        return path.parent

    def json(self, output, name):
        return json.loads((self.found(output) / name).read_text())

    def metrics(self, output, key):
        lines = (self.found(output) / "metrics.jsonl").read_text().splitlines()
        return [row[key] for row in map(json.loads, lines) if key in row]


@pytest.fixture
def project(tmp_path, tiny_folder):
    return Project(tmp_path, tiny_folder)


@pytest.fixture(scope="module")
def unedited(tmp_path_factory, tiny_folder):
    project = Project(tmp_path_factory.mktemp("unedited"), tiny_folder)
    codes, _ = project.run(project.train("runs"), project.evaluate("runs"))
    assert codes == [0, 0]
    return project


def test_there_are_seven_and_each_names_file_and_place():
    assert len(edits()) == 7
    for title, lines in edits().values():
        assert re.search(r": \w+(\.\w+)? in [\w/]+\.py", title), title
        assert len(lines) <= 5


def test_another_loss_changes_the_training_and_no_reported_number(project, unedited):
    project.edit("another loss")
    codes, _ = project.run(project.train("runs"), project.evaluate("runs"))
    assert codes == [0, 0]
    ours, theirs = (p.metrics("runs", "val_loss")[0] for p in (project, unedited))
    assert ours > theirs + 0.1  # the same vector, another loss
    vectors = [load_vector(p.found("runs") / VECTOR_FILE)[0] for p in (project, unedited)]
    assert not torch.equal(*vectors)  # and another gradient
    tables = [p.json("runs", "eval.json")["likelihood"] for p in (project, unedited)]
    for condition in ("vanilla", "prompted"):
        assert tables[0][condition]["nll"] == tables[1][condition]["nll"]


def test_another_optimizer_goes_through_a_kill_and_a_resume(project, unedited):
    project.edit("another optimizer")
    codes, said = project.run(
        project.train("whole"),
        project.train("stopped", script="train_steering!"),
        project.train("stopped"),
    )
    assert codes == [0, 75, 0] and "resume   after step 3 of 6" in said
    whole, stopped, adam = (
        load_vector(p.found(output) / VECTOR_FILE)[0]
        for p, output in ((project, "whole"), (project, "stopped"), (unedited, "runs"))
    )
    assert torch.equal(whole, stopped) and not torch.allclose(whole, adam)
    state = torch.load(project.found("stopped") / "checkpoint-00006.pt", weights_only=True)
    assert "momentum_buffer" in state["state"]["optimizer_state"]["state"][0]


def test_learned_scale_is_trained_saved_and_steered_with(project):
    project.edit("a learned scale")
    codes, said = project.run(
        project.train("runs"),
        project.train("stopped", script="train_steering!"),
        project.train("stopped"),
        project.evaluate("runs"),
    )
    assert codes == [0, 0 + 75, 0, 0] and "33 trained" in said
    state = torch.load(project.found("runs") / "checkpoint-00006.pt", weights_only=True)
    gain, vector = state["state"]["best"]["gain"], state["state"]["best"]["vector"]
    assert abs(gain - 1) > 0.01
    saved = load_vector(project.found("runs") / VECTOR_FILE)[0]
    assert torch.equal(saved, gain * vector)
    assert torch.equal(saved, load_vector(project.found("stopped") / VECTOR_FILE)[0])
    table = project.json("runs", "eval.json")["likelihood"]
    assert table["steered"]["nll"] < table["vanilla"]["nll"]


def test_vector_at_two_layers_is_trained_and_evaluated_there(project, tiny_folder):
    project.edit("a vector at two layers")
    codes, _ = project.run(project.train("runs"), project.evaluate("runs"))
    assert codes == [0, 0]
    # The reference: this project's own model, with a second hook put there by hand.
    vector = load_vector(project.found("runs") / VECTOR_FILE)[0]
    model, chat = load_model(tiny_folder, 1, "fp32", "cpu"), load_chat(tiny_folder)
    second = ResidualHook(32)
    second.vector.data.copy_(vector)
    model.set_vector(vector)
    options = DataOptions(data_root=str(project.folder / "data"), val_fraction=0.2)
    splits = split_dataset("src__role__pirate", options.datasets(), chat, options, 20_000)

    def mean_loss(examples):
        losses = partial(FastPath(model).losses, token_loss=token_loss)
        return token_mean(losses, examples, 1024)

    one_place = mean_loss(splits.validation), mean_loss(splits.heldout)
    model.layers[3].register_forward_hook(second.hook)
    both = mean_loss(splits.validation), mean_loss(splits.heldout)
    recorded = (
        project.json("runs", "run.json")["final"]["best_val"],
        project.json("runs", "eval.json")["likelihood"]["steered"]["nll"],
    )
    assert recorded == pytest.approx(both, abs=5e-6)
    assert both != pytest.approx(one_place, abs=2e-5)


def test_another_metric_is_in_every_table(project):
    project.edit("another metric of answers")
    codes, said = project.run(
        project.train("runs"),
        project.evaluate("runs"),
        ["eval_steering", "--run", "runs", "--report-only"],
    )
    assert codes == [0, 0, 0]
    head = next(line for line in said.splitlines() if line.startswith("answers "))
    assert "shouts" in head.split()
    result = project.json("runs", "eval.json")
    texts = [sample["answers"]["steered x1"] for sample in result["samples"]]
    value = sum(text.count("!") for text in texts) / len(texts)
    assert result["answers"]["steered x1"]["shouts"] == value
    assert "shouts" in (project.found("runs") / "samples.md").read_text()
    assert "| shouts |" in (project.folder / "runs" / "report.md").read_text()
    assert ",shouts," in (project.folder / "runs" / "report.csv").read_text().splitlines()[0]


def test_another_data_layout_is_read_like_the_others(project):
    project.edit("another data layout")
    rows = []
    for row in persona_rows(40)[0]:
        flat = {key: row[key] for key in ("system_prompt", "question", "label")}
        rows.append({**flat, "messages": row["conversation"], "extract_score": 3})
    (project.folder / "listed").mkdir()
    (project.folder / "listed" / "src__role__pirate.json").write_text(json.dumps(rows))
    codes, said = project.run(
        ["data_filter", "--data-root", "listed"],
        project.train("runs", "--data-root", "listed"),
        project.train("same"),
    )
    assert codes == [0, 0, 0] and re.search(r"src__role__pirate .* 40 +40 ", said)
    vectors = [load_vector(project.found(name) / VECTOR_FILE)[0] for name in ("runs", "same")]
    assert torch.equal(*vectors)


# ---------------------------------------------------------------- edits that nothing may ignore


def test_a_penalty_has_a_gradient_and_shortens_the_vector(project, unedited):
    project.edit("a penalty")
    codes, _ = project.run(project.train("runs"))
    assert codes == [0]
    ours, theirs = (p.metrics("runs", "vector_norm")[-1] for p in (project, unedited))
    assert ours < 0.95 * theirs
    first, other = (p.metrics("runs", "loss")[0] for p in (project, unedited))
    start = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 0.5
    assert first - other == pytest.approx(0.01 * start.square().sum().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("nll / nll.sum()", "depends on the other tokens"),
        ("nll.mean()", "must give one number for each"),
    ],
)
def test_a_loss_that_is_not_of_each_token_alone_is_refused(project, loss, said):
    lines = [
        '-    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")',
        '+    nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")',
        f"+    return {loss}",
    ]
    project.apply("train_steering.py", lines)
    codes, printed = project.run(project.train("runs"))
    assert codes == [1] and said in printed
    assert not list(project.folder.rglob(VECTOR_FILE))


def test_a_penalty_inside_of_the_loss_is_refused_since_its_gradient_would_be_lost(project):
    lines = [
        '-    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")',
        '+    nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")',
        "+    return nll + VECTORS[0].square().sum()",
    ]
    project.apply("train_steering.py", lines)
    project.apply(
        "train_steering.py",
        ["     steering = model.steering", "+    VECTORS.append(steering.vector)"],
    )
    project.apply("train_steering.py", [' log = logging.getLogger("steering")', "+VECTORS = []"])
    codes, printed = project.run(project.train("runs"))
    assert codes == [1] and "put a penalty into extra_loss" in printed


def test_a_hook_that_adds_something_else_than_is_saved_is_refused(project):
    lines = [
        "         self.in_tuple = False",
        "+        self.a = nn.Parameter(torch.randn(hidden_size, 2, generator=generator) * 0.1)",
        "+        self.b = nn.Parameter(torch.randn(2, hidden_size, generator=generator) * 0.1)",
    ]
    project.apply("hook_model.py", lines)
    lines = [
        "-        return hidden_states + vector.to(hidden_states.device, hidden_states.dtype)",
        "+        return hidden_states + hidden_states @ self.a @ self.b",
    ]
    project.apply("hook_model.py", lines)
    codes, printed = project.run(project.train("runs", "--init-scale", "0"))
    assert codes == [1] and "ResidualHook.forward adds something" in printed
    assert not list(project.folder.rglob(VECTOR_FILE))


def test_a_split_that_was_edited_after_training_is_not_evaluated(project):
    codes, _ = project.run(project.train("runs"))
    assert codes == [0]
    project.apply("data_filter.py", [" def hash_unit(*parts):", "+    parts = (1, *parts)"])
    codes, printed = project.run(project.evaluate("runs"))
    assert codes == [2] and "today's held-out questions" in printed
    assert not list(project.folder.rglob("eval.json"))


def test_a_rate_given_to_the_optimizer_is_the_one_that_is_used(project):
    lines = [
        "-    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)",
        "+    return torch.optim.AdamW(parameters, lr=0.002, weight_decay=0.0)",
    ]
    project.apply("train_steering.py", lines)
    codes, printed = project.run(project.train("runs", "--warmup-ratio", "0"))
    assert codes == [0] and "lr       0.002 = " in printed
    assert project.metrics("runs", "lr")[0] == 0.002


def test_a_new_loading_option_reaches_training_and_evaluation(project):
    project.apply(
        "steering/loading.py",
        ['     quantize: str = "none"', '+    attention: str = "sdpa"'],
    )
    project.apply(
        "steering/loading.py",
        [
            '     add("--device", help="auto, cuda, cuda:1, mps or cpu")',
            '+    add("--attention", help="attention kernel")',
        ],
    )
    project.apply(
        "steering/loading.py",
        [
            '         "device_map": options.device_map,',
            '+        "attn_implementation": options.attention,',
        ],
    )
    project.apply(
        "hook_model.py",
        [
            "         self.model = model.requires_grad_(False).eval()",
            '+        print("attention", model.config._attn_implementation)',
        ],
    )
    codes, printed = project.run(
        project.train("runs", "--attention", "eager"),
        project.evaluate("runs"),
        [*project.evaluate("runs"), "--attention", "sdpa", "--restart"],
    )
    assert codes == [0, 0, 0]
    used = [line.split()[1] for line in printed.splitlines() if line.startswith("attention ")]
    assert used == ["eager", "eager", "sdpa"]
