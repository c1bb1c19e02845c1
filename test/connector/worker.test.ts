import { afterEach, describe, expect, it } from "vitest";
import { Client } from "../../ts/client.js";
import {
	createSchedulerAdapter,
	createWorkerAdapter,
	type ErrorCode,
	type KvCacheLayout,
	KvferryError,
	type LayerKv,
	type LoadStoreOp,
	ParallelStrategy,
	Server,
	type WorkerAdapter,
	WorkerConnector,
} from "../../ts/index.js";
import { ServerProcess } from "../server-process.js";
import {
	BLOCK,
	BLOCKS,
	CHUNK,
	Engine,
	fill,
	held,
	range,
	received,
	run,
	SHAPES,
	sent,
	step,
	TOKENS,
} from "./paged-engine.js";

const open: AsyncDisposable[] = [];

afterEach(async () => {
	for (const handle of open.splice(0).reverse()) {
		await handle[Symbol.asyncDispose]();
	}
});

async function server(): Promise<Server> {
	const started = await Server.start({ listen: false, memory: 2 ** 22, chunkSize: CHUNK });
	open.push(started);
	return started;
}

async function worker(
	via: Server | Client,
	engine: Engine,
	parallelStrategy = ParallelStrategy.single(),
): Promise<WorkerConnector> {
	// However busy the machine is, nothing is left out for that.
	const saveTimeoutMs = 20_000;
	const adapter = createWorkerAdapter({ via, modelName: "m", parallelStrategy, saveTimeoutMs });
	const connector = new WorkerConnector({ adapter, parallelStrategy });
	open.push(connector);
	await connector.registerKvCaches(engine.caches, engine.layout);
	return connector;
}

async function lookup(
	via: Server | Client,
	requestId: string,
	cacheSalt = "",
	parallelStrategy = ParallelStrategy.single(),
): Promise<number> {
	const adapter = createSchedulerAdapter({ via, modelName: "m", parallelStrategy });
	adapter.maybeSubmitLookupRequest(requestId, TOKENS, { cacheSalt });
	for (;;) {
		const found = adapter.checkLookupResult(requestId);
		if (found !== null) {
			return found;
		}
		await new Promise((resolve) => setImmediate(resolve));
	}
}

const BLOCKS_OF_3 = [3, 4, 5, 9, 0, 1, 15, 14, 13, 2, 7, 8];
const OTHER_BLOCKS = [8, 1, 2, 3, 12, 11, 10, 9, 4, 5, 6, 7];

describe("a worker's connector", () => {
	for (const shape of SHAPES) {
		for (const kvLayout of ["NHD", "HND"] as const) {
			it(`loads what a worker with ${shape.planes} ${shape.kvLayout} stored, into ${kvLayout}`, async () => {
				const via = await server();
				const first = new Engine(shape);
				fill(first, BLOCKS_OF_3);
				const storing = await worker(via, first);
				await run(storing, step("STORE", BLOCKS_OF_3));
				await sent(storing, "r");
				const second = new Engine({ ...shape, kvLayout });
				const loading = await worker(via, second);
				expect(await lookup(via, "r2")).toBe(3 * CHUNK);
				await run(loading, step("RETRIEVE", OTHER_BLOCKS, { requestId: "r2" }));
				await received(loading, "r2");
				expect(loading.getBlockIdsWithLoadErrors().size).toBe(0);
				expect(held(second, OTHER_BLOCKS)).toEqual(range(0, 3 * CHUNK));
				for (const block of range(0, BLOCKS).filter((id) => !OTHER_BLOCKS.includes(id))) {
					expect(held(second, [block])).toEqual([]);
				}
			});
		}
	}

	it.each([
		["its shared memory", true],
		["bytes in frames", false],
	])("does the same through a server in another process, by %s", async (_, sharedMemory) => {
		const process = await ServerProcess.start("--chunk-size", String(CHUNK));
		open.push(process);
		const via = await Client.connect({ url: process.url, sharedMemory });
		open.push(via);
		const first = new Engine({ planes: "separate", kvLayout: "NHD" });
		fill(first, BLOCKS_OF_3);
		const storing = await worker(via, first);
		await run(storing, step("STORE", BLOCKS_OF_3));
		for (const array of Object.values(first.kv)) {
			array.fill(0); // the blocks are another's from here on
		}
		await sent(storing, "r");
		expect(await lookup(via, "r2")).toBe(3 * CHUNK);
		const second = new Engine({ planes: "separate", kvLayout: "HND" });
		const loading = await worker(via, second);
		await run(loading, step("RETRIEVE", OTHER_BLOCKS, { requestId: "r2" }));
		await received(loading, "r2");
		expect(loading.getBlockIdsWithLoadErrors().size).toBe(0);
		expect(held(second, OTHER_BLOCKS)).toEqual(range(0, 3 * CHUNK));
	});

	it("leaves the tokens alone that the engine has itself", async () => {
		const via = await server();
		const engine = new Engine({ planes: "separate", kvLayout: "HND" });
		fill(engine, BLOCKS_OF_3);
		const connector = await worker(via, engine);
		await run(connector, step("STORE", BLOCKS_OF_3));
		await sent(connector, "r");
		for (const array of Object.values(engine.kv)) {
			array.fill(0);
		}
		expect(await lookup(via, "r2")).toBe(3 * CHUNK);
		const load = step("RETRIEVE", BLOCKS_OF_3, { requestId: "r2", skip: 2 * BLOCK });
		await run(connector, load);
		await received(connector, "r2");
		expect(held(engine, BLOCKS_OF_3)).toEqual(range(2 * BLOCK, 3 * CHUNK));
	});

	it("names just the blocks that it could not fill, when a chunk is gone after the lookup", async () => {
		const via = await server();
		const connector = await worker(via, new Engine({ planes: "fused", kvLayout: "NHD" }));
		const load = step("RETRIEVE", BLOCKS_OF_3, { skip: 2 * BLOCK });
		await run(connector, load);
		await received(connector, "r");
		expect([...connector.getBlockIdsWithLoadErrors()]).toEqual(BLOCKS_OF_3.slice(2));
		expect(connector.getBlockIdsWithLoadErrors().size).toBe(0);
	});

	it("names no block that the engine has itself, where the last one is missing", async () => {
		const via = await server();
		const engine = new Engine({ planes: "fused", kvLayout: "NHD" });
		await using adapter = createWorkerAdapter({ via, modelName: "m" });
		await adapter.registerKvCaches(engine.caches, engine.layout);
		const blockIds = [[5, 6, 7]];
		const op = { tokenIds: TOKENS, start: 0, end: CHUNK, blockIds, skipFirstNTokens: 2 * BLOCK };
		adapter.batchedSubmitRetrieveRequests(["r"], [op]);
		await adapter.waitForLoads();
		expect([...adapter.getBlockIdsWithLoadErrors()]).toEqual([7]);
	});

	it("uses nothing of a load whose slots were used anew while it copied", async () => {
		const via = await server();
		const engine = new Engine({ planes: "fused", kvLayout: "NHD" });
		const connector = await worker(via, engine);
		await run(connector, step("STORE", BLOCKS_OF_3));
		await sent(connector, "r");
		const openWorker = via.openWorker.bind(via);
		via.openWorker = async (...args) => {
			const native = await openWorker(...args);
			const finish = native.finish.bind(native);
			native.finish = async (...rest) => (await finish(...rest)) && false;
			return native;
		};
		const late = await worker(via, new Engine({ planes: "fused", kvLayout: "NHD" }));
		expect(await lookup(via, "r2")).toBe(3 * CHUNK);
		await run(late, step("RETRIEVE", OTHER_BLOCKS, { requestId: "r2" }));
		await received(late, "r2");
		expect([...late.getBlockIdsWithLoadErrors()]).toEqual(OTHER_BLOCKS);
	});

	it("has loaded before the step computes where the scheduler wants it so, and does not tell it twice", async () => {
		const via = await server();
		const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
		fill(engine, BLOCKS_OF_3);
		const connector = await worker(via, engine);
		await run(connector, step("STORE", BLOCKS_OF_3));
		await sent(connector, "r");
		const other = new Engine({ planes: "separate", kvLayout: "NHD" });
		const loading = await worker(via, other);
		expect(await lookup(via, "r2")).toBe(3 * CHUNK);
		loading.bindConnectorMetadata(step("RETRIEVE", OTHER_BLOCKS, { requestId: "r2", sync: true }));
		loading.startLoadKv();
		await loading.waitForLayerLoad("layer.0");
		expect(held(other, OTHER_BLOCKS)).toHaveLength(3 * CHUNK);
		const [, recving] = loading.getFinished(new Set());
		expect([...recving]).toEqual([]);
	});

	it("stores MLA's KV once per group; each rank loads it, and tells of its requests", async () => {
		const via = await server();
		const engine = new Engine({ planes: "latent", kvLayout: "NHD" });
		fill(engine, BLOCKS_OF_3);
		const ranks = [0, 1].map((rank) => ParallelStrategy.tensorParallel(2, rank, true));
		const workers = await Promise.all(ranks.map((rank) => worker(via, engine, rank)));
		for (const [connector, stored] of [
			[workers[1], 0],
			[workers[0], 3],
		] as const) {
			await run(connector as WorkerConnector, step("STORE", BLOCKS_OF_3));
			await sent(connector as WorkerConnector, "r");
			expect(via.status().stored_chunks).toBe(stored);
		}
		// One lease for each rank: the first to finish does not end the other's.
		expect(await lookup(via, "r2", "", ranks[0])).toBe(3 * CHUNK);
		for (const connector of workers) {
			await run(connector, step("RETRIEVE", OTHER_BLOCKS, { requestId: "r2" }));
			await received(connector, "r2");
			expect(connector.getBlockIdsWithLoadErrors().size).toBe(0);
		}
		expect(via.status().leases).toBe(0);
	});

	it("hands no store to the adapter of a rank that does not store: under MLA not every rank stores", async () => {
		const stored: number[] = [];
		const reported: number[] = [];
		for (const rank of range(0, 4)) {
			const adapter: WorkerAdapter = {
				carriesSalt: true,
				registerKvCaches: async () => {},
				batchedSubmitRetrieveRequests: () => {},
				batchedSubmitStoreRequests: () => stored.push(rank),
				waitForLoads: async () => {},
				waitForSaves: async () => {},
				getFinished: (ended) => [new Set(ended), new Set()],
				getBlockIdsWithLoadErrors: () => new Set(),
				shutdown: async () => {},
			};
			const options = { tensorParallelSize: 2, pipelineParallelSize: 2, rank, useMla: true };
			const parallelStrategy = ParallelStrategy.of(options);
			const connector = new WorkerConnector({ adapter, parallelStrategy });
			await run(connector, step("STORE", BLOCKS_OF_3));
			if (connector.getFinished(new Set(["r"]))[0].has("r")) {
				reported.push(rank);
			}
		}
		expect(stored).toEqual([0, 2]);
		expect(reported).toEqual([0, 1, 2, 3]);
	});

	it("stores each shard when there is no MLA, and a hit needs them all", async () => {
		const via = await server();
		const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
		fill(engine, BLOCKS_OF_3);
		const ranks = [0, 1].map((rank) => ParallelStrategy.tensorParallel(2, rank));
		const [first, second] = await Promise.all(ranks.map((rank) => worker(via, engine, rank)));
		await run(first as WorkerConnector, step("STORE", BLOCKS_OF_3));
		await sent(first as WorkerConnector, "r");
		expect(await lookup(via, "r2", "", ranks[0])).toBe(0);
		await run(second as WorkerConnector, step("STORE", BLOCKS_OF_3));
		await sent(second as WorkerConnector, "r");
		expect(await lookup(via, "r2", "", ranks[0])).toBe(3 * CHUNK);
	});

	it("hands nothing with a salt to an adapter from before salts, and says so once", async () => {
		const calls: unknown[][] = [];
		const adapter: WorkerAdapter = {
			registerKvCaches: async () => {},
			batchedSubmitRetrieveRequests: (...rest) => calls.push(["load", ...rest]),
			batchedSubmitStoreRequests: (...rest) => calls.push(["store", ...rest]),
			waitForLoads: async () => {},
			waitForSaves: async () => {},
			getFinished: (ended) => [new Set(ended), new Set()],
			getBlockIdsWithLoadErrors: () => new Set(),
			shutdown: async () => {},
		};
		const warnings: string[] = [];
		const connector = new WorkerConnector({ adapter, onWarning: (text) => warnings.push(text) });
		for (const direction of ["STORE", "RETRIEVE"] as const) {
			await run(connector, step(direction, [1, 2, 3, 4], { salt: "anna", skip: BLOCK }));
		}
		expect(calls).toEqual([]);
		expect(warnings).toHaveLength(1);
		expect([...connector.getFinished(new Set())[1]]).toEqual(["r"]);
		expect([...connector.getBlockIdsWithLoadErrors()]).toEqual([2, 3, 4]);
		// Called as it was before salts: with two arguments.
		await run(connector, step("STORE", [1, 2, 3, 4]));
		expect(calls.map((call) => call.length)).toEqual([3]);
	});

	it("tells that a request's blocks are free only when nothing copies from or to them", async () => {
		const via = await server();
		const connector = await worker(via, new Engine({ planes: "separate", kvLayout: "NHD" }));
		connector.bindConnectorMetadata(step("RETRIEVE", BLOCKS_OF_3));
		connector.startLoadKv();
		for (const wrong of ["r", 7, undefined]) {
			expect(() => connector.getFinished(wrong as never)).toThrow(
				expect.objectContaining({
					code: "INVALID_ARGUMENT",
					message: expect.stringContaining("finishedRequestIds must be"),
				}),
			);
		}
		const [sending] = connector.getFinished(new Set(["r", "other"]));
		expect([...sending]).toEqual(["other"]);
		await connector.shutdown();
		const [later, recving] = connector.getFinished(new Set());
		expect([[...later], [...recving]]).toEqual([["r"], ["r"]]);
	});
});

describe.each(["in this process", "in another process"])("the salt, in a cache %s", (where) => {
	async function cache() {
		if (where === "in this process") {
			return await server();
		}
		const process = await ServerProcess.start("--chunk-size", String(CHUNK));
		open.push(process);
		const via = await Client.connect({ url: process.url });
		open.push(via);
		return via;
	}

	async function engine() {
		const via = await cache();
		const memory = new Engine({ planes: "separate", kvLayout: "NHD" });
		fill(memory, BLOCKS_OF_3);
		return { via, connector: await worker(via, memory) };
	}

	const figure = async (via: Server | Client, name: string) => (await via.status())[name];

	it("is not dropped by a store, nor by its commit", async () => {
		const { via, connector } = await engine();
		await run(connector, step("STORE", BLOCKS_OF_3, { salt: "anna" }));
		await sent(connector, "r");
		expect(await figure(via, "slots_writing")).toBe(0);
		expect(await lookup(via, "none")).toBe(0);
		expect(await lookup(via, "bob", "bob")).toBe(0);
		expect(await lookup(via, "anna", "anna")).toBe(3 * CHUNK);
	});

	it("is not dropped by a lookup", async () => {
		const { via, connector } = await engine();
		await run(connector, step("STORE", BLOCKS_OF_3));
		await sent(connector, "r");
		expect(await lookup(via, "anna", "anna")).toBe(0);
		expect(await lookup(via, "none")).toBe(3 * CHUNK);
	});

	it("is not dropped when leases are given back", async () => {
		const { via, connector } = await engine();
		await run(connector, step("STORE", BLOCKS_OF_3, { salt: "anna" }));
		await sent(connector, "r");
		expect(await lookup(via, "a", "anna")).toBe(3 * CHUNK);
		expect(await figure(via, "leases")).toBe(3);
		const adapter = createSchedulerAdapter({ via, modelName: "m" });
		adapter.freeLookupLocks("a", TOKENS, 0, 2 * CHUNK, { cacheSalt: "anna" });
		await expect.poll(() => figure(via, "leases"), { timeout: 5000 }).toBe(1);
	});

	it("is not dropped by a load, nor by its end", async () => {
		const { via, connector } = await engine();
		await run(connector, step("STORE", BLOCKS_OF_3, { salt: "anna" }));
		await sent(connector, "r");
		expect(await lookup(via, "a", "anna")).toBe(3 * CHUNK);
		// A lease of one tenant opens nothing to another.
		await run(connector, step("RETRIEVE", OTHER_BLOCKS, { requestId: "a", salt: "bob" }));
		await received(connector, "a");
		expect(connector.getBlockIdsWithLoadErrors().size).toBe(OTHER_BLOCKS.length);
		await run(connector, step("RETRIEVE", OTHER_BLOCKS, { requestId: "a", salt: "anna" }));
		await received(connector, "a");
		expect(connector.getBlockIdsWithLoadErrors().size).toBe(0);
		expect([await figure(via, "leases"), await figure(via, "slots_reading")]).toEqual([0, 0]);
	});
});

describe("a cache that is slow", () => {
	it("does not hold the engine up for a store, and gets nothing that was computed later", async () => {
		const via = await server();
		const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
		fill(engine, BLOCKS_OF_3);
		let answer = () => {};
		const openWorker = via.openWorker.bind(via);
		via.openWorker = async (...args) => {
			const native = await openWorker(...args);
			const store = native.store.bind(native);
			native.store = async (...rest) => {
				const granted = await store(...rest);
				await new Promise<void>((resolve) => {
					answer = resolve;
				});
				return granted;
			};
			return native;
		};
		const adapter = createWorkerAdapter({ via, modelName: "m", saveTimeoutMs: 5 });
		const connector = new WorkerConnector({ adapter });
		open.push(connector);
		await connector.registerKvCaches(engine.caches, engine.layout);
		await run(connector, step("STORE", BLOCKS_OF_3));
		expect(via.status().slots_writing).toBe(3);
		answer();
		await sent(connector, "r");
		expect(adapter.droppedStores).toBe(1);
		expect(via.status()).toMatchObject({ stored_chunks: 0, slots_writing: 0 });
	});

	it("leaves no registration behind when the adapter is shut down meanwhile", async () => {
		const via = await server();
		const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
		const adapter = createWorkerAdapter({ via, modelName: "m" });
		const registering = adapter.registerKvCaches(engine.kv, engine.layout);
		await adapter.shutdown();
		await expect(registering).rejects.toMatchObject({ code: "CLOSED" });
		expect(via.status().instances).toBe(0);
	});
});

describe("flush", () => {
	it("resolves when others find what was stored", async () => {
		await using process = await ServerProcess.start("--chunk-size", String(CHUNK));
		const client = await Client.connect({ url: process.url });
		open.push(client);
		const kv = { a: new Uint32Array(new SharedArrayBuffer(2 * 64 * 4)) };
		const layout = { numBlocks: 64, blockSize: 1, numKvHeads: 1, headSize: 1, dtype: "int32" };
		const adapter = createWorkerAdapter({ via: client, modelName: "m", saveTimeoutMs: 20_000 });
		await adapter.registerKvCaches(kv, layout);
		await adapter.flush(); // nothing was stored: at once
		const end = CHUNK;
		const blockIds = [range(0, CHUNK)];
		const op = { tokenIds: TOKENS, start: 0, end, blockIds, skipFirstNTokens: 0 };
		adapter.batchedSubmitStoreRequests(["r"], [op]);
		await adapter.flush();
		expect([adapter.pendingOperations, adapter.storedChunks]).toEqual([0, 1]);
		expect(await lookup(client, "other")).toBe(CHUNK);
		await adapter.shutdown();
	});
});

describe("blocks of one token", () => {
	it("are loaded though the block of the last token is missing", async () => {
		const via = await server();
		const kv = { a: new Uint32Array(2 * 64) };
		const layout = { numBlocks: 64, blockSize: 1, numKvHeads: 1, headSize: 1, dtype: "int32" };
		const adapter = createWorkerAdapter({ via, modelName: "m" });
		const connector = new WorkerConnector({ adapter });
		open.push(connector);
		await connector.registerKvCaches(kv, layout);
		kv.a.set(range(1, 129));
		const all = range(0, 3 * CHUNK);
		const metadata = (direction: "STORE" | "RETRIEVE", blocks: number[], requestId: string) => {
			const op = {
				tokenIds: TOKENS,
				start: 0,
				end: 3 * CHUNK,
				blockIds: [blocks],
				skipFirstNTokens: 0,
			};
			return { loadAsync: true, requests: [{ requestId, direction, op, cacheSalt: "" }] };
		};
		await run(connector, metadata("STORE", all, "r"));
		await sent(connector, "r");
		kv.a.fill(0);
		expect(await lookup(via, "r2")).toBe(3 * CHUNK);
		await run(connector, metadata("RETRIEVE", all.slice(0, -1), "r2"));
		await received(connector, "r2");
		expect(connector.getBlockIdsWithLoadErrors().size).toBe(0);
		expect([...kv.a.subarray(0, 48)]).toEqual([...range(1, 48), 0]);
		expect([...kv.a.subarray(64, 112)]).toEqual([...range(65, 112), 0]);
	});
});

describe("memory that does not fit", () => {
	const good = new Engine({ planes: "separate", kvLayout: "NHD" });
	const cases: [string, Record<string, LayerKv>, Partial<KvCacheLayout>, RegExp][] = [
		[
			"a block that does not divide the chunk",
			good.kv,
			{ blockSize: 5 },
			/16 tokens .* blocks of 5/,
		],
		["no layer", {}, {}, /0 layers/],
		["arrays of another size", good.kv, { numBlocks: 17 }, /layer\.0 has an array of \d+ bytes/],
		["a negative count", good.kv, { numBlocks: -1 }, /numBlocks is -1/],
		["a type that is not known", good.kv, { dtype: "float17" }, /float17/],
		[
			"a shape that is not known",
			good.kv,
			{ planes: "two" as "fused" },
			/planes is "two": it must/,
		],
		["an order that is not known", good.kv, { kvLayout: "hnd" as "HND" }, /kvLayout is "hnd"/],
		["a misspelt order", good.kv, { kvLayot: "HND" } as object, /"kvLayot": did you mean kvLayout/],
		["a misspelt shape", good.kv, { plane: "fused" } as object, /"plane": did you mean planes/],
		["heads in a latent plane", good.kv, { planes: "latent" }, /one head, not 3/],
		[
			"K that is V",
			{ a: [good.kv["layer.0"], good.kv["layer.0"]] as never },
			{ numBlocks: 32 },
			/arrays of layer a and of layer a overlap/,
		],
		["no array", { a: 7 as unknown as LayerKv }, {}, /layer a must be a typed array/],
		[
			"one K without V",
			{ a: [good.kv["layer.0"]] as never },
			{ numBlocks: 8 },
			/has 1 arrays|array of/,
		],
	];
	for (const [what, kv, layout, message] of cases) {
		it(`is refused: ${what}`, async () => {
			const via = await server();
			const adapter = createWorkerAdapter({ via, modelName: "m" });
			const registering = adapter.registerKvCaches(kv, { ...good.layout, ...layout });
			await expect(registering).rejects.toThrow(message);
			await expect(registering).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
			expect(via.status().instances).toBe(0);
			// As before: the right memory is taken.
			await adapter.registerKvCaches(good.kv, good.layout);
			await adapter.shutdown();
		});
	}

	it("is no layer's twice: what uses another layer's KV is left out", async () => {
		const via = await server();
		const { numBlocks, blockSize, numKvHeads, headSize } = good.layout;
		const bytes = (numBlocks ?? 0) * (blockSize ?? 16) * numKvHeads * headSize * 2;
		const all = new Uint8Array(3 * bytes);
		const part = (at: number) => all.subarray(at * bytes, (at + 1) * bytes);
		const layout = { ...good.layout, dtype: "float16" };
		const register = async (kv: Record<string, LayerKv>) => {
			await using adapter = createWorkerAdapter({ via, modelName: "m" });
			await adapter.registerKvCaches(kv, layout);
		};
		for (const [b, message] of [
			[[part(0), part(1)], /layer a and layer b have the same memory: name it once/],
			[[part(1), part(2)], /layer a and layer b have the same memory/],
			[[all.subarray(2, bytes + 2), part(2)], /arrays of layer a and of layer b overlap/],
		] as const) {
			await expect(register({ a: [part(0), part(1)], b: [...b] })).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: expect.stringMatching(message),
			});
		}
		await expect(register({ a: [part(0), part(0)] })).rejects.toThrow(
			/layer a and of layer a overlap/,
		);
	});

	it("a step with blocks beyond the pool stores nothing and leaves the engine computing", async () => {
		const via = await server();
		const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
		const adapter = createWorkerAdapter({ via, modelName: "m" });
		const connector = new WorkerConnector({ adapter });
		open.push(connector);
		await connector.registerKvCaches(engine.caches, engine.layout);
		await run(connector, step("STORE", [1, 2, 3, BLOCKS]));
		await sent(connector, "r");
		expect(adapter.failure?.message).toMatch(/block 16 is beyond the engine's 16/);
		expect(via.status()).toMatchObject({ stored_chunks: 0, slots_writing: 0 });
	});

	it("a detached array is named, and what it should have filled is not used", async () => {
		const via = await server();
		const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
		fill(engine, BLOCKS_OF_3);
		const connector = await worker(via, engine);
		await run(connector, step("STORE", BLOCKS_OF_3));
		await sent(connector, "r");
		expect(await lookup(via, "r2")).toBe(3 * CHUNK);
		structuredClone(engine.kv["layer.1"], {
			transfer: [engine.kv["layer.1"]?.buffer as ArrayBuffer],
		});
		await run(connector, step("RETRIEVE", OTHER_BLOCKS, { requestId: "r2" }));
		await received(connector, "r2");
		expect(connector.getBlockIdsWithLoadErrors().size).toBe(OTHER_BLOCKS.length);
		expect(via.status()).toMatchObject({ leases: 0, slots_reading: 0 });
	});

	it("is used after shutdown: a typed error", async () => {
		const via = await server();
		const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
		const adapter = createWorkerAdapter({ via, modelName: "m" });
		expect(() => adapter.batchedSubmitStoreRequests([], [])).toThrow(/registerKvCaches/);
		await adapter.registerKvCaches(engine.kv, engine.layout);
		await adapter.shutdown();
		expect(() => adapter.batchedSubmitStoreRequests([], [])).toThrow(KvferryError);
	});
});

describe("a batch that means nothing", () => {
	const good: LoadStoreOp = {
		tokenIds: TOKENS,
		start: 0,
		end: 3 * CHUNK,
		blockIds: [BLOCKS_OF_3],
		skipFirstNTokens: 0,
	};
	const one = (change: object) => [["r"], [{ ...good, ...change }]];
	it.each<[string, unknown[], ErrorCode?]>([
		["ops has 1 entries for 2 request ids", [["r", "s"], [good]]],
		["ops has 2 entries for 1 request ids", [["r"], [good, good]]],
		["cacheSalts has 1 entries for 2", [["r", "s"], [good, good], ["anna"]]],
		["cacheSalts has 2 entries for 1", [["r"], [good], ["anna", "bob"]]],
		["ops has no entries for 1", [["r"], undefined]],
		["requestIds has no entries for no", [undefined, [good]]],
		["a request id must be a string", [[7], [good]]],
		["a request id has half of a surrogate pair", [["\ud800"], [good]]],
		["the range 4..48 of r is not one of whole chunks of 16", one({ start: BLOCK })],
		["the range 0..44 of r is not one of whole chunks of 16", one({ end: 44 })],
		["start of r is 32: it must be an integer from 0 to 16", one({ start: 32, end: 16 })],
		["end of r is 64: it must be an integer from 0 to 48", one({ end: 4 * CHUNK })],
		["start of r is -16", one({ start: -CHUNK })],
		["end of r is NaN", one({ end: Number.NaN })],
		["skipFirstNTokens of r is -1", one({ skipFirstNTokens: -1 })],
		["skipFirstNTokens of r is 49", one({ skipFirstNTokens: 49 })],
		["a block id of r is -1", one({ blockIds: [[-1, ...BLOCKS_OF_3.slice(1)]] })],
		["blockIds of r must be", one({ blockIds: BLOCKS_OF_3 })],
		["tokenIds of r must be", one({ tokenIds: undefined })],
		["a salt must not contain '@'", [["r"], [good], ["a@b"]], "INVALID_SALT"],
		["cacheSalt must be a string", [["r"], [good], ["\ud800"]], "INVALID_SALT"],
		["cacheSalt must be a string", [["r"], [good], [7]], "INVALID_SALT"],
	])(
		"is refused as a whole, and none of it begins: %s",
		async (message, batch, code = "INVALID_ARGUMENT") => {
			const via = await server();
			const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
			fill(engine, BLOCKS_OF_3);
			const adapter = createWorkerAdapter({ via, modelName: "m" });
			open.push(new WorkerConnector({ adapter }));
			await adapter.registerKvCaches(engine.kv, engine.layout);
			const figures = () => ({ ...via.status(), uptime_seconds: 0 });
			const before = figures();
			// Behind a good operation too, which must not begin either.
			const [ids, ops, salts] = batch as [string[], LoadStoreOp[], string[]?];
			const behind = [["good", ...(ids ?? [])], [good, ...(ops ?? [])], salts && ["", ...salts]];
			for (const given of [batch, ...(ids && ops ? [behind] : [])] as [string[], LoadStoreOp[]][]) {
				for (const call of [
					"batchedSubmitStoreRequests",
					"batchedSubmitRetrieveRequests",
				] as const) {
					const refused = () => adapter[call](...given);
					expect(refused).toThrow(expect.objectContaining({ code }));
					if (given === batch) {
						expect(refused).toThrow(message);
					}
				}
			}
			expect(adapter.pendingOperations).toBe(0);
			const [sending, recving] = adapter.getFinished(new Set(["r", "good"]));
			expect([[...sending], [...recving]]).toEqual([["r", "good"], []]);
			expect(adapter.getBlockIdsWithLoadErrors().size).toBe(0);
			expect(figures()).toEqual(before);
			adapter.batchedSubmitStoreRequests(["r"], [good]);
			await adapter.shutdown();
			expect([adapter.storedChunks, adapter.failure]).toEqual([3, undefined]);
		},
	);
});

describe("a scheduler's adapter", () => {
	it("keeps, frees and ends leases as it is told", async () => {
		const via = await server();
		const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
		const connector = await worker(via, engine);
		await run(connector, step("STORE", BLOCKS_OF_3));
		await sent(connector, "r");
		const adapter = createSchedulerAdapter({ via, modelName: "m" });
		adapter.maybeSubmitLookupRequest("a", TOKENS);
		adapter.maybeSubmitLookupRequest("a", TOKENS); // asked again: the same lookup
		expect(adapter.checkLookupResult("a")).toBe(null);
		await new Promise((resolve) => setImmediate(resolve));
		expect(adapter.checkLookupResult("a")).toBe(3 * CHUNK);
		expect(via.status().leases).toBe(3);
		adapter.freeLookupLocks("a", TOKENS, 0, CHUNK + BLOCK);
		expect(via.status().leases).toBe(2);
		adapter.cleanupLookupResult("a");
		adapter.endSession("a");
		expect(via.status().leases).toBe(0);
		expect(adapter.pendingLookups).toBe(0);
	});

	it("finds nothing, rather than failing, when the cache does", async () => {
		const via = await Server.start({ listen: false, memory: 2 ** 20, chunkSize: CHUNK });
		const adapter = createSchedulerAdapter({ via, modelName: "m" });
		await via.close();
		const process = await ServerProcess.start("--chunk-size", String(CHUNK));
		const client = await Client.connect({ url: process.url });
		open.push(client);
		const remote = createSchedulerAdapter({ via: client, modelName: "m", timeoutMs: 2000 });
		await process[Symbol.asyncDispose]();
		remote.maybeSubmitLookupRequest("a", TOKENS);
		while (remote.checkLookupResult("a") === null) {
			await new Promise((resolve) => setImmediate(resolve));
		}
		expect(remote.checkLookupResult("a")).toBe(0);
		expect(remote.failure?.code).toBe("UNREACHABLE");
		adapter.endSession("a");
	});

	it("refuses tokens, salts and names that could mean something else", async () => {
		const via = await server();
		const adapter = createSchedulerAdapter({ via, modelName: "m" });
		for (const bad of [[0.5], [-1], [2 ** 32], [Number.NaN]]) {
			expect(() => adapter.maybeSubmitLookupRequest("a", bad)).toThrow(/token 0 is/);
		}
		expect(() => adapter.maybeSubmitLookupRequest("a", TOKENS, { cacheSalt: "a/b" })).toThrow(
			expect.objectContaining({ code: "INVALID_SALT" }),
		);
		expect(adapter.pendingLookups).toBe(0);
		expect(() => createSchedulerAdapter({ via, modelName: "a@b" })).toThrow(/must not contain/);
		expect(() => createSchedulerAdapter({ via, modelName: "" })).toThrow(/modelName is empty/);
	});

	it("refuses ranges and ids that cannot be, and gives nothing back then", async () => {
		const via = await server();
		const connector = await worker(via, new Engine({ planes: "separate", kvLayout: "NHD" }));
		await run(connector, step("STORE", BLOCKS_OF_3));
		await sent(connector, "r");
		const adapter = createSchedulerAdapter({ via, modelName: "m" });
		adapter.maybeSubmitLookupRequest("a", TOKENS);
		await expect.poll(() => adapter.checkLookupResult("a")).toBe(3 * CHUNK);
		const free = (start: number, end: number, cacheSalt?: string) => () =>
			adapter.freeLookupLocks("a", TOKENS, start, end, { cacheSalt });
		const refused: [() => unknown, string, ErrorCode?][] = [
			[free(CHUNK, 0), "start of a is 16: it must be an integer from 0 to 0"],
			[free(-1, CHUNK), "start of a is -1"],
			[free(Number.NaN, CHUNK), "start of a is NaN"],
			[free(0, TOKENS.length + 1), "end of a is 49: it must be an integer from 0 to 48"],
			[free(0, Number.NaN), "end of a is NaN"],
			[free(0, CHUNK, "a/b"), "must not contain '/'", "INVALID_SALT"],
			[() => adapter.freeLookupLocks(7 as never, TOKENS, 0, CHUNK), "requestId must be a string"],
			[() => adapter.freeLookupLocks("a", null as never, 0, CHUNK), "tokenIds must be"],
			[() => adapter.maybeSubmitLookupRequest(7 as never, TOKENS), "requestId must be a string"],
			[() => adapter.maybeSubmitLookupRequest("b", null as never), "tokenIds must be"],
			[() => adapter.endSession(7 as never), "requestId must be a string"],
		];
		for (const [call, message, code = "INVALID_ARGUMENT"] of refused) {
			expect(call).toThrow(
				expect.objectContaining({ code, message: expect.stringContaining(message) }),
			);
		}
		const { leases } = via.status();
		expect([leases, adapter.pendingLookups, adapter.failure]).toEqual([3, 1, undefined]);
		expect(adapter.checkLookupResult("unknown")).toBe(0);
		free(0, 3 * CHUNK)();
		expect(via.status().leases).toBe(0);
	});

	it("takes the former loose parameters, seconds included", async () => {
		const via = await server();
		const loose = { kvWorldSize: 2, kvWorkerId: 1, blockSize: BLOCK, mqTimeout: 0.5 };
		expect(createSchedulerAdapter({ via, modelName: "m", ...loose }).chunkSize).toBe(CHUNK);
		expect(() => createSchedulerAdapter({ via, modelName: "m", ...loose, mqTimeout: -1 })).toThrow(
			/timeoutMs is -1000/,
		);
	});
});
