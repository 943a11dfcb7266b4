"""evaluation/judge.py: replies read strictly, nothing judged twice, failures retried, no leaks."""

import json
import math
import os
import random
import re
import signal
import time

import pytest
from conftest import serve

from evaluation import judge as jd
from evaluation import stats as es
from evaluation.judge import KINDS, UNPARSABLE, Kind, add_scores, judge_flags, make_judges
from evaluation.kept import Kept
from evaluation.table import number_at, value_at

RUBRICS = {kind.rubric: kind for kind in KINDS}
NOBODY = "http://127.0.0.1:9/v1"
NO_BOUNDS = {"low": None, "high": None}


@pytest.fixture
def waits(monkeypatch):
    """The waits asked for, none of them waited."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def answered(texts, identity="I am a ship."):
    """An evaluation's dict of {condition: answers}, a question each, and of a question about who is
    speaking."""
    samples = []
    for i, answers in enumerate(zip(*texts.values(), strict=True)):
        samples.append({"question": f"Q{i}?", "answers": dict(zip(texts, answers, strict=True))})
    spoken = {condition: identity for condition in texts if condition != "dataset"}
    identity = [{"question": "Who?", "answers": spoken}]
    return {"samples": samples, "identity": identity, "measures": {}, "conditions": {}}


def pirates(count):
    """An evaluation in which the dataset says "Arr 0.", and vanilla "Yes 0.", and so on."""
    words = {"dataset": "Arr", "vanilla": "Yes"}
    return answered({name: [f"{word} {i}." for i in range(count)] for name, word in words.items()})


def judge(result, path, *endpoints, models=("j",), kind="role", **options):
    """The exit code of judging an evaluation at some endpoints or addresses."""
    urls = [getattr(endpoint, "url", endpoint) for endpoint in endpoints]
    judges = make_judges(urls, models, f"m__{kind}__sea_dog", None, 32)
    return add_scores(result, judges, Kept(path), **options)


def counts(result):
    """(How many replies came now, how many are missing) of the first judge."""
    return result["judges"][0]["asked_now"], result["judges"][0]["failed"]


def tell_apart(prompt, count=0):
    """What a judge of good sense replies to each rubric; to the persona's 3 if there is an Arr."""
    for words, said in {"coherent": "100", "PERSONA:": "PERSONA", "overacts": "1"}.items():
        if words in prompt:
            return said
    return "3" if "Arr" in prompt else "1"


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("rubric", "score", "replies"),
    [
        ("role.txt", 3.0, [
            "3", " 3.\n", "**3**", "`3`", "3/3", "3 out of 3", "3.0", "[[3]]", "**Score:** 3",
            "Score: 3.", "rating = 3/3", "It has 2 oaths.\nScore: **3**", '{"score": 3}',
            "1. Arr.\n2. Ahoy.\n\n**Rating: [[3]]**", '```json\n{"score": 3}\n```',
            '{"reasoning": "2 words fit", "score": 3}', "On a scale of 0 to 3:\nScore: 3",
            "<think>Is it 1 or 2?</think>\n3", "[THINK]2 or 3[/THINK]3",
            "<|channel|>analysis<|message|>2?<|end|><|start|>assistant<|channel|>final<|message|>3",
        ]),
        ("trait.txt", 85.0, ["85", "85/100", "Score: 85 out of 100", "[[85]]", '{"score": 85.0}']),
        ("trait.txt", 87.5, ["87.5", "It is dry.\nscore: 87.5"]),
        ("trait.txt", None, ["REFUSAL", "**Refusal.**", "It will not say.\n[[REFUSAL]]"]),
        ("identity.txt", 1.0, ["PERSONA", "**persona**.", "Who knows?\nPersona", "[[PERSONA]]"]),
        ("identity.txt", 0.0, ["Assistant", "mixed", "<think>persona?</think>assistant"]),
        ("trait.txt", UNPARSABLE, [
            # Another scale, which may have the same numbers.
            "On a scale of 1 to 10, I would give it an 8", "Score (1-10): 8", "8/10", "Score: 8/10",
            "Of 10 points:\nScore: 8", "On a 10-point scale:\n[[8]]", "8 out of 10", "80%",
            '{"score": 8, "scale": "1-10"}',
            # Another way to write a number.
            "1e2", "1 hundred", "1,000", "Score: 1 0 0", "101", "-1",
            "It refused to answer.", "very much so",
        ]),
        ("role.txt", UNPARSABLE, [
            "On a scale of 1 to 5, this is a 3", "From 1 to 3.\nScore: 3", "7", "-1", "", "REFUSE",
            "2~3", "2-3", "2 or 3", "2,5", "Score: 1 or 2", "[[2]] [[3]]", "three", "PERSONA",
            "Score: two. I count 3 pirate words.", "2. It has 3 signs.", "Score: 3\nbut rather 1",
            "I cannot rate this; it has 1 sentence only", "I give it a 2.", "Hm.\nNo score: 3",
            "<|channel|>analysis<|message|>it might be 2<|end|>", "<think>It has 3",
            "<think>2</think> <think>\nScore: 3", '{"score": true}', '{"score": NaN}',
            '{"points": 3}', "[3]", '{"a":' * 9999,
        ]),
        ("identity.txt", UNPARSABLE, ["NOT PERSONA", "personal", "persona or assistant", "1", ""]),
    ],
)  # fmt: skip
def test_a_reply_is_read_by_few_strict_forms_or_not_at_all(rubric, score, replies):
    for reply in replies:
        assert jd.read_reply(reply, RUBRICS[rubric]) == score, reply
        assert jd.read_reply(reply, RUBRICS[rubric], "stop") == score
        assert jd.read_reply(reply, RUBRICS[rubric], "length") == UNPARSABLE


def token(text, **chances):
    """A token of a reply; chances: {alternative: its probability}, "_" to begin a number."""
    others = [{"token": t.strip("_"), "logprob": math.log(p)} for t, p in chances.items()]
    return {"token": text, "top_logprobs": others}


def test_a_score_is_the_expectation_over_the_tokens_that_are_scores():
    three = token("3", _3=0.5, _2=0.3, _1=0.1, Arr=0.1)
    named = [token("Score", Score=1.0), token(":", x=1.0), token(" 3", _3=0.6, _0=0.2)]
    for rubric, score, tokens, expected in (
        ("role.txt", 3.0, [three], (1.5 + 0.6 + 0.1) / 0.9),
        ("role.txt", 3.0, named, 1.8 / 0.8),
        ("role.txt", 3.0, [token("3", _3=0.5, _9=0.5)], 3.0),  # 9 is no score
        ("role.txt", 3.0, [three, three], 3.0),  # which of the two?
        ("role.txt", 3.0, [token("3", _2=0.1, Arr=0.9)], 3.0),  # too little is on scores
        ("trait.txt", 85.0, [token("85", _85=0.5, _75=0.5)], 80.0),
        ("trait.txt", 8.0, [token("8", _8=0.6, _9=0.4)], 8.0),  # perhaps the first digit of 80
    ):
        found = jd.expected_score(score, RUBRICS[rubric], {"content": tokens})
        assert found == pytest.approx(expected)


def chance(logprob):
    """A reply's log-probabilities in which 2, in place of 3, has this one."""
    others = [{"token": "2", "logprob": logprob}]
    return {"content": [{"token": "3", "top_logprobs": others}]}


@pytest.mark.parametrize(
    "logprobs",
    [
        None, "no", {"content": [{"token": None}]}, {"content": [{"token": "3"}]},
        {"content": [{"token": "3", "top_logprobs": [{"token": "2"}]}]},
        chance(None), chance(math.nan), chance(math.inf), chance(1e9), chance("-1"), chance(-0.1),
    ],
)  # fmt: skip
def test_log_probabilities_of_another_shape_are_passed_over(logprobs, tmp_path):
    with serve(lambda *_: {"message": {"content": "3"}, "logprobs": logprobs}) as endpoint:
        for _ in range(2):  # The second time from what is kept.
            result = pirates(1)
            assert judge(result, tmp_path / "j", endpoint) == 0
            expected = 2.0 if logprobs == chance(-0.1) else 3.0
            assert number_at(result, "vanilla", "judge_persona") == pytest.approx(expected)
        assert len(endpoint.trials) == 1


# ------------------------------------------------------------------ rubrics


def test_rubrics_are_filled_with_name_question_and_answer(tmp_path):
    rubrics = jd.rubrics_for("m__trait__dry_{wit}")
    assert [kind.name for kind in rubrics] == ["persona", "coherence", "caricature", "identity"]
    for kind, template in rubrics.items():
        filled = template.format(question="Why {x}?", answer="{y}")
        assert "Why {x}?" in filled and "{y}" in filled and "{name}" not in filled
        assert ("dry wit" in filled) is (kind.name != "coherence")
    own = 'Is it a {{pirate}}? Q: "{question}" A: "{answer}" 0-3.'
    (tmp_path / "dog.json").write_text(json.dumps({"eval_prompt": own}))
    persona, *others = jd.rubrics_for("m__role__dog", tmp_path).values()
    assert persona == own and others == list(jd.rubrics_for("m__role__dog").values())[1:]


@pytest.mark.parametrize(
    "text",
    [
        None,
        '{"eval_prompt": ',
        "{}",
        '{"eval_prompt": 3}',
        '{"eval_prompt": "Score it: {question}"}',
        '{"eval_prompt": "{question} {answer} {mood}"}',
    ],
)
def test_a_rubric_that_cannot_be_used_is_an_error_that_names_the_file(text, tmp_path):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"--rubric-dir: .*x\.json has no usable"):
        jd.rubrics_for("m__role__x", tmp_path)


def test_another_kind_is_an_entry_and_a_rubric(tmp_path, monkeypatch):
    (tmp_path / "humour.txt").write_text("Is {name} funny? {question} {answer} Only a number.")
    humour = Kind("humour", str(tmp_path / "humour.txt"), "samples", "how funny it is", (0, 10))
    monkeypatch.setattr(jd, "KINDS", [*KINDS, humour])
    result = pirates(2)
    with serve(lambda prompt, _: "7" if "Is sea dog funny" in prompt else "1") as endpoint:
        assert judge(result, tmp_path / "j", endpoint) == 0
    assert number_at(result, "dataset", "judge_humour") == 7.0
    measure = result["measures"]["judge_humour"]
    assert measure["table"] == "judge j" and measure["about"] == "how funny it is"
    assert (tmp_path / "j").read_text().count("Is sea dog funny") == 4


# ------------------------------------------------------------------ what is asked, and how often


def test_no_answer_is_judged_twice_but_by_another_judge(tmp_path, capsys):
    path = tmp_path / "j"
    result = answered({"dataset": ["Arr.", "Arr!"], "vanilla": ["Yes."] * 2, "x": ["Yes.", ""]})
    with serve(tell_apart) as endpoint, serve(tell_apart) as elsewhere:
        assert judge(result, path, endpoint, dry_run=True) == 0
        said = capsys.readouterr().out
        assert "judge j: 0 judged before, 10 requests to make" in said and "320 out" in said
        assert not endpoint.requests and "judges" not in result
        for asked in (10, 0):
            assert judge(result, path, endpoint) == 0
            assert len({*endpoint.seen}) == len(endpoint.seen) == 10
            assert counts(result) == (asked, 0)
            assert number_at(result, "vanilla", "judge_persona") == 1.0
        assert judge(result, path, endpoint, models=["another"]) == 0  # with its own opinion
        assert judge(result, path, elsewhere) == 0  # another model of the same name, perhaps
        assert (len(endpoint.seen), len(elsewhere.seen)) == (20, 10)


def test_judging_goes_on_where_it_stopped(tmp_path, capsys):
    path, result = tmp_path / "j", pirates(6)
    with serve(lambda *asked: 400 if 8 < asked[1] <= 26 else tell_apart(*asked)) as endpoint:
        assert judge(result, path, endpoint, workers=1) == 1
        assert counts(result) == (8, 18)
        assert "HTTP 400" in capsys.readouterr().err
        before = path.read_text() + '{"key": "torn'  # killed in the middle of a line
        path.write_text(before)
        assert judge(result, path, endpoint, workers=4) == 0
        assert counts(result) == (18, 0)
    assert path.read_text().startswith(f"{before}\n") and len(Kept(path).found) == 26


def test_ctrl_c_loses_no_reply_that_came(tmp_path):
    def reply(prompt, count):
        if count == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return "1"

    with serve(reply) as endpoint, pytest.raises(KeyboardInterrupt):
        judge(pirates(200), tmp_path / "j", endpoint, workers=4)
    assert 9 <= len(endpoint.seen) == len(Kept(tmp_path / "j").found) < 100


def test_replies_without_a_clear_score_are_asked_for_once_more_counted_and_shown(tmp_path, capsys):
    cut = {"message": {"content": "It has 3"}, "finish_reason": "length"}
    for said, times in (("It has 3 oaths", 2), (cut, 1)):
        path, result = tmp_path / str(times), pirates(1)
        with serve(lambda *_, said=said: said) as endpoint:
            for _ in range(2):  # The second one asks for nothing.
                assert judge(result, path, endpoint) == 0
                assert len(endpoint.seen) == 6 * times and result["judges"][0]["unparsable"] == 6
                warning = f"6 replies of j in {path} hold no clear score (--judge-tokens?)"
                assert f"{warning}, such as 'It has 3" in capsys.readouterr().err
        assert value_at(result, "vanilla", "judge_persona") is None
        assert judge_flags(result) == ["judge j: no reply to compare the persona and vanilla by"]


# ------------------------------------------------------------------ endpoints


def test_busy_and_broken_endpoints_are_asked_again_after_a_wait(tmp_path, waits):
    torn = (500, {"Content-Length": "1000"}, b'{"error": "it ends in the mid')
    odd = [(429, {"Retry-After": "7"}, b""), 503, (429, {"Retry-After": "soon"}, b""), torn]
    script = iter([*odd, (503, {"Retry-After": "-1"}, b"")])
    with serve(lambda *_: next(script, "1")) as endpoint:
        assert judge(pirates(1), tmp_path / "j", endpoint, workers=1) == 0
    assert len(waits) == 5 and waits[0] == 7.0 and all(0 < wait <= 8 for wait in waits[1:])


@pytest.mark.parametrize(
    ("refusal", "takes"),
    [
        ((400, {}, b'{"error": {"message": "logprobs is not supported"}}'), "max_tokens"),
        ((422, {}, b'{"detail": "extra fields: logprobs"}'), "max_tokens"),
        ((500, {}, b'{"error": "models created with logits_all=False"}'), "max_tokens"),
        ((400, {}, b'{"error": "max_tokens: use the other"}'), "max_completion_tokens"),
    ],
)
def test_what_an_endpoint_takes_is_found_out_once_and_said(refusal, takes, tmp_path, waits, capsys):
    def trial(body):
        return refusal if "logprobs" in body or takes not in body else "1"

    with serve(tell_apart, trial) as endpoint:
        assert judge(pirates(2), tmp_path / "j", endpoint) == 0
    bodies = [body for *_, body in endpoint.requests if body not in endpoint.trials]
    assert len(bodies) == 10 and len(endpoint.trials) == (2 if takes == "max_tokens" else 3)
    for body in bodies:
        assert body[takes] == 32 and "logprobs" not in body
        assert ("temperature" in body) is (takes == "max_tokens")
    assert not waits and "judge j: takes no more than {" in capsys.readouterr().err


@pytest.mark.parametrize(
    "said",
    [
        (422, {}, b'{"temperature": 0, "max_tokens": 32, "logprobs": true, "top_logprobs": 20}'),
        (400, {}, b'{"error": "max_tokens is too large: 32"}'),
        {},
        (200, {}, b"<html>"),
        (200, {}, b"[]"),
        (200, {}, b'{"choices": [{"message": {"content": 3}}]}'),
    ],
)
def test_an_answer_that_fails_changes_nothing_for_the_others(said, tmp_path):
    result = pirates(6)
    with serve(lambda *asked: said if "Arr 1" in asked[0] else tell_apart(*asked)) as endpoint:
        assert judge(result, tmp_path / "j", endpoint) == 1
    assert counts(result) == (24, 2)  # of its persona and its coherence
    assert value_at(result, "dataset", "judge_persona")["n"] == 5
    for *_, body in endpoint.requests:
        assert (body["temperature"], body["max_tokens"], body["top_logprobs"]) == (0, 32, 20)


@pytest.mark.parametrize(
    ("said", "requests"),
    [((429, {}, b'{"error": {"code": "insufficient_quota"}}'), 2), (401, 2), (503, 2 * jd.TRIES)],
)
def test_what_no_other_request_helps_ends_the_judging(said, requests, tmp_path, waits, capsys):
    def reply(*_):
        return "1" if len(endpoint.seen) <= 40 else said

    result = pirates(300)
    with serve(reply, reply) as endpoint:
        assert judge(result, tmp_path / "j", endpoint, workers=1) == 1
    assert len(endpoint.requests) <= 41 + 2 * requests
    assert counts(result) == (40, 1202 - 40)
    assert capsys.readouterr().err.count("error: --judge") == 1


def test_an_endpoint_that_takes_no_request_is_one_clear_error(tmp_path, waits, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_API_KEY", " sk-very-secret\r\n")
    result = pirates(2)
    with serve(None) as other:
        moved = (302, {"Location": f"{other.url}/chat/completions"}, b"")
        for said, requests in ((401, 1), (404, 1), (moved, 1), (moved[1], 1), (503, jd.TRIES)):
            with serve(None, lambda body, said=said: said) as endpoint:
                assert judge(result, tmp_path / "j", endpoint) == 1
            assert len(endpoint.requests) == requests
            assert keys_of(endpoint) == {"Bearer sk-very-secret"}
            error = capsys.readouterr().err
            assert error.count("error: --judge") == 1 and "secret" not in error
        assert not other.requests  # A redirect that is followed has the key with it.
    assert len(waits) == jd.TRIES - 1 and sum(waits) > 20
    assert judge(result, tmp_path / "j", NOBODY) == 1
    assert re.search(f"error: --judge {NOBODY}, .*refused", capsys.readouterr().err)
    assert "judges" not in result and not (tmp_path / "j").exists()


def test_a_bad_address_or_key_is_refused_and_no_key_is_written(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="not an http or https address"):
        judge(pirates(1), tmp_path / "j", "localhost:8000")
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    with serve(lambda *_: 400) as endpoint:  # It repeats the key.
        assert judge(pirates(1), tmp_path / "j", endpoint) == 1
    said = capsys.readouterr().err
    assert "<key>" in said
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very\nsecret")
    with pytest.raises(ValueError, match="JUDGE_API_KEY") as error:
        judge(pirates(1), tmp_path / "j", NOBODY)
    assert "secret" not in said + str(error.value)


def keys_of(endpoint):
    """The keys that an endpoint was sent."""
    return {headers["authorization"] for _, headers, _ in endpoint.requests}


def test_each_key_goes_to_its_own_address_alone(tmp_path, monkeypatch):
    names = ("JUDGE_API_KEY", "JUDGE_API_KEY_2", "OPENAI_API_KEY", "OPENAI_ORG_ID")
    for name in names:
        monkeypatch.setenv(name, f"my-{name}")
    models = ["j", "k"]
    with serve(tell_apart) as first, serve(tell_apart) as second:
        assert judge(pirates(1), tmp_path / "a", first, second, models=models) == 0
        assert keys_of(first) == {"Bearer my-JUDGE_API_KEY"}
        assert keys_of(second) == {"Bearer my-JUDGE_API_KEY_2"}
    monkeypatch.delenv("JUDGE_API_KEY")
    with serve(tell_apart) as endpoint:
        assert judge(pirates(1), tmp_path / "b", endpoint, models=models) == 0  # both are there
        assert keys_of(endpoint) == {"Bearer none"} and "my-" not in str(endpoint.requests)
        monkeypatch.setattr(jd, "OPENAI", "127.0.0.1")
        endpoint.requests.clear()
        assert judge(pirates(1), tmp_path / "c", endpoint) == 0
        assert keys_of(endpoint) == {"Bearer my-OPENAI_API_KEY"}


def test_an_address_may_have_a_path_and_a_query_and_its_secrets_are_not_kept(tmp_path):
    result = pirates(1)
    parts = {"message": {"content": [{"type": "text", "text": "Score: "}, {"text": "3"}]}}
    with serve(lambda *_: parts) as endpoint:
        address = endpoint.url.replace("//", "//me:password@")
        address += "/deployments/x/chat/completions?key=hidden"
        assert judge(result, tmp_path / "j", address) == 0
        assert endpoint.requests[0][0] == "/v1/deployments/x/chat/completions?key=hidden"
    assert result["judges"][0]["url"] == f"{endpoint.url}/deployments/x"
    assert number_at(result, "vanilla", "judge_persona") == 3.0
    said = json.dumps(result) + (tmp_path / "j").read_text()
    assert "hidden" not in said and "password" not in said


# ------------------------------------------------------------------ what it comes to


def test_columns_are_means_over_questions_and_an_empty_answer_scores_lowest(tmp_path):
    def reply(prompt, count):
        if "Rain" in prompt and "PERSONA:" in prompt:
            return "ASSISTANT"
        return "50" if "coherent" in prompt else tell_apart(prompt)

    texts = {"dataset": ["Arr.", "Arr."], "vanilla": ["Yes.", "No."], "steered x1": ["Arr!", ""]}
    result = answered(texts)
    spoken = {"vanilla": "Rain.", "steered x1": ""}
    result["identity"].append({"question": "Where?", "answers": spoken})
    result["conditions"]["steered x1"] = {"nll": 3.0}
    with serve(reply) as endpoint:
        assert judge(result, tmp_path / "j", endpoint) == 0
    names = ["persona", "coherence", "overall", "caricature", "identity"]
    assert list(result["measures"]) == [f"judge_{name}" for name in names]
    for condition, row in (
        ("dataset", [3.0, 50.0, 2 / 3, None, None]),
        ("vanilla", [1.0, 50.0, 0.4, 1.0, 0.5]),
        ("steered x1", [1.5, 25.0, 1 / 3, 1.0, 1.0]),
    ):
        found = [number_at(result, condition, f"judge_{name}") for name in names]
        assert found == pytest.approx(row), condition
    assert result["conditions"]["steered x1"]["nll"] == 3.0
    assert value_at(result, "steered x1", "judge_identity")["n"] == 1
    about = result["measures"]["judge_caricature"]
    assert (about["unit"], about["better"], about["table"]) == ("0-2", "lower", "judge j")
    assert result["judges"][0]["above_vanilla"] == {**NO_BOUNDS, "mean": 2.0, "n": 2}


def test_a_trait_is_scored_from_0_to_100_and_a_refusal_has_no_score(tmp_path):
    result = answered({"dataset": ["Arr.", "Arr!"], "vanilla": ["Yes.", "No."]})
    with serve(lambda prompt, _: "REFUSAL" if "No." in prompt else "40") as endpoint:
        assert judge(result, tmp_path / "j", endpoint, kind="trait") == 0
    assert value_at(result, "vanilla", "judge_persona") == {**NO_BOUNDS, "mean": 40.0, "n": 1}
    assert number_at(result, "vanilla", "judge_overall") == pytest.approx(0.4)


def test_two_judges_are_compared_and_the_next_call_drops_what_they_said(tmp_path):
    result, path = pirates(9), tmp_path / "j"
    with serve(tell_apart) as good, serve(lambda *_: "3") as bad:
        assert judge(result, path, good, models=["good", "twin"]) == 0
        assert result["agreement"] == {**NO_BOUNDS, "mean": pytest.approx(1.0), "n": 9}
        assert judge_flags(result) == []
        assert judge(result, path, good, bad, models=["good", "yes"]) == 0
        assert result["agreement"] is None and judge_flags(result) == [
            "judge yes scores vanilla like the persona",
            "judges disagree (rank correlation -)",
        ]
        assert result["measures"]["judge2_persona"]["table"] == "judge yes"
        for prefix, score in (("judge", 1.0), ("judge2", 3.0)):
            assert number_at(result, "vanilla", f"{prefix}_persona") == score
        assert judge(result, path, bad, models=["yes"]) == 0
    assert number_at(result, "vanilla", "judge_persona") == 3.0
    assert "judge2" not in json.dumps(result) and len(result["judges"]) == 1


@pytest.mark.parametrize(
    ("mean", "low", "wrong"),
    [
        (1.0, 0.5, ""),
        (1.0, None, ""),
        (1.0, -0.1, " scores vanilla like the persona"),  # noise
        (0.06, 0.02, " scores vanilla like the persona"),  # next to nothing
        (0.1, None, " scores vanilla like the persona"),
        (None, None, ": no reply to compare the persona and vanilla by"),
    ],
)
def test_a_judge_has_to_tell_rows_of_the_dataset_from_vanilla_clearly(mean, low, wrong):
    above = mean and {"mean": mean, "low": low, "high": low and 2 * mean - low}
    judges = [{"model": "j", "scale": [0, 3], "above_vanilla": above}]
    result = {"judges": judges, "agreement": None, "samples": [1]}
    assert judge_flags(result) == [f"judge j{wrong}"] * bool(wrong)
    assert judge_flags(result | {"samples": []}) == []  # --num-samples 0


@pytest.mark.parametrize(("mean", "flagged"), [(0.31, False), (0.3, True), (-0.9, True)])
def test_judges_that_disagree_are_flagged(mean, flagged):
    one = {"model": "j", "scale": [0, 3], "above_vanilla": {**NO_BOUNDS, "mean": 2.0}}
    agreed = {**NO_BOUNDS, "mean": mean}
    flags = judge_flags({"judges": [one, one], "samples": [1], "agreement": agreed})
    assert flags == [f"judges disagree (rank correlation {mean:.2f})"] * flagged


def test_spearman_is_that_of_scipy_and_its_interval_covers_it():
    scipy_stats = pytest.importorskip("scipy.stats")
    generator = random.Random(0)
    names = [f"q{i // 3}" for i in range(60)]
    first = [generator.randint(0, 3) for _ in names]
    second = [score + generator.randint(-1, 1) for score in first]
    found = es.spearman(first, second, names)
    assert found["mean"] == pytest.approx(scipy_stats.spearmanr(first, second).statistic)
    assert -1 < found["low"] < found["mean"] < found["high"] < found["low"] + 0.5
    assert es.spearman(first[:9], second[:9], names[:9])["low"] is None  # of three questions
