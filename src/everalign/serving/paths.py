"""What clients call the gateway's paths, all of them led to one: `/v1/...`.

| asked for | meant |
|---|---|
| `/chat/completions`, and others without `/v1` | `/v1/chat/completions` |
| `/v1/v1/...`, as where a client adds `/v1` to a base URL that has it | `/v1/...` |
| `/openai/v1/...`, `/openai/...?api-version=...` (Azure) | `/v1/...` |
| `/openai/deployments/NAME/chat/completions?api-version=...` (Azure) | `/v1/chat/completions` of the model NAME |
| one with `//`, or a `/` at its end, as clients make them of a base URL that ends so | the same without |
| any of them behind the path of `--root-path` | the same without it |
"""

import re
from dataclasses import dataclass

# The first words of OpenAI's paths, and of those that servers like it have; the gateway's own pages are none of them.
ENDPOINTS = (
    *("assistants", "audio", "batches", "chat", "classify", "completions", "containers", "conversations", "embeddings"),
    *("evals", "feedback", "files", "fine_tuning", "images", "messages", "models", "moderations", "realtime", "rerank"),
    *("responses", "score", "threads", "tokenize", "uploads", "vector_stores", "videos"),
)
_DEPLOYMENT = re.compile(
    r"/openai/deployments/(?P<model>.+?)/(?P<rest>(?:chat/)?completions|(?:embeddings|images|audio)(?:/.*)?)", re.DOTALL
)
_AZURE = re.compile(r"/openai(?:/v1)?/(?P<rest>.+)")
_REPEATED = re.compile(r"(?:/v1){2,}(?=/)")


@dataclass(frozen=True)
class Meant:
    """Where a request leads.

    Args:
        path: that the gateway's routes know.
        model: that the path names in the place of the body; None where it names none.
        azure: whether it is one of Azure's paths, whose `api-version` says nothing to others.
    """

    path: str
    model: str | None = None
    azure: bool = False


def meant(path: str, root: str = "") -> Meant:
    """Return where a path leads.

    Args:
        path: of the request, without its query.
        root: what a proxy has in front; a proxy may have taken it away.
    """
    plain = re.sub(r"//+", "/", path).rstrip("/")
    if root and plain.startswith(f"{root}/"):
        plain = plain[len(root) :]
    if plain.startswith(("/v1/", "/openai/")) or plain[1:].partition("/")[0] in ENDPOINTS:
        path = plain
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :] or "/"
    if found := _DEPLOYMENT.fullmatch(path):
        return Meant(f"/v1/{found['rest']}", found["model"], azure=True)
    if found := _AZURE.fullmatch(path):
        return Meant(f"/v1/{found['rest']}", azure=True)
    path = _REPEATED.sub("/v1", path, count=1) if path.startswith("/v1/v1/") else path
    return Meant(f"/v1{path}" if path[1:].partition("/")[0] in ENDPOINTS else path)
