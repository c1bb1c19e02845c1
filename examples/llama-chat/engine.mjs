// One process of an application: loads a model, asks one question about a document, and ends.
//
//   node engine.mjs --model FILE.gguf --question TEXT [--url tcp://HOST:PORT] [--salt NAME]
//
// With --url, the document's attention state comes from a kvferry server (npx kvferry serve) when an
// earlier process has left it there, and is left there for the next one. Prints one JSON object.

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { Client } from "kvferry";
import { LlamaPrefixCache } from "kvferry/llama-cpp";
import { getLlama, LlamaChatSession, LlamaLogLevel } from "node-llama-cpp";

const { values } = parseArgs({
	options: {
		model: { type: "string", default: "model.gguf" },
		question: { type: "string", default: "What is this document about?" },
		"max-tokens": { type: "string", default: "32" },
		url: { type: "string" },
		salt: { type: "string" },
	},
});
const document = readFileSync(new URL("document.txt", import.meta.url), "utf8");
const systemPrompt = `Answer questions about this document.\n\n${document}`;

const llama = await getLlama({
	build: "never",
	gpu: false,
	skipDownload: true,
	logLevel: LlamaLogLevel.error,
});
const model = await llama.loadModel({ modelPath: values.model });
// One thread: two of them, beside other work, wait for each other more than they compute.
const context = await model.createContext({ contextSize: 2048, batchSize: 512, threads: 1 });
await warmUp();

const client = values.url === undefined ? undefined : await Client.connect({ url: values.url });
const cache = client && (await LlamaPrefixCache.open({ context, via: client }));
const session = new LlamaChatSession({ contextSequence: context.getSequence(), systemPrompt });

let outputTokens = 0;
let ttftMs = 0;
const options = {
	temperature: 0, // the likeliest token each time: the same prompt has one answer
	maxTokens: Number(values["max-tokens"]),
	onToken(/** @type {number[]} */ tokens) {
		ttftMs ||= performance.now() - asked;
		outputTokens += tokens.length;
	},
};
const asked = performance.now();
const { response, restored, saved } = cache
	? await cache.prompt(session, values.question, { ...options, cacheSalt: values.salt })
	: { response: await session.prompt(values.question, options) };

const { usedInputTokens } = session.sequence.tokenMeter;
console.log(
	JSON.stringify({
		ttft_ms: ttftMs,
		// The first token to be generated comes out of the evaluation of the prompt's last one.
		prompt_tokens: usedInputTokens + 1 + (restored?.hitTokens ?? 0),
		hit_tokens: restored?.hitTokens ?? 0,
		output_tokens: outputTokens,
		loaded_bytes: restored?.bytes ?? 0,
		stored_bytes: saved?.bytes ?? 0,
		response,
		failure: (restored?.failure ?? saved?.failure)?.message,
	}),
);
await cache?.close();
await client?.close();
await llama.dispose();

/** Reads the model's pages and starts the engine's threads: neither belongs to a prompt. */
async function warmUp() {
	const sequence = context.getSequence();
	await sequence.evaluateWithoutGeneratingNewTokens(model.tokenize(document).slice(0, 16));
	await sequence.dispose();
}
