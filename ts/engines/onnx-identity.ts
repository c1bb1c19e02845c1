import { readFile, stat } from "node:fs/promises";
import { dirname, join } from "node:path";
import { checkText } from "../arguments.js";
import { KvferryError } from "../errors.js";
import { canonicalJson, fileSha256 } from "./identity.js";
import type { KvLayout } from "./onnx-layout.js";
import type { EngineSession } from "./onnxruntime.js";

/** What belongs to the cache's identity and cannot be read from the engine: `modelPath` or `modelId`. */
export interface OnnxIdentityOptions {
	/** The model's file. It is hashed, with the files of external data that it names. */
	readonly modelPath?: string | undefined;
	/** Instead of a hash: a name that never means other weights, with the revision and the precision. */
	readonly modelId?: string | undefined;
	/**
	 * What else changes the numbers: execution provider and release of onnxruntime (`"cuda 1.30.0"`, say), so that
	 * others' are not used. Default: transformers.js's device, else `"cpu"`.
	 */
	readonly engine?: string | undefined;
}

/**
 * All that a model's KV depends on besides the tokens.
 *
 * @returns Canonical JSON.
 * @throws {@link KvferryError} `IDENTITY_UNKNOWN` without a model, `SYSTEM` when a file cannot be read.
 */
export async function identityOf(
	session: EngineSession,
	layout: KvLayout,
	options: OnnxIdentityOptions,
): Promise<string> {
	// transformers.js notes here which of a model's files it took, and the device.
	const config = Reflect.get(session, "config") as { device?: unknown } | undefined;
	const { engine = config?.device ?? "cpu" } = options;
	checkText("engine", engine);
	return canonicalJson({
		engine,
		config: config ?? null,
		layout,
		model: await modelOf(options),
	});
}

async function modelOf({ modelPath, modelId }: OnnxIdentityOptions): Promise<object> {
	if (modelId !== undefined) {
		checkText("modelId", modelId);
		if (modelId !== "") {
			return { id: modelId };
		}
	}
	if (modelPath === undefined) {
		throw new KvferryError(
			"IDENTITY_UNKNOWN",
			"A session does not tell its model: pass the option `modelPath`, or `modelId`.",
		);
	}
	checkText("modelPath", modelPath);
	const sha256 = await fileSha256(modelPath);
	const external = await externalFiles(modelPath);
	const hashes = external.map((name) => fileSha256(join(dirname(modelPath), name)));
	return { sha256, external: await Promise.all(hashes) };
}

/** A model whose weights lie elsewhere is a small file. */
const GRAPH_BYTES_MAX = 2 ** 26;

/** `StringStringEntryProto` of an ONNX tensor: the key "location", and then a name. */
const LOCATION = Buffer.from("\x0a\x08location\x12", "latin1");

/** The files of external data that a model names, in the order of their first use. */
async function externalFiles(path: string): Promise<string[]> {
	if ((await stat(path)).size > GRAPH_BYTES_MAX) {
		return [];
	}
	const model = await readFile(path);
	const names = new Set<string>();
	for (let at = model.indexOf(LOCATION); at >= 0; at = model.indexOf(LOCATION, at + 1)) {
		const start = at + LOCATION.length;
		const length = model[start] ?? 0; // a varint of one byte: file names are short
		names.add(model.toString("utf8", start + 1, start + 1 + length));
	}
	return [...names];
}
