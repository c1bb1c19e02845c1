// One run: a store, engines that share it, faults, and the checks at the end. All of it follows from the seed.

import { Device } from "./device.mjs";
import { Engine } from "./engine.mjs";
import { Random } from "./random.mjs";
import { Transport, Violation } from "./transport.mjs";

/**
 * @typedef {object} EngineConfig
 * @property {string} model
 * @property {number} tp
 * @property {number} pp
 * @property {boolean} mla
 * @property {"separate" | "fused" | "latent"} planes
 * @property {"NHD" | "HND"} kvLayout
 * @property {number} numBlocks
 * @property {number} blockSize
 * @property {number} chunkSize
 * @property {number[]} layers Of each stage.
 * @property {number} maxTokens Of a step.
 * @property {number} maxRequests That run at once.
 * @property {boolean} loadAsync
 * @property {"fail" | "recompute"} policy
 * @property {"block" | "lmcache"} planner
 * @property {boolean} saveDecodeCache
 * @property {boolean} saysComputed Whether the connector is told how much is computed, as it may be.
 */

/** Milliseconds after which leases have ended, and reservations. */
const JUMPS = [400_000, 700_000];

export class World {
	/** What happened, to be seen not to be nothing. */
	counts = {
		...{ requests: 0, finished: 0, ended: 0, aborts: 0, errors: 0, preemptions: 0 },
		...{ allocationFailures: 0, loads: 0, failedLoads: 0, tornLoads: 0, hitChunks: 0 },
		...{ storeOperations: 0, storedChunks: 0, refusedChunks: 0, restarts: 0, clears: 0, jumps: 0 },
		...{ evictedChunks: 0, sharedFailures: 0, reusedSlots: 0 },
		/** With a GPU: copies that it did, and calls of CUDA that were made to fail and were met by a copy. */
		...{ gpuCopies: 0, failedCalls: 0 },
	};
	/** The GPU that KV memory is on, if it is. @type {Device | undefined} */
	device;
	/** Copies of real time, which no tick passes. @type {Set<Promise<unknown>>} */
	#copies = new Set();
	/** @type {Violation | undefined} */
	violation;
	#tick = 0;
	/** @type {{ due: number, resolve: () => void }[]} */
	#sleeping = [];
	/** @type {Map<string, import("./content.mjs").Sequence>} */
	#sequences = new Map();

	/**
	 * @param {typeof import("../../ts/index.js")} kvferry
	 * @param {{ simulatorAdvance(ms: number): void }} addon
	 * @param {number} seed
	 * @param {number} requests
	 * @param {boolean} cuda Whether KV memory is a GPU's.
	 */
	constructor(kvferry, addon, seed, requests, cuda) {
		this.kvferry = kvferry;
		this.addon = addon;
		this.seed = seed;
		this.requests = requests;
		const random = new Random(seed);
		this.random = random;
		this.cuda = cuda;
		const often = () => random.pick([0, 1, 1, 3]);
		this.faults = {
			lostRequest: 0.005 * often(),
			lostReply: 0.004 * often(),
			late: 0.15 * often(),
			duplicate: 0.05 * often(),
			torn: 0.05 * often(),
			reused: 0.01 * often(),
			abort: 0.0005 * often(),
			allocation: 0.03 * often(),
			restart: 0.001 * often(),
			clear: 0.003 * often(),
			jump: 0.002 * often(),
			stall: 0.002 * often(),
		};
		this.chunkSize = random.pick([8, 16]);
		/** @type {import("../../ts/index.js").ServerOptions} */
		this.serverOptions = {
			listen: false,
			chunkSize: this.chunkSize,
			memory: 4096 * random.pick([40, 100, 400, 2000]),
		};
	}

	/** @param {string} message */
	fail(message) {
		this.violation ??= new Violation(`seed ${this.seed}, tick ${this.#tick}: ${message}`);
		return this.violation;
	}

	/** @param {string} id @param {import("./content.mjs").Sequence} sequence */
	register(id, sequence) {
		this.#sequences.set(id, sequence);
		this.counts.requests++;
	}

	/** @param {string} id */
	sequenceOf(id) {
		return /** @type {import("./content.mjs").Sequence} */ (this.#sequences.get(id));
	}

	/** Resolves so many ticks from now. @param {number} count @returns {Promise<void>} */
	ticks(count) {
		return new Promise((resolve) => {
			this.#sleeping.push({ due: this.#tick + count, resolve });
		});
	}

	/**
	 * Holds the time until a copy has ended. Copies run side by side, but tell of their ends in the order of their
	 * beginnings. Seeds are replayed nearly so, but not exactly: the driver's threads have a time of their own.
	 *
	 * @template T @param {Promise<T>} copy @returns {Promise<T>}
	 */
	async copied(copy) {
		// Its own failure is met at once, however long the others take.
		const inOrder = Promise.allSettled([...this.#copies, copy]).then(() => copy);
		this.#copies.add(inOrder);
		try {
			return await inOrder;
		} finally {
			this.#copies.delete(inOrder);
		}
	}

	/** @param {number} number @param {EngineConfig | undefined} like */
	#engineConfig(number, like) {
		const { random } = this;
		const blockSize = random.pick([1, 2, 4, 8].filter((size) => this.chunkSize % size === 0));
		const mla = random.chance(0.4);
		const [tp, pp] = random.pick([
			/** @type {const} */ ([1, 1]),
			/** @type {const} */ ([1, 1]),
			/** @type {const} */ ([2, 1]),
			/** @type {const} */ ([1, 2]),
			/** @type {const} */ ([2, 2]),
		]);
		/** @type {EngineConfig} */
		const config = {
			model: `model-${number}`,
			tp,
			pp,
			mla,
			layers: Array.from({ length: pp }, () => random.integer(1, 3)),
			planes: mla ? "latent" : random.pick(["separate", "fused"]),
			kvLayout: random.pick(["NHD", "HND"]),
			numBlocks: Math.ceil((random.integer(2, 8) * 64) / blockSize),
			blockSize,
			chunkSize: this.chunkSize,
			maxTokens: random.integer(8, 64),
			maxRequests: random.integer(2, 12),
			loadAsync: random.chance(0.7),
			policy: random.chance(0.7) ? "recompute" : "fail",
			planner: random.chance(0.75) ? "block" : "lmcache",
			saveDecodeCache: random.chance(0.5),
			saysComputed: random.chance(0.7),
		};
		// Engines of one model share what they store: in the same shards, and in whatever blocks.
		const shared = like !== undefined && random.chance(0.7) ? like : config;
		const { model, planes, layers } = shared;
		return { ...config, model, planes, layers, mla: shared.mla, tp: shared.tp, pp: shared.pp };
	}

	async run() {
		const { random, kvferry } = this;
		this.transport = new Transport(await kvferry.Server.start(this.serverOptions), this);
		this.device = this.cuda ? new Device(this.addon) : undefined;
		try {
			/** @type {Engine[]} */
			const engines = [];
			for (let number = random.integer(1, 2); number > 0; number--) {
				engines.push(new Engine(this, this.#engineConfig(number, engines[0]?.config)));
			}
			for (const engine of engines) {
				await engine.start();
			}
			if (this.device !== undefined && random.chance(0.2)) {
				// A call of ours that the engine does not make itself.
				const calls = ["cuLaunchKernel", "cuEventRecord", "cuStreamWaitEvent", "cuEventQuery"];
				const [call, number] = [random.pick(calls), random.integer(1, 300)];
				this.device.addon.simulatorCudaFail(call, number, random.pick([1, 2, 46]));
			}
			this.#makeRequests(engines);
			const limit = 1000 + 400 * this.requests;
			let running = engines.length;
			for (const engine of engines) {
				engine.run().then(
					() => running--,
					(error) => {
						this.violation ??= error instanceof Violation ? error : this.fail(error.stack);
					},
				);
			}
			while (running > 0 || this.#sleeping.length > 0) {
				await this.#advance();
				if (this.#tick > limit) {
					throw this.fail("it is stuck: requests do not finish");
				}
			}
			await this.#checkEnd(engines);
		} finally {
			await this.transport.server.close();
		}
		const broken = this.device?.close() ?? 0;
		if (broken > 0) {
			throw this.fail(`${broken} rules of CUDA were broken; the fake driver says which`);
		}
		return this.counts;
	}

	async #advance() {
		await new Promise((resolve) => setImmediate(resolve));
		while (this.#copies.size > 0) {
			await Promise.allSettled(this.#copies);
			await new Promise((resolve) => setImmediate(resolve));
		}
		if (this.violation !== undefined) {
			throw this.violation;
		}
		await this.#faults();
		this.#tick++;
		const due = this.#sleeping.filter(({ due }) => due <= this.#tick);
		this.#sleeping = this.#sleeping.filter(({ due }) => due > this.#tick);
		for (const { resolve } of due) {
			resolve();
		}
	}

	/** What happens between any two steps. */
	async #faults() {
		const { random, faults, counts } = this;
		const transport = /** @type {Transport} */ (this.transport);
		if (random.chance(faults.restart)) {
			counts.restarts++;
			counts.evictedChunks += Number(transport.server.status().evicted_objects);
			const old = transport.server;
			transport.restart(await this.kvferry.Server.start(this.serverOptions));
			await old.close();
		}
		if (random.chance(faults.clear)) {
			counts.clears++;
			transport.forget();
			const place = { modelName: "any", kvWorldSize: 1, numKvReaders: 1 };
			await transport.server.openScheduler(place).clear(1000);
		}
		if (random.chance(faults.jump)) {
			this.jump();
		}
	}

	/** Lets so much time pass that leases have ended, and perhaps reservations. */
	jump() {
		this.counts.jumps++;
		/** @type {Transport} */ (this.transport).jumps++;
		this.addon.simulatorAdvance(this.random.pick(JUMPS));
	}

	/** Conversations that share beginnings, of several tenants. @param {Engine[]} engines */
	#makeRequests(engines) {
		const { random } = this;
		const token = () => random.integer(0, 4);
		const tokens = (/** @type {number} */ count) => Array.from({ length: count }, token);
		const longest = Math.min(...engines.map(({ config }) => config.numBlocks * config.blockSize));
		/** @type {number[][]} */
		const documents = Array.from({ length: 4 }, () => tokens(random.integer(8, 60)));
		for (let i = 0; i < this.requests; i++) {
			const document = random.pick(documents);
			const shared = random.chance(0.8) ? document.length : random.integer(0, document.length);
			const own = random.chance(0.2) ? 0 : random.integer(0, 24);
			const prompt = [...document.slice(0, shared), ...tokens(own)].slice(0, longest - 12);
			if (prompt.length === 0) {
				prompt.push(token());
			}
			if (random.chance(0.15)) {
				documents[random.integer(0, documents.length - 1)] = [...prompt, ...tokens(4)];
			}
			random
				.pick(engines)
				.add(`r${i}`, random.pick(["", "", "anna", "bob"]), prompt, random.integer(1, 12));
		}
	}

	/** @param {Engine[]} engines */
	async #checkEnd(engines) {
		const transport = /** @type {Transport} */ (this.transport);
		await new Promise((resolve) => setImmediate(resolve));
		if (this.violation !== undefined) {
			throw this.violation;
		}
		if (this.counts.ended !== this.requests) {
			throw this.fail(`${this.requests - Number(this.counts.ended)} requests have not ended`);
		}
		const status = transport.server.status();
		this.counts.evictedChunks += Number(status.evicted_objects);
		for (const name of ["leases", "sessions", "slots_writing", "slots_reading"]) {
			if (status[name] !== 0) {
				throw this.fail(`${status[name]} ${name} are left after the last request`);
			}
		}
		for (const engine of engines) {
			await engine.checkNothingLeaked();
		}
		const place = { modelName: "any", kvWorldSize: 1, numKvReaders: 1 };
		await transport.server.openScheduler(place).clear(1000);
		const after = transport.server.status();
		for (const name of ["instances", "slots_apart", "objects", "used_bytes"]) {
			if (after[name] !== 0) {
				throw this.fail(`${after[name]} ${name} are left after the last worker`);
			}
		}
	}
}

/**
 * Simulates one seed.
 *
 * @param {typeof import("../../ts/index.js")} kvferry The simulator's build.
 * @param {{ simulatorAdvance(ms: number): void }} addon Its addon.
 * @param {number} seed
 * @param {number} requests
 * @param {boolean} cuda Whether KV memory is that of a GPU, by the fake driver.
 * @returns {Promise<Record<string, number>>} What happened.
 */
export async function simulate(kvferry, addon, seed, requests, cuda = false) {
	return await new World(kvferry, addon, seed, requests, cuda).run();
}
