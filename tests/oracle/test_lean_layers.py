"""Norms and gated layers that keep less for the backward pass, against the models' own."""

import pickle

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
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
