import { types } from "node:util";
import {
	checkAttached,
	checkBoolean,
	checkInteger,
	checkObject,
	checkOptions,
	checkSalt,
	checkSpelled,
	checkText,
	invalid,
	misnamedSalt,
} from "./arguments.js";
import { wrap } from "./errors.js";
import { native } from "./native.js";
import type { Trackers } from "./native-binding.js";

const U32_MAX = 2 ** 32 - 1;

/** In the order of their numbers in the addon. */
const STATES: readonly RequestState[] = ["PREFETCHING", "WAITING_FOR_LOAD", "READY", "BYPASSED"];

/**
 * Where a request stands.
 *
 * - `PREFETCHING`: the cache was asked, or will be; the engine has allocated no blocks yet.
 * - `WAITING_FOR_LOAD`: blocks are allocated, and the next plan loads into them.
 * - `READY`: nothing is to be loaded (any more); computed chunks are stored.
 * - `BYPASSED`: a load failed, and the cache is left out until blocks are allocated anew.
 */
export type RequestState = "PREFETCHING" | "WAITING_FOR_LOAD" | "READY" | "BYPASSED";

/** Options of {@link TrackerTable}. */
export interface TrackerTableOptions {
	/** Tokens of a chunk, the cache's unit: 1 to 2³² − 1. Default 256. */
	readonly chunkSize?: number | undefined;
	/**
	 * Tokens of a block, the engine's unit, which divide the chunk. Default 16. An array has one for each
	 * KV group; 0 marks a group that is neither stored nor loaded.
	 */
	readonly blockSize?: number | readonly number[] | undefined;
	/** Blocks of the engine's pool: ids are below it. Default 2³² − 1, any id. */
	readonly numBlocks?: number | undefined;
	/**
	 * For groups of sliding windows: when an id that is appended stands already among the last so many
	 * blocks, the block has moved, and 0 takes its old place. Default 0, never.
	 */
	readonly relocationWindow?: number | undefined;
}

const OPTIONS = {
	chunkSize: true,
	blockSize: true,
	numBlocks: true,
	relocationWindow: true,
} satisfies Record<keyof TrackerTableOptions, true>;

/** A request to track: new, or as it was known elsewhere. Counts are tokens. */
export interface TrackedRequest {
	readonly requestId: string;
	/** Tokens of it that have a hash: whole blocks count, so all its tokens may. */
	readonly numTokens: number;
	/** The tenant. Absent, null and "" are the same: none. */
	readonly cacheSalt?: string | null | undefined;
	/** Tokens beyond which nothing is stored. Default: no limit. */
	readonly maxStoredTokens?: number | undefined;
	/** Default 0. */
	readonly numScheduledTokens?: number | undefined;
	/** Leading tokens in the engine's own prefix cache. Default 0. */
	readonly numLocalHitTokens?: number | undefined;
	/** Leading tokens in the cache. Default 0. */
	readonly numExternalHitTokens?: number | undefined;
	/** Leading tokens that need not be stored. Default 0. */
	readonly numStoredTokens?: number | undefined;
	/** Default `PREFETCHING`. */
	readonly state?: RequestState | undefined;
	/** The blocks that it has. Default none. */
	readonly blockIds?: BlockIds | undefined;
}

const REQUEST = {
	requestId: true,
	numTokens: true,
	cacheSalt: true,
	maxStoredTokens: true,
	numScheduledTokens: true,
	numLocalHitTokens: true,
	numExternalHitTokens: true,
	numStoredTokens: true,
	state: true,
	blockIds: true,
} satisfies Record<keyof TrackedRequest, true>;

/** Block ids of one group, or of each. */
export type BlockIds = readonly number[] | Uint32Array | readonly (readonly number[])[];

/** What a scheduler knows of one request: a view that is always up to date. */
export class RequestTracker {
	readonly requestId: string;
	/** The tenant; "" for none. */
	readonly cacheSalt: string;
	/** Names the request in {@link StepArrays}; used anew after the request was removed. */
	readonly handle: number;
	readonly #table: Trackers;
	readonly #group: number;
	readonly #blockSize: number;
	readonly #groups: number;

	/** @internal */
	constructor(
		table: Trackers,
		handle: number,
		requestId: string,
		cacheSalt: string,
		blockSizes: readonly number[],
	) {
		this.#table = table;
		this.handle = handle;
		this.requestId = requestId;
		this.cacheSalt = cacheSalt;
		this.#group = Math.max(
			0,
			blockSizes.findIndex((size) => size > 0),
		);
		this.#blockSize = blockSizes[this.#group] || 1;
		this.#groups = blockSizes.length;
	}

	get state(): RequestState {
		return STATES[this.#field(6)] as RequestState;
	}

	/** Tokens of it that have a hash. */
	get numTokens(): number {
		return this.#field(0);
	}

	/** Tokens that were scheduled since it began, or began anew after a preemption. */
	get numScheduledTokens(): number {
		return this.#field(2);
	}

	/** Leading tokens in the engine's own prefix cache (vLLM: `num_vllm_hit_tokens`). */
	get numLocalHitTokens(): number {
		return this.#field(3);
	}

	/** Leading tokens in the cache (vLLM: `num_lmcache_hit_tokens`). */
	get numExternalHitTokens(): number {
		return this.#field(4);
	}

	/** Leading tokens that are stored, or whose store is planned. */
	get numStoredTokens(): number {
		return this.#field(5);
	}

	/** {@link numLocalHitTokens} in blocks of the first group. */
	get numLocalHitBlocks(): number {
		return Math.floor(this.numLocalHitTokens / this.#blockSize);
	}

	/** {@link numExternalHitTokens} in blocks of the first group. */
	get numExternalHitBlocks(): number {
		return Math.floor(this.numExternalHitTokens / this.#blockSize);
	}

	/** {@link numStoredTokens} in blocks of the first group. */
	get numStoredBlocks(): number {
		return Math.floor(this.numStoredTokens / this.#blockSize);
	}

	/** Whether something is still to be loaded: the cache has more than the engine itself. */
	get needsRetrieve(): boolean {
		const { state } = this;
		const open = state === "PREFETCHING" || state === "WAITING_FOR_LOAD";
		return open && this.numExternalHitTokens > this.numLocalHitTokens;
	}

	/** How many blocks of the first group it has. */
	get numAllocatedBlocks(): number {
		return wrap(() => this.#table.blockCount(this.handle, this.#group));
	}

	/** Its blocks, for each group. */
	get allocatedBlockIds(): number[][] {
		return Array.from({ length: this.#groups }, (_, group) =>
			wrap(() => this.#table.blocks(this.handle, group)),
		);
	}

	#field(index: number): number {
		return wrap(() => this.#table.get(this.handle))[index] as number;
	}
}

/** The requests of one step. Read during the call only. */
export interface StepArrays {
	/** {@link RequestTracker.handle} of each, at most once. */
	readonly handles: Uint32Array;
	/** Tokens that are scheduled in this step, for each. */
	readonly scheduledTokens: Uint32Array;
	/** Tokens that have a hash by now, generated ones included, for each. */
	readonly numTokens: Uint32Array;
	/**
	 * Where the new blocks of each request's groups begin in `blockIds`, and the end: requests × groups + 1
	 * ascending numbers from 0.
	 */
	readonly blockOffsets: Uint32Array;
	/** New blocks, which go behind those that the request has. */
	readonly blockIds: Uint32Array;
}

const STEP_ARRAYS = [
	"handles",
	"scheduledTokens",
	"numTokens",
	"blockOffsets",
	"blockIds",
] as const satisfies readonly (keyof StepArrays)[];

/** One operation of a plan. */
export interface PlannedOperation {
	/** {@link RequestTracker.handle}. */
	readonly handle: number;
	readonly direction: "RETRIEVE" | "STORE";
	/** First token, a multiple of the chunk size. */
	readonly start: number;
	/** Token after the last, a multiple of the chunk size. */
	readonly end: number;
	/** Tokens at the start that the engine has itself, and that must not be overwritten. */
	readonly skipFirstNTokens: number;
	/** The blocks of the range, for each group; fewer when the request has fewer. */
	readonly blockIds: number[][];
}

const WORDS = 5;

/** What a step loads and stores: loads first, older requests first. Valid until the next plan of the table. */
export class StepPlan implements Iterable<PlannedOperation> {
	/** How many operations. */
	readonly length: number;
	/** Five words each: handle, 0 to load or 1 to store, start, end, tokens to skip. */
	readonly operations: Uint32Array;
	/** Where the blocks of each operation's groups begin in `blockIds`, and the end. */
	readonly blockOffsets: Uint32Array;
	/** The blocks of all operations. */
	readonly blockIds: Uint32Array;
	readonly #groups: number;

	/** @internal */
	constructor(
		operations: Uint32Array,
		blockOffsets: Uint32Array,
		blockIds: Uint32Array,
		groups: number,
	) {
		this.length = operations.length / WORDS;
		this.operations = operations;
		this.blockOffsets = blockOffsets;
		this.blockIds = blockIds;
		this.#groups = groups;
	}

	/** The operations as objects, in order. */
	*[Symbol.iterator](): IterableIterator<PlannedOperation> {
		for (let i = 0; i < this.length; i++) {
			const at = (word: number) => this.operations[i * WORDS + word] as number;
			const blockIds = Array.from({ length: this.#groups }, (_, group) => {
				const list = i * this.#groups + group;
				const [start, end] = [this.blockOffsets[list], this.blockOffsets[list + 1]] as [
					number,
					number,
				];
				const ids = new Array<number>(end - start);
				for (let j = start; j < end; j++) {
					ids[j - start] = this.blockIds[j] as number;
				}
				return ids;
			});
			yield {
				handle: at(0),
				direction: at(1) === 1 ? "STORE" : "RETRIEVE",
				start: at(2),
				end: at(3),
				skipFirstNTokens: at(4),
				blockIds,
			};
		}
	}
}

/**
 * The requests of one scheduler, in native memory: a step is planned in one call, and its cost grows with
 * the requests in it, not with their lengths.
 */
export class TrackerTable {
	/** Tokens of a chunk. */
	readonly chunkSize: number;
	/** Tokens of a block, for each KV group. */
	readonly blockSizes: readonly number[];
	readonly #native: Trackers;
	readonly #requests = new Map<string, RequestTracker>();
	readonly #byHandle = new Map<number, RequestTracker>();
	#operations = new Uint32Array(64 * WORDS);
	#blockOffsets: Uint32Array;
	#blockIds = new Uint32Array(4096);
	readonly #size = new Uint32Array(2);

	/** @throws `INVALID_ARGUMENT` for sizes that are no integers, or blocks that do not divide the chunk. */
	constructor(options: TrackerTableOptions = {}) {
		checkOptions("TrackerTable", options, OPTIONS);
		const { chunkSize = 256, blockSize = 16, numBlocks = U32_MAX, relocationWindow = 0 } = options;
		checkInteger("chunkSize", chunkSize, 1, U32_MAX);
		checkInteger("numBlocks", numBlocks, 1, U32_MAX);
		checkInteger("relocationWindow", relocationWindow, 0, U32_MAX);
		if (typeof blockSize !== "number" && !Array.isArray(blockSize)) {
			throw invalid("blockSize must be a number, or an array with one for each KV group");
		}
		const blockSizes: readonly number[] =
			typeof blockSize === "number" ? [blockSize] : [...blockSize];
		for (const size of blockSizes) {
			checkInteger("blockSize", size, typeof blockSize === "number" ? 1 : 0, U32_MAX);
		}
		this.chunkSize = chunkSize;
		this.blockSizes = blockSizes;
		this.#blockOffsets = new Uint32Array(64 * blockSizes.length + 1);
		this.#native = wrap(
			() => new (native().Trackers)(chunkSize, [...blockSizes], numBlocks, relocationWindow),
		);
	}

	/** How many requests are tracked. */
	get size(): number {
		return this.#requests.size;
	}

	/** The request of this id, or the one that a plan names by its handle. */
	get(request: string | number): RequestTracker | undefined {
		return typeof request === "string" ? this.#requests.get(request) : this.#byHandle.get(request);
	}

	/** Every tracked request, in no particular order. */
	[Symbol.iterator](): IterableIterator<RequestTracker> {
		return this.#requests.values();
	}

	/**
	 * Begins to track a request.
	 *
	 * @throws `INVALID_ARGUMENT` for an id that is tracked already, counts that are no integers from 0 to
	 * 2³² − 1, or more than 2²⁰ requests; `INVALID_SALT`.
	 */
	add(request: TrackedRequest): RequestTracker {
		checkSpelled("TrackerTable.add", request, REQUEST);
		const cacheSalt = namedSaltOf("the request", request);
		const { requestId, numTokens, maxStoredTokens = U32_MAX, state = "PREFETCHING" } = request;
		checkText("requestId", requestId);
		if (this.#requests.has(requestId)) {
			throw invalid(`request ${requestId} is tracked already: remove it first`);
		}
		const { numScheduledTokens = 0, numLocalHitTokens = 0 } = request;
		const { numExternalHitTokens = 0, numStoredTokens = 0 } = request;
		const counts = {
			numTokens,
			maxStoredTokens,
			numScheduledTokens,
			numLocalHitTokens,
			numExternalHitTokens,
			numStoredTokens,
		};
		for (const [name, count] of Object.entries(counts)) {
			checkInteger(name, count, 0, U32_MAX);
		}
		const number = STATES.indexOf(state);
		if (number < 0) {
			throw invalid(`state is not one of ${STATES.join(", ")}`);
		}
		const fields = Uint32Array.from([...Object.values(counts), number]);
		const { offsets, ids } = this.#blocks(request.blockIds ?? this.blockSizes.map(() => []));
		const handle = wrap(() => this.#native.add(fields, offsets, ids));
		const tracker = new RequestTracker(this.#native, handle, requestId, cacheSalt, this.blockSizes);
		this.#requests.set(requestId, tracker);
		this.#byHandle.set(handle, tracker);
		return tracker;
	}

	/** Forgets a request; does nothing when it is not tracked. */
	remove(requestId: string): void {
		const tracker = this.#requests.get(requestId);
		if (tracker !== undefined) {
			wrap(() => this.#native.remove(tracker.handle));
			this.#requests.delete(requestId);
			this.#byHandle.delete(tracker.handle);
		}
	}

	/**
	 * Takes in what a lookup found. A second answer takes the place of the first: both count the same
	 * tokens.
	 *
	 * @param numLocalHitTokens Leading tokens in the engine's own prefix cache.
	 * @param numExternalHitTokens Leading tokens in the cache: whole chunks of the request's tokens.
	 */
	setHits(requestId: string, numLocalHitTokens: number, numExternalHitTokens: number): void {
		const { handle } = this.#tracked(requestId);
		checkInteger("numLocalHitTokens", numLocalHitTokens, 0, U32_MAX);
		checkInteger("numExternalHitTokens", numExternalHitTokens, 0, U32_MAX);
		wrap(() => this.#native.setHits(handle, numLocalHitTokens, numExternalHitTokens));
	}

	/**
	 * Takes in the blocks that the engine allocated.
	 *
	 * @param blockIds All blocks of the request, those that it had before included.
	 * @param load Whether the engine wants to load what the cache has; if not, it computes it.
	 */
	allocate(requestId: string, blockIds: BlockIds, load: boolean): RequestState {
		const { handle } = this.#tracked(requestId);
		checkBoolean("load", load);
		const { offsets, ids } = this.#blocks(blockIds);
		const state = wrap(() => this.#native.allocate(handle, offsets, ids, load));
		return STATES[state] as RequestState;
	}

	/** Leaves the cache out for a request whose load failed; it is computed from its first token. */
	bypass(requestId: string): void {
		const { handle } = this.#tracked(requestId);
		wrap(() => this.#native.bypass(handle));
	}

	/**
	 * Plans a step: what waits for a load is loaded, and of the step's requests those whole chunks are stored
	 * that are computed by the step's end and are not stored yet. With an error nothing has changed.
	 *
	 * @throws `INVALID_ARGUMENT` for handles that are unknown or there twice, block ids that are out of range,
	 * and arrays that do not fit together.
	 */
	plan(step: StepArrays): StepPlan {
		checkObject("step", step);
		const { handles, scheduledTokens, numTokens, blockOffsets, blockIds } = step;
		for (const name of STEP_ARRAYS) {
			if (!types.isUint32Array(step[name])) {
				throw invalid(`${name} must be a Uint32Array`);
			}
		}
		const groups = this.blockSizes.length;
		const plan = () =>
			wrap(() =>
				this.#native.plan(
					handles,
					scheduledTokens,
					numTokens,
					blockOffsets,
					blockIds,
					this.#operations,
					this.#blockOffsets,
					this.#blockIds,
					this.#size,
				),
			);
		if (!plan()) {
			const [operations, blocks] = this.#size as unknown as [number, number];
			this.#operations = new Uint32Array(2 * operations * WORDS);
			this.#blockOffsets = new Uint32Array(2 * operations * groups + 1);
			this.#blockIds = new Uint32Array(2 * blocks);
			plan();
		}
		const [operations, blocks] = this.#size as unknown as [number, number];
		return new StepPlan(
			this.#operations.subarray(0, operations * WORDS),
			this.#blockOffsets.subarray(0, operations * groups + 1),
			this.#blockIds.subarray(0, blocks),
			groups,
		);
	}

	#blocks(blockIds: BlockIds): { offsets: Uint32Array; ids: Uint32Array } {
		const offsets = [0];
		const ids: number[] = [];
		for (const list of blockLists(blockIds, this.blockSizes.length)) {
			for (const id of list) {
				ids.push(id);
			}
			offsets.push(ids.length);
		}
		return { offsets: Uint32Array.from(offsets), ids: Uint32Array.from(ids) };
	}

	#tracked(requestId: string): RequestTracker {
		const tracker = this.#requests.get(requestId);
		if (tracker === undefined) {
			throw invalid(`request ${requestId} is not tracked, or no more`);
		}
		return tracker;
	}
}

/** The salt of a request: "" for none. */
export function saltOf({ cacheSalt }: { readonly cacheSalt?: string | null | undefined }): string {
	const salt = checkSalt(cacheSalt);
	if (salt !== "") {
		wrap(() => native().checkSalt(salt));
	}
	return salt;
}

/** The same, of what has no salt under another name either, which would leave the request everybody's. */
export function namedSaltOf(what: string, of: Parameters<typeof saltOf>[0]): string {
	const salt = saltOf(of);
	const misspelt = salt === "" ? misnamedSalt(of) : undefined;
	if (misspelt !== undefined) {
		throw invalid(
			`${what} has a ${misspelt}, and no cacheSalt: name it so, or what it stores is everybody's; ` +
				"rename it if it names no tenant",
		);
	}
	return salt;
}

/** The blocks of each group, checked. */
export function blockLists(
	blockIds: BlockIds,
	groups: number,
): readonly (readonly number[] | Uint32Array)[] {
	const nested = Array.isArray(blockIds) && blockIds.some((ids) => Array.isArray(ids));
	const lists = (nested ? blockIds : [blockIds]) as (readonly number[] | Uint32Array)[];
	for (const list of lists) {
		if (types.isUint32Array(list)) {
			checkAttached("blockIds", list);
		} else if (!Array.isArray(list)) {
			throw invalid("blockIds must be an array of block ids, or an array of them for each group");
		}
	}
	if (lists.length !== groups) {
		throw invalid(`blocks of ${lists.length} groups were given for ${groups}`);
	}
	for (const list of lists) {
		for (const id of list) {
			checkInteger("a block id", id, 0, U32_MAX - 1);
		}
	}
	return lists;
}
