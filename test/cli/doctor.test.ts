// The built program: what it finds wrong on servers where something is.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { checkDisk, checkMemory, checkRemote } from "../../ts/cli/doctor.js";
import { Client, PrefixCache, Server } from "../../ts/index.js";
import { LmcacheServer } from "../lmcache-server.js";

const MAIN = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));
const CHUNK = 16;
const BYTES = 4000; // with its header just below a page

interface Told {
	code: number;
	out: string;
	err: string;
}

async function doctor(stdin: string, ...args: string[]): Promise<Told> {
	const child = spawn(process.execPath, [MAIN, "doctor", ...args], { stdio: "pipe" });
	child.stdin.on("error", () => {}); // it need not read
	child.stdin.end(stdin);
	const exit = once(child, "exit") as Promise<[number]>;
	const [out, err, [code]] = await Promise.all([text(child.stdout), text(child.stderr), exit]);
	return { code, out, err };
}

function prompt(chunks: number, first = 0): Uint32Array {
	return Uint32Array.from({ length: chunks * CHUNK }, (_, at) => first + at);
}

describe("kvferry doctor", () => {
	let server: Server;
	let client: Client;
	let url: string;

	beforeAll(async () => {
		server = await Server.start({ port: 0, memory: 4 * 4096, chunkSize: CHUNK });
		url = `tcp://${server.address}`;
		client = await Client.connect({ url });
		const cache = await PrefixCache.open({ via: client, identity: "mine", bytesPerChunk: BYTES });
		const store = (tokens: Uint32Array, cacheSalt = "") =>
			cache.store(tokens, () => new Uint8Array(BYTES), { cacheSalt });
		await store(prompt(1, 900)); // makes room for the last one
		await store(prompt(2));
		await store(prompt(1, 500), "secret");
		await store(prompt(1, 700));
	});

	afterAll(async () => {
		await client.close();
		await server.close();
	});

	/** What is said of a prompt, one line for each check that is not ok. */
	async function ask(
		tokens: Uint32Array,
		...args: string[]
	): Promise<{ code: number; told: string }> {
		const of = args.includes("--model") ? args : ["--identity", "mine", ...args];
		const ids = JSON.stringify([...tokens]);
		const { code, out, err } = await doctor(ids, "--server", url, "--tokens", "-", ...of);
		expect(err).toBe("");
		const told = out.split("\n").filter((line) => line !== "" && !line.startsWith("ok "));
		return { code, told: told.join("\n") };
	}

	it("finds nothing wrong with a hit", async () => {
		expect(await ask(prompt(2))).toEqual({ code: 0, told: "" });
		expect(await ask(prompt(3).subarray(0, 2 * CHUNK + 3))).toEqual({ code: 0, told: "" });
	});

	it("finds nothing wrong with a server", async () => {
		const { code, out } = await doctor("", "--server", url, "--chunk-size", String(CHUNK));
		expect(code).toBe(0);
		expect(out).toMatch(/^ok +server +tcp:.* is kvferry \d+\.\d+\.\d+, process \d+, up \d+ s\.\n/);
		expect(out).toMatch(/\nok +chunk size +16 tokens\.\n/);
		expect(out).toMatch(/\nok +hashing +.*blake3/);
		expect(out).toMatch(/\nok +memory +/);
	});

	it.each<[string, Uint32Array, string[], RegExp]>([
		[
			"what was never stored",
			prompt(3),
			[],
			/2 of 3 .*chunk 2 \(tokens 32 to 47\)[\s\S]*never stored/,
		],
		[
			"what was evicted",
			prompt(1, 900),
			[],
			/0 of 1[\s\S]*evicted at \d{4}-\d\d-\d\dT.* what the same tenant stored/,
		],
		["another salt", prompt(2), ["--salt", "x"], /under another salt \(1 of them\)/],
		["no salt", prompt(1, 500), [], /under another salt \(1 of them\)/],
		[
			"another model",
			prompt(2),
			["--model", "m"],
			/note.*No engine.* for model m [\s\S]*another model \(the identity whose SHA-256 begins with [0-9a-f]{12}\), not for m:/,
		],
		["another chunk size", prompt(2), ["--chunk-size", "256"], /have 16 tokens, not 256/],
		["another algorithm", prompt(2), ["--hash-algorithm", "sha256_cbor"], /blake3.*sha256_cbor/],
		["another seed", prompt(2), ["--hash-seed", "7"], /blake3 with seed 0.*seed 7/],
		["a short prompt", prompt(1).subarray(1), [], /15 tokens, fewer than one chunk of 16/],
	])("finds %s", async (_, tokens, args, words) => {
		const { code, told } = await ask(tokens, ...args);
		expect(told).toMatch(words);
		expect(told).not.toContain("secret");
		expect(code).toBe(1);
	});

	it("tells the same as one JSON object", async () => {
		const args = ["--server", url, "--tokens", "-", "--identity", "mine", "--json"];
		const { code, out, err } = await doctor([...prompt(1, 900)].join(" "), ...args);
		expect([code, err]).toEqual([1, ""]);
		const told = JSON.parse(out);
		expect(told).toMatchObject({
			url,
			healthy: false,
			explanation: { chunks: 1, hitChunks: 0, missing: { removed: { cause: "evicted" } } },
		});
		expect(told.checks).toContainEqual({
			check: "prompt",
			result: "finding",
			message: expect.stringContaining("evicted"),
		});
		const hit = await doctor([...prompt(2)].join(" "), ...args);
		expect([hit.code, JSON.parse(hit.out).healthy]).toEqual([0, true]);
	});

	it("takes no lease", async () => {
		await ask(prompt(2));
		expect(await client.status()).toMatchObject({ leases: 0, sessions: 0, lookups: 0 });
	});

	it("says what to start when no server is there", async () => {
		const { code, out, err } = await doctor("", "--server", "tcp://127.0.0.1:1", "--json");
		expect([code, err]).toEqual([1, ""]);
		const { healthy, checks } = JSON.parse(out);
		expect([healthy, checks.length]).toEqual([false, 1]);
		expect(checks[0].message).toMatch(/127\.0\.0\.1:1.*npx kvferry serve/);
	});

	it("tells its own errors on stderr", async () => {
		const { code, out, err } = await doctor("1 2 x", "--tokens", "-", "--model", "m");
		expect([code, out]).toEqual([1, ""]);
		expect(err).toMatch(/^INVALID_TOKEN: .*token 2/);
	});
});

describe("kvferry doctor at a server with tenants and a disk", () => {
	it("tells by whose store a chunk was evicted, as figures call the tenant", async () => {
		const options = { port: 0, httpPort: 0, memory: 2 * 4096, chunkSize: CHUNK };
		await using server = await Server.start(options);
		await using client = await Client.connect({ url: `tcp://${server.address}` });
		await using cache = await PrefixCache.open({
			via: client,
			identity: "mine",
			bytesPerChunk: BYTES,
		});
		await cache.store(prompt(2), () => new Uint8Array(BYTES), { cacheSalt: "victim" });
		await cache.store(prompt(2), () => new Uint8Array(BYTES), { cacheSalt: "greedy" });
		const answer = await fetch(`http://${server.httpAddress}/status`);
		const { tenants } = (await answer.json()) as { tenants: object };
		const [greedy] = Object.keys(tenants);
		const of = ["--identity", "mine", "--salt", "victim"];
		const where = ["--server", `tcp://${server.address}`, "--tokens", "-"];
		const { code, out } = await doctor([...prompt(2)].join(" "), ...where, ...of);
		expect(code).toBe(1);
		expect(out).toMatch(new RegExp(`evicted at .* what the tenant ${greedy} stored`));
		expect(out).not.toContain("greedy");
	});

	it("tells what came faster than the memory grows", () => {
		const status = { pool_bytes: 2 ** 30, reserved_bytes: 2 ** 27, refused_growing_chunks: 7 };
		expect(checkMemory(status)).toEqual([
			{
				check: "memory",
				result: "ok",
				message: expect.stringMatching(
					/refused for want of room: 0, and 7 that came faster than the memory grows: 128\.0 MiB of it are reserved yet\.$/,
				),
			},
		]);
		expect(checkMemory({ pool_bytes: 1 })[0]?.message).toMatch(/for want of room: 0\.$/);
	});

	it("finds that saves fail: more than are written, or just now", () => {
		const remote = { remote_failure: "", remote_saves: 100, remote_save_failures: 7 };
		expect(checkRemote(remote)).toMatchObject([
			{ result: "note", message: expect.stringMatching(/since the start: 7 saves failed\.$/) },
		]);
		expect(checkRemote(remote, { ...remote, remote_save_failures: 9 })).toMatchObject([
			{
				result: "finding",
				message: expect.stringMatching(/^Saves fail: 9 since the start, 2 of them .*noeviction/),
			},
		]);
		expect(checkRemote({ ...remote, remote_dropped_failed: 100 })).toMatchObject([
			{ result: "finding" },
		]);
	});

	it("tells that a disk has less room than it was given", () => {
		const disk = { disk_bytes: 24 * 2 ** 20, disk_bound_bytes: 2 ** 30, disk_objects: 1 };
		expect(checkDisk(disk)).toMatchObject([
			{ result: "ok" },
			{ result: "note", message: expect.stringMatching(/^It may hold 24 MiB of 1 GiB: /) },
		]);
		expect(checkDisk({ ...disk, disk_bytes: 2 ** 30 })).toHaveLength(1);
		expect(checkDisk({ disk_bytes: 1, disk_objects: 0 })).toHaveLength(1); // a server of before
	});

	it("tells which tier failed", async () => {
		const disk = mkdtempSync(join(tmpdir(), "kvferry-doctor-"));
		try {
			const server = await Server.start({ port: 0, memory: 2 ** 20, chunkSize: CHUNK, disk });
			await using _ = server;
			const where = ["--server", `tcp://${server.address}`];
			const works = await doctor("", ...where);
			expect([works.code, works.out]).toEqual([0, expect.stringMatching(/^ok +disk +It works/m)]);
			rmSync(join(disk, "objects"), { recursive: true });
			writeFileSync(join(disk, "objects"), "in the way");
			await using cache = await PrefixCache.open({
				via: server,
				identity: "mine",
				bytesPerChunk: BYTES,
			});
			await cache.store(prompt(1), () => new Uint8Array(BYTES));
			await expect.poll(() => server.status().disk_save_failures).toBeGreaterThan(0);
			const failed = await doctor("", ...where);
			expect(failed.out).toMatch(/^finding +disk +The disk tier failed .*objects/m);
			expect(failed.out).toMatch(/^ok +memory /m);
			expect(failed.code).toBe(1);
		} finally {
			rmSync(disk, { recursive: true, force: true });
		}
	});

	it("tells of a remote that never answered", async () => {
		const remote = "redis://127.0.0.1:1/0";
		await using server = await Server.start({ port: 0, memory: 2 ** 20, chunkSize: CHUNK, remote });
		const url = `tcp://${server.address}`;
		await using client = await Client.connect({ url });
		await expect.poll(async () => (await client.status()).remote_failure).toMatch(/./);
		const { code, out } = await doctor("", "--server", url);
		expect(out).toMatch(/^finding +remote +The remote tier failed and takes nothing just now: /m);
		expect(code).toBe(1);
	});
});

describe("kvferry doctor at LMCache's server", () => {
	it.each([
		[2, 0],
		[1, 1],
	])("tells what can be known: %i of 2 chunks", async (hits, expected) => {
		const name = `kvferry-doctor-${process.pid}`;
		writeFileSync(`/dev/shm/${name}`, new Uint8Array(64));
		await using lmcache = await LmcacheServer.start(CHUNK, hits, { name, bytes: 64 });
		const args = ["--server", lmcache.url, "--tokens", "-", "--model", "m"];
		const { code, out, err } = await doctor([...prompt(2)].join(" "), ...args);
		rmSync(`/dev/shm/${name}`);
		expect([code, err]).toEqual([expected, ""]);
		expect(out).toMatch(/^note +server +.*LMCache 0\.5\.5 or 0\.5\.6/);
		expect(out).toMatch(
			/\nok +bytes +They go through shared memory \(LMCache's engine_driven mode\)\.\n/,
		);
		expect(out).toMatch(/\nok +chunk size +16 tokens\.\n/);
		expect(out).toMatch(/\nnote +hashing +LMCache's server does not tell its --hash-algorithm/);
		expect(out).toMatch(hits === 2 ? /All 2 whole chunks/ : /finds 1 of 2.*does not tell/);
		expect(lmcache.lookups).toBe(1);
		expect(lmcache.asked).toContain(12); // free_lookup_locks: its leases are given back
	});

	it("says what a server has to be started with whose memory cannot be mapped", async () => {
		await using lmcache = await LmcacheServer.start(CHUNK, 0);
		const { code, out } = await doctor("", "--server", lmcache.url);
		expect(out).toMatch(/^finding +bytes .*--no-l1-use-lazy --shm-name NAME/m);
		expect(code).toBe(1);
	});
});
