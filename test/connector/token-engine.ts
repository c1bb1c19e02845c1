// An engine whose KV says which tokens it is of.

import { once } from "node:events";
import { createServer } from "node:net";
import { setImmediate } from "node:timers/promises";
import { expect } from "vitest";
import { type EngineRequest, type KvConnectors, resolveOffloading } from "../../ts/index.js";

export const BLOCK = 4;
const BLOCKS = 32;
export const range = (from: number, to: number): number[] =>
	Array.from({ length: to - from }, (_, i) => from + i);

/** Offloading to a server at this port. */
export async function lmcache(port: number) {
	return resolveOffloading({
		kvOffloadingSize: 1,
		kvOffloadingBackend: "lmcache",
		kvTransferConfig: { kvConnectorExtraConfig: { "lmcache.mp.port": port } },
	});
}

export async function freePort(): Promise<number> {
	const server = createServer().listen(0, "127.0.0.1");
	await once(server, "listening");
	const { port } = server.address() as { port: number };
	server.close();
	await once(server, "close");
	return port;
}

/** An engine with one layer of KV in each worker, whose every element says which token it is of. */
export class Engine implements AsyncDisposable {
	readonly kv: KvConnectors;
	readonly memory: Uint32Array[];
	#next = 0;
	/** How many workers have told of a request's load. */
	readonly #loaded = new Map<string, number>();

	private constructor(kv: KvConnectors) {
		this.kv = kv;
		this.memory = kv.workers.map(() => new Uint32Array(BLOCKS * BLOCK * 2));
	}

	static async open(kv: KvConnectors | undefined): Promise<Engine> {
		const engine = new Engine(kv as KvConnectors);
		for (const [rank, worker] of engine.kv.workers.entries()) {
			await worker.registerKvCaches(
				{ layer: engine.memory[rank] as Uint32Array },
				{ numBlocks: BLOCKS, blockSize: BLOCK, numKvHeads: 1, headSize: 1, dtype: "int32" },
			);
		}
		return engine;
	}

	/** One step; which requests all workers have loaded by then. */
	async #step(requests: EngineRequest[], tokens: number): Promise<Set<string>> {
		const { scheduler, workers } = this.kv;
		const metadata = scheduler.buildConnectorMeta({
			scheduledNewReqs: requests,
			scheduledCachedReqs: [],
			numScheduledTokens: Object.fromEntries(requests.map(({ requestId }) => [requestId, tokens])),
		});
		for (const worker of workers) {
			worker.bindConnectorMetadata(metadata);
			worker.startLoadKv();
			await worker.waitForSave();
			for (const id of worker.getFinished(new Set())[1]) {
				this.#loaded.set(id, (this.#loaded.get(id) ?? 0) + 1);
			}
		}
		const all = [...this.#loaded].filter(([, count]) => count === workers.length);
		return new Set(all.map(([id]) => id));
	}

	/** Runs a prompt through; says how many of its tokens were loaded. */
	async run(tokens: number[], cacheSalt?: string): Promise<number> {
		const { scheduler, workers } = this.kv;
		const request = { requestId: `r${this.#next++}`, allTokenIds: tokens, cacheSalt };
		let [found] = scheduler.getNumNewMatchedTokens(request, 0);
		while (found === null) {
			await setImmediate();
			[found] = scheduler.getNumNewMatchedTokens(request, 0);
		}
		const blocks = range(0, Math.ceil(tokens.length / BLOCK));
		scheduler.updateStateAfterAlloc(request, blocks, found);
		if (found > 0) {
			let loaded = await this.#step([], 0);
			while (!loaded.has(request.requestId)) {
				await setImmediate();
				loaded = await this.#step([], 0);
			}
			scheduler.updateStateAfterAlloc(request, blocks, 0);
		}
		for (const [rank, memory] of this.memory.entries()) {
			for (const at of range(0, found)) {
				expect([memory[at], memory[BLOCKS * BLOCK + at]]).toEqual([tokens[at], (-1 - rank) >>> 0]);
			}
			memory.set(tokens);
			memory.fill((-1 - rank) >>> 0, BLOCKS * BLOCK);
		}
		await this.#step([request], tokens.length - found);
		scheduler.requestFinished(request, blocks);
		let left = workers.length;
		let ended = new Set([request.requestId]);
		while (left > 0) {
			await setImmediate();
			left -= workers.filter((worker) => worker.getFinished(ended)[0].size > 0).length;
			ended = new Set();
		}
		for (const memory of this.memory) {
			memory.fill(0);
		}
		return found;
	}

	async [Symbol.asyncDispose](): Promise<void> {
		await this.kv[Symbol.asyncDispose]();
	}
}
