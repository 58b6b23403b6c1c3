"""Calls of LiteLLM as a client: BASE_URL KEY; prints what each of them gave as JSON."""

import litellm
from calls import WEATHER, run

DRAWN = {"id", "created"}
"""What LiteLLM makes up anew for every answer or chunk."""


def calls(base_url, key):
    settings = {"model": "openai/small", "api_base": base_url, "api_key": key, "num_retries": 0, "max_retries": 0}
    asked = settings | {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    weather = {"type": "function", "function": WEATHER}

    def refused(status):
        messages = [{"role": "user", "content": f"refuse with {status}"}]
        try:
            litellm.completion(**settings, messages=messages)
        except (litellm.BadRequestError, litellm.RateLimitError, litellm.InternalServerError) as error:
            return [type(error).__name__, error.status_code, error.message]

    def streamed(**more):
        return [chunk.model_dump(exclude=DRAWN) for chunk in litellm.completion(**asked, stream=True, **more)]

    return {
        "chat": lambda: litellm.completion(**asked).model_dump(exclude=DRAWN),
        "stream": streamed,
        "tools": lambda: litellm.completion(**asked, tools=[weather]).model_dump(exclude=DRAWN),
        "streamed tools": lambda: streamed(tools=[weather]),
        "response": lambda: litellm.responses(**settings, input="What?").model_dump(exclude=DRAWN),
        "embeddings": lambda: litellm.embedding(**settings, input=["a"], encoding_format="float").model_dump(),
        "refused with 400": lambda: refused(400),
        "refused with 429": lambda: refused(429),
    }


if __name__ == "__main__":
    run(calls)
