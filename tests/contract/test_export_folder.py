"""The folder that comes out is the folder that went in: other weights, a card, and nothing else that differs."""

import json
import stat
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MixtralConfig,
    Qwen2_5_VLConfig,
    Qwen3MoeConfig,
)

from everalign import AdapterOptions
from everalign.errors import EveralignError, InputError
from everalign.modeling import model_files as checkpoint
from everalign.modeling.loading import load_model
from everalign.modeling.model_files import merged_into, write_checked
from learner_for_tests import make_learner, task_rows
from models_for_tests import SHAPE
from tokenizers_for_tests import byte_tokenizer

PROBE = torch.tensor([[5, 17, 80, 3, 3, 42, 9]])
BASE = {**SHAPE, "vocab_size": 262}
NO_HEADS = {key: value for key, value in BASE.items() if key not in ("head_dim", "num_key_value_heads")}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}


def _deepseek():
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    return DeepseekV3Config(
        **NO_HEADS, num_key_value_heads=4, moe_intermediate_size=16, first_k_dense_replace=1, **ranks, **experts
    )


def _gemma3():
    return Gemma3Config(
        text_config={**BASE, "query_pre_attn_scalar": 8, "sliding_window": 16},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=261,
    )


def _llava():
    return LlavaConfig(
        text_config={"model_type": "llama", **BASE},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=261,
    )


def _mistral3():
    return Mistral3Config(
        text_config={"model_type": "mistral", **BASE},
        vision_config={"model_type": "pixtral", "head_dim": 8, **VISION},
        image_token_index=261,
    )


def _qwen2_5_vl():
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2]}
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLConfig(
        text_config={**NO_HEADS, "num_key_value_heads": 2, "rope_scaling": rope},
        vision_config={**tower, "fullatt_block_indexes": [0]},
        image_token_id=261,
        video_token_id=260,
    )


CONFIGS = {
    "llama": lambda: LlamaConfig(**BASE),
    "tied": lambda: LlamaConfig(**BASE, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma3": _gemma3,
    "llava": _llava,
    "mistral3": _mistral3,
    "qwen2_5_vl": _qwen2_5_vl,
    "mixtral": lambda: MixtralConfig(**BASE, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**BASE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "deepseek_v3": _deepseek,
    "gpt_oss": lambda: GptOssConfig(**BASE, num_local_experts=4),
}


def save(folder, kind="llama", dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    vision = hasattr(config, "vision_config")
    model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_config(config).to(dtype)
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder):
    """The model of a folder in fp32, of the very class that it names."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)


def adapter_of(folder, path):
    """An adapter of attention, which every architecture has, made by plain peft; and what model and adapter compute."""
    model = loaded(folder)
    vision = hasattr(model.config, "vision_config")
    targets = r".*language_model.*\.(q_proj|o_proj)" if vision else r".*\.(q_proj|o_proj|q_a_proj|c_attn)"
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(path)
    return logits(adapted)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits.float()


def export(folder, adapter, out, dtype="auto"):
    out.mkdir()
    return write_checked(merged_into(load_model(str(folder)), adapter), out, dtype)


def tensors(folder):
    """Every tensor of a checkpoint, by file and name."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as held:
            found |= {(file.name, key): held.get_tensor(key) for key in held.keys()}  # noqa: SIM118
    return found


def forms(held):
    return {key: (tensor.shape, tensor.dtype) for key, tensor in held.items()}


@pytest.mark.parametrize(
    ("kind", "shards"),
    [*((kind, None) for kind in CONFIGS), *((kind, "20KB") for kind in ("llama", "mixtral", "llava"))],
)
def test_names_shapes_dtypes_and_files_of_the_weights_are_those_that_went_in(tmp_path, kind, shards):
    folder = save(tmp_path / "model", kind, **({} if shards is None else {"max_shard_size": shards}))
    expected = adapter_of(folder, tmp_path / "adapter")
    written = export(folder, tmp_path / "adapter", tmp_path / "out")
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert forms(after) == forms(before)
    assert shards is None or len({name for name, _ in after}) > 1
    changed = {key for _, key in before if not torch.equal(after[_, key], before[_, key])}
    assert changed
    assert all(any(part in key for part in ("q_proj", "o_proj", "q_a_proj", "c_attn")) for key in changed)
    assert not any("vision" in key for key in changed)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        if (folder / name).exists():
            assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((folder / name).read_text())
    error = (logits(loaded(tmp_path / "out")) - expected).norm(dim=-1).median() / expected.norm(dim=-1).median()
    assert error <= 0.1
    assert written.dtype == "bf16"
    assert 0 < written.rounding <= 0.1


@pytest.mark.parametrize(
    ("base", "dtype", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp16", torch.float16),
    ],
)
def test_weights_are_merged_in_fp32_and_rounded_once(tmp_path, base, dtype, expected):
    folder = save(tmp_path / "model", dtype=base)
    adapter_of(folder, tmp_path / "adapter")
    export(folder, tmp_path / "adapter", tmp_path / "out", dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, merged[key].to(expected)) for key, tensor in written.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == expected


def test_what_a_checkpoint_holds_in_another_precision_keeps_it(tmp_path):
    folder = save(tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].float()
    held["model.rotary_emb.inv_freq"] = torch.rand(4)  # as old checkpoints have, and no model reads
    checkpoint.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    adapter_of(folder, tmp_path / "adapter")
    for dtype, most in (("auto", torch.bfloat16), ("fp16", torch.float16)):
        export(folder, tmp_path / "adapter", tmp_path / dtype, dtype)
        written = load_file(tmp_path / dtype / "model.safetensors")
        assert written.keys() == held.keys()
        wide = {key for key, tensor in written.items() if tensor.dtype == torch.float32}
        assert wide == {"model.norm.weight", "model.rotary_emb.inv_freq"}
        assert {tensor.dtype for key, tensor in written.items() if key not in wide} == {most}


def test_values_beyond_fp16_are_refused(tmp_path):
    folder = save(tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    checkpoint.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    adapter_of(folder, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"up_proj\.weight has values beyond the range of fp16: choose --dtype bf16"):
        export(folder, tmp_path / "adapter", tmp_path / "out", "fp16")


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_in_pickles_come_out_as_safetensors(tmp_path, shards):
    """With a head that is the embeddings under a second name, as such files have it."""
    folder = save(tmp_path / "model", "tied")
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    held["lm_head.weight"] = held["model.embed_tokens.weight"]
    if shards == 1:
        torch.save(held, folder / "pytorch_model.bin")
    else:
        names = {key: f"pytorch_model-0000{1 + ('layers' in key)}-of-00002.bin" for key in held}
        for name in set(names.values()):
            torch.save({key: held[key] for key in held if names[key] == name}, folder / name)
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    adapter_of(folder, tmp_path / "adapter")
    export(folder, tmp_path / "adapter", tmp_path / "out")
    written = {key: tensor for (_, key), tensor in tensors(tmp_path / "out").items()}
    assert forms(written) == forms(held)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    assert not list((tmp_path / "out").glob("*.bin*"))
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
        assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}


@pytest.mark.parametrize(
    ("kind", "former"),
    [
        # As the checkpoints on the Hub have it, and as transformers writes them now.
        ("qwen2_5_vl", {"model.language_model.": "model.", "model.visual.": "visual."}),
        ("llava", {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}),
        ("llava", {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}),
        ("mixtral", {}),
    ],
)
def test_names_of_other_versions_of_transformers_stay(tmp_path, kind, former):
    folder = save(tmp_path / "model", kind)
    held = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        start = next((old for old in former if key.startswith(old)), "")
        held[former.get(start, "") + key.removeprefix(start)] = tensor
    checkpoint.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    expected = adapter_of(folder, tmp_path / "adapter")
    export(folder, tmp_path / "adapter", tmp_path / "out", "fp32")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == held.keys()
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


def test_names_without_the_prefix_that_the_model_has_stay_so(tmp_path):
    """GPT-2's own checkpoints, and all that were saved from a model without its head."""
    folder = save(tmp_path / "model", "gpt2")
    held = {key.removeprefix("transformer."): t for key, t in load_file(folder / "model.safetensors").items()}
    checkpoint.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    expected = adapter_of(folder, tmp_path / "adapter")
    export(folder, tmp_path / "adapter", tmp_path / "out", "fp32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == held.keys()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-4)


def test_files_that_are_no_weights_come_along_and_those_of_other_weights_do_not(tmp_path):
    folder = save(tmp_path / "model")
    kept = {
        "tokenizer.model": b"\x00pieces",
        "preprocessor_config.json": b'{"size": 28}',
        "processor_config.json": b"{}",
        "chat_template.json": b"{}",
        "modeling_own.py": b"class Own: ...\n",
        "LICENSE": b"as you like",
        "additional_chat_templates/tools.jinja": b"{{ messages }}",
    }
    left = ("consolidated.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "original/params.json")
    left += (".hidden", "README.md", "optimizer.pt", "adapter_config.json", "model.gguf")
    adapter_of(folder, tmp_path / "adapter")
    for name, content in {**kept, **dict.fromkeys(left, b"{}")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "adapter_config.json").unlink()  # peft's own, which transformers would apply; it is loaded without
    export(folder, tmp_path / "adapter", tmp_path / "out")
    out = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {name: out[name] for name in kept} == kept
    assert not set(left) & set(out)
    own = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert set(out) == {*kept, *own, "model.safetensors"}
    for name in own:
        assert out[name] == (folder / name).read_bytes()


def test_a_head_that_got_weights_of_its_own_is_written_besides(tmp_path):
    """As an adapter that was merged into the base model before leaves it."""
    folder = save(tmp_path / "model", "tied", max_shard_size="20KB")
    model = load_model(str(folder))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.5, requires_grad=False)
    model.config.tie_word_embeddings = False
    expected = logits(model)
    (tmp_path / "out").mkdir()
    write_checked(model, tmp_path / "out", "fp32")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5)
    assert {key for _, key in tensors(tmp_path / "out")} - {key for _, key in tensors(folder)} == {"lm_head.weight"}


def test_embeddings_that_grew_are_written_with_the_size_of_the_vocabulary(tmp_path):
    folder = save(tmp_path / "model")
    model = load_model(str(folder))
    model.resize_token_embeddings(270, mean_resizing=False)
    expected = logits(model)
    (tmp_path / "out").mkdir()
    write_checked(model, tmp_path / "out", "fp32")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.vocab_size == 270
    torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5)


def test_what_was_written_wrongly_is_not_handed_out(tmp_path, monkeypatch):
    folder = save(tmp_path / "model")
    adapter_of(folder, tmp_path / "adapter")
    save_file = checkpoint.save_file

    def forgetful(held, *arguments, **more):
        save_file({**held, "model.norm.weight": held["model.norm.weight"] * 1.01}, *arguments, **more)

    monkeypatch.setattr(checkpoint, "save_file", forgetful)
    with pytest.raises(EveralignError, match="the written model's logits differ from the merged ones by"):
        export(folder, tmp_path / "adapter", tmp_path / "out")


def test_a_real_sentencepiece_tokenizer_comes_out_as_it_went_in(tmp_path):
    package = pytest.importorskip("mistral_common", reason="its tokenizers come with the package mistral-common")
    folder = save(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    pieces = (Path(package.__file__).parent / "data" / "tokenizer.model.v1").read_bytes()
    (folder / "tokenizer.model").write_bytes(pieces)
    facts = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    adapter_of(folder, tmp_path / "adapter")
    export(folder, tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == pieces
    before, after = (AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "out"))
    assert before("Wörter, two  spaces")["input_ids"] == after("Wörter, two  spaces")["input_ids"]
    assert stat.S_IMODE((tmp_path / "out" / "tokenizer.model").stat().st_mode) & 0o400


def test_a_model_that_reads_images_learns_from_texts_and_stays_what_it_was(tmp_path):
    folder = save(tmp_path / "model", "llava")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    learner = make_learner(folder, tmp_path / "run", adapter=AdapterOptions(rank=4, alpha=8.0))
    learner.learn(task_rows("warm"), "warm")
    out = learner.export(tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {*(file.name for file in folder.iterdir()), "README.md"}
    before, after = tensors(folder), tensors(out)
    assert forms(after) == forms(before)
    changed = {key for _, key in before if not torch.equal(after[_, key], before[_, key])}
    assert changed
    assert all("language_model.layers" in key or "language_model.model.layers" in key for key in changed)
    adapter = PeftModel.from_pretrained(loaded(folder), str(tmp_path / "run" / "versions" / "001-warm" / "adapter"))
    assert 'pipeline("image-text-to-text"' in (out / "README.md").read_text()
    error = (logits(loaded(out)) - logits(adapter)).norm() / logits(adapter).norm()
    assert error <= 0.02


def test_a_checkpoint_that_is_quantised_comes_out_in_plain_numbers(tmp_path):
    """Its tensors on disk have no places for what was merged; the model in memory was turned back into numbers."""
    folder = save(tmp_path / "model")
    model = load_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    expected = logits(model)
    for dtype, kind in (("auto", torch.bfloat16), ("fp32", torch.float32)):
        (tmp_path / dtype).mkdir()
        write_checked(load_model(str(tmp_path / "auto")) if dtype == "fp32" else model, tmp_path / dtype, dtype)
        written = json.loads((tmp_path / dtype / "config.json").read_text())
        assert "quantization_config" not in written
        assert AutoModelForCausalLM.from_pretrained(tmp_path / dtype).dtype == kind
        torch.testing.assert_close(logits(loaded(tmp_path / dtype)), expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "auto" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
