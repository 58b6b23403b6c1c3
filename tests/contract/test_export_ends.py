"""An export says where its answers end, so that it stops wherever it is served as it was taught to."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from everalign import AdapterOptions
from everalign.data import PreferenceSet
from everalign.data.chat_template import DEFAULT_CHAT_TEMPLATE
from everalign.methods import SequentialFineTuning
from everalign.modeling.sampling import write_ends
from learner_for_tests import make_learner, task_rows
from models_for_tests import random_model
from tokenizers_for_tests import CHATML, NO_END, byte_tokenizer

EOS, IM_END = 257, 259
WITH_EOS = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"


def chats(count=16):
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}?"}], "chosen": "Yes.", "rejected": "no"} for i in range(count)
    ]
    return PreferenceSet.of(rows, source="chats.jsonl")


def save(folder, template=CHATML, generation=None, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer(template)
    model = random_model(vocabulary=len(tokenizer))
    model.config.eos_token_id = EOS
    model.generation_config = GenerationConfig(
        eos_token_id=EOS if generation is None else generation, do_sample=True, temperature=0.7
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def learned(folder, output, rows):
    """A run that has learned its rows well enough to say the answer, and to stop then."""
    learner = make_learner(
        folder, output, SequentialFineTuning(), "sft", adapter=AdapterOptions(rank=8, alpha=16.0),
        options={"learning_rate": 2e-2, "epochs": 6},
    )  # fmt: skip
    learner.learn(rows, "a")
    return learner


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    place = tmp_path_factory.mktemp("chatting")
    return learned(save(place / "model"), place / "run", chats())


def generated(folder, limit=20):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        chats()[3].prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=limit, pad_token_id=0)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])


def test_an_export_stops_where_it_was_taught_to(chatting, tmp_path):
    """The base model's EOS is another token than the one that its template ends turns with."""
    out = chatting.export(tmp_path / "out")
    assert generated(out) == "Yes.<|im_end|>"
    assert read(out, "generation_config.json")["eos_token_id"] == [EOS, IM_END]
    assert read(out, "generation_config.json")["temperature"] == 0.7
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"
    assert read(out, "config.json")["eos_token_id"] == EOS
    before, after = chatting.tokenizer, AutoTokenizer.from_pretrained(out)
    assert before("a text</s>")["input_ids"] == after("a text</s>")["input_ids"]
    assert before.apply_chat_template(chats()[0].prompt) == after.apply_chat_template(chats()[0].prompt)


def test_the_adapter_alone_says_so_too(chatting, tmp_path):
    out = chatting.export_adapter(tmp_path / "out")
    assert read(out, "generation_config.json")["eos_token_id"] == [EOS, IM_END]
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("held", "template", "with_chats", "expected"),
    [
        (EOS, CHATML, True, [EOS, IM_END]),
        ([EOS, 7], CHATML, True, [EOS, 7, IM_END]),
        ([IM_END, EOS], CHATML, True, [IM_END, EOS]),
        (7, CHATML, False, [7, EOS]),
        (EOS, CHATML, False, EOS),
        (EOS, None, True, EOS),
        (EOS, NO_END, True, EOS),
    ],
)
def test_ends_are_added_to_those_that_were_named(tmp_path, held, template, with_chats, expected):
    folder = save(tmp_path / "model", template, held)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_ends(folder, None, byte_tokenizer(template), with_chats)
    assert read(folder, "generation_config.json")["eos_token_id"] == expected
    if held == expected and not (with_chats and template == CHATML):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_without_generation_configuration_gets_one_where_it_is_needed(tmp_path):
    folder = save(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    generation = GenerationConfig.from_model_config(AutoModelForCausalLM.from_pretrained(folder).config)
    write_ends(folder, generation, byte_tokenizer(CHATML), chats=False)
    assert not (folder / "generation_config.json").exists()
    write_ends(folder, generation, byte_tokenizer(CHATML), chats=True)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [EOS, IM_END]


@pytest.mark.parametrize(
    ("tokenizer", "held", "with_chats", "expected"),
    [
        (byte_tokenizer(CHATML), EOS, True, "<|im_end|>"),
        (byte_tokenizer(CHATML), EOS, False, "</s>"),
        # As Gemma and Phi-3 have it.
        (byte_tokenizer(CHATML), [EOS, IM_END], True, "</s>"),
        # Its template would render other texts, and its texts would end with another token.
        (byte_tokenizer(WITH_EOS), EOS, True, "</s>"),
        (byte_tokenizer(CHATML, adds="$A </s>"), EOS, True, "</s>"),
        (byte_tokenizer(NO_END), EOS, True, "</s>"),
    ],
)
def test_the_tokenizer_s_eos_becomes_the_end_of_turns_where_nothing_else_changes(
    tmp_path, tokenizer, held, with_chats, expected
):
    folder = save(tmp_path / "model", generation=held, tokenizer=tokenizer)
    special = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    write_ends(folder, None, tokenizer, with_chats)
    assert AutoTokenizer.from_pretrained(folder).eos_token == expected
    named = read(folder, "special_tokens_map.json")["eos_token"]
    assert (named if isinstance(named, str) else named["content"]) == expected


def test_the_template_that_chats_were_learned_by_comes_along(tmp_path):
    folder = save(tmp_path / "model", None)
    out = {}
    for name, rows in (("chats", chats(8)), ("texts", task_rows("warm"))):
        learner = make_learner(folder, tmp_path / name, objective="sft")
        learner.learn(rows, "a")
        out[name] = [learner.export(tmp_path / f"{name}-out"), learner.export_adapter(tmp_path / f"{name}-adapter")]
    assert [AutoTokenizer.from_pretrained(place).chat_template for place in out["chats"]] == [DEFAULT_CHAT_TEMPLATE] * 2
    assert [AutoTokenizer.from_pretrained(place).chat_template for place in out["texts"]] == [None] * 2


def test_a_corrector_s_folder_names_the_end_of_corrections(tmp_path):
    from corrections_for_tests import corrections
    from everalign.correction import CorrectorOptions, train_corrector

    folder = save(tmp_path / "model", CHATML, [IM_END])
    options = CorrectorOptions(epochs=1, identity=0, lora_rank=2)
    trained = train_corrector(str(folder), corrections(4, 0), tmp_path / "out", options=options)
    assert read(trained.path, "generation_config.json")["eos_token_id"] == [IM_END, EOS]
    assert AutoTokenizer.from_pretrained(trained.path).eos_token == "</s>"


def test_what_is_sampled_stops_at_the_same_tokens(chatting):
    from everalign.modeling.sampling import sample_completions
    from everalign.options import SamplingOptions

    options = SamplingOptions(completions=2, temperature=0.01, max_new_tokens=20)
    with torch.no_grad():
        (found,) = sample_completions(chatting.policy, chatting.tokenizer, [chats()[3].prompt], options, seed=0)
    assert found.texts == ("Yes.", "Yes.")
