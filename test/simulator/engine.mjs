// An engine with a paged KV pool, after vLLM's v1 scheduler: its own prefix cache, continuous batching,
// chunked prefill, preemption, loads in or between steps, both failure policies.

import { Memory, Sequence } from "./content.mjs";

/** @typedef {import("../../ts/index.js")} Kvferry */
/** @typedef {import("../../ts/index.js").ConnectorMetadata} Metadata */

/**
 * @typedef {object} Request
 * @property {string} id
 * @property {string} salt
 * @property {Sequence} sequence
 * @property {number} promptTokens
 * @property {number} maxTokens Prompt and output.
 * @property {"WAITING" | "WAITING_FOR_REMOTE_KVS" | "RUNNING" | "PREEMPTED" | "FINISHED"} status
 * @property {number[]} blocks
 * @property {number} computed
 * @property {boolean} hasRun
 * @property {boolean} preempted
 * @property {boolean} hasLoaded A load was begun for it.
 * @property {boolean} uncounted Nobody told the connector how much it has computed, where that mattered.
 * @property {number} recoverTo Tokens that it had before a failed load took some.
 * @property {number | undefined} wrongAt The first position that this step computed from wrong KV.
 * @property {Set<number>} accounted Chunks that were hit, or whose store was planned.
 * @property {import("../../ts/index.js").EngineRequest} view
 */

/** Blocks of one engine: who has them, and what they hold. */
class Blocks {
	/** @type {number[]} */
	#references;
	/** @type {(number | undefined)[]} */
	#keys;
	/** Blocks without a reference, the one to be used next first. */
	#free;
	/** @type {Map<number, number>} */
	#cached = new Map();

	/** @param {number} count */
	constructor(count) {
		this.count = count;
		this.#references = new Array(count).fill(0);
		this.#keys = new Array(count).fill(undefined);
		this.#free = new Set(this.#references.keys());
	}

	get free() {
		return this.#free.size;
	}

	/** @param {number} key */
	find(key) {
		return this.#cached.get(key);
	}

	/** @param {number} block @param {number} more */
	#count(block, more) {
		const references = /** @type {number} */ (this.#references[block]) + more;
		this.#references[block] = references;
		return references;
	}

	/** Takes blocks that are there, and new ones; undefined when there are not enough. @param {number[]} there @param {number} count */
	take(there, count) {
		const idle = there.filter((block) => this.#references[block] === 0).length;
		if (this.#free.size - idle < count) {
			return undefined;
		}
		for (const block of there) {
			this.#free.delete(block);
			this.#count(block, 1);
		}
		const taken = [];
		for (const block of this.#free) {
			if (taken.length === count) {
				break;
			}
			taken.push(block);
		}
		for (const block of taken) {
			this.#free.delete(block);
			this.#references[block] = 1;
			this.forget(block);
		}
		return taken;
	}

	/** @param {number[]} blocks */
	release(blocks) {
		for (const block of blocks.toReversed()) {
			if (this.#count(block, -1) === 0) {
				this.#free.add(block);
			}
		}
	}

	/** @param {number} block @param {number} key */
	cache(block, key) {
		if (this.#keys[block] === undefined && !this.#cached.has(key)) {
			this.#keys[block] = key;
			this.#cached.set(key, block);
		}
	}

	/** @param {number} block */
	forget(block) {
		const key = this.#keys[block];
		if (key !== undefined) {
			this.#cached.delete(key);
			this.#keys[block] = undefined;
		}
	}
}

/** A worker's adapter some of whose loads are torn: a part of the blocks holds garbage, and is reported. */
class Tearing {
	carriesSalt = true;
	/** @type {Map<string, import("../../ts/index.js").LoadStoreOp>} */
	#loads = new Map();
	/** @type {Set<number>} */
	#torn = new Set();

	/**
	 * @param {import("../../ts/index.js").CacheWorkerAdapter} inner
	 * @param {Engine} engine
	 * @param {Memory} memory
	 * @param {boolean} mayStore
	 */
	constructor(inner, engine, memory, mayStore) {
		this.inner = inner;
		this.engine = engine;
		this.memory = memory;
		this.mayStore = mayStore;
	}

	/** @type {import("../../ts/index.js").WorkerAdapter["registerKvCaches"]} */
	registerKvCaches(caches, layout) {
		return this.inner.registerKvCaches(caches, layout);
	}

	/** @type {import("../../ts/index.js").WorkerAdapter["batchedSubmitRetrieveRequests"]} */
	batchedSubmitRetrieveRequests(ids, ops, salts) {
		ids.forEach((id, i) => {
			this.#loads.set(id, /** @type {import("../../ts/index.js").LoadStoreOp} */ (ops[i]));
		});
		this.inner.batchedSubmitRetrieveRequests(ids, ops, ...(salts ? [salts] : []));
	}

	/** @type {import("../../ts/index.js").WorkerAdapter["batchedSubmitStoreRequests"]} */
	batchedSubmitStoreRequests(ids, ops, salts) {
		if (!this.mayStore) {
			this.engine.world.fail(`${ids}: a rank stores what the first of its group stores`);
		}
		this.inner.batchedSubmitStoreRequests(ids, ops, ...(salts ? [salts] : []));
	}

	async waitForLoads() {
		await this.inner.waitForLoads();
		for (const id of [...this.#loads.keys()]) {
			this.#tear(id);
		}
	}

	waitForSaves() {
		return this.inner.waitForSaves();
	}

	/** @param {string} id */
	#tear(id) {
		const op = this.#loads.get(id);
		this.#loads.delete(id);
		const { random, faults, counts } = this.engine.world;
		if (op === undefined || !random.chance(faults.torn)) {
			return;
		}
		counts.tornLoads++;
		const kept = Math.floor(op.skipFirstNTokens / this.engine.config.blockSize);
		for (const block of /** @type {number[]} */ (op.blockIds[0]).slice(kept)) {
			if (random.chance(0.3)) {
				this.memory.spoil(block);
				this.#torn.add(block);
			}
		}
	}

	/** @type {import("../../ts/index.js").WorkerAdapter["getFinished"]} */
	getFinished(finished) {
		const [sending, recving] = this.inner.getFinished(finished);
		for (const id of recving) {
			this.#tear(id);
		}
		return [sending, recving];
	}

	getBlockIdsWithLoadErrors() {
		const errors = this.inner.getBlockIdsWithLoadErrors();
		for (const block of this.#torn) {
			errors.add(block);
		}
		this.#torn.clear();
		return errors;
	}

	shutdown() {
		return this.inner.shutdown();
	}
}

export class Engine {
	/** @type {Request[]} */
	#waiting = [];
	/** @type {Request[]} */
	#running = [];
	/** @type {Request[]} */
	#coming = [];
	/** @type {Map<string, { blocks: number[], left: number }>} Ended requests whose workers may still copy. */
	#ending = new Map();
	/** @type {Set<string>} */
	#ended = new Set();
	/** @type {Map<string, number>} */
	#received = new Map();
	/** @type {Set<string>} */
	#failedRecving = new Set();
	/** @type {{ connector: import("../../ts/index.js").WorkerConnector, adapter: import("../../ts/index.js").CacheWorkerAdapter, memory: Memory }[]} */
	#workers = [];

	/**
	 * @param {import("./world.mjs").World} world
	 * @param {import("./world.mjs").EngineConfig} config
	 */
	constructor(world, config) {
		const { kvferry } = world;
		this.world = world;
		this.config = config;
		this.blocks = new Blocks(config.numBlocks);
		const via = /** @type {any} */ (world.transport);
		const strategy = (/** @type {number} */ rank) =>
			kvferry.ParallelStrategy.of({
				tensorParallelSize: config.tp,
				pipelineParallelSize: config.pp,
				rank,
				useMla: config.mla,
			});
		const modelName = config.model;
		this.adapter = kvferry.createSchedulerAdapter({
			via,
			modelName,
			parallelStrategy: strategy(0),
		});
		this.connector = new kvferry.SchedulerConnector({
			adapter: this.adapter,
			blockSize: config.blockSize,
			numBlocks: config.numBlocks,
			planner: config.planner,
			saveDecodeCache: config.saveDecodeCache,
			loadAsync: config.loadAsync,
			onWarning: (text) => world.fail(`unexpected warning: ${text}`),
		});
		for (let rank = 0; rank < config.tp * config.pp; rank++) {
			const parallelStrategy = strategy(rank);
			const shard = config.mla ? Math.floor(rank / config.tp) : rank;
			const numLayers = /** @type {number} */ (config.layers[Math.floor(rank / config.tp)]);
			const memory = new Memory({ ...config, numLayers }, shard);
			const saveTimeoutMs = 2 ** 31 - 1; // real time has no part in it
			const adapter = kvferry.createWorkerAdapter({
				...{ via, modelName, parallelStrategy, saveTimeoutMs },
			});
			const mayStore = !config.mla || rank % config.tp === 0;
			const tearing = new Tearing(adapter, this, memory, mayStore);
			const connector = new kvferry.WorkerConnector({ adapter: tearing, parallelStrategy });
			this.#workers.push({ connector, adapter, memory });
		}
	}

	async start() {
		for (const { connector, memory } of this.#workers) {
			const { device } = this.world;
			const { caches, layout } = device?.cachesOf(memory) ?? {
				caches: memory.layers,
				layout: memory.layout,
			};
			await connector.registerKvCaches(caches, layout);
		}
	}

	get idle() {
		const lists = [this.#waiting, this.#running, this.#coming];
		return lists.every((list) => list.length === 0) && this.#ending.size === 0;
	}

	/** @param {string} id @param {string} salt @param {number[]} tokens @param {number} outputs */
	add(id, salt, tokens, outputs) {
		const sequence = new Sequence(this.config.model, salt, tokens);
		/** @type {Request} */
		const request = {
			id,
			salt,
			sequence,
			promptTokens: tokens.length,
			maxTokens: tokens.length + outputs,
			status: "WAITING",
			blocks: [],
			computed: 0,
			hasRun: false,
			preempted: false,
			hasLoaded: false,
			uncounted: false,
			recoverTo: 0,
			wrongAt: undefined,
			accounted: new Set(),
			view: /** @type {any} */ (undefined),
		};
		const says = this.config.saysComputed;
		request.view = {
			requestId: id,
			numPromptTokens: tokens.length,
			cacheSalt: salt === "" ? this.world.random.pick([undefined, null, ""]) : salt,
			get allTokenIds() {
				return sequence.tokens;
			},
			get status() {
				return request.status;
			},
			get numComputedTokens() {
				return says ? request.computed : undefined;
			},
		};
		this.#coming.push(request);
		this.world.register(id, sequence);
	}

	async run() {
		while (!this.idle) {
			await this.world.ticks(1);
			await this.#step();
		}
	}

	async #step() {
		const { world, config } = this;
		const { random, faults } = world;
		for (let i = random.integer(0, 3); i > 0 && this.#coming.length > 0; i--) {
			this.#waiting.push(/** @type {Request} */ (this.#coming.shift()));
		}
		for (const request of [...this.#waiting, ...this.#running]) {
			// An abort matters most while others wait for what this one computes anew.
			const often = request.recoverTo > request.computed ? 100 : 1;
			if (random.chance(faults.abort * often)) {
				world.counts.aborts++;
				this.#backOff(request);
				this.#finish(request);
			}
		}
		const scheduled = this.#schedule();
		const metadata = this.connector.buildConnectorMeta({
			scheduledNewReqs: scheduled.isNew.map(({ id }) => ({ requestId: id })),
			scheduledCachedReqs: scheduled.cached,
			numScheduledTokens: Object.fromEntries(scheduled.tokens),
		});
		// What is loaded in the step that computes it may be wrong, and all that shares its blocks.
		const loads = config.loadAsync
			? []
			: metadata.requests.filter(({ direction }) => direction === "RETRIEVE");
		const loading = new Set(
			loads.flatMap(({ requestId }) => scheduled.byId.get(requestId)?.blocks ?? []),
		);
		this.#checkPlan(metadata, scheduled);
		for (const [id, count] of scheduled.tokens) {
			/** @type {Request} */ (scheduled.byId.get(id)).computed += count;
		}
		const invalid = await this.#work(metadata, scheduled);
		this.#checkNothingLeftOut(scheduled, loading);
		this.#takeOutput(scheduled, invalid);
	}

	/** What each rank does with a step. @param {Metadata} metadata @param {Scheduled} scheduled */
	async #work(metadata, scheduled) {
		for (const { connector } of this.#workers) {
			connector.bindConnectorMetadata(metadata);
			connector.startLoadKv();
		}
		await Promise.all(this.#workers.map(({ connector }) => connector.waitForLayerLoad()));
		this.#compute(scheduled);
		await Promise.all(this.#workers.map(({ connector }) => connector.waitForSave()));
		const finished = this.#ended;
		this.#ended = new Set();
		/** @type {Set<number>} */
		const invalid = new Set();
		for (const { connector } of this.#workers) {
			const [sending, recving] = connector.getFinished(finished);
			for (const id of recving) {
				this.#received.set(id, (this.#received.get(id) ?? 0) + 1);
			}
			for (const id of sending) {
				const ending = this.#ending.get(id);
				if (ending === undefined) {
					throw this.world.fail(`${id} was reported as ended more often than there are workers`);
				}
				if (--ending.left === 0) {
					this.blocks.release(ending.blocks);
					this.#ending.delete(id);
					this.#received.delete(id);
				}
			}
			for (const block of connector.getBlockIdsWithLoadErrors()) {
				invalid.add(block);
			}
		}
		return invalid;
	}

	/** Computes in the order of the step; what is computed from wrong KV is garbage. @param {Scheduled} scheduled */
	#compute(scheduled) {
		const size = this.config.blockSize;
		for (const [id, count] of scheduled.tokens) {
			const request = /** @type {Request} */ (scheduled.byId.get(id));
			const { sequence, blocks, computed } = request;
			const at = (/** @type {number} */ position) =>
				/** @type {const} */ ([
					sequence.state(position),
					/** @type {number} */ (blocks[Math.floor(position / size)]),
					position % size,
				]);
			request.wrongAt = undefined;
			for (let position = 0; position < computed - count; position++) {
				if (!this.#workers.every(({ memory }) => memory.holds(...at(position)))) {
					request.wrongAt = position;
					break;
				}
			}
			for (let position = computed - count; position < computed; position++) {
				for (const { memory } of this.#workers) {
					memory.compute(...at(position), request.wrongAt === undefined);
				}
			}
		}
	}

	/** @param {Scheduled} scheduled @param {Set<number>} invalid */
	#takeOutput(scheduled, invalid) {
		const { world, config } = this;
		/** @type {Set<string>} */
		const discarded = new Set();
		this.connector.updateConnectorOutput({ invalidBlockIds: invalid });
		if (invalid.size > 0) {
			world.counts.failedLoads++;
			const blocks = this.#running.flatMap((request) => request.blocks);
			const shared = [...invalid].some((id) => blocks.filter((block) => block === id).length > 1);
			world.counts.sharedFailures += shared ? 1 : 0;
			const view = (/** @type {Request} */ { id, blocks, computed, status }) => ({
				requestId: id,
				blockIds: blocks,
				numComputedTokens: computed,
				status,
			});
			const recovery = world.kvferry.handleInvalidBlocks({
				running: this.#running.map(view),
				waiting: this.#waiting.map(view),
				numScheduledTokens: Object.fromEntries(scheduled.tokens),
				invalidBlockIds: invalid,
				blockSize: config.blockSize,
				kvLoadFailurePolicy: config.policy,
			});
			for (const request of [...this.#waiting, ...this.#running]) {
				const computed = recovery.numComputedTokens.get(request.id);
				if (computed === undefined) {
					continue;
				}
				request.uncounted ||= !config.saysComputed;
				if (request.status === "RUNNING") {
					request.recoverTo = Math.max(request.recoverTo, request.computed);
					// What is to be computed anew is nobody's prefix until then.
					for (const block of request.blocks.slice(Math.floor(computed / config.blockSize))) {
						this.blocks.forget(block);
					}
				}
				request.computed = computed;
			}
			for (const block of recovery.evictedBlockIds) {
				this.blocks.forget(block);
			}
			for (const id of recovery.failedRecvingRequestIds) {
				this.#failedRecving.add(id);
			}
			for (const id of recovery.discardedRequestIds) {
				discarded.add(id);
			}
			if (config.policy === "fail") {
				for (const request of [...this.#waiting, ...this.#running]) {
					if (discarded.has(request.id)) {
						world.counts.errors++;
						this.#finish(request);
					}
				}
			}
		}
		for (const [id] of scheduled.tokens) {
			const request = /** @type {Request} */ (scheduled.byId.get(id));
			if (discarded.has(id) || request.status === "FINISHED") {
				continue;
			}
			if (request.wrongAt !== undefined) {
				throw world.fail(`${id} was computed from wrong KV at position ${request.wrongAt}`);
			}
			if (request.computed >= request.recoverTo) {
				request.recoverTo = 0;
			}
			this.#cache(request, request.computed);
			if (request.computed === request.sequence.length) {
				request.sequence.push(request.sequence.nextToken());
				if (request.sequence.length >= request.maxTokens) {
					world.counts.finished++;
					this.#finish(request);
				}
			}
		}
	}

	/** Whoever waited for this request to compute shared blocks anew does it now. @param {Request} request */
	#backOff(request) {
		const first = Math.floor(request.computed / this.config.blockSize);
		const last = Math.ceil(request.recoverTo / this.config.blockSize);
		for (const block of request.blocks.slice(first, Math.max(first, last))) {
			for (const other of this.#running.filter((other) => other !== request)) {
				const at = other.blocks.indexOf(block) * this.config.blockSize;
				if (at >= 0 && at < other.computed) {
					other.recoverTo = Math.max(other.recoverTo, other.computed);
					other.computed = at;
				}
			}
		}
	}

	/** @param {Request} request @param {number} tokens */
	#cache({ blocks, sequence }, tokens) {
		const size = this.config.blockSize;
		for (let end = size; end <= tokens; end += size) {
			this.blocks.cache(/** @type {number} */ (blocks[end / size - 1]), sequence.key(end - 1));
		}
	}

	/** @param {Request} request */
	#finish(request) {
		request.status = "FINISHED";
		this.#running = this.#running.filter((other) => other !== request);
		this.#waiting = this.#waiting.filter((other) => other !== request);
		this.#failedRecving.delete(request.id);
		const [keep] = this.connector.requestFinished(request.view, request.blocks);
		this.world.counts.ended++;
		if (this.connector.tracker(request.id) !== undefined) {
			this.world.fail(`${request.id} has ended and is tracked still`);
		}
		if (keep) {
			this.#ending.set(request.id, { blocks: request.blocks, left: this.#workers.length });
			this.#ended.add(request.id);
		} else {
			this.blocks.release(request.blocks);
		}
	}

	/** @typedef {{ tokens: Map<string, number>, byId: Map<string, Request>, isNew: Request[], cached: import("../../ts/index.js").CachedRequest[] }} Scheduled */

	#schedule() {
		const { config, world } = this;
		/** @type {Scheduled} */
		const scheduled = { tokens: new Map(), byId: new Map(), isNew: [], cached: [] };
		let budget = config.maxTokens;
		let preempted = false;
		const take = (/** @type {Request} */ request, /** @type {number} */ count) => {
			scheduled.tokens.set(request.id, count);
			scheduled.byId.set(request.id, request);
			budget -= count;
		};
		for (let i = 0; i < this.#running.length && budget > 0; i++) {
			const request = /** @type {Request} */ (this.#running[i]);
			const count = Math.min(request.sequence.length - request.computed, budget);
			let added = this.#allocate(request, request.computed + count, []);
			while (added === undefined) {
				const victim = /** @type {Request} */ (this.#running.pop());
				this.#preempt(victim);
				preempted = true;
				budget += scheduled.tokens.get(victim.id) ?? 0;
				scheduled.tokens.delete(victim.id);
				scheduled.cached = scheduled.cached.filter(({ requestId }) => requestId !== victim.id);
				if (victim === request) {
					break;
				}
				added = this.#allocate(request, request.computed + count, []);
			}
			if (added !== undefined) {
				take(request, count);
				scheduled.cached.push({ requestId: request.id, newBlockIds: added });
			}
		}
		// Who holds blocks comes first, or holders and the first in line wait for each other.
		const holders = this.#waiting.filter(({ blocks }) => blocks.length > 0);
		const others = this.#waiting.filter(({ blocks }) => blocks.length === 0);
		for (const request of preempted ? [] : [...holders, ...others]) {
			if (budget === 0 || this.#running.length >= config.maxRequests) {
				break;
			}
			if (request.status === "WAITING_FOR_REMOTE_KVS" && !this.#hasLoaded(request)) {
				continue;
			}
			/** @type {number[]} */
			let local = [];
			let [external, loadAsync] = [0, false];
			if (request.computed === 0) {
				local = this.#localHit(request);
				const tokens = local.length * config.blockSize;
				const [found, isAsync] = this.connector.getNumNewMatchedTokens(request.view, tokens);
				if (found === null) {
					continue;
				}
				if (found + tokens >= request.sequence.length) {
					throw world.fail(`${request.id}: a hit of ${found + tokens} leaves nothing to compute`);
				}
				[external, loadAsync] = [found, isAsync];
			}
			const before = request.computed + local.length * config.blockSize + external;
			const count = loadAsync ? 0 : Math.min(request.sequence.length - before, budget);
			const added = world.random.chance(world.faults.allocation)
				? undefined
				: this.#allocate(request, before + count, local);
			if (added === undefined) {
				world.counts.allocationFailures++;
				const last = holders.findLast(({ status }) => status !== "WAITING_FOR_REMOTE_KVS");
				if (this.#running.length === 0 && last !== undefined) {
					this.#waiting = this.#waiting.filter((other) => other !== last);
					this.#preempt(last);
				}
				break;
			}
			const asked = request.computed === 0;
			const hits = asked ? (this.adapter.checkLookupResult(request.id) ?? 0) : 0;
			this.connector.updateStateAfterAlloc(request.view, request.blocks, external);
			for (let end = config.chunkSize; end <= hits; end += config.chunkSize) {
				request.accounted.add(end);
			}
			// Leases of a load that failed stay until the request ends.
			if (asked && !request.hasLoaded) {
				// What the engine has whole, or computes after all, is held no longer.
				const has = local.length * config.blockSize;
				const first = external > 0 ? has - (has % config.chunkSize) : hits;
				world.transport?.checkHeld(request.id, (hits - first) / config.chunkSize);
			}
			request.computed = before;
			request.hasLoaded ||= external > 0;
			if (loadAsync) {
				request.status = "WAITING_FOR_REMOTE_KVS";
				world.counts.loads++;
				continue;
			}
			world.counts.loads += external > 0 ? 1 : 0;
			this.#waiting = this.#waiting.filter((other) => other !== request);
			this.#running.push(request);
			request.status = "RUNNING";
			take(request, count);
			this.#cache(request, before + count);
			if (request.hasRun) {
				const newBlockIds = [...request.blocks];
				scheduled.cached.push({ requestId: request.id, newBlockIds, resumed: true });
			} else {
				scheduled.isNew.push(request);
			}
			request.hasRun = true;
		}
		return scheduled;
	}

	/** Whether all workers have told that a load ended; then the request is as before it. @param {Request} request */
	#hasLoaded(request) {
		if (this.#received.get(request.id) !== this.#workers.length) {
			return false;
		}
		this.#received.delete(request.id);
		const loaded = this.world.kvferry.updateWaitingForRemoteKv({
			numComputedTokens: request.computed,
			numTokens: request.sequence.length,
			failedRecving: this.#failedRecving.delete(request.id),
		});
		request.computed = loaded.numComputedTokens;
		this.#cache(request, loaded.numTokensToCache);
		if (loaded.freeBlocks) {
			this.blocks.release(request.blocks);
			request.blocks = [];
			request.accounted.clear();
		}
		request.status = request.preempted ? "PREEMPTED" : "WAITING";
		return true;
	}

	/** Leading blocks in this engine's own cache; one token remains to be computed. @param {Request} request */
	#localHit({ sequence }) {
		const found = [];
		const size = this.config.blockSize;
		for (let end = size; end < sequence.length; end += size) {
			const block = this.blocks.find(sequence.key(end - 1));
			if (block === undefined) {
				break;
			}
			found.push(block);
		}
		return found;
	}

	/** @param {Request} request @param {number} tokens @param {number[]} local */
	#allocate(request, tokens, local) {
		const needed = Math.ceil(tokens / this.config.blockSize);
		const count = Math.max(0, needed - request.blocks.length - local.length);
		const added = this.blocks.take(local, count);
		if (added !== undefined) {
			request.blocks.push(...local, ...added);
		}
		return added;
	}

	/** @param {Request} request */
	#preempt(request) {
		this.world.counts.preemptions++;
		this.#backOff(request);
		this.blocks.release(request.blocks);
		request.blocks = [];
		request.computed = 0;
		request.recoverTo = 0;
		request.accounted.clear();
		request.status = "PREEMPTED";
		request.preempted = true;
		request.uncounted ||= !this.config.saysComputed;
		this.#waiting.unshift(request);
	}

	/** @param {Metadata} metadata @param {Scheduled} scheduled */
	#checkPlan({ requests }, scheduled) {
		for (const { requestId, direction, op } of requests) {
			const request = scheduled.byId.get(requestId);
			if (direction === "RETRIEVE") {
				continue; // what it loads is checked when it is used
			}
			const computed = (request?.computed ?? 0) + (scheduled.tokens.get(requestId) ?? 0);
			if (op.end > computed) {
				throw this.world.fail(
					`${requestId}: tokens up to ${op.end} are to be stored, and ${computed} are computed by then`,
				);
			}
			for (
				let end = op.start + this.config.chunkSize;
				end <= op.end;
				end += this.config.chunkSize
			) {
				request?.accounted.add(end);
			}
			this.world.counts.storeOperations++;
		}
	}

	/**
	 * Every whole chunk that is computed was hit, or its store was planned.
	 *
	 * @param {Scheduled} scheduled
	 * @param {Set<number>} loading
	 */
	#checkNothingLeftOut(scheduled, loading) {
		const { config } = this;
		for (const [id] of scheduled.tokens) {
			const request = /** @type {Request} */ (scheduled.byId.get(id));
			if (request.uncounted || request.blocks.some((block) => loading.has(block))) {
				continue;
			}
			const promptOnly = config.planner === "lmcache" && !config.saveDecodeCache;
			const tokens = promptOnly
				? Math.min(request.computed, request.promptTokens)
				: request.computed;
			for (let end = config.chunkSize; end <= tokens; end += config.chunkSize) {
				if (!request.accounted.has(end)) {
					throw this.world.fail(
						`${id}: the chunk up to ${end} is computed, was not hit, and is not stored`,
					);
				}
			}
		}
	}

	/** After the last request. */
	async checkNothingLeaked() {
		const { world } = this;
		if (this.blocks.free !== this.blocks.count) {
			throw world.fail(
				`${this.blocks.count - this.blocks.free} blocks are not free after the last request`,
			);
		}
		if (this.adapter.pendingLookups > 0) {
			throw world.fail(`${this.adapter.pendingLookups} lookups are not cleaned up`);
		}
		for (const { connector, adapter } of this.#workers) {
			if (adapter.pendingOperations > 0) {
				throw world.fail(`${adapter.pendingOperations} operations have not ended`);
			}
			await connector.shutdown();
		}
	}
}
