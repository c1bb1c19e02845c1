import {
	checkHandle,
	checkInteger,
	checkObject,
	checkOptions,
	checkText,
	invalid,
	shown,
} from "./arguments.js";
import type { KvConnectors, PagedEngine } from "./connector/offloading.js";
import { KvferryError } from "./errors.js";
import type { KvLoadFailurePolicy } from "./recovery.js";

const BACKENDS: readonly KvOffloadingBackend[] = ["native", "lmcache"];
const ROLES: readonly KvRole[] = ["kv_producer", "kv_consumer", "kv_both"];
const FAILURE_POLICIES: readonly KvLoadFailurePolicy[] = ["fail", "recompute"];

/** Where evicted KV goes: to memory that the connector manages, or to a cache server. */
export type KvOffloadingBackend = "native" | "lmcache";

/** Whether an engine stores KV, loads it, or both. */
export type KvRole = "kv_producer" | "kv_consumer" | "kv_both";

/** Which connector an engine uses, by vLLM's names. */
export interface KvTransferConfig {
	/** The connector's name. Default null: none. */
	readonly kvConnector?: string | null | undefined;
	/** Needed with a connector. Default null. */
	readonly kvRole?: KvRole | null | undefined;
	/** What the connector itself reads. Default `{}`. */
	readonly kvConnectorExtraConfig?: Readonly<Record<string, unknown>> | undefined;
	/** Port between engines, for connectors that have one. Default 14579. */
	readonly kvPort?: number | undefined;
	/** Default "fail". */
	readonly kvLoadFailurePolicy?: KvLoadFailurePolicy | undefined;
	/** vLLM's Python module of the connector: kept, never loaded. Default null. */
	readonly kvConnectorModulePath?: string | null | undefined;
}

/** A {@link KvTransferConfig} whose defaults are filled in. */
export type ResolvedKvTransferConfig = {
	readonly [Name in keyof KvTransferConfig]-?: Exclude<KvTransferConfig[Name], undefined>;
};

/** Options of {@link resolveOffloading}. */
export interface OffloadingOptions {
	/**
	 * GiB, for all ranks together; text is read as a number. With "lmcache" it only switches offloading on,
	 * since the server sets its capacity. Default: off.
	 */
	readonly kvOffloadingSize?: number | string | null | undefined;
	/** Default "native". */
	readonly kvOffloadingBackend?: KvOffloadingBackend | undefined;
	/** Workers that share each layer. Sizes are not divided by it. Default 1. */
	readonly tensorParallelSize?: number | undefined;
	/** Whether the engine computes long prompts in parts. Default false. */
	readonly enableChunkedPrefill?: boolean | undefined;
	/** The connector that was configured already; a size replaces its name and role. Default: none. */
	readonly kvTransferConfig?: KvTransferConfig | null | undefined;
	/**
	 * Environment variables, such as `process.env`: `VLLM_USE_SIMPLE_KV_OFFLOAD`, an integer other than 0,
	 * makes "native" choose SimpleCPUOffloadConnector. Default: none are set.
	 */
	readonly env?: Readonly<Record<string, string | null | undefined>> | undefined;
}

const OPTIONS = {
	kvOffloadingSize: true,
	kvOffloadingBackend: true,
	tensorParallelSize: true,
	enableChunkedPrefill: true,
	kvTransferConfig: true,
	env: true,
} satisfies Record<keyof OffloadingOptions, true>;

/** What {@link resolveOffloading} found: plain data. */
export interface ResolvedOffloading {
	/** GiB; null when off. */
	readonly kvOffloadingSize: number | null;
	readonly kvOffloadingBackend: KvOffloadingBackend;
	/** The connector's configuration; null when none was given and offloading is off. */
	readonly kvTransferConfig: ResolvedKvTransferConfig | null;
	/** `tcp://host:port` of the server that LMCacheMPConnector connects to; null for other connectors. */
	readonly serverAddress: string | null;
	/** Whether there is a connector. */
	readonly isKvTransferInstance: boolean;
	/** Whether it stores KV. */
	readonly isKvProducer: boolean;
	/** Whether it loads KV. */
	readonly isKvConsumer: boolean;
	/** What is probably not meant, for a person. */
	readonly warnings: readonly string[];
}

/** What makes a connector of one name for an engine. */
export type ConnectorFactory<Engine, Connector> = (
	offloading: ResolvedOffloading,
	engine: Engine,
) => Connector | Promise<Connector>;

/** Loads a factory when its connector is wanted: `async () => (await import("./mine.js")).create`. */
export type ConnectorLoader<Engine, Connector> = () => Promise<ConnectorFactory<Engine, Connector>>;

/** Loaders by the names of their connectors. */
export type ConnectorRegistry<Engine, Connector> = Readonly<
	Record<string, ConnectorLoader<Engine, Connector>>
>;

/**
 * Works out which connector an engine's offloading options mean, as vLLM 0.33 does (pull request 42865). It
 * opens no connection, loads no addon, and leaves its arguments as they are.
 *
 * @throws `INVALID_ARGUMENT` for values that vLLM refuses, and for ExampleHiddenStatesConnector with chunked
 * prefill, whether or not a size is set.
 *
 * @example
 * ```ts
 * const offloading = resolveOffloading({ kvOffloadingSize: 8, kvOffloadingBackend: "lmcache" });
 * offloading.kvTransferConfig?.kvConnector; // "LMCacheMPConnector"
 * offloading.serverAddress; // "tcp://localhost:5555"
 * ```
 */
export function resolveOffloading(options: OffloadingOptions = {}): ResolvedOffloading {
	checkOptions("resolveOffloading", options, OPTIONS);
	const { kvOffloadingBackend = "native", tensorParallelSize = 1, env = {} } = options;
	const { enableChunkedPrefill = false } = options;
	checkOneOf("kvOffloadingBackend", kvOffloadingBackend, BACKENDS);
	checkInteger("tensorParallelSize", tensorParallelSize, 1, 2 ** 32 - 1);
	if (typeof enableChunkedPrefill !== "boolean") {
		throw invalid("enableChunkedPrefill must be true or false");
	}
	const kvOffloadingSize = sizeOf(options.kvOffloadingSize);
	const given = withDefaults(options.kvTransferConfig);
	if (given?.kvConnector === "ExampleHiddenStatesConnector" && enableChunkedPrefill) {
		throw invalid(
			"ExampleHiddenStatesConnector takes each prompt whole: set enableChunkedPrefill to false, or use " +
				"another connector",
		);
	}
	const kvTransferConfig =
		kvOffloadingSize === null
			? given
			: switchedOn(given ?? withDefaults({}), kvOffloadingBackend, kvOffloadingSize, env);
	const { kvConnector = null, kvRole = null } = kvTransferConfig ?? {};
	const serverAddress =
		kvConnector === "LMCacheMPConnector"
			? addressIn(kvTransferConfig?.kvConnectorExtraConfig ?? {})
			: null;
	const isKvTransferInstance = kvConnector !== null;
	return {
		kvOffloadingSize,
		kvOffloadingBackend,
		kvTransferConfig,
		serverAddress,
		isKvTransferInstance,
		isKvProducer: isKvTransferInstance && kvRole !== "kv_consumer",
		isKvConsumer: isKvTransferInstance && kvRole !== "kv_producer",
		warnings: warningsOf(given, kvTransferConfig, serverAddress),
	};
}

/** The connectors of this package. */
const CONNECTORS: ConnectorRegistry<PagedEngine, KvConnectors> = {
	LMCacheMPConnector: async () => (await import("./connector/offloading.js")).connectToServer,
	OffloadingConnector: async () => (await import("./connector/offloading.js")).offloadHere,
	SimpleCPUOffloadConnector: async () => (await import("./connector/offloading.js")).offloadHere,
};

/**
 * Makes the connectors that {@link resolveOffloading} chose, for the scheduler and the workers of this process:
 * `LMCacheMPConnector` with a server in another process, which may come later; `OffloadingConnector` and
 * `SimpleCPUOffloadConnector` with memory of this process.
 *
 * @returns The connectors, or `undefined` when none is configured.
 * @throws `UNSUPPORTED_OPTION` for a connector of another name; `INVALID_ARGUMENT` for an engine that cannot be, or has
 * options that are not known.
 *
 * @example
 * ```ts
 * const offloading = resolveOffloading({ kvOffloadingSize: 8, kvOffloadingBackend: "lmcache" });
 * const kv = await createConnector(offloading, { modelName: "llama-3.1-8b fp16", blockSize: 16 });
 * kv?.scheduler.getNumNewMatchedTokens(request, 0);
 * ```
 */
export async function createConnector(
	offloading: ResolvedOffloading,
	engine: PagedEngine,
): Promise<KvConnectors | undefined>;
/**
 * Makes the connector that {@link resolveOffloading} chose, by loaders of one's own. Only its own code is loaded.
 *
 * @param engine What the connector's factory needs of the engine.
 * @param registry The loaders.
 * @returns The connector, or `undefined` when none is configured.
 * @throws `UNSUPPORTED_OPTION` for a connector without a loader; the message names the known ones. Errors of
 * loaders and factories come as they are.
 */
export async function createConnector<Engine, Connector>(
	offloading: ResolvedOffloading,
	engine: Engine,
	registry: ConnectorRegistry<Engine, Connector>,
): Promise<Connector | undefined>;
export async function createConnector(
	offloading: ResolvedOffloading,
	engine: unknown,
	registry: ConnectorRegistry<never, unknown> = CONNECTORS,
): Promise<unknown> {
	checkHandle("offloading", offloading, "kvTransferConfig", "give what resolveOffloading returned");
	const name = offloading.kvTransferConfig?.kvConnector ?? null;
	if (name === null) {
		return undefined;
	}
	const load = Object.hasOwn(registry, name) ? registry[name] : undefined;
	if (load === undefined) {
		const known = Object.keys(registry).sort().join(", ") || "none";
		throw new KvferryError(
			"UNSUPPORTED_OPTION",
			`there is no connector ${shown(name)}; known: ${known}. Configure one of them or give its loader`,
		);
	}
	const create = await load();
	return await create(offloading, engine as never);
}

/** As pydantic reads vLLM's `float | None`. */
function sizeOf(given: unknown): number | null {
	if (given === undefined || given === null) {
		return null;
	}
	const size = typeof given === "string" ? numberIn(given) : given;
	if (typeof size === "boolean") {
		return Number(size);
	}
	if (typeof size !== "number" || Number.isNaN(size)) {
		throw invalid(
			`kvOffloadingSize is ${shown(given)}: it must be a number of GiB, or null for off`,
		);
	}
	return size;
}

function numberIn(text: string): number {
	const infinite = /^\s*([+-]?)inf(?:inity)?\s*$/i.exec(text);
	if (infinite !== null) {
		return infinite[1] === "-" ? -Infinity : Infinity;
	}
	const finite = /^\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?\s*$/i;
	return finite.test(text) ? Number(text) : Number.NaN;
}

function withDefaults(given: KvTransferConfig): ResolvedKvTransferConfig;
function withDefaults(given: KvTransferConfig | null | undefined): ResolvedKvTransferConfig | null;
function withDefaults(given: KvTransferConfig | null | undefined): ResolvedKvTransferConfig | null {
	if (given === undefined || given === null) {
		return null;
	}
	checkObject("kvTransferConfig", given);
	const {
		kvConnector = null,
		kvRole = null,
		kvConnectorExtraConfig = {},
		kvPort = 14579,
		kvLoadFailurePolicy = "fail",
		kvConnectorModulePath = null,
		...rest
	} = given;
	for (const name of Object.keys(rest)) {
		throw invalid(
			`kvTransferConfig.${name} is not known: names are in camelCase, as kvConnector, and what a ` +
				"connector itself reads belongs in kvConnectorExtraConfig",
		);
	}
	checkObject("kvConnectorExtraConfig", kvConnectorExtraConfig);
	checkInteger("kvPort", kvPort, 0, 65_535);
	checkOneOf("kvLoadFailurePolicy", kvLoadFailurePolicy, FAILURE_POLICIES);
	if (kvConnectorModulePath !== null) {
		checkText("kvConnectorModulePath", kvConnectorModulePath);
	}
	if (kvRole !== null) {
		checkOneOf("kvRole", kvRole, ROLES);
	}
	if (kvConnector !== null) {
		checkText("kvConnector", kvConnector);
		if (kvRole === null) {
			throw invalid(
				`kvConnector ${shown(kvConnector)} has no kvRole: give one of ${ROLES.join(", ")}`,
			);
		}
	}
	return {
		kvConnector,
		kvRole,
		kvConnectorExtraConfig: { ...kvConnectorExtraConfig },
		kvPort,
		kvLoadFailurePolicy,
		kvConnectorModulePath,
	};
}

function switchedOn(
	given: ResolvedKvTransferConfig,
	backend: KvOffloadingBackend,
	size: number,
	env: Readonly<Record<string, string | null | undefined>>,
): ResolvedKvTransferConfig {
	if (backend === "lmcache") {
		return { ...given, kvConnector: "LMCacheMPConnector", kvRole: "kv_both" };
	}
	return {
		...given,
		kvConnector: wantsSimple(env) ? "SimpleCPUOffloadConnector" : "OffloadingConnector",
		kvRole: "kv_both",
		kvConnectorExtraConfig: { ...given.kvConnectorExtraConfig, cpu_bytes_to_use: size * 2 ** 30 },
	};
}

/** As Python's `bool(int(…))`: an empty text is no integer. */
function wantsSimple(env: Readonly<Record<string, string | null | undefined>>): boolean {
	const flag = env.VLLM_USE_SIMPLE_KV_OFFLOAD ?? "0";
	if (typeof flag !== "string" || !/^\s*[+-]?\d+(?:_\d+)*\s*$/.test(flag)) {
		throw invalid(
			`VLLM_USE_SIMPLE_KV_OFFLOAD is ${shown(flag)}: it must be 0 or 1, or not be set at all`,
		);
	}
	return /[1-9]/.test(flag);
}

function addressIn(extra: Readonly<Record<string, unknown>>): string {
	const { "lmcache.mp.host": host = "tcp://localhost", "lmcache.mp.port": port = 5555 } = extra;
	if (typeof host !== "string" || !/^(?:[a-z]+:\/\/)?(?:[^\s:/[\]]+|\[[\da-f:.]+\])$/i.test(host)) {
		throw invalid(
			`lmcache.mp.host is ${shown(host)}: it must be a host without a port, as "tcp://localhost" or ` +
				'"[::1]"; the port goes to lmcache.mp.port',
		);
	}
	const number = typeof port === "string" && /^\d+$/.test(port) ? Number(port) : port;
	checkInteger("lmcache.mp.port", number, 1, 65_535);
	return `${host.includes("://") ? "" : "tcp://"}${host}:${number}`;
}

function warningsOf(
	given: ResolvedKvTransferConfig | null,
	resolved: ResolvedKvTransferConfig | null,
	serverAddress: string | null,
): string[] {
	const warnings: string[] = [];
	const before = given?.kvConnector ?? null;
	const after = resolved?.kvConnector ?? null;
	const extra = resolved?.kvConnectorExtraConfig ?? {};
	if (before !== null && before !== after) {
		warnings.push(`kvOffloadingSize replaces the connector ${shown(before)} by ${after}.`);
	}
	const { cpu_bytes_to_use: bytes } = extra;
	if (serverAddress === null && typeof bytes === "number" && !(bytes > 0 && bytes < Infinity)) {
		warnings.push(`cpu_bytes_to_use is ${bytes}: no connector can store in that.`);
	}
	if (serverAddress !== null) {
		const capacity = ["lmcache.local_cpu", "lmcache.max_local_cpu_size"].filter(
			(key) => key in extra,
		);
		if (capacity.length > 0) {
			warnings.push(
				`${capacity.join(" and ")} change nothing: the server at ${serverAddress} sets its capacity ` +
					"(kvferry serve --memory).",
			);
		}
		if ("lmcache.mp.server_urls" in extra) {
			warnings.push(
				`lmcache.mp.server_urls is not read: one server is used, ${serverAddress} by lmcache.mp.host ` +
					"and lmcache.mp.port.",
			);
		}
	}
	return warnings;
}

function checkOneOf(name: string, value: unknown, choices: readonly string[]): void {
	if (!choices.some((choice) => choice === value)) {
		throw invalid(`${name} is ${shown(value)}: it must be ${choices.join(" or ")}`);
	}
}
