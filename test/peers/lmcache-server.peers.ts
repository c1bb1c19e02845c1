// Our client against LMCache's own server.

import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { text } from "node:stream/consumers";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { example, fetchModel, installEngine } from "../../scripts/engine.mjs";
import {
	Client,
	createConnector,
	ParallelStrategy,
	PrefixCache,
	type PrefixCacheOptions,
} from "../../ts/index.js";
import { BLOCK, Engine, lmcache as offloading, range } from "../connector/token-engine.js";
import { LmcacheServer } from "./programs.mjs";

const CHUNK = 16;
const BYTES = 100_000;
const SIZES = ["--chunk-size", String(CHUNK)];
const CLI = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));

function prompt(chunks: number, first = 0): Uint32Array {
	return Uint32Array.from({ length: chunks * CHUNK }, (_, at) => first + at);
}

function bytesOf(chunk: number): Uint8Array {
	return Uint8Array.from({ length: BYTES }, (_, at) => (at * 31 + chunk * 7) % 251);
}

async function doctor(url: string): Promise<{ code: number; told: string }> {
	const child = spawn(process.execPath, [CLI, "doctor", "--server", url], { stdio: "pipe" });
	const exit = once(child, "exit") as Promise<[number]>;
	const [told, [code]] = await Promise.all([text(child.stdout), exit]);
	return { code, told };
}

/** How many leading chunks are found, and that each is what was stored. */
async function hits(cache: PrefixCache, tokens: Uint32Array, cacheSalt = ""): Promise<number> {
	const hit = await cache.lookup(tokens, { cacheSalt });
	const loaded = await hit.load();
	expect(hit.failure).toBeUndefined();
	expect(loaded).toEqual(Array.from({ length: hit.chunks }, (_, chunk) => bytesOf(chunk)));
	return hit.chunks;
}

describe("LMCache's server with shared memory", () => {
	let server: LmcacheServer;

	beforeAll(async () => {
		server = await LmcacheServer.start([...LmcacheServer.SHARED, ...SIZES]);
	});

	afterAll(() => server?.[Symbol.asyncDispose]());

	async function opened(identity: string, options: Partial<PrefixCacheOptions> = {}) {
		const client = await Client.connect({ url: server.url });
		const cache = await PrefixCache.open({
			...{ via: client, identity, bytesPerChunk: BYTES },
			...options,
		});
		return {
			client,
			cache,
			async [Symbol.asyncDispose]() {
				await cache.close();
				await client.close();
			},
		};
	}

	it("hands what one process stored to another, by salt", async () => {
		const tokens = prompt(4, 10_000);
		{
			await using one = await opened("shared");
			const stored = await one.cache.store(tokens, bytesOf, { cacheSalt: "tenant" });
			expect(stored).toMatchObject({ storedChunks: 4 });
			expect(stored.failure).toBeUndefined();
		}
		await using other = await opened("shared");
		expect(await hits(other.cache, tokens, "tenant")).toBe(4);
		expect(await hits(other.cache, prompt(9, 10_000), "tenant")).toBe(4);
		expect(await hits(other.cache, tokens)).toBe(0);
		expect(await hits(other.cache, tokens, "another")).toBe(0);
		await using third = await opened("another model");
		expect(await hits(third.cache, tokens, "tenant")).toBe(0);
	});

	it("stores only what is missing", async () => {
		await using one = await opened("missing");
		await one.cache.store(prompt(2, 20_000), bytesOf);
		const stored = await one.cache.store(prompt(4, 20_000), bytesOf);
		expect(stored.storedChunks).toBe(2);
		expect(await hits(one.cache, prompt(4, 20_000))).toBe(4);
	});

	it("answers signs of life, and is emptied", async () => {
		await using one = await opened("cleared");
		await one.cache.store(prompt(2, 30_000), bytesOf);
		expect(await hits(one.cache, prompt(2, 30_000))).toBe(2);
		expect(await one.client.ping()).toBeGreaterThan(0);
		await one.client.clear();
		expect(await hits(one.cache, prompt(2, 30_000))).toBe(0);
		await one.cache.store(prompt(2, 30_000), bytesOf);
		expect(await hits(one.cache, prompt(2, 30_000))).toBe(2);
	});

	it("serves the workers of a tensor-parallel engine, each its part", async () => {
		const workers = [0, 1].map((rank) => ParallelStrategy.tensorParallel(2, rank));
		const options = { modelName: "tp 2", blockSize: BLOCK, workers };
		const connectors = async () => createConnector(await offloading(server.port), options);
		const tokens = range(40_000, 40_000 + 3 * CHUNK + 2);
		{
			await using one = await Engine.open(await connectors());
			expect(await one.run(tokens, "tenant")).toBe(0);
			expect(await one.run(tokens, "tenant")).toBe(3 * CHUNK);
		}
		await using other = await Engine.open(await connectors());
		expect(await other.run(tokens, "tenant")).toBe(3 * CHUNK);
		expect(await other.run(tokens)).toBe(0);
	});

	it("is told apart by the doctor", async () => {
		const { code, told } = await doctor(server.url);
		expect(told).toMatch(/LMCache/);
		expect(told).toMatch(/0\.5\.5 or 0\.5\.6/);
		expect(told).toMatch(/shared memory .*engine_driven/);
		expect(told).toMatch(new RegExp(`chunk size +${CHUNK} tokens`));
		expect(code).toBe(0);
	});

	it("keeps LlamaPrefixCache's prompts for the next process", async () => {
		installEngine();
		const model = await fetchModel();
		const ask = async (...cache: string[]) => {
			const args = ["engine.mjs", "--model", model, "--max-tokens", "8", ...cache];
			const { stdout } = await promisify(execFile)(process.execPath, args, { cwd: example });
			return JSON.parse(stdout) as { hit_tokens: number; response: string; failure?: string };
		};
		const cold = await ask("--url", server.url);
		const warm = await ask("--url", server.url);
		const control = await ask();
		expect(cold).toMatchObject({ hit_tokens: 0, response: control.response });
		expect(warm.hit_tokens).toBeGreaterThan(1000);
		expect(warm.response).toBe(control.response);
	}, 180_000);

	it("is missed while it is gone, and joined again when it is back", async () => {
		await using one = await opened("restart");
		await one.cache.store(prompt(2, 50_000), bytesOf);
		await server.end("SIGKILL");
		const missed = await one.cache.lookup(prompt(2, 50_000));
		expect(missed.chunks).toBe(0);
		expect(missed.failure?.code).toMatch(/UNREACHABLE|TIMEOUT/);
		const refused = await one.cache.store(prompt(2, 50_000), bytesOf);
		expect(refused).toMatchObject({ storedChunks: 0, failure: { code: "UNREACHABLE" } });
		server = await LmcacheServer.start([...LmcacheServer.SHARED, ...SIZES], server.port);
		await expect.poll(() => one.client.connected, { timeout: 20_000 }).toBe(true);
		expect(await hits(one.cache, prompt(2, 50_000))).toBe(0);
		expect((await one.cache.store(prompt(2, 50_000), bytesOf)).storedChunks).toBe(2);
		expect(await hits(one.cache, prompt(2, 50_000))).toBe(2);
	}, 300_000);

	it("cannot be used by another user, who is told why", async () => {
		if (process.getuid?.() !== 0) {
			process.stdout.write("SKIPPED a process of another user: only root can start one\n");
			return;
		}
		const program = `
			import { Client, PrefixCache } from ${JSON.stringify(new URL("../../dist/index.js", import.meta.url))};
			const via = await Client.connect({ url: ${JSON.stringify(server.url)} });
			const opening = PrefixCache.open({ via, identity: "another user", bytesPerChunk: 1000 });
			console.log(await opening.then(() => "opened", String));
			await via.close();`;
		const args = ["--input-type=module", "--eval", program];
		const user = { uid: 65_534, gid: 65_534, cwd: "/" };
		const { stdout } = await promisify(execFile)(process.execPath, args, user);
		expect(stdout).toMatch(
			/lmcache_l1_pool.*another user's: run the server and this process as one/,
		);
	});
});

describe("LMCache's server with a full pool", () => {
	it("stores in parts what fits, and nothing is said to be stored that is not found", async () => {
		// 1 GB; a chunk of 64 MB.
		await using server = await LmcacheServer.start([...LmcacheServer.SHARED, ...SIZES]);
		await using client = await Client.connect({ url: server.url });
		const bytesPerChunk = 64_000_000;
		await using cache = await PrefixCache.open({ via: client, identity: "full", bytesPerChunk });
		const chunk = new Uint8Array(bytesPerChunk).fill(7);
		let stored = 0;
		for (let round = 0; round < 3; round++) {
			const told = await cache.store(prompt(8, round * 100_000), () => chunk, {
				timeoutMs: 60_000,
			});
			expect(told.failure).toBeUndefined();
			await using hit = await cache.lookup(prompt(8, round * 100_000));
			expect(told.storedChunks).toBeLessThanOrEqual(hit.chunks);
			stored += told.storedChunks;
		}
		expect(stored).toBeGreaterThan(8);
	}, 300_000);
});

describe("LMCache's server as it is by default", () => {
	it("has no memory to map: what to start it with is said, and everything goes on without", async () => {
		await using server = await LmcacheServer.start(SIZES);
		const remedy = /--no-l1-use-lazy --shm-name NAME --supported-transfer-mode engine_driven/;
		await using client = await Client.connect({ url: server.url, timeoutMs: 2_000 });
		const opening = PrefixCache.open({
			...{ via: client, identity: "default", bytesPerChunk: BYTES },
			timeoutMs: 2_000,
		});
		await expect(opening).rejects.toThrow(remedy);
		const { code, told } = await doctor(server.url);
		expect(told).toMatch(remedy);
		expect(code).toBe(1);
	}, 300_000);
});
