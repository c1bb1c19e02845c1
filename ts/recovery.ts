import { types } from "node:util";
import {
	checkAttached,
	checkInteger,
	checkIterable,
	checkObject,
	checkSpelled,
	checkText,
	invalid,
} from "./arguments.js";
import { KvferryError, wrap } from "./errors.js";
import { native } from "./native.js";

const U32_MAX = 2 ** 32 - 1;

/**
 * What becomes of a request whose KV could not be loaded: `"fail"` ends it with an error, `"recompute"`
 * computes what is missing.
 */
export type KvLoadFailurePolicy = "fail" | "recompute";

/** A request as recovery sees it. */
export interface RecoveryRequest {
	readonly requestId: string;
	/** In the order of its tokens, those allocated in this step included. */
	readonly blockIds: readonly number[] | Uint32Array;
	/** Tokens that it counts as computed, those scheduled in this step included. */
	readonly numComputedTokens: number;
	/** Of a waiting request: `WAITING_FOR_REMOTE_KVS` while its KV is loaded between steps. */
	readonly status?: string | undefined;
}

/** A step in which blocks could not be loaded: the arguments of {@link handleInvalidBlocks}. */
export interface InvalidBlocksStep {
	/** Requests that run, in the scheduler's order. */
	readonly running: readonly RecoveryRequest[];
	/** Requests that wait. Default none; looked at only if `WAITING_FOR_REMOTE_KVS`. */
	readonly waiting?: readonly RecoveryRequest[] | undefined;
	/** Tokens of each request in this step, by id. Absent is 0; ids of no request mean nothing. */
	readonly numScheduledTokens: Readonly<Record<string, number>>;
	/** What the workers' `getBlockIdsWithLoadErrors` said. Blocks of no request mean nothing. */
	readonly invalidBlockIds: Iterable<number>;
	/** Tokens of a block. Default 16. */
	readonly blockSize?: number | undefined;
	/** Default `"fail"`, as vLLM's. */
	readonly kvLoadFailurePolicy?: KvLoadFailurePolicy | undefined;
	/** KV groups of the model. Default 1; blocks of more cannot be told apart. */
	readonly numKvCacheGroups?: number | undefined;
}

const STEP = {
	running: true,
	waiting: true,
	numScheduledTokens: true,
	invalidBlockIds: true,
	blockSize: true,
	kvLoadFailurePolicy: true,
	numKvCacheGroups: true,
} satisfies Record<keyof InvalidBlocksStep, true>;

/** What a scheduler does about failed loads. */
export interface LoadFailures {
	/** The new `numComputedTokens` of the affected requests, by id. Never more than before. */
	readonly numComputedTokens: ReadonlyMap<string, number>;
	/**
	 * Requests whose output of this step is worth nothing. Under `"fail"`, end them with an error; under
	 * `"recompute"`, schedule them again from their `numComputedTokens`.
	 */
	readonly discardedRequestIds: readonly string[];
	/**
	 * Requests that go on waiting, until their load has ended: then {@link updateWaitingForRemoteKv} with
	 * `failedRecving`. Only under `"recompute"`.
	 */
	readonly failedRecvingRequestIds: readonly string[];
}

/** What follows from invalid blocks: the result of {@link handleInvalidBlocks}. */
export interface InvalidBlocksRecovery extends LoadFailures {
	/** Tokens to be computed that were believed to be there; those of shared blocks once. 0 or more. */
	readonly totalAffectedTokens: number;
	/** Those of the invalid blocks that a request had among its computed tokens, each once. */
	readonly affectedBlockIds: readonly number[];
	/** Blocks that the engine's prefix cache must forget, each once. Only under `"fail"`. */
	readonly evictedBlockIds: readonly number[];
}

/**
 * What a scheduler does when blocks could not be loaded (vLLM: `_handle_invalid_blocks`, as corrected by its
 * pull request 38096). Each request is cut at its first invalid block. Changes nothing: the caller takes over
 * what is returned.
 *
 * Before this step a request had `numComputedTokens` − `numScheduledTokens` tokens; blocks behind those are not
 * looked at. Of a block that several running requests share, the first computes it anew; a request with only
 * such blocks goes back to what it had before the step. Waiting requests are treated likewise, apart.
 *
 * Under `"fail"`, the first invalid block of a running request and all its blocks behind, those allocated in
 * this step included, are to be evicted. Blocks of waiting requests are in no prefix cache yet.
 *
 * @throws {@link KvferryError} `UNSUPPORTED_MODEL` with more than one KV group. `INVALID_ARGUMENT` for a
 * request that is there twice, ids and counts that are no integers from 0 on, and for more scheduled than
 * computed tokens.
 */
export function handleInvalidBlocks(step: InvalidBlocksStep): InvalidBlocksRecovery {
	checkSpelled("handleInvalidBlocks", step, STEP);
	const { running, waiting = [], numScheduledTokens, invalidBlockIds } = step;
	const { blockSize = 16, kvLoadFailurePolicy = "fail", numKvCacheGroups = 1 } = step;
	checkInteger("blockSize", blockSize, 1, U32_MAX);
	checkInteger("numKvCacheGroups", numKvCacheGroups, 1, U32_MAX);
	const fails = failsRequests(kvLoadFailurePolicy);
	if (numKvCacheGroups > 1) {
		throw new KvferryError(
			"UNSUPPORTED_MODEL",
			`invalid blocks of ${numKvCacheGroups} KV groups cannot be told apart: report whole requests as ` +
				"failed, to handleFailedRecving",
		);
	}
	checkRequests("running", running);
	checkRequests("waiting", waiting);
	checkCounts(numScheduledTokens);
	const loading = waiting.filter(isLoading);
	const requests = [...loading, ...running];
	const seen = new Set<string>();
	const computed: number[] = [];
	const scheduled: number[] = [];
	const blockIds: number[] = [];
	const blockOffsets = [0];
	for (const { requestId, numComputedTokens, blockIds: ids } of requests) {
		checkText("requestId", requestId);
		if (seen.has(requestId)) {
			throw invalid(`request ${requestId} is in the step twice`);
		}
		seen.add(requestId);
		checkInteger(`numComputedTokens of ${requestId}`, numComputedTokens, 0, U32_MAX);
		const now = Object.hasOwn(numScheduledTokens, requestId) ? numScheduledTokens[requestId] : 0;
		// The bound is the rule: what is scheduled in this step counts as computed already.
		const name = `numScheduledTokens of ${requestId}, a part of its numComputedTokens,`;
		checkInteger(name, now, 0, numComputedTokens);
		computed.push(numComputedTokens);
		scheduled.push(now as number);
		appendIds(`blockIds of ${requestId}`, ids, blockIds);
		blockOffsets.push(blockIds.length);
	}
	const invalidIds: number[] = [];
	appendIds("invalidBlockIds", invalidBlockIds, invalidIds);
	const recovery = wrap(() =>
		native().recover(
			blockSize,
			fails,
			Uint32Array.from(computed),
			Uint32Array.from(scheduled),
			new Uint8Array(requests.length).fill(1, 0, loading.length),
			Uint32Array.from(blockOffsets),
			Uint32Array.from(blockIds),
			Uint32Array.from(invalidIds),
		),
	);
	const affected = [...recovery.affected];
	const idOf = (at: number) => (requests[at] as RecoveryRequest).requestId;
	const idsOf = (positions: number[]) => positions.map(idOf);
	const failed = idsOf(affected.filter((at) => at < loading.length));
	const stopped = idsOf(affected.filter((at) => at >= loading.length));
	return {
		numComputedTokens: new Map(
			affected.map((at) => [idOf(at), recovery.computed[at] as number] as const),
		),
		discardedRequestIds: fails ? [...failed, ...stopped] : stopped,
		failedRecvingRequestIds: fails ? [] : failed,
		totalAffectedTokens: recovery.affectedTokens,
		affectedBlockIds: [...recovery.found],
		evictedBlockIds: [...recovery.evicted],
	};
}

/** Loads that failed as a whole: the arguments of {@link handleFailedRecving}. */
export interface FailedRecving {
	/** Requests of the scheduler; looked at only if `WAITING_FOR_REMOTE_KVS`. */
	readonly requests: readonly Pick<RecoveryRequest, "requestId" | "status">[];
	/** Requests whose load failed. Those that are not among `requests` mean nothing: they were aborted. */
	readonly failedRequestIds: Iterable<string>;
	/** Default `"fail"`, as vLLM's. */
	readonly kvLoadFailurePolicy?: KvLoadFailurePolicy | undefined;
}

const FAILURES = {
	requests: true,
	failedRequestIds: true,
	kvLoadFailurePolicy: true,
} satisfies Record<keyof FailedRecving, true>;

/**
 * What a scheduler does when requests' loads failed as a whole, in any number of KV groups (vLLM:
 * `_handle_failed_recving`). Under `"recompute"`, such a request has no computed tokens.
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT` for ids that are no strings, and for an unknown policy.
 */
export function handleFailedRecving(failures: FailedRecving): LoadFailures {
	checkSpelled("handleFailedRecving", failures, FAILURES);
	const { requests, failedRequestIds, kvLoadFailurePolicy = "fail" } = failures;
	const fails = failsRequests(kvLoadFailurePolicy);
	checkRequests("requests", requests);
	const failed = new Set<string>();
	checkIterable("failedRequestIds", failedRequestIds);
	for (const requestId of failedRequestIds) {
		checkText("a request id of failedRequestIds", requestId);
		failed.add(requestId);
	}
	const affected = requests.filter(isLoading).map(({ requestId }) => requestId);
	const requestIds = [...new Set(affected)].filter((requestId) => failed.has(requestId));
	return {
		numComputedTokens: new Map(fails ? [] : requestIds.map((requestId) => [requestId, 0])),
		discardedRequestIds: fails ? requestIds : [],
		failedRecvingRequestIds: fails ? [] : requestIds,
	};
}

/** A load that has ended: the arguments of {@link updateWaitingForRemoteKv}. */
export interface EndedLoad {
	/** Tokens that the request counts as computed: after a failure, those that recovery left it. */
	readonly numComputedTokens: number;
	/** All its tokens, at least 1. */
	readonly numTokens: number;
	/** Whether it was among {@link LoadFailures.failedRecvingRequestIds} since the load began. Default false. */
	readonly failedRecving?: boolean | undefined;
}

const LOAD = {
	numComputedTokens: true,
	numTokens: true,
	failedRecving: true,
} satisfies Record<keyof EndedLoad, true>;

/** What a scheduler does after {@link updateWaitingForRemoteKv}. */
export interface LoadedRequest {
	/** The request's new count. A model needs one token to go on from, so it is below `numTokens`. */
	readonly numComputedTokens: number;
	/** Leading tokens whose blocks the engine's prefix cache may now have. */
	readonly numTokensToCache: number;
	/** Whether the request has nothing left and gives its blocks back: it may have a local hit next time. */
	readonly freeBlocks: boolean;
}

/**
 * What a scheduler does when the load of a waiting request has ended (vLLM: `_update_waiting_for_remote_kv`).
 *
 * @throws {@link KvferryError} `INVALID_ARGUMENT` for counts that are no integers or more computed tokens than
 * there are.
 */
export function updateWaitingForRemoteKv(load: EndedLoad): LoadedRequest {
	checkSpelled("updateWaitingForRemoteKv", load, LOAD);
	const { numComputedTokens, numTokens, failedRecving = false } = load;
	checkInteger("numTokens", numTokens, 1, U32_MAX);
	checkInteger("numComputedTokens", numComputedTokens, 0, numTokens);
	return {
		numComputedTokens: Math.min(numComputedTokens, numTokens - 1),
		numTokensToCache: numComputedTokens,
		freeBlocks: failedRecving && numComputedTokens === 0,
	};
}

/** Whether a request's KV is loaded between steps. */
function isLoading({ status }: Pick<RecoveryRequest, "status">): boolean {
	return status === "WAITING_FOR_REMOTE_KVS";
}

function failsRequests(policy: KvLoadFailurePolicy): boolean {
	if (policy !== "fail" && policy !== "recompute") {
		throw invalid(`kvLoadFailurePolicy is ${String(policy)}: it must be "fail" or "recompute"`);
	}
	return policy === "fail";
}

function checkRequests(name: string, value: unknown): void {
	if (!Array.isArray(value)) {
		throw invalid(`${name} must be an array of requests`);
	}
	for (const request of value) {
		checkObject(`a request of ${name}`, request);
	}
}

/** A Map would read as if nothing had been scheduled. */
function checkCounts(counts: unknown): void {
	if (typeof counts !== "object" || counts === null || types.isMap(counts)) {
		throw invalid("numScheduledTokens must be an object of counts by request id");
	}
}

/** Adds block ids to `to`, checked. */
function appendIds(name: string, ids: Iterable<number>, to: number[]): void {
	if (types.isUint32Array(ids)) {
		checkAttached(name, ids);
	}
	checkIterable(name, ids);
	const block = `a block of ${name}`;
	for (const id of ids) {
		checkInteger(block, id, 0, U32_MAX);
		to.push(id);
	}
}
