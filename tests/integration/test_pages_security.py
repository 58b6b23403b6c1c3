"""Who sees the gateway's pages, what other sites can do with them, and that nothing said becomes markup."""

import re

import pytest

from everalign.serving.pages.base import parsed
from everalign.serving.security import Sessions
from everalign.serving.settings import Access
from everalign.serving.store.database import FeedbackStore
from pages_for_tests import Browser, form_action, hidden, read
from upstream_for_tests import Fake, Script, UpstreamServer, serving

KEY = "sk-client-one"
EVIL = "<script>alert(1)</script>'\"><img src=x onerror=alert(1)>"
PAGES = ["/", "/dashboard", "/answers/chatcmpl-1"]


@pytest.fixture(scope="module")
def upstream():
    with UpstreamServer() as server:
        yield server


@pytest.fixture(scope="module")
def locked(upstream):
    with serving(upstream, keys=(KEY, "sk-two"), corrector=Fake()) as running:
        yield running


@pytest.fixture(scope="module")
def open_(upstream, tmp_path_factory):
    store = FeedbackStore.open(f"sqlite:///{tmp_path_factory.mktemp('store')}/feedback.db")
    with serving(upstream, corrector=Fake(), store=store) as running:
        yield running


@pytest.fixture
def browser(locked):
    with Browser(locked) as found:
        yield found


@pytest.mark.parametrize("path", PAGES)
def test_pages_lead_to_the_key_and_show_nothing_before(path, browser):
    reply = browser.get(path)
    assert (reply.status_code, reply.headers["location"], reply.content) == (303, "/login", b"")
    assert browser.post(path, data={"question": "?"}).status_code == 303
    assert browser.get(path, headers={"accept": "*/*"}).status_code == 401


def test_a_key_opens_the_pages_and_nothing_else(browser, locked):
    reply = browser.sign_in(KEY)
    assert (reply.status_code, reply.headers["location"]) == (303, "/")
    assert [browser.get(path).status_code for path in PAGES] == [200, 200, 404]
    for path in ("/v1/models", "/metrics", "/ready", "/openapi.json"):
        assert browser.get(path).status_code == 401
    assert browser.post("/v1/feedback", json={"id": "x", "rating": 1}).status_code == 401
    assert KEY not in str(browser.cookies)
    assert KEY not in browser.get("/").text


def test_the_session_s_cookie(browser):
    cookie = browser.sign_in(KEY).headers["set-cookie"]
    assert re.match(r"everalign_session_\d+=", cookie)
    assert {"HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"} <= set(cookie.split("; "))
    assert "Secure" not in cookie


@pytest.mark.parametrize(("trusted", "secure"), [((), False), (("10.0.0.0/8",), False), (("127.0.0.1",), True)])
def test_by_https_the_cookie_goes_over_nothing_else(upstream, trusted, secure):
    access = Access(trusted_proxies=trusted)
    with serving(upstream, keys=(KEY,), access=access) as gateway, Browser(gateway) as browser:
        reply = browser.get("/login", headers={"x-forwarded-proto": "https"})
    assert ("Secure" in reply.headers["set-cookie"].split("; ")) == secure


@pytest.mark.parametrize("key", ["", "sk-other", "sk-client-onë", " "])
def test_a_key_that_is_not_known(key, browser):
    reply = browser.sign_in(key)
    assert reply.status_code == 401
    assert "This key is not known here" in read(reply)
    assert browser.get("/").status_code == 303


def test_signing_in_begins_another_session_and_signing_out_ends_it(browser, locked):
    token = browser.token("/login")
    before = dict(browser.cookies)
    browser.sign_in(KEY)
    after = dict(browser.cookies)
    assert before.keys() == after.keys()
    assert before != after
    assert browser.submit("/", token=token, question="?", model="small").status_code == 403
    assert browser.submit("/logout").headers["location"] == "/login"
    # The cookie that somebody has kept is of no use any more.
    with Browser(locked, cookies=after) as other:
        assert other.get("/").status_code == 303


def test_sessions_are_signed_and_end():
    now = [1000.0]
    sessions = Sessions(60, lambda: now[0])
    session = sessions.begin("0123456789ab")
    cookie = sessions.cookie(session)
    assert sessions.read(cookie) == session
    key, nonce, expires, signature = cookie.split(".")
    for other in (
        "", "...", "x", f".{nonce}.{expires}.{signature}", f"{key}.{nonce}.{int(expires) + 1}.{signature}",
        f"ba9876543210.{nonce}.{expires}.{signature}", f"{key}.{nonce}.{expires}.{'0' * 64}", cookie + "é",
        Sessions(60, lambda: now[0]).cookie(session),
    ):  # fmt: skip
        assert sessions.read(other) is None
    assert sessions.is_token(session, sessions.token(session))
    assert not sessions.is_token(session, sessions.token(sessions.begin("0123456789ab")))
    assert not sessions.is_token(session, signature)
    now[0] += 60
    assert sessions.read(cookie) is None


@pytest.mark.parametrize("path", ["/", "/answers/chatcmpl-1", "/logout", "/login"])
@pytest.mark.parametrize("token", ["", "0" * 64, "é"])
def test_a_form_of_another_site_does_nothing(path, token, locked, upstream):
    with Browser(locked) as browser:
        if path != "/login":
            browser.sign_in(KEY)
        upstream.requests.clear()
        reply = browser.submit(path, token=token, question="?", model="small", key=KEY)
        # To another's answer, or to one that is not there, nothing is said either.
        assert reply.status_code in ((403, 404) if path.startswith("/answers") else (403,))
        assert upstream.requests == []
        if path == "/logout":
            assert browser.get("/").status_code == 200


def test_a_form_of_nobody_s_session_does_nothing(open_, upstream):
    upstream.requests.clear()
    with Browser(open_) as browser:
        reply = browser.post("/", data={"question": "?", "model": "small", "token": ""})
    assert reply.status_code == 403
    assert "this form has expired" in read(reply)
    assert upstream.requests == []


def test_forms_that_cannot_be_read(open_):
    with Browser(open_) as browser:
        for kind, content, status in [
            ("application/json", b"{}", 415),
            ("text/plain", b"a=b", 415),
            ("application/x-www-form-urlencoded", b"a=%ff", 400),
            ("application/x-www-form-urlencoded", b"\xff", 400),
            ("application/x-www-form-urlencoded", b"&".join([b"a=b"] * 50), 400),
        ]:
            assert browser.post("/", content=content, headers={"content-type": kind}).status_code == status
    assert parsed(b"a=1%0D%0A2&b=&a=3+4") == {"a": "3 4", "b": ""}


@pytest.mark.parametrize("path", ["/", "/dashboard", "/login", "/answers/none", "/assets/style.css"])
def test_what_a_page_may_load_and_who_may_frame_it(path, locked):
    with Browser(locked) as browser:
        reply = browser.get(path, headers={"authorization": f"Bearer {KEY}"}, follow_redirects=True)
    policy = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    if not path.startswith("/assets"):
        assert policy["style-src"] == policy["script-src"] == policy["form-action"] == "'self'"
        assert policy["base-uri"] == "'none'"
        assert not re.search(r"<style|style=|<script(?! src=\"/assets/)|\son\w+=|https?://", reply.text)
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["referrer-policy"] == "same-origin"
    assert reply.headers["cache-control"] == "no-store"


def test_without_a_key_there_is_the_way_to_sign_in_alone(locked):
    with Browser(locked) as browser:
        assert browser.get("/login").status_code == 200
        for name, kind in (("style.css", "text/css"), ("script.js", "text/javascript")):
            assert browser.get(f"/assets/{name}").headers["content-type"].startswith(kind)
        for path in ("/assets/", "/assets/..%2fpages/routes.py", "/assets/other", "/login/"):
            assert browser.get(path).status_code == 401


def test_nothing_that_is_said_becomes_markup(open_, upstream):
    upstream.answer = lambda _: Script(f"{EVIL} original")
    with Browser(open_) as browser:
        asked = browser.ask(f"{EVIL} question", model=f"{EVIL} model", system=f"{EVIL} system")
        fields = {"edited_text": f"{EVIL} edit", "tags": "<script>tag</script>", "comment": f"{EVIL} comment"}
        path = form_action(asked)
        said = browser.submit(path, digest=hidden(asked, "digest"), **fields)
        wrong = browser.submit(path, preferred=EVIL, digest=EVIL, **fields)
        none = browser.get(f"/answers/{EVIL.replace('/', '')}")
        pages = [asked, said, wrong, none, browser.get(path)]
    assert [page.status_code for page in pages] == [200, 200, 400, 404, 200]
    for page in pages:
        assert page.text.count("<script") == 1
        assert "<img" not in page.text
    for page, words in ((asked, "original question model system"), (said, "original question system edit comment tag")):
        assert all(word in read(page) for word in words.split())


def test_models_of_an_upstream_become_no_markup(open_, upstream, monkeypatch):
    async def models(self):
        return [{"id": EVIL, "object": "model"}]

    monkeypatch.setattr("everalign.serving.upstream.Upstream.models", models)
    with serving(upstream, corrector=Fake()) as gateway, Browser(gateway) as browser:
        page = browser.get("/")
    assert "&lt;script&gt;" in page.text
    assert page.text.count("<script") == 1


def test_no_key_is_needed_at_this_machine_and_nobody_else_gets_a_page(open_):
    with Browser(open_) as browser:
        assert browser.get("/login").headers["location"] == "/"
        assert "Sign out" not in browser.get("/").text
        for headers in ({"host": "evil.example"}, {"x-forwarded-for": "1.2.3.4"}):
            for path in ("/", "/login", "/assets/style.css"):
                assert browser.get(path, headers=headers).status_code == 403
