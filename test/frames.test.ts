// Clients that cannot map the server's pool: the bytes go through the connection.

import { execFile } from "node:child_process";
import { closeSync, ftruncateSync, openSync, readFileSync, rmSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterEach, describe, expect, it } from "vitest";
import { Client, type ClientOptions, PrefixCache, type RequestOptions } from "../ts/index.js";
import { ServerProcess } from "./server-process.js";

const CLI = fileURLToPath(new URL("../dist/cli/main.js", import.meta.url));
/** More than a piece, and no whole number of them. */
const BYTES = 700_000;
const CHUNK = 16;

const open: AsyncDisposable[] = [];

afterEach(async () => {
	for (const one of open.splice(0).reverse()) {
		await one[Symbol.asyncDispose]();
	}
});

function use<T extends AsyncDisposable>(one: T): T {
	open.push(one);
	return one;
}

const tokens = (chunks: number) => Uint32Array.from({ length: chunks * CHUNK }, (_, at) => at);
const bytesOf = (chunk: number) => Uint8Array.from({ length: BYTES }, (_, at) => at * 7 + chunk);

async function serve(): Promise<ServerProcess> {
	return use(await ServerProcess.start("--chunk-size", String(CHUNK)));
}

async function cacheOf(url: string, options: ClientOptions = {}) {
	const client = use(await Client.connect({ url, ...options }));
	const cache = use(await PrefixCache.open({ via: client, identity: "m", bytesPerChunk: BYTES }));
	return { client, cache };
}

async function load(cache: PrefixCache, chunks: number, options: RequestOptions = {}) {
	await using hit = await cache.lookup(tokens(chunks), options);
	return { chunks: hit.chunks, loaded: await hit.load() };
}

/** Stores and loads eight chunks; other salts find none of them. */
async function roundTrip(writer: PrefixCache, reader: PrefixCache) {
	const salt = { cacheSalt: "tenant" };
	expect(await writer.store(tokens(8), bytesOf, salt)).toMatchObject({ storedChunks: 8 });
	const { loaded } = await load(reader, 8, salt);
	expect(loaded.length).toBe(8);
	for (const [chunk, bytes] of loaded.entries()) {
		expect(Buffer.compare(bytes, bytesOf(chunk))).toBe(0);
	}
	expect((await load(reader, 8)).chunks).toBe(0);
	expect((await load(reader, 8, { cacheSalt: "another" })).chunks).toBe(0);
}

describe("a client that asks for no shared memory", () => {
	it("stores and loads what others load and store", async () => {
		const server = await serve();
		const frames = await cacheOf(server.url, { sharedMemory: false });
		const mapped = await cacheOf(server.url);
		expect(frames.client.inFrames).toMatch(/not asked for/);
		expect(mapped.client.inFrames).toBeUndefined();
		await roundTrip(frames.cache, mapped.cache);
		await frames.client.clear();
		await roundTrip(mapped.cache, frames.cache);
	});

	it("misses when the server is killed, and goes on with the next one", async () => {
		const first = await serve();
		const { client, cache } = await cacheOf(first.url, { sharedMemory: false });
		await cache.store(tokens(8), bytesOf);
		const storing = cache.store(tokens(40), bytesOf);
		await first.kill();
		expect((await storing).storedChunks).toBe(0);
		expect((await load(cache, 8)).chunks).toBe(0);
		use(await ServerProcess.start("--chunk-size", String(CHUNK), "--port", first.port));
		await expect.poll(() => client.connected).toBe(true);
		await roundTrip(cache, cache);
		expect(client.inFrames).toBeDefined();
	});
});

describe("a client that does not reach the pool", () => {
	it("goes on in frames by itself, and doctor says why", async () => {
		const server = await serve();
		rmSync(`/dev/shm/${server.shmName}`); // as in another container
		const { client, cache } = await cacheOf(server.url);
		expect(client.inFrames).toMatch(/cannot open the server's pool/);
		await roundTrip(cache, cache);
		const run = promisify(execFile)(process.execPath, [CLI, "doctor", "--server", server.url]);
		expect((await run).stdout).toMatch(/note {5}bytes .*through the connection.*cannot open/);
	});

	it("does not take another's of the same name for it", async () => {
		const server = await serve();
		const path = `/dev/shm/${server.shmName}`;
		rmSync(path);
		const other = openSync(path, "wx", 0o600);
		try {
			ftruncateSync(other, 64 << 20);
			const { client, cache } = await cacheOf(server.url);
			expect(client.inFrames).toMatch(/is not the server's/);
			await roundTrip(cache, cache);
			expect(readFileSync(path).every((byte) => byte === 0)).toBe(true);
		} finally {
			closeSync(other);
			rmSync(path);
		}
	});
});
