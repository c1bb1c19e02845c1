import type { EngineSession, EngineTensor, OnnxLayout } from "../../ts/engines/onnx.js";

/** What a session tells, without an engine behind it. */
export interface FakeSession extends EngineSession {
	readonly inputMetadata: {
		name: string;
		isTensor: boolean;
		type: string;
		shape: (number | string)[];
	}[];
}

/** A session of so many layers with plain KV inputs, and the inputs that all models have. */
export function sessionOf(
	layers: number,
	{ kvHeads, headSize, dtype }: OnnxLayout,
	more: readonly string[] = [],
): FakeSession {
	const names = Array.from({ length: layers }, (_, layer) => [
		`${layer}.key`,
		`${layer}.value`,
	]).flat();
	const inputNames = [
		...["input_ids", "attention_mask", "position_ids", ...more],
		...names.map((name) => `past_key_values.${name}`).reverse(), // the order is not ours to choose
	];
	return {
		inputNames,
		outputNames: ["logits", ...names.map((name) => `present.${name}`)],
		inputMetadata: inputNames.map((name) => ({
			name,
			isTensor: true,
			type: name.startsWith("past_key_values.") ? dtype : "int64",
			shape: name.startsWith("past_key_values.")
				? ["batch", kvHeads, "past", headSize]
				: ["batch", "tokens"],
		})),
	};
}

/** A tensor, without an engine behind it. */
export class FakeTensor implements EngineTensor {
	readonly location = "cpu";

	constructor(
		readonly type: string,
		readonly data: Float32Array | Uint16Array,
		readonly dims: number[],
	) {}
}

/** `present.*` of a prompt of `tokens`: every element tells where it belongs. */
export function presentOf(
	session: FakeSession,
	{ kvHeads, headSize, dtype }: OnnxLayout,
	tokens: number,
): Record<string, FakeTensor> {
	const outputs: Record<string, FakeTensor> = {};
	for (const [number, name] of session.outputNames.slice(1).entries()) {
		const elements = kvHeads * tokens * headSize;
		const data = dtype === "float16" ? new Uint16Array(elements) : new Float32Array(elements);
		for (let head = 0, at = 0; head < kvHeads; head++) {
			for (let token = 0; token < tokens; token++) {
				for (let element = 0; element < headSize; element++, at++) {
					data[at] = (((number * 31 + head) * 4099 + token) * 67 + element) % 65_521;
				}
			}
		}
		outputs[name] = new FakeTensor(dtype, data, [1, kvHeads, tokens, headSize]);
	}
	return outputs;
}
