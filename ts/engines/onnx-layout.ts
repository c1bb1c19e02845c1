import { checkHandle, checkInteger, checkObject, invalid } from "../arguments.js";
import { KvferryError } from "../errors.js";
import type { EngineSession, EngineTensor, EngineValue } from "./onnxruntime.js";

/** What a model's KV tensors `[1, kvHeads, tokens, headSize]` have in common. */
export interface OnnxLayout {
	/** KV heads of a layer. */
	readonly kvHeads: number;
	/** Elements of a head. */
	readonly headSize: number;
	/** Type of an element. */
	readonly dtype: "float32" | "float16";
}

/** {@link OnnxLayout}, and which tensors have it. */
export interface KvLayout extends OnnxLayout {
	/** `0.key`, `0.value`, `1.key`, …: what follows `past_key_values.` and `present.`. */
	readonly names: readonly string[];
}

const DTYPES = {
	float32: { array: Float32Array, bytes: 4 },
	float16: { array: Uint16Array, bytes: 2 },
} as const;

const KV_INPUT = /^past_key_values\.(\d+)\.(key|value)$/;

/** Inputs that the tokens decide, or that do not change what a token's KV is. */
const PLAIN_INPUTS: ReadonlySet<string> = new Set([
	"input_ids",
	"attention_mask",
	"position_ids",
	"cache_position",
	"num_logits_to_keep",
	"use_cache_branch",
]);

/**
 * Reads the layout of a session's KV tensors.
 *
 * @param given Of what the session does not tell.
 * @throws {@link KvferryError} `UNSUPPORTED_MODEL` with the reason, `IDENTITY_UNKNOWN` for sizes that neither the
 * session nor `given` has, `INVALID_ARGUMENT` where they disagree.
 */
export function layoutOf(session: EngineSession, given: OnnxLayout | undefined): KvLayout {
	const names = kvNames(session);
	checkGiven(given);
	const metadata = Array.isArray(session.inputMetadata) ? session.inputMetadata : [];
	const found: Partial<Record<keyof OnnxLayout, number | string>> = {};
	for (const name of names) {
		const input = `past_key_values.${name}`;
		const value = metadata.find((value) => value?.name === input);
		for (const [part, size] of Object.entries(value ? told(input, value) : {})) {
			const key = part as keyof OnnxLayout;
			found[key] ??= size;
			if (found[key] !== size) {
				throw unsupported(`${input} has a ${key} of ${size}, others ${found[key]}`);
			}
		}
	}
	const part = <K extends keyof OnnxLayout>(key: K): OnnxLayout[K] => {
		const [tells, says] = [found[key], given?.[key]];
		if (tells !== undefined && says !== undefined && tells !== says) {
			throw invalid(`layout.${key} is ${says}: the session says ${tells}`);
		}
		const size = tells ?? says;
		if (size === undefined) {
			throw new KvferryError(
				"IDENTITY_UNKNOWN",
				`The session does not tell the ${key} of its KV inputs: pass the option \`layout\`.`,
			);
		}
		return size as OnnxLayout[K];
	};
	return { names, kvHeads: part("kvHeads"), headSize: part("headSize"), dtype: part("dtype") };
}

/** The KV inputs by their numbers, each with the output that continues it. */
function kvNames({ inputNames, outputNames }: EngineSession): string[] {
	const layers = inputNames
		.map((name) => KV_INPUT.exec(name)?.[1])
		.filter((layer) => layer !== undefined);
	const strange = inputNames.find((name) => !PLAIN_INPUTS.has(name) && !KV_INPUT.test(name));
	if (layers.length === 0) {
		throw unsupported(
			"the session has no inputs past_key_values.0.key and so on: export the model with its cache " +
				"(text-generation-with-past)",
		);
	}
	if (strange !== undefined) {
		throw unsupported(
			strange.startsWith("past")
				? `its input ${strange} is no state of keys and values for each token`
				: `its input ${strange} may change its state, which must depend on nothing but token ids`,
		);
	}
	const names = [...new Set(layers)]
		.sort((a, b) => Number(a) - Number(b))
		.flatMap((layer) => [`${layer}.key`, `${layer}.value`]);
	for (const name of names) {
		if (!inputNames.includes(`past_key_values.${name}`)) {
			throw unsupported(`the session has no input past_key_values.${name}`);
		}
		if (!outputNames.includes(`present.${name}`)) {
			throw unsupported(`the session has no output present.${name}`);
		}
	}
	return names;
}

/** What the metadata of an input says for certain. */
function told(input: string, { isTensor, type, shape = [] }: EngineValue): Partial<OnnxLayout> {
	if (!isTensor || (type !== "float32" && type !== "float16")) {
		throw unsupported(`${input} is ${type ?? "no tensor"}: float32 and float16 can be cached`);
	}
	if (shape.length === 0) {
		return { dtype: type };
	}
	const [batch, heads, tokens, size] = shape;
	if (shape.length !== 4 || typeof tokens === "number") {
		throw unsupported(
			`${input} has the shape [${shape}], not [batch, heads, tokens, head size] with any number of tokens: ` +
				"other orders, and caches of fixed size or with a sliding window, cannot be cut by tokens",
		);
	}
	if (typeof batch === "number" && batch !== 1) {
		throw unsupported(`${input} is for batches of ${batch}: a prompt is a batch of 1`);
	}
	return {
		dtype: type,
		...(typeof heads === "number" ? { kvHeads: heads } : {}),
		...(typeof size === "number" ? { headSize: size } : {}),
	};
}

function checkGiven(given: OnnxLayout | undefined): void {
	if (given === undefined) {
		return;
	}
	checkObject("layout", given);
	checkInteger("layout.kvHeads", given.kvHeads, 1, 2 ** 20);
	checkInteger("layout.headSize", given.headSize, 1, 2 ** 20);
	if (!Object.hasOwn(DTYPES, given.dtype)) {
		throw invalid("layout.dtype must be float32 or float16");
	}
}

/** The data of a new tensor of `tokens`. */
export function newData(layout: OnnxLayout, tokens: number): Float32Array | Uint16Array {
	return new DTYPES[layout.dtype].array(layout.kvHeads * tokens * layout.headSize);
}

/** The bytes of an array's elements. */
export function bytesOf({ buffer, byteOffset, byteLength }: ArrayBufferView): Uint8Array {
	return new Uint8Array(buffer, byteOffset, byteLength);
}

/** The bytes of a run's KV tensors, in the layout's order. */
export interface Held {
	/** Tokens whose KV they hold. */
	readonly tokens: number;
	readonly bytes: Uint8Array[];
}

/**
 * Finds a run's KV tensors, as `present.*` or as `past_key_values.*`.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT` for tensors that are missing, of another shape or not in memory.
 */
export function heldBy(tensors: object, layout: KvLayout): Held {
	let held: number | undefined;
	const bytes = layout.names.map((name) => {
		const outputs = tensors as Record<string, EngineTensor | undefined>;
		const present = outputs[`present.${name}`];
		const of = present === undefined ? `past_key_values.${name}` : `present.${name}`;
		const tensor = present ?? outputs[of];
		if (tensor === undefined) {
			throw invalid(`there is neither present.${name} nor past_key_values.${name}: give them all`);
		}
		checkHandle(of, tensor, "dims", "it must be the engine's tensor");
		const { type, dims } = tensor;
		const location = tensor.location ?? "cpu";
		const [batch, heads, tokens = 0, size] = dims;
		held ??= tokens;
		const { kvHeads, headSize, dtype } = layout;
		if (type !== dtype || dims.length !== 4 || heads !== kvHeads || size !== headSize) {
			throw invalid(
				`${of} is ${type} [${dims}]: it must be ${dtype} [1, ${kvHeads}, tokens, ${headSize}]`,
			);
		}
		if (batch !== 1) {
			throw invalid(`${of} has a batch of ${batch}: cut it into one prompt each`);
		}
		if (tokens !== held) {
			throw invalid(
				`${of} holds ${tokens} tokens and others ${held}: what has left a sliding window cannot be stored`,
			);
		}
		if (!location.startsWith("cpu")) {
			throw invalid(
				`${of} lies in a ${location}: have the outputs in memory (preferredOutputLocation "cpu")`,
			);
		}
		const { data } = tensor;
		const length = kvHeads * tokens * headSize * DTYPES[dtype].bytes;
		if (!ArrayBuffer.isView(data) || data.byteLength !== length) {
			throw invalid(
				`the data of ${of} does not have ${length} bytes: was it transferred or disposed of?`,
			);
		}
		return bytesOf(data);
	});
	return { tokens: held ?? 0, bytes };
}

function unsupported(reason: string): KvferryError {
	return new KvferryError("UNSUPPORTED_MODEL", `The model cannot be cached: ${reason}.`);
}
