"""Other aims than next-token loss that still give one vector: which is worth its tokens?

    python bench/aims.py bench/plan_aims.txt --out runs/aims        # a line: name | aim | options
    python bench/aims.py --table runs/aims                          # and frontier.png

A plain loop, without checkpoints: train_steering.py has what won. Each run trains one vector, and
is then scored on held-out questions: NLL of its own rows and of another author's answers in the
persona (second_author.jsonl), and at scales of equal KL(vanilla || steered) on plain rows, answers'
persona by probe and by lexicon. The last vector counts, whatever validations say.
"""

import argparse
import collections
import contextlib
import functools
import json
import math
import random
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sweep import read_plan

import eval_steering
import train_steering
from evaluation import answers, measures
from evaluation.stats import repeated
from hook_model import ResidualHook, load_chat, load_model
from steering.chat_format import collate, label_count
from steering.fast_path import FastPath, HeadLoss, token_mean
from steering.run_state import Run
from steering.teacher import first_rows, teacher_examples
from steering.vector_file import read_json, write_json

SCALES = 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0
KL_LEVELS = 0.25, 0.5, 0.75, 1.0  # nats a token, that vectors are compared at
QUESTIONS, TIMES, NEW_TOKENS = 20, 3, 48  # each question is answered so many times
MARGIN, MARGIN_WEIGHT, PLAIN_WEIGHT = 0.5, 6.0, 0.6  # of the contrast, as in EasyEdit


class RowHook(ResidualHook):
    """A ResidualHook whose scale may be a tensor (B, 1, 1), whose vector may have a learned factor,
    and which may act at the positions of `mask` (B, T, 1) alone."""

    def __init__(self, hidden_size, learned_scale=False):
        super().__init__(hidden_size)
        self.mask, self.only_prompt = None, False
        if learned_scale:
            self.alpha = torch.nn.Parameter(torch.ones(()))

    def added(self):
        return self.vector * self.alpha if hasattr(self, "alpha") else self.vector

    def forward(self, hidden_states):
        if not torch.is_tensor(self.scale) and self.scale == 0:
            return hidden_states
        vector = self.scale * self.added()
        if self.only_prompt:
            mask = self.mask
            if mask is None or mask.shape[:2] != hidden_states.shape[:2]:
                return hidden_states
            vector = vector * mask
        return hidden_states + vector.to(hidden_states.dtype)

    @contextlib.contextmanager
    def rows(self, scale):
        """Context: a scale for each row, (B,)."""
        before, self.scale = self.scale, scale[:, None, None].to(self.vector.device)
        try:
            yield
        finally:
            self.scale = before


def prompt_mask(lengths, starts, width):
    """(B, width, 1): 1 at the first two and last two tokens of each prompt."""
    mask = torch.zeros(len(lengths), width, 1)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for at in (0, 1, length - 2, length - 1):
            mask[row, start + at] = 1.0
    return mask


def masked(model, examples):
    """Set the hook's mask to the prompts of (right-padded) examples."""
    if model.steering.only_prompt:
        lengths = [next(i for i, t in enumerate(e.labels) if t >= 0) for e in examples]
        width = collate(examples)[0].shape[1]
        model.steering.mask = prompt_mask(lengths, [0] * len(lengths), width)


# ------------------------------------------------------------------ training


def divergence(fast, examples, reference):
    """KL(reference || model) of label tokens, differentiable: (N,). reference: states (N, n)."""
    fast._check_fast_path(examples)
    states, _, logits_of = fast._before_head(examples)

    def kl(logits, before):
        with torch.no_grad():
            before = logits_of(before.to(logits)).float().log_softmax(-1)
        return (before.exp() * (before - logits.float().log_softmax(-1))).sum(-1)

    return HeadLoss.apply(states, logits_of, kl, reference)


def plain_states(model, fast, examples):
    """{id of an example: what the plain model's head reads at its label tokens, (N, n)}."""
    with model.steering_off():
        return {id(e): fast.states([e]) for e in examples}


def teacher_states(model, fast, chat, train, kind):
    """{id of an example: states of the model that sees the persona prompt}; kind: of `teacher`."""
    prompted = teacher_examples(chat, train, kind)
    with model.steering_off():
        return {id(e): fast.states([p]) for e, p in zip(train, prompted, strict=True)}


def fit(model, chat, data, aim, args):
    """Train the model's vector for one aim; returns what it took."""
    steering, train, started = model.steering, data.train, time.time()
    fast, seen = FastPath(model), [0]
    pairs = collections.defaultdict(list)
    for example in data.plain_train:
        pairs[example.row["question"]].append(example)
    uses_plain = aim.contrast or aim.neutral_kl
    fast.cache_prefix([*train, *(data.plain_train if uses_plain else [])], max_tokens=4096)
    losses = functools.partial(fast.losses, token_loss=train_steering.token_loss)
    teacher = aim.teacher and teacher_states(model, fast, chat, train, aim.teacher)
    neutral = plain_states(model, fast, data.plain_train) if aim.neutral_kl else {}
    unit = fast.median_residual_norm(train[:8]) / math.sqrt(model.hidden_size)
    draw = random.Random(args.seed)
    shuffle = torch.Generator().manual_seed(args.seed)
    groups = [{"params": [steering.vector], "lr": 0.0}]
    if hasattr(steering, "alpha"):
        groups.append({"params": [steering.alpha], "lr": 0.0, "factor": 0.02 / (0.05 * unit)})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    per_epoch = math.ceil(len(train) / args.batch_size)
    epochs = train_steering.epochs_of(args, per_epoch)
    total, step = epochs * per_epoch, 0

    def loss_of(batch):
        """The aim's loss of the rows of a step."""
        masked(model, batch)
        seen[0] += sum(len(e.input_ids) for e in batch)
        counts = list(map(label_count, batch))
        scale = contextlib.nullcontext()
        if aim.scale_draw:
            scale = steering.rows(torch.tensor([draw.uniform(*aim.scale_draw) for _ in batch]))
        with scale:
            if teacher:
                reference = torch.cat([teacher[id(e)] for e in batch])
                loss = divergence(fast, batch, reference).sum() / sum(counts)
                if aim.mix:
                    loss = (1 - aim.mix) * loss + aim.mix * losses(batch).sum() / sum(counts)
            else:
                loss = losses(batch).sum() / sum(counts)
        if aim.contrast:
            plain = [draw.choice(pairs.get(e.row["question"]) or data.plain_train) for e in batch]
            seen[0] += sum(len(e.input_ids) for e in plain)
            other = losses(plain).sum() / sum(map(label_count, plain))
            margin = torch.relu(MARGIN - (other - loss))
            loss = loss + PLAIN_WEIGHT * other + MARGIN_WEIGHT * margin
        if aim.neutral_kl:
            plain = draw.sample(data.plain_train, len(batch))
            masked(model, plain)
            seen[0] += sum(len(e.input_ids) for e in plain)
            reference = torch.cat([neutral[id(e)] for e in plain])
            effect = divergence(fast, plain, reference).sum() / len(reference)
            loss = loss + aim.neutral_kl * effect
        return loss

    for _ in range(epochs):
        order = torch.randperm(len(train), generator=shuffle).tolist()
        for start in range(0, len(order), args.batch_size):
            loss = loss_of([train[i] for i in order[start : start + args.batch_size]])
            loss.backward()
            lr = (
                aim.units * unit * train_steering.lr_factor(step, total, int(0.1 * total), "cosine")
            )
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("factor", 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    with torch.no_grad():
        vector = steering.added().detach().clone()
        if hasattr(steering, "alpha"):
            steering.alpha.fill_(1.0)
        steering.vector.copy_(vector)
    seconds = round(time.time() - started, 1)
    return vector, {"tokens": seen[0], "seconds": seconds, "steps": step, "unit": unit}


# ------------------------------------------------------------------ scoring


def second_author(chat, name, rows):
    """Examples of another author's answers in the persona to the rows' questions."""
    lines = map(json.loads, (ROOT / "bench/second_author.jsonl").read_text().splitlines())
    texts = {line["question"]: line["answer"] for line in lines if line["dataset"] == name}
    asked = {row["question"]: row for row in rows if row["question"] in texts}
    if not asked:
        raise ValueError(f"second_author.jsonl answers no held-out question of {name}")
    return answers.answer_examples(chat, list(asked.values()), [texts[q] for q in asked])


def lexicon(data, size=60):
    """Words of the persona's training rows that plain ones use much less."""

    def count(examples):
        texts = (e.row["messages"][-1]["content"].lower() for e in examples)
        return collections.Counter(w for t in texts for w in re.findall(r"[a-z']+", t))

    persona, plain = count(data.train), count(data.plain_train)
    totals = sum(persona.values()), sum(plain.values())

    def odds(word):
        return (persona[word] + 0.5) / totals[0] / ((plain[word] + 0.5) / totals[1])

    frequent = [word for word, n in persona.items() if n >= 3]
    return {*sorted(frequent, key=odds, reverse=True)[:size]}


def answers_at(model, chat, turns, scales, seed=0):
    """[scale][question]: answers, all written at once."""
    sampling = answers.Sampling(NEW_TOKENS, 0.7, seed, len(turns))
    steering, result = model.steering, []
    if not steering.only_prompt:
        every = [turn for _ in scales for turn in turns]
        wide = answers.Sampling(NEW_TOKENS, 0.7, seed, len(every))
        scale = torch.tensor([s for s in scales for _ in turns])
        with steering.rows(scale):
            model.generate = model.model.generate  # a scale of its own for each row
            texts = answers.generate_answers(model, chat, every, wide)
            del model.generate
        return [texts[i : i + len(turns)] for i in range(0, len(texts), len(turns))]
    inputs = chat.inputs(turns)["attention_mask"]
    lengths, width = inputs.sum(1).tolist(), inputs.shape[1]
    steering.mask = prompt_mask(lengths, [width - n for n in lengths], width)
    for scale in scales:
        with model.scaled(scale):
            result.append(answers.generate_answers(model, chat, turns, sampling))
    return result


def score(model, chat, data, context, vector, limit):
    """All numbers of a vector. context: of `prepare`."""
    fast = context["fast"]

    def nll(batch):
        masked(model, batch)
        return measures.nll_of(fast)(batch)

    def effect(batch):
        masked(model, batch)
        return fast.divergences(batch)

    result = {"norm": vector.norm().item()}
    result["cosine"] = torch.cosine_similarity(vector, context["difference"], dim=0).item()
    for name in ("validation", "heldout", "second"):
        result[name] = token_mean(nll, context[name], limit)
    curve = {0.0: 0.0}
    for scale in SCALES:
        with model.scaled(scale):
            curve[scale] = token_mean(effect, context["plain"], limit)
        if curve[scale] > KL_LEVELS[-1]:
            break
    result["kl"] = curve
    kl = np.array([*curve.values()])
    order = np.maximum.accumulate(kl)
    levels = [level for level in KL_LEVELS if level <= order[-1]]
    scales = np.interp(np.sqrt(levels), np.sqrt(order), [*curve]).tolist()
    scales = [*scales, 1.0]
    levels = [*map(str, levels), "x1"]
    each = [answers_at(model, chat, context["turns"], scales, seed) for seed in range(TIMES)]
    texts = [[text for part in parts for text in part] for parts in zip(*each, strict=True)]
    result["levels"] = {}
    for level, scale, each in zip(levels, scales, texts, strict=True):
        written = answers.answer_examples(chat, context["rows"] * TIMES, each)
        examples = answers.without_end(written, chat)
        found = {"scale": scale, "texts": each, "probe": None}
        if examples:
            means = measures.response_means(model, examples, limit)
            found["probe"] = context["probe"](means).mean().item()
            with model.steering_off():
                found["nll"] = token_mean(measures.nll_of(fast), examples, limit)
        words = [re.findall(r"[a-z']+", text.lower()) for text in each]
        shares = [sum(w in context["lexicon"] for w in ws) / max(1, len(ws)) for ws in words]
        found["lexicon"] = float(np.mean(shares))
        found["repeated"] = float(np.mean([repeated(t) for t in each]))
        found["kl"] = 1.0 if level == "x1" else float(level)
        result["levels"][level] = found
    return result


def prepare(model, chat, name, data):
    """What every vector of a persona, model and layer is scored with."""
    fast = FastPath(model)
    second = second_author(chat, name, [e.row for e in data.heldout])
    plain = measures.first_tokens(data.plain_heldout, 3000)
    fast.cache_prefix([*data.validation, *data.heldout, *second, *plain], max_tokens=4096)
    parts = data.train, data.plain_train, data.heldout, data.plain_heldout
    means = [measures.response_means(model, answers.without_end(p, chat), 1024) for p in parts]
    probe, report = measures.train_probe(*means)
    rows = first_rows(data.heldout, QUESTIONS)
    with model.steering_off():
        sets = {"validation": data.validation, "heldout": data.heldout, "second": second}
        vanilla = {k: token_mean(measures.nll_of(fast), e, 2048) for k, e in sets.items()}
    return {
        "vanilla": vanilla,
        "fast": fast, "second": second, "plain": plain, "validation": data.validation,
        "heldout": data.heldout, "difference": means[0].mean(0) - means[1].mean(0),
        "probe": probe, "auroc": report["auroc"], "rows": rows, "lexicon": lexicon(data),
        "turns": [row["messages"][:-1] for row in rows],
    }  # fmt: skip


def aim_parser():
    """The aim of a plan's line."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--teacher", choices=("prompted", "few_shot"))
    add("--mix", type=float, default=0.0, help="share of next-token loss beside the teacher's")
    add("--neutral-kl", type=float, default=0.0)
    add("--contrast", action="store_true")
    add("--learned-scale", action="store_true")
    add("--scale-draw", type=float, nargs=2)
    add("--positions", action="store_true", help="only the prompt's first and last two tokens")
    add("--mean-difference", action="store_true", help="no training")
    add("--units", type=float, default=0.05, help="learning rate, as --lr auto has it")
    return parser


def run_plan(plan, out):
    """Train and score each line of a plan, `name | aim | options of train_steering.py`."""
    loaded, contexts = {}, {}
    for name, common, *rest in read_plan(plan):
        aim = aim_parser().parse_args(shlex.split(rest[0]))
        argv = shlex.split(f"--data-root sample_data {common} {' '.join(rest[1:])}")
        args = train_steering.parse_args(argv)
        dataset, model_name = args.dataset[0], Path(args.model).name
        folder = out / f"{model_name}-{args.layer}-{dataset}-seed{args.seed}"
        path = folder / f"{name}.json"
        before = read_json(path) if path.exists() else {}
        if before.get("times") == TIMES:
            continue
        if args.model not in loaded:
            loaded.clear()
            contexts.clear()
            model = load_model(args.model, args.layer, args.dtype)
            loaded[args.model] = model, load_chat(args.model)
        model, chat = loaded[args.model]
        model.steering = RowHook(model.hidden_size, aim.learned_scale)
        model.steering.only_prompt = aim.positions
        model.set_layer(args.layer)
        key = dataset, args.layer, args.seed
        if key not in contexts:
            contexts.clear()
            run = Run(folder, dataset, {}, None, vars(args))
            data = eval_steering.load_data(run, chat, 20_000)
            if not (data.plain_train and data.plain_heldout):
                raise SystemExit(f"{dataset}: no plain rows")
            contexts[key] = data, prepare(model, chat, dataset, data)
        data, context = contexts[key]
        if before:  # scored with fewer answers: only that is done again
            vector = torch.tensor(before["vector"])
            took = {key: before[key] for key in ("tokens", "seconds", "steps")}
            model.set_vector(vector)
        elif aim.mean_difference:
            vector, took = context["difference"], {"tokens": 0, "seconds": 0.0, "steps": 0}
            model.set_vector(vector)
        else:
            vector, took = fit(model, chat, data, aim, args)
        started = time.time()
        result = score(model, chat, data, context, vector, 2048)
        result |= {"vanilla": context["vanilla"], "times": TIMES}
        result |= {**took, "aim": rest[0], "options": argv, "auroc": context["auroc"]}
        result |= {"vector": vector.tolist(), "score_seconds": round(time.time() - started, 1)}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        at = [f"{k}: {v['scale']:.2f} {v['probe'] or 0:.2f}" for k, v in result["levels"].items()]
        shown = ", ".join(f"{k} {result[k]:.3f}" for k in ("validation", "heldout", "second"))
        spent = f"{took['seconds']} + {result['score_seconds']} s"
        print(f"{folder.name} {name}: {shown} | {at} | {spent}", flush=True)


# ------------------------------------------------------------------ what came out


def results(out):
    """{(model and layer): {aim: [result of each persona and seed]}} of a folder of runs."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in sorted(out.rglob("*.json")):
        result = read_json(path)
        place = "-".join(path.parent.name.split("-")[:-2])
        found[place][path.stem].append(result | {"where": path.parent.name})
    return found


def at_level(each, level, key):
    """What the answers of each run are like at a KL; none if one of them never reaches it."""
    found = [r["levels"].get(str(level), {}).get(key) for r in each]
    return [] if None in found else found


def table(out):
    """Means over the runs of each aim; in brackets, of next-token loss over the same ones, and of
    how many of them the probe gives more than that."""
    columns = [(f"probe at KL {level:g}", level, "probe") for level in KL_LEVELS]
    columns += [("lexicon at KL 0.5", 0.5, "lexicon"), ("repeated at KL 0.5", 0.5, "repeated")]
    names = ["aim", "runs", "tokens", "NLL gain", "another author's", *(c[0] for c in columns)]
    for place, aims in results(out).items():
        print(f"\n### {place}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
        before = {r["where"]: r for r in aims["ce"]}
        for name, each in aims.items():
            each = [r for r in each if r["where"] in before]
            same = [before[r["where"]] for r in each]
            cells = [name, str(len(each)), f"{np.mean([r['tokens'] for r in each]):,.0f}"]
            for key in ("heldout", "second"):
                gains = [np.mean([r["vanilla"][key] - r[key] for r in x]) for x in (each, same)]
                cells.append("{:.3f} ({:.3f})".format(*gains))
            for _, level, key in columns:
                found, ce = (at_level(x, level, key) for x in (each, same))
                cells.append(f"{np.mean(found):.2f} ({np.mean(ce):.2f})" if found and ce else "-")
                if key == "probe" and found and ce and name != "ce":
                    more = sum(a > b for a, b in zip(found, ce, strict=True))
                    cells[-1] = f"{cells[-1][:-1]}; {more} of {len(found)})"
            print(f"| {' | '.join(cells)} |")


def picture(out):
    """frontier.png: persona by probe against KL on plain rows, a line for each aim that has all the
    personas that next-token loss has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def personas(each):
        return {r["where"].rsplit("-", 1)[0] for r in each}

    places = results(out)
    figure, axes = pyplot.subplots(1, len(places), figsize=(5 * len(places), 4.5), squeeze=False)
    for axis, (place, aims) in zip(axes[0], places.items(), strict=True):
        for name, each in aims.items():
            points = [(level, at_level(each, level, "probe")) for level in KL_LEVELS]
            points = [(level, np.mean(found)) for level, found in points if found]
            if points and personas(each) == personas(aims["ce"]):
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        many = f"{len(personas(aims['ce']))} personas, {len(aims['ce'])} runs"
        axis.set(title=f"{place}\n{many}", ylim=(0, 1))
        axis.set(xlabel="KL(vanilla || steered) on plain rows, nats a token")
        axis.set(ylabel="persona of answers, by probe")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "frontier.png", dpi=100)


def main():
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("plan", nargs="?", type=Path, help="file with one run a line")
    add("--out", type=Path, default=Path("runs/aims"), help="folder of the results")
    add("--table", type=Path, metavar="DIR", help="print the results of this folder, and draw")
    args = parser.parse_args()
    if args.plan:
        run_plan(args.plan, args.out)
    if args.table:
        table(args.table)
        picture(args.table)


if __name__ == "__main__":
    main()
