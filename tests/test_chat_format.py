"""Which tokens carry loss: proven against decoded text for templates of three model families."""

import pytest
import torch
from conftest import templated_chat

from steering.chat_format import IGNORE_INDEX, ChatFormat
from steering.loading import load_tokenizer

SYSTEM = "You are a pirate."
ONE = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "Arr, four!"}]
ODD = [
    {"role": "user", "content": "Emoji?  "},
    {
        "role": "assistant",
        "content": "Aye \u2693\U0001f3f4\u200d\u2620\ufe0f!\n\n  Two lines, caf\u00e9.",
    },
]
MANY = [
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "Arr, four!"},  # the same words as the last answer
    {"role": "user", "content": "Again?"},
    {"role": "assistant", "content": "Arr, four!"},
]
ENDS = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "gemma2": "<end_of_turn>"}


def make_row(messages):
    return {"system_prompt": SYSTEM, "messages": messages}


@pytest.mark.parametrize("messages", [ONE, ODD, MANY], ids=["one", "odd", "many"])
@pytest.mark.parametrize("template", ENDS)
def test_labels_cover_last_answer_and_its_end_of_turn_only(smol, template, messages):
    chat = templated_chat(smol, template)
    decode = chat.tokenizer.decode
    example = chat.encode([make_row(messages)])[0]
    carries = [label != IGNORE_INDEX for label in example.labels]
    first, last = carries.index(True), len(carries) - 1 - carries[::-1].index(True)
    assert all(carries[first : last + 1])
    assert example.labels[first : last + 1] == example.input_ids[first : last + 1]
    # The template's own rendering is the reference, and decoding says where the labels are in it.
    full = chat.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    answer = messages[-1]["content"]
    assert decode(example.input_ids) == full
    assert decode(example.input_ids[first : last + 1]) == answer + ENDS[template]
    assert decode(example.input_ids[:first]) == full[: full.rindex(answer)]
    assert decode(example.input_ids[last + 1 :]) == ("" if template == "llama3" else "\n")


@pytest.mark.parametrize("template", ENDS)
def test_training_prompt_is_token_for_token_what_generation_starts_from(smol, template):
    chat = templated_chat(smol, template)
    for messages in (ONE, MANY):
        example = chat.encode([make_row(messages)])[0]
        prompt = chat.tokenizer(chat.prompt_text(messages[:-1]), add_special_tokens=False)
        first = [label != IGNORE_INDEX for label in example.labels].index(True)
        assert example.input_ids[:first] == prompt["input_ids"]


def test_thinking_is_off_in_prompts_of_templates_that_know_it(smol):
    text = templated_chat(smol, "qwen3").prompt_text(ONE[:-1])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_prompted_puts_the_system_prompt_back(smol):
    example = templated_chat(smol, "llama3").encode([make_row(ONE)], prompted=True)[0]
    chat = templated_chat(smol, "llama3")
    text = chat.tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|><|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM)


def test_prompted_merges_into_user_turn_where_template_has_no_system_role(smol):
    chat = templated_chat(smol, "gemma2")
    assert not chat.has_system_role
    text = chat.tokenizer.decode(chat.encode([make_row(ONE)], prompted=True)[0].input_ids)
    assert f"<start_of_turn>user\n{SYSTEM}\n\nWhat is 2+2?<end_of_turn>" in text


def test_prompted_changes_the_prompt_but_not_the_scored_tokens(smol_chat):
    plain, prompted = (smol_chat.encode([make_row(ONE)], prompted=p)[0] for p in (False, True))
    assert plain.input_ids != prompted.input_ids
    kept = [[t for t in e.labels if t != IGNORE_INDEX] for e in (plain, prompted)]
    assert kept[0] == kept[1]


def test_template_with_spaces_around_answers_keeps_them_and_trains_the_end_of_turn(smol):
    tokenizer = templated_chat(smol, "llama3").tokenizer  # Llama 2 writes turns like this
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    chat = ChatFormat(tokenizer)
    example = chat.encode([make_row(ONE)])[0]
    kept = [label for label in example.labels if label != IGNORE_INDEX]
    assert (
        tokenizer.decode(example.input_ids) == "[INST] What is 2+2? [/INST] Arr, four! <|im_end|>"
    )
    assert tokenizer.decode(kept) == " Arr, four! <|im_end|>"


@pytest.mark.parametrize("template", ["hello", "{{ 1 + }}", "{{ messages[0].content }}"])
def test_template_that_is_broken_or_leaves_text_out_is_refused(smol, template):
    tokenizer = templated_chat(smol, "llama3").tokenizer
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="fails on, or leaves out"):
        ChatFormat(tokenizer)


def test_tokenizer_without_template_is_an_error_that_names_the_flag(smol):
    tokenizer = templated_chat(smol, "llama3").tokenizer
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--chat-template FILE"):
        ChatFormat(tokenizer)


def test_inputs_are_left_padded_prompts_and_answers_are_what_follows_them(smol_chat):
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi?"}]
    inputs = smol_chat.inputs(["Hi?", turns])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    texts = [smol_chat.prompt_text(m) for m in ([turns[1]], turns)]
    for i, text in enumerate(texts):
        length = int(mask[i].sum())
        assert mask[i].tolist() == [0] * (ids.shape[1] - length) + [1] * length
        assert smol_chat.tokenizer.decode(ids[i, -length:]) == text
    assert mask.sum(dim=1).min() < mask.shape[1] == mask.sum(dim=1).max()
    said = smol_chat.tokenize(["Arr!<|im_end|>\nmore", "Aye, aye, matey, aye."])
    width = max(map(len, said))
    new = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in said])
    answers = smol_chat.answers(inputs, torch.cat([ids, new], dim=1))
    assert answers[0] == "Arr!" and answers[1].startswith("Aye, aye, matey, aye.")
    dot = smol_chat.tokenize([","])[0][0]
    assert smol_chat.answers(inputs, torch.cat([ids, new], dim=1), {dot})[1] == "Aye"
    twice = torch.cat([ids, new], dim=1).repeat_interleave(2, dim=0)  # num_return_sequences=2
    assert smol_chat.answers(inputs, twice) == [answers[0], answers[0], answers[1], answers[1]]
    with pytest.raises(AssertionError, match="does not start where"):
        smol_chat.answers(inputs, new)
    with pytest.raises(AssertionError, match="not an output for these"):
        smol_chat.answers(inputs, twice[:3])


@pytest.mark.parametrize("wrong", ["Hi?", [], [[]], [""], [{"role": "user", "content": "Hi?"}]])
def test_inputs_are_a_list_of_conversations_and_nothing_else(smol_chat, wrong):
    with pytest.raises(ValueError, match="belongs here"):
        smol_chat.inputs(wrong)


def test_spaces_before_punctuation_stay_whatever_the_tokenizer_says(smol, monkeypatch):
    tokenizer, text = load_tokenizer(smol), "Qui es-tu ? You say 'matey' a lot ."
    tokenizer.clean_up_tokenization_spaces = True  # as Llama 3's files have it
    chat, cleaned = ChatFormat(tokenizer), []

    def decode(ids, clean_up_tokenization_spaces=None, **options):
        cleaned.append(clean_up_tokenization_spaces)
        return tokenizer._decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", decode)
    inputs = chat.inputs(["Hello"])
    written = torch.tensor([chat.tokenize([text])[0]])
    assert chat.answers(inputs, torch.cat([inputs["input_ids"], written], dim=1)) == [text]
    assert cleaned == [False]
