"""Runs of pydantic-ai's agents: BASE_URL KEY; prints what each of them gave as JSON."""

import asyncio

from calls import run
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the capital of France?"


class Place(BaseModel):
    """What is asked for as a structure."""

    city: str
    country: str
    people: int


def shown(result):
    """What an agent's run gave, and what it cost."""
    return [result.output if isinstance(result.output, str) else result.output.model_dump(), str(result.usage)]


def calls(base_url, key):
    provider = OpenAIProvider(base_url=base_url, api_key=key)
    chat, responses = (kind("small", provider=provider) for kind in (OpenAIChatModel, OpenAIResponsesModel))

    async def streamed(model):
        async with Agent(model).run_stream(QUESTION) as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    def with_tool(model):
        agent = Agent(model)

        @agent.tool_plain
        def get_weather(city: str) -> str:
            return f"rain in {city}"

        return shown(agent.run_sync(QUESTION))

    return {
        "chat": lambda: shown(Agent(chat).run_sync(QUESTION)),
        "stream": lambda: "".join(asyncio.run(streamed(chat))),
        "an agent with a tool": lambda: with_tool(chat),
        "structure": lambda: shown(Agent(chat, output_type=Place).run_sync(QUESTION)),
        "response": lambda: shown(Agent(responses).run_sync(QUESTION)),
        "streamed response": lambda: "".join(asyncio.run(streamed(responses))),
        "an agent with a tool over responses": lambda: with_tool(responses),
    }


if __name__ == "__main__":
    run(calls)
