import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { setImmediate } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { afterEach, describe, expect, it } from "vitest";
import {
	Client,
	createSchedulerAdapter,
	createWorkerAdapter,
	PrefixCache,
	Server,
	WorkerConnector,
} from "../ts/index.js";
import {
	CHUNK,
	Engine,
	fill,
	held,
	range,
	received,
	run,
	sent,
	step,
	TOKENS,
} from "./connector/paged-engine.js";
import { ServerProcess } from "./server-process.js";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const BYTES = 10_000;

const open: AsyncDisposable[] = [];

afterEach(async () => {
	for (const handle of open.splice(0).reverse()) {
		await handle[Symbol.asyncDispose]();
	}
});

/** A directory that goes with the test. */
function directory(): string {
	const path = mkdtempSync(join(tmpdir(), "kvferry-disk-"));
	open.push({
		[Symbol.asyncDispose]: async () => rmSync(path, { recursive: true, force: true }),
	});
	return path;
}

async function server(disk: string): Promise<Server> {
	const started = await Server.start({ listen: false, memory: 2 ** 22, chunkSize: CHUNK, disk });
	open.push(started);
	return started;
}

async function cacheOf(via: Server): Promise<PrefixCache> {
	const cache = await PrefixCache.open({ via, identity: "model", bytesPerChunk: BYTES });
	open.push(cache);
	return cache;
}

function tokens(count: number): Uint32Array {
	return Uint32Array.from({ length: count }, (_, at) => at);
}

function bytesOf(chunk: number): Uint8Array {
	return new Uint8Array(BYTES).fill(chunk + 1);
}

/** The chunks that are read, each compared with what was stored. */
async function read(cache: PrefixCache, prompt: Uint32Array, cacheSalt?: string): Promise<number> {
	const loaded = await (await cache.lookup(prompt, { cacheSalt })).load();
	expect(loaded.every((bytes, chunk) => Buffer.compare(bytes, bytesOf(chunk)) === 0)).toBe(true);
	return loaded.length;
}

/** What a process prints that has a cache over a server with this disk. */
async function inProcess(disk: string, script: string): Promise<string> {
	const source = `
		import { PrefixCache, Server } from "${new URL("../dist/index.js", import.meta.url)}";
		const server = await Server.start({
			listen: false, memory: 2 ** 22, chunkSize: ${CHUNK}, disk: ${JSON.stringify(disk)},
		});
		const cache = await PrefixCache.open({ via: server, identity: "model", bytesPerChunk: ${BYTES} });
		const prompt = Uint32Array.from({ length: 5 * ${CHUNK} }, (_, at) => at);
		const bytesOf = (chunk) => new Uint8Array(${BYTES}).fill(chunk + 1);
		${script}
	`;
	const child = spawn(process.execPath, ["--input-type=module", "-e", source], {
		cwd: ROOT,
		timeout: 25_000,
		stdio: ["ignore", "pipe", "pipe"],
	});
	const exit = once(child, "exit") as Promise<[number | null]>;
	const [out, errors, [code]] = await Promise.all([text(child.stdout), text(child.stderr), exit]);
	expect({ code, errors }).toEqual({ code: 0, errors: "" });
	return out;
}

describe("a cache with a disk", () => {
	it("finds in a new process what another one stored before it closed", async () => {
		const disk = directory();
		const store = "console.log((await cache.store(prompt, bytesOf)).storedChunks);";
		expect(await inProcess(disk, `${store} await cache.close(); await server.close();`)).toBe(
			"5\n",
		);
		const load = `
			const loaded = await (await cache.lookup(prompt)).load();
			console.log(loaded.length, loaded.every((bytes, chunk) => bytes.every((byte) => byte === chunk + 1)));
		`;
		expect(await inProcess(disk, `${load} await server.close();`)).toBe("5 true\n");
		expect(await read(await cacheOf(await server(disk)), tokens(9 * CHUNK))).toBe(5);
	});

	it("writes what was pending when its server is closed", async () => {
		const disk = directory();
		const first = await server(disk);
		const cache = await cacheOf(first);
		const prompt = tokens(60 * CHUNK);
		await cache.store(prompt, bytesOf);
		await first.close(); // while the cache is open
		const second = await server(disk);
		expect(second.status()).toMatchObject({ disk_objects: 60, disk_queue_bytes: 0, objects: 0 });
		expect(await read(await cacheOf(second), prompt)).toBe(60);
		expect(second.status()).toMatchObject({ leases: 0, promoted_chunks: 60, disk_loads: 60 });
	});

	it("is closed for each who closes it only when all is written", async () => {
		const disk = directory();
		const first = await server(disk);
		await (await cacheOf(first)).store(tokens(60 * CHUNK), bytesOf);
		const order: string[] = [];
		const closing = first.close().then(() => order.push("first"));
		await first.close();
		order.push("second");
		const second = await server(disk); // the directory is free
		expect(second.status()).toMatchObject({ disk_objects: 60 });
		await closing;
		expect(order).toEqual(["first", "second"]);
	});

	it("counts hits by the tier that they came from", async () => {
		const disk = directory();
		const first = await server(disk);
		await (await cacheOf(first)).store(tokens(3 * CHUNK), bytesOf);
		await first.close();
		const second = await Server.start({
			port: 0,
			httpPort: 0,
			memory: 2 ** 22,
			chunkSize: CHUNK,
			disk,
		});
		open.push(second);
		const cache = await cacheOf(second);
		for (let time = 0; time < 2; time++) {
			expect(await read(cache, tokens(3 * CHUNK))).toBe(3);
		}
		const metrics = await (await fetch(`http://${second.httpAddress}/metrics`)).text();
		for (const [tier, of] of [
			["disk", "chunks"],
			["memory", "chunks"],
			["disk", "tokens"],
			["memory", "tokens"],
		]) {
			const hits = of === "chunks" ? 3 : 3 * CHUNK;
			expect(metrics).toContain(`\nkvferry_hit_${of}_total{tier="${tier}"} ${hits}\n`);
		}
	});

	it("finds what was stored under a salt under that one alone, also after a restart", async () => {
		const disk = directory();
		const first = await server(disk);
		await (await cacheOf(first)).store(tokens(2 * CHUNK), bytesOf, { cacheSalt: "tenant-a" });
		await first.close();
		const cache = await cacheOf(await server(disk));
		for (const salt of ["tenant-b", "", undefined]) {
			expect(await read(cache, tokens(2 * CHUNK), salt)).toBe(0);
		}
		expect(await read(cache, tokens(2 * CHUNK), "tenant-a")).toBe(2);
	});

	it("takes a damaged file for a miss, and what is computed anew is kept", async () => {
		const disk = directory();
		const first = await server(disk);
		await (await cacheOf(first)).store(tokens(4 * CHUNK), bytesOf);
		await first.close();
		const objects = join(disk, "objects");
		const files = readdirSync(objects).map((name) => join(objects, name));
		const third = files.find((path) => readFileSync(path).at(4096 + 5000) === 3) as string;
		const bytes = readFileSync(third);
		bytes[4096 + 5000] = 9;
		writeFileSync(third, bytes);
		const second = await server(disk);
		const cache = await cacheOf(second);
		expect(await read(cache, tokens(4 * CHUNK))).toBe(2);
		expect(second.status()).toMatchObject({ disk_damaged: 1 });
		const computed: number[] = [];
		await cache.store(tokens(4 * CHUNK), (chunk) => {
			computed.push(chunk);
			return bytesOf(chunk);
		});
		expect(computed).toEqual([2]);
		await second.close();
		expect(await read(await cacheOf(await server(disk)), tokens(4 * CHUNK))).toBe(4);
	});

	it("has its directory for itself", async () => {
		const disk = directory();
		const first = await server(disk);
		await expect(server(disk)).rejects.toMatchObject({
			code: "DISK_IN_USE",
			message: expect.stringContaining(disk),
		});
		const start = "Server.start({ listen: false, memory: 2 ** 22, disk })";
		const other = inProcess(
			directory(),
			`
			const disk = ${JSON.stringify(disk)};
			console.log(await ${start}.catch((error) => error.code));
		`,
		);
		expect(await other).toBe("DISK_IN_USE\n");
		await first.close();
		await server(disk);
	});
});

describe("a server with a disk", () => {
	it("gives paged engines after its restart what they stored before", async () => {
		const disk = directory();
		const start = (...port: string[]) =>
			ServerProcess.start("--disk", disk, "--chunk-size", String(CHUNK), ...port);
		const first = await start();
		const via = await Client.connect({ url: first.url });
		open.push(via);
		const engine = new Engine({ planes: "separate", kvLayout: "NHD" });
		const connector = new WorkerConnector({
			adapter: createWorkerAdapter({
				via,
				modelName: "m",
				verify: "always",
				saveTimeoutMs: 30_000,
			}),
		});
		open.push(connector);
		await connector.registerKvCaches(engine.caches, engine.layout);
		const [from, to] = [range(0, 12), [...range(13, 16), ...range(0, 9)]];
		fill(engine, from);
		await run(connector, step("STORE", from));
		await sent(connector, "r");
		await first[Symbol.asyncDispose]();

		open.push(await start("--port", first.port));
		const scheduler = createSchedulerAdapter({ via, modelName: "m" });
		const lookup = async (requestId: string, salt?: string) => {
			scheduler.maybeSubmitLookupRequest(requestId, TOKENS, { cacheSalt: salt });
			for (;;) {
				const found = scheduler.checkLookupResult(requestId);
				if (found !== null) {
					return found;
				}
				await setImmediate();
			}
		};
		let request = 0;
		// Less as long as it connects anew.
		await expect.poll(() => lookup(`r${++request}`), { timeout: 20_000 }).toBe(3 * CHUNK);
		for (const array of Object.values(engine.kv)) {
			array.fill(0);
		}
		await run(connector, step("RETRIEVE", to, { requestId: `r${request}` }));
		await received(connector, `r${request}`);
		expect(connector.getBlockIdsWithLoadErrors().size).toBe(0);
		expect(held(engine, to)).toEqual(range(0, 3 * CHUNK));
		expect(await lookup("another tenant's", "salt")).toBe(0);
		expect(await via.status()).toMatchObject({
			promoted_chunks: 3,
			disk_loads: 3,
			disk_damaged: 0,
		});
	});
});
