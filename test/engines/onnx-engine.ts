import { createRequire } from "node:module";
import { join } from "node:path";
import { buildTinyModel, installOnnx, onnxExample } from "../../scripts/onnx.mjs";
import type { EngineSession, EngineTensor } from "../../ts/engines/onnx.js";

type Tensors = Record<string, EngineTensor>;

/** onnxruntime's session. */
export interface Session extends EngineSession {
	run(feeds: Tensors): Promise<Tensors>;
	release(): Promise<void>;
}

/** onnxruntime-node. */
export interface Onnxruntime {
	readonly Tensor: new (type: string, data: unknown, dims: number[]) => EngineTensor;
	readonly InferenceSession: { create(path: string, options: object): Promise<Session> };
}

/** The engines' place, and the tiny model's. */
export interface OnnxEngine {
	readonly ort: Onnxruntime;
	/** Its directory. */
	readonly model: string;
	/** A file of the model. */
	file(name: string): string;
	open(name?: string): Promise<Session>;
}

/** Installs and builds what is not there yet; says so in one line, and gives nothing, where that is refused. */
export function openOnnx(): OnnxEngine | undefined {
	try {
		installOnnx();
		const model = buildTinyModel();
		const ort: Onnxruntime = createRequire(join(onnxExample, "package.json"))("onnxruntime-node");
		const file = (name: string) => join(model, "onnx", name);
		const open = (name = "model.onnx") =>
			ort.InferenceSession.create(file(name), { intraOpNumThreads: 1 });
		return { ort, model, file, open };
	} catch (error) {
		const [reason] = (error as Error).message.split("\n");
		process.stderr.write(`SKIPPED: tests under onnxruntime and transformers.js: ${reason}\n`);
		return undefined;
	}
}

/** What a model computed. */
export interface Evaluated {
	/** What it gave last, with the KV of all tokens. */
	readonly outputs: Tensors;
	/** Generated tokens, greedily. */
	readonly tokens: number[];
	/** The logits behind each. */
	readonly logits: Float32Array[];
}

/** Evaluates `rest`, the tokens behind those that `feeds` hold, and goes on for `count` tokens. */
export async function evaluate(
	{ ort }: OnnxEngine,
	session: Session,
	feeds: Tensors,
	rest: readonly number[],
	count = 1,
): Promise<Evaluated> {
	const int64 = (values: bigint[]) =>
		new ort.Tensor("int64", BigInt64Array.from(values), [1, values.length]);
	const tokens: number[] = [];
	const logits: Float32Array[] = [];
	let past = feeds["past_key_values.0.key"]?.dims[2] ?? 0;
	let [kv, input] = [feeds, rest];
	for (;;) {
		const total = past + input.length;
		const outputs = await session.run({
			...kv,
			input_ids: int64(input.map(BigInt)),
			attention_mask: int64(Array<bigint>(total).fill(1n)),
			position_ids: int64(input.map((_, at) => BigInt(past + at))),
		});
		const all = outputs.logits as EngineTensor;
		const last = (all.data as Float32Array).slice(-(all.dims[2] as number));
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
