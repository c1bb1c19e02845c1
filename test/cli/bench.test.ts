// The built program.

import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { noRoom, storeWhole } from "../../ts/cli/bench.js";
import { Client, PrefixCache, Server } from "../../ts/index.js";
import { ServerProcess } from "../server-process.js";

const main = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));

async function bench(...args: string[]) {
	const child = spawn(process.execPath, [main, "bench", ...args], { stdio: "pipe" });
	const exit = once(child, "exit") as Promise<[number]>;
	const [out, err, [code]] = await Promise.all([text(child.stdout), text(child.stderr), exit]);
	return { code, out, err };
}

const SMALL = ["--size", "2MiB", "--chunk-bytes", "16KiB"];

describe("kvferry bench", () => {
	it("measures a server of its own, and prints a table", async () => {
		const { code, out, err } = await bench(...SMALL);
		expect([code, err]).toEqual([0, ""]);
		expect(out).toMatch(/^operation +count +half within +99 of 100 within +rate\n/);
		for (const operation of ["ping", "miss", "store", "lookup", "load"]) {
			expect(out).toMatch(new RegExp(`^${operation} +\\d+ +\\d+\\.\\d{3} ms`, "m"));
		}
		expect(out).toMatch(/^load +8 .*iB\/s$/m);
	});

	it("leaves a running server as it was", async () => {
		const disk = mkdtempSync(join(tmpdir(), "kvferry-bench-"));
		try {
			await using server = await Server.start({ port: 0, httpPort: 0, memory: 2 ** 23, disk });
			await using cache = await PrefixCache.open({ via: server, identity: "m", bytesPerChunk: 64 });
			await cache.store(new Uint32Array(512), () => new Uint8Array(64));
			const url = `tcp://${server.address}`;
			const where = ["--url", url, "--http", `http://${server.httpAddress}`];
			const { code, out, err } = await bench(...where, ...SMALL, "--json");
			expect([code, err]).toEqual([0, ""]);
			const told = JSON.parse(out);
			expect(told).toMatchObject({ url, bytes: 2 ** 21, chunkBytes: 2 ** 14, cleared: true });
			expect(told.rows.find((row: { operation: string }) => row.operation === "store")).toEqual({
				operation: "store",
				count: 8,
				p50Ms: expect.any(Number),
				p99Ms: expect.any(Number),
				bytesPerSecond: expect.any(Number),
			});
			await expect
				.poll(() => server.status())
				.toMatchObject({ objects: 2, disk_objects: 2, evicted_objects: 0, stored_chunks: 130 });
			const answer = await fetch(`http://${server.httpAddress}/status`);
			const { tenants } = (await answer.json()) as { tenants: object };
			expect(Object.keys(tenants)).toEqual(["none"]);

			const large = await bench(...where, "--size", "8MiB", "--chunk-bytes", "16KiB", "--json");
			expect(large.code).toBe(1);
			expect(JSON.parse(large.err).message).toMatch(/^--size 8 MiB: the server has .* free/);
			expect(server.status()).toMatchObject({ objects: 2, evicted_objects: 0 });
		} finally {
			rmSync(disk, { recursive: true, force: true });
		}
	});

	it("says how to remove what it could not", async () => {
		await using server = await Server.start({ port: 0, httpPort: 0, memory: 2 ** 23 });
		// Answers as the server, but clears nothing.
		const proxy = createServer(async (request, response) => {
			if (request.url === "/clear") {
				response.writeHead(503).end();
				return;
			}
			const answer = await fetch(`http://${server.httpAddress}${request.url}`);
			response.end(await answer.text());
			if (request.url === "/status") {
				child?.kill("SIGINT");
			}
		}).listen(0, "127.0.0.1");
		let child: ChildProcess | undefined;
		try {
			await once(proxy, "listening");
			const http = `http://127.0.0.1:${(proxy.address() as AddressInfo).port}`;
			const where = ["--url", `tcp://${server.address}`, "--http", http];
			const { code, err } = await bench(...where, ...SMALL);
			expect(code).toBe(1);
			expect(err).toMatch(
				/^PROTOCOL: .* answers 503.* could not be cleared .*still be there: curl /,
			);
			const [, body = ""] = /-d '(\{.*?\})'/.exec(err) ?? [];
			const headers = { "content-type": "application/json" };
			const clear = { method: "POST", headers, body };
			const removed = await fetch(`http://${server.httpAddress}/clear`, clear);
			expect(await removed.json()).toEqual({ cleared: 128 });

			child = spawn(process.execPath, [main, "bench", ...where, ...SMALL], { stdio: "pipe" });
			const told = await text(child.stderr as NodeJS.ReadableStream);
			expect(told).toMatch(/^ABORTED: stopped; it could not be cleared /);
		} finally {
			proxy.close();
		}
	});

	it("says which quota is too small, before it stores anything", async () => {
		await using server = await Server.start({ port: 0, httpPort: 0, memory: 2 ** 23 });
		const http = `http://${server.httpAddress}`;
		const quota = await fetch(`${http}/quotas/default`, {
			method: "PUT",
			headers: { "content-type": "application/json" },
			body: JSON.stringify({ cap: 2 ** 16 }),
		});
		expect(quota.ok).toBe(true);
		const { code, err } = await bench(
			...["--url", `tcp://${server.address}`, "--http", http],
			...SMALL,
		);
		expect(code).toBe(1);
		expect(err).toMatch(/^INVALID_ARGUMENT: --chunk-bytes 16 KiB: .*64 KiB.*kvferry quota/);
		expect(server.status().stored_chunks).toBe(0);
	});

	it("touches no server that it could not clear", async () => {
		await using server = await Server.start({ port: 0, memory: 2 ** 23 });
		const url = `tcp://${server.address}`;
		const { code, err } = await bench("--url", url, "--http", "http://127.0.0.1:1", ...SMALL);
		expect(code).toBe(1);
		expect(err).toMatch(/^UNREACHABLE: .*--http/);
		expect(server.status().stored_chunks).toBe(0);
	});

	it("touches no server when it is told another one's HTTP, which it would clear instead", async () => {
		await using server = await ServerProcess.start("--memory", "8MiB");
		await using other = await Server.start({ port: 0, httpPort: 0, memory: 2 ** 23 });
		const url = `tcp://127.0.0.1:${server.port}`;
		const { code, err } = await bench(
			"--url",
			url,
			"--http",
			`http://${other.httpAddress}`,
			...SMALL,
		);
		expect(code).toBe(1);
		expect(err).toMatch(
			/^INVALID_ARGUMENT: --http http:.* is process \d+, and --url tcp:.* process \d+/,
		);
		await using client = await Client.connect({ url });
		expect((await client.status()).stored_chunks).toBe(0);
	});

	it("refuses chunks of which there would be too many to wait for", async () => {
		const { code, err } = await bench("--size", "32MiB", "--chunk-bytes", "7");
		expect([code, err]).toEqual([
			1,
			expect.stringMatching(/^INVALID_ARGUMENT: --chunk-bytes 7: .*give 32 at least/),
		]);
	});
});

describe("a prompt of the benchmark", () => {
	const CHUNK = 16;
	const BYTES = 4000; // with its header a page
	const tokens = (first: number, chunks: number) =>
		Uint32Array.from({ length: chunks * CHUNK }, (_, at) => first + at);
	const content = new Uint8Array(BYTES);
	const embedded = () => Server.start({ listen: false, memory: 4 * 4096, chunkSize: CHUNK });
	const identity = { identity: "m", bytesPerChunk: BYTES };

	it("is stored whole when room was short for a moment", async () => {
		await using server = await embedded();
		await using cache = await PrefixCache.open({ via: server, ...identity });
		const busy = await cache.native.store(tokens(1000, 2), "", 5000); // two of four slots are being written
		const stored: number[] = [];
		const bytesOf = (chunk: number) => {
			stored.push(chunk);
			if (chunk === 1) {
				cache.native.abandon(busy, 5000);
			}
			return content;
		};
		expect(await storeWhole(cache, tokens(0, 4), bytesOf, { timeoutMs: 60_000 })).toBe(0);
		expect(stored).toEqual([0, 1, 2, 3]);
	});

	it("is given up when there is no room in time, and the rest is counted", async () => {
		await using server = await embedded();
		await using cache = await PrefixCache.open({ via: server, ...identity });
		expect(await storeWhole(cache, tokens(0, 6), () => content, { timeoutMs: 20 })).toBe(2);
	});

	it.each([
		["the memory is growing", 2 ** 26, 0, "TIMEOUT", /^1 of 16 .* 9 ms; .* 64 MiB of 528 MiB yet/],
		["it is full", 528 * 2 ** 20, 0, "TIMEOUT", /; all 528 MiB are used, or held by others/],
		["shared memory ran out", 2 ** 26, 1, "POOL_TOO_LARGE", /has 64 MiB of 528 MiB.*\/dev\/shm/],
	])("is given up with the reason: %s", (_, reserved, failed, code, message) => {
		const status = { pool_bytes: 528 * 2 ** 20, reserved_bytes: reserved, growth_failed: failed };
		expect(noRoom(1, status, 9)).toMatchObject({
			code,
			message: expect.stringMatching(message),
		});
	});

	it("tells why the cache failed, which is no want of room", async () => {
		await using server = await Server.start({ port: 0, memory: 2 ** 20, chunkSize: CHUNK });
		await using client = await Client.connect({ url: `tcp://${server.address}` });
		await using cache = await PrefixCache.open({ via: client, ...identity });
		await server.close();
		await expect(
			storeWhole(cache, tokens(0, 4), () => content, { timeoutMs: 2000 }),
		).rejects.toMatchObject({ code: expect.stringMatching(/^(UNREACHABLE|TIMEOUT)$/) });
	});
});
