// invalid_blocks.json: what a scheduler does when blocks or whole loads could not be loaded.

import { isDeepStrictEqual } from "node:util";
import { EXCUSED } from "./outcome.mjs";

/** @typedef {import("./outcome.mjs").Json} Json */
/** @typedef {import("../../ts/index.js").InvalidBlocksStep} InvalidBlocksStep */
/** @typedef {import("../../ts/index.js").RecoveryRequest} RecoveryRequest */

/** @type {typeof import("../../ts/index.js")} */
let kvferry;

/** @type {import("./outcome.mjs").Schema} */
export default function recovery(data, built) {
	kvferry = built;
	if (!Array.isArray(data?.handle_failed_recving)) {
		return undefined;
	}
	return [
		["cases", data.cases, invalidBlocks],
		["handle_failed_recving", data.handle_failed_recving, failedRecving],
	];
}

function requestOf(/** @type {Json} */ item) {
	return {
		requestId: item.request_id,
		blockIds: item.block_ids,
		numComputedTokens: item.num_computed_tokens,
		numTokens: item.num_tokens,
		status: item.status,
	};
}

function sorted(/** @type {readonly number[]} */ ids) {
	return [...ids].sort((a, b) => a - b);
}

/** The counts of requests after a recovery, by id. */
function counts(
	/** @type {readonly RecoveryRequest[]} */ requests,
	/** @type {ReadonlyMap<string, number>} */ changed,
) {
	return Object.fromEntries(
		requests.map(({ requestId, numComputedTokens }) => [
			requestId,
			changed.get(requestId) ?? numComputedTokens,
		]),
	);
}

/** One of the original's two scans. It collects blocks to evict under either policy. */
function scan(
	/** @type {InvalidBlocksStep} */ step,
	/** @type {readonly RecoveryRequest[]} */ requests,
) {
	const found = kvferry.handleInvalidBlocks({ ...step, kvLoadFailurePolicy: "fail" });
	return {
		affected_req_ids: [...found.discardedRequestIds].sort(),
		total_affected_tokens: found.totalAffectedTokens,
		blocks_to_evict: sorted(found.evictedBlockIds),
		marked_invalid: sorted(found.affectedBlockIds),
		num_computed_tokens: counts(requests, found.numComputedTokens),
	};
}

function invalidBlocks(/** @type {Json} */ item) {
	const running = item.running.map(requestOf);
	/** @type {ReturnType<typeof requestOf>[]} */
	const waiting = item.waiting.map(requestOf);
	const loading = waiting.filter(({ status }) => status === "WAITING_FOR_REMOTE_KVS");
	const step = {
		running,
		waiting,
		numScheduledTokens: item.num_scheduled_tokens,
		invalidBlockIds: item.invalid_block_ids,
		blockSize: item.block_size,
		kvLoadFailurePolicy: item.policy,
	};
	if (
		!isDeepStrictEqual(scan({ ...step, waiting: [] }, running), item.scan_sync) ||
		!isDeepStrictEqual(scan({ ...step, running: [] }, loading), item.scan_async)
	) {
		return false;
	}
	const all = [...running, ...waiting];
	const before = item.failed_recving_before ?? [];
	const handle = () =>
		kvferry.handleInvalidBlocks({ ...step, numKvCacheGroups: item.num_kv_cache_groups });
	if (item.handle.error) {
		const unchanged = { num_computed_tokens: counts(all, new Map()), evicted_blocks: null };
		const { error, ...left } = item.handle;
		return (
			refuses(handle, "UNSUPPORTED_MODEL") &&
			isDeepStrictEqual({ ...unchanged, failed_recving_kv_req_ids: before.toSorted() }, left)
		);
	}
	const recovery = handle();
	const { evictedBlockIds, numComputedTokens } = recovery;
	const failed = new Set([...before, ...recovery.failedRecvingRequestIds]);
	const handled = {
		returned_req_ids: [...recovery.discardedRequestIds].sort(),
		num_computed_tokens: counts(all, numComputedTokens),
		failed_recving_kv_req_ids: [...failed].sort(),
		evicted_blocks: evictedBlockIds.length > 0 ? sorted(evictedBlockIds) : null,
	};
	if (!isDeepStrictEqual(handled, item.handle)) {
		return false;
	}
	return (
		item.after_async_load_finished === undefined ||
		ended(item, loading, handled.num_computed_tokens, failed)
	);
}

/** A load at its end. @typedef {import("../../ts/index.js").EndedLoad} EndedLoad */

/**
 * The defects of the original at the end of a load: each tells from what goes in whether the load shows it,
 * and what is right instead of the outcome that the original gives.
 *
 * @type {[string, (load: EndedLoad) => boolean | undefined, (outcome: Json) => Json][]}
 */
const DEFECTS = [
	[
		"a full-prompt hit leaves no token to compute", // when all its invalid blocks are shared
		(load) => load.failedRecving && load.numComputedTokens === load.numTokens,
		(outcome) => ({ ...outcome, num_computed_tokens: outcome.num_computed_tokens - 1 }),
	],
	[
		"a request without tokens comes to have -1 computed tokens",
		(load) => load.numTokens === 0 && load.numComputedTokens === 0,
		({ request_id }) => ({ request_id, refused: true }),
	],
];

/** What becomes of the waiting requests when all loads have ended. */
function ended(
	/** @type {Json} */ item,
	/** @type {ReturnType<typeof requestOf>[]} */ loading,
	/** @type {Record<string, number>} */ computed,
	/** @type {ReadonlySet<string>} */ failed,
) {
	/** @type {Set<string>} */
	const defects = new Set();
	const same = loading.every(({ requestId, numTokens }, at) => {
		const numComputedTokens = /** @type {number} */ (computed[requestId]);
		const load = { numComputedTokens, numTokens, failedRecving: failed.has(requestId) };
		let expected = item.after_async_load_finished[at];
		for (const [name, shows, right] of DEFECTS) {
			if (shows(load)) {
				defects.add(name);
				expected = right(expected);
			}
		}
		return isDeepStrictEqual({ request_id: requestId, ...outcomeOf(load) }, expected);
	});
	const left = [...failed].filter((id) => !loading.some(({ requestId }) => requestId === id));
	if (
		!same ||
		loading.length !== item.after_async_load_finished.length ||
		!isDeepStrictEqual(left.sort(), item.failed_recving_after)
	) {
		return false;
	}
	return defects.size === 0 || { [EXCUSED]: [...defects].join("; ") };
}

function outcomeOf(/** @type {EndedLoad} */ load) {
	const end = () => kvferry.updateWaitingForRemoteKv(load);
	if (load.numTokens === 0) {
		return { refused: refuses(end, "INVALID_ARGUMENT") };
	}
	const { numComputedTokens, numTokensToCache, freeBlocks } = end();
	return {
		num_computed_tokens: numComputedTokens,
		cache_blocks_called_with: freeBlocks ? null : numTokensToCache,
		freed: freeBlocks,
	};
}

/** Whether the call throws a KvferryError of this code. */
function refuses(/** @type {() => unknown} */ call, /** @type {string} */ code) {
	try {
		call();
		return false;
	} catch (error) {
		return error instanceof kvferry.KvferryError && error.code === code;
	}
}

function failedRecving(/** @type {Json} */ item) {
	const { num_computed_before: before, failed_recving: failedRequestIds } = item;
	const failures = kvferry.handleFailedRecving({
		requests: [{ requestId: "w", status: item.status }],
		failedRequestIds,
		kvLoadFailurePolicy: item.policy,
	});
	return (
		isDeepStrictEqual([...failures.discardedRequestIds], item.returned) &&
		isDeepStrictEqual([...failures.failedRecvingRequestIds], item.failed_recving_kv_req_ids) &&
		(failures.numComputedTokens.get("w") ?? before) === item.num_computed_after
	);
}
