// parallel_strategy.json: which piece of a chunk a worker has, and whether it stores it.

import { isDeepStrictEqual } from "node:util";

/** @typedef {import("./outcome.mjs").Json} Json */

/** @type {typeof import("../../ts/index.js")} */
let kvferry;

/** @type {import("./outcome.mjs").Schema} */
export default function parallel(data, built) {
	kvferry = built;
	if (!Array.isArray(data?.extended_rows)) {
		return undefined;
	}
	return [
		["rows", data.rows ?? [], row],
		["extended_rows", data.extended_rows, row],
		["mla_flags", data.mla_flags ?? [], flags],
		["legacy_init_args", data.legacy_init_args ?? [], loose],
	];
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

function row(/** @type {Json} */ item) {
	const of = () =>
		kvferry.ParallelStrategy.of({
			tensorParallelSize: item.tp,
			pipelineParallelSize: item.pp,
			rank: item.rank,
			useMla: item.mla,
			isHybrid: item.is_hybrid,
			numServers: item.n_servers,
			decodeContextParallelSize: item.dcp,
		});
	if (item.validate_dcp_error) {
		return refuses(of);
	}
	const strategy = of();
	const kvRank = strategy.kvRank.toString(16).padStart(8, "0");
	const builtin = {
		kv_world_size: strategy.kvWorldSize,
		kv_worker_id: strategy.kvWorkerId,
		object_kv_rank_hex: kvRank,
		is_first_rank_of_pp_group: strategy.isFirstRankOfTpGroup, // vLLM's name for it
		stores: strategy.storesKv,
	};
	const lmcache = {
		mla_only: strategy.useMla,
		kv_world_size: strategy.kvWorldSize,
		kv_worker_id: strategy.kvWorkerId,
		num_kv_readers: strategy.numKvReaders,
		kv_tp_size: strategy.tensorParallelSize / strategy.numServers,
		ranks_per_server: strategy.ranksPerServer,
		is_kv_event_subscriber: strategy.rank % strategy.ranksPerServer === 0,
		is_kv_writer: strategy.storesKv,
		object_kv_rank_hex: kvRank,
		server_index: strategy.serverIndex,
	};
	return (
		strategy.worldSize === (item.world_size ?? strategy.worldSize) &&
		isDeepStrictEqual(builtin, item.vllm_builtin ?? builtin) &&
		isDeepStrictEqual(lmcache, item.lmcache_0_5_6)
	);
}

/** What is no boolean is not MLA to the original; here it is refused, so that nobody stores for nothing. */
function flags(/** @type {Json} */ item) {
	const given = (/** @type {Json} */ flag) =>
		flag === "<absent>" || flag === null ? undefined : flag;
	const of = () =>
		kvferry.ParallelStrategy.of({
			useMla: given(item.use_mla),
			isHybrid: given(item.is_hybrid),
		});
	return ["boolean", "undefined"].includes(typeof given(item.use_mla))
		? of().useMla === item.mla_only
		: !item.mla_only && refuses(of);
}

function loose(/** @type {Json} */ item) {
	const [kvWorldSize, kvWorkerId, blockSize] = item.args;
	const of = () => kvferry.strategyOf({ kvWorldSize, kvWorkerId, blockSize });
	if (item.error) {
		return refuses(of);
	}
	const strategy = of();
	const seen = {
		mla_only: strategy.useMla,
		vllm_world_size: strategy.worldSize,
		vllm_worker_id: strategy.rank,
		tp_size: strategy.tensorParallelSize,
		pp_size: strategy.pipelineParallelSize,
		n_servers: strategy.numServers,
		dcp_size: strategy.decodeContextParallelSize,
	};
	return (
		isDeepStrictEqual(seen, item.strategy) &&
		strategy.kvWorldSize === item.kv_world_size &&
		strategy.kvWorkerId === item.kv_worker_id &&
		strategy.storesKv
	);
}
