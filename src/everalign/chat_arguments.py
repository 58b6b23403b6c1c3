"""What a chat client is given, checked: a server's address, a model's name, a key, limits."""

import math
import re

import httpx

from everalign.errors import InputError

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that holds the key of the server that is asked alone."""


def checked_url(text: str) -> str:
    """The address below which `chat/completions` is."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise InputError(f"the server's address cannot be read: {error}") from None
    if url.userinfo or url.query or url.fragment:
        # Not repeated: this is where people put passwords.
        raise InputError(
            f"{url.scheme}://{url.host}: the server's address must be without user, '?' and '#'; "
            f"a key belongs in the environment variable {KEY_VARIABLE}"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"{text}: the address must begin with http:// or https://, such as http://127.0.0.1:8000/v1")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    # Some servers have another version, or more, at the end of the path.
    versioned = re.search(r"/v\d", path)
    return str(url.copy_with(path=path if versioned else f"{path}/v1"))


def checked_model(model: str) -> str:
    """A model's name that is not empty."""
    if not model.strip():
        raise InputError("model: is empty; name a model as the server knows it")
    return model


def checked_key(key: str, variable: str = KEY_VARIABLE) -> str:
    """A key, from an environment variable, as a header can hold it; a header's own error would print it."""
    key = key.strip()
    if re.search(r"[^\x21-\x7e]", key):
        raise InputError(f"the API key ({variable}) has characters other than letters, digits and signs of ASCII")
    return key


def check_limits(timeout: float, retries: int, concurrency: int, requests_per_minute: float) -> None:
    """Refuse limits that no client can keep."""
    if not (math.isfinite(timeout) and timeout > 0):
        raise InputError(f"timeout: must be above 0 seconds, found {timeout}")
    if retries < 0:
        raise InputError(f"retries: must be at least 0, found {retries}")
    if concurrency < 1:
        raise InputError(f"concurrency: must be at least 1, found {concurrency}")
    if not (math.isfinite(requests_per_minute) and requests_per_minute >= 0):
        raise InputError(f"requests per minute: must be at least 0, found {requests_per_minute}")
