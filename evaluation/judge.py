"""Score answers with a judge: any OpenAI-compatible chat endpoint, paid once an answer.

    judge = Judge("http://localhost:8000/v1", "gpt-4.1-mini", rubric_for("x__role__pirate"), "role")
    verdicts = judge.score([(question, answer), ...], Path("judgements.jsonl"), workers=8)

The key comes from JUDGE_API_KEY, or from OPENAI_API_KEY for OpenAI's own address, and goes nowhere
but there. Needs the openai package, whose client asks again, after a wait, where an endpoint is
busy or broken.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from tqdm import tqdm

from evaluation.stats import mean_interval
from steering.chat_format import THOUGHT
from steering.data_layouts import parse_name, pooled_names

SCALES = {"role": (0, 3), "trait": (0, 100)}  # lowest and highest score
OPENAI = "api.openai.com"
TRIES, TIMEOUT = 8, 120.0  # requests an answer, seconds each

# <kind>.txt in place of a dataset's own rubric (--rubric-dir); the scales are the datasets'.
RUBRICS = Path(__file__).parent / "rubrics"


class JudgeError(Exception):
    """The endpoint does not answer as it should; the message says how.
    of_all: whether it would do so whatever the answer, as with a wrong address or key."""

    of_all = True


def rubric_for(dataset, folder=None):
    """The rubric of a dataset, a template with {question} and {answer}.
    folder: has <name>.json files with an "eval_prompt", as role and trait files of the field do.
    Raises ValueError if the file is missing or its template is not one."""
    _, kind, name = parse_name(pooled_names(dataset)[0])
    if folder is None:
        rubric = (RUBRICS / f"{kind}.txt").read_text(encoding="utf-8").strip()
        return rubric.replace("{name}", re.sub("[{}]", "", name).replace("_", " "))
    path = Path(folder, f"{name}.json")
    try:
        template = json.loads(path.read_text(encoding="utf-8-sig"))["eval_prompt"]
        filled = template.format(question="QUESTION-1", answer="ANSWER-2")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f'--rubric-dir: {path} has no usable "eval_prompt" ({error!r})') from error
    if "QUESTION-1" not in filled or "ANSWER-2" not in filled:
        raise ValueError(f"--rubric-dir: {path}: eval_prompt lacks {{question}} or {{answer}}")
    return template


def parse_reply(reply, kind, finish=None):
    """The score in a judge's reply, "refusal", or "unparsable".
    A score is the number on the kind's scale that "score:" or "rating:" names, all such numbers
    being the same one, or else the only number of the reply. Ranges ("0-3", "2 or 3") and what a
    score is out of ("2/3") are none, thoughts before the answer are passed over; a score out of
    another maximum is unparsable. finish: its finish_reason; "length" is unparsable."""
    reply = re.sub(rf"(?is)<({THOUGHT})>.*?</\1>", "", reply)
    reply = re.sub(r"(?s)\[THINK\].*?\[/THINK\]", "", reply).rpartition("</think>")[2]
    if finish == "length" or re.search(rf"(?i)<({THOUGHT})>|\[THINK\]", reply):
        return "unparsable"
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


class Judge:
    """A chat endpoint, a model there and a rubric.
    url: up to and with /v1, or the whole .../chat/completions, with a ?query or without; kind:
    "role" or "trait". Raises ValueError for a bad address or key, or without the openai package."""

    def __init__(self, url, model, rubric, kind, max_tokens=32):
        try:
            import openai
        except ImportError as error:
            raise ValueError("--judge needs the openai package (pip install openai)") from error
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--judge {url}: not an http or https address")
        self.model, self.rubric, self.kind, self.max_tokens = model, rubric, kind, max_tokens
        self.options = {"temperature": 0, "max_tokens": max_tokens}
        self.url = parts._replace(query="", netloc=parts.netloc.rpartition("@")[2]).geturl()
        names = ["JUDGE_API_KEY", *(["OPENAI_API_KEY"] if parts.hostname == OPENAI else [])]
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

    def prompt(self, question, answer):
        """The rubric filled in."""
        return self.rubric.format(question=question, answer=answer)

    def identity(self, question, answer):
        """What makes two judgements the same one: judge model, its whole prompt, reply length."""
        parts = [self.model, self.prompt(question, answer), self.max_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def ask(self, question, answer):
        """(The judge's reply to one answer, its finish_reason); JudgeError if it cannot be had."""
        message, options = {"role": "user", "content": self.prompt(question, answer)}, self.options
        create = self._client.chat.completions.create
        try:
            choice = create(model=self.model, messages=[message], **options).choices[0]
            content = choice.message.content or ""
            if isinstance(content, list):  # in parts, as some servers send it
                content = "".join(part.get("text", "") for part in content)
            return content, choice.finish_reason
        except Exception as error:  # whatever the client makes of what comes over the wire
            status, body = (getattr(error, key, "") for key in ("status_code", "body"))
            refused = options.keys() & re.findall(r"\w+", str(body)) if status == 400 else ()
            problem = f"{error!r} {error.__cause__ or ''}"
            if status:
                problem = f"HTTP {status}: {body or error}"
        if refused:  # newer models of OpenAI's take neither max_tokens nor a temperature
            rest = {key: value for key, value in options.items() if key not in refused}
            other = {"max_completion_tokens": self.max_tokens} if "max_tokens" in refused else {}
            self.options = rest | other
            return self.ask(question, answer)
        problem = problem.replace(self._key or "\0", "<key>")[:400]
        error = JudgeError(f"--judge {self.url}, model {self.model}: {problem}")
        error.of_all = status not in (400, 413, 422)  # else it may dislike this answer alone
        raise error

    def score(self, pairs, path, workers=8):
        """Verdicts of (question, answer) pairs: a score, "refusal", "unparsable", or None.
        path: a JSONL file with a line a judgement, written as they come and never asked for again.
        None: the endpoint failed on it; a second call tries again. Raises JudgeError if it fails
        on the first of all as it would on every one."""
        known = self._read(path)
        wanted = {self.identity(*pair): pair for pair in pairs}
        missing = {key: pair for key, pair in wanted.items() if key not in known}
        lock, bar = threading.Lock(), tqdm(total=len(missing), desc="judge", disable=None)
        self.asked, self.failures = 0, []
        if missing and bar.disable:
            print(f"judge: {len(missing)} answers to ask for", file=sys.stderr, flush=True)

        def judge(key, pair):
            reply, finish = self.ask(*pair)
            line = {"key": key, "judge": self.model, "question": pair[0], "answer": pair[1]}
            line |= {"reply": reply, "finish": finish}
            line["verdict"] = parse_reply(reply, self.kind, finish)
            with lock, open(path, "a", encoding="utf-8") as file:
                print(json.dumps(line), file=file, flush=True)
                os.fsync(file.fileno())
                known[key], self.asked = line["verdict"], self.asked + 1
                bar.update()

        with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = []
            try:
                for number, (key, pair) in enumerate(missing.items()):
                    futures.append(pool.submit(judge, key, pair))
                    if number == 0 and getattr(futures[0].exception(), "of_all", False):
                        futures[0].result()  # raises it
                for future in futures:
                    try:
                        future.result()
                    except JudgeError as error:
                        self.failures.append(str(error))
            except BaseException:  # Ctrl-C: what is on its way comes in, the rest is not asked for
                pool.shutdown(cancel_futures=True)
                raise
        return [known.get(self.identity(*pair)) for pair in pairs]

    def add_scores(self, result, path, workers=8):
        """Add scores to the answers of an eval.json's dict; 1 if the judge failed, else 0.
        path, workers: as in `score`."""
        samples = result["samples"]
        conditions = list(samples[0]["answers"]) if samples else []
        pairs = [(s["question"], s["answers"][c]) for c in conditions for s in samples]
        asked = [pair for pair in pairs if pair[1]]
        try:
            verdicts = dict(zip(asked, self.score(asked, path, workers), strict=True))
        except JudgeError as error:  # the evaluation is there all the same
            print(f"error: {error}", file=sys.stderr)
            return 1
        low, high = SCALES[self.kind]
        for condition in conditions:
            scores, counts = [], {"refusal": 0, "unparsable": 0, "failed": 0}
            for sample in samples:  # an empty answer shows nothing of the persona
                question, answer = sample["question"], sample["answers"][condition]
                verdict = verdicts.get((question, answer)) if answer else float(low)
                if isinstance(verdict, float):
                    scores.append((verdict, question))
                else:
                    counts[verdict or "failed"] += 1
            scored = mean_interval(*(zip(*scores, strict=True) if scores else ((), ())))
            result["answers"][condition]["judge"] = {"score": scored, **counts}
        result["judge"] = {
            "model": self.model, "url": self.url, "scale": [low, high], "rubric": self.rubric,
            "asked_now": self.asked, "failed": len(self.failures),
        }  # fmt: skip
        warnings = self.failures[:3]
        if unparsable := sum(verdict == "unparsable" for verdict in verdicts.values()):
            warnings.append(f"{unparsable} replies in {path} hold no clear score (--judge-tokens?)")
        for warning in warnings:
            print(f"WARNING: {warning}", file=sys.stderr)
        return 1 if self.failures else 0

    def _read(self, path):
        """{key: verdict} of a judgements file; a torn last line is cut off, to be judged again."""
        known, data = {}, path.read_bytes() if path.exists() else b""
        if data and not data.endswith(b"\n"):
            data = data[: data.rfind(b"\n") + 1]
            os.truncate(path, len(data))
        for line in data.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                known[entry["key"]] = parse_reply(entry["reply"], self.kind, entry.get("finish"))
        return known
