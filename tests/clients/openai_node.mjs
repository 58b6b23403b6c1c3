// Calls of openai-node: BASE_URL KEY; prints what each of them gave as JSON.
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const asked = { model: "small", messages: [{ role: "user", content: "What is the capital of France?" }] };
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const weather = { type: "function", function: { name: "get_weather", parameters } };
const func = { type: "function", name: "get_weather", parameters, strict: false };

async function all(stream) {
  const found = [];
  for await (const event of await stream) found.push(event);
  return found;
}

async function refused(status) {
  try {
    await client.chat.completions.create({ model: "small", messages: [{ role: "user", content: `refuse with ${status}` }] });
  } catch (error) {
    const limits = error.headers.get("x-ratelimit-remaining-requests");
    return [error.constructor.name, error.status, error.error, limits];
  }
}

const found = {
  chat: await client.chat.completions.create(asked),
  stream: await all(client.chat.completions.create({ ...asked, stream: true })),
  "stream with usage": await all(
    client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } }),
  ),
  "accumulated stream": await client.chat.completions.stream(asked).finalChatCompletion(),
  tools: await client.chat.completions.create({ ...asked, tools: [weather] }),
  "streamed tools": await all(client.chat.completions.create({ ...asked, tools: [weather], stream: true })),
  response: await client.responses.create({ model: "small", input: "What?" }),
  "streamed response": await all(client.responses.create({ model: "small", input: "What?", stream: true })),
  "response with tools": await client.responses.create({ model: "small", input: "What?", tools: [func] }),
  "streamed response with tools": await all(
    client.responses.create({ model: "small", input: "What?", tools: [func], stream: true }),
  ),
  embeddings: await client.embeddings.create({ model: "small", input: ["a", "b"] }),
  models: (await all(client.models.list())).map((model) => model.id),
  "refused with 400": await refused(400),
  "refused with 429": await refused(429),
};
console.log(JSON.stringify(found));
