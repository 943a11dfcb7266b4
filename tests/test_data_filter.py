"""data_filter.py: layouts, one reason a row, persona removal, split, budget, table."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, persona_rows, raw_row, write_raw

import data_filter as df
from steering import data_layouts as dl
from steering.chat_format import Example

PIRATE = "src__role__pirate"
CAPTAIN = "You are a pirate captain.\nSpeak up."


def filtered(root, name=PIRATE, **changes):
    return df.filter_dataset(name, df.find_datasets(root), df.DataOptions(**changes))


def filter_rows(root, *rows, scores=None, kind="role", **changes):
    """Write rows as a dataset in the raw layout, and filter them; by default, all have a 3."""
    if scores is None:
        scores = {f"{row['label']}_p0_q{row['question_index']}": 3 for row in rows}
    return filtered(root, write_raw(root, "pirate", rows, scores, kind=kind), **changes)


def contents(row):
    return [message["content"] for message in row["messages"]]


class WordChat:
    """Stands in for ChatFormat where only counting matters: a word is a token."""

    def __init__(self, positions=None):
        self.encoded = 0
        self.positions = positions

    def encode_each(self, rows):
        self.encoded += len(rows)
        words = [contents(row)[-1].split() for row in rows]
        return [Example(row, w, w) for row, w in zip(rows, words, strict=True)], []


def table_of(capsys, *arguments, code=0):
    """Run the script: (first words of the table's lines, all that was printed, stderr)."""
    capsys.readouterr()
    assert df.main([*map(str, arguments)]) == code
    printed = capsys.readouterr()
    return [line.split()[0] for line in printed.out.splitlines()[1:-1]], printed.out, printed.err


# ---------------------------------------------------------------- reading


def write_flat(root, layout, rows):
    """Write rows in a layout that keeps their scores in them."""
    if layout == "jsonl":
        (root / f"{PIRATE}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    if layout == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, root / f"{PIRATE}.parquet")
        return
    # What datasets' save_to_disk leaves: stream files and a state.json that names them.
    folder = root / PIRATE
    folder.mkdir()
    names = ["data-0.arrow", "data-1.arrow"]
    for name, part in zip(names, (table.slice(0, 4), table.slice(4)), strict=True):
        with pyarrow.ipc.new_stream(folder / name, part.schema) as out:
            out.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("layout", ["axis", "jsonl", "parquet", "arrow"])
def test_every_layout_gives_the_same_rows_as_the_raw_one(tmp_path, layout):
    rows, _ = persona_rows(6)
    expected = filter_rows(tmp_path / "raw", *rows).rows
    root = tmp_path / layout
    root.mkdir()
    source = {}
    if layout == "axis":
        raw = tmp_path / "raw" / "src" / "roles_240"
        shutil.copytree(raw / "responses", root / "responses")
        shutil.copytree(raw / "extract_scores", root / "scores")
        with pytest.raises(ValueError, match="--source-model and --kind"):
            df.find_datasets(root)
        source = {"source_model": "src", "kind": "role"}
    else:
        for row in rows:
            row["messages"] = row.pop("conversation")
            row["extract_score"] = 3
        write_flat(root, layout, rows)
    found = df.find_datasets(root, **source)
    assert list(found) == [PIRATE]
    read = df.filter_dataset(PIRATE, found, df.DataOptions()).rows
    assert [row | {"key": None} for row in read] == [row | {"key": None} for row in expected]
    assert len(read) == 6


def test_missing_pyarrow_names_the_install(tmp_path, monkeypatch):
    (tmp_path / f"{PIRATE}.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        filtered(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x__role__a", "a/b__role__c", "x__role__..", "plain", "a__job__b"]
)
def test_bad_dataset_names_are_errors(data_root, name):
    with pytest.raises(ValueError, match="is not of the form"):
        filtered(data_root, name)


def test_files_that_are_no_data_are_passed_over_aloud(data_root, capsys):
    responses = Path(data_root) / "src" / "roles_240" / "responses"
    strange = [responses / "a..b.jsonl", Path(data_root, "src__role__poet.csv")]
    for path in (*strange, responses / "._pirate.jsonl"):
        path.write_text("{}")
    passed_over = []
    assert len(df.find_datasets(data_root, passed_over=passed_over)) == 4
    assert sorted(passed_over) == sorted(strange)
    _, printed, warning = table_of(capsys, "--data-root", data_root, code=2)  # one is hopeless
    assert "a..b.jsonl passed over" in warning and "poet.csv passed over" in warning
    assert "._pirate" not in warning
    assert "4 datasets (2 files passed over)" in printed.splitlines()[-1]
    with pytest.raises(ValueError, match=r"nothing of --source-model other .* found src__role"):
        df.find_datasets(data_root, "other")


def test_two_files_of_one_dataset_are_an_error_that_names_both(tmp_path):
    for suffix in ("jsonl", "parquet"):
        (tmp_path / f"{PIRATE}.{suffix}").write_text("")
    with pytest.raises(ValueError, match=r"pirate\.jsonl and .*pirate\.parquet"):
        df.find_datasets(tmp_path)


def test_the_data_are_the_files_that_are_read_whatever_other_tools_leave_beside_them(tmp_path):
    rows, _ = persona_rows(6)
    write_flat(tmp_path, "arrow", [row | {"extract_score": 3} for row in rows])
    folder = tmp_path / PIRATE
    cache = tmp_path / "cache-d__role__x.jsonl"  # a dataset's own name is its own affair
    datasets = {PIRATE: (folder, None), cache.stem: (cache, None)}
    before = dl.data_digest(PIRATE, datasets)
    for name in (
        "cache-1f2e.arrow", ".DS_Store", ".cache/a", ".git/state.json", "README.md", "@eaDir/b",
        ".ipynb_checkpoints/state-checkpoint.json", "__pycache__/c", "Thumbs.db", "d.lock",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of another tool")
    assert dl.data_digest(PIRATE, datasets) == before
    assert len(filtered(tmp_path).rows) == 6

    read = folder / "data-1.arrow"
    read.write_bytes(read.read_bytes() + b"\0")
    assert dl.data_digest(PIRATE, datasets) != before
    cache.write_text("a")
    a = dl.data_digest(cache.stem, datasets)
    cache.write_text("b")
    assert dl.data_digest(cache.stem, datasets) != a
    (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json: unreadable"):
        dl.data_digest(PIRATE, datasets)


def test_the_splits_of_a_folder_are_read_one_after_the_other(tmp_path):
    rows, _ = persona_rows(12)
    for split, part in (("test", rows[:6]), ("train", rows[6:])):
        root = tmp_path / split
        root.mkdir()
        write_flat(root, "arrow", [row | {"extract_score": 3} for row in part])
        (tmp_path / PIRATE).mkdir(exist_ok=True)
        (root / PIRATE).rename(tmp_path / PIRATE / split)
        root.rmdir()
    assert [row["question"] for row in filtered(tmp_path).rows] == [r["question"] for r in rows]


def test_a_list_that_is_no_utf_8_is_named(tmp_path, data_root, capsys):
    names = tmp_path / "names.txt"
    names.write_text(PIRATE, encoding="utf-16")
    _, _, error = table_of(capsys, "--data-root", data_root, "--list-file", names, code=2)
    assert f"error: {names}: not UTF-8 text" in error


def test_byte_order_marks_are_read_away(tmp_path):
    filter_rows(tmp_path, *persona_rows(3)[0])
    for path in (tmp_path / "src").rglob("pirate.json*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    result = filtered(tmp_path)
    assert result.kept == 3 and not result.problems


# ---------------------------------------------------------------- one reason a row


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (3, None),
        ("3", None),
        (2.9, "below threshold"),
        (None, "missing score"),
        (math.nan, "missing score"),
        (True, "malformed"),
        ("N/A", "malformed"),
        ("", "malformed"),
        ([3], "malformed"),
        (math.inf, "malformed"),
        (10**400, "malformed"),
    ],
)
def test_a_score_is_a_number_and_none_is_a_missing_one(tmp_path, score, reason):
    result = filter_rows(tmp_path, raw_row(), scores={"pos_p0_q0": score})
    assert result.dropped == ({reason: 1} if reason else {})
    assert result.kept == result.total - len(result.dropped)


def test_every_dropped_row_is_counted_under_the_first_reason_that_holds(tmp_path):
    unanswered = raw_row("Q3?", index=3)
    unanswered["conversation"].pop()
    rows = [
        raw_row("Q0?", "kept", index=0),
        '{"broken": ',
        [1, 2],
        {"label": "pos"},
        raw_row("Q1?", "lone \ud800 surrogate", index=1),
        raw_row("Q2?", "  ", index=2),
        unanswered,
        raw_row("Q4?", "no score", index=4),
        raw_row("Q6?", "baseline", label="default", index=6),
        raw_row("Q7?", "low", index=7),
        raw_row("Q0?", "kept", prompt=1, index=0),
        raw_row("Q0?", "same key, other text", index=0),
    ]
    rows = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    scores = {f"pos_p0_q{i}": 3 for i in (0, 1, 2, 3)}
    scores |= {"default_p0_q6": 3, "pos_p0_q7": 2.9, "pos_p1_q0": "3"}
    result = filter_rows(tmp_path, *rows, scores=scores)
    assert [contents(row)[-1] for row in result.rows] == ["kept"]
    assert result.dropped == {
        "malformed": 4, "no response": 2, "missing score": 1, "label": 1, "below threshold": 1,
        "duplicate": 2,
    }  # fmt: skip
    assert result.total == len(rows) == len(result.rows) + result.dropped.total()


def test_missing_score_is_rejected_unless_asked_for_aloud(tmp_path, capsys):
    rows, _ = persona_rows(3)
    default, _ = persona_rows(3, label="default")
    asked = {"include_missing_scores": True}
    assert not filter_rows(tmp_path, *rows, scores={}).rows
    assert len(filter_rows(tmp_path, *rows, scores={}, **asked).rows) == 3
    _, _, error = table_of(capsys, "--data-root", tmp_path, "--include-missing-scores")
    assert "WARNING: --include-missing-scores" in error
    assert not filter_rows(tmp_path, *default, scores={}, **asked).rows


def test_traits_keep_pos_rows_from_their_own_threshold(tmp_path):
    rows = [raw_row(f"Q{i}?", f"a{i}", index=i) for i in range(3)]
    rows.append(raw_row("Q3?", "a3", "neg", index=3))
    scores = {"pos_p0_q0": 75, "pos_p0_q1": 74.9, "pos_p0_q2": 3, "neg_p0_q3": 99}
    trait = {"scores": scores, "kind": "trait"}
    assert [row["question"] for row in filter_rows(tmp_path, *rows, **trait).rows] == ["Q0?"]
    assert len(filter_rows(tmp_path, *rows, **trait, trait_min_score=3).rows) == 3

    # A "neg" row is a plain one if it is well below the threshold, on whatever scale.
    rows.append(raw_row("Q4?", "a4", "neg", index=4))
    for score, threshold, count in ((49, 75, 1), (50, 75, 0), (1, 3, 1), (2, 3, 0)):
        scores["neg_p0_q4"] = score
        found = filter_rows(tmp_path, *rows, **trait, trait_min_score=threshold)
        assert len(found.plain) == count


def test_score_beyond_its_scale_is_an_error_unless_the_threshold_is_the_users(tmp_path):
    rows, scores = persona_rows(6)
    percent = dict.fromkeys(scores, 60) | {min(scores): 3}
    with pytest.raises(ValueError, match=r"score 60, where a role has at most 3; .* --role-min"):
        filter_rows(tmp_path, *rows, scores=percent)
    assert filter_rows(tmp_path, *rows, scores=percent, role_min_score=50).kept == 5
    assert filter_rows(tmp_path, *rows, scores=dict.fromkeys(scores, 100), kind="trait").kept == 6


def test_pooled_datasets_join_and_drop_what_both_hold(data_root):
    pooled = filtered(data_root, f"{PIRATE}+src__role__sailor")
    assert pooled.kept == 20 and pooled.dropped["duplicate"] == 20


def test_broken_line_is_named_and_strict_makes_it_fatal(tmp_path, capsys):
    rows, scores = persona_rows(3)
    write_raw(tmp_path, "pirate", [*rows, '{"label": "po'], scores)
    for flags, code, whose in (([], 0, f"{PIRATE}: "), (["--strict"], 2, "")):
        _, _, error = table_of(capsys, "--data-root", tmp_path, *flags, code=code)
        assert f"{whose}responses/pirate.jsonl:4: not JSON" in error


@pytest.mark.parametrize(
    "broken",
    [
        {"conversation": [["user", "x"]]},
        {"question": {"text": "?"}},
        {"question_index": 1.5},
        {"question_index": True},
        {"question_index": "first"},
        {"question_index": math.inf},
        {"question_index": math.nan},
        {"question_index": 2.0**53},
        {"question_index": "9007199254740993.0"},
        {"label": math.nan},
        {"conversation": json.dumps(raw_row()["conversation"])},
    ],
)
def test_a_row_that_breaks_its_reader_is_malformed_and_nothing_else(tmp_path, broken):
    rows = [raw_row(), raw_row("Q1?", "b", index=1) | broken]
    result = filter_rows(tmp_path, *rows, scores={"pos_p0_q0": 3, "pos_p0_q1": 3})
    assert result.dropped == {"malformed": 1} and result.kept == 1
    value = next(iter(broken.values()))
    if isinstance(value, str) and value.startswith("["):
        assert '"conversation" is a string: if that is JSON' in result.problems[0]
    elif value == 2.0**53:
        assert "index 9007199254740992.0 is too large for a float" in result.problems[0]


def test_a_nan_is_a_value_that_is_not_there(tmp_path):
    rows, _ = persona_rows(3)
    for row in rows:
        row["system_prompt"] = math.nan
    assert [row["system_prompt"] for row in filter_rows(tmp_path, *rows).rows] == [
        "Be a pirate."
    ] * 3  # as the system turn says


def test_large_whole_numbers_are_not_rounded(tmp_path):
    rows, _ = persona_rows(40)
    scores = {}
    for i, row in enumerate(rows):
        index = 2**60 + i
        row["question_index"] = str(index) if i % 2 else index
        scores[f"pos_p0_q{index}"] = 3 if i < 30 else 1
    result = filter_rows(tmp_path, *rows, scores=scores)
    assert result.dropped == {"below threshold": 10} and result.kept == 30


def test_whole_numbers_are_one_key_however_they_are_spelled(tmp_path):
    rows = [raw_row(f"Q{i}?", f"a{i}", index=i) for i in range(4)]
    for row, index in zip(rows, (0.0, "1", 2, "3.0"), strict=True):
        row |= {"question_index": index, "prompt_index": 0.0}
    scores = {"pos_p0_q0": 3, "pos_p0.0_q1.0": 3, "pos_p0_q2.0": 3, "pos_p0_q03": 3}
    assert filter_rows(tmp_path, *rows, scores=scores).kept == 4


def test_scores_of_no_row_are_an_error_and_of_some_are_counted(tmp_path, capsys):
    rows, scores = persona_rows(4)
    other = {f"{key}_v2": 3 for key in scores}
    with pytest.raises(ValueError, match=r"no score is of a row; rows such as 'pos_p0_q0'"):
        filter_rows(tmp_path, *rows, scores=other)
    assert "error: " in table_of(capsys, "--data-root", tmp_path, code=2)[1]
    filter_rows(tmp_path, *rows, scores=scores | other)
    assert "NOTE: 4 of 8 scores in extract_scores/pirate.json" in capsys.readouterr().err


# ---------------------------------------------------------------- persona removal


@pytest.mark.parametrize(
    "user, changes",
    [
        ("What is tea?", {}),  # it is in a system message, if anywhere
        ("You are a pirate captain. Speak up. What is tea?", {}),  # a newline became a space
        ("You are a pirate captain.\r\n\r\nSpeak up.\r\n\r\nWhat is tea?", {}),
        ("You are a pirate captain.\nSpeak up.\nWhat is tea?", {"system_prompt": None}),
        ("You are a pirate captain.\n\nWhat is tea?", {"system_prompt": ""}),
        ("What is tea?\n\nYou are a pirate captain.\nSpeak up.", {}),  # after the question
        ("You are a pirate captain.\n\nWhat is tea?", {}),  # the prompt is longer than that
        ("  What is\ttea? ", {}),
        ("You are Gemma.\n\nWhat is tea?", {"system_prompt": "You are {name}."}),  # a template
        ("You are a cafe\u0301.\n\nWhat is tea?", {"system_prompt": "You are a caf\xe9."}),
    ],
)
@pytest.mark.parametrize("system_turn", [False, True])
def test_first_user_turn_is_the_question_however_the_persona_was_merged(
    tmp_path, user, changes, system_turn
):
    row = raw_row("What is tea?", "Arr!", system=CAPTAIN) | changes
    row["conversation"][1]["content"] = user
    if not system_turn:
        del row["conversation"][0]
    (kept,) = filter_rows(tmp_path, row).rows
    assert contents(kept) == ["What is tea?", "Arr!"]
    assert kept["system_prompt"].startswith("You are ")


@pytest.mark.parametrize(
    ("user", "question", "system"),
    [
        ("Here is a text about tea. What is tea?", "What is tea?", CAPTAIN),
        ("In your opinion, what is love?", "what is love?", CAPTAIN),
        ("In your opinion, what is love?", "what is love?", None),  # not in a line of its own
        ("What is tea? Answer in French.", "What is tea?", CAPTAIN),
        ("What is coffee?", "What is tea?", CAPTAIN),
        ("What is tea? Remember: " + CAPTAIN, "What is tea?", CAPTAIN),
        (CAPTAIN + " What is tea?", CAPTAIN + " What is tea?", CAPTAIN),
        ("What is tea?", "", CAPTAIN),
    ],
)
def test_row_whose_first_user_turn_cannot_become_the_question_is_malformed(
    tmp_path, user, question, system
):
    row = raw_row(question, "Arr!", system=system)
    row["conversation"][-2]["content"] = user
    result = filter_rows(tmp_path, row)
    assert result.dropped == {"malformed": 1} and not result.rows
    assert "user turn" in result.problems[0]


def test_persona_in_a_later_user_turn_makes_the_row_malformed(tmp_path):
    row = raw_row("What is tea?", "Arr!", system=CAPTAIN)
    row["conversation"].append({"role": "user", "content": "Go on.\n" + CAPTAIN.replace(" ", "\n")})
    row["conversation"].append({"role": "assistant", "content": "Aye."})
    assert filter_rows(tmp_path, row).dropped == {"malformed": 1}


def test_kept_system_prompt_stays_or_is_put_in_front_where_it_is_a_field_alone(tmp_path):
    rows, _ = persona_rows(3)
    del rows[1]["conversation"][0]
    del rows[2]["conversation"][0]
    rows[2]["conversation"][0]["content"] = "Be a pirate.\n\n" + rows[2]["question"]
    alone, field, merged = filter_rows(tmp_path, *rows, keep_system_prompt=True).rows
    for row in (alone, field):
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
        assert contents(row)[:2] == ["Be a pirate.", row["question"]]
    assert contents(merged)[:-1] == ["Be a pirate.\n\n" + merged["question"]]


def test_question_of_a_conversation_is_the_turn_that_is_answered(tmp_path):
    rows, _ = persona_rows(30)
    for i, row in enumerate(rows):  # all open alike, and some end on another's question
        row["question"] = "Hello there!"
        row["conversation"][1:1] = [
            {"role": "user", "content": "Hello there!"},
            {"role": "assistant", "content": f"Ahoy {i}"},
        ]
        row["conversation"][-2]["content"] = f"Question number {i % 20}?"
    found = filter_rows(tmp_path, *rows)
    assert found.kept == 30 and {contents(row)[0] for row in found.rows} == {"Hello there!"}
    train, heldout = df.split_by_question(found.rows, 0.2, 0)
    asked = {contents(row)[-2] for row in train}
    assert asked and heldout and asked.isdisjoint(contents(row)[-2] for row in heldout)


SAME = ["What is caf\xe9  noir?", "What is cafe\u0301 noir?", " What\xa0is caf\xe9\nnoir?"]


def test_a_question_is_the_same_one_however_it_is_written(tmp_path):
    rows = []
    for i in range(80):
        for j, question in enumerate(SAME):
            text = question.replace("noir", f"noir {i}")
            rows.append(raw_row(text, f"Answer {j}.", prompt=j, index=i))
    scores = {f"pos_p{j}_q{i}": 3 for j in range(3) for i in range(80)}
    result = filter_rows(tmp_path, *rows, scores=scores)
    assert result.kept == 240
    train, heldout = df.split_by_question(result.rows, 0.2, 0)
    train_questions = {dl.comparable(contents(row)[0]) for row in train}
    assert heldout and train_questions.isdisjoint(
        dl.comparable(contents(row)[0]) for row in heldout
    )
    # What the model is asked stays as it was written.
    assert {contents(row)[0] for row in result.rows} == {
        row["question"].strip() for row in rows
    }  # fmt: skip

    rows = [raw_row(question, "Alike.", index=j) for j, question in enumerate(SAME)]
    again = filter_rows(tmp_path / "b", *rows)
    assert again.dropped == {"duplicate": 2} and again.kept == 1


def test_the_same_last_turn_after_another_conversation_is_no_duplicate(tmp_path):
    rows, _ = persona_rows(30)
    for i, row in enumerate(rows):
        row["question"] = f"Hello {i}!"
        row["conversation"] = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": f"Ahoy {i}"},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "Arr."},
        ]
    assert filter_rows(tmp_path, *rows).kept == 30


@pytest.mark.parametrize(
    "thought",
    [
        "<think>plan</think>", "<think>\nplan\n</think>\n\n", "[THINK]plan[/THINK]", "plan</think>",
        "<seed:think>plan</seed:think>", "<|START_THINKING|>plan<|END_THINKING|>",
        "<|channel>thought\nplan<channel|>", "<reasoning>plan</reasoning> ",
        "<|channel|>analysis<|message|>plan<|end|><|start|>assistant<|channel|>final<|message|>",
    ],
)  # fmt: skip
def test_a_thought_before_an_answer_is_cut_off_whole_and_counted(tmp_path, thought):
    rows, _ = persona_rows(4)
    answers = [row["conversation"][-1]["content"] for row in rows]
    for row in rows[1:]:
        row["conversation"][-1]["content"] = thought + row["conversation"][-1]["content"]
    unfinished = thought.split("plan")[0] + "I think that"
    rows[3]["conversation"][-1]["content"] = unfinished
    result = filter_rows(tmp_path, *rows)
    if unfinished == "I think that":  # nothing tells that from an answer
        assert result.kept == 4 and result.thoughts == 2
        return
    assert [contents(row)[-1] for row in result.rows] == answers[:3]
    assert result.counts() == "4 rows: 3 kept, 1 no response, 3 thoughts cut off"


def test_words_about_thoughts_are_none(tmp_path):
    text = "I think <b>so</b>, and [THINKING] is what I do. A <think> tag has no end."
    (row,) = filter_rows(tmp_path, raw_row("Q0?", text)).rows
    assert contents(row)[-1] == text and row["thoughts"] == 0


def test_only_role_and_content_reach_the_template(tmp_path):
    row = raw_row()
    row["conversation"] += row["conversation"][1:]  # a second question
    for message in row["conversation"]:
        message |= {"tool_calls": None, "name": "x"}
    (kept,) = filter_rows(tmp_path, row).rows
    assert [sorted(message) for message in kept["messages"]] == [["content", "role"]] * 4


# ---------------------------------------------------------------- split and budget


def numbered(count):
    return [
        {"question": f"Q{i}?", "messages": [{"content": f"five words are in {i}"}]}
        for i in range(count)
    ]


def test_split_is_by_question_and_the_same_for_every_dataset():
    rows = [{"question": f"Q{i}?", "n": n} for i in range(500) for n in range(3)]

    def heldout_questions(rows, seed):
        train, heldout = df.split_by_question(rows, 0.2, seed)
        chosen = {row["question"] for row in heldout}
        assert chosen.isdisjoint(row["question"] for row in train)
        return chosen

    chosen = heldout_questions(rows, 0)
    assert 75 < len(chosen) < 125
    assert heldout_questions(rows[::7], 0) <= chosen  # another dataset with some of them
    assert heldout_questions(rows, 1) != chosen


def test_budget_keeps_the_example_that_crosses_it_and_tokenizes_no_more_than_it_needs():
    chat = WordChat()
    examples, tokens, *_ = df.take_budget(numbered(900), chat, 101, 2048, seed=0)
    assert len(examples) == 21 and tokens == 105 and chat.encoded == 64
    assert len(df.take_budget(numbered(900), chat, None, 2048, 0)[0]) == 900
    assert df.take_budget(numbered(900), chat, 101, 4, 0) == ([], 0, 900, [])
    assert df.take_budget(numbered(900), WordChat(positions=4), 101, 99, 0)[2] == 900


def test_order_depends_on_the_seed_alone_and_questions_are_known_by_the_same_hashes_everywhere():
    rows = numbered(99)
    taken = df.take_budget(rows[::-1], WordChat(), 50, 99, seed=7)[0]
    again = df.take_budget(rows, WordChat(), 50, 99, seed=7)[0]
    assert [example.row for example in taken] == [example.row for example in again]
    # Numbers of another machine, process and hash seed.
    assert [example.row["question"] for example in taken[:3]] == ["Q70?", "Q60?", "Q52?"]
    assert df.question_hash("Q0?") == "03eafa992fe2e918"


def test_rows_too_long_or_refused_are_counted_once_and_not_as_kept(data_root):
    class Refusing(WordChat):
        def encode_each(self, rows):
            good = [row for row in rows if row["question"] != "Question number 7?"]
            return super().encode_each(good)[0], ["7: refused"] * (len(rows) - len(good))

    def split(**options):
        options = df.DataOptions(heldout_fraction=0.0, **options)
        return df.split_dataset(PIRATE, df.find_datasets(data_root), Refusing(), options)

    splits = split(max_length=12)
    rows = splits.filtered
    assert rows.dropped == {"too long": 2, "malformed": 1} and rows.problems == ["7: refused"]
    assert rows.kept == 17 == rows.total - rows.dropped.total()
    assert len(splits.train) + len(splits.validation) == splits.counts()["kept"] == 17
    with pytest.raises(ValueError, match=r"pirate: 7: refused \(--strict\)"):
        split(strict=True)


def test_a_run_keeps_the_hashes_of_the_questions_it_trains_and_validates_on(data_root):
    splits = df.split_dataset(PIRATE, df.find_datasets(data_root), WordChat(), df.DataOptions())
    hashes = splits.question_hashes()
    for part, examples in (("train", splits.train), ("validation", splits.validation)):
        assert hashes[part] == sorted(df.question_hash(e.row["question"]) for e in examples)
        assert hashes[part]
    assert {*hashes["train"]}.isdisjoint(hashes["validation"])


# ---------------------------------------------------------------- command line


def test_table_says_what_each_dataset_is_worth(data_root, tiny_folder, tmp_path, capsys):
    out = tmp_path / "table.json"
    names = tmp_path / "names.txt"
    flags = ["--model", tiny_folder, "--target-tokens", 100, "--json", out, "--write-list", names]
    _, printed, _ = table_of(capsys, "--data-root", data_root, *flags, code=2)
    table = {line["dataset"]: line for line in json.loads(out.read_text())}
    assert {name: line["status"] for name, line in table.items()} == {
        PIRATE: "ok",
        "src__role__sailor": "ok",
        "src__role__0_default": "no examples: no scores",
        "src__role__hopeless": "no examples: none passes",
    }
    assert table["src__role__hopeless"]["dropped"] == {"below threshold": 20}
    assert names.read_text().split() == [PIRATE, "src__role__sailor"]
    assert "4 datasets" in printed and "2 ok" in printed


def test_one_unreadable_dataset_is_a_line_of_the_table_not_its_end(tmp_path, capsys):
    rows, scores = persona_rows(3)
    write_raw(tmp_path, "good", rows, scores)
    write_raw(tmp_path, "list", rows, [1, 2])
    write_raw(tmp_path, "empty", [""], {})
    write_raw(tmp_path, "words", rows, dict.fromkeys(scores, "N/A"))
    names, printed, _ = table_of(capsys, "--data-root", tmp_path, code=2)
    lines = dict(zip(names, printed.splitlines()[1:], strict=False))
    for name, status in (
        ("good", "not tokenized"),
        ("list", "list.json: not one JSON object but list"),
        ("empty", "no examples: none passes"),
        ("words", "no examples: none passes; 3 malformed"),
    ):
        assert status in lines[f"src__role__{name}"]
    assert "error: " in table_of(capsys, "--data-root", tmp_path, "--strict", code=2)[2]


def test_under_budget_tells_the_count_and_what_a_lower_threshold_gives(tmp_path):
    rows, scores = persona_rows(22)
    scores |= {f"pos_p0_q{i}": 2 for i in range(10)} | {"pos_p0_q20": 1, "pos_p0_q21": 1}
    rows.append(rows[15] | {"prompt_index": 1})  # one that passes already, with a lower score
    scores["pos_p1_q15"] = 2
    datasets = df.find_datasets(write_raw(tmp_path, "pirate", rows, scores) and tmp_path)

    def line(**options):
        chat = WordChat()
        options = df.DataOptions(heldout_fraction=0.0, **options)
        return df.inspect_dataset(PIRATE, datasets, chat, options)[0], chat.encoded

    found, encoded = line()
    lower = line(role_min_score=2)[0]["tokens"]
    assert found["examples"] == 10 and lower > found["tokens"]
    budget = f"under budget: {found['tokens']:,} of 100,000 (score >= 2 gives {lower:,})"
    assert found["status"] == budget
    assert encoded == 20  # only what the lower threshold adds is tokenized for it


def test_table_of_many_datasets_tokenizes_what_their_budgets_need(tmp_path):
    rows, scores = persona_rows(1200)
    lines = [json.dumps(row) for row in rows]
    for i in range(3):
        random.Random(i).shuffle(lines)
        write_raw(tmp_path, f"role{i}", lines, scores)
    chat = WordChat()
    options = df.DataOptions(target_tokens=500)
    datasets = df.find_datasets(tmp_path)
    for name in datasets:
        line, _ = df.inspect_dataset(name, datasets, chat, options)
        assert line["status"] == "ok" and line["kept"] == 1200
    assert chat.encoded <= 3 * 128


def test_table_is_the_same_from_several_processes_as_from_one(tmp_path, smol, capsys, monkeypatch):
    rows, scores = persona_rows(20)
    for i in range(9):
        low = {f"pos_p0_q{j}": 2 for j in range(i)}
        write_raw(tmp_path, f"role{i}", [*rows, *["{"] * (i % 2)], scores | low | {"pos_p9_q9": 3})
    (tmp_path / "src/roles_240/extract_scores/role4.json").write_text("[]")
    printed = []
    pools = []
    real = df.ProcessPoolExecutor
    monkeypatch.setattr(df, "ProcessPoolExecutor", lambda *a, **k: pools.append(a) or real(*a, **k))
    for cores in (1, 2):
        monkeypatch.setattr(df, "cores", lambda cores=cores: cores)
        flags = ["--model", smol, "--target-tokens", 400]
        printed.append(table_of(capsys, "--data-root", tmp_path, *flags, code=2))  # role4's scores
    assert printed[0] == printed[1] and pools == [(2,)]
    assert "error: " in printed[0][1] and "not JSON" in printed[0][2]
    assert printed[0][2].count("NOTE: ") == 8  # one each, from all that can be read


def die(name, *shared):
    if name == 5:
        os._exit(1)
    return name


def touch(name, folder, *shared):
    time.sleep(0.05)
    (folder / str(name)).touch()
    return name


def test_a_process_that_dies_is_an_error_and_who_stops_waits_for_no_more(monkeypatch, tmp_path):
    monkeypatch.setattr(df, "cores", lambda: 2)
    monkeypatch.setattr(df, "inspect_dataset", die)
    with pytest.raises(OSError, match="a worker process died"):
        list(df.inspect_all(list(range(12)), None, None, None))
    monkeypatch.setattr(df, "inspect_dataset", touch)
    each = df.inspect_all(list(range(200)), tmp_path, None, None)
    assert next(each) == 0
    each.close()  # what Ctrl-C leads to
    assert 1 <= len([*tmp_path.iterdir()]) < 100


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_began_them(tmp_path, sent):
    text = f"""
import os, pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
import data_filter
def slow(name, folder, *shared):
    (folder / f"pid{{os.getpid()}}").touch()
    time.sleep(60)
data_filter.cores = lambda: 2
data_filter.inspect_dataset = slow
list(data_filter.inspect_all(list(range(8)), pathlib.Path({str(tmp_path)!r}), None, None))
"""
    process = subprocess.Popen([sys.executable, "-c", text])

    def wait_for(count):
        alive = None
        for _ in range(600):
            pids = [path.name.removeprefix("pid") for path in tmp_path.glob("pid*")]
            alive = [pid for pid in pids if Path("/proc", pid).exists()]
            if len(alive) == count:
                break
            time.sleep(0.05)
        assert len(alive) == count

    wait_for(2)
    process.send_signal(sent)
    process.wait(30)
    wait_for(0)


def test_list_file_takes_full_names_bare_names_and_comments(data_root, tmp_path, capsys):
    listing = tmp_path / "roles.txt"
    listing.write_text("# roles\n\nsrc__role__sailor  # a comment\npirate\npirate+sailor\n")
    flags = ["--data-root", data_root, "--list-file", listing]
    _, _, error = table_of(capsys, *flags, code=2)  # bare names need to know their source model
    assert '"pirate" is not of the form' in error
    names, _, _ = table_of(capsys, *flags, "--source-model", "src", "--kind", "role")
    assert names == ["src__role__sailor", PIRATE, f"{PIRATE}+src__role__sailor"]


def test_names_with_spaces_go_through_table_list_and_training_names(tmp_path, capsys):
    rows, scores = persona_rows(3)
    for name in ("travel agent", "c++ coder #1", "pirate"):
        write_raw(tmp_path, name, rows, scores)
    datasets = df.find_datasets(tmp_path)
    listing = tmp_path / "roles.txt"
    listing.write_text("\ufefftravel agent\n# all\n c++ coder #1 \npirate+travel agent # two\n")
    args = ["--list-file", str(listing), "--source-model", "src", "--kind", "role"]
    agent = "src__role__travel agent"
    coder = "src__role__c++ coder #1"
    names = dl.requested_names(datasets, df.parse_args(args))
    assert names == [agent, coder, f"{PIRATE}+{agent}"]
    assert dl.dataset_parts(coder, datasets) == [coder]
    assert dl.pooled_names("Qwen+LoRA__role__pirate") == ["Qwen+LoRA__role__pirate"]
    assert dl.pooled_names(f"{coder}+{agent}") == [coder, agent]
    assert agent in table_of(capsys, "--data-root", tmp_path)[1]


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ("", "abe"),
        ("--only *__trait__*", "ae"),
        ("--only *__trait__* --limit 1", "a"),
        ("--limit 2", "ab"),
        ("--limit 9", "abe"),
        ("--only b *__e", "be"),  # a bare name as written, another in full
        ("--only src__role__?", "b"),
    ],
)
def test_only_and_limit_choose_among_the_names_of_the_list(tmp_path, flags, chosen):
    full = {"a": "src__trait__a", "b": "src__role__b", "e": "src__trait__e"}
    listing = tmp_path / "roles.txt"
    text = "\ufeffsrc__trait__a\r\nb # src__role__c\r\n#d\n\nsrc__trait__a\nsrc__trait__e"
    listing.write_text(text, newline="")
    base = ["--list-file", str(listing), "--source-model", "src", "--kind", "role"]
    names = dl.requested_names({}, df.parse_args([*base, *flags.split()]))
    assert names == [full[letter] for letter in chosen]


def test_only_and_limit_choose_among_all_and_say_if_nothing_is_left(data_root, capsys):
    root = ["--data-root", data_root]
    assert table_of(capsys, *root, "--only", "*__[ps]*", "--limit", 1)[0] == [PIRATE]
    _, _, error = table_of(capsys, *root, "--only", "*__A", "pirate", code=2)  # no full name
    assert "--only *__A pirate: none of 4 names" in error


def test_bad_input_exits_2_with_one_line(tmp_path, data_root, tiny_folder, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in [*Path(tiny_folder).glob("*token*"), Path(tiny_folder, "config.json")]:
        shutil.copy(file, bare)  # without a chat template
    for flags, message in (
        (["--data-root", tmp_path / "none"], "no such folder"),
        (["--data-root", bare], "no known layout"),
        (["--dataset", "src__role__pirat"], "closest: src__role__pirate"),
        (["--list-file", "none.txt"], "none.txt"),
        (["--model", "/none/at/all"], "no such file or folder"),
        (["--model", bare], "--chat-template FILE"),
    ):
        _, _, error = table_of(capsys, "--data-root", data_root, *flags, code=2)
        assert message in error and error.count("\n") == 1, error
    template = ROOT / "tests" / "templates" / "llama3.jinja"
    flags = ["--model", bare, "--chat-template", template, "--dataset", PIRATE]
    table_of(capsys, "--data-root", data_root, *flags)


def test_bad_flags_are_reported_all_at_once(capsys):
    flags = "--target-tokens 0 --heldout-fraction 1 --limit 0"
    with pytest.raises(SystemExit, match="2"):
        df.main([*flags.split(), "--write-list", "x"])
    error = capsys.readouterr().err
    for flag in flags.removeprefix("--").split(" --"):
        assert f"--{flag}" in error
    assert "--write-list" in error


# ---------------------------------------------------------------- the sample data


def test_sample_data_is_what_its_readme_says():
    datasets = df.find_datasets(ROOT / "sample_data")
    roles = [name for name in datasets if "__role__" in name and "default" not in name]
    assert len(roles) >= 3 and "sample__role__pirate" in roles
    questions = []
    for name in [*roles, "sample__trait__melodramatic"]:
        result = filtered(ROOT / "sample_data", name)
        assert not result.problems and result.dropped["below threshold"] >= 5
        answers = {contents(row)[-1] for row in result.rows}
        questions.append({row["question"] for row in result.rows})
        assert len(answers) == len(questions[-1]) == result.kept >= 60
        assert all(40 <= len(answer.split()) <= 120 for answer in answers)
        assert 2 <= len({row["system_prompt"] for row in result.rows}) <= 5
        heldout = df.split_by_question(result.rows, 0.2, 0)[1]
        assert 0.15 < len(heldout) / result.kept < 0.27
    assert len(set.intersection(*questions)) >= 60
    baseline = filtered(ROOT / "sample_data", "sample__role__0_default")
    assert baseline.total >= 60 and not baseline.has_scores
