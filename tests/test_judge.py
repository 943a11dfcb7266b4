"""evaluation/judge.py: replies read strictly, nothing judged twice, failures retried, no leaks."""

import contextlib
import http.server
import json
import math
import random
import re
import threading
import time

import numpy as np
import pytest

from evaluation import judge as jd
from evaluation import judging
from evaluation import stats as es
from evaluation.kept import Kept

ASKED = [("role", f"Question {i}?", f"Answer number {i}") for i in range(20)]


class Endpoint:
    """A chat endpoint on loopback: `reply(prompt, count)` gives what the message says, a choice as
    a dict, an HTTP status, or (status, headers, bytes)."""

    def __init__(self, reply):
        endpoint, self.seen, self.headers, self.asked = self, [], [], []
        lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with lock:
                    endpoint.seen.append(prompt)
                    endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                    endpoint.asked.append((self.path, body))
                    said = reply(prompt, len(endpoint.seen))
                if isinstance(said, int):
                    auth = self.headers.get("Authorization")
                    said = said, {"Retry-After": "7"} if said == 429 else {}, f"no: {auth}".encode()
                if not isinstance(said, tuple):
                    choice = {"message": {"role": "assistant", "content": said}}
                    choice = said if isinstance(said, dict) else choice
                    said = 200, {}, json.dumps({"choices": [choice]}).encode()
                self.send_response(said[0])
                for name, value in {"Content-Type": "application/json", **said[1]}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said[2])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def judge(self, kind="role"):
        return jd.Judge(self.url, "j", jd.rubrics_for(f"m__{kind}__sea_dog"))


@contextlib.contextmanager
def serve(reply):
    endpoint = Endpoint(reply)
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        thread.join()
        endpoint.server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """The waits asked for, none of them waited."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def test_replies_are_scores_refusals_or_unparsable():
    for reply, kind, verdict in (
        ("3", "role", 3.0),
        (" 2/3.", "role", 2.0),
        ("**Score: 1**", "role", 1.0),
        ("I give it a 2.", "role", 2.0),
        ("<think>Is it 1 or 3?</think>\n0", "role", 0.0),
        ("On a scale of 0-3 it is a 2", "role", 2.0),
        ("Score (0-3): 3", "role", 3.0),
        ("Score from 0 to 3: **1**", "role", 1.0),
        ("1. It talks like a pirate.\n2. It has 3 oaths.\nScore: 3", "role", 3.0),
        ("The score is 2, not 3.", "role", "unparsable"),
        ("The score is 3 if lenient, but here it is 1.", "role", "unparsable"),
        ("0. The answer has none of the 3 signs of a pirate.", "role", "unparsable"),
        ("3. Uses pirate slang, though only in 1 sentence.", "role", "unparsable"),
        ("2. It sounds like a pirate.", "role", 2.0),
        ("Score: 3 - 2 strong pirate phrases and 1 weak one.", "role", 3.0),
        ("3 \u2014 2 pirate words, and 1 ship", "role", "unparsable"),
        ("Score: 2,5", "role", "unparsable"),
        ("Score: 2 - 3", "role", "unparsable"),
        ("1. It talks like a pirate, 3", "role", "unparsable"),
        ("A score of 3 would need full role-play; this only hints, so 1.", "role", "unparsable"),
        ("Not a score of 3. 1", "role", "unparsable"),
        ("It falls short of a score of 3. Final: 2", "role", "unparsable"),
        ("Score: 1 or 2", "role", "unparsable"),
        ("Score: 2, rating: 1", "role", "unparsable"),
        ("Rating: 3/10", "role", "unparsable"),
        ("The score is 3 of 10", "role", "unparsable"),
        ("Score: 8/10", "trait", "unparsable"),
        ("5/5", "trait", "unparsable"),
        ("Score: 1,000", "trait", "unparsable"),
        ("a score of 20 for style, and 90 for persona", "trait", "unparsable"),
        ("<thinking>maybe a score of 3</thinking>\n1", "role", 1.0),
        ("[THINK]score 3?[/THINK]1", "role", 1.0),
        ("[THINK]score 3?", "role", "unparsable"),
        ("Score = **2**", "role", 2.0),
        ("2 or 3", "role", "unparsable"),
        ("2-3", "role", "unparsable"),
        ("0\u2013100", "trait", "unparsable"),
        ("<think>It has 3 oaths, so", "role", "unparsable"),
        ("<think>2</think> <think>so 3", "role", "unparsable"),
        ("3 out of 3", "role", 3.0),
        ("85/100", "trait", 85.0),
        ("7", "role", "unparsable"),
        ("-1", "role", "unparsable"),
        ("85", "trait", 85.0),
        ("87.5 of 100", "trait", 87.5),
        ("101", "trait", "unparsable"),
        ("REFUSAL", "trait", "refusal"),
        ("It refused to answer.", "trait", "refusal"),
        ("very much so", "trait", "unparsable"),
        ("", "role", "unparsable"),
    ):
        assert jd.parse_reply(reply, kind) == verdict, reply
    assert jd.parse_reply("It is a 3", "role", "length") == "unparsable"  # cut in its reasoning
    assert jd.parse_reply("It is a 3", "role", "stop") == 3.0


def test_rubric_of_the_dataset_is_filled_with_question_and_answer(tmp_path):
    template = 'Is it a {{pirate}}? Q: "{question}" A: "{answer}" 0-3.'
    (tmp_path / "pirate.json").write_text(json.dumps({"eval_prompt": template}))
    rubrics = jd.rubrics_for("m__role__pirate", tmp_path)
    assert list(rubrics) == ["role", "coherence", "identity", "caricature"]
    judge = jd.Judge("http://x/v1", "j", rubrics)
    assert judge.prompt("role", "a {b}?", "{c}") == 'Is it a {pirate}? Q: "a {b}?" A: "{c}" 0-3.'
    own = jd.rubrics_for("m__trait__dry_wit")
    assert "dry wit" in own["trait"] and "0 (" in own["trait"] and "100" in own["trait"]
    assert all("dry wit" in own[kind] for kind in ("identity", "caricature"))
    for kind in own:
        filled = own[kind].format(question="Why {x}?", answer="{y}")
        assert "Why {x}?" in filled and "{y}" in filled and "{name}" not in filled
    for name, text in (
        ("gone", None),
        ("torn", '{"eval_prompt": '),
        ("keyless", "{}"),
        ("blind", json.dumps({"eval_prompt": "Score it: {question}"})),
        ("odd", json.dumps({"eval_prompt": "{question} {answer} {mood}"})),
    ):
        if text is not None:
            (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(ValueError, match=f"--rubric-dir.*{name}.json"):
            jd.rubrics_for(f"m__role__{name}", tmp_path)


def test_every_answer_is_judged_once_and_verdicts_keep_their_order(tmp_path):
    with serve(lambda prompt, count: prompt.split("number ")[1].split()[0]) as endpoint:
        judge = endpoint.judge("trait")
        asked = [("trait", *pair) for _, *pair in [*ASKED, ASKED[3]]]  # the same answer twice
        assert judge.score(asked, Kept(tmp_path / "j.jsonl")) == [*map(float, range(20)), 3.0]
        assert len(endpoint.seen) == len(set(endpoint.seen)) == judge.asked == 20
        again = endpoint.judge("trait")
        assert again.score(asked[:20], Kept(tmp_path / "j.jsonl")) == [*map(float, range(20))]
        assert len(endpoint.seen) == 20 and again.asked == 0
        other = jd.Judge(endpoint.url, "another", judge.rubrics)  # its own opinion
        other.score(asked[:2], Kept(tmp_path / "j.jsonl"))
        assert len(endpoint.seen) == 22


def test_interrupted_judging_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "j.jsonl"

    def interrupted(prompt, count):
        return "2" if count <= 8 else 400  # a client that dies sees no more answers

    with serve(interrupted) as endpoint:
        judge = endpoint.judge()
        verdicts = judge.score(ASKED, Kept(path), workers=1)
        assert verdicts.count(2.0) == 8 and verdicts.count(None) == len(judge.failures) == 12
    with open(path, "a") as file:
        file.write('{"key": "torn')  # killed in the middle of a line
    with serve(lambda *_: "1") as endpoint:
        judge = endpoint.judge()
        verdicts = judge.score(ASKED, Kept(path), workers=4)
        assert len(endpoint.seen) == judge.asked == 12
        assert verdicts.count(2.0) == 8 and verdicts.count(1.0) == 12
    lines = path.read_text().splitlines()
    assert lines[8] == '{"key": "torn' and len(lines) == 21
    assert len({json.loads(line)["key"] for line in lines if line != lines[8]}) == 20


def test_busy_and_broken_endpoints_are_asked_again_after_a_wait(tmp_path, waits):
    script = iter([429, 503, "no number"])
    with serve(lambda *_: next(script)) as endpoint:
        assert endpoint.judge().score(ASKED[:1], Kept(tmp_path / "j.jsonl")) == ["unparsable"]
        assert len(endpoint.seen) == 3
    assert waits[0] == 7.0 and 0 < waits[1] <= 8.0  # what the server asked for; then back-off
    with serve(lambda *_: 503) as endpoint:
        with pytest.raises(jd.JudgeError, match="HTTP 503"):
            endpoint.judge().score(ASKED, Kept(tmp_path / "j.jsonl"))
        assert len(endpoint.seen) == jd.TRIES  # the first answer of all: no use in going on
    assert sum(waits[2:]) > 20 and len(waits) == 2 + jd.TRIES - 1


def test_wrong_key_fails_at_once_and_is_never_written(tmp_path, waits, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    with serve(lambda *_: 401) as endpoint:
        with pytest.raises(jd.JudgeError, match="HTTP 401") as error:
            endpoint.judge().score(ASKED, Kept(tmp_path / "j.jsonl"))
        assert len(endpoint.seen) == 1 and not waits
        assert endpoint.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert "secret" not in str(error.value) and "<key>" in str(error.value)
    with serve(lambda *_: "3") as endpoint:
        endpoint.judge().score(ASKED[:2], Kept(tmp_path / "j.jsonl"))
    assert "secret" not in (tmp_path / "j.jsonl").read_text() + "".join(capsys.readouterr())


def test_nobody_there_is_a_clear_error(tmp_path, waits):
    judge = jd.Judge("http://127.0.0.1:9/v1", "j", jd.rubrics_for("m__role__x"))
    with pytest.raises(jd.JudgeError, match=r"http://127.0.0.1:9/v1,.*refused"):
        judge.score(ASKED, Kept(tmp_path / "j.jsonl"))
    with pytest.raises(ValueError, match="not an http"):
        jd.Judge("localhost:8000", "j", {})


def test_keys_with_white_space_are_stripped_and_broken_ones_not_shown(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", " sk-very-secret\r\n")
    with serve(lambda *_: "3") as endpoint:
        assert endpoint.judge().ask("role", "q", "a") == ("3", None, None)
        assert endpoint.headers[0]["authorization"] == "Bearer sk-very-secret"
        monkeypatch.setenv("JUDGE_API_KEY", "sk-very\nsecret")
        with pytest.raises(ValueError, match="JUDGE_API_KEY") as error:
            endpoint.judge()
    assert "very" not in str(error.value) and "secret" not in str(error.value)


def test_a_redirect_is_not_followed_so_that_the_key_stays(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    with serve(lambda *_: "3") as other:
        for status in (302, 307, 308):
            where = {"Location": f"{other.url}/chat/completions"}
            redirect, error = (status, where, b""), pytest.raises(jd.JudgeError, match=str(status))
            with serve(lambda *_, said=redirect: said) as endpoint, error:
                endpoint.judge().ask("role", "q", "a")
        assert not other.seen


def test_models_that_refuse_max_tokens_or_temperature_are_asked_without(tmp_path):
    def picky(prompt, count):
        body = endpoint.asked[-1][1]
        for name, other in (("max_tokens", "max_completion_tokens"), ("temperature", "top_p")):
            if name in body:
                text = f"Unsupported parameter: '{name}' is not supported. Use '{other}' instead."
                return 400, {}, json.dumps({"error": {"message": text}}).encode()
        return "2"

    with serve(picky) as endpoint:
        judge = endpoint.judge()
        assert judge.score(ASKED[:3], Kept(tmp_path / "j.jsonl")) == [2.0] * 3
        body = endpoint.asked[-1][1]
        assert body["max_completion_tokens"] == 32 and len(endpoint.seen) == 5  # 2 refusals, once
    with serve(lambda *_: (400, {}, b'{"error": "no such model"}')) as endpoint:
        with pytest.raises(jd.JudgeError, match="no such model"):
            endpoint.judge().ask("role", "q", "a")
        assert len(endpoint.seen) == 1


def test_the_openai_key_is_for_openai_alone_and_no_secret_of_the_address_is_kept(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    with serve(lambda *_: "3") as endpoint:
        judge = jd.Judge(f"{endpoint.url}?key=hidden", "j", {"role": "{question}{answer}"})
        judge.ask("role", "q", "a")
        assert "secret" not in str(endpoint.headers) and "org-mine" not in str(endpoint.headers)
        assert endpoint.asked[0][0].endswith("?key=hidden") and "hidden" not in judge.url
    theirs = jd.Judge("https://me:word@api.openai.com/v1", "j", {})
    assert theirs._key == "sk-very-secret" and theirs.url == "https://api.openai.com/v1"


def test_each_address_gets_its_own_key(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-first")
    monkeypatch.setenv("JUDGE_API_KEY_2", "sk-second")
    about = "m__role__x", None, 32
    two = judging.make_judges(["http://a/v1", "http://b/v1"], ["j", "k"], *about)
    assert [judge._key for judge in two] == ["sk-first", "sk-second"]
    one = judging.make_judges(["http://a/v1"], ["j", "k"], *about)
    assert [(judge.url, judge._key) for judge in one] == [("http://a/v1", "sk-first")] * 2
    monkeypatch.delenv("JUDGE_API_KEY_2")
    assert judging.make_judges(["http://a/v1", "http://b/v1"], ["j", "k"], *about)[1]._key == ""


def test_an_answer_that_is_refused_ends_nothing(tmp_path):
    def reply(prompt, count):
        return (400, {}, b'{"error": {"code": "content_filter"}}') if "number 0" in prompt else "2"

    with serve(reply) as endpoint:
        judge = endpoint.judge()
        verdicts = judge.score(ASKED[:5], Kept(tmp_path / "j.jsonl"))
    assert verdicts == [None, 2.0, 2.0, 2.0, 2.0] and len(judge.failures) == 1


def test_what_else_servers_send(tmp_path, waits):
    parts = {"message": {"content": [{"type": "text", "text": "Score: "}, {"text": "3"}]}}
    torn = 500, {"Content-Length": "1000"}, b'{"error": "it ends in the mid'
    script = iter([torn, (429, {"Retry-After": "soon"}, b""), (503, {"Retry-After": "-1"}, b"")])
    with serve(lambda *_: next(script, parts)) as endpoint:
        assert endpoint.judge().ask("role", "q", "a") == ("Score: 3", None, None)
        assert len(endpoint.seen) == 4 and all(0 <= wait <= 8 for wait in waits)
        address = f"{endpoint.url}/deployments/x/chat/completions?api-version=2026-01-01"
        judge = jd.Judge(address, "j", {"role": "{question}{answer}"})
        judge.ask("role", "q", "a")
        assert endpoint.asked[-1][0] == "/v1/deployments/x/chat/completions?api-version=2026-01-01"
    for broken in (
        {},
        (200, {}, b"<html>"),
        (200, {}, b"[]"),
        (403, {"Content-Length": "9"}, b"x"),
    ):
        with serve(lambda *_, said=broken: said) as endpoint, pytest.raises(jd.JudgeError):
            endpoint.judge().ask("role", "q", "a")


def evaluated(texts, identity="I am a ship."):
    """An eval.json's dict of {condition: answers}, a question each."""
    count = len(next(iter(texts.values())))
    return {
        "samples": [
            {"question": f"Q{i}?", "answers": {c: t[i] for c, t in texts.items()}}
            for i in range(count)
        ],
        "identity": [
            {"question": "Who?", "answers": {c: identity for c in texts if c != "dataset"}}
        ],
        "answers": {condition: {} for condition in texts},
    }


def test_replies_that_were_cut_are_counted_with_a_hint(tmp_path, capsys):
    cut = {"message": {"content": "It has 3"}, "finish_reason": "length"}
    result = evaluated({"dataset": ["b"], "vanilla": ["a"]})
    for asked in (6, 0):  # the kept reply is parsed in the same way
        with serve(lambda *_: cut) as endpoint:
            judges = [endpoint.judge()]
            assert judging.add_scores(result, judges, Kept(tmp_path / "j.jsonl")) == 0
            assert len(endpoint.seen) == asked
        assert result["judges"][0]["conditions"]["vanilla"]["unparsable"] == 4
        assert "--judge-tokens" in capsys.readouterr().err


def scored(prompt, persona, coherence="100"):
    """What a judge replies to each of the four rubrics."""
    for words, said in (("coherent", coherence), ("PERSONA:", "PERSONA"), ("overacts", "1")):
        if words in prompt:
            return said
    return persona


def test_overall_is_the_harmonic_mean_and_an_empty_answer_scores_lowest(tmp_path):
    def reply(prompt, count):
        return scored(prompt, "3" if "Arr" in prompt else "1", "50")

    texts = {"dataset": ["Arr.", "Arr."], "vanilla": ["Yes.", "No."], "steered x1": ["Arr!", ""]}
    result = evaluated(texts)
    with serve(reply) as endpoint:
        assert judging.add_scores(result, [endpoint.judge()], Kept(tmp_path / "j")) == 0
    rows = result["judges"][0]["conditions"]
    assert rows["vanilla"]["score"]["mean"] == 1.0 and rows["steered x1"]["score"]["mean"] == 1.5
    assert rows["steered x1"]["coherence"]["mean"] == 25.0
    assert rows["vanilla"]["overall"]["mean"] == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))
    assert rows["steered x1"]["overall"]["mean"] == pytest.approx((2 * 1 * 0.5 / 1.5 + 0) / 2)
    assert rows["vanilla"]["identity"] == {"persona": 1, "assistant": 0, "mixed": 0}
    assert rows["vanilla"]["caricature"]["mean"] == 1.0
    assert rows["dataset"]["above_vanilla"]["mean"] == 2.0 and list(rows) == list(texts)
    assert rows["dataset"]["caricature"] is None and not any(rows["dataset"]["identity"].values())
    assert judging.judge_flags(result) == []


def test_a_judge_that_says_3_to_everything_is_given_away(tmp_path):
    texts = {
        "dataset": [f"Arr {i}." for i in range(9)],
        "vanilla": [f"Yes {i}." for i in range(9)],
    }
    result, kept = evaluated(texts), Kept(tmp_path / "j")

    def honest(prompt, count):
        number = int(found[1]) if (found := re.search(r"(?:Yes|Arr) (\d)", prompt)) else 0
        return scored(prompt, str((number % 2) + 2 * ("Arr" in prompt)))

    with serve(honest) as good, serve(lambda prompt, _: scored(prompt, "3")) as bad:
        rubrics = good.judge().rubrics
        judges = [jd.Judge(good.url, "good", rubrics), jd.Judge(good.url, "twin", rubrics)]
        assert judging.add_scores(result, judges, kept) == 0
        assert result["agreement"]["spearman"] == pytest.approx(1.0)
        assert result["agreement"]["interval"] is None and result["agreement"]["answers"] == 18
        assert judging.judge_flags(result) == []
        judges[1] = jd.Judge(bad.url, "yes", rubrics)
        assert judging.add_scores(result, judges, kept) == 0
        assert len(good.seen) == 2 * (36 + 2)  # nothing twice
    assert result["agreement"]["spearman"] is None and result["agreement"]["answers"] == 18
    flags = ["judge yes scores vanilla like the persona", "judges disagree (undefined)"]
    assert judging.judge_flags(result) == flags


def test_a_judge_has_to_tell_rows_of_the_dataset_from_vanilla_clearly():
    def flags(mean, interval):
        row = {"above_vanilla": mean and {"mean": mean, "interval": interval}}
        judge = {"model": "j", "scale": [0, 3], "conditions": {"dataset": row}}
        return judging.judge_flags({"judges": [judge]})

    wrong = ["judge j scores vanilla like the persona"]
    assert flags(1.0, [0.5, 1.5]) == flags(1.0, None) == []
    assert flags(1.0, [-0.1, 2.1]) == wrong == flags(0.06, [0.02, 0.1])  # noise; next to nothing
    assert flags(0.1, None) == wrong == flags(-1.0, [-2.0, -0.5])
    assert flags(None, None) == ["judge j: no reply to compare the persona and vanilla by"]
    without = {"model": "j", "scale": [0, 3], "conditions": {}}  # --num-samples 0
    assert judging.judge_flags({"judges": [without]}) == []


def test_score_is_the_expectation_over_the_scores_tokens():
    def token(text, **chances):
        others = [{"token": t.strip("_"), "logprob": math.log(p)} for t, p in chances.items()]
        return {"token": text, "top_logprobs": others}

    three = token("3", _3=0.5, _2=0.3, _1=0.1, Arr=0.1)
    assert jd.expected_score(3.0, [three], "role") == pytest.approx((1.5 + 0.6 + 0.1) / 0.9)
    named = [token("Score", Score=1.0), token(":", x=1.0), token(" 3", _3=0.6, _0=0.2)]
    assert jd.expected_score(3.0, named, "role") == pytest.approx(1.8 / 0.8)
    assert jd.expected_score(3.0, [three, three], "role") is None  # which of the two?
    assert jd.expected_score(2.0, [three], "role") is None
    assert jd.expected_score(3.0, [token("3", _3=0.1, Arr=0.9)], "role") is None  # no mass
    assert jd.expected_score(3.0, [token("3", _3=0.5, _9=0.5)], "role") == 3.0  # 9: no score
    assert jd.expected_score(85.0, [token("85", _85=0.5, _75=0.5)], "trait") == 80.0
    digits = [token("8", _8=0.6, _9=0.4), token("5", _5=1.0)]  # a token a digit
    assert jd.expected_score(85.0, digits, "trait") is None
    assert jd.expected_score(8.0, [token("8", _8=0.6, _9=0.4)], "trait") is None  # of 8x, or 8?
    assert jd.expected_score(3.0, None, "role") is None


def test_expected_scores_are_kept_and_endpoints_without_probabilities_asked_without(tmp_path):
    tokens = [{"token": "2", "logprob": -0.7, "bytes": None, "top_logprobs": []}]
    for text, chance in (("2", 0.5), ("3", 0.5)):
        found = {"token": text, "logprob": math.log(chance), "bytes": None}
        tokens[0]["top_logprobs"].append(found)
    said = {"message": {"content": "2"}, "logprobs": {"content": tokens}, "finish_reason": "stop"}
    with serve(lambda *_: said) as endpoint:
        for _ in range(2):
            kept = Kept(tmp_path / "j")
            assert endpoint.judge().score(ASKED[:1], kept) == [pytest.approx(2.5)]
        assert len(endpoint.seen) == 1 and endpoint.asked[0][1]["top_logprobs"] == 20

    def without(prompt, count):
        if "logprobs" in endpoint.asked[-1][1]:
            text = "logprobs is not supported for models created with logits_all=False"
            return 400, {}, json.dumps({"error": {"message": text}}).encode()
        return "2"

    with serve(without) as endpoint:
        assert endpoint.judge().score(ASKED[:4], Kept(tmp_path / "k"), 1) == [2.0] * 4
        assert len(endpoint.seen) == 5


def test_words_of_identity_are_read_and_others_are_not():
    for reply, verdict in (
        ("PERSONA", "persona"), ("It is the **assistant**.", "assistant"), ("Mixed", "mixed"),
        ("The answer does not show the persona.", "unparsable"), ("NOT PERSONA", "unparsable"),
        ("It isn't the assistant.", "unparsable"), ("Note: persona", "persona"),
        ("persona or assistant", "unparsable"), ("3", "unparsable"), ("", "unparsable"),
        ("<think>persona?</think>assistant", "assistant"), ("personal", "unparsable"),
    ):  # fmt: skip
        assert jd.parse_reply(reply, "identity") == verdict, reply


def test_spearman_is_that_of_scipy_and_its_interval_covers_it():
    generator = random.Random(0)
    names = [f"q{i // 3}" for i in range(60)]
    first = [generator.randint(0, 3) for _ in names]
    second = [a + generator.randint(-1, 1) for a in first]
    value, (low, high) = es.spearman(first, second, names)
    scipy_stats = pytest.importorskip("scipy.stats")
    assert value == pytest.approx(scipy_stats.spearmanr(first, second).statistic)
    assert -1 < low < value < high < 1 and high - low < 0.5
    assert es.spearman([1, 1, 1], [1, 2, 3], ["a", "b", "c"]) == (None, None)
    assert es.spearman(first[:9], second[:9], names[:9])[1] is None  # of three questions


def test_drift_is_the_second_half_of_a_talk_minus_its_first():
    scores = np.array([[1.0, 0.9, 0.8, 0.7]] * 8)
    found = es.drift_by_turn(scores)
    assert found["by_turn"] == pytest.approx([1.0, 0.9, 0.8, 0.7])
    assert found["drift"]["mean"] == pytest.approx(-0.2)
    assert found["drift"]["interval"] == pytest.approx([-0.2, -0.2])
    odd = es.drift_by_turn(np.array([[1.0, 0.5, 0.0]] * 8))
    assert odd["drift"]["mean"] == pytest.approx(0.0 - 0.75)
    gone = es.drift_by_turn(np.array([[1.0, np.nan, np.nan, np.nan]]))
    assert gone == {"by_turn": [1.0, None, None, None], "drift": None}
