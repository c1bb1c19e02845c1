import { types } from "node:util";
import {
	checkAttached,
	checkBytes,
	checkInteger,
	checkOptions,
	invalid,
	named,
} from "./arguments.js";
import { wrap } from "./errors.js";
import { Hashes } from "./hash.js";
import { native } from "./native.js";
import type { PrefixIndex as NativeIndex } from "./native-binding.js";

/** Options of {@link PrefixIndex}. */
export interface PrefixIndexOptions {
	/** Hashes that it holds at most, 1 to 2²⁸. */
	readonly capacity: number;
	/** Bytes of one hash: 32, 16 (xxhash blocks) or 8. Default 32. */
	readonly hashBytes?: number | undefined;
}

/**
 * Hashes of one request or of many: what {@link ChunkHasher} and {@link BlockHasher} give, a list of that, or
 * their bytes, one after the other, in one array or in several (those of events, say).
 */
export type HashList = Hashes | readonly (Hashes | Uint8Array)[] | Uint8Array;

/** What {@link PrefixIndex.insert} did. */
export interface InsertResult {
	/** How many hashes were not there before. */
	readonly inserted: number;
	/** The hashes that went for them, first gone first. */
	readonly evicted: Hashes;
}

/**
 * Which chunks or blocks are known to be stored, by their hashes: a bounded set that forgets the least
 * recently used.
 *
 * All calls take many hashes, and use them as if one by one from the last to the first. So leading chunks are
 * younger than those that follow them, and a prompt loses its last chunks first.
 *
 * Memory, outside of JavaScript's heap: hashBytes + 24 bytes for each hash of the capacity, 16 of them from the
 * start and the others as hashes come; 8 bytes for each hash of the largest call so far. An index of 1,000,000
 * hashes of 32 bytes has 56 MB.
 *
 * The table of hashes has a random seed of its own: nobody can choose prompts that make it slow.
 */
export class PrefixIndex {
	/** Hashes that it holds at most. */
	readonly capacity: number;
	/** Bytes of one hash. */
	readonly hashBytes: number;
	readonly #native: NativeIndex;

	/**
	 * @throws {@link KvferryError} `INVALID_ARGUMENT` for an option out of its range, `SYSTEM` when there is no
	 * memory for the capacity.
	 */
	constructor(options: PrefixIndexOptions) {
		checkOptions("PrefixIndex", options, { capacity: true, hashBytes: true });
		const { capacity, hashBytes = 32 } = options;
		checkInteger("capacity", capacity, 1, 2 ** 28);
		checkInteger("hashBytes", hashBytes, 8, 32);
		this.capacity = capacity;
		this.hashBytes = hashBytes;
		this.#native = wrap(() => new (native().PrefixIndex)(hashBytes, capacity));
	}

	/** Hashes that are there. */
	get size(): number {
		return wrap(() => this.#native.size);
	}

	/**
	 * Adds hashes, or uses them if they are there. When the capacity is reached, each new one takes the place of
	 * the least recently used. Hashes of one call never evict each other: of more hashes than the capacity, the
	 * first ones are taken and the others are left out.
	 *
	 * @throws {@link KvferryError} `INVALID_ARGUMENT` for hashes of another length; nothing has changed.
	 */
	insert(hashes: HashList): InsertResult {
		const { bytes } = this.#flat(hashes);
		const count = Math.min(bytes.length / this.hashBytes, this.capacity);
		const room = Math.max(0, this.size + count - this.capacity);
		const evicted = new Uint8Array(room * this.hashBytes);
		const done = wrap(() => this.#native.insert(bytes, evicted));
		const gone = evicted.subarray(0, done.evicted * this.hashBytes);
		return { inserted: done.inserted, evicted: new Hashes(gone, this.hashBytes) };
	}

	/**
	 * Removes hashes, as when the store has dropped them.
	 *
	 * @returns How many were there.
	 * @throws {@link KvferryError} `INVALID_ARGUMENT` for hashes of another length; nothing has changed.
	 */
	remove(hashes: HashList): number {
		const { bytes } = this.#flat(hashes);
		return wrap(() => this.#native.remove(bytes));
	}

	/**
	 * Tells which hashes are there, without using them.
	 *
	 * @returns 1 for each that is there and 0 for each that is not.
	 * @throws {@link KvferryError} `INVALID_ARGUMENT` for hashes of another length.
	 */
	contains(hashes: HashList): Uint8Array {
		const { bytes } = this.#flat(hashes);
		const found = new Uint8Array(bytes.length / this.hashBytes);
		wrap(() => this.#native.contains(bytes, found));
		return found;
	}

	/**
	 * Counts how many leading hashes of each request are there, up to its first one that is not, and uses them.
	 * Requests are used one after the other.
	 *
	 * @param requests The hashes of each request; or those of all of them, with `offsets`.
	 * @param offsets Where each request begins, counted in hashes, and the end: ascending from 0 to the number of
	 * hashes. Default: each element of a list is a request, anything else is one request.
	 * @param into Where to write the counts, from its first element on; what is returned is a view of it. Default
	 * a new array. Must not share its buffer with the other arguments.
	 * @returns The count of each request.
	 * @throws {@link KvferryError} `INVALID_ARGUMENT` for hashes of another length, offsets that do not ascend so,
	 * and `into` that is too short; nothing has changed.
	 */
	matchPrefixes(requests: HashList, offsets?: Uint32Array, into?: Uint32Array): Uint32Array {
		const { bytes, ends } = this.#flat(requests);
		checkU32("offsets", offsets ?? new Uint32Array());
		const bounds = new Uint32Array(offsets ?? [0, ...ends]);
		if (bounds.length === 0) {
			throw invalid("offsets are empty: they ascend from 0 to the number of hashes");
		}
		const counts = countsFor(bounds.length - 1, into, bytes, bounds);
		wrap(() => this.#native.matchPrefixes(bytes, bounds, counts));
		return counts;
	}

	/** Forgets all hashes. */
	clear(): void {
		wrap(() => this.#native.clear());
	}

	/** The bytes of all hashes, and how many there are up to the end of each part. */
	#flat(hashes: HashList): { bytes: Uint8Array; ends: number[] } {
		const parts: readonly (Hashes | Uint8Array)[] = Array.isArray(hashes)
			? hashes
			: [hashes as Hashes | Uint8Array];
		const all: Uint8Array[] = [];
		const ends: number[] = [];
		let total = 0;
		for (const part of parts) {
			const bytes = this.#bytesOf(part);
			all.push(bytes);
			total += bytes.length;
			ends.push(total / this.hashBytes);
		}
		const [only] = all;
		if (only !== undefined && all.length === 1 && !types.isSharedArrayBuffer(only.buffer)) {
			return { bytes: only, ends };
		}
		// Of shared memory a copy is used: another thread could change a hash between two looks at it.
		const bytes = new Uint8Array(total);
		let at = 0;
		for (const part of all) {
			bytes.set(part, at);
			at += part.length;
		}
		return { bytes, ends };
	}

	#bytesOf(part: Hashes | Uint8Array): Uint8Array {
		if (part instanceof Hashes && part.hashBytes !== this.hashBytes) {
			throw invalid(
				`hashes of ${part.hashBytes} bytes do not fit an index of hashes of ${this.hashBytes} bytes: ` +
					"give the index their hashBytes",
			);
		}
		const bytes: unknown = part instanceof Hashes ? part.bytes : part;
		if (!types.isUint8Array(bytes)) {
			throw invalid(
				`hashes are ${named(bytes)}: pass Hashes, a list of them, or their bytes as one Uint8Array`,
			);
		}
		checkBytes("hashes", bytes);
		if (bytes.length % this.hashBytes !== 0) {
			throw invalid(
				`${bytes.length} bytes are no whole number of hashes of ${this.hashBytes} bytes`,
			);
		}
		return bytes;
	}
}

function checkU32(name: string, array: unknown): asserts array is Uint32Array {
	if (!types.isUint32Array(array)) {
		throw invalid(`${name} must be a Uint32Array`);
	}
	checkAttached(name, array);
}

/** The array that counts are written to; native code must never see it overlap with what it reads. */
function countsFor(
	requests: number,
	into: Uint32Array | undefined,
	bytes: Uint8Array,
	offsets: Uint32Array,
): Uint32Array {
	if (into === undefined) {
		return new Uint32Array(requests);
	}
	checkU32("into", into);
	if (into.length < requests) {
		throw invalid(`there are ${requests} requests, but into has room for ${into.length} counts`);
	}
	if (into.buffer === bytes.buffer || into.buffer === offsets.buffer) {
		throw invalid(
			"into must not share its buffer with the other arguments: pass an array of its own",
		);
	}
	return into.subarray(0, requests);
}
