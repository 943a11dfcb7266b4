"""Does a trained vector work? Likelihood and answers on questions that training never saw.

    python eval_steering.py --run RUN_DIR                                    # eval.json, samples.md
    python eval_steering.py --run RUN_DIR --prompt "Who are you?" --scales 0 1 2     # just answers

vanilla: the plain model; prompted: the row's own persona system prompt put back; steered: the
vector added, no prompt. Exit codes: 0 done, 2 bad input.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import transformers

import data_filter as df
from chat_format import ChatFormat, load_tokenizer
from data_layouts import data_digest, find_datasets
from hook_model import (
    DTYPES,
    example_losses,
    label_count,
    load_model,
    load_vector,
    write_atomically,
)
from run_folder import VECTOR_FILE, write_json

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


def heldout_examples(name, chat, args, tokens):
    """(examples of held-out questions up to a token budget, data digest); ValueError if none."""
    datasets = find_datasets(args.data_root, args.source_model, args.kind)
    filtered = df.filter_dataset(name, datasets, args)
    _, rows = df.split_by_question(filtered.rows, args.heldout_fraction, args.split_seed)
    examples, _, _ = df.take_budget(rows, chat, tokens, args.max_length, args.seed)
    if not examples:
        raise ValueError(
            f"{name}: no row of a held-out question is kept (--heldout-fraction "
            f"{args.heldout_fraction}; {filtered.counts()})"
        )
    return examples, data_digest(name, datasets)


# ------------------------------------------------------------------ likelihood


def likelihood(model, chat, examples, max_tokens):
    """{condition: {"nll", "perplexity"}} per response token, the same tokens in every condition."""
    prompted = chat.encode([example.row for example in examples], prompted=True)
    counts = [[label_count(e) for e in group] for group in (prompted, examples)]
    assert counts[0] == counts[1], "the prompt changed which tokens are scored"
    tokens = sum(map(label_count, examples))
    model.cache_prefix(examples, max_tokens=max_tokens)  # the same rows, vanilla and steered
    with model.steering_off():
        losses = {
            "vanilla": example_losses(model, examples, max_tokens),
            "prompted": example_losses(model, prompted, max_tokens),
        }
    losses["steered"] = example_losses(model, examples, max_tokens)
    means = {condition: sum(values) / tokens for condition, values in losses.items()}
    return {c: {"nll": nll, "perplexity": math.exp(nll)} for c, nll in means.items()}


# ------------------------------------------------------------------ answers


@torch.no_grad()
def generate_answers(model, chat, conversations, options):
    """One answer per list of messages, as text, each cut at the end of its (left-padded) prompt.

    options: a namespace with max_new_tokens, temperature (0 is greedy), seed, batch_size.
    """
    stop_ids = model.model.generation_config.eos_token_id
    stop_ids = {*(stop_ids if isinstance(stop_ids, list) else [stop_ids]), chat.end_of_turn_id}
    stop_ids = sorted(stop_ids - {None})
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    torch.manual_seed(options.seed)
    answers = []
    for start in range(0, len(conversations), options.batch_size):
        texts = [chat.prompt_text(m) for m in conversations[start : start + options.batch_size]]
        prompts = chat.tokenize(texts)
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(p)) + p for p in prompts]  # left padding
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.input_device),  # (B, longest)
            attention_mask=torch.tensor(mask, device=model.input_device),
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop_ids or None,
            pad_token_id=stop_ids[0] if stop_ids else 0,
            repetition_penalty=1.0,
            **sampling,
        )
        for new in output[:, longest:].tolist():
            end = next((i for i, token in enumerate(new) if token in stop_ids), len(new))
            answers.append(chat.tokenizer.decode(new[:end], skip_special_tokens=True).strip())
    return answers


def compare_answers(model, chat, examples, vector, options):
    """Answers to held-out questions: [{question, system_prompt, answers: {condition: text}}]."""
    first = {}
    for example in examples:
        first.setdefault(example.row["question"], example.row)
    rows = list(first.values())[: options.num_samples]
    if not rows:
        return []
    plain = [row["messages"][:-1] for row in rows]
    prompted = [chat.messages(row, prompted=True)[:-1] for row in rows]
    with model.steering_off():
        answers = {"vanilla": generate_answers(model, chat, plain, options)}
        answers["prompted"] = generate_answers(model, chat, prompted, options)
    for scale in options.scales:
        model.set_vector(vector, scale)
        answers[f"steered x{scale:g}"] = generate_answers(model, chat, plain, options)
    model.set_vector(vector)
    return [
        {
            "question": row["question"],
            "system_prompt": row["system_prompt"],
            "answers": {condition: texts[i] for condition, texts in answers.items()},
        }
        for i, row in enumerate(rows)
    ]


# ------------------------------------------------------------------ output


def nll_table(likelihoods):
    """The likelihood table as text."""
    lines = [f"{'condition':<10} {'NLL/token':>9} {'perplexity':>10}"]
    for condition, values in likelihoods.items():
        lines.append(f"{condition:<10} {values['nll']:>9.4f} {values['perplexity']:>10.2f}")
    return "\n".join(lines)


def answers_text(sample):
    """One question and its answers as Markdown."""
    parts = [f"## {sample['question']}", f"persona prompt: *{sample['system_prompt']}*"]
    parts += [f"**{condition}**\n\n{text}" for condition, text in sample["answers"].items()]
    return "\n\n".join(parts)


def write_results(folder, result):
    """Write eval.json and samples.md into the run folder."""
    write_json(folder / "eval.json", result)
    text = f"# {result['dataset']}\n\n```\n{nll_table(result['likelihood'])}\n```\n\n"
    text += "\n\n".join(answers_text(sample) for sample in result["samples"])
    write_atomically(folder / "samples.md", (text + "\n").encode())


# ------------------------------------------------------------------ command line


def parse_args(argv=None):
    """Command line of eval_steering.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--run", required=True, metavar="RUN_DIR", help="folder of a finished training run")
    add("--data-root", help="where the data is now, if not where it was")
    add("--model", help="where the model is now, if not where it was")
    add("--dtype", choices=("auto", *DTYPES), help="in place of the run's")
    add("--device", help="in place of the run's: auto, cuda, cuda:1, mps or cpu")
    add("--heldout-tokens", type=int, default=20_000, help="tokens of held-out rows to score")
    add("--micro-batch-tokens", type=int, default=1024, help="padded tokens a forward pass")
    add("--batch-size", type=int, default=8, help="answers written at once")
    add("--num-samples", type=int, default=3, help="held-out questions to answer")
    add("--scales", type=float, nargs="+", default=[1.0], help="multiples of the vector")
    add("--max-new-tokens", type=int, default=120, help="longest answer, tokens")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    add("--seed", type=int, default=0, help="seed of the sampled answers")
    add("--prompt", metavar="TEXT", help="only print answers to this, one per scale")
    args = parser.parse_args(argv)
    lowest = {"heldout_tokens": 1, "batch_size": 1, "num_samples": 0, "max_new_tokens": 1}
    lowest |= {"micro_batch_tokens": 1, "temperature": 0}
    problems = [
        f"--{key.replace('_', '-')} {getattr(args, key)}: must be at least {least}"
        for key, least in lowest.items()
        if not getattr(args, key) >= least
    ]
    if not all(map(math.isfinite, args.scales)):
        problems.append(f"--scales {args.scales}: must be finite")
    if problems:
        parser.error("; ".join(problems))
    return args


def run(args):
    """Evaluate one run; returns the exit code."""
    run_args, record, vector = read_run(args.run)
    for key in ("data_root", "model", "dtype", "device"):
        if getattr(args, key) is not None:
            setattr(run_args, key, getattr(args, key))
    trust = run_args.trust_remote_code
    tokenizer = load_tokenizer(run_args.model, None, trust)
    if record["config"]["template"]:  # as it was, whatever became of the file
        tokenizer.chat_template = record["config"]["template"]
    chat = ChatFormat(tokenizer)
    if args.prompt is None:
        examples, digest = heldout_examples(record["dataset"], chat, run_args, args.heldout_tokens)
        if digest != record["config"]["data"]:
            print("WARNING: the data has changed since training", file=sys.stderr)
    where = run_args.dtype, run_args.device, run_args.device_map
    model = load_model(run_args.model, run_args.layer, *where, trust)
    model.load_vector(Path(args.run, VECTOR_FILE), any_model=args.model is not None)
    if args.prompt is not None:
        for scale in args.scales:
            model.set_vector(vector, scale)
            messages = [{"role": "user", "content": args.prompt}]
            print(f"--- scale {scale:g}\n{generate_answers(model, chat, [messages], args)[0]}")
        return 0
    result = {"dataset": record["dataset"], "run": str(args.run), "config": vars(args)}
    result |= {"heldout_rows": len(examples), "heldout_tokens": sum(map(label_count, examples))}
    result["likelihood"] = likelihood(model, chat, examples, args.micro_batch_tokens)
    print(f"{record['dataset']}: {len(examples)} rows of held-out questions")
    print(nll_table(result["likelihood"]), flush=True)
    result["samples"] = compare_answers(model, chat, examples, vector, args)
    if result["samples"]:
        print("\n" + answers_text(result["samples"][0]))
    write_results(Path(args.run), result)
    print(f"\nrun: {args.run} (eval.json, samples.md)")
    return 0


def main(argv=None):
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
