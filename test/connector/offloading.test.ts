import { setImmediate } from "node:timers/promises";
import { afterEach, describe, expect, it } from "vitest";
import {
	createConnector,
	type EventsOptions,
	KvConnectors,
	ParallelStrategy,
	resolveOffloading,
	Server,
} from "../../ts/index.js";
import { ServerProcess } from "../server-process.js";
import { BLOCK, Engine, freePort, lmcache, range } from "./token-engine.js";

const CHUNK = 16;

const open: AsyncDisposable[] = [];

afterEach(async () => {
	for (const handle of open.splice(0).reverse()) {
		await handle[Symbol.asyncDispose]();
	}
});

async function opened(kv: KvConnectors | undefined): Promise<Engine> {
	const engine = await Engine.open(kv);
	open.push(engine);
	return engine;
}

const native = resolveOffloading({ kvOffloadingSize: 2 ** -8 });

describe("createConnector", () => {
	it("offloads to this process's memory, for all its workers", async () => {
		const workers = [0, 1].map((rank) => ParallelStrategy.tensorParallel(2, rank));
		const options = { modelName: "m", blockSize: BLOCK, chunkSize: CHUNK, workers };
		const engine = await opened(await createConnector(native, options));
		const tokens = range(1000, 1000 + 3 * CHUNK + 2);
		expect(await engine.run(tokens)).toBe(0);
		expect(await engine.run(tokens)).toBe(3 * CHUNK);
		expect(await engine.run(tokens, "tenant")).toBe(0);
		expect(await engine.kv.scheduler.resetCache()).toBe(true);
		expect(await engine.run(tokens)).toBe(0);
	});

	it("tells routers what is stored and what goes, in order and without gaps", async () => {
		const options = { modelName: "m", blockSize: BLOCK, chunkSize: CHUNK };
		const engine = await opened(await createConnector(native, options));
		await engine.run(range(0, 2 * CHUNK));
		await engine.kv.scheduler.resetCache();
		const told = [];
		while (told.length < 4) {
			told.push(...(engine.kv.scheduler.takeEvents()?.events ?? []));
			await setImmediate();
		}
		expect(told.map(({ sequence, kind }) => [sequence, kind])).toEqual([
			[1, "stored"],
			[2, "stored"],
			[3, "removed"],
			[4, "removed"],
		]);
		expect(told[1]?.parentChunkHash).toEqual(told[0]?.chunkHash);
		expect(engine.kv.scheduler.takeEvents()).toBeUndefined();
	});

	it("tells routers all that a cache stored that was started anew", async () => {
		const options = { modelName: "m", blockSize: BLOCK, chunkSize: CHUNK };
		const engine = await opened(await createConnector(native, options));
		const taken = async () => {
			let told = engine.kv.scheduler.takeEvents();
			while (told === undefined || told.events.length === 0) {
				await setImmediate();
				told = engine.kv.scheduler.takeEvents();
			}
			return told;
		};
		await engine.run(range(0, 2 * CHUNK));
		const first = await taken();
		// As after a restart: another log, which is longer already than what was read of the former one.
		const other = await Server.start({ listen: false, memory: 2 ** 22, chunkSize: CHUNK });
		open.push(other);
		engine.kv.via.events = (asked) => other.events(asked as EventsOptions);
		const second = await opened(new KvConnectors(other, options));
		await second.run(range(0, 4 * CHUNK));
		const told = await taken();
		expect(told.incarnation).not.toBe(first.incarnation);
		expect(told.events.map(({ sequence }) => sequence)).toEqual([1, 2, 3, 4]);
	});

	it("goes on without a server, says which one it misses, and joins it when it comes", async () => {
		const port = await freePort();
		const warnings: string[] = [];
		const onWarning = (text: string) => warnings.push(text);
		const options = { modelName: "m", blockSize: BLOCK, chunkSize: CHUNK, onWarning };
		const begin = performance.now();
		const engine = await opened(await createConnector(await lmcache(port), options));
		expect(performance.now() - begin).toBeLessThan(10_000);
		expect(warnings).toEqual([
			expect.stringMatching(new RegExp(`localhost:${port}.*npx kvferry serve --port ${port}`)),
		]);
		const tokens = range(0, 2 * CHUNK + 1);
		expect(await engine.run(tokens)).toBe(0);
		const server = await ServerProcess.start("--port", String(port), "--chunk-size", String(CHUNK));
		open.push(server);
		const { via } = engine.kv;
		while ("connected" in via && !via.connected) {
			await setImmediate();
		}
		expect(await engine.run(tokens)).toBe(0);
		expect(await engine.run(tokens)).toBe(2 * CHUNK);
	});

	it("hands stores of one process to another", async () => {
		const server = await ServerProcess.start("--chunk-size", String(CHUNK));
		open.push(server);
		const port = Number(new URL(server.url).port);
		const options = { modelName: "m", blockSize: BLOCK };
		const engines = await Promise.all(
			[0, 1].map(async () => opened(await createConnector(await lmcache(port), options))),
		);
		const tokens = range(0, 2 * CHUNK + 1);
		expect(await engines[0]?.run(tokens, "tenant")).toBe(0);
		expect(await engines[1]?.run(tokens, "tenant")).toBe(2 * CHUNK);
		expect(await engines[1]?.run(tokens)).toBe(0);
	});

	it("goes by the chunk size of a server that is there, and warns of another", async () => {
		const server = await ServerProcess.start("--chunk-size", String(CHUNK));
		open.push(server);
		const offloading = await lmcache(Number(server.port));
		const warnings: string[] = [];
		const options = {
			modelName: "m",
			blockSize: BLOCK,
			onWarning: (message: string) => warnings.push(message),
		};
		const kv = await createConnector(offloading, { ...options, chunkSize: CHUNK });
		await kv?.close();
		expect(warnings).toEqual([]);
		const other = await createConnector(offloading, { ...options, chunkSize: 64 });
		await other?.close();
		expect(warnings).toEqual([
			expect.stringMatching(/^chunkSize is 64, .* chunks of 16 .*--chunk-size 64$/),
		]);
	});

	it("refuses options that it does not know, for each connector", async () => {
		const engine = { modelName: "m", blocksize: BLOCK };
		for (const offloading of [native, await lmcache(1)]) {
			await expect(createConnector(offloading, engine)).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: 'createConnector has no option "blocksize": did you mean blockSize?',
			});
		}
	});

	it("says what an engine or a size lacks, and leaves nothing open", async () => {
		const engine = { modelName: "m", blockSize: 5, chunkSize: CHUNK };
		await expect(createConnector(native, engine)).rejects.toThrow(/blocks? of 5/);
		await expect(createConnector(native, { modelName: "m", workers: [] })).rejects.toThrow(
			/workers is empty/,
		);
		const of = (size: number, rank: number) => ParallelStrategy.tensorParallel(size, rank);
		for (const [workers, message] of [
			[[of(2, 0), of(2, 0)], /two workers have rank 0/],
			[[of(2, 0), of(4, 1)], /ranks of 2 and of 4/],
			[[{ rank: 0 }], /workers must be an array with a ParallelStrategy/],
		] as const) {
			const opening = createConnector(native, { modelName: "m", workers: workers as never });
			await expect(opening).rejects.toThrow(message);
		}
		const tiny = resolveOffloading({ kvOffloadingSize: 0 });
		await expect(createConnector(tiny, { modelName: "m" })).rejects.toThrow(
			/cpu_bytes_to_use is 0/,
		);
	});
});
