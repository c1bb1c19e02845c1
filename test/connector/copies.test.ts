// Copies that run by themselves: memory on SharedArrayBuffers, and memory by its address.

import { existsSync } from "node:fs";
import { open as openFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { afterEach, describe, expect, it } from "vitest";
import { addonOf, simulatorRoot } from "../../scripts/simulator-build.mjs";
import {
	type CacheWorkerAdapter,
	Client,
	createSchedulerAdapter,
	createWorkerAdapter,
	type KvCacheLayout,
	KvferryError,
	type LayerKv,
	Server,
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

const { simulatorAddress } = createRequire(import.meta.url)(addonOf(simulatorRoot)) as {
	simulatorAddress(array: Uint8Array): bigint;
};

const FROM = [3, 4, 5, 9, 0, 1, 15, 14, 13, 2, 7, 8];
const TO = [8, 1, 2, 3, 12, 11, 10, 9, 4, 5, 6, 7];
const NHD = { planes: "separate", kvLayout: "NHD" } as const;

const open: AsyncDisposable[] = [];

afterEach(async () => {
	for (const handle of open.splice(0).reverse()) {
		await handle[Symbol.asyncDispose]();
	}
});

async function server(memory = 2 ** 22, chunkSize = CHUNK): Promise<Server> {
	const started = await Server.start({ listen: false, memory, chunkSize });
	open.push(started);
	return started;
}

/** The same memory, by its address. */
function byAddress(caches: Record<string, LayerKv>): Record<string, LayerKv> {
	const pointer = (view: ArrayBufferView) => ({
		pointer: simulatorAddress(new Uint8Array(view.buffer, view.byteOffset, view.byteLength)),
		byteLength: view.byteLength,
	});
	const layers = Object.entries(caches).map(([name, kv]) => [
		name,
		Array.isArray(kv) ? kv.map(pointer) : pointer(kv as ArrayBufferView),
	]);
	return Object.fromEntries(layers);
}

async function worker(
	via: Server | Client,
	caches: Record<string, LayerKv>,
	layout: KvCacheLayout,
	options: { saveTimeoutMs?: number; verify?: "always" | "never" } = {},
): Promise<WorkerConnector & { adapter: CacheWorkerAdapter }> {
	const adapter = createWorkerAdapter({ via, modelName: "m", ...options });
	const connector = new WorkerConnector({ adapter });
	open.push(connector);
	await connector.registerKvCaches(caches, layout);
	return Object.assign(connector, { adapter });
}

async function lookup(via: Server | Client, requestId: string, tokens = TOKENS): Promise<number> {
	const adapter = createSchedulerAdapter({ via, modelName: "m" });
	adapter.maybeSubmitLookupRequest(requestId, tokens);
	let found = adapter.checkLookupResult(requestId);
	while (found === null) {
		await new Promise((resolve) => setImmediate(resolve));
		found = adapter.checkLookupResult(requestId);
	}
	return found;
}

describe("memory that copies run to by themselves", () => {
	for (const shape of SHAPES) {
		for (const interleaved of shape.planes === "separate" ? [false, true] : [false]) {
			for (const how of ["on SharedArrayBuffers", "by its address"]) {
				const side = interleaved ? ", K and V side by side" : "";
				it(`stores and loads ${shape.planes} ${shape.kvLayout}${side}, ${how}`, async () => {
					const via = await server();
					const first = new Engine(shape, "shared", interleaved);
					fill(first, FROM);
					const caches = (engine: Engine) =>
						how === "by its address" ? byAddress(engine.caches) : engine.caches;
					const storing = await worker(via, caches(first), first.layout);
					await run(storing, step("STORE", FROM));
					for (const array of Object.values(first.kv)) {
						array.fill(0); // the blocks are another's from here on
					}
					await sent(storing, "r");
					expect(storing.adapter.storedChunks).toBe(3);
					expect(await lookup(via, "r2")).toBe(3 * CHUNK);
					const second = new Engine(shape, "shared", interleaved);
					const loading = await worker(via, caches(second), second.layout);
					await run(loading, step("RETRIEVE", TO, { requestId: "r2", skip: 2 * BLOCK }));
					await received(loading, "r2");
					expect(loading.getBlockIdsWithLoadErrors().size).toBe(0);
					expect(held(second, TO)).toEqual(range(2 * BLOCK, 3 * CHUNK));
					const others = range(0, BLOCKS).filter((id) => !TO.slice(2).includes(id));
					for (const block of others) {
						expect(held(second, [block])).toEqual([]);
					}
				});
			}
		}
	}

	const layers = range(0, 16).map((layer) => `layer.${layer}`);
	const tokenIds = range(0, 16 * 256);
	const layout = { numBlocks: 16, blockSize: 256, numKvHeads: 8, headSize: 128, dtype: "float16" };
	const blockIds = [range(0, 16)];
	const op = { tokenIds, start: 0, end: tokenIds.length, blockIds, skipFirstNTokens: 0 };
	const large = (direction: "STORE" | "RETRIEVE", requestId: string) => ({
		loadAsync: false,
		requests: [{ requestId, direction, op, cacheSalt: "" }],
	});
	/** 256 MiB of KV. */
	const memory = (Buffer: new (bytes: number) => ArrayBufferLike) => {
		const bytes = 2 * 16 * 256 * 8 * 128 * 2;
		return Object.fromEntries(layers.map((name) => [name, new Uint16Array(new Buffer(bytes))]));
	};

	for (const Buffer of [SharedArrayBuffer, ArrayBuffer]) {
		it(`lets JavaScript go on meanwhile, and has a layer when it says so (${Buffer.name})`, async () => {
			const via = await server(2 ** 28, 256);
			const [from, to] = [memory(Buffer), memory(Buffer)];
			layers.forEach((name, layer) => {
				from[name]?.fill(layer + 1);
			});
			const storing = await worker(via, from, layout, { saveTimeoutMs: 1 });
			await run(storing, large("STORE", "r"));
			for (const name of layers) {
				from[name]?.fill(0); // the engine goes on: what it was told is saved must be
			}
			await sent(storing, "r");
			expect(await lookup(via, "r2", tokenIds)).toBe(tokenIds.length);
			const loading = await worker(via, to, layout);
			loading.bindConnectorMetadata(large("RETRIEVE", "r2"));
			let turns = 0;
			const turning = setInterval(() => turns++, 0);
			loading.startLoadKv();
			for (const [layer, name] of layers.entries()) {
				await loading.waitForLayerLoad(name);
				expect(to[name]?.every((element) => element === layer + 1)).toBe(true);
			}
			await loading.waitForSave();
			clearInterval(turning);
			expect(loading.getBlockIdsWithLoadErrors().size).toBe(0);
			expect(turns).toBeGreaterThan(0);
			await expect(loading.waitForLayerLoad("layer.16")).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
			});
		});
	}

	it("is not stored from nor loaded to once it is gone in mid-copy", async () => {
		const via = await server(2 ** 28, 256);
		const from = memory(ArrayBuffer);
		const storing = await worker(via, from, layout);
		const running = run(storing, large("STORE", "r"));
		const last = from["layer.15"] as Uint16Array;
		structuredClone(last, { transfer: [last.buffer as ArrayBuffer] });
		await running;
		await sent(storing, "r");
		expect(storing.adapter.storedChunks).toBe(0);
		expect(storing.adapter.failure?.message).toContain("transferred");
		expect(via.status()).toMatchObject({ objects: 0, slots_writing: 0 });
	});

	const bad: [string, (engine: Engine) => Record<string, LayerKv>, Partial<KvCacheLayout>?][] = [
		[
			"is half an array",
			({ kv }) => ({ ...kv, "layer.0": [kv["layer.0"], kv["layer.1"]] as never }),
		],
		[
			"has no address",
			({ kv }) => ({ ...byAddress(kv), "layer.0": { pointer: 0n, byteLength: 3840 } }),
		],
		["has a number for an address", ({ kv }) => ({ ...kv, "layer.0": { pointer: 1 } as never })],
		[
			"has a negative address",
			({ kv }) => ({ ...kv, "layer.0": { pointer: -8n, byteLength: 3840 } }),
		],
		[
			"ends beyond the last address",
			({ kv }) => ({ ...byAddress(kv), "layer.0": { pointer: 2n ** 64n - 16n, byteLength: 3840 } }),
		],
		[
			"is not aligned",
			({ kv }) => ({ ...byAddress(kv), "layer.0": { pointer: 4097n, byteLength: 3840 } }),
		],
		[
			"is partly by address",
			({ kv }) => ({ ...kv, "layer.0": byAddress(kv)["layer.0"] as LayerKv }),
		],
		["is two layers' at once", ({ kv }) => ({ ...kv, "layer.1": kv["layer.0"] as Uint16Array })],
		["has blocks that overlap", ({ kv }) => kv, { blockStride: 10 }],
		["has a stride that is none", ({ kv }) => kv, { blockStride: 0.5 }],
		["is of a device that is not known", ({ kv }) => byAddress(kv), { device: "tpu" }],
		["is a GPU's without an address", ({ kv }) => kv, { device: "cuda" }],
		[
			"has a number for a stream",
			({ kv }) => byAddress(kv),
			{ device: "cuda", stream: 0 as unknown as bigint },
		],
		[
			"is ordered by each thread's own stream",
			({ kv }) => byAddress(kv),
			{ device: "cuda:1", stream: 2n },
		],
	];
	for (const [name, caches, layout] of bad) {
		it(`is refused when it ${name}, and another registration succeeds`, async () => {
			const via = await server();
			const engine = new Engine(NHD, "shared");
			const adapter = createWorkerAdapter({ via, modelName: "m" });
			const connector = new WorkerConnector({ adapter });
			open.push(connector);
			const wrong = connector.registerKvCaches(caches(engine), { ...engine.layout, ...layout });
			await expect(wrong).rejects.toBeInstanceOf(KvferryError);
			await expect(wrong).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
			await connector.registerKvCaches(engine.caches, engine.layout);
			fill(engine, FROM);
			await run(connector, step("STORE", FROM));
			await sent(connector, "r");
			expect(adapter.storedChunks).toBe(3);
		});
	}

	it("is not summed when it is a GPU's", async () => {
		const engine = new Engine(NHD, "shared");
		const layout = { ...engine.layout, device: "cuda" };
		const registering = worker(await server(), byAddress(engine.kv), layout, { verify: "always" });
		await expect(registering).rejects.toMatchObject({ code: "UNSUPPORTED_OPTION" });
	});

	it("may be the host's where there is no CUDA, and an error says what is missing", async (context) => {
		if (existsSync("/dev/nvidiactl")) {
			context.skip("this machine has a GPU: npm run test:gpu tests it");
		}
		const via = await server();
		const engine = new Engine(NHD, "shared");
		const adapter = createWorkerAdapter({ via, modelName: "m" });
		const connector = new WorkerConnector({ adapter });
		open.push(connector);
		const cuda = { ...engine.layout, device: "cuda" };
		const registering = connector.registerKvCaches(byAddress(engine.kv), cuda);
		await expect(registering).rejects.toMatchObject({ code: "CUDA_UNAVAILABLE" });
		await expect(registering).rejects.toThrow(/libcuda/);
		await connector.registerKvCaches(engine.caches, engine.layout);
		fill(engine, FROM);
		await run(connector, step("STORE", FROM));
		await sent(connector, "r");
		expect(adapter.storedChunks).toBe(3);
	});

	it("loads no block twice", async () => {
		const via = await server();
		const engine = new Engine(NHD, "shared");
		fill(engine, FROM);
		const connector = await worker(via, engine.caches, engine.layout);
		await run(connector, step("STORE", FROM));
		await sent(connector, "r");
		expect(await lookup(via, "r2")).toBe(3 * CHUNK);
		const twice = [...TO.slice(0, 11), 8];
		await run(connector, step("RETRIEVE", twice, { requestId: "r2" }));
		await received(connector, "r2");
		expect(connector.adapter.failure?.message).toContain("block 8 would be loaded twice");
		expect(connector.getBlockIdsWithLoadErrors()).toEqual(new Set(twice));
		expect(held(engine, FROM)).toHaveLength(3 * CHUNK);
		expect(via.status()).toMatchObject({ leases: 0, slots_reading: 0 });
	});
});

describe("verified copies", () => {
	for (const memory of ["shared", "array"] as const) {
		/** Something is stored; then a worker looks it up and loads it. */
		const load = async (
			via: Server | Client,
			stored: "always" | "never",
			skip = 0,
			between: () => Promise<void> | void = () => {},
		) => {
			const first = new Engine(NHD, memory);
			fill(first, FROM);
			const storing = await worker(via, first.caches, first.layout, { verify: stored });
			await run(storing, step("STORE", FROM));
			await sent(storing, "r");
			await between();
			const second = new Engine({ ...NHD, kvLayout: "HND" }, memory);
			const loading = await worker(via, second.caches, second.layout, { verify: "always" });
			expect(await lookup(via, "r2")).toBe(3 * CHUNK);
			await run(loading, step("RETRIEVE", TO, { requestId: "r2", skip }));
			await received(loading, "r2");
			return { good: held(second, TO), failed: loading.getBlockIdsWithLoadErrors() };
		};

		it(`load what was stored, the tokens left alone included (${memory})`, async () => {
			const { good, failed } = await load(await server(), "always", 6 * BLOCK);
			expect([good, failed]).toEqual([range(6 * BLOCK, 3 * CHUNK), new Set()]);
		});

		it(`use nothing of a chunk whose bytes have changed, and drop it (${memory})`, async () => {
			const process = await ServerProcess.start("--chunk-size", String(CHUNK));
			open.push(process);
			const via = await Client.connect({ url: process.url });
			open.push(via);
			const { failed } = await load(via, "always", 0, async () => {
				const pool = await openFile(`/dev/shm/${process.shmName}`, "r+");
				const object = 2 * 2 * CHUNK * 3 * 5 * 2;
				await pool.write(Uint8Array.of(0xff), 0, 1, 4096 + object - 7); // of the second chunk
				await pool.close();
			});
			expect(failed).toEqual(new Set(TO));
			expect(await lookup(via, "r3")).toBe(CHUNK);
			expect((await via.status()).damaged_chunks).toBe(1);
		});

		it(`load nothing that was stored without a checksum (${memory})`, async () => {
			const via = await server();
			const { failed } = await load(via, "never");
			expect(failed).toEqual(new Set(TO));
			expect(via.status()).toMatchObject({ leases: 0, slots_reading: 0, objects: 3 });
		});
	}

	it("are refused for what is neither", async () => {
		const via = await server();
		expect(() => createWorkerAdapter({ via, modelName: "m", verify: "yes" as never })).toThrow(
			/verify must be "always" or "never"/,
		);
	});
});
