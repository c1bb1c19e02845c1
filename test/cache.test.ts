import { afterEach, describe, expect, it } from "vitest";
import { PrefixCache } from "../ts/cache.js";
import { Server } from "../ts/server.js";

const BYTES = 10_000;
const CHUNK = 16;

const open: AsyncDisposable[] = [];

afterEach(async () => {
	for (const handle of open.splice(0).reverse()) {
		await handle[Symbol.asyncDispose]();
	}
});

async function server(memory = 2 ** 22): Promise<Server> {
	const started = await Server.start({ listen: false, memory, chunkSize: CHUNK });
	open.push(started);
	return started;
}

async function cacheOf(via: Server, identity = "model"): Promise<PrefixCache> {
	const cache = await PrefixCache.open({ via, identity, bytesPerChunk: BYTES });
	open.push(cache);
	return cache;
}

/** `count` tokens that begin with `first`. */
function tokens(count: number, first = 0): Uint32Array {
	return Uint32Array.from({ length: count }, (_, at) => first + at);
}

function bytesOf(chunk: number): Uint8Array {
	return new Uint8Array(BYTES).fill(chunk + 1);
}

describe("PrefixCache in this process", () => {
	it("finds what was stored, for as many leading chunks as the prompts share", async () => {
		const cache = await cacheOf(await server());
		const stored = await cache.store(tokens(5 * CHUNK + 3), bytesOf);
		expect(stored).toEqual({ storedChunks: 5, refusedChunks: 0 });
		const other = tokens(5 * CHUNK);
		other[3 * CHUNK + 1] = 999;
		for (const [prompt, chunks] of [
			[tokens(5 * CHUNK + 3), 5],
			[tokens(9 * CHUNK), 5],
			[other, 3],
			[tokens(CHUNK - 1), 0],
			[new Uint32Array(0), 0],
			[tokens(5 * CHUNK, 1), 0],
		] as const) {
			const hit = await cache.lookup(prompt);
			expect(hit.chunks).toBe(chunks);
			const loaded = await hit.load();
			expect(loaded).toEqual(Array.from({ length: chunks }, (_, chunk) => bytesOf(chunk)));
		}
	});

	it("stores only what is missing", async () => {
		const cache = await cacheOf(await server());
		await cache.store(tokens(2 * CHUNK), bytesOf);
		const asked: number[] = [];
		const stored = await cache.store(tokens(4 * CHUNK), (chunk) => {
			asked.push(chunk);
			return bytesOf(chunk);
		});
		expect(asked).toEqual([2, 3]);
		expect(stored.storedChunks).toBe(2);
	});

	it("keeps identities and salts apart", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		await cache.store(tokens(CHUNK), bytesOf, { cacheSalt: "tenant-a" });
		const hits = async (of: PrefixCache, cacheSalt?: string | null) => {
			await using hit = await of.lookup(tokens(CHUNK), { cacheSalt });
			return hit.chunks;
		};
		expect(await hits(cache, "tenant-a")).toBe(1);
		expect(await hits(cache, "tenant-b")).toBe(0);
		expect(await hits(cache)).toBe(0);
		expect(await hits(cache, null)).toBe(0);
		expect(await hits(await cacheOf(store, "another model"), "tenant-a")).toBe(0);
		expect(await hits(await cacheOf(store), "tenant-a")).toBe(1);
	});

	it("stores the leading chunks of a prompt for which there is no room, and says so", async () => {
		const cache = await cacheOf(await server(4 * 12_288)); // 3 pages for each chunk
		const stored = await cache.store(tokens(6 * CHUNK), bytesOf);
		expect(stored).toEqual({ storedChunks: 4, refusedChunks: 2 });
		await using hit = await cache.lookup(tokens(6 * CHUNK));
		expect(hit.chunks).toBe(4);
	});

	it("stores nothing when the caller's function throws or gives other bytes", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		const prompt = tokens(2 * CHUNK);
		const failing = (chunk: number) => {
			if (chunk === 1) {
				throw new RangeError("no state");
			}
			return bytesOf(chunk);
		};
		await expect(cache.store(prompt, failing)).rejects.toThrow(RangeError);
		await expect(cache.store(prompt, () => new Uint8Array(BYTES - 1))).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringMatching(/chunk 0 has 9999 bytes.*10000/),
		});
		expect(store.status().used_bytes).toBe(0);
		expect((await cache.store(prompt, bytesOf)).storedChunks).toBe(2);
	});

	it("gives leases back when a hit is closed, loaded, or its lookup aborted", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		await cache.store(tokens(2 * CHUNK), bytesOf);
		const hit = await cache.lookup(tokens(2 * CHUNK));
		expect(store.status().leases).toBe(2);
		await hit.close();
		await hit.close();
		expect(store.status().leases).toBe(0);
		const aborted = new AbortController();
		const lookup = cache.lookup(tokens(2 * CHUNK), { signal: aborted.signal });
		aborted.abort(new Error("changed my mind"));
		await expect(lookup).rejects.toMatchObject({ code: "ABORTED" });
		await expect.poll(() => store.status().sessions).toBe(0);
		await (await cache.lookup(tokens(2 * CHUNK))).load();
		await expect
			.poll(() => store.status())
			.toMatchObject({ leases: 0, slots_reading: 0, sessions: 0 });
		await expect(hit.load()).rejects.toMatchObject({ code: "CLOSED" });
	});

	it("leaves no session of a prompt that is not stored", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		expect((await cache.lookup(tokens(2 * CHUNK))).chunks).toBe(0);
		expect(store.status().sessions).toBe(0);
	});

	it("gives room and leases back when its signal aborts in the middle, or before", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		const aborting = new AbortController();
		const { signal } = aborting;
		const abortAt1 = (chunk: number) => {
			if (chunk === 1) {
				aborting.abort();
			}
			return bytesOf(chunk);
		};
		const aborted = { code: "ABORTED" };
		await expect(cache.store(tokens(3 * CHUNK), abortAt1, { signal })).rejects.toMatchObject(
			aborted,
		);
		expect(store.status()).toMatchObject({ slots_writing: 0, objects: 0, used_bytes: 0 });
		await cache.store(tokens(3 * CHUNK), bytesOf);
		const hit = await cache.lookup(tokens(3 * CHUNK));
		await expect(hit.load(undefined, { signal })).rejects.toMatchObject(aborted);
		expect(store.status()).toMatchObject({ leases: 0, sessions: 0 });
		await expect(hit.load()).rejects.toMatchObject({ code: "CLOSED" });
	});

	it("says why a hit could not be loaded", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		await cache.store(tokens(CHUNK), bytesOf);
		const hit = await cache.lookup(tokens(CHUNK));
		await cache.close();
		expect(await hit.load()).toEqual([]);
		expect(hit.failure?.code).toBe("PROTOCOL");
	});

	it("refuses what it cannot use, by name", async () => {
		const cache = await cacheOf(await server());
		const detached = tokens(CHUNK);
		structuredClone(detached, { transfer: [detached.buffer as ArrayBuffer] });
		await expect(cache.lookup(detached)).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
		await expect(cache.lookup([1, 2] as never)).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
		for (const cacheSalt of ["a/b", "a@b", "x".repeat(129), "\ud800", 7 as never]) {
			await expect(cache.lookup(tokens(CHUNK), { cacheSalt })).rejects.toMatchObject({
				code: "INVALID_SALT",
			});
		}
		await expect(cache.lookup(tokens(CHUNK), { timeoutMs: 0 })).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
		});
		const misspelt = { cache_salt: "acme" } as object;
		for (const [of, call] of [
			["lookup", cache.lookup(tokens(CHUNK), misspelt)],
			["store", cache.store(tokens(CHUNK), bytesOf, misspelt)],
		] as const) {
			await expect(call).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: `${of} has no option "cache_salt": did you mean cacheSalt?`,
			});
		}
	});

	it("misses and stores nothing once its server was closed, and says so", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		await cache.store(tokens(CHUNK), bytesOf);
		await store.close();
		const hit = await cache.lookup(tokens(CHUNK));
		expect(hit).toMatchObject({ chunks: 0, failure: { code: "CLOSED" } });
		expect(await cache.store(tokens(2 * CHUNK), bytesOf)).toMatchObject({
			storedChunks: 0,
			failure: { code: "CLOSED", message: expect.stringContaining("server was closed") },
		});
	});

	it("ends with ABORTED, whatever its server is, when it was aborted before", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		const hit = await cache.lookup(tokens(CHUNK));
		await store.close();
		const signal = AbortSignal.abort();
		const aborted = expect.objectContaining({ code: "ABORTED" });
		await expect(cache.lookup(tokens(CHUNK), { signal })).rejects.toEqual(aborted);
		await expect(cache.store(tokens(CHUNK), bytesOf, { signal })).rejects.toEqual(aborted);
		await expect(hit.load(undefined, { signal })).rejects.toEqual(aborted);
	});

	it("refuses what is no function, before anything is used up", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		await expect(cache.store(tokens(CHUNK), undefined as never)).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringMatching(/^bytesOf is missing/),
		});
		await cache.store(tokens(CHUNK), bytesOf);
		const hit = await cache.lookup(tokens(CHUNK));
		await expect(hit.load({ timeoutMs: 1 } as never)).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringMatching(/^into is of type object: it must be a function/),
		});
		expect(await hit.load()).toHaveLength(1);
	});

	it("opens with no option that it does not know, and with nothing but a client or a server", async () => {
		const via = await server();
		const options = { via, identity: "m", bytesPerChunk: BYTES };
		const opening = (given: object) => PrefixCache.open({ ...options, ...given });
		for (const [given, message] of [
			[{ salt: "acme" }, 'PrefixCache.open has no option "salt": there are via, identity, '],
			[
				{ via: "tcp://127.0.0.1:5555" },
				'via is "tcp://127.0.0.1:5555": give await Client.connect(',
			],
			[{ via: Promise.resolve(via) }, "via is a promise, await it: "],
			[{ via: undefined }, "via is missing: "],
			[{ identity: "" }, "identity is empty"],
			[{ identity: new Uint8Array() }, "identity is empty"],
			[{ identity: "m\ud800" }, "identity has half of a surrogate pair"],
		] as const) {
			await expect(opening(given)).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
				message: expect.stringContaining(message),
			});
		}
	});

	it("is closed after close, and its server too", async () => {
		const store = await server();
		const cache = await cacheOf(store);
		await expect(cache.close({ timeoutMs: 0 })).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
		expect(store.status().instances).toBe(1);
		await cache.close();
		await cache.close();
		expect(store.status().instances).toBe(0);
		await expect(cache.lookup(tokens(CHUNK))).rejects.toMatchObject({ code: "CLOSED" });
		await store.close();
		await store.close();
		expect(() => store.status()).toThrowError(expect.objectContaining({ code: "CLOSED" }));
	});
});
