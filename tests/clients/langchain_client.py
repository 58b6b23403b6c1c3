"""Calls of LangChain's ChatOpenAI: BASE_URL KEY; prints what each of them gave as JSON."""

from calls import WEATHER, run
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

QUESTION = "What is the capital of France?"


class Place(BaseModel):
    """What is asked for as a structure."""

    city: str
    country: str
    people: int


def shown(message):
    """A message without the number that LangChain draws for it."""
    return message.model_dump(exclude={"id"})


def calls(base_url, key):
    settings = {"base_url": base_url, "api_key": key, "model": "small", "max_retries": 0}
    chat, responses = ChatOpenAI(**settings), ChatOpenAI(**settings, use_responses_api=True)
    weather = {"type": "function", "function": WEATHER}
    embeddings = OpenAIEmbeddings(base_url=base_url, api_key=key, model="small", check_embedding_ctx_length=False)
    return {
        "chat": lambda: shown(chat.invoke(QUESTION)),
        "stream": lambda: [shown(chunk) for chunk in chat.stream(QUESTION)],
        "tools": lambda: shown(chat.bind_tools([weather]).invoke(QUESTION)),
        "streamed tools": lambda: [shown(chunk) for chunk in chat.bind_tools([weather]).stream(QUESTION)],
        "structure": lambda: chat.with_structured_output(Place).invoke(QUESTION).model_dump(),
        "structure by a tool": lambda: (
            chat.with_structured_output(Place, method="function_calling").invoke(QUESTION).model_dump()
        ),
        "response": lambda: shown(responses.invoke(QUESTION)),
        "streamed response": lambda: [shown(chunk) for chunk in responses.stream(QUESTION)],
        "embeddings": lambda: embeddings.embed_documents(["a", "b"]),
    }


if __name__ == "__main__":
    run(calls)
