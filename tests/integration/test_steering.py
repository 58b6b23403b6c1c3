"""Steering: exact under verification, nothing at strength 0, and only with the corrector that it was made for."""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_for_tests import run, write_rows
from corrections_for_tests import corrections, corrector
from everalign.contrib.steering import (
    SteeredEngine,
    SteeringOptions,
    common_direction,
    followed,
    load_steered_corrector,
    mirrored,
    prefix_differences,
    rank_correlation,
    steer_corrector,
    well_formed,
)
from everalign.contrib.steering_vectors import (
    Steering,
    SteeringSetting,
    decoder_layers,
    fingerprints,
    read_steering,
    residuals,
    shifted,
)
from everalign.correction import NO_GUARDS, CorrectionOptions, Corrector, load_corrector_files
from everalign.correction.edits import edit_ratio, edit_share, kept_share
from everalign.data import CorrectionSet
from everalign.errors import EveralignError, InputError
from everalign.modeling.loading import load_model, load_tokenizer, model_fingerprint
from models_for_tests import FAMILIES, random_model, saved_model

FREE = CorrectionOptions(guards=NO_GUARDS, max_new_tokens=14)
QUICK = SteeringOptions(direction="mean", strengths=(-0.5, -0.25, 0.25, 0.5), trials=6)
PAIRS = [(f"q{i}?", f"no {i}") for i in range(301, 308)]


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """A corrector's folder with a steering in it, and what is known of that."""
    folder = tmp_path_factory.mktemp("steered") / "corrector"
    shutil.copytree(corrector().path, folder)
    return folder, steer_corrector(folder, corrections(48, 200), options=QUICK)


@pytest.fixture
def copied(steered, tmp_path):
    """A copy of it that may be damaged."""
    shutil.copytree(steered[0], tmp_path / "copy")
    return tmp_path / "copy"


def setting(strength, ratio=0.0, well_formed=1.0):
    return SteeringSetting(strength=strength, edit_share=ratio, changed=0.5, well_formed=well_formed)


# ---- the residual stream ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shift_is_what_layers_pass_on(family):
    model, tokens = random_model(family), torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    layers = decoder_layers(model)
    assert len(layers) == 2
    vector = torch.randn(32)
    before = residuals(model, layers, tokens, 3)
    assert before.shape == (2, 2, 3, 32)
    with shifted(layers, {0: vector}):
        after = residuals(model, layers, tokens, 3)
        moved = model(input_ids=tokens).logits
    assert torch.allclose(after[0], before[0] + vector, atol=1e-5)
    assert not torch.allclose(after[1], before[1], atol=1e-2)
    assert not torch.equal(moved, model(input_ids=tokens).logits)
    assert torch.equal(residuals(model, layers, tokens, 3), before)
    assert not any(layer._forward_hooks for layer in layers)


def test_another_thread_is_not_shifted():
    model, tokens, found = random_model(), torch.tensor([[5, 6, 7]]), []
    plain = model(input_ids=tokens).logits
    with shifted(decoder_layers(model), {0: torch.ones(32)}):
        thread = threading.Thread(target=lambda: found.append(model(input_ids=tokens).logits))
        thread.start()
        thread.join()
        assert not torch.equal(model(input_ids=tokens).logits, plain)
    assert torch.equal(found[0], plain)


def test_layers_that_are_not_in_one_list_are_refused():
    model = random_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="llama model cannot be steered: it does not hold its 7 layers"):
        decoder_layers(model)


# ---- directions ----


@pytest.mark.parametrize("kind", ["principal", "mean"])
def test_a_planted_direction_is_found_with_its_sign(kind):
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    sizes = torch.rand(200, 1, generator=generator) + 0.5
    differences = 3 * sizes * planted + 0.3 * torch.randn(200, 16, generator=generator)
    differences[0] *= 1000  # one long difference counts no more than others
    found = common_direction(differences, kind)
    assert found.norm() == pytest.approx(1)
    assert found.float() @ planted > 0.99
    assert torch.allclose(common_direction(-differences, kind), -found, atol=1e-6)


def test_differences_are_taken_behind_the_same_number_of_tokens():
    files = load_corrector_files(corrector().path)
    encoder, model = files.encoder(load_tokenizer(str(corrector().path))), load_model(str(corrector().path))
    (row,) = CorrectionSet.of([{"question": "q", "answer": "abcde", "correction": "abX"}])
    found = prefix_differences(model, encoder, [row], 8)
    # "ab" is common; "X" and the end stand where "c" and "d" do.
    assert found.shape == (2, 2, 32)
    prompt = encoder.prompt("q", "abcde")
    tokens = torch.tensor([prompt + encoder.response(text)[:3] for text in ("abcde", "abX")])
    states = residuals(model, decoder_layers(model), tokens, 1)
    assert torch.allclose(found[:, 0], states[:, 1, 0] - states[:, 0, 0], atol=1e-5)
    assert prefix_differences(model, encoder, [row], 3).shape[1] == 1
    with pytest.raises(InputError, match="none of 1 rows can be extracted from"):
        prefix_differences(model, encoder, [row], 2)


def test_settings_count_as_far_as_corrections_are_well_formed_and_edits_follow():
    found = [setting(-1, 0.5, 0.2), setting(-0.5, 0.1), setting(0, 0.2, 0.95), setting(0.5, 0.4), setting(1, 9, 0.5)]
    assert [one.strength for one in well_formed(found)] == [-0.5, 0, 0.5]
    assert rank_correlation(well_formed(found)) == pytest.approx(1)
    assert [one.strength for one in followed(found)] == [-0.5, 0, 0.5]
    turned = [setting(-1, 0.3), setting(-0.5, 0.1), setting(0, 0.2), setting(0.5, 0.19), setting(1, 0.1)]
    assert [one.strength for one in followed(turned)] == [-0.5, 0, 0.5]
    assert [one.strength for one in mirrored(turned)] == [-1, -0.5, 0, 0.5, 1]
    assert [one.edit_share for one in mirrored(turned)] == [0.1, 0.19, 0.2, 0.1, 0.3]
    assert [one.strength for one in followed(mirrored(turned))] == [-1, -0.5, 0]
    assert rank_correlation([setting(-1, 0.3), setting(0, 0.2), setting(1, 0.1)]) == pytest.approx(-1)
    assert rank_correlation([setting(-1), setting(0), setting(1)]) == 0


@pytest.mark.parametrize(
    ("answer", "correction", "ratio", "kept"),
    [("abcd", "abcd", 0, 1), ("abcd", "ad", 0.5, 0.5), ("ab", "xxabxx", 2, 1), ("abc", "", 1, 0), ("", "ab", 2, 1)],
)
def test_edits_are_counted_by_the_answer_s_tokens(answer, correction, ratio, kept):
    assert edit_ratio(list(answer), list(correction)) == ratio
    longest = max(len(answer), len(correction), 1)
    assert edit_share(list(answer), list(correction)) == pytest.approx(ratio * max(len(answer), 1) / longest)
    assert kept_share(list(answer), list(correction)) == kept


# ---- a steered corrector ----


def test_a_strength_decides_how_much_is_edited(steered):
    _, facts = steered
    assert [one.strength for one in facts.settings] == [-0.5, -0.25, 0, 0.25, 0.5]
    assert facts.spearman > 0
    inside = [one for one in facts.settings if facts.lowest <= one.strength <= facts.highest]
    assert facts.spearman == rank_correlation(inside)
    assert facts.settings[-1].edit_share != facts.settings[0].edit_share
    assert facts.lowest <= 0 <= facts.highest
    assert (facts.rows, facts.held_out) == (12, 6)


def test_strength_0_is_the_corrector_as_it_is(steered):
    plain = Corrector.from_pretrained(corrector().path)
    for able in (Corrector.from_pretrained(steered[0]), load_steered_corrector(steered[0], 0)):
        assert able.correct_batch(PAIRS, FREE) == plain.correct_batch(PAIRS, FREE)
        assert able.fingerprint == plain.fingerprint
    engine, (low, high) = SteeredEngine.from_pretrained(steered[0]), (steered[1].lowest, steered[1].highest)
    fingerprints_ = {engine.at(strength).fingerprint for strength in {0, low, high, high / 2}}
    assert len(fingerprints_) == len({0, low, high, high / 2})


def test_no_hook_is_there_at_strength_0_nor_between_the_pieces_of_a_stream(steered, monkeypatch):
    folder, facts = steered
    able = SteeredEngine.from_pretrained(folder)
    layers = decoder_layers(able._model.model)
    pieces = Corrector(able.at(facts.highest or facts.lowest)).stream(*PAIRS[0], FREE)
    while next(pieces, None) is not None:
        assert not any(layer._forward_hooks for layer in layers)
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", lambda *_: pytest.fail("a hook at strength 0"))
    Corrector(able.at(0)).correct(*PAIRS[0], FREE)


def test_verified_drafts_are_what_steered_greedy_decoding_writes(steered):
    folder, facts = steered
    engine, model = SteeredEngine.from_pretrained(folder), load_model(str(folder))
    encoder = load_corrector_files(folder).encoder(load_tokenizer(str(folder)))
    for strength in (facts.lowest, facts.highest):
        able = Corrector(engine.at(strength))
        together = able.correct_batch(PAIRS, FREE)
        shifts = read_steering(folder, model, "everalign-1").at(strength)
        for pair, corrected in zip(PAIRS, together, strict=True):
            prompt = torch.tensor([encoder.prompt(*pair)])
            with shifted(decoder_layers(model), shifts):
                ids = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=14, do_sample=False,
                    eos_token_id=sorted(encoder.ends), pad_token_id=0,
                )  # fmt: skip
            assert corrected.text == encoder.decode(ids[0, prompt.shape[1] :].tolist())
            assert able.correct(*pair, FREE).text == corrected.text
            assert "".join(able.stream(*pair, FREE)) == corrected.text


def test_steered_corrections_are_others(steered):
    folder, _ = steered
    engine = SteeredEngine.from_pretrained(folder)
    wide = Steering(engine.steering.shifts, -9.0, 9.0)
    plain = [one.text for one in Corrector(engine).correct_batch(PAIRS, FREE)]
    for strength in (-4, 4):
        assert [one.text for one in Corrector(engine.at(strength, wide)).correct_batch(PAIRS, FREE)] != plain


def test_the_same_rows_and_seed_give_the_same_steering(steered, copied):
    again = steer_corrector(copied, corrections(48, 200), options=QUICK, overwrite=True)
    assert again == steered[1]


def test_given_layers_are_steered_together(copied):
    shown, options = [], QUICK.replace(layers=(1, 0), direction="principal")
    facts = steer_corrector(
        copied, corrections(48, 200), options=options, overwrite=True, progress=lambda *place: shown.append(place)
    )
    assert facts.layers == (0, 1)
    # Two rounds of trials, of all strengths and 0, each of which is told of.
    trials = 2 * (len(options.strengths) + 1)
    assert shown == [("steering", done, trials) for done in range(1, trials + 1)]
    assert load_file(copied / "steering.safetensors")["vectors"].shape == (2, 32)
    assert all(norm > 0 for norm in facts.norms)


def test_a_steering_of_fp32_is_for_bf16_too_but_for_nothing_else(steered, copied):
    exact = load_steered_corrector(copied, steered[1].lowest or steered[1].highest, precision="bf16")
    exact.correct(*PAIRS[0], FREE)
    model = load_model(str(copied))
    assert list(fingerprints(model)) == ["torch.float32", "torch.bfloat16"]
    assert fingerprints(model)["torch.bfloat16"] == model_fingerprint(load_model(str(copied), "bf16"))
    facts = json.loads((copied / "steering.json").read_text())
    del facts["fingerprints"]["torch.bfloat16"]
    (copied / "steering.json").write_text(json.dumps(facts))
    with pytest.raises(
        InputError, match=r"was made for weights in torch\.float32, and the model is in torch\.bfloat16"
    ):
        load_steered_corrector(copied, 0.1, precision="bf16")


# ---- bad input ----


def changed_facts(**values):
    def change(folder):
        path = folder / "steering.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def other_vectors(folder):
    path = folder / "steering.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "vectors": tensors["vectors"] + 1}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "steering.json").unlink(), "cannot be steered yet; run everalign correct steer"),
        (lambda folder: (folder / "steering.json").write_text("{"), "damaged JSON"),
        (changed_facts(layers=[]), "steering.json: field 'layers'"),
        (changed_facts(layers=[7]), "does not fit the corrector's layers"),
        (changed_facts(template="aligner-1"), "was made for the template 'aligner-1', not 'everalign-1'"),
        (changed_facts(fingerprints={"torch.float32": "x"}), "was made for other weights than this corrector's"),
        (lambda folder: (folder / "steering.safetensors").unlink(), "is missing or not the one"),
        (other_vectors, "is missing or not the one that steering.json names"),
    ],
)
def test_a_steering_that_is_not_the_corrector_s_is_refused(copied, damage, message):
    damage(copied)
    able = Corrector.from_pretrained(copied)
    assert able.correct(*PAIRS[0], FREE) == Corrector.from_pretrained(corrector().path).correct(*PAIRS[0], FREE)
    with pytest.raises(InputError, match=message):
        load_steered_corrector(copied, 0.1)


def test_strengths_that_cannot_be_are_refused(steered):
    folder, facts = steered
    for strength in (3, float("nan")):
        with pytest.raises(
            InputError, match=f"stay well-formed from {facts.lowest:g} to {facts.highest:g}, found {strength:g}"
        ):
            load_steered_corrector(folder, strength)
    with pytest.raises(InputError, match="cannot be steered yet"):
        load_steered_corrector(saved_model(), 0.5, template="aligner-1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, "direction must be one of principal, mean, found 'up'"),
        ({"rows": 1}, "rows must be a whole number of at least 2"),
        ({"trials": 1}, "trials must be a whole number of at least 2"),
        ({"prefix": 0}, "prefix must be a whole number of at least 1"),
        ({"strengths": (0.5,)}, "strengths must be at least two different"),
        ({"strengths": (0.5, 0.0)}, "strengths must be at least two different"),
        ({"strengths": (0.5, float("inf"))}, "strengths"),
        ({"layers": ()}, "layers must be different numbers, at least one"),
        ({"layers": (1, 1)}, "layers must be different numbers"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SteeringOptions(**options)


def test_what_cannot_be_steered_is_refused(copied):
    with pytest.raises(InputError, match=r"steering\.json exists: ask for overwrite"):
        steer_corrector(copied, corrections(48, 200))
    with pytest.raises(InputError, match="edits: 15 rows whose correction is another text"):
        steer_corrector(copied, corrections(30), overwrite=True)
    with pytest.raises(InputError, match="the corrector has layers 0 to 1, found 2"):
        steer_corrector(copied, corrections(48), options=SteeringOptions(layers=(2,)), overwrite=True)
    with pytest.raises(InputError, match="no corrector"):
        steer_corrector(saved_model(), corrections(48))


def test_a_strength_that_changes_nothing_is_an_error(copied):
    tiny = SteeringOptions(strengths=(-1e-9, 1e-9), trials=2)
    with pytest.raises(EveralignError, match="no strength changes how much is edited"):
        steer_corrector(copied, corrections(48, 200), options=tiny, overwrite=True)


# ---- the command line ----


def test_the_command_line_steers_and_corrects_with_a_strength(copied, tmp_path, capsys):
    rows = write_rows(tmp_path / "edits.jsonl", corrections(48, 200))
    command = ["correct", "steer", "--corrector", str(copied), "--data", str(rows), "--direction", "mean"]
    command += ["--strengths=-0.5,-0.25,0.25,0.5", "--trials", "6"]
    code, _, err = run(capsys, *command)
    assert (code, "steering.json exists" in err) == (2, True)
    code, out, err = run(capsys, *command, "--overwrite")
    assert code == 0, err
    assert "edited" in out
    assert "6 held-out rows" in out
    assert "layer 1: edited" in err
    code, out, _ = run(capsys, *command, "--overwrite", "--json")
    facts = json.loads(out)
    assert code == 0
    assert len(facts["settings"]) == 5
    answers = write_rows(tmp_path / "answers.jsonl", [{"question": q, "answer": a} for q, a in PAIRS])
    strength = facts["lowest"] or facts["highest"]
    output = ["--data", str(answers), "--output", str(tmp_path / "out.jsonl"), "--no-guards"]
    code, _, err = run(capsys, "correct", "run", "--corrector", str(copied), *output, f"--strength={strength}")
    assert code == 0, err
    able = load_steered_corrector(copied, strength)
    expected = [one.text for one in able.correct_batch(PAIRS, CorrectionOptions(guards=NO_GUARDS))]
    assert [json.loads(line)["correction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1,x"], "--layers: must be whole numbers with commas"),
        (["--strengths", "1,much"], "--strengths: must be numbers with commas"),
        (["--direction", "up"], "direction must be one of"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_flags_exit_2(steered, tmp_path, capsys, arguments, message):
    rows = write_rows(tmp_path / "edits.jsonl", corrections(48, 200))
    command = ["correct", "steer", "--corrector", str(steered[0]), "--data", str(rows), "--overwrite"]
    code, out, err = run(capsys, *command, *arguments)
    assert (code, out) == (2, "")
    assert message in err
