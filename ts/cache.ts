import { types } from "node:util";
import {
	checkBytes,
	checkFunction,
	checkGiven,
	checkInteger,
	checkOptions,
	checkSalt,
	checkTokens,
	checkVia,
	invalid,
	shown,
} from "./arguments.js";
import type { Client } from "./client.js";
import { KvferryError, wrap } from "./errors.js";
import type {
	PrefixCache as NativePrefixCache,
	PrefixHit as NativePrefixHit,
	PrefixReading,
	PrefixWriting,
} from "./native-binding.js";
import type { Server } from "./server.js";
import {
	throwIfAborted,
	timeoutOf,
	timeoutOfCall,
	WAIT_OPTIONS,
	type WaitOptions,
	waitFor,
} from "./waiting.js";

/** How a {@link PrefixCache} is set up. */
export interface PrefixCacheOptions extends WaitOptions {
	/** Where the cache is: a server in another process, or one in this process. */
	readonly via: Client | Server;
	/**
	 * Everything that a chunk's bytes depend on besides tokens and salt: model, precision, engine
	 * release, … Another identity is another cache, and another {@link PrefixCacheOptions.bytesPerChunk} takes one. The same
	 * thing must always be written the same way.
	 */
	readonly identity: string | Uint8Array;
	/** Bytes that the engine keeps for one chunk, 1 to 2^40 - 2^24, and less than 4 GiB for each token. */
	readonly bytesPerChunk: number;
}

const OPTIONS = {
	via: true,
	identity: true,
	bytesPerChunk: true,
	signal: true,
	timeoutMs: true,
} satisfies Record<keyof PrefixCacheOptions, true>;

/** Options of one request. A name that is none is refused: a salt that is misspelt would share with everybody. */
export interface RequestOptions extends WaitOptions {
	/**
	 * The tenant: what is stored with one salt is never found with another. At most 128 characters
	 * without `@ / \` and NUL. "" and null are the same as none, also in a call on an engine's cache that was opened with a
	 * salt, which is that of calls that leave it out.
	 */
	readonly cacheSalt?: string | null | undefined;
}

/** The names of {@link RequestOptions}. */
export const REQUEST_OPTIONS = {
	...WAIT_OPTIONS,
	cacheSalt: true,
} satisfies Record<keyof RequestOptions, true>;

/** What became of a {@link PrefixCache.store}. */
export interface StoreResult {
	/** Chunks that were written now; others were there, or are being written by someone else. */
	readonly storedChunks: number;
	/**
	 * Chunks for which there was no room, which may be there a moment later: a pool grows while it is filled. Undefined
	 * when the server does not say.
	 */
	readonly refusedChunks: number | undefined;
	/** Why nothing was stored, if the cache failed. */
	readonly failure?: KvferryError;
}

/** An object has at most 1 TiB, with its header, and rounded up to a multiple of the chunk's tokens. */
const BYTES_PER_CHUNK_MAX = 2 ** 40 - 2 ** 24;

/**
 * Failures of the cache, as opposed to mistakes of the caller: they end as "compute it". Closed is the client or the
 * server, for the cache's own end is thrown before; unsupported is a server without shared memory, unauthorized one with
 * other tokens, that came after the cache was opened.
 */
const FAILURES: ReadonlySet<string> = new Set([
	"CLOSED",
	"TIMEOUT",
	"UNREACHABLE",
	"UNAUTHORIZED",
	"PROTOCOL",
	"SYSTEM",
	"UNSUPPORTED_OPTION",
	"UNSUPPORTED_PLATFORM",
]);

/** The failure of the cache that `error` is; anything else is thrown on. */
export function failureOf(error: unknown): KvferryError {
	if (error instanceof KvferryError && FAILURES.has(error.code)) {
		return error;
	}
	throw error;
}

/**
 * A prefix cache for engines without paging: bytes for each chunk of a prompt, found again by the
 * prompt's tokens. Bytes that come back are checked against their checksum and identity, whatever
 * server they come from.
 *
 * A cache that fails is a miss, with the reason beside it: what is computed instead is slower, never
 * wrong.
 *
 * @example
 * ```ts
 * const cache = await PrefixCache.open({ via: client, identity: "model-7 f16", bytesPerChunk });
 * const hit = await cache.lookup(tokens);
 * const chunks = await hit.load(); // one Uint8Array for each leading chunk that is stored
 * await cache.store(tokens, (chunk) => stateOfChunk(chunk));
 * ```
 */
export class PrefixCache implements AsyncDisposable {
	/** Tokens of one chunk. */
	readonly chunkSize: number;
	/** Bytes of one chunk. */
	readonly bytesPerChunk: number;
	readonly #native: NativePrefixCache;
	readonly #via: Client | Server;
	#closing: Promise<void> | undefined;

	private constructor(cache: NativePrefixCache, { via, bytesPerChunk }: PrefixCacheOptions) {
		this.#native = cache;
		this.#via = via;
		this.chunkSize = cache.chunkSize;
		this.bytesPerChunk = bytesPerChunk;
	}

	/**
	 * Registers with a cache.
	 *
	 * @throws {@link KvferryError} `UNREACHABLE` or `TIMEOUT` when a server does not answer; not over a
	 * client that was told to go on without one, see {@link ClientOptions.whenUnreachable}.
	 */
	static async open(options: PrefixCacheOptions): Promise<PrefixCache> {
		checkOptions("PrefixCache.open", options, OPTIONS);
		const { via, identity, bytesPerChunk } = options;
		checkVia(via, "openPrefixCache");
		checkInteger("bytesPerChunk", bytesPerChunk, 1, BYTES_PER_CHUNK_MAX);
		if (typeof identity === "string") {
			checkGiven("identity", identity);
		}
		const bytes = typeof identity === "string" ? new TextEncoder().encode(identity) : identity;
		if (!types.isUint8Array(bytes)) {
			throw invalid(`identity is ${shown(bytes)}: give a text, or a Uint8Array`);
		}
		checkBytes("identity", bytes);
		if (bytes.length === 0) {
			throw invalid("identity is empty: give what the chunks' bytes depend on");
		}
		return new PrefixCache(await via.openPrefixCache(bytes, bytesPerChunk, options), options);
	}

	/**
	 * Chunks that came back with other bytes than were stored, since this cache was opened. Each was a
	 * miss; a kvferry server drops them, so that they are stored anew.
	 */
	get damagedChunks(): number {
		return this.#native.damagedChunks;
	}

	/**
	 * Which leading chunks of `tokens` are stored. They stay until the hit is loaded or closed, or until
	 * the server's session timeout. Only whole chunks count: a prompt shorter than one has no hit.
	 */
	async lookup(tokens: Uint32Array, options: RequestOptions = {}): Promise<PrefixHit> {
		this.#checkOpen();
		checkTokens(tokens);
		checkOptions("lookup", options, REQUEST_OPTIONS);
		const [salt, timeoutMs] = [checkSalt(options.cacheSalt), timeoutOf(options)];
		throwIfAborted(options.signal);
		try {
			this.checkVia();
			const hit = await waitFor(
				() => this.#native.lookup(tokens, salt, timeoutMs),
				options.signal,
				(late) => this.#native.release(late, timeoutMs),
			);
			return new PrefixHit(this, this.#native, hit, timeoutMs);
		} catch (error) {
			return new PrefixHit(this, this.#native, failureOf(error), timeoutMs);
		}
	}

	/**
	 * Stores those whole chunks of `tokens` that are not stored yet.
	 *
	 * @param bytesOf The bytes of a chunk, counted from the prompt's start; just
	 * {@link PrefixCache.bytesPerChunk} of them. They are copied before the next call. Nothing is stored
	 * when it throws.
	 */
	async store(
		tokens: Uint32Array,
		bytesOf: (chunk: number) => Uint8Array,
		options: RequestOptions = {},
	): Promise<StoreResult> {
		this.#checkOpen();
		checkTokens(tokens);
		checkFunction("bytesOf", bytesOf);
		checkOptions("store", options, REQUEST_OPTIONS);
		const [salt, timeoutMs] = [checkSalt(options.cacheSalt), timeoutOf(options)];
		throwIfAborted(options.signal);
		try {
			this.checkVia();
			const writing = await waitFor(
				() => this.#native.store(tokens, salt, timeoutMs),
				options.signal,
				(late) => this.#native.abandon(late, timeoutMs),
			);
			return await this.#write(writing, bytesOf, options, timeoutMs);
		} catch (error) {
			return { storedChunks: 0, refusedChunks: undefined, failure: failureOf(error) };
		}
	}

	async #write(
		writing: PrefixWriting,
		bytesOf: (chunk: number) => Uint8Array,
		options: RequestOptions,
		timeoutMs: number,
	): Promise<StoreResult> {
		const { chunks } = writing;
		try {
			throwIfAborted(options.signal);
			for (const [place, chunk] of chunks.entries()) {
				const bytes = bytesOf(chunk);
				checkChunk(`the bytes of chunk ${chunk}`, bytes, this.bytesPerChunk);
				wrap(() => writing.write(place, bytes));
				throwIfAborted(options.signal);
			}
		} catch (error) {
			await this.#native.abandon(writing, timeoutMs).catch(() => {}); // the first error tells more
			throw error;
		}
		const refusedChunks = writing.refused ?? undefined;
		const committed = await waitFor(() => this.#native.commit(writing, timeoutMs), options.signal);
		return { storedChunks: committed ? chunks.length : 0, refusedChunks };
	}

	/**
	 * Ends the registration, once no store is under way; what is stored stays. Calling it again does
	 * nothing.
	 */
	async close(options: WaitOptions = {}): Promise<void> {
		const timeoutMs = timeoutOfCall("close", options);
		this.#closing ??= this.#native.close(timeoutMs).catch(() => {}); // the server notices by itself
		const closing = this.#closing;
		await waitFor(() => closing, options.signal);
	}

	/** The same as {@link PrefixCache.close}. */
	async [Symbol.asyncDispose](): Promise<void> {
		await this.close();
	}

	/** @internal */
	get native(): NativePrefixCache {
		this.#checkOpen();
		return this.#native;
	}

	/**
	 * Throws why nothing can be asked of the client or the server.
	 *
	 * @internal
	 */
	checkVia(): void {
		const { trouble } = this.#via;
		if (trouble !== undefined) {
			throw trouble;
		}
	}

	#checkOpen(): void {
		if (this.#closing !== undefined) {
			throw new KvferryError("CLOSED", "The prefix cache was closed; open another one.");
		}
	}
}

/** Stored chunks of one prompt, held until they are loaded or the hit is closed. */
export class PrefixHit implements AsyncDisposable {
	/** Leading chunks that are stored. */
	readonly chunks: number;
	#failure: KvferryError | undefined;
	readonly #cache: PrefixCache;
	readonly #native: NativePrefixCache;
	readonly #hit: NativePrefixHit | undefined;
	readonly #timeoutMs: number;
	#ended = false;

	/** @internal */
	constructor(
		cache: PrefixCache,
		native: NativePrefixCache,
		found: NativePrefixHit | KvferryError,
		timeoutMs: number,
	) {
		this.#cache = cache;
		this.#native = native;
		this.#failure = found instanceof KvferryError ? found : undefined;
		this.#hit = found instanceof KvferryError ? undefined : found;
		this.chunks = this.#hit?.chunks ?? 0;
		this.#timeoutMs = timeoutMs;
	}

	/** Why there is no hit, or why nothing of it could be loaded, if the cache failed. */
	get failure(): KvferryError | undefined {
		return this.#failure;
	}

	/**
	 * Copies the chunks. Fewer than {@link PrefixHit.chunks} come back when one is not what was stored:
	 * those before it are good, and what `into` gave for it holds bytes that mean nothing.
	 *
	 * @param into Where to: an array for a chunk of just the chunk's bytes. Default: new arrays.
	 */
	async load(
		into: (chunk: number) => Uint8Array = () => new Uint8Array(this.#cache.bytesPerChunk),
		options: WaitOptions = {},
	): Promise<Uint8Array[]> {
		if (this.#ended) {
			throw new KvferryError("CLOSED", "The hit was loaded or closed; look up again.");
		}
		checkFunction("into", into);
		const timeoutMs = timeoutOfCall("load", options);
		const hit = this.#hit;
		if (options.signal?.aborted === true) {
			await this.close();
		}
		throwIfAborted(options.signal);
		this.#ended = true;
		if (hit === undefined) {
			return [];
		}
		let reading: PrefixReading;
		try {
			this.#cache.checkVia();
			reading = await waitFor(
				() => this.#native.load(hit, timeoutMs),
				options.signal,
				(late) => this.#native.finish(late, timeoutMs),
			);
		} catch (error) {
			this.#failure = failureOf(error);
			return [];
		}
		const loaded: Uint8Array[] = [];
		try {
			for (let chunk = 0; chunk < reading.chunks; chunk++) {
				const bytes = into(chunk);
				checkChunk(`the array for chunk ${chunk}`, bytes, this.#cache.bytesPerChunk);
				if (!wrap(() => reading.read(chunk, bytes))) {
					break;
				}
				loaded.push(bytes);
			}
		} finally {
			// Every byte was checked as it was copied: nothing that happens now makes it wrong, and nobody
			// has to wait for it.
			this.#native.finish(reading, timeoutMs).catch(() => {});
		}
		return loaded;
	}

	/** Lets the chunks go unread. Calling it again, or after a load, does nothing. */
	async close(): Promise<void> {
		if (!this.#ended && this.#hit !== undefined) {
			this.#ended = true;
			await this.#native.release(this.#hit, this.#timeoutMs).catch(() => {}); // they end by themselves
		}
	}

	/** The same as {@link PrefixHit.close}. */
	async [Symbol.asyncDispose](): Promise<void> {
		await this.close();
	}
}

function checkChunk(name: string, bytes: unknown, length: number): asserts bytes is Uint8Array {
	checkBytes(name, bytes);
	if (bytes.length !== length) {
		throw invalid(`${name} has ${bytes.length} bytes: it must have bytesPerChunk, ${length}`);
	}
}
