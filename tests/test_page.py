"""report.html: what is in it, and, in a browser, what is done with it."""

import base64
import hashlib
import html.parser
import json
import math
import shutil
import sys

import numpy as np
import pytest
from conftest import QUICK, ROOT

import eval_steering as ev
from evaluation import page as pg
from steering.files import read_json, write_json

sys.path.insert(0, str(ROOT / "bench"))
import bench_report

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\u2028"


class Parser(html.parser.HTMLParser):
    """blocks: [(attributes, text)] of the scripts of a page; policy: of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.blocks, self.inside, self.policy = [], False, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.inside = tag == "script"
        if self.inside:
            self.blocks.append((attributes, ""))
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            attributes, text = self.blocks[-1]
            self.blocks[-1] = attributes, text + data


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """A folder with report.html of two runs: an evaluated one, with hostile texts, and another."""
    runs = sorted(path.parent for path in (trained / "runs").rglob("run.json"))
    flags = [*QUICK, "--num-samples", "3", "--turns", "2", "--max-new-tokens", "4"]
    assert ev.main(["--run", str(runs[0]), *flags]) == 0
    result = read_json(runs[0] / "eval.json")
    result["samples"][0]["answers"]["vanilla"] = HOSTILE
    result["samples"][1]["question"] = HOSTILE
    result["flags"] = ["no better than vanilla", HOSTILE]
    result["likelihood"]["random"]["nll"] = math.nan
    result["likelihood"]["vanilla"]["steered_minus_interval"] = [math.nan, math.nan]
    with open(runs[0] / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 99, "lo')  # as a kill leaves it
    write_json(runs[0] / "eval.json", result)
    out = tmp_path_factory.mktemp("report")
    assert ev.main(["--run", str(trained / "runs"), "--report-only", "--report-dir", str(out)]) == 0
    return out


def blocks_of(folder):
    parser = Parser((folder / "report.html").read_text())
    data = {about["id"]: json.loads(text) for about, text in parser.blocks if "id" in about}
    return data, [text for about, text in parser.blocks if "id" not in about], parser.policy


def test_texts_are_data_and_the_only_script_is_the_one_that_the_page_allows(reported):
    data, scripts, policy = blocks_of(reported)
    assert scripts == [(ROOT / "evaluation/page.js").read_text()]
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert policy == allowed
    names = [row["cells"]["dataset"] for row in data["index"]["rows"]]
    run = data[f"run-{names.index('pirate')}"]
    assert run["samples"][0]["answers"]["vanilla"] == HOSTILE
    assert "innerHTML" not in scripts[0] and "eval(" not in scripts[0]


def test_page_holds_what_the_report_and_the_evaluation_say(reported, finished):
    data, _, _ = blocks_of(reported)
    index, result = data["index"], read_json(finished / "eval.json")
    assert [row["number"] for row in index["rows"]] == [0, 1]
    assert set(data) == {"index", "run-0", "run-1"}
    row = next(row for row in index["rows"] if row["cells"]["dataset"] == "pirate")
    steered, vanilla = (result["likelihood"][name] for name in ("steered", "vanilla"))
    assert row["cells"]["steered"] == pytest.approx(steered["nll"], rel=1e-4)
    assert "no better than vanilla" in row["flags"] and "other code" not in row["flags"]
    run = data[f"run-{row['number']}"]
    assert [s["scale"] for s in run["scales"]] == sorted(
        float(name.removeprefix("steered x")) for name in result["answers"] if "steered" in name
    )
    assert run["nll"][0][:2] == ["vanilla", pytest.approx(vanilla["nll"], rel=1e-4)]
    assert next(bar for bar in run["nll"] if bar[0] == "random")[:2] == ["random", None]
    assert row["bounds"]["minus_vanilla"] == [None, None] and run["loss"][-1][0] != 99
    assert {line["name"] for line in run["turns"]} >= {"vanilla", "prompted"}
    assert run["loss"][0][0] == 1 and run["val"][0][0] == 0 and "condition" in run["tables"]
    other = data[f"run-{1 - row['number']}"]
    assert other["samples"] == [] and other["loss"]  # not evaluated: how it trained is there
    assert [heat["names"] for heat in index["heat"]] == [
        [row["cells"]["dataset"] for row in index["rows"]]
    ]


def test_an_evaluation_by_another_version_costs_the_page_nothing_but_itself(finished, tmp_path):
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    write_json(tmp_path / "eval.json", {"likelihood": {"vanilla": 1.0}, "flags": []})
    data = pg.run_data(tmp_path)
    assert "another version" in data["tables"] and data["loss"] and data["samples"] == []


def test_heat_map_gives_back_its_numbers_and_curves_are_thinned(tmp_path):
    matrix = np.array([[1.0, -0.2], [0.3, 0.9]])
    heat = pg.heat_map("Title", "Note", ["a", "b"], matrix)
    shares = np.frombuffer(base64.b64decode(heat["cells"]), np.uint8).reshape(2, 2) / 255
    again = heat["low"] + shares * (heat["high"] - heat["low"])
    assert np.abs(again - matrix).max() < 0.003
    assert pg.heat_map("", "", ["a"], [[2.0]])["cells"] == base64.b64encode(b"\0").decode()
    lines = [json.dumps({"step": i, "loss": math.nan if i == 0 else 1.0}) for i in range(1000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    points = pg.curve(tmp_path / "metrics.jsonl", "loss")
    assert 70 <= len(points) <= pg.POINTS + 1 and points[-1] == [999, 1.0]
    assert pg.plain_numbers(points[0]) == [0, None]
    nan = pg.heat_map("", "", ["a", "b"], np.array([[1.0, np.nan], [0.0, 1.0]]))
    assert (nan["low"], nan["high"]) == (0.0, 1.0)
    assert pg.curve(tmp_path / "none", "loss") == []


@pytest.mark.full
def test_a_browser_sorts_filters_opens_a_run_and_runs_no_text(reported):
    from selenium.webdriver.common.action_chains import ActionChains

    driver = bench_report.browser()
    try:
        driver.get((reported / "report.html").as_uri())
        find = driver.find_elements

        def column(number):
            return [row.find_elements("css selector", "td")[number].text for row in rows()]

        def rows():
            return find("css selector", "#runs tbody tr")

        assert sorted(column(0)) == ["pirate", "sailor"] and find("id", "count")[0].text.startswith(
            "2 runs, model"
        )
        head = driver.find_element("css selector", 'th[data-key="dataset"]')
        head.click()
        assert column(0) == ["pirate", "sailor"]
        assert head.get_attribute("aria-sort") == "ascending"
        head.click()
        assert column(0) == ["sailor", "pirate"]
        driver.find_element("css selector", 'th[data-key="steered"]').click()
        assert column(0) == ["pirate", "sailor"]  # what has no number comes last
        button = driver.find_element("css selector", 'button[data-flag="no better than vanilla"]')
        button.click()
        assert column(0) == ["pirate"] and "1 of 2 runs" in find("id", "count")[0].text
        button.click()
        driver.find_element("id", "search").send_keys("SAIL")
        assert column(0) == ["sailor"]
        driver.execute_script("document.getElementById('search').value = ''; showTable()")
        assert not driver.find_element("id", "run").is_displayed()
        rows()[0].click()
        driver.implicitly_wait(5)
        answers = driver.find_element("id", "answers")
        assert HOSTILE.strip("\u2028") in answers.text  # as text
        assert len(find("css selector", "#run svg")) == 4
        before = answers.text
        driver.execute_script(
            "const s = document.querySelector('#slider input'); s.value = 0;"
            "s.dispatchEvent(new Event('input'))"
        )
        assert driver.find_element("id", "answers").text != before
        assert (
            driver.find_element("css selector", "#slider output").text.strip().startswith("steered")
        )
        canvas = driver.find_element("css selector", "#heat canvas")
        driver.execute_script("arguments[0].scrollIntoView()", canvas)
        ActionChains(driver).move_to_element_with_offset(canvas, -100, 100).perform()
        said = driver.find_element("css selector", "#heat .said").text
        assert "pirate / sailor: " in said or "sailor / pirate: " in said
        driver.find_element("id", "close").click()
        assert not driver.find_element("id", "run").is_displayed()
        assert driver.execute_script("return window.hacked") is None
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        driver.quit()
