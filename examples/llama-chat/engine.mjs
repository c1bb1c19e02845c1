// One process of an application: loads a model, asks one question about a document, and ends.
//
//   node engine.mjs --model FILE.gguf --question TEXT [--url tcp://HOST:PORT | --disk DIR] [--salt NAME]
//
// With --url, the document's attention state comes from a kvferry server (npx kvferry serve) when an
// earlier process has left it there, and is left there for the next one; with --disk, from files that an earlier
// process has left in DIR, and no server runs anywhere. Prints one JSON object.

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { Client, Server } from "kvferry";
import { LlamaPrefixCache } from "kvferry/llama-cpp";
import { getLlama, LlamaChatSession, LlamaLogLevel } from "node-llama-cpp";

const { values } = parseArgs({
	options: {
		model: { type: "string", default: "model.gguf" },
		question: { type: "string", default: "What is this document about?" },
		"max-tokens": { type: "string", default: "32" },
		url: { type: "string" },
		disk: { type: "string" },
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

const via = await openCache();
const cache = via && (await LlamaPrefixCache.open({ context, via }));
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
await via?.close(); // what is not on the disk yet is written now
await llama.dispose();

/** A server of its own process, or a cache in this one that keeps its chunks on disk; or none. */
async function openCache() {
	if (values.disk !== undefined) {
		return await Server.start({ listen: false, memory: 2 ** 30, disk: values.disk });
	}
	return values.url === undefined ? undefined : await Client.connect({ url: values.url });
}

/** Reads the model's pages and starts the engine's threads: neither belongs to a prompt. */
async function warmUp() {
	const sequence = context.getSequence();
	await sequence.evaluateWithoutGeneratingNewTokens(model.tokenize(document).slice(0, 16));
	await sequence.dispose();
}
