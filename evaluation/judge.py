"""A judge: any OpenAI-compatible chat endpoint, asked for a score of an answer, and paid once.

    judge = Judge("http://localhost:8000/v1", "gpt-4.1-mini", rubrics_for("x__role__pirate"))
    verdicts = judge.score([("role", question, answer), ...], Kept("judgements.jsonl"), workers=8)

The key comes from JUDGE_API_KEY (JUDGE_API_KEY_2 for a second address), or from OPENAI_API_KEY for
OpenAI's own address, and goes nowhere but there. Needs the openai package, whose client asks again,
after a wait, where an endpoint is busy or broken.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from tqdm import tqdm

from steering.chat_format import THOUGHT
from steering.data_layouts import parse_name, pooled_names

# What a judge may be asked of an answer: its lowest and highest score, or its words. role and trait
# are the datasets' own scales of the persona.
SCALES = {"role": (0, 3), "trait": (0, 100), "coherence": (0, 100), "caricature": (0, 2)}
WORDS = {"identity": ("persona", "assistant", "mixed")}
MIN_MASS = 0.25  # of probability that must be on scores, for their expectation to be taken
OPENAI = "api.openai.com"
CLIENT = 400, 413, 422  # statuses that find fault with a request, which may be with its options
TOP = 20  # alternatives to each token of a reply to ask for
TRIES, TIMEOUT = 8, 120.0  # requests an answer, seconds each

# <kind>.txt each; those of role and trait are in place of a dataset's own (--rubric-dir).
RUBRICS = Path(__file__).parent / "rubrics"


class JudgeError(Exception):
    """The endpoint does not answer as it should; the message says how.
    of_all: whether it would do so whatever the answer, as with a wrong address or key."""

    of_all = True


def rubrics_for(dataset, folder=None):
    """{kind: template with {question} and {answer}} of a dataset: first the persona's, role or
    trait, then coherence, identity and caricature.
    folder: has <name>.json files with an "eval_prompt", as role and trait files of the field do.
    Raises ValueError if the file is missing or its template is not one."""
    _, own, name = parse_name(pooled_names(dataset)[0])
    rubrics = {}
    for kind in (own, "coherence", "identity", "caricature"):
        rubric = (RUBRICS / f"{kind}.txt").read_text(encoding="utf-8").strip()
        rubrics[kind] = rubric.replace("{name}", re.sub("[{}]", "", name).replace("_", " "))
    if folder is None:
        return rubrics
    path = Path(folder, f"{name}.json")
    try:
        template = json.loads(path.read_text(encoding="utf-8-sig"))["eval_prompt"]
        filled = template.format(question="QUESTION-1", answer="ANSWER-2")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f'--rubric-dir: {path} has no usable "eval_prompt" ({error!r})') from error
    if "QUESTION-1" not in filled or "ANSWER-2" not in filled:
        raise ValueError(f"--rubric-dir: {path}: eval_prompt lacks {{question}} or {{answer}}")
    return rubrics | {own: template}


def parse_reply(reply, kind, finish=None):
    """The score in a judge's reply, one of the kind's WORDS, "refusal", or "unparsable".
    A score is the number on the kind's scale that "score:" or "rating:" names, all such numbers
    being the same one, or else the only number of the reply. Ranges ("0-3", "2 or 3") and what a
    score is out of ("2/3") are none, thoughts before the answer are passed over; a score out of
    another maximum is unparsable. finish: its finish_reason; "length" is unparsable."""
    reply = re.sub(rf"(?is)<({THOUGHT})>.*?</\1>", "", reply)
    reply = re.sub(r"(?s)\[THINK\].*?\[/THINK\]", "", reply).rpartition("</think>")[2]
    if finish == "length" or re.search(rf"(?i)<({THOUGHT})>|\[THINK\]", reply):
        return "unparsable"
    if kind in WORDS:
        found = {word for word in WORDS[kind] if re.search(rf"(?i)\b{word}\b", reply)}
        denied = re.search(r"(?i)\b(not?|nor|neither|without|isn|doesn|cannot|never)\b", reply)
        return found.pop() if len(found) == 1 and not denied else "unparsable"
    low, high = SCALES[kind]
    number = r"-?\d+(?:[.,]\d+)*"
    try:
        span = rf"({number})\s*(?:[-\u2013\u2014]|\.\.+|to|or)\s*({number})"
        text = re.sub(span, lambda m: "" if float(m[1]) < float(m[2]) else m[0], reply)
        out_of = rf"({number})\s*(?:/|out of|of)\s*({number})"
        other = any(float(most) != high for _, most in re.findall(out_of, text))
        text = re.sub(out_of, r"\1", text)
        named = rf"(?i:\b(?:score|rating)\b)[\s*_`()\[\]]*[:=][\s*_`]*({number})"
        found = re.findall(named, text) or re.findall(rf"(?<![\w.]){number}", text)
        found = {float(n) for n in found}
    except ValueError:  # 1,000 or 2,5
        return "unparsable"
    if not found and re.search(r"\brefus", reply, re.I):
        return "refusal"
    clear = len(found) == 1 and not other and low <= min(found) <= high
    return found.pop() if clear else "unparsable"


def expected_score(score, tokens, kind):
    """The mean score under the judge's own probabilities, or None where they do not say it.
    score: what `parse_reply` found; tokens: the reply's as the endpoint gives them, with "token"
    and "top_logprobs". Taken where one token alone is the score, and so are alternatives to it of
    at least MIN_MASS (as in persona-vectors). Where each digit is a token of its own, a token is no
    score of two digits."""
    low, high = SCALES[kind]

    def value(text):
        text = text.strip()
        return int(text) if text.isascii() and text.isdigit() and low <= int(text) <= high else None

    at = [token for token in tokens or () if value(token["token"]) == score]
    if len(at) != 1:
        return None
    chances = {}
    for other in at[0]["top_logprobs"]:
        if (found := value(other["token"])) is not None:
            chances[found] = chances.get(found, 0.0) + math.exp(other["logprob"])
    mass = sum(chances.values())
    if mass < MIN_MASS or (high > 9 and max(chances) < 10):
        return None
    return sum(found * chance for found, chance in chances.items()) / mass


class Judge:
    """A chat endpoint and a model there, which judge by rubrics.
    url: up to and with /v1, or the whole .../chat/completions, with a ?query or without; rubrics:
    {kind: template}, as of `rubrics_for`; key: the environment variable of its key. Raises
    ValueError for a bad address or key, or without the openai package."""

    def __init__(self, url, model, rubrics, max_tokens=32, key="JUDGE_API_KEY"):
        try:
            import openai
        except ImportError as error:
            raise ValueError("--judge needs the openai package (pip install openai)") from error
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--judge {url}: not an http or https address")
        self.model, self.rubrics, self.max_tokens = model, rubrics, max_tokens
        self.asked, self.failures = 0, []
        self.options = {"temperature": 0, "max_tokens": max_tokens}
        self.options |= {"logprobs": True, "top_logprobs": TOP}
        self.url = parts._replace(query="", netloc=parts.netloc.rpartition("@")[2]).geturl()
        names = [key, *(["OPENAI_API_KEY"] if parts.hostname == OPENAI else [])]
        self._key = next((key for n in names if (key := os.environ.get(n, "").strip())), "")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"the key in ${' or $'.join(names)} has a line end or no ASCII in it")
        base = parts._replace(path=re.sub("/chat/completions/?$", "", parts.path), query="")
        # Another address that a redirect names would get the key as well: none is followed.
        self._client = openai.OpenAI(
            base_url=base.geturl(), default_query=dict(parse_qsl(parts.query)), timeout=TIMEOUT,
            api_key=self._key or "none", max_retries=TRIES - 1,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )  # fmt: skip
        if parts.hostname != OPENAI:  # which the client takes from the environment
            self._client.organization = self._client.project = None

    def prompt(self, kind, question, answer):
        """The rubric filled in."""
        return self.rubrics[kind].format(question=question, answer=answer)

    def key(self, kept, asked):
        """What makes two judgements the same one: judge model, its whole prompt, reply length."""
        return kept.key(self.model, self.prompt(*asked), self.max_tokens)

    def ask(self, kind, question, answer):
        """(The judge's reply to one answer, its finish_reason, its tokens with their probabilities
        if the endpoint gives them); JudgeError if it cannot be had."""
        options = self.options
        message = {"role": "user", "content": self.prompt(kind, question, answer)}
        create = self._client.chat.completions.create
        try:
            choice = create(model=self.model, messages=[message], **options).choices[0]
            content = choice.message.content or ""
            if isinstance(content, list):  # in parts, as some servers send it
                content = "".join(part.get("text", "") for part in content)
            return content, choice.finish_reason, reply_tokens(choice)
        except Exception as error:  # whatever the client makes of what comes over the wire
            status, body = (getattr(error, key, "") for key in ("status_code", "body"))
            refused = options.keys() & re.findall(r"\w+", str(body)) if status in CLIENT else ()
            if {"logprobs", "logits_all"} & {*re.findall(r"\w+", str(body))}:  # whatever the status
                refused = {*refused} | (options.keys() & {"logprobs", "top_logprobs"})
            problem = f"{error!r} {error.__cause__ or ''}"
            if status:
                problem = f"HTTP {status}: {body or error}"
        if refused:  # newer models of OpenAI's take neither max_tokens nor a temperature
            rest = {key: value for key, value in options.items() if key not in refused}
            other = {"max_completion_tokens": self.max_tokens} if "max_tokens" in refused else {}
            self.options = rest | other
            return self.ask(kind, question, answer)
        problem = problem.replace(self._key or "\0", "<key>")[:400]
        error = JudgeError(f"--judge {self.url}, model {self.model}: {problem}")
        error.of_all = status not in CLIENT  # else it may dislike this answer alone
        raise error

    def score(self, asked, kept, workers=8):
        """Verdicts of (kind, question, answer)s: a score, a word, "refusal", "unparsable", or None.
        kept: a Kept, to which a line a judgement is added as it comes; it is never asked for again.
        None: the endpoint failed on it; a second call tries again. Raises JudgeError if it fails
        on the first of all as it would on every one."""
        missing = self.missing(asked, kept)
        bar = tqdm(total=len(missing), desc="judge", disable=None)
        self.asked, self.failures = 0, []
        if missing and bar.disable:
            print(f"judge: {len(missing)} answers to ask for", file=sys.stderr, flush=True)

        def judge(key, item):
            reply, finish, tokens = self.ask(*item)
            line = dict(zip(("kind", "question", "answer"), item, strict=True))
            line |= {"judge": self.model, "reply": reply, "finish": finish}
            verdict = parse_reply(reply, item[0], finish)
            expected = expected_score(verdict, tokens, item[0]) if type(verdict) is float else None
            kept.add(key, **line, verdict=verdict, expected=expected)
            bar.update()

        with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = []
            try:
                for number, (key, item) in enumerate(missing.items()):
                    futures.append(pool.submit(judge, key, item))
                    if number == 0 and getattr(futures[0].exception(), "of_all", False):
                        futures[0].result()  # raises it
                for future in futures:
                    try:
                        future.result()
                        self.asked += 1
                    except JudgeError as error:
                        self.failures.append(str(error))
            except BaseException:  # Ctrl-C: what is on its way comes in, the rest is not asked for
                pool.shutdown(cancel_futures=True)
                raise
        return [self.verdict(kept.found.get(self.key(kept, item)), item[0]) for item in asked]

    def missing(self, asked, kept):
        """{key: (kind, question, answer)} of those that are not in `kept`, each once."""
        keys = {self.key(kept, item): item for item in asked}
        return {key: item for key, item in keys.items() if "reply" not in kept.found.get(key, {})}

    @staticmethod
    def verdict(line, kind):
        """What a kept line says, read again; None without one."""
        if not line or "reply" not in line:
            return None
        verdict = parse_reply(line["reply"], kind, line.get("finish"))
        expected = line.get("expected")
        return float(expected) if type(verdict) is float and expected is not None else verdict


def reply_tokens(choice):
    """The tokens of a reply as dicts, with their alternatives; None where there are none."""
    with contextlib.suppress(Exception):  # whatever an endpoint makes of the field
        return [token.model_dump() for token in choice.logprobs.content]
    return None
