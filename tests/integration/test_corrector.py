"""A corrector at work: what it returns is what greedy decoding writes, or the original and the reason."""

import json

import pytest
import torch

from chat_server_for_tests import ChatServer, Reply
from cli_for_tests import run, write_rows
from corrections_for_tests import corrections, corrector
from everalign.correction import NO_GUARDS, CorrectionOptions, Corrector, Guards
from everalign.correction.batch import correct_rows, journal_facts
from everalign.correction.engines import Begun, EngineOutput
from everalign.correction.templates import get_template
from everalign.correction.tokenization import CorrectionEncoder
from everalign.data.readers import load_uncorrected
from everalign.data.records import CorrectionSet
from everalign.errors import EveralignError, InputError
from everalign.modeling.loading import load_model, load_tokenizer
from everalign.modeling.speculative import DraftDecoder
from everalign.storage import Journal
from models_for_tests import saved_model
from tokenizers_for_tests import byte_tokenizer

FREE = CorrectionOptions(guards=NO_GUARDS)


@pytest.fixture(scope="module")
def trained():
    return Corrector.from_pretrained(corrector().path)


@pytest.fixture(scope="module")
def wild():
    """A random model, which writes bytes of all kinds."""
    return Corrector.from_pretrained(saved_model(), template="aligner-1")


def pairs(count=12):
    return [(row.question, row.answer) for row in corrections(count, 200)]


def generated(folder, pair, limit):
    """What transformers' own greedy decoding writes, as text."""
    from everalign.correction import load_corrector_files

    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    encoder = load_corrector_files(folder, None if (folder / "corrector.json").exists() else "aligner-1").encoder(
        tokenizer
    )
    prompt = torch.tensor([encoder.prompt(*pair)])
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=False,
        eos_token_id=sorted(encoder.ends), pad_token_id=0,
    )  # fmt: skip
    return encoder.decode(ids[0, prompt.shape[1] :].tolist())


def test_corrections_are_those_of_greedy_decoding_one_by_one_and_together(trained):
    options = CorrectionOptions(guards=NO_GUARDS, max_new_tokens=12)
    together = trained.correct_batch(pairs(), options)
    for pair, corrected in zip(pairs(), together, strict=True):
        assert corrected.text == generated(corrector().path, pair, 12)
        assert corrected == trained.correct(*pair, options) or corrected.forward_passes > 1
        assert corrected.text == trained.correct(*pair, options).text
        assert corrected.changed == (corrected.text != pair[1])


def test_an_answer_that_would_be_written_again_is_returned_after_one_pass(trained):
    question = "q201?"
    written = trained.correct(question, "no 201", FREE).text
    fixed = trained.correct(question, written, FREE)
    for _ in range(20):
        if not fixed.changed:
            break
        written, fixed = fixed.text, trained.correct(question, fixed.text, FREE)
    assert (fixed.text, fixed.changed, fixed.reason) == (written, False, None)
    assert (fixed.forward_passes, fixed.rejected_draft_tokens) == (1, 0)
    assert fixed.accepted_draft_tokens == fixed.output_tokens > 1
    assert list(trained.stream(question, written)) == [written]


@pytest.mark.parametrize("guards", [None, NO_GUARDS])
@pytest.mark.parametrize("answer", ["no 7", "schön 漢字 😀", "x"])
def test_pieces_of_a_stream_are_the_correction(trained, wild, answer, guards):
    options = CorrectionOptions(guards=guards, max_new_tokens=40)
    for engine in (trained, wild):
        pieces = list(engine.stream("q7?", answer, options))
        assert "".join(pieces) == engine.correct("q7?", answer, options).text
        assert all(pieces)
        *begun, result = engine.stream_events("q7?", answer, options)
        rest = result.text[len("".join(begun)) :]
        assert ([*begun, rest] if rest else begun) == pieces
        assert result.text == "".join(pieces)
    if guards is NO_GUARDS:
        assert len(list(wild.stream("q7?", answer, options))) > 3


def test_a_stream_whose_first_token_differs_begins_with_its_result(wild):
    for guards in (None, Guards(unfinished=False)):
        options = CorrectionOptions(guards=guards, max_new_tokens=8)
        assert list(wild.stream_events("q7?", "x", options)) == [wild.correct("q7?", "x", options)]


def test_no_piece_ends_inside_of_a_character(wild, monkeypatch):
    """Written byte by byte, as a byte-level model writes what it has no token for."""
    text = "a😀é漢b"
    tokens = load_tokenizer(str(saved_model()))(text, add_special_tokens=False)["input_ids"]

    def step(self):
        row = self.rows[0]
        row.tokens.append(tokens[len(row.tokens)])
        row.ended = len(row.tokens) == len(tokens)
        self._cache.passes += 1

    monkeypatch.setattr(DraftDecoder, "step", step)
    assert list(wild.stream("q", "x", FREE)) == list(text)


def test_a_correction_that_is_begun_goes_on_as_it_would_have(trained):
    """Whatever part of its own correction a corrector is given, the rest is the same; and what was begun stays."""
    options = CorrectionOptions(guards=NO_GUARDS)
    for question, answer in pairs(6):
        whole = trained.correct(question, answer, options).text
        begun = [Begun(whole[:end], covers) for end in range(len(whole) + 1) for covers in (0, len(answer) // 2)]
        found = trained.correct_batch([(question, answer)] * len(begun), options, begun)
        # Cut in the middle of a word, a text has other tokens than the corrector wrote.
        wordwise = [i for i, one in enumerate(begun) if len(one.text) == len(whole) or whole[len(one.text)] == " "]
        assert len(wordwise) >= 4
        assert [found[i].text for i in wordwise] == [whole] * len(wordwise)
        assert all(one.text.startswith(start.text) for one, start in zip(found, begun, strict=True))


@pytest.mark.parametrize("begun", ["", "schön ", "Ein 😀.", "漢字。", "a.\n\n", "x"])
@pytest.mark.parametrize("rest", ["", " und 漢字 😀", "漢字", "\n\nb"])
def test_tokens_of_a_beginning_and_its_rest_are_the_text_s(trained, begun, rest):
    encoder = trained._engine.encoder
    first, draft = encoder.continuation(begun, rest)
    assert encoder.decode([*first, *draft]) == begun + rest
    assert encoder.decode(first).rstrip() == begun.rstrip()
    assert encoder.continued(begun, first, draft) == (begun + rest)
    assert encoder.continued(begun, first, [encoder.tokenizer.eos_token_id]) == begun


def test_a_token_that_holds_the_end_of_a_sentence_and_a_line_break_is_begun_whole():
    """As in Llama 3's and Qwen's vocabularies: a model that never saw `.` before a line break would not write one."""
    merges = (("Ċ", "Ċ"), (".", "ĊĊ"))
    encoder = CorrectionEncoder(byte_tokenizer(merges=merges), get_template("aligner-1"))
    joined = encoder.tokenizer.convert_tokens_to_ids(".ĊĊ")
    first, draft = encoder.continuation("a.", "\n\nb")
    assert (first[-1], encoder.decode(first), encoder.decode(draft)) == (joined, "a.\n\n", "b")
    assert encoder.continued("a.", first, draft) == "a.\n\nb"
    assert encoder.continued("a.", first, draft[-1:]) == "a."
    assert encoder.decode(encoder.continuation("a.", " b")[0]) == "a."


def test_what_is_begun_stays_where_the_rest_is_kept(wild):
    answer, begun = "see https://example.org and more.", Begun("Look: ", 4)
    kept = "Look: https://example.org and more."
    options = CorrectionOptions(max_new_tokens=3)
    (found,) = wild.correct_batch([("q?", answer)], options, [begun])
    assert (found.text, found.changed, found.reason) == (kept, True, "unfinished")
    (gated,) = wild.correct_batch([("q?", answer)], CorrectionOptions(gate=lambda _: True), [begun])
    assert (gated.text, gated.changed, gated.reason) == (kept, True, "gate")
    (long,) = wild.correct_batch([("q?", "x" * 3000)], FREE, [Begun("y", 2999)])
    assert (long.text, long.reason, long.forward_passes) == ("yx", "too_long", 0)


def test_sentences_of_a_growing_answer(trained):
    answer = "no 3, as I would say. yes 7, as they all say. no"
    pieces = [answer[cut : cut + 3] for cut in range(0, len(answer), 3)]
    *begun, result = trained.stream_by_sentence("q3?", iter(pieces), FREE)
    text = ""
    for piece in begun:
        text += piece
    assert result.text.startswith(text)
    assert result.changed == (result.text != answer)
    assert result.forward_passes >= 3  # two sentences and the end
    (whole,) = trained.stream_by_sentence("q3?", ["no 3"], FREE)
    assert whole.text == trained.correct("q3?", "no 3", FREE).text


def test_an_unchanged_growing_answer_leaves_unchanged(wild):
    answer = "Die 漢字 sind da 😀.  Und\tgeht es dann so? \n"
    options = CorrectionOptions(gate=lambda _: True)
    *begun, result = wild.stream_by_sentence("q?", list(answer), options)
    assert "".join(begun) == "Die 漢字 sind da 😀.  Und\tgeht es dann so?"
    assert (result.text, result.changed, result.reason) == (answer, False, "gate")


def test_an_approver_is_for_whole_answers_only(trained):
    judged = Corrector(trained._engine, FREE, approver=object())
    for call in (lambda: list(judged.stream_by_sentence("q?", ["a"])), judged.check_continues):
        with pytest.raises(InputError, match="an approver judges whole answers"):
            call()


def test_a_refused_correction_gives_the_answer_back(wild):
    answer = "see https://example.org"
    free, guarded = (
        wild.correct("q?", answer, CorrectionOptions(guards=g, max_new_tokens=9)) for g in (NO_GUARDS, None)
    )
    assert free.changed
    assert (guarded.text, guarded.changed, guarded.reason) == (answer, False, "unfinished")
    assert guarded.forward_passes == free.forward_passes
    options = CorrectionOptions(guards=Guards(unfinished=False), max_new_tokens=9)
    assert wild.correct("q?", answer, options).reason == "url"


class FixedEngine:
    """Writes the same correction of everything."""

    template, fingerprint = get_template("everalign-1"), "fixed"

    def __init__(self, text):
        self.text = text

    def write(self, pairs, gate, limit):
        return [EngineOutput(self.text) for _ in pairs]


@pytest.mark.parametrize("question", ["May I?", [{"role": "user", "content": "May I?"}]])
def test_a_correction_that_is_the_question_gives_the_answer_back(question):
    repeating = Corrector(FixedEngine("May I?"))
    found = repeating.correct(question, "Yes.")
    assert (found.text, found.changed, found.reason) == ("Yes.", False, "repeat")
    assert repeating.correct("Another question", "Yes.").text == "May I?"


def test_gates_let_answers_pass(trained):
    pair = ("q3?", "no 3")
    assert trained.correct(*pair, FREE).changed
    seen = []

    def gate(verified):
        seen.append(verified)
        return True

    passed = trained.correct(*pair, CorrectionOptions(gate=gate))
    assert (passed.text, passed.changed, passed.reason) == ("no 3", False, "gate")
    assert (passed.forward_passes, passed.output_tokens) == (1, 0)
    likelihood = seen[0].log_likelihood
    assert trained.correct(*pair, CorrectionOptions(gate=likelihood - 1e-3)).reason == "gate"
    assert trained.correct(*pair, CorrectionOptions(gate=min(0.0, likelihood + 1e-3))).reason != "gate"


def test_what_does_not_fit_is_returned_and_said(trained):
    long = trained.correct("q?", "x" * 300)
    assert (long.text, long.changed, long.reason, long.forward_passes) == ("x" * 300, False, "too_long", 0)
    assert list(trained.stream("q?", "x" * 300)) == ["x" * 300]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("q", 3), "pair 2: field 'answer': must be text"),
        (("", "a"), "pair 2: field 'question': is empty"),
        (([{"role": "assistant", "content": "a"}], "a"), "pair 2: field 'question'"),
    ],
)
def test_bad_pairs_are_refused(trained, pair, message):
    with pytest.raises(InputError, match=message):
        trained.correct_batch([("q", "a"), pair])


def test_bad_options_are_refused(trained):
    for options, message in (({"gate": 0.5}, "gate: must be"), ({"max_new_tokens": 0}, "max_new_tokens: must be")):
        with pytest.raises(InputError, match=message):
            CorrectionOptions(**options)
    with pytest.raises(InputError, match="device 'nowhere'"):
        Corrector.from_pretrained(corrector().path, device="nowhere")
    with pytest.raises(InputError, match="tokens per batch"):
        Corrector.from_pretrained(corrector().path, tokens_per_batch=0)
    with pytest.raises(InputError, match="no corrector"):
        Corrector.from_pretrained(saved_model())


# ---- servers ----


def completion(text, reason="stop"):
    return Reply(
        {"choices": [{"text": text, "finish_reason": reason}], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
    )


def test_a_server_is_asked_with_the_template_s_text():
    def reply(prompt):
        return completion("cut", "length") if "third" in prompt else completion("better" if "bad" in prompt else "good")

    with ChatServer(reply) as server:
        remote = Corrector.from_endpoint(server.url, "aligner", template="aligner-1")
        found = remote.correct_batch([("first", "bad"), ("second", "good"), ("third", "x" * 4000)])
        assert list(remote.stream("first", "bad")) == ["better"]
    assert [(one.text, one.changed, one.reason) for one in found] == [
        ("better", True, None),
        ("good", False, None),
        ("x" * 4000, False, "unfinished"),
    ]
    assert (found[0].forward_passes, found[0].output_tokens) == (None, 3)
    request = next(request for request in server.requests if "first" in request.body["prompt"])
    assert request.path == "/v1/completions"
    assert request.body["prompt"] == remote.template.render("first", "bad")
    assert request.body["prompt"].endswith("first | bad ASSISTANT:")
    assert (request.body["temperature"], request.body["max_tokens"]) == (0, 512)
    assert max(request.body["max_tokens"] for request in server.requests) > 2000


def test_a_server_has_no_gate_and_may_fail():
    with ChatServer(lambda _: Reply({"choices": [{"text": None}]})) as server:
        remote = Corrector.from_endpoint(server.url, "aligner", template="aligner-1")
        with pytest.raises(InputError, match="gate: a server does not say"):
            remote.correct("q", "a", CorrectionOptions(gate=-0.1))
        with pytest.raises(EveralignError, match="must be text"):
            remote.correct("q", "a")


# ---- files ----


def rows_of(count):
    return CorrectionSet.of([{"question": f"q{i}?", "answer": f"no {i}"} for i in range(count)], "answers")


def test_a_file_is_corrected_and_goes_on_after_a_kill(trained, tmp_path, monkeypatch):
    rows, whole = rows_of(10), tmp_path / "whole.jsonl"
    expected = correct_rows(rows, trained, whole)
    asked, write = [], Corrector.correct_batch

    def failing(self, batch, options=None):
        asked.append(len(batch))
        if len(asked) == 3:
            raise EveralignError("the power went")
        return write(self, batch, options)

    monkeypatch.setattr(Corrector, "correct_batch", failing)
    with pytest.raises(EveralignError, match="rows 7 to 9: the power went; what was corrected before is kept"):
        correct_rows(rows, trained, tmp_path / "out.jsonl", rows_per_batch=3)
    assert not (tmp_path / "out.jsonl").exists()
    (partial,) = tmp_path.glob("*.partial")
    assert sorted(Journal(partial).read(range(10))) == list(range(6))
    again = correct_rows(rows, trained, tmp_path / "out.jsonl", rows_per_batch=3)
    assert again.resumed == 6
    assert sum(asked[3:]) == 4
    assert (tmp_path / "out.jsonl").read_text() == whole.read_text()
    assert [one.text for one in again.corrected] == [one.text for one in expected.corrected]
    assert not list(tmp_path.glob("*.partial"))
    first = json.loads(whole.read_text().splitlines()[0])
    assert list(first) == ["question", "answer", "correction", "changed", "reason"]
    assert first["correction"] == expected.corrected[0].text


def test_other_options_begin_anew_and_damage_is_told(trained, tmp_path):
    rows, output = rows_of(3), tmp_path / "out.jsonl"
    Journal.beside(output, *journal_facts(trained, CorrectionOptions(), rows)).put({1: {}})
    assert correct_rows(rows, trained, output, options=FREE).resumed == 0
    with pytest.raises(InputError, match="damaged: delete this file"):
        correct_rows(rows, trained, output, overwrite=True)


def test_journals_have_the_name_that_version_0_1_0_gave_them(trained):
    options = CorrectionOptions(gate=-0.5)
    named = "CorrectionOptions(gate=-0.5, guards=None, max_new_tokens=None, strength=0.0)"
    rows = rows_of(3)
    assert journal_facts(trained, options, rows) == (trained.fingerprint, named, rows.fingerprint)


def test_bad_runs_are_refused(trained, tmp_path):
    for rows, output, options, message in (
        (rows_of(0), "a.jsonl", {}, "no rows in it"),
        (rows_of(1), "a.json", {}, "must end in .jsonl"),
        (rows_of(1), "there.jsonl", {}, "exists: choose another output"),
        (rows_of(1), "a.jsonl", {"rows_per_batch": 0}, "batch size"),
        (rows_of(1), "a.jsonl", {"options": CorrectionOptions(gate=lambda _: True)}, "gate: must be a number"),
    ):
        (tmp_path / "there.jsonl").touch()
        with pytest.raises(InputError, match=message):
            correct_rows(rows, trained, tmp_path / output, **options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "field 'answer': no such column"),
        ({"prompt": "q"}, "field 'completion': no such column"),
        ({"prompt": "q", "completion": "a", "answer": "b"}, "field 'answer': the row has 'prompt' or 'completion' too"),
        ({"question": "q", "answer": ""}, "field 'answer': is empty"),
        ({"question": 3, "answer": "a"}, "field 'question'"),
        (["q", "a"], "a row must be an object"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}, json.dumps(row)])
    with pytest.raises(InputError, match=rf"rows.jsonl:2: {message}"):
        load_uncorrected(path)


def test_the_command_line_corrects_a_file(tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"q{i}?", "completion": f"no {i}"} for i in range(4)])
    command = ["correct", "run", "--corrector", str(corrector().path), "--data", str(tmp_path / "rows.jsonl")]
    code, out, err = run(capsys, *command, "--output", str(tmp_path / "out.jsonl"))
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if line.split()[0] != "kept"] == [
        "rows", "changed", "passes", "speed", "output",
    ]  # fmt: skip
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    code, out, _ = run(
        capsys, *command, "--output", str(tmp_path / "out.jsonl"), "--overwrite", "--json", "--no-guards"
    )
    facts = json.loads(out)
    assert (facts["rows"], facts["kept_because"], facts["resumed"]) == (4, {}, 0)
    assert facts["forward_passes"] >= 4
    assert facts["tokens_per_second"] > 0


@pytest.mark.parametrize("verb", ["run", "evaluate"])
def test_a_server_is_told_the_objectives_of_its_corrector(tmp_path, capsys, verb):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    output = ["--output", str(tmp_path / "out.jsonl")] if verb == "run" else []
    with ChatServer(lambda _: completion("a")) as server:
        known = ["--corrector", f"{server.url}#m", "--template", "everalign-1", "--objectives", "helpful, kind"]
        code, _, err = run(capsys, "correct", verb, *known, "--data", str(rows), *output)
    assert code == 0, err
    (request,) = server.requests
    assert "\nIt should be more: helpful, kind\n" in request.body["prompt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--objectives", "kind"], "a folder holds its own, so leave it out"),
        (["http://127.0.0.1:1/v1#m", "--template", "everalign-1", "--objectives", "a,,b"], "objectives[1]: must be"),
        (["http://127.0.0.1:1/v1#m", "--template", "aligner-1", "--objectives", "kind"], "has no place for any"),
        (["http://127.0.0.1:1/v1"], "name the model behind the address"),
        (["http://127.0.0.1:1/v1#m"], "name it with --template"),
        (
            ["http://127.0.0.1:1/v1#m", "--template", "aligner-1", "--tokens-per-batch", "9"],
            "--tokens-per-batch: is for",
        ),
        (["http://127.0.0.1:1/v1#m", "--template", "aligner-1", "--strength", "0.5"], "--strength: is for"),
        (["nowhere"], "no corrector"),
    ],
)
def test_correctors_that_cannot_be_are_refused(tmp_path, capsys, arguments, message):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    output = ["--data", str(rows), "--output", str(tmp_path / "out.jsonl")]
    code, _, err = run(capsys, "correct", "run", "--corrector", *arguments, *output)
    assert code == 2
    assert message in err


def test_a_server_goes_on_with_what_was_begun():
    def reply(prompt):
        return completion(" And more.") if prompt.endswith("Better.") else completion("Good.")

    with ChatServer(reply) as server:
        remote = Corrector.from_endpoint(server.url, "aligner", template="aligner-1")
        asked = [("first", "Bad. Worse."), ("second", "Good.")]
        found = remote.correct_batch(asked, None, [Begun("Better.", 4), Begun()])
    assert [(one.text, one.changed) for one in found] == [("Better. And more.", True), ("Good.", False)]
