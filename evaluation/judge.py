"""Score answers with a judge: any OpenAI-compatible chat endpoint, paid once an answer.

    judge = Judge("http://localhost:8000/v1", "gpt-4.1-mini", rubric_for("x__role__pirate"))
    verdicts = judge.score([(question, answer), ...], Path("judgements.jsonl"), workers=8)

The key comes from JUDGE_API_KEY or OPENAI_API_KEY and goes nowhere but into the request.
"""

import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from evaluation.stats import mean_interval
from steering.data_layouts import parse_name

SCALES = {"role": (0, 3), "trait": (0, 100)}  # lowest and highest score
KEYS = ("JUDGE_API_KEY", "OPENAI_API_KEY")  # environment, the first that is set
TRIES, LONGEST_WAIT, TIMEOUT = 6, 60.0, 120.0  # requests an answer, seconds between, seconds each

# <kind>.txt in place of a dataset's own rubric (--rubric-dir); the scales are the datasets'.
RUBRICS = Path(__file__).parent / "rubrics"


class JudgeError(Exception):
    """The endpoint does not answer as it should; the message says how."""


def rubric_for(dataset, folder=None):
    """The rubric of a dataset, a template with {question} and {answer}.
    folder: has <name>.json files with an "eval_prompt", as role and trait files of the field do.
    Raises ValueError if the file is missing or its template is not one."""
    _, kind, name = parse_name(dataset.split("+")[0])
    if folder is None:
        rubric = (RUBRICS / f"{kind}.txt").read_text(encoding="utf-8").strip()
        return rubric.replace("{name}", re.sub("[{}]", "", name).replace("_", " "))
    path = Path(folder, f"{name}.json")
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["eval_prompt"]
        filled = template.format(question="QUESTION-1", answer="ANSWER-2")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f'--rubric-dir: {path} has no usable "eval_prompt" ({error!r})') from error
    if "QUESTION-1" not in filled or "ANSWER-2" not in filled:
        raise ValueError(f"--rubric-dir: {path}: eval_prompt lacks {{question}} or {{answer}}")
    return template


def parse_reply(reply, kind):
    """The score in a judge's reply, "refusal", or "unparsable".
    A score is a number on the kind's scale that the reply starts with ("2/3", "Score: 2"), or the
    only one in it. What a thinking judge writes before its answer is passed over."""
    reply = reply.rpartition("</think>")[2].strip()
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", reply)
    first = re.match(r"[\W_]*(?:(?:final )?(?:score|rating|answer)\b[\W_]*)?(?=\d)", reply, re.I)
    if not numbers:
        return "refusal" if re.search(r"\brefus", reply, re.I) else "unparsable"
    low, high = SCALES[kind]
    clear = (first or len(set(numbers)) == 1) and low <= float(numbers[0]) <= high
    return float(numbers[0]) if clear else "unparsable"


class Judge:
    """A chat endpoint, a model there and a rubric.
    url: up to and with /v1, or the whole .../chat/completions; kind: "role" or "trait"."""

    def __init__(self, url, model, rubric, kind, max_tokens=32):
        self.address, url = url, url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        if not re.match(r"https?://[^/\s]", self.url):
            raise ValueError(f"--judge {url}: not an http or https address")
        self.model, self.rubric, self.kind, self.max_tokens = model, rubric, kind, max_tokens
        self._key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)

    def prompt(self, question, answer):
        """The rubric filled in."""
        return self.rubric.format(question=question, answer=answer)

    def identity(self, question, answer):
        """What makes two judgements the same one: judge model, its whole prompt, reply length."""
        parts = [self.model, self.prompt(question, answer), self.max_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def ask(self, question, answer):
        """The judge's reply to one answer, with retries; JudgeError if it cannot be had."""
        message = {"role": "user", "content": self.prompt(question, answer)}
        body = {"model": self.model, "messages": [message]}
        body |= {"temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(1, TRIES + 1):
            wait = min(LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    reply = json.load(response)["choices"][0]["message"]["content"]
                return reply or ""
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(300).decode(errors='replace').strip()}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    break  # a wrong key, model or request stays wrong
                with contextlib.suppress(TypeError, ValueError):
                    wait = min(LONGEST_WAIT, float(error.headers["Retry-After"]))
            except (OSError, http.client.HTTPException) as error:  # refused, timed out, cut off
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"not a chat completion ({error!r})"
            if attempt < TRIES:
                time.sleep(wait)
        if self._key:
            problem = problem.replace(self._key, "<key>")
        raise JudgeError(f"--judge {self.url}, model {self.model}: {problem}")

    def score(self, pairs, path, workers=8):
        """Verdicts of (question, answer) pairs: a score, "refusal", "unparsable", or None.
        path: a JSONL file with a line a judgement, written as they come and never asked for again.
        None: the endpoint failed on it; a second call tries again. Raises JudgeError if it failed
        on the first of all, since a wrong address or key would fail on every one."""
        known = self._read(path)
        wanted = {self.identity(*pair): pair for pair in pairs}
        missing = {key: pair for key, pair in wanted.items() if key not in known}
        lock, bar = threading.Lock(), tqdm(total=len(missing), desc="judge", disable=None)
        self.asked, self.failures = 0, []
        if missing and bar.disable:
            print(f"judge: {len(missing)} answers to ask for", file=sys.stderr, flush=True)

        def judge(key, pair):
            reply = self.ask(*pair)
            line = {"key": key, "judge": self.model, "question": pair[0], "answer": pair[1]}
            line |= {"reply": reply, "verdict": parse_reply(reply, self.kind)}
            with lock, open(path, "a", encoding="utf-8") as file:
                print(json.dumps(line), file=file, flush=True)
                os.fsync(file.fileno())
                known[key], self.asked = line["verdict"], self.asked + 1
                bar.update()

        with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
            todo = list(missing.items())
            if todo:
                judge(*todo[0])
            futures = [pool.submit(judge, key, pair) for key, pair in todo[1:]]
            try:
                for future in futures:
                    try:
                        future.result()
                    except JudgeError as error:
                        self.failures.append(str(error))
            except BaseException:  # Ctrl-C: what is on its way comes in, the rest is not asked for
                pool.shutdown(cancel_futures=True)
                raise
        return [known.get(self.identity(*pair)) for pair in pairs]

    def add_scores(self, result, path, workers=8, seed=0):
        """Add scores to the answers of an eval.json's dict; 1 if the judge failed on some, else 0.
        path, workers: as in `score`; seed: of the intervals."""
        samples = result["samples"]
        conditions = list(samples[0]["answers"]) if samples else []
        pairs = [(s["question"], s["answers"][c]) for c in conditions for s in samples]
        asked = [pair for pair in pairs if pair[1]]
        verdicts = dict(zip(asked, self.score(asked, path, workers), strict=True))
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
            scored = mean_interval(*(zip(*scores, strict=True) if scores else ((), ())), seed)
            result["answers"][condition]["judge"] = {"score": scored, **counts}
        result["judge"] = {
            "model": self.model, "url": self.address, "scale": [low, high], "rubric": self.rubric,
            "asked_now": self.asked, "failed": len(self.failures),
        }  # fmt: skip
        for failure in self.failures[:3]:
            print(f"WARNING: {failure}", file=sys.stderr)
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
                known[entry["key"]] = parse_reply(entry["reply"], self.kind)
        return known
