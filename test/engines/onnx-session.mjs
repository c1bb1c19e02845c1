// What an application on onnxruntime-node does with a model. As a process of its own, with the cache:
//
//   onnx-session.mjs FILE.onnx SERVER-URL "[token, …]" COUNT
//
// loads what there is of the prompt, evaluates the rest, generates COUNT tokens, and prints
// { hitTokens, tokens, logits }.

import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import { Client } from "kvferry";
import { OnnxPrefixCache } from "kvferry/onnx";

/**
 * @typedef {import("../../ts/engines/onnx.js").EngineTensor} Tensor
 * @typedef {Record<string, Tensor>} Tensors
 */

/** Evaluates `rest`, the tokens behind those that `feeds` hold, and goes on greedily for `count` tokens. */
export async function evaluate(
	/** @type {import("./onnx-engine.js").Onnxruntime} */ ort,
	/** @type {import("./onnx-engine.js").Session} */ session,
	/** @type {Tensors} */ feeds,
	/** @type {readonly number[]} */ rest,
	count = 1,
) {
	const int64 = (/** @type {bigint[]} */ values) =>
		new ort.Tensor("int64", BigInt64Array.from(values), [1, values.length]);
	/** @type {number[]} */
	const tokens = [];
	/** @type {Float32Array[]} */
	const logits = [];
	let past = feeds["past_key_values.0.key"]?.dims[2] ?? 0;
	let [kv, input] = [feeds, rest];
	for (;;) {
		const total = past + input.length;
		const outputs = await session.run({
			...kv,
			input_ids: int64(input.map(BigInt)),
			attention_mask: int64(Array(total).fill(1n)),
			position_ids: int64(input.map((_, at) => BigInt(past + at))),
		});
		const { dims = [], data } = outputs.logits ?? {};
		const last = /** @type {Float32Array} */ (data).slice(-(dims[2] ?? 0));
		const token = last.indexOf(Math.max(...last));
		logits.push(last);
		tokens.push(token);
		if (tokens.length === count) {
			return { outputs, tokens, logits };
		}
		const present = Object.entries(outputs).filter(([name]) => name.startsWith("present."));
		kv = Object.fromEntries(
			present.map(([name, tensor]) => [name.replace("present", "past_key_values"), tensor]),
		);
		[past, input] = [total, [token]];
	}
}

/** Every bit of them, as text. */
export function base64(/** @type {Float32Array} */ logits) {
	return Buffer.from(new Uint8Array(logits.buffer)).toString("base64");
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	const [modelPath = "", url = "", prompt = "[]", count] = process.argv.slice(2);
	const example = new URL("../../examples/onnx-chat/package.json", import.meta.url);
	/** @type {import("./onnx-engine.js").Onnxruntime} */
	const ort = createRequire(example)("onnxruntime-node");
	const session = await ort.InferenceSession.create(modelPath, { intraOpNumThreads: 1 });
	const client = await Client.connect({ url });
	const cache = await OnnxPrefixCache.open({ session, Tensor: ort.Tensor, modelPath, via: client });
	const { hitTokens, feeds } = await cache.load(JSON.parse(prompt));
	const rest = JSON.parse(prompt).slice(hitTokens);
	const { tokens, logits } = await evaluate(ort, session, feeds, rest, Number(count));
	process.stdout.write(JSON.stringify({ hitTokens, tokens, logits: logits.map(base64) }));
	await cache.close();
	await client.close();
}
