// One process of an application on transformers.js, with the tiny model:
//
//   onnx-process.mjs MODE MODEL-DIRECTORY DTYPE SERVER-URL "[token, …]" SPLIT
//
// MODE "store" has the cache generate behind the prompt's first SPLIT tokens; "load" behind the whole prompt, and
// "unmasked" without an attention mask; "cold" does the same in two calls of generate, without the cache; "single" in one.
// Prints { hitTokens, storedTokens, sequence, logits }.

import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";
import { Client } from "kvferry";
import { OnnxPrefixCache } from "kvferry/onnx";

const [mode = "", directory = "", dtype = "fp32", url = "", prompt = "[]", split = "0"] =
	process.argv.slice(2);
const require = createRequire(new URL("../../examples/onnx-chat/package.json", import.meta.url));
// The ESM build: another one's classes are not the same.
const path = require.resolve("@huggingface/transformers").replace(/\.cjs$/, ".mjs");
const transformers = await import(pathToFileURL(path).href);
const { AutoModelForCausalLM, DynamicCache, LogitsProcessor, LogitsProcessorList, Tensor, env } =
	transformers;
env.allowRemoteModels = false;
env.localModelPath = dirname(directory);
const model = await AutoModelForCausalLM.from_pretrained(basename(directory), {
	dtype,
	session_options: { intraOpNumThreads: 1 },
});

/** @type {string[]} */
const logits = [];
class Recorder extends LogitsProcessor {
	_call(/** @type {unknown} */ _ids, /** @type {{ data: Float32Array }} */ scores) {
		logits.push(
			Buffer.from(new Uint8Array(Float32Array.from(scores.data).buffer)).toString("base64"),
		);
		return scores;
	}
}
const recorders = new LogitsProcessorList();
recorders.push(new Recorder());

const ids = BigInt64Array.from(JSON.parse(prompt), BigInt);
const inputs = (/** @type {BigInt64Array} */ tokens, /** @type {number} */ count) => ({
	input_ids: new Tensor("int64", tokens, [1, tokens.length]),
	attention_mask: new Tensor(
		"int64",
		tokens.map(() => 1n),
		[1, tokens.length],
	),
	max_new_tokens: count,
	do_sample: false,
});
const whole = { ...inputs(ids, 8), logits_processor: recorders };
const first = inputs(ids.slice(0, Number(split)), 1);

const result = await run();
process.stdout.write(
	JSON.stringify({
		hitTokens: result.loaded?.hitTokens,
		storedTokens: result.saved?.storedTokens,
		failure: (result.loaded?.failure ?? result.saved?.failure)?.message,
		sequence: Array.from(result.sequences.data, Number),
		logits,
	}),
);

/** @returns {Promise<Partial<import("kvferry/onnx").GenerateResult> & { sequences: { data: any } }>} */
async function run() {
	if (mode === "single") {
		return { sequences: await model.generate(whole) };
	}
	if (mode === "cold") {
		const { past_key_values } = await model.generate({ ...first, return_dict_in_generate: true });
		return { sequences: await model.generate({ ...whole, past_key_values }) };
	}
	const client = await Client.connect({ url });
	const modelPath = `${directory}/onnx/${dtype === "fp16" ? "model_fp16" : "model"}.onnx`;
	const options = { model, Tensor, DynamicCache, modelPath, via: client };
	const cache = await OnnxPrefixCache.open(options);
	const { attention_mask: _, ...unmasked } = whole;
	const generated = await cache.generate(
		mode === "store" ? first : mode === "unmasked" ? unmasked : whole,
	);
	await cache.close();
	await client.close();
	return generated;
}
