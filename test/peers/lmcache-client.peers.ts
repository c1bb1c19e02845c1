// LMCache's own conformance run and its listener against our server.

import { describe, expect, it } from "vitest";
import { Client, chunkHashes, PrefixCache } from "../../ts/index.js";
import { ServerProcess } from "../server-process.js";
import { hasGpu, LmcacheListener, lmcache, lmcacheDriven } from "./programs.mjs";

describe("lmcache bench server", () => {
	it.each(["engine_driven", "lmcache_driven"])(
		"passes in the mode %s",
		async (mode) => {
			const port = 18_000 + (process.pid % 1000);
			await using server = await ServerProcess.start(
				...["--memory", "1GiB", "--chunk-size", "256", "--http-port", String(port)],
			);
			const requests = ["--start", "0", "--end", "8", "--interval", "0"];
			const urls = ["--rpc-url", server.url, "--url", `http://127.0.0.1:${port}`];
			const kind = ["--mode", "cpu", "--transfer-mode", mode];
			const told = await lmcache("bench", "server", ...kind, ...urls, ...requests);
			process.stdout.write(told);
			const count = (line: RegExp) => told.match(line)?.length ?? 0;
			expect(count(/cold\] STORE: stored \(512 tokens/g)).toBe(8);
			expect(count(/warm\] LOOKUP: 2\/2 chunks hit/g)).toBe(8);
			expect(count(/warm\] RETRIEVE: retrieved \(512 tokens/g)).toBe(8);
			// In the other mode it asks the server for checksums of the engine's memory, which ours does not serve.
			expect(count(/CHECKSUM MATCH OK/g)).toBe(mode === "engine_driven" ? 8 : 0);
		},
		300_000,
	);
});

describe("LMCache's client whose memory the server copies from and to", () => {
	it.each([
		{ mode: "cpu", args: ["--shape", "(2,1024,16,2,64):float16:4"] },
		{ mode: "gpu", args: [] },
		{ mode: "gpu", args: ["--isolated"] },
	] as const)(
		"gets back what it stored, and nothing else is written: $mode $args",
		async ({ mode, args }) => {
			if (mode === "gpu" && !(await hasGpu())) {
				process.stdout.write("SKIPPED: LMCache's torch finds no GPU here\n");
				return;
			}
			await using server = await ServerProcess.start("--memory", "1GiB", "--chunk-size", "256");
			const told = await lmcacheDriven(server.url, mode, "--rounds", "2", ...args);
			process.stdout.write(`${JSON.stringify(told)}\n`);
			expect(told.chunks).toBe(8);
		},
		300_000,
	);
});

it("LMCache's listener hears what is stored with its tokens, and what goes, but not of a tenant's", async () => {
	await using server = await ServerProcess.start("--memory", "1MiB", "--chunk-size", "16");
	const client = await Client.connect({ url: server.url });
	const cache = await PrefixCache.open({ via: client, identity: "model", bytesPerChunk: 4000 });
	const bytes = () => new Uint8Array(4000);
	const prompt = Uint32Array.from({ length: 32 }, (_, at) => at);
	await cache.store(
		Uint32Array.from(prompt, (token) => token + 900),
		bytes,
	); // tells the model's name
	const modelName = (await client.events()).events[0]?.modelName ?? "";
	await client.clear();
	await using listener = new LmcacheListener(server.url, modelName);
	expect(await listener.batch()).toMatchObject({ enabled: true });
	await cache.store(
		Uint32Array.from(prompt, (token) => token + 500),
		bytes,
		{ cacheSalt: "tenant" },
	);
	await cache.store(prompt, bytes);
	const [first, second] = [...chunkHashes(prompt, { chunkSize: 16 })].map((hash) =>
		Buffer.from(hash).toString("hex"),
	);
	expect(await listener.batch()).toEqual({
		enabled: true,
		lost: false,
		events: [
			{ kind: "stored", hashes: [first], parent: null, tokens: [...prompt.subarray(0, 16)] },
			{ kind: "stored", hashes: [second], parent: first, tokens: [...prompt.subarray(16)] },
		],
	});
	await client.clear();
	const { events } = await listener.batch();
	expect(events.map(({ kind }) => kind)).toEqual(["removed", "removed"]);
	expect(events.flatMap(({ hashes }) => hashes).toSorted()).toEqual([first, second].toSorted());
	listener.end();
	expect(await listener.answer()).toEqual({ ended: true, pong: true });
	await cache.close();
	await client.close();
}, 300_000);
