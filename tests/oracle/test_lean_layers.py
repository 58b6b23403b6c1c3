"""Norms and gated layers that keep less for the backward pass, against the models' own."""

import pickle

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from everalign.modeling.policy import Policy
from everalign.modeling.runtime import SavedBytes, use_lean_layers
from models_for_tests import FAMILIES, random_model

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


def gradients(module, x, learns):
    module.requires_grad_(learns)
    x = x.clone().requires_grad_()
    y = module(x)
    (y.float() * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), x.grad, [p.grad for p in module.parameters() if learns]


def assert_lean_agrees(make, width, dtype, tolerance, learns):
    torch.manual_seed(0)
    own, lean = make().to(dtype), make().to(dtype)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    lean.load_state_dict(own.state_dict())
    use_lean_layers(lean)
    assert "forward" in vars(lean)
    x = torch.randn(3, 700, width).to(dtype)
    x[0, 0] = 0.0
    (y, dx, dw), (our_y, our_dx, our_dw) = (gradients(module, x, learns) for module in (own, lean))
    for theirs, ours in zip([y, dx, *dw], [our_y, our_dx, *our_dw], strict=True):
        assert ours.dtype == theirs.dtype
        size = theirs.float().abs().max()
        torch.testing.assert_close(ours.float() / size, theirs.float() / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("learns", [False, True])
def test_norms(dtype, tolerance, learns):
    assert_lean_agrees(lambda: LlamaRMSNorm(64, eps=1e-5), 64, dtype, tolerance, learns)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("learns", [False, True])
def test_gated_layers(dtype, tolerance, learns):
    config = random_model("llama").config
    assert_lean_agrees(lambda: LlamaMLP(config), config.hidden_size, dtype, tolerance, learns)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rotary_embeddings(dtype, tolerance):
    """Values and gradients of the library's own function, of which the cosines of both halves may differ."""
    use_lean_layers(random_model("llama"))
    lean, own = modeling_llama.apply_rotary_pos_emb, modeling_llama.apply_rotary_pos_emb.__wrapped__
    generator = torch.Generator().manual_seed(0)
    cos, sin = (torch.randn(1, 7, 8, generator=generator).to(dtype) for _ in range(2))
    found = {}
    for name, rotate in {"own": own, "lean": lean}.items():
        start = [torch.randn(2, heads, 7, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2)]
        leaves = [x.to(dtype).requires_grad_() for x in start]
        rotated = rotate(*(leaf * 1.0 for leaf in leaves), cos, sin)
        sum((x.float() * torch.linspace(-1, 2, x.numel()).view(x.shape)).sum() for x in rotated).backward()
        found[name] = [*(x.detach() for x in rotated), *(leaf.grad for leaf in leaves)]
    for theirs, ours in zip(*found.values(), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_a_rotary_embedding_writes_into_nothing_that_is_needed():
    use_lean_layers(random_model("llama"))
    rotate = modeling_llama.apply_rotary_pos_emb
    cos, sin = torch.rand(2, 1, 7, 8).unbind(0)
    leaf, shared = torch.rand(1, 4, 7, 8, requires_grad=True), torch.rand(1, 1, 7, 8).expand(1, 2, 7, 8)
    before = leaf.detach().clone(), shared.clone()
    rotate(leaf, shared, cos, sin)
    assert torch.equal(leaf, before[0])
    assert torch.equal(shared, before[1])
    # A product keeps its operands for the backward pass: writing over one is an error, not a wrong gradient.
    query = leaf * 1.0
    kept = query * query
    rotate(query, shared.clone(), cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


class Clamped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-50, 50))


class Cast(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states).float()


def test_layers_that_compute_something_else_stay_as_they_are():
    norm = Gemma2RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    for module in (norm, Clamped(random_model("llama").config), Cast(16)):
        use_lean_layers(module)
        assert "forward" not in vars(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_what_they_did(family):
    ids = torch.arange(3, 27).view(3, 8)
    model = random_model(family)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        use_lean_layers(model)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-4)


def test_a_policy_keeps_less(monkeypatch):
    ids = torch.arange(128)[None] % 40 + 3

    def kept(policy):
        with SavedBytes(policy) as saved:
            policy.language_model(input_ids=ids)
        return saved.total

    lean = kept(Policy(random_model("llama"), 4, 8.0))
    monkeypatch.setattr("everalign.modeling.policy.use_lean_layers", lambda model: None)
    assert lean < 0.85 * kept(Policy(random_model("llama"), 4, 8.0))


def test_a_model_of_lean_layers_can_be_pickled():
    model = random_model()
    use_lean_layers(model)
    again = pickle.loads(pickle.dumps(model))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.model.norm.forward.args[0] is again.model.norm
