"""Calls of LlamaIndex's OpenAILike: BASE_URL KEY; prints what each of them gave as JSON."""

from calls import run
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

ASKED = [ChatMessage(role="user", content="What is the capital of France?")]


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def calls(base_url, key):
    settings = {"api_base": base_url, "api_key": key, "model": "small", "max_retries": 0}
    chat = OpenAILike(**settings, is_chat_model=True, is_function_calling_model=True, context_window=8192)
    tool = FunctionTool.from_defaults(get_weather)
    return {
        "chat": lambda: chat.chat(ASKED).model_dump(),
        "stream": lambda: [chunk.model_dump(include={"delta", "raw"}) for chunk in chat.stream_chat(ASKED)],
        "complete": lambda: chat.complete("It is").text,
        "tools": lambda: chat.chat_with_tools([tool], chat_history=ASKED).model_dump(),
    }


if __name__ == "__main__":
    run(calls)
