"""Judges: what they are asked of an evaluation's answers, over which endpoint, what comes of it.

    judges = make_judges(["http://localhost:8000/v1"], ["gpt-4.1-mini"], dataset, None, 32)
    code = add_scores(result, judges, judgements(run), workers=8)

A judge is a model at any OpenAI-compatible chat endpoint; what it replied once is never asked for
again. The key comes from JUDGE_API_KEY (JUDGE_API_KEY_2 for a second address), or from
OPENAI_API_KEY for OpenAI's own address, and goes nowhere but there. Needs the openai package, whose
client asks again, after a wait, where an endpoint is busy or broken.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean
from urllib.parse import parse_qsl, urlsplit

from tqdm import tqdm

from evaluation.kept import Kept
from evaluation.stats import mean_interval, spearman
from evaluation.table import Measure, add_column, bounds_of, drop_columns, text_of
from steering.data_layouts import parse_name, pooled_names, without_thought

RUBRICS = Path(__file__).parent / "rubrics"
SCALES = {"role": (0, 3), "trait": (0, 100)}  # of the scores that come with the datasets
OPENAI = "api.openai.com"
TRIES = 8  # requests an answer
TIMEOUT = 120.0  # seconds each
TOP = 20  # alternatives to each token of a reply to ask for
MIN_MASS = 0.25  # of probability that must be on scores, for their expectation to be taken
TRIAL = "Reply with the number 1."  # our own request, which tells whether an endpoint works
UNPARSABLE = "unparsable"
ALIKE = 0.05  # share of the scale within which a judge finds vanilla and persona alike
CHARACTERS = 4  # a token, about


@dataclass(frozen=True)
class Kind:
    """Something to ask a judge of an answer, and the column that comes of it.

    rubric: a file in RUBRICS, with {name}, {question} and {answer}. of: which answers are judged,
    "samples" or "identity". scale: the lowest and the highest score. words: what a reply may be in
    place of a score; the first counts as 1, any other as 0. about, better, form: as of a Measure.
    """

    name: str
    rubric: str
    of: str
    about: str
    scale: tuple = (0, 1)
    words: tuple = ()
    better: str = "higher"
    form: str = "{:.2f}"


# What a judge is asked. An entry and its rubric are all that another kind takes. Which of the
# persona's two is asked depends on the dataset; --rubric-dir has others in place of its rubric.
PERSONA = "how much of the persona is in an answer"
SPEAKER = "share of the answers about who is speaking in which the persona speaks"
COHERENCE = Kind("coherence", "coherence.txt", "samples", "of an answer", (0, 100), form="{:.1f}")
KINDS = [
    Kind("persona", "role.txt", "samples", PERSONA, SCALES["role"]),
    Kind("persona", "trait.txt", "samples", PERSONA, SCALES["trait"], form="{:.1f}"),
    COHERENCE,
    Kind("caricature", "caricature.txt", "identity", "how overacted it is", (0, 2), (), "lower"),
    Kind("identity", "identity.txt", "identity", SPEAKER, words=("persona", "assistant", "mixed")),
]
# Nobody is asked for this one: it is the harmonic mean of both, as in AxBench.
OVERALL = Kind("overall", "", "samples", "of persona and coherence, as shares of their scales")


class JudgeError(Exception):
    """An endpoint does not reply as it should; the message says how."""


class RequestRefused(JudgeError):
    """It finds fault with the request, perhaps with its options."""


# ------------------------------------------------------------------ rubrics and replies


def rubrics_for(dataset, folder=None):
    """{Kind: template with {question} and {answer}} of a dataset, the persona's first.

    folder: has <name>.json files with an "eval_prompt", as role and trait files of the field do.
    Raises ValueError if the file is missing or its template is not one.
    """
    _, role_or_trait, name = parse_name(pooled_names(dataset)[0])
    shown_name = re.sub("[{}]", "", name).replace("_", " ")
    rubrics = {}
    for kind in KINDS:
        if kind.name != "persona" or kind.rubric == f"{role_or_trait}.txt":
            rubric = (RUBRICS / kind.rubric).read_text(encoding="utf-8").strip()
            rubrics[kind] = rubric.replace("{name}", shown_name)
    if folder is not None:
        rubrics[next(iter(rubrics))] = foreign_rubric(Path(folder, f"{name}.json"))
    return rubrics


def foreign_rubric(path):
    """The "eval_prompt" of a JSON file; ValueError if it is not one."""
    try:
        template = json.loads(path.read_text(encoding="utf-8-sig"))["eval_prompt"]
        filled = template.format(question="QUESTION-1", answer="ANSWER-2")
        if "QUESTION-1" not in filled or "ANSWER-2" not in filled:
            raise ValueError("it lacks {question} or {answer}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'--rubric-dir: {path} has no usable "eval_prompt" ({error!r})') from error
    return template


def read_reply(reply, kind, finish=None):
    """The score in a judge's reply, None if the answer refuses to be scored, or UNPARSABLE.

    It is read where the whole reply is a number or a word, a JSON object has a "score", or the last
    line is "score: N", "rating: N", "[[N]]" or a word. Nothing is guessed: any other reply is
    unparsable, and so is one that names another scale. finish: its finish_reason, "length" if it
    was cut.
    """
    text = re.sub("[*_`]", "", without_thought(reply)).strip().lower().removesuffix(".")
    word = text.rpartition("\n")[2].strip().removeprefix("[[").removesuffix("]]")
    if finish == "length":
        return UNPARSABLE
    if word in kind.words:
        return float(word == kind.words[0])
    if kind.words or names_another_scale(text, kind):
        return UNPARSABLE
    if word == "refusal":
        return None

    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        text = f"score: {json.loads(text.removeprefix('json'))['score']}"
    number = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*\d+)?"
    last = r"(?:.*\n)?\s*"
    label = r"(?:score|rating)\s*[:=]\s*"
    forms = rf"{number}|{last}{label}{number}|{last}(?:{label})?\[\[{number}\]\]"
    found = re.fullmatch(forms, text, re.DOTALL)
    low, high = kind.scale
    if not found or not low <= float(found[found.lastindex]) <= high:
        return UNPARSABLE
    return float(found[found.lastindex])


def names_another_scale(text, kind):
    """Whether a text has a range or a maximum of scores that is not the kind's."""
    low, high = kind.scale
    ours = rf"\b{low}\s*(?:[-\u2013]|to|and)\s*{high}\b|(?:/|of)\s*{high}\b|\b{high}[- ]point"
    any_scale = r"\d\s*(?:[-\u2013]|to|and)\s*\d|(?:/|of)\s*\d|\d[- ]point"
    return re.search(any_scale, re.sub(ours, "", text)) is not None


def expected_score(score, kind, logprobs):
    """The mean score under the judge's own probabilities; `score` where they do not say it.

    score: what `read_reply` found; logprobs: the reply's, whatever an endpoint makes of them. They
    say it where one token alone is the score, and scores have MIN_MASS of its alternatives (as in
    persona-vectors). Where each digit is a token of its own, no token is a score of two digits.
    """
    low, high = kind.scale
    values = []
    chances = []
    try:
        (token,) = [t for t in logprobs["content"] if t["token"].strip() == f"{score:g}"]
        for other in token["top_logprobs"]:
            text = other["token"].strip()
            if text.isdecimal() and low <= int(text) <= high:
                values.append(int(text))
                chances.append(math.exp(other["logprob"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return score
    no_chances = not MIN_MASS <= sum(chances) <= 1.01  # not a number is no chance either
    if no_chances or (high > 9 and max(values) < 10):
        return score
    return fmean(values, chances)


# ------------------------------------------------------------------ an endpoint


def make_judges(urls, models, dataset, rubric_dir, max_tokens):
    """A Judge of a dataset for each model, at its own address or all at the last one."""
    rubrics = rubrics_for(dataset, rubric_dir)
    keys = ["JUDGE_API_KEY", "JUDGE_API_KEY_2"]  # of an address, which no other gets
    judges = []
    for number, model in enumerate(models):
        place = min(number, len(urls) - 1)
        judges.append(Judge(urls[place], model, rubrics, max_tokens, keys[place]))
    return judges


class Judge:
    """A chat endpoint and a model there, which judge by rubrics; and what came of `score`.

    url: up to and with /v1, or the whole .../chat/completions, with a ?query or without. rubrics:
    as of `rubrics_for`. max_tokens: of a reply. key: the environment variable of its key. Raises
    ValueError for a bad address or key, or without the openai package.

    found: {(kind, question, answer): score}. asked_now: how many replies came. failed: how many are
    missing, errors: why. unparsable: the replies in which there is no clear score.
    """

    def __init__(self, url, model, rubrics, max_tokens, key):
        try:
            import openai
        except ImportError as error:
            raise ValueError("--judge needs the openai package (pip install openai)") from error
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--judge {url}: not an http or https address")
        path = re.sub("(/chat/completions)?/?$", "", parts.path)
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"  # no password
        self.model = model
        self.rubrics = rubrics
        self.max_tokens = max_tokens

        self._key = os.environ.get(key, "").strip()
        if parts.hostname == OPENAI and not self._key:
            self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"${key} or $OPENAI_API_KEY has a line end or no ASCII in it")
        # Another address that a redirect names would get the key as well, so none is followed.
        hooks = {"response": [without_vain_retries]}
        self._client = openai.OpenAI(
            base_url=parts._replace(path=path, query="").geturl(),
            default_query=dict(parse_qsl(parts.query)),
            api_key=self._key or "none",
            timeout=TIMEOUT,
            max_retries=TRIES - 1,
            http_client=openai.DefaultHttpxClient(follow_redirects=False, event_hooks=hooks),
        )
        if parts.hostname != OPENAI:  # The client takes both from the environment.
            self._client.organization = None
            self._client.project = None

    def score(self, prompts, kept, workers, dry_run):
        """Ask for what was never asked for, and read all of it; say what it takes, and what fails.

        prompts: {(kind, question, answer): the rubric filled in}; kept: a Kept, to which a line a
        judgement is added as it comes. Two judgements are the same one if address, model, whole
        prompt and length of the reply are. Where the endpoint failed, a second call tries again.
        """
        self.found = {}
        self.errors = []
        self.unparsable = []
        about = (self.url, self.model, self.max_tokens)
        keys = {item: kept.key(*about, prompt) for item, prompt in prompts.items()}
        missing = {item: prompts[item] for item, key in keys.items() if key not in kept.found}
        tokens = sum(map(len, missing.values())) // CHARACTERS
        print(
            f"judge {self.model}: {len(prompts) - len(missing)} judged before, {len(missing)} "
            f"requests to make, about {tokens:,} tokens in, at most "
            f"{len(missing) * self.max_tokens:,} out",
            flush=True,
        )
        if missing and not dry_run:
            try:
                self.ask_for(missing, keys, kept, workers)
            except JudgeError as error:
                self.errors.insert(0, error)
        lines = {item: kept.found[key] for item, key in keys.items() if key in kept.found}
        self.failed = len(prompts) - len(lines)
        self.asked_now = len(missing) - self.failed
        for item, line in lines.items():
            if line["score"] == UNPARSABLE:
                self.unparsable.append(line["reply"])
            elif line["score"] is not None:
                self.found[item] = line["score"]
        for error in self.errors[:3]:
            print(f"error: {error}", file=sys.stderr)
        if self.unparsable:
            print(
                f"WARNING: {len(self.unparsable)} replies of {self.model} in {kept.path} hold no "
                f"clear score (--judge-tokens?), such as {self.unparsable[0][-100:]!r}",
                file=sys.stderr,
            )

    def ask_for(self, prompts, keys, kept, workers):
        """Ask for replies and keep them. What one answer runs into goes to `errors`; JudgeError if
        every one would run into it."""
        options = self.accepted_options()

        def judge(item, prompt):
            kind = item[0]
            try:
                for _ in range(2):  # A reply without a clear score is asked for once more.
                    reply, finish, logprobs = self.ask(prompt, options)
                    score = expected_score(read_reply(reply, kind, finish), kind, logprobs)
                    if score != UNPARSABLE or finish == "length":
                        break
            except JudgeError as error:
                self.ask(TRIAL, options)  # An endpoint that fails here too is of no more use.
                self.errors.append(error)
                return
            kept.add(keys[item], judge=self.model, prompt=prompt, reply=reply, score=score)

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(judge, *asked) for asked in prompts.items()]
            done = concurrent.futures.as_completed(futures)
            try:
                for future in tqdm(done, "judge", len(futures), disable=None):
                    future.result()
            finally:  # Also of Ctrl-C: what is on its way comes in, the rest is not asked for.
                pool.shutdown(cancel_futures=True)

    def accepted_options(self):
        """Options of a request that the endpoint takes, found out by requests of our own. What an
        answer runs into later says nothing about the others. JudgeError if it takes none."""
        plain = {"temperature": 0, "max_tokens": self.max_tokens}
        with_chances = {**plain, "logprobs": True, "top_logprobs": TOP}
        newer = {"max_completion_tokens": self.max_tokens}  # as OpenAI's reasoning models want it
        for options in (with_chances, plain, newer):
            try:
                self.ask(TRIAL, options)
                break
            except RequestRefused:
                if options is newer:
                    raise
        if options is not with_chances:
            print(f"judge {self.model}: takes no more than {options}", file=sys.stderr)
        return options

    def ask(self, prompt, options):
        """(Reply, its finish_reason, its log-probabilities) of one request; JudgeError if it
        cannot be had."""
        message = {"role": "user", "content": prompt}
        create = self._client.chat.completions.with_raw_response.create
        try:
            response = create(model=self.model, messages=[message], **options)
            choice = response.http_response.json()["choices"][0]
            content = choice["message"]["content"] or ""
            if isinstance(content, list):  # in parts, as some servers send it
                content = [part.get("text", "") for part in content]
            return "".join(content), choice.get("finish_reason"), choice.get("logprobs")
        except Exception as error:  # whatever the client makes of what comes over the wire
            status = getattr(error, "status_code", None)
            cause = getattr(error, "body", None) or error.__cause__
            problem = f"HTTP {status}: {error!r} {cause}".replace(self._key or "\0", "<key>")
            text = f"--judge {self.url}, model {self.model}: {problem[:400]}"
            if status in (400, 422) or "logits_all" in text:
                raise RequestRefused(text) from None
            raise JudgeError(text) from None


def without_vain_retries(response):
    """Tell the client not to ask again where no wait helps: the account is empty, or a llama.cpp
    server was started without log-probabilities, which it calls an internal error."""
    if response.status_code >= 400:
        text = response.read()
        if b"insufficient_quota" in text or b"logits_all" in text:
            response.headers["x-should-retry"] = "false"


# ------------------------------------------------------------------ scores of an evaluation


def judgements(run):
    """What is Kept of a run's judgements: in its dataset's folder, that runs of other seeds share,
    or in its own."""
    folder = run.folder.absolute()
    if folder.parent.name == run.dataset:
        folder = folder.parent
    return Kept(folder / "judgements.jsonl")


def add_scores(result, judges, kept, workers=8, dry_run=False):
    """Put the judges' scores into an evaluation's dict; 1 if one of them failed, else 0.

    judges: of `make_judges`; kept: a Kept of their judgements; dry_run: only say what it takes. The
    scores of an earlier call go, unless no judge replied to anything.
    """
    prompts = {}
    for kind, template in judges[0].rubrics.items():
        for sample in result[kind.of]:
            question = sample["question"]
            for answer in filter(None, sample["answers"].values()):
                prompt = template.format(question=question, answer=answer)
                prompts[kind, question, answer] = prompt
    for judge in judges:
        judge.score(prompts, kept, workers, dry_run)
    if dry_run:
        return 0

    scored = [judge for judge in judges if judge.failed < len(prompts)]
    if scored:
        drop_columns(result, "judge")
        prefixes = ["judge", "judge2"]
        pairs = zip(scored, prefixes, strict=False)
        result["judges"] = [add_judge(result, judge, prefix) for judge, prefix in pairs]
        result["agreement"] = None
        if len(scored) == 2:
            result["agreement"] = agreement(scored[0].found, scored[1].found)
    return int(any(judge.failed for judge in judges))


def add_judge(result, judge, prefix):
    """Put a judge's columns into the table, and return what else is to be known of it."""
    kinds = list(judge.rubrics)
    persona = kinds[0]
    for (kind, question, answer), score in list(judge.found.items()):
        coherence = judge.found.get((COHERENCE, question, answer))
        if kind is persona and coherence is not None:  # Both scales begin at 0.
            shares = [score / persona.scale[1], coherence / COHERENCE.scale[1]]
            judge.found[OVERALL, question, answer] = harmonic_mean(shares)

    kinds.insert(2, OVERALL)
    for kind in kinds:
        scores = scores_of_answers(result, kind, judge.found)
        measure = Measure(
            name=f"{prefix}_{kind.name}",
            table=f"judge {judge.model}",
            form=kind.form,
            unit=f"{kind.scale[0]}-{kind.scale[1]}",
            better=kind.better,
            about=kind.about,
        )
        column = {name: mean_of(row, kind.scale) for name, row in scores.items()}
        add_column(result, measure, column)

    # A judge has to find the persona in the dataset's own answers rather than in the plain model's.
    scores = scores_of_answers(result, persona, judge.found)
    plain = scores.get("vanilla", {})
    shown = scores.get("dataset", {})
    above = {question: shown[question] - plain[question] for question in shown if question in plain}
    return {
        "model": judge.model,
        "url": judge.url,
        "scale": list(persona.scale),
        "rubrics": {kind.name: template for kind, template in judge.rubrics.items()},
        "asked_now": judge.asked_now,
        "failed": judge.failed,
        "unparsable": len(judge.unparsable),
        "above_vanilla": mean_of(above),
    }


def scores_of_answers(result, kind, found):
    """{condition: {question: score}} of a kind. An empty answer to a question has the lowest score;
    one about who is speaking says nothing and has none."""
    column = {}
    for sample in result[kind.of]:
        question = sample["question"]
        for condition, answer in sample["answers"].items():
            score = found.get((kind, question, answer))
            if not answer and kind.of == "samples":
                score = float(kind.scale[0])
            if score is not None:
                column.setdefault(condition, {})[question] = score
    return column


def mean_of(scores, scale=None):
    """`mean_interval` of {question: score}; scale: of a score, None of a difference of two."""
    return mean_interval(list(scores.values()), list(scores), scale)


def agreement(first, second):
    """`spearman` of the persona scores in what two judges found of the same answers."""
    both = [item for item in first if item in second and item[0].name == "persona"]
    questions = [question for _, question, _ in both]
    return spearman([first[item] for item in both], [second[item] for item in both], questions)


def judge_flags(result):
    """What is wrong with the judges of an evaluation's dict, as a list."""
    judges = result.get("judges", [])
    flags = []
    if not result["samples"]:  # --num-samples 0
        return flags
    for judge in judges:
        above = judge["above_vanilla"]
        bounds = bounds_of(above)
        low, high = judge["scale"]
        if above is None:
            flags.append(f"judge {judge['model']}: no reply to compare the persona and vanilla by")
        elif above["mean"] <= ALIKE * (high - low) or (bounds and bounds[0] <= 0):
            flags.append(f"judge {judge['model']} scores vanilla like the persona")
    if len(judges) == 2:
        agreed = result["agreement"]
        if agreed is None or agreed["mean"] <= 0.3:
            flags.append(f"judges disagree (rank correlation {text_of(agreed, '{:.2f}')})")
    return flags
