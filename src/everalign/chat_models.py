"""A model behind a server as users name it, URL#MODEL, and the files that say what it is to do."""

from dataclasses import dataclass
from pathlib import Path

from everalign.chat_client import CONCURRENCY, TIMEOUT, ChatClient
from everalign.errors import InputError


@dataclass(frozen=True)
class ChatOptions:
    """How a server is asked; None stands for the default.

    Args:
        concurrency: requests under way at once.
        requests_per_minute: at most so many requests are begun.
        timeout: seconds for one attempt.
    """

    concurrency: int | None = None
    requests_per_minute: float | None = None
    timeout: float | None = None

    def client(self, name: str, whom: str, api_key: str | None = None) -> ChatClient:
        """Return a client for a name such as `http://127.0.0.1:8000/v1#qwen2.5`: the server's address, # and the model.

        Args:
            name: address and model.
            whom: who is named, such as `a judge`, for messages.
            api_key: what the server asks for, empty for nothing; OPENAI_API_KEY when None.

        Raises:
            InputError: the name lacks a part, or an option cannot be used.
        """
        address, _, model = name.partition("#")
        if not model.strip():
            raise InputError(
                f"{whom} is named URL#MODEL, such as http://127.0.0.1:8000/v1#qwen2.5; the model is missing"
            )
        return ChatClient(
            address,
            model,
            api_key,
            timeout=TIMEOUT if self.timeout is None else self.timeout,
            concurrency=CONCURRENCY if self.concurrency is None else self.concurrency,
            requests_per_minute=self.requests_per_minute or 0,
        )


def read_instructions(path: Path, whose: str, what: str) -> str:
    """Return the text of a file of instructions.

    Args:
        path: the file.
        whose: instructions they are, such as `the judge's`, for messages.
        what: they should say, for messages.

    Raises:
        InputError: there is no such file, or it is no text, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {whose} instructions cannot be read: {error}") from error
    if not text.strip():
        raise InputError(f"{path}: is empty; say {what}")
    return text
