"""Some fifty architectures, tiny and random, of their real classes: make test-full.

Of each: loss and gradient from the cache, without it and with recomputed layers, against a forward
that only has the hook; and greedy `generate` against token-by-token argmax. What transformers here
does not have is skipped. The last test prints who takes the fast path, as README lists it.
"""

import pytest
import torch
import transformers as hf
from conftest import CONFIGS, HEADS, SMALL, gradient_of, plain_loss, rows_of

import hook_model as hm
from interop.adapter import find_site
from steering import fast_path as fp
from train_steering import token_loss

pytestmark = pytest.mark.full

MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
MOE |= {"moe_intermediate_size": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {**SMALL, **HEADS, **MOE, **IDS, "max_position_embeddings": 128}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
MLA = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16}
MLA |= {"q_lora_rank": 16, "head_dim": 8, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
SLIDING, FULL = "sliding_attention", "full_attention"
LIST = (
    "afmoe apertus arcee bamba bitnet bloom cohere cohere2 cwm deepseek_v2 deepseek_v3 "
    "diffllama doge ernie4_5 ernie4_5_moe exaone4 falcon falcon_h1 flex_olmo gemma gemma2 "
    "gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss "
    "granite granitemoe helium hunyuan_v1_dense jamba jetmoe lfm2 llama llama4_text minimax "
    "ministral mistral mixtral mpt nemotron nemotron_h olmo olmo2 olmo3 olmoe opt persimmon phi "
    "phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 "
    "stablelm starcoder2 vaultgemma xglm "
)
NAMES = LIST.split()
SPECIAL = {  # what the common settings lack, or must not have
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3], "head_dim": None},
    "deepseek_v2": {**MLA, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "deepseek_v3": {**MLA, "first_k_dense_replace": 1},
    "falcon": {"head_dim": None}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "num_kv_shared_layers": 2, "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
        "num_kv_shared_layers": 2, "layer_types": [SLIDING, FULL, SLIDING, FULL],
    },
}  # fmt: skip
REFUSED = {"gemma3n_text"}  # four residual streams
TAKEN, FIT = {}, []  # {name: "fast" or "plain"}; names that adapters fit


def make(name):
    """A SteerModel of an architecture, at its layer 1, with a vector that shows."""
    if name in CONFIGS:
        config = CONFIGS[name]()
    else:
        try:
            kind = hf.models.auto.configuration_auto.CONFIG_MAPPING[name]
        except KeyError:
            pytest.skip(f"transformers {hf.__version__} has no {name}")
        settings = COMMON | SPECIAL.get(name, {})
        config = kind(**{key: value for key, value in settings.items() if value is not None})
    torch.manual_seed(0)
    whole = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = hm.SteerModel(whole, 1)
    noise = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(1))
    model.set_vector(noise, 0.7)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_cached_plain_and_recomputed_are_the_hooked_forward(name):
    model, rows = make(name), rows_of(9, 14, 11)
    if name in REFUSED:
        with pytest.raises(ValueError, match="gives states"):
            plain_loss(model, rows)
        return
    expected = plain_loss(model, rows)
    gradient = gradient_of(model, expected)
    assert gradient.norm() > 0
    fast = fp.FastPath(model)
    for place, recompute in (("host", False), ("off", False), ("host", True)):
        if recompute:
            fp.checkpoint_layers(model)
        fast.cache_prefix(rows, place, max_tokens=14)
        loss = fast.losses(rows, token_loss).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4), (place, recompute)
        got = gradient_of(model, loss)
        close = torch.nn.functional.cosine_similarity(got, gradient, dim=0)
        assert close > 1 - 1e-6 and got.norm() == pytest.approx(gradient.norm().item(), rel=1e-3)
    TAKEN[name] = "fast" if fast.is_fast(rows) else "plain"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_greedy_generation_is_the_argmax_of_the_steered_forward(name):
    model, ids = make(name), torch.arange(3, 12)[None]
    stop = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    out = model.generate(input_ids=ids, max_new_tokens=4, **stop)
    for _ in range(4):
        with torch.no_grad():
            new = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, new[None]], dim=1)
    assert out.tolist() == ids.tolist()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_what_is_added_where_adapters_act_is_the_vector_or_the_model_is_refused(name):
    model, ids = make(name), torch.arange(3, 12)[None]
    try:
        site = find_site(model)
    except ValueError as error:
        assert "no adapter for" in str(error)
        return
    steered, vector = model(input_ids=ids).logits, model.steering.added()
    handle = site.module.register_forward_hook(lambda module, inputs, output: output + vector)
    with model.steering_off():
        theirs = model(input_ids=ids).logits
    handle.remove()
    assert torch.allclose(theirs, steered, atol=1e-4)
    with model.steering_off():
        assert not torch.allclose(model(input_ids=ids).logits, steered, atol=1e-4)
    FIT.append(name)


def test_print_who_takes_the_fast_path_and_adapters(capsys):
    with capsys.disabled():
        for way in ("fast", "plain"):
            names = sorted(name for name, taken in TAKEN.items() if taken == way)
            print(f"\n{way} ({len(names)}): {', '.join(names)}")
        print(f"adapters ({len(FIT)}): {', '.join(FIT)}")
    assert len(TAKEN) >= 40 and len(FIT) >= 30
