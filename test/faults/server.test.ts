import { type ChildProcess, fork } from "node:child_process";
import { once } from "node:events";
import { closeSync, openSync, readFileSync, writeSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { afterEach, describe, expect, it } from "vitest";
import { Client, PrefixCache } from "../../ts/index.js";
import { ServerProcess } from "../server-process.js";
import { payload, tokens } from "./prompts.mjs";

const BYTES = 100_000;
const CHUNK = 64;
const WORKER = fileURLToPath(new URL("worker.mjs", import.meta.url));

const open: AsyncDisposable[] = [];

afterEach(async () => {
	for (const handle of open.splice(0).reverse()) {
		await handle[Symbol.asyncDispose]();
	}
});

function use<T extends AsyncDisposable>(handle: T): T {
	open.push(handle);
	return handle;
}

async function serve(...args: string[]): Promise<ServerProcess> {
	return use(await ServerProcess.start("--chunk-size", String(CHUNK), ...args));
}

async function engine(server: ServerProcess) {
	const client = use(await Client.connect({ url: server.url }));
	const cache = use(
		await PrefixCache.open({ via: client, identity: "faults", bytesPerChunk: BYTES }),
	);
	const store = (first: number, chunks: number) =>
		cache.store(tokens(CHUNK, first, chunks), (chunk) => payload(first, chunk, BYTES));
	/** Loads what is stored of a prompt, checks every byte, and counts the chunks. */
	const load = async (first: number, chunks: number) => {
		const hit = await cache.lookup(tokens(CHUNK, first, chunks));
		const loaded = await hit.load();
		for (const [chunk, bytes] of loaded.entries()) {
			expect(Buffer.compare(bytes, payload(first, chunk, BYTES)), `chunk ${chunk}`).toBe(0);
		}
		return loaded.length;
	};
	return { client, cache, store, load };
}

/** An engine in another process. */
async function worker(server: ServerProcess) {
	const child = fork(WORKER, [server.url, String(BYTES)], {
		stdio: ["pipe", "inherit", "inherit", "ipc"],
	});
	use({
		async [Symbol.asyncDispose]() {
			child.kill("SIGCONT");
			child.kill("SIGTERM");
			if (child.exitCode === null && child.signalCode === null) {
				await once(child, "exit");
			}
		},
	});
	await once(child, "message");
	return child;
}

async function ask(child: ChildProcess, message: object): Promise<Record<string, unknown>> {
	const answer = once(child, "message");
	child.send(message);
	return (await answer)[0] as Record<string, unknown>;
}

describe("a server that dies", () => {
	it("during a store: nothing is stored, the engine is told in time and goes on", async () => {
		const server = await serve();
		const { cache, load } = await engine(server);
		const prompt = tokens(CHUNK, 1, 4);
		const stored = await cache.store(
			prompt,
			(chunk) => {
				if (chunk === 2) {
					server.signal("SIGKILL");
				}
				return payload(1, chunk, BYTES);
			},
			{ timeoutMs: 2_000 },
		);
		expect(stored.storedChunks).toBe(0);
		expect(stored.failure?.code).toMatch(/^(UNREACHABLE|TIMEOUT)$/);
		expect(await load(1, 4)).toBe(0);
	});

	it("during a lookup: a miss, with the reason", async () => {
		const server = await serve();
		const { cache, store } = await engine(server);
		await store(1, 4);
		await server.stop();
		const lookup = cache.lookup(tokens(CHUNK, 1, 4), { timeoutMs: 10_000 });
		await server.kill();
		const hit = await lookup;
		expect(hit.chunks).toBe(0);
		expect(hit.failure?.code).toBe("UNREACHABLE");
	});

	it("during a load: what was read is right, or not given", async () => {
		const server = await serve();
		const { cache, store } = await engine(server);
		await store(1, 4);
		const hit = await cache.lookup(tokens(CHUNK, 1, 4));
		expect(hit.chunks).toBe(4);
		const loaded = await hit.load((chunk) => {
			if (chunk === 1) {
				server.signal("SIGKILL");
			}
			return new Uint8Array(BYTES);
		});
		for (const [chunk, bytes] of loaded.entries()) {
			expect(Buffer.compare(bytes, payload(1, chunk, BYTES))).toBe(0);
		}
	});

	it("is joined again when it is back on the same port, with its new memory", async () => {
		const first = await serve();
		const { client, store, load } = await engine(first);
		await store(1, 4);
		await first.kill();
		expect(await load(1, 4)).toBe(0);
		await serve("--port", first.port);
		await expect.poll(() => client.ping().catch(() => -1), { timeout: 10_000 }).toBeGreaterThan(0);
		expect(await load(1, 4)).toBe(0);
		expect((await store(1, 4)).storedChunks).toBe(4);
		expect(await load(1, 4)).toBe(4);
	});
});

describe("a server that is silent", () => {
	it("is a miss at the deadline, and is used again when it answers", async () => {
		const server = await serve();
		const { cache, client, store, load } = await engine(server);
		await store(1, 2);
		await server.stop();
		const prompt = tokens(CHUNK, 1, 2);
		expect((await cache.lookup(prompt, { timeoutMs: 300 })).failure?.code).toBe("TIMEOUT");
		const stored = await cache.store(prompt, () => new Uint8Array(BYTES), { timeoutMs: 300 });
		expect(stored.failure?.code).toMatch(/^(UNREACHABLE|TIMEOUT)$/);
		server.signal("SIGCONT");
		await expect.poll(() => client.ping().catch(() => -1), { timeout: 10_000 }).toBeGreaterThan(0);
		expect(await load(1, 2)).toBe(2);
		await expect.poll(async () => (await client.status()).sessions).toBe(0);
	});
});

describe("bytes in the pool that change", () => {
	it("are a miss and are never given to the engine", async () => {
		const server = await serve();
		const { cache, client, store, load } = await engine(server);
		await store(1, 3);
		const path = `/dev/shm/${server.shmName}`;
		const at = readFileSync(path).indexOf("prompt 1 chunk 1;");
		const pool = openSync(path, "r+");
		writeSync(pool, "P", at);
		closeSync(pool);
		const hit = await cache.lookup(tokens(CHUNK, 1, 3));
		expect(hit.chunks).toBe(3);
		const loaded = await hit.load();
		expect(loaded.length, "the chunk before it is good, those after it have no prefix").toBe(1);
		await expect.poll(() => client.status()).toMatchObject({ damaged_chunks: 1 });
		expect(cache.damagedChunks).toBe(1);
		expect((await store(1, 3)).storedChunks, "it is stored anew").toBe(1);
		expect(await load(1, 3)).toBe(3);
	});
});

describe("another tenant's salt", () => {
	it("misses what is stored, in both directions", async () => {
		const { cache } = await engine(await serve());
		const prompt = tokens(CHUNK, 1, 3);
		const bytesOf = (chunk: number) => payload(1, chunk, BYTES);
		await cache.store(prompt, bytesOf, { cacheSalt: "tenant-a" });
		for (const [cacheSalt, chunks] of [
			["tenant-a", 3],
			["tenant-b", 0],
			["", 0],
		] as const) {
			await using hit = await cache.lookup(prompt, { cacheSalt });
			expect(hit.chunks, cacheSalt).toBe(chunks);
		}
		expect((await cache.store(prompt, bytesOf)).storedChunks, "none is shared").toBe(3);
	});
});

describe("a full pool", () => {
	it("drops what was used longest ago, and takes nothing while all of it is held", async () => {
		const server = await serve("--memory", "1MiB"); // 10 chunks of 25 pages
		const { cache, store, load, client } = await engine(server);
		await store(1, 6);
		await store(2, 4);
		expect(await load(1, 6)).toBe(6);
		expect((await store(3, 4)).storedChunks).toBe(4);
		expect(await load(2, 4)).toBe(0);
		expect(await load(1, 6)).toBe(6);
		const held = [tokens(CHUNK, 1, 6), tokens(CHUNK, 3, 4)].map((prompt) => cache.lookup(prompt));
		const hits = await Promise.all(held);
		expect(await store(4, 2)).toEqual({ storedChunks: 0, refusedChunks: 2 });
		expect(await client.status()).toMatchObject({ refused_chunks: 2, leases: 10 });
		for (const hit of hits) {
			await hit.close();
		}
		expect((await store(4, 2)).storedChunks).toBe(2);
	});
});

describe("starting a server", () => {
	it("with more memory than shared memory has is an error with both sizes and a remedy", async () => {
		const starting = ServerProcess.start("--memory", "8TiB");
		await expect(starting).rejects.toThrow(/POOL_TOO_LARGE.*8796093022208.*\d+ free.*shm-size/s);
	});

	it("twice on one port or one segment is an error, and the first goes on", async () => {
		const server = await serve("--shm-name", `faults-${process.pid}`);
		const { store, load } = await engine(server);
		await store(1, 2);
		await expect(ServerProcess.start("--port", server.port)).rejects.toThrow(/ADDRESS_IN_USE/);
		const same = ServerProcess.start("--shm-name", `faults-${process.pid}`);
		await expect(same).rejects.toThrow(/POOL_IN_USE/);
		expect(await load(1, 2)).toBe(2);
	});

	it("over the segment of a killed one replaces it", async () => {
		const name = `faults-stale-${process.pid}`;
		const killed = await serve("--shm-name", name);
		await killed.kill();
		expect(readFileSync(`/dev/shm/${killed.shmName}`).length).toBe(64 * 2 ** 20);
		const { store, load } = await engine(await serve("--shm-name", name));
		await store(1, 2);
		expect(await load(1, 2)).toBe(2);
	});
});

describe("several engines", () => {
	it("that store the same prompts at once store each chunk once, and all of it is right", async () => {
		const server = await serve();
		const workers = await Promise.all([worker(server), worker(server)]);
		let stored = 0;
		for (let first = 1; first <= 20; first++) {
			const results = await Promise.all(workers.map((one) => ask(one, { first, chunks: 3 })));
			stored += results.reduce((sum, result) => sum + Number(result.storedChunks), 0);
		}
		expect(stored).toBe(60);
		const { load } = await engine(server);
		for (let first = 1; first <= 20; first++) {
			expect(await load(first, 3)).toBe(3);
		}
	});

	it("keep the slots of one that was killed in mid-copy from nobody", async () => {
		const server = await serve("--memory", "1MiB");
		const killed = await worker(server);
		expect(await ask(killed, { first: 1, chunks: 10, holdAt: 5 })).toEqual({ held: true });
		const { client, store, load } = await engine(server);
		expect(await client.status()).toMatchObject({ slots_writing: 10 });
		killed.kill("SIGKILL");
		await expect.poll(async () => (await client.status()).slots_writing).toBe(0);
		expect(await load(1, 10)).toBe(0);
		expect((await store(2, 10)).storedChunks).toBe(10);
		expect(await load(2, 10)).toBe(10);
	});
});
