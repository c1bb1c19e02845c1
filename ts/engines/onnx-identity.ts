import { open } from "node:fs/promises";
import { dirname, join } from "node:path";
import { checkText } from "../arguments.js";
import { KvferryError } from "../errors.js";
import type { WaitOptions } from "../waiting.js";
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
 * @throws {@link KvferryError} `IDENTITY_UNKNOWN` without a model, or when a name of external data in it is cut off or
 * longer than 4096 bytes; `SYSTEM` when a file cannot be read.
 */
export async function identityOf(
	session: EngineSession,
	layout: KvLayout,
	options: OnnxIdentityOptions & Pick<WaitOptions, "signal">,
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

async function modelOf({
	modelPath,
	modelId,
	signal,
}: OnnxIdentityOptions & Pick<WaitOptions, "signal">): Promise<object> {
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
	const sha256 = await fileSha256(modelPath, signal);
	const external = new Map<string, string>();
	for await (const name of externalFiles(modelPath)) {
		// One after the other: a model can have a file for each tensor.
		if (!external.has(name)) {
			external.set(name, await fileSha256(join(dirname(modelPath), name), signal));
		}
	}
	return { sha256, external: [...external.values()] };
}

/** `StringStringEntryProto` of an ONNX tensor: the key "location", and then a name. */
const LOCATION = Buffer.from("\x0a\x08location\x12", "latin1");

/** Of the varint before a name. Protobuf takes no longer one for a length. */
const LENGTH_BYTES_MAX = 5;

/** `PATH_MAX` of Linux. */
const NAME_BYTES_MAX = 4096;

const ENTRY_BYTES_MAX = LOCATION.length + LENGTH_BYTES_MAX + NAME_BYTES_MAX;

/** A graph can have weights inside too, so it is not held as a whole. */
const READ_BYTES = 1 << 20;

/** The files of external data that a model names, in the order of their use. */
async function* externalFiles(path: string): AsyncGenerator<string> {
	await using file = await open(path);
	let held: Buffer = Buffer.alloc(0);
	for await (const piece of file.createReadStream({
		highWaterMark: READ_BYTES,
		autoClose: false,
	})) {
		held = Buffer.concat([held, piece]);
		// What begins later may end in the next piece.
		const end = Math.max(0, held.length - ENTRY_BYTES_MAX);
		yield* namesIn(held, end, path);
		held = held.subarray(end);
	}
	yield* namesIn(held, held.length, path);
}

/** The names in entries that begin in the first `end` bytes. */
function* namesIn(bytes: Buffer, end: number, path: string): Generator<string> {
	let at = bytes.indexOf(LOCATION);
	while (at >= 0 && at < end) {
		const name = nameAt(bytes, at + LOCATION.length);
		if (name === undefined) {
			// Left out, it could be weights that the identity does not tell apart.
			throw new KvferryError(
				"IDENTITY_UNKNOWN",
				`The model ${path} has a name of external data that is cut off or longer than ${NAME_BYTES_MAX} bytes: pass the option \`modelId\` instead of \`modelPath\`.`,
			);
		}
		yield name;
		at = bytes.indexOf(LOCATION, at + 1);
	}
}

/** The name behind the varint at `start`. */
function nameAt(bytes: Buffer, start: number): string | undefined {
	let length = 0;
	for (let digit = 0; digit < LENGTH_BYTES_MAX; digit++) {
		const byte = bytes[start + digit];
		if (byte === undefined) {
			return undefined;
		}
		length += (byte & 0x7f) * 2 ** (7 * digit);
		if (byte < 0x80) {
			const from = start + digit + 1;
			const whole = length <= NAME_BYTES_MAX && from + length <= bytes.length;
			return whole ? bytes.toString("utf8", from, from + length) : undefined;
		}
	}
	return undefined;
}
