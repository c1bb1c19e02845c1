// One process of an application: loads an ONNX model, asks one question about a document, and ends.
//
//   node engine.mjs --model FILE.onnx [--question TEXT] [--url tcp://HOST:PORT] [--salt NAME]
//
// With --url, the document's attention state comes from a kvferry server (npx kvferry serve) when an earlier
// process has left it there, and is left there for the next one. Prints one JSON object.
//
// The model's tokens are bytes here, as those of scripts/tiny-onnx.py are; a real model comes with its tokenizer.

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { Client } from "kvferry";
import { OnnxPrefixCache } from "kvferry/onnx";
import { InferenceSession, Tensor } from "onnxruntime-node";

const { values } = parseArgs({
	options: {
		model: { type: "string", default: "model.onnx" },
		question: { type: "string", default: "What is this document about?" },
		"max-tokens": { type: "string", default: "16" },
		url: { type: "string", default: "tcp://127.0.0.1:5555" },
		salt: { type: "string" },
	},
});
const document = readFileSync(new URL("../llama-chat/document.txt", import.meta.url), "utf8");
const tokens = [...Buffer.from(`${document}\n\n${values.question}\n`)];
const promptTokens = tokens.length;

const session = await InferenceSession.create(values.model, { intraOpNumThreads: 1 });
const client = await Client.connect({ url: values.url });
const options = { session, Tensor, modelPath: values.model, cacheSalt: values.salt, via: client };
const cache = await OnnxPrefixCache.open(options);

const asked = performance.now();
const loaded = await cache.load(tokens);
let past = loaded.feeds;
let held = loaded.hitTokens;
let ttftMs = 0;
/** @type {Readonly<Record<string, Tensor>>} */
let outputs;
do {
	const rest = tokens.slice(held);
	outputs = await session.run({
		...past,
		input_ids: int64(rest),
		attention_mask: int64(tokens.map(() => 1)),
		position_ids: int64(rest.map((_, at) => held + at)),
	});
	held = tokens.length;
	past = pastOf(outputs);
	tokens.push(likeliest(/** @type {Tensor} */ (outputs.logits)));
	ttftMs ||= performance.now() - asked;
} while (tokens.length < promptTokens + Number(values["max-tokens"]));
const saved = await cache.save(tokens, outputs); // the last token has not been evaluated

console.log(
	JSON.stringify({
		ttft_ms: ttftMs,
		prompt_tokens: promptTokens,
		hit_tokens: loaded.hitTokens,
		output_tokens: tokens.length - promptTokens,
		loaded_bytes: loaded.bytes,
		stored_bytes: saved.bytes,
		response: tokens.slice(promptTokens),
		failure: (loaded.failure ?? saved.failure)?.message,
	}),
);
await cache.close();
await client.close();
await session.release();

function int64(/** @type {number[]} */ values) {
	return new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

/** What a run has left, as the next one takes it. */
function pastOf(/** @type {Readonly<Record<string, Tensor>>} */ outputs) {
	const present = Object.entries(outputs).filter(([name]) => name.startsWith("present."));
	return Object.fromEntries(
		present.map(([name, tensor]) => [name.replace("present", "past_key_values"), tensor]),
	);
}

/** The token with the highest logit behind the last one. */
function likeliest(/** @type {Tensor} */ { data, dims }) {
	const last = /** @type {Float32Array} */ (data).slice(-(dims[2] ?? 0));
	return last.indexOf(Math.max(...last));
}
