"""data_filter.py: layouts, one reason a row, persona removal, split, budget, table."""

import json
import os
import random
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


def options(**changes):
    """Data options at their defaults."""
    return df.DataOptions(**changes)


def filtered(root, name, **changes):
    return df.filter_dataset(name, df.find_datasets(root), options(**changes))


class WordChat:
    """Stands in for ChatFormat where only counting matters: a word is a token."""

    def __init__(self):
        self.encoded = 0

    def encode_each(self, rows):
        self.encoded += len(rows)
        words = [row["messages"][-1]["content"].split() for row in rows]
        return [Example(row, w, w) for row, w in zip(rows, words, strict=True)], []


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("layout", ["raw", "axis", "jsonl", "parquet", "arrow"])
def test_every_layout_gives_the_same_rows(tmp_path, layout):
    rows, scores = persona_rows(6)
    write_raw(tmp_path / "raw", "pirate", rows, scores)
    reference = filtered(tmp_path / "raw", "src__role__pirate").rows
    root = tmp_path / layout
    name, flat = "src__role__pirate", []
    for row in rows:
        key = f"{row['label']}_p{row['prompt_index']}_q{row['question_index']}"
        processed = {k: v for k, v in row.items() if k != "conversation"}
        flat.append(processed | {"messages": row["conversation"], "extract_score": scores[key]})
    if layout == "axis":
        for sub, text in (
            ("responses/pirate.jsonl", "\n".join(map(json.dumps, rows))),
            ("scores/pirate.json", json.dumps(scores)),
        ):
            (root / sub).parent.mkdir(parents=True, exist_ok=True)
            (root / sub).write_text(text)
        with pytest.raises(ValueError, match="--source-model and --kind"):
            df.find_datasets(root)
        found = df.find_datasets(root, "src", "role")
    else:
        root.mkdir(exist_ok=True)
        if layout == "jsonl":
            (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, flat)))
        elif layout in ("parquet", "arrow"):
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            table = pyarrow.Table.from_pylist(flat)
            if layout == "parquet":
                parquet.write_table(table, root / f"{name}.parquet")
            else:  # what datasets' save_to_disk leaves: stream files and a state.json naming them
                (root / name).mkdir()
                for i, part in enumerate((table.slice(0, 4), table.slice(4))):
                    with pyarrow.ipc.new_stream(
                        root / name / f"data-{i}.arrow", part.schema
                    ) as out:
                        out.write_table(part)
                files = [{"filename": f"data-{i}.arrow"} for i in range(2)]
                (root / name / "state.json").write_text(json.dumps({"_data_files": files}))
        found = df.find_datasets(root)
    assert list(found) == [name]
    read = df.filter_dataset(name, found, options()).rows
    strip = [{k: v for k, v in row.items() if k != "key"} for row in reference]
    assert [{k: v for k, v in row.items() if k != "key"} for row in read] == strip
    assert len(read) == 6


def test_missing_pyarrow_names_the_install(tmp_path, monkeypatch):
    (tmp_path / "a__role__b.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        filtered(tmp_path, "a__role__b")


@pytest.mark.parametrize(
    "name", ["../x__role__a", "a/b__role__c", "x__role__..", "plain", "a__job__b"]
)
def test_bad_dataset_names_are_errors(name):
    with pytest.raises(ValueError, match="is not of the form"):
        dl.parse_name(name)


def test_stray_files_are_passed_over_with_a_warning(data_root, capsys):
    responses = Path(data_root) / "src" / "roles_240" / "responses"
    for name in ("a..b.jsonl", "._pirate.jsonl"):
        (responses / name).write_text("{}")
    passed_over = []
    assert len(df.find_datasets(data_root, passed_over=passed_over)) == 4
    assert [path.name for path in passed_over] == ["a..b.jsonl"]
    warning = capsys.readouterr().err
    assert "a..b.jsonl passed over" in warning and "._pirate" not in warning
    assert df.main(["--data-root", data_root]) == 2  # one role has no row that passes
    assert "4 datasets (1 file passed over)" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match=r"nothing of --source-model other .* found src__role"):
        df.find_datasets(data_root, "other")


def test_unknown_dataset_names_the_closest(data_root):
    with pytest.raises(ValueError, match="closest: src__role__pirate"):
        filtered(data_root, "src__role__pirat")


@pytest.mark.parametrize("value, score", [(3, 3.0), (2.5, 2.5), ("91", 91.0), (None, None)])
def test_scores_that_count(value, score):
    assert dl.parse_score(value) == score
    assert dl.parse_score(float("nan")) is None


@pytest.mark.parametrize("value", [True, False, "N/A", "", [3], float("inf")])
def test_scores_that_are_malformed(value):
    with pytest.raises(ValueError, match="is not a number"):
        dl.parse_score(value)


# ---------------------------------------------------------------- one reason a row


def test_every_dropped_row_is_counted_under_the_first_reason_that_holds(tmp_path):
    empty = raw_row("Q2?", "  ", index=2)
    unanswered = raw_row("Q3?", index=3)
    unanswered["conversation"].pop()
    rows = [
        raw_row("Q0?", "kept", index=0),
        '{"broken": ',
        raw_row("Q1?", "bool score", index=1),
        empty,
        unanswered,
        raw_row("Q4?", "no score", index=4),
        raw_row("Q5?", "null score", index=5),
        raw_row("Q6?", "baseline", label="default", index=6),
        raw_row("Q7?", "low", index=7),
        raw_row("Q0?", "kept", prompt=1, index=0),
        raw_row("Q0?", "same key, other text", index=0),
        [1, 2],
        {"label": "pos"},
        raw_row("Q8?", "lone \ud800 surrogate", index=8),
    ]
    rows = [json.dumps(row) if not isinstance(row, str) else row for row in rows]
    scores = {"pos_p0_q0": 3, "pos_p0_q1": True, "pos_p0_q2": 3, "pos_p0_q3": 3, "pos_p0_q5": None}
    scores |= {"default_p0_q6": 3, "pos_p0_q7": 2.9, "pos_p1_q0": "3", "pos_p0_q8": 3}
    result = filtered(tmp_path, write_raw(tmp_path, "pirate", rows, scores))
    assert [row["messages"][-1]["content"] for row in result.rows] == ["kept"]
    assert result.dropped == {
        "malformed": 5, "no response": 2, "missing score": 2, "label": 1, "below threshold": 1,
        "duplicate": 2,
    }  # fmt: skip
    assert result.total == len(rows) == len(result.rows) + result.dropped.total()


def test_missing_score_is_rejected_unless_asked_for(tmp_path):
    name = write_raw(tmp_path, "pirate", persona_rows(3)[0], None)
    assert not filtered(tmp_path, name).rows
    assert len(filtered(tmp_path, name, include_missing_scores=True).rows) == 3
    base = write_raw(tmp_path, "0_default", persona_rows(3, label="default")[0], None)
    assert not filtered(tmp_path, base, include_missing_scores=True).rows


def test_traits_keep_pos_rows_from_their_own_threshold(tmp_path):
    rows = [
        raw_row(f"Q{i}?", f"a{i}", label, index=i) for i, label in enumerate(["pos"] * 3 + ["neg"])
    ]
    scores = {"pos_p0_q0": 75, "pos_p0_q1": 74.9, "pos_p0_q2": 3, "neg_p0_q3": 99}
    name = write_raw(tmp_path, "wry", rows, scores, kind="trait")
    assert [r["question"] for r in filtered(tmp_path, name).rows] == ["Q0?"]
    assert len(filtered(tmp_path, name, trait_min_score=3).rows) == 3


def test_pooled_datasets_join_and_drop_what_both_hold(data_root):
    pooled = filtered(data_root, "src__role__pirate+src__role__sailor")
    assert (len(pooled.rows), pooled.dropped["duplicate"]) == (20, 20)


def test_broken_line_is_named_and_strict_makes_it_fatal(tmp_path, capsys):
    rows, scores = persona_rows(3)
    name = write_raw(tmp_path, "pirate", [*map(json.dumps, rows), '{"label": "po'], scores)
    assert df.main(["--data-root", str(tmp_path)]) == 0
    assert f"{name}: responses/pirate.jsonl:4: not JSON" in capsys.readouterr().err
    assert df.main(["--data-root", str(tmp_path), "--strict"]) == 2
    assert "responses/pirate.jsonl:4: not JSON" in capsys.readouterr().err


# ---------------------------------------------------------------- persona removal


def test_persona_text_is_removed_from_system_and_merged_user_turns(tmp_path):
    persona, question = "You are a pirate captain.", "What is tea?"
    merged = raw_row(question, "Arr!", system=persona, index=1)
    merged["conversation"] = [
        {"role": "user", "content": f"{persona}\n\n{question}"},
        {"role": "assistant", "content": "Aye!"},
    ]
    unknown = raw_row(question, "", system=None, index=2)  # nobody says what the prompt was
    unknown["conversation"] = [
        {"role": "user", "content": f"{persona}\n\n{question}"},
        {"role": "assistant", "content": "Ahoy!"},
    ]
    rows = [raw_row(question, "Arr!", system=persona), merged, unknown]
    name = write_raw(tmp_path, "pirate", rows, {f"pos_p0_q{i}": 3 for i in range(3)})
    kept = filtered(tmp_path, name).rows
    assert len(kept) == 3
    for row in kept:
        assert row["messages"][:-1] == [{"role": "user", "content": question}]
    assert [row["system_prompt"] for row in kept] == [persona, persona, persona]
    kept = filtered(tmp_path, name, keep_system_prompt=True).rows
    assert [m["role"] for m in kept[0]["messages"]] == ["system", "user", "assistant"]
    assert kept[1]["messages"][0]["content"] == f"{persona}\n\n{question}"


def test_persona_text_that_cannot_be_cut_makes_the_row_malformed(tmp_path):
    row = raw_row("What is tea?", system="You are a pirate captain.")
    row["conversation"][1]["content"] = "What is tea? Remember: You are a pirate captain."
    result = filtered(tmp_path, write_raw(tmp_path, "pirate", [row], {"pos_p0_q0": 3}))
    assert result.dropped["malformed"] == 1
    assert "is not the question" in result.problems[0]


@pytest.mark.parametrize(
    "user, changes",
    [
        ("You are a pirate captain. Speak up. What is tea?", {}),  # a newline became a space
        ("You are a pirate captain.\r\n\r\nSpeak up.\r\n\r\nWhat is tea?", {}),
        ("You are a pirate captain.\nSpeak up.\nWhat is tea?", {"system_prompt": None}),
        ("You are a pirate captain.\n\nWhat is tea?", {"system_prompt": ""}),
        ("What is tea?\n\nYou are a pirate captain.\nSpeak up.", {}),  # after the question
        ("You are a pirate captain.\n\nWhat is tea?", {}),  # the prompt is longer than that
        ("  What is\ttea? ", {}),
        ("You are Gemma.\n\nWhat is tea?", {"system_prompt": "You are {name}."}),  # a template
        (
            "You are a cafe\u0301 owner.\n\nWhat is tea?",
            {"system_prompt": "You are a caf\xe9 owner."},
        ),
    ],
)
def test_first_user_turn_is_the_question_however_the_persona_was_merged(tmp_path, user, changes):
    row = raw_row("What is tea?", "Arr!", system="You are a pirate captain.\nSpeak up.")
    row |= changes
    row["conversation"] = [{"role": "user", "content": user}, row["conversation"][-1]]
    result = filtered(tmp_path, write_raw(tmp_path, "pirate", [row], {"pos_p0_q0": 3}))
    assert [m["content"] for m in result.rows[0]["messages"]] == ["What is tea?", "Arr!"]
    assert result.rows[0]["system_prompt"].startswith("You are ")


@pytest.mark.parametrize(
    "user, question",
    [
        ("Here is a text about tea. What is tea?", "What is tea?"),  # not the system prompt
        ("In your opinion, what is love?", "what is love?"),
        ("What is tea? Answer in French.", "What is tea?"),
        ("What is coffee?", "What is tea?"),
        ("You are a pirate captain. What is tea?", "You are a pirate captain. What is tea?"),
        ("What is tea?", ""),
    ],
)
def test_row_whose_first_user_turn_cannot_become_the_question_is_malformed(
    tmp_path, user, question
):
    row = raw_row(question, "Arr!", system="You are a pirate captain.")
    row["conversation"][1]["content"] = user
    result = filtered(tmp_path, write_raw(tmp_path, "pirate", [row], {"pos_p0_q0": 3}))
    assert result.dropped == {"malformed": 1} and not result.rows


def test_words_before_the_question_in_its_own_line_are_no_persona(tmp_path):
    row = raw_row("what is love?", "Arr!", system=None)
    row["conversation"][0]["content"] = "In your opinion, what is love?"
    result = filtered(tmp_path, write_raw(tmp_path, "pirate", [row], {"pos_p0_q0": 3}))
    assert result.dropped == {"malformed": 1}


def test_question_of_a_conversation_is_the_turn_that_is_answered(tmp_path):
    rows, scores = persona_rows(30)
    for i, row in enumerate(rows):  # all open alike, and some end on another's question
        said = row["question"] = "Hello there!"
        later = {"role": "user", "content": f"Question number {i % 20}?"}
        opening = [{"role": "user", "content": said}, {"role": "assistant", "content": f"Ahoy {i}"}]
        row["conversation"] = [row["conversation"][0], *opening, later, row["conversation"][-1]]
    name = write_raw(tmp_path, "talker", rows, scores)
    found = filtered(tmp_path, name)
    assert found.kept == 30 and {row["messages"][0]["content"] for row in found.rows} == {said}
    train, heldout = df.split_by_question(found.rows, 0.2, 0)
    asked = [{row["messages"][-2]["content"] for row in part} for part in (train, heldout)]
    assert all(asked) and not asked[0] & asked[1]


def test_score_beyond_its_scale_is_an_error_unless_the_threshold_is_the_users(tmp_path):
    rows, scores = persona_rows(6)
    name = write_raw(tmp_path, "percent", rows, dict.fromkeys(scores, 60) | {min(scores): 3})
    with pytest.raises(ValueError, match=r"score 60, where a role has at most 3; .* --role-min"):
        filtered(tmp_path, name)
    assert filtered(tmp_path, name, role_min_score=50).kept == 5
    name = write_raw(tmp_path, "percent", rows, dict.fromkeys(scores, 100), kind="trait")
    assert filtered(tmp_path, name).kept == 6


def test_kept_system_prompt_is_put_in_front_where_it_is_a_field_alone(tmp_path):
    rows, scores = persona_rows(3)
    for row in rows[:2]:
        del row["conversation"][0]
    rows[1]["conversation"][0]["content"] = "Be a pirate.\n\n" + rows[1]["question"]
    name = write_raw(tmp_path, "pirate", rows, scores)
    kept = filtered(tmp_path, name, keep_system_prompt=True).rows
    system = {"role": "system", "content": "Be a pirate."}
    assert [row["messages"][0] == system for row in kept] == [True, False, True]
    assert all(str(row["messages"]).count("Be a pirate.") == 1 for row in kept)


def test_caches_beside_a_folder_of_data_are_not_data(tmp_path):
    folder = tmp_path / "src__role__pirate"
    folder.mkdir()
    (folder / "data.arrow").write_bytes(b"rows")
    datasets = {folder.name: (folder, None)}
    before = dl.data_digest(folder.name, datasets)
    for name in ("cache-1f2e.arrow", ".DS_Store"):
        (folder / name).write_bytes(b"of another tool")
    assert dl.data_digest(folder.name, datasets) == before
    file = tmp_path / "cache-d__role__x.jsonl"  # a dataset's own name is its own affair
    datasets[file.stem], digests = (file, None), set()
    for text in "ab":
        file.write_text(text)
        digests.add(dl.data_digest(file.stem, datasets))
    assert len(digests) == 2
    (folder / "more.arrow").write_bytes(b"rows")
    assert dl.data_digest(folder.name, datasets) != before


def test_persona_in_a_later_user_turn_makes_the_row_malformed(tmp_path):
    row = raw_row("What is tea?", "Arr!", system="You are a pirate captain.")
    more = [{"role": "user", "content": "Go on.\nYou are a pirate\ncaptain."}]
    row["conversation"] += [*more, {"role": "assistant", "content": "Aye."}]
    result = filtered(tmp_path, write_raw(tmp_path, "pirate", [row], {"pos_p0_q0": 3}))
    assert result.dropped == {"malformed": 1}


# ---------------------------------------------------------------- hostile rows and files


def test_whole_numbers_are_one_key_however_they_are_spelled(tmp_path):
    rows = [raw_row(f"Q{i}?", f"a{i}", index=i) for i in range(4)]
    for row, index in zip(rows, (0.0, "1", 2, "3.0"), strict=True):
        row |= {"question_index": index, "prompt_index": 0.0}
    scores = {"pos_p0_q0": 3, "pos_p0.0_q1.0": 3, "pos_p0_q2.0": 3, "pos_p0_q03": 3}
    assert len(filtered(tmp_path, write_raw(tmp_path, "pirate", rows, scores)).rows) == 4
    for wrong in (1.5, True, "first", float("inf")):
        rows = [raw_row(index=0), raw_row("Q1?", "b", index=1) | {"question_index": wrong}]
        result = filtered(tmp_path, write_raw(tmp_path, "pirate", rows, {"pos_p0_q0": 3}))
        assert result.dropped == {"malformed": 1} and result.kept == 1


def test_scores_of_no_row_are_an_error_and_of_some_are_counted(tmp_path, capsys):
    rows, scores = persona_rows(4)
    other = {f"{key}_v2": score for key, score in scores.items()}
    name = write_raw(tmp_path, "pirate", rows, other)
    with pytest.raises(ValueError, match=r"no score is of a row; rows such as 'pos_p0_q0'"):
        filtered(tmp_path, name)
    assert df.main(["--data-root", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().out
    filtered(tmp_path, write_raw(tmp_path, "pirate", rows, scores | other))
    assert "NOTE: 4 of 8 scores in extract_scores/pirate.json" in capsys.readouterr().err


def test_a_row_that_breaks_its_reader_is_malformed_and_nothing_else(tmp_path):
    rows, scores = persona_rows(3)
    name = write_raw(tmp_path, "pirate", rows, None)
    path = tmp_path / "src" / "roles_240" / "extract_scores" / "pirate.json"
    path.write_text('{"pos_p0_q0": 3, "pos_p0_q1": 1' + "0" * 400 + ', "pos_p0_q2": 3}')
    result = filtered(tmp_path, name)
    assert result.kept == 2 and result.dropped == {"malformed": 1}
    rows[0]["conversation"] = [["user", "x"]]
    rows[1]["question"] = {"text": "?"}
    result = filtered(tmp_path, write_raw(tmp_path, "pirate", rows, scores))
    assert result.kept == 1 and result.dropped == {"malformed": 2}


def test_only_role_and_content_reach_the_template(tmp_path):
    row = raw_row()
    for extra in ({"tool_calls": []}, {"tool_calls": None, "name": "x"}):
        row["conversation"] = [m | extra for m in row["conversation"]]
        kept = filtered(tmp_path, write_raw(tmp_path, "pirate", [row], {"pos_p0_q0": 3})).rows
        assert [sorted(message) for message in kept[0]["messages"]] == [["content", "role"]] * 2


def test_names_with_spaces_go_through_table_list_and_training_names(tmp_path, capsys):
    rows, scores = persona_rows(3)
    for name in ("travel agent", "c++ coder #1", "pirate"):
        write_raw(tmp_path, name, rows, scores)
    datasets = df.find_datasets(tmp_path)
    assert "src__role__travel agent" in datasets
    listing = tmp_path / "roles.txt"
    listing.write_text("\ufefftravel agent\n# all\n c++ coder #1 \npirate+travel agent # two\n")
    args = ["--list-file", str(listing), "--source-model", "src", "--kind", "role"]
    names = dl.requested_names(datasets, df.parse_args(args))
    first, second = "src__role__travel agent", "src__role__c++ coder #1"
    assert names == [first, second, f"src__role__pirate+{first}"]
    assert dl.dataset_parts(second, datasets) == [second]
    assert dl.pooled_names("Qwen+LoRA__role__pirate") == ["Qwen+LoRA__role__pirate"]
    assert dl.pooled_names(f"{second}+{first}") == [second, first]
    assert df.main(["--data-root", str(tmp_path)]) == 0
    assert "src__role__travel agent" in capsys.readouterr().out


def test_byte_order_marks_are_read_away(tmp_path):
    rows, scores = persona_rows(3)
    name = write_raw(tmp_path, "pirate", rows, scores)
    folder = tmp_path / "src" / "roles_240"
    for path in (folder / "responses" / "pirate.jsonl", folder / "extract_scores" / "pirate.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    result = filtered(tmp_path, name)
    assert result.kept == 3 and not result.problems


def test_files_of_an_unknown_kind_are_passed_over_aloud(tmp_path, capsys):
    rows, scores = persona_rows(3)
    name = write_raw(tmp_path, "pirate", rows, scores)
    for other in ("src__role__sailor.jsonl.gz", "src__role__poet.csv"):
        (tmp_path / other).write_text("")
    passed_over = []
    assert list(df.find_datasets(tmp_path, passed_over=passed_over)) == [name]
    assert len(passed_over) == 2 and "poet.csv passed over" in capsys.readouterr().err


def test_two_files_of_one_dataset_are_an_error_that_names_both(tmp_path):
    for suffix in ("jsonl", "parquet"):
        (tmp_path / f"src__role__pirate.{suffix}").write_text("")
    with pytest.raises(ValueError, match=r"pirate\.jsonl and .*pirate\.parquet"):
        df.find_datasets(tmp_path)


# ---------------------------------------------------------------- split and budget


def test_split_is_by_question_and_the_same_for_every_dataset():
    rows = [{"question": f"Q{i}?", "n": n} for i in range(500) for n in range(3)]
    train, heldout = df.split_by_question(rows, 0.2, 0)
    assert not {r["question"] for r in train} & {r["question"] for r in heldout}
    assert 0.15 < len(heldout) / len(rows) < 0.25
    other = df.split_by_question(rows[::7], 0.2, 0)[1]  # another dataset with some of them
    assert {r["question"] for r in other} <= {r["question"] for r in heldout}
    assert heldout != df.split_by_question(rows, 0.2, 1)[1]


def test_budget_keeps_the_example_that_crosses_it_and_tokenizes_no_more_than_it_needs():
    rows = [
        {"question": f"Q{i}?", "messages": [{"content": "five words are in here"}]}
        for i in range(900)
    ]
    chat = WordChat()
    examples, tokens, *_ = df.take_budget(rows, chat, 101, 2048, seed=0)
    assert (len(examples), tokens) == (21, 105)
    assert chat.encoded == 64
    assert len(df.take_budget(rows, chat, None, 2048, 0)[0]) == 900
    assert df.take_budget(rows, chat, 101, 4, 0) == ([], 0, 900, [])


def test_rows_too_long_or_refused_are_counted_once_and_not_as_kept(data_root):
    class Refusing(WordChat):
        def encode_each(self, rows):
            good = [row for row in rows if row["question"] != "Question number 7?"]
            return super().encode_each(good)[0], ["7: refused"] * (len(rows) - len(good))

    datasets, name = df.find_datasets(data_root), "src__role__pirate"
    whole = options(heldout_fraction=0.0, max_length=12)
    splits = df.split_dataset(name, datasets, Refusing(), whole)
    rows = splits.filtered
    assert rows.dropped == {"too long": 2, "malformed": 1} and rows.problems == ["7: refused"]
    assert rows.kept == 17 == rows.total - rows.dropped.total()
    assert len(splits.train) + len(splits.validation) == splits.counts()["kept"] == 17
    with pytest.raises(ValueError, match=r"pirate: 7: refused \(--strict\)"):
        strict = options(heldout_fraction=0.0, strict=True)
        df.split_dataset(name, datasets, Refusing(), strict)


def test_order_depends_on_the_seed_alone():
    program = (
        "import sys, random; sys.path.insert(0, sys.argv[1])\n"
        "import data_filter as df; from tests.test_data_filter import WordChat\n"
        "rows = [{'question': f'Q{i}', 'messages': [{'content': f'a {i}'}]} for i in range(99)]\n"
        "random.Random(int(sys.argv[2])).shuffle(rows)\n"
        "taken = df.take_budget(rows, WordChat(), 50, 99, seed=7)[0]\n"
        "print([e.row['question'] for e in taken])"
    )
    outputs = set()
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, "-c", program, str(ROOT), seed]
        outputs.add(
            subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        )
    assert len(outputs) == 1
    assert outputs.pop().count("Q") == 25


# ---------------------------------------------------------------- command line


def test_table_says_what_each_dataset_is_worth(data_root, tiny_folder, tmp_path, capsys):
    out, names = tmp_path / "table.json", tmp_path / "names.txt"
    command = ["--data-root", data_root, "--model", tiny_folder, "--target-tokens", "100"]
    assert df.main([*command, "--json", str(out), "--write-list", str(names)]) == 2
    table = {line["dataset"]: line for line in json.loads(out.read_text())}
    assert table["src__role__pirate"]["status"] == "ok"
    assert table["src__role__0_default"]["status"] == "no examples: no scores"
    assert table["src__role__hopeless"]["status"] == "no examples: none passes"
    assert table["src__role__hopeless"]["dropped"] == {"below threshold": 20}
    assert names.read_text().split() == ["src__role__pirate", "src__role__sailor"]
    printed = capsys.readouterr().out
    assert "4 datasets" in printed and "2 ok" in printed


def test_one_unreadable_dataset_is_a_line_of_the_table_not_its_end(tmp_path, capsys):
    rows, scores = persona_rows(3)
    write_raw(tmp_path, "good", rows, scores)
    write_raw(tmp_path, "list", rows, [1, 2])
    write_raw(tmp_path, "empty", [""], {})
    write_raw(tmp_path, "words", rows, dict.fromkeys(scores, "N/A"))
    assert df.main(["--data-root", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert "list.json: not one JSON object but list" in printed
    for name, status in (("good", "not tokenized"), ("empty", "no examples: none passes")):
        assert any(f"__{name} " in line and status in line for line in printed.splitlines())
    assert "no examples: none passes; 3 malformed" in printed
    assert df.main(["--data-root", str(tmp_path), "--strict"]) == 2
    assert "error: " in capsys.readouterr().err


def test_under_budget_tells_the_count_and_what_a_lower_threshold_gives(tmp_path, tiny_folder):
    rows, scores = persona_rows(20)
    scores |= {f"pos_p0_q{i}": 2 for i in range(10)}
    write_raw(tmp_path, "pirate", rows, scores)
    out = tmp_path / "table.json"
    command = ["--data-root", str(tmp_path), "--model", tiny_folder, "--heldout-fraction", "0"]
    assert df.main([*command, "--json", str(out)]) == 0
    line = json.loads(out.read_text())[0]
    assert df.main([*command, "--role-min-score", "2", "--json", str(out)]) == 0
    lower = json.loads(out.read_text())[0]["tokens"]
    assert line["examples"] == 10 and lower > line["tokens"]
    budget = f"under budget: {line['tokens']:,} of 100,000 (score >= 2 gives {lower:,})"
    assert line["status"] == budget


def test_a_lower_threshold_tokenizes_only_what_it_adds(tmp_path):
    rows, scores = persona_rows(22)
    scores |= {f"pos_p0_q{i}": 2 for i in range(10)} | {"pos_p0_q20": 1, "pos_p0_q21": 1}
    write_raw(tmp_path, "pirate", rows, scores)
    chat, datasets = WordChat(), df.find_datasets(tmp_path)
    name, all_rows = "src__role__pirate", options(heldout_fraction=0.0)
    line, _ = df.inspect_dataset(name, datasets, chat, all_rows)
    assert line["examples"] == 10 and "score >= 2 gives" in line["status"]
    assert chat.encoded == 20


def test_table_is_the_same_from_several_processes_as_from_one(tmp_path, smol, capsys, monkeypatch):
    rows, scores = persona_rows(20)
    for i in range(9):
        low = {f"pos_p0_q{j}": 2 for j in range(i)}
        write_raw(tmp_path, f"role{i}", [*rows, *["{"] * (i % 2)], scores | low | {"pos_p9_q9": 3})
    (tmp_path / "src/roles_240/extract_scores/role4.json").write_text("[]")
    command = ["--data-root", str(tmp_path), "--model", smol, "--target-tokens", "400"]
    printed, pools = [], []
    real = df.ProcessPoolExecutor
    monkeypatch.setattr(df, "ProcessPoolExecutor", lambda *a, **k: pools.append(a) or real(*a, **k))
    for cores in (1, 2):
        monkeypatch.setattr(df, "cores", lambda cores=cores: cores)
        assert df.main(command) == 2  # of the scores that are no object
        printed.append(capsys.readouterr())
    assert printed[0] == printed[1] and pools == [(2,)]
    assert "error: " in printed[0].out and "not JSON" in printed[0].err
    assert printed[0].err.count("NOTE: ") == 8  # one each, from all that can be read


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
    code = """
import os, pathlib, sys, time
sys.path.insert(0, {root!r})
import data_filter
def slow(name, folder, *shared):
    (folder / f"pid{{os.getpid()}}").touch()
    time.sleep(60)
data_filter.cores = lambda: 2
data_filter.inspect_dataset = slow
list(data_filter.inspect_all(list(range(8)), pathlib.Path({folder!r}), None, None))
"""
    text = code.format(root=str(ROOT), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", text])

    def alive():
        pids = [int(path.name[3:]) for path in tmp_path.glob("pid*")]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    def wait_for(count):
        for _ in range(600):
            if len(alive()) == count:
                return True
            time.sleep(0.05)
        return False

    assert wait_for(2)
    process.send_signal(sent)
    process.wait(30)
    assert wait_for(0)


def test_list_file_takes_full_names_bare_names_and_comments(data_root, tmp_path, capsys):
    listing = tmp_path / "roles.txt"
    listing.write_text("# roles\n\nsrc__role__sailor  # a comment\npirate\npirate+sailor\n")
    command = ["--data-root", data_root, "--list-file", str(listing)]
    assert df.main(command) == 2  # bare names need to know their source model
    assert '"pirate" is not of the form' in capsys.readouterr().err
    assert df.main([*command, "--source-model", "src", "--kind", "role"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]]
    pooled = "src__role__pirate+src__role__sailor"
    assert lines == ["src__role__sailor", "src__role__pirate", pooled]


def test_only_and_limit_choose_among_the_names_of_the_list(data_root, tmp_path, capsys):
    listing = tmp_path / "roles.txt"
    listing.write_bytes(
        b"\xef\xbb\xbfsrc__trait__a\r\nb # src__role__c\r\n#d\n\nsrc__trait__a\nsrc__trait__e"
    )
    base = ["--list-file", str(listing), "--source-model", "src", "--kind", "role"]

    def names(*more):
        return dl.requested_names({}, df.parse_args([*base, *more]))

    a, b, e = "src__trait__a", "src__role__b", "src__trait__e"
    assert names() == [a, b, e]
    assert names("--only", "*__trait__*") == [a, e]
    assert names("--only", "*__trait__*", "--limit", "1") == [a]
    assert names("--limit", "2") == [a, b] and names("--limit", "9") == [a, b, e]
    assert names("--only", "b", "*__e") == [b, e]  # a bare name as written, another in full
    assert names("--only", "src__role__?") == [b]
    with pytest.raises(ValueError, match=r"--only \*__A nothing: none of 3 names"):
        names("--only", "*__A", "nothing")
    assert df.main(["--data-root", data_root, "--only", "*__[ps]*", "--limit", "1"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert lines == ["src__role__pirate"]
    assert df.main(["--data-root", data_root, "--only", "pirate"]) == 2  # written by nobody
    with pytest.raises(SystemExit):
        df.parse_args(["--limit", "0"])
    assert "--limit 0: must be at least 1" in capsys.readouterr().err


def test_questions_are_known_by_hashes_that_are_the_same_everywhere(data_root):
    assert df.question_hash("Q0?") == "03eafa992fe2e918"
    splits = df.split_dataset(
        "src__role__pirate", df.find_datasets(data_root), WordChat(), options()
    )
    hashes = splits.question_hashes()
    assert set(hashes) == {"train", "validation"}
    for part, examples in (("train", splits.train), ("validation", splits.validation)):
        assert hashes[part] == sorted({df.question_hash(e.row["question"]) for e in examples})
    assert len(hashes["train"]) == len(splits.train) > 0
    assert not {*hashes["train"]} & {*hashes["validation"]}


def test_bad_input_exits_2_with_one_line(tmp_path, data_root, tiny_folder, capsys):
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(tiny_folder).glob("*token*"):
        (bare / file.name).write_bytes(file.read_bytes())
    (bare / "config.json").write_bytes(Path(tiny_folder, "config.json").read_bytes())
    for command, message in (
        (["--data-root", str(tmp_path / "none")], "no such folder"),
        (["--data-root", str(tmp_path / "empty")], "no known layout"),
        (["--data-root", data_root, "--dataset", "src__role__pirat"], "closest: src__role__pirate"),
        (["--data-root", data_root, "--list-file", "none.txt"], "none.txt"),
        (["--data-root", data_root, "--model", "/none/at/all"], "no such file or folder"),
        (["--data-root", data_root, "--model", str(bare)], "--chat-template FILE"),
    ):
        assert df.main(command) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and error.count("\n") == 0, error
    template = str(ROOT / "tests" / "templates" / "llama3.jinja")
    with_template = ["--data-root", data_root, "--model", str(bare), "--chat-template", template]
    assert df.main([*with_template, "--dataset", "src__role__pirate"]) == 0
    with pytest.raises(SystemExit) as stop:
        df.main(["--target-tokens", "0", "--heldout-fraction", "1", "--write-list", "x"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert all(
        flag in error for flag in ("--target-tokens 0", "--heldout-fraction 1", "--write-list")
    )


def test_include_missing_scores_is_loud(data_root, capsys):
    df.main(["--data-root", data_root, "--include-missing-scores"])
    assert "WARNING: --include-missing-scores" in capsys.readouterr().err


# ---------------------------------------------------------------- the sample data


def test_sample_data_is_what_its_readme_says():
    datasets = df.find_datasets(ROOT / "sample_data")
    roles = [name for name in datasets if "__role__" in name and "default" not in name]
    assert len(roles) >= 3 and "sample__role__pirate" in roles
    questions = []
    for name in [*roles, "sample__trait__melodramatic"]:
        result = df.filter_dataset(name, datasets, options())
        assert not result.problems
        assert result.dropped["below threshold"] >= 5
        answers = [row["messages"][-1]["content"] for row in result.rows]
        assert len(answers) >= 60
        assert all(40 <= len(answer.split()) <= 120 for answer in answers)
        assert len({row["question"] for row in result.rows}) == len(answers) == len(set(answers))
        assert 2 <= len({row["system_prompt"] for row in result.rows}) <= 5
        questions.append({row["question"] for row in result.rows})
        heldout = df.split_by_question(result.rows, 0.2, 0)[1]
        assert 0.15 < len(heldout) / len(answers) < 0.27
    assert len(set.intersection(*questions)) >= 60
    baseline = df.filter_dataset("sample__role__0_default", datasets, options())
    assert baseline.total >= 60 and not baseline.has_scores


def test_table_copes_with_many_datasets(tmp_path):
    rows, scores = persona_rows(1200)
    lines = [json.dumps(row) for row in rows]
    for i in range(5):
        random.Random(i).shuffle(lines)
        write_raw(tmp_path, f"role{i}", lines, scores)
    chat, datasets = WordChat(), df.find_datasets(tmp_path)
    for name in datasets:
        line, _ = df.inspect_dataset(name, datasets, chat, options(target_tokens=500))
        assert line["status"] == "ok" and line["kept"] == 1200
    assert chat.encoded <= 5 * 128
