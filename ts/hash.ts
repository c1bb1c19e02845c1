import { types } from "node:util";
import {
	checkAttached,
	checkBytes,
	checkInteger,
	checkObject,
	checkOptions,
	checkText,
	invalid,
	named,
} from "./arguments.js";
import { brand } from "./brand.js";
import { KvferryError, wrap } from "./errors.js";
import { native } from "./native.js";

/**
 * Token ids. `Uint32Array` is the fast path, read in place; it may lie on a `SharedArrayBuffer`.
 * Arrays of safe integers and of bigints are checked and converted one by one.
 */
export type Tokens = Uint32Array | readonly number[] | readonly bigint[];

/**
 * How chunks are hashed: LMCache's `--hash-algorithm`. `blake3` takes token ids of 32 bits only,
 * `sha256_cbor` integers of any size and sign.
 */
export type ChunkAlgorithm = "blake3" | "sha256_cbor";

/**
 * How blocks are hashed: vLLM's `--prefix-caching-hash-algo`. Hashes have 32 bytes, those of the xxhash
 * algorithms 16.
 *
 * **WARNING** The xxhash algorithms are fast, but collisions can be made on purpose: with them, one
 * tenant may be served what another one stored.
 */
export type BlockAlgorithm = "sha256" | "sha256_cbor" | "xxhash" | "xxhash_cbor";

/** Options of {@link ChunkHasher}. */
export interface ChunkHasherOptions {
	/** Tokens of a chunk, 1 to 2³² − 1. Default 256, as LMCache's. */
	chunkSize?: number | undefined;
	/** Default `blake3`, as LMCache's. */
	algorithm?: ChunkAlgorithm | undefined;
	/** Start after the chunk that has this hash, instead of at the prompt's first token. */
	parent?: Uint8Array | undefined;
}

const CHUNK_OPTIONS = {
	chunkSize: true,
	algorithm: true,
	parent: true,
} satisfies Record<keyof ChunkHasherOptions, true>;

/** A LoRA adapter by vLLM's names for it; both are part of every block's hash. */
export interface Lora {
	/** `lora_name`. */
	name: string;
	/** `lora_path`. */
	path: string;
}

/**
 * A multimodal item by vLLM's names for it: part of the hash of each block that its placeholder tokens
 * reach into, with its place there.
 */
export interface MmFeature {
	/**
	 * `identifier`: vLLM's hash of the item's content, behind the adapter's name where that matters. At
	 * most 4096 bytes of UTF-8, as the other texts.
	 */
	identifier: string;
	/**
	 * `mm_position.offset`: the first placeholder, counted from the first token that is hashed; a safe
	 * integer, negative for an item that began before `parent` ended.
	 */
	offset: number;
	/** `mm_position.length`: how many placeholders, 0 to 2³² − 1. */
	length: number;
}

/** Embeddings in the place of a prompt's token ids, vLLM's `prompt_embeds`: a row for each token. */
export interface PromptEmbeds {
	/**
	 * The tensor's bytes: rows in order from that of the first token that is hashed on, elements little
	 * endian as `model.dtype` has them. Read once, by the constructor.
	 */
	data: Uint8Array;
	/** Bytes of a row, 1 to 2³² − 1: hidden size times bytes of an element. */
	bytesPerToken: number;
}

/** Options of {@link BlockHasher}. */
export interface BlockHasherOptions {
	/** Tokens of a block, 1 to 2³² − 1. Default 16, as vLLM's. */
	blockSize?: number | undefined;
	/** Default `sha256`, as vLLM's. */
	algorithm?: BlockAlgorithm | undefined;
	/**
	 * `PYTHONHASHSEED` of the engine, as text. Default: what vLLM takes when it is not set. The xxhash
	 * algorithms need it, since vLLM draws another one in each process otherwise.
	 */
	seed?: string | undefined;
	/** The tenant: part of the first block's hash and so of all. Default none, as is `""`. */
	cacheSalt?: string | undefined;
	/**
	 * The adapter. Default none. Under `sha256` and `xxhash`, vLLM's hashes depend on which of equal texts
	 * (name, path, salt, identifiers) are one Python object; here none are, except single characters up to
	 * U+00FF, which Python shares. The `_cbor` algorithms have no such ambiguity.
	 */
	lora?: Lora | undefined;
	/**
	 * The multimodal items of the whole request, sorted by offset and apart. Default none. vLLM takes
	 * others too, but what it makes of them depends on how the tokens come in; here as well.
	 */
	mmFeatures?: readonly MmFeature[] | undefined;
	/**
	 * The embeddings of the whole prompt; tokens beyond them were generated. Default none. Pass 0 as the
	 * id of each token that they stand for, as vLLM does.
	 */
	promptEmbeds?: PromptEmbeds | undefined;
	/**
	 * Tokens after a block that its hash covers, 0 to 2³² − 1: a block has a hash only once they are
	 * there. Default 0. vLLM has another value only with EAGLE's kind of drafter and no KV connector.
	 */
	numHashLookaheadTokens?: number | undefined;
	/** Start after the block that has this hash, instead of at the request's first token. */
	parent?: Uint8Array | undefined;
}

const BLOCK_OPTIONS = {
	blockSize: true,
	algorithm: true,
	seed: true,
	cacheSalt: true,
	lora: true,
	mmFeatures: true,
	promptEmbeds: true,
	numHashLookaheadTokens: true,
	parent: true,
} satisfies Record<keyof BlockHasherOptions, true>;

/** Hashes of equal length, one after the other in one array. */
export class Hashes implements Iterable<Uint8Array> {
	/** All of them: `length * hashBytes` bytes. */
	readonly bytes: Uint8Array;
	/** Bytes of one hash. */
	readonly hashBytes: number;

	/**
	 * @param bytes The hashes, one after the other.
	 * @param hashBytes Bytes of one hash.
	 */
	constructor(bytes: Uint8Array, hashBytes: number) {
		if (!(hashBytes >= 1) || bytes.length % hashBytes !== 0) {
			throw invalid(`${bytes.length} bytes are no whole number of hashes of ${hashBytes} bytes`);
		}
		this.bytes = bytes;
		this.hashBytes = hashBytes;
	}

	/** How many there are. */
	get length(): number {
		return this.bytes.length / this.hashBytes;
	}

	/** A view of one hash, counted from the end if negative; `undefined` if there is none. */
	at(index: number): Uint8Array | undefined {
		const at = index < 0 ? index + this.length : index;
		if (!(Number.isInteger(at) && at >= 0 && at < this.length)) {
			return undefined;
		}
		return this.bytes.subarray(at * this.hashBytes, (at + 1) * this.hashBytes);
	}

	/** All of them as lower-case hexadecimal text. */
	toHex(): string[] {
		return Array.from(this, (hash) => Buffer.from(hash).toString("hex"));
	}

	/**
	 * The hashes of blocks `factor` times as large: of each whole group of `factor` blocks the last one's
	 * (vLLM's `BlockHashListWithBlockSize`).
	 *
	 * @param factor How many blocks make a large one, at least 1.
	 */
	coarsen(factor: number): Hashes {
		checkInteger("factor", factor, 1, U32_MAX);
		const coarse = new Uint8Array(Math.floor(this.length / factor) * this.hashBytes);
		for (let at = 0; at < coarse.length; at += this.hashBytes) {
			const from = (at + this.hashBytes) * factor - this.hashBytes;
			coarse.set(this.bytes.subarray(from, from + this.hashBytes), at);
		}
		return new Hashes(coarse, this.hashBytes);
	}

	/** Views of the hashes, in order. */
	*[Symbol.iterator](): IterableIterator<Uint8Array> {
		for (let at = 0; at < this.bytes.length; at += this.hashBytes) {
			yield this.bytes.subarray(at, at + this.hashBytes);
		}
	}
}

brand(Hashes, "Hashes");

/** What the two hashers of the addon have in common. */
interface NativeHasher {
	append(tokens: Uint32Array, hashes: Uint8Array): void;
	appendIntegers(tokens: bigint[], hashes: Uint8Array): void;
}

/** The hashes of a growing sequence of tokens: each token is hashed once. */
class Hasher {
	/** Tokens of one hash. */
	readonly #size: number;
	readonly #hashBytes: number;
	readonly #native: NativeHasher;
	/** Tokens since those of the last hash, less those that the next one looks ahead. */
	#pending: number;

	protected constructor(
		size: number,
		hashBytes: number,
		nativeHasher: NativeHasher,
		lookahead = 0,
	) {
		this.#size = size;
		this.#hashBytes = hashBytes;
		this.#native = nativeHasher;
		this.#pending = -lookahead;
	}

	/**
	 * Adds tokens, in parts of any length, and returns the hashes that they complete. Tokens that
	 * complete none wait for the next call.
	 *
	 * @param tokens What follows the tokens of earlier calls.
	 * @param into Where to write the hashes, from its first byte on; what is returned are views of it.
	 * Default a new array. Must not share its buffer with `tokens`.
	 * @throws {@link KvferryError} `INVALID_TOKEN` that names the position in `tokens`, and
	 * `INVALID_ARGUMENT` when `into` is too short; nothing is added.
	 */
	append(tokens: Tokens, into?: Uint8Array): Hashes {
		const ids = convert(tokens);
		const count = Math.max(0, Math.floor((this.#pending + ids.length) / this.#size));
		const bytes = roomFor(count * this.#hashBytes, into, ids);
		wrap(() =>
			Array.isArray(ids)
				? this.#native.appendIntegers(ids, bytes)
				: this.#native.append(ids, bytes),
		);
		this.#pending = this.#pending + ids.length - count * this.#size;
		return new Hashes(bytes, this.#hashBytes);
	}
}

/** The chunk hashes of one growing prompt, bit-equal to LMCache's; 32 bytes each. */
export class ChunkHasher extends Hasher {
	/** @throws {@link KvferryError} `INVALID_ARGUMENT` for an option out of its range. */
	constructor(options: ChunkHasherOptions = {}) {
		checkOptions("ChunkHasher", options, CHUNK_OPTIONS);
		const { chunkSize = 256, algorithm = "blake3", parent } = options;
		checkInteger("chunkSize", chunkSize, 1, U32_MAX);
		checkText("algorithm", algorithm);
		checkParent(parent);
		super(
			chunkSize,
			32,
			wrap(() => new (native().ChunkHasher)(algorithm, chunkSize, parent)),
		);
	}
}

/** The block hashes of one growing request, bit-equal to vLLM's. */
export class BlockHasher extends Hasher {
	/**
	 * @throws {@link KvferryError} `INVALID_ARGUMENT` for an option out of its range, and for an xxhash
	 * algorithm without a seed.
	 */
	constructor(options: BlockHasherOptions = {}) {
		checkOptions("BlockHasher", options, BLOCK_OPTIONS);
		const { blockSize = 16, algorithm = "sha256", seed, cacheSalt = "", lora, parent } = options;
		const { mmFeatures = [], promptEmbeds, numHashLookaheadTokens = 0 } = options;
		checkInteger("blockSize", blockSize, 1, U32_MAX);
		checkText("algorithm", algorithm);
		checkText("cacheSalt", cacheSalt);
		if (seed !== undefined) {
			checkText("seed", seed);
		}
		if (lora !== undefined) {
			checkObject("lora", lora);
			checkText("lora.name", lora.name);
			checkText("lora.path", lora.path);
		}
		checkMmFeatures(mmFeatures);
		if (promptEmbeds !== undefined) {
			checkObject("promptEmbeds", promptEmbeds);
			checkBytes("promptEmbeds.data", promptEmbeds.data);
			checkInteger("promptEmbeds.bytesPerToken", promptEmbeds.bytesPerToken, 1, U32_MAX);
		}
		checkInteger("numHashLookaheadTokens", numHashLookaheadTokens, 0, U32_MAX);
		checkParent(parent);
		const needed = { blockSize, algorithm, cacheSalt, mmFeatures, numHashLookaheadTokens };
		const hasher = wrap(() => new (native().BlockHasher)(needed, parent, seed, lora, promptEmbeds));
		super(blockSize, algorithm.startsWith("xxhash") ? 16 : 32, hasher, numHashLookaheadTokens);
	}
}

/**
 * The hashes of a prompt's complete chunks, bit-equal to LMCache's. Neither salt nor model is hashed:
 * they are fields of the {@link objectKey}.
 *
 * @param tokens The whole prompt, from its first token (or after `options.parent`).
 * @throws {@link KvferryError} `INVALID_TOKEN` that names the position of a fraction, NaN, number
 * beyond ±(2⁵³ − 1) or, under `blake3`, outside of 0 to 2³² − 1.
 */
export function chunkHashes(tokens: Tokens, options?: ChunkHasherOptions): Hashes {
	return new ChunkHasher(options).append(tokens);
}

/**
 * The hashes of a request's full blocks, bit-equal to vLLM's.
 *
 * @param tokens The whole request, from its first token (or after `options.parent`).
 * @throws {@link KvferryError} `INVALID_TOKEN` that names the position of a fraction, NaN or number
 * beyond ±(2⁵³ − 1).
 */
export function blockHashes(tokens: Tokens, options?: BlockHasherOptions): Hashes {
	return new BlockHasher(options).append(tokens);
}

/** The fields of an {@link objectKey}. */
export interface ObjectKeyFields {
	/** Without `@`. */
	modelName: string;
	/** KV shards of the model, 1 to 255. */
	worldSize: number;
	/** The shard, below `worldSize`. */
	rank: number;
	/** The chunk's hash. */
	chunkHash: Uint8Array;
	/** The tenant: at most 128 characters, none of `@`, `/`, `\` and NUL. Default none, as is `""`. */
	cacheSalt?: string | undefined;
	/** LMCache's object group. Default 0. */
	group?: number | undefined;
}

const KEY_FIELDS = {
	modelName: true,
	worldSize: true,
	rank: true,
	chunkHash: true,
	cacheSalt: true,
	group: true,
} satisfies Record<keyof ObjectKeyFields, true>;

/**
 * LMCache's text form of an object's key: `model@kvrank@group@hash`, then `@salt` if there is one.
 *
 * @throws {@link KvferryError} `INVALID_SALT` or `INVALID_ARGUMENT`.
 */
export function objectKey(fields: ObjectKeyFields): string {
	checkOptions("objectKey", fields, KEY_FIELDS);
	const { modelName, worldSize, rank, chunkHash, cacheSalt = "", group = 0 } = fields;
	checkText("modelName", modelName);
	checkText("cacheSalt", cacheSalt);
	checkInteger("worldSize", worldSize, 1, 255);
	checkInteger("rank", rank, 0, worldSize - 1);
	checkInteger("group", group, 0, U32_MAX);
	checkBytes("chunkHash", chunkHash);
	return wrap(() => native().objectKey(modelName, worldSize, rank, group, chunkHash, cacheSalt));
}

/**
 * vLLM's key of a block within a KV cache group: the hash, then the group as four bytes, most
 * significant first.
 */
export function packGroupId(hash: Uint8Array, group: number): Uint8Array {
	checkBytes("hash", hash);
	checkInteger("group", group, 0, U32_MAX);
	const packed = new Uint8Array(hash.length + 4);
	packed.set(hash);
	new DataView(packed.buffer).setUint32(hash.length, group);
	return packed;
}

/** The inverse of {@link packGroupId}; `hash` is a view of `packed`. */
export function unpackGroupId(packed: Uint8Array): { hash: Uint8Array; group: number } {
	checkBytes("packed", packed);
	const at = packed.length - 4;
	if (at < 0) {
		throw invalid(`a packed key has at least 4 bytes, this one has ${packed.length}`);
	}
	const group = new DataView(packed.buffer, packed.byteOffset).getUint32(at);
	return { hash: packed.subarray(0, at), group };
}

/**
 * A block's hash as the integer in vLLM's KV events (`VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES`): its last
 * eight bytes, most significant first.
 */
export function eventHash(hash: Uint8Array): bigint {
	checkBytes("hash", hash);
	if (hash.length < 8) {
		throw invalid(`a block's hash has at least 8 bytes, this one has ${hash.length}`);
	}
	return new DataView(hash.buffer, hash.byteOffset).getBigUint64(hash.length - 8);
}

const U32_MAX = 0xffff_ffff;

/** Tokens as the addon takes them: 32-bit ids in a typed array, or else all as bigints. */
function convert(tokens: Tokens): Uint32Array | bigint[] {
	if (types.isUint32Array(tokens)) {
		checkAttached("tokens", tokens);
		return tokens;
	}
	if (!Array.isArray(tokens)) {
		throw invalid("tokens must be a Uint32Array, or an array of safe integers or of bigints");
	}
	const ids = new Uint32Array(tokens.length);
	let fits = true;
	for (let at = 0; at < ids.length; at++) {
		const token: unknown = tokens[at];
		if (typeof token !== "bigint" && !Number.isSafeInteger(token)) {
			throw new KvferryError(
				"INVALID_TOKEN",
				`the token at position ${at} is ${named(token)}: pass safe integers, or bigints`,
			);
		}
		const id = Number(token);
		fits &&= id >= 0 && id <= U32_MAX;
		ids[at] = id;
	}
	return fits ? ids : tokens.map(BigInt);
}

/** The array that hashes are written to; native code must never see it overlap with `tokens`. */
function roomFor(
	bytes: number,
	into: Uint8Array | undefined,
	tokens: Uint32Array | bigint[],
): Uint8Array {
	if (into === undefined) {
		return new Uint8Array(bytes);
	}
	checkBytes("into", into);
	if (into.length < bytes) {
		throw invalid(`the hashes need ${bytes} bytes, but into has ${into.length}`);
	}
	if (!Array.isArray(tokens) && into.buffer === tokens.buffer) {
		throw invalid("into must not share its buffer with tokens: pass an array of its own");
	}
	return into.length === bytes ? into : into.subarray(0, bytes);
}

function checkMmFeatures(features: unknown): asserts features is MmFeature[] {
	if (!Array.isArray(features)) {
		throw invalid("mmFeatures must be an array of { identifier, offset, length }");
	}
	for (const [at, feature] of features.entries()) {
		checkObject(`mmFeatures[${at}]`, feature);
		checkText(`mmFeatures[${at}].identifier`, feature.identifier);
		const { MIN_SAFE_INTEGER, MAX_SAFE_INTEGER } = Number;
		checkInteger(`mmFeatures[${at}].offset`, feature.offset, MIN_SAFE_INTEGER, MAX_SAFE_INTEGER);
		checkInteger(`mmFeatures[${at}].length`, feature.length, 0, U32_MAX);
	}
}

function checkParent(parent: unknown): void {
	if (parent !== undefined) {
		checkBytes("parent", parent);
	}
}
