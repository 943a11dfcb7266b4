"""Does a trained vector work? Likelihood, answers and side effects on questions it never saw.

    python eval_steering.py --run RUN_DIR                         # eval.json, samples.md, eval.png
    python eval_steering.py --run runs                            # every run in there, and a report
    python eval_steering.py --run RUN_DIR --judge http://localhost:8000/v1 --judge-model NAME
    python eval_steering.py --run RUN_DIR --prompt "Who are you?" --scales 0 1 2      # just answers

vanilla: the plain model; prompted: the row's own persona system prompt put back; steered: the
vector added, no prompt; mean_difference: the vector that no training made; random: of the same
norm. What is chosen (coefficients) is chosen on validation questions; what is reported is of
held-out ones. Exit codes: 0 done, 1 the judge failed on some answers, 2 bad input, 130 Ctrl-C.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import eval_report
from chat_format import ChatFormat, load_tokenizer
from data_layouts import data_digest, find_datasets, parse_name
from eval_measures import (
    COEFFICIENTS,
    add_own_answers,
    choose_coefficients,
    compare_answers,
    describe_answers,
    first_rows,
    generate_answers,
    heldout_examples,
    heldout_losses,
    load_data,
    questions_of,
    side_effects,
    train_probe,
    within_budget,
    without_end,
)
from eval_stats import compare_losses, mean_interval, recovered_fraction
from hook_model import (
    DTYPES,
    example_sums,
    label_count,
    load_model,
    load_vector,
    response_means,
    vector_digest,
    write_atomically,
)
from judge import SCALES, Judge, JudgeError, rubric_for
from run_folder import VECTOR_FILE, find_runs, read_json, write_json

RANDOM_VECTORS = 3
# Options that do not change the numbers: a finished evaluation with others is not done again.
NOT_RESULTS = (
    *("run", "data_root", "model", "device", "micro_batch_tokens", "batch_size", "restart"),
    *("judge", "judge_model", "judge_workers", "judge_tokens", "rubric_dir"),
    *("report_dir", "specificity_runs", "prompt"),
)


# ------------------------------------------------------------------ the run


def read_run(folder):
    """(training options as a namespace, run.json's dict, vector (n,)) of a finished run folder.

    The persona's text is left out of prompts even if the run kept it there, so that vanilla and
    steered are what they say. Raises ValueError if the run is not finished or not readable.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        args = argparse.Namespace(**{**record["args"], "keep_system_prompt": False})
        used = ("model", "layer", "data_root", "split_seed", "max_length", "trust_remote_code")
        if missing := {*used} - {*record["args"]} or {"dataset", "config"} - {*record}:
            raise KeyError(*missing)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--run {folder}: no readable run.json ({error})") from error
    if not (folder / VECTOR_FILE).exists():
        raise ValueError(f"--run {folder}: no {VECTOR_FILE}, so this run has not finished")
    return args, record, load_vector(folder / VECTOR_FILE)[0]


# ------------------------------------------------------------------ one run


class Progress(tqdm):
    """A bar over the passes of one evaluation: `next` names the one that begins."""

    def next(self, text):
        """Begin the next pass."""
        if self.text:
            self.update()
        self.text = text
        self.set_description_str(text)

    text = ""


def evaluate(model, chat, data, vector, args):
    """All numbers and answers of one vector (n,), as a JSON-able dict. The model ends with it set.

    Raises AssertionError if a held-out question was seen before.
    """
    limit, rows = args.micro_batch_tokens, first_rows(data.heldout, args.num_samples)
    scales = list(dict.fromkeys(args.scales)) if rows else []
    own = 0 if data.plain_train and data.plain_heldout else 2
    passes = own + 2 + 2 * len(COEFFICIENTS) + 6 + 2 * (3 + len(scales)) * bool(rows)
    bar = Progress(total=passes + len(scales) + 1, unit="pass", disable=None)
    with bar:
        if own:
            bar.next("the model's own answers")
            add_own_answers(model, chat, data, args, bar)
        data.check()

        # Mean states of training rows: the mean difference, and what the probe is fitted on.
        bar.next("states of training rows")
        persona, plain = (
            response_means(model, without_end(examples, chat), limit)
            for examples in (data.train, data.plain_train)
        )
        difference = persona.mean(dim=0) - plain.mean(dim=0)
        bar.next("states of held-out rows")
        heldout_means = [
            response_means(model, without_end(examples, chat), limit)
            for examples in (data.heldout, data.plain_heldout)
        ]
        probe, about_probe = train_probe(persona, plain, *heldout_means)

        result = likelihood(model, chat, data, vector, difference, args, bar)

        # Behaviour: answers, what they are like, and what the vector does to everything else.
        directions = {f"steered x{scale:g}": vector * scale for scale in scales}
        factor = result["coefficients"]["mean_difference"]["chosen"]
        directions["mean_difference"] = difference * factor
        answers = compare_answers(model, chat, rows, directions, args, bar)
        real = result["likelihood"]["vanilla"]["perplexity"]
        result["answers"] = describe_answers(model, chat, rows, answers, probe, real, args, bar)
        effects = side_effects(model, data.plain_heldout, directions, args, bar)
        result |= {"side_effects": effects, "probe": about_probe}
        result["plain"] = {"source": data.plain_source, "train": len(data.plain_train)}
        result["norms"] = {
            "steered": vector.norm().item(),
            "mean_difference": difference.norm().item(),
        }
        result["samples"] = [
            {
                "question": row["question"],
                "system_prompt": row["system_prompt"],
                "answers": {condition: texts[i] for condition, texts in answers.items()},
            }
            for i, row in enumerate(rows)
        ]
        bar.update()
    model.set_vector(vector)
    return result


def likelihood(model, chat, data, vector, difference, args, bar):
    """Coefficients by validation questions, NLL table and recovered fraction on held-out ones.

    vector: the trained one (n,); difference: the mean difference (n,).
    """
    directions = {"steered": vector, "mean_difference": difference}
    chooser = within_budget(data.validation or data.train, args.heldout_tokens)
    chosen = choose_coefficients(model, chooser, directions, args, bar)
    seeded = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(RANDOM_VECTORS, len(vector), generator=seeded)
    vectors = {
        "random": list(noise / noise.norm(dim=1, keepdim=True) * vector.norm()),
        "mean_difference": [difference * chosen["mean_difference"]["chosen"]],
        "steered": [vector],
    }
    if chosen["steered"]["chosen"] == 1.0:
        bar.total -= 1
    else:
        vectors["steered_chosen"] = [vector * chosen["steered"]["chosen"]]
    losses = heldout_losses(model, chat, data.heldout, vectors, args, bar)
    tokens, questions = list(map(label_count, data.heldout)), questions_of(data.heldout)
    counts = {"rows": len(tokens), "questions": len(set(questions)), "tokens": sum(tokens)}
    return {
        "heldout": counts,
        "likelihood": compare_losses(losses, tokens, questions, args.seed),
        "recovered": recovered_fraction(losses, tokens, questions, args.seed),
        "coefficients": {
            "chosen_on": "validation questions" if data.validation else "training questions",
            **chosen,
        },
    }


def find_flags(result, record):
    """What is wrong with a run, as a list of words, most serious first."""
    table = result["likelihood"]
    bounds = {name: row.get("steered_minus_interval", [0, 0]) for name, row in table.items()}
    collapsed = [name for name, row in result["answers"].items() if row["collapsed"]]
    checks = [
        ("NaN", not all(math.isfinite(row["nll"]) for row in table.values())),
        ("no better than vanilla", not bounds["vanilla"][1] < 0),
        ("no better than random", not bounds["random"][1] < 0),
        ("worse than mean difference", bounds["mean_difference"][0] > 0),
        *(
            (f"collapse at {name.removeprefix('steered ')}", "steered x" in name)
            for name in collapsed
        ),
    ]
    return [*(name for name, wrong in checks if wrong), *eval_report.training_flags(record)]


def evaluation_config(args, run_args, record, vector):
    """What decides the numbers: options, the run's own settings, the data and the vector."""
    options = {key: value for key, value in vars(args).items() if key not in NOT_RESULTS}
    datasets = find_datasets(run_args.data_root, run_args.source_model, run_args.kind)
    options |= {"data": data_digest(record["dataset"], datasets), "vector": vector_digest(vector)}
    return options | {"run": record["config_hash"], "format_version": eval_report.FORMAT_VERSION}


def evaluate_folder(folder, args, models):
    """Evaluate one run folder and write its files; returns the exit code. ValueError: bad input.

    models: a ModelShelf. What eval.json holds already, under the same options, is not done again.
    """
    started = time.time()
    run_args, record, vector = read_run(folder)
    apply_overrides(run_args, args)
    config = evaluation_config(args, run_args, record, vector)
    if config["data"] != record["config"]["data"]:
        print("WARNING: the data has changed since training", file=sys.stderr)
    path, result = folder / "eval.json", None
    if not args.restart and (old := read_json(path)).get("config") == config:
        result = old
    if result is None:
        chat = models.chat(run_args, record)
        data = load_data(record["dataset"], chat, run_args, args.heldout_tokens)
        model = models.model(run_args)
        model.load_vector(folder / VECTOR_FILE, any_model=args.model is not None)
        result = {"dataset": record["dataset"], "run": str(folder), "config": config}
        result |= evaluate(model, chat, data, vector, args)
        result |= {"flags": find_flags(result, record), "seconds": round(time.time() - started, 1)}
        write_json(path, result)  # before the judge, who may fail
    code = judge_answers(folder, result, args) if args.judge else 0
    write_json(path, result)
    write_atomically(folder / "samples.md", eval_report.samples_text(result).encode())
    files = ["eval.json", "samples.md"]
    files += eval_report.plot_run(folder / "eval.png", result, folder / "metrics.jsonl")
    print(eval_report.summary_text(result))
    print(f"\nrun: {folder} ({', '.join(files)})", flush=True)
    return code


def judge_answers(folder, result, args):
    """Add the judge's scores to a result; returns 1 if it failed on some answers, else 0."""
    dataset = result["dataset"]
    kind = parse_name(dataset.split("+")[0])[1]
    rubric = rubric_for(dataset, args.rubric_dir)
    judge = Judge(args.judge, args.judge_model, rubric, kind, args.judge_tokens)
    samples = result["samples"]
    conditions = list(samples[0]["answers"]) if samples else []
    pairs = [(s["question"], s["answers"][c]) for c in conditions for s in samples]
    asked = [pair for pair in pairs if pair[1]]
    verdicts = judge.score(asked, folder / "judgements.jsonl", args.judge_workers)
    verdicts = dict(zip(asked, verdicts, strict=True))
    low, high = SCALES[kind]
    for condition in conditions:
        scores, questions, counts = [], [], {"refusal": 0, "unparsable": 0, "failed": 0}
        for sample in samples:  # an empty answer shows nothing of the persona
            verdict = verdicts.get((sample["question"], sample["answers"][condition]))
            if not sample["answers"][condition]:
                verdict = float(low)
            if isinstance(verdict, float):
                scores.append(verdict)
                questions.append(sample["question"])
            else:
                counts[verdict or "failed"] += 1
        scored = mean_interval(scores, questions, args.seed)
        result["answers"][condition]["judge"] = {"score": scored, **counts}
    result["judge"] = {"model": args.judge_model, "url": args.judge, "scale": [low, high]}
    result["judge"] |= {"asked_now": judge.asked, "failed": len(judge.failures)}
    result["judge"]["rubric"] = rubric
    for failure in judge.failures[:3]:
        print(f"WARNING: {failure}", file=sys.stderr)
    return 1 if judge.failures else 0


# ------------------------------------------------------------------ several runs


class ModelShelf:
    """The model in use, kept from run to run as long as they want the same one."""

    def __init__(self):
        self._key, self._model, self._chats = None, None, {}

    def chat(self, run_args, record):
        """The ChatFormat of a run: its template as it was, whatever became of the file."""
        key = run_args.model, record["config"]["template"]
        if key not in self._chats:
            tokenizer = load_tokenizer(run_args.model, None, run_args.trust_remote_code)
            if key[1]:
                tokenizer.chat_template = key[1]
            self._chats[key] = ChatFormat(tokenizer)
        return self._chats[key]

    def model(self, run_args):
        """The run's model, with the vector's place at the run's layer."""
        name, layer = run_args.model, run_args.layer
        where = run_args.dtype, run_args.device, run_args.device_map, run_args.trust_remote_code
        if self._key != (name, where):
            self._key = self._model = None  # make room first
            self._model = load_model(name, layer, *where)
            self._key = name, where
        if self._model.layer != layer:
            self._model.set_layer(layer)
        return self._model


def apply_overrides(run_args, args):
    """Put --data-root, --model, --dtype and --device in place of the run's own."""
    for key in ("data_root", "model", "dtype", "device"):
        if getattr(args, key) is not None:
            setattr(run_args, key, getattr(args, key))


def specificity(folders, args, models, path):
    """NLL of each persona's held-out rows under each vector, among runs of one model and layer.

    A list of {"model", "layer", "names", "runs", "nll": [vector][persona], "vanilla"}, also written
    to `path`; at most --specificity-runs runs each, since every vector meets every persona.
    """
    groups = {}
    for folder in folders:
        run_args, record, vector = read_run(folder)
        apply_overrides(run_args, args)
        key = run_args.model, run_args.layer
        groups.setdefault(key, []).append((folder, run_args, record, vector))
    groups = {k: v[: args.specificity_runs] for k, v in groups.items() if len(v) > 1}
    config = [
        [evaluation_config(args, run_args, record, vector) for _, run_args, record, vector in group]
        for group in groups.values()
    ]
    old = read_json(path)
    if not args.restart and old.get("config") == config:
        return old["matrices"]
    matrices = []
    for (name, layer), group in groups.items():
        columns, vanilla = [], []
        for _, run_args, record, _ in tqdm(group, desc="specificity", unit="persona", disable=None):
            chat, model = models.chat(run_args, record), models.model(run_args)
            datasets = find_datasets(run_args.data_root, run_args.source_model, run_args.kind)
            examples = heldout_examples(
                record["dataset"], chat, datasets, run_args, args.heldout_tokens
            )
            tokens = sum(map(label_count, examples))
            model.cache_prefix(examples, max_tokens=args.micro_batch_tokens)

            def nll(direction, model=model, examples=examples, tokens=tokens):
                model.set_vector(direction)
                losses = example_sums(model.losses, examples, args.micro_batch_tokens)
                return sum(losses) / tokens

            columns.append([nll(vector) for _, _, _, vector in group])
            vanilla.append(nll(torch.zeros(model.hidden_size)))
        rows = [eval_report.report_row(folder) for folder, *_ in group]
        matrix = {"model": name, "layer": layer, "names": eval_report.short_names(rows)}
        matrix |= {"runs": [str(folder) for folder, *_ in group], "vanilla": vanilla}
        matrices.append(matrix | {"nll": np.array(columns).T.tolist()})
    write_json(path, {"config": config, "matrices": matrices})
    return matrices


# ------------------------------------------------------------------ command line


def parse_args(argv=None):
    """Command line of eval_steering.py; every bad flag is reported, all at once."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("data and model").add_argument
    add("--run", required=True, nargs="+", metavar="DIR", help="run folders, or folders of runs")
    add("--data-root", help="where the data is now, if not where it was")
    add("--model", help="where the model is now, if not where it was")
    add("--dtype", choices=("auto", *DTYPES), help="in place of the run's")
    add("--device", help="in place of the run's: auto, cuda, cuda:1, mps or cpu")
    add("--heldout-tokens", type=int, default=20_000, help="tokens of held-out rows to score")
    add("--micro-batch-tokens", type=int, default=1024, help="padded tokens a forward pass")
    add("--seed", type=int, default=0, help="of sampled answers, random vectors and intervals")
    add = parser.add_argument_group("answers").add_argument
    add("--num-samples", type=int, default=8, help="held-out questions to answer; 0: none")
    add("--scales", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="multiples of the vector")
    add("--max-new-tokens", type=int, default=80, help="longest answer, tokens")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--batch-size", type=int, default=8, help="answers written at once")
    add("--prompt", metavar="TEXT", help="only print answers to this, one per scale")
    add = parser.add_argument_group("judge").add_argument
    add("--judge", metavar="URL", help="OpenAI-compatible endpoint, such as http://host:8000/v1")
    add("--judge-model", metavar="NAME", help="model there; key from $JUDGE_API_KEY")
    add("--rubric-dir", metavar="DIR", help="<name>.json files with an eval_prompt")
    add("--judge-workers", type=int, default=8, help="requests at once")
    add("--judge-tokens", type=int, default=32, help="longest reply; more for one that thinks")
    add = parser.add_argument_group("output").add_argument
    add(
        "--report-dir",
        metavar="DIR",
        help="of the report of several runs; default: the folder of all",
    )
    add("--specificity-runs", type=int, default=16, help="most runs to try on each other")
    add("--restart", action="store_true", help="evaluate anew what is evaluated already")
    args = parser.parse_args(argv)
    lowest = {"heldout_tokens": 1, "batch_size": 1, "num_samples": 0, "max_new_tokens": 1}
    lowest |= {"micro_batch_tokens": 1, "temperature": 0, "judge_workers": 1, "judge_tokens": 1}
    lowest |= {"specificity_runs": 0}
    problems = [
        f"--{key.replace('_', '-')} {getattr(args, key)}: must be at least {least}"
        for key, least in lowest.items()
        if not getattr(args, key) >= least
    ]
    if not all(map(math.isfinite, args.scales)):
        problems.append(f"--scales {args.scales}: must be finite")
    if bool(args.judge) != bool(args.judge_model):
        problems.append("--judge and --judge-model: give both or neither")
    if problems:
        parser.error("; ".join(problems))
    return args


def print_answers(folder, args, models):
    """Answers to --prompt at each scale, and nothing else."""
    run_args, record, vector = read_run(folder)
    apply_overrides(run_args, args)
    chat, model = models.chat(run_args, record), models.model(run_args)
    model.load_vector(folder / VECTOR_FILE, any_model=args.model is not None)
    for scale in args.scales:
        model.set_vector(vector, scale)
        messages = [{"role": "user", "content": args.prompt}]
        print(f"--- scale {scale:g}\n{generate_answers(model, chat, [messages], args)[0]}")


def run(args):
    """Evaluate every run; returns the worst exit code."""
    folders, models, codes = find_runs(args.run), ModelShelf(), []
    for folder in folders:
        try:
            if args.prompt is not None:
                print_answers(folder, args, models)
            else:
                codes.append(evaluate_folder(folder, args, models))
        except (ValueError, OSError, JudgeError) as error:  # the next run may do better
            print(f"error: {error}", file=sys.stderr)
            codes.append(1 if isinstance(error, JudgeError) else 2)
    if len(folders) > 1 and args.prompt is None:
        done = [folder for folder in folders if (folder / "eval.json").exists()]
        shared = (
            args.run[0] if len(args.run) == 1 else os.path.commonpath(map(os.path.abspath, folders))
        )
        out = Path(args.report_dir or shared)
        out.mkdir(parents=True, exist_ok=True)
        matrices = specificity(done, args, models, out / "specificity.json")
        runs = eval_report.all_runs(args.run)
        files = eval_report.write_report(out, runs, matrices)
        print(f"\nreport of {len(runs)} runs: {out} ({', '.join(files)})")
    return max(codes, default=0)


def main(argv=None):
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: what is evaluated or judged is kept, start again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
