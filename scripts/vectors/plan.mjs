// store_plan.json, store_scenarios.json and store_plan_lmcache.json: trackers, plans, and the
// scheduler's connector.

import { isDeepStrictEqual } from "node:util";
import { EXCUSED } from "./outcome.mjs";

/** @typedef {import("./outcome.mjs").Json} Json */
/** @typedef {import("../../ts/index.js").RequestTracker} RequestTracker */
/** @typedef {import("../../ts/index.js").EngineRequest} EngineRequest */
/** @typedef {import("../../ts/index.js").SchedulerConnector} SchedulerConnector */

/** @type {typeof import("../../ts/index.js")} */
let kvferry;

/** @type {import("./outcome.mjs").Schema} */
export default function plan(data, built) {
	kvferry = built;
	if (data?.scenarios !== undefined) {
		return [["scenarios", data.scenarios, scenario]];
	}
	const first = data?.cases?.[0] ?? {};
	if ("blocks_in_chunk" in first) {
		return [["cases", data.cases, blockPlan]];
	}
	if ("group_tokens_per_block" in first) {
		return [
			["cases", data.cases, tokenPlan],
			["append_block_ids", data.append_block_ids ?? [], appendBlocks],
			["connector_probes", data.connector_probes ?? [], probe],
		];
	}
	return undefined;
}

/** LMCache's name of a state as ours. */
function stateOf(/** @type {string} */ name) {
	const state = name === "BYPASS_LMCACHE" ? "BYPASSED" : name;
	return /** @type {import("../../ts/index.js").RequestState} */ (state);
}

/** Whether the call throws INVALID_ARGUMENT. */
function refuses(/** @type {() => unknown} */ call) {
	try {
		call();
		return false;
	} catch (error) {
		return error instanceof kvferry.KvferryError && error.code === "INVALID_ARGUMENT";
	}
}

/** Plans a step of one request that schedules nothing and brings no blocks. */
function planOf(
	/** @type {import("../../ts/index.js").TrackerTable} */ table,
	/** @type {RequestTracker} */ tracker,
	/** @type {string} */ kind,
) {
	const plan = table.plan({
		handles: Uint32Array.of(tracker.handle),
		scheduledTokens: Uint32Array.of(0),
		numTokens: Uint32Array.of(tracker.numTokens),
		blockOffsets: new Uint32Array(table.blockSizes.length + 1),
		blockIds: new Uint32Array(),
	});
	const operations = [...plan].filter(({ direction }) => direction === kind.toUpperCase());
	return operations.map(({ handle, ...operation }) => operation);
}

/**
 * Whether a load is planned that the originals meet with an assertion. They plan loads first, so such a
 * case's store is never reached in a real step.
 */
function isImpossible(
	/** @type {import("../../ts/index.js").TrackerTable} */ { chunkSize },
	/** @type {RequestTracker} */ tracker,
) {
	const { state, needsRetrieve, numExternalHitTokens, numTokens } = tracker;
	const whole = numExternalHitTokens % chunkSize === 0 && numExternalHitTokens <= numTokens;
	return state === "WAITING_FOR_LOAD" && needsRetrieve && !whole;
}

/** vLLM's planner counts blocks. */
function blockPlan(/** @type {Json} */ item) {
	const { block_size: block, blocks_in_chunk: chunk } = item;
	const open = () => {
		const table = new kvferry.TrackerTable({ chunkSize: chunk * block, blockSize: block });
		const tracker = table.add({
			requestId: "r",
			numTokens: item.num_block_hashes * block,
			cacheSalt: item.cache_salt,
			numScheduledTokens: item.num_scheduled_tokens,
			numLocalHitTokens: item.num_vllm_hit_blocks * block,
			numExternalHitTokens: item.num_lmcache_hit_blocks * block,
			numStoredTokens: item.num_stored_blocks * block,
			state: stateOf(item.state),
			blockIds: item.allocated_block_ids,
		});
		return { table, tracker };
	};
	if (chunk * block === 0) {
		return !item.result && refuses(open); // there is no such table, so nothing is planned
	}
	if (item.num_scheduled_tokens < 0) {
		return item.result === null && refuses(open); // counts are never negative here: nothing is planned
	}
	const { table, tracker } = open();
	const known =
		tracker.needsRetrieve === item.needs_retrieve &&
		(tracker.needsRetrieve && tracker.state === "WAITING_FOR_LOAD") ===
			item.is_ready_for_retrieving;
	if (item.error) {
		return known && refuses(() => planOf(table, tracker, item.kind)) && unchanged(tracker, item);
	}
	if (isImpossible(table, tracker)) {
		return known && refuses(() => planOf(table, tracker, item.kind));
	}
	const operations = planOf(table, tracker, item.kind);
	const { result } = item;
	const expected = result && {
		direction: result.direction,
		start: result.start,
		end: result.end,
		blockIds: [result.block_ids],
		skipFirstNTokens: result.skip_first_n_tokens,
	};
	return (
		known &&
		tracker.cacheSalt === (result?.cache_salt ?? tracker.cacheSalt) &&
		isDeepStrictEqual(operations, result ? [expected] : []) &&
		unchanged(tracker, item)
	);
}

/** Whether a tracker is as the case says that it is after it; a planned load makes it ready with us. */
function unchanged(/** @type {RequestTracker} */ tracker, /** @type {Json} */ { after, kind }) {
	return (
		tracker.numScheduledTokens === after.num_scheduled_tokens &&
		tracker.numLocalHitBlocks === after.num_vllm_hit_blocks &&
		tracker.numExternalHitBlocks === after.num_lmcache_hit_blocks &&
		(kind !== "store" || tracker.numStoredBlocks === after.num_stored_blocks) &&
		(tracker.state === after.state || after.state === "WAITING_FOR_LOAD") &&
		tracker.allocatedBlockIds[0]?.length === after.num_allocated
	);
}

/** LMCache's planner counts tokens, in groups. */
function tokenPlan(/** @type {Json} */ item) {
	/** @type {number[]} */
	const sizes = item.group_tokens_per_block;
	const table = new kvferry.TrackerTable({ chunkSize: item.tokens_per_chunk, blockSize: sizes });
	const limits = [item.save_decode_cache ? null : item.num_prompt_tokens, item.max_offload_tokens];
	const limit = Math.min(...limits.filter((limit) => limit !== null));
	const tracker = table.add({
		requestId: "r",
		numTokens: item.num_tokens,
		cacheSalt: item.cache_salt,
		maxStoredTokens: limit === Infinity ? undefined : limit,
		numScheduledTokens: item.num_scheduled_tokens,
		numLocalHitTokens: item.num_vllm_hit_tokens,
		numExternalHitTokens: item.num_lmcache_hit_tokens,
		numStoredTokens: item.num_stored_tokens,
		state: stateOf(item.state),
		blockIds: sizes.map((_, group) => item.allocated_block_ids[group] ?? []),
	});
	const known = tracker.needsRetrieve === item.needs_retrieve;
	const same = () =>
		tracker.numScheduledTokens === item.after.num_scheduled_tokens &&
		tracker.numLocalHitTokens === item.after.num_vllm_hit_tokens &&
		tracker.numExternalHitTokens === item.after.num_lmcache_hit_tokens &&
		(item.kind !== "store" || tracker.numStoredTokens === item.after.num_stored_tokens);
	if (item.error) {
		return known && refuses(() => planOf(table, tracker, item.kind)) && same();
	}
	if (isImpossible(table, tracker)) {
		return known && refuses(() => planOf(table, tracker, item.kind));
	}
	const operations = planOf(table, tracker, item.kind);
	const { result } = item;
	const expected = result && {
		direction: result.direction,
		start: result.start,
		end: result.end,
		blockIds: result.block_ids,
		skipFirstNTokens: result.skip_first_n_tokens,
	};
	return (
		known &&
		tracker.cacheSalt === (result?.cache_salt ?? tracker.cacheSalt) &&
		isDeepStrictEqual(operations, result ? [expected] : []) &&
		same()
	);
}

function appendBlocks(/** @type {Json} */ item) {
	const relocationWindow = item.relocation_window;
	const table = new kvferry.TrackerTable({ chunkSize: 16, blockSize: 16, relocationWindow });
	const tracker = table.add({ requestId: "r", numTokens: 0, blockIds: item.tracked });
	table.plan({
		handles: Uint32Array.of(tracker.handle),
		scheduledTokens: Uint32Array.of(0),
		numTokens: Uint32Array.of(0),
		blockOffsets: Uint32Array.of(0, item.append.length),
		blockIds: Uint32Array.from(item.append),
	});
	return isDeepStrictEqual(tracker.allocatedBlockIds, [item.after]);
}

/** An adapter that answers what a case says, and writes down what it is asked. */
function recorder(/** @type {number} */ chunkSize) {
	/** @type {Json[]} */
	const calls = [];
	/** @type {{ result: number | null }} */
	const answer = { result: 0 };
	/** @type {import("../../ts/index.js").SchedulerAdapter} */
	const adapter = {
		chunkSize,
		carriesSalt: true,
		maybeSubmitLookupRequest(request_id, tokens, { cacheSalt: cache_salt = "" } = {}) {
			const call = "maybe_submit_lookup_request";
			calls.push({ call, request_id, num_token_ids: tokens.length, cache_salt });
		},
		checkLookupResult: () => answer.result,
		cleanupLookupResult(request_id) {
			calls.push({ call: "cleanup_lookup_result", request_id });
		},
		freeLookupLocks(request_id, tokens, start, end) {
			const num_token_ids = tokens.length;
			calls.push({ call: "free_lookup_locks", request_id, start, end, num_token_ids });
		},
		endSession(request_id) {
			calls.push({ call: "end_session", request_id });
		},
		reportBlockAllocations(allocations) {
			const records = allocations.map(({ requestId, newBlockIds, newTokenIds }) => ({
				request_id: requestId,
				new_block_ids: newBlockIds[0],
				num_new_token_ids: newTokenIds.length,
				first_token: newTokenIds[0] ?? null,
			}));
			calls.push({ call: "report_block_allocations", records });
		},
	};
	return { adapter, calls, answer };
}

/** A request whose prompt is 0, 1, 2, … */
function requestOf(/** @type {Json} */ { request_id, num_prompt_tokens, ...rest }) {
	return {
		requestId: request_id,
		allTokenIds: [...Array(num_prompt_tokens).keys()],
		numBlockHashes: rest.num_block_hashes,
		cacheSalt: rest.cache_salt,
		kvTransferParams: rest.kv_transfer_params,
		status: "WAITING",
	};
}

/**
 * What our connector does at each event of a scenario: the event's own fields, and what it returned,
 * called and left behind.
 */
function ours(/** @type {Json} */ { block_size: blockSize, blocks_in_chunk: chunk, events }) {
	const { adapter, calls, answer } = recorder(chunk * blockSize);
	const connector = new kvferry.SchedulerConnector({ adapter, blockSize });
	/** @type {Map<string, ReturnType<typeof requestOf>>} */
	const requests = new Map();
	return events.map((/** @type {Json} */ event) => {
		calls.length = 0;
		/** @type {Json} */
		const seen = { calls };
		const request = /** @type {ReturnType<typeof requestOf>} */ (requests.get(event.request_id));
		switch (event.op) {
			case "new_request":
				requests.set(event.request_id, requestOf(event));
				return undefined;
			case "append_output_tokens":
				while (request.allTokenIds.length < event.num_tokens) {
					request.allTokenIds.push(request.allTokenIds.length);
				}
				request.numBlockHashes = event.num_block_hashes;
				return undefined;
			case "preempt":
				return undefined;
			case "get_num_new_matched_tokens":
				answer.result = event.lookup_result;
				request.status = event.status;
				try {
					seen.ret = connector.getNumNewMatchedTokens(request, event.num_computed_tokens);
				} catch {
					seen.error = true;
				}
				break;
			case "update_state_after_alloc":
				connector.updateStateAfterAlloc(request, event.block_ids, event.num_external_tokens);
				seen.ret = null;
				break;
			case "build_connector_meta": {
				const meta = connector.buildConnectorMeta({
					scheduledNewReqs: event.new.map((/** @type {string} */ requestId) => ({ requestId })),
					scheduledCachedReqs: event.cached.map((/** @type {Json} */ cached) => ({
						requestId: cached.request_id,
						newBlockIds: cached.new_block_ids,
						resumed: cached.resumed,
					})),
					numScheduledTokens: event.num_scheduled_tokens,
				});
				seen.ret = meta.requests.map(({ requestId, direction, op, cacheSalt }) => ({
					request_id: requestId,
					direction,
					start: op.start,
					end: op.end,
					block_ids: op.blockIds[0],
					skip_first_n_tokens: op.skipFirstNTokens,
					cache_salt: cacheSalt,
					num_token_ids: op.tokenIds.length,
				}));
				break;
			}
			case "request_finished":
				seen.ret = connector.requestFinished(request, event.block_ids);
				break;
			default:
				throw new Error(`no event ${event.op} is known`);
		}
		seen.calls = structuredClone(calls);
		seen.trackers = Object.fromEntries(
			Object.keys(event.trackers).map((id) => [id, trackerOf(connector, id, requests.get(id))]),
		);
		return seen;
	});
}

function trackerOf(
	/** @type {SchedulerConnector} */ connector,
	/** @type {string} */ id,
	/** @type {ReturnType<typeof requestOf> | undefined} */ request,
) {
	const tracker = connector.tracker(id);
	return (
		tracker && {
			num_scheduled_tokens: tracker.numScheduledTokens,
			num_vllm_hit_blocks: tracker.numLocalHitBlocks,
			num_lmcache_hit_blocks: tracker.numExternalHitBlocks,
			num_stored_blocks: tracker.numStoredBlocks,
			state: tracker.state,
			allocated_block_ids: tracker.allocatedBlockIds[0],
			num_block_hashes: request?.numBlockHashes,
			num_tokens: request?.allTokenIds.length,
		}
	);
}

/**
 * The same, by a plain model that knows nothing of ours. With `corrected`, without the original's
 * defects.
 */
function model(
	/** @type {Json} */ { block_size: block, blocks_in_chunk: chunk, events },
	/** @type {boolean} */ corrected,
) {
	/** @type {Map<string, Json>} */
	const requests = new Map();
	/** @type {Map<string, Json>} */
	const trackers = new Map();
	return events.map((/** @type {Json} */ event) => {
		const { op, request_id: id } = event;
		const request = requests.get(id);
		/** @type {Json[]} */
		const calls = [];
		/** @type {Json} */
		const seen = { calls };
		if (op === "new_request") {
			const { num_prompt_tokens: tokens, num_block_hashes: hashes, cache_salt: salt } = event;
			requests.set(id, { tokens, hashes, salt: salt ?? "", params: event.kv_transfer_params });
			return undefined;
		}
		if (op === "append_output_tokens") {
			Object.assign(request, { tokens: event.num_tokens, hashes: event.num_block_hashes });
			return undefined;
		}
		if (op === "preempt") {
			return undefined;
		}
		if (op === "get_num_new_matched_tokens") {
			const { num_computed_tokens: computed, lookup_result: found } = event;
			const preempted = event.status === "PREEMPTED";
			if (!trackers.has(id) || (preempted && trackers.get(id).state !== "PREFETCHING")) {
				const fresh = { scheduled: 0, local: 0, external: 0, stored: 0, state: "PREFETCHING" };
				trackers.set(id, { ...fresh, blocks: [] });
			}
			const tracker = trackers.get(id);
			if (preempted) {
				seen.ret = [0, false];
			} else {
				const call = "maybe_submit_lookup_request";
				const { tokens: num_token_ids, salt: cache_salt } = request;
				calls.push({ call, request_id: id, num_token_ids, cache_salt });
				if (found === null) {
					seen.ret = [null, true];
				} else if (found % (block * chunk) !== 0) {
					seen.error = true;
				} else {
					if (found > 0 || corrected) {
						tracker.local = Math.floor(computed / block);
					}
					if (found > 0) {
						tracker.external = found / block;
						tracker.stored = found / block + (corrected ? 0 : tracker.stored);
					}
					const usable = corrected ? Math.min(found, request.tokens - 1) : found;
					const rest = Math.max(0, usable - computed);
					seen.ret = [rest, rest > 0];
				}
			}
		} else if (op === "update_state_after_alloc") {
			const tracker = trackers.get(id);
			tracker.blocks = event.block_ids;
			seen.ret = null;
			if (tracker.state === "PREFETCHING") {
				calls.push({ call: "cleanup_lookup_result", request_id: id });
				const loads = tracker.external > tracker.local && event.num_external_tokens > 0;
				tracker.state = loads ? "WAITING_FOR_LOAD" : "READY";
				const end = (loads ? tracker.local : tracker.external) * block;
				if (tracker.external > 0 && end > 0) {
					const call = "free_lookup_locks";
					calls.push({ call, request_id: id, start: 0, end, num_token_ids: request.tokens });
				}
			}
		} else if (op === "build_connector_meta") {
			seen.ret = [];
			const add = (
				/** @type {string} */ name,
				/** @type {string} */ direction,
				/** @type {number} */ from,
				/** @type {number} */ to,
				skip = 0,
			) => {
				const { salt, tokens } = requests.get(name);
				seen.ret.push({
					request_id: name,
					direction,
					start: from * block,
					end: to * block,
					block_ids: trackers.get(name).blocks.slice(from, to),
					skip_first_n_tokens: skip * block,
					cache_salt: salt,
					num_token_ids: tokens,
				});
			};
			for (const [name, tracker] of trackers) {
				if (tracker.state === "WAITING_FOR_LOAD") {
					const from = tracker.local - (tracker.local % chunk);
					add(name, "RETRIEVE", from, tracker.external, tracker.local - from);
					tracker.state = "READY";
				}
			}
			/** @type {Json[]} */
			const records = [];
			const run = (/** @type {string} */ name, /** @type {number[]} */ added) => {
				const tracker = trackers.get(name);
				const { hashes, tokens } = requests.get(name);
				tracker.scheduled += event.num_scheduled_tokens[name];
				const there =
					Math.floor(tracker.scheduled / block) + Math.max(tracker.local, tracker.external);
				const ready = Math.min(hashes, tracker.blocks.length, there) - tracker.stored;
				const chunks = Math.floor(ready / chunk);
				if (chunks > 0) {
					const to = tracker.stored + chunks * chunk;
					add(name, "STORE", tracker.stored, to);
					tracker.stored = to;
				}
				if (added.length > 0) {
					const first = (tracker.blocks.length - added.length) * block;
					const count = Math.max(0, Math.min(tokens, tracker.blocks.length * block) - first);
					records.push({
						request_id: name,
						new_block_ids: added,
						num_new_token_ids: count,
						first_token: count > 0 ? first : null,
					});
				}
			};
			for (const name of event.new) {
				run(name, trackers.get(name).blocks);
			}
			for (const { request_id: name, new_block_ids: added, resumed } of event.cached) {
				if (!resumed) {
					const tracker = trackers.get(name);
					tracker.blocks = [...tracker.blocks, ...(added ?? [])];
				}
				run(name, added ?? []);
			}
			if (records.length > 0) {
				calls.push({ call: "report_block_allocations", records });
			}
		} else {
			const { external, local } = trackers.get(id);
			const { params } = request;
			const key = "num_lmcache_extra_cached_tokens";
			const extra = params && key in params ? { [key]: Math.max(0, external - local) * block } : {};
			seen.ret = [true, params && extra];
			calls.push({ call: "end_session", request_id: id });
			trackers.delete(id);
		}
		seen.trackers = Object.fromEntries(
			Object.keys(event.trackers).map((name) => {
				const tracker = trackers.get(name);
				const { tokens, hashes } = requests.get(name);
				return [
					name,
					tracker && {
						num_scheduled_tokens: tracker.scheduled,
						num_vllm_hit_blocks: tracker.local,
						num_lmcache_hit_blocks: tracker.external,
						num_stored_blocks: tracker.stored,
						state: tracker.state,
						allocated_block_ids: tracker.blocks,
						num_block_hashes: hashes,
						num_tokens: tokens,
					},
				];
			}),
		);
		return seen;
	});
}

/** What a scenario says of an event, in the form of `ours`. */
function oracle(/** @type {Json} */ event) {
	const { ret, error, calls, trackers } = event;
	if (trackers === undefined) {
		return undefined;
	}
	return error ? { calls, error: true, trackers } : { calls, ret, trackers };
}

/**
 * The known defects of the original: each finds the event with its first effect, or -1, from what goes
 * into the connector alone.
 *
 * @type {[string, (scenario: Json) => number][]}
 */
const DEFECTS = [
	[
		"a local hit without an external hit under-stores",
		({ block_size, events }) =>
			events.findIndex(
				(/** @type {Json} */ event) =>
					isLookup(event) && event.lookup_result === 0 && event.num_computed_tokens >= block_size,
			),
	],
	[
		"asking again after a failed allocation counts stored blocks twice",
		({ events }) => {
			/** Requests that were answered with a hit and have no blocks yet. @type {Set<string>} */
			const answered = new Set();
			return events.findIndex((/** @type {Json} */ event) => {
				if (event.op === "update_state_after_alloc" || event.op === "request_finished") {
					answered.delete(event.request_id);
				}
				const hit = isLookup(event) && event.lookup_result > 0;
				const again = hit && answered.has(event.request_id);
				if (hit) {
					answered.add(event.request_id);
				}
				return again;
			});
		},
	],
	[
		"a full-prompt hit leaves no token to compute",
		({ events }) => {
			/** @type {Map<string, number>} */
			const tokens = new Map();
			return events.findIndex((/** @type {Json} */ event) => {
				if (event.op === "new_request") {
					tokens.set(event.request_id, event.num_prompt_tokens);
				}
				return (
					isLookup(event) &&
					event.lookup_result === tokens.get(event.request_id) &&
					event.num_computed_tokens < event.lookup_result
				);
			});
		},
	],
];

/** Whether an event asks the cache; after a preemption vLLM's connector does not. */
function isLookup(/** @type {Json} */ { op, status }) {
	return op === "get_num_new_matched_tokens" && status !== "PREEMPTED";
}

function scenario(/** @type {Json} */ item) {
	const original = item.events.map(oracle);
	// The model has to know the original before it may say what is right instead.
	if (!isDeepStrictEqual(model(item, false), original)) {
		return false;
	}
	const effects = DEFECTS.map(([, find]) => find(item));
	const shown = effects.filter((at) => at >= 0);
	const first = Math.min(item.events.length, ...shown);
	const right = [...original.slice(0, first), ...model(item, true).slice(first)];
	if (!isDeepStrictEqual(ours(item), right)) {
		return false;
	}
	const defects = DEFECTS.filter((_, i) => effects[i] === first).map(([name]) => name);
	return shown.length === 0 || { [EXCUSED]: defects.join("; ") };
}

/** LMCache's own connector, step by step. */
function probe(/** @type {Json} */ item) {
	const { adapter, calls, answer } = recorder(item.tokens_per_chunk);
	const connector = new kvferry.SchedulerConnector({ adapter, planner: "lmcache" });
	/** @type {Json} */
	const request = {
		...requestOf({ request_id: "r", num_prompt_tokens: item.num_tokens }),
		numComputedTokens: undefined,
	};
	return item.steps.every((/** @type {Json} */ step) => {
		calls.length = 0;
		const [name, first, second] = step.call;
		request.status = step.status ?? request.status;
		let ret;
		switch (name) {
			case "match":
				answer.result = second;
				ret = connector.getNumNewMatchedTokens(request, first);
				break;
			case "alloc":
				connector.updateStateAfterAlloc(request, [...Array(first).keys()], second);
				break;
			case "set_state": // what planning the load does
				connector.buildConnectorMeta({
					scheduledNewReqs: [],
					scheduledCachedReqs: [],
					numScheduledTokens: {},
				});
				break;
			case "set_computed":
				request.numComputedTokens = first;
				break;
			case "status":
				request.status = first;
				break;
			default:
				throw new Error(`no step ${name} is known`);
		}
		const made = calls.map(({ call, cache_salt, start, end }) => {
			switch (call) {
				case "maybe_submit_lookup_request":
					return ["lookup", cache_salt !== ""];
				case "cleanup_lookup_result":
					return ["cleanup"];
				default:
					return [call, start, end];
			}
		});
		const tracker = connector.tracker("r");
		const blocks = tracker?.allocatedBlockIds[0]?.length ?? 0;
		const left = {
			num_scheduled_tokens: tracker?.numScheduledTokens,
			num_vllm_hit_tokens: tracker?.numLocalHitTokens,
			num_lmcache_hit_tokens: tracker?.numExternalHitTokens,
			num_stored_tokens: tracker?.numStoredTokens,
			state: tracker?.state,
			allocated: blocks > 0 ? { 0: blocks } : {},
		};
		return (
			isDeepStrictEqual(ret, step.ret) &&
			isDeepStrictEqual(made, step.adapter_calls) &&
			isDeepStrictEqual(left, { ...step.tracker, state: stateOf(step.tracker.state) })
		);
	});
}
