"""The page that follows a run: what it reads, whom it answers, and what a browser draws of it."""

import json
import shutil
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from cli_for_tests import run as run_verb
from everalign.serving.pages.dashboard import watch_app
from runs_for_tests import write_run


def line(version, step, **more):
    place = {"task": version[4:], "version": version, "round": 1, "stage": "fpo", "stage_number": 0}
    return {**place, "step": step, "steps": 20, "time": time.time(), "loss": 1 / step, "accuracy": 0.5, **more}


@pytest.fixture
def run(tmp_path):
    path = write_run(tmp_path / "run", {"a": [0.5, [0.8, 0.7]], "<b>": [0.5, [0.5, 0.9]]})
    lines = [line("001-a", step) for step in (1, 5, 20)] + [line("002-b", 1), line("002-b", 5, margin=0.25)]
    (path / "training.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


@pytest.fixture
def client(run):
    return TestClient(watch_app(run), base_url="http://127.0.0.1:8765")


def test_it_shows_what_the_run_has_written_by_now(run, client):
    found = client.get("/data").json()
    assert [(one["part"], one["step"]) for one in found["steps"]][-2:] == [("002-b/1/0", 1), ("002-b/1/0", 5)]
    assert found["steps"][-1] | {"margin": 0.25, "accuracy": 50.0, "steps": 20} == found["steps"][-1]
    assert [row["name"] for row in found["heat"]] == ["nothing", "a", "<b>"]
    assert [cell["text"] for cell in found["heat"][2]["cells"]] == ["70.0", "90.0"]
    assert ["BWT", "−10.0"] in found["summary"]
    assert [one["name"] for one in found["versions"]] == ["002-2", "001-1"]
    with (run / "training.jsonl").open("a") as file:
        file.write(json.dumps(line("002-b", 10)) + "\n")
    assert client.get("/data").json()["steps"][-1]["step"] == 10


def test_a_run_that_has_only_begun_is_shown(tmp_path):
    client = TestClient(watch_app(write_run(tmp_path / "run", {})), base_url="http://localhost")
    assert client.get("/data").json()["steps"] == []
    assert "watch.js" in client.get("/").text


def test_a_long_run_is_thinned_out_but_for_its_last_step(run, client):
    lines = [line("001-a", step) for step in range(1, 10_001)]
    (run / "training.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = client.get("/data").json()
    assert found["logged"] == 10_000
    assert len(found["steps"]) < 4000
    assert found["steps"][-1]["step"] == 10_000


def test_damage_is_told_on_the_page(run, client):
    (run / "training.jsonl").write_text("{")  # may still be written
    assert client.get("/data").json()["steps"] == []
    (run / "training.jsonl").write_text("{\n")
    reply = client.get("/data")
    assert reply.status_code == 503
    assert "line 1: damaged JSON" in reply.json()["trouble"]


def test_other_sites_get_nothing_through_a_browser_here(client):
    assert client.get("/data", headers={"host": "evil.example"}).status_code == 400
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert client.get("/assets/script.js").status_code == 404


def test_the_verb_refuses_what_it_cannot_watch(tmp_path, capsys, monkeypatch):
    assert run_verb(capsys, "watch", str(tmp_path))[0] == 2
    path = write_run(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, error = run_verb(capsys, "watch", str(path), "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "--port" in error
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    code, _, error = run_verb(capsys, "watch", str(path))
    assert code == 2
    assert "watching needs fastapi, which is not installed: pip install 'everalign[serve]'" in error


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def url(run):
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(watch_app(run), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    listening.close()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_it_and_keeps_it_fresh(run, url):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    assert httpx.get(url, trust_env=False).status_code == 200
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, complaints = browser.new_page(viewport={"width": 360, "height": 740}), []
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.get_by_role("img", name="loss").wait_for()
        assert page.locator(".chart").count() == 3
        assert page.locator("#now").get_by_text("5 of 20").is_visible()
        assert page.locator(".heat .own", has_text="90.0").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        with (run / "training.jsonl").open("a") as file:
            file.write(json.dumps(line("002-b", 10)) + "\n")
        page.locator("#now").get_by_text("10 of 20").wait_for()
        page.locator(".chart").first.hover()
        assert "fpo, step" in page.locator("#curves .note").first.inner_text()
        browser.close()
    assert complaints == []
