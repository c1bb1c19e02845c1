import { checkOptions, checkText, invalid, warningsTo } from "../arguments.js";
import { Client } from "../client.js";
import type { ResolvedOffloading } from "../config.js";
import { ParallelStrategy } from "../parallel.js";
import { Server } from "../server.js";
import { createSchedulerAdapter, createWorkerAdapter } from "./cache-adapter.js";
import { SchedulerConnector, type SchedulerConnectorOptions } from "./scheduler.js";
import { WorkerConnector } from "./worker.js";

/** What `createConnector` needs to know of an engine. */
export interface PagedEngine extends Omit<SchedulerConnectorOptions, "adapter" | "blockSize"> {
	/** See {@link CacheAdapterOptions}. */
	readonly modelName: string;
	/** Tokens of a block. Default 16. */
	readonly blockSize?: number | undefined;
	/** The workers of this process, one strategy each. Default: a single one that has all KV. */
	readonly workers?: readonly ParallelStrategy[] | undefined;
	/** Any worker's strategy, for a process with none of its own. Default: that of the first worker. */
	readonly parallelStrategy?: ParallelStrategy | undefined;
	/**
	 * Tokens of a chunk: of a cache in this process, or of a server that is not there yet; one that has others then is not joined.
	 * Of a server that is there its own count, and a warning names both. Default 256.
	 */
	readonly chunkSize?: number | undefined;
	/** See {@link CacheAdapterOptions}. Default 5,000. */
	readonly timeoutMs?: number | undefined;
	/** The token of a server that asks for one. Default: `KVFERRY_TOKEN` of the environment, else none. */
	readonly token?: string | undefined;
	/** Instead: a file that has it. Default: `kvferry.token_file` of the connector's extra configuration. */
	readonly tokenFile?: string | undefined;
	/** Ends the wait for a server. */
	readonly signal?: AbortSignal | undefined;
}

const OPTIONS = {
	modelName: true,
	blockSize: true,
	workers: true,
	parallelStrategy: true,
	chunkSize: true,
	timeoutMs: true,
	token: true,
	tokenFile: true,
	signal: true,
	numBlocks: true,
	relocationWindow: true,
	planner: true,
	saveDecodeCache: true,
	loadAsync: true,
	onWarning: true,
} satisfies Record<keyof PagedEngine, true>;

/** The connectors of one process, and the cache that they share. */
export class KvConnectors implements AsyncDisposable {
	readonly scheduler: SchedulerConnector;
	/** In the order of {@link PagedEngine.workers}. */
	readonly workers: readonly WorkerConnector[];
	/** The server that they are connected to, or the one in this process. */
	readonly via: Client | Server;
	#closing: Promise<void> | undefined;

	/** @internal */
	constructor(via: Client | Server, engine: PagedEngine) {
		const { modelName, timeoutMs, workers = [ParallelStrategy.single()], onWarning } = engine;
		const parallelStrategy = engine.parallelStrategy ?? workers[0];
		if (parallelStrategy === undefined) {
			throw invalid(
				"workers is empty: a process without workers of its own gives a parallelStrategy",
			);
		}
		this.via = via;
		const adapter = createSchedulerAdapter({ via, modelName, timeoutMs, parallelStrategy });
		const { blockSize, numBlocks, relocationWindow, planner, saveDecodeCache, loadAsync } = engine;
		this.scheduler = new SchedulerConnector({
			adapter,
			blockSize,
			numBlocks,
			relocationWindow,
			planner,
			saveDecodeCache,
			loadAsync,
			onWarning,
		});
		this.workers = workers.map((parallelStrategy) => {
			const options = { via, modelName, timeoutMs, parallelStrategy };
			const adapter = createWorkerAdapter(options);
			return new WorkerConnector({ adapter, parallelStrategy, onWarning });
		});
	}

	/** Shuts the workers down, then closes {@link KvConnectors.via}. Calling it again does nothing. */
	async close(): Promise<void> {
		this.#closing ??= Promise.all(this.workers.map((worker) => worker.shutdown())).then(() =>
			this.via.close(),
		);
		await this.#closing;
	}

	/** The same as {@link KvConnectors.close}. */
	async [Symbol.asyncDispose](): Promise<void> {
		await this.close();
	}
}

function checkEngine(engine: PagedEngine): void {
	checkOptions("createConnector", engine, OPTIONS);
	const { workers = [] } = engine;
	if (!Array.isArray(workers) || !workers.every((worker) => worker instanceof ParallelStrategy)) {
		throw invalid(
			"workers must be an array with a ParallelStrategy for each worker of this process",
		);
	}
	const sizes = new Set(workers.map(({ worldSize }) => worldSize));
	if (sizes.size > 1) {
		throw invalid(`workers are ranks of ${[...sizes].join(" and of ")}: all are of one engine`);
	}
	const ranks = workers.map(({ rank }) => rank);
	const twice = ranks.find((rank, at) => ranks.indexOf(rank) < at);
	if (twice !== undefined) {
		throw invalid(`two workers have rank ${twice}: nothing hits that another rank has not stored`);
	}
}

/** LMCacheMPConnector: a server in another process, which may come later. */
export async function connectToServer(
	{ serverAddress, kvTransferConfig }: ResolvedOffloading,
	engine: PagedEngine,
): Promise<KvConnectors> {
	checkEngine(engine);
	const { chunkSize, signal, onWarning, token } = engine;
	const { "kvferry.token_file": configured } = kvTransferConfig?.kvConnectorExtraConfig ?? {};
	if (configured !== undefined) {
		checkText("kvferry.token_file", configured);
	}
	const tokenFile = engine.tokenFile ?? (token === undefined ? configured : undefined);
	const via = await Client.connect({
		url: serverAddress ?? "tcp://localhost:5555",
		whenUnreachable: "warn",
		token,
		tokenFile,
		...(chunkSize === undefined ? {} : { chunkSize }),
		...(signal === undefined ? {} : { signal }),
		...(onWarning === undefined ? {} : { onWarning }),
	});
	if (chunkSize !== undefined && via.chunkSize !== chunkSize) {
		warningsTo(onWarning)(
			`chunkSize is ${chunkSize}, and the server at ${via.url} has chunks of ${via.chunkSize} tokens, which count: leave it ` +
				`out, or start the server with --chunk-size ${chunkSize}`,
		);
	}
	return await withVia(via, engine);
}

/** OffloadingConnector and SimpleCPUOffloadConnector: memory of this process. */
export async function offloadHere(
	{ kvTransferConfig }: ResolvedOffloading,
	engine: PagedEngine,
): Promise<KvConnectors> {
	checkEngine(engine);
	const bytes = kvTransferConfig?.kvConnectorExtraConfig.cpu_bytes_to_use;
	if (typeof bytes !== "number" || !(bytes >= 4096)) {
		throw invalid(
			`cpu_bytes_to_use is ${String(bytes)}: it must be the bytes to offload to, 4096 or more; ` +
				"kvOffloadingSize sets it, in GiB",
		);
	}
	const { chunkSize = 256, signal } = engine;
	const via = await Server.start({
		listen: false,
		memory: Math.floor(bytes),
		chunkSize,
		...(signal === undefined ? {} : { signal }),
	});
	return await withVia(via, engine);
}

async function withVia(via: Client | Server, engine: PagedEngine): Promise<KvConnectors> {
	try {
		return new KvConnectors(via, engine);
	} catch (error) {
		await via.close();
		throw error;
	}
}
