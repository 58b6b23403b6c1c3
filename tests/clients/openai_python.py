"""Calls of openai-python: BASE_URL KEY; prints what each of them gave as JSON."""

import openai
from calls import WEATHER, run
from pydantic import BaseModel


class Place(BaseModel):
    """What is asked for as a structure."""

    city: str
    country: str
    people: int


def calls(base_url, key):
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
    chat = client.chat.completions
    asked = {"model": "small", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    weather = {"type": "function", "function": WEATHER}

    def refused(status):
        messages = [{"role": "user", "content": f"refuse with {status}"}]
        try:
            chat.create(model="small", messages=messages)
        except openai.APIStatusError as error:
            limits = error.response.headers.get("x-ratelimit-remaining-requests")
            return [type(error).__name__, error.status_code, error.body, limits]

    def streamed(**more):
        return [chunk.model_dump() for chunk in chat.create(**asked, stream=True, **more)]

    def accumulated():
        with chat.stream(**asked, stream_options={"include_usage": True}) as stream:
            return stream.get_final_completion().model_dump()

    def response_stream(**more):
        with client.responses.create(model="small", input="What?", stream=True, **more) as stream:
            return [event.model_dump() for event in stream]

    function = {"type": "function", **WEATHER, "strict": False}
    return {
        "chat": lambda: chat.create(**asked).model_dump(),
        "two choices": lambda: chat.create(**asked, n=2).model_dump(),
        "headers": lambda: chat.with_raw_response.create(**asked).headers["x-ratelimit-remaining-requests"],
        "stream": streamed,
        "stream with usage": lambda: streamed(stream_options={"include_usage": True}),
        "accumulated stream": accumulated,
        "tools": lambda: chat.create(**asked, tools=[weather]).model_dump(),
        "streamed tools": lambda: streamed(tools=[weather]),
        "structure": lambda: chat.parse(**asked, response_format=Place).model_dump(),
        "refused with 400": lambda: refused(400),
        "refused with 429": lambda: refused(429),
        "refused with 500": lambda: refused(500),
        "response": lambda: client.responses.create(model="small", input="What?").model_dump(),
        "streamed response": response_stream,
        "response with tools": lambda: client.responses.create(
            model="small", input="What?", tools=[function]
        ).model_dump(),
        "streamed response with tools": lambda: response_stream(tools=[function]),
        "structured response": lambda: client.responses.parse(
            model="small", input="What?", text_format=Place
        ).model_dump(),
        "embeddings": lambda: client.embeddings.create(model="small", input=["a", "b"]).model_dump(),
        "completion": lambda: client.completions.create(model="small", prompt="It is").model_dump(),
        "moderation": lambda: client.moderations.create(input="x").model_dump(),
        "models": lambda: [model.id for model in client.models.list()],
    }


if __name__ == "__main__":
    run(calls)
