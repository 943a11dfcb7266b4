"""What personas as adapters cost a server: requests a second against the plain model.

    python bench/bench_serving.py http://localhost:8000 MODEL adapters

Of a vLLM server that finds its adapters in the folder (interop/README.md, "Serve them"), and has
--max-loras 64. Sends --requests at once, with 1, 8 and 64 different personas among them, in turns
with as many to the plain model, and prints the ratio of each pair.
"""

import argparse
import json
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def ask(address, model, number, tokens):
    """One request; returns the tokens that came back."""
    turns = [{"role": "user", "content": f"Question {number}: how was your day at work?"}]
    body = {"model": model, "messages": turns, "temperature": 0}
    body |= {"max_tokens": tokens, "min_tokens": tokens}
    headers = {"Content-Type": "application/json"}
    url = f"{address}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)["usage"]["completion_tokens"]


def requests_a_second(address, models, count, tokens):
    """Of `count` requests at once, to these models in turns."""
    names = [models[i % len(models)] for i in range(count)]
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        written = list(pool.map(lambda i: ask(address, names[i], i, tokens), range(count)))
    assert set(written) == {tokens}, f"answers of {min(written)} to {max(written)} tokens"
    return count / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("model")
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--requests", type=int, default=64, help="at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--pairs", type=int, default=3, help="of plain and personas, in turns")
    args = parser.parse_args()
    names = sorted(path.parent.name for path in args.adapters.glob("*/adapter_config.json"))
    for different in (1, 8, 64):
        chosen, ratios, speeds = names[:different], [], []
        if len(chosen) < different or args.requests < different:
            print(f"{different} personas: not tried, with {len(names)} adapters in the folder")
            continue
        load = (args.address, chosen, args.requests, args.tokens)
        plain = (args.address, [args.model], args.requests, args.tokens)
        requests_a_second(*load)  # the first time, adapters are read
        requests_a_second(*plain)
        for i in range(args.pairs):
            order = (plain, load) if i % 2 else (load, plain)
            first, second = (requests_a_second(*which) for which in order)
            speeds.append((first, second) if i % 2 else (second, first))
            ratios.append(speeds[-1][1] / speeds[-1][0])
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        before, after = (statistics.median(column) for column in zip(*speeds, strict=True))
        print(
            f"{different:>2} personas: {after:.2f} requests a second, plain {before:.2f}: "
            f"ratio {statistics.median(ratios):.2f} ({each})",
            flush=True,
        )


if __name__ == "__main__":
    main()
