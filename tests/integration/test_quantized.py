"""A base model that is quantised as it is loaded: learned on as its dequantised self, undone for export."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cli_for_tests import run as cli
from everalign import AdapterOptions
from everalign.data.collate import collate
from everalign.errors import InputError
from everalign.learning.export import export_version
from everalign.learning.run_data import load_run
from everalign.modeling import base_weights
from everalign.modeling.loading import load_base, load_model, model_fingerprint
from everalign.modeling.policy import Policy
from everalign.modeling.runtime import recomputable_layers, recomputing
from learner_for_tests import held_out, make_learner, save_model, task_rows
from models_for_tests import packed, perturb, random_pairs, saved_model

pytest.importorskip("bitsandbytes", reason="quantises: pip install everalign[quantize]")

WIDE = {"adapter": AdapterOptions(rank=4, alpha=8.0), "options": {"quantize": "nf4"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    scores = make_learner(model, output, **WIDE).learn(task_rows("warm"), "warm", held_out("warm"))
    assert scores["warm"].accuracy > 0.9
    return output


def logits(model):
    with torch.no_grad():
        found = model.eval()(input_ids=torch.arange(3, 30)[None]).logits
    return found - found.mean(-1, keepdim=True)


# ---- the same gradients as on the weights that it stands for ----


def gradients(model, batch, again):
    """Of every adapter, after a pass without gradients, which must not change how the next ones are computed."""
    policy = perturb(Policy(model, 4, 8.0)).train()
    with policy.evaluating():
        policy(batch)
    with recomputing(recomputable_layers(policy) if again else []):
        sums = policy(batch)
        (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
    return sums.detach(), {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_those_of_the_dequantised_weights(again):
    """bitsandbytes packs weights for inference on a processor with AVX512-BF16, and gradients then pass them by."""
    batch = collate(random_pairs(4, longest=20), shared=True)
    found, of_packed = gradients(load_model(str(saved_model()), quantize="nf4"), batch, again)
    plain = base_weights.plain_weights(load_model(str(saved_model()), quantize="nf4"))
    expected, of_plain = gradients(plain, batch, False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert of_packed.keys() == of_plain.keys()
    for name, gradient in of_plain.items():
        assert gradient.norm() > 0
        assert (of_packed[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_linear_modules_are_quantised_and_nothing_else():
    quantised, plain = load_model(str(saved_model()), quantize="nf4"), load_model(str(saved_model()))
    sizes = {}
    for name, parameter in plain.named_parameters():
        own = quantised.get_parameter(name)
        if "proj" in name:
            assert own.dtype == torch.uint8
            sizes[name] = own.numel() / parameter.numel()
        else:
            assert torch.equal(own, parameter)
    assert set(sizes.values()) == {0.5}


# ---- a run ----


def test_a_run_remembers_it_and_goes_on_with_it(model, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    assert facts["settings"]["quantize"] == "nf4"
    assert facts["model_fingerprint"] == f"{model_fingerprint(load_model(str(model)))}-nf4"
    rows = [json.dumps(row.to_json()) for row in task_rows("brief")]
    (tmp_path / "brief.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"settings \(quantize: 'nf4' then, None now\)"):
        make_learner(model, run, adapter=WIDE["adapter"], resume=True)
    arguments = ["--resume", "--task", f"brief={tmp_path / 'brief.jsonl'}", "--output", str(run), "--no-report"]
    code, _, error = cli(capsys, "learn", *arguments)
    assert code == 0, error
    assert [version.task for version in load_run(run).versions] == ["warm", "brief"]
    code, out, error = cli(capsys, "evaluate", str(run), "--limit", "1", "--max-new-tokens", "4", "--json")
    assert code == 0, error
    assert {row["version"] for row in json.loads(out)["results"]} == {"000", "002-brief"}


def test_a_run_from_before_is_one_of_plain_weights(model, tmp_path):
    make_learner(model, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    facts = json.loads(path.read_text())
    del facts["settings"]["quantize"]
    path.write_text(json.dumps(facts))
    assert make_learner(model, tmp_path / "run", resume=True).context.options.quantize is None


# ---- export ----


def test_what_was_learned_is_merged_into_the_plain_weights(model, finished, tmp_path, capsys):
    code, out, error = cli(capsys, "export", str(finished), str(tmp_path / "out"), "--json")
    assert code == 0, error
    shown = json.loads(out)
    adapter = finished / "versions" / "001-warm" / "adapter"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter))
    exported = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(exported, logits(plain), rtol=1e-4, atol=1e-4)
    quantised = logits(PeftModel.from_pretrained(load_model(str(model), quantize="nf4"), str(adapter)))
    moved = ((exported - quantised).norm(dim=-1) / quantised.norm(dim=-1)).median()
    assert shown["quantisation"] == pytest.approx(moved.item(), rel=0.5)
    assert 0.001 < shown["quantisation"] < 0.3
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    code, out, _ = cli(capsys, "export", str(finished), str(tmp_path / "again"))
    assert f"logits differ by {shown['quantisation']:.1%} of their norm from those it was learned with" in out


def test_an_adapter_is_exported_as_it_was_learned(finished, tmp_path, capsys):
    code, _, error = cli(capsys, "export", str(finished), str(tmp_path / "out"), "--adapter")
    assert code == 0, error
    learned = load_file(finished / "versions" / "001-warm" / "adapter" / "adapter_model.safetensors")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert learned.keys() == written.keys()
    assert all(torch.equal(learned[name], written[name]) for name in learned)


def test_other_plain_weights_are_refused(finished, tmp_path):
    other = save_model(tmp_path / "other", seed=1, layers=2)
    with pytest.raises(InputError, match=r"is not the model that .* was started with"):
        export_version(load_run(finished), tmp_path / "out", model=str(other))
    with pytest.raises(InputError, match="as it was loaded, and merges into its plain weights: leave base"):
        export_version(load_run(finished), tmp_path / "out", base=str(other))


def test_a_run_on_published_quantised_weights_is_merged_into_the_model_in_full_precision(model, tmp_path, capsys):
    folder = packed(model, tmp_path / "packed")
    learner = make_learner(folder, tmp_path / "run", adapter=WIDE["adapter"])
    learner.learn(task_rows("warm"), "warm")
    code, out, error = cli(
        capsys, "export", str(tmp_path / "run"), str(tmp_path / "out"), "--base", str(model), "--json"
    )
    assert code == 0, error
    assert 0.001 < json.loads(out)["quantisation"] < 0.3
    adapter = tmp_path / "run" / "versions" / "001-warm" / "adapter"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), logits(plain), rtol=1e-4, atol=1e-4)
    own = logits(AutoModelForCausalLM.from_pretrained(learner.export(tmp_path / "own", base=model)))
    assert torch.equal(own, logits(exported))
    # Another model of the same shape, as far from it as any.
    other = save_model(tmp_path / "other", seed=1, layers=2)
    state = {name: 3 * value for name, value in load_file(other / "model.safetensors").items()}
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"differ by .* of their norm from those on the quantised weights"):
        export_version(load_run(tmp_path / "run"), tmp_path / "bad", base=str(other))
    assert not (tmp_path / "bad").exists()


def test_a_base_for_plain_weights_or_an_adapter_alone_is_refused(model, tmp_path, capsys):
    make_learner(model, tmp_path / "run").learn(task_rows("warm"), "warm")
    with pytest.raises(InputError, match="is not quantised: leave base out"):
        export_version(load_run(tmp_path / "run"), tmp_path / "out", base=str(model))
    code, _, error = cli(capsys, "export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter", "--base", "tiny")
    assert code == 2
    assert "--base: an adapter is merged into nothing" in error


# ---- what cannot be quantised ----


def test_what_is_quantised_already_or_has_an_adapter_to_merge_is_refused(model, finished, tmp_path):
    with pytest.raises(InputError, match="is quantised already, with bitsandbytes: leave quantize out"):
        load_base(str(packed(model, tmp_path / "packed")), "fp32", quantize="nf4")
    with pytest.raises(InputError, match="an adapter is merged into plain weights; write the merged model first"):
        load_base(str(model), "fp32", adapter=str(finished / "versions" / "001-warm" / "adapter"), quantize="nf4")


def test_a_missing_library_is_named_before_anything_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(base_weights, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"quantize nf4 needs bitsandbytes: pip install 'everalign\[quantize\]'"):
        make_learner(model, tmp_path / "run", **WIDE)
    assert not (tmp_path / "run" / "run.json").exists()
