"""The contract of every architecture: two tasks are learned with the defaults, or it is refused before.

Learned means: two versions, whose adapter plain peft loads onto the plain model, whose export plain transformers loads,
all three with the same logits, and log-probabilities of shared and packed rows that are those of each row alone.
"""

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from everalign import AdapterOptions, Learner, PreferenceSet, TrainingOptions
from everalign.data.collate import collate
from everalign.data.tokenization import TokenizedRow
from everalign.errors import InputError
from everalign.modeling.loading import language_model_class
from models_for_tests import SHAPE, random_pairs
from tiers_for_tests import slow_but
from tokenizers_for_tests import byte_tokenizer

VOCABULARY = len(byte_tokenizer())
BASE = {**SHAPE, "vocab_size": VOCABULARY}
# Without what some classes call by other names.
NO_HEAD_DIM = {name: value for name, value in BASE.items() if name != "head_dim"}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
WINDOW = {"sliding_window": 6}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]


def text(kind, **settings):
    """A configuration of the class that transformers has for this kind."""
    return getattr(transformers, kind)(**settings)


ARCHITECTURES = {
    # dense, rotary
    "llama": lambda: text("LlamaConfig", **BASE),
    "mistral": lambda: text("MistralConfig", **BASE, **WINDOW),
    "ministral": lambda: text("MinistralConfig", **BASE, **WINDOW),
    "qwen2": lambda: text("Qwen2Config", **BASE),
    "qwen3": lambda: text("Qwen3Config", **BASE),
    "gemma": lambda: text("GemmaConfig", **BASE),
    "gemma2": lambda: text("Gemma2Config", **BASE, **WINDOW, query_pre_attn_scalar=8),
    "gemma3": lambda: text("Gemma3TextConfig", **BASE, **WINDOW, query_pre_attn_scalar=8, layer_types=MIXED),
    "phi": lambda: text("PhiConfig", **NO_HEAD_DIM),
    "phi3": lambda: text("Phi3Config", **NO_HEAD_DIM),
    "stablelm": lambda: text("StableLmConfig", **NO_HEAD_DIM),
    "starcoder2": lambda: text("Starcoder2Config", **NO_HEAD_DIM),
    "olmo": lambda: text("OlmoConfig", **NO_HEAD_DIM),
    "olmo2": lambda: text("Olmo2Config", **NO_HEAD_DIM),
    "cohere": lambda: text("CohereConfig", **NO_HEAD_DIM),
    "cohere2": lambda: text("Cohere2Config", **BASE, **WINDOW, layer_types=MIXED),
    "granite": lambda: text("GraniteConfig", **NO_HEAD_DIM),
    "glm": lambda: text("GlmConfig", **BASE),
    "glm4": lambda: text("Glm4Config", **BASE),
    "smollm3": lambda: text("SmolLM3Config", **NO_HEAD_DIM),
    "nemotron": lambda: text("NemotronConfig", **BASE),
    "exaone4": lambda: text("Exaone4Config", **BASE, **WINDOW, layer_types=MIXED),
    "ernie4_5": lambda: text("Ernie4_5Config", **BASE),
    "hunyuan": lambda: text("HunYuanDenseV1Config", **BASE),
    "arcee": lambda: text("ArceeConfig", **BASE),
    "apertus": lambda: text("ApertusConfig", **NO_HEAD_DIM),
    "helium": lambda: text("HeliumConfig", **BASE),
    "persimmon": lambda: text("PersimmonConfig", **NO_HEAD_DIM),
    "bitnet": lambda: text("BitNetConfig", **NO_HEAD_DIM),
    "seed_oss": lambda: text("SeedOssConfig", **BASE),
    "diffllama": lambda: text("DiffLlamaConfig", **BASE),
    # dense, older
    "gpt2": lambda: text("GPT2Config", **OLD, vocab_size=VOCABULARY),
    "gpt_neo": lambda: text(
        "GPTNeoConfig", vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4,
        max_position_embeddings=128, window_size=6, attention_types=[[["global", "local"], 1]],
    ),
    "gptj": lambda: text("GPTJConfig", **OLD, rotary_dim=4, vocab_size=VOCABULARY),
    "gpt_neox": lambda: text("GPTNeoXConfig", **NO_HEAD_DIM),
    "codegen": lambda: text("CodeGenConfig", **OLD, rotary_dim=4, vocab_size=VOCABULARY),
    "gpt_bigcode": lambda: text("GPTBigCodeConfig", **OLD, vocab_size=VOCABULARY),
    "opt": lambda: text(
        "OPTConfig", vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=128,
    ),
    "biogpt": lambda: text("BioGptConfig", **{**NO_HEAD_DIM, "max_position_embeddings": 128}),
    "bloom": lambda: text("BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: text("MptConfig", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "falcon": lambda: text(
        "FalconConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "falcon, ALiBi": lambda: text(
        "FalconConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    # experts
    "mixtral": lambda: text("MixtralConfig", **BASE, num_local_experts=4),
    "qwen2_moe": lambda: text("Qwen2MoeConfig", **NO_HEAD_DIM, **MOE, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: text("Qwen3MoeConfig", **BASE, **MOE, mlp_only_layers=[0]),
    "olmoe": lambda: text("OlmoeConfig", **NO_HEAD_DIM, num_experts=4, num_experts_per_tok=2),
    "phimoe": lambda: text("PhimoeConfig", **NO_HEAD_DIM, num_local_experts=4),
    "granitemoe": lambda: text("GraniteMoeConfig", **NO_HEAD_DIM, num_local_experts=4, num_experts_per_tok=2),
    "glm4_moe": lambda: text("Glm4MoeConfig", **BASE, **ROUTED),
    "deepseek_v2": lambda: text(
        "DeepseekV2Config", **{**BASE, "head_dim": 8, "num_key_value_heads": 4}, **ROUTED, **MLA,
        topk_method="greedy",
    ),
    "deepseek_v3": lambda: text("DeepseekV3Config", **{**BASE, "num_key_value_heads": 4}, **ROUTED, **MLA),
    "ernie4_5_moe": lambda: text(
        "Ernie4_5_MoeConfig", **NO_HEAD_DIM, moe_num_experts=4, moe_k=2, moe_intermediate_size=16
    ),
    "gpt_oss": lambda: text(
        "GptOssConfig", **BASE, **WINDOW, num_local_experts=4, num_experts_per_tok=2, layer_types=MIXED
    ),
    "llama4": lambda: text(
        "Llama4TextConfig", **BASE, num_local_experts=4, intermediate_size_mlp=48, interleave_moe_layer_step=2,
        attention_chunk_size=8,
    ),
    "minimax": lambda: text(
        "MiniMaxConfig", **BASE, num_local_experts=4, block_size=8, layer_types=["linear_attention", "full_attention"]
    ),
    # recurrent, and mixed with attention
    "mamba": lambda: text("MambaConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": lambda: text(
        "Mamba2Config", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8,
        head_dim=8, n_groups=1, chunk_size=8,
    ),
    "falcon_mamba": lambda: text(
        "FalconMambaConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "rwkv": lambda: text("RwkvConfig", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=128),
    "recurrent_gemma": lambda: text("RecurrentGemmaConfig", **{**BASE, "num_hidden_layers": 3}, lru_width=32),
    "jamba": lambda: text(
        "JambaConfig", **NO_HEAD_DIM, num_experts=4, attn_layer_offset=1, attn_layer_period=2, mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "bamba": lambda: text("BambaConfig", **NO_HEAD_DIM, **SSM, attn_layer_indices=[1]),
    "falcon_h1": lambda: text("FalconH1Config", **BASE, **{**SSM, "mamba_n_heads": 4}, mamba_d_ssm=32),
    "granitemoehybrid": lambda: text(
        "GraniteMoeHybridConfig", **NO_HEAD_DIM, **SSM, num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=16, layer_types=["mamba", "attention"],
    ),
    "zamba2": lambda: text(
        "Zamba2Config", **{**NO_HEAD_DIM, "num_hidden_layers": 3}, mamba_d_state=8, mamba_headdim=8, n_mamba_heads=8,
        mamba_ngroups=1, chunk_size=8, hybrid_layer_ids=[1, 2], num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid", "hybrid"],
    ),
    "lfm2": lambda: text("Lfm2Config", **NO_HEAD_DIM, layer_types=["conv", "full_attention"], block_multiple_of=8),
    "qwen3_next": lambda: text(
        "Qwen3NextConfig", **BASE, **MOE, **LINEAR, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    # that read images too
    "gemma3, images": lambda: text(
        "Gemma3Config", text_config={**BASE, **WINDOW, "query_pre_attn_scalar": 8, "layer_types": MIXED},
        vision_config=VISION, mm_tokens_per_image=4, image_token_index=90,
    ),
    "gemma3n": lambda: text(
        "Gemma3nTextConfig", **{**BASE, "num_hidden_layers": 4, "intermediate_size": [48] * 4}, **WINDOW,
        layer_types=MIXED * 2, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY, laurel_rank=4, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "llava": lambda: text(
        "LlavaConfig", text_config=text("LlamaConfig", **BASE), image_token_index=90,
        vision_config=text("CLIPVisionConfig", **VISION),
    ),
    "qwen2_5_vl": lambda: text(
        "Qwen2_5_VLConfig",
        text_config={**NO_HEAD_DIM, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32},
    ),
    "mistral3": lambda: text(
        "Mistral3Config", text_config=text("MistralConfig", **BASE), image_token_index=90,
        vision_config=text("PixtralVisionConfig", **{**VISION, "head_dim": 8}),
    ),
}  # fmt: skip

REFUSED = {
    "bert": (
        lambda: text("BertConfig", **{**NO_HEAD_DIM, "is_decoder": False}),
        "BertLMHeadModel .*reading a text from left to right fails .*not a causal language model",
    ),
    "t5": (
        lambda: text("T5Config", vocab_size=VOCABULARY, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8),
        "cannot load a model from the folder .*T5Config",
    ),
}

PAIRS = [
    *random_pairs(3, seed=5, vocabulary=90),
    TokenizedRow.pair("alike", [3, 4, 5], [6, 7, 8, 9, 10], [6, 7, 8, 11], 1.0),
]
TOKENS = torch.tensor([[3 + 5 * i % 80 for i in range(14)]])


@pytest.fixture(scope="module", autouse=True)
def few_words():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def write(config, folder):
    torch.manual_seed(0)
    auto = AutoModelForCausalLM
    if type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        auto = transformers.AutoModelForSeq2SeqLM
    elif language_model_class(config) is AutoModelForImageTextToText:
        auto = AutoModelForImageTextToText
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.8 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def plain(folder):
    """What plain transformers loads from a folder."""
    config = AutoConfig.from_pretrained(folder)
    return language_model_class(config).from_pretrained(folder, dtype=torch.float32).eval()


# Elsewhere everything is done anyhow, and a second less matters seventy times.
REHEARSED = {
    "llama", "gpt2", "qwen2_moe", "phimoe", "deepseek_v3", "llama4", "mamba2", "zamba2", "qwen3_next", "gemma3, images",
    "gemma3n",
}  # fmt: skip


def learn(folder, output, said):
    training = TrainingOptions(learning_rate=1e-2, batch_size=2, max_length=40)
    adapter = AdapterOptions(rank=2, alpha=4.0)
    learner = Learner(str(folder), output=output, training=training, adapter=adapter, log=said.append)
    for answer in ("yes", "maybe"):
        rows = [{"prompt": f"{answer} {i}?", "chosen": f"{answer} {i}", "rejected": f"no {i}"} for i in range(4)]
        learner.learn(PreferenceSet.of(rows, source="rows"), name=answer)
    return learner


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


def same(found, expected, size=1e-4):
    return (found - expected).abs().max() <= size * expected.abs().max()


# One of each kind of block, position, cache and checkpoint; the others are tried by `make test-slow`.
REPRESENTATIVES = REHEARSED - {"phimoe", "zamba2", "llama4"} | {
    "falcon, ALiBi", "rwkv",
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(REPRESENTATIVES, ARCHITECTURES))
def test_two_tasks_are_learned_versioned_reloaded_and_exported(name, tmp_path, monkeypatch):
    if name not in REHEARSED:
        monkeypatch.setattr("everalign.learning.context.rehearse", lambda *_: None)
    write(ARCHITECTURES[name](), tmp_path / "model")
    said = []
    learner = learn(tmp_path / "model", tmp_path / "run", said)
    learned, base = logits(learner.policy.peft), plain(tmp_path / "model")
    assert not same(learned, logits(base), 1e-3)
    has_experts = any("experts." in name and p.ndim == 3 for name, p in base.named_parameters())
    assert has_experts == any("routed experts are not adapted" in line for line in said)
    (adapter,) = (tmp_path / "run" / "versions").glob("002-*/adapter")
    served = PeftModel.from_pretrained(base, str(adapter)).eval()
    assert same(logits(served), learned)
    learner.export(tmp_path / "out")
    assert same(logits(plain(tmp_path / "out")), learned)
    with torch.no_grad():
        found = learner.policy(collate(PAIRS, learner.policy.head.shared)).view(-1, 2)
    for i, pair in enumerate(PAIRS):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            assert found[i, side].item() == pytest.approx(exclusive(served, pair.prompt, response), abs=2e-3)


@torch.no_grad()
def exclusive(model, prompt, response):
    found = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(found[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_learned_with_is_refused_before(make, reason, tmp_path):
    write(make(), tmp_path / "model")
    with pytest.raises(InputError, match=reason):
        learn(tmp_path / "model", tmp_path / "run", [])
    assert not list((tmp_path / "run").glob("versions/*"))
