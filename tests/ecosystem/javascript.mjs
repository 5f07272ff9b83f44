// Asks the service with OpenAI's client for JavaScript; prints the id of the conversation that it wrote.
// The answer to the first attempt of each append is lost on the way (see javascript.py).
import OpenAI from "openai";

class RepeatingOpenAI extends OpenAI {
  idempotencyHeader = "Idempotency-Key";
}

const ai = new RepeatingOpenAI({
  baseURL: process.env.TEST_API_BASE_URL,
  apiKey: "none",
  defaultHeaders: { "X-User-Id": "ada" },
});
const made = await ai.conversations.create({ metadata: { from: "javascript" } });
await ai.conversations.items.create(made.id, {
  items: [{ type: "message", role: "user", content: "once" }],
});
const texts = [];
for await (const item of ai.conversations.items.list(made.id, { order: "asc" })) {
  texts.push(item.content[0].text);
}
if (texts.join() !== "once") throw new Error(`read ${texts}`);
try {
  await ai.conversations.retrieve("missing");
  throw new Error("a missing conversation was found");
} catch (error) {
  if (error.status !== 404 || !error.message.includes("There is no conversation")) throw error;
}
console.log(made.id);
