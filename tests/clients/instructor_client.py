"""Structures by instructor, in its modes: BASE_URL KEY; prints what each of them gave as JSON."""

import instructor
import openai
from calls import run
from pydantic import BaseModel


class Place(BaseModel):
    """What is asked for."""

    city: str
    country: str
    people: int


def calls(base_url, key):
    asked = {"model": "small", "messages": [{"role": "user", "content": "What is the capital of France?"}]}

    def structured(mode):
        client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key=key, max_retries=0), mode=mode)
        place, completion = client.create_with_completion(**asked, response_model=Place, max_retries=1)
        return [place.model_dump(), completion.model_dump()]

    def partly():
        client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key=key, max_retries=0))
        return [part.model_dump() for part in client.create_partial(**asked, response_model=Place)]

    return {
        "tools": lambda: structured(instructor.Mode.TOOLS),
        "json": lambda: structured(instructor.Mode.JSON),
        "schema": lambda: structured(instructor.Mode.JSON_SCHEMA),
        "streamed parts": partly,
    }


if __name__ == "__main__":
    run(calls)
