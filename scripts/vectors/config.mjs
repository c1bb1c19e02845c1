// offload_config.json: which connector the offloading options mean.

import { isDeepStrictEqual } from "node:util";

/** @typedef {import("./outcome.mjs").Json} Json */
/** @typedef {import("../../ts/index.js").ResolvedOffloading} ResolvedOffloading */

/** @type {typeof import("../../ts/index.js")} */
let kvferry;

/** @type {import("./outcome.mjs").Schema} */
export default function config(data, built) {
	kvferry = built;
	return "kv_offloading_size" in (data?.cases?.[0] ?? {})
		? [["cases", data.cases, offloading]]
		: undefined;
}

function offloading(/** @type {Json} */ item) {
	/** @type {Json} */
	const options = {
		kvOffloadingSize: item.kv_offloading_size,
		tensorParallelSize: item.tensor_parallel_size,
		kvTransferConfig: camelCase(item.existing_kv_transfer_config),
		env: item.env,
	};
	// null stands for None, which is refused, and for nothing given, which is the default.
	if (item.kv_offloading_backend !== null || item.cache_config_error) {
		options.kvOffloadingBackend = item.kv_offloading_backend;
	}
	const before = structuredClone(options);
	const passed =
		item.cache_config_error || item.kv_transfer_config_error || item.error
			? refuses(options) && (!item.partial_kv_transfer_config || untouched(item, options))
			: agrees(kvferry.resolveOffloading(options), item);
	return passed && isDeepStrictEqual(options, before);
}

function agrees(/** @type {ResolvedOffloading} */ resolved, /** @type {Json} */ item) {
	const { cache_config, flags, cpu_bytes_type } = item;
	const bytes = resolved.kvTransferConfig?.kvConnectorExtraConfig.cpu_bytes_to_use;
	return (
		same(resolved.kvOffloadingSize, cache_config.kv_offloading_size) &&
		(resolved.kvOffloadingSize === null) === (cache_config.type === "NoneType") &&
		resolved.kvOffloadingBackend === cache_config.kv_offloading_backend &&
		same(snakeCase(resolved.kvTransferConfig), item.result) &&
		(typeof bytes === "number") === ["int", "float"].includes(cpu_bytes_type) &&
		same(
			{
				is_kv_transfer_instance: resolved.isKvTransferInstance,
				is_kv_producer: resolved.isKvProducer,
				is_kv_consumer: resolved.isKvConsumer,
			},
			flags ?? {
				is_kv_transfer_instance: false,
				is_kv_producer: false,
				is_kv_consumer: false,
			},
		)
	);
}

/** vLLM has changed its configuration by the time it refuses; ours is what was given. */
function untouched(/** @type {Json} */ item, /** @type {Json} */ options) {
	const { kvTransferConfig } = kvferry.resolveOffloading({
		kvTransferConfig: options.kvTransferConfig ?? {},
	});
	return same(snakeCase(kvTransferConfig), item.partial_kv_transfer_config);
}

/** Whether these options are refused as INVALID_ARGUMENT. */
function refuses(/** @type {Json} */ options) {
	try {
		kvferry.resolveOffloading(options);
		return false;
	} catch (error) {
		return error instanceof kvferry.KvferryError && error.code === "INVALID_ARGUMENT";
	}
}

/** Equal, where the vectors write what is not finite as text. */
function same(/** @type {Json} */ ours, /** @type {Json} */ theirs) {
	const written = JSON.stringify(ours, (_, value) =>
		typeof value === "number" && !Number.isFinite(value)
			? String(value).replace("Infinity", "inf")
			: value,
	);
	return isDeepStrictEqual(JSON.parse(written), theirs);
}

/** The names of an object's own fields in JavaScript's spelling; what is in them stays. */
function camelCase(/** @type {Json} */ object) {
	return renamed(object, (name) => name.replace(/_(\w)/g, (_, letter) => letter.toUpperCase()));
}

function snakeCase(/** @type {Json} */ object) {
	return renamed(object, (name) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`));
}

function renamed(/** @type {Json} */ object, /** @type {(name: string) => string} */ rename) {
	return object === null
		? null
		: Object.fromEntries(Object.entries(object).map(([name, value]) => [rename(name), value]));
}
