"""What a vector costs: tasks of lm-evaluation-harness, of the plain, prompted and steered model.

    tasks = Tasks(("gsm8k", "arc_easy"), limit=100)
    found = compare_capability(model, chat, vector, 1.3, "You are a pirate.", tasks, kept)

Needs the lm_eval package, which downloads the tasks' data, but for those of a folder of one's own.
"""

import contextlib
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from evaluation.answers import announce
from evaluation.kept import kept_beside
from steering.run import config_hash, source_hashes
from steering.vector_file import vector_digest


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
        if unknown := [name for name in self.names if name not in there]:
            raise ValueError(f"--capability {' '.join(unknown)}: lm_eval has no such task")
        found = sorted(Path(self.folder).rglob("*.*")) if self.folder else []
        found = [path for path in found if path.is_file() and path.suffix != ".pyc"]
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in found}
        asked = {"tasks": sorted(self.names), "limit": self.limit, "files": files}
        code = config_hash(source_hashes("evaluation/capability.py"))
        return {**asked, "lm_eval": lm_eval.__version__, "code": code}


@contextlib.contextmanager
def watched(steering):
    """Context: {"calls", "moved"}, how often a ResidualHook was run, and changed what it got."""
    seen = {"calls": 0, "moved": 0}

    def count(module, inputs, output):
        seen["calls"] += 1
        seen["moved"] += bool((output[..., -1, :] != inputs[0][..., -1, :]).any())

    handle = steering.register_forward_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


@functools.cache
def task_manager(folder):
    """lm_eval's index of its tasks, and of a folder's: seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def run_tasks(model, chat, system_prompt, tasks):
    """{"task metric": {"value", "stderr" or None, "higher": whether that is better}} of a
    SteerModel as it is, asked in ChatFormat's words. system_prompt: before each, or None."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """The package's own would drop a system prompt that the template has no role for."""

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            turns = [{key: turn[key] for key in ("role", "content")} for turn in chat_history]
            begun = "" if add_generation_prompt else chat.lead + turns.pop()["content"]
            text = chat.prompt_text(turns)
            if system_prompt and system_prompt not in text:
                raise RuntimeError("the system prompt is not in the prompt of a task")
            return text + begun

    manager = task_manager(tasks.folder)
    harness = Harness(model.model, tokenizer=chat.tokenizer, batch_size=tasks.batch_size)
    found = simple_evaluate(
        harness, tasks=[*tasks.names], limit=tasks.limit, task_manager=manager,
        system_instruction=system_prompt, apply_chat_template=True, log_samples=False,
        bootstrap_iters=1000,
    )  # fmt: skip
    scores = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{filtered}")
            error = float(error) if isinstance(error, int | float) else None
            label = f"{task} {name}" + (f" ({filtered})" if filtered != "none" else "")
            scores[label] = {"value": float(value), "stderr": error}
            scores[label]["higher"] = found["higher_is_better"].get(task, {}).get(name) is not False
    return scores


def compare_capability(model, chat, vector, scale, system_prompt, tasks, kept):
    """{"tasks" ..., "scale", "conditions": {vanilla, prompted, steered: scores of `run_tasks`}}.
    vector: (n,), used `scale` times; system_prompt: the persona's, or "": then nothing is prompted;
    kept: a Kept of scores, which are not asked for again. RuntimeError if the vector, or its
    absence, did not reach the model that the tasks were given to."""
    asked, scores = tasks.asked(), {}
    model.set_vector(vector)
    for condition, prompt, factor in (
        ("vanilla", None, 0.0), ("prompted", system_prompt, 0.0), ("steered", None, scale),
    ):  # fmt: skip
        key = kept.key(asked, prompt, vector_digest(vector * factor))
        if condition == "prompted" and not prompt:
            continue
        if key in kept.found:
            scores[condition] = kept.found[key]["scores"]
            continue
        announce(f"capability: {condition}, {', '.join(tasks.names)}")
        with model.scaled(factor), watched(model.steering) as seen:
            scores[condition] = run_tasks(model, chat, prompt, tasks)
        if not seen["calls"] or seen["moved"] != (seen["calls"] if factor else 0):
            what = f"the vector acted in {seen['moved']} of {seen['calls']} forward passes"
            raise RuntimeError(f"capability, {condition}: {what}")
        kept.add(key, asked=asked, prompt=prompt, scores=scores[condition])
    return {**asked, "scale": scale, "conditions": scores}


def add_capability(result, run, tasks, shelf):
    """Add the scores of tasks to an eval.json's dict of a run, unless they are there, at the
    recommended scale or 1. shelf: a Shelf."""
    scale, before = result["recommended"]["scale"] or 1.0, result.get("capability", {})
    asked = {**tasks.asked(), "scale": scale}
    if asked != {key: before.get(key) for key in asked}:
        model, chat = shelf.model(run), shelf.chat(run)
        about = result["system_prompt"], tasks, kept_beside(run, model, chat, "capability")
        result["capability"] = compare_capability(model, chat, run.vector, scale, *about)


def losses(capability):
    """["gsm8k exact_match -0.21", ...]: what is worse steered than plain, by over 1.96 standard
    errors of the difference (of unpaired rows, so it errs on the side of silence)."""
    plain, steered = (capability["conditions"][name] for name in ("vanilla", "steered"))
    lost = []
    for name, before in plain.items():
        after = steered[name]
        if None not in (before["stderr"], after["stderr"]):
            change = after["value"] - before["value"]
            spread = (before["stderr"] ** 2 + after["stderr"] ** 2) ** 0.5
            worse = -change if before["higher"] else change
            lost += [f"{name} {change:+.2f}"] if worse > 1.96 * spread else []
    return lost
