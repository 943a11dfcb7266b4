"""Does a trained vector work? Likelihood, answers and side effects on questions it never saw.

    python eval_steering.py --run RUN_DIR                         # eval.json, samples.md, eval.png
    python eval_steering.py --run runs           # every run in there, and a report; --report-only
    python eval_steering.py --run RUN_DIR --judge http://localhost:8000/v1 --judge-model NAME
    python eval_steering.py --run RUN_DIR --capability gsm8k arc_easy # what the vector costs
    python eval_steering.py --run RUN_DIR --prompt "Who are you?" --scales 0 1 2      # just answers
    python eval_steering.py --run runs --chat --max-new-tokens 400          # talk to any of them
    python eval_steering.py --vector evil.pt --model Qwen/Qwen3-32B --layer 22 --dataset NAME

vanilla: the plain model; prompted: the row's own system prompt put back; few_shot: a prompt with
three examples; steered: the vector added, no prompt; evaluation/README.md has the rest. What is
chosen is chosen on validation questions, what is reported is of held-out ones. Exit codes: 0 done,
1 the judge failed on some answers, 2 bad input, 130 Ctrl-C.
"""

import math
import os
import sys
import time
import traceback
from dataclasses import asdict, fields, replace
from pathlib import Path

import data_filter
from data_filter import DataOptions, question_hash
from evaluation import answers, judging, measures, report, summary
from evaluation.capability import Tasks, add_capability
from evaluation.kept import kept_beside
from evaluation.prompts import first_rows
from evaluation.scale import recommend_scale
from hook_model import load_from_options
from interop.formats import import_vector
from steering.command_line import exit_code, new_parser, parse
from steering.data_layouts import data_digest
from steering.files import read_json, write_json
from steering.finished import (
    Shelf,
    eval_path,
    import_name,
    model_suffix,
    read_run,
    write_imported_run,
)
from steering.loading import LoadOptions, add_load_arguments, model_digest, same_files
from steering.run import changed_sources, differences, source_hashes
from steering.run_folder import all_runs, find_runs, lock_folder, run_path
from steering.vector_file import VECTOR_FILE, vector_digest

# Options that do not change the numbers: a finished evaluation with others is not done again.
NOT_IN_CONFIG = """
    run vector dataset layer any_model out data_root source_model kind model device device_map
    trust_remote_code micro_batch_tokens batch_size restart judge judge_model judge_workers
    judge_tokens rubric_dir judge_dry_run capability capability_limit capability_tasks report_dir
    report_only specificity_runs prompt chat
"""
# Modules that show numbers, or make some that know their own code: no part of what eval.json is of.
SHOWN = "report", "page", "summary", "plots", "judge", "judging", "capability", "chat"


def import_run(args):
    """Make a run folder of --vector, as it is, for --dataset; returns the folder.
    Raises ValueError if the file does not fit the model, or the folder holds something else."""
    found = import_vector(args.vector, args.model, args.layer, args.any_model)
    options = DataOptions.of(changes_of(args))
    default = run_path("runs", args.model, found.layer, args.dataset, import_name(args.vector))
    folder, data = Path(args.out or default), data_digest(args.dataset, options.datasets())
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
    budgets = sum(len(example.input_ids) for example in splits.train), heldout_tokens
    plain = [
        data_filter.take_budget(group, chat, budget, options.max_length, options.seed)[0]
        for group, budget in zip(groups, budgets, strict=True)
    ]
    asked = [example for example in splits.heldout if example.row["system_prompt"]]
    heldout = asked or splits.heldout
    if left_out := len(splits.heldout) - len(heldout):
        answers.announce(f"{left_out} held-out rows without a system prompt are left out")
    data = measures.EvalData(splits.train, splits.validation, heldout, *plain, source, left_out)
    check_questions(run, data)
    return data


def check_questions(run, data):
    """ValueError if the run was trained on, or validated by, a question that would be reported on:
    the split was changed since then. An imported vector does not say what it was trained on."""
    trained_on = set()
    for hashes in run.record.get("questions", {}).values():
        trained_on.update(hashes)
    questions = measures.questions_of([*data.heldout, *data.plain_heldout])
    leaked = [question for question in questions if question_hash(question) in trained_on]
    if leaked:
        raise ValueError(
            f"{run.folder} was trained on {len(set(leaked))} of today's held-out questions, such "
            f"as {leaked[0]!r}: the split by question has changed since the training (its code or "
            "the data). Evaluate with the code of the training, or train again"
        )


def evaluate(model, chat, data, vector, kept, args):
    """All numbers and answers of one vector (n,), as a JSON-able dict. The model ends with it set.
    kept: answers of the plain model. AssertionError if a held-out question was seen before."""
    limit, seed = args.micro_batch_tokens, args.seed
    sampling = answers.Sampling(args.max_new_tokens, args.temperature, seed, args.batch_size)
    rows = first_rows(data.heldout, args.num_samples)
    if not (data.plain_train and data.plain_heldout):
        measures.add_own_answers(model, chat, data, sampling, kept)
    data.check()

    # Mean states of rows: the mean difference, and what the probe is fitted on and checked by.
    answers.announce("states of training, plain and held-out rows")
    parts = data.train, data.plain_train, data.heldout, data.plain_heldout
    parts = (measures.first_tokens(part, measures.MEAN_TOKENS) for part in parts)
    persona, plain, *heldout_states = (
        measures.response_means(model, answers.without_end(examples, chat), limit)
        for examples in parts
    )
    difference = persona.mean(dim=0) - plain.mean(dim=0)
    fitted, probe_report = measures.train_probe(persona, plain, *heldout_states)

    # Chosen on validation questions: the scale; and coefficients, before the likelihood is taken.
    about = args.kl_budget, sampling, args.num_samples, limit
    recommended = recommend_scale(model, chat, data, vector, fitted, *about)
    data.check(recommended["questions"])
    scale, probe = recommended["scale"], None if probe_report["withheld"] else fitted
    result = measures.likelihood(model, chat, data, vector, difference, scale, limit, seed)

    # Behaviour: answers, what they are like, and what the vector does to everything else.
    scales = sorted({*args.scales, *([scale] if scale else [])})
    directions = {f"steered x{s:g}": vector * s for s in scales}
    directions["mean_difference"] = difference * result["coefficients"]["mean_difference"]["chosen"]
    trained_on = measures.questions_of([*data.train, *data.validation])
    asked = rows + (answers.identity_rows(rows[0], trained_on) if rows else [])
    versions = answers.prompted_rows(asked, data.train, each_prompt=True)
    texts = answers.compare_answers(model, chat, asked, versions, directions, sampling, kept)
    written = {"dataset": [row["messages"][-1]["content"] for row in rows]} if rows else {}
    written |= {condition: each[: len(rows)] for condition, each in texts.items()}
    yardstick = result["likelihood"]["vanilla"]["perplexity"]
    answers.announce("reading the answers")
    described = measures.describe_answers(model, chat, rows, written, probe, yardstick, limit)
    effects = measures.side_effects(model, data.plain_heldout, directions, limit)
    model.set_vector(vector)
    norms = {"steered": vector.norm().item(), "mean_difference": difference.norm().item()}
    system_prompt = data.heldout[0].row["system_prompt"]
    result |= {
        "recommended": recommended, "answers": described, "side_effects": effects,
        "probe": probe_report, "norms": norms,
        "plain": {"source": data.plain_source, "train": len(data.plain_train)},
        "samples": answers.side_by_side(rows, written), "system_prompt": system_prompt,
        "identity": answers.side_by_side(asked, texts)[len(rows) :],
        "prompts": answers.prompts_of(versions),
    }  # fmt: skip
    if args.turns:
        about = args.turns, scale or 1.0, system_prompt, probe, sampling, kept, limit
        result["conversation"] = measures.conversations(model, chat, *about)
    return result


def evaluation_config(args, run):
    """What decides the numbers: options, the run's own settings, the data and the vector."""
    config = {key: value for key, value in vars(args).items() if key not in NOT_IN_CONFIG.split()}
    datasets = DataOptions.of(run.args).datasets()
    plain = data_filter.plain_datasets(run.dataset, datasets)
    config["plain"] = [data_digest(name, datasets) for name in plain]
    config["data"] = data_digest(run.dataset, datasets)
    config |= {"vector": vector_digest(run.vector), "run": run.record["config_hash"]}
    name, trained_on = run.args["model"], run.record["config"].get("model_digest")
    digest = model_digest(name)
    config["model_digest"] = trained_on if same_files(name, digest, trained_on) else digest
    return config | {"format_version": summary.FORMAT_VERSION}


def evaluate_folder(folder, args, shelf):
    """Evaluate one run folder and write its files; returns the exit code. ValueError: bad input.
    What eval.json holds already, under the same options, is not done again."""
    started, run = time.time(), read_run(folder, changes_of(args))
    without = tuple(f"evaluation/{name}.py" for name in SHOWN)
    sources = source_hashes("eval_steering.py", without)
    config = evaluation_config(args, run)
    path = eval_path(run)
    if config["data"] != run.record["config"]["data"]:
        print("WARNING: the data has changed since training", file=sys.stderr)
    about = args.judge, args.judge_model, run.dataset, args.rubric_dir, args.judge_tokens
    judges = judging.make_judges(*about) if args.judge else []
    before = result = read_json(path)
    other = differences(config, result.get("config", {}), option_defaults())
    if args.restart or other:
        other = [summary.WHY_NEW_FORMAT] if "format_version" in other else other
        old, why = path.exists(), ", ".join(other) or "--restart"
        if old:
            answers.announce(f"anew ({why}); the last evaluation is kept as {path.stem}.old.json")
        chat = shelf.chat(run)
        data = load_data(run, chat, args.heldout_tokens)
        shelf.heldout[folder], model = data.heldout, shelf.model(run)
        model.load_vector(folder / VECTOR_FILE, any_model=args.model is not None)
        result = {"dataset": run.dataset, "run": str(folder), "config": config, "code": sources}
        kept = kept_beside(run, model, chat, "answers")
        result |= evaluate(model, chat, data, run.vector, kept, args)
        result["seconds"] = round(time.time() - started, 1)
        if old:  # only now that there is another
            os.replace(path, path.with_suffix(".old.json"))
        write_json(path, result)  # before the judge, who may be stopped
    elif changed := ", ".join(changed_sources(result.get("code", {}), sources)):
        print(f"WARNING: {path} is by other code ({changed}): --restart redoes it", file=sys.stderr)
    code = 0
    try:
        if args.capability:
            add_capability(result, run, tasks_of(args), shelf)
            write_json(path, result)
        if judges:
            about = judging.judgements(run), args.judge_workers, args.judge_dry_run
            code = judging.add_scores(result, judges, *about)
        for part in sorted({"judges", "capability"} & (before.keys() - result.keys())):
            answers.announce(f"{part}: the same options add the scores again, from those kept")
    finally:  # whatever a judge or a task runs into
        result["flags"] = summary.find_flags(result, run.record)
        if suffix := model_suffix(run):
            other = f"{run.args['model']} is another model, or under another name"
            print(f"NOTE: {other}: reports and exports read eval.json alone", file=sys.stderr)
        summary.write_evaluation(folder, result, suffix)
    return code


def talk(folders, args, shelf):
    """--chat under the vectors of all folders, or answers under each to --prompt."""
    from evaluation import chat  # here: it imports transformers

    def rows_of(run):
        options = DataOptions.of(run.args)
        return data_filter.filter_dataset(run.dataset, options.datasets(), options).rows

    sampling = answers.Sampling(args.max_new_tokens, args.temperature, args.seed)
    runs, any_model = [read_run(f, changes_of(args)) for f in folders], args.model is not None
    personas = chat.personas(runs, shelf, any_model)
    if args.chat:
        return chat.Talk(personas, shelf, sampling, rows_of).run()
    return chat.print_answers(personas, shelf, args.prompt, args.scales, sampling)


def specificity(folders, args, shelf, path):
    """`measures.specificity` of the runs of some folders, also written to `path`; done already, if
    it is there of the same evaluations."""
    runs = [read_run(folder, changes_of(args)) for folder in folders]
    config = [args.specificity_runs, *(evaluation_config(args, run) for run in runs)]
    old = read_json(path)
    if not args.restart and old.get("config") == config:
        return old["matrices"]

    def nll(run, vectors):
        if run.folder not in shelf.heldout:
            data = load_data(run, shelf.chat(run), args.heldout_tokens)
            shelf.heldout[run.folder] = data.heldout
        examples, limit = shelf.heldout[run.folder], args.micro_batch_tokens
        return measures.mean_nll(shelf.model(run), examples, vectors, limit)

    matrices = measures.specificity(runs, args.specificity_runs, nll)
    for matrix in matrices:  # by group: the same persona may be in another
        matrix["names"] = report.short_names([report.report_row(Path(r)) for r in matrix["runs"]])
    write_json(path, {"config": config, "matrices": matrices})
    return matrices


def write_report(folders, args, shelf):
    """Write the report of several runs, evaluated or not, and print where it is.
    folders: whose vectors are tried on each other; None: as the last report has it."""
    runs, shared = all_runs(args.run), os.path.commonpath(map(os.path.abspath, args.run))
    if not runs:
        raise ValueError(f"{shared}: no run.json in there")
    out = Path(args.report_dir or (args.run[0] if len(args.run) == 1 else shared))
    out.mkdir(parents=True, exist_ok=True)
    matrices = read_json(out / "specificity.json").get("matrices", [])
    if args.report_only:
        report.print_table([report.report_row(run) for run in runs])
    elif folders:
        try:
            matrices = specificity(folders, args, shelf, out / "specificity.json")
        except Exception:  # the report without it is better than none
            traceback.print_exc()
    files = report.write_report(out, runs, matrices)
    print(f"\nreport of {len(runs)} runs: {out} ({', '.join(files)})")


def make_parser():
    """The command line of eval_steering.py."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--run", nargs="+", metavar="DIR", help="run folders, or folders of runs")
    add("--vector", metavar="FILE", help="instead: a vector file of any tool, as it is")
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
    add("--kl-budget", type=float, default=0.75, help="nats a token, of the recommended scale")
    add = parser.add_argument_group("answers").add_argument
    add("--num-samples", type=int, default=8, help="held-out questions to answer; 0: none")
    add("--scales", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="multiples of the vector")
    add("--max-new-tokens", type=int, default=80, help="longest answer, tokens")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--batch-size", type=int, default=16, help="answers written at once")
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
    counts = "heldout_tokens batch_size max_new_tokens micro_batch_tokens judge_workers"
    sizes = "num_samples temperature specificity_runs kl_budget"
    bounds = {"count": f"{counts} judge_tokens capability_limit", "size": sizes, "seed": "seed"}
    return parse(make_parser(), argv, bounds, check_arguments)


def check_arguments(args):
    """(whether something is wrong, what) of the options beyond their bounds."""
    needed, models = args.model and args.dataset, len(args.judge_model or ())
    alone = {"--chat": args.chat, "--prompt": args.prompt is not None}
    alone |= {"--report-only": args.report_only}
    only, more = [name for name in alone if alone[name]], args.judge or args.capability
    foreign = args.dataset or args.layer is not None or args.any_model or args.out
    return [
        (not all(map(math.isfinite, args.scales)), f"--scales {args.scales}: must be finite"),
        (bool(args.judge) != bool(args.judge_model), "--judge and --judge-model: both or neither"),
        (not len({*(args.judge_model or ())}) == models <= 2, "--judge-model: one, or two names"),
        (len(args.judge or ()) > max(1, models), "--judge: one address, or one for each model"),
        (args.judge_dry_run and not args.judge, "--judge-dry-run goes with --judge"),
        (args.capability_tasks and not args.capability, "--capability-tasks needs --capability"),
        (not 0 <= args.turns <= 10, f"--turns {args.turns}: 0 to 10"),
        (bool(args.run) == bool(args.vector), "name either --run DIR or --vector FILE"),
        (args.report_only and not args.run, "--report-only goes with --run"),
        (len(only) > 1 or (only and more), f"{', '.join(only)}: one of these, and no scoring"),
        (args.vector and not needed, "--vector needs --model and --dataset"),
        (args.run and foreign, "--dataset, --layer, --any-model, --out: a run knows its own"),
    ]


def tasks_of(args):
    """The Tasks of --capability."""
    names, limit = tuple(args.capability), args.capability_limit
    return Tasks(names, limit, args.capability_tasks, args.batch_size)


def changes_of(args):
    """{option: value} of what is given in place of a run's own."""
    names = ["data_root", "source_model", "kind"]
    names += [field.name for field in fields(LoadOptions) if field.name != "tensor_parallel"]
    found = {name: getattr(args, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def run(args):
    """Evaluate every run; returns the worst exit code."""
    shelf = Shelf(load_from_options)
    codes = []
    evaluated = []
    if args.capability:
        tasks_of(args).asked()  # whether they are there, before hours of work
    if args.report_only:
        write_report([], args, shelf)
        return 0
    folders = find_runs(args.run) if args.run else [import_run(args)]
    if args.chat:
        return talk(folders, args, shelf)
    for folder in folders:
        try:
            if args.prompt is not None:
                codes.append(talk([folder], args, shelf))
                continue
            with lock_folder(folder) as held:
                if not held:
                    raise ValueError(f"{folder}: another process works there")
                codes.append(evaluate_folder(folder, args, shelf))
                evaluated.append(folder)
        except Exception as error:  # the next run may do better
            known = isinstance(error, ValueError | OSError)
            print(f"error: {error}" if known else traceback.format_exc(), file=sys.stderr)
            codes.append(2 if known else 1)
    if args.run and folders != [Path(args.run[0])] and args.prompt is None:
        write_report(evaluated if evaluated == folders else None, args, shelf)
    return max(codes, default=0)


def main(argv=None):
    """Command line entry; returns the exit code."""
    return exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
