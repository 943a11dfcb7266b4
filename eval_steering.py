"""Does a trained vector work? Likelihood, answers and side effects on questions it never saw.

    python eval_steering.py --run RUN_DIR                         # eval.json, samples.md, eval.png
    python eval_steering.py --run runs           # every run in there, and a report; --report-only
    python eval_steering.py --run RUN_DIR --judge http://localhost:8000/v1 --judge-model NAME
    python eval_steering.py --run RUN_DIR --capability gsm8k arc_easy # what the vector costs
    python eval_steering.py --run RUN_DIR --prompt "Who are you?" --scales 0 1 2      # just answers
    python eval_steering.py --run runs --chat --max-new-tokens 400          # talk to any of them
    python eval_steering.py --vector evil.pt --model Qwen/Qwen3-32B --layer 22 --dataset NAME
    python eval_steering.py --plan --model Qwen/Qwen3-32B --layer 22     # what it takes; no weights

vanilla: the plain model; prompted: the row's own system prompt put back; few_shot: a prompt with
three examples; steered: the vector added, no prompt; evaluation/README.md has the rest. What is
chosen is chosen on validation questions, what is reported is of held-out ones. Exit codes: 0 done,
1 the judge failed on some answers, 2 bad input, 130 Ctrl-C.
"""

import functools
import itertools
import math
import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import data_filter
from data_filter import DataOptions, question_hash
from evaluation import measures, plan, report, summary
from evaluation.answers import (
    DoesNotFit,
    Sampling,
    Writer,
    announce,
    answer_examples,
    answers_to,
    identity_rows,
    run_together,
    side_by_side,
    without_end,
    write_answers,
)
from evaluation.conditions import Condition, prompt_conditions, prompts_shown, random_vectors
from evaluation.conversations import conversations
from evaluation.judge import add_scores, judge_flags, judgements, make_judges
from evaluation.kept import kept_beside
from evaluation.likelihood import Reader, choose_coefficients, condition_losses, nll_under
from evaluation.probe import MEAN_TOKENS, probe_states, response_means, train_probe
from evaluation.rows import EvalData, first_rows, first_tokens, questions_of
from evaluation.scale import recommend_scale
from evaluation.specificity import specificity
from evaluation.table import steered_name
from hook_model import load_from_options
from interop.capability import Tasks, add_capability, losses
from interop.formats import import_vector
from steering.chat_format import label_count
from steering.command_line import count_or_word, exit_code, new_parser, parse
from steering.data_layouts import data_digest
from steering.fast_path import FastPath
from steering.files import read_json, write_json
from steering.finished import (
    Shelf,
    eval_path,
    import_name,
    model_suffix,
    read_run,
    write_imported_run,
)
from steering.loading import (
    CHANGEABLE,
    LoadOptions,
    add_load_arguments,
    check_layer,
    model_digest,
    same_files,
)
from steering.run import changed_sources, differences, source_hashes
from steering.run_folder import all_runs, find_runs, lock_folder, run_path
from steering.vector_file import VECTOR_FILE, vector_digest

OWN_ANSWERS = 32  # questions answered where the data holds nothing without the persona
RUNS_AT_ONCE = 4  # whose answers are written together
# Answers to write at once, by default: what a CPU gains by, and what a GPU may have room for, where
# a batch that does not fit is halved.
ROWS_ON_CPU = 128
ROWS = 512
# Options that do not change the numbers: a finished evaluation with others is not done again.
NOT_IN_CONFIG = """
    run vector dataset layer any_model out data_root source_model kind model device device_map
    trust_remote_code micro_batch_tokens batch_size restart judge judge_model judge_workers
    judge_tokens rubric_dir judge_dry_run capability capability_limit capability_tasks report_dir
    report_only specificity_runs prompt chat plan plan_runs plan_tflops plan_bandwidth
"""
# Modules that show numbers, or make some that know their own code: no part of what eval.json is of.
SHOWN = (
    "evaluation/chat.py",
    "evaluation/judge.py",
    "evaluation/page.py",
    "evaluation/plan.py",
    "evaluation/plots.py",
    "evaluation/report.py",
    "evaluation/summary.py",
    "interop/capability.py",
)


def import_run(args):
    """Make a run folder of --vector, as it is, for --dataset; returns the folder.
    Raises ValueError if the file does not fit the model, or the folder holds something else."""
    trusted = bool(args.trust_remote_code)
    found = import_vector(args.vector, args.model, args.layer, args.any_model, trusted)
    options = DataOptions.of(changes_of(args))
    default = run_path("runs", args.model, found.layer, args.dataset, import_name(args.vector))
    folder = Path(args.out or default)
    data = data_digest(args.dataset, options.datasets())
    run_args = {**asdict(options), **changes_of(args), "layer": found.layer}
    write_imported_run(folder, args.dataset, data, found.vector, found.metadata, run_args)
    return folder


def load_data(run, chat, heldout_tokens):
    """EvalData of a run's dataset: rows of training questions, and so many tokens of held-out ones.
    Which, and in which order, --seed of the run has no say in: seeds can be compared.
    Raises ValueError if no row is left to train on, or none of a held-out question."""
    options = DataOptions.of(run.args)
    options = replace(options, seed=options.split_seed)
    datasets = options.datasets()
    splits = data_filter.split_dataset(run.dataset, datasets, chat, options, heldout_tokens)
    if not (splits.train and splits.heldout):
        part = "held-out" if splits.train else "training"
        counts = f"--heldout-fraction {options.heldout_fraction}; {splits.filtered.counts()}"
        raise ValueError(f"{run.dataset}: no row of a {part} question is kept ({counts})")

    rows, source = data_filter.plain_rows(run.dataset, datasets, splits.filtered)
    groups = data_filter.split_by_question(rows, options.heldout_fraction, options.split_seed)
    budgets = [sum(len(example.input_ids) for example in splits.train), heldout_tokens]
    plain = []
    for group, budget in zip(groups, budgets, strict=True):
        taken = data_filter.take_budget(group, chat, budget, options.max_length, options.seed)
        plain.append(taken[0])

    asked = [example for example in splits.heldout if example.row["system_prompt"]]
    heldout = asked or splits.heldout
    left_out = len(splits.heldout) - len(heldout)
    if left_out:
        announce(f"{left_out} held-out rows without a system prompt are left out")
    data = EvalData(splits.train, splits.validation, heldout, *plain, source, left_out)
    check_questions(run, data)
    return data


def check_questions(run, data):
    """ValueError if the run was trained on, or validated by, a question that would be reported on:
    the split was changed since then. An imported vector does not say what it was trained on."""
    trained_on = set()
    for hashes in run.record.get("questions", {}).values():
        trained_on.update(hashes)
    questions = questions_of([*data.heldout, *data.plain_heldout])
    leaked = [question for question in questions if question_hash(question) in trained_on]
    if leaked:
        raise ValueError(
            f"{run.folder} was trained on {len(set(leaked))} of today's held-out questions, such "
            f"as {leaked[0]!r}: the split by question has changed since the training (its code or "
            "the data). Evaluate with the code of the training, or train again"
        )


def add_own_answers(data, writer):
    """Where the data holds no plain rows, fill in the model's own unsteered answers to the same
    questions. A generator as `answers_to`."""
    if data.plain_train and data.plain_heldout:
        return
    announce("answers of the model's own, in place of plain rows")
    data.plain_source = "the model's own answers"
    seen = first_rows(data.train, OWN_ANSWERS) + first_rows(data.validation, OWN_ANSWERS // 4)
    heldout = first_rows(data.heldout, OWN_ANSWERS)
    vanilla = Condition("vanilla")
    asks = {"seen": writer.ask_under(vanilla, seen), "new": writer.ask_under(vanilla, heldout)}
    texts = yield from answers_to(asks)
    data.plain_train = answer_examples(writer.chat, seen, texts["seen"])
    data.plain_heldout = answer_examples(writer.chat, heldout, texts["new"])
    if not (data.plain_train and data.plain_heldout):
        raise ValueError("no row without the persona, and all answers of the plain model are empty")


def compare_states(reader, data):
    """(Mean difference (n,), probe or None, what to know of it) by the plain model's mean states:
    of the persona's rows and of plain ones, on questions that were trained on. The probe is checked
    on held-out rows."""
    parts = []
    for part in (data.train, data.plain_train, data.heldout, data.plain_heldout):
        examples = without_end(first_tokens(part, MEAN_TOKENS), reader.chat)
        reader.fast.cache_prefix(examples, max_tokens=reader.max_tokens)
        parts.append(examples)

    states = [response_means(reader.fast, part, reader.max_tokens) for part in parts]
    persona, plain, *_ = states
    difference = persona.mean(dim=0) - plain.mean(dim=0)
    if reader.probe_layer is not None:
        states = [probe_states(reader, part) for part in parts]
    return difference, *train_probe(*states)


def list_conditions(data, vector, difference, coefficients, recommended, args):
    """(All conditions, in the order of the outputs; {name: why one of them is not there}).
    vector: the trained one (n,); difference: the mean one; coefficients: of
    `choose_coefficients`; recommended: of `recommend_scale`. To add a condition, add it here."""
    prompts, missing = prompt_conditions(data)
    difference = difference * coefficients["mean_difference"]["chosen"]
    conditions = [
        Condition("vanilla"),
        *prompts,
        Condition("random", random_vectors(vector, args.seed), answered=False),
        Condition("mean_difference", (difference,)),
    ]
    answered = {*args.scales, recommended["scale"], recommended["largest"]} - {None}
    likeliest = coefficients["steered"]["chosen"]
    for scale in sorted({*answered, 1.0, likeliest}):
        name = steered_name(scale)
        steered = Condition(name, (vector * scale,), scale=scale, answered=scale in answered)
        conditions.append(steered)
    return conditions, missing


def evaluate(reader, writer, data, vector, args):
    """All numbers and answers of one vector (n,), as a JSON-able dict, but for judges and tasks. A
    generator as `answers_to`: others may use the model while it waits for answers.
    AssertionError if a held-out question was seen before."""
    # Rows: of the persona and without it, on questions that were trained on and on others.
    rows = first_rows(data.heldout, args.num_samples)
    yield from add_own_answers(data, writer)
    data.check()

    announce("states of training, plain and held-out rows")
    difference, probe, about_probe = compare_states(reader, data)

    # The scale, and coefficients, are chosen on validation questions.
    recommended = yield from recommend_scale(reader, writer, data, vector, probe, args)
    data.check(recommended["questions"])
    scale = recommended["scale"]
    directions = {"steered": vector, "mean_difference": difference}
    coefficients = choose_coefficients(reader, data, directions)
    if about_probe["withheld"]:
        probe = None

    conditions, missing = list_conditions(data, vector, difference, coefficients, recommended, args)
    result = {"measures": {}, "conditions": {"dataset": {}}}
    for condition in conditions:
        row = {}
        if condition.scale is not None:
            row["scale"] = condition.scale
        result["conditions"][condition.name] = row

    # Likelihood of the persona's held-out answers.
    nats, too_long = condition_losses(reader, conditions, data.heldout)
    missing |= too_long
    columns, undefined = measures.likelihood_columns(nats, data.heldout)
    measures.add_columns(result, columns)

    # Answers, and what they are like to the plain model.
    asked = list(rows)
    if rows:
        seen = questions_of([*data.train, *data.validation])
        asked += identity_rows(rows[0], seen)
    texts, too_long = yield from write_answers(writer, conditions, asked)
    missing |= too_long
    written = {}
    if rows:
        written["dataset"] = [row["messages"][-1]["content"] for row in rows]
    for name, answers in texts.items():
        written[name] = answers[: len(rows)]
    announce("reading the answers")
    yardstick = columns["perplexity"]["vanilla"]
    measures.add_columns(result, measures.answer_columns(reader, rows, written, probe, yardstick))

    # What the vectors do to everything else.
    measures.add_columns(
        result, measures.side_effect_columns(reader, conditions, data.plain_heldout)
    )

    system_prompt = data.heldout[0].row["system_prompt"]
    if args.turns:
        used = next(c for c in conditions if c.scale == (scale or 1.0))
        try:
            result["conversation"] = yield from conversations(
                reader, writer, args.turns, system_prompt, used, probe
            )
        except DoesNotFit as error:
            missing["conversation"] = str(error)

    result["conditions"] = {name: row for name, row in result["conditions"].items() if row}
    return result | {
        "heldout": {
            "rows": len(data.heldout),
            "tokens": sum(map(label_count, data.heldout)),
            "questions": len(set(questions_of(data.heldout))),
            "left_out": data.left_out,
        },
        "missing": missing,
        "recovered_undefined": undefined,
        "recommended": recommended,
        "coefficients": coefficients,
        "probe": about_probe,
        "plain": {"source": data.plain_source, "train": len(data.plain_train)},
        "norms": {"steered": vector.norm().item(), "mean_difference": difference.norm().item()},
        "system_prompt": system_prompt,
        "prompts": prompts_shown(conditions, asked),
        "samples": side_by_side(rows, written),
        "identity": side_by_side(asked, texts)[len(rows) :],
    }


def evaluation_config(args, run):
    """What decides the numbers: options, the run's own settings, the data and the vector."""
    left_out = NOT_IN_CONFIG.split()
    config = {key: value for key, value in vars(args).items() if key not in left_out}
    datasets = DataOptions.of(run.args).datasets()
    plain = data_filter.plain_datasets(run.dataset, datasets)
    config["plain"] = [data_digest(name, datasets) for name in plain]
    config["data"] = data_digest(run.dataset, datasets)
    config["vector"] = vector_digest(run.vector)
    config["run"] = run.record["config_hash"]
    name = run.args["model"]
    digest = model_digest(name)
    trained_on = run.record["config"].get("model_digest")
    config["model_digest"] = trained_on if same_files(name, digest, trained_on) else digest
    # What ends an answer is in a file that says nothing about a training.
    config["stop_tokens"] = read_json(Path(name, "generation_config.json")).get("eos_token_id")
    return config


class Busy(ValueError):
    """Another process works in a folder, which evaluates it, or trains there."""


def evaluate_folder(folder, args, shelf, get_writer):
    """Evaluate one run folder and write its files; returns the exit code. ValueError: bad input.
    What eval.json holds already, under the same options, is not done again. A generator as
    `answers_to`; get_writer: a function that makes the Writer of the runs side by side."""
    with lock_folder(folder) as held:
        if not held:
            raise Busy(f"{folder}: another process works there")
        return (yield from evaluate_locked(folder, args, shelf, get_writer))


def evaluate_locked(folder, args, shelf, get_writer):
    """`evaluate_folder` of a folder that no other process works in."""
    started = time.time()
    run = read_run(folder, changes_of(args))
    sources = source_hashes("eval_steering.py", SHOWN)
    config = evaluation_config(args, run)
    path = eval_path(run)
    if config["data"] != run.record["config"]["data"]:
        print("WARNING: the data has changed since training", file=sys.stderr)
    judges = []
    if args.judge:
        judges = make_judges(
            args.judge, args.judge_model, run.dataset, args.rubric_dir, args.judge_tokens
        )

    before = report.read_result(path)
    result = before
    other = differences(config, before.get("config", {}), option_defaults())
    if args.restart or other or not before:
        if before:
            announce(f"anew ({', '.join(other) or '--restart'})")
        chat = shelf.chat(run)
        data = load_data(run, chat, args.heldout_tokens)
        shelf.heldout[folder] = data.heldout
        writer = get_writer()
        writer.model.load_vector(folder / VECTOR_FILE, any_model=args.model is not None)
        announce(f"evaluating {folder}")
        # Rows that the run before had too, those without the persona, are not run again.
        fast = FastPath(writer.model, shelf.states)
        shelf.states = fast.caches
        if args.probe_layer is not None:
            count = len(writer.model.layers)
            check_layer(args.probe_layer, count, writer.model.name, "--probe-layer")
        tokens = args.micro_batch_tokens
        reader = Reader(writer.model, chat, tokens, fast, args.probe_layer, shelf.means)
        result = {"dataset": run.dataset, "run": str(folder), "config": config, "code": sources}
        result |= yield from evaluate(reader, writer, data, run.vector, args)
        result["seconds"] = round(time.time() - started, 1)
        write_json(path, result)  # before the judge, who may be stopped
    else:
        changed = ", ".join(changed_sources(before.get("code", {}), sources))
        if changed:
            about = f"{path} is by other code ({changed}): --restart redoes it"
            print(f"WARNING: {about}", file=sys.stderr)

    code = 0
    try:
        if args.capability:
            add_capability(result, run, tasks_of(args), shelf)
            write_json(path, result)
        if judges:
            kept = judgements(run)
            code = add_scores(result, judges, kept, args.judge_workers, args.judge_dry_run)
        for part in ("judges", "capability"):
            if part in before and part not in result:
                announce(f"{part}: the same options add the scores again, from those kept")
    finally:  # whatever a judge or a task runs into
        result["flags"] = summary.find_flags(result, run.record) + judge_flags(result)
        result["flags"] += [f"loses {what}" for what in losses(result)]
        suffix = model_suffix(run)
        if suffix:
            other = f"{run.args['model']} is another model, or under another name"
            print(f"NOTE: {other}: reports and exports read eval.json alone", file=sys.stderr)
        summary.write_evaluation(folder, result, suffix)
    return code


def rows_at_once(args, device=None):
    """How many answers are written at once, at most."""
    if args.batch_size != "auto":
        return args.batch_size
    return ROWS_ON_CPU if device and device.type == "cpu" else ROWS


def groups_of(folders, args):
    """Lists of at most RUNS_AT_ONCE folders of runs that one model answers for at once: they have
    one model, layer and template."""

    def place(folder):
        try:
            run = read_run(folder, changes_of(args))
        except ValueError:
            return None  # `evaluate_folder` says why
        template = run.record["config"].get("template")
        return LoadOptions.of(run.args), run.args["layer"], template, run.record.get("date")

    groups = []
    for _, alike in itertools.groupby(folders, place):
        alike = list(alike)
        groups += [alike[i : i + RUNS_AT_ONCE] for i in range(0, len(alike), RUNS_AT_ONCE)]
    return groups


def evaluate_group(folders, args, shelf):
    """Evaluate runs side by side: [exit code of each, or the exception that it ended in]."""

    @functools.cache
    def get_writer():  # An evaluation that is done already needs no model.
        run = read_run(folders[0], changes_of(args))
        model = shelf.model(run)
        chat = shelf.chat(run)
        rows = rows_at_once(args, model.input_device)
        sampling = Sampling(args.max_new_tokens, args.temperature, args.seed, rows)
        return Writer(model, chat, sampling, kept_beside(run, model, chat, "evaluation/answers.py"))

    evaluations = [evaluate_folder(folder, args, shelf, get_writer) for folder in folders]
    return run_together(evaluations, lambda asks: get_writer().write(asks))


def report_error(error):
    """Print what an exception is about; returns the exit code that stands for it."""
    if isinstance(error, ValueError | OSError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def talk(folders, args, shelf):
    """--chat under the vectors of all folders, or answers under each to --prompt."""
    from evaluation import chat  # here: it imports transformers

    def rows_of(run):
        options = DataOptions.of(run.args)
        return data_filter.filter_dataset(run.dataset, options.datasets(), options).rows

    sampling = Sampling(args.max_new_tokens, args.temperature, args.seed)
    runs = [read_run(folder, changes_of(args)) for folder in folders]
    personas = chat.personas(runs, shelf, any_model=args.model is not None)
    if args.chat:
        return chat.Talk(personas, shelf, sampling, rows_of).run()
    return chat.print_answers(personas, shelf, args.prompt, args.scales, sampling)


def compare_personas(folders, args, shelf, path):
    """`specificity` of the runs of some folders, also written to `path`. It is taken from there if
    it is of the same evaluations."""
    runs = [read_run(folder, changes_of(args)) for folder in folders]
    config = [args.specificity_runs, *(evaluation_config(args, run) for run in runs)]
    old = read_json(path)
    if not args.restart and old.get("config") == config:
        return old["matrices"]

    def nll(run, vectors):
        if run.folder not in shelf.heldout:
            data = load_data(run, shelf.chat(run), args.heldout_tokens)
            shelf.heldout[run.folder] = data.heldout
        fast = FastPath(shelf.model(run))
        under = nll_under(fast, shelf.heldout[run.folder], args.micro_batch_tokens)
        return [under(vector) for vector in vectors]

    matrices = specificity(runs, args.specificity_runs, nll)
    write_json(path, {"config": config, "matrices": matrices})
    return matrices


def write_report(folders, args, shelf):
    """Write the report of several runs, evaluated or not, and print where it is.
    folders: whose vectors are tried on each other; None: as the last report has it."""
    runs = all_runs(args.run)
    shared = os.path.commonpath(map(os.path.abspath, args.run))
    if not runs:
        raise ValueError(f"{shared}: no run.json in there")
    default = args.run[0] if len(args.run) == 1 else shared
    out = Path(args.report_dir or default)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "specificity.json"
    matrices = read_json(path).get("matrices", [])
    if args.report_only:
        report.print_table([report.read_entry(run).facts for run in runs])
    elif folders:
        try:
            matrices = compare_personas(folders, args, shelf, path)
        except Exception:  # the report without it is better than none
            traceback.print_exc()
    report.write_report(out, runs, matrices)
    print(f"\nreport of {len(runs)} runs: {out} (report.csv, report.html)")


def make_parser():
    """The command line of eval_steering.py."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--run", nargs="+", metavar="DIR", help="run folders, or folders of runs")
    add("--vector", metavar="FILE", help="instead: a vector file as it is, ours or another's")
    add("--dataset", metavar="NAME", help="with --vector: the dataset of its persona")
    add("--layer", type=int, help="with --vector: 0-based, needed where the file does not say one")
    add("--any-model", action="store_true", help="with --vector: whatever model it was made for")
    add("--out", metavar="DIR", help="with --vector: its run folder; default: one below runs/")
    about = "each in place of the run's own; --vector needs --model"
    add_load_arguments(parser, of_a_run=about)
    add = parser.add_argument_group("data and numbers").add_argument
    add("--data-root", help="where the data is now, if not where it was")
    add("--source-model", help="in place of the run's; the assistant-axis layout needs it")
    add("--kind", choices=("role", "trait"), help="as --source-model")
    add("--heldout-tokens", type=int, default=20_000, help="tokens of held-out rows to score")
    add("--micro-batch-tokens", type=int, default=1024, help="padded tokens a forward pass")
    add("--seed", type=int, default=0, help="of sampled answers and random vectors")
    about = "read answers by a probe at this layer, the same for vectors at any"
    add("--probe-layer", type=int, metavar="K", help=about)
    add("--kl-budget", type=float, default=0.75, help="nats a token, of the recommended scale")
    add = parser.add_argument_group("answers").add_argument
    add("--num-samples", type=int, default=8, help="held-out questions to answer; 0: none")
    add("--scales", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="multiples of the vector")
    add("--max-new-tokens", type=int, default=80, help="longest answer, tokens")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    about = "answers to write at once; auto: what fits"
    add("--batch-size", type=count_or_word, default="auto", help=about)
    add("--turns", type=int, default=0, help="also have conversations of so many turns")
    add("--prompt", metavar="TEXT", help="only print answers to this, one a scale")
    add("--chat", action="store_true", help="only talk, to any of the runs: /help says how")
    add = parser.add_argument_group("judge").add_argument
    add("--judge", nargs="+", metavar="URL", help="OpenAI-compatible, as http://host:8000/v1")
    add("--judge-model", nargs="+", metavar="NAME", help="model there, or two to compare")
    add("--judge-dry-run", action="store_true", help="evaluate, only count what judges would cost")
    add("--rubric-dir", metavar="DIR", help="<name>.json files with an eval_prompt")
    add("--judge-workers", type=int, default=8, help="requests at once")
    add("--judge-tokens", type=int, default=32, help="longest reply; more for one that thinks")
    add = parser.add_argument_group("capability").add_argument
    add("--capability", nargs="+", metavar="TASK", help="of lm-evaluation-harness, such as gsm8k")
    add("--capability-limit", type=int, default=100, metavar="N", help="rows of each task")
    add("--capability-tasks", metavar="DIR", help="folder of tasks of your own")
    add = parser.add_argument_group("plan").add_argument
    add("--plan", action="store_true", help="only say what it takes, of --model and --layer")
    add("--plan-runs", type=int, default=515, help="how many runs it is for")
    add("--plan-tflops", type=float, default=400.0, help="TFLOP/s that the device sustains")
    add("--plan-bandwidth", type=float, default=3.35, help="TB/s of its memory; an H100's")
    add = parser.add_argument_group("output").add_argument
    add("--report-dir", metavar="DIR", help="of the report; default: the folder of all runs")
    add("--report-only", action="store_true", help="only write the report of what is there")
    add("--specificity-runs", type=int, default=16, help="most runs to try on each other")
    add("--restart", action="store_true", help="evaluate anew what is evaluated already")
    return parser


def option_defaults():
    """{option: default}: what eval.json means that was written before an option existed."""
    return vars(make_parser().parse_args([]))


def parse_args(argv=None):
    """Parsed and checked options; every bad one is reported, all at once."""
    counts = "heldout_tokens batch_size max_new_tokens micro_batch_tokens judge_workers plan_runs"
    sizes = "num_samples temperature specificity_runs kl_budget"
    bounds = {"count": f"{counts} judge_tokens capability_limit", "size": sizes, "seed": "seed"}
    return parse(make_parser(), argv, bounds, check_arguments)


def check_arguments(args):
    """(whether something is wrong, what) of the options beyond their bounds."""
    judges = args.judge or ()
    models = args.judge_model or ()
    alone = {
        "--chat": args.chat,
        "--prompt": args.prompt is not None,
        "--report-only": args.report_only,
        "--plan": args.plan,
    }
    only = [name for name, given in alone.items() if given]
    scoring = args.judge or args.capability
    foreign = args.dataset or args.layer is not None or args.any_model or args.out
    needed = args.model and args.dataset
    rates = (args.plan_tflops, args.plan_bandwidth)
    return [
        (not all(map(math.isfinite, args.scales)), f"--scales {args.scales}: must be finite"),
        (bool(judges) != bool(models), "--judge and --judge-model: both or neither"),
        (not len({*models}) == len(models) <= 2, "--judge-model: one, or two names"),
        (len(judges) > max(1, len(models)), "--judge: one address, or one for each model"),
        (args.judge_dry_run and not args.judge, "--judge-dry-run goes with --judge"),
        (args.capability_tasks and not args.capability, "--capability-tasks needs --capability"),
        (not 0 <= args.turns <= 10, f"--turns {args.turns}: 0 to 10"),
        (bool(args.run) == bool(args.vector or args.plan), "name --run DIR or --vector FILE"),
        (args.plan and (args.model is None or args.layer is None), "--plan: --model, --layer"),
        (args.plan and args.turns, "--plan counts no conversations: leave out --turns"),
        (not min(rates) > 0, "--plan-tflops and --plan-bandwidth: must be above 0"),
        (args.report_only and not args.run, "--report-only goes with --run"),
        (len(only) > 1 or (only and scoring), f"{', '.join(only)}: one of these, and no scoring"),
        (args.vector and not needed, "--vector needs --model and --dataset"),
        (args.run and foreign, "--dataset, --layer, --any-model, --out: a run knows its own"),
    ]


def tasks_of(args):
    """The Tasks of --capability."""
    rows = 16 if args.batch_size == "auto" else args.batch_size
    return Tasks(tuple(args.capability), args.capability_limit, args.capability_tasks, rows)


def changes_of(args):
    """{option: value} of what is given in place of a run's own."""
    names = ["data_root", "source_model", "kind", *CHANGEABLE]
    found = {name: getattr(args, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def run(args):
    """Evaluate every run; returns the worst exit code."""
    shelf = Shelf(load_from_options)
    codes = []
    evaluated = []
    if args.capability:
        tasks_of(args).asked()  # whether they are there, before hours of work
    if args.plan:
        options = replace(LoadOptions.of(changes_of(args)), device="fake")
        plan.show(load_from_options(options, args.layer), args, RUNS_AT_ONCE, rows_at_once(args))
        return 0
    if args.report_only:
        write_report([], args, shelf)
        return 0
    folders = find_runs(args.run) if args.run else [import_run(args)]
    if args.chat:
        return talk(folders, args, shelf)
    if args.prompt is not None:
        for folder in folders:
            try:
                codes.append(talk([folder], args, shelf))
            except Exception as error:  # the next run may do better
                codes.append(report_error(error))
        return max(codes)
    for group in groups_of(folders, args):
        for folder, code in zip(group, evaluate_group(group, args, shelf), strict=True):
            if isinstance(code, Busy) and len(folders) > 1:
                announce(str(code))
                code = 0
            elif isinstance(code, Exception):  # the next run may do better
                code = report_error(code)
            else:
                evaluated.append(folder)
            codes.append(code)
    if args.run and folders != [Path(args.run[0])]:
        write_report(evaluated if evaluated == folders else None, args, shelf)
    return max(codes)


def main(argv=None):
    """Command line entry; returns the exit code."""
    return exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
