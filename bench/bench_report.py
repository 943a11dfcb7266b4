"""How big report.html of many runs is, and how long it takes to write, to open and to open a run.

    python bench/bench_report.py RUNS --count 515 --out many      # needs chromium and selenium

RUNS: a folder of evaluated runs, which are copied under other names, with vectors of their own.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation import report
from steering.files import read_json, write_json
from steering.run_folder import find_runs
from steering.vector_file import VECTOR_FILE, load_vector, save_vector


def copy_runs(folders, count, out):
    """`count` runs below `out`, made from those in `folders` in turns."""
    made, noise = [], torch.Generator().manual_seed(0)
    for number in range(count):
        source = folders[number % len(folders)]
        kind = "role" if number % 2 else "trait"
        folder = out / "layer12" / f"many__{kind}__persona {number:03d}"
        if not folder.exists():
            folder.mkdir(parents=True)
            for name in ("run.json", "eval.json", "metrics.jsonl"):
                shutil.copy(source / name, folder)
            vector, header = load_vector(source / VECTOR_FILE)
            vector = vector + vector.norm() / 20 * torch.randn(len(vector), generator=noise)
            save_vector(folder / VECTOR_FILE, vector, header)
            for name in ("run.json", "eval.json"):
                about = read_json(folder / name) | {"dataset": folder.name}
                write_json(folder / name, about)
        made.append(folder)
    return made


def browser():
    """A headless chromium, driven by selenium; RuntimeError that names the install without it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location, driver = shutil.which("chromium") or "", shutil.which("chromedriver")
    if not (options.binary_location and driver):
        raise RuntimeError("no chromium with its driver: apt-get install chromium chromium-driver")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000"):
        options.add_argument(flag)
    return webdriver.Chrome(options, Service(driver))


def main():
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=515)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folders = [f for f in find_runs(map(str, args.runs)) if (f / "eval.json").exists()]
    made = copy_runs(folders, args.count, args.out)
    started = time.perf_counter()
    report.write_report(args.out, made)
    print(f"report of {len(made)} runs written in {time.perf_counter() - started:.1f} s")
    page = args.out / "report.html"
    print(f"report.html: {page.stat().st_size / 2**20:.1f} MiB")
    driver = browser()
    driver.get(page.resolve().as_uri())
    timing = driver.execute_script(
        "return JSON.stringify(performance.getEntriesByType('navigation')[0])"
    )
    print(f"opened, loaded: {json.loads(timing)['loadEventEnd'] / 1000:.2f} s")
    clock = "const t = performance.now(); {}; return performance.now() - t"
    for what, code in (
        ("sorted", "document.querySelector('th[data-key^=at]').click()"),
        ("a run opened", "showRun(7)"),
    ):
        print(f"{what}: {driver.execute_script(clock.format(code)) / 1000:.3f} s")
    driver.quit()


if __name__ == "__main__":
    main()
