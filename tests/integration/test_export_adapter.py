"""An adapter alone: plain peft loads it, in the precision that was asked for, with all that serving it takes."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli_for_tests import run as cli
from everalign import AdapterOptions
from everalign.errors import InputError
from everalign.learning.export import export_adapter, export_version, max_lora_rank, model_card
from everalign.learning.run_data import load_run
from everalign.methods import LifeAlign
from everalign.storage import checksums, write_json
from learner_for_tests import make_learner, save_model, tasks

PROBE = torch.tensor([[5, 17, 80, 3, 3, 42, 9]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model") / "base", layers=2)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base model\n")
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    make_learner(model, output, LifeAlign(space="product")).learn_all(tasks("warm", "brief"))
    return output


def sign(version):
    """Note the checksums of a version that was tampered with, as if it had been written so."""
    path = version / "manifest.json"
    files = checksums(version, exclude=frozenset({path.name}))
    write_json(path, json.loads(path.read_text()) | {"files": files})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


@pytest.mark.parametrize(("dtype", "held"), [("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_plain_peft_loads_the_adapter(model, finished, tmp_path, dtype, held):
    done = export_adapter(load_run(finished), tmp_path / "out", dtype=dtype)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    own = load_file(finished / "versions" / "002-brief" / "adapter" / "adapter_model.safetensors")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[held]
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], own[key].to(kind)) for key in own)
    assert (done.dtype, done.version, done.corrector) == (held, "002-brief", False)
    base = AutoModelForCausalLM.from_pretrained(model)
    expected = logits(PeftModel.from_pretrained(base, str(finished / "versions" / "002-brief" / "adapter")))
    found = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"))
    tolerance = {"fp32": 1e-6, "bf16": 3e-2, "fp16": 3e-3}[held]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("wörd")["input_ids"]
        == AutoTokenizer.from_pretrained(model)("wörd")["input_ids"]
    )
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    (tmp_path / "new").touch()
    assert modes == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}


def test_an_adapter_is_filled_up_to_a_rank_that_servers_take(model, finished, tmp_path, capsys):
    """Its product stays: of each module, and of the model."""
    code, out, error = cli(capsys, "export", str(finished), str(tmp_path / "out"), "--adapter", "--pad-rank", "--json")
    assert code == 0, error
    own = finished / "versions" / "002-brief" / "adapter"
    then, now = (json.loads((folder / "adapter_config.json").read_text()) for folder in (own, tmp_path / "out"))
    assert (json.loads(out)["rank"], now["r"]) == (8, 8)
    assert then["r"] < 8
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (own, tmp_path / "out"))
    for name in (name for name in before if ".lora_A." in name):
        other = name.replace(".lora_A.", ".lora_B.")
        assert (after[name].shape[0], after[other].shape[1]) == (8, 8)
        products = [
            config["lora_alpha"] / config["r"] * weights[other].double() @ weights[name].double()
            for config, weights in ((then, before), (now, after))
        ]
        assert products[0].norm() > 0
        torch.testing.assert_close(products[1], products[0], rtol=1e-12, atol=0)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(own)))
    found = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    code, _, error = cli(capsys, "export", str(finished), str(tmp_path / "other"), "--pad-rank")
    assert code == 2
    assert "--pad-rank: a merged model has no rank: give --adapter too" in error


def test_every_file_of_a_run_and_of_its_exports_follows_the_umask(finished, tmp_path):
    export_version(load_run(finished), tmp_path / "merged")
    (tmp_path / "new").touch()
    expected = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    written = [path for place in (finished / "versions", tmp_path / "merged") for path in place.rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written if path.is_file()} == {expected}


@pytest.mark.parametrize(
    ("rank", "most"), [(1, 8), (8, 8), (9, 16), (16, 16), (33, 64), (64, 64), (129, 256), (300, 320), (321, 512)]
)
def test_vllm_is_told_the_next_rank_that_it_takes(rank, most):
    assert max_lora_rank(rank) == most


def test_a_rank_beyond_what_vllm_takes_is_said(model, tmp_path, capsys, finished):
    assert max_lora_rank(513) is None
    run = tmp_path / "run"
    learner = make_learner(
        model, run, LifeAlign(space="product"), adapter=AdapterOptions(rank=4, alpha=8.0, targets="q_proj")
    )
    learner.learn_all(tasks("warm"))
    adapter = run / "versions" / "001-warm" / "adapter"
    weights = load_file(adapter / "adapter_model.safetensors")
    wide = {
        key: torch.cat([tensor, torch.zeros(600, tensor.shape[1])])
        if "lora_A" in key
        else torch.cat([tensor, torch.zeros(tensor.shape[0], 600)], dim=1)
        for key, tensor in weights.items()
    }
    save_file(wide, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 600 + config["r"]}))
    sign(run / "versions" / "001-warm")
    code, out, _ = cli(capsys, "export", str(run), str(tmp_path / "out"), "--adapter")
    assert code == 0
    assert "takes no adapter of this rank: export the merged model" in out
    assert "serve the merged model" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InputError, match=r"has rank 60\d, and servers take at most 512: leave pad_rank out"):
        export_adapter(load_run(run), tmp_path / "padded", pad_rank=True)


def test_the_command_line_says_what_serving_takes(model, finished, tmp_path, capsys):
    out = tmp_path / "out"
    code, text, _ = cli(capsys, "export", str(finished), str(out), "--adapter", "--dtype", "bf16")
    rank = json.loads((out / "adapter_config.json").read_text())["r"]
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["adapter"] == str(out)
    assert (lines["dtype"], lines["rank"], lines["version"]) == ("bf16", str(rank), "002-brief")
    assert lines["vllm"] == (
        f"vllm serve {model} --enable-lora --max-lora-rank {max_lora_rank(rank)} --lora-modules out={out} "
        f"--generation-config {out}"
    )
    code, text, _ = cli(capsys, "export", str(finished), str(tmp_path / "b"), "--adapter", "--json", "--version", "001")
    shown = json.loads(text)
    assert (code, shown["version"], shown["dtype"]) == (0, "001-warm", "fp32")
    assert shown["vllm"].startswith(f"vllm serve {model} --enable-lora --max-lora-rank ")
    code, _, err = cli(capsys, "export", str(finished), str(tmp_path / "c"), "--dtype", "int8")
    assert code == 2
    assert "dtype: must be one of auto, fp32, bf16, fp16, found 'int8'" in err
    assert not (tmp_path / "c").exists()


def test_an_adapter_beyond_fp16_is_refused(model, tmp_path):
    learner = make_learner(model, tmp_path / "run", LifeAlign(space="product"))
    learner.learn_all(tasks("warm"))
    weights = tmp_path / "run" / "versions" / "001-warm" / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor * 1e6 for key, tensor in load_file(weights).items()}, weights)
    with pytest.raises(InputError, match="changed since it was written"):
        learner.export_adapter(tmp_path / "out", dtype="fp16")
    sign(weights.parent.parent)
    with pytest.raises(InputError, match="beyond the range of fp16: choose --dtype bf16 or fp32"):
        learner.export_adapter(tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_an_adapter_goes_nowhere_where_something_is(finished, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists: choose another folder to export to"):
        export_adapter(load_run(finished), tmp_path / "out")
    with pytest.raises(InputError, match="has no version '9'"):
        export_adapter(load_run(finished), tmp_path / "new", "9")


def test_a_base_model_that_was_moved_is_named_in_the_adapter(finished, model, tmp_path):
    moved = shutil.copytree(model, tmp_path / "moved")
    export_adapter(load_run(finished), tmp_path / "out", model=str(moved))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)


@pytest.mark.parametrize("adapter", [True, False])
def test_the_card_says_what_was_learned_how_and_what_it_scored(model, finished, tmp_path, adapter):
    run = load_run(finished)
    (export_adapter if adapter else export_version)(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["license"] == "apache-2.0"
    assert facts["library_name"] == ("peft" if adapter else "transformers")
    assert "base_model" not in facts, "a folder is no name on the Hub"
    assert f"`{model}` after 2 tasks" in body
    for version in run.versions:
        source = version.manifest.train
        assert f"| {version.task} | {source.source} | {source.rows} | {source.fingerprint[:16]} |" in body
        accuracy = [run.zero_shot[version.task], version.scores[version.task], run.versions[-1].scores[version.task]]
        shown = " | ".join(f"{100 * score.accuracy:.1f}" for score in accuracy)
        assert f"| {version.task} | {accuracy[-1].pairs} | {shown} |" in body
    for name, value in {**run.facts.libraries, "learning_rate": 0.02, "seed": 0, "method": "lifealign"}.items():
        assert re.search(rf"^\| {name} \| .*{re.escape(str(value))}.* \|$", body, re.MULTILINE)
    assert ("--max-lora-rank" in body) == adapter


def test_a_name_on_the_hub_is_named_as_base_model(finished, tmp_path):

    run = load_run(finished)
    for base, expected in (
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ):
        card = model_card(run, run.versions, base, tmp_path, tmp_path / "out", "bf16", 12)
        assert yaml.safe_load(card.split("---\n")[1])["base_model"] == expected
        assert "--max-lora-rank 16" in card
        # What comes in a package has no weights of that name.
        assert f"vllm serve {tmp_path if base == 'smollm2' else base} --enable-lora" in card


@pytest.mark.slow
def test_a_base_model_from_the_hub_s_cache(tmp_path):
    """In a process of its own, since the Hub's client reads its settings once; nothing is asked for."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    blobs = save_model(tmp_path / "blobs", layers=2)
    (blobs / "LICENSE").write_text("as you like")
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    script = (
        "from learner_for_tests import make_learner, task_rows\n"
        "learner = make_learner('org/name', 'run')\n"
        "learner.learn(task_rows('warm'), 'warm')\n"
        "learner.export('out'), learner.export_adapter('adapter')\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env | {"PYTHONPATH": paths}, check=True)
    written = {file.name: file.is_symlink() for file in (tmp_path / "out").iterdir()}
    assert written == dict.fromkeys([*(file.name for file in blobs.iterdir()), "README.md"], False)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
