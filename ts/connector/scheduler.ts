import {
	checkBoolean,
	checkHandle,
	checkInteger,
	checkIterable,
	checkObject,
	checkOptions,
	checkText,
	checkTokenIds,
	invalid,
	warningsTo,
} from "../arguments.js";
import type { KvEvents } from "../events.js";
import {
	type BlockIds,
	blockLists,
	namedSaltOf,
	type RequestTracker,
	type StepArrays,
	type StepPlan,
	saltOf,
	TrackerTable,
} from "../tracker.js";
import type { BlockAllocation, SaltOption, SchedulerAdapter } from "./adapter.js";
import { type ConnectorMetadata, type RequestMetadata, SharedTokens } from "./metadata.js";

const U32_MAX = 2 ** 32 - 1;

/** A request of the engine. The connector keeps it and reads it anew in every call. */
export interface EngineRequest {
	readonly requestId: string;
	/** Prompt and generated tokens; grows. */
	readonly allTokenIds: readonly number[] | Uint32Array;
	/** Tokens of the prompt. Default: those that are there when the connector first sees the request. */
	readonly numPromptTokens?: number | undefined;
	/** The tenant. Absent, null and "" are the same: none. */
	readonly cacheSalt?: string | null | undefined;
	/**
	 * `PREEMPTED` when its blocks were taken away; every other word is as good as none, and a request that has other blocks all
	 * the same is refused.
	 */
	readonly status?: string | undefined;
	/**
	 * Tokens whose KV the engine has, those of the step that is being planned not included. Default: not said;
	 * a request whose load failed is not stored any more then.
	 */
	readonly numComputedTokens?: number | undefined;
	/** Blocks that have a hash. Default: the whole blocks of `allTokenIds`. */
	readonly numBlockHashes?: number | undefined;
	/** What a router passes along; see {@link SchedulerConnector.requestFinished}. */
	readonly kvTransferParams?: Readonly<Record<string, unknown>> | null | undefined;
	/** Tokens beyond which nothing is stored (LMCache: `lmcache.max_offload_tokens`). Default: no limit. */
	readonly maxOffloadTokens?: number | undefined;
}

/** A request that ran before this step. */
export interface CachedRequest {
	readonly requestId: string;
	/** Blocks that this step gave it; for a resumed request, all of them. */
	readonly newBlockIds?: BlockIds | null | undefined;
	/** It runs again after a preemption. Default false. */
	readonly resumed?: boolean | undefined;
}

/** What the engine's scheduler decided for a step, by vLLM's names. */
export interface SchedulerOutput {
	/** Requests that run for the first time. */
	readonly scheduledNewReqs: readonly { readonly requestId: string }[];
	/** Requests that ran before. */
	readonly scheduledCachedReqs: readonly CachedRequest[];
	/** Tokens of each request in this step, by id. */
	readonly numScheduledTokens: Readonly<Record<string, number>>;
}

/** What the workers told in a step, put together. */
export interface ConnectorOutput {
	/** Ended requests that all workers told: see `WorkerConnector.getFinished`. Default none. */
	readonly finishedSending?: Iterable<string> | undefined;
	/** Requests whose load all workers told to have ended. Default none. */
	readonly finishedRecving?: Iterable<string> | undefined;
	/** What any worker's `getBlockIdsWithLoadErrors` said. Default none. */
	readonly invalidBlockIds?: Iterable<number> | undefined;
}

/** Options of {@link SchedulerConnector}. */
export interface SchedulerConnectorOptions {
	/** The cache. */
	readonly adapter: SchedulerAdapter;
	/** Tokens of a block; an array has one for each KV group. Default 16. */
	readonly blockSize?: number | readonly number[] | undefined;
	/** Blocks of the engine's pool. Default: any id is taken. */
	readonly numBlocks?: number | undefined;
	/** See {@link TrackerTableOptions.relocationWindow}. Default 0. */
	readonly relocationWindow?: number | undefined;
	/**
	 * Whose rules plan the stores. `"block"` (the default) is vLLM's own: every whole chunk. `"lmcache"` is
	 * LMCache's: chunks of the prompt only, unless `saveDecodeCache`, and a preempted request asks the cache
	 * again, unless it was loaded and has not run since: then the load is taken to have failed.
	 */
	readonly planner?: "block" | "lmcache" | undefined;
	/** With `planner: "lmcache"`: store chunks with generated tokens too. Default false. */
	readonly saveDecodeCache?: boolean | undefined;
	/**
	 * Whether loads end between steps, while other requests are computed; if not, a request is loaded in the step
	 * that computes it. Default true.
	 */
	readonly loadAsync?: boolean | undefined;
	/** Gets each warning once. Default: `process.emitWarning`. */
	readonly onWarning?: ((message: string) => void) | undefined;
}

const OPTIONS = {
	adapter: true,
	blockSize: true,
	numBlocks: true,
	relocationWindow: true,
	planner: true,
	saveDecodeCache: true,
	loadAsync: true,
	onWarning: true,
} satisfies Record<keyof SchedulerConnectorOptions, true>;

/** A request that is tracked. */
interface Tracked {
	readonly tracker: RequestTracker;
	readonly request: EngineRequest;
	readonly tokens: SharedTokens;
	/** Tokens that it had when it was first seen. */
	readonly firstTokens: number;
	/** Tokens that the engine said are loaded for its blocks. */
	loads: number;
}

/**
 * The scheduler's side of KV offloading, with the methods of vLLM's connectors: which tokens need not be
 * computed, and what each step loads and stores. It never waits.
 */
export class SchedulerConnector {
	/** KV groups of unlike shape cannot be managed apart (vLLM: `supports_hma`). */
	readonly supportsHma = false;
	readonly #adapter: SchedulerAdapter;
	readonly #table: TrackerTable;
	readonly #alignment: number;
	readonly #planner: "block" | "lmcache";
	readonly #saveDecodeCache: boolean;
	readonly #loadAsync: boolean;
	/** Whether block ids move, and leave 0. */
	readonly #relocates: boolean;
	readonly #warn: (message: string) => void;
	readonly #warned = new Set<string>();
	readonly #requests = new Map<string, Tracked>();
	/** Requests of which nobody says how much is computed, since a load of theirs failed. */
	readonly #unknown = new Set<string>();
	/** Requests whose load the next plan begins. */
	readonly #loading = new Set<string>();
	/** Requests that have ended, and whose blocks a worker may still copy. */
	readonly #ending = new Set<string>();
	/** Requests whose tokens must not be shown to the adapter. */
	readonly #uncached = new Set<string>();

	/** @throws `INVALID_ARGUMENT` for sizes that do not fit together, and options that it does not know. */
	constructor(options: SchedulerConnectorOptions) {
		checkOptions("SchedulerConnector", options, OPTIONS);
		checkHandle("adapter", options.adapter, "chunkSize", "give createSchedulerAdapter({ … })");
		const { adapter, blockSize, numBlocks, relocationWindow, planner = "block" } = options;
		if (planner !== "block" && planner !== "lmcache") {
			throw invalid(`planner must be "block" or "lmcache"`);
		}
		const { saveDecodeCache = false, loadAsync = true } = options;
		checkBoolean("saveDecodeCache", saveDecodeCache);
		checkBoolean("loadAsync", loadAsync);
		this.#adapter = adapter;
		this.#planner = planner;
		this.#saveDecodeCache = saveDecodeCache;
		this.#loadAsync = loadAsync;
		this.#relocates = relocationWindow !== undefined && relocationWindow > 0;
		this.#warn = warningsTo(options.onWarning);
		const { chunkSize } = adapter;
		this.#table = new TrackerTable({ chunkSize, blockSize, numBlocks, relocationWindow });
		// Where every group has a whole number of blocks.
		this.#alignment = this.#table.blockSizes.filter((size) => size > 0).reduce(lcm, 1);
	}

	/** What is known of a request; `undefined` when it is not tracked. */
	tracker(requestId: string): RequestTracker | undefined {
		return this.#table.get(requestId);
	}

	/**
	 * How many tokens of a request need not be computed beyond those that the engine has itself.
	 *
	 * @param numComputedTokens Leading tokens in the engine's own prefix cache.
	 * @returns The tokens, and whether they are loaded between steps. `null` tokens: not known yet, ask
	 * again and go on with other requests. At least the prompt's last token remains to be computed.
	 * @throws `INVALID_ARGUMENT` for counts that are out of range, and what the adapter says of the tokens;
	 * `INVALID_SALT`. A request that was not known is not known then.
	 */
	getNumNewMatchedTokens(
		request: EngineRequest,
		numComputedTokens: number,
	): [numTokens: number | null, loadAsync: boolean] {
		checkObject("request", request);
		checkText("requestId", request.requestId);
		checkTokenIds(`allTokenIds of ${request.requestId}`, request.allTokenIds);
		checkInteger("numComputedTokens", numComputedTokens, 0, request.allTokenIds.length);
		const cacheSalt = saltOf(request);
		if (cacheSalt !== "" && this.#adapter.carriesSalt !== true) {
			this.#uncached.add(request.requestId);
			this.#warnOnce(
				"The adapter does not declare carriesSalt, so requests with a salt are computed without " +
					"the cache: no tenant may be served what another one stored.",
			);
			return [0, false];
		}
		const { requestId } = request;
		const isNew = this.#table.get(requestId) === undefined;
		if (this.#uncached.has(requestId) || (isNew && this.#ending.has(requestId))) {
			// What workers tell of an id could be meant for the request that had it before.
			this.#uncached.add(requestId);
			return [0, false];
		}
		const tracker = this.#track(request);
		const local = numComputedTokens - (numComputedTokens % this.#alignment);
		if (request.status === "PREEMPTED" && this.#planner === "block") {
			// vLLM forgets the local hit here and stores less; its own count tells which of both is meant.
			if (request.numComputedTokens !== undefined) {
				this.#table.setHits(requestId, local, 0);
			}
			return [0, false];
		}
		if (tracker.state === "READY" && loadFailed(request, tracker)) {
			this.#adapter.cleanupLookupResult(requestId);
			this.#table.bypass(requestId);
		}
		if (tracker.state === "BYPASSED") {
			this.#table.setHits(requestId, local, 0);
			return [0, false];
		}
		try {
			this.#adapter.maybeSubmitLookupRequest(requestId, request.allTokenIds, salted(cacheSalt));
		} catch (error) {
			if (isNew) {
				this.#table.remove(requestId);
				this.#requests.delete(requestId);
			}
			throw error;
		}
		const hit = this.#adapter.checkLookupResult(requestId);
		if (hit === null) {
			return [null, this.#loadAsync];
		}
		const hashed = this.#hashedTokens(request);
		const { chunkSize } = this.#table;
		const isHit = hit <= request.allTokenIds.length && hit % chunkSize === 0;
		const found = isHit ? Math.min(hit, hashed - (hashed % chunkSize)) : hit; // which is refused
		this.#table.setHits(requestId, local, found);
		// A model needs one token to go on from.
		const usable = Math.min(found, request.allTokenIds.length - 1);
		const toLoad = Math.max(0, usable - numComputedTokens);
		return [toLoad, toLoad > 0 && this.#loadAsync];
	}

	/**
	 * Takes in the blocks that the engine allocated for a request.
	 *
	 * @param blockIds All blocks of the request, those that it had before included.
	 * @param numExternalTokens Tokens that are to be loaded: what {@link getNumNewMatchedTokens} said, or 0.
	 * @throws `INVALID_ARGUMENT` for a request that the connector was never asked about, and for block ids and
	 * counts that are out of range. Nothing has changed then.
	 */
	updateStateAfterAlloc(
		request: EngineRequest,
		blockIds: BlockIds,
		numExternalTokens: number,
	): void {
		checkObject("request", request);
		const { requestId, allTokenIds } = request;
		checkTokenIds(`allTokenIds of ${requestId}`, allTokenIds);
		checkInteger("numExternalTokens", numExternalTokens, 0, allTokenIds.length);
		const tracked = this.#uncached.has(requestId) ? undefined : this.#tracked(requestId);
		const most = tracked === undefined ? 0 : loadable(tracked);
		if (numExternalTokens > most) {
			throw invalid(
				`numExternalTokens is ${numExternalTokens}, and ${most} tokens are loaded for ${requestId} at most: pass what ` +
					"getNumNewMatchedTokens said for these blocks, or 0",
			);
		}
		if (tracked === undefined) {
			return;
		}
		const { tracker } = tracked;
		const before = tracker.state;
		const state = this.#table.allocate(requestId, blockIds, numExternalTokens > 0);
		if (state === "WAITING_FOR_LOAD") {
			this.#loading.add(requestId);
			tracked.loads = Math.max(tracked.loads, numExternalTokens);
		}
		if (before !== "PREFETCHING") {
			return;
		}
		this.#adapter.cleanupLookupResult(requestId);
		const { numExternalHitTokens, numLocalHitTokens, cacheSalt } = tracker;
		// The adapter keeps the lease of a chunk that the engine has in part: it is loaded all the same.
		const unneeded = state === "WAITING_FOR_LOAD" ? numLocalHitTokens : numExternalHitTokens;
		if (numExternalHitTokens > 0 && unneeded > 0) {
			this.#adapter.freeLookupLocks(requestId, allTokenIds, 0, unneeded, salted(cacheSalt));
		}
	}

	/**
	 * Plans a step: what its workers load and store. With an error nothing has changed.
	 *
	 * @throws `INVALID_ARGUMENT` for requests that the connector was never asked about or that are there twice, or
	 * counts and block ids that are out of range.
	 */
	buildConnectorMeta(output: SchedulerOutput): ConnectorMetadata {
		checkOutput(output);
		const { scheduledNewReqs, scheduledCachedReqs, numScheduledTokens } = output;
		const groups = this.#table.blockSizes.length;
		const most = scheduledNewReqs.length + scheduledCachedReqs.length;
		const handles = new Uint32Array(most);
		const scheduled = new Uint32Array(most);
		const tokens = new Uint32Array(most);
		const offsets = new Uint32Array(most * groups + 1);
		const blockIds: number[] = [];
		let count = 0;
		const allocations: BlockAllocation[] | undefined =
			this.#adapter.reportBlockAllocations === undefined ? undefined : [];
		for (const requestId of this.#loading) {
			this.#checkLoad(this.#tracked(requestId));
		}
		const loading = new Set(
			[...(this.#loadAsync ? [] : this.#loading)].flatMap(
				(id) => this.#table.get(id)?.allocatedBlockIds.flat() ?? [],
			),
		);
		const take = (requestId: string, given: BlockIds | null | undefined, isNew: boolean) => {
			if (this.#uncached.has(requestId)) {
				return;
			}
			const tracked = this.#tracked(requestId);
			const now = numScheduledTokens[requestId];
			checkCount("numScheduledTokens", requestId, now);
			const { allTokenIds } = tracked.request;
			if (!(allTokenIds.length > 0)) {
				checkTokenIds(`allTokenIds of ${requestId}`, allTokenIds); // whose memory may have gone
			}
			handles[count] = tracked.tracker.handle;
			scheduled[count] = now as number;
			tokens[count] = this.#storableTokens(tracked, allTokenIds, now as number, loading);
			// Most requests get no block in a step.
			const lists = given === null || given === undefined ? NONE : blockLists(given, groups);
			for (let group = 0; group < groups; group++) {
				const list = lists[group];
				if (list !== undefined && !isNew) {
					for (const id of list) {
						blockIds.push(id);
					}
				}
				offsets[count * groups + group + 1] = blockIds.length;
			}
			count++;
			if (allocations !== undefined && lists.some((ids) => ids.length > 0)) {
				allocations.push(this.#allocation(tracked, lists, isNew));
			}
		};
		for (const request of scheduledNewReqs) {
			checkObject("a request of scheduledNewReqs", request);
			const { requestId } = request;
			// Its blocks came with updateStateAfterAlloc.
			const { tracker } = this.#requests.get(requestId) ?? {};
			take(requestId, allocations && tracker?.allocatedBlockIds, true);
		}
		for (const request of scheduledCachedReqs) {
			checkObject("a request of scheduledCachedReqs", request);
			const { requestId, newBlockIds, resumed = false } = request;
			if (resumed) {
				this.#checkResumed(requestId, newBlockIds);
			}
			take(requestId, newBlockIds, resumed);
		}
		const plan = this.#plan({
			handles: handles.subarray(0, count),
			scheduledTokens: scheduled.subarray(0, count),
			numTokens: tokens.subarray(0, count),
			blockOffsets: offsets.subarray(0, count * groups + 1),
			blockIds: Uint32Array.from(blockIds),
		});
		this.#loading.clear();
		const requests: RequestMetadata[] = [];
		for (const { handle, direction, ...op } of plan) {
			const { requestId, cacheSalt } = this.#table.get(handle) as RequestTracker;
			const { request, tokens } = this.#requests.get(requestId) as Tracked;
			const tokenIds = tokens.of(request.allTokenIds, op.end);
			requests.push({ requestId, direction, op: { tokenIds, ...op }, cacheSalt });
		}
		if (allocations !== undefined && allocations.length > 0) {
			this.#adapter.reportBlockAllocations?.(allocations);
		}
		return { requests, loadAsync: this.#loadAsync };
	}

	/**
	 * Takes in what the workers told in a step, before the next one is planned.
	 *
	 * @throws `INVALID_ARGUMENT` for block ids that are no integers from 0 on.
	 */
	updateConnectorOutput(output: ConnectorOutput): void {
		checkObject("output", output);
		const { invalidBlockIds: reported = [], finishedSending = [], finishedRecving = [] } = output;
		checkIterable("invalidBlockIds", reported);
		checkIterable("finishedSending", finishedSending);
		checkIterable("finishedRecving", finishedRecving);
		const invalidBlockIds = new Set(reported);
		for (const id of invalidBlockIds) {
			checkInteger("an invalid block id", id, 0, U32_MAX);
		}
		for (const requestId of finishedSending) {
			this.#ending.delete(requestId);
		}
		if (invalidBlockIds.size === 0) {
			return;
		}
		for (const [requestId, { tracker, request }] of this.#requests) {
			const told = request.numComputedTokens !== undefined;
			if (!told && tracker.allocatedBlockIds.flat().some((id) => invalidBlockIds.has(id))) {
				this.#unknown.add(requestId);
			}
		}
	}

	/**
	 * Ends a request, however it ended. Its id may be used again when all workers have told its end, and
	 * {@link SchedulerConnector.updateConnectorOutput} has heard of it; before, it is computed without the cache.
	 *
	 * @returns Whether its blocks must be kept until a worker reports it as sent, and what goes back to the
	 * router: the tokens that came from the cache, when `kvTransferParams` has a key
	 * `num_lmcache_extra_cached_tokens`.
	 */
	requestFinished(
		request: EngineRequest,
		_blockIds?: BlockIds,
	): [keepBlocks: boolean, kvTransferParams: Record<string, unknown> | null] {
		checkObject("request", request);
		const { requestId, kvTransferParams } = request;
		checkText("requestId", requestId);
		if (kvTransferParams !== undefined && kvTransferParams !== null) {
			checkObject("kvTransferParams", kvTransferParams);
		}
		const params: Record<string, unknown> | null = kvTransferParams ? {} : null;
		const tracker = this.#table.get(requestId);
		if (params !== null && kvTransferParams && EXTRA in kvTransferParams) {
			const extra = (tracker?.numExternalHitTokens ?? 0) - (tracker?.numLocalHitTokens ?? 0);
			params[EXTRA] = Math.max(0, extra);
		}
		this.#unknown.delete(requestId);
		this.#loading.delete(requestId);
		const uncached = this.#uncached.delete(requestId);
		if (tracker === undefined && !uncached) {
			return [this.#ending.has(requestId), params]; // ended before, and a worker may still copy
		}
		if (tracker !== undefined) {
			this.#table.remove(requestId);
			this.#requests.delete(requestId);
			this.#adapter.endSession(requestId);
		}
		this.#ending.add(requestId);
		if (this.#ending.size > ENDING_MAX) {
			this.#ending.delete(this.#ending.values().next().value as string); // told long ago, or never
		}
		return [true, params];
	}

	/**
	 * What the cache stored and removed, for whoever routes requests by it: as far as it is known since the last
	 * call, which asks for more. Never waits.
	 *
	 * @returns `undefined` when there is nothing new, or the adapter cannot tell. Events have sequence numbers
	 * without gaps; `lost`, or another `incarnation`, means that some were missed: forget all, and begin anew.
	 */
	takeEvents(): KvEvents | undefined {
		return this.#adapter.takeEvents?.();
	}

	/**
	 * Drops what the cache has stored and nobody uses.
	 *
	 * @returns Whether the adapter could.
	 */
	async resetCache(): Promise<boolean> {
		return (await this.#adapter.resetCache?.()) ?? false;
	}

	/** Plans, and names a request that is there twice by its id. */
	#plan(step: StepArrays): StepPlan {
		try {
			return this.#table.plan(step);
		} catch (error) {
			const { handles } = step;
			const twice = handles.find((handle, at) => handles.indexOf(handle) < at);
			if (twice === undefined) {
				throw error;
			}
			throw invalid(`request ${this.#table.get(twice)?.requestId} is in the step twice`);
		}
	}

	/** The tracker of a request; after a preemption a new one. */
	#track(request: EngineRequest): RequestTracker {
		const { requestId, cacheSalt, numPromptTokens } = request;
		const known = this.#requests.get(requestId);
		if (known?.request !== request) {
			namedSaltOf(`request ${requestId}`, request);
		}
		if (known !== undefined) {
			checkSame(known, request);
			if (request.status !== "PREEMPTED" || this.#goesOn(known.tracker, request)) {
				if (request !== known.request) {
					this.#hashedTokens(request); // refuses what the next step would stumble over
					this.#requests.set(requestId, { ...known, request });
				}
				return known.tracker;
			}
		}
		const { maxOffloadTokens = Infinity } = request;
		const { firstTokens = request.allTokenIds.length } = known ?? {};
		const prompt = numPromptTokens ?? firstTokens;
		checkInteger(`numPromptTokens of ${requestId}`, prompt, 0, U32_MAX);
		if (maxOffloadTokens !== Infinity) {
			checkInteger(`maxOffloadTokens of ${requestId}`, maxOffloadTokens, 0, U32_MAX);
		}
		const promptOnly = this.#planner === "lmcache" && !this.#saveDecodeCache;
		const numTokens = this.#hashedTokens(request);
		this.#table.remove(requestId); // nothing is refused from here on
		this.#loading.delete(requestId);
		const tracker = this.#table.add({
			requestId,
			numTokens,
			cacheSalt,
			maxStoredTokens: Math.min(promptOnly ? prompt : U32_MAX, maxOffloadTokens),
		});
		const tokens = new SharedTokens();
		this.#requests.set(requestId, { tracker, request, tokens, firstTokens, loads: 0 });
		return tracker;
	}

	/** Whether a preempted request has what it had: nothing of it ran since the cache was asked last. */
	#goesOn(tracker: RequestTracker, request: EngineRequest): boolean {
		const { state, numScheduledTokens } = tracker;
		if (state === "PREFETCHING") {
			return true;
		}
		// Its load failed, and would fail again: only LMCache's planner asks the cache after a preemption.
		const failed = state === "BYPASSED" || (state === "READY" && loadFailed(request, tracker));
		return this.#planner === "lmcache" && numScheduledTokens === 0 && failed;
	}

	/** Refuses a load of more tokens than the request has by now. */
	#checkLoad({ request, tracker }: Tracked): void {
		const { requestId, allTokenIds } = request;
		const name = `allTokenIds of ${requestId}`;
		checkTokenIds(name, allTokenIds);
		if (allTokenIds.length < tracker.numExternalHitTokens) {
			throw invalid(
				`${name} has ${allTokenIds.length} tokens, and ${tracker.numExternalHitTokens} were found: a request that ` +
					"has become another one is ended by requestFinished",
			);
		}
	}

	/** Refuses other blocks than updateStateAfterAlloc told: what is stored goes by those. */
	#checkResumed(requestId: string, given: BlockIds | null | undefined): void {
		if (given === null || given === undefined || this.#uncached.has(requestId)) {
			return;
		}
		const known = this.#tracked(requestId).tracker.allocatedBlockIds;
		const moves = (id: number, other: number | undefined) =>
			this.#relocates && (id === 0 || other === 0);
		const lists = blockLists(given, this.#table.blockSizes.length);
		const same = known.every((ids, group) => {
			return ids.every((id, at) => id === lists[group]?.[at] || moves(id, lists[group]?.[at]));
		});
		if (!same) {
			throw invalid(
				`request ${requestId} is resumed with other blocks than it is known to have: ask for it again, with the ` +
					"status PREEMPTED, and tell its blocks by updateStateAfterAlloc; give relocationWindow where a sliding window gives blocks up",
			);
		}
	}

	#tracked(requestId: string): Tracked {
		const tracked = this.#requests.get(requestId);
		if (tracked === undefined) {
			throw invalid(
				`request ${requestId} is unknown: call getNumNewMatchedTokens for it first, and nothing after ` +
					"requestFinished",
			);
		}
		return tracked;
	}

	#hashedTokens(request: EngineRequest, allTokenIds = request.allTokenIds): number {
		const { numBlockHashes } = request;
		if (numBlockHashes === undefined) {
			return allTokenIds.length;
		}
		checkInteger("numBlockHashes", numBlockHashes, 0, U32_MAX);
		return Math.min(allTokenIds.length, numBlockHashes * this.#alignment);
	}

	/** Tokens that may be stored at the end of a step: those that are surely good then. */
	#storableTokens(
		{ request, tracker }: Tracked,
		allTokenIds: EngineRequest["allTokenIds"],
		scheduled: number,
		loading: ReadonlySet<number>,
	): number {
		// What is loaded in this step may fail, and all that is computed on it is wrong then: in other
		// requests too, which share its blocks. The next step stores it.
		const onLoad = () => tracker.allocatedBlockIds.flat().some((id) => loading.has(id));
		if (this.#unknown.has(request.requestId) || (loading.size > 0 && onLoad())) {
			return tracker.numStoredTokens;
		}
		const hashed = this.#hashedTokens(request, allTokenIds);
		const { numComputedTokens } = request;
		if (numComputedTokens === undefined) {
			return hashed;
		}
		checkCount("numComputedTokens", request.requestId, numComputedTokens);
		// After a failed load more was scheduled than is computed.
		return Math.min(hashed, numComputedTokens + scheduled);
	}

	#allocation(
		{ request, tracker }: Tracked,
		lists: readonly (readonly number[] | Uint32Array)[],
		isNew: boolean,
	): BlockAllocation {
		const group = this.#table.blockSizes.findIndex((size) => size > 0);
		const size = this.#table.blockSizes[group] as number;
		const added = lists[group]?.length ?? 0;
		const held = tracker.numAllocatedBlocks;
		const before = isNew ? held - added : held;
		const newTokenIds = [...request.allTokenIds.slice(before * size, (before + added) * size)];
		const newBlockIds = lists.map((ids) => [...ids]);
		return { requestId: request.requestId, newBlockIds, newTokenIds };
	}

	#warnOnce(message: string): void {
		if (!this.#warned.has(message)) {
			this.#warned.add(message);
			this.#warn(message);
		}
	}
}

/**
 * Refuses a request that has the id of another one, which would be given what is that one's. Its prompt tells: what came
 * after it may have been replaced.
 */
function checkSame(
	{ request: known, tracker, firstTokens }: Tracked,
	request: EngineRequest,
): void {
	const { requestId } = request;
	if (saltOf(request) !== tracker.cacheSalt) {
		throw invalid(`request ${requestId} had another cacheSalt before: ${END_FIRST}`);
	}
	if (request === known) {
		return;
	}
	const [before, now] = [known.allTokenIds, request.allTokenIds]; // which may be getters
	const most = Math.min(firstTokens, before.length, now.length);
	for (let at = 0; before !== now && at < most; at++) {
		if (before[at] !== now[at]) {
			throw invalid(
				`request ${requestId} had another token at position ${at} before: ${END_FIRST}`,
			);
		}
	}
}

/** Tokens that may be counted as loaded into a request's blocks. */
function loadable({ tracker, loads }: Tracked): number {
	const { state, numExternalHitTokens, numLocalHitTokens } = tracker;
	if (state === "PREFETCHING" || state === "WAITING_FOR_LOAD") {
		return Math.max(0, numExternalHitTokens - numLocalHitTokens);
	}
	return state === "READY" ? loads : 0; // told again when they are there
}

const END_FIRST = "call requestFinished for the one that had this id first";

/** Asked again with nothing computed after a load was planned: the load failed, and was not counted. */
function loadFailed(request: EngineRequest, tracker: RequestTracker): boolean {
	return (request.numComputedTokens ?? 0) === 0 && tracker.numExternalHitTokens > 0;
}

function checkOutput(output: SchedulerOutput): void {
	checkObject("output", output);
	const { scheduledNewReqs, scheduledCachedReqs, numScheduledTokens } = output;
	for (const [name, list] of Object.entries({ scheduledNewReqs, scheduledCachedReqs })) {
		if (!Array.isArray(list)) {
			throw invalid(`${name} must be an array of requests`);
		}
	}
	checkObject("numScheduledTokens", numScheduledTokens);
}

/** Ids of ended requests that are remembered. */
const ENDING_MAX = 65_536;

/** Checks a count of a request. The name is put together only for the error: there are two for each in a step. */
function checkCount(what: string, requestId: string, count: unknown): void {
	if (!Number.isInteger(count) || (count as number) < 0 || (count as number) > 2 ** 32 - 1) {
		checkInteger(`${what} of ${requestId}`, count, 0, 2 ** 32 - 1);
	}
}

const NONE: ReturnType<typeof blockLists> = [];
const EXTRA = "num_lmcache_extra_cached_tokens";

function salted(cacheSalt: string): SaltOption | undefined {
	return cacheSalt === "" ? undefined : { cacheSalt };
}

function lcm(a: number, b: number): number {
	let [x, y] = [a, b];
	while (y > 0) {
		[x, y] = [y, x % y];
	}
	return (a / x) * b;
}
