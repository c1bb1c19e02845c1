import { createRequire } from "node:module";
import { join } from "node:path";
import { buildTinyModel, installOnnx, onnxExample, skipped } from "../../scripts/onnx.mjs";
import type { EngineSession, EngineTensor } from "../../ts/engines/onnx.js";

/** onnxruntime's session. */
export interface Session extends EngineSession {
	run(feeds: Record<string, EngineTensor>): Promise<Record<string, EngineTensor>>;
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
		skipped("tests under onnxruntime-node and transformers.js", error);
		return undefined;
	}
}
