import { setImmediate as nextTurn } from "node:timers/promises";
import {
	checkInteger,
	checkObject,
	checkOptions,
	checkText,
	checkTokenIds,
	checkVia,
	invalid,
	shown,
} from "../arguments.js";
import type { Client } from "../client.js";
import { KvferryError, wrap } from "../errors.js";
import type { KvEvents } from "../events.js";
import { native } from "../native.js";
import type { PagedWorker as NativeWorker, PagedPlace, PagedScheduler } from "../native-binding.js";
import {
	PARALLELISM_OPTIONS,
	type ParallelismOptions,
	type ParallelStrategy,
	strategyOf,
} from "../parallel.js";
import type { Server } from "../server.js";
import { saltOf } from "../tracker.js";
import { waitFor } from "../waiting.js";
import type {
	KvCacheLayout,
	LayerKv,
	SaltOption,
	SchedulerAdapter,
	WorkerAdapter,
} from "./adapter.js";
import { arraysOf, checkApart, gpuOf, registerArrays } from "./kv-arrays.js";
import { blocksToFill, checkOperation, type LoadStoreOp } from "./metadata.js";

const U32_MAX = 2 ** 32 - 1;

/** Options of {@link createSchedulerAdapter} and {@link createWorkerAdapter}. */
export type CacheAdapterOptions = ParallelismOptions & {
	/** Where the cache is: a server in another process, or one in this process. */
	readonly via: Client | Server;
	/**
	 * Names the model and all that its KV depends on besides tokens and salt (weights, precision, rotary
	 * settings, …): who uses the same name shares KV. Without `@`, at most 4,096 bytes. vLLM gives its `model`.
	 */
	readonly modelName: string;
	/**
	 * Milliseconds that the cache has for each answer, 1 to 2³¹ − 1; then it is a miss, or not stored. A
	 * {@link Client} gives up after 5,000 in any case. Default 5,000.
	 */
	readonly timeoutMs?: number | undefined;
	/**
	 * Milliseconds that a worker's `waitForSaves` waits for the cache to have room ready, 0 to 2³¹ − 1; what has
	 * none by then is not stored, so that no engine stands still for a store. Default 100.
	 */
	readonly saveTimeoutMs?: number | undefined;
	/**
	 * `"always"`: a worker sums what it stores (CRC-64/NVME of each object) and what it loads, while it copies; what
	 * is not what was stored is dropped from the cache and computed anew. Needs a server that keeps checksums
	 * (kvferry's); what was stored without one (by vLLM, or by workers with `"never"`) is not loaded. Not for a GPU's
	 * memory. Default `"never"`: memory is trusted.
	 */
	readonly verify?: "always" | "never" | undefined;
};

const OPTIONS = {
	...PARALLELISM_OPTIONS,
	via: true,
	modelName: true,
	timeoutMs: true,
	saveTimeoutMs: true,
	verify: true,
} satisfies Record<keyof CacheAdapterOptions, true>;

/** The names of {@link KvCacheLayout}: one that is misspelt would be its default, and blocks be read otherwise than they lie. */
const LAYOUT = {
	numBlocks: true,
	blockSize: true,
	numKvHeads: true,
	headSize: true,
	dtype: true,
	planes: true,
	kvLayout: true,
	blockStride: true,
	device: true,
	stream: true,
} satisfies Record<keyof KvCacheLayout, true>;

/** A {@link SchedulerAdapter} of {@link createSchedulerAdapter}. */
export interface CacheSchedulerAdapter extends SchedulerAdapter {
	/** Lookups whose result is not fetched and cleaned up yet. */
	readonly pendingLookups: number;
	/** Why the latest request to the cache failed; undefined when it did not. */
	readonly failure: KvferryError | undefined;
}

/** A {@link WorkerAdapter} of {@link createWorkerAdapter}. */
export interface CacheWorkerAdapter extends WorkerAdapter, AsyncDisposable {
	/** Loads and stores that have not ended. */
	readonly pendingOperations: number;
	/** Chunks that this worker stored. */
	readonly storedChunks: number;
	/** Stores that were given up because the cache had no room ready in time. */
	readonly droppedStores: number;
	/** Why the latest load or store failed; undefined when it did not. */
	readonly failure: KvferryError | undefined;
	/** Resolves when every store so far has ended: others find what was stored. `waitForSaves` waits for copies only. */
	flush(): Promise<void>;
}

/**
 * What a {@link SchedulerConnector} needs of a cache.
 *
 * @throws `INVALID_ARGUMENT` for a model name with `@`, or a strategy that contradicts itself.
 *
 * @example
 * ```ts
 * const adapter = createSchedulerAdapter({ via: client, modelName: "llama-3.1-8b fp16" });
 * const connector = new SchedulerConnector({ adapter, blockSize: 16 });
 * ```
 */
export function createSchedulerAdapter(options: CacheAdapterOptions): CacheSchedulerAdapter {
	return new NativeSchedulerAdapter(options);
}

/**
 * What a {@link WorkerConnector} needs of a cache.
 *
 * @throws `INVALID_ARGUMENT` for a strategy that contradicts itself.
 */
export function createWorkerAdapter(options: CacheAdapterOptions): CacheWorkerAdapter {
	return new NativeWorkerAdapter(options);
}

class NativeSchedulerAdapter implements CacheSchedulerAdapter {
	readonly carriesSalt = true;
	readonly chunkSize: number;
	readonly #native: PagedScheduler;
	readonly #timeoutMs: number;
	/** The tokens found, or null while that is not known. */
	readonly #lookups = new Map<string, { found: number | null }>();
	#failure: KvferryError | undefined;
	readonly #via: Client | Server;
	/** Events that nobody took yet, and where to read on. */
	#events: KvEvents | undefined;
	#cursor = 0;
	#incarnation = "";
	#asking = false;

	constructor(options: CacheAdapterOptions) {
		const { strategy, place, timeoutMs } = read("createSchedulerAdapter", options);
		this.#via = options.via;
		this.chunkSize = options.via.chunkSize;
		this.#native = options.via.openScheduler(place(strategy));
		this.#timeoutMs = timeoutMs;
	}

	get pendingLookups(): number {
		return this.#lookups.size;
	}

	get failure(): KvferryError | undefined {
		return this.#failure;
	}

	maybeSubmitLookupRequest(
		requestId: string,
		tokenIds: readonly number[] | Uint32Array,
		options?: SaltOption,
	): void {
		checkText("requestId", requestId);
		if (this.#lookups.has(requestId)) {
			return;
		}
		const tokens = tokensOf(tokenIds);
		const end = tokens.length - (tokens.length % this.chunkSize);
		const cacheSalt = saltOf(options ?? {});
		const lookup: { found: number | null } = { found: null };
		this.#lookups.set(requestId, lookup);
		if (end === 0) {
			lookup.found = 0;
			return;
		}
		this.#run(
			() => this.#native.lookup(tokens, { requestId, start: 0, end, cacheSalt }, this.#timeoutMs),
			(chunks) => {
				lookup.found = chunks * this.chunkSize;
			},
			() => {
				lookup.found = 0;
			},
		);
	}

	checkLookupResult(requestId: string): number | null {
		const lookup = this.#lookups.get(requestId);
		return lookup === undefined ? 0 : lookup.found;
	}

	cleanupLookupResult(requestId: string): void {
		this.#lookups.delete(requestId);
	}

	freeLookupLocks(
		requestId: string,
		tokenIds: readonly number[] | Uint32Array,
		start: number,
		end: number,
		options?: SaltOption,
	): void {
		checkText("requestId", requestId);
		checkTokenIds("tokenIds", tokenIds);
		checkInteger(`end of ${requestId}`, end, 0, tokenIds.length);
		checkInteger(`start of ${requestId}`, start, 0, end);
		const cacheSalt = saltOf(options ?? {});
		const first = Math.ceil(start / this.chunkSize) * this.chunkSize;
		const last = end - (end % this.chunkSize);
		if (last <= first) {
			return;
		}
		const tokens = tokensOf(tokenIds, last);
		const range = { requestId, start: first, end: last, cacheSalt };
		this.#run(() => this.#native.release(tokens, range, this.#timeoutMs));
	}

	endSession(requestId: string): void {
		checkText("requestId", requestId);
		this.#lookups.delete(requestId);
		this.#run(() => this.#native.endSession(requestId, this.#timeoutMs));
	}

	takeEvents(): KvEvents | undefined {
		const taken = this.#events;
		this.#events = undefined;
		if (!this.#asking) {
			this.#asking = true;
			const asked = this.#via.events({ cursor: this.#cursor, timeoutMs: this.#timeoutMs });
			asked.then(
				(told) => {
					this.#asking = false;
					const restarted = told.incarnation !== this.#incarnation;
					this.#incarnation = told.incarnation;
					if (restarted && this.#cursor !== 0) {
						this.#cursor = 0; // of another log: what this one has before it would be lost
						return;
					}
					this.#events = told.events.length > 0 || told.lost || restarted ? told : undefined;
					this.#cursor = told.nextCursor;
				},
				(error: KvferryError) => {
					this.#failure = error;
					this.#asking = error.code === "UNSUPPORTED_OPTION"; // LMCache's server never will
				},
			);
		}
		return taken;
	}

	async resetCache(): Promise<boolean> {
		try {
			await waitFor(() => this.#native.clear(this.#timeoutMs), undefined);
			return true;
		} catch (error) {
			this.#failure = error as KvferryError;
			return false;
		}
	}

	#run<T>(
		work: () => Promise<T>,
		then: (value: T) => void = () => {},
		failed: () => void = () => {},
	): void {
		waitFor(work, undefined).then(
			(value) => {
				this.#failure = undefined;
				then(value);
			},
			(error: KvferryError) => {
				this.#failure = error;
				failed();
			},
		);
	}
}

class NativeWorkerAdapter implements CacheWorkerAdapter {
	readonly carriesSalt = true;
	readonly #options: CacheAdapterOptions;
	readonly #place: PagedPlace;
	readonly #workerId: number;
	readonly #timeoutMs: number;
	readonly #saveTimeoutMs: number;
	readonly #verify: boolean;
	#native: NativeWorker | undefined;
	/** Memory that is only had during a call; undefined when copies run by themselves. */
	#borrowed: Uint8Array[] | undefined;
	#arraysPerLayer = 1;
	/** Tokens. */
	#blockSize = 1;
	#registering = false;
	#closed = false;
	readonly #loads = new Set<Promise<void>>();
	/** For each of them, how to wait for its first arrays. */
	readonly #loading = new Set<(arrays: number) => Promise<void>>();
	/** For each store, how to wait for its copy. */
	readonly #copying = new Set<() => Promise<void>>();
	readonly #stores = new Set<Promise<void>>();
	/** How many operations of each request have not ended. */
	readonly #open = new Map<string, number>();
	readonly #ended = new Set<string>();
	#loaded = new Set<string>();
	#errors = new Set<number>();
	#storedChunks = 0;
	#droppedStores = 0;
	#failure: KvferryError | undefined;

	constructor(options: CacheAdapterOptions) {
		const { strategy, place, timeoutMs, saveTimeoutMs, verify } = read(
			"createWorkerAdapter",
			options,
		);
		this.#options = options;
		this.#verify = verify;
		this.#place = place(strategy);
		this.#workerId = strategy.kvWorkerId;
		this.#timeoutMs = timeoutMs;
		this.#saveTimeoutMs = saveTimeoutMs;
	}

	get pendingOperations(): number {
		return this.#loads.size + this.#stores.size;
	}

	get storedChunks(): number {
		return this.#storedChunks;
	}

	get droppedStores(): number {
		return this.#droppedStores;
	}

	get failure(): KvferryError | undefined {
		return this.#failure;
	}

	async registerKvCaches(
		kvCaches: Readonly<Record<string, LayerKv>>,
		layout: KvCacheLayout,
	): Promise<void> {
		if (this.#closed) {
			throw new KvferryError("CLOSED", "The adapter was shut down; create another one.");
		}
		if (this.#registering) {
			throw invalid("KV caches are registered already: shut down, and create another adapter");
		}
		checkObject("kvCaches", kvCaches);
		checkOptions("registerKvCaches", layout, LAYOUT);
		const { numBlocks, blockSize = 16, numKvHeads, headSize, dtype } = layout;
		const { planes = "separate", kvLayout = "NHD", blockStride } = layout;
		const gpu = gpuOf(layout);
		if (gpu !== undefined && this.#verify) {
			throw new KvferryError(
				"UNSUPPORTED_OPTION",
				'verify: "always" is for memory of the host: a GPU\'s is copied without being summed.',
			);
		}
		const sizes = { numBlocks, blockSize, numKvHeads, headSize };
		for (const [name, size] of Object.entries(sizes)) {
			checkInteger(name, size, 1, U32_MAX);
		}
		if (blockStride !== undefined) {
			checkInteger("blockStride", blockStride, 1, Number.MAX_SAFE_INTEGER);
		}
		checkText("dtype", dtype);
		if (planes !== "separate" && planes !== "fused" && planes !== "latent") {
			throw invalid(`planes is ${shown(planes)}: it must be "separate", "fused" or "latent"`);
		}
		if (kvLayout !== "NHD" && kvLayout !== "HND") {
			throw invalid(`kvLayout is ${shown(kvLayout)}: it must be "NHD" or "HND"`);
		}
		const layers = Object.entries(kvCaches);
		const arrays = layers.flatMap(([name, kv]) => arraysOf(name, kv, planes === "separate"));
		const native = {
			...sizes,
			numLayers: layers.length,
			dtype,
			planes,
			order: kvLayout,
			...(blockStride === undefined ? {} : { blockStride }),
		};
		this.#registering = true;
		try {
			const worker = await waitFor(
				() => this.#options.via.openWorker(this.#place, this.#workerId, native, this.#timeoutMs),
				undefined,
			);
			const perLayer = planes === "separate" ? 2 : 1;
			try {
				const wrong = arrays.findIndex(({ byteLength }) => byteLength !== worker.arrayBytes);
				if (wrong >= 0) {
					throw invalid(
						`layer ${layers[Math.floor(wrong / perLayer)]?.[0]} has an array of ` +
							`${arrays[wrong]?.byteLength} bytes; by its layout each has ${worker.arrayBytes}`,
					);
				}
				this.#borrowed = await registerArrays(worker, arrays, gpu);
				const layerOf = (at: number) => layers[Math.floor(at / perLayer)]?.[0] ?? "";
				checkApart(arrays, blockStride !== undefined, layerOf);
				if (this.#closed) {
					throw new KvferryError("CLOSED", "The adapter was shut down; create another one.");
				}
			} catch (error) {
				await worker.close(this.#timeoutMs).catch(() => {}); // its connection's end does it
				throw error;
			}
			this.#native = worker;
			this.#arraysPerLayer = perLayer;
			this.#blockSize = blockSize;
		} finally {
			this.#registering = this.#native !== undefined;
		}
	}

	batchedSubmitRetrieveRequests(
		requestIds: readonly string[],
		ops: readonly LoadStoreOp[],
		cacheSalts?: readonly string[],
	): void {
		const worker = this.#worker();
		checkBatch(requestIds, ops, cacheSalts, this.#options.via.chunkSize);
		ops.forEach((op, i) => {
			const requestId = requestIds[i] as string;
			this.#begin(requestId, this.#loads, this.#load(worker, requestId, op, cacheSalts?.[i] ?? ""));
		});
	}

	batchedSubmitStoreRequests(
		requestIds: readonly string[],
		ops: readonly LoadStoreOp[],
		cacheSalts?: readonly string[],
	): void {
		const worker = this.#worker();
		checkBatch(requestIds, ops, cacheSalts, this.#options.via.chunkSize);
		ops.forEach((op, i) => {
			const requestId = requestIds[i] as string;
			const store = this.#store(worker, requestId, op, cacheSalts?.[i] ?? "");
			this.#begin(requestId, this.#stores, store);
		});
	}

	async waitForLoads(): Promise<void> {
		await Promise.all(this.#loads);
	}

	async waitForLayer(layer: number): Promise<void> {
		const arrays = (layer + 1) * this.#arraysPerLayer;
		await Promise.all([...this.#loading].map((copied) => copied(arrays)));
	}

	async waitForSaves(): Promise<void> {
		await Promise.all([...this.#copying].map((copied) => copied()));
	}

	async flush(): Promise<void> {
		await Promise.all(this.#stores);
	}

	getFinished(
		finishedRequestIds: ReadonlySet<string>,
	): [finishedSending: Set<string>, finishedRecving: Set<string>] {
		for (const requestId of finishedRequestIds) {
			this.#ended.add(requestId);
		}
		const sending = new Set([...this.#ended].filter((requestId) => !this.#open.has(requestId)));
		for (const requestId of sending) {
			this.#ended.delete(requestId);
		}
		const recving = this.#loaded;
		this.#loaded = new Set();
		return [sending, recving];
	}

	getBlockIdsWithLoadErrors(): Set<number> {
		const errors = this.#errors;
		this.#errors = new Set();
		return errors;
	}

	async shutdown(): Promise<void> {
		this.#closed = true;
		const ended = Promise.all([...this.#loads, ...this.#stores]);
		let late: NodeJS.Timeout | undefined;
		// A GPU may never come to its end: closing the memory ends what waits for it.
		const patience =
			this.#borrowed === undefined &&
			new Promise((resolve) => {
				late = setTimeout(resolve, this.#timeoutMs);
			});
		await Promise.race([ended, patience || ended]);
		clearTimeout(late);
		const worker = this.#native;
		this.#native = undefined;
		this.#borrowed = undefined;
		await worker?.close(this.#timeoutMs).catch(() => {}); // the connection's end tells the same
		await ended;
	}

	async [Symbol.asyncDispose](): Promise<void> {
		await this.shutdown();
	}

	#worker(): NativeWorker {
		if (this.#closed) {
			throw new KvferryError("CLOSED", "The adapter was shut down; create another one.");
		}
		if (this.#native === undefined) {
			throw invalid("no KV caches are registered: await registerKvCaches first");
		}
		return this.#native;
	}

	#begin(requestId: string, among: Set<Promise<void>>, work: Promise<void>): void {
		this.#open.set(requestId, (this.#open.get(requestId) ?? 0) + 1);
		const ended = work.finally(() => {
			among.delete(ended);
			const left = (this.#open.get(requestId) ?? 1) - 1;
			if (left > 0) {
				this.#open.set(requestId, left);
			} else {
				this.#open.delete(requestId);
			}
		});
		among.add(ended);
	}

	/** Loads; whatever goes wrong, the blocks are told and not used. */
	async #load(
		worker: NativeWorker,
		requestId: string,
		op: LoadStoreOp,
		cacheSalt: string,
	): Promise<void> {
		let loaded = false;
		let ended = () => {};
		const end = new Promise<void>((resolve) => {
			ended = resolve;
		});
		let loading = (_arrays: number) => end;
		try {
			const tokens = tokensOf(op.tokenIds, op.end);
			const range = { requestId, start: op.start, end: op.end, cacheSalt };
			const blocks = blocksOf(op);
			const [skip, verify, timeoutMs] = [op.skipFirstNTokens, this.#verify, this.#timeoutMs];
			const borrowed = this.#borrowed;
			if (borrowed === undefined) {
				const load = wrap(() =>
					worker.loadBlocks(tokens, range, { blocks, skip, verify }, timeoutMs),
				);
				// A copy that fails is told of by the blocks that it should have filled.
				loading = (arrays) => load.copied(arrays).catch(() => {});
				this.#loading.add(loading);
				loaded = (await waitFor(() => load.ended(), undefined)) > 0;
			} else {
				this.#loading.add(loading);
				const load = await waitFor(() => worker.load(tokens, range, timeoutMs), undefined);
				let copied = false;
				try {
					if (wrap(() => worker.planLoad(load, blocks, skip, verify))) {
						while (wrap(() => worker.copyIn(load, borrowed))) {
							await nextTurn();
						}
						copied = true;
					}
				} finally {
					const held = await waitFor(() => worker.finish(load, timeoutMs), undefined);
					loaded = copied && held;
				}
			}
			this.#failure = undefined;
		} catch (error) {
			this.#failure = error as KvferryError;
		}
		ended();
		this.#loading.delete(loading);
		if (!loaded) {
			for (const block of blocksToFill(op, this.#blockSize)) {
				this.#errors.add(block);
			}
		}
		this.#loaded.add(requestId);
	}

	async #store(
		worker: NativeWorker,
		requestId: string,
		op: LoadStoreOp,
		cacheSalt: string,
	): Promise<void> {
		let ended = () => {};
		let copying = (): Promise<void> => Promise.resolve();
		let late: NodeJS.Timeout | undefined;
		/** From now on the engine can wait for the copy: until it is late and can still be forbidden. */
		const begin = (wait: () => Promise<void>, forbid: () => boolean) => {
			copying = wait;
			this.#copying.add(copying);
			late = setTimeout(() => {
				if (forbid()) {
					this.#droppedStores++;
					ended();
				}
			}, this.#saveTimeoutMs);
		};
		try {
			const tokens = tokensOf(op.tokenIds, op.end);
			const range = { requestId, start: op.start, end: op.end, cacheSalt };
			const blocks = blocksOf(op);
			const [verify, timeoutMs] = [this.#verify, this.#timeoutMs];
			const borrowed = this.#borrowed;
			if (borrowed === undefined) {
				const store = wrap(() =>
					worker.storeBlocks(tokens, range, { blocks, skip: 0, verify }, timeoutMs),
				);
				const copied = () => store.copied(U32_MAX).catch(() => {}); // its end tells why
				begin(copied, () => store.forbid());
				this.#storedChunks += await waitFor(() => store.ended(), undefined);
			} else {
				let [forbidden, begun] = [false, false];
				const end = new Promise<void>((resolve) => {
					ended = resolve;
				});
				begin(
					() => end,
					() => {
						forbidden = !begun;
						return forbidden;
					},
				);
				const store = await waitFor(() => worker.store(tokens, range, timeoutMs), undefined);
				if (forbidden) {
					await waitFor(() => worker.abandon(store, timeoutMs), undefined);
					return;
				}
				begun = true;
				try {
					wrap(() => worker.planStore(store, blocks, verify));
					while (wrap(() => worker.copyOut(store, borrowed))) {
						await nextTurn();
					}
				} catch (error) {
					await worker.abandon(store, timeoutMs).catch(() => {}); // the first error tells more
					throw error;
				}
				ended();
				this.#storedChunks += await waitFor(() => worker.commit(store, timeoutMs), undefined);
			}
			this.#failure = undefined;
		} catch (error) {
			this.#failure = error as KvferryError;
		} finally {
			clearTimeout(late);
			this.#copying.delete(copying);
			ended();
		}
	}
}

function read(of: string, options: CacheAdapterOptions) {
	checkOptions(of, options, OPTIONS);
	checkVia(options.via, "openWorker");
	const { modelName, timeoutMs, mqTimeout } = options as typeof options & { mqTimeout?: number };
	checkText("modelName", modelName);
	if (modelName === "") {
		throw invalid("modelName is empty: give the model's name");
	}
	wrap(() => native().checkModelName(modelName));
	const strategy = strategyOf(options);
	const wait = timeoutMs ?? (mqTimeout === undefined ? 5000 : Math.ceil(mqTimeout * 1000));
	checkInteger("timeoutMs", wait, 1, 2 ** 31 - 1);
	const place = ({ kvWorldSize, numKvReaders }: ParallelStrategy): PagedPlace => ({
		modelName,
		kvWorldSize,
		numKvReaders,
	});
	const { saveTimeoutMs = 100 } = options;
	checkInteger("saveTimeoutMs", saveTimeoutMs, 0, 2 ** 31 - 1);
	const { verify = "never" } = options;
	if (verify !== "always" && verify !== "never") {
		throw invalid('verify must be "always" or "never"');
	}
	return { strategy, place, timeoutMs: wait, saveTimeoutMs, verify: verify === "always" };
}

/** Refuses a batch as a whole: none of it has begun then. */
function checkBatch(
	requestIds: readonly string[],
	ops: readonly LoadStoreOp[],
	cacheSalts: readonly string[] | undefined,
	chunkSize: number,
): void {
	const check = (name: string, list: readonly unknown[]) => {
		if (!Array.isArray(list) || list.length !== requestIds.length) {
			throw invalid(
				`${name} has ${list?.length ?? "no"} entries for ${requestIds?.length ?? "no"} request ids: ` +
					"give arrays with one for each operation",
			);
		}
	};
	check("requestIds", requestIds);
	check("ops", ops);
	if (cacheSalts !== undefined) {
		check("cacheSalts", cacheSalts);
	}
	requestIds.forEach((requestId, i) => {
		checkText("a request id", requestId);
		const op = ops[i] as LoadStoreOp;
		checkOperation(requestId, op);
		if (op.start % chunkSize !== 0 || op.end % chunkSize !== 0) {
			throw invalid(
				`the range ${op.start}..${op.end} of ${requestId} is not one of whole chunks of ${chunkSize}`,
			);
		}
		if (cacheSalts !== undefined) {
			saltOf({ cacheSalt: cacheSalts[i] });
		}
	});
}

/** Token ids up to `end`, or all, as the wire has them; the addon copies them during its call. */
function tokensOf(tokenIds: readonly number[] | Uint32Array, end?: number): Uint32Array {
	checkTokenIds("tokenIds", tokenIds);
	if (tokenIds instanceof Uint32Array) {
		return end === undefined || end === tokenIds.length ? tokenIds : tokenIds.subarray(0, end);
	}
	const tokens = Uint32Array.from(tokenIds.slice(0, end));
	const wrong = tokens.findIndex((token, i) => token !== tokenIds[i]);
	if (wrong >= 0) {
		throw new KvferryError(
			"INVALID_TOKEN",
			`token ${wrong} is ${String(tokenIds[wrong])}: token ids are integers from 0 to 2^32 - 1`,
		);
	}
	return tokens;
}

function blocksOf(op: LoadStoreOp): Uint32Array {
	const groups = op.blockIds.filter((blocks) => blocks.length > 0);
	if (groups.length !== 1) {
		throw invalid(`an operation has blocks of ${groups.length} KV groups: only one can be copied`);
	}
	return new Uint32Array(groups[0] as readonly number[]);
}
