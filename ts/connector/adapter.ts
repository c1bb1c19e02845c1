import type { KvEvents } from "../events.js";
import type { LoadStoreOp } from "./metadata.js";

/** Options of the calls that name tokens. */
export interface SaltOption {
	/** The tenant. Absent for none. */
	readonly cacheSalt?: string | undefined;
}

/** Blocks that a step gave to a request. */
export interface BlockAllocation {
	readonly requestId: string;
	/** The new blocks, for each KV group. */
	readonly newBlockIds: readonly (readonly number[])[];
	/** The tokens that lie in them, as far as they are known. */
	readonly newTokenIds: readonly number[];
}

/**
 * What a scheduler asks a cache. Users may bring their own; none of the calls waits, and none throws for
 * trouble with the cache: what is not known is not there.
 */
export interface SchedulerAdapter {
	/** Tokens of a chunk. */
	readonly chunkSize: number;
	/**
	 * Whether every call passes salts on. Without it, requests with a salt are computed without the cache.
	 */
	readonly carriesSalt?: boolean | undefined;
	/** Begins to look up a request's tokens, unless that was begun already. */
	maybeSubmitLookupRequest(
		requestId: string,
		tokenIds: readonly number[] | Uint32Array,
		options?: SaltOption,
	): void;
	/** Leading tokens that the cache has, in whole chunks; `null` while that is not known. They are leased. */
	checkLookupResult(requestId: string): number | null;
	/** The lookup's result will not be asked for again. */
	cleanupLookupResult(requestId: string): void;
	/**
	 * Ends the leases of the chunks that lie wholly in `start..end` (tokens, within `tokenIds`): the engine has
	 * them itself.
	 */
	freeLookupLocks(
		requestId: string,
		tokenIds: readonly number[] | Uint32Array,
		start: number,
		end: number,
		options?: SaltOption,
	): void;
	/** The request has ended: the cache may forget what it remembers of it. */
	endSession(requestId: string): void;
	/** Tells which blocks a step gave out, for whoever routes requests by them. */
	reportBlockAllocations?(allocations: readonly BlockAllocation[]): void;
	/** What was stored and what went since the last call, as far as it is known here. */
	takeEvents?(): KvEvents | undefined;
	/** Drops everything that is stored and not in use. Resolves to whether it was done. */
	resetCache?(): Promise<boolean>;
}

/** KV memory by its address, for engines in native code: of this process, or of a GPU. */
export interface KvPointer {
	/** The first byte's address, a multiple of an element's size. */
	readonly pointer: bigint;
	/** Bytes that lie there, all of them readable and writable from any thread. */
	readonly byteLength: number;
}

/** KV memory of a GPU that another process has, for {@link KvCacheLayout.device} `"cuda"`. */
export interface KvIpcHandle {
	/** The 64 bytes of `cuIpcGetMemHandle`, which name an allocation. */
	readonly ipcHandle: Uint8Array;
	/** Bytes from the allocation's start to the array's. Default 0. */
	readonly byteOffset?: number | undefined;
	/** Bytes that lie there. */
	readonly byteLength: number;
}

/**
 * Part of a layer's KV memory. What lies on a SharedArrayBuffer, is named by its address or is a GPU's is copied
 * while JavaScript goes on, by threads of kvferry's own or by the GPU. Other memory is copied on the thread that
 * runs JavaScript, a millisecond or two at a time.
 */
export type KvArray = ArrayBufferView | KvPointer | KvIpcHandle;

/** The KV memory of one layer: K and V, or both in one array. */
export type LayerKv = KvArray | readonly [k: KvArray, v: KvArray];

/** How an engine's KV memory is laid out; every layer alike. */
export interface KvCacheLayout {
	/** Blocks of the pool. */
	readonly numBlocks: number;
	/** Tokens of a block, which divide the chunk. Default 16. */
	readonly blockSize?: number | undefined;
	/** KV heads of this rank; 1 with "latent". */
	readonly numKvHeads: number;
	/** Elements of one head of K, or of V; of the latent vector with "latent". */
	readonly headSize: number;
	/** torch's name of the element type, as "float16", "bfloat16", "float32", "uint8". */
	readonly dtype: string;
	/**
	 * What a layer is. `"separate"` (the default): K and V, each `[blocks, …]`, as two arrays or as one of shape
	 * `[2, blocks, …]`. `"fused"`: one array `[blocks, …]` where a head has K's elements and then V's.
	 * `"latent"`: one array of MLA's latent vectors.
	 */
	readonly planes?: "separate" | "fused" | "latent" | undefined;
	/** Order within a block: `"NHD"` (tokens, heads, elements; the default) or `"HND"`. */
	readonly kvLayout?: "NHD" | "HND" | undefined;
	/**
	 * Bytes from a block to the next in an array, where blocks do not follow each other: with
	 * `[blocks, 2, …]`, K's array begins at the memory's start, V's a block later, and both have the stride of two
	 * blocks. An array ends with its last block. Default: the bytes of a block.
	 */
	readonly blockStride?: number | undefined;
	/**
	 * Where the memory is, as torch names it: `"cpu"` (the default), `"cuda"` or `"cuda:1"`. A GPU's memory is given
	 * by address or by IPC handle, and must be of the device's primary context.
	 */
	readonly device?: string | undefined;
	/**
	 * The CUDA stream (`CUstream`) that the engine computes on: stores wait for what it was given before
	 * `waitForSave`, and what it is given after a load waits for that. It must not be capturing a graph while loads or
	 * stores run. Default 0, the legacy default stream; 2, each thread's own, is refused.
	 */
	readonly stream?: bigint | undefined;
}

/**
 * What a worker asks a cache to copy. Users may bring their own. The `batchedSubmit…` calls return at once
 * and do not throw for trouble with the cache: a load that fails ends in
 * {@link WorkerAdapter.getBlockIdsWithLoadErrors}, a store that fails is not stored. For arguments that mean
 * nothing (lists of unequal lengths, ranges that are not whole chunks) they throw, and nothing has begun.
 */
export interface WorkerAdapter {
	/** Whether every call passes salts on. Without it, what has a salt is neither loaded nor stored. */
	readonly carriesSalt?: boolean | undefined;
	/** Announces the memory that is copied from and to: it must stay as it is until `shutdown` has resolved. */
	registerKvCaches(
		kvCaches: Readonly<Record<string, LayerKv>>,
		layout: KvCacheLayout,
	): Promise<void>;
	/** Begins loads; `cacheSalts` has one for each operation, "" for none, and is absent when none has one. */
	batchedSubmitRetrieveRequests(
		requestIds: readonly string[],
		ops: readonly LoadStoreOp[],
		cacheSalts?: readonly string[],
	): void;
	/** Begins stores. */
	batchedSubmitStoreRequests(
		requestIds: readonly string[],
		ops: readonly LoadStoreOp[],
		cacheSalts?: readonly string[],
	): void;
	/** Resolves when no load that was begun writes to blocks any more. */
	waitForLoads(): Promise<void>;
	/** The same for one layer, by its place among the registered ones. Without it, layers are there together. */
	waitForLayer?(layer: number): Promise<void>;
	/** Resolves when no store that was begun reads blocks any more. */
	waitForSaves(): Promise<void>;
	/**
	 * What ended since the last call.
	 *
	 * @param finishedRequestIds Requests that the engine ended since.
	 * @returns Ended requests whose blocks are not read or written any more, each once; and requests whose load
	 * has ended, well or not.
	 */
	getFinished(
		finishedRequestIds: ReadonlySet<string>,
	): [finishedSending: Set<string>, finishedRecving: Set<string>];
	/** Blocks that loads should have filled and did not, since the last call. */
	getBlockIdsWithLoadErrors(): Set<number>;
	/** Ends everything, once nothing is copied any more; what a GPU does not come to, ten seconds later. */
	shutdown(): Promise<void>;
}
