"""What an evaluation measures: each condition is what it says it is, each measure is of it.

Each check that guards against a known error of such evaluations is also run with that error built
in, and must then fail.
"""

import contextlib
import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONFIGS, block_outputs, tiny

import eval_steering as ev
import hook_model as hm
from evaluation import answers as an
from evaluation import conditions as co
from evaluation import likelihood as li
from evaluation import measures as me
from evaluation import probe as pr
from evaluation import stats
from evaluation.conditions import Condition
from evaluation.kept import Kept
from evaluation.rows import first_rows
from evaluation.shared_prefix import after_shared_prefix, common_tokens
from evaluation.table import Measure, add_column, number_at, text_of
from steering.chat_format import Example, label_count
from steering.fast_path import FastPath
from steering.finished import read_run

SAMPLING = an.Sampling(max_new_tokens=12, temperature=0.0, seed=0, batch_size=3)
QUESTIONS = ["Hi?", "What is the longest river that you have ever sailed on, captain?", "Why?"]
CONVERSATIONS = [[{"role": "user", "content": question}] for question in QUESTIONS]
LIMIT = 60  # padded tokens a forward pass


@pytest.fixture
def reader(tiny_folder, smol_chat):
    """A Reader of the tiny model."""
    return li.Reader(hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu"), smol_chat, LIMIT)


@pytest.fixture
def vector(finished):
    """The vector of the tiny run."""
    return read_run(finished).vector


# ---------------------------------------------------------------- answers


def check_greedy_answers(steered, chat):
    """Assert that greedy answers are token by token the argmax of the steered forward."""
    answers = an.generate_answers(steered, chat, CONVERSATIONS, SAMPLING)
    for messages, answer in zip(CONVERSATIONS, answers, strict=True):
        ids = chat.tokenize([chat.prompt_text(messages)])[0]
        start = len(ids)
        for _ in range(12):  # no cache, no padding
            with torch.no_grad():
                token = steered(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == chat.end_of_turn_id:
                break
            ids.append(token)
        assert answer == chat.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    return answers


def test_greedy_answers_equal_the_argmax_of_the_steered_forward(steered, smol_chat):
    steered.model.generation_config.repetition_penalty = 5.0  # a model's own, which must not act
    answers = check_greedy_answers(steered, smol_chat)
    with steered.steering_off():
        assert an.generate_answers(steered, smol_chat, CONVERSATIONS, SAMPLING) != answers


def test_answers_cut_in_the_wrong_place_are_caught(steered, smol_chat, monkeypatch):
    real = steered.model.generate
    with monkeypatch.context() as fault:  # a generate that gives its left padding back unpadded
        fault.setattr(steered.model, "generate", lambda **options: real(**options)[:, 1:])
        with pytest.raises(AssertionError, match="where its prompt ends"):
            an.generate_answers(steered, smol_chat, CONVERSATIONS, SAMPLING)

    def echo(**options):  # the end of the prompt, cut off too late, in the answer
        ids = options["input_ids"]
        return torch.cat([ids, ids[:, -3:], real(**options)[:, ids.shape[1] :]], dim=1)

    monkeypatch.setattr(steered.model, "generate", echo)
    with pytest.raises(AssertionError):
        check_greedy_answers(steered, smol_chat)


def test_answers_hold_no_prompt_text_and_stop_at_the_end_of_turn(smol, smol_chat):
    model = hm.load_model(smol, 12, device="cpu")
    conversations = [[{"role": "user", "content": "Say only the word yes."}], CONVERSATIONS[1]]
    sampling = replace(SAMPLING, max_new_tokens=40)
    short, long = an.generate_answers(model, smol_chat, conversations, sampling)
    for text in (short, long):
        assert text
        for part in ("<|im", "assistant", "helpful AI", "longest river that"):
            assert part not in text
    assert len(smol_chat.tokenize([short])[0]) < 40


def test_sampled_answers_depend_on_the_seed_but_not_on_the_batch(steered, smol_chat):
    turns = [[{"role": "user", "content": f"{q}?"}] for q in ("Who are you", "Tea", "What is 2+2")]

    def answers(at_once, seed=0, conversations=turns):
        sampling = an.Sampling(8, 1.0, seed)
        texts = []
        for start in range(0, 3, at_once):
            batch = conversations[start : start + at_once]
            texts += an.generate_answers(steered, smol_chat, batch, sampling)
        return texts

    together = answers(3)
    assert together == answers(1) == answers(2)
    assert together[::-1] == answers(2, conversations=turns[::-1])
    assert together != answers(3, seed=1)
    assert len(set(together)) == 3


@pytest.fixture
def writer(steered, smol_chat, tmp_path):
    """A Writer of the tiny model, four rows at once."""
    kept = Kept(tmp_path / "kept")
    return an.Writer(steered, smol_chat, an.Sampling(8, 0.7, 0, 4), kept)


def vectors_of(count):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(5))


def test_answers_under_several_vectors_are_those_under_each_alone(writer):
    vectors = vectors_of(3)
    asks = writer.ask(CONVERSATIONS)
    for vector in vectors:
        asks += writer.ask(CONVERSATIONS, vector)
    texts = writer.write(asks)
    assert len(texts) == 12 and len({*texts}) > 6
    model = writer.model
    for i, vector in enumerate([0 * vectors[0], *vectors]):
        model.set_vector(vector)
        alone = an.generate_answers(model, writer.chat, CONVERSATIONS, writer.sampling)
        assert texts[3 * i : 3 * i + 3] == alone


def test_what_is_written_at_once_is_alike_in_length_and_in_equal_parts(writer, written_at_once):
    long = [[{"role": "user", "content": "word " * 300}]]
    writer.write(writer.ask([*CONVERSATIONS, *CONVERSATIONS, *long], vectors_of(1)[0]))
    assert sorted(map(len, written_at_once)) == [1, 3, 3]
    written_at_once.clear()
    writer.write(writer.ask([*CONVERSATIONS, *CONVERSATIONS]))  # the plain model's, once each
    writer.write(writer.ask(CONVERSATIONS))
    assert [*map(len, written_at_once)] == [3] and len(writer.kept.found) == 3


def test_a_batch_that_memory_does_not_hold_is_written_in_halves(writer, monkeypatch):
    asks = writer.ask([*CONVERSATIONS, CONVERSATIONS[0]], vectors_of(1)[0])
    expected = writer.write(asks)
    real = writer.model.model.generate

    def generate(input_ids, **options):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(input_ids=input_ids, **options)

    monkeypatch.setattr(writer.model.model, "generate", generate)
    assert writer.write(asks) == expected


def test_evaluations_side_by_side_get_the_answers_that_they_asked_for():
    written = []

    def evaluation(name, times):
        found = []
        for i in range(times):
            texts = yield from an.answers_to({"a": [f"{name}{i}"], "none": [], "b": [name] * i})
            assert texts["none"] == [] and texts["b"] == [name.upper()] * i
            found += texts["a"]
        if name == "bad":
            raise ValueError("its own fault")
        return found

    def write(asks):
        written.append(len(asks))
        return [ask.upper() for ask in asks]

    parts = [evaluation("x", 3), evaluation("bad", 1), evaluation("y", 2), evaluation("z", 0)]
    x, bad, y, z = an.run_together(parts, write)
    assert (x, y, z) == (["X0", "X1", "X2"], ["Y0", "Y1"], [])
    assert isinstance(bad, ValueError) and written == [3, 4, 3]

    def fails(asks):
        raise OSError("of all")

    ended = an.run_together([evaluation("x", 1), evaluation("z", 0)], fails)
    assert isinstance(ended[0], OSError) and ended[1] == []


def test_seeded_noise_samples_from_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    process = an.seeded_noise([[]], an.Sampling(temperature=0.5), "cpu")
    picks = torch.stack([process(None, scores).argmax() for _ in range(4000)])
    got = picks.bincount(minlength=4) / len(picks)
    assert torch.allclose(got, (scores[0] / 0.5).softmax(-1), atol=0.03)


def test_a_models_own_generation_config_does_not_touch_answers(steered, smol_chat):
    sampling = an.Sampling(8, 0.7, 0, 2)
    before = an.generate_answers(steered, smol_chat, CONVERSATIONS, sampling)
    own = steered.model.generation_config
    own.repetition_penalty = 5.0
    own.num_beams = 2
    own.forced_eos_token_id = 3
    assert an.generate_answers(steered, smol_chat, CONVERSATIONS, sampling) == before
    assert steered.model.generation_config is own


# ---------------------------------------------------------------- conditions and their likelihood


def test_prompts_are_the_rows_own_each_of_the_datasets_and_one_with_examples(data):
    train = [Example({**e.row}, [], []) for e in data.train]
    for i, example in enumerate(train):
        example.row["system_prompt"] = "Act it." if i % 3 == 0 else "Be it."
    conditions, missing = co.prompt_conditions(replace(data, train=train))
    named = {condition.name: condition for condition in conditions}
    assert list(named) == ["prompted", "prompt 1", "prompt 2", "few_shot"]
    assert not missing

    rows = first_rows(data.heldout, 2)
    assert named["prompted"].prompt(rows) == rows
    assert {row["system_prompt"] for row in named["prompt 1"].prompt(rows)} == {"Be it."}
    for row, shown in zip(rows, named["few_shot"].prompt(rows), strict=True):
        *shots, question, answer = shown["messages"]
        assert [question, answer] == row["messages"]
        assert shown["system_prompt"] == "Be it."
        examples = [e.row["messages"] for e in train[: co.SHOTS]]
        assert shots == [turn for turns in examples for turn in turns]
    assert co.prompts_shown(conditions, rows) == {
        "prompt 1": "Be it.",
        "prompt 2": "Act it.",
        "few_shot": "Be it.",
    }


def test_random_vectors_are_as_long_as_the_trained_one_and_depend_on_the_seed(vector):
    vectors = co.random_vectors(vector, 0)
    assert len(vectors) == 3
    for other in vectors:
        assert other.norm() == pytest.approx(vector.norm().item())
    assert torch.equal(vectors[0], co.random_vectors(vector, 0)[0])
    assert not torch.equal(vectors[0], co.random_vectors(vector, 1)[0])
    assert not torch.equal(vectors[0], vectors[1])


def test_the_mean_difference_leads_from_plain_rows_to_the_persona(reader, data):
    difference, probe, about = ev.compare_states(reader, data)
    means = []
    for part in (data.train, data.plain_train):
        examples = an.without_end(part, reader.chat)
        means.append(pr.response_means(reader.fast, examples, LIMIT).mean(dim=0))
    assert torch.allclose(difference, means[0] - means[1], atol=1e-6)
    assert about["rows"]["train"] == len(data.train)
    heldout = pr.response_means(reader.fast, an.without_end(data.heldout, reader.chat), LIMIT)
    assert (probe(heldout) > 0.5).float().mean() > 0.5


def test_a_probe_may_be_of_another_layer_and_the_mean_difference_is_not(reader, data):
    own = ev.compare_states(reader, data)
    other = replace(reader, probe_layer=3)
    difference, probe, _ = ev.compare_states(other, data)
    assert torch.equal(difference, own[0])
    examples = an.without_end(data.heldout, reader.chat)
    scores = pr.persona_scores(other, probe, examples)

    # The reference: outputs of the block, by the test's own hook on the plain model.
    means = []
    for example in examples:
        with reader.model.steering_off():
            states = block_outputs(reader.model, torch.tensor([example.input_ids]))[3][0]
        means.append(states[torch.tensor(example.labels) >= 0].mean(dim=0))
    assert scores == pytest.approx(probe(torch.stack(means)).tolist(), rel=1e-4)
    assert scores != pytest.approx(pr.persona_scores(reader, own[1], examples), rel=1e-3)


def test_a_prompt_that_cannot_be_is_missing_for_a_reason(data):
    bare = [replace(e, row={**e.row, "system_prompt": ""}) for e in data.heldout]
    conditions, missing = co.prompt_conditions(replace(data, heldout=bare, train=data.train[:2]))
    assert not conditions
    assert "no system prompt" in missing["prompted"]
    assert missing["few_shot"] == "2 questions to train on, 3 are needed"


def compare_with_reference(reader, data, vector):
    """Assert that the losses of conditions are what the model's own loss gives, row by row.
    The text is what the template renders whole, with the prompt of a condition and without."""
    prompts = [c for c in co.prompt_conditions(data)[0] if c.name in ("prompted", "few_shot")]
    conditions = [
        Condition("vanilla"),
        *prompts,
        Condition("steered", (vector,)),
        Condition("two", (vector, -vector), answered=False),
    ]
    losses, missing = li.condition_losses(reader, conditions, data.heldout)
    assert list(losses) == ["vanilla", "prompted", "few_shot", "steered", "two"]
    assert not missing

    chat = reader.chat
    reference = hm.load_model(reader.model.name, 1, dtype="fp32", device="cpu").model
    moved = torch.zeros_like(vector)
    reference.model.layers[1].register_forward_hook(lambda module, inputs, out: out + moved)

    def nats_of(turns):
        text = chat.tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        ids = torch.tensor([chat.tokenizer(text, add_special_tokens=False)["input_ids"]])
        count = len(chat.tokenize([turns[-1]["content"] + "<|im_end|>"])[0])
        labels = ids.clone()
        labels[:, :-count] = -100
        with torch.no_grad():
            return reference(input_ids=ids, labels=labels).loss.item() * count

    system = [{"role": "system", "content": "Be a pirate."}]
    shots = []
    for row in first_rows(data.train, co.SHOTS):
        shots += row["messages"]
    before = {"prompted": system, "few_shot": [*system, *shots]}
    for i, example in enumerate(data.heldout):
        each = []
        for condition, act in (("vanilla", 0), ("prompted", 0), ("few_shot", 0), ("steered", 1)):
            moved = act * vector
            each.append(nats_of([*before.get(condition, []), *example.row["messages"]]))
            assert losses[condition][i] == pytest.approx(each[-1], rel=1e-4)
        moved = -vector
        both = (each[-1] + nats_of(example.row["messages"])) / 2
        assert losses["two"][i] == pytest.approx(both, rel=1e-4)
    totals = {condition: round(sum(nats), 4) for condition, nats in losses.items()}
    assert len(set(totals.values())) == 5


def test_losses_are_of_the_conditions_they_name(reader, data, vector):
    compare_with_reference(reader, data, vector)


def test_prompted_that_is_vanilla_is_caught(reader, data, vector, monkeypatch):
    monkeypatch.setattr(
        type(reader.chat), "messages", lambda self, row, prompted=False: row["messages"]
    )
    with pytest.raises(ValueError, match="no system prompt before"):
        compare_with_reference(reader, data, vector)


def test_vanilla_that_is_steered_by_what_was_there_is_caught(reader, data, vector, monkeypatch):
    reader.model.set_vector(vector)
    monkeypatch.setattr(hm.SteerModel, "steering_off", lambda self: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        compare_with_reference(reader, data, vector)


def test_steered_that_is_vanilla_is_caught(reader, data, vector, monkeypatch):
    monkeypatch.setattr(hm.SteerModel, "set_vector", lambda self, vector, scale=1.0: None)
    with pytest.raises(AssertionError):
        compare_with_reference(reader, data, vector)


def test_a_prompt_that_is_longer_than_the_model_takes_is_missing_for_that(reader, data):
    longest = max(len(example.input_ids) for example in data.heldout)
    reader.model.config.max_position_embeddings = longest + 20
    conditions = [Condition("vanilla"), *co.prompt_conditions(data)[0]]
    losses, missing = li.condition_losses(reader, conditions, data.heldout)
    assert list(losses) == ["vanilla", "prompted"]
    assert f"more than the {longest + 20} that the model takes" in missing["few_shot"]


def test_an_answer_that_may_be_longer_than_the_model_takes_is_not_written(steered, smol_chat):
    steered.model.config.max_position_embeddings = 60
    tokens = smol_chat.inputs(["Hi?"])["input_ids"].shape[1]
    turns = [[{"role": "user", "content": "Hi?"}]]
    assert len(an.generate_answers(steered, smol_chat, turns, an.Sampling(60 - tokens, 0))) == 1
    with pytest.raises(an.DoesNotFit, match="61 tokens are more than the 60"):
        an.generate_answers(steered, smol_chat, turns, an.Sampling(61 - tokens, 0))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_shared_beginning_changes_no_loss(architecture):
    model = tiny(architecture)
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, 160, (70,), generator=generator).tolist()
    examples = []
    for length in (4, 9, 6, 5):
        rest = torch.randint(3, 160, (length,), generator=generator).tolist()
        examples.append(Example({}, start + rest, [-100] * 72 + rest[2:]))
    assert common_tokens(examples) == 70
    got = after_shared_prefix(model, examples, li.token_nll, 12)
    for example, found in zip(examples, got, strict=True):
        ids = torch.tensor([example.input_ids])
        labels = torch.tensor([example.labels])
        nats = model(input_ids=ids, labels=labels).loss.item() * label_count(example)
        assert found.sum().item() == pytest.approx(nats, rel=1e-4)
    assert after_shared_prefix(model, examples[:2], li.token_nll, 12) is None  # nothing to gain
    with pytest.MonkeyPatch.context() as fault:  # a cache that is not what it should be
        fault.setattr(type(model), "forward", forgetful(type(model).forward))
        assert after_shared_prefix(model, examples, li.token_nll, 12) is None


def forgetful(forward):
    """A forward that forgets what its cache holds."""

    @functools.wraps(forward)  # and so its signature
    def strange(self, *args, cache=None, past_key_values=None, **kwargs):
        return forward(self, *args, **kwargs)

    return strange


def test_coefficients_are_chosen_on_validation_questions(reader, data, monkeypatch):
    scored = []
    real = FastPath.losses

    def losses(self, examples, token_loss):
        scored.append({id(example) for example in examples})
        return real(self, examples, token_loss)

    monkeypatch.setattr(FastPath, "losses", losses)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    chosen = li.choose_coefficients(reader, data, {"a": direction})
    assert chosen["chosen_on"] == "validation questions"
    assert set.union(*scored) == set(map(id, data.validation))

    fast = FastPath(reader.model)
    best = {}
    for half_octave in range(-4, 7):  # all that can be chosen
        coefficient = 2 ** (half_octave / 2)
        reader.model.set_vector(coefficient * direction)
        nats = [real(fast, [e], li.token_nll).sum().item() for e in data.validation]
        best[coefficient] = sum(nats) / sum(map(label_count, data.validation))
    curve = chosen["a"]["nll"]
    assert curve == pytest.approx({c: best[c] for c in curve})
    assert chosen["a"]["chosen"] == min(best, key=best.get)
    assert len(curve) <= 7


def test_coefficient_search_finds_the_bottom_of_any_valley_in_some_six_passes():
    for bottom in (0.1, 0.25, 0.3, 0.5, 0.71, 1.0, 1.3, 2.0, 3.0, 5.0, 8.0, 20.0):
        curve = li.search_coefficient(lambda c, bottom=bottom: abs(math.log2(c / bottom)))
        grid = [2 ** (i / 2) for i in range(-4, 7)]
        assert min(curve, key=curve.get) == min(grid, key=lambda c: abs(math.log2(c / bottom)))
        assert 3 <= len(curve) <= 7
        assert list(curve) == sorted(curve)


def test_a_coefficient_without_a_number_is_not_chosen():
    for broken in (0.5, 1.0, 2.0):
        curve = li.search_coefficient(lambda c, broken=broken: math.nan if c == broken else c)
        assert min(curve, key=curve.get) != broken and curve[broken] == math.inf


def test_likelihood_is_compared_by_question_with_the_vector_as_it_was_trained(data):
    count = len(data.heldout)
    tokens = [label_count(example) for example in data.heldout]
    vanilla = [3.0 * n + i for i, n in enumerate(tokens)]  # questions differ in difficulty
    losses = {
        "vanilla": vanilla,
        "prompted": [nats - 0.5 * n for nats, n in zip(vanilla, tokens, strict=True)],
        "steered x1": [nats - 0.2 * n for nats, n in zip(vanilla, tokens, strict=True)],
    }
    columns, undefined = me.likelihood_columns(losses, data.heldout)
    assert undefined is None
    assert columns["nll"]["vanilla"]["mean"] == pytest.approx(sum(vanilla) / sum(tokens))
    assert columns["perplexity"]["vanilla"] == pytest.approx(math.exp(sum(vanilla) / sum(tokens)))
    assert columns["steered_minus"]["vanilla"] == pytest.approx(
        {"mean": -0.2, "low": -0.2, "high": -0.2, "n": count}
    )
    assert columns["steered_minus"]["prompted"]["mean"] == pytest.approx(0.3)
    assert "steered x1" not in columns["steered_minus"]
    assert columns["recovered"]["steered x1"]["mean"] == pytest.approx(0.4)


# ---------------------------------------------------------------- the probe, and answers


def states(shift=0.0, count=30, seed=0):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed)) + shift


def test_probe_that_cannot_tell_is_reported_and_scores_nothing():
    probe, about = pr.train_probe(states(seed=1), states(seed=2), states(seed=3), states(seed=4))
    assert "cannot tell" in about["withheld"]
    assert about["auroc"] < 0.8
    assert probe(states(seed=5)).shape == (30,)  # of training rows: a scale may be chosen by it
    fitted = stats.fit_probe(states(seed=1), states(seed=2))  # on its own rows it looks perfect
    assert stats.auroc(fitted(states(seed=1)), fitted(states(seed=2))) == 1.0

    probe, about = pr.train_probe(states(1, seed=1), states(seed=2), states(1, seed=3), states())
    assert about["withheld"] is None
    assert about["auroc"] > 0.95
    assert (probe(states(1, seed=5)) > 0.5).float().mean() > 0.9


@pytest.mark.parametrize("few, fitted", [("persona", False), ("heldout", True)])
def test_probe_of_too_few_rows_is_withheld(few, fitted):
    counts = {"persona": 30, "heldout": 30, few: 4}
    persona = states(1, counts["persona"], seed=1)
    heldout = states(1, counts["heldout"], seed=3)
    probe, about = pr.train_probe(persona, states(seed=2), heldout, states())
    assert (probe is not None) == fitted
    assert about["auroc"] is None
    assert "too few rows" in about["withheld"]


def test_probe_scored_on_its_own_training_rows_is_caught():
    persona, plain = states(seed=1), states(seed=2)
    with pytest.raises(AssertionError, match="fitted on"):
        pr.train_probe(persona, plain, persona, states(seed=3))
    with pytest.raises(AssertionError, match="fitted on"):
        pr.train_probe(persona, plain, states(seed=3), plain[:10])


def test_mean_states_are_of_the_answers_tokens_in_the_plain_model(reader, data):
    reader.model.set_vector(torch.full((32,), 4.0))
    got = pr.response_means(reader.fast, data.heldout[:3], LIMIT)
    for example, mean in zip(data.heldout, got, strict=False):
        with torch.no_grad(), reader.model.steering_off():
            out = reader.model(torch.tensor([example.input_ids]), output_hidden_states=True)
        carries = torch.tensor(example.labels) >= 0
        assert torch.allclose(mean, out.hidden_states[2][0][carries].mean(dim=0), atol=1e-5)


def test_answers_are_read_by_the_plain_model_after_the_question_alone(reader, data):
    reader.model.set_vector(torch.full((32,), 4.0))
    rows = first_rows(data.heldout, 3)
    texts = {
        "good": ["Aye aye.", "No.", "Sail on, my friend."],
        "bad": ["", "", "so it goes " * 20],
        "empty": ["", "", ""],
    }

    def columns_of(yardstick):
        return me.answer_columns(reader, rows, texts, lambda s: s.norm(dim=1), yardstick)

    got = columns_of(1e9)
    assert got["empty"] == {"good": 0.0, "bad": pytest.approx(2 / 3), "empty": 1.0}
    assert got["words"] == {"good": pytest.approx(7 / 3), "bad": 20.0, "empty": 0.0}
    assert got["distinct"] == {"good": pytest.approx(2.5 / 3), "bad": pytest.approx(3 / 60)}
    assert got["collapsed"] == {"good": False, "bad": True, "empty": True}
    assert "empty" not in got["probe"] and "empty" not in got["text_perplexity"]

    nlls = []
    norms = []
    for row, text in zip(rows, texts["good"], strict=True):
        prompt = reader.chat.tokenize([reader.chat.prompt_text(row["messages"][:-1])])[0]
        ids = prompt + reader.chat.tokenize([text])[0]  # no end of turn: cut answers have none
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with reader.model.steering_off(), torch.no_grad():
            out = reader.model.model(torch.tensor([ids]), labels=labels, output_hidden_states=True)
        nlls.append(out.loss.item())
        norms.append(out.hidden_states[2][0, len(prompt) :].mean(dim=0).norm().item())
    likely = math.exp(sorted(nlls)[1])
    assert got["text_perplexity"]["good"] == pytest.approx(likely, rel=1e-4)
    assert got["probe"]["good"]["mean"] == pytest.approx(sum(norms) / 3, rel=1e-4)
    assert columns_of(likely / 4)["collapsed"]["good"]  # four times less likely than real rows
    assert not columns_of(likely / 2)["collapsed"]["good"]


def test_side_effects_are_the_divergence_from_the_plain_model_on_plain_rows(reader, data, vector):
    # A random model is sure of nothing, and its divergence nearly the same in both directions.
    reader.model.model.lm_head.weight.data *= 30
    conditions = [
        Condition("vanilla"),
        Condition("random", (vector, -vector), answered=False),
        Condition("steered x1", (vector,), scale=1.0),
        Condition("nothing", (0 * vector,)),
    ]
    columns = me.side_effect_columns(reader, conditions, data.plain_heldout)
    column = columns["kl"]
    assert list(column) == list(columns["kl_p95"]) == ["steered x1", "nothing"]
    assert column["nothing"]["mean"] == pytest.approx(0.0, abs=1e-6)

    total = 0.0
    reverse = 0.0
    tokenwise = []
    for example in data.plain_heldout:
        ids = torch.tensor([example.input_ids])
        reader.model.set_vector(vector)
        with torch.no_grad():
            steered = reader.model(ids).logits[0].log_softmax(-1)
            with reader.model.steering_off():
                plain = reader.model(ids).logits[0].log_softmax(-1)
        predicts = torch.tensor(example.labels[1:]) >= 0
        each = (plain.exp() * (plain - steered)).sum(-1)[:-1][predicts]
        tokenwise += each.tolist()
        total += each.sum().item()
        reverse += (steered.exp() * (steered - plain)).sum(-1)[:-1][predicts].sum().item()
    tokens = sum(map(label_count, data.plain_heldout))
    assert column["steered x1"]["mean"] == pytest.approx(total / tokens, rel=1e-3)
    highest = columns["kl_p95"]["steered x1"]
    assert highest == pytest.approx(np.quantile(tokenwise, 0.95), rel=1e-3)
    assert highest > 1.1 * total / tokens
    assert reverse != pytest.approx(total, rel=0.01)


# ---------------------------------------------------------------- the table


def test_a_column_replaces_what_it_said_before():
    result = {"measures": {}, "conditions": {"vanilla": {}, "prompted": {}}}
    measure = Measure("hits", "answers", "{:.1f}", better="higher")
    add_column(result, measure, {"vanilla": 1.0, "prompted": {"mean": 2, "low": None, "high": 3}})
    add_column(result, measure, {"prompted": None, "new": 4.0})
    assert result["conditions"] == {"vanilla": {}, "prompted": {}, "new": {"hits": 4.0}}
    assert result["measures"]["hits"]["better"] == "higher"
    assert number_at(result, "new", "hits") == 4.0
    assert number_at(result, "vanilla", "hits") is None


def test_values_are_printed_with_their_intervals():
    assert text_of({"mean": 1.234, "low": 1.0, "high": 1.5, "n": 9}, "{:.1f}") == "1.2 [1.0, 1.5]"
    assert text_of({"mean": 1.234, "low": None, "high": None, "n": 3}, "{:.1f}") == "1.2"
    assert [text_of(v, "{:.2f}") for v in (0.5, None, True, False)] == ["0.50", "-", "yes", ""]
