import { checkHandle, checkIterable, checkOptions, invalid, warningsTo } from "../arguments.js";
import {
	PARALLELISM_OPTIONS,
	type ParallelismOptions,
	type ParallelStrategy,
	strategyOf,
} from "../parallel.js";
import type { KvCacheLayout, LayerKv, WorkerAdapter } from "./adapter.js";
import {
	blocksToFill,
	type ConnectorMetadata,
	type LoadStoreOp,
	readMetadata,
	type SaltedMetadata,
} from "./metadata.js";

/** Options of {@link WorkerConnector}. */
export type WorkerConnectorOptions = ParallelismOptions & {
	/** The cache. */
	readonly adapter: WorkerAdapter;
	/** Gets each warning once. Default: `process.emitWarning`. */
	readonly onWarning?: ((message: string) => void) | undefined;
};

const OPTIONS = {
	...PARALLELISM_OPTIONS,
	adapter: true,
	onWarning: true,
} satisfies Record<keyof WorkerConnectorOptions, true>;

/**
 * A worker's side of KV offloading, with the methods of vLLM's connectors: it carries out what the
 * scheduler's side planned. For each step: `bindConnectorMetadata`, `startLoadKv`, compute (before each layer
 * `waitForLayerLoad`, after it `saveKvLayer`), `waitForSave`, `getFinished`, `getBlockIdsWithLoadErrors`.
 */
export class WorkerConnector implements AsyncDisposable {
	/** Where this worker stands, and whether it stores. */
	readonly parallelStrategy: ParallelStrategy;
	readonly #adapter: WorkerAdapter;
	readonly #warn: (message: string) => void;
	#warned = false;
	#metadata = readMetadata({ requests: [] });
	#layers: readonly string[] = [];
	/** This step's loads, if the step waits for them. */
	#loads: Promise<void> | undefined;
	/** Loads that were refused here, and that nobody else reports. */
	readonly #refused = { requests: new Set<string>(), blocks: new Set<number>() };
	/** Requests whose load the engine does not hear of by `getFinished`. */
	readonly #synchronous = new Set<string>();
	#shutdown: Promise<void> | undefined;

	/** @throws `INVALID_ARGUMENT` for a strategy that contradicts itself, and options that it does not know. */
	constructor(options: WorkerConnectorOptions) {
		checkOptions("WorkerConnector", options, OPTIONS);
		checkHandle("adapter", options.adapter, "registerKvCaches", "give createWorkerAdapter({ … })");
		this.parallelStrategy = strategyOf(options);
		this.#adapter = options.adapter;
		this.#warn = warningsTo(options.onWarning);
	}

	/**
	 * Announces the memory that KV is copied from and to, by the names of the layers, in the model's order. It
	 * must stay as it is until {@link WorkerConnector.shutdown}.
	 *
	 * @throws `INVALID_ARGUMENT` for memory that is not as `layout` says.
	 */
	async registerKvCaches(
		kvCaches: Readonly<Record<string, LayerKv>>,
		layout: KvCacheLayout,
	): Promise<void> {
		await this.#adapter.registerKvCaches(kvCaches, layout);
		this.#layers = Object.keys(kvCaches);
	}

	/**
	 * Takes in what this step loads and stores.
	 *
	 * @throws `INVALID_ARGUMENT` for what is no metadata, counts and ranges that cannot be, and block ids that are
	 * no integers from 0 on; `INVALID_SALT`. What was bound before stays.
	 */
	bindConnectorMetadata(metadata: ConnectorMetadata): void {
		this.#metadata = readMetadata(metadata);
	}

	/** Begins this step's loads. */
	startLoadKv(): void {
		const { requests, loadAsync } = this.#metadata;
		const loads = this.#allowed(requests.filter(({ direction }) => direction === "RETRIEVE"));
		for (const { requestId } of loadAsync ? [] : loads) {
			this.#synchronous.add(requestId);
		}
		if (loads.length > 0) {
			this.#adapter.batchedSubmitRetrieveRequests(...batchOf(loads));
		}
		this.#loads = loads.length > 0 && !loadAsync ? this.#adapter.waitForLoads() : undefined;
	}

	/**
	 * Resolves when a layer is loaded, those before it too, or when its load has failed: which blocks are good,
	 * {@link WorkerConnector.getBlockIdsWithLoadErrors} tells after {@link WorkerConnector.waitForSave}. At once
	 * where loads end between steps. Memory on SharedArrayBuffers or by address is loaded layer by layer, so that
	 * the first layers are computed while later ones are loaded.
	 *
	 * @param layer A name given to {@link WorkerConnector.registerKvCaches}. Default: all layers.
	 * @throws `INVALID_ARGUMENT` for a name that was not.
	 */
	async waitForLayerLoad(layer?: string): Promise<void> {
		const place = layer === undefined ? undefined : this.#layers.indexOf(layer);
		if (place === -1) {
			throw invalid(`no layer ${layer} is registered: they are ${this.#layers.join(", ")}`);
		}
		if (
			place === undefined ||
			this.#loads === undefined ||
			this.#adapter.waitForLayer === undefined
		) {
			await this.#loads;
			return;
		}
		await this.#adapter.waitForLayer(place);
	}

	/** Tells that a layer is computed. Layers are stored together, in {@link WorkerConnector.waitForSave}. */
	saveKvLayer(_layerName?: string): void {}

	/**
	 * Stores what this step planned, to be called when the step is computed. When it resolves, blocks may be
	 * computed anew or given to others; what the cache could not take until then is not stored.
	 */
	async waitForSave(): Promise<void> {
		await this.#loads; // all that failed of them is known when the step ends
		if (this.parallelStrategy.storesKv) {
			const { requests } = this.#metadata;
			const stores = this.#allowed(requests.filter(({ direction }) => direction === "STORE"));
			if (stores.length > 0) {
				this.#adapter.batchedSubmitStoreRequests(...batchOf(stores));
			}
		}
		this.#metadata = readMetadata({ requests: [] });
		await this.#adapter.waitForSaves();
	}

	/**
	 * What ended since the last call. A request counts when all workers have told it.
	 *
	 * @param finishedRequestIds Requests that the engine ended since: finished or aborted.
	 * @returns Requests that the engine ended and whose blocks it may give to others, each once, from workers that
	 * store nothing too; and requests whose load has ended, well or not.
	 */
	getFinished(
		finishedRequestIds: ReadonlySet<string>,
	): [finishedSending: Set<string>, finishedRecving: Set<string>] {
		checkIterable("finishedRequestIds", finishedRequestIds);
		const [sending, recving] = this.#adapter.getFinished(finishedRequestIds);
		for (const requestId of this.#refused.requests) {
			recving.add(requestId);
		}
		this.#refused.requests.clear();
		for (const requestId of recving) {
			if (this.#synchronous.delete(requestId)) {
				recving.delete(requestId);
			}
		}
		return [sending, recving];
	}

	/** Blocks that were to be loaded and do not hold what they should, since the last call. */
	getBlockIdsWithLoadErrors(): Set<number> {
		const failed = this.#adapter.getBlockIdsWithLoadErrors();
		for (const block of this.#refused.blocks) {
			failed.add(block);
		}
		this.#refused.blocks.clear();
		return failed;
	}

	/** Ends everything, once nothing is copied any more. Calling it again does nothing. */
	async shutdown(): Promise<void> {
		this.#shutdown ??= this.#adapter.shutdown();
		await this.#shutdown;
	}

	/** The same as {@link WorkerConnector.shutdown}. */
	async [Symbol.asyncDispose](): Promise<void> {
		await this.shutdown();
	}

	/** What the adapter may see: nothing with a salt that it would lose on the way. */
	#allowed(requests: readonly SaltedMetadata[]): readonly SaltedMetadata[] {
		if (this.#adapter.carriesSalt === true) {
			return requests;
		}
		const refused = requests.filter(({ cacheSalt }) => cacheSalt !== "");
		for (const { requestId, direction, op } of refused) {
			if (direction === "RETRIEVE") {
				if (this.#metadata.loadAsync) {
					this.#refused.requests.add(requestId);
				}
				for (const block of blocksToFill(op)) {
					this.#refused.blocks.add(block);
				}
			}
		}
		if (refused.length > 0 && !this.#warned) {
			this.#warned = true;
			this.#warn(
				"The worker's adapter does not declare carriesSalt, so what has a salt is neither loaded nor " +
					"stored: no tenant may be served what another one stored.",
			);
		}
		return requests.filter(({ cacheSalt }) => cacheSalt === "");
	}
}

function batchOf(requests: readonly SaltedMetadata[]): [string[], LoadStoreOp[], string[]?] {
	const ids = requests.map(({ requestId }) => requestId);
	const ops = requests.map(({ op }) => op);
	const salts = requests.map(({ cacheSalt }) => cacheSalt);
	return salts.some((salt) => salt !== "") ? [ids, ops, salts] : [ids, ops];
}
