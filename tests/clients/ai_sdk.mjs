// Calls of the AI SDK, by its providers `openai` and `openai-compatible`: BASE_URL KEY; prints what each gave as JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, apiKey] = process.argv.slice(2);
globalThis.AI_SDK_LOG_WARNINGS = false; // they would stand on standard output
const openai = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ baseURL, apiKey, name: "gateway", includeUsage: true });
const models = {
  "openai responses": openai.responses("small"),
  "openai chat": openai.chat("small"),
  "openai-compatible": compatible("small"),
};
const prompt = "What is the capital of France?";
const schema = z.object({ city: z.string(), country: z.string(), people: z.number() });
const get_weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `rain in ${city}`,
});

async function refused(model, status) {
  try {
    await generateText({ model, prompt: `refuse with ${status}`, maxRetries: 0 });
  } catch (error) {
    return [error.name, error.statusCode, error.message];
  }
}

async function streamed(model) {
  const result = streamText({ model, prompt, maxRetries: 0 });
  const pieces = [];
  for await (const piece of result.textStream) pieces.push(piece);
  return { text: pieces.join(""), usage: await result.usage, reason: await result.finishReason };
}

async function ask(model, more = {}) {
  const result = await generateText({ model, prompt, maxRetries: 0, ...more });
  return { text: result.text, usage: result.usage, reason: result.finishReason, steps: result.steps.length };
}

const found = {};
for (const [name, model] of Object.entries(models)) {
  found[`${name}: text`] = await ask(model);
  found[`${name}: stream`] = await streamed(model);
  found[`${name}: tool`] = await ask(model, { tools: { get_weather }, stopWhen: stepCountIs(3) });
  found[`${name}: object`] = (await generateObject({ model, prompt, schema, maxRetries: 0 })).object;
  found[`${name}: refused with 400`] = await refused(model, 400);
  found[`${name}: refused with 429`] = await refused(model, 429);
}
found.embedding = (await embed({ model: openai.textEmbeddingModel("small"), value: "a" })).embedding;
console.log(JSON.stringify(found));
