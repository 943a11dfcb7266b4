"""evaluation/stats.py: intervals are paired and over questions; probe, AUROC, text metrics."""

import math

import numpy as np
import pytest
import torch

from evaluation import stats as es

RNG = np.random.default_rng(7)


def test_interval_is_over_questions_not_rows():
    losses = RNG.uniform(1, 3, 25)
    tokens = np.full(25, 4)
    questions = [f"q{i}" for i in range(25)]
    grouped = [question for question in questions for _ in range(5)]
    again = es.ratio(np.repeat(losses, 5), np.repeat(tokens, 5), grouped)
    # Five times the rows of a question are no new questions.
    assert again == pytest.approx(es.ratio(losses, tokens, questions))


def test_intervals_cover_what_they_say_from_eight_questions_on():
    """Rows of unlike length, NLL a token that is skewed; 1% is 3 standard errors."""
    truth = 3.0
    for count in (8, 12, 17, 40):
        covered = 0
        names = [str(i) for i in range(count)]
        for _ in range(4000):
            tokens = np.clip(RNG.lognormal(4, 0.5, count), 5, None)
            nll = truth + RNG.normal(0, 0.4, count) + 0.3 * (RNG.gamma(4, 0.25, count) - 1)
            found = es.ratio(nll * tokens, tokens, names)
            covered += found["low"] <= truth <= found["high"]
        assert 0.93 <= covered / 4000 <= 0.97, count
    for count in (1, 2, 7):
        few = {"mean": 1.0, "low": None, "high": None, "n": count}
        assert es.mean_interval([1.0] * count, list(range(count))) == few
    assert es.student_t(7) == pytest.approx(2.3646, abs=1e-3)  # of any table
    assert es.student_t(30) == pytest.approx(2.0423, abs=1e-3)


def chance(ones, count, share):
    """Of so many ones among `count` draws that are one with a chance of `share`."""
    return math.comb(count, ones) * share**ones * (1 - share) ** (count - ones)


@pytest.mark.parametrize("scale", [(0, 1), (0, 3), (0, 100)])
@pytest.mark.parametrize("count", [8, 12, 17, 40])
def test_intervals_of_scores_hold_at_the_ends_of_their_scale_and_stay_on_it(count, scale):
    top = scale[1]
    names = list(range(count))
    found = []
    for ones in range(count + 1):
        scores = [top] * ones + [0] * (count - ones)
        found.append(es.mean_interval(scores, names, scale))
        assert found[-1]["mean"] == pytest.approx(top * ones / count)
        assert 0 <= found[-1]["low"] <= found[-1]["mean"] <= found[-1]["high"] <= top
    assert found[0]["low"] == 0 < found[0]["high"]
    assert found[-1]["high"] == top > found[-1]["low"]
    for share in (0.05, 0.1, 0.5, 0.9):  # exact, not drawn
        inside = [f["low"] <= top * share <= f["high"] for f in found]
        covered = sum(chance(i, count, share) * inside[i] for i in range(count + 1))
        assert covered >= 0.95, share
    # Where scores are alike, less is not known.
    alike = es.mean_interval([0.5 * top + 0.01 * top * (i % 3) for i in names], names, scale)
    half = found[count // 2]
    assert alike["high"] - alike["low"] < 0.7 * (half["high"] - half["low"])


def test_recovered_fractions_of_a_weak_gain_hold():
    """Prompting gains 0.06 +- 0.12 or 0.10 +- 0.15 a question, the vector 1.2 times that."""
    for gain, spread in ((0.06, 0.12), (0.10, 0.15)):
        for count in (12, 17, 40):
            reported = 0
            covered = 0
            names = [str(i) for i in range(count)]
            for _ in range(2000):
                prompting = gain + spread * RNG.standard_normal(count)
                steering = 1.2 * (gain + spread * RNG.standard_normal(count))
                losses = {"vanilla": np.zeros(count), "prompted": -prompting, "steered": -steering}
                found, why = es.recovered_fractions(losses, [1] * count, names)
                if why is None:
                    reported += 1
                    covered += found["steered"]["low"] <= 1.2 <= found["steered"]["high"]
            assert reported > 200 and covered / reported >= 0.9


def test_interval_agrees_with_the_normal_one_on_many_questions():
    values = RNG.normal(3.0, 1.0, 400)
    got = es.mean_interval(list(values), [str(i) for i in range(400)])
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert got["mean"] == pytest.approx(values.mean())
    assert got["low"] == pytest.approx(values.mean() - half, abs=0.02)
    assert got["high"] == pytest.approx(values.mean() + half, abs=0.02)
    assert es.mean_interval([], []) is None


def test_recovered_fraction_and_why_it_is_undefined():
    questions = [str(i) for i in range(12)]
    tokens = [1] * 12
    base = RNG.uniform(3, 4, 12)
    losses = {"vanilla": base, "prompted": base - 1.0, "steered": base - 0.25}
    found, why = es.recovered_fractions(losses, tokens, questions)
    assert why is None
    assert found == {"steered": pytest.approx({"mean": 0.25, "low": 0.25, "high": 0.25, "n": 12})}

    few = {name: nats[:3] for name, nats in losses.items()}
    found, why = es.recovered_fractions(few, tokens[:3], questions[:3])
    assert not found
    assert "3 held-out questions" in why

    noise = RNG.normal(0, 0.5, 12)
    noise -= noise.mean() - 0.01  # prompting "helps" by 0.01, within the noise
    losses["prompted"] = base - noise
    found, why = es.recovered_fractions(losses, tokens, questions)
    assert not found
    assert "prompting does not help" in why

    del losses["prompted"]
    assert es.recovered_fractions(losses, tokens, questions)[0] == {}


def test_drift_is_the_later_half_of_turns_minus_the_other():
    scores = np.array([[0.1, 0.2, 0.6, 0.7], [0.3, np.nan, np.nan, 0.5], [np.nan] * 4])
    found = es.drift_by_turn(scores)
    assert found["by_turn"] == pytest.approx([0.2, 0.2, 0.6, 0.6])
    assert found["drift"] == {"mean": pytest.approx(0.35), "low": None, "high": None, "n": 2}
    assert es.drift_by_turn(np.full((2, 2), np.nan)) == {"by_turn": [None, None], "drift": None}


def test_probe_finds_a_direction_and_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    shift = torch.zeros(40)
    shift[3] = 4.0
    positive, negative = (torch.randn(60, 40, generator=generator) for _ in range(2))
    probe = es.fit_probe(positive[:40] + shift, negative[:40])
    on, off = probe(positive[40:] + shift), probe(negative[40:])
    assert es.auroc(on, off) > 0.9 and on.mean() > 0.6 > 0.4 > off.mean()
    wins = [(a > b) + 0.5 * (a == b) for a in (1, 2, 2, 5) for b in (0, 2, 4)]
    assert es.auroc([1, 2, 2, 5], [0, 2, 4]) == pytest.approx(sum(wins) / len(wins))


def test_probe_weighs_classes_alike():
    generator = torch.Generator().manual_seed(0)
    many, few = torch.randn(200, 8, generator=generator), torch.randn(20, 8, generator=generator)
    assert es.fit_probe(few, many)(torch.zeros(1, 8)).item() == pytest.approx(0.5, abs=0.1)


def test_text_measures_see_loops_and_empty_answers():
    def measure(text):
        functions = es.word_count, es.distinct_words, es.repeated, es.is_empty
        return [function(text) for function in functions]

    assert measure("") == [0, None, 0.0, 1.0]
    assert measure("Don't panic, the ship sails at dawn.") == [7, 1.0, 0.0, 0.0]
    words, distinct, repeated, empty = measure("tell them what ye think " * 10)
    assert [words, distinct, empty] == [50, 0.1, 0.0]
    assert repeated > 0.85
    for sign in ("🏴‍☠️", "ha", "!", "我是海盗", "- "):  # without words to repeat
        assert es.repeated("Arr " + sign * 60) > 0.6
