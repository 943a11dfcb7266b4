"""report.html of a real evaluation: what is in it, and, in a browser, what is done with it."""

import base64
import hashlib
import html.parser
import json
import math
import sys

import pytest
from conftest import QUICK, ROOT, the_folder

import eval_steering as ev
from evaluation import page, report
from evaluation.table import number_at, value_at
from steering.files import read_json, write_json

sys.path.insert(0, str(ROOT / "bench"))
import bench_report

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\u2028"
HOSTILE += "@DATA@@SCRIPT@@POLICY@"


class Parser(html.parser.HTMLParser):
    """blocks: [(attributes, text)] of the scripts of a page; policy: of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.blocks = []
        self.inside = False
        self.policy = ""
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
            self.blocks[-1] = (attributes, text + data)


@pytest.fixture(scope="module")
def reported(trained, finished, tmp_path_factory):
    """A folder with report.html of two runs: an evaluated one, with hostile texts, and another."""
    flags = [*QUICK, "--num-samples", "3", "--turns", "2", "--max-new-tokens", "4"]
    assert ev.main(["--run", str(finished), *flags]) == 0
    result = read_json(finished / "eval.json")
    result["samples"][0]["answers"]["vanilla"] = HOSTILE
    result["samples"][1]["question"] = HOSTILE
    result["flags"] = ["no better than vanilla", HOSTILE]
    result["conditions"]["random"]["nll"] = math.nan
    write_json(finished / "eval.json", result)
    with open(finished / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 99, "lo')  # as a kill leaves it
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
    assert data["run-0"]["samples"][0]["answers"]["vanilla"] == HOSTILE
    assert "innerHTML" not in scripts[0]
    assert "eval(" not in scripts[0]


def test_page_holds_every_value_of_the_evaluation_once(reported, finished):
    data, _, _ = blocks_of(reported)
    result = read_json(finished / "eval.json")
    assert set(data) == {"index", "run-0", "run-1"}
    row, other = data["index"]["rows"]
    assert data["index"]["measures"] == result["measures"]
    assert [row["title"], other["title"]] == ["pirate", "sailor"]
    assert "no better than vanilla" in row["facts"]["flags"]

    run = data["run-0"]
    assert list(run["conditions"]) == list(result["conditions"])
    for condition, values in result["conditions"].items():
        in_table = row["conditions"].get(condition)
        in_run = run["conditions"][condition]
        assert (in_table is None) != (in_run is None)
        cells = in_table or in_run
        assert cells.keys() == values.keys()
        if value_at(result, condition, "scale") is None:
            assert in_table
    assert row["conditions"]["random"]["nll"] is None  # NaN
    nll = value_at(result, "vanilla", "nll")
    wanted = [nll["mean"], nll["low"], nll["high"]]
    assert row["conditions"]["vanilla"]["nll"] == pytest.approx(wanted, rel=1e-4)


def test_page_shows_how_a_run_was_trained_whether_it_is_evaluated_or_not(reported, trained):
    data, _, _ = blocks_of(reported)
    metrics = the_folder(trained / "runs", "src__role__sailor") / "metrics.jsonl"
    losses = [row["loss"] for row in map(json.loads, metrics.open()) if "loss" in row]
    other = data["run-1"]
    assert [loss for _, loss in other["loss"]][: len(losses)] == pytest.approx(losses, rel=1e-4)
    assert other["validation"][0][0] == 0
    assert other["conditions"] == {}
    run = data["run-0"]
    assert run["loss"][-1][0] == 6  # the torn line is passed over
    assert {"vanilla", "prompted"} <= run["turns"].keys()
    assert "vanilla" in run["tables"]


def test_long_curves_are_thinned_and_end_where_they_end():
    rows = [{"step": step, "loss": step / 2} for step in range(1000)]
    points = page.curve([*rows, {"step": 1000, "val_loss": 1.0}], "loss")
    assert 70 <= len(points) <= page.POINTS + 1
    assert points[0] == [0, 0.0]
    assert points[-1] == [999, 499.5]
    assert page.curve([], "loss") == []


@pytest.fixture
def browser():
    driver = bench_report.browser()
    driver.implicitly_wait(5)
    yield driver
    driver.quit()


@pytest.fixture
def driver(browser, reported):
    browser.get((reported / "report.html").as_uri())
    return browser


@pytest.mark.full
@pytest.mark.parametrize(
    ("models", "shown"),
    [
        (["orgA/tiny", "orgB/tiny"], ["orgA/tiny", "orgB/tiny"]),
        (["orgA/tiny", "orgB/small"], ["tiny", "small"]),
    ],
)
def test_a_browser_shows_as_much_of_a_models_name_as_tells_it_apart(
    browser, tmp_path, models, shown
):
    for number, model in enumerate(models):
        about = {"dataset": f"src__role__{number}", "status": "done"}
        about["args"] = {"model": model, "layer": 1}
        (tmp_path / f"run{number}").mkdir()
        write_json(tmp_path / f"run{number}" / "run.json", about)
    report.write_report(tmp_path, sorted(tmp_path.glob("run*")))
    browser.get((tmp_path / "report.html").as_uri())
    cells = browser.find_elements("css selector", "#runs tbody td:nth-child(2)")
    assert [cell.text for cell in cells] == shown
    assert browser.find_element("id", "count").text == "2 runs, layer 1"


@pytest.mark.full
def test_a_browser_sorts_filters_opens_a_run_and_runs_no_text(driver, finished):
    from selenium.webdriver.common.action_chains import ActionChains

    def one(selector):
        return driver.find_element("css selector", selector)

    def texts(selector):
        return [node.text for node in driver.find_elements("css selector", selector)]

    def names():
        return [text.split("\n")[0] for text in texts("#runs tbody td:first-child")]

    def change(selector, value, event):
        code = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('EVENT'))"
        driver.execute_script(code.replace("EVENT", event), one(selector), value)

    assert one("#count").text == "2 runs, model tiny-llama, layer 1"
    assert names() == ["pirate", "sailor"]
    head = one('th[data-key="run"]')
    head.click()
    assert head.get_attribute("aria-sort") == "ascending"
    head.click()
    assert names() == ["sailor", "pirate"]
    one('th[data-key="at steered x1"]').click()
    assert names() == ["pirate", "sailor"]  # what has no number comes last

    # Another measure: the conditions that have it, and their numbers.
    assert "dataset" not in texts("#runs th[data-key^=at]")
    change("#measure", "words", "change")
    place = texts("#runs tr:last-child th").index("dataset")
    result = read_json(finished / "eval.json")
    words = result["measures"]["words"]["form"].format(number_at(result, "dataset", "words"))
    assert texts("#runs tbody tr:first-child td")[place] == words

    button = one('button[data-flag="no better than vanilla"]')
    button.click()
    assert names() == ["pirate"]
    assert "1 of 2 runs" in one("#count").text
    button.click()
    change("#search", "SAIL", "input")
    assert names() == ["sailor"]
    change("#search", "", "input")

    # A dot opens its run: a panel for each measure, and answers as text.
    assert not one("#run").is_displayed()
    one('#overview [data-run="0"]').click()
    assert HOSTILE.split("\u2028")[0] in one("#answers").text
    assert {"nll", "words", "kl"} <= {text.split()[0] for text in texts("#run figcaption")}
    before = one("#answers").text
    change("#slider input", 0, "input")
    assert one("#slider output").text.strip().startswith("steered x1")
    assert one("#answers").text != before

    canvas = one("#heat canvas")
    driver.execute_script("arguments[0].scrollIntoView()", canvas)
    ActionChains(driver).move_to_element_with_offset(canvas, -20, 20).perform()
    assert one("#heat .said").text.startswith("sailor / pirate: ")
    one("#close").click()
    assert not one("#run").is_displayed()
    assert driver.execute_script("return window.hacked") is None
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
