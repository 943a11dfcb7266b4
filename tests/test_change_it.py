"""README's edits of "Change it", in copies of the project; and edits that must not be ignored."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, persona_rows, raw_row, write_raw

import hook_model as hm
import train_steering as ts
from data_filter import DataOptions, split_dataset
from evaluation.table import number_at
from steering.fast_path import FastPath, token_mean
from steering.files import read_json, read_json_lines
from steering.vector_file import VECTOR_FILE, load_vector

README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK = "--data-root data --model tiny --layer 1 --lr 0.05 --dtype fp32 --device cpu --max-steps 6"
QUICK += " --save-every 1 --val-every 2 --val-fraction 0.2 --init-scale 0.5"
QUICK += " --dataset src__role__pirate"
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

real = train_steering.StopRequest
for name, *arguments in json.loads(sys.argv[1]):
    train_steering.StopRequest = Stop if name.endswith("!") else real
    code = importlib.import_module(name.rstrip("!")).main(arguments)
    assert code == (75 if name.endswith("!") else 0), (name, code)
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
        write_raw(folder / "data", "pirate", *persona_rows(40))
        plain = []
        for i in range(40):
            plain.append(raw_row(f"Question number {i}?", f"It is {i}!", "default", 0, i))
        write_raw(folder / "data", "0_default", plain, None)

    def edit(self, name):
        """Apply one of README's edits: "-" and " " lines must be there, "+" lines are put in."""
        title, lines = edits()[name]
        self.apply(re.search(r"[\w/]+\.py", title)[0], *lines)

    def apply(self, file, *lines):
        """Apply the lines of a diff to a file."""
        path = self.folder / file
        text = path.read_text().splitlines()
        place = None
        for line in lines:
            if line[0] == "+":
                text.insert(place, line[1:])
                place += 1
                continue
            assert text.count(line[1:]) == 1, f"{file}: {line[1:]!r}"
            place = text.index(line[1:])
            if line[0] == "-":
                del text[place]
            else:
                place += 1
        path.write_text("\n".join(text) + "\n")

    def run(self, *commands):
        """Run main functions in one process, each given as a line; returns what was printed."""
        words = json.dumps([command.split() for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, words], cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    def found(self, output="runs"):
        """The run folder below an output folder."""
        (path,) = self.folder.glob(f"{output}/*/layer1/src__role__*/run.json")
        return path.parent

    def vector(self, output="runs"):
        return load_vector(self.found(output) / VECTOR_FILE)[0]

    @property
    def evaluation(self):
        return read_json(self.found() / "eval.json")

    def metrics(self, key):
        rows = read_json_lines(self.found() / "metrics.jsonl")
        return [row[key] for row in rows if key in row]


def train(output="runs", script="train_steering"):
    """The command of a short training."""
    return f"{script} {QUICK} --output-dir {output}"


EVALUATE = "eval_steering --run runs --num-samples 2 --max-new-tokens 6 --scales 1"


@pytest.fixture
def project(tmp_path, tiny_folder):
    return Project(tmp_path, tiny_folder)


@pytest.fixture(scope="module")
def unedited(tmp_path_factory, tiny_folder):
    project = Project(tmp_path_factory.mktemp("unedited"), tiny_folder)
    project.run(train(), EVALUATE)
    return project


def test_there_are_eight_and_each_names_file_and_place():
    assert len(edits()) == 8
    for title, lines in edits().values():
        assert re.search(r": \w+(\.\w+)? in [\w/]+\.py", title), title
        assert len(lines) <= 5


def test_another_loss_changes_the_training_and_no_reported_number(project, unedited):
    project.edit("another loss")
    project.run(train(), EVALUATE)
    # The same vector, another loss; then another gradient.
    assert project.metrics("val_loss")[0] > unedited.metrics("val_loss")[0] + 0.1
    assert not torch.equal(project.vector(), unedited.vector())
    for condition in ("vanilla", "prompted"):
        nll = number_at(project.evaluation, condition, "nll")
        assert nll == number_at(unedited.evaluation, condition, "nll") is not None


def test_a_penalty_has_a_gradient_and_shortens_the_vector(project, unedited):
    project.edit("a penalty")
    project.run(train())
    norm = project.metrics("vector_norm")[-1]
    assert norm < 0.95 * unedited.metrics("vector_norm")[-1]
    start = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 0.5
    added = project.metrics("loss")[0] - unedited.metrics("loss")[0]
    assert added == pytest.approx(0.01 * start.square().sum().item(), rel=1e-3)


def test_another_optimizer_goes_through_a_kill_and_a_resume(project, unedited):
    project.edit("another optimizer")
    said = project.run(train(), train("stopped", "train_steering!"), train("stopped"))
    assert "resume   after step 3 of 6" in said
    assert torch.equal(project.vector(), project.vector("stopped"))
    assert not torch.allclose(project.vector(), unedited.vector())
    state = torch.load(project.found("stopped") / "checkpoint-00006.pt", weights_only=True)
    assert "momentum_buffer" in state["state"]["optimizer_state"]["state"][0]


def test_learned_scale_is_trained_saved_and_steered_with(project):
    project.edit("a learned scale")
    stopped = [train("stopped", "train_steering!"), train("stopped")]
    assert "33 trained" in project.run(train(), *stopped, EVALUATE)
    state = torch.load(project.found() / "checkpoint-00006.pt", weights_only=True)
    best = state["state"]["best"]
    assert abs(best["gain"] - 1) > 0.01
    assert torch.equal(project.vector(), best["gain"] * best["vector"])
    assert torch.equal(project.vector(), project.vector("stopped"))
    steered = number_at(project.evaluation, "steered x1", "nll")
    assert steered < number_at(project.evaluation, "vanilla", "nll")


def test_vector_at_two_layers_is_trained_and_evaluated_there(project, tiny_folder):
    project.edit("a vector at two layers")
    project.run(train(), EVALUATE)
    # The reference: this project's own model, with a second hook put there by hand.
    model = hm.load_model(tiny_folder, 1, "fp32", "cpu")
    second = hm.ResidualHook(32)
    second.vector.data.copy_(project.vector())
    model.set_vector(project.vector())
    options = DataOptions(data_root=str(project.folder / "data"), val_fraction=0.2)
    chat = hm.load_chat(tiny_folder)
    splits = split_dataset("src__role__pirate", options.datasets(), chat, options, 20_000)

    def losses():
        per_token = partial(FastPath(model).losses, token_loss=ts.token_loss)
        return [token_mean(per_token, rows, 1024) for rows in (splits.validation, splits.heldout)]

    one_place = losses()
    model.layers[3].register_forward_hook(second.hook)
    both = losses()
    best = read_json(project.found() / "run.json")["final"]["best_val"]
    recorded = [best, number_at(project.evaluation, "steered x1", "nll")]
    assert recorded == pytest.approx(both, abs=5e-6)
    assert both != pytest.approx(one_place, abs=2e-5)


def test_another_measure_and_another_condition_are_in_every_output(project):
    project.edit("another measure of answers")
    project.edit("another condition")
    said = project.run(train(), EVALUATE, "eval_steering --run runs --report-only")
    heads = [line.split() for line in said.splitlines() if line.startswith("answers ")]
    assert any("shouts" in head for head in heads)
    result = project.evaluation
    for condition in ("steered x1", "half"):
        texts = [sample["answers"][condition] for sample in result["samples"]]
        value = sum(text.count("!") for text in texts) / len(texts)
        assert number_at(result, condition, "shouts") == value
    runs = project.folder / "runs"
    lines = (runs / "report.csv").read_text().splitlines()
    page = (runs / "report.html").read_text().split('id="index">')[1].split("</script>")[0]
    index = json.loads(page)
    assert "shouts" in index["measures"] and "half" in index["rows"][0]["conditions"]
    assert "shouts" in lines[0].split(",") and any(",half," in line for line in lines)
    samples = (project.found() / "samples.md").read_text()
    assert "shouts" in samples
    for text in (said, samples):
        assert re.search(r"^\W*half\b", text, re.MULTILINE)


def test_another_data_layout_is_read_like_the_others(project):
    project.edit("another data layout")
    rows = []
    for row in persona_rows(40)[0]:
        flat = {key: row[key] for key in ("system_prompt", "question", "label")}
        rows.append({**flat, "messages": row["conversation"], "extract_score": 3})
    (project.folder / "listed").mkdir()
    (project.folder / "listed" / "src__role__pirate.json").write_text(json.dumps(rows))
    said = project.run(
        "data_filter --data-root listed", train() + " --data-root listed", train("same")
    )
    assert re.search(r"src__role__pirate .* 40 +40 ", said)
    assert torch.equal(project.vector(), project.vector("same"))


def test_a_new_loading_option_reaches_training_and_evaluation(project):
    loading = "steering/loading.py"
    project.apply(loading, '     quantize: str = "none"', '+    attention: str = "sdpa"')
    project.apply(
        loading,
        '     add("--device", help="auto, cuda, cuda:1, mps or cpu")',
        '+    add("--attention", help="attention kernel")',
    )
    project.apply(
        loading,
        '         "device_map": options.device_map,',
        '+        "attn_implementation": options.attention,',
    )
    project.apply(
        "hook_model.py",
        "         self.model = model.requires_grad_(False).eval()",
        '+        print("attention", model.config._attn_implementation)',
    )
    other = EVALUATE + " --attention sdpa --restart"
    said = project.run(train() + " --attention eager", EVALUATE, other)
    assert re.findall(r"^attention (\w+)$", said, re.MULTILINE) == ["eager", "eager", "sdpa"]


# ---------------------------------------------------------------- edits that nothing may ignore


def nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda *given: nll(*given) / nll(*given).sum(), "depends on the other tokens"),
        (lambda *given: nll(*given).mean(), "must give one number for each"),
    ],
)
def test_a_loss_that_is_not_of_each_token_alone_is_refused(training, monkeypatch, loss, said):
    monkeypatch.setattr(ts, "token_loss", loss)
    assert said in training(code=1)
    assert not list(training.output.rglob(VECTOR_FILE))


def test_a_penalty_inside_of_the_loss_is_refused_since_its_gradient_would_be_lost(
    training, monkeypatch
):
    steering = []
    real = ts.set_start

    def set_start(model, args):
        real(model, args)
        steering.append(model.steering)

    def loss(logits, targets):
        return nll(logits, targets) + steering[0].vector.square().sum()

    monkeypatch.setattr(ts, "set_start", set_start)
    monkeypatch.setattr(ts, "token_loss", loss)
    assert "put a penalty into extra_loss" in training(code=1)


def test_a_hook_that_adds_something_else_than_is_saved_is_refused(training, monkeypatch):
    turn = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(hm.ResidualHook, "forward", lambda hook, x: x + hook.vector + x @ turn)
    assert "ResidualHook.forward adds something" in training(code=1)
    assert not list(training.output.rglob(VECTOR_FILE))


def test_a_rate_given_to_the_optimizer_is_the_one_that_is_used(training, monkeypatch):
    monkeypatch.setattr(ts, "make_optimizer", lambda vectors, lr: torch.optim.AdamW(vectors, 0.002))
    assert "lr       0.002 = " in training("--warmup-ratio 0")
    assert read_json_lines(training.folder / "metrics.jsonl")[1]["lr"] == 0.002
