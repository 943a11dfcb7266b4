"""What a vector costs: tasks of lm-evaluation-harness, of the plain, prompted and steered model.

    tasks = Tasks(("gsm8k", "arc_easy"), limit=100)
    add_capability(result, run, tasks, shelf)

Needs the lm_eval package, which downloads the tasks' data, but for those of a folder of one's own.
"""

import contextlib
import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from evaluation.answers import announce
from evaluation.kept import code_of, kept_beside
from evaluation.table import Measure, add_column, condition_to_use, drop_columns
from steering.vector_file import vector_digest

SURE = 1.96  # standard errors to either side of a mean in which the truth is, 95 times of 100


@dataclass(frozen=True)
class Tasks:
    """names: of tasks; limit: rows of each; folder: where tasks of one's own are, or None."""

    names: tuple
    limit: int
    folder: str | None = None
    batch_size: int = 16

    def asked(self):
        """What decides the scores, as a dict: the files of the folder count, not its place.
        Raises ValueError without the package, and for a task that it does not have."""
        try:
            import lm_eval
        except ImportError as error:
            raise ValueError("--capability needs lm_eval (pip install lm_eval[hf])") from error
        there = task_manager(self.folder).all_tasks
        unknown = [name for name in self.names if name not in there]
        if unknown:
            raise ValueError(f"--capability {' '.join(unknown)}: lm_eval has no such task")
        files = {}
        if self.folder:
            for path in sorted(Path(self.folder).rglob("*.*")):
                if path.is_file() and path.suffix != ".pyc":
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    files[str(path.relative_to(self.folder))] = digest[:16]
        return {
            "tasks": sorted(self.names),
            "limit": self.limit,
            "files": files,
            "lm_eval": lm_eval.__version__,
            "code": code_of("interop/capability.py"),
        }


@functools.cache
def task_manager(folder):
    """lm_eval's index of its tasks, and of a folder's: seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


@contextlib.contextmanager
def acting(model, scale, condition):
    """Context: the model's vector acts `scale` times. RuntimeError at its end unless it did so in
    every forward pass, or in none for scale 0: then the tasks were given to another model."""
    calls = []

    def note(module, inputs, output):
        calls.append(bool((output[..., -1, :] != inputs[0][..., -1, :]).any()))

    handle = model.steering.register_forward_hook(note)
    try:
        with model.scaled(scale):
            yield
    finally:
        handle.remove()
    if not calls or calls != [scale != 0] * len(calls):
        acted = f"the vector acted in {sum(calls)} of {len(calls)} forward passes"
        raise RuntimeError(f"capability, {condition}: {acted}")


def run_tasks(model, chat, system_prompt, tasks):
    """{"task metric": {"value", "stderr" or None, "higher": whether that is better}} of a
    SteerModel as it is, asked in ChatFormat's words. system_prompt: before each, or None."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """The package's own would drop a system prompt that the template has no role for."""

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            turns = [{key: turn[key] for key in ("role", "content")} for turn in chat_history]
            begun = ""
            if not add_generation_prompt:
                begun = chat.lead + turns.pop()["content"]
            text = chat.prompt_text(turns)
            if system_prompt and system_prompt not in text:
                raise RuntimeError("the system prompt is not in the prompt of a task")
            return text + begun

    found = simple_evaluate(
        Harness(model.model, tokenizer=chat.tokenizer, batch_size=tasks.batch_size),
        tasks=list(tasks.names),
        limit=tasks.limit,
        task_manager=task_manager(tasks.folder),
        system_instruction=system_prompt,
        apply_chat_template=True,
        log_samples=False,
        bootstrap_iters=1000,
    )
    scores = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = f"{task} {name}"
            if filtered != "none":
                label += f" ({filtered})"
            error = values.get(f"{name}_stderr,{filtered}")
            if not isinstance(error, int | float):
                error = None
            higher = found["higher_is_better"].get(task, {}).get(name) is not False
            scores[label] = {"value": float(value), "stderr": error, "higher": higher}
    return scores


def add_capability(result, run, tasks, shelf):
    """Put the scores of tasks into an evaluation's dict of a run, unless they are there: of the
    plain model, of the prompted one if there is a system prompt, and at the scale to use."""
    asked = tasks.asked()
    scale = result["recommended"]["scale"] or 1.0
    about = {**asked, "scale": scale}
    if about.items() <= result.get("capability", {}).items():
        return
    conditions = {"vanilla": (None, 0.0)}
    if result["system_prompt"]:
        conditions["prompted"] = (result["system_prompt"], 0.0)
    conditions[condition_to_use(result)] = (None, scale)

    model = shelf.model(run)
    chat = shelf.chat(run)
    kept = kept_beside(run, model, chat, "interop/capability.py")
    model.set_vector(run.vector)
    scores = {}
    for condition, (prompt, factor) in conditions.items():
        steered = None  # the plain model, whose scores all runs share
        if factor:
            steered = [vector_digest(run.vector * factor), run.args["layer"]]
        key = kept.key(asked, prompt, steered)
        if key not in kept.found:
            announce(f"capability: {condition}, {', '.join(tasks.names)}")
            with acting(model, factor, condition):
                found = run_tasks(model, chat, prompt, tasks)
            kept.add(key, asked=asked, prompt=prompt, scores=found)
        scores[condition] = kept.found[key]["scores"]
    result["capability"] = {**about, "conditions": scores}
    add_columns(result, scores, tasks.limit)


def add_columns(result, scores, rows):
    """Put {condition: scores of `run_tasks`} into the table, in place of those of other tasks."""
    drop_columns(result, "capability")
    for task, plain in scores["vanilla"].items():
        better = "higher" if plain["higher"] else "lower"
        about = f"of lm-evaluation-harness, {rows} rows at most"
        column = {}
        for condition, found in scores.items():
            value = {"mean": found[task]["value"], "low": None, "high": None, "n": rows}
            if found[task]["stderr"] is not None:
                half = SURE * found[task]["stderr"]
                value["low"] = value["mean"] - half
                value["high"] = value["mean"] + half
            column[condition] = value
        add_column(result, Measure(task, "capability", "{:.3f}", "", better, about), column)


def losses(result):
    """["gsm8k exact_match -0.21", ...]: what is worse steered than plain, beyond the standard error
    of the difference (of unpaired rows, so it errs on the side of silence)."""
    if "capability" not in result:
        return []
    scores = result["capability"]["conditions"]
    lost = []
    for task, before in scores["vanilla"].items():
        after = scores[condition_to_use(result)][task]
        if before["stderr"] is None or after["stderr"] is None:
            continue
        change = after["value"] - before["value"]
        worse = -change if before["higher"] else change
        if worse > SURE * math.hypot(before["stderr"], after["stderr"]):
            lost.append(f"{task} {change:+.2f}")
    return lost
