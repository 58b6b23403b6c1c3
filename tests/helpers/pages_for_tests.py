"""A browser without a screen or a script: keeps cookies, reads forms, sends them."""

import html
import re

import httpx


class Browser(httpx.Client):
    """A client that sends a page's forms with its token."""

    def __init__(self, gateway, **more):
        accept = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
        super().__init__(base_url=gateway.url[:-3], headers=accept, trust_env=False, timeout=10, **more)

    def token(self, path="/"):
        return hidden(self.get(path, follow_redirects=True), "token")

    def submit(self, path, *, token=None, **fields):
        return self.post(path, data={"token": self.token() if token is None else token, **fields})

    def ask(self, question="Is it salty?", model="small", **fields):
        return self.submit("/", model=model, question=question, **fields)

    def sign_in(self, key):
        return self.submit("/login", token=self.token("/login"), key=key)


def hidden(reply, name):
    return html.unescape(re.search(rf'name="{name}" value="([^"]*)"', reply.text)[1])


def form_action(reply):
    """Where the feedback form is sent."""
    return re.search(r'action="(/answers/[^"#]*)#feedback"', reply.text)[1]


def read(reply):
    """A page's text, without its marks."""
    apart = re.sub(r"</?(?:d[tdl]|t[dhr]|div|p|h\d|span|label)\b[^>]*>", " ", reply.text)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", apart)))
